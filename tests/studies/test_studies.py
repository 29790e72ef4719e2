"""The studies on run folders by hand, against loops, and on one small training."""

import doctest
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data
from evaluate import find_runs
from tests.conftest import neutral, write_run
from tests.studies import bench, compare, curves, parts, select_on_test

# --- Is a difference real? ------------------------------------------------------------


@pytest.mark.parametrize("counts", [(0, 1), (1, 5), (3, 3), (2, 9), (0, 0), (6, 0)])
def test_mcnemar_against_all_outcomes_of_the_coins(counts):
    n = sum(counts)
    heads = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
    uneven = [abs(h - n / 2) >= abs(counts[0] - n / 2) for h in heads]
    assert compare.mcnemar(*counts) == pytest.approx(sum(uneven) / 2**n)
    assert doctest.testmod(compare).attempted == 1


def test_bootstrap_of_two_dialogues_reaches_from_one_to_the_other():
    counts = np.zeros((2, 2, 4, 4), dtype=int)  # system, dialogue, truth, guess
    # In dialogue 0, A takes both classes for class 0, and B knows them.
    counts[0, 0, [0, 1], [0, 0]] = (3, 1)
    counts[1, 0, [0, 1], [0, 1]] = (3, 1)
    # In dialogue 1, A alone knows one of two utterances.
    counts[0, 1, 0, [0, 1]] = 1
    counts[1, 1, 0, 1] = 2
    # One draw in four has dialogue 0 twice, one in four has dialogue 1 twice.
    low, high = compare.bootstrap(*counts)
    assert low.tolist() == [-0.5, -0.5]
    assert high.tolist() == [0.25, 0.5]  # WA from 3 / 4 to 1, UA from 1 / 2 to 1


def cells(out):
    """Split the lines of tables at their bars, into lists of cells."""
    lines = [line.strip("|").split("|") for line in out.splitlines()]
    return [[cell.strip() for cell in line] for line in lines]


def write_systems(root, runs_a, runs_b):
    """Write runs (fold, seed, rows) of Sys. 17 and Sys. 18. Returns their folders."""
    for system, runs in (("a", runs_a), ("b", runs_b)):
        for fold, seed, rows in runs:
            folder = root / system / f"{fold}-{seed}"
            write_run(folder, frozen=system == "a", fold=fold, seed=seed, rows=rows)
    return [str(root / "a"), str(root / "b")]


def test_differences_are_paired_by_fold_and_seed(tmp_path, capsys):
    def runs(counts):
        return [(f, seed, neutral(right, fold=f)) for f, seed, right in counts]

    # Fold 3 has no partner in B, and seed 2 none in A.
    a = runs([(1, 0, 4), (2, 0, 2), (1, 1, 5), (3, 0, 1)])
    b = runs([(1, 0, 5), (2, 0, 6), (1, 1, 2), (2, 2, 8)])
    compare.main(write_systems(tmp_path, a, b))
    out = capsys.readouterr().out
    # +1, +4 and -3 of 8 are +12.5, +50 and -37.5 points: 25 / 3 in the mean.
    sd = np.std([12.5, 50, -37.5], ddof=1)
    row = ["WA", "45.83", "54.17", f"{25 / 3:+.2f} ± {sd:.2f}", "+31.25", "-37.50"]
    assert row in cells(out)
    assert "A: Sys. 17 (MMT frozen), toy" in out and "B: Sys. 18" in out
    # An utterance counts once: fold 1 with seed 0 alone, and fold 2.
    assert "16 predictions in 2 dialogue(s)" in out and "do not trust" in out
    assert "only A is right in 0, only B in 5" in out and "p = 0.0625" in out  # 2 / 2^5
    assert "WA of B minus A: +31.25 points" in out
    for line in out.splitlines():
        if ": " in line and any(c.isdigit() for c in line):
            assert "toy" in line


def test_equal_systems_have_an_interval_that_contains_0(tmp_path, capsys):
    rows = neutral(12, 20, dialogs=10)
    compare.main(write_systems(tmp_path, [(5, 0, rows)], [(5, 0, rows)]))
    out = capsys.readouterr().out
    assert "p = 1\n" in out and "do not trust" not in out
    assert out.count("+0.00 to +0.00 (contains 0: no difference is shown)") == 2


OTHER_LABEL = [*neutral(6)[:-1], (neutral(6)[-1][0], 2, 3)]


@pytest.mark.parametrize(
    ("run", "changes", "message"),
    [
        ((2, 0, neutral(6, fold=2)), {}, "no run of the same fold and seed"),
        ((5, 0, neutral(6, 9)), {}, "different test data"),
        ((5, 0, OTHER_LABEL), {}, "different test data"),
        ((5, 0, None), {"frozen": True}, "must have one system"),
        ((5, 0, None), {"title": "toy, context=5"}, "must have one system"),
        ((5, 0, None), {"wa": 0.1}, "damaged"),
    ],
)
def test_mixtures_and_unlike_test_data_are_refused(run, changes, message, tmp_path):
    folders = write_systems(tmp_path, [(5, 0, None)], [run])
    if changes:
        write_run(tmp_path / "b" / "another", fold=1, **changes)
    with pytest.raises(data.InputError, match=message):
        compare.main(folders)


# --- Parts ----------------------------------------------------------------------------


