"""evaluate.py: metrics on written-out cases, the report on written-out run folders, the register."""

import ast
import csv
import doctest
import itertools
import json
import math
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from conftest import ROOT
from model import FUSIONS


def test_wa_and_ua_by_hand_and_not_swapped():
    # 8 neutral, 7 of them right; 2 angry, none right.
    truth, guess = [0] * 8 + [2] * 2, [0] * 7 + [1] + [0, 3]
    assert evaluate.weighted_accuracy(truth, guess) == pytest.approx(7 / 10)
    assert evaluate.unweighted_accuracy(truth, guess) == pytest.approx((7 / 8 + 0 / 2) / 2)
    counts = evaluate.confusion_matrix(truth, guess).tolist()
    assert counts == [[7, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]  # rows are the truth


def test_ua_is_the_mean_recall_of_figure_4():
    # Fig. 4c, 100 utterances a class: .69 .88 .85 .94 on the diagonal; the paper prints UA 84.00.
    rows = [[69, 13, 5, 13], [4, 88, 2, 6], [8, 2, 85, 5], [2, 1, 3, 94]]
    truth, guess = [], []
    for i, row in enumerate(rows):
        for j, n in enumerate(row):
            truth += [i] * n
            guess += [j] * n
    assert evaluate.unweighted_accuracy(truth, guess) == pytest.approx(0.84)


def test_the_examples_in_the_docstrings():
    found = doctest.testmod(evaluate)
    assert found.attempted >= 10 and found.failed == 0


def test_score_is_cross_entropy_and_the_metrics():
    log_probs = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 2 + [[0.28, 0.24, 0.24, 0.24]]).log()
    s = evaluate.score(torch.tensor([0, 0, 1]), log_probs)
    assert s["loss"] == pytest.approx(-(2 * math.log(0.7) + math.log(0.24)) / 3)
    assert s["wa"] == pytest.approx(2 / 3) and s["ua"] == 0.5 and isinstance(s["ua"], float)


def test_predict_runs_without_dropout_in_the_given_order():
    model = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Identity())
    rows = torch.arange(70)
    out = evaluate.predict(lambda_model(model), rows, lambda part: {"x": torch.eye(4)[part % 4]})
    assert out.argmax(1).tolist() == (rows % 4).tolist()
    torch.testing.assert_close(out.exp().sum(1), torch.ones(70))


def lambda_model(layers):
    class Model(torch.nn.Module):
        def forward(self, x):
            assert not self.training
            return layers(x)

    model = Model()
    model.layers = layers
    return model


