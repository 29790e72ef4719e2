"""evaluate.py: metrics by hand, reports on run folders by hand, an utterance."""

import csv
import doctest
import json
import math
import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
from data import InputError
from model import Config, EmotionRecognizer
from tests.conftest import CLASSES, change, neutral, write_run, write_wav

# --- Metrics --------------------------------------------------------------------------


def test_wa_and_ua_by_hand_and_not_swapped():
    """8 neutral, 7 of them right, and 2 angry, none right. Rows are the truth."""
    truth = [0] * 8 + [2] * 2
    guesses = [0] * 7 + [1] + [0, 3]
    counts = [[7, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]
    scores = evaluate.metrics(torch.tensor(truth), torch.tensor(guesses))
    assert scores == {"wa": 7 / 10, "ua": 7 / 16, "confusion": counts}
    assert evaluate.weighted_accuracy(truth, guesses) == 7 / 10
    assert evaluate.unweighted_accuracy(truth, guesses) == 7 / 16
    assert evaluate.confusion_matrix(truth, guesses).tolist() == counts
    json.dumps(scores)
    found = doctest.testmod(evaluate)
    assert found.attempted >= 3 and found.failed == 0


def test_the_papers_numbers_are_the_papers():
    """Copied once more from its text: WA and UA of Sys. 1 to 18, and Table 2."""
    numbers = """
        66.15 65.35  66.70 66.71  63.51 64.67  67.99 68.24  74.33 76.57  77.67 78.76
        74.55 76.41  76.09 76.57  67.76 69.37  68.07 67.93  74.98 76.85  77.75 78.60
        77.61 77.85  79.80 80.65  79.91 81.88  79.91 81.15  78.58 80.72  80.36 81.70
    """
    names = "WavLM+FC WavLM+TE BERT+FC BERT+TE CMT(A→T) CMT(T→A) EF LF MMT".split()
    kinds = [f"{name} {kind}" for name in names for kind in ("frozen", "fine-tuned")]
    table = evaluate.TABLE_1
    assert list(table) == list(range(1, 19))
    assert [table[n][0] for n in table] == kinds
    assert [x for n in table for x in table[n][1:]] == [*map(float, numbers.split())]
    frozen, finetuned = (78.32, 80.56), (84.45, 84.39)
    expected = {15: frozen, 17: frozen, 18: finetuned}
    assert evaluate.TABLE_2 == {n: (kinds[n - 1], *expected[n]) for n in expected}


# --- Tables ---------------------------------------------------------------------------


def cells(text):
    """Read the rows of the Markdown tables in a text as dicts."""
    found = []
    header = None
    for line in text.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = row
        elif set(row[0]) != {"-"}:
            found.append(dict(zip(header, row, strict=True)))
    return found


@pytest.fixture
def write(tmp_path):
    """Write the folder of a run: `right` of eight neutral utterances are right."""

    def run(fusion="mmt", frozen=False, fold=5, seed=0, right=6, **changes):
        title = changes.get("title", changes.get("corpus", "toy"))
        folder = tmp_path / "runs" / f"{title}-{fusion}-{frozen}-{fold}-{seed}-{right}"
        rows = neutral(right, fold=fold)
        system = {"fusion": fusion, "frozen": frozen, "fold": fold, "seed": seed}
        return write_run(folder, rows=rows, **system, **changes)

    return run


@pytest.fixture
def report(capsys, tmp_path):
    """Run a command of evaluate.py on the runs: what it prints, and its error."""

    def run(command="tables", runs=tmp_path / "runs", *arguments):
        error = ""
        try:
            evaluate.main([command, str(runs), *map(str, arguments)])
        except InputError as problem:
            error = str(problem)
        return capsys.readouterr().out, error

    return run


def test_a_mean_is_over_folds_beside_the_papers_number(write, report):
    """Fold 1 has two seeds. They are averaged first: 50. Folds 2 and 3: 75 and 100."""
    for fold, seed, right in [(1, 0, 2), (1, 1, 6), (2, 0, 6), (3, 0, 8)]:
        write(fold=fold, seed=seed, right=right, corpus="iemocap")
    for fold in range(1, 6):
        write("audio-fc", True, fold, corpus="iemocap", right=4)
    out, error = report()
    audio, mmt, *table_2 = cells(out)
    head = ["Sys.", "model", "folds", "runs", "WA", "UA", "paper's WA", "paper's UA"]
    row = ["18", "MMT fine-tuned", "1 2 3", "4", *["75.00 ± 25.00"] * 2]
    assert list(mmt.items()) == list(zip(head, [*row, "80.36", "81.70"], strict=True))
    assert (audio["Sys."], audio["folds"], audio["runs"]) == ("1", "1 2 3 4 5", "5")
    assert (audio["UA"], audio["paper's UA"]) == ("50.00 ± 0.00", "65.35")
    assert not table_2 and not error
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, "the columns are not aligned"


def test_table_2_has_session_5_alone(write, report):
    """Its rows are Sys. 15, 17 and 18."""
    for seed, right in ((0, 4), (1, 8)):
        write(seed=seed, right=right, corpus="iemocap")
    for fusion, fold in (("lf", 5), ("mmt", 4), ("ef", 5)):
        write(fusion, True, fold, corpus="iemocap")
    lf, mmt = cells(report()[0].split("Table 2, Session 5")[1])
    assert (lf["Sys."], lf["UA"], lf["paper's UA"]) == ("15", "75.00", "80.56")
    assert (mmt["Sys."], mmt["WA"], mmt["paper's WA"]) == ("18", "75.00", "84.45")


def test_other_corpora_and_other_settings_never_share_a_table(write, report):
    """Only the full release of IEMOCAP is set beside the paper's numbers."""
    corpora = ["toy", "toy-partial", "mine", "iemocap-partial"]
    for corpus in corpora:
        write(corpus=corpus)
    write(title="toy, context=5", right=8)
    out, _ = report()
    for title in [*corpora, "toy, context=5"]:
        assert out.count(f"Table 1, {title}, in %") == 1
    assert "87.50" not in out and len(cells(out)) == 5
    assert "80.36" not in out and "paper" not in out and "Table 2" not in out


# --- Run folders that are not as they should be ---------------------------------------


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("result.json", b"}", b""),
        ("result.json", b'"ua": 0.75', b'"ua": NaN'),
        ("config.json", b'"fold": 2', b'"fold": 3'),
        ("predictions.csv", b"neu,neu", b"neu,joy"),
        ("predictions.csv", b"neu,neu", b"neu,sad"),
    ],
)
def test_a_damaged_run_is_named_and_left_out(file, old, new, write, report):
    """Its files must agree: WA, UA and the confusion matrix are counted again."""
    write("ef", True, 1)
    folder = write("ef", True, 2)
    change(folder / file, old, new)
    out, error = report()
    assert error.startswith(str(folder)) and "damaged" in error
    assert [(row["folds"], row["runs"]) for row in cells(out)] == [("1", "1")]


