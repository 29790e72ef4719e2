"""train.py: the two triggers, and whole runs on a small corpus with tiny upstreams.

Where a trigger falls differs between processors. So the development losses of the runs
here are chosen by hand.
"""

import contextlib
import copy
import csv
import functools
import json
import re
import shutil
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import data
import evaluate
import train
from data import InputError
from model import FUSIONS, Config, EmotionRecognizer, Upstream
from tests.conftest import CLASSES, write_wav
from train import Patience, Run

ANSWERS = {"c": "continue", "f": "finetune", "s": "stop"}

# --- The two triggers of §3.2 ---------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "losses", "expected"),
    [
        # Fine-tuning after 5 epochs and the end after 10. Equal or NaN is not lower.
        ((), [1.0, 2.0, 1.0, float("nan")] + [2.0] * 7, "c" + "ccccf" + "cccc" + "s"),
        # A lower loss sets the counter to 0, before and after the trigger.
        ((), [3] + [4] * 4 + [2] + [3] * 10, "ccccc" + "c" + "ccccf" + "cccc" + "s"),
        ((), [3] + [4] * 6 + [2] + [3] * 10, "cccccfc" + "c" + "ccccccccc" + "s"),
        # The lowest loss counts, and not the one of the epoch before.
        ((2, 3), [1.0, 3.0, 2.0, 1.5], "ccfs"),
        # If both are due, the answer is "stop".
        ((3, 3), [1.0] * 4, "cccs"),
        ((4, 3), [1.0] * 4, "cccs"),
        # The example of the docstring.
        ((2, 4), [1, 0.8, 0.9, 0.8, 0.7, 0.8, 0.8, 0.8, 0.8], "cccf" + "cccc" + "s"),
    ],
)
def test_patience_by_hand(settings, losses, expected):
    """§3.2: no decrease for 5 epochs starts fine-tuning, for 10 ends the training."""
    patience = Patience(*settings)
    assert [patience.step(loss) for loss in losses] == [ANSWERS[x] for x in expected]


# --- An epoch by hand -----------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_an_epoch_takes_a_step_of_adamw_for_each_batch_the_last_one_too(micro_batch):
    """§3.2: AdamW with weight decay, on the mean cross-entropy of each batch (§2.4).

    [A18]: the last batch has two utterances instead of three, and a step of its own.
    [A15]: no class weights, no clipping. --micro-batch changes nothing in the result.
    """
    args = Namespace(device="cpu", batch_size=3, weight_decay=0.5)
    args.micro_batch = micro_batch
    torch.manual_seed(0)
    x = torch.randn(8, 5) * torch.arange(1.0, 9.0).unsqueeze(1)
    labels = torch.tensor([0, 0, 0, 1, 2, 3, 0, 1])
    parts = []

    def batch(rows):
        parts.append(rows.tolist())
        return {"input": x[rows]}, labels[rows]

    model = nn.Linear(5, 4).eval()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5, fused=True)
    loss = train.train_epoch(model, optimizer, batch, torch.arange(8), args)
    assert model.training, "dropout is off in training"
    order = sum(parts, [])
    assert sorted(order) == list(range(8)) != order, "an epoch is not shuffled"
    sizes = [2, 1, 2, 1, 2] if micro_batch else [3, 3, 2]
    assert [len(part) for part in parts] == sizes, "the last batch is not kept"
    # The reference: PyTorch's optimizer with the defaults of the literature.
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.5}
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.1, **settings)
    total = 0.0
    for chosen in (order[:3], order[3:6], order[6:]):
        log_probs = reference(x[chosen]).log_softmax(dim=1)
        nll = -log_probs[range(len(chosen)), labels[chosen]]
        total += nll.sum().item()
        optimizer.zero_grad()
        nll.mean().backward()
        optimizer.step()
    assert loss == pytest.approx(total / 8)
    for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, expected, atol=1e-5), "these are not AdamW's steps"


