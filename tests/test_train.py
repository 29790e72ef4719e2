"""train.py: the triggers on written-out losses, and whole runs on a small corpus."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from conftest import ROOT, write_wav
from model import FUSIONS, Config, EmotionRecognizer, SqueezeExcitation, Upstream
from train import Patience


def events(losses, **settings):
    patience = Patience(**settings)
    return "".join(patience.step(x)[0] for x in losses)  # c, f, s


# --- the triggers of §3.2


def test_fine_tuning_after_5_and_stop_after_10_on_one_counter():
    assert events([1.0] + [2.0] * 10) == "c" + "ccccf" + "cccc" + "s"


def test_a_lower_loss_sets_the_counter_back_and_fine_tuning_goes_on():
    assert events([1.0] + [2] * 4 + [0.9] + [2] * 10) == "c" + "cccc" + "c" + "ccccf" + "cccc" + "s"
    # Lower in fine-tuning: 10 more epochs, no second trigger.
    assert events([1.0] + [2] * 6 + [0.9] + [2] * 10) == "c" + "ccccfc" + "c" + "c" * 9 + "s"


def test_equal_is_not_lower_and_nan_is_not_either():
    assert events([1.0] * 11) == "c" + "ccccf" + "cccc" + "s"
    assert events([1.0] + [float("nan")] * 10) == "c" + "ccccf" + "cccc" + "s"


def test_a_frozen_system_only_stops():
    assert events([1.0] + [2.0] * 10, finetune_after=None) == "c" + "c" * 9 + "s"


def test_the_counter_can_start_anew_at_the_trigger():  # the other reading of A9
    assert events([1.0] + [2.0] * 15, reset_at_finetune=True) == "c" + "ccccf" + "c" * 9 + "s"
    assert (
        events([3, 2, 1, 1, 1, 1], finetune_after=2, stop_after=2, reset_at_finetune=True)[-1]
        == "s"
    )


def test_the_docstrings_example():
    losses = [1.0, 0.8, 0.9, 0.8, 0.7, 0.8, 0.8, 0.8, 0.8]
    assert events(losses, finetune_after=2, stop_after=4) == "cc" + "cf" + "c" + "ccc" + "s"


def test_a_smallest_decrease_is_relative():  # the other reading of A17
    losses = [1.0, 0.95, 0.91, 0.89, 0.81, 0.82, 0.85]
    for scale in (1, 1e-3, 1e3):
        some = [scale * x for x in losses]
        assert events(some, finetune_after=None, stop_after=3, min_decrease=0.1) == "ccccccs"
        assert events(some, finetune_after=None, stop_after=3) == "ccccccc"
    assert events([1.0, 0.95, 0.91], finetune_after=2, min_decrease=0.1) == "ccf"


# --- whole runs


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory, small_corpus):
    """Folders of tiny upstreams whose vocabulary is not made from the corpus."""
    import model

    words = ["paper street lovely party hate it all alone oh no 1 2 3 4 5 6 7 8 9 10 11 12 13"]
    return model.make_tiny_upstreams(str(tmp_path_factory.mktemp("upstreams")), words)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def go(monkeypatch, small_corpus, upstreams, workplace):
    """Run train.py in a folder of its own, with impatient triggers: go(out, arguments) -> run."""
    monkeypatch.chdir(workplace)

    def run(out, *arguments, root=small_corpus, device="cpu"):
        train.main([
            "--iemocap", str(root), "--partial", "--finetune-after", "2", "--stop-after", "4",
            "--wavlm", upstreams["audio"], "--bert", upstreams["text"], "--device", device,
            "--out", str(workplace / out), *arguments,
        ])  # fmt: skip
        return sorted((workplace / out).rglob("config.json"))[-1].parent

    return run


def timeless(folder):
    """The log and the result without their clocks and memory, and the predictions."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    for row in (*log, result):
        row.pop("seconds")
    return log, result, (folder / "predictions.csv").read_text()


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_run_from_end_to_end(go, small_corpus, capsys):
    folder = go("end-to-end", "--fusion", "mmt", "--fold", "5")
    system = "mmt-finetuned-wavlm=audio-bert=text-finetune_after=2-stop_after=4"
    assert folder.parts[-3:] == ("small-partial", system, "fold5-seed0")
    assert set(result_of(folder)) == {
        "corpus", "fusion", "frozen", "fold", "seed", "wa", "ua", "loss", "confusion", "epochs",
        "finetune_epoch", "dev_speaker", "n_train", "n_dev", "n_test", "seconds",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert set(OTHER) | {"fusion", "frozen", "fold", "seed"} < set(config)
    assert config["switches"].keys() == {"wavlm", "bert", "finetune_after", "stop_after"}
    for name in ("config.json", "log.jsonl", "checkpoint.pt", "predictions.csv", "result.json"):
        assert (folder / name).stat().st_size > 0, name
    log, result, _ = timeless(folder)
    assert [row["epoch"] for row in log] == list(range(1, len(log) + 1))
    assert set(log[0]) == {
        "epoch", "phase", "lr", "train_loss", "dev_loss", "dev_wa", "dev_ua", "since_best"
    }  # fmt: skip
    phases = [(row["phase"], row["lr"]) for row in log]
    k = result["finetune_epoch"]
    assert phases == [("frozen", 1e-3)] * k + [("finetune", 1e-5)] * (len(log) - k) and 0 < k < len(
        log
    )
    assert log[-1]["since_best"] == 4 and result["epochs"] == len(log)

    # The result, counted again from the predictions and from the label files.
    truth = {u.id: u for u in data.read_iemocap(small_corpus)}
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["utterance"] for r in rows} == {
        u.id for u in truth.values() if u.session == 5 and u.emotion != "fru"
    }
    right, by_class = 0, {}
    for r in rows:
        p = [float(r[c]) for c in ("neu", "hap", "ang", "sad")]
        assert (
            abs(sum(p) - 1) < 1e-5
            and r["prediction"] == ("neu", "hap", "ang", "sad")[p.index(max(p))]
        )
        assert (
            r["label"] == truth[r["utterance"]].emotion
            and r["speaker"] == truth[r["utterance"]].speaker
        )
        right += r["label"] == r["prediction"]
        by_class.setdefault(r["label"], []).append(r["label"] == r["prediction"])
    assert result["wa"] == pytest.approx(right / len(rows))
    assert result["ua"] == pytest.approx(
        sum(sum(v) / len(v) for v in by_class.values()) / len(by_class)
    )
    assert result["n_test"] == len(rows) and sum(map(sum, result["confusion"])) == len(rows)
    assert result["n_train"] + result["n_dev"] + result["n_test"] == sum(
        u.label is not None for u in truth.values()
    )
    assert result["corpus"] == "small-partial" and result["dev_speaker"][:5] != "Ses05"

    said = capsys.readouterr().out
    for line in ("on cpu", "fine-tuning starts", "training stops", "small-partial: WA"):
        assert line in said
    go("end-to-end", "--fusion", "mmt", "--fold", "5")
    assert "done before" in capsys.readouterr().out