def test_unfinished_runs_duplicates_and_folders_without_runs(write, report, tmp_path):
    """The first is listed and no error. Of two runs of a kind, the first one counts."""
    first = write("ef", True, 1, right=4)
    unfinished = write("ef", True, 2)
    (unfinished / "result.json").unlink()
    out, error = report()
    assert f"{unfinished}: not finished" in out and not error
    assert [(row["folds"], row["WA"]) for row in cells(out)] == [("1", "50.00")]
    with pytest.raises(InputError, match="is not a finished run"):
        evaluate.Recognizer(unfinished)
    second = write("ef", True, 1, right=8)
    out, error = report()
    assert [(row["runs"], row["WA"]) for row in cells(out)] == [("1", "50.00")]
    assert f"{second}: left out, a duplicate of {first}" in error
    # The folder of an upstream has a config.json, too.
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text('{"model_type": "wavlm"}')
    out, error = report("tables", tmp_path / "tiny")
    assert re.fullmatch(rf"{tmp_path}/tiny: .*no run in it.+", error) and not out


def test_a_near_tie_is_written_as_it_was_scored(tmp_path):
    """Two log-probabilities one bit apart, whose exponentials are the same number."""
    high = torch.tensor(-0.3)
    low = torch.nextafter(high, torch.tensor(-1.0))
    while torch.exp(low) != torch.exp(high):
        high, low = low, torch.nextafter(low, torch.tensor(-1.0))
    log_probs = torch.stack([low, high, torch.tensor(-9.0), torch.tensor(-9.0)])[None]
    utterance = SimpleNamespace(id="Ses05F_impro01_F000", speaker="Ses05F", label=1)
    evaluate.write_predictions(tmp_path, [utterance], log_probs)
    (row,) = csv.DictReader((tmp_path / "predictions.csv").open())
    assert row["prediction"] == "hap" and row["neu"] == row["hap"] != row["ang"]


