"""train.py: the two triggers, and whole runs on a small corpus with tiny upstreams.

Where a trigger falls differs between processors. So most runs here follow a script,
with one letter per epoch: c(ontinue), f(inetune) or s(top).
"""

import contextlib
import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data
import evaluate
import train
from data import InputError
from model import FUSIONS, Config, EmotionRecognizer, SqueezeExcitation, Upstream
from tests.conftest import change, write_wav
from train import Patience

ANSWERS = {"c": "continue", "f": "finetune", "s": "stop"}

# --- The two triggers of §3.2 ---------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "losses", "expected"),
    [
        # Fine-tuning after 5 epochs and the end after 10, by one counter.
        ((), [1.0] + [2.0] * 10, "c" + "ccccf" + "cccc" + "s"),
        # A lower loss sets the counter to 0, before and after the trigger.
        ((), [3] + [4] * 4 + [2] + [3] * 10, "ccccc" + "c" + "ccccf" + "cccc" + "s"),
        ((), [3] + [4] * 6 + [2] + [3] * 10, "cccccfc" + "c" + "ccccccccc" + "s"),
        # The lowest loss counts, and not the one of the epoch before.
        ((2, 3), [1.0, 3.0, 2.0, 1.5], "ccfs"),
        # Equal is not lower, and NaN is not lower.
        ((), [1.0] * 11, "c" + "ccccf" + "cccc" + "s"),
        ((), [1.0] + [float("nan")] * 10, "c" + "ccccf" + "cccc" + "s"),
        # A frozen system only stops.
        ((None,), [1.0] + [2.0] * 10, "c" + "ccccccccc" + "s"),
        # If both are due, the answer is "stop".
        ((3, 3), [1.0] * 4, "cccs"),
        ((4, 3), [1.0] * 4, "cccs"),
        # The example of the docstring.
        (
            (2, 4),
            [1.0, 0.8, 0.9, 0.8, 0.7, 0.8, 0.8, 0.8, 0.8],
            "cc" + "cf" + "cccc" + "s",
        ),
    ],
)
def test_patience_by_hand(settings, losses, expected):
    patience = Patience(*settings)
    assert [patience.step(loss) for loss in losses] == [ANSWERS[x] for x in expected]


# --- Whole runs -----------------------------------------------------------------------


class Scripted(Patience):
    """Patience whose answers are given."""

    script = ""
    epoch = 0  # how many epochs the latest run has

    def __init__(self, *settings):
        super().__init__(*settings)
        Scripted.epoch = 0

    def step(self, dev_loss):
        answer = ANSWERS[self.script[Scripted.epoch]]
        Scripted.epoch += 1
        self.finetuning = self.finetuning or answer == "finetune"
        return answer


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder for the runs and the cache of all tests."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def go(monkeypatch, small_corpus, tiny_folder, work):
    """go(out, *flags) trains, and returns the folder of the last run below `out`."""

    def run(out, *flags, script="cfcs", root=small_corpus, bert=None):
        Scripted.epoch = 0
        if script:
            monkeypatch.setattr(Scripted, "script", script)
            monkeypatch.setattr(train, "Patience", Scripted)
        else:
            monkeypatch.setattr(train, "Patience", Patience)
        folders = ["--out", str(work / out), "--cache", str(work / "cache")]
        upstreams = ["--wavlm", str(tiny_folder / "audio")]
        upstreams += ["--bert", str(bert or tiny_folder / "text")]
        corpus = ["--iemocap", str(root), "--partial", "--device", "cpu"]
        train.main([*corpus, *folders, *upstreams, *flags])
        return sorted((work / out).rglob("config.json"))[-1].parent

    return run


def read_json(path):
    return json.loads(path.read_text())


def read_log(folder):
    return [
        json.loads(line) for line in (folder / "log.jsonl").read_text().split("\n")[:-1]
    ]


def outcome(folder):
    """What a run has computed: log, result, predictions and weights, but no seconds."""
    log = read_log(folder)
    result = read_json(folder / "result.json")
    for row in [*log, result]:
        del row["seconds"]
    predictions = (folder / "predictions.csv").read_text()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    weights = {}
    for part in [state["model"], *state["upstreams"].values()]:
        for name, value in part.items():
            weights[name] = value.numpy().tobytes()
    return log, result, predictions, weights


