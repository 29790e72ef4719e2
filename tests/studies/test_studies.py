"""The studies on run folders by hand, against loops, and on one small training."""

import doctest
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from evaluate import find_runs, metrics
from tests.conftest import change
from tests.studies import bench, compare, curves, parts, select_on_test

CLASSES = ["neu", "hap", "ang", "sad"]


def write_run(root, system, fold, seed, rows, corpus="toy", settings="", log=()):
    """Write a finished run of MMT frozen (17) or fine-tuned (18).

    rows   (utterance, label, prediction), by class numbers
    """
    run = {"corpus": corpus, "fusion": "mmt", "frozen": system == 17}
    run |= {"fold": fold, "seed": seed}
    folder = root / f"{system}{settings}" / f"fold{fold}-seed{seed}"
    folder.mkdir(parents=True)
    config = {**run, "title": corpus + settings, "settings": {}}
    config |= {"model": {}, "weights_checksums": {}, "upstreams": {}}
    _, truth, guesses = zip(*rows, strict=True)
    result = {**run, **metrics(truth, guesses), "n_test": len(rows), "loss": 1.0}
    result |= {"epochs": len(log), "finetune_epoch": None}
    for row in log:
        if row["event"] == "finetune":
            result["finetune_epoch"] = row["epoch"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    table = "utterance,speaker,label,prediction,neu,hap,ang,sad\n"
    for name, label, guess in rows:
        speaker = name[:5] + name.rpartition("_")[2][0]
        table += f"{name},{speaker},{CLASSES[label]},{CLASSES[guess]},.4,.2,.2,.2\n"
    (folder / "predictions.csv").write_text(table)
    return folder


def neutral(fold, right, n=8, dialogs=1):
    """Make n neutral utterances. The first ones are right, the others taken for sad."""
    rows = []
    for i in range(n):
        name = f"Ses0{fold}F_impro{1 + i * dialogs // n:02}_F{i:03}"
        rows.append((name, 0, 0 if i < right else 3))
    return rows


# --- Is a difference real? ------------------------------------------------------------


@pytest.mark.parametrize("counts", [(0, 1), (1, 5), (3, 3), (2, 9), (0, 0), (6, 0)])
def test_mcnemar_against_all_outcomes_of_the_coins(counts):
    n = sum(counts)
    heads = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
    uneven = [abs(h - n / 2) >= abs(counts[0] - n / 2) for h in heads]
    assert compare.mcnemar(*counts) == pytest.approx(sum(uneven) / 2**n)
    assert doctest.testmod(compare).attempted == 1


def test_bootstrap_against_a_loop_over_drawn_dialogues():
    chance = random.Random(0)
    dialogs = []  # lists of (truth, guess of A, guess of B)
    for d in range(12):
        rows = []
        for _ in range(5 + d):
            y = chance.randrange(4)
            a = y if chance.random() < 0.5 else chance.randrange(4)
            b = y if chance.random() < 0.5 + 0.03 * d else chance.randrange(4)
            rows.append((y, a, b))
        dialogs.append(rows)

    def accuracies(rows, system):
        by_class = {}
        for row in rows:
            by_class.setdefault(row[0], []).append(row[0] == row[system])
        recalls = [sum(v) / len(v) for v in by_class.values()]
        right = sum(row[0] == row[system] for row in rows)
        return right / len(rows), sum(recalls) / len(recalls)

    draws = []
    for _ in range(3000):
        rows = [row for d in chance.choices(dialogs, k=12) for row in d]
        a, b = accuracies(rows, 1), accuracies(rows, 2)
        draws.append((b[0] - a[0], b[1] - a[1]))
    counts = np.zeros((2, 12, 4, 4), dtype=int)
    for d, rows in enumerate(dialogs):
        for y, a, b in rows:
            counts[0, d, y, a] += 1
            counts[1, d, y, b] += 1
    low, high = compare.bootstrap(*counts)
    for k in (0, 1):
        ordered = sorted(draw[k] for draw in draws)
        assert (low[k], high[k]) == pytest.approx(
            (ordered[75], ordered[-76]), abs=0.012
        )


def run_compare(capsys, a, b):
    compare.main([str(a), str(b)])
    return capsys.readouterr().out


def test_differences_are_paired_by_fold_and_seed(tmp_path, capsys):
    # Fold 3 has no partner in B, and seed 2 none in A.
    for fold, seed, right in ((1, 0, 4), (2, 0, 2), (1, 1, 5), (3, 0, 1)):
        write_run(tmp_path / "a", 17, fold, seed, neutral(fold, right))
    for fold, seed, right in ((1, 0, 5), (2, 0, 6), (1, 1, 2), (2, 2, 8)):
        write_run(tmp_path / "b", 18, fold, seed, neutral(fold, right))
    out = run_compare(capsys, tmp_path / "a", tmp_path / "b")
    # +1, +4 and -3 of 8 are +12.5, +50 and -37.5 points. Their mean is 25 / 3.
    points = (12.5, 50.0, -37.5)
    mean = sum(points) / 3
    sd = math.sqrt(sum((x - mean) ** 2 for x in points) / 2)
    row = ["WA", "45.83", "54.17", f"{mean:+.2f} ± {sd:.2f}", "+31.25", "-37.50"]
    lines = [line.split("|") for line in out.splitlines()]
    assert row in [[cell.strip() for cell in line[1:-1]] for line in lines]
    assert "A: Sys. 17 (MMT frozen), toy" in out and "B: Sys. 18" in out
    # An utterance counts once: fold 1 with seed 0 alone, and fold 2.
    assert "16 predictions in 2 dialogues" in out
    assert "only A is right in 0, only B in 5" in out and "p = 0.0625" in out  # 2 / 2^5
    assert "WA of B minus A: +31.25 points" in out
    assert "With 2 dialogues, the intervals cannot be trusted" in out
    for line in out.splitlines():
        if "." in line and any(c.isdigit() for c in line) and line[0] not in "|W":
            assert "toy" in line


def test_one_dialogue_has_no_interval(tmp_path, capsys):
    write_run(tmp_path / "a", 17, 1, 0, neutral(1, 2))
    write_run(tmp_path / "b", 18, 1, 0, neutral(1, 8))
    out = run_compare(capsys, tmp_path / "a", tmp_path / "b")
    assert "+75.00 points" in out and "interval" in out and "95 %" not in out


def test_identical_systems_differ_by_nothing(tmp_path, capsys):
    for system in (17, 18):
        write_run(tmp_path / str(system), system, 1, 0, neutral(1, 12, 20, 10))
    out = run_compare(capsys, tmp_path / "17", tmp_path / "18")
    assert "p = 1\n" in out and "trusted" not in out and "disagree" not in out
    assert out.count("+0.00 to +0.00 (contains 0: no difference is shown)") == 2


@pytest.mark.parametrize(("dialogs", "belief"), [(3, "neither"), (12, "the interval")])
def test_where_the_tests_disagree_a_sentence_says_which_to_believe(
    dialogs, belief, tmp_path, capsys
):
    # All that B gets right and A does not is in one dialogue. So McNemar is sure, and
    # draws without this dialogue show no difference.
    n = 12 * dialogs
    better = [neutral(1, 12, n, dialogs), neutral(1, 0, n, dialogs)]
    write_run(tmp_path / "a", 17, 1, 0, better[1])
    write_run(tmp_path / "b", 18, 1, 0, better[0])
    out = run_compare(capsys, tmp_path / "a", tmp_path / "b")
    assert "p = 0.000488" in out  # 2 / 2^12
    assert "They disagree about WA" in out and f"believe {belief}" in out


def test_mixtures_and_unlike_test_data_are_refused(tmp_path, capsys):
    a = write_run(tmp_path / "a", 17, 1, 0, neutral(1, 4)).parent
    write_run(tmp_path / "two", 17, 1, 0, neutral(1, 4))
    write_run(tmp_path / "two", 18, 2, 0, neutral(2, 4))
    write_run(tmp_path / "set", 17, 1, 0, neutral(1, 4))
    write_run(tmp_path / "set", 17, 2, 0, neutral(2, 4), settings=", context=5")
    write_run(tmp_path / "fold", 18, 2, 0, neutral(2, 4))
    write_run(tmp_path / "other", 18, 1, 0, neutral(1, 4, n=9))
    label = write_run(tmp_path / "label", 18, 1, 0, neutral(1, 4))
    change(label / "predictions.csv", b"F007,Ses01F,neu", b"F007,Ses01F,ang")
    result = json.loads((label / "result.json").read_text())
    result |= metrics([0] * 7 + [2], [0] * 4 + [3] * 4)
    (label / "result.json").write_text(json.dumps(result))
    for folder, message in (
        ("two", "B needs the finished runs of one system"),
        ("set", "B needs the finished runs of one system"),
        ("fold", "no run of the same fold and seed"),
        ("other", "different test data"),
        ("label", "different test data"),
    ):
        with pytest.raises(data.InputError, match=message):
            compare.main([str(a), str(tmp_path / folder)])
    with pytest.raises(data.InputError, match="A needs"):
        compare.main([str(tmp_path / "two"), str(a)])
    # A damaged run is named after the comparison of the others.
    damaged = write_run(tmp_path / "fold", 18, 3, 0, neutral(3, 4))
    (damaged / "result.json").write_text("{")
    write_run(tmp_path / "fold", 18, 1, 0, neutral(1, 4))
    with pytest.raises(data.InputError, match="fold3-seed0"):
        compare.main([str(a), str(tmp_path / "fold")])
    assert "B minus A" in capsys.readouterr().out


# --- Parts ----------------------------------------------------------------------------


def test_parts_pool_the_runs_of_a_system(tmp_path, capsys):
    rows = [
        ("Ses05F_impro01_F000", 0, 0),
        ("Ses05F_impro01_M000", 0, 3),
        ("Ses05F_script01_1_F000", 2, 2),
        ("Ses05F_script01_1_F001", 0, 0),
    ]
    write_run(tmp_path, 17, 5, 0, rows)
    write_run(tmp_path, 17, 5, 1, [(name, y, 0) for name, y, _ in rows])
    # Other corpora are neither improvised nor scripted, whatever their names.
    write_run(tmp_path, 18, 1, 0, [("manuscript_1", 1, 1)], corpus="mine")
    parts.main([str(tmp_path)])
    tables = capsys.readouterr().out.split("Parts of")
    found = {}
    for line in tables[2].splitlines():
        if line.startswith("| 17"):
            _, part, n, wa, ua = [cell.strip() for cell in line.strip("|").split("|")]
            found[part] = (int(n), float(wa), float(ua))
    assert found == {
        "all": (8, 75.00, pytest.approx(100 * (5 / 6 + 1 / 2) / 2, abs=0.01)),
        "improvised": (4, 75.00, 75.00),
        "scripted": (4, 75.00, 75.00),
        "speaker Ses05F": (6, pytest.approx(83.33, abs=0.01), 75.00),
        "speaker Ses05M": (2, 50.00, 50.00),
        "class neu": (
            6,
            pytest.approx(83.33, abs=0.01),
            pytest.approx(83.33, abs=0.01),
        ),
        "class ang": (2, 50.00, 50.00),
    }
    assert "toy" in tables[2] and "mine" in tables[1]
    assert "scripted" not in tables[1] and "improvised" not in tables[1]


def test_a_text_is_seen_if_another_session_has_it(small_corpus, tmp_path, capsys):
    texts = [(1, "Oh, no!"), (2, "oh no"), (3, "It is."), (3, "it is"), (4, "Its")]
    corpus = []
    for i, (session, text) in enumerate(texts):
        corpus.append(
            data.Utterance(str(i), session, "d", "s", 0.0, 1.0, text, "neu", None)
        )
    seen = parts.seen_elsewhere(corpus)
    assert seen == {"0": True, "1": True, "2": False, "3": False, "4": False}

    names = [u.id for u in data.read_iemocap(small_corpus)[0] if u.session == 5]
    write_run(tmp_path, 17, 5, 0, [(name, 0, 0) for name in names])
    parts.main([str(tmp_path), "--iemocap", str(small_corpus)])
    assert "| text " in capsys.readouterr().out
    write_run(tmp_path, 17, 1, 0, neutral(1, 8, n=30))
    with pytest.raises(data.InputError, match="is not in"):
        parts.main([str(tmp_path), "--iemocap", str(small_corpus)])


# --- Curves ---------------------------------------------------------------------------


def make_log(dev_losses, trigger):
    log = []
    for epoch, loss in enumerate(dev_losses, 1):
        event = "finetune" if epoch == trigger else "continue"
        row = {"epoch": epoch, "dev_loss": loss, "train_loss": 2 * loss, "event": event}
        log.append({**row, "dev_ua": 1 - loss})
    return log


def test_curves_show_every_epoch_and_mark_the_trigger(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    losses = [0.5, 0.4, 0.3, 0.35]
    for fold, trigger in ((1, 2), (2, None)):
        log = make_log(losses, trigger)
        write_run(tmp_path / "runs", 18, fold, 0, neutral(fold, 4), log=log)
    runs, _ = find_runs(tmp_path / "runs")
    figure = curves.draw_curves(runs)
    loss, ua = figure.axes
    points = {}
    for line in loss.lines:
        if len(line.get_xdata()) == 1:
            points[line.get_marker()] = line.get_xydata().tolist()
    assert points == {"v": [[2, 0.4]]}
    dev, train = loss.lines[:2]
    assert dev.get_xydata().tolist() == [[i + 1, x] for i, x in enumerate(losses)]
    assert train.get_ydata().tolist() == [1.0, 0.8, 0.6, 0.7]
    assert train.get_linestyle() == ":"
    assert ua.lines[0].get_ydata().tolist() == pytest.approx([50, 60, 70, 65])
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels[:2] == ["fold 1, seed 0", "fold 2, seed 0"] and len(labels) == 3
    figure.draw_without_rendering()
    ticks = [float(tick.get_text().replace("−", "-")) for tick in ua.get_xticklabels()]
    assert all(tick == int(tick) for tick in ticks)
    title = figure.get_suptitle()
    assert "Emotion recognition" in title and "MMT fine-tuned" in title
    assert "toy" in title

    curves.main([str(tmp_path / "runs"), str(tmp_path / "pictures")])
    (path,) = (tmp_path / "pictures").iterdir()
    assert f"{path}: toy, Sys. 18" in capsys.readouterr().out
    (runs[0].folder / "log.jsonl").write_text('{"epoch": 1')
    with pytest.raises(data.InputError, match="log.jsonl: damaged"):
        curves.draw_curves(runs)


# --- Selecting on test ----------------------------------------------------------------


def test_selecting_on_test_trains_on_no_test_row(
    small_corpus, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    trained = set()
    batch = data.batch

    def watch(rows, *rest):
        if torch.is_grad_enabled():  # a training step
            trained.update(rows.tolist())
        return batch(rows, *rest)

    monkeypatch.setattr(data, "batch", watch)
    arguments = ["--iemocap", str(small_corpus), "--partial", "--upstream", "tiny"]
    arguments += ["--fusion", "text-fc", "--frozen", "--max-epochs", "3"]
    select_on_test.main([*arguments, "--device", "cpu", "--lr-frozen", "0.5"])
    corpus, _ = data.read_iemocap(small_corpus)
    assert trained and not any(corpus[row].session == 5 for row in trained)
    assert data.split is select_on_test.honest_split

    (run,), problems = find_runs(Path("runs"))
    assert "SELECTED-ON-TEST" in run.config["title"] and not problems
    # The development data is the test data.
    last = json.loads((run.folder / "log.jsonl").read_text().splitlines()[-1])
    assert run.result["ua"] == pytest.approx(last["dev_ua"])
    out = capsys.readouterr().out
    assert f"SELECTED-ON-TEST, {run.folder.parent.name}: UA on the test session" in out


def test_selected_epochs_are_beside_the_last_one(tmp_path):
    for fold, best in ((1, 0.75), (2, 0.85)):
        log = make_log([0.5, 0.3, 0.6, 0.4], None)
        for row, ua in zip(log, [0.50, 0.60, best, 0.65], strict=True):
            row["dev_ua"] = ua
        write_run(tmp_path, 17, fold, 0, neutral(fold, 4), log=log)
    table = select_on_test.describe_selection(tmp_path / "17")
    lines = [line.strip("|").split("|") for line in table.splitlines()[4:]]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["fold1-seed0", "65.00", "60.00", "75.00"],
        ["fold2-seed0", "65.00", "60.00", "85.00"],
        ["mean", "65.00", "60.00", "80.00"],
    ]


@pytest.mark.slow
def test_the_bench_measures_both_codes(capsys):
    bench.main(["--n", "2", "--repeats", "1"])
    assert capsys.readouterr().out.count(" MiB, ") == 8
