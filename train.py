"""Training as in §2.4 and §3.2: frozen, then fine-tuned, then the last model tested.

    python train.py --fusion mmt --fold 5                 the toy corpus, made on the spot
    python train.py --iemocap DIR --fusion mmt --fold 5   the paper's Sys. 18, Session 5

The first takes about 20 s on two CPU cores, all that it makes included, and ends (toy numbers):

    Trigger: no lower dev loss for 5 epochs. Fine-tuning starts: ...
    toy epoch  35 finetune train loss 0.6791  dev loss 0.6326 WA 75.57% UA 74.96%  6 since lowest
    ...
    Stop: no lower dev loss for 10 epochs.
    toy: WA 73.50%  UA 73.33%  on 283 test utterances of Session5, after 39 epochs in 16 s

Read Patience (the triggers), then train(), whose loop is the paper's training procedure, then what
it leans on: Training is the state that the loop changes, Material what it starts from, and resume
explains the run's twin, the frozen or fine-tuned run that shares its frozen epochs.
"""

import argparse
import copy
import errno
import io
import itertools
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import data
import evaluate
from data import CorpusError, Utterance
from evaluate import RunError
from model import FUSIONS, Config, EmotionRecognizer, Upstream, UpstreamError, make_tiny_upstreams

# §3.2: AdamW, 1e-3 "during initial training", 1e-5 "during fine-tuning", weight decay, batch size
LR_FROZEN, LR_FINETUNE, WEIGHT_DECAY, BATCH = 1e-3, 1e-5, 1e-3, 32
FINETUNE_AFTER, STOP_AFTER = 5, 10  # epochs without a lower development loss


class Patience:
    """The two triggers of §3.2, fed with the development loss after each epoch.

    "If the loss has not decreased for 5 epochs, the fine-tuning process starts; if the loss has not
    decreased for 10 epochs, the training stops." `finetune_after` None: a frozen system, which only
    stops. With 2 and 4 for brevity, the losses on the left are answered on the right:

        1.0  0.8   "continue"  "continue"      a lower loss each time
        0.9  0.8   "continue"  "finetune"      2 epochs without one (equal is not lower)
        0.7        "continue"                  lower: the count is back at 0, fine-tuning goes on
        0.8 x 4    "continue" x 3  "stop"      4 epochs without one
    """

    def __init__(self, finetune_after: int | None = FINETUNE_AFTER, stop_after: int = STOP_AFTER,
                 reset_at_finetune: bool = False):  # fmt: skip
        self.finetune_after = finetune_after
        self.stop_after = stop_after
        self.reset_at_finetune = reset_at_finetune
        self.best = float("inf")
        self.since_best = 0  # epochs
        self.finetuning = False

    # EXERCISE 8 (20 min): delete the body, write it again; pytest -m ex8
    def step(self, dev_loss: float) -> str:
        """After an epoch: "continue", "finetune" (once, through trigger) or "stop".

        Counts in `best` and `since_best`, which the checkpoint keeps; where both are due, "stop".
        """
        if dev_loss < self.best:
            self.best, self.since_best = dev_loss, 0
        else:
            self.since_best += 1
        if self.stopped:
            return "stop"
        if self.finetune_after is None or self.finetuning or self.since_best < self.finetune_after:
            return "continue"
        self.trigger()
        return "finetune"

    @property
    def stopped(self) -> bool:
        return self.since_best >= self.stop_after

    def trigger(self) -> None:
        """Fine-tuning starts: remember it, and count anew if asked to."""
        self.finetuning = True
        # UNSPECIFIED [A9]: whether the 10 epochs are counted anew from the trigger. We read one
        # counter, which goes on: 5 more epochs without a lower loss end it; alternative:
        # --reset-patience. Either way a lower loss sets it to 0, and fine-tuning goes on.
        if self.reset_at_finetune:
            self.since_best = 0


# ------------------------------------------------------------------------------------------------
# One run: a system, a fold, a seed
# ------------------------------------------------------------------------------------------------