def test_a_run_from_end_to_end(go, small_corpus, capsys):
    folder = go("end-to-end", "--fusion", "mmt", "--fold", "5", script="ccfcs")
    system = "mmt-finetuned-wavlm=audio-bert=text"
    assert folder.parts[-3:] == ("small-partial", system, "fold5-seed0")
    files = "checkpoint.pt config.json log.jsonl predictions.csv result.json"
    assert sorted(path.name for path in folder.iterdir()) == files.split()

    log = read_log(folder)
    fields = "epoch phase lr train_loss dev_loss dev_wa dev_ua since_best event seconds"
    assert [list(row) for row in log] == [fields.split()] * 5
    assert [row["epoch"] for row in log] == [1, 2, 3, 4, 5]

    # The result, counted again from the predictions and from the label file.
    (path,) = small_corpus.glob("Session5/dialog/EmoEvaluation/*.txt")
    emotions = dict(
        re.findall(r"\t(\S+_[FM]\d+)\t(neu|hap|ang|sad)\t", path.read_text())
    )
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    classes = ["neu", "hap", "ang", "sad"]
    assert list(rows[0]) == ["utterance", "speaker", "label", "prediction", *classes]
    assert {row["utterance"]: row["label"] for row in rows} == emotions
    confusion = [[0] * 4 for _ in range(4)]
    for row in rows:
        assert row["speaker"] == f"Ses05{row['utterance'][-4]}"
        p = [float(row[c]) for c in classes]
        assert sum(p) == pytest.approx(1, abs=1e-5)
        assert p[classes.index(row["prediction"])] == max(p)
        confusion[classes.index(row["label"])][classes.index(row["prediction"])] += 1
    hits = [confusion[k][k] for k in range(4)]
    recalls = [confusion[k][k] / sum(confusion[k]) for k in range(4)]
    result = read_json(folder / "result.json")
    fields = "corpus fusion frozen fold seed wa ua loss confusion epochs finetune_epoch"
    fields += " dev_speaker n_train n_dev n_test seconds"
    assert set(result) == set(fields.split())
    assert result["confusion"] == confusion
    assert result["wa"] == pytest.approx(sum(hits) / len(rows))
    assert result["ua"] == pytest.approx(sum(recalls) / 4)
    assert result["n_test"] == len(rows)
    assert result["n_train"] + result["n_dev"] == 56 - len(
        rows
    )  # 56 of the four classes
    assert re.fullmatch("Ses0[1-4][FM]", result["dev_speaker"])
    assert (result["epochs"], result["finetune_epoch"]) == (5, 3)
    assert result["seconds"] == pytest.approx(sum(row["seconds"] for row in log))

    printed = capsys.readouterr().out
    for words in ("small-partial epoch +5", "fine-tuning starts", "small-partial: WA"):
        assert re.search(words, printed)
    go("end-to-end", "--fusion", "mmt", "--fold", "5")
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["s", "ccs", "fs", "cfccs", "ccccc"])
def test_the_answers_of_patience_start_fine_tuning_and_end_the_run(
    script, go, monkeypatch
):
    opened = []
    open_source = data.Source.open

    def watch(source, what):
        opened.append(Scripted.epoch)
        return open_source(source, what)

    monkeypatch.setattr(data.Source, "open", watch)
    flags = ["--fusion", "text-fc"]
    if "s" not in script:
        flags += ["--max-epochs", str(len(script))]
    folder = go(f"answers-{script}", *flags, script=script)
    log = read_log(folder)
    assert [row["event"] for row in log] == [ANSWERS[x] for x in script]
    n_frozen = script.index("f") + 1 if "f" in script else len(script)
    n_finetune = len(script) - n_frozen
    expected = [("frozen", 1e-3)] * n_frozen + [("finetune", 1e-5)] * n_finetune
    assert [(row["phase"], row["lr"]) for row in log] == expected
    expected = script.index("f") + 1 if "f" in script else None
    assert opened == ([expected] if expected else [])
    assert read_json(folder / "result.json")["finetune_epoch"] == expected


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("file", "moment", "n_deaths"),
    [
        ("config.json", "after", 1),
        ("checkpoint.pt", "before", 4),
        ("checkpoint.pt", "after", 4),
        ("log.jsonl", "after", 4),
        ("predictions.csv", "after", 1),
    ],
)
def test_killed_at_a_file_a_run_ends_with_the_same_bits(
    file, moment, n_deaths, go, monkeypatch
):
    """It dies in every epoch, before or after it writes the file."""
    whole = outcome(go("whole", "--fusion", "lf"))
    write_whole = data.write_whole
    deaths = set()

    def die(path, now):
        if (path.name, now) == (file, moment) and Scripted.epoch not in deaths:
            deaths.add(Scripted.epoch)
            raise Killed

    @contextlib.contextmanager
    def deadly_write(path):
        die(path, "before")
        with write_whole(path) as part:
            yield part
        die(path, "after")

    monkeypatch.setattr(data, "write_whole", deadly_write)
    folder = None
    while folder is None:
        with contextlib.suppress(Killed):
            folder = go(f"killed-{file}-{moment}", "--fusion", "lf")
    assert len(deaths) == n_deaths
    assert outcome(folder) == whole


