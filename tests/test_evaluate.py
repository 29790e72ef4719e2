"""evaluate.py: metrics on cases by hand, reports on run folders by hand, an utterance, the register."""

import ast
import csv
import doctest
import functools
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
from conftest import ROOT, write_wav
from model import FUSIONS, Config, EmotionRecognizer


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
    assert found.attempted >= 5 and found.failed == 0


def test_metrics_of_tensors_are_plain_numbers():
    s = evaluate.metrics(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]))
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


def write_run(root, fusion, frozen, fold, seed=0, corpus="toy", right=6, n=8, switches=(), **changes):
    """A run folder by hand: `right` of n neutral utterances are right, the others taken for sad."""
    switches = dict(switches)
    name = f"{fusion}-{'frozen' if frozen else 'finetuned'}"
    name += "".join(f"-{k}={v}" for k, v in switches.items())
    folder = root / corpus / name / f"fold{fold}-seed{seed}"
    folder.mkdir(parents=True)
    same = {"corpus": corpus, "fusion": fusion, "frozen": frozen, "fold": fold, "seed": seed}
    config = {
        **same, "sessions": [1, 2, 3, 4, 5], "switches": switches, "trim": "leading",
        "precision": "fp32", "model": {}, "upstreams": {}, "utterances": "0", **switches,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    result = {
        **same, "wa": right / n, "ua": right / n, "loss": 1.0,
        "confusion": [[right, 0, 0, n - right], [0] * 4, [0] * 4, [0] * 4], "epochs": 20,
        "finetune_epoch": None, "dev_speaker": "Ses01F", "n_train": 1, "n_dev": 1, "n_test": n,
        "seconds": 1.0,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result | changes))
    guesses = ["neu"] * right + ["sad"] * (n - right)
    rows = ["utterance,speaker,label,prediction,neu,hap,ang,sad,seen_text"]
    rows += [
        f"Ses0{fold}F_impro01_F{i:03},Ses0{fold}F,neu,{g},.4,.2,.2,.2,0"
        for i, g in enumerate(guesses)
    ]
    (folder / "predictions.csv").write_text("\n".join(rows) + "\n")
    return folder


def cells(table):
    """The rows of a Markdown table as dicts."""
    lines = [line[1:-1].split("|") for line in table.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(header, row)) for row in rows]


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
        write_run(tmp_path, "mmt", False, fold, right=right, corpus="iemocap")
    for fold in range(1, 6):
        write_run(tmp_path, "audio-fc", True, fold, corpus="iemocap")
    done = report(tmp_path)
    assert done.returncode == 0, done.err
    audio, mmt = cells(done.out)  # in the paper's order
    # 50, 75, 100: mean 75, standard deviation 25; the paper's 80.36 and 81.70.
    assert mmt == {
        "Sys.": "18", "model": "MMT fine-tuned", "runs": "3", "WA": "75.00 ± 25.00",
        "paper WA": "80.36", "diff WA": "-5.36", "UA": "75.00 ± 25.00", "paper UA": "81.70",
        "diff UA": "-6.70", "missing folds": "[4, 5] (seed 0)",
    }  # fmt: skip
    assert audio == {
        "Sys.": "1", "model": "WavLM+FC frozen", "runs": "5", "WA": "75.00 ± 0.00",
        "paper WA": "66.15", "diff WA": "+8.85", "UA": "75.00 ± 0.00", "paper UA": "65.35",
        "diff UA": "+9.65", "missing folds": "",
    }  # fmt: skip
    assert "Table 2" not in done.out  # no Sys. 15, 17 or 18 on Session 5


@pytest.mark.parametrize("corpus", ["toy", "toy-half-partial", "mine", "iemocap-partial"])
def test_only_iemocap_is_set_beside_the_paper(corpus, report, tmp_path):
    write_run(tmp_path, "mmt", False, 5, corpus=corpus)
    out = report(tmp_path).out
    assert f"Table 1 with {corpus}, in %" in out and "75.00" in out
    assert "80.36" not in out and "paper" not in out and "diff" not in out and "Table 2" not in out


def test_every_block_measured_on_the_toy_says_so(report, tmp_path):
    write_run(tmp_path, "mmt", False, 5), write_run(tmp_path, "ef", True, 5)
    for arguments in ((), ("--parts",), ("--compare", "13", "18")):
        for block in re.split(r"\n\n(?!\|)", report(tmp_path, *arguments).out.strip()):
            assert "toy" in block, block
    for line in report(tmp_path / "toy" / "ef-frozen").out.splitlines():
        assert not re.search(r"\d\d\.\d", line) or line.startswith("|") or "toy" in line, line