class Killed(BaseException):
    pass


@pytest.mark.parametrize("flags", ["", "--select best"])
def test_killed_after_every_epoch_a_run_ends_with_the_same_bits(flags, go, monkeypatch):
    name = flags.replace(" ", "")
    whole = go("whole" + name, "--fusion", "lf", *flags.split())
    write, deaths = data.write_whole, []

    def dying_write(path, content):
        write(path, content)
        if path.name not in ("checkpoint.pt", "log.jsonl", "predictions.csv"):
            return
        # Once at every checkpoint, and at some logs, whose epoch is then in no checkpoint.
        epoch = len((path.parent / "log.jsonl").read_text().splitlines())
        if (path.name, epoch) not in deaths and (path.name != "log.jsonl" or epoch % 3 == 1):
            deaths.append((path.name, epoch))
            raise Killed

    monkeypatch.setattr(data, "write_whole", dying_write)
    for _ in range(100):
        try:
            folder = go("killed" + name, "--fusion", "lf", *flags.split())
            break
        except Killed:
            pass
    log, result, _ = timeless(whole)
    assert 0 < result["finetune_epoch"] < len(log)
    assert [e for file, e in deaths if file == "checkpoint.pt"] == list(range(1, len(log) + 1))
    assert timeless(folder) == timeless(whole)
    weights = [
        torch.load(f / "checkpoint.pt", weights_only=True)["weights"] for f in (whole, folder)
    ]
    for m, part in weights[0].items():
        assert part.keys() == weights[1][m].keys()
        assert all(torch.equal(x, weights[1][m][k]) for k, x in part.items()), m


def test_same_seed_same_bits_other_seed_other_result(go, workplace):
    first = timeless(go("s1", "--fusion", "text-fc", "--seed", "3"))
    assert timeless(go("s2", "--fusion", "text-fc", "--seed", "3")) == first
    assert timeless(go("s3", "--fusion", "text-fc", "--seed", "4"))[0] != first[0]


