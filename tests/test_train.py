"""train.py: the two triggers, and whole runs on a small corpus with tiny upstreams.

Where a trigger falls differs between processors. So the development losses of the runs
here are chosen by hand. `Patience` has more checks in tests/course/checks.py.
"""

import contextlib
import copy
import csv
import functools
import json
import math
import re
import shutil
from argparse import Namespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import data
import evaluate
import train
from data import InputError
from model import Config, EmotionRecognizer, Upstream
from tests.conftest import CLASSES, write_wav
from train import Patience, Run

# --- The two triggers of §3.2 ---------------------------------------------------------


def test_patience_by_hand():
    """The example of its docstring, and 5 and 10 epochs (§3.2)."""
    for settings, losses, expected in [
        ((2, 4), [1, 0.8, 0.9, 0.8, 0.7, 0.8, 0.8, 0.8, 0.8], "cccfccccs"),
        ((), [2, 1, 3, 2, 1, 1, 1, 2, 2, 2, 2, 2], "ccccccfccccs"),
    ]:
        patience = Patience(*settings)
        answers = [patience.step(loss) for loss in losses]
        assert "".join(answer[0] for answer in answers) == expected


# --- An epoch by hand -----------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_an_epoch_takes_a_step_of_adamw_for_each_batch(micro_batch):
    """§3.2: AdamW with weight decay, on the mean cross-entropy of each batch (§2.4).

    [A18]: the last batch has two utterances instead of three, and a step of its own.
    [A15]: no class weights, no clipping. --micro-batch changes nothing in the result.
    """
    args = Namespace(device="cpu", batch_size=3, micro_batch=micro_batch)
    torch.manual_seed(0)
    x = torch.randn(8, 5) * torch.arange(1.0, 9.0).unsqueeze(1)
    labels = torch.tensor([0, 0, 0, 1, 2, 3, 0, 1])
    parts = []

    def batch(rows):
        parts.append(rows)
        return {"input": x[rows]}, labels[rows]

    model = nn.Linear(5, 4).eval()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5, fused=True)
    loss = train.train_epoch(model, optimizer, batch, torch.arange(8), args)
    assert model.training, "dropout is off in training"
    assert max(map(len, parts)) == (micro_batch or 3)
    order = torch.cat(parts)
    assert sorted(order.tolist()) == list(range(8)) != order.tolist(), "not shuffled"
    optimizer = torch.optim.AdamW(reference.parameters(), 0.1, weight_decay=0.5)
    total = 0.0
    for chosen in order.split(3):
        optimizer.zero_grad()
        expected = F.cross_entropy(reference(x[chosen]), labels[chosen])
        expected.backward()
        optimizer.step()
        total += expected.item() * len(chosen)
    assert loss == pytest.approx(total / 8)
    for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, expected, atol=1e-5), "these are not AdamW's steps"


# --- Whole runs -----------------------------------------------------------------------

# With these flags and losses, fine-tuning starts after the second epoch, and the fourth
# is the last.
LOSSES = [1.0, 2.0, 2.0, 2.0]
TRIGGERS = ["--finetune-after", "1", "--stop-after", "3"]


@pytest.fixture(scope="module")
def trainer(small_corpus, tmp_path_factory):
    """trainer(out, *flags) trains, and returns the folder of its last run."""
    work = tmp_path_factory.mktemp("work")
    write_config = train.write_config
    load = functools.cache(evaluate.load_upstream)

    def run(out, *flags, root=small_corpus):
        def patience_with_losses_by_hand(*settings):
            patience = Patience(*settings)
            step = patience.step
            losses = iter(LOSSES)
            patience.step = lambda dev_loss: step(next(losses))
            return patience

        def remember(folder, config):
            run.folders.append(folder)
            write_config(folder, config)

        run.folders = []
        command = ["--iemocap", str(root), "--partial", "--device", "cpu", *TRIGGERS]
        command += ["--upstream", "tiny", "--cache", str(work / "cache")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "Patience", patience_with_losses_by_hand)
            patch.setattr(train, "write_config", remember)
            patch.setattr(evaluate, "load_upstream", load)
            train.main([*command, "--out", str(work / out), *flags])
        return run.folders[-1]

    return run