def test_same_seed_same_bits_another_seed_another_result(go):
    first = outcome(go("first", "--fusion", "text-te", "--seed", "3"))
    assert outcome(go("second", "--fusion", "text-te", "--seed", "3")) == first
    assert outcome(go("third", "--fusion", "text-te", "--seed", "4"))[0] != first[0]


def test_epochs_shuffle_the_training_utterances_and_the_test_comes_last(
    go, small_corpus, monkeypatch
):
    split = data.split
    batch = data.batch
    batches = []

    def watch(rows, *others):
        batches.append((torch.is_grad_enabled(), rows.tolist()))
        return batch(rows, *others)

    monkeypatch.setattr(
        data, "split", lambda corpus, fold, seed: split(corpus, fold, 0)
    )
    monkeypatch.setattr(data, "batch", watch)
    for seed in ("0", "1"):
        go("orders", "--fusion", "text-fc", "--seed", seed, script="cs")
    corpus, _ = data.read_iemocap(small_corpus)
    train_rows, dev_rows, test_rows = split(corpus, 5, 0)
    orders = set()
    for run in (
        batches[:7],
        batches[7:],
    ):  # 2 epochs of train, train, dev, and the test
        for first, second, dev in (run[:3], run[3:6]):
            assert (first[0], second[0], dev) == (True, True, (False, dev_rows))
            assert (len(first[1]), len(second[1])) == (32, 7)
            assert sorted(first[1] + second[1]) == train_rows
            orders.add(tuple(first[1] + second[1]))
        assert run[6:] == [(False, test_rows)]
    assert len(orders) == 4


def test_fine_tuning_changes_only_what_the_paper_opens(go, tiny, monkeypatch):
    live = {}
    monkeypatch.setattr(data.Source, "close", lambda source: live.update({source: 1}))
    go("opened", "--fusion", "mmt")
    for source in live:
        modality = source.upstream.modality
        start = {"audio": "feature_extractor.", "text": "embeddings."}[modality]
        original = dict(tiny[modality].model.named_parameters())
        for name, parameter in source.live.model.named_parameters():
            # Weight decay moves even the words that no text has.
            changed = not torch.equal(parameter, original[name])
            assert changed == name.startswith(start), name
    assert len(live) == 2


def test_the_test_session_changes_nothing_in_training(go, small_corpus, tmp_path):
    poisoned = tmp_path / "small"
    shutil.copytree(small_corpus, poisoned)
    noise = torch.Generator().manual_seed(0)
    for path in sorted(poisoned.rglob("Ses05*.wav")):
        samples = torch.rand(len(data.load_wav(path)), generator=noise) - 0.5
        write_wav(path, samples.tolist())
    for path in poisoned.glob("Session5/dialog/*/*.txt"):
        text = path.read_text()
        for old, new in [
            ("hap", "HAP"),
            ("ang", "hap"),
            ("HAP", "ang"),
            ("hate", "again"),
        ]:
            text = text.replace(f"\t{old}\t", f"\t{new}\t").replace(
                f" {old} ", f" {new} "
            )
        path.write_text(text)
    clean_log, _, clean_predictions, clean_weights = outcome(go("clean"))
    cache = ["--cache", str(tmp_path / "cache")]
    log, _, predictions, weights = outcome(go("poisoned", *cache, root=poisoned))
    assert (log, weights) == (clean_log, clean_weights)
    assert predictions != clean_predictions


# --- Computed again by hand: no batch, no padding, no torch.optim ---------------------


