"""The studies on run folders by hand, against loops, and on one small training."""

import doctest
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from evaluate import find_runs
from tests.conftest import change, neutral, write_run
from tests.studies import bench, compare, curves, parts, select_on_test

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
        right = [row[0] == row[system] for row in rows]
        recalls = []
        for y in {row[0] for row in rows}:
            of_class = [r for r, row in zip(right, rows, strict=True) if row[0] == y]
            recalls.append(np.mean(of_class))
        return np.array([np.mean(right), np.mean(recalls)])

    draws = []
    for _ in range(1500):
        rows = sum(chance.choices(dialogs, k=12), [])
        draws.append(accuracies(rows, 2) - accuracies(rows, 1))
    counts = np.zeros((2, 12, 4, 4), dtype=int)
    for d, rows in enumerate(dialogs):
        for y, a, b in rows:
            counts[0, d, y, a] += 1
            counts[1, d, y, b] += 1
    expected = np.percentile(draws, [2.5, 97.5], axis=0)
    np.testing.assert_allclose(compare.bootstrap(*counts), expected, atol=0.015)


def run_compare(capsys, root, a, b):
    """Compare two systems that ran once, from the rows of their predictions."""
    write_run(root / "a" / "run", frozen=True, rows=a)
    write_run(root / "b" / "run", rows=b)
    compare.main([str(root / "a"), str(root / "b")])
    return capsys.readouterr().out


def test_differences_are_paired_by_fold_and_seed(tmp_path, capsys):
    # Fold 3 has no partner in B, and seed 2 none in A.
    for system, runs in {
        "a": [(1, 0, 4), (2, 0, 2), (1, 1, 5), (3, 0, 1)],
        "b": [(1, 0, 5), (2, 0, 6), (1, 1, 2), (2, 2, 8)],
    }.items():
        for fold, seed, right in runs:
            folder = tmp_path / system / f"{fold}-{seed}"
            run = {"fold": fold, "seed": seed, "rows": neutral(right, fold=fold)}
            write_run(folder, frozen=system == "a", **run)
    compare.main([str(tmp_path / "a"), str(tmp_path / "b")])
    out = capsys.readouterr().out
    # +1, +4 and -3 of 8 are +12.5, +50 and -37.5 points: 25 / 3 in the mean.
    sd = np.std([12.5, 50, -37.5], ddof=1)
    row = ["WA", "45.83", "54.17", f"{25 / 3:+.2f} ± {sd:.2f}", "+31.25", "-37.50"]
    lines = [line.split("|") for line in out.splitlines()]
    assert row in [[cell.strip() for cell in line[1:-1]] for line in lines]
    assert "A: Sys. 17 (MMT frozen), toy" in out and "B: Sys. 18" in out
    # An utterance counts once: fold 1 with seed 0 alone, and fold 2.
    assert "16 predictions in 2 dialogues" in out
    assert "only A is right in 0, only B in 5" in out and "p = 0.0625" in out  # 2 / 2^5
    assert "WA of B minus A: +31.25 points" in out
    for line in out.splitlines():
        if "." in line and any(c.isdigit() for c in line) and line[0] not in "|W":
            assert "toy" in line


@pytest.mark.parametrize(
    ("dialogs", "trusted", "interval"), [(1, True, 0), (2, False, 2), (10, True, 2)]
)
def test_few_dialogues_have_no_interval_or_one_that_cannot_be_trusted(
    dialogs, trusted, interval, tmp_path, capsys
):
    rows = neutral(12, 20, dialogs=dialogs)
    out = run_compare(capsys, tmp_path, rows, rows)
    assert "p = 1\n" in out and "+0.00 points" in out and "disagree" not in out
    assert out.count("95 % interval") == interval
    assert out.count("+0.00 to +0.00 (contains 0: no difference is shown)") == interval
    assert ("cannot be trusted" in out) != trusted
    assert ("There is no interval" in out) == (dialogs == 1)


