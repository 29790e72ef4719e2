"""course.py and first_hour.py: a student's copy without answers, its checks, the key."""

import ast
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import bugs
import course
import differences
import first_hour
from conftest import ROOT

NAMES = ("masked_mean", "cross_modal_attention", "SqueezeExcitation.gates", "ContextConv.forward",
         "TransformerBlock.forward", "unweighted_accuracy", "split", "Patience.step", "batch")  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "copy"
    course.student(folder)
    return folder


def test_a_students_copy_holds_no_answer(copy):
    everything = "\n".join(p.read_text() for p in copy.rglob("*") if p.suffix in (".py", ".md"))
    for answer in (  # a line of each of the nine bodies, and of what only teachers may read
        "x.masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=1) / n_steps",
        "q @ k.transpose(1, 2) / math.sqrt(w_k.shape[1])",
        "hidden = torch.relu(self.reduce(z))",
        "x = self.conv(x).squeeze(1)",
        "x = x_t + self.dropout(x) if self.residual else self.dropout(x)",
        "counts.diagonal()[size > 0] / size[size > 0]",
        "train = [u for u in rest if u.speaker != dev_speaker]",
        "if dev_loss < self.best * (1 - self.min_decrease):",
        "windows[rows].unique(return_inverse=True)",
        "Say the larger class every time", "PACKED = ",
    ):  # fmt: skip
        assert answer not in everything, answer
    code = "\n".join((copy / name).read_text() for name in course.FILES)
    assert len(re.findall(r"exercise \d, [\w.]+, is yours to write first", code)) == 9
    assert "delete the body" not in code
    page = (copy / "tests" / "COURSE.md").read_text()
    assert "## Exercises" in page and not any(title in page for title in course.OURS)
    whole = (ROOT / "tests" / "COURSE.md").read_text()
    assert all(title in whole for title in course.OURS)
    for name in course.FILES:  # all of them compile, and every docstring is there
        old, new = (root.joinpath(name).read_text() for root in (ROOT, copy))
        compile(new, name, "exec")
        documented = [[ast.get_docstring(node) for node in ast.walk(ast.parse(text))
                       if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                       and ast.get_docstring(node)] for text in (old, new)]  # fmt: skip
        assert documented[0] == documented[1]
        assert set(re.findall(r"\[[ADE]\d+\]", old)) == set(re.findall(r"\[[ADE]\d+\]", new))