def train(settings: dict, means: dict, material: "Material", folder: Path, device: str) -> None:
    """One system on one fold with one seed, from where its folder stands to its result.json.

    settings: what makes it this run and no other; means: machine, libraries and what saves memory,
    which change how sums are rounded and which units dropout hits, and are noted beside. Called
    again with the same folder, it goes on where it was killed. Raises RunError where the folder
    holds another run, or where the loss is not finite.
    """
    name = run_name(settings["fusion"], settings["frozen"])
    number = evaluate.system_number(settings["fusion"], settings["frozen"])
    title = f"Sys. {number} ({name}), fold {settings['fold']}, seed {settings['seed']}"
    claim(folder, settings, means)
    if (folder / "result.json").exists():
        print(f"{title}: done before, see {folder}; delete that to train anew")
        return

    # An utterance is known by its row in the corpus: in labels, windows, clips, texts and states.
    train_set, dev_set, test_set = data.split(material.corpus, settings["fold"], settings["seed"])
    row_of = {u.id: i for i, u in enumerate(material.corpus)}
    train_rows, dev_rows, test_rows = (
        torch.tensor([row_of[u.id] for u in part]) for part in (train_set, dev_set, test_set)
    )
    print(
        f"\n{title}: train {len(train_set)}, dev {len(dev_set)} (speaker {dev_set[0].speaker}), "
        f"test {len(test_set)} (Session{settings['fold']}) utterances of {material.name}; {folder}"
    )

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # A new EmotionRecognizer, AdamW on it at 1e-3, Patience, no epoch behind it ...
    run = Training(settings, material, device)
    resume(run, folder)  # ... unless this run, or its twin, was further already.
    model, patience = run.model, run.patience  # not run.optimizer: fine-tuning makes a new one
    labels = material.labels.to(device)
    while not patience.stopped:  # [A15]: no cap on the epochs
        started = time.perf_counter()

        # §3.2: one epoch over the training speakers, shuffled anew, in batches of 32.
        model.train()  # dropout on; the upstreams stay in eval mode [A12]
        train_loss = 0.0
        batches = train_rows[torch.randperm(len(train_rows), generator=run.order)].split(BATCH)
        bar = f"epoch {len(run.log) + 1}"
        for rows in tqdm(batches, desc=bar, leave=False, delay=3, disable=None):
            run.optimizer.zero_grad()
            for part in rows.split(means["micro_batch"]):  # all 32 at once unless memory is short
                logits = model(**run.batch(part))  # (B, 4)
                loss = F.cross_entropy(logits, labels[part])  # §2.4; [A15]: classes not weighted
                (loss * (len(part) / len(rows))).backward()  # parts add up to the batch's gradient
                value = finite(loss.item(), run, rows)  # RunError where it is inf or NaN
                train_loss += value * len(part) / len(train_rows)  # a mean over utterances
            run.optimizer.step()  # [A15]: gradients not clipped

        # §3.2: "we randomly select one speaker as a development set and monitor its loss".
        log_probs = evaluate.predict(model, dev_rows, run.batch)  # (N_dev, 4), dropout off
        dev = evaluate.score(material.labels[dev_rows], log_probs)
        event = patience.step(finite(dev["loss"], run, dev_rows))
        log_epoch(run, train_loss, dev, event, time.perf_counter() - started)
        select(run, dev, test_rows)  # test_rows: for --select test alone
        save_trigger(run, folder)

        # §2.4: "partial fine-tuning": from the next epoch on the upstreams run on every batch, and
        # their lowest parts learn with the rest.
        if event == "finetune":
            opened = {"audio": "WavLM's CNN encoder", "text": "BERT's input embeddings"}
            print(
                f"Trigger: no lower dev loss for {FINETUNE_AFTER} epochs. Fine-tuning starts: "
                f"{' and '.join(opened[m] for m in run.upstreams)}, learning rate {LR_FINETUNE:g}."
            )
            run.start_finetuning()

        # After a kill, training goes on from here.
        save(folder / "checkpoint.pt", run.state())
        write_log(folder, run.log)

    print(f"Stop: no lower dev loss for {STOP_AFTER} epochs.")
    write_log(folder, run.log)  # a kill may have come between the last checkpoint and its line
    conclude(run, folder, train_set, dev_set, test_set, test_rows)


def finite(loss: float, run: "Training", rows: Tensor) -> float:
    """The loss, if it is a number; a model that has met inf or NaN never comes back from it."""
    if not math.isfinite(loss):
        ids = [run.material.corpus[i].id for i in rows.tolist()]
        raise RunError(
            f"the loss is {loss} in epoch {len(run.log) + 1}, among utterances {ids[0]} ... "
            f"{ids[-1]}; training stopped, and the run folder holds the epoch before. Look at "
            f"these inputs; if it was --precision bf16, try fp32"
        )
    return loss