@pytest.fixture(scope="module")
def mmt(trainer):
    return trainer("mmt")


@pytest.fixture(scope="module")
def text_fc(trainer):
    return trainer("text-fc", "--fusion", "text-fc")


def read_json(path):
    return json.loads(path.read_text())


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").open()]


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
        weights |= {name: value.numpy().tobytes() for name, value in part.items()}
    return log, result, predictions, weights


def test_a_run_from_end_to_end(mmt, small_corpus, trainer, capsys):
    """Its files, counted again from the label file of Session 5."""
    system = "mmt-finetuned-upstream=tiny-finetune_after=1-stop_after=3"
    assert mmt.parts[-3:] == ("small-partial", system, "fold5-seed0")
    files = "checkpoint.pt config.json log.jsonl predictions.csv result.json"
    assert sorted(path.name for path in mmt.iterdir()) == files.split()

    log = read_log(mmt)
    fields = "epoch phase lr train_loss dev_loss dev_wa dev_ua since_best event seconds"
    assert [list(row) for row in log] == [fields.split()] * 4
    keys = ("epoch", "phase", "lr", "since_best", "event")
    assert [tuple(row[key] for key in keys) for row in log] == [
        (1, "frozen", 1e-3, 0, "continue"),
        (2, "frozen", 1e-3, 1, "finetune"),
        (3, "finetune", 1e-5, 2, "continue"),
        (4, "finetune", 1e-5, 3, "stop"),
    ]
    (path,) = small_corpus.glob("Session5/dialog/EmoEvaluation/*.txt")
    pattern = r"\t(\S+_[FM]\d+)\t(neu|hap|ang|sad)\t"
    emotions = dict(re.findall(pattern, path.read_text()))
    with (mmt / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["utterance", "speaker", "label", "prediction", *CLASSES]
    assert {row["utterance"]: row["label"] for row in rows} == emotions
    for row in rows:
        assert row["speaker"] == f"Ses05{row['utterance'][-4]}"
        p = [float(row[c]) for c in CLASSES]
        assert sum(p) == pytest.approx(1, abs=1e-5)
        assert p[CLASSES.index(row["prediction"])] == max(p)
    # read_run counts WA, UA and the confusion matrix again.
    result = evaluate.read_run(mmt).result
    assert result.keys() >= {"wa", "ua", "confusion", "loss", "seconds"}
    assert re.fullmatch("Ses0[1-4][FM]", result["dev_speaker"])
    n = len(rows)
    expected = {"corpus": "small-partial", "fusion": "mmt", "frozen": False, "fold": 5}
    expected |= {"seed": 0, "epochs": 4, "finetune_epoch": 2, "n_test": n}
    expected |= {"n_train": 39, "n_dev": 56 - 39 - n}  # 56 of the four classes
    assert expected.items() <= result.items()
    # Otherwise a GPU computes WavLM's convolutions with fewer bits.
    assert not torch.backends.cudnn.allow_tf32
    trainer("mmt")
    assert "already finished" in capsys.readouterr().out


@torch.no_grad()
def test_the_losses_by_hand_one_utterance_at_a_time(mmt, small_corpus):
    """-log p(label) of development and test, by the weights of the checkpoint.

    Fine-tuning has moved all that §2.4 opens by four steps of a new AdamW [A11], which
    are two epochs of two batches, and nothing else.
    """
    corpus, _ = data.read_iemocap(small_corpus)
    result = read_json(mmt / "result.json")
    config = read_json(mmt / "config.json")
    checkpoint = torch.load(mmt / "checkpoint.pt", weights_only=True)
    recognizer = EmotionRecognizer(Config(**config["model"])).eval()
    recognizer.load_state_dict(checkpoint["model"])
    upstreams = {}
    n_trained = len(checkpoint["model"])
    for m, start in (("audio", "feature_extractor."), ("text", "embeddings.")):
        upstreams[m] = Upstream(config["upstreams"][m], m)
        parameters = dict(upstreams[m].named_parameters())
        tuned = checkpoint["upstreams"][m]
        assert list(tuned) == [n for n in parameters if n.startswith(f"model.{start}")]
        n_trained += len(tuned)
        for name, value in tuned.items():
            p = parameters[name]
            assert 1.5e-5 < (p - value).abs().max() < 4.5e-5, f"{name} was not trained"
            p.copy_(value)
    optimizer = checkpoint["optimizer"]
    assert [float(s["step"]) for s in optimizer["state"].values()] == [4] * n_trained
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {1e-3}

    def states(m, raw):
        return upstreams[m]([upstreams[m].prepare(raw)])[0]

    texts = [states("text", u.text) for u in corpus]
    for loss, chosen in [
        (read_log(mmt)[-1]["dev_loss"], lambda u: u.speaker == result["dev_speaker"]),
        (result["loss"], lambda u: u.session == 5),
    ]:
        losses = []
        for row, u in enumerate(corpus):
            if u.emotion == "fru" or not chosen(u):
                continue
            audio = states("audio", data.clip(data.load_wav(u.wav)))
            window = [torch.zeros(0, 2, 48)] * 9
            for k, other in enumerate(range(row - 4, row + 5)):
                if 0 <= other < 70 and corpus[other].dialog == u.dialog:
                    window[k] = texts[other]
            mask = torch.zeros(1, 9, max(map(len, window)), dtype=torch.bool)
            for k, text in enumerate(window):
                mask[0, k, : len(text)] = True
            audio = (audio, torch.ones(1, len(audio), dtype=torch.bool))
            logits = recognizer(audio, (torch.cat(window), mask))[0]
            losses.append(-logits.log_softmax(0)[CLASSES.index(u.emotion)])
        assert sum(losses).item() / len(losses) == pytest.approx(loss, abs=2e-5)


class Killed(BaseException):
    pass


def test_killed_after_every_file_a_run_ends_with_the_same_bits(
    text_fc, trainer, monkeypatch
):
    """The log is one epoch ahead of the checkpoint if it dies between the two."""
    write_whole = data.write_whole
    deaths = set()

    @contextlib.contextmanager
    def deadly_write(path):
        with write_whole(path) as part:
            yield part
        log = path.with_name("log.jsonl")
        death = (path.name, log.exists() and len(read_log(path.parent)))
        if death not in deaths:
            deaths.add(death)
            raise Killed

    monkeypatch.setattr(data, "write_whole", deadly_write)
    # No epoch survives its own checkpoint here, and only saved epochs are printed.
    early = "an epoch is printed before it is saved"
    monkeypatch.setattr(train, "print_epoch", lambda *_: pytest.fail(early))
    folder = None
    while folder is None:
        with contextlib.suppress(Killed):
            folder = trainer("killed", "--fusion", "text-fc")
    assert len(deaths) == 3 + 2 * 4  # two files in each epoch
    assert outcome(folder) == outcome(text_fc)


def test_shuffled_batches_have_the_states_and_labels_of_their_rows(
    trainer, monkeypatch
):
    """Without dropout and at a rate of 0, a loss does not depend on the order."""
    split = data.split

    def split_without_dev(corpus, fold, seed):
        train_rows, _, test_rows = split(corpus, fold, seed)
        return train_rows, train_rows, test_rows

    monkeypatch.setattr(data, "split", split_without_dev)
    flags = "--fusion ef --dropout 0 --lr-frozen 0 --max-epochs 1"
    (row,) = read_log(trainer("shuffled", *flags.split()))
    assert row["train_loss"] == pytest.approx(row["dev_loss"], rel=1e-5)


def test_each_seed_and_each_epoch_has_random_numbers_of_its_own(trainer, monkeypatch):
    """Otherwise the batches and the dropout of all epochs are the same."""
    train_epoch = train.train_epoch
    drawn = []
    weights = []

    def watch(model, *others):
        drawn.append(torch.rand(1).item())
        weights.append(model.classifier[0].weight.detach().clone())
        return train_epoch(model, *others)

    monkeypatch.setattr(train, "train_epoch", watch)
    flags = ["--fusion", "text-fc", "--max-epochs", "2", "--seed", "0", "1"]
    trainer("seeds", *flags)
    assert len(set(drawn)) == 4
    assert not torch.equal(weights[0], weights[2]), "two seeds, the same first weights"


def test_the_test_session_changes_nothing_in_training(
    mmt, trainer, small_corpus, tmp_path
):
    """Neither its recordings, labels and words, nor its part of the tiny vocabulary."""
    poisoned = tmp_path / "small"
    shutil.copytree(small_corpus, poisoned)
    noise = torch.Generator().manual_seed(0)
    for path in sorted(poisoned.rglob("Ses05*.wav")):
        samples = torch.rand(len(data.load_wav(path)), generator=noise) - 0.5
        write_wav(path, samples.tolist())
    swap = {"\thap\t": "\tang\t", "\tang\t": "\thap\t", "hate": "aha"}
    for path in poisoned.glob("Session5/dialog/*/*.txt"):
        text = re.sub("|".join(swap), lambda old: swap[old[0]], path.read_text())
        path.write_text(text)
    outcomes = []
    for folder in (mmt, trainer("poisoned", root=poisoned)):
        log, _, predictions, weights = outcome(folder)
        # The table of words has another length.
        words = weights.pop("model.embeddings.word_embeddings.weight")
        outcomes.append((log, weights, predictions, len(words)))
    clean, other = outcomes
    assert clean[:2] == other[:2], "training has seen the test session"
    assert clean[2] != other[2]
    assert clean[3] != other[3], "another corpus should have words of its own"


FROZEN = ["--precision bf16", "--context 1", "--dropout 0.1", "--weight-decay 0.5"]
FROZEN += ["--batch-size 16", "--lr-frozen 0.01"]
SETTINGS = [("text-fc --max-epochs 1", flags) for flags in FROZEN]
SETTINGS += [("cmt-t2a --max-epochs 1", "--cma-residual"), ("text-fc", "--open all")]
SETTINGS += [("text-fc", "--open nothing"), ("text-fc", "--lr-finetune 1e-3")]


@pytest.mark.parametrize(("system", "flags"), SETTINGS)
def test_every_setting_changes_the_weights(system, flags, trainer):
    """Each run has a folder of its own, and states of its own precision."""
    folders = []
    for more in ("", flags):
        command = f"--fusion {system} {more}".split()
        folders.append(trainer("settings", *command))
    plain, changed = [outcome(folder)[3] for folder in folders]
    assert plain != changed


def test_runs_of_one_command_end_as_they_would_alone(trainer):
    """Fine-tuning changes a copy of the upstreams, and each run makes a new copy.

    A frozen system stays frozen, and has the upstreams of its own modalities.
    """
    trainer("together", "--system", "6", "1", "--seed", "0", "1")
    _, together, frozen, _ = trainer.folders
    assert outcome(together) == outcome(trainer("6", "--system", "6", "--seed", "1"))
    assert list(read_json(frozen / "config.json")["upstreams"]) == ["audio"]
    assert {(row["phase"], row["lr"]) for row in read_log(frozen)} == {("frozen", 1e-3)}
    assert read_json(frozen / "result.json")["finetune_epoch"] is None


@pytest.mark.parametrize(
    ("name", "diverged"),
    [("train_epoch", math.nan), ("measure", ({"loss": math.inf}, None))],
)
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    name, diverged, text_fc, trainer, monkeypatch
):
    """The same command goes on from there."""
    function = getattr(train, name)
    calls = []

    def diverge(*arguments):
        calls.append(arguments)
        return diverged if len(calls) == 2 else function(*arguments)

    command = [f"diverged-{name}", "--fusion", "text-fc"]
    message = "epoch 2: the loss is not finite"
    with monkeypatch.context() as patch, pytest.raises(InputError, match=message):
        patch.setattr(train, name, diverge)
        trainer(*command)
    assert outcome(trainer(*command)) == outcome(text_fc)