def test_only_what_the_paper_opens_is_ever_changed(go, monkeypatch):
    seen, made, before = {}, {}, {}
    step, open_ = torch.optim.AdamW.step, Upstream.open

    def watch(optimizer, *args):
        group = optimizer.param_groups[-1]
        ids = {id(p) for g in optimizer.param_groups for p in g["params"]}
        seen.setdefault(group["lr"], set()).update(ids)
        assert {g["weight_decay"] for g in optimizer.param_groups} == {1e-3}
        return step(optimizer, *args)

    def first_open(upstream, what):  # at the trigger
        made[upstream.modality] = upstream
        before[upstream.modality] = {n: p.clone() for n, p in upstream.model.named_parameters()}
        return open_(upstream, what)

    def test_set(*arguments):  # the end of training
        for m, upstream in made.items():
            tuned[m] = {n: p.clone() for n, p in upstream.model.named_parameters()}
        return write(*arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    monkeypatch.setattr(Upstream, "open", first_open)
    tuned, write = {}, evaluate.write_predictions
    monkeypatch.setattr(evaluate, "write_predictions", test_set)
    go("opened", "--fusion", "mmt")
    head, all_of_it = seen[1e-3], seen[1e-5]
    assert head < all_of_it
    parts = {"audio": "feature_extractor.", "text": "embeddings."}
    opened = set()
    for m, part in parts.items():
        for name, p in made[m].model.named_parameters():
            same = torch.equal(tuned[m][name], before[m][name])
            # BERT's rows that no input used move by weight decay alone.
            assert same != name.startswith(part), name
            opened |= {id(p)} if name.startswith(part) else set()
    assert all_of_it - head == opened
    for m, upstream in made.items():  # the next run of the command starts as this one did
        for name, p in upstream.model.named_parameters():
            assert torch.equal(p, before[m][name]) and not p.requires_grad, name


def test_the_test_session_changes_nothing_in_training(go, small_corpus, tmp_path):
    clean = timeless(go("clean", "--fusion", "mmt"))[0]
    for session in small_corpus.glob("Session[1-4]"):
        (tmp_path / "small").mkdir(exist_ok=True)
        (tmp_path / "small" / session.name).symlink_to(session)
    source = small_corpus / "Session5"
    for old in source.rglob("*"):
        new = tmp_path / "small" / "Session5" / old.relative_to(source)
        if old.is_dir():
            new.mkdir(parents=True, exist_ok=True)
        elif old.suffix == ".wav":
            with_wave = data.load_wav(old)
            write_wav(new, (torch.rand(len(with_wave)) - 0.5).tolist())  # noise
        elif "Emo" in str(old):  # all labels wrong
            swap = {"neu": "ang", "ang": "neu", "hap": "sad", "sad": "hap"}
            words = [swap.get(w, w) for w in old.read_text().split("\t")]
            new.write_text("\t".join(words))
        else:
            new.write_text(old.read_text().replace("hate", "love"))
    poisoned = timeless(go("poisoned", "--fusion", "mmt", root=tmp_path / "small"))[0]
    assert poisoned == clean


def test_best_predicts_with_the_weights_it_kept(go):
    folder = go("best-predicts", "--fusion", "text-fc", "--select", "best", "--frozen")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    lowest = min(state["log"], key=lambda row: row["dev_loss"])
    assert lowest["epoch"] < len(state["log"])  # the last epoch is not the best
    last = go("last-predicts", "--fusion", "text-fc", "--frozen")
    assert (folder / "predictions.csv").read_text() != (last / "predictions.csv").read_text()
    # Give the last run the best weights for its last ones, and let it test again.
    other = torch.load(last / "checkpoint.pt", weights_only=True)
    other["weights"] = state["selected"]["weights"]
    torch.save(other, last / "checkpoint.pt")
    (last / "result.json").unlink()
    go("last-predicts", "--fusion", "text-fc", "--frozen")
    assert (folder / "predictions.csv").read_text() == (last / "predictions.csv").read_text()


def test_the_papers_numbers_are_the_defaults():
    s = train.flags().parse_args([])
    assert (s.fold, s.seed, s.system, s.micro_batch) == (["5"], [0], None, None)
    assert (s.fusion, s.frozen, s.wavlm, s.bert) == (
        "mmt", False, "microsoft/wavlm-large", "bert-base-uncased"
    )  # fmt: skip
    assert (s.lr_frozen, s.lr_finetune, s.weight_decay, s.batch_size) == (1e-3, 1e-5, 1e-3, 32)
    assert (s.finetune_after, s.stop_after, s.max_epochs, s.min_decrease) == (5, 10, None, 0)
    assert (s.dropout, s.context, s.select, s.open, s.precision) == (
        0.5, 9, "last", "bottom", "fp32"
    )  # fmt: skip
    assert (s.condense, s.text_mask, s.cma_residual, s.reset_patience, s.head_lr, s.trim) == (
        "sum", "union", False, False, None, "leading"
    )  # fmt: skip
    assert (s.head, s.dropout_at) == ("mlp", "modules")


def test_every_epoch_sees_each_training_utterance_once_in_another_order(go, monkeypatch):
    orders, batch = [], data.batch

    def watch(rows, *rest):
        if torch.is_grad_enabled():  # not while predicting
            orders.append(rows.tolist())
        return batch(rows, *rest)

    monkeypatch.setattr(data, "batch", watch)
    go("orders", "--fusion", "text-fc", "--frozen", "--seed", "7")
    first, second = (sum(orders[i : i + 2], []) for i in (0, 2))  # 39 utterances: 32 and 7
    assert len(orders[0]) == 32 and sorted(first) == sorted(second) and first != second
    assert len(set(first)) == len(first)


def test_a_damaged_checkpoint_is_one_sentence(go):
    folder = go("damaged", "--fusion", "text-fc", "--frozen")
    (folder / "result.json").unlink()
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:1000])
    with pytest.raises(data.InputError, match="checkpoint.pt: .*delete it"):
        go("damaged", "--fusion", "text-fc", "--frozen")


def test_other_settings_on_the_same_folder_are_refused_by_name(go, upstreams, tmp_path):
    folder = go("settings", "--fusion", "text-fc", "--frozen")
    other = tmp_path / "text"  # another BERT whose folder has the same name
    shutil.copytree(upstreams["text"], other)
    bert = Upstream(str(other), "text").model
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight += 0.1
    bert.save_pretrained(other)
    with pytest.raises(data.InputError, match="config.json: holds a run with .*delete .*settings"):
        go("settings", "--fusion", "text-fc", "--frozen", "--bert", str(other))
    assert (folder / "result.json").exists()


@pytest.mark.parametrize(
    "switch",
    [
        "--condense concat",
        "--text-mask target",
        "--cma-residual",
        "--reset-patience",
        "--context 1",
        "--head linear",
        "--dropout-at projector",
        "--dropout-at both",
        "--head-lr 1e-3",
        "--open nothing",
        "--open all",
        "--min-decrease 0.5",
        "--select best",
    ],
)
def test_every_switch_of_the_register_runs_and_changes_the_run(go, switch):
    plain = timeless(go("plain", "--fusion", "cmt-a2t"))
    other = timeless(go("switch" + switch.replace(" ", ""), "--fusion", "cmt-a2t", *switch.split()))
    assert (other[0], other[2]) != (plain[0], plain[2])