def test_table_2_is_session_5_alone(report, tmp_path):
    for seed, right in ((0, 4), (1, 8)):
        write_run(tmp_path, "mmt", False, 5, seed, "iemocap", right=right)
    write_run(tmp_path, "lf", True, 5, corpus="iemocap"), write_run(tmp_path, "mmt", True, 4, corpus="iemocap")
    lf, mmt = cells(report(tmp_path).out.split("Table 2")[1])
    # 50 and 100: mean 75, standard deviation over the seeds 35.36.
    assert (mmt["Sys."], mmt["WA"], mmt["paper WA"], mmt["diff WA"]) == ("18", "75.00 ± - ± 35.36", "84.45", "-9.45")
    assert (lf["Sys."], lf["UA"], lf["paper UA"], lf["missing folds"]) == ("15", "75.00", "80.56", "")


def test_one_run_is_described_beside_chance_with_its_confusion_matrix():
    counts = [[3, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 2]]  # 8 utterances, 3 classes
    result = {"corpus": "toy", "wa": 0.625, "ua": 0.6, "fold": 5, "epochs": 9, "seconds": 2.0}
    text = evaluate.describe(result | {"confusion": counts, "n_test": 8})
    assert "WA 62.50%  UA 60.00%" in text and "WA 50.00%  UA 33.33%" in text  # 4 of 8; 1 of 3
    assert all("toy" in line for line in text.splitlines() if "%" in line or "fraction" in line)
    neu, hap, ang, sad = cells(text)
    assert list(neu.values()) == ["neu", "0.75", "0.25", "0.00", "0.00", "4"]
    assert hap["ang"] == "1.00" and ang["n"] == "0" and sad["sad"] == "1.00"


def test_corpora_never_share_a_table(report, tmp_path):
    write_run(tmp_path, "mmt", False, 5, corpus="toy")
    write_run(tmp_path, "mmt", False, 5, corpus="iemocap", right=8)
    out = report(tmp_path).out
    assert "Table 1 with iemocap" in out and "Table 1 with toy" in out and "87.50" not in out
    assert out.count("Table 2") == 1  # of IEMOCAP


def test_flipped_switches_never_share_a_table(report, tmp_path):
    write_run(tmp_path, "mmt", False, 5)
    write_run(tmp_path, "mmt", False, 5, switches={"condense": "concat", "cma_residual": True})
    out = report(tmp_path).out
    assert out.count("Table 1 with toy") == 2
    assert "Table 1 with toy, condense=concat, cma_residual=True, in" in out