def test_parts_pool_the_runs_of_a_system(tmp_path, capsys):
    rows = [
        ("Ses05F_impro01_F000", 0, 0),
        ("Ses05F_impro01_M000", 0, 3),
        ("Ses05F_script01_1_F000", 2, 2),
        ("Ses05F_script01_1_F001", 0, 0),
    ]
    write_run(tmp_path / "0", rows=rows)
    write_run(tmp_path / "1", seed=1, rows=[(name, y, 0) for name, y, _ in rows])
    # Other corpora are neither improvised nor scripted, whatever their names.
    write_run(tmp_path / "2", corpus="mine", rows=[("manuscript_1", 1, 1)])
    parts.main([str(tmp_path)])
    _, mine, toy = capsys.readouterr().out.split("Parts of")
    assert "mine" in mine and "scripted" not in mine
    assert "toy" in toy
    assert [row[1:] for row in cells(toy)[4:11]] == [
        ["all", "8", "75.00", "66.67"],
        ["class ang", "2", "50.00", "50.00"],
        ["class neu", "6", "83.33", "83.33"],
        ["improvised", "4", "75.00", "75.00"],
        ["scripted", "4", "75.00", "75.00"],
        ["speaker Ses05F", "6", "83.33", "75.00"],
        ["speaker Ses05M", "2", "50.00", "50.00"],
    ]


def test_a_text_is_seen_if_another_session_has_it(small_corpus, tmp_path, capsys):
    texts = [(1, "Oh, no!"), (2, "oh no"), (3, "It is."), (3, "it is"), (4, "Its")]
    corpus = [SimpleNamespace(id=t, session=session, text=t) for session, t in texts]
    seen = parts.seen_elsewhere(corpus)
    assert [u for u in seen if seen[u]] == ["Oh, no!", "oh no"]

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
    runs = tmp_path / "runs"
    log = make_log([0.5, 0.4, 0.3, 0.35], trigger=2)
    write_run(runs / "0", fold=1, log=log)
    write_run(runs / "1", fold=1, seed=1, log=log)
    write_run(runs / "2", fold=2, log=make_log([0.9]))
    figure = curves.draw_curves(find_runs(runs)[0])
    lines = {}
    for ax in figure.axes:
        lines[ax.get_ylabel()] = ax.lines[0].get_ydata().tolist()
        assert ax.lines[0].get_xdata().tolist() == [1, 2, 3, 4]
        # Epochs 2 and 4 have dots, as has a run of one epoch.
        assert [line.get_markevery() for line in ax.lines] == [[1, 3], [1, 3], [0]]
        # A fold has a colour, a seed has a line style.
        looks = [(line.get_color(), line.get_linestyle()) for line in ax.lines]
        assert looks == [("C1", "-"), ("C1", "--"), ("C2", "-")]
    assert lines == {
        "training loss": [1.0, 0.8, 0.6, 0.7],
        "development loss": [0.5, 0.4, 0.3, 0.35],
        "UA in development": [0.5, 0.6, 0.7, 0.65],
    }
    assert figure.get_suptitle() == "toy, Sys. 18 (MMT fine-tuned)"

    curves.main([str(runs), str(tmp_path / "pictures")])
    (path,) = (tmp_path / "pictures").iterdir()
    assert capsys.readouterr().out == f"{path}\n"


# --- Selecting on test ----------------------------------------------------------------


def test_selecting_on_test_trains_on_no_test_row(
    small_corpus, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    split = data.split
    flags = f"--iemocap {small_corpus} --partial --upstream tiny --fusion text-fc "
    flags += "--frozen --max-epochs 3 --device cpu --lr-frozen 0.5"
    select_on_test.main(flags.split())
    assert data.split is split  # the honest one again
    corpus, _ = data.read_iemocap(small_corpus)
    train_rows, dev_rows, test_rows = select_on_test.split_with_test_as_dev(
        corpus, 5, 0
    )
    assert train_rows == split(corpus, 5, 0)[0]
    assert dev_rows == test_rows == split(corpus, 5, 0)[2]

    (run,), problems = find_runs(Path("runs"))
    assert "SELECTED-ON-TEST" in run.config["title"] and not problems
    # The development data is the test data.
    last = curves.read_log(run.folder / "log.jsonl")[-1]
    assert run.result["ua"] == pytest.approx(last["dev_ua"])
    out = capsys.readouterr().out
    assert f"SELECTED-ON-TEST, {run.folder.parent.name}: UA on the test session" in out


def test_selected_epochs_are_beside_the_last_one(tmp_path):
    for fold, best in ((1, 0.75), (2, 0.85)):
        log = make_log([0.5, 0.3, 0.6, 0.4])
        for row, ua in zip(log, [0.50, 0.60, best, 0.65], strict=True):
            row["dev_ua"] = ua
        write_run(tmp_path / f"fold{fold}-seed0", fold=fold, log=log)
    assert cells(select_on_test.describe_selection(tmp_path))[4:] == [
        ["fold1-seed0", "65.00", "60.00", "75.00"],
        ["fold2-seed0", "65.00", "60.00", "85.00"],
        ["mean", "65.00", "60.00", "80.00"],
    ]


# --- Speed ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bench_measures_both_codes(capsys):
    bench.main(["--repeats", "1"])
    assert "fine-tuning step" in capsys.readouterr().out