def log_epoch(run: "Training", train_loss: float, dev: dict, event: str, seconds: float) -> None:
    """The epoch as a row of log.jsonl, and as a line on the screen:

    toy epoch  35 finetune train loss 0.6791  dev loss 0.6326 WA 75.57% UA 74.96%  6 since lowest

    Warns where no utterance of it woke an S&E unit [A2].
    """
    e = {
        "epoch": len(run.log) + 1,
        "phase": "frozen" if run.finetune_epoch is None else "finetune",
        "lr": run.optimizer.param_groups[0]["lr"], "train_loss": train_loss,
        "dev_loss": dev["loss"], "dev_wa": dev["wa"], "dev_ua": dev["ua"],
        # At the trigger --reset-patience has set the counter back already.
        "since_best": FINETUNE_AFTER if event == "finetune" else run.patience.since_best,
        "seconds": seconds,
    }  # fmt: skip
    run.log.append(e)
    age = f"{e['since_best']} since lowest" if e["since_best"] else "lowest"
    print(
        f"{run.material.name} epoch {e['epoch']:3} {e['phase']:8} "
        f"train loss {e['train_loss']:.4f}  dev loss {e['dev_loss']:.4f} "
        f"WA {e['dev_wa']:6.2%} UA {e['dev_ua']:6.2%}  {age:15} {e['seconds']:.1f} s"
    )
    for m, extractor in run.model.extractor.items():
        if not extractor.se.fired:
            print(f"warning: the S&E unit of the {m} features is dead: all get the same gates")
        extractor.se.fired = False  # for the next epoch


def select(run: "Training", dev: dict, test_rows: Tensor) -> None:
    """Keep the weights of the best epoch, where --select asks for one."""
    # UNSPECIFIED [A10]: "The last model is selected and then evaluated". We read: the last epoch's,
    # 10 epochs after the best; alternative: --select best, that of the lowest development loss.
    if run.settings["select"] == "last":
        return
    if run.settings["select"] == "best":
        value = -dev["loss"]
    else:
        log_probs = evaluate.predict(run.model, test_rows, run.batch)
        value = evaluate.score(run.material.labels[test_rows], log_probs)["wa"]
        print(
            f"SELECTING ON TEST: THIS IS CHEATING, AND IT IS MARKED SO. "
            f"{run.material.name} test WA {value:.2%}"
        )
    if run.selected is None or value > run.selected["value"]:
        weights = copy.deepcopy(run.weights())
        run.selected = {"value": value, "weights": weights, "finetune_epoch": run.finetune_epoch}


def save_trigger(run: "Training", folder: Path) -> None:
    """trigger.pt: the state in which the trigger first fires, or would if this run were not frozen.

    It is for the run's twin (see resume).
    """
    first = next((e["epoch"] for e in run.log if e["since_best"] == FINETUNE_AFTER), None)
    if first == len(run.log):
        save(folder / "trigger.pt", run.state())


def conclude(
    run: "Training", folder: Path, train_set: list[Utterance], dev_set: list[Utterance],
    test_set: list[Utterance], test_rows: Tensor,
) -> None:  # fmt: skip
    """Test the last model, or the selected one, and write predictions.csv and result.json."""
    settings, material = run.settings, run.material
    if run.selected:  # [A10]: not the last weights
        run.load_weights(run.selected["weights"])
        if run.selected["finetune_epoch"] is None:  # of the frozen phase: heard as it was then
            run.sources = {m: material.states[m] for m in run.upstreams}

    # The test session: predicted here for the first time (but for --select test).
    log_probs = evaluate.predict(run.model, test_rows, run.batch)  # (N_test, 4)
    seen = data.texts_elsewhere(material.corpus)  # ids whose words another session speaks too
    evaluate.write_predictions(
        folder / "predictions.csv", test_set, log_probs, [u.id in seen for u in test_set]
    )
    result = {
        **{k: settings[k] for k in ("corpus", "fusion", "frozen", "fold", "seed", "select")},
        **evaluate.score(material.labels[test_rows], log_probs),
        "epochs": len(run.log), "finetune_epoch": run.finetune_epoch,
        "dev_speaker": dev_set[0].speaker, "n_train": len(train_set), "n_dev": len(dev_set),
        "n_test": len(test_set), "seconds": sum(epoch["seconds"] for epoch in run.log),
        "peak_memory_bytes": peak_memory(run.device),
    }  # fmt: skip
    write_json(folder / "result.json", result)
    print(evaluate.describe(result))