def test_in_a_copy_a_command_names_the_exercise_that_it_waits_for(copy, monkeypatch):
    done = subprocess.run([sys.executable, "tests/first_hour.py"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "exercise 1, masked_mean, is yours to write first\n"
    monkeypatch.setattr(course, "ROOT", copy)
    with pytest.raises(SystemExit, match="made from the repository"):
        course.key(copy / "key.md")
    assert "row sums" in (copy / "tests" / "first_hour.txt").read_text()


def test_a_copy_is_never_written_over_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit, match="not empty"):
        course.student(tmp_path)


def test_verdicts_of_an_empty_and_a_whole_copy(copy, capsys):
    for n, verdict in enumerate(course.verdicts(copy), 1):
        needs = {3: "after exercise 1", 5: "after exercise 2"}
        assert verdict.startswith(needs.get(n, f"exercise {n}, ")), verdict

    assert course.check([ROOT])
    rows = re.findall(r"^\| (\d) \| ([\w.]+) \| (.*) \|$", capsys.readouterr().out, re.MULTILINE)
    assert rows == [(str(n), name, "passed") for n, name in enumerate(NAMES, 1)]


@pytest.mark.slow
def test_an_answer_that_never_ends_or_does_not_compile_has_a_verdict(copy):
    path = copy / "model.py"
    empty = path.read_text()
    first = '    raise SystemExit("exercise 1, masked_mean, is yours to write first")'
    second = '    raise SystemExit("exercise 2, cross_modal_attention, is yours to write first")'
    assert first in empty and second in empty
    half = empty.replace(first, "    return x.mean(1)").replace(second, "    while True:\n        pass")
    path.write_text(half)
    found = course.verdicts(copy, seconds=12)
    assert found[0].startswith("does padding count") and found[1].startswith("it does not end")
    assert len(found) == 9 and found[8] == "not reached"
    path.write_text(empty + "\ndef (\n")
    assert all("SyntaxError" in verdict for verdict in course.verdicts(copy)[5:])
    path.write_text(empty)


def test_the_key_holds_every_answer(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tests" / "course.py", "key", tmp_path / "key.md"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    key = (tmp_path / "key.md").read_text()
    assert sorted(re.findall(r"^\*\*(\d)\. `", key, re.MULTILINE)) == list("123456789")
    assert all(what in key for what in bugs.BUGS) and "n_steps = mask.sum" in key
    questions = re.findall(r"^(\d)\. ", (ROOT / "tests" / "COURSE.md").read_text(), re.MULTILINE)
    assert set("012345") <= set(questions)
    for n in "012345":  # each question of a sitting has an answer
        assert f"**{n}a. " in key


def test_differences_are_paired_by_fold_and_seed(monkeypatch, capsys):
    def runs(name, ua):
        return [SimpleNamespace(name=name, fold=fold, seed=seed, result={"ua": x, "wa": x / 2})
                for (fold, seed), x in ua.items()]  # fmt: skip

    a = runs("a", {(1, 0): 0.50, (2, 0): 0.60, (1, 1): 0.70, (3, 0): 0.1})
    b = runs("b", {(1, 0): 0.51, (2, 0): 0.63, (1, 1): 0.65})
    monkeypatch.setattr(differences, "find_runs", lambda folder: ({"A": a, "B": b}[str(folder)], []))
    differences.main(["A", "B"])
    # +1, +3 and -5 points: the mean is -1/3, the deviations 4/3, 10/3, -14/3, their squares sum to 312/9
    sd = (312 / 9 / 2) ** 0.5
    assert f"UA: -0.3 ± {sd:.1f} over 3 pairs (60.0 to 59.7); by seed +2.0, -5.0" in capsys.readouterr().out
    other = runs("c", {(4, 0): 0.5})
    for mixed in (b + b[:1], b + other):
        with pytest.raises(differences.InputError, match="one system each"):
            differences.differences(a, mixed)


def test_reports_do_not_name_what_is_wrong():
    for what, (report, changes) in bugs.BUGS.items():
        assert what not in report and len(changes) >= 1
    text = (ROOT / "tests" / "bugs.py").read_text()
    assert not any(what in text or report in text for what, (report, _) in bugs.BUGS.items())
    files = [changes[0][0] for _, changes in bugs.BUGS.values()]
    assert len(files) >= 10 and min(map(files.count, ("data.py", "train.py", "evaluate.py"))) >= 2


def test_the_first_hour_runs_and_its_loss_is_right(capsys):
    first_hour.main()
    out = capsys.readouterr().out
    rows = dict(re.findall(r"^(\S+(?: \S+)?) +(\([\d, ]*\)) ", out, re.MULTILINE))
    assert rows["X_A"] == "(3, 6, 4)" and rows["weights"] == "(3, 5, 6)" and rows["logits"] == "(3, 4)"
    loss, by_hand = re.findall(r"^(?:loss|by hand) +\(\) +(\S+)", out, re.MULTILINE)
    assert loss == by_hand
    assert re.search(r"^row sums .* 1.000 1.000 1.000 1.000 ", out, re.MULTILINE)


def test_the_figures_have_the_shapes_of_the_code(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    import figures

    found = figures.shapes()
    assert found["extractor.audio"] == (32, 249, 16) and found["extractor.text"] == (32, 20, 16)
    assert found["extractor.audio.se.expand"] == (32, 25) and found["fusion"] == (32, 32) and found[""] == (32, 4)
    figures.main([str(tmp_path / "new")])
    drawn = sorted(p.name for p in (tmp_path / "new").iterdir())
    assert drawn == ["figure-1.png", "figure-2.png", "figure-3.png"]
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in (tmp_path / "new").iterdir())