# --- Settings and folders -------------------------------------------------------------


def test_the_defaults_are_the_constants_of_the_paper():
    """§3.2, and the systems have the numbers of Table 1."""
    constants = {"lr_frozen": 1e-3, "lr_finetune": 1e-5, "weight_decay": 1e-3}
    constants |= {"batch_size": 32, "dropout": 0.5, "context": 9, "max_epochs": None}
    constants |= {"finetune_after": 5, "stop_after": 10, "fusion": "mmt", "fold": [5]}
    constants |= {"wavlm": "microsoft/wavlm-large", "bert": "bert-base-uncased"}
    constants |= {"open": "bottom", "precision": "fp32", "cma_residual": False}
    assert constants.items() <= vars(train.parse_args(["--iemocap", "x"])).items()

    def chosen(*numbers):
        return train.chosen_systems(train.parse_args(["--system", *numbers]))

    assert chosen("18", "15", "6") == [("mmt", False), ("lf", True), ("text-fc", False)]
    assert chosen(*map(str, range(1, 19))) == chosen("all")


def test_a_folders_name_lists_what_differs_from_the_defaults(tmp_path):
    """The toy corpus has defaults of its own."""
    (tmp_path / "toy.json").write_text("{}")
    for root, flags, name in [
        ("x", "--dropout 0.50 --micro-batch 4", ""),
        ("x", "--dropout 0 --cma-residual", "-cma_residual=True-dropout=0.0"),
        ("x", "--wavlm some/where --bert else", "-wavlm=where-bert=else"),
        (tmp_path, "--max-epochs 38", ""),
        (tmp_path, "--upstream paper", "-upstream=paper"),
    ]:
        args = train.parse_args(["--iemocap", str(root), *flags.split()])
        folder = train.run_folder(args, Run("c", "lf", True, 2, 7))
        assert folder.as_posix() == f"runs/c/lf-frozen{name}/fold2-seed7"


