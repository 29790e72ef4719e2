"""A student's copy without answers, its verdicts, the teacher's key, and the hunts."""

import ast
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.course import classroom, hunts

PAGE = ROOT / "tests" / "course" / "README.md"
ANSWERS = ROOT / "tests" / "course" / "ANSWERS.md"
NAMES = {
    "1": "masked_mean",
    "2": "cross_modal_attention",
    "3": "SqueezeExcitation.forward",
    "4": "TextFeatureExtractor.forward",
    "5": "TransformerBlock.forward",
    "6": "unweighted_accuracy",
    "7": "split",
    "8": "Patience.step",
    "9": "gather",
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "copy"
    classroom.student(folder)
    return folder


def read(path):
    return path.read_text(encoding="utf-8")


def code_lines(source):
    """Return the lines without indent and comments."""
    return [line.strip() for line in re.sub(r"#.*", "", source).split("\n")]


# --- The student's copy ---------------------------------------------------------------


def test_a_copy_has_no_answer(copy):
    files = [path for path in copy.rglob("*") if path.suffix in (".py", ".md")]
    everything = "\n".join(read(path) for path in files)
    for name in classroom.FILES:
        lines = read(ROOT / name).split("\n")
        for _, first, last in classroom.exercises("\n".join(lines)).values():
            body = code_lines("\n".join(lines[first - 1 : last]))
            assert max(body, key=len) not in everything
    for line in read(ANSWERS).split("\n"):
        assert len(line) < 60 or line not in everything
    assert "PACKED = " not in everything
    assert not [path for path in files if path.name.startswith("test_")]


def test_a_copy_has_nine_empty_bodies_with_their_docstrings_and_tags(copy):
    empty = []
    for name in classroom.FILES:
        whole = read(ROOT / name)
        code = read(copy / name)
        empty += re.findall(r"exercise (\d), ([\w.]+), is yours to write first", code)
        assert "delete the body" not in code
        docstrings = []
        for source in (whole, code):
            definitions = [
                node
                for node in ast.walk(ast.parse(source))
                if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            ]
            docstrings.append([ast.get_docstring(node) for node in definitions])
        assert docstrings[0] == docstrings[1]
        tags = r"\[[ADE]\d+\]"
        assert set(re.findall(tags, whole)) == set(re.findall(tags, code))
    assert dict(empty) == NAMES


def test_the_page_of_a_copy_has_no_section_for_teachers(copy):
    page = read(copy / "tests" / "course" / "README.md")
    assert "## Exercises" in page
    for title in classroom.FOR_TEACHERS:
        assert title in read(PAGE)
        assert title not in page


def test_a_command_in_a_copy_names_the_exercise_that_it_needs(copy):
    command = [sys.executable, "-m", "tests.course.first_hour"]
    process = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr == "exercise 1, masked_mean, is yours to write first\n"
    assert "row sums" in read(copy / "tests" / "course" / "first_hour.txt")


def test_a_copy_is_never_written_over_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit, match="not empty"):
        classroom.student(tmp_path)


# --- Verdicts -------------------------------------------------------------------------


def test_the_verdicts_of_an_empty_copy_come_from_the_checks_of_this_project(copy):
    checks = copy / "tests" / "course" / "checks.py"
    before = read(checks)
    checks.write_text("print('passed')")
    for number, verdict in enumerate(classroom.verdicts(copy), 1):
        calls = {3: "after exercise 1", 5: "after exercise 2"}
        assert verdict.startswith(calls.get(number, f"exercise {number}, ")), verdict
    checks.write_text(before)


def test_the_table_of_the_whole_project_says_passed(capsys):
    assert classroom.check([ROOT])
    out = capsys.readouterr().out
    rows = re.findall(r"^\| (\d) \| ([\w.]+) \| passed \|$", out, re.MULTILINE)
    assert dict(rows) == NAMES
    assert not classroom.check([ROOT / "no such folder"])
    assert "No such file" in capsys.readouterr().out