def peak_memory(device: str) -> int:
    """Bytes: of the GPU by this run, as torch counts it; without one, of the process so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return peak * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------
# The state of a run, and its folder
#
# A fold on IEMOCAP takes hours, so a run can be killed at any moment and goes on to the same bits:
# a checkpoint holds all that training changes, every random state included, and every file is
# written under another name and then renamed (data.rewrite). What happens when, in the folder:
#
#     claim          config.json
#     each epoch     trigger.pt (once), checkpoint.pt, log.jsonl
#     at the end     predictions.csv, result.json
#
# A kill between any two of these repeats no more than the epoch that it hit. (evaluate.py tells
# what is in the files.)
# ------------------------------------------------------------------------------------------------


class Training:
    """All that one run changes while it trains, hence all that its checkpoint holds."""

    def __init__(self, settings: dict, material: "Material", device: str):
        self.settings, self.material, self.device = settings, material, device
        torch.manual_seed(settings["seed"])  # initial weights, then dropout
        self.order = torch.Generator().manual_seed(settings["seed"])  # of the batches
        config = Config.of(settings)
        self.upstreams = {m: material.upstreams[m] for m in config.modalities}
        for m, upstream in self.upstreams.items():
            upstream.requires_grad_(False)  # an earlier run of this command may have changed it
            upstream.finetunable().load_state_dict(material.pristine[m])
        self.model = EmotionRecognizer(config).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR_FROZEN, weight_decay=WEIGHT_DECAY
        )
        self.patience = Patience(
            None if settings["frozen"] else FINETUNE_AFTER, STOP_AFTER, settings["reset_patience"]
        )
        self.windows = data.context_windows(material.corpus, config.n_context)
        self.sources = {m: material.states[m] for m in self.upstreams}  # the cache, then live
        self.finetune_epoch: int | None = None  # the last frozen one, at which the trigger fired
        self.log: list[dict] = []  # a row an epoch
        self.selected: dict | None = None  # [A10]: weights and score of the best epoch

    def batch(self, rows: Tensor) -> dict[str, tuple]:
        """The utterances at these rows of the corpus, as EmotionRecognizer takes them."""
        return data.batch(rows, self.windows, self.sources, self.device)

    def start_finetuning(self) -> None:
        """§2.4: from now on WavLM's CNN encoder and BERT's input embeddings learn too."""
        parameters = list(self.model.parameters())
        for m, upstream in self.upstreams.items():
            upstream.finetunable().requires_grad_(True)
            parameters += upstream.finetunable().parameters()
            self.sources[m] = data.live(upstream, self.material.raw[m])
        # UNSPECIFIED [A11]: the optimiser at the trigger, and the rate of what was trained before.
        # One rate is named (§3.2), so a new AdamW takes all of it at 1e-5.
        self.optimizer = torch.optim.AdamW(parameters, lr=LR_FINETUNE, weight_decay=WEIGHT_DECAY)
        self.finetune_epoch = len(self.log)

    def weights(self) -> dict[str, dict]:
        """What training changed: the model and, once fine-tuning, what is open of the upstreams."""
        parts = {"model": self.model}
        if self.finetune_epoch is not None:
            parts |= {m: upstream.finetunable() for m, upstream in self.upstreams.items()}
        return {name: module.state_dict() for name, module in parts.items()}

    def load_weights(self, weights: dict[str, dict]) -> None:
        """The inverse of weights(); what it does not name goes back to where it started."""
        self.model.load_state_dict(weights["model"])
        for m, upstream in self.upstreams.items():
            upstream.finetunable().load_state_dict(weights.get(m, self.material.pristine[m]))

    def state(self) -> dict:
        """The checkpoint: nothing but tensors, numbers, strings, lists and dicts.

        With the same weights, the same optimiser moments and the same random numbers still to
        come, the next epoch is the one that an undisturbed run would have had: the order of the
        batches is drawn from `order`, dropout from the device's own generator.
        """
        random_states = {"cpu": torch.get_rng_state(), "order": self.order.get_state()}
        if self.device == "cuda":
            random_states["cuda"] = torch.cuda.get_rng_state()
        return {
            "settings": self.settings, "finetune_epoch": self.finetune_epoch,
            "weights": self.weights(), "optimizer": self.optimizer.state_dict(),
            "patience": {"best": self.patience.best, "since_best": self.patience.since_best},
            "random_states": random_states, "log": self.log, "selected": self.selected,
        }  # fmt: skip

    def load_state(self, state: dict) -> None:
        """The inverse of state(). The order matters: the trigger makes a new optimiser."""
        if state["finetune_epoch"] is not None:
            self.start_finetuning()
            self.patience.trigger()
        self.finetune_epoch = state["finetune_epoch"]  # which it took from a log not yet loaded
        self.load_weights(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.patience.best = state["patience"]["best"]
        self.patience.since_best = state["patience"]["since_best"]
        torch.set_rng_state(state["random_states"]["cpu"])
        self.order.set_state(state["random_states"]["order"])
        if self.device == "cuda" and "cuda" in state["random_states"]:
            torch.cuda.set_rng_state(state["random_states"]["cuda"])
        self.log = state["log"]
        self.selected = state["selected"]


def run_name(fusion: str, frozen: bool) -> str:
    """The folder of a system's runs below that of their corpus: mmt-finetuned is Sys. 18."""
    return f"{fusion}-{'frozen' if frozen else 'finetuned'}"