@pytest.mark.parametrize("arguments, message", [
    ("--system 19", "invalid choice: '19'"), ("--context 4", "odd"),
    ("--partial", "--iemocap"), ("--system 1 --frozen", "--frozen"),
    ("--dropout 1.5", "--dropout: 1.5"), ("--batch-size 0", "from 1"),
])  # fmt: skip
def test_bad_flags_are_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments.split())
    assert message in capsys.readouterr().err


def test_a_corpus_that_is_not_the_full_release_is_refused_without_partial(small_corpus, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--iemocap", small_corpus, "--upstream", "tiny"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "dialogues 1 (not 28)" in done.stderr and "add --partial" in done.stderr


# --- oracles: the run computed again by hand, without data.batch, torch.optim and Patience


class ByHand:
    """The small corpus and its layer states, for loops that are written out here."""

    def __init__(self, small_corpus, upstreams, cache):
        self.corpus, self.folders, self.cache = data.read_iemocap(small_corpus), upstreams, cache
        number = {"neu": 0, "hap": 1, "exc": 1, "ang": 2, "sad": 3}
        self.labels = torch.tensor([number.get(u.emotion, -1) for u in self.corpus])
        self.row = {u.id: i for i, u in enumerate(self.corpus)}
        self.clips = {i: data.clip(data.load_wav(u.wav)) for i, u in enumerate(self.corpus)}
        by_dialog = {}
        for i, u in enumerate(self.corpus):
            by_dialog.setdefault(u.dialog, []).append(i)
        self.windows = torch.full((len(self.corpus), 9), -1)
        for rows in by_dialog.values():
            for k, i in enumerate(rows):
                for column, place in enumerate(range(k - 4, k + 5)):
                    if 0 <= place < len(rows):
                        self.windows[i, column] = rows[place]

    def from_files(self, m, rows):
        """Padded states and mask of these utterances, from the cache's files."""
        (folder,) = self.cache.glob(f"{m}-fp32-*")  # the upstream's folder is called audio or text
        parts = []
        for i in rows:
            (file,) = folder.glob(f"{self.corpus[i].id}-*.npy")
            parts.append(torch.from_numpy(np.load(file)).float())
        states = torch.zeros(len(parts), max(map(len, parts)), *parts[0].shape[1:])
        mask = torch.zeros(states.shape[:2], dtype=torch.bool)
        for x, part, real in zip(states, parts, mask):
            x[: len(part)], real[: len(part)] = part, True
        return states, mask

    def logits(self, recognizer, rows, live=None):
        """Every window spelled out: states (B, 9, T, L, D). live: upstreams to run, if any."""
        everyone = range(len(self.corpus))
        if live:
            audio = live["audio"]([self.clips[i] for i in rows])
            states, mask = live["text"]([u.text for u in self.corpus])
        else:
            audio = self.from_files("audio", rows)
            states, mask = self.from_files("text", everyone)
        windows = self.windows[rows]
        there = (windows >= 0)[:, :, None]
        states, mask = states[windows].flatten(0, 1), (mask[windows] & there).flatten(0, 1)
        return recognizer(audio, (states, mask, torch.arange(9 * len(rows)).view(-1, 9)))

    def loss(self, *arguments):
        """Equal weights, no smoothing: the mean of -log p(truth)."""
        rows = arguments[1]
        log_p = self.logits(*arguments)
        log_p = log_p - log_p.logsumexp(dim=1, keepdim=True)
        return -sum(log_p[k, self.labels[i]] for k, i in enumerate(rows)) / len(rows)

    def upstreams(self, weights):
        """The pre-trained models with what a checkpoint changed in them."""
        found = {m: Upstream(self.folders[m], m) for m in ("audio", "text")}
        for m, upstream in found.items():
            parameters = dict(upstream.model.named_parameters())
            for name, x in weights[m].items():
                parameters[name].data.copy_(x)
        return found


@pytest.fixture(scope="module")
def by_hand(small_corpus, upstreams, workplace):
    return ByHand(small_corpus, upstreams, workplace / "cache-by-hand")


@pytest.fixture
def checkpoints(monkeypatch):
    """A run's initial weights, the rows of its training batches, and all of its checkpoints."""
    seen = {"initial": [], "rows": [], "states": []}
    batch, write = data.batch, data.write_whole

    class Watched(EmotionRecognizer):
        def __init__(self, config):
            super().__init__(config)
            seen["initial"].append({k: x.clone() for k, x in self.state_dict().items()})

    def watch_batch(rows, *rest):
        if torch.is_grad_enabled():
            seen["rows"].append(rows.tolist())
        return batch(rows, *rest)

    def watch_write(path, content):
        write(path, content)
        if path.name == "checkpoint.pt":
            seen["states"].append(torch.load(path, weights_only=True))

    monkeypatch.setattr(train, "EmotionRecognizer", Watched)
    monkeypatch.setattr(data, "batch", watch_batch)
    monkeypatch.setattr(data, "write_whole", watch_write)
    return seen


OPENED = {  # what §2.4 fine-tunes, by the names of transformers
    "nothing": {"audio": (), "text": ()},
    "bottom": {"audio": ("feature_extractor.",), "text": ("embeddings.",)},
    "all": {"audio": ("",), "text": ("",)},
}


@pytest.mark.parametrize("flags, part, head_rate, rate, decay", [
    ("", 8, 1e-5, 1e-5, 1e-3),
    ("--open nothing", 8, 1e-5, 1e-5, 1e-3),
    ("--open all --lr-finetune 1e-4", 8, 1e-4, 1e-4, 1e-3),
    ("--head-lr 1e-3 --weight-decay 1", 8, 1e-3, 1e-5, 1),
    ("--micro-batch 3", 3, 1e-5, 1e-5, 1e-3),  # its parts add up to the batch's gradient
])  # fmt: skip
def test_the_steps_of_both_phases_are_adamw_by_hand(
    flags, part, head_rate, rate, decay, go, by_hand, checkpoints, monkeypatch
):
    """Five steps before the trigger and five after it, from the loss to the weights."""
    for name in ("clip_grad_norm_", "clip_grad_value_"):  # these gradients are small
        monkeypatch.delattr(torch.nn.utils, name)
    # min_decrease 1: no loss counts as lower, so the trigger fires after epoch 1. A system without
    # Transformer blocks has no dropout but --dropout.
    folder = go("steps" + flags.replace(" ", ""), "--fusion", "ef", "--dropout", "0",
                "--batch-size", "8", "--min-decrease", "1", "--finetune-after", "1",
                "--stop-after", "2", "--cache", str(by_hand.cache), *flags.split())  # fmt: skip
    first, second = checkpoints["states"]
    assert (first["finetune_epoch"], second["finetune_epoch"], len(second["log"])) == (1, 1, 2)
    config = json.loads((folder / "config.json").read_text())
    recognizer = EmotionRecognizer(Config(**config["model"]))
    epochs = [[]]  # of batches of rows, from the parts in which they came
    size = 0
    for rows in checkpoints["rows"]:
        if size == 39:
            epochs.append([])
            size = 0
        if size % 8 == 0:
            epochs[-1].append([])
        epochs[-1][-1] += rows
        size += len(rows)
        assert len(rows) <= part
    assert [[len(rows) for rows in epoch] for epoch in epochs] == [[8, 8, 8, 8, 7]] * 2
    assert sorted(sum(epochs[0], [])) == sorted(sum(epochs[1], []))

    what = OPENED[flags.split()[1] if "--open" in flags else "bottom"]
    starts = checkpoints["initial"][0], first["weights"]["model"]
    for phase, (start, epoch, end) in enumerate(zip(starts, epochs, (first, second))):
        recognizer.load_state_dict(start)
        rates = {f"model.{n}": (p, head_rate if phase else 1e-3)
                 for n, p in recognizer.named_parameters()}  # fmt: skip
        live = None
        if phase and "nothing" not in flags:
            live = by_hand.upstreams(first["weights"])
            for m, upstream in live.items():
                for n, p in upstream.model.named_parameters():
                    if n.startswith(what[m]):
                        rates[f"{m}.{n}"] = p.requires_grad_(True), rate
        before = {n: p.detach().clone() for n, (p, _) in rates.items()}
        moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, (p, _) in rates.items()}
        train_loss = 0.0
        for t, rows in enumerate(epoch, 1):
            loss = by_hand.loss(recognizer, rows, live)
            train_loss += loss.item() * len(rows) / 39
            found = torch.autograd.grad(loss, [p for p, _ in rates.values()], allow_unused=True)
            for (n, (p, lr)), g in zip(rates.items(), found):
                if g is None:  # BERT's pooler, WavLM's embedding of masked frames
                    continue
                m, v = moments[n]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                with torch.no_grad():
                    p.mul_(1 - lr * decay)
                    p.sub_(lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))

        assert end["log"][phase]["train_loss"] == pytest.approx(train_loss, rel=1e-4)
        assert end["log"][phase]["lr"] == (rate if phase else 1e-3)
        weights = {f"{m}.{n}": x for m, state in end["weights"].items() for n, x in state.items()}
        opened = {n for n in rates if not n.startswith("model.")}
        if phase:
            assert {n for n in weights if not n.startswith("model.")} == opened
        for n, (p, lr) in rates.items():
            if n.endswith(("k_proj.bias", "key.bias")):  # softmax: no gradient but rounding
                continue
            # Where a gradient is nearly zero, Adam takes its sign from the rounding.
            wrong = (weights[n] - p.detach()).abs() > 0.02 * lr
            assert wrong.float().mean() < 0.005, n
        moved = sum(not torch.equal(before[n], p) for n, (p, _) in rates.items())
        assert moved >= len(rates) - 3