@pytest.mark.parametrize("harm", [
    lambda f: (f / "result.json").write_text('{"corpus": "toy"'),
    lambda f: (f / "result.json").write_text("[]"),
    lambda f: (f / "config.json").unlink(),
    lambda f: (f / "config.json").write_text("{}"),
    lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"fold": 2', '"fold": 3')),
    lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"ef"', '"mmt"')),
    lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"toy"', '"iemocap"')),
    lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('[1, 2, 3, 4, 5]', '[1, "2"]')),
    lambda f: (f / "result.json").write_text((f / "result.json").read_text().replace('"n_test": 8', '"n_test": 9')),
    lambda f: (f / "result.json").write_text((f / "result.json").read_text().replace('"loss": 1.0', '"loss": NaN')),
    lambda f: (f / "result.json").write_text((f / "result.json").read_text().replace('"loss": 1.0', '"loss": -1')),
    lambda f: (f / "result.json").write_text((f / "result.json").read_text().replace('"ua": 0.75', '"ua": NaN')),
    lambda f: (f / "result.json").write_text((f / "result.json").read_text().replace('"epochs": 20', '"epochs": 0')),
    lambda f: (f / "result.json").write_text((f / "result.json").read_text().replace('[[6, 0', '[[5, 1')),
    lambda f: (f / "result.json").write_bytes(b"\xff\xfe"),
    lambda f: (f / "result.json").write_text((f / "result.json").read_text().replace('"wa": 0.75', '"wa": 0.9')),
])  # fmt: skip
def test_a_damaged_run_is_named_and_left_out_and_the_exit_code_says_so(harm, report, tmp_path):
    write_run(tmp_path, "ef", True, 1)
    harm(write_run(tmp_path, "ef", True, 2))
    done = report(tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.err
    assert re.search(r"ef-frozen/fold2-seed0/\w+\.(json|csv): \S.*; restore it, or delete", done.err)
    (row,) = cells(done.out.split("\ntoy: ")[0])  # what follows describes the one run
    assert (row["Sys."], row["runs"]) == ("13", "1")


def test_an_unfinished_run_is_listed_and_is_no_error(report, tmp_path):
    write_run(tmp_path, "ef", True, 1)
    folder = write_run(tmp_path, "ef", True, 2)
    (folder / "result.json").unlink()
    write_log(folder, [3, 2, 1])
    for done in (report(tmp_path), report(folder)):
        assert done.returncode == 0 and done.err == ""
        assert f"unfinished: {folder} (3 epochs so far); the same train.py command goes on" in done.out
    (folder / "log.jsonl").unlink()
    assert "(0 epochs so far)" in report(tmp_path).out
    with pytest.raises(data.InputError, match="unfinished"):
        evaluate.Recognizer(folder)


def test_a_single_run_is_described(report, tmp_path):
    folder = write_run(tmp_path, "ef", True, 1)
    assert "toy: WA 75.00%  UA 75.00%  on 8 test utterances of session 1" in report(folder).out
    write_run(tmp_path, "ef", True, 2)
    assert "toy: WA" not in report(tmp_path).out


def test_a_second_run_of_the_same_kind_is_left_out(report, tmp_path):
    write_run(tmp_path / "a", "ef", True, 1, right=8)
    write_run(tmp_path / "b", "ef", True, 1, right=4)
    done = report(tmp_path)
    assert done.returncode == 1 and re.search(r"/b/toy/\S+: duplicate of \S+/a/toy/", done.err)
    assert cells(done.out)[0]["WA"] == "100.00"


def test_upstreams_are_no_runs(report, tmp_path):
    write_run(tmp_path, "ef", True, 1)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text('{\n  "model_type": "wavlm"\n}')
    done = report(tmp_path)
    assert done.returncode == 0 and "tiny" not in done.out + done.err


@pytest.mark.parametrize("harm", [
    lambda text: text.replace("neu,neu", "neu,joy", 1), lambda text: text[:80], lambda text: "",
    lambda text: text.replace("neu,neu", "neu,sad", 1), lambda text: text + text.splitlines()[1] + "\n",
    lambda text: "other,columns\n1,2\n", None, lambda text: text.replace(".4,.2", ".4,nan", 1),
    lambda text: text.replace(".4", "1.4", 1).replace(".2", "-.8", 1), lambda text: text.replace(".4", "4", 1),
    lambda text: text.replace(",0\n", "\n", 1), lambda text: text.replace("F000", "F001", 1),
    lambda text: text.replace("neu,neu,", "neu,", 1), lambda text: "".join(text.splitlines(True)[:-1]),
])  # fmt: skip
def test_damaged_predictions_are_named_and_left_out(harm, tmp_path):
    path = write_run(tmp_path, "ef", True, 2) / "predictions.csv"
    if harm is None:
        path.unlink()
    else:
        path.write_text(harm(path.read_text()))
    runs, left_out = evaluate.find_runs(tmp_path)
    # Where the files disagree, any of them may be at fault: both are named.
    assert runs == [] and len(left_out) == 1 and str(path.parent) in left_out[0]
    assert "predictions.csv" in left_out[0]


def test_a_near_tie_is_written_as_it_was_scored(tmp_path):
    # Two log-probabilities one bit apart, whose exponentials are the same number.
    high = torch.tensor(-0.3)
    low = torch.nextafter(high, torch.tensor(-1.0))
    while torch.exp(low) != torch.exp(high):
        high, low = low, torch.nextafter(low, torch.tensor(-1.0))
    log_probs = torch.stack([low, high, torch.tensor(-9.0), torch.tensor(-9.0)])[None]
    u = SimpleNamespace(id="Ses05F_impro01_F000", speaker="Ses05F", label=1)
    evaluate.write_predictions(tmp_path / "p.csv", [u], log_probs, set())
    (row,) = csv.DictReader((tmp_path / "p.csv").open())
    assert row["prediction"] == "hap" and log_probs.argmax() == 1


def test_no_check_hangs_on_assert():
    # Python skips them under -O.
    for name in ("model", "data", "train", "evaluate"):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        assert not [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert)], name


def test_several_seeds_are_averaged_in_their_folds_and_gaps_are_named(tmp_path):
    for fold, seed, right in ((1, 0, 2), (1, 1, 4), (2, 0, 6), (2, 1, 8), (3, 0, 5)):
        write_run(tmp_path, "ef", True, fold, seed, right=right)
    (row,) = cells(evaluate.table_1(evaluate.find_runs(tmp_path)[0]))
    # Folds: 3/8, 7/8, 5/8 -> mean 62.5, sd 25. Seeds: (2+6+5)/24 and (4+8)/16 -> sd 14.73.
    assert row["WA"] == "62.50 ± 25.00 ± 14.73"
    assert row["missing folds"] == "[4, 5] (seed 0), [3, 4, 5] (seed 1)"


def test_tables_are_aligned_markdown(tmp_path):
    for fold in range(1, 6):
        write_run(tmp_path, "mmt", False, fold), write_run(tmp_path, "ef", True, fold, corpus="toy")
    lines = evaluate.table_1(evaluate.find_runs(tmp_path)[0]).splitlines()
    assert lines[1] == "" and len({len(line) for line in lines[2:]}) == 1
    assert lines[2].startswith("| Sys. | model ") and lines[3].startswith("| ---- | -----")
    assert [i for i, c in enumerate(lines[2]) if c == "|"] == [i for i, c in enumerate(lines[4]) if c == "|"]
    assert lines[4].startswith("| 13   | EF frozen ") and lines[5].startswith("| 18   | MMT fine-tuned | 5 ")


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


def test_two_identical_systems_are_said_to_be_so(report, tmp_path):
    for fold in (1, 2):
        write_run(tmp_path, "mmt", True, fold), write_run(tmp_path, "mmt", False, fold)
    text = report(tmp_path, "--compare", "17", "18").out
    assert "16 predictions in 2 dialogues" in text and "folds [1, 2]" in text and "p = 1 " in text
    assert text.count("+0.00 points, 95 % interval +0.00 to +0.00  (contains 0: no difference") == 2