def test_another_run_in_the_same_folder_is_refused_by_name(text_fc):
    """Where an upstream is does not matter, if its weights are the same."""
    config = read_json(text_fc / "config.json")
    for key in ("seed", "settings", "model", "corpus_checksum", "weights_checksums"):
        message = re.escape(f"{text_fc} has {key} {config[key]} instead of other.")
        with pytest.raises(InputError, match=f"{message} .*--out"):
            train.write_config(text_fc, config | {key: "other"})
    train.write_config(text_fc, config | {"upstreams": {"text": "elsewhere"}})
    assert read_json(text_fc / "config.json") == config


# --- Wrong input, and what users are told ---------------------------------------------

BAD_FLAGS = ["--system 19", "--context 4", "--corpus b.csv --iemocap a"]
BAD_FLAGS += ["--frozen --system 1", "--dropout 1.5", "--lr-frozen nan"]
BAD_FLAGS += ["--batch-size 0", "--max-epochs many"]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_one_sentence(flags, capsys):
    """It names the first of them, and argparse exits with 2."""
    with pytest.raises(SystemExit, match="2"):
        train.main(flags.split())
    assert re.search(f"error: .*{flags.split()[0]}", capsys.readouterr().err)


def test_only_the_full_release_is_iemocap(small_corpus, tmp_path):
    """A table is never "iemocap", whatever its name is."""
    table = tmp_path / "iemocap.csv"
    table.write_text("text,emotion,session,dialog,speaker\nhello,happy,1,d1,s1\n")
    name, _ = train.read_corpus(train.parse_args(["--corpus", str(table)]))
    assert name != "iemocap"
    args = train.parse_args(["--iemocap", str(small_corpus)])
    with pytest.raises(InputError, match=r"(?s)session 1: .*1819.*--partial"):
        train.read_corpus(args)


def test_toy_is_beside_every_number_of_the_toy(small_corpus, tmp_path, capsys):
    """Nothing measured on the toy is printed without the word."""
    root = tmp_path / "small"
    shutil.copytree(small_corpus, root)
    (root / "toy.json").write_text("{}")
    folders = ["--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")]
    flags = ["--iemocap", str(root), "--device", "cpu", "--max-epochs", "3"]
    train.main([*flags, *folders, "--fusion", "text-fc"])
    evaluate.main(["tables", str(tmp_path / "runs")])
    printed = capsys.readouterr().out
    for words in ("This is the TOY", "toy epoch +3", "toy.*: WA", "Table 1, toy"):
        assert re.search(words, printed)
    for line in printed.splitlines():
        if line and not line.startswith(("|", "The four", "Other")):
            title = line
        if re.search(r"\d\.\d|%", line):
            assert "toy" in title, line