def test_with_nothing_open_the_cached_states_serve_to_the_end(go, by_hand, monkeypatch):
    made, live = [], data.live
    monkeypatch.setattr(data, "live", lambda *inputs: (made.append(1), live(*inputs))[1])
    flags = ("--fusion", "ef", "--min-decrease", "1", "--finetune-after", "1", "--stop-after", "2",
             "--cache", str(by_hand.cache))  # fmt: skip
    folder = go("nothing-open", *flags, "--open", "nothing")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in log] == [1e-3, 1e-5] and not made
    go("bottom-open", *flags)
    assert len(made) == 2  # audio and text


@pytest.mark.parametrize("flags", ["", "--frozen", "--reset-patience", "--min-decrease 0.01"])
def test_losses_and_triggers_computed_again(flags, go, by_hand):
    """The development loss by the checkpoint's weights, the triggers by a plain loop."""
    folder = go("again" + flags.replace(" ", ""), "--fusion", "lf", "--cache",
                str(by_hand.cache), *flags.split())  # fmt: skip
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    config = json.loads((folder / "config.json").read_text())
    log, result, _ = timeless(folder)
    recognizer = EmotionRecognizer(Config(**config["model"])).eval()
    recognizer.load_state_dict(state["weights"]["model"])
    live = None if flags == "--frozen" else by_hand.upstreams(state["weights"])
    corpus = by_hand.corpus
    dev = [i for i, u in enumerate(corpus) if u.speaker == result["dev_speaker"]]
    test = [i for i, u in enumerate(corpus) if u.session == 5]
    for rows, expected in ((dev, log[-1]["dev_loss"]), (test, result["loss"])):
        rows = [i for i in rows if by_hand.labels[i] >= 0]
        with torch.no_grad():
            assert by_hand.loss(recognizer, rows, live).item() == pytest.approx(expected, abs=2e-5)

    smallest = 0.01 if "min" in flags else 0.0
    best, since, trigger, counts, stop = float("inf"), 0, None, [], None
    for row in log:
        assert stop is None
        since += 1
        if row["dev_loss"] < best - smallest * best or best == float("inf"):
            best, since = row["dev_loss"], 0
        counts.append(since)
        if since >= 4:
            stop = row["epoch"]
        elif since >= 2 and trigger is None and flags != "--frozen":
            trigger = row["epoch"]
            if "reset" in flags:
                since = 0
    assert counts == [row["since_best"] for row in log]
    assert (trigger, stop) == (result["finetune_epoch"], result["epochs"])
    phases = [row["epoch"] <= (trigger or stop) for row in log]
    assert [row["phase"] == "frozen" for row in log] == phases