class ByHand:
    """The small corpus and its layer states, one utterance at a time."""

    def __init__(self, small_corpus, tiny_folder, cache):
        self.corpus, _ = data.read_iemocap(small_corpus)
        self.tiny_folder = tiny_folder
        self.cache = cache

    def states(self, modality, row, live):
        utterance = self.corpus[row]
        if live is None:
            (file,) = self.cache.glob(f"{modality}-fp32-*/{utterance.id}-*.npy")
            return torch.from_numpy(np.load(file))
        raw = utterance.text
        if modality == "audio":
            raw = data.clip(data.load_wav(utterance.wav))
        upstream = live[modality]
        return upstream([upstream.prepare(raw)])[0]

    def loss(self, recognizer, rows, live=None):
        """The mean of -log p(label). `live`: upstreams to use in place of the cache."""
        states = {}  # of texts
        total = 0.0
        for row in rows:
            audio = self.states("audio", row, live)
            window = []
            for other in range(row - 4, row + 5):
                inside = 0 <= other < len(self.corpus)
                if inside and self.corpus[other].dialog == self.corpus[row].dialog:
                    if other not in states:
                        states[other] = self.states("text", other, live)
                    window.append(states[other])
                else:
                    window.append(torch.zeros(0, 2, 48))
            mask = torch.zeros(1, 9, max(map(len, window)), dtype=torch.bool)
            for k, text in enumerate(window):
                mask[0, k, : len(text)] = True
            logits = recognizer(
                audio=(audio, torch.ones(1, len(audio), dtype=torch.bool)),
                text=(torch.cat(window), mask),
            )[0]
            label = ["neu", "hap", "ang", "sad"].index(self.corpus[row].emotion)
            total = total + logits.exp().sum().log() - logits[label]
        return total / len(rows)

    def upstreams(self, state):
        """The pre-trained upstreams, with what a checkpoint has changed in them."""
        upstreams = {
            m: Upstream(str(self.tiny_folder / m), m) for m in ("audio", "text")
        }
        for modality, upstream in upstreams.items():
            parameters = dict(upstream.model.named_parameters())
            for name, value in state["upstreams"][modality].items():
                parameters[name.removeprefix("model.")].data.copy_(value)
        return upstreams


@pytest.fixture
def by_hand(small_corpus, tiny_folder, work):
    return ByHand(small_corpus, tiny_folder, work / "cache")


OPENED = {  # by the names of transformers
    "nothing": None,
    "bottom": {"audio": "feature_extractor.", "text": "embeddings."},
    "all": {"audio": "", "text": ""},
}


@pytest.mark.parametrize(
    "flags",
    [
        "--micro-batch 3",
        "--open nothing",
        "--open all --lr-finetune 1e-4 --weight-decay 1",
    ],
)
def test_the_steps_of_both_phases_are_adamw_by_hand(flags, go, by_hand, monkeypatch):
    """Five steps of each phase, the last one of a smaller batch."""
    for name in ("clip_grad_norm_", "clip_grad_value_"):  # these gradients are small
        monkeypatch.delattr(torch.nn.utils, name)
    parts = []
    batch = data.batch
    states = []
    write_whole = data.write_whole
    train_epoch = train.train_epoch

    def watch_batch(rows, *others):
        if torch.is_grad_enabled():
            parts.append(rows.tolist())
        return batch(rows, *others)

    def watch_epoch(model, *others):
        if not states:
            values = model.state_dict().items()
            states.append({"model": {name: value.clone() for name, value in values}})
        return train_epoch(model, *others)

    @contextlib.contextmanager
    def watch_write(path):
        with write_whole(path) as part:
            yield part
        if path.name == "checkpoint.pt":
            states.append(torch.load(path, weights_only=True))

    monkeypatch.setattr(data, "batch", watch_batch)
    monkeypatch.setattr(train, "train_epoch", watch_epoch)
    monkeypatch.setattr(data, "write_whole", watch_write)
    # This system has no Transformer block, so it has no dropout but --dropout.
    start = ["--fusion", "ef", "--dropout", "0", "--batch-size", "8"]
    folder = go(f"steps{flags}", *start, *flags.split(), script="fs")
    options = dict(re.findall(r"--(\S+) ([^-]\S*)", flags))
    finetune_rate = float(options.get("lr-finetune", 1e-5))
    decay = float(options.get("weight-decay", 1e-3))
    opens = OPENED[options.get("open", "bottom")]

    # Both epochs have five batches of 39 utterances, in parts.
    assert max(map(len, parts)) == int(options.get("micro-batch", 8))
    rows = sum(parts, [])
    assert sorted(rows[:39]) == sorted(rows[39:])

    recognizer = EmotionRecognizer(Config(**read_json(folder / "config.json")["model"]))
    for phase, rate in enumerate((1e-3, finetune_rate)):
        before, after = states[phase : phase + 2]
        recognizer.load_state_dict(before["model"])
        parameters = dict(recognizer.named_parameters())
        found = dict(after["model"])
        live = None
        if phase == 1 and opens:
            live = by_hand.upstreams(before)
            for modality, upstream in live.items():
                for name, p in upstream.model.named_parameters():
                    if name.startswith(opens[modality]):
                        parameters[f"{modality} {name}"] = p.requires_grad_(True)
                for name, value in after["upstreams"][modality].items():
                    found[f"{modality} {name.removeprefix('model.')}"] = value
        assert found.keys() == parameters.keys()
        means = {name: torch.zeros_like(p) for name, p in parameters.items()}
        squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
        train_loss = 0.0
        for t in range(1, 6):
            batch_rows = rows[39 * phase :][:39][8 * t - 8 : 8 * t]
            loss = by_hand.loss(recognizer, batch_rows, live)
            train_loss += loss.item() * len(batch_rows) / 39
            grads = torch.autograd.grad(
                loss, list(parameters.values()), allow_unused=True
            )
            for (name, p), grad in zip(parameters.items(), grads, strict=True):
                if grad is None:  # BERT's pooler, WavLM's embedding of masked frames
                    continue
                means[name] = 0.9 * means[name] + 0.1 * grad
                squares[name] = 0.999 * squares[name] + 0.001 * grad**2
                mean = means[name] / (1 - 0.9**t)
                square = squares[name] / (1 - 0.999**t)
                with torch.no_grad():
                    p.mul_(1 - rate * decay)
                    p.sub_(rate * mean / (square.sqrt() + 1e-8))

        assert after["log"][phase]["lr"] == rate
        assert after["log"][phase]["train_loss"] == pytest.approx(train_loss, rel=1e-4)
        for name, p in parameters.items():
            if name.endswith(("k_proj.bias", "key.bias")):
                continue  # The softmax passes them no gradient but rounding errors.
            # If a gradient is nearly 0, Adam takes its sign from the rounding.
            wrong = (found[name] - p.detach()).abs() > 0.02 * rate
            assert wrong.float().mean() < 0.005, name