def test_compare_pairs_the_folds_that_both_have(report, tmp_path):
    write_run(tmp_path, "ef", True, 1, right=2), write_run(tmp_path, "ef", True, 2)
    write_run(tmp_path, "mmt", False, 1, right=8), write_run(tmp_path, "mmt", False, 3)
    done = report(tmp_path, "--compare", "13", "18")
    # 6 utterances on which only 18 is right: p = 2 / 2^6; one dialogue, so no spread.
    assert done.returncode == 0 and "A: Sys. 13" in done.out and "B: Sys. 18" in done.out
    assert (
        "folds [1]," in done.out
        and "only A right: 0, only B right: 6" in done.out
        and "p = 0.0312" in done.out
    )
    assert "WA of B minus A: +75.00 points, 95 % interval +75.00 to +75.00" in done.out
    with pytest.raises(data.InputError, match="no fold|in common"):
        report(tmp_path, "--compare", "1", "18")


def test_compare_by_number_takes_the_lowest_common_seed_and_stays_within_a_title(report, tmp_path):
    for seed, right in ((0, 1), (1, 4), (2, 8)):
        write_run(tmp_path, "ef", True, 1, seed, right=right)
    for seed, right in ((1, 6), (2, 2)):
        write_run(tmp_path, "mmt", False, 1, seed, right=right)
    write_run(tmp_path, "mmt", False, 1, 1, switches={"condense": "concat"})  # without a partner
    out = report(tmp_path, "--compare", "13", "18").out
    assert "seeds [1]: 8 predictions" in out and "only A right: 0, only B right: 2" in out
    assert "concat" not in out


def test_compare_two_folders_by_fold_and_seed(report, tmp_path):
    other = {"cma_residual": True}
    for fold, seed, right, changed in ((1, 0, 4, 6), (1, 1, 8, 8), (2, 1, 2, 7), (3, 0, 1, None)):
        write_run(tmp_path, "cmt-a2t", True, fold, seed, right=right)
        if changed is not None:
            write_run(tmp_path, "cmt-a2t", True, fold, seed, right=changed, switches=other)
    a = tmp_path / "toy" / "cmt-a2t-frozen"
    b = tmp_path / "toy" / "cmt-a2t-frozen-cma_residual=True"
    done = report(tmp_path, "--compare", str(a), str(b))
    assert done.returncode == 0, done.err
    # Two pairs of 8: of fold 1 the lower seed, fold 2 has one, fold 3 has no partner.
    assert "folds [1, 2], seeds [0, 1]: 16 predictions in 2 dialogues" in done.out
    assert "only A right: 0, only B right: 7" in done.out and "p = 0.0156" in done.out  # 2 / 2^7
    assert "(if independent)" in done.out and "+43.75 points" in done.out  # 7 of 16
    assert "B: Sys. 9 (CMT(A→T) frozen), toy, cma_residual=True" in done.out
    write_run(tmp_path, "ef", True, 1)
    with pytest.raises(data.InputError, match="one system each"):
        report(tmp_path, "--compare", str(tmp_path / "toy"), str(b))


def test_compare_refuses_two_systems_on_unlike_folds(tmp_path):
    """No fold occurs twice in A, and it is a mixture all the same."""
    for fold, fusion in ((1, "ef"), (2, "lf")):
        write_run(tmp_path, fusion, True, fold)
        write_run(tmp_path, "mmt", True, fold)
    runs, _ = evaluate.find_runs(tmp_path)
    mixed, whole = ([x for x in runs if (x.fusion == "mmt") == same] for same in (False, True))
    with pytest.raises(data.InputError, match="one system each"):
        evaluate.compare(mixed, whole)


def test_compare_refuses_other_test_data(tmp_path):
    write_run(tmp_path, "ef", True, 1, n=8)
    path = write_run(tmp_path, "mmt", True, 1, n=8) / "predictions.csv"
    path.write_text(path.read_text().replace("F007", "F009"))
    runs, _ = evaluate.find_runs(tmp_path)
    with pytest.raises(data.InputError, match="different utterances"):
        evaluate.compare(runs[:1], runs[1:])


def test_parts_of_the_test_data(tmp_path):
    folder = write_run(tmp_path, "ef", True, 5, right=6, n=8)
    lines = (folder / "predictions.csv").read_text().splitlines()
    for i in (1, 8):
        lines[i] = lines[i].removesuffix("0") + "1"
    lines[7:] = [
        line.replace("_impro01_F", "_script01_1_M").replace("Ses05F,", "Ses05M,")
        for line in lines[7:]
    ]
    (folder / "predictions.csv").write_text("\n".join(lines) + "\n")
    runs, _ = evaluate.find_runs(tmp_path)
    rows = {row["part"]: [row["n"], row["WA"], row["UA"]] for row in cells(evaluate.breakdown(runs))}
    assert rows["all"] == ["8", "75.00", "75.00"] and rows["class neu"] == rows["all"]
    assert rows["improvised"] == ["6", "100.00", "100.00"] == rows["speaker Ses05F"]
    assert rows["scripted"] == ["2", "0.00", "0.00"] == rows["speaker Ses05M"]
    assert rows["text seen"] == ["2", "50.00", "50.00"] and rows["text unseen"][0] == "6"