def test_a_run_resumes_after_its_upstream_has_moved(go, upstreams, tmp_path, capsys):
    """The weights are the same, so only the path differs, in settings and in switches."""
    shutil.copytree(upstreams["text"], tmp_path / "text")
    flags = ("--fusion", "text-fc", "--frozen", "--max-epochs", "2")
    folder = go("moved", *flags)
    before = (folder / "predictions.csv").read_text()
    (folder / "result.json").unlink()
    assert go("moved", *flags, "--bert", str(tmp_path / "text")) == folder
    assert "resumes after epoch 2" in capsys.readouterr().out
    assert (folder / "predictions.csv").read_text() == before


def test_states_of_the_cache_are_computed_without_tf32(go, monkeypatch):
    """Like the live ones: on a GPU, the convolutions of WavLM would round otherwise."""
    seen, cache = [], data.cache_states
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(data, "cache_states", lambda *a: seen.append(torch.backends.cudnn.allow_tf32) or cache(*a))
    go("tf32", "--fusion", "ef", "--frozen", "--max-epochs", "1")
    assert seen == [False, False]


def test_a_frozen_epoch_that_is_best_is_tested_with_frozen_states(go):
    """Fine-tuning at a rate that ruins the upstreams must not reach the selected model."""
    flags = ("--fusion", "text-fc", "--select", "best")
    tuned = go("ruined", *flags, "--lr-finetune", "0.5")
    result = result_of(tuned)
    state = torch.load(tuned / "checkpoint.pt", weights_only=True)
    assert result["finetune_epoch"] and state["selected"]["finetune_epoch"] is None
    frozen = go("whole-frozen", *flags, "--frozen", "--max-epochs", str(result["finetune_epoch"]))
    assert (tuned / "predictions.csv").read_text() == (frozen / "predictions.csv").read_text()


def test_the_seed_draws_the_order_of_the_batches(go, checkpoints, monkeypatch):
    """With the same three parts, two seeds see the training utterances in two orders."""
    split = data.split
    monkeypatch.setattr(data, "split", lambda corpus, fold, seed: split(corpus, fold, 0))
    orders = []
    for seed in "01":
        checkpoints["rows"].clear()
        go("order" + seed, "--fusion", "text-fc", "--frozen", "--max-epochs", "2", "--seed", seed)
        orders.append(sum(checkpoints["rows"], []))
    half = len(orders[0]) // 2
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    assert orders[0][:half] != orders[0][half:]  # the second epoch has another order


def test_a_dead_squeeze_and_excitation_is_warned_of(go, monkeypatch, capsys):
    go("alive", "--fusion", "ef", "--frozen", "--max-epochs", "2")
    assert "dead" not in capsys.readouterr().out
    born = SqueezeExcitation.__init__

    def dead(self, n_layers):
        born(self, n_layers)
        torch.nn.init.constant_(self.reduce.bias, -100)

    monkeypatch.setattr(SqueezeExcitation, "__init__", dead)
    go("dead", "--fusion", "ef", "--frozen", "--max-epochs", "2")
    said = capsys.readouterr().out
    for m in ("audio", "text"):
        assert said.count(f"warning: the S&E unit of the {m} features is dead") == 2


# --- settings, folders, several runs of one command


OTHER = {  # of each setting a value that is not the usual one
    "upstream": "tiny", "wavlm": "some/where", "bert": "else", "precision": "bf16",
    "lr_frozen": 0.01, "lr_finetune": 1e-4, "weight_decay": 0.0, "batch_size": 8, "dropout": 0.1,
    "context": 3, "finetune_after": 2, "stop_after": 4, "max_epochs": 7, "condense": "concat",
    "text_mask": "target", "cma_residual": True, "reset_patience": True, "select": "best",
    "head_lr": 1e-3, "trim": "all", "head": "linear", "dropout_at": "both", "min_decrease": 0.1,
    "open": "all",
}  # fmt: skip


