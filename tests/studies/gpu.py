"""Check on a GPU that the code is right, and measure how fast it is and what it needs.

    python -m tests.studies.gpu [--tiny] [--limit 520]

It needs no corpus and no download. Clips, texts and weights are random, in the sizes of
IEMOCAP, WavLM-Large and BERT-base. All figures come from short runs of train.py: two
epochs with frozen upstreams, and two of fine-tuning. It prints one line per figure, and
rewrites gpu.json after every part. A part that fails prints one line, and the next one
starts. The exit code is 1 if one of the checks failed, did not run, or printed WRONG.
--tiny tries the script itself in seconds, on a CPU too.
"""

import argparse
import contextlib
import gc
import itertools
import json
import sys
import tempfile
import time
import wave
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import transformers
from torch.nn import functional as F

import data
import model
import train

# A fold's mean: 4/5 of 5,531 utterances, of which one speaker is for development.
N_ROWS = 3872 + 553
# All inputs of the cache. The texts are at most this many.
N_INPUTS = {"audio": 5531, "text": 10039}


class Study:
    """A corpus and two upstreams for runs of train.py, and the figures so far."""

    n_turns = 64  # of each of the five dialogues
    longest = 5.0  # seconds
    # As make_tiny_upstreams reads them: nothing differs from WavLM-Large and BERT-base.
    sizes = {"TINY": {}, "TINY_CNN": {}}

    def __init__(self, code: SimpleNamespace, folder: Path):
        self.started = time.perf_counter()
        self.stdout = sys.stdout
        self.figures = {}
        self.wrong = []
        self.code = code
        self.folder = folder
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.n_rows = 4 * self.n_turns  # of training and development
        texts = self.write_corpus()
        with mock.patch.multiple(code.model, **self.sizes):
            code.model.make_tiny_upstreams(folder, texts)

    def write_corpus(self) -> list[str]:
        """Write noise and words, of IEMOCAP's lengths. Returns the texts."""
        rng = np.random.default_rng(0)
        table = "text,emotion,session,dialog,speaker,wav\n"
        texts = []
        for session, turn in itertools.product(range(1, 6), range(self.n_turns)):
            n_words = np.clip(rng.lognormal(np.log(8), 0.85), 1, 98)
            text = " ".join(f"word{k}" for k in rng.integers(0, 999, int(n_words)))
            seconds = np.clip(rng.lognormal(np.log(3.6), 0.7), 0.6, self.longest)
            samples = rng.integers(-9999, 9999, int(16000 * seconds), dtype="<i2")
            name = f"{session}-{turn}.wav"
            with wave.open(str(self.folder / name), "wb") as file:
                file.setparams((1, 2, 16000, 0, "NONE", ""))
                file.writeframes(samples.tobytes())
            emotion = data.CLASSES[(turn // 2 + session) % 4]
            speaker = f"{session}{'FM'[turn % 2]}"
            table += f"{text},{emotion},{session},{session},{speaker},{name}\n"
            texts.append(text)
        (self.folder / "random.csv").write_text(table)
        return texts

    def run(self, flags: str, device: str | None = None, n_commands: int = 1) -> dict:
        """Train for four epochs. Returns the logs by fusion.

        n_commands   5 to interrupt the run after each of its epochs, and start it again
        """
        folder = self.folder
        device = device or self.device
        out = Path(tempfile.mkdtemp(dir=folder))
        fixed = f"--corpus {folder}/random.csv --out {out} --max-epochs 4 "
        fixed += f"--device {device} --cache {folder}/cache-{device} "
        if "tiny" not in flags:
            fixed += f"--wavlm {folder}/audio --bert {folder}/text "

        def step(patience: train.Patience, dev_loss: float) -> str:
            """Start fine-tuning after two epochs, whatever the losses are."""
            patience.since_best += 1
            due = patience.finetune_after and patience.since_best == 2
            return "finetune" if due else "continue"

        interruption = KeyboardInterrupt if n_commands > 1 else None
        with (
            mock.patch.object(self.code.train.Patience, "step", step),
            mock.patch.object(self.code.train, "print_epoch", side_effect=interruption),
            contextlib.redirect_stdout(None),
        ):
            for _ in range(n_commands):
                with contextlib.suppress(KeyboardInterrupt):
                    self.code.train.main((fixed + flags).split())
        logs = {}
        for path in out.rglob("log.jsonl"):
            config = json.loads(path.with_name("config.json").read_text())
            lines = path.read_text().splitlines()
            logs[config["fusion"]] = [json.loads(line) for line in lines]
        return logs

    @cached_property
    def reference(self) -> dict:
        """The logs that all checks compare theirs with."""
        return self.run(CHECKED)

    def say(self, text: str) -> None:
        seconds = time.perf_counter() - self.started
        print(f"[{seconds:5.1f} s] {text}", file=self.stdout, flush=True)

    def add(self, name: str, value: float, unit: str = "") -> None:
        self.figures[name] = float(value)
        self.say(f"{name}: {value:.4g} {unit}")


class TinyStudy(Study):
    n_turns = 2
    longest = 0.7
    sizes = {"TINY": model.TINY, "TINY_CNN": model.TINY_CNN}


# --- Is it right? ---------------------------------------------------------------------

LIMIT = 1e-3
# The vanilla block on audio, text without a block, and both cross-modal blocks.
CHECKED = "--upstream tiny --system 4 6 18 --batch-size 8 --lr-frozen 1e-2 "
CHECKED += "--lr-finetune 1e-2"


def check(study: Study, name: str, flags: str = "", **options) -> None:
    """Compare the losses of all epochs with those of the reference."""
    # Dropout draws other numbers on another device, and in parts of a batch.
    with mock.patch.object(F, "dropout", lambda x, *_, **__: x):
        reference = study.reference
        logs = study.run(f"{CHECKED} {flags}", **options)
    for fusion, log in logs.items():
        losses = []
        for rows in (log, reference[fusion]):
            losses.append([(row["train_loss"], row["dev_loss"]) for row in rows])
        difference = np.abs(np.subtract(*losses)).max()
        figure = f"{name}, {fusion}, difference of the losses"
        study.add(figure, difference, f"(at most {LIMIT})")
        # NaN is wrong too.
        if not difference <= LIMIT:
            study.wrong.append(figure)
            study.say(f"WRONG: {figure}")


# --- How fast is it at full size, and how much memory does it need? -------------------


def fill_cache(study: Study, name: str, precision: str) -> None:
    """Report the seconds to compute the states of one input."""
    source_class = study.code.data.Source
    fill = source_class.fill

    def timed_fill(source: data.Source) -> None:
        started = time.perf_counter()
        fill(source)
        seconds = (time.perf_counter() - started) / len(source.files)
        study.add(f"{name}, {source.upstream.modality}, per input", seconds, "s")

    with mock.patch.object(source_class, "fill", timed_fill):
        study.run(f"--frozen --max-epochs 1 --precision {precision}")


def compare_states(study: Study, name: str) -> None:
    """Report how far the states in bf16 are from those in fp32, for eight inputs."""
    for bf16 in study.folder.glob(f"cache-{study.device}/*-bf16-*"):
        fp32 = bf16.with_name(bf16.name.replace("bf16", "fp32"))
        files = [path.name for path in bf16.iterdir()][:8]
        rounded = np.concatenate([np.load(bf16 / file) for file in files])
        exact = np.concatenate([np.load(fp32 / file) for file in files]).astype(float)
        error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
        study.add(f"{name}, {bf16.name.split('-')[0]}", error)


def measure(study: Study, name: str, fusion: str, precision: str, size: int) -> None:
    """Report the seconds of an epoch and of a fine-tuning step, and the peak memory."""
    flags = f"--fusion {fusion} --precision {precision} --micro-batch {size}"
    (log,) = study.run(flags).values()
    # The first epoch of each phase is slower.
    frozen = log[1]["seconds"] * N_ROWS / study.n_rows
    study.add(f"{name}, frozen epoch", frozen, "s")
    step = log[3]["seconds"] * 32 / study.n_rows
    study.add(f"{name}, fine-tuning step", step, "s")
    if study.device == "cuda":
        peak = torch.cuda.max_memory_reserved() / 2**30
        study.add(f"{name}, peak memory", peak, "GiB")


def read_files(study: Study, name: str, n_threads: int) -> None:
    """Report the seconds of a frozen epoch whose states do not fit into memory."""
    pool = ThreadPoolExecutor(n_threads)
    limits = {"GPU_RESERVE": 2**60, "CPU_LIMIT": 0}  # bytes
    patches = {**limits, "ThreadPoolExecutor": lambda n: pool}
    with mock.patch.multiple(study.code.data, **patches):
        (log,) = study.run("--frozen --max-epochs 2").values()
    study.add(name, log[1]["seconds"] * N_ROWS / study.n_rows, "s")


def project(study: Study, name: str) -> None:
    """Estimate the hours of Table 1."""
    figures = study.figures
    for precision in ("fp32", "bf16"):
        seconds = 0
        for modality, n in N_INPUTS.items():
            seconds += n * figures[f"cache {precision}, {modality}, per input"]
        for fusion in model.FUSIONS:
            # The upstreams and their states take nearly all of the time.
            modalities = model.Config(fusion).modalities
            like = "mmt" if len(modalities) == 2 else f"{modalities[0]}-fc"
            like = f"{like} {precision}, micro-batch 32"
            frozen = figures[f"{like}, frozen epoch"]
            finetuning = figures[f"{like}, fine-tuning step"] * N_ROWS / 32
            # Five folds. A guess: frozen runs take 30 epochs, fine-tuned ones 20 + 10.
            seconds += 5 * ((30 + 20) * frozen + 10 * finetuning)
        study.add(f"{name}, {precision}", seconds / 3600, "h")


# --- All parts ------------------------------------------------------------------------

CHECKS = {
    "against the CPU": partial(check, device="cpu"),
    "micro-batches of 3": partial(check, flags="--system 18 --micro-batch 3"),
    "resumed": partial(check, flags="--system 18", n_commands=5),
}
PARTS = CHECKS | {
    "cache fp32": partial(fill_cache, precision="fp32"),
    "cache bf16": partial(fill_cache, precision="bf16"),
    "states in bf16 against fp32": compare_states,
    "frozen epoch from files, 1 thread": partial(read_files, n_threads=1),
    "frozen epoch from files, 8 threads": partial(read_files, n_threads=8),
}
SIZES = [("mmt", 32), ("audio-fc", 32), ("text-fc", 32), ("mmt", 16), ("mmt", 8)]
for (fusion, size), precision in itertools.product(SIZES, ("fp32", "bf16")):
    part = partial(measure, fusion=fusion, precision=precision, size=size)
    PARTS[f"{fusion} {precision}, micro-batch {size}"] = part
PARTS["Table 1"] = project


def run_part(study: Study, name: str, limit: float) -> str:
    """Run a part. Returns "done", or why not in one line."""
    if time.perf_counter() - study.started > limit:
        return "skipped, no time left"
    try:
        PARTS[name](study, name)
    except Exception as problem:
        words = " ".join(str(problem).split())
        return f"failed, {type(problem).__name__}: {words:.200}"
    finally:
        if study.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return "done"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Is it right and how fast on a GPU?")
    parser.add_argument("--tiny", action="store_true", help="try the script itself")
    limit_help = "seconds: no part starts in the last 20"
    parser.add_argument("--limit", type=float, default=520, help=limit_help)
    args = parser.parse_args(arguments)
    content = {"torch": torch.__version__, "transformers": transformers.__version__}
    content |= {"device": "cpu", "tiny": args.tiny, "parts": {}}
    if torch.cuda.is_available():
        content["device"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        kind = TinyStudy if args.tiny else Study
        study = kind(SimpleNamespace(model=model, data=data, train=train), Path(folder))
        study.say(f"{content}")
        for name in PARTS:
            result = run_part(study, name, args.limit - 20)
            study.say(f"{name}: {result}")
            content["parts"][name] = result
            content |= {"figures": study.figures, "wrong": study.wrong}
            Path("gpu.json").write_text(json.dumps(content, indent=1))
    right = not study.wrong and all(content["parts"][name] == "done" for name in CHECKS)
    study.say(f"right: {right}. All figures are in gpu.json")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