def claim(folder: Path, settings: dict, means: dict) -> None:
    """Write config.json, or raise RunError naming what differs from the run that is there:

        runs/toy/mmt-frozen/fold5-seed0 holds a run with dropout 0.5, not 0.1; take another ...

    Other code than that run's is not refused, for it may be a mended print. But it is said, and a
    run that goes on with it is marked, so that no table mixes it with others.
    """
    path = folder / "config.json"
    if path.exists():
        try:
            old = json.loads(path.read_text())
            changed = [k for k in settings if old.get(k) != settings[k]]
            files = [f for f, code in means["code"].items() if old.get("code", {}).get(f) != code]
            begun = (folder / "checkpoint.pt").exists()
            mixed = sorted({*old.get("code_changed", []), *(files if begun else [])})
        except (ValueError, AttributeError, TypeError) as error:
            raise RunError(f"{path}: damaged ({error}); delete {folder} to start anew") from None
        if changed:
            was = ", ".join(f"{k} {old.get(k)!r}, not {settings[k]!r}" for k in changed)
            raise RunError(f"{folder} holds a run with {was}; take another --out, or delete it")
        if files and begun:
            print(f"warning: {folder} was begun before {', '.join(files)} changed")
        means = {**means, "code_changed": mixed}
    if not (folder / "result.json").exists():  # a finished run keeps the means that made it
        write_json(path, {**settings, **means})


def resume(run: Training, folder: Path) -> None:
    """Go on from the folder's checkpoint, or from the trigger of the run's twin, or from nothing.

    A frozen system and its fine-tuned twin (Sys. 1 and 2, 3 and 4 ...) are the same run until the
    trigger first fires. Whichever gets there first leaves trigger.pt, and the other starts from it:
    its result is what it would be alone. In the toy run at the head of this file

        Sys. 17   epochs 1 ... 34, trigger.pt, 35 ... 39   cached states and 1e-3 throughout
        Sys. 18                    trigger.pt, 35 ... 39   live upstreams and 1e-5
    """
    path = folder / "checkpoint.pt"
    if path.exists():
        state = evaluate.load_checkpoint(path)
        if state.get("settings") != run.settings:
            raise RunError(f"{path}: not a checkpoint of this run (other settings); delete it")
        load_into(run, state, path)
        print(f"goes on after epoch {len(run.log)}")
        return
    frozen = run.settings["frozen"]
    # folder is <out>/<corpus>/<fusion>-<frozen|finetuned>/fold<k>-seed<n>
    twin = folder.parent.with_name(run_name(run.settings["fusion"], not frozen)) / folder.name
    path = twin / "trigger.pt"
    if path.exists() and code_of(twin) == code_of(folder):
        state = evaluate.load_checkpoint(path)
        if state.get("settings") == {**run.settings, "frozen": not frozen}:
            load_into(run, state, path)
            run.patience.since_best = FINETUNE_AFTER  # --reset-patience has set it to 0
            print(f"the {len(run.log)} epochs to the trigger are those of {twin.parent.name}")
            if not frozen:
                run.patience.trigger()
                run.start_finetuning()