@pytest.mark.parametrize(
    "flags",
    [
        "--finetune-after 1 --stop-after 3 --lr-frozen 0.03",
        "--frozen --stop-after 2 --lr-frozen 0.03",
        "--finetune-after 2 --stop-after 2 --lr-frozen 0.03",
    ],
)
def test_losses_and_triggers_computed_again(flags, go, by_hand):
    """The losses by the weights of the checkpoint, the triggers by a plain loop."""
    folder = go(f"again{flags}", "--fusion", "ef", *flags.split(), script=None)
    config = read_json(folder / "config.json")
    result = read_json(folder / "result.json")
    log = read_log(folder)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    recognizer = EmotionRecognizer(Config(**config["model"])).eval()
    recognizer.load_state_dict(state["model"])
    live = by_hand.upstreams(state) if result["finetune_epoch"] else None
    targets = [row for row, u in enumerate(by_hand.corpus) if u.emotion != "fru"]
    for loss, chosen in [
        (log[-1]["dev_loss"], lambda u: u.speaker == result["dev_speaker"]),
        (result["loss"], lambda u: u.session == 5),
    ]:
        rows = [row for row in targets if chosen(by_hand.corpus[row])]
        with torch.no_grad():
            assert by_hand.loss(recognizer, rows, live).item() == pytest.approx(
                loss, abs=2e-5
            )

    options = dict(re.findall(r"--(\S+) ([^-]\S*)", flags))
    finetune_after = int(options.get("finetune-after", 10**6))
    stop_after = int(options["stop-after"])
    losses = [row["dev_loss"] for row in log]
    finetune_epoch = None
    for epoch in range(1, len(log) + 1):
        # The epochs since the first one that has the lowest loss so far.
        since_best = epoch - 1 - losses.index(min(losses[:epoch]))
        event = "continue"
        if since_best >= stop_after:
            event = "stop"
        elif since_best >= finetune_after and finetune_epoch is None:
            event = "finetune"
            finetune_epoch = epoch
        assert log[epoch - 1]["since_best"] == since_best
        assert log[epoch - 1]["event"] == event
    assert event == "stop"
    assert result["finetune_epoch"] == finetune_epoch


def test_with_nothing_open_the_cache_is_read_to_the_end(go, tmp_path, monkeypatch):
    forward = Upstream.forward
    calls = []

    def watch(upstream, inputs):
        # A GPU would compute WavLM's convolutions with fewer bits otherwise.
        assert not torch.backends.cudnn.allow_tf32
        calls.append(upstream.modality)
        return forward(upstream, inputs)

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(Upstream, "forward", watch)
    flags = ["--fusion", "ef", "--cache", str(tmp_path)]
    log = read_log(go("nothing-open", *flags, "--open", "nothing"))
    assert [row["lr"] for row in log] == [1e-3, 1e-3, 1e-5, 1e-5]
    assert sorted(calls) == ["audio"] * 56 + ["text"] * 70  # to fill the cache
    go("bottom-open", *flags)
    assert {"audio", "text"} == set(calls[56 + 70 :])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_dropout_is_on_in_both_phases_and_off_in_measuring(fusion, go, monkeypatch):
    forward = EmotionRecognizer.forward
    found = []

    def twice(model, **inputs):
        logits = forward(model, **inputs)
        same = torch.equal(logits, forward(model, **inputs))
        found.append("off" if same else "on")
        return logits

    monkeypatch.setattr(EmotionRecognizer, "forward", twice)
    go(f"dropout-{fusion}", "--fusion", fusion, script="fs")
    # Two batches to train on and one to develop on, twice, and then the test.
    assert found == ["on", "on", "off"] * 2 + ["off"]


