"""The studies on run folders by hand, against loops, and on one small training."""

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


@pytest.mark.parametrize("counts", [(1, 5), (3, 3), (9, 2), (0, 0)])
def test_mcnemar_against_all_outcomes_of_the_coins(counts):
    n = sum(counts)
    heads = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
    uneven = [abs(h - n / 2) >= abs(counts[0] - n / 2) for h in heads]
    assert compare.mcnemar(*counts) == pytest.approx(sum(uneven) / 2**n)


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


def test_differences_are_paired_by_fold_and_seed(tmp_path, capsys):
    # By fold and seed, the right ones of 8. Two runs have no partner.
    a = {(1, 0): 4, (2, 0): 2, (1, 1): 5, (3, 0): 1}
    b = {(1, 0): 5, (2, 0): 6, (1, 1): 2, (2, 2): 8}
    for name, system in (("a", a), ("b", b)):
        for (fold, seed), right in system.items():
            folder = tmp_path / name / f"{fold}-{seed}"
            rows = neutral(right, fold=fold)
            write_run(folder, frozen=name == "a", fold=fold, seed=seed, rows=rows)
    compare.main([str(tmp_path / "a"), str(tmp_path / "b")])
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


@pytest.mark.parametrize(("dialogs", "intervals"), [(1, 0), (9, 2), (10, 2)])
def test_intervals_need_two_dialogues_and_better_ten(
    dialogs, intervals, tmp_path, capsys
):
    folder = write_run(tmp_path / "run", rows=neutral(12, 20, dialogs=dialogs))
    compare.main([str(folder), str(folder)])
    out = capsys.readouterr().out
    assert "p = 1\n" in out
    line = "95 % interval +0.00 to +0.00 (contains 0: no difference is shown)"
    assert out.count("interval +") == out.count(line) == intervals
    assert ("believe the interval" in out) == (dialogs > 1)
    assert ("do not trust" in out) == (dialogs == 9)


@pytest.mark.parametrize(
    ("fold", "changes", "message"),
    [
        (2, {}, "no run of the same fold and seed"),
        (5, {"corpus_checksum": "1"}, "different corpora"),
        (1, {"frozen": True}, "must have one system"),
        (1, {"title": "toy, context=5"}, "must have one system"),
        (1, {"wa": 0.1}, "damaged"),
        (1, {"fold": 5}, "more than one run"),
    ],
)
def test_mixtures_and_unlike_corpora_are_refused(fold, changes, message, tmp_path):
    write_run(tmp_path / "a", frozen=True)
    write_run(tmp_path / "b" / "1", **({"fold": fold} | changes))
    if fold == 1:
        write_run(tmp_path / "b" / "5")
    with pytest.raises(data.InputError, match=message):
        compare.main([str(tmp_path / "a"), str(tmp_path / "b")])


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
    _, mine, toy = capsys.readouterr().out.split("Parts of the test data, ")
    assert mine.startswith("mine") and "scripted" not in mine
    assert toy.startswith("toy")
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

    # The second one is of another corpus.
    write_run(tmp_path / "5", rows=[("Ses05F_impro01_F000", 0, 0), ("d1_001", 0, 0)])
    parts.main([str(tmp_path), "--iemocap", str(small_corpus)])
    row = ["18", "text not seen", "1", "100.00", "100.00"]
    assert row in cells(capsys.readouterr().out)


# --- Curves ---------------------------------------------------------------------------


def make_log(dev_losses, dev_uas, trigger=None):
    log = []
    for epoch, (loss, ua) in enumerate(zip(dev_losses, dev_uas, strict=True), 1):
        entry = {"epoch": epoch, "train_loss": 2 * loss, "dev_loss": loss, "dev_ua": ua}
        entry["event"] = "finetune" if epoch == trigger else "continue"
        log.append(entry)
    return log


def test_curves_show_every_epoch_and_mark_the_trigger(tmp_path, monkeypatch):
    Figure = pytest.importorskip("matplotlib.figure").Figure
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda *arguments: saved.append(arguments))
    log = make_log([0.5, 0.4, 0.3, 0.6], [0.5, 0.6, 0.7, 0.4], trigger=2)
    write_run(tmp_path / "0", fold=1, log=log)
    write_run(tmp_path / "1", fold=2, seed=1, log=make_log([0.9], [0.1]))
    curves.main([str(tmp_path), str(tmp_path / "pictures")])
    ((figure, path),) = saved
    assert path == tmp_path / "pictures" / "toy, Sys. 18.png"
    lines = {ax.get_ylabel(): ax.lines[0].get_ydata().tolist() for ax in figure.axes}
    assert lines == {
        "training loss": [1.0, 0.8, 0.6, 1.2],
        "development loss": [0.5, 0.4, 0.3, 0.6],
        "UA in development": [0.5, 0.6, 0.7, 0.4],
    }
    for ax in figure.axes:
        assert ax.lines[0].get_xdata().tolist() == [1, 2, 3, 4]
        # Epochs 2 and 4 have dots, as has a run of one epoch.
        assert [line.get_markevery() for line in ax.lines] == [[1, 3], [0]]
        # A fold has a colour, a seed has a line style.
        looks = [(line.get_color(), line.get_linestyle()) for line in ax.lines]
        assert looks == [("C1", "-"), ("C2", "--")]


# --- Selecting on test ----------------------------------------------------------------


def test_selecting_on_test_trains_on_no_test_row(
    small_corpus, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    corpus, _ = data.read_iemocap(small_corpus)
    train_rows, _, test_rows = data.split(corpus, 5, 0)
    split = select_on_test.split_with_test_as_dev(corpus, 5, 0)
    assert split == (train_rows, test_rows, test_rows)

    flags = f"--iemocap {small_corpus} --partial --upstream tiny --fusion text-fc "
    flags += "--frozen --max-epochs 2 --device cpu"
    select_on_test.main(flags.split())
    assert data.split(corpus, 5, 0)[1] != test_rows  # the honest one again
    (run,), _ = find_runs(Path("runs"))
    assert "SELECTED-ON-TEST" in run.config["title"]
    # The development data was the test data.
    last = curves.read_log(run.folder / "log.jsonl")[-1]
    assert run.result["loss"] == pytest.approx(last["dev_loss"])
    out = capsys.readouterr().out
    assert f"SELECTED-ON-TEST, {run.folder.parent.name}: UA on the test session" in out


def test_selected_epochs_are_beside_the_last_one(tmp_path):
    for fold, best in ((1, 0.75), (2, 0.85)):
        log = make_log([0.5, 0.3, 0.6, 0.4], [0.50, 0.60, best, 0.65])
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
    assert "fine-tuning epoch" in capsys.readouterr().out