def test_fine_tuning_starts_with_a_new_adamw_for_everything_that_is_open(
    tiny, tmp_path
):
    """[A11]: one rate of 1e-5, and no averages of the frozen phase."""
    args = train.parse_args(["--iemocap", "x", "--weight-decay", "0.25"])
    sources = {m: data.Source(tiny[m], {}, [], tmp_path, "cpu") for m in tiny}
    model = EmotionRecognizer(Config())
    optimizer = train.start_finetuning(model, sources, args)
    expected = [*model.parameters()]
    for source in sources.values():
        expected += [p for p in source.live.parameters() if p.requires_grad]
    (group,) = optimizer.param_groups
    assert list(map(id, group["params"])) == list(map(id, expected))
    assert (group["lr"], group["weight_decay"]) == (1e-5, 0.25)
    assert not optimizer.state, "averages of the frozen phase are left"


# --- Whole runs -----------------------------------------------------------------------

# With these flags and losses, fine-tuning starts after the second epoch, and the fourth
# is the last.
LOSSES = [1.0, 2.0, 2.0, 2.0]
TRIGGERS = ["--finetune-after", "1", "--stop-after", "3"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder for the runs and the cache of all tests."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def trainer(small_corpus, tiny_folder, work):
    """trainer(out, *flags) trains, and returns the folder of the last run in `out`."""
    measure = train.measure
    load = functools.cache(evaluate.load_upstream)

    def run(out, *flags, losses=LOSSES, root=small_corpus, bert=tiny_folder / "text"):
        def with_losses_by_hand(*arguments):
            metrics, log_probs = measure(*arguments)
            run.measured.append(metrics["loss"])
            epochs = 0
            for path in (work / out).rglob("checkpoint.pt"):
                if not (path.parent / "result.json").exists():
                    epochs = len(torch.load(path, weights_only=True)["log"])
            if epochs < len(losses):  # development, and not the test
                metrics["loss"] = losses[epochs]
            return metrics, log_probs

        run.measured = []
        command = ["--iemocap", str(root), "--partial", "--device", "cpu", *TRIGGERS]
        command += ["--out", str(work / out), "--cache", str(work / "cache")]
        command += ["--wavlm", str(tiny_folder / "audio"), "--bert", str(bert)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "measure", with_losses_by_hand)
            patch.setattr(evaluate, "load_upstream", load)
            train.main([*command, *flags])
        paths = (work / out).rglob("config.json")
        return max(paths, key=lambda path: path.stat().st_mtime_ns).parent

    return run


@pytest.fixture(scope="module")
def mmt(trainer):
    """The folder of a run of MMT, and what was measured after each epoch."""
    folder = trainer("mmt")
    return folder, trainer.measured


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
        for name, value in part.items():
            weights[name] = value.numpy().tobytes()
    return log, result, predictions, weights


def test_a_run_from_end_to_end(mmt, small_corpus, trainer, capsys):
    """Its files, counted again from the label file of Session 5."""
    folder, _ = mmt
    changed = "wavlm=audio-bert=text-finetune_after=1-stop_after=3"
    system = f"mmt-finetuned-{changed}"
    assert folder.parts[-3:] == ("small-partial", system, "fold5-seed0")
    files = "checkpoint.pt config.json log.jsonl predictions.csv result.json"
    assert sorted(path.name for path in folder.iterdir()) == files.split()

    log = read_log(folder)
    fields = "epoch phase lr train_loss dev_loss dev_wa dev_ua since_best event seconds"
    assert [list(row) for row in log] == [fields.split()] * 4
    keys = ("epoch", "phase", "lr", "dev_loss", "since_best", "event")
    assert [tuple(row[key] for key in keys) for row in log] == [
        (1, "frozen", 1e-3, 1.0, 0, "continue"),
        (2, "frozen", 1e-3, 2.0, 1, "finetune"),
        (3, "finetune", 1e-5, 2.0, 2, "continue"),
        (4, "finetune", 1e-5, 2.0, 3, "stop"),
    ]
    (path,) = small_corpus.glob("Session5/dialog/EmoEvaluation/*.txt")
    pattern = r"\t(\S+_[FM]\d+)\t(neu|hap|ang|sad)\t"
    emotions = dict(re.findall(pattern, path.read_text()))
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["utterance", "speaker", "label", "prediction", *CLASSES]
    assert {row["utterance"]: row["label"] for row in rows} == emotions
    for row in rows:
        assert row["speaker"] == f"Ses05{row['utterance'][-4]}"
        p = [float(row[c]) for c in CLASSES]
        assert sum(p) == pytest.approx(1, abs=1e-5)
        assert p[CLASSES.index(row["prediction"])] == max(p)
    # read_run counts WA, UA and the confusion matrix again.
    result = evaluate.read_run(folder).result
    n = len(rows)
    assert re.fullmatch("Ses0[1-4][FM]", result.pop("dev_speaker"))
    seconds = sum(row["seconds"] for row in log)
    assert result.pop("seconds") == pytest.approx(seconds)
    assert result.keys() >= {"wa", "ua", "confusion", "loss"}
    expected = {"corpus": "small-partial", "fusion": "mmt", "frozen": False, "fold": 5}
    expected |= {"seed": 0, "epochs": 4, "finetune_epoch": 2, "n_test": n}
    expected |= {"n_train": 39, "n_dev": 56 - 39 - n}  # 56 of the four classes
    assert expected.items() <= result.items()
    trainer("mmt")
    assert "finished already" in capsys.readouterr().out


@torch.no_grad()
def test_the_losses_by_hand_one_utterance_at_a_time(mmt, small_corpus, tiny):
    """-log p(label) of development and test, by the weights of the checkpoint.

    Fine-tuning has moved all that §2.4 opens by four steps of AdamW, and nothing else.
    """
    folder, measured = mmt
    corpus, _ = data.read_iemocap(small_corpus)
    result = read_json(folder / "result.json")
    config = read_json(folder / "config.json")["model"]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    recognizer = EmotionRecognizer(Config(**config)).eval()
    recognizer.load_state_dict(state["model"])
    upstreams = {}
    for m, start in (("audio", "feature_extractor."), ("text", "embeddings.")):
        upstreams[m] = Upstream(tiny[m].name, m)
        parameters = dict(upstreams[m].model.named_parameters())
        opened = {name for name in parameters if name.startswith(start)}
        assert {n.removeprefix("model.") for n in state["upstreams"][m]} == opened
        for name, value in state["upstreams"][m].items():
            p = parameters[name.removeprefix("model.")]
            assert 1.5e-5 < (p - value).abs().max() < 4.5e-5, f"{name} was not trained"
            p.copy_(value)

    def states(m, raw):
        return upstreams[m]([upstreams[m].prepare(raw)])[0]

    texts = [states("text", u.text) for u in corpus]
    for loss, chosen in [
        (measured[-2], lambda u: u.speaker == result["dev_speaker"]),
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


@pytest.mark.parametrize("flags", ["--frozen", "--stop-after 1", "--max-epochs 2"])
def test_a_run_ends_without_fine_tuning(flags, trainer, monkeypatch):
    """A frozen system, both triggers at once, and a cap: no upstream is opened."""
    monkeypatch.delattr(data.Source, "open")
    losses = [2.0, 1.0] if "max" in flags else LOSSES
    folder = trainer("ends", "--fusion", "text-fc", *flags.split(), losses=losses)
    log = read_log(folder)
    last = {"--frozen": "cccs", "--stop-after 1": "cs", "--max-epochs 2": "cc"}[flags]
    assert [row["event"] for row in log] == [ANSWERS[x] for x in last]
    assert {(row["phase"], row["lr"]) for row in log} == {("frozen", 1e-3)}
    assert read_json(folder / "result.json")["finetune_epoch"] is None


class Killed(BaseException):
    pass


def test_killed_after_every_file_a_run_ends_with_the_same_bits(
    mmt, trainer, monkeypatch
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
        if path.parent.name == "fold5-seed0" and death not in deaths:
            deaths.add(death)
            raise Killed

    monkeypatch.setattr(data, "write_whole", deadly_write)
    folder = None
    while folder is None:
        with contextlib.suppress(Killed):
            folder = trainer("killed")
    assert len(deaths) == 3 + 2 * 4  # two files in each epoch
    assert outcome(folder) == outcome(mmt[0])


def test_the_run_goes_on_with_the_new_adamw(mmt):
    """[A11]: its two epochs of fine-tuning, with two batches each, are four steps."""
    checkpoint = torch.load(mmt[0] / "checkpoint.pt", weights_only=True)
    states = checkpoint["optimizer"]["state"].values()
    assert {float(state["step"]) for state in states} == {4.0}


def test_the_last_small_batch_is_kept_and_the_test_comes_last(
    trainer, small_corpus, monkeypatch
):
    """[A18]: 39 utterances are a batch of 32 and one of 7. Each epoch has its order."""
    split, batch, epoch = data.split, data.batch, train.train_epoch
    batches = []
    weights = []

    def watch(rows, *others):
        batches.append((torch.is_grad_enabled(), rows.tolist()))
        return batch(rows, *others)

    def watch_epoch(model, *others):
        weights.append(model.classifier[0].weight.detach().clone())
        return epoch(model, *others)

    monkeypatch.setattr(data, "split", lambda corpus, fold, seed: split(corpus, 5, 0))
    monkeypatch.setattr(data, "batch", watch)
    monkeypatch.setattr(train, "train_epoch", watch_epoch)
    flags = ["--fusion", "text-fc", "--max-epochs", "2", "--seed", "0", "1"]
    trainer("orders", *flags, losses=[2.0, 1.0])
    corpus, _ = data.read_iemocap(small_corpus)
    train_rows, dev_rows, test_rows = split(corpus, 5, 0)
    orders = set()
    for run in (batches[:7], batches[7:]):  # train, train and dev, twice, then the test
        for first, second, dev in (run[:3], run[3:6]):
            assert (first[0], second[0], dev) == (True, True, (False, dev_rows))
            assert (len(first[1]), len(second[1])) == (32, 7), "the last batch is kept"
            assert sorted(first[1] + second[1]) == train_rows
            orders.add(tuple(first[1] + second[1]))
        assert run[6:] == [(False, test_rows)], "the test session comes once, and last"
    assert len(orders) == 4
    assert not torch.equal(weights[0], weights[2]), "two seeds, the same first weights"


def test_the_test_session_changes_nothing_in_training(trainer, small_corpus, tmp_path):
    """Neither its recordings, labels and words, nor its part of the tiny vocabulary."""
    poisoned = tmp_path / "small"
    shutil.copytree(small_corpus, poisoned)
    noise = torch.Generator().manual_seed(0)
    for path in sorted(poisoned.rglob("Ses05*.wav")):
        samples = torch.rand(len(data.load_wav(path)), generator=noise) - 0.5
        write_wav(path, samples.tolist())
    for path in poisoned.glob("Session5/dialog/*/*.txt"):
        text = path.read_text().replace("\thap\t", "\tHAP\t").replace("hate", "zebra")
        path.write_text(
            text.replace("\tang\t", "\thap\t").replace("\tHAP\t", "\tang\t")
        )
    outcomes = []
    for root in (small_corpus, poisoned):
        folder = trainer(f"{root.parent.name}", "--upstream", "tiny", root=root)
        log, _, predictions, weights = outcome(folder)
        # The table of words has another length.
        assert weights.pop("model.embeddings.word_embeddings.weight")
        vocabulary = read_json(folder / "config.json")["upstreams"]["text"]
        outcomes.append((log, weights, predictions, vocabulary))
    clean, other = outcomes
    assert clean[:2] == other[:2], "training has seen the test session"
    assert clean[2] != other[2]
    assert clean[3] != other[3], "another corpus should have words of its own"


@pytest.mark.parametrize("fusion", FUSIONS)
def test_dropout_is_on_in_both_phases_and_off_in_measuring(
    fusion, trainer, monkeypatch
):
    """ "Throughout our training" (§3.2), so while fine-tuning too."""
    forward = EmotionRecognizer.forward
    found = []

    def twice(model, **inputs):
        logits = forward(model, **inputs)
        same = torch.equal(logits, forward(model, **inputs))
        found.append("off" if same else "on")
        return logits

    monkeypatch.setattr(EmotionRecognizer, "forward", twice)
    flags = ["--fusion", fusion, "--max-epochs", "3"]
    trainer(f"dropout-{fusion}", *flags, losses=[1.0, 1.0, 0.5])
    # Two batches to train on and one to develop on, three times, and then the test.
    frozen, finetuning = found[:6], found[6:9]
    assert frozen == ["on", "on", "off"] * 2, "dropout in the frozen phase"
    assert finetuning == ["on", "on", "off"], "dropout while fine-tuning"
    assert found[9:] == ["off"], "no dropout in the test"


SETTINGS = ["", "--precision bf16", "--cma-residual", "--context 1", "--open nothing"]
SETTINGS += ["--open all", "--dropout 0.1", "--weight-decay 0.5", "--batch-size 16"]
SETTINGS += ["--lr-frozen 0.01", "--lr-finetune 1e-3"]


@pytest.mark.parametrize("flags", SETTINGS)
def test_every_setting_changes_the_weights_and_no_setting_none(flags, trainer, mmt):
    """The same seed gives the same bits."""
    weights = outcome(trainer(f"setting{flags}", *flags.split()))[3]
    assert (weights == outcome(mmt[0])[3]) == (flags == "")


def test_runs_of_one_command_end_as_they_would_alone(trainer, work):
    """Fine-tuning changes a copy of the upstreams, and each run makes a new copy.

    A run has the upstreams of its own system, whatever the others use.
    """
    trainer("together", "--system", "14", "1", "--seed", "0", "1")
    names = {"14": "ef-finetuned", "1": "audio-fc-frozen"}
    for number, seed in (("14", "1"), ("1", "0")):
        (together,) = (work / "together").rglob(f"{names[number]}*/fold5-seed{seed}")
        alone = trainer(f"alone{number}", "--system", number, "--seed", seed)
        assert outcome(together) == outcome(alone)
        configs = [read_json(run / "config.json") for run in (together, alone)]
        assert configs[0] == configs[1]


# --- Settings and folders -------------------------------------------------------------


def test_the_defaults_are_the_constants_of_the_paper():
    """§3.2, and the systems have the numbers of Table 1."""
    args = train.make_parser().parse_args([])
    assert (args.lr_frozen, args.lr_finetune, args.weight_decay) == (1e-3, 1e-5, 1e-3)
    assert (args.batch_size, args.dropout, args.context) == (32, 0.5, 9)
    assert (args.finetune_after, args.stop_after, args.max_epochs) == (5, 10, None)
    assert (args.wavlm, args.bert) == ("microsoft/wavlm-large", "bert-base-uncased")
    assert (args.open, args.precision, args.cma_residual) == ("bottom", "fp32", False)
    assert (args.fusion, args.frozen, args.fold, args.seed) == ("mmt", False, [5], [0])

    def chosen(*numbers):
        return train.chosen_systems(train.parse_args(["--system", *numbers]))

    assert chosen("18", "15", "6") == [("mmt", False), ("lf", True), ("text-fc", False)]
    assert chosen("11") == [("cmt-t2a", True)]
    systems = chosen("all")
    assert len(systems) == len(set(systems)) == 18
    assert chosen(*map(str, range(1, 19))) == systems


# A value of each setting that is not its default.
OTHER = """upstream=tiny wavlm=where bert=else precision=bf16 open=all cma_residual=True
    lr_frozen=0.01 lr_finetune=0.5 weight_decay=0.0 batch_size=8 dropout=0.1 context=3
    finetune_after=2 stop_after=4 max_epochs=7""".split()


def test_a_folders_name_lists_exactly_what_differs_from_the_defaults(tmp_path):
    """The toy corpus has defaults of its own."""
    flags = vars(train.make_parser().parse_args([]))
    # These are in the name anyway, or change nothing in a result.
    others = "iemocap corpus partial fusion frozen system fold seed out cache device"
    others = {*others.split(), "micro_batch"}
    assert flags.keys() == {one.partition("=")[0] for one in OTHER} | others
    toy = tmp_path / "toy"
    toy.mkdir()
    (toy / "toy.json").write_text("{}")

    def name(*flags, root="x"):
        args = train.parse_args(["--iemocap", str(root), *flags])
        folder = train.run_folder(args, Run("c", "lf", True, 2, 7)).as_posix()
        return re.fullmatch("runs/c/lf-frozen(.*)/fold2-seed7", folder)[1]

    assert name() == name("--dropout", "0.50", "--micro-batch", "4") == ""
    assert name(root=toy) == name("--max-epochs", "38", root=toy) == ""
    for other in OTHER:
        flag = "--" + other.replace("_", "-").removesuffix("=True")
        assert name(flag) == f"-{other}"
    assert name("--context", "5", "--dropout", "0") == "-dropout=0.0-context=5"
    assert name("--wavlm", "some/where") == "-wavlm=where"
    assert name("--upstream", "paper", root=toy) == "-upstream=paper"


def test_another_run_in_the_same_folder_is_refused_by_name(
    small_corpus, tiny, tmp_path
):
    """Where an upstream is does not matter, if its weights are the same."""
    args = train.parse_args(["--iemocap", "x"])
    corpus, _ = data.read_iemocap(small_corpus)
    run = Run("mine", "text-fc", False, 5, 0)
    upstream = Namespace(n_layers=2, dim=48, checksum="01234567", name="here")

    def write(run=run, corpus=corpus, **changes):
        changed = Namespace(**(vars(upstream) | changes))
        source = Namespace(upstream=changed)
        config = train.describe_run(args, run, corpus, {"text": source})
        train.write_config(tmp_path, config)
        return config

    config = write()
    assert write(name="elsewhere") == config | {"upstreams": {"text": "elsewhere"}}
    text = [replace(corpus[0], text="x"), *corpus[1:]]
    for key, changes in {
        "seed": {"run": replace(run, seed=1)},
        "corpus_checksum": {"corpus": text},
        "weights_checksums": {"checksum": "76543210"},
    }.items():
        with pytest.raises(InputError) as error:
            write(**changes)
        for words in (str(tmp_path), key, str(config[key]), "--out"):
            assert words in str(error.value)
    assert read_json(tmp_path / "config.json") == config


def test_a_run_resumes_if_its_upstream_has_moved_and_no_other_run(
    mmt, trainer, tiny_folder, tmp_path, work, capsys
):
    """A checkpoint of another run is refused, and the result is that of the weights."""
    before = outcome(mmt[0])
    shutil.copytree(work / "mmt", work / "moved")
    for path in (work / "moved").rglob("result.json"):
        path.unlink()
    shutil.copytree(tiny_folder / "text", tmp_path / "text")
    folder = trainer("moved", bert=tmp_path / "text")
    assert "after epoch 4" in capsys.readouterr().out
    assert outcome(folder) == before
    other = folder.with_name("fold5-seed1")
    other.mkdir()
    shutil.copy(folder / "checkpoint.pt", other)
    with pytest.raises(InputError, match="checkpoint.pt.*'seed': 0"):
        trainer("moved", "--seed", "1")


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


def test_each_precision_has_states_of_its_own(small_corpus, tiny_folder, tmp_path):
    """A run in fp32 must not read what a run in bf16 has computed."""
    flags = ["--iemocap", str(small_corpus), "--partial", "--fusion", "text-fc"]
    flags += ["--bert", str(tiny_folder / "text"), "--cache", str(tmp_path)]
    files = []
    for precision in ("bf16", "fp32"):
        args = train.parse_args([*flags, "--device", "cpu", "--precision", precision])
        _, corpus = train.read_corpus(args)
        files.append(set(train.load_sources(args, corpus)["text"].files.values()))
    assert files[0].isdisjoint(files[1])
    assert set(tmp_path.rglob("*.npy")) == files[0] | files[1]


def test_only_the_full_release_is_iemocap(small_corpus, tmp_path, capsys):
    """With --partial a damaged dialogue is left out. A table is never "iemocap"."""
    root = tmp_path / "small"
    shutil.copytree(small_corpus, root)

    def read(*flags):
        return train.read_corpus(train.parse_args(list(map(str, flags))))

    with pytest.raises(InputError, match=r"(?s)session 1: .*1819.*--partial"):
        read("--iemocap", root)
    next(root.rglob("Ses03*.wav")).unlink()
    with pytest.raises(InputError, match="Ses03F_impro01"):
        read("--iemocap", root)
    name, corpus = read("--iemocap", root, "--partial")
    assert (name, len(corpus)) == ("small-partial", 56)
    assert re.search("left out: .*Ses03F_impro01", capsys.readouterr().out)
    table = tmp_path / "iemocap.csv"
    table.write_text("text,emotion,session,dialog,speaker\nhello,happy,1,d1,s1\n")
    assert read("--corpus", table)[0] != "iemocap"


def test_toy_is_beside_every_number_of_the_toy(
    small_corpus, tmp_path, monkeypatch, capsys
):
    """Nothing measured on the toy is printed without the word."""
    # A GPU computes WavLM's convolutions with fewer bits otherwise.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    root = tmp_path / "small"
    shutil.copytree(small_corpus, root)
    (root / "toy.json").write_text("{}")
    folders = ["--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")]
    flags = ["--iemocap", str(root), "--device", "cpu", "--max-epochs", "3"]
    train.main([*flags, *folders])
    assert not torch.backends.cudnn.allow_tf32
    evaluate.main(["tables", str(tmp_path / "runs")])
    printed = capsys.readouterr().out
    for words in (
        "This is the TOY corpus",
        "toy epoch +3",
        "toy.*: WA",
        "Table 1, toy",
    ):
        assert re.search(words, printed)
    for line in printed.splitlines():
        if line and not line.startswith(("|", "The four", "Other")):
            title = line
        if re.search(r"\d\.\d|%", line):
            assert "toy" in title, line


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    mmt, trainer, work, monkeypatch
):
    """The same command goes on from there."""
    cross_entropy = F.cross_entropy
    calls = []

    def sick(*inputs, **options):
        calls.append(1)
        factor = float("nan") if len(calls) == 4 else 1  # the last batch of epoch 2
        return factor * cross_entropy(*inputs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train.F, "cross_entropy", sick)
        with pytest.raises(InputError, match="epoch 2: the loss is not finite"):
            trainer("nan")
    (folder,) = [path.parent for path in (work / "nan").rglob("checkpoint.pt")]
    assert not (folder / "result.json").exists()
    assert not (folder / "predictions.csv").exists()
    assert outcome(trainer("nan")) == outcome(mmt[0])
    # If the last step of an epoch fails, only the development loss shows it.
    with pytest.raises(InputError, match="epoch 2: the loss is not finite"):
        trainer("inf", losses=[LOSSES[0], float("inf")])