def test_bf16_is_near_fp32_with_head_and_weights_in_fp32(go, monkeypatch):
    forward = EmotionRecognizer.forward

    def watch(model, **inputs):
        logits = forward(model, **inputs)
        assert logits.dtype == torch.float32
        return logits

    monkeypatch.setattr(EmotionRecognizer, "forward", watch)
    flags = ["--fusion", "mmt", "--dropout", "0"]
    full = go("fp32", *flags)
    half = go("bf16", *flags, "--precision", "bf16")
    for one, other in zip(read_log(full), read_log(half), strict=True):
        assert one["train_loss"] != other["train_loss"]
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.01)
    state = torch.load(half / "checkpoint.pt", weights_only=True)
    for weights in [state["model"], *state["upstreams"].values()]:
        assert {value.dtype for value in weights.values()} == {torch.float32}


# --- Settings, folders, several runs of one command -----------------------------------


def test_the_defaults_are_the_constants_of_the_paper():
    args = train.make_parser().parse_args([])
    assert (args.lr_frozen, args.lr_finetune, args.weight_decay) == (1e-3, 1e-5, 1e-3)
    assert (args.batch_size, args.dropout, args.context) == (32, 0.5, 9)
    assert (args.finetune_after, args.stop_after, args.max_epochs) == (5, 10, None)
    assert (args.wavlm, args.bert) == ("microsoft/wavlm-large", "bert-base-uncased")
    assert (args.open, args.precision, args.cma_residual) == ("bottom", "fp32", False)
    assert (args.fusion, args.frozen, args.fold, args.seed) == ("mmt", False, [5], [0])


def test_the_systems_have_the_numbers_of_table_1():
    def chosen(*numbers):
        return train.chosen_systems(train.parse_args(["--system", *numbers]))

    assert chosen("18") == [("mmt", False)]
    assert chosen("15", "6") == [("lf", True), ("text-fc", False)]
    assert chosen("11") == [("cmt-t2a", True)]
    systems = chosen("all")
    assert len(systems) == len(set(systems)) == 18
    assert chosen(*map(str, range(1, 19))) == systems


OTHER = {  # a value of each setting that is not its default
    "upstream": "tiny",
    "wavlm": "some/where",
    "bert": "else",
    "precision": "bf16",
    "open": "all",
    "cma_residual": True,
    "lr_frozen": 0.01,
    "lr_finetune": 1e-4,
    "weight_decay": 0.0,
    "batch_size": 8,
    "dropout": 0.1,
    "context": 3,
    "finetune_after": 2,
    "stop_after": 4,
    "max_epochs": 7,
}


class Stopped(Exception):
    pass


def test_a_folders_name_lists_exactly_what_differs_from_the_defaults(
    small_corpus, tiny, tmp_path, monkeypatch
):
    flags = vars(train.make_parser().parse_args([]))
    # These are in the name anyway, or change nothing in a result.
    others = "iemocap corpus partial fusion frozen system fold seed out cache device"
    assert flags.keys() == OTHER.keys() | set(others.split()) | {"micro_batch"}

    def stop(config):
        raise Stopped

    corpus, _ = data.read_iemocap(small_corpus)
    sources = {m: data.Source(tiny[m], {}, corpus, tmp_path, "cpu") for m in tiny}
    monkeypatch.setattr(train, "load_sources", lambda args, corpus: sources)
    monkeypatch.setattr(train, "EmotionRecognizer", stop)
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "toy.json").write_text("{}")
    for session in small_corpus.iterdir():
        (tmp_path / "toy" / session.name).symlink_to(session)
    monkeypatch.chdir(tmp_path)

    def folder_of(*flags, root=small_corpus):
        flags = ["--fusion", "lf", "--frozen", *flags]
        corpus = ["--iemocap", str(root), "--fold", "2", "--seed", "7"]
        if root == small_corpus:
            corpus.append("--partial")
        with pytest.raises(Stopped):
            train.main([*corpus, *flags])
        (path,) = tmp_path.rglob("config.json")
        folder = path.parent
        path.unlink()
        return folder.relative_to(tmp_path).as_posix()

    usual = "runs/small-partial/lf-frozen/fold2-seed7"
    assert folder_of() == usual
    assert folder_of("--dropout", "0.50", "--open", "bottom") == usual
    assert folder_of("--micro-batch", "4", "--cache", "another") == usual
    for name, value in OTHER.items():
        flag = [f"--{name.replace('_', '-')}"]
        if value is not True:
            flag.append(str(value))
        shown = "where" if name == "wavlm" else value
        expected = usual.replace("frozen", f"frozen-{name}={shown}")
        assert folder_of(*flag) == expected
    expected = usual.replace("frozen", "frozen-dropout=0.0-context=5")
    assert folder_of("--context", "5", "--dropout", "0") == expected
    # The toy corpus has defaults of its own.
    usual = "runs/toy/lf-frozen/fold2-seed7"
    assert folder_of(root="toy") == usual
    for name, value in [("upstream", "paper"), ("max_epochs", "7")]:
        expected = usual.replace("frozen", f"frozen-{name}={value}")
        assert folder_of(f"--{name.replace('_', '-')}", value, root="toy") == expected