def test_a_folders_name_holds_exactly_the_settings_that_are_not_the_usual_ones(
    monkeypatch, small_corpus, tmp_path, tiny
):
    monkeypatch.chdir(tmp_path)
    corpus = data.read_iemocap(small_corpus)
    cached = {m: data.CachedStates([None] * len(corpus), "cpu") for m in tiny}
    for name, inputs in (("load_inputs", lambda *a: (tiny, None, cached)), ("train", lambda *a: 0)):
        monkeypatch.setattr(train, name, inputs)
    monkeypatch.setattr(data, "read_iemocap", lambda root, problems: corpus)
    always = {"fusion", "frozen", "fold", "seed"}  # in every name
    machine = {"iemocap", "corpus", "partial", "out", "cache", "device", "micro_batch", "system"}
    defaults = vars(train.flags().parse_args([]))
    assert OTHER.keys() == defaults.keys() - always - machine

    def folder_of(*flags, root=("--iemocap", str(small_corpus), "--partial")):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        train.main([*root, "--device", "cpu", *flags])
        (path,) = (tmp_path / "runs").rglob("config.json")
        return path.parent.parent.name, json.loads(path.read_text())

    assert folder_of()[0] == "mmt-finetuned"
    for name, value in OTHER.items():
        flag = ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
        found, config = folder_of(*flag)
        assert found == f"mmt-finetuned-{name}={'where' if name == 'wavlm' else value}"
        assert config[name] == value and config["switches"] == {name: value}
        usual = {k: defaults[k] for k in OTHER}
        assert {k: config[k] for k in usual} == usual | {name: value}
    usual = ("--dropout", "0.5", "--open", "bottom")
    found, _ = folder_of(*usual, "--fusion", "lf", "--frozen", "--context", "5")
    assert found == "lf-frozen-context=5"
    # The toy has usual values of its own.
    monkeypatch.setattr(data, "write_toy", lambda root: small_corpus)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.name == "toy.json" or exists(path))
    assert folder_of(root=())[0] == "mmt-finetuned"
    assert folder_of("--max-epochs", "7", root=())[0] == "mmt-finetuned-max_epochs=7"
    assert folder_of("--upstream", "paper", root=())[0] == "mmt-finetuned-upstream=paper"


def test_the_way_to_trim_and_the_precision_reach_the_states(go, monkeypatch, workplace):
    asked, load = [], data.load_clips
    monkeypatch.setattr(data, "load_clips", lambda *a: asked.append(a[1:]) or load(*a))
    go("trimmed", "--fusion", "audio-fc", "--frozen", "--max-epochs", "1", "--trim", "all")
    folder = go("bf16", "--fusion", "audio-fc", "--frozen", "--max-epochs", "1",
                "--precision", "bf16", "--cache", "other-cache")  # fmt: skip
    assert asked == [("all",), ("leading",)]
    (states,) = (workplace / "other-cache").iterdir()
    assert states.name.startswith("audio-bf16-") and "precision=bf16" in str(folder)


def test_runs_of_one_command_end_as_they_would_alone(go, workplace):
    """Fine-tuning changes the upstreams, and the next run starts from the pre-trained ones."""
    go("together", "--system", "13", "14", "--seed", "0", "1")
    found = {p.parts[-3][:5] + p.parts[-2]: p.parent
             for p in (workplace / "together").rglob("config.json")}  # fmt: skip
    assert len(found) == 4
    for number, kind in (("13", "ef-fr"), ("14", "ef-fi")):
        for seed in "01":
            alone = go(f"alone-{number}-{seed}", "--system", number, "--seed", seed)
            assert timeless(found[f"{kind}fold5-seed{seed}"]) == timeless(alone)


# --- at full size (by hand: pytest -m slow)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_step_at_full_size(fusion, full_size_upstreams):
    """WavLM-Large and BERT-base shapes with random weights: a step of each phase on the CPU."""
    g = torch.Generator().manual_seed(0)
    raw = {
        "audio": [0.1 * torch.randn(n, generator=g) for n in (80000, 30000)],
        "text": ["i hate it", "so do i , and all alone", "lovely party"],
    }
    windows = torch.tensor([[-1, -1, -1, -1, 0, 1, 2, -1, -1], [-1, -1, -1, 0, 1, 2, -1, -1, -1]])
    labels, rows = torch.tensor([2, 1]), torch.tensor([0, 1])
    config = Config(fusion)
    upstreams = {m: full_size_upstreams[m] for m in config.modalities}
    frozen = {}
    for m, upstream in upstreams.items():
        with torch.no_grad():
            x, mask = upstream(raw[m])
        assert x.shape[2:] == ((25, 1024) if m == "audio" else (13, 768))
        assert m == "text" or mask.sum(1).tolist() == [249, 93]
        frozen[m] = lambda rows, x=x, mask=mask: (x[rows].half(), mask[rows])
    head = EmotionRecognizer(config).train()

    def step(sources, parameters):
        def everything():
            found = dict(head.named_parameters())
            for m, upstream in upstreams.items():
                found |= {f"{m}.{n}": p for n, p in upstream.model.named_parameters()}
            return found

        before = {n: p.clone() for n, p in everything().items()}
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-3)
        logits = head(**data.batch(rows, windows, sources, "cpu"))
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        return {n for n, p in everything().items() if not torch.equal(before[n], p)}

    assert step(frozen, head.parameters()) == set(head.state_dict())
    opened = [p for upstream in upstreams.values() for p in upstream.open("bottom").values()]
    live = {m: data.live(upstream, raw[m]) for m, upstream in upstreams.items()}
    bottom = step(live, [*head.parameters(), *opened]) - set(head.state_dict())
    parts = {"audio": "audio.feature_extractor.", "text": "text.embeddings."}
    assert {n.split(".", 2)[0] for n in bottom} == set(upstreams)
    assert all(n.startswith(parts[n.split(".")[0]]) for n in bottom)