@pytest.mark.slow
def test_an_answer_that_never_ends_or_does_not_compile_has_a_verdict(copy):
    path = copy / "model.py"
    before = read(path)
    code = before
    for number, body in [
        (1, "    print('my mean')\n    return x.mean(1)"),
        (2, "    while True:\n        pass"),
    ]:
        empty = f"    raise SystemExit.*exercise {number}, .*"
        code, n = re.subn(empty, body, code)
        assert n == 1
    path.write_text(code, encoding="utf-8")
    verdicts = classroom.verdicts(copy, seconds=20)
    assert verdicts[0].startswith("does the padding count")
    assert verdicts[1].startswith("it does not end")
    assert verdicts[5:] == ["not reached"] * 4
    path.write_text(before + "\ndef (\n", encoding="utf-8")
    assert all("SyntaxError" in verdict for verdict in classroom.verdicts(copy)[5:])
    path.write_text(before, encoding="utf-8")


# --- The key --------------------------------------------------------------------------


def test_the_key_has_all_answers_and_a_copy_cannot_make_it(copy, tmp_path, monkeypatch):
    classroom.key(tmp_path / "key.md")
    key = read(tmp_path / "key.md")
    assert dict(re.findall(r"^\*\*(\d)\. `([\w.]+)`", key, re.MULTILINE)) == NAMES
    assert "clamp(min=1)" in key
    for fault in hunts.BUGS:
        assert fault in key
    # Every sitting has a question, and every question has an answer.
    assert set("012345") <= set(re.findall(r"^(\d)\. ", read(PAGE), re.MULTILINE))
    for number in "012345":
        assert f"**{number}a. " in key
    monkeypatch.setattr(classroom, "ROOT", copy)
    with pytest.raises(SystemExit, match="made from the repository"):
        classroom.key(tmp_path / "key.md")


# --- The hunts ------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    for name in classroom.FILES:
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def code_of(folder):
    return {name: read(folder / name) for name in classroom.FILES}


@pytest.mark.parametrize("fault", hunts.BUGS)
def test_a_bug_can_be_put_in_and_taken_out(fault, project):
    before = code_of(project)
    _, changes = hunts.BUGS[fault]
    hunts.swap(changes, project)
    assert hunts.hidden(project) == [fault]
    for name, code in code_of(project).items():
        compile(code, name, "exec")
    hunts.swap(changes, project, back=True)
    assert hunts.hidden(project) == []
    assert code_of(project) == before


def test_hide_and_reveal_delete_what_other_code_has_made(project, capsys):
    before = code_of(project)
    for command in (lambda: hunts.hide(None, project), lambda: hunts.reveal(project)):
        for name in ("cache/tiny", "runs/toy/mmt", "runs/iemocap/mmt", "corpora/toy"):
            (project / name).mkdir(parents=True, exist_ok=True)
        command()
        assert not (project / "cache").exists()
        assert [path.name for path in (project / "runs").iterdir()] == ["iemocap"]
        assert (project / "corpora" / "toy").exists()
    assert code_of(project) == before
    assert re.match("A user reports: .+\n.+\nIt was: ", capsys.readouterr().out)
    with pytest.raises(SystemExit, match="None of these bugs"):
        hunts.reveal(project)


def test_a_bug_is_not_given_away_by_its_report_or_by_the_file():
    source = read(ROOT / "tests" / "course" / "hunts.py")
    files = []
    for fault, (report, changes) in hunts.BUGS.items():
        assert fault not in report
        assert fault not in source
        assert report not in source
        files.append(changes[0][0])
    assert len(files) == 12
    for name in classroom.FILES:
        assert files.count(name) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", hunts.BUGS)
def test_a_bug_trains_and_a_test_fails(fault, project):
    shutil.copy(ROOT / "README.md", project)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests", project / "tests", ignore=ignored)
    hunts.swap(hunts.BUGS[fault][1], project)
    command = [sys.executable, "train.py", "--fusion", "mmt", "--device", "cpu"]
    command += ["--finetune-after", "1", "--max-epochs", "6"]
    process = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "toy: WA" in process.stdout
    # Some tests compare the text of the code, so any change makes them fail.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["--ignore", "tests/course/test_classroom.py"]
    command += ["--ignore", "tests/studies/test_alternatives.py"]
    process = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert process.returncode == 1, process.stdout[-2000:]
    assert "1 failed" in process.stdout