@pytest.mark.parametrize(("dialogs", "belief"), [(3, "neither"), (12, "the interval")])
def test_where_mcnemar_alone_shows_a_difference(dialogs, belief, tmp_path, capsys):
    # All that B alone gets right is in one dialogue. Draws without it are equal.
    n = 12 * dialogs
    a, b = neutral(0, n, dialogs=dialogs), neutral(12, n, dialogs=dialogs)
    out = run_compare(capsys, tmp_path, a, b)
    assert "p = 0.000488" in out  # 2 / 2^12
    assert "They disagree about WA" in out and f"believe {belief}" in out


def test_where_the_interval_alone_shows_a_difference(tmp_path, capsys):
    # In five of ten dialogues, B is right once more. Few draws have none of these five.
    names = [f"Ses05F_impro{d:02}_F000" for d in range(10)]
    a = [(name, 0, 3) for name in names]
    b = [(name, 0, 0 if d < 5 else 3) for d, name in enumerate(names)]
    out = run_compare(capsys, tmp_path, a, b)
    assert "p = 0.0625" in out and "disagree about WA" in out and "trusted" not in out
    assert "believe the interval" in out


def test_mixtures_and_unlike_test_data_are_refused(tmp_path, capsys):
    a = write_run(tmp_path / "a" / "1", frozen=True).parent
    b = write_run(tmp_path / "b" / "1").parent
    write_run(tmp_path / "two" / "1")
    write_run(tmp_path / "two" / "2", frozen=True)
    write_run(tmp_path / "settings" / "1")
    write_run(tmp_path / "settings" / "2", fold=2, title="toy, context=5")
    write_run(tmp_path / "fold" / "1", fold=2)
    write_run(tmp_path / "longer" / "1", rows=neutral(6, 9))
    name, _, guess = neutral(6)[-1]
    write_run(tmp_path / "label" / "1", rows=[*neutral(6)[:-1], (name, 2, guess)])
    for folder, message in (
        ("two", "B needs the finished runs of one system"),
        ("settings", "B needs the finished runs of one system"),
        ("fold", "no run of the same fold and seed"),
        ("longer", "different test data"),
        ("label", "different test data"),
    ):
        with pytest.raises(data.InputError, match=message):
            compare.main([str(a), str(tmp_path / folder)])
    with pytest.raises(data.InputError, match="A needs"):
        compare.main([str(tmp_path / "two"), str(a)])
    # A damaged run is named after the comparison of the others.
    change(write_run(b / "3", fold=3) / "result.json", b"{", b"")
    with pytest.raises(data.InputError, match="/b/3"):
        compare.main([str(a), str(b)])
    assert "B minus A" in capsys.readouterr().out


# --- Parts ----------------------------------------------------------------------------


def test_parts_pool_the_runs_of_a_system(tmp_path, capsys):
    rows = [
        ("Ses05F_impro01_F000", 0, 0),
        ("Ses05F_impro01_M000", 0, 3),
        ("Ses05F_script01_1_F000", 2, 2),
        ("Ses05F_script01_1_F001", 0, 0),
    ]
    write_run(tmp_path / "0", frozen=True, rows=rows)
    again = [(name, y, 0) for name, y, _ in rows]
    write_run(tmp_path / "1", frozen=True, seed=1, rows=again)
    # Other corpora are neither improvised nor scripted, whatever their names.
    write_run(tmp_path / "2", corpus="mine", rows=[("manuscript_1", 1, 1)])
    parts.main([str(tmp_path)])
    _, mine, toy = capsys.readouterr().out.split("Parts of")
    found = {}
    for line in toy.splitlines():
        if line.startswith("| 17"):
            _, part, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            found[part] = " ".join(cells)
    assert found == {
        "all": "8 75.00 66.67",  # recalls of 5 / 6 and 1 / 2
        "improvised": "4 75.00 75.00",
        "scripted": "4 75.00 75.00",
        "speaker Ses05F": "6 83.33 75.00",
        "speaker Ses05M": "2 50.00 50.00",
        "class neu": "6 83.33 83.33",
        "class ang": "2 50.00 50.00",
    }
    assert "toy" in toy and "mine" in mine
    assert "scripted" not in mine and "improvised" not in mine