@pytest.mark.parametrize(
    "flags",
    [
        "--cma-residual",
        "--context 1",
        "--open nothing",
        "--open all",
        "--dropout 0.1",
        "--weight-decay 0.5",
        "--batch-size 16",
        "--lr-frozen 0.01",
        "--lr-finetune 1e-3",
    ],
)
def test_every_setting_changes_the_weights(flags, go):
    plain = outcome(go("plain", "--fusion", "cmt-a2t"))[3]
    assert (
        outcome(go(f"setting{flags}", "--fusion", "cmt-a2t", *flags.split()))[3]
        != plain
    )


def test_runs_of_one_command_end_as_they_would_alone(go, work):
    """Fine-tuning changes a copy of the upstreams, and each run makes a new copy."""
    go("together", "--system", "14", "13", "--seed", "0", "1", script="fs")
    for number, system in (("13", "ef-frozen"), ("14", "ef-finetuned")):
        for seed in "01":
            (together,) = (work / "together").rglob(f"{system}*/fold5-seed{seed}")
            flags = ["--system", number, "--seed", seed]
            alone = go(f"alone{number}-{seed}", *flags, script="fs")
            assert outcome(together) == outcome(alone)


@pytest.mark.parametrize("what", ["weights_checksums", "corpus_checksum", "seed"])
def test_another_run_in_the_same_folder_is_refused_by_name(
    what, go, small_corpus, tiny_folder, tmp_path
):
    root = tmp_path / "small"
    bert = tmp_path / "text"
    shutil.copytree(small_corpus, root)
    shutil.copytree(tiny_folder / "text", bert)
    flags = ["--fusion", "text-fc"]
    out = f"refused-{what}"
    folder = go(out, *flags, root=root, bert=bert)
    before = outcome(folder)
    old = read_json(folder / "config.json")
    if what == "weights_checksums":
        changed = Upstream(str(bert), "text").model
        changed.embeddings.word_embeddings.weight.data += 0.1
        changed.save_pretrained(bert)
    elif what == "corpus_checksum":
        path = next(root.glob("Session1/dialog/transcriptions/*.txt"))
        change(path, b"lovely", b"lively")
    else:
        flags += ["--seed", "1"]
        folder = folder.rename(folder.with_name("fold5-seed1"))
    with pytest.raises(InputError) as error:
        go(out, *flags, root=root, bert=bert)
    for words in (str(folder), what, str(old[what]), "--out"):
        assert words in str(error.value)
    assert outcome(folder) == before


def test_a_checkpoint_of_another_run_is_refused(go):
    folder = go("theirs", "--fusion", "text-fc")
    other = go("theirs", "--fusion", "text-fc", "--seed", "1")
    (other / "result.json").unlink()
    shutil.copy(folder / "checkpoint.pt", other)
    with pytest.raises(InputError, match="checkpoint.pt.*'seed': 0"):
        go("theirs", "--fusion", "text-fc", "--seed", "1")


def test_a_run_resumes_after_its_upstream_has_moved(go, tiny_folder, tmp_path, capsys):
    """The weights are the same, so only the path differs."""
    flags = ["--fusion", "text-fc"]
    folder = go("moved", *flags)
    before = outcome(folder)
    (folder / "result.json").unlink()
    shutil.copytree(tiny_folder / "text", tmp_path / "text")
    assert go("moved", *flags, bert=tmp_path / "text") == folder
    assert "after epoch 4" in capsys.readouterr().out
    assert outcome(folder) == before