def write_run(root, fusion, frozen, fold, seed=0, corpus="toy", right=6, n=8, **changes):
    """A run folder by hand: `right` of n neutral utterances are right, the others taken for sad."""
    folder = (
        root / corpus / f"{fusion}-{'frozen' if frozen else 'finetuned'}" / f"fold{fold}-seed{seed}"
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    result = {
        "corpus": corpus, "fusion": fusion, "frozen": frozen, "fold": fold, "seed": seed,
        "wa": right / n, "ua": right / n, "loss": 1.0,
        "confusion": [[right, 0, 0, n - right], [0] * 4, [0] * 4, [0] * 4], "epochs": 20,
        "finetune_epoch": None, "dev_speaker": "Ses01F", "n_train": 1, "n_dev": 1, "n_test": n,
        "seconds": 1.0, "peak_memory_bytes": 1, "select": "last",
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result | changes))
    guesses = ["neu"] * right + ["sad"] * (n - right)
    rows = ["utterance,speaker,label,prediction,neu,hap,ang,sad"]
    rows += [
        f"Ses0{fold}F_impro01_F{i:03},Ses0{fold}F,neu,{g},.4,.2,.2,.2"
        for i, g in enumerate(guesses)
    ]
    (folder / "predictions.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def report(capsys):
    """Run evaluate.py on a folder: -> (exit code, what it said, what it complained of)."""

    def run(root, *arguments):
        code = 0
        try:
            evaluate.main([str(root), *arguments])
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
            print(exit.code, file=sys.stderr)
        return SimpleNamespace(returncode=code, **capsys.readouterr()._asdict())

    return run


def test_the_command_itself(tmp_path):
    write_run(tmp_path, "mmt", False, 5)
    command = [sys.executable, ROOT / "evaluate.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "Table 1 with toy" in done.stdout, done.stderr


def test_the_report_sets_means_beside_the_paper_and_names_missing_folds(report, tmp_path):
    for fold, right in ((1, 4), (2, 6), (3, 8)):
        write_run(tmp_path, "mmt", False, fold, right=right)
    for fold in range(1, 6):
        write_run(tmp_path, "audio-fc", True, fold)
    done = report(tmp_path)
    assert done.returncode == 0, done.err
    (mmt,) = [line for line in done.out.splitlines() if line.strip().startswith("18  MMT")]
    # 50, 75, 100: mean 75, standard deviation 25; the paper's 80.36 and 81.70.
    assert (
        mmt.split()
        == (
            "18 MMT fine-tuned A+T 3 75.00 ± 25.00 80.36 -5.36 75.00 ± 25.00 81.70 -6.70 "
            "seed 0 misses folds 4 5"
        ).split()
    )
    (audio,) = [line for line in done.out.splitlines() if line.strip().startswith("1  WavLM+FC")]
    assert (
        audio.split()
        == ("1 WavLM+FC frozen A 5 75.00 ± 0.00 66.15 +8.85 75.00 ± 0.00 65.35 +9.65").split()
    )
    assert "toy" in done.out


def test_one_run_is_described_beside_chance_with_its_confusion_matrix():
    counts = [[3, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 2]]  # 8 utterances, 3 classes
    result = {"corpus": "toy", "wa": 0.625, "ua": 0.6, "fold": 5, "epochs": 9, "seconds": 2.0}
    text = evaluate.describe(result | {"confusion": counts, "n_test": 8})
    assert "WA 62.50%  UA 60.00%" in text and "WA 50.00%  UA 33.33%" in text  # 4 of 8; 1 of 3
    neu, hap, ang, sad = text.splitlines()[-4:]
    assert neu.split() == ["neu", "0.75", "0.25", "0.00", "0.00", "of", "4"]
    assert hap.split()[3] == "1.00" and ang.split()[-1] == "0" and sad.split()[4] == "1.00"


def test_corpora_never_share_a_table(report, tmp_path):
    write_run(tmp_path, "mmt", False, 5, corpus="toy")
    write_run(tmp_path, "mmt", False, 5, corpus="iemocap", right=8)
    out = report(tmp_path).out
    assert "Table 1 with iemocap" in out and "Table 1 with toy" in out and "87.50" not in out
    assert out.count("Table 2") == 2


def test_flipped_switches_and_selection_on_test_never_share_a_table(report, tmp_path):
    write_run(tmp_path / "a", "mmt", False, 5)
    flipped = write_run(tmp_path / "b", "mmt", False, 5)
    (flipped / "config.json").write_text('{"cma_residual": true}')
    write_run(tmp_path / "c", "mmt", False, 5, select="test")
    out = report(tmp_path).out
    assert out.count("Table 1 with toy") == 3
    assert "Table 1 with toy, cma_residual True, in" in out and "toy, SELECTED ON TEST, in" in out


@pytest.mark.parametrize("harm", [
    lambda f: (f / "result.json").write_text('{"corpus": "toy"'),
    lambda f: (f / "result.json").write_text("[]"),
    lambda f: (f / "result.json").unlink(),
    lambda f: (f / "result.json").write_bytes(b"\xff\xfe"),
    lambda f: (f / "result.json").write_text((f / "result.json").read_text().replace('"wa": 0.75', '"wa": 0.9')),
])  # fmt: skip
def test_a_damaged_run_is_named_and_left_out_and_the_exit_code_says_so(harm, report, tmp_path):
    write_run(tmp_path, "ef", True, 1)
    harm(write_run(tmp_path, "ef", True, 2))
    done = report(tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.err
    assert "fold2-seed0" in done.err and "13  EF frozen" in done.out


@pytest.mark.parametrize("harm", [
    lambda text: text.replace("neu,neu", "neu,joy", 1), lambda text: text[:80], lambda text: "",
    lambda text: text.replace("neu,neu", "neu,sad", 1), lambda text: text + text.splitlines()[1] + "\n",
    lambda text: "other,columns\n1,2\n", None,
])  # fmt: skip
def test_damaged_predictions_are_named_and_left_out(harm, tmp_path):
    path = write_run(tmp_path, "ef", True, 2) / "predictions.csv"
    if harm is None:
        path.unlink()
    else:
        path.write_text(harm(path.read_text()))
    runs, left_out = evaluate.find_runs(tmp_path)
    assert runs == [] and len(left_out) == 1 and str(path) in left_out[0]


def test_a_near_tie_is_written_as_it_was_scored(tmp_path):
    # Two log-probabilities one bit apart, whose exponentials are the same number.
    high = torch.tensor(-0.3)
    low = torch.nextafter(high, torch.tensor(-1.0))
    while torch.exp(low) != torch.exp(high):
        high, low = low, torch.nextafter(low, torch.tensor(-1.0))
    log_probs = torch.stack([low, high, torch.tensor(-9.0), torch.tensor(-9.0)])[None]
    u = SimpleNamespace(id="Ses05F_impro01_F000", speaker="Ses05F", label=1)
    evaluate.write_predictions(tmp_path / "p.csv", [u], log_probs, [False])
    (row,) = csv.DictReader((tmp_path / "p.csv").open())
    assert row["prediction"] == "hap" and evaluate.score(torch.tensor([1]), log_probs)["wa"] == 1.0


def test_no_check_hangs_on_assert():
    # Python skips them under -O.
    for name in ("model", "data", "train", "evaluate"):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        assert not [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert)], name


def test_several_seeds_are_averaged_in_their_folds_and_gaps_are_named(tmp_path):
    for fold, seed, right in ((1, 0, 2), (1, 1, 4), (2, 0, 6), (2, 1, 8), (3, 0, 5)):
        write_run(tmp_path, "ef", True, fold, seed, right=right)
    (row,) = evaluate.table_1(evaluate.find_runs(tmp_path)[0]).rows
    # Folds: 3/8, 7/8, 5/8 -> mean 62.5, sd 25. Seeds: (2+6+5)/24 and (4+8)/16 -> sd 14.73.
    assert row[4] == "62.50 ± 25.00 ± 14.73"
    assert row[-1] == "seed 0 misses folds 4 5; seed 1 misses folds 3 4 5"


def test_tables_as_markdown_and_csv(tmp_path):
    for fold in range(1, 6):
        write_run(tmp_path, "mmt", False, fold)
    table = evaluate.table_1(evaluate.find_runs(tmp_path)[0])
    lines = table.render("markdown").splitlines()
    assert lines[2].startswith("| Sys. | Model |") and lines[3].startswith("| --- | --- |")
    assert lines[4].startswith("| 18 | MMT fine-tuned | A+T | 5 | 75.00 ± 0.00 | 80.36 |")
    header, row = csv.reader(table.render("csv").splitlines())
    assert header[:3] == ["table", "Sys.", "Model"] and row[1:3] == ["18", "MMT fine-tuned"]


# --- is a difference real?


def test_mcnemar_against_all_outcomes_of_the_coins():
    for only_a, only_b, both in ((0, 1, 3), (1, 5, 2), (3, 3, 0), (2, 9, 5), (0, 0, 4)):
        a = [1] * only_a + [0] * only_b + [1] * both
        b = [0] * only_a + [1] * only_b + [1] * both
        n = only_a + only_b
        heads = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
        uneven = sum(abs(h - n / 2) >= abs(only_a - n / 2) for h in heads) / 2**n
        assert evaluate.mcnemar(a, b) == pytest.approx(uneven)
        assert evaluate.mcnemar(b, a) == pytest.approx(uneven)


def test_bootstrap_against_a_loop_over_drawn_dialogues():
    chance = random.Random(0)
    truth, a, b, dialogs = [], [], [], []
    for d in range(12):
        for _ in range(5 + d):
            y = chance.randrange(4)
            truth.append(y), dialogs.append(f"d{d}")
            a.append(y if chance.random() < 0.5 else chance.randrange(4))
            b.append(y if chance.random() < 0.5 + 0.03 * d else chance.randrange(4))
    found = evaluate.bootstrap(*(np.array(x) for x in (truth, a, b, dialogs)))

    def metrics(rows, guess):
        by_class = {}
        for i in rows:
            by_class.setdefault(truth[i], []).append(guess[i] == truth[i])
        recalls = [sum(v) / len(v) for v in by_class.values()]
        return sum(guess[i] == truth[i] for i in rows) / len(rows), sum(recalls) / len(recalls)

    members = {d: [i for i, x in enumerate(dialogs) if x == d] for d in set(dialogs)}
    draws = []
    for _ in range(3000):
        rows = [i for d in chance.choices(sorted(members), k=12) for i in members[d]]
        (wa_a, ua_a), (wa_b, ua_b) = metrics(rows, a), metrics(rows, b)
        draws.append((wa_b - wa_a, ua_b - ua_a))
    (wa_a, ua_a), (wa_b, ua_b) = (metrics(range(len(truth)), g) for g in (a, b))
    for k, (metric, difference) in enumerate((("wa", wa_b - wa_a), ("ua", ua_b - ua_a))):
        ordered = sorted(draw[k] for draw in draws)
        expected = (difference, ordered[75], ordered[-76])
        assert found[metric] == pytest.approx(expected, abs=0.012)


def test_two_identical_systems_are_said_to_be_so(tmp_path):
    for fold in (1, 2):
        write_run(tmp_path, "mmt", True, fold), write_run(tmp_path, "mmt", False, fold)
    text = evaluate.compare(evaluate.find_runs(tmp_path)[0], 17, 18)
    assert "16 utterances in 2 dialogues, folds 1 2" in text and "the same everywhere" in text


def test_compare_pairs_the_folds_that_both_have(tmp_path):
    write_run(tmp_path, "ef", True, 1, right=2), write_run(tmp_path, "ef", True, 2)
    write_run(tmp_path, "mmt", False, 1, right=8), write_run(tmp_path, "mmt", False, 3)
    runs, _ = evaluate.find_runs(tmp_path)
    text = evaluate.compare(runs, 13, 18)
    # 6 utterances on which only 18 is right: p = 2 / 2^6; one dialogue, so no spread.
    assert (
        "folds 1\n" in text
        and "only 13 right: 0, only 18 right: 6" in text
        and "p = 0.0312" in text
    )
    assert "WA of 18 less 13: +75.00 points, 95 % interval +75.00 to +75.00" in text
    with pytest.raises(evaluate.RunError, match="no fold"):
        evaluate.compare(runs, 1, 18)


def test_parts_of_the_test_data(tmp_path):
    folder = write_run(tmp_path, "ef", True, 5, right=6, n=8)
    text = (folder / "predictions.csv").read_text()
    lines = [line + (",1" if i in (1, 8) else ",0") for i, line in enumerate(text.splitlines())]
    lines[0] = text.splitlines()[0] + ",seen_text"
    lines[7:] = [
        line.replace("_impro01_F", "_script01_1_M").replace("Ses05F,", "Ses05M,")
        for line in lines[7:]
    ]
    (folder / "predictions.csv").write_text("\n".join(lines) + "\n")
    rows = {row[1]: row[2:] for row in evaluate.breakdown(evaluate.find_runs(tmp_path)[0]).rows}
    assert rows["all"] == ["8", "75.00", "75.00"] and rows["class neu"] == rows["all"]
    assert rows["improvised"] == ["6", "100.00", "100.00"] == rows["speaker Ses05F"]
    assert rows["scripted"] == ["2", "0.00", "0.00"] == rows["speaker Ses05M"]
    assert rows["text seen"] == ["2", "50.00", "50.00"] and rows["text unseen"][0] == "6"


def test_a_folder_without_runs_is_said(report, tmp_path):
    done = report(tmp_path)
    assert done.returncode == 1 and "no run in it" in done.err


def test_the_papers_numbers_are_the_papers():
    # The sums of Table 1's columns, taken from the paper's text, and the rows that its text quotes.
    rows = evaluate.TABLE_1
    sums = [sum(rows[n][i] for n in range(k, 19, 2)) for k in (1, 2) for i in (2, 3)]
    assert [round(x, 2) for x in sums] == [657.38, 669.67, 674.34, 680.31]
    assert rows[18] == ("MMT fine-tuned", "A+T", 80.36, 81.70)
    assert rows[9] == ("CMT(A→T) frozen", "A+T", 67.76, 69.37)
    assert evaluate.TABLE_2[18] == (84.45, 84.39)
    numbers = [evaluate.system_number(f, frozen) for f in FUSIONS for frozen in (True, False)]
    assert numbers == list(rows) == list(range(1, 19))


# --- the register of open points, deviations and errors


def tags(text):
    return set(re.findall(r"\[((?:A|D|E)\d+)\]", text))


def test_the_code_and_the_readme_list_the_same_points():
    sources = "".join(
        (ROOT / f"{f}.py").read_text() for f in ("model", "data", "train", "evaluate")
    )
    assert tags(sources) == tags((ROOT / "README.md").read_text())
    assert {f"A{n}" for n in range(1, 17)} | {f"E{n}" for n in range(1, 10)} <= tags(sources)
    for tag in tags(sources):  # each is explained in exactly one place
        kind = {"A": "UNSPECIFIED", "D": "DEVIATION", "E": "PAPER-ERROR"}[tag[0]]
        assert len(re.findall(rf"{kind} \[{tag}\]", sources)) == 1, tag


def test_every_open_point_has_a_measured_effect_or_a_reason_for_none():
    readme = (ROOT / "README.md").read_text()
    for tag in sorted(tags(readme)):
        if tag[0] in "AD":
            (row,) = re.findall(rf"^\| \[{tag}\] \|.*\|$", readme, re.M)
            effect = row.split("|")[-2].strip()
            assert re.search(r"[+−]\d+\.\d ± \d|^none: \w|; \w", effect), row


def test_the_documents_name_no_flag_that_there_is_not():
    programs = "".join(p.read_text() for p in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")])
    assert (ROOT / "tests" / "COURSE.md").exists()
    for name in ("README.md", "tests/COURSE.md"):
        for flag in set(re.findall(r"(?<![-\w])--[a-z][-a-z]+", (ROOT / name).read_text())):
            assert f'"{flag}"' in programs or flag in ("--array", "--gres"), (name, flag)


# --- pictures


@pytest.fixture
def figures(monkeypatch):
    pytest.importorskip("matplotlib")
    drawn, draw = [], evaluate.figure
    monkeypatch.setattr(evaluate, "figure", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    return drawn


def write_log(folder, dev_losses):
    rows = [
        {"epoch": i, "train_loss": 2 * x, "dev_loss": x, "dev_ua": 1 - x}
        for i, x in enumerate(dev_losses, 1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_figure_4_has_the_papers_panels_in_its_order(report, figures, tmp_path):
    runs = (
        ("text-te", True),
        ("audio-te", False),
        ("mmt", False),
        ("text-te", False),
        ("ef", True),
    )
    for k, (fusion, frozen) in enumerate(runs):
        for fold in (1, 5):
            folder = write_run(tmp_path / "runs", fusion, frozen, fold, right=k + 2)
            write_log(folder, [0.5, 0.4])
    done = report(tmp_path / "runs", "--pictures", str(tmp_path / "pictures"))
    assert done.returncode == 0 and "toy-confusions.png" in done.err
    axes = figures[0].axes
    assert [ax.get_title() for ax in axes] == [
        "(a) Sys. 4 (UA: 37.50%)", "(b) Sys. 8 (UA: 62.50%)", "(c) Sys. 18 (UA: 50.00%)",
        "(d) Sys. 7 (UA: 25.00%)",
    ]  # fmt: skip
    cells = [t.get_text() for t in axes[0].texts]
    assert cells[:4] == ["0.38", "0.00", "0.00", "0.62"] and cells[4:] == ["0.00"] * 12
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["neu", "hap", "ang", "sad"]
    assert figures[0].get_suptitle() == "toy"
    names = {p.name for p in (tmp_path / "pictures").iterdir()}
    assert names == {"toy-confusions.png"} | {f"toy-curves-{n:02}.png" for n in (4, 7, 8, 13, 18)}


def test_curves_mark_the_trigger_and_the_stop(report, figures, tmp_path):
    folder = write_run(tmp_path, "mmt", False, 3, finetune_epoch=2)
    write_log(folder, [0.5, 0.4, 0.3, 0.35])
    assert report(folder, "--pictures", str(tmp_path / "p")).returncode == 0
    loss, ua = figures[1].axes
    marks = {
        line.get_marker(): line.get_xydata().tolist()
        for line in loss.lines
        if len(line.get_xdata()) == 1
    }
    assert marks == {"v": [[2, 0.4]], "s": [[4, 0.35]]}
    assert ua.lines[0].get_ydata().tolist() == pytest.approx([50, 60, 70, 65])
    assert figures[0].axes[0].get_title() == "(a) Sys. 18 Session3 (UA: 75.00%)"


def test_a_picture_that_cannot_be_drawn_is_named(report, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    folder = write_run(tmp_path, "mmt", False, 3)
    (folder / "log.jsonl").write_text('{"epoch": 1}\n')
    done = report(folder, "--pictures", str(tmp_path / "p"))
    assert done.returncode == 1 and "log.jsonl" in done.err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = report(folder, "--pictures", str(tmp_path / "q"))
    assert done.returncode == 1 and "pip install matplotlib" in done.err