def test_a_text_is_seen_if_another_session_has_it(small_corpus, tmp_path, capsys):
    texts = [(1, "Oh, no!"), (2, "oh no"), (3, "It is."), (3, "it is"), (4, "Its")]
    corpus = []
    for i, (session, text) in enumerate(texts):
        u = data.Utterance(str(i), session, "d", "s", 0.0, 1.0, text, "neu", None)
        corpus.append(u)
    seen = parts.seen_elsewhere(corpus)
    assert seen == {"0": True, "1": True, "2": False, "3": False, "4": False}

    names = [u.id for u in data.read_iemocap(small_corpus)[0] if u.session == 5]
    write_run(tmp_path / "5", rows=[(name, 0, 0) for name in names])
    parts.main([str(tmp_path), "--iemocap", str(small_corpus)])
    assert "| text " in capsys.readouterr().out
    write_run(tmp_path / "1", fold=1, rows=neutral(8, 30, fold=1))
    with pytest.raises(data.InputError, match="is not in"):
        parts.main([str(tmp_path), "--iemocap", str(small_corpus)])


# --- Curves ---------------------------------------------------------------------------


def make_log(dev_losses, trigger=None):
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
        write_run(
            tmp_path / "runs" / str(fold), fold=fold, log=make_log(losses, trigger)
        )
    runs, _ = find_runs(tmp_path / "runs")
    figure = curves.draw_curves(runs)
    loss, ua = figure.axes
    marks = [line for line in loss.lines if len(line.get_xdata()) == 1]
    assert [line.get_xydata().tolist() for line in marks] == [[[2, 0.4]]]
    assert marks[0].get_marker() == "v"
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
    for damage in ('{"epoch": 1', ""):
        (runs[0].folder / "log.jsonl").write_text(damage)
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
    split = data.split
    select_on_test.main([*arguments, "--device", "cpu", "--lr-frozen", "0.5"])
    assert data.split is split
    corpus, _ = data.read_iemocap(small_corpus)
    assert trained == set(split(corpus, 5, 0)[0])

    (run,), problems = find_runs(Path("runs"))
    assert "SELECTED-ON-TEST" in run.config["title"] and not problems
    # The development data is the test data.
    last = json.loads((run.folder / "log.jsonl").read_text().splitlines()[-1])
    assert run.result["ua"] == pytest.approx(last["dev_ua"])
    out = capsys.readouterr().out
    assert f"SELECTED-ON-TEST, {run.folder.parent.name}: UA on the test session" in out


def test_selected_epochs_are_beside_the_last_one(tmp_path):
    for fold, best in ((1, 0.75), (2, 0.85)):
        log = make_log([0.5, 0.3, 0.6, 0.4])
        for row, ua in zip(log, [0.50, 0.60, best, 0.65], strict=True):
            row["dev_ua"] = ua
        write_run(tmp_path / f"fold{fold}-seed0", fold=fold, log=log)
    table = select_on_test.describe_selection(tmp_path)
    lines = [line.strip("|").split("|") for line in table.splitlines()[4:]]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["fold1-seed0", "65.00", "60.00", "75.00"],
        ["fold2-seed0", "65.00", "60.00", "85.00"],
        ["mean", "65.00", "60.00", "80.00"],
    ]


@pytest.mark.slow
def test_the_bench_measures_both_codes(capsys):
    bench.main(["--n", "2", "--repeats", "1", "--before", "HEAD"])
    assert capsys.readouterr().out.count(" s ") == 16