# --- Wrong input, and what users are told ---------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--system 19", "--system"),
        ("--context 4", "--context"),
        ("--iemocap a --corpus b.csv", "--corpus"),
        ("--system 1 --frozen", "--frozen"),
        ("--dropout 1.5", "dropout"),
        ("--lr-frozen nan", "lr.frozen"),
        ("--batch-size 0", "--batch-size"),
        ("--max-epochs many", "--max-epochs"),
    ],
)
def test_bad_flags_are_one_sentence(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(flags.split())
    assert stopped.value.code == 2
    assert re.search(f"error: .*{message}", capsys.readouterr().err)


def test_only_the_full_release_is_iemocap(small_corpus, tmp_path, capsys):
    root = tmp_path / "small"
    shutil.copytree(small_corpus, root)

    def read(*flags):
        return train.read_corpus(train.parse_args(list(map(str, flags))))

    with pytest.raises(InputError, match=r"(?s)session 1: .*1819.*--partial"):
        read("--iemocap", root)
    # A damaged dialogue is an error, too, or with --partial left out with a line.
    next(root.rglob("Ses03*.wav")).unlink()
    with pytest.raises(InputError, match="Ses03F_impro01"):
        read("--iemocap", root)
    name, corpus = read("--iemocap", root, "--partial")
    assert (name, len(corpus)) == ("small-partial", 56)
    assert re.search("left out: .*Ses03F_impro01", capsys.readouterr().out)


def test_a_table_named_iemocap_is_not_reported_as_iemocap(tmp_path):
    path = tmp_path / "iemocap.csv"
    path.write_text("text,emotion,session,dialog,speaker\nhello,happy,1,d1,s1\n")
    assert train.read_corpus(train.parse_args(["--corpus", str(path)]))[0] != "iemocap"


def test_toy_is_beside_every_number_of_the_toy(small_corpus, tmp_path, capsys):
    root = tmp_path / "small"
    shutil.copytree(small_corpus, root)
    (root / "toy.json").write_text("{}")
    folders = ["--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")]
    flags = ["--iemocap", str(root), "--device", "cpu", "--max-epochs", "3"]
    train.main([*flags, *folders])
    evaluate.main(["tables", str(tmp_path / "runs")])
    printed = capsys.readouterr().out
    for words in ("This is the TOY corpus", "toy epoch +3", "toy: WA", "Table 1, toy"):
        assert re.search(words, printed)
    for line in printed.splitlines():
        if line and not line.startswith("|"):
            title = line
        if re.search(r"\d\.\d|%", line):
            assert "toy" in title, line


def test_a_dead_squeeze_and_excitation_is_warned_of(go, monkeypatch, capsys):
    go("alive", "--fusion", "ef")
    assert "warning" not in capsys.readouterr().out
    create = SqueezeExcitation.__init__

    def create_dead(self, n_layers):
        create(self, n_layers)
        torch.nn.init.constant_(self.reduce.bias, -100)

    monkeypatch.setattr(SqueezeExcitation, "__init__", create_dead)
    go("dead", "--fusion", "ef", script="cs")
    warnings = re.findall(r"warning: (\S+)\.se", capsys.readouterr().out)
    assert warnings == ["extractor.audio", "extractor.text.each_text"] * 2


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    go, monkeypatch
):
    cross_entropy = F.cross_entropy
    calls = []

    def sick(*inputs, **options):
        calls.append(1)
        factor = float("nan") if len(calls) == 4 else 1  # the last batch of epoch 2
        return factor * cross_entropy(*inputs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train.F, "cross_entropy", sick)
        with pytest.raises(InputError, match="nan in epoch 2"):
            go("nan", "--fusion", "text-fc")
    folder = go("nan", "--fusion", "text-fc")  # resumes after epoch 1
    assert outcome(folder) == outcome(go("no-nan", "--fusion", "text-fc"))


def test_a_test_loss_that_is_not_finite_leaves_no_result(go, monkeypatch, work):
    measure = train.measure

    def sick(*inputs):
        result = measure(*inputs)
        if Scripted.epoch == 4:
            result[0]["loss"] = float("inf")
        return result

    monkeypatch.setattr(train, "measure", sick)
    with pytest.raises(InputError, match="inf in the test"):
        go("inf", "--fusion", "text-fc")
    (folder,) = [path.parent for path in (work / "inf").rglob("checkpoint.pt")]
    assert not (folder / "result.json").exists()
    assert not (folder / "predictions.csv").exists()
