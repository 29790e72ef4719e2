"""evaluate.py: metrics by hand, reports on run folders by hand, an utterance."""

import csv
import doctest
import json
import math
import os
import re
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
from model import Config, EmotionRecognizer
from tests.conftest import change, write_wav

CLASSES = ["neu", "hap", "ang", "sad"]
RUN_KEYS = ("corpus", "fusion", "frozen", "fold", "seed")


# --- Metrics --------------------------------------------------------------------------


def test_wa_and_ua_by_hand_and_not_swapped():
    # 8 neutral, 7 of them right. 2 angry, none of them right.
    truth = [0] * 8 + [2] * 2
    guesses = [0] * 7 + [1] + [0, 3]
    assert evaluate.weighted_accuracy(truth, guesses) == pytest.approx(7 / 10)
    assert evaluate.unweighted_accuracy(truth, guesses) == pytest.approx(7 / 16)
    # The rows are the truth.
    counts = [[7, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]
    assert evaluate.confusion_matrix(truth, guesses).tolist() == counts
    scores = evaluate.metrics(torch.tensor(truth), torch.tensor(guesses))
    assert scores == {"wa": 0.7, "ua": 7 / 16, "confusion": counts}
    json.dumps(scores)


# The diagonals of Fig. 4, in %, and the UA that stands above each panel.
@pytest.mark.parametrize(
    ("diagonal", "printed"),
    [
        ((83, 52, 86, 65), 71.65),
        ((65, 81, 85, 83), 78.17),
        ((69, 88, 85, 94), 84.00),
        ((62, 72, 79, 89), 75.92),
    ],
)
def test_ua_is_the_mean_recall_of_figure_4(diagonal, printed):
    # The classes of Session 5 are of unlike size, so its WA is another number.
    sizes = (384, 442, 170, 245)
    truth, guesses = [], []
    for label, (percent, size) in enumerate(zip(diagonal, sizes, strict=True)):
        right = round(percent * size / 100)
        truth += [label] * size
        guesses += [label] * right + [(label + 1) % 4] * (size - right)
    ua = evaluate.unweighted_accuracy(truth, guesses)
    # Our counts are whole numbers, and the figure rounds its fractions to two digits.
    assert 100 * ua == pytest.approx(sum(diagonal) / 4, abs=0.2)
    assert 100 * ua == pytest.approx(printed, abs=0.5)


def test_the_examples_in_the_docstrings():
    found = doctest.testmod(evaluate)
    assert found.attempted >= 3 and found.failed == 0


# --- Tables ---------------------------------------------------------------------------


def write_run(root, fusion, frozen, fold, seed=0, corpus="toy", right=6, n=8, title=""):
    """Write a finished run: `right` of n neutral ones are right, the others are sad."""
    run = {"corpus": corpus, "fusion": fusion, "frozen": frozen}
    run |= {"fold": fold, "seed": seed}
    title = title or corpus
    name = f"{fusion}-{'frozen' if frozen else 'finetuned'}{title.partition(',')[2]}"
    folder = root / corpus / name / f"fold{fold}-seed{seed}"
    folder.mkdir(parents=True)
    config = {**run, "title": title, "corpus_checksum": "0"}
    config |= {"settings": {"precision": "fp32"}, "model": {}}
    config |= {"weights_checksums": {}, "upstreams": {}}
    confusion = [[right, 0, 0, n - right], [0] * 4, [0] * 4, [0] * 4]
    result = {**run, "wa": right / n, "ua": right / n, "loss": 1.0}
    result |= {"confusion": confusion, "epochs": 20, "finetune_epoch": None}
    result |= {"dev_speaker": "Ses01F", "n_train": 1, "n_dev": 1, "n_test": n}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(result | {"seconds": 1.0}))
    rows = ["utterance,speaker,label,prediction,neu,hap,ang,sad"]
    for i in range(n):
        guess = "neu" if i < right else "sad"
        name = f"Ses0{fold}F_impro01_F{i:03}"
        rows.append(f"{name},Ses0{fold}F,neu,{guess},.4,.2,.2,.2")
    (folder / "predictions.csv").write_text("\n".join(rows) + "\n")
    (folder / "log.jsonl").write_text("")
    return folder


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
def report(capsys, monkeypatch):
    """Run a command of evaluate.py: its exit code, and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        monkeypatch.setattr(sys.stdout, "reconfigure", lambda **k: None, raising=False)
        monkeypatch.setattr(sys.stderr, "reconfigure", lambda **k: None, raising=False)
        code, message = 0, ""
        try:
            data.run_command(evaluate.main)
        except SystemExit as stop:
            code, message = 1, str(stop.code)
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, error=message)

    return run


def test_a_mean_is_over_folds_beside_the_papers_number(report, tmp_path):
    # Fold 1 has two seeds. They are averaged first: 50. Folds 2 and 3: 75 and 100.
    runs = [(1, 0, 2), (1, 1, 6), (2, 0, 6), (3, 0, 8)]
    for fold, seed, right in runs:
        write_run(tmp_path, "mmt", False, fold, seed, "iemocap", right)
    for fold in range(1, 6):
        write_run(tmp_path, "audio-fc", True, fold, corpus="iemocap")
    done = report("tables", tmp_path)
    assert done.code == 0, done.error
    audio, mmt = cells(done.out)
    assert mmt == {
        "Sys.": "18",
        "model": "MMT fine-tuned",
        "folds": "1 2 3",
        "runs": "4",
        "WA": "75.00 ± 25.00",
        "UA": "75.00 ± 25.00",
        "paper's WA": "80.36",
        "paper's UA": "81.70",
    }
    assert (audio["Sys."], audio["folds"], audio["runs"]) == ("1", "1 2 3 4 5", "5")
    assert (audio["UA"], audio["paper's UA"]) == ("75.00 ± 0.00", "65.35")
    assert "Table 2" not in done.out
    # The table is aligned Markdown.
    lines = [line for line in done.out.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("corpus", ["toy", "toy-partial", "mine", "iemocap-partial"])
def test_only_iemocap_is_set_beside_the_paper(corpus, report, tmp_path):
    write_run(tmp_path, "mmt", False, 5, corpus=corpus)
    out = report("tables", tmp_path).out
    assert f"Table 1, {corpus}, in %" in out and "75.00" in out
    assert "80.36" not in out and "paper" not in out and "Table 2" not in out


def test_table_2_has_session_5_alone(report, tmp_path):
    for seed, right in ((0, 4), (1, 8)):
        write_run(tmp_path, "mmt", False, 5, seed, "iemocap", right)
    for fusion, fold in (("lf", 5), ("mmt", 4), ("ef", 5)):
        write_run(tmp_path, fusion, True, fold, corpus="iemocap")
    lf, mmt = cells(report("tables", tmp_path).out.split("Table 2, Session 5")[1])
    assert (lf["Sys."], lf["UA"], lf["paper's UA"]) == ("15", "75.00", "80.56")
    assert (mmt["Sys."], mmt["WA"], mmt["paper's WA"]) == ("18", "75.00", "84.45")


def test_other_corpora_and_other_settings_never_share_a_table(report, tmp_path):
    write_run(tmp_path, "mmt", False, 5)
    write_run(tmp_path, "mmt", False, 5, title="toy, context=5")
    write_run(tmp_path, "mmt", False, 5, corpus="iemocap", right=8)
    out = report("tables", tmp_path).out
    for title in ("iemocap", "toy", "toy, context=5"):
        assert out.count(f"Table 1, {title}, in %") == 1
    assert "87.50" not in out and len(cells(out)) == 4
    # Every line with a result on the toy, or the title of its table, says toy.
    for block in re.split(r"\n\n(?!\|)", out.strip()):
        assert "toy" in block or "iemocap" in block


def test_the_papers_numbers_are_the_papers():
    # Copied once more from the text of the paper: WA and UA of Sys. 1 to 18.
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
    assert {n: row[1:] for n, row in evaluate.TABLE_2.items()} == expected
    assert {n: row[0] for n, row in evaluate.TABLE_2.items()} == {
        n: kinds[n - 1] for n in expected
    }


# --- Run folders that are not as they should be ---------------------------------------


def test_an_unfinished_run_is_listed_and_is_no_error(report, tmp_path):
    write_run(tmp_path, "ef", True, 1)
    folder = write_run(tmp_path, "ef", True, 2)
    (folder / "result.json").unlink()
    done = report("tables", tmp_path)
    assert (done.code, done.error) == (0, "")
    assert f"{folder}: not finished" in done.out
    (row,) = cells(done.out)
    assert row["folds"] == "1"
    with pytest.raises(data.InputError, match="result.json"):
        evaluate.Recognizer(folder)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("result.json", b"}", b""),
        ("result.json", b'"ua": 0.75', b'"ua": NaN'),
        ("result.json", b"[[6, 0", b"[[5, 1"),
        ("config.json", b'"fold": 2', b'"fold": 3'),
        ("predictions.csv", b"neu,neu", b"neu,joy"),
        ("predictions.csv", b"neu,neu", b"neu,sad"),
    ],
)
def test_a_damaged_run_is_named_and_left_out(file, old, new, report, tmp_path):
    write_run(tmp_path, "ef", True, 1)
    folder = write_run(tmp_path, "ef", True, 2)
    change(folder / file, old, new)
    done = report("tables", tmp_path)
    assert done.code == 1
    assert done.error.startswith(f"error: {folder}") and "damaged" in done.error
    (row,) = cells(done.out)
    assert (row["folds"], row["runs"]) == ("1", "1")


def test_a_second_run_of_the_same_kind_is_left_out(report, tmp_path):
    first = write_run(tmp_path / "a", "ef", True, 1, right=8)
    second = write_run(tmp_path / "b", "ef", True, 1, right=4)
    done = report("tables", tmp_path)
    assert done.code == 1 and cells(done.out)[0]["WA"] == "100.00"
    assert f"{second}: left out, a duplicate of {first}" in done.error


def test_a_folder_without_runs_is_one_sentence(report, tmp_path):
    # The folder of an upstream has a config.json, too.
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text('{"model_type": "wavlm"}')
    done = report("tables", tmp_path)
    assert (done.code, done.out) == (1, "")
    assert re.fullmatch(rf"error: {tmp_path}: .*no run in it.+", done.error)


def test_a_near_tie_is_written_as_it_was_scored(tmp_path):
    # Two log-probabilities one bit apart, whose exponentials are the same number.
    high = torch.tensor(-0.3)
    low = torch.nextafter(high, torch.tensor(-1.0))
    while torch.exp(low) != torch.exp(high):
        high, low = low, torch.nextafter(low, torch.tensor(-1.0))
    log_probs = torch.stack([low, high, torch.tensor(-9.0), torch.tensor(-9.0)])[None]
    utterance = SimpleNamespace(id="Ses05F_impro01_F000", speaker="Ses05F", label=1)
    evaluate.write_predictions(tmp_path, [utterance], log_probs)
    (row,) = csv.DictReader((tmp_path / "predictions.csv").open())
    assert row["prediction"] == "hap" and row["neu"] == row["hap"] != row["ang"]


# --- Fig. 4 ---------------------------------------------------------------------------


def test_figure_4_has_the_papers_panels_in_its_order(report, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    save = figure.Figure.savefig

    def watch(self, path):
        drawn.append(self)
        save(self, path)

    monkeypatch.setattr(figure.Figure, "savefig", watch)
    systems = [("text-te", True), ("audio-te", False), ("mmt", False)]
    for number, (fusion, frozen) in enumerate([*systems, ("text-te", False)]):
        for fold in (1, 5):
            write_run(tmp_path / "runs", fusion, frozen, fold, right=number + 2)
    write_run(tmp_path / "runs", "ef", True, 2, title="toy, context=5")
    done = report("draw", tmp_path / "runs", tmp_path / "pictures")
    assert done.code == 0, done.error
    panels, others = drawn
    titles = [ax.get_title() for ax in panels.axes]
    expected = ["4 (UA: 37.50%)", "8 (UA: 62.50%)", "18 (UA: 50.00%)", "7 (UA: 25.00%)"]
    for title, system in zip(titles, expected, strict=True):
        assert f"Sys. {system}" in title and "fold 5, seed 0" in title
    ax = panels.axes[0]
    numbers = [text.get_text() for text in ax.texts]
    assert numbers[:4] == ["0.38", "0.00", "0.00", "0.62"]
    assert numbers[4:] == ["0.00"] * 12
    assert [text.get_text() for text in ax.get_xticklabels()] == CLASSES
    assert [text.get_text()[:3] for text in ax.get_yticklabels()] == CLASSES
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("Groundtruth", "Predictions")
    assert "toy" in panels.get_suptitle() and "context" not in panels.get_suptitle()
    # Without the systems of Fig. 4, there are the first ones.
    assert "Sys. 13" in others.axes[0].get_title()
    assert "toy, context=5" in others.get_suptitle()
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2


# --- An utterance of your own ---------------------------------------------------------


@pytest.fixture
def own(tiny, tmp_path):
    """Write a run with random weights: its folder, its model and a wav of 1 s."""
    wav = tmp_path / "x.wav"
    write_wav(wav, [0.3 * math.sin(k / 10) for k in range(16000)])

    def make(fusion, corpus="mine", context=9, upstreams=None):
        folder = write_run(tmp_path / "runs", fusion, False, 5, corpus=corpus)
        config = Config(fusion=fusion, n_context=context)
        config.audio_layers, config.audio_dim = tiny["audio"].n_layers, 48
        config.text_layers, config.text_dim = tiny["text"].n_layers, 48
        torch.manual_seed(0)
        model = EmotionRecognizer(config).eval()
        file = folder / "config.json"
        content = json.loads(file.read_text()) | {
            "model": asdict(config),
            "upstreams": {m: tiny[m].name for m in config.modalities},
            "weights_checksums": {m: tiny[m].checksum for m in config.modalities},
        }
        file.write_text(json.dumps(content))
        run = {key: content[key] for key in RUN_KEYS}
        upstreams = {"audio": {}, "text": {}} | (upstreams or {})
        state = {"run": run, "model": model.state_dict(), "upstreams": upstreams}
        torch.save(state, folder / "checkpoint.pt")
        return SimpleNamespace(folder=folder, model=model, wav=wav)

    return make


@torch.no_grad()
def test_an_utterance_gets_what_the_model_says(own, tiny):
    run = own("mmt")
    recognizer = evaluate.Recognizer(run.folder)
    before, after = ["a", "b"], ["lovely party", "it", "oh", "i", "too far"]
    answer = recognizer.recognize(run.wav, "i hate it", before, after)
    # The same by hand: two turns before, so two places of the window are empty. Four
    # turns after, so the fifth is not read.
    audio = tiny["audio"]([tiny["audio"].prepare(data.load_wav(run.wav))])
    texts = ["a", "b", "i hate it", "lovely party", "it", "oh", "i"]
    text = tiny["text"]([tiny["text"].prepare(one) for one in texts])
    mask = torch.zeros(1, 9, max(map(len, text)), dtype=torch.bool)
    for place, x in enumerate(text, start=2):
        mask[0, place, : len(x)] = True
    audio_mask = torch.ones(1, len(audio[0]), dtype=torch.bool)
    logits = run.model((audio[0], audio_mask), (torch.cat(text), mask))
    assert list(answer) == CLASSES
    expected = logits[0].softmax(0).tolist()
    assert list(answer.values()) == pytest.approx(expected, abs=1e-6)


def test_of_many_turns_the_nearest_are_read(own):
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


def test_audio_is_clipped_as_in_training(own, tmp_path):
    recognizer = evaluate.Recognizer(own("audio-fc").folder)
    tone = [0.3 * math.sin(k * k / 1e5) for k in range(100000)]
    write_wav(tmp_path / "long.wav", [0] * 8000 + tone)
    write_wav(tmp_path / "clip.wav", tone[:80000])
    answers = [recognizer.recognize(tmp_path / f"{x}.wav") for x in ("long", "clip")]
    assert answers[0] == pytest.approx(answers[1], abs=1e-6)


@torch.no_grad()
def test_the_weights_of_fine_tuning_are_used(own, tiny, tmp_path):
    # A checkpoint holds what data.Source gives after fine-tuning.
    source = data.Source(tiny["text"], {}, [], tmp_path, "cpu")
    for parameter in source.open("bottom"):
        parameter += torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
    frozen = evaluate.Recognizer(own("text-fc").folder)
    run = own("text-fc", corpus="other", upstreams={"text": source.state_dict()})
    tuned = evaluate.Recognizer(run.folder)
    tokens = [tiny["text"].prepare("hate")]
    states = source.live(tokens)[0]
    assert torch.equal(tuned.upstreams["text"](tokens)[0], states)
    assert not torch.allclose(frozen.upstreams["text"](tokens)[0], states, atol=0.1)
    assert tuned.recognize(None, "hate") != frozen.recognize(None, "hate")


@pytest.mark.parametrize(
    ("fusion", "arguments"),
    [
        ("mmt", ["--text", "oh"]),
        ("text-te", ["--wav", "x.wav"]),
        ("text-te", ["--wav", "x.wav", "--text", "oh"]),
        ("audio-te", []),
    ],
)
def test_a_modality_that_is_missing_or_not_used_is_named(
    fusion, arguments, own, report, tmp_path, monkeypatch
):
    run = own(fusion)
    monkeypatch.chdir(tmp_path)
    done = report("recognize", run.folder, *arguments)
    assert done.code == 1 and str(run.folder) in done.error
    for modality in run.model.config.modalities:
        assert modality in done.error


def test_the_command_prints_what_the_model_says(own, report):
    run = own("mmt", corpus="toy")
    arguments = ["--wav", run.wav, "--text", "oh"]
    done = report(
        "recognize", run.folder, *arguments, "--before", "a", "--after", "b", "i"
    )
    assert done.code == 0, done.error
    answer = evaluate.Recognizer(run.folder).recognize(run.wav, "oh", ["a"], ["b", "i"])
    for name in CLASSES:
        assert f"{name} {answer[name]:.1%}" in done.out
    for line in done.out.splitlines():
        assert line.startswith("toy: ")
    assert "speech" in done.out


def test_another_upstream_and_another_checkpoint_are_refused(own):
    run = own("mmt")
    other = own("lf")
    checkpoint = run.folder / "checkpoint.pt"
    content = checkpoint.read_bytes()
    checkpoint.write_bytes((other.folder / "checkpoint.pt").read_bytes())
    with pytest.raises(data.InputError, match="checkpoint.pt.*'fusion': 'lf'"):
        evaluate.Recognizer(run.folder)
    checkpoint.write_bytes(content)
    checksum = b'"weights_checksums": {"audio": "'
    change(run.folder / "config.json", checksum, checksum + b"0")
    with pytest.raises(data.InputError, match="has changed since"):
        evaluate.Recognizer(run.folder)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_damaged_or_hostile_checkpoint_is_named(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = own("text-fc")
    path = run.folder / "checkpoint.pt"
    # One bit of a weight. torch.load alone does not notice.
    raw = bytearray(path.read_bytes())
    weight = run.model.classifier[0].weight.detach().numpy().tobytes()
    raw[raw.index(weight) + 3] ^= 1
    path.write_bytes(raw)
    torch.load(path)
    with pytest.raises(data.InputError, match="(?s)checkpoint.pt: .*Restore it"):
        evaluate.Recognizer(run.folder)
    torch.save({"run": Hostile()}, path)
    with pytest.raises(data.InputError, match="(?s)checkpoint.pt: .*Restore it"):
        evaluate.Recognizer(run.folder)
    assert not (tmp_path / "ran").exists()
