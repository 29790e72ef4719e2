"""evaluate.py: metrics by hand, reports on run folders by hand, an utterance."""

import doctest
import itertools
import json
import math
import re
from dataclasses import asdict

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
    truth = torch.tensor([0] * 8 + [2] * 2)
    guesses = torch.tensor([0] * 7 + [1] + [0, 3])
    counts = [[7, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]
    scores = evaluate.metrics(truth, guesses)
    assert scores == {"wa": 7 / 10, "ua": 7 / 16, "confusion": counts}
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
    """Read the rows of the Markdown tables in a text, without their headers."""
    lines = re.findall(r"^\| (\d.*?) *\|$", text, re.MULTILINE)
    return [re.split(r" *\| *", line) for line in lines]


@pytest.fixture
def write(tmp_path):
    """Write the folder of a run: `right` of eight neutral utterances are right."""
    numbers = itertools.count(10)

    def run(fusion="mmt", frozen=False, fold=5, right=6, **others):
        folder = tmp_path / "runs" / str(next(numbers))
        others["rows"] = neutral(right, fold=fold)
        return write_run(folder, fusion=fusion, frozen=frozen, fold=fold, **others)

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
    """Fold 1 has two seeds. They are averaged first: 50. Folds 2 and 5: 75 and 100.

    Table 2 has Session 5 alone, and Sys. 15, 17 and 18.
    """
    for fold, seed, right in [(1, 0, 2), (1, 1, 6), (2, 0, 6), (5, 0, 8)]:
        write(fold=fold, seed=seed, right=right, corpus="iemocap")
    for fusion, fold in [("audio-fc", 1), ("audio-fc", 5), ("mmt", 4), ("lf", 5)]:
        write(fusion, True, fold, right=4, corpus="iemocap")
    out, error = report()
    mean = "75.00 ± 25.00"
    assert cells(out) == [
        ["1", "WavLM+FC frozen", "1 5", "2", *["50.00 ± 0.00"] * 2, "66.15", "65.35"],
        ["15", "LF frozen", "5", "1", "50.00", "50.00", "79.91", "81.88"],
        ["17", "MMT frozen", "4", "1", "50.00", "50.00", "78.58", "80.72"],
        ["18", "MMT fine-tuned", "1 2 5", "4", mean, mean, "80.36", "81.70"],
        ["15", "LF frozen", "5", "1", "50.00", "50.00", "78.32", "80.56"],
        ["18", "MMT fine-tuned", "5", "1", "100.00", "100.00", "84.45", "84.39"],
    ]
    head = r"Sys. \| model +\| folds +\| runs \| WA +\| UA +\| paper's WA \| paper's UA"
    table_1, table_2 = out.split("Table 2, Session 5")
    assert len(re.findall(head, table_1)) == len(re.findall(head, table_2)) == 1
    lines = [line for line in table_1.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, "the columns are not aligned"
    assert not error


def test_other_corpora_and_other_settings_never_share_a_table(write, report):
    """Only the full release of IEMOCAP is set beside the paper's numbers."""
    titles = ["toy", "toy, context=5", "toy-partial", "mine", "iemocap-partial"]
    for title in titles:
        write(corpus=title.split(",")[0], title=title)
    out, _ = report()
    assert all(out.count(f"Table 1, {title}, in %") == 1 for title in titles)
    assert [row[3] for row in cells(out)] == ["1"] * 5
    assert "paper" not in out and "Table 2" not in out


# --- Run folders that are not as they should be ---------------------------------------


DAMAGES = [("result.json", b"}", b""), ("config.json", b'"fold": 2', b'"fold": 3')]
DAMAGES += [("predictions.csv", b"neu,neu", b"neu,sad")]


@pytest.mark.parametrize(("file", "old", "new"), DAMAGES)
def test_a_damaged_run_is_named_and_left_out(file, old, new, write, report):
    """Its files must agree: WA, UA and the confusion matrix are counted again."""
    write("ef", True, 1)
    folder = write("ef", True, 2)
    change(folder / file, old, new)
    out, error = report()
    assert error.startswith(str(folder)) and "damaged" in error
    assert [row[2:4] for row in cells(out)] == [["1", "1"]]


def test_unfinished_runs_and_runs_on_another_corpus_are_left_out(write, report):
    """The first is listed and no error."""
    first = write("ef", True, 1, right=4)
    unfinished = write("ef", True, 2)
    (unfinished / "result.json").unlink()
    out, error = report()
    assert f"{unfinished}: not finished" in out and not error
    with pytest.raises(InputError, match="is not a finished run"):
        evaluate.Recognizer(unfinished)
    other = write("ef", True, 3, corpus_checksum="1")
    out, error = report()
    assert [row[2:5] for row in cells(out)] == [["1", "1", "50.00"]]
    assert error == f"{other}: left out, on other data than {first}"
    empty = first.parent / "empty"
    empty.mkdir()
    assert report("tables", empty)[1].startswith(f"{empty}: no run in it")


def test_figure_4_has_the_papers_panels_in_its_order(
    write, report, tmp_path, monkeypatch
):
    """Sys. 4, 8, 18 and 7 on Session 5. Without them, the first runs are drawn."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = {}
    save = lambda self, path: drawn.update({path.name: self.axes})  # noqa: E731
    monkeypatch.setattr(figure.Figure, "savefig", save)
    systems = [("text-te", True), ("audio-te", False), ("mmt", False)]
    for number, (fusion, frozen) in enumerate([*systems, ("text-te", False)]):
        for fold in (1, 5):
            write(fusion, frozen, fold, right=number + 2)
    write("ef", True, 2, title="toy, context=5")
    report("draw", tmp_path / "runs", tmp_path / "pictures")
    titles = {name: [ax.get_title() for ax in axes] for name, axes in drawn.items()}
    (other,) = titles.pop("toy, context=5.png")
    assert other == "Sys. 13 (UA: 75.00%)\nEF frozen, fold 2, seed 0"
    (panels,) = titles.values()
    expected = ["4 (UA: 37.50%)", "8 (UA: 62.50%)", "18 (UA: 50.00%)", "7 (UA: 25.00%)"]
    for panel, system in zip(panels, expected, strict=True):
        assert panel.startswith(f"Sys. {system}\n") and "fold 5, seed 0" in panel
    ax = drawn["toy.png"][0]
    assert ax.figure.get_suptitle() == "Fig. 4 on toy"
    # The truth is the row. A text is at (x, y), which is (column, row).
    numbers = {text.get_position(): text.get_text() for text in ax.texts}
    assert len(numbers) == 16 and (numbers[0, 0], numbers[3, 0]) == ("0.38", "0.62")
    assert [text.get_text() for text in ax.get_xticklabels()] == CLASSES
    assert [text.get_text()[:3] for text in ax.get_yticklabels()] == CLASSES
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("Groundtruth", "Predictions")


# --- An utterance of your own ---------------------------------------------------------


@pytest.fixture
def own(tiny, write):
    """Write a run with random weights. Returns its folder, and its model.

    tuned   the weights of the upstreams that fine-tuning has changed, by modality
    """

    def make(fusion, tuned=None):
        config = Config(fusion, 2, 48, 2, 48, n_context=5)
        torch.manual_seed(0)
        model = EmotionRecognizer(config).eval()
        folder = write(
            fusion,
            model=asdict(config),
            upstreams={m: tiny[m].name for m in config.modalities},
            weights_checksums={m: tiny[m].checksum for m in config.modalities},
        )
        run = {"corpus": "toy", "fusion": fusion, "frozen": False, "fold": 5, "seed": 0}
        state = {"run": run, "model": model.state_dict()}
        state["upstreams"] = {"audio": {}, "text": {}} | (tuned or {})
        torch.save(state, folder / "checkpoint.pt")
        return folder, model

    return make


@torch.no_grad()
def test_an_utterance_gets_what_the_model_says(own, tiny, report, tmp_path):
    """By hand: 5 s from the first sound, and the texts of a window of five.

    Of three turns before, the first is not read. One turn after, so one place is empty.
    The checkpoint has the weights that fine-tuning has changed.
    """
    source = data.Source(tiny["text"], {}, [], tmp_path, "cpu")
    for parameter in source.open("bottom"):
        parameter += torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
    folder, model = own("mmt", {"text": source.state_dict()})
    tone = [0.3 * math.sin(k * k / 1e5) for k in range(100000)]
    write_wav(tmp_path / "x.wav", [0] * 8000 + tone)
    before, after = ["too far", "a", "lovely party"], ["oh"]
    arguments = ["--wav", tmp_path / "x.wav", "--text", "i hate it"]
    arguments += ["--before", *before, "--after", *after]
    out, error = report("recognize", folder, *arguments)
    clip = torch.tensor([round(32767 * x) / 32768 for x in tone[:80000]])
    audio = tiny["audio"]([tiny["audio"].prepare(clip)])[0]
    texts = [*before[1:], "i hate it", *after]
    text = source.live([tiny["text"].prepare(one) for one in texts])
    mask = torch.zeros(1, 5, max(map(len, text)), dtype=torch.bool)
    for place, x in enumerate(text):
        mask[0, place, : len(x)] = True
    audio_mask = torch.ones(1, len(audio), dtype=torch.bool)
    logits = model((audio, audio_mask), (torch.cat(text), mask))
    expected = dict(zip(CLASSES, logits[0].softmax(0).tolist(), strict=True))
    recognizer = evaluate.Recognizer(folder)
    answer = recognizer.recognize(tmp_path / "x.wav", "i hate it", before, after)
    assert list(answer) == CLASSES and answer == pytest.approx(expected, abs=1e-6)
    lines = [f"toy: {name} {answer[name]:.1%}" for name in CLASSES]
    assert out.splitlines() == lines and not error


@pytest.mark.parametrize(
    ("fusion", "arguments"),
    [("mmt", "--text oh"), ("lf", "--wav x"), ("text-te", "--wav x --text oh")],
)
def test_a_modality_that_is_missing_or_not_used_is_named(
    fusion, arguments, own, report
):
    """The sentence names the modalities that the run uses."""
    folder, model = own(fusion)
    _, error = report("recognize", folder, *arguments.split())
    assert f"{folder} uses {model.config.modalities}" in error


def test_another_checkpoint_or_upstream_is_refused(own):
    """The checkpoint of another run, and an upstream with other weights."""
    folder, _ = own("text-fc")
    content = (folder / "checkpoint.pt").read_bytes()
    (own("text-te")[0] / "checkpoint.pt").rename(folder / "checkpoint.pt")
    with pytest.raises(InputError, match="(?s)checkpoint.pt: .*'text-te'.*Restore it"):
        evaluate.Recognizer(folder)
    (folder / "checkpoint.pt").write_bytes(content)
    checksum = b'"weights_checksums": {"text": "'
    change(folder / "config.json", checksum, checksum + b"0")
    with pytest.raises(InputError, match="has changed since"):
        evaluate.Recognizer(folder)
