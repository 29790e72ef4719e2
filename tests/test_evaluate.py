"""evaluate.py: metrics on written-out cases, the report on written-out run folders, the register."""

import doctest
import json
import re
import subprocess
import sys

import pytest
import torch

import evaluate
from conftest import ROOT


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
    truth = [i for i, row in enumerate(rows) for n in row for _ in range(n)]
    guess = [j for row in rows for j, n in enumerate(row) for _ in range(n)]
    assert evaluate.unweighted_accuracy(truth, guess) == pytest.approx(0.84)


def test_the_examples_in_the_docstrings():
    found = doctest.testmod(evaluate)
    assert found.attempted >= 3 and found.failed == 0


def test_score_is_cross_entropy_and_the_metrics():
    log_probs = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25001]]).log()
    s = evaluate.score(torch.tensor([0, 1]), log_probs)
    assert s["loss"] == pytest.approx(
        -(torch.tensor(0.7).log() + torch.tensor(0.25).log()).item() / 2
    )
    assert s["wa"] == 0.5 and s["ua"] == 0.5


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
    return folder


def report(root):
    return subprocess.run(
        [sys.executable, ROOT / "evaluate.py", root], capture_output=True, text=True
    )


def test_the_report_sets_means_beside_the_paper_and_names_missing_folds(tmp_path):
    for fold, right in ((1, 4), (2, 6), (3, 8)):
        write_run(tmp_path, "mmt", False, fold, right=right)
    for fold in range(1, 6):
        write_run(tmp_path, "audio-fc", True, fold)
    done = report(tmp_path)
    assert done.returncode == 0, done.stderr
    (mmt,) = [line for line in done.stdout.splitlines() if line.strip().startswith("18 MMT")]
    # 50, 75, 100: mean 75, standard deviation 25; the paper's 80.36 and 81.70.
    assert "75.00 ± 25.00 (80.36)" in mmt and "(81.70)" in mmt and "folds missing: 4 5" in mmt
    (audio,) = [line for line in done.stdout.splitlines() if line.strip().startswith("1 WavLM+FC")]
    assert "75.00 ±  0.00 (66.15)" in audio and "(65.35)" in audio and "missing" not in audio
    assert "toy" in done.stdout


def test_one_run_is_described_beside_chance_with_its_confusion_matrix():
    counts = [[3, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 2]]  # 8 utterances, 3 classes
    result = {"corpus": "toy", "wa": 0.625, "ua": 0.6, "fold": 5, "epochs": 9, "seconds": 2.0}
    text = evaluate.describe(result | {"confusion": counts, "n_test": 8})
    assert "WA 62.50%  UA 60.00%" in text and "WA 50.00%  UA 33.33%" in text  # 4 of 8; 1 of 3
    neu, hap, ang, sad = text.splitlines()[-4:]
    assert neu.split() == ["neu", "0.75", "0.25", "0.00", "0.00", "of", "4"]
    assert hap.split()[3] == "1.00" and ang.split()[-1] == "0" and sad.split()[4] == "1.00"


def test_corpora_never_share_a_table(tmp_path):
    write_run(tmp_path, "mmt", False, 5, corpus="toy")
    write_run(tmp_path, "mmt", False, 5, corpus="iemocap", right=8)
    out = report(tmp_path).stdout
    assert "Table 1 with iemocap" in out and "Table 1 with toy" in out and "87.50" not in out
    assert out.count("Table 2") == 2


def test_flipped_switches_and_selection_on_test_never_share_a_table(tmp_path):
    write_run(tmp_path / "a", "mmt", False, 5)
    flipped = write_run(tmp_path / "b", "mmt", False, 5)
    (flipped / "config.json").write_text('{"cma_residual": true}')
    write_run(tmp_path / "c", "mmt", False, 5, select="test")
    out = report(tmp_path).stdout
    assert out.count("Table 1 with toy") == 3
    assert "Table 1 with toy, cma_residual True:" in out and "toy, SELECTED ON TEST:" in out


@pytest.mark.parametrize("harm", [
    lambda f: (f / "result.json").write_text('{"corpus": "toy"'),
    lambda f: (f / "result.json").write_text("[]"),
    lambda f: (f / "result.json").unlink(),
    lambda f: (f / "result.json").write_bytes(b"\xff\xfe"),
    lambda f: (f / "result.json").write_text((f / "result.json").read_text().replace('"wa": 0.75', '"wa": 0.9')),
])  # fmt: skip
def test_a_damaged_run_is_named_and_left_out_and_the_exit_code_says_so(harm, tmp_path):
    write_run(tmp_path, "ef", True, 1)
    harm(write_run(tmp_path, "ef", True, 2))
    done = report(tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "fold2-seed0" in done.stderr and "13 EF frozen" in done.stdout


def test_a_folder_without_runs_is_said(tmp_path):
    done = report(tmp_path)
    assert done.returncode == 1 and "no run in it" in done.stderr


def test_the_papers_numbers_are_the_papers():
    # The sums of Table 1's columns, taken from the paper's text, and the rows that its text quotes.
    rows = list(evaluate.TABLE_1.values())
    assert [round(sum(r[i] for r in rows), 2) for i in (2, 3, 4, 5)] == [
        657.38,
        669.67,
        674.34,
        680.31,
    ]
    assert evaluate.TABLE_1["mmt"][4:] == (80.36, 81.70) and evaluate.TABLE_2[False] == (
        84.45,
        84.39,
    )
    assert (
        evaluate.system_number("audio-fc", True) == 1 and evaluate.system_number("mmt", False) == 18
    )


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