def code_of(folder: Path) -> tuple | None:
    """With what code a run was made, by its config.json; None where that does not tell."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return config["code"], config.get("code_changed", [])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def load_into(run: Training, state: dict, path: Path) -> None:
    """The state read from `path`, into the run; RunError where it does not fit."""
    try:
        run.load_state(state)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise RunError(f"{path}: not a checkpoint of this run ({reason}); delete it") from None


def save(path: Path, state: dict) -> None:
    """A checkpoint, through data.rewrite; read back with weights_only: it can run no code."""
    whole = io.BytesIO()  # first in memory: torch.save cannot tell a full disk from a bug
    torch.save(state, whole)
    data.rewrite(path, lambda file: file.write(whole.getbuffer()))


def write_json(path: Path, value) -> None:
    """`value` as indented JSON, through data.rewrite."""
    data.rewrite(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def write_log(folder: Path, log: list[dict]) -> None:
    """log.jsonl, whole: after a kill it never holds an epoch that the checkpoint does not."""
    lines = "".join(json.dumps(row) + "\n" for row in log)
    data.rewrite(folder / "log.jsonl", lambda file: file.write(lines.encode()))


# ------------------------------------------------------------------------------------------------
# What runs start from
#
# The corpus, the upstreams as they were trained by others, and their layer states. A command may
# ask for many runs (--system all --fold all): they share all of this.
# ------------------------------------------------------------------------------------------------


@dataclass
class Material:
    """The corpus as tensors and callables, shared by all runs of a command."""

    name: str  # of the corpus, as reports print it
    corpus: list[Utterance]
    labels: Tensor  # (N,), -1 where the emotion is none of the four
    raw: dict[str, Sequence]  # by modality: clips (a data.Ragged), texts (a list)
    states: dict[str, data.Ragged]  # by modality: their cached layer states
    upstreams: dict[str, Upstream]
    pristine: dict[str, dict]  # by modality: what fine-tuning opens, before any did
    identity: dict[str, dict]  # by modality: digests of the upstream and of what it is fed
    digest: str  # of all ids, emotions and words


def read_corpus(args: argparse.Namespace) -> tuple[str, list[Utterance]]:
    """(its name in reports, the corpus) of --iemocap, or of the toy, which is written first.

    The name says what the corpus is not: toy, toy-<folder>, <folder>-partial, iemocap-skipped.
    Raises CorpusError with every problem of it.
    """
    root = args.iemocap
    if root is None:
        print(
            "No --iemocap: this is the TOY corpus of tones and made-up words. Its numbers say toy."
        )
        root = data.write_toy("corpora/toy")
    if data.toy_settings(root) is not None:
        name = "toy" if args.iemocap is None else f"toy-{root.resolve().name}"
    else:
        name = root.resolve().name if args.partial else "iemocap"
    name += "-partial" if args.partial else ""
    corpus, problems = data.scan(root)
    bad = bool(problems)
    full = args.iemocap is not None and not args.partial
    problems += data.reference_problems(corpus) if full else []
    if problems and args.skip_bad and corpus:
        print("\n".join(problems))
        print(f"--skip-bad: goes on with {len(corpus)} utterances, and every report says skipped")
        name += "-skipped"
    elif problems:
        hints = ["If this is not meant to be the full release, say --partial."] if full else []
        hints += ["To go on without what is bad, say --skip-bad."] if bad and corpus else []
        raise CorpusError([*problems, f"{len(problems)} problem(s) in {root}", *hints])
    return name, corpus


def folds(args: argparse.Namespace, corpus: list[Utterance]) -> list[int]:
    """The sessions to test on; "all": those that the corpus has."""
    return sorted({u.session for u in corpus} if args.fold == ["all"] else set(map(int, args.fold)))


def prepare(
    args: argparse.Namespace, name: str, corpus: list[Utterance], modalities: list[str], device: str
) -> Material:
    """Load the upstreams, compute the layer states that are not in the cache.

    In cache/<corpus>/ stand clips/ (what WavLM hears), audio-<digest>/ and text-<digest>/ (layer
    states; the digest is of the upstream's name and precision, so several can be tried in turn)
    and, for a dry run, tiny-<digest>/ (upstreams of a few layers).
    """
    cache = Path("cache") / name
    texts = [u.text for u in corpus]

    names = {"audio": "microsoft/wavlm-large", "text": "bert-base-uncased"}  # [A15]: uncased
    toy = data.toy_settings(args.iemocap or Path("corpora/toy")) is not None
    if args.upstream == "tiny" or (args.upstream is None and toy):
        # Tensors this small gain nothing from a second thread; and with one the sums, and all that
        # follows from their rounding, are the same whatever the number of cores.
        torch.set_num_threads(1)
        made = data.digest([texts, torch.__version__, data.code(make_tiny_upstreams)])
        folder = cache / f"tiny-{made}"
        if not folder.exists():  # renamed when complete: a kill leaves no half of it
            part = folder.with_name(folder.name + ".part")
            make_tiny_upstreams(str(part), texts)
            part.rename(folder)
        names = {m: str(folder / m) for m in names}
        name += "" if toy else "-tiny"
    names = {"audio": args.wavlm or names["audio"], "text": args.bert or names["text"]}
    # Their layers and widths are read off the models, so those of any size fit (settings_of).
    upstreams = {
        m: Upstream(names[m], m, args.precision, args.grad_checkpoint).to(device)
        for m in modalities
    }

    raw: dict[str, Sequence] = {"text": texts}
    if "audio" in modalities:
        raw["audio"] = data.cache_clips(cache / "clips", corpus)
    # What states depend on is noted with them, and in the settings of every run that reads them: of
    # other weights, clips or code they are made anew, and a run on them is another run.
    states, identity, code = {}, {}, data.code(Upstream)
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    for m, upstream in upstreams.items():
        fed = data.digest(texts) if m == "text" else raw["audio"].fingerprint
        identity[m] = {"weights": upstream.fingerprint, "inputs": fed, "precision": args.precision,
                       "code": code}  # fmt: skip
        states[m] = data.cache_states(
            cache / f"{m}-{data.digest([names[m], args.precision])}", upstream, raw[m],
            upstream.steps(raw[m]), {**identity[m], "libraries": libraries},
        )  # fmt: skip
        if device == "cuda":
            states[m].move_to_gpu()
    labels = torch.tensor([-1 if u.label is None else u.label for u in corpus])
    # Fine-tuning writes into the upstreams, which the next run of this command wants as they were.
    pristine = {m: copy.deepcopy(u.finetunable().state_dict()) for m, u in upstreams.items()}
    digest = data.digest([[u.id, u.emotion, u.text] for u in corpus])
    return Material(name, corpus, labels, raw, states, upstreams, pristine, identity, digest)


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def share(runs: list[tuple], shard: str) -> list[tuple]:
    """Share "I/N" of the runs (fusion, frozen, fold, seed), in the order given.

    Shares cost about the same: the dearest unit goes to whoever has least to do. A unit is a
    frozen run and its fine-tuned twin, which share their frozen epochs. Shares depend on nothing
    but the runs asked for, so N processes that do not know of each other do all of it, once. Of
    Sys. 17 and 18 on folds 1 and 2, share 1/2 is fold 1 and share 2/2 is fold 2.
    """
    # A batch of 32 clips costs WavLM-Large about six times what its 200 sentences cost BERT-base;
    # a frozen epoch reads the cache, and costs next to nothing.
    price = {"audio": 6, "text": 1}
    finetuned: dict[tuple, bool] = {}  # by unit: whether its fine-tuned run is asked for
    for fusion, frozen, fold, seed in runs:
        unit = fusion, fold, seed
        finetuned[unit] = finetuned.get(unit, False) or not frozen
    cost = {u: 1 + f * sum(price[m] for m in Config(u[0]).modalities) for u, f in finetuned.items()}
    part, parts = map(int, shard.split("/"))
    load, mine = [0] * parts, set()
    for unit in sorted(cost, key=cost.get, reverse=True):
        least = load.index(min(load))
        load[least] += cost[unit]
        if least == part - 1:
            mine.add(unit)
    return [run for run in runs if (run[0], *run[2:]) in mine]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = p.add_argument
    add("--iemocap", type=Path, metavar="DIR", help="the corpus; without it, the toy corpus")
    add("--partial", action="store_true", help="DIR is not the full release: no reference counts")
    add("--skip-bad", action="store_true", help="leave out what is missing or damaged, and say so")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--fusion", choices=list(FUSIONS), default="mmt")
    what.add_argument("--system", nargs="+", metavar="N", help="Table 1's numbers, 1 to 18, or all")
    add("--frozen", action="store_true", help="no fine-tuning: Table 1's odd numbers")
    add("--fold", nargs="+", default=["5"], metavar="K", help="test session, 1 to 5, or all")
    add("--seed", "--seeds", nargs="+", type=int, default=[0], metavar="N",
        help="of weights, order, dropout and development speaker; default 0")  # fmt: skip
    add("--shard", default="1/1", metavar="I/N", help="the I-th of N shares of the runs")
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--upstream", choices=("paper", "tiny"), help="tiny: a few random layers, for a dry run")
    add("--wavlm", metavar="NAME", help="any WavLM, HuBERT or wav2vec 2.0, or its folder")
    add("--bert", metavar="NAME", help="any BERT or RoBERTa, or its folder")
    memory = p.add_argument_group("where memory or time is short; the hyper-parameters stay")
    memory.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="upstreams'")
    memory.add_argument("--grad-checkpoint", action="store_true",
                        help="compute activations twice instead of keeping them")  # fmt: skip
    memory.add_argument("--micro-batch", type=int, default=BATCH, metavar="N",
                        help="a batch of 32 in parts of N, whose gradients add up; other "
                             "draws of dropout")  # fmt: skip
    switches = p.add_argument_group("the other reading of an open point (README)")
    add = switches.add_argument
    add("--context", type=int, default=9, metavar="C", help="utterances; odd; 1: none")
    add("--dropout", type=float, default=0.5, help="between modules")
    add("--condense", choices=("sum", "concat"), default="sum", help="[A1]")
    add("--text-mask", choices=("union", "target"), default="union", help="[A5]")
    add("--cma-residual", action="store_true", help="[A7]")
    add("--reset-patience", action="store_true", help="[A9]")
    add("--select", choices=("last", "best", "test"), default="last",
        help="[A10] the epoch to test; test: to see how that cheats")  # fmt: skip
    args = p.parse_args(arguments)

    everything = [str(n) for n in range(1, 19)]
    args.system = everything if args.system == ["all"] else args.system
    if args.system and not set(args.system) <= set(everything):
        p.error(f"--system {' '.join(args.system)}: expected numbers from 1 to 18, or all")
    if args.system and args.frozen:
        p.error("--frozen: the number of the --system says this already (odd: frozen)")
    if args.fold != ["all"] and not set(args.fold) <= set("12345"):
        p.error(f"--fold {' '.join(args.fold)}: expected numbers from 1 to 5, or all")
    if not all(0 <= seed < 2**63 for seed in args.seed):
        p.error(f"--seed {' '.join(map(str, args.seed))}: expected numbers from 0 to 2^63 - 1")
    shard = [int(n) if n.isdecimal() else 0 for n in args.shard.split("/")]
    if len(shard) != 2 or not 1 <= shard[0] <= shard[1]:
        p.error(f"--shard {args.shard}: expected I/N with I from 1 to N, as in 2/4")
    if args.context < 1 or args.context % 2 == 0:
        p.error(f"--context {args.context}: expected an odd number, as many before as after")
    if not 0 <= args.dropout < 1:
        p.error(f"--dropout {args.dropout}: expected a number from 0 to below 1")
    if not 1 <= args.micro_batch <= BATCH:
        p.error(f"--micro-batch {args.micro_batch}: expected a number from 1 to {BATCH}")
    if args.partial and args.iemocap is None:
        p.error("--partial: say of which folder, with --iemocap DIR")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch finds no CUDA GPU here; leave it out to run on the CPU")
    return args


def settings_of(
    args: argparse.Namespace, material: Material, fusion: str, frozen: bool, fold: int, seed: int
) -> dict:
    """What makes a run this one and no other: nothing else may train into its folder."""
    used = {m: material.upstreams[m] for m in Config(fusion).modalities}
    config = Config(
        fusion, n_context=args.context, dropout=args.dropout, condense=args.condense,
        text_mask=args.text_mask, cma_residual=args.cma_residual,
        **{f"{m}_layers": u.n_layers for m, u in used.items()},
        **{f"{m}_dim": u.dim for m, u in used.items()},
    )  # fmt: skip
    return {
        "corpus": material.name, "frozen": frozen, "fold": fold, "seed": seed, **asdict(config),
        # Constants too: who changes one in this file gets a run of another name, not an old result.
        "lr": [LR_FROZEN, LR_FINETUNE], "weight_decay": WEIGHT_DECAY, "batch": BATCH,
        "triggers": [FINETUNE_AFTER, STOP_AFTER], "reset_patience": args.reset_patience,
        "select": args.select, "precision": args.precision, "wavlm": args.wavlm, "bert": args.bert,
        "utterances": material.digest,
        "upstreams": {m: material.identity[m] for m in used},
    }  # fmt: skip


def means_of(args: argparse.Namespace, material: Material, device: str) -> dict:
    """With what a run is made: noted in config.json, but a run may go on with others."""
    return {
        "folders": {
            m: os.path.abspath(u.name) if os.path.isdir(u.name) else u.name
            for m, u in material.upstreams.items()
        },
        "device": device, "micro_batch": args.micro_batch, "grad_checkpoint": args.grad_checkpoint,
        "torch": torch.__version__, "transformers": transformers.__version__,
        "code": {
            f"{name}.py": data.code(sys.modules[module])
            for name, module in (("model", "model"), ("data", "data"), ("train", __name__))
        },
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device == "cuda"
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name() if cuda else 'the CPU'}")
    torch.backends.cudnn.allow_tf32 = False  # but for [D1] cached states must equal live ones
    systems = [(args.fusion, args.frozen)]
    if args.system:
        table_1 = [(fusion, frozen) for fusion in FUSIONS for frozen in (True, False)]  # Sys. 1-18
        systems = [table_1[n - 1] for n in sorted(set(map(int, args.system)))]

    # What all runs start from. One process at a time: the others find the cache filled.
    with data.exclusive(Path("cache")):
        name, corpus = read_corpus(args)
        runs = itertools.product(systems, folds(args, corpus), dict.fromkeys(args.seed))
        runs = share([(*system, fold, seed) for system, fold, seed in runs], args.shard)
        if args.shard != "1/1":
            print(f"share {args.shard}: {len(runs)} runs")
        for _, _, fold, seed in runs:
            data.split(corpus, fold, seed)  # raises before hours of caching, not after
        modalities = sorted({m for fusion, *_ in runs for m in Config(fusion).modalities})
        material = prepare(args, name, corpus, modalities, device)

    # The runs, one after the other, each in a folder that no other process works in.
    means = means_of(args, material, device)
    for fusion, frozen, fold, seed in runs:
        settings = settings_of(args, material, fusion, frozen, fold, seed)
        folder = args.out / material.name / run_name(fusion, frozen) / f"fold{fold}-seed{seed}"
        with data.exclusive(folder, wait=False):
            train(settings, means, material, folder, device)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's ends as Ctrl-C does
    try:
        main()
    except torch.OutOfMemoryError:
        sys.exit(
            "error: out of GPU memory; with --micro-batch 8 or --grad-checkpoint the same command "
            "goes on; --precision bf16 helps too, but needs a new --out"
        )
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "; what was written is whole: make room, and the same command goes on"
        sys.exit(f"error: {error}{hint if full else ''}")
    except (CorpusError, UpstreamError, RunError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on after the last whole epoch.")