def test_parts_without_iemocaps_names_are_neither_improvised_nor_scripted(tmp_path):
    path = write_run(tmp_path, "ef", True, 5) / "predictions.csv"
    path.write_text(path.read_text().replace("_impro01", "_call7"))
    names = [row["part"] for row in cells(evaluate.breakdown(evaluate.find_runs(tmp_path)[0]))]
    assert names == ["all", "text unseen", "speaker Ses05F", "class neu"]


def test_a_folder_without_runs_is_said(tmp_path):
    command = [sys.executable, ROOT / "evaluate.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "no run in it" in done.stderr and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_a_terminal_without_arrows_and_a_closed_pipe(tmp_path):
    for fusion in FUSIONS:
        write_run(tmp_path, fusion, True, 5)
    command = f"{sys.executable} {ROOT / 'evaluate.py'} {tmp_path}"
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=ascii_only)
    assert done.returncode == 0 and "CMT(A?T) frozen" in done.stdout, done.stderr
    done = subprocess.run(f"{command} | (read line; exec 0<&-; sleep 1)", shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_the_papers_numbers_are_the_papers():
    # The sums of Table 1's columns, taken from the paper's text, and the rows that its text quotes.
    rows = evaluate.TABLE_1
    sums = [sum(rows[n][i] for n in range(k, 19, 2)) for k in (1, 2) for i in (2, 3)]
    assert [round(x, 2) for x in sums] == [657.38, 669.67, 674.34, 680.31]
    assert rows[18] == ("MMT fine-tuned", "A+T", 80.36, 81.70)
    assert rows[9] == ("CMT(A→T) frozen", "A+T", 67.76, 69.37)
    assert evaluate.TABLE_2[18] == (84.45, 84.39)
    # All figures once more, copied from the text of the paper: WA and UA, Sys. 1 to 18.
    table_1 = """
        66.15 65.35  66.70 66.71  63.51 64.67  67.99 68.24  74.33 76.57  77.67 78.76
        74.55 76.41  76.09 76.57  67.76 69.37  68.07 67.93  74.98 76.85  77.75 78.60
        77.61 77.85  79.80 80.65  79.91 81.88  79.91 81.15  78.58 80.72  80.36 81.70
    """
    assert [x for n in rows for x in rows[n][2:]] == [float(x) for x in table_1.split()]
    names = "WavLM+FC WavLM+TE BERT+FC BERT+TE CMT(A→T) CMT(T→A) EF LF MMT".split()
    kinds = [f"{name} {kind}" for name in names for kind in ("frozen", "fine-tuned")]
    assert [rows[n][0] for n in rows] == kinds
    assert [rows[n][1] for n in rows] == ["A"] * 4 + ["T"] * 4 + ["A+T"] * 10
    assert evaluate.TABLE_2 == {15: (78.32, 80.56), 17: (78.32, 80.56), 18: (84.45, 84.39)}
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


@functools.cache  # four processes
def flags_of_the_commands():
    """Every flag that --help of the commands, or a script below tests/, knows."""
    text = "".join(p.read_text() for p in ROOT.glob("tests/*.py"))
    for name in ("train", "evaluate", "data", "model"):
        command = [sys.executable, ROOT / f"{name}.py", "--help"]
        text += subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"(?<![-\w])--[a-z][-a-z]+", text))


def test_every_open_point_names_a_flag_that_there_is_and_its_effect():
    readme, course = (ROOT / "README.md").read_text(), (ROOT / "tests" / "COURSE.md").read_text()
    sources = "".join((ROOT / f"{f}.py").read_text() for f in ("model", "data", "train"))
    flags = flags_of_the_commands()
    for tag in sorted(tags(readme)):
        if tag[0] == "A":
            (row,) = re.findall(rf"^\| \[{tag}\] \|.*\|$", readme, re.M)
            for flag in re.findall(r"--[a-z-]+", row):
                assert flag in flags, row
            (block,) = re.findall(rf"UNSPECIFIED \[{tag}\](?:.*\n\s*#)*.*", sources)
            if "tests/COURSE.md" in block:  # a measured effect
                (row,) = re.findall(rf"^\| \[{tag}\].*\|$", course, re.M)
                assert re.search(r"[+−]?\d+\.\d ± \d", row), row