@pytest.fixture(scope="session")
def full_size_upstreams(tmp_path_factory):
    import transformers as hf

    import model

    folder = tmp_path_factory.mktemp("full")
    words = [f"word{i}" for i in range(20000)]  # a tokenizer that fits BERT's embedding
    tiny = model.make_tiny_upstreams(str(folder / "tiny"), [" ".join(words)])
    torch.manual_seed(0)
    for m, config, cls in (
        ("audio", hf.WavLMConfig(**model.WAVLM_LARGE), hf.WavLMModel), ("text", hf.BertConfig(), hf.BertModel)
    ):  # fmt: skip
        cls(config).save_pretrained(folder / m)
        loader = hf.AutoFeatureExtractor if m == "audio" else hf.AutoTokenizer
        loader.from_pretrained(tiny[m]).save_pretrained(folder / m)
    return {m: Upstream(str(folder / m), m) for m in ("audio", "text")}


# --- what a finished run can do: an utterance of your own, pictures


def test_an_utterance_of_the_corpus_is_recognized_as_in_the_run(go, small_corpus, tmp_path):
    """The same probabilities as predictions.csv, by files and words alone."""
    corpus = data.read_iemocap(small_corpus)
    for fusion, switch in (("mmt", ()), ("mmt", ("--frozen",)), ("audio-fc", ()), ("text-fc", ())):
        folder = go(f"own-{fusion}{len(switch)}", "--fusion", fusion, *switch)
        recognizer = evaluate.Recognizer(folder)
        with open(folder / "predictions.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in (rows[0], rows[4], rows[-1]):  # at both edges of the dialogue, and within it
            i = next(i for i, u in enumerate(corpus) if u.id == row["utterance"])
            texts = [u.text for u in corpus if u.dialog == corpus[i].dialog]
            k = texts.index(corpus[i].text)
            p = recognizer.recognize(corpus[i].wav, texts[k], texts[:k], texts[k + 1 :])
            for c, value in p.items():
                assert value == pytest.approx(float(row[c]), abs=2e-3 if switch else 2e-5), fusion
    recognizer.recognize("x.wav", "oh no 1", before=["a"] * 6)
    said = " ".join(recognizer.remarks)
    assert "no audio" in said and "4 turns of context are missing" in said and "toy" not in said
    with pytest.raises(data.InputError, match="--text"):
        recognizer.recognize("x.wav")


def test_long_audio_is_said(go, tmp_path):
    recognizer = evaluate.Recognizer(go("own-mmt0", "--fusion", "mmt"))
    write_wav(tmp_path / "long.wav", [0.1, -0.1] * 48000)
    recognizer.recognize(tmp_path / "long.wav", "oh no")
    assert "Of 6.0 s of audio, 5 s are used." in recognizer.remarks


def test_a_run_that_cannot_be_loaded_is_one_sentence(go):
    folder = go("broken", "--fusion", "text-fc")
    path = folder / "config.json"
    for old, new, message in (
        ('"text_dim": 64', '"text_dim": 32', "does not fit"),
        ('"weights": {\n  "text": "', '"weights": {\n  "text": "0', "not the weights"),
        ('"dim": 16', '"dummy": 16', "does not fit"),
        ('"upstreams": {\n  "text": "/', '"upstreams": {\n  "text": "/nowhere/', "/nowhere/"),
    ):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises((data.InputError), match=message):
            evaluate.Recognizer(folder)
        path.write_text(text)


def test_pictures_of_an_utterance_hold_what_they_show(go, small_corpus, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    folder = go("own-mmt0", "--fusion", "mmt")
    figures = []
    draw = evaluate.figure
    monkeypatch.setattr(evaluate, "figure", lambda *a: figures.append(draw(*a)) or figures[-1])
    wav = sorted(small_corpus.rglob("Ses05*.wav"))[0]
    evaluate.main([
        str(folder), "--wav", str(wav), "--text", "oh lovely party", "--before", "hate it",
        "--pictures", str(tmp_path),
    ])  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == {"gates.png", "attention.png"}
    gates, attention = figures
    (ax,) = gates.axes  # three layers, gates of a sigmoid, audio and text
    assert len(ax.lines) == 2
    for line in ax.lines:
        assert len(line.get_ydata()) == 3 and all(0 < y < 1 for y in line.get_ydata())
    a2t, t2a = attention.axes[:2]
    assert "audio to text" in a2t.get_title() and "text to audio" in t2a.get_title()
    frames = (len(data.clip(data.load_wav(wav))) - 340) // 320 + 1  # of the tiny CNN
    rows, columns = (ax.images[0].get_array() for ax in (a2t, t2a))
    assert rows.shape == columns.shape == (5, frames)  # [CLS] oh lovely party [SEP]
    assert abs(rows.sum(axis=1) - 1).max() < 1e-5 and abs(columns.sum(axis=0) - 1).max() < 1e-5
    words = [t.get_text() for t in a2t.get_yticklabels()]
    assert words == ["[CLS]", "oh", "lovely", "party", "[SEP]"]
    assert all("small-partial" in fig.get_suptitle().replace("\n", " ") for fig in figures)


def test_a_corpus_in_a_folder_named_toys_is_no_toy(small_corpus, tmp_path):
    copied = tmp_path / "copy" / "toys"
    shutil.copytree(small_corpus, copied)
    name, _ = train.read_corpus(copied, None, True)
    assert name == "my-toys-partial"
    (copied / "toy.json").write_text("{}")
    assert train.read_corpus(copied, None, True)[0] == "toy-toys-partial"