def test_figure_4_has_the_papers_panels_in_its_order(
    write, report, tmp_path, monkeypatch
):
    """Sys. 4, 8, 18 and 7 on Session 5. Without them, the first runs are drawn."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    save = lambda self, path: (drawn.append(self), path.write_bytes(b""))  # noqa: E731
    monkeypatch.setattr(figure.Figure, "savefig", save)
    systems = [("text-te", True), ("audio-te", False), ("mmt", False)]
    for number, (fusion, frozen) in enumerate([*systems, ("text-te", False)]):
        for fold in (1, 5):
            write(fusion, frozen, fold, right=number + 2)
    write("ef", True, 2, title="toy, context=5")
    report("draw", tmp_path / "runs", tmp_path / "pictures")
    panels, others = drawn
    expected = ["4 (UA: 37.50%)", "8 (UA: 62.50%)", "18 (UA: 50.00%)", "7 (UA: 25.00%)"]
    for ax, system in zip(panels.axes, expected, strict=True):
        assert f"Sys. {system}" in ax.get_title()
        assert "fold 5, seed 0" in ax.get_title()
    ax = panels.axes[0]
    # The truth is the row. A text is at (x, y), which is (column, row).
    numbers = {text.get_position(): text.get_text() for text in ax.texts}
    expected = {(x, y): "0.00" for x in range(4) for y in range(4)}
    assert numbers == {**expected, (0, 0): "0.38", (3, 0): "0.62"}
    assert [text.get_text() for text in ax.get_xticklabels()] == CLASSES
    assert [text.get_text()[:3] for text in ax.get_yticklabels()] == CLASSES
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("Groundtruth", "Predictions")
    assert "toy" in panels.get_suptitle() and "context" not in panels.get_suptitle()
    assert "Sys. 13" in others.axes[0].get_title()
    assert "toy, context=5" in others.get_suptitle()
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2


# --- An utterance of your own ---------------------------------------------------------


@pytest.fixture
def own(tiny, tmp_path, write):
    """Write a run with random weights: its folder, its model and a wav of 6.75 s."""
    wav = tmp_path / "x.wav"
    tone = [0.3 * math.sin(k * k / 1e5) for k in range(100000)]
    write_wav(wav, [0] * 8000 + tone)

    def make(fusion, corpus="mine", context=9, upstreams=None):
        config = Config(fusion, 2, 48, 2, 48, n_context=context)
        torch.manual_seed(0)
        model = EmotionRecognizer(config).eval()
        folder = write(
            fusion,
            corpus=corpus,
            model=asdict(config),
            upstreams={m: tiny[m].name for m in config.modalities},
            weights_checksums={m: tiny[m].checksum for m in config.modalities},
        )
        content = json.loads((folder / "config.json").read_text())
        keys = ("corpus", "fusion", "frozen", "fold", "seed")
        state = {"run": {key: content[key] for key in keys}}
        state["model"] = model.state_dict()
        state["upstreams"] = {"audio": {}, "text": {}} | (upstreams or {})
        torch.save(state, folder / "checkpoint.pt")
        return SimpleNamespace(folder=folder, model=model, wav=wav, tone=tone)

    return make


@torch.no_grad()
def test_an_utterance_gets_what_the_model_says(own, tiny, report):
    """By hand: 5 s from the first sound. Two turns before, so two places are empty.

    Five turns after, and the fifth is not read. Each line says that it is the toy.
    """
    run = own("mmt", corpus="toy")
    before, after = ["a", "b"], ["lovely party", "it", "oh", "i", "too far"]
    arguments = ["--wav", run.wav, "--text", "i hate it"]
    arguments += ["--before", *before, "--after", *after]
    out, error = report("recognize", run.folder, *arguments)
    clip = torch.tensor([round(32767 * x) / 32768 for x in run.tone[:80000]])
    audio = tiny["audio"]([tiny["audio"].prepare(clip)])
    texts = ["a", "b", "i hate it", "lovely party", "it", "oh", "i"]
    text = tiny["text"]([tiny["text"].prepare(one) for one in texts])
    mask = torch.zeros(1, 9, max(map(len, text)), dtype=torch.bool)
    for place, x in enumerate(text, start=2):
        mask[0, place, : len(x)] = True
    audio_mask = torch.ones(1, len(audio[0]), dtype=torch.bool)
    logits = run.model((audio[0], audio_mask), (torch.cat(text), mask))
    expected = dict(zip(CLASSES, logits[0].softmax(0).tolist(), strict=True))
    answer = evaluate.Recognizer(run.folder).recognize(
        run.wav, "i hate it", before, after
    )
    assert list(answer) == CLASSES and answer == pytest.approx(expected, abs=1e-6)
    for name in CLASSES:
        assert f"{name} {answer[name]:.1%}" in out
    assert all(line.startswith("toy: ") for line in out.splitlines())
    assert not error


def test_of_many_turns_the_nearest_are_read(own):
    """Their order matters, and those beyond the window do not."""
    recognizer = evaluate.Recognizer(own("text-te").folder)
    alone = evaluate.Recognizer(own("text-fc", context=1).folder)
    before = ["hate", "lovely", "alone", "party"]
    after = ["so", "again", "it", "and"]
    answer = recognizer.recognize(None, "oh", before, after)
    far = recognizer.recognize(None, "oh", ["so"] * 3 + before, [*after, "party"])
    assert far == answer
    for other in ([before[::-1], after], [before[1:], after], [before, after[:3]]):
        assert recognizer.recognize(None, "oh", *other) != answer
    assert alone.recognize(None, "oh", before, after) == alone.recognize(None, "oh")


@torch.no_grad()
def test_the_weights_of_fine_tuning_are_used(own, tiny, tmp_path):
    """A checkpoint holds what data.Source gives after fine-tuning."""
    source = data.Source(tiny["text"], {}, [], tmp_path, "cpu")
    for parameter in source.open("bottom"):
        parameter += torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
    frozen = evaluate.Recognizer(own("text-fc").folder)
    run = own("text-fc", corpus="other", upstreams={"text": source.state_dict()})
    tuned = evaluate.Recognizer(run.folder)
    tokens = [tiny["text"].prepare("hate")]
    assert torch.equal(tuned.upstreams["text"](tokens)[0], source.live(tokens)[0])
    assert tuned.recognize(None, "hate") != frozen.recognize(None, "hate")


def test_a_modality_that_is_missing_or_not_used_is_named(own, report):
    """The sentence names the modalities that the run uses."""
    for fusion, *arguments in [
        ("mmt", "--text", "oh"),
        ("lf", "--wav", "x.wav"),
        ("text-te", "--wav", "x.wav", "--text", "oh"),
        ("audio-te",),
    ]:
        run = own(fusion)
        _, error = report("recognize", run.folder, *arguments)
        assert str(run.folder) in error
        assert all(modality in error for modality in run.model.config.modalities)


def test_another_checkpoint_or_upstream_is_refused(own):
    """The checkpoint of another run, and an upstream with other weights."""
    run, other = own("text-fc"), own("text-te")
    path = run.folder / "checkpoint.pt"
    content = path.read_bytes()
    path.write_bytes((other.folder / "checkpoint.pt").read_bytes())
    with pytest.raises(InputError, match="(?s)checkpoint.pt: .*'text-te'.*Restore it"):
        evaluate.Recognizer(run.folder)
    path.write_bytes(content)
    checksum = b'"weights_checksums": {"text": "'
    change(run.folder / "config.json", checksum, checksum + b"0")
    with pytest.raises(InputError, match="has changed since"):
        evaluate.Recognizer(run.folder)