def test_the_documents_name_no_flag_that_there_is_not():
    flags = flags_of_the_commands() | {"--array", "--index-url"}
    for name in ("README.md", "tests/COURSE.md", "tests/CORPORA.md"):
        used = set(re.findall(r"(?<![-\w])--[a-z][-a-z]+", (ROOT / name).read_text()))
        assert used <= flags, (name, used - flags)


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
    write_log(write_run(tmp_path / "runs", "mmt", False, 5, seed=1, right=8), [0.5, 0.4])
    done = report(tmp_path / "runs", "--pictures", str(tmp_path / "pictures"))
    assert done.returncode == 0
    axes = figures[0].axes
    assert [ax.get_title().split("\n")[0] for ax in axes] == [
        "(a) Sys. 4 (UA: 37.50%)", "(b) Sys. 8 (UA: 62.50%)", "(c) Sys. 18 (UA: 50.00%)",
        "(d) Sys. 7 (UA: 25.00%)",
    ]  # fmt: skip
    assert {ax.get_title().split("\n")[1] for ax in axes} == {"fold 5, seed 0"}
    cells = [t.get_text() for t in axes[0].texts]
    assert cells[:4] == ["0.38", "0.00", "0.00", "0.62"] and cells[4:] == ["0.00"] * 12
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["neu", "hap", "ang", "sad"]
    assert (axes[0].get_ylabel(), axes[0].get_xlabel()) == ("Groundtruth", "Predictions")
    assert axes[0].images[0].cmap.name == "Blues"
    assert figures[0].get_suptitle() == "Fig. 4 with toy"
    names = {p.name for p in (tmp_path / "pictures").iterdir()}
    assert names == {"toy-confusions.png"} | {f"toy-curves-{n:02}.png" for n in (4, 7, 8, 13, 18)}


def test_curves_mark_the_trigger(report, figures, tmp_path):
    folder = write_run(tmp_path, "mmt", False, 3, finetune_epoch=2)
    write_log(folder, [0.5, 0.4, 0.3, 0.35])
    assert report(folder, "--pictures", str(tmp_path / "p")).returncode == 0
    loss, ua = figures[1].axes
    marks = {
        line.get_marker(): line.get_xydata().tolist()
        for line in loss.lines
        if len(line.get_xdata()) == 1
    }
    assert marks == {"v": [[2, 0.4]]}
    dev, train = loss.lines[:2]
    assert dev.get_xydata().tolist() == [[1, 0.5], [2, 0.4], [3, 0.3], [4, 0.35]]
    assert train.get_ydata().tolist() == [1.0, 0.8, 0.6, 0.7] and train.get_linestyle() == ":"
    assert ua.lines[0].get_ydata().tolist() == pytest.approx([0.5, 0.6, 0.7, 0.65])
    assert figures[1].get_suptitle() == "Sys. 18 (MMT fine-tuned), toy"
    assert figures[0].axes[0].get_title() == "(a) Sys. 18 (UA: 75.00%)\nfold 3, seed 0"


def test_a_legend_holds_what_is_drawn_and_can_be_read(report, figures, tmp_path):
    for fold, start in ((1, None), (2, 1)):
        fusion, frozen = "mmt", start is None
        write_log(write_run(tmp_path, fusion, frozen, fold, finetune_epoch=start), [0.5, 0.4])
    report(tmp_path, "--pictures", str(tmp_path / "p"))
    _, frozen, tuned = figures
    labels = [[t.get_text() for t in f.axes[0].get_legend().get_texts()] for f in (frozen, tuned)]
    assert labels[0] == ["fold 1, seed 0"]
    assert labels[1] == ["fold 2, seed 0", "fine-tuning starts"]
    from matplotlib.text import Text

    for figure in figures:
        assert all(t.get_fontsize() >= 9 for t in figure.findobj(Text) if t.get_text())


def test_a_picture_that_cannot_be_drawn_is_named(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    folder = write_run(tmp_path, "mmt", False, 3)
    (folder / "log.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(data.InputError, match="log.jsonl: .*dev_loss.*; restore it"):
        evaluate.main([str(folder), "--pictures", str(tmp_path / "p")])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(data.InputError, match="pip install matplotlib"):
        evaluate.main([str(folder), "--pictures", str(tmp_path / "q")])


# --- an utterance of your own


@pytest.fixture
def own(tiny, tmp_path, monkeypatch):
    """Make a run folder with a checkpoint of random weights, and a wav of one second."""
    monkeypatch.setattr(evaluate, "Upstream", lambda name, m, precision: calls(tiny[m]))
    write_wav(tmp_path / "x.wav", [0.3 * math.sin(k / 10) for k in range(16000)])
    used, tuned = [], torch.nn.ParameterDict({"w": torch.zeros(1)}).requires_grad_(False)

    def calls(upstream):
        wrapped = SimpleNamespace(**{
            k: getattr(upstream, k)
            for k in ("name", "fingerprint", "max_tokens", "preprocessor") if hasattr(upstream, k)
        })  # fmt: skip

        class Counted:
            def __getattr__(self, name):
                return getattr(wrapped, name)

            def __call__(self, raw):
                used.append(raw)
                return upstream(raw)

            model = tuned

        return Counted()

    def make(fusion, corpus="mine", selected=None, context=9, weights=()):
        folder = write_run(tmp_path / "runs", fusion, False, 5, corpus=corpus)
        shapes = {f"{m}_layers": tiny[m].n_layers for m in tiny}
        shapes |= {f"{m}_dim": tiny[m].dim for m in tiny}
        config = Config(fusion=fusion, n_context=context, **shapes)
        torch.manual_seed(0)
        model = EmotionRecognizer(config).eval()
        file = folder / "config.json"
        content = json.loads(file.read_text()) | {
            "model": asdict(config),
            "upstreams": {m: tiny[m].name for m in config.modalities}, "open": "bottom",
            "weights": {m: tiny[m].fingerprint for m in config.modalities},
        }
        file.write_text(json.dumps(content))
        weights = {"audio": {}, "text": {}, **dict(weights), "model": model.state_dict()}
        state = {"weights": weights, "selected": selected}
        torch.save(state, folder / "checkpoint.pt")
        return SimpleNamespace(
            folder=folder, model=model, wav=tmp_path / "x.wav", used=used, opened=tuned["w"]
        )

    return make


def test_an_utterance_gets_what_the_model_says(own, tiny):
    run = own("mmt")
    recognizer = evaluate.Recognizer(run.folder)
    p = recognizer.recognize(run.wav, "i hate it", ["a", "b"], ["lovely party"])
    # The same by hand: C = 9 with two turns before and one after.
    import data

    audio = tiny["audio"]([data.clip(data.load_wav(run.wav))])
    text = tiny["text"](["a", "b", "i hate it", "lovely party"])
    context = torch.tensor([[-1, -1, 0, 1, 2, 3, -1, -1, -1]])
    with torch.no_grad():
        expected = run.model(audio=audio, text=(*text, context)).softmax(1)[0]
    assert list(p) == ["neu", "hap", "ang", "sad"]
    torch.testing.assert_close(torch.tensor(list(p.values())), expected)
    assert recognizer.remarks == [
        "5 turns of context are missing. They count as a dialogue's edge."
    ]


def test_of_many_turns_the_nearest_are_read(own):
    run = own("text-te")
    before, after = [f"b{k}" for k in range(6)], [f"a{k}" for k in range(6)]
    recognizer = evaluate.Recognizer(run.folder)
    recognizer.recognize(None, "oh", before, after)
    assert run.used[-1] == ["b2", "b3", "b4", "b5", "oh", "a0", "a1", "a2", "a3"]
    assert recognizer.remarks == []
    recognizer.recognize(None, "oh", "one turn", "another turn")  # no letters
    assert run.used[-1] == ["one turn", "oh", "another turn"]
    alone = evaluate.Recognizer(own("text-fc", context=1).folder)
    alone.recognize(text="oh", before=before, after=after)
    assert run.used[-1] == ["oh"] and alone.remarks == []


def test_what_a_user_must_know_is_said(own, tmp_path):
    write_wav(tmp_path / "long.wav", [0.1, -0.1] * 48000)
    for fusion, arguments, remarks in (
        ("audio-fc", (tmp_path / "long.wav", "oh"),
         ["This system uses no text, so yours is ignored.", "Of 6.0 s of audio, 5 s are used."]),
        ("text-fc", (tmp_path / "x.wav", "hate " * 600),
         ["This system uses no audio, so yours is ignored.", "Of 602 tokens, 512 are used.",
          "8 turns of context are missing. They count as a dialogue's edge."]),
    ):  # fmt: skip
        recognizer = evaluate.Recognizer(own(fusion).folder)
        recognizer.recognize(*arguments)
        assert recognizer.remarks == remarks
    for fusion, arguments in (("mmt", ("x.wav",)), ("text-te", ("x.wav",)), ("lf", (None, "oh"))):
        with pytest.raises(data.InputError, match="add --wav FILE or --text WORDS"):
            evaluate.Recognizer(own(fusion).folder).recognize(*arguments)


def test_every_line_about_a_toy_model_says_toy(own, report):
    run = own("mmt", corpus="toy")
    done = report(run.folder, "--wav", str(run.wav), "--text", "oh", "--after", "a", "b")
    lines = done.out.splitlines()
    assert done.returncode == 0 and len(lines) == 3 and all(line.startswith("toy: ") for line in lines)
    assert re.fullmatch(r"toy: (\w{3} \d+\.\d%(, )?){4}", lines[0]) and "real speech" in lines[1]
    assert "6 turns" in lines[2]
    with pytest.raises(data.InputError, match="needs audio"):  # a turn belongs to an utterance
        report(run.folder, "--before", "a")


def test_audio_is_trimmed_as_in_training(own, tmp_path):
    write_wav(tmp_path / "gap.wav", [0.3] * 8000 + [0] * 8000 + [0.3, -0.3] * 4000)
    run = own("audio-fc")
    for trim, samples in (("leading", 24000), ("all", 16000)):
        path = run.folder / "config.json"
        path.write_text(path.read_text().replace('"leading"', f'"{trim}"'))
        evaluate.Recognizer(run.folder).recognize(tmp_path / "gap.wav")
        assert len(run.used[-1][0]) == samples


def test_selected_and_fine_tuned_weights_are_used(own):
    run = own("text-fc", weights={"text": {"w": torch.ones(1)}})
    evaluate.Recognizer(run.folder)
    assert run.opened == 1 and not run.opened.requires_grad
    run.opened.fill_(5.0)
    state = torch.load(run.folder / "checkpoint.pt")
    other = {k: torch.zeros_like(x) for k, x in state["weights"]["model"].items()}
    torch.save(state | {"selected": {"weights": {"model": other, "text": {}}}}, run.folder / "checkpoint.pt")
    recognizer = evaluate.Recognizer(run.folder)
    assert recognizer.recognize(text="oh") == dict.fromkeys(evaluate.CLASSES, 0.25)
    assert run.opened == 5  # a frozen epoch was selected: as pre-trained


def test_a_run_that_cannot_be_loaded_is_one_sentence(own):
    for old, new, message in (
        ('"dim": 16', '"dim": 8', "checkpoint.pt does not fit config.json"),
        ('"weights": {"audio": "', '"weights": {"audio": "0', "not the weights"),
        ('"dim": 16', '"dummy": 16', "dummy"), ('"trim"', '"cut"', "trim"),
    ):  # fmt: skip
        run = own("mmt")
        path = run.folder / "config.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(data.InputError, match=message) as error:
            evaluate.Recognizer(run.folder)
        assert "\n" not in str(error.value)
        __import__("shutil").rmtree(run.folder)


def test_a_damaged_checkpoint_is_named(own):
    run = own("text-fc")
    path = run.folder / "checkpoint.pt"
    raw = bytearray(path.read_bytes())
    weight = run.model.classifier[0].weight.detach().numpy().tobytes()
    raw[raw.index(weight) + 3] ^= 1  # a bit of a weight: torch.load alone takes it
    path.write_bytes(raw)
    torch.load(path)
    with pytest.raises(data.InputError, match="checkpoint.pt: .*; delete it and train again"):
        evaluate.Recognizer(run.folder)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_checkpoint_runs_no_code(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = own("text-fc")
    torch.save({"weights": Hostile()}, run.folder / "checkpoint.pt")
    with pytest.raises(data.InputError, match="checkpoint.pt: "):
        evaluate.Recognizer(run.folder)
    assert not (tmp_path / "ran").exists()


def test_pictures_of_an_utterance_hold_what_they_show(own, figures, report, tmp_path):
    run = own("mmt", corpus="toy")
    done = report(
        run.folder, "--wav", str(run.wav), "--text", "i lovely party", "--before", "hate it",
        "--pictures", str(tmp_path / "p"),
    )  # fmt: skip
    assert done.returncode == 0
    assert {p.name for p in (tmp_path / "p").iterdir()} == {"gates.png", "attention.png"}
    assert len(run.used) == 2  # one run of each upstream
    gates, attention = figures
    (ax,) = gates.axes
    assert [line.get_label() for line in ax.lines] == ["audio", "text"]
    recognizer = evaluate.Recognizer(run.folder)
    recognizer.recognize(run.wav, "i lovely party", ["hate it"])
    states, mask, _ = recognizer.batch["text"]
    target = recognizer.model.extractor["text"].se.gates(states.float(), mask)[1]
    assert ax.lines[1].get_ydata().tolist() == pytest.approx(target.tolist(), abs=1e-7)
    a2t, t2a = [ax for ax in attention.axes if ax.get_title()]
    assert "audio to text: each row" in a2t.get_title()
    assert "text to audio: each column" in t2a.get_title()
    rows, columns = (ax.images[0].get_array() for ax in (a2t, t2a))
    assert rows.shape == columns.shape == (5, 49)  # [CLS] i lovely party [SEP]; 1 s
    assert abs(rows.sum(axis=1) - 1).max() < 1e-5 and abs(columns.sum(axis=0) - 1).max() < 1e-5
    words = [t.get_text() for t in a2t.get_yticklabels()]
    assert words == ["[CLS]", "i", "lovely", "party", "[SEP]"]
    assert all("Sys. 18 (MMT fine-tuned), toy, fold 5, seed 0" in f.get_suptitle() for f in figures)


def test_the_gates_are_those_of_the_utterance_not_of_its_context(own, figures, report, tmp_path, monkeypatch):
    import model

    # Random weights give all texts the same gates. These are 0, 0.1, 0.2 for text 0, 1, 2.
    by_row = lambda self, x, mask: torch.arange(len(x))[:, None] / 10 + torch.zeros(x.shape[2])  # noqa: E731
    run = own("text-te")
    monkeypatch.setattr(model.SqueezeExcitation, "gates", by_row)
    report(run.folder, "--text", "oh", "--before", "a", "b", "--pictures", str(tmp_path / "p"))
    assert figures[0].axes[0].lines[0].get_ydata().tolist() == pytest.approx([0.2] * 3)


def test_without_cross_attention_there_is_one_picture(own, figures, report, tmp_path):
    run = own("lf")
    report(run.folder, "--wav", str(run.wav), "--text", "oh", "--pictures", str(tmp_path / "p"))
    assert {p.name for p in (tmp_path / "p").iterdir()} == {"gates.png"}
