"""Check on a GPU that the code is right, and measure how fast it is and what it needs.

    python -m tests.studies.gpu [--tiny] [--limit 520]

It needs no corpus and no download. Clips, texts and weights are random, in the sizes of
IEMOCAP, WavLM-Large and BERT-base. All figures come from short runs of train.py: two
epochs with frozen upstreams, and two of fine-tuning. It prints one line per figure, and
rewrites gpu.json after every part. A part that fails prints one line, and the next one
starts. The exit code is 1 if one of the checks failed, or did not run. --tiny tries the
script itself in seconds, on a CPU too.
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
from functools import partial
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
from tests.studies.curves import read_log

CODE = SimpleNamespace(model=model, data=data, train=train)
# A fold's mean: 4/5 of 5,531 utterances, of which one speaker is for development.
N_ROWS = 3872 + 553


class Study:
    """A corpus and two upstreams for runs of train.py, and the figures so far.

    code   the modules to measure. bench.py has others.
    """

    n_turns = 64  # of each of the five dialogues
    longest = 5.0  # seconds
    # As make_tiny_upstreams reads them: nothing differs from WavLM-Large and BERT-base.
    sizes = {"TINY": {}, "TINY_CNN": {}}

    def __init__(self, folder: Path, code: SimpleNamespace = CODE):
        self.figures = {}
        self.folder = folder
        self.code = code
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # Write noise and words, of IEMOCAP's lengths.
        rng = np.random.default_rng(0)
        table = "text,emotion,session,dialog,speaker,wav\n"
        for session, turn in itertools.product(range(1, 6), range(self.n_turns)):
            n_words = np.clip(rng.lognormal(np.log(8), 0.85), 1, 98)
            text = " ".join(f"word{k}" for k in rng.integers(0, 999, int(n_words)))
            seconds = np.clip(rng.lognormal(np.log(3.6), 0.7), 0.6, self.longest)
            samples = rng.integers(-9999, 9999, int(16000 * seconds), dtype="<i2")
            name = f"{session}-{turn}.wav"
            with wave.open(str(folder / name), "wb") as file:
                file.setparams((1, 2, 16000, 0, "NONE", ""))
                file.writeframes(samples.tobytes())
            emotion = data.CLASSES[(turn // 2 + session) % 4]
            speaker = f"{session}{'FM'[turn % 2]}"
            table += f"{text},{emotion},{session},{session},{speaker},{name}\n"
        (folder / "random.csv").write_text(table)
        with mock.patch.multiple(code.model, **self.sizes):
            code.model.make_tiny_upstreams(folder, [table])

    def run(self, flags: str, device: str | None = None, n_commands: int = 1) -> list:
        """Train for four epochs. Returns the log of each system, in order of its name.

        n_commands   5 to interrupt the run after each of its epochs, and start it again
        """
        folder = self.folder
        device = device or self.device
        out = Path(tempfile.mkdtemp(dir=folder))
        fixed = f"--corpus {folder}/random.csv --out {out} --max-epochs 4 "
        fixed += f"--device {device} --cache {folder}/cache-{device} "
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
        return [read_log(path) for path in sorted(out.rglob("log.jsonl"))]

    def add(self, name: str, value: float, unit: str = "") -> None:
        self.figures[name] = float(value)
        print(f"{name}: {value:.4g} {unit}", flush=True)

    def add_epoch(self, name: str, log_entry: dict) -> None:
        """Report the seconds of an epoch, scaled to the size of IEMOCAP."""
        n_rows = 4 * self.n_turns  # of training and development
        self.add(name, log_entry["seconds"] * N_ROWS / n_rows, "s")


class TinyStudy(Study):
    n_turns = 2
    longest = 0.7
    sizes = {"TINY": model.TINY, "TINY_CNN": model.TINY_CNN}


# --- Is it right? ---------------------------------------------------------------------


def check(study: Study, name: str, flags: str = "", more: str = "", **options):
    """Compare the losses of all epochs with and without more flags, or options of run.

    Raises ValueError if they differ by more than rounding.
    """
    flags += " --upstream tiny --batch-size 8 --lr-frozen 1e-2 --lr-finetune 1e-2 "
    losses = []
    # Dropout draws other numbers on another device, and in parts of a batch.
    with mock.patch.object(F, "dropout", lambda x, *_, **__: x):
        for logs in (study.run(flags), study.run(flags + more, **options)):
            entries = itertools.chain(*logs)
            losses.append([(e["train_loss"], e["dev_loss"]) for e in entries])
    difference = np.abs(np.subtract(*losses)).max()
    study.add(f"{name}, difference of the losses", difference)
    # NaN is wrong too.
    if not difference <= 1e-3:
        raise ValueError("WRONG: the losses differ")


# --- How fast is it at full size, and how much memory does it need? -------------------


def fill_cache(study: Study, name: str, precision: str) -> None:
    """Report the seconds to compute the states of one input."""
    seconds = {}
    fill = study.code.data.Source.fill

    def timed_fill(source: data.Source) -> None:
        started = time.perf_counter()
        fill(source)
        elapsed = time.perf_counter() - started
        seconds[source.upstream.modality] = elapsed / len(source.files)

    with mock.patch.object(study.code.data.Source, "fill", timed_fill):
        study.run(f"--frozen --max-epochs 1 --precision {precision}")
    for modality, value in seconds.items():
        study.add(f"{name}, {modality}, per input", value, "s")


def compare_states(study: Study, name: str) -> None:
    """Report how far the states in bf16 are from those in fp32, for eight inputs."""
    for bf16 in study.folder.glob(f"cache-{study.device}/*-bf16-*"):
        fp32 = bf16.with_name(bf16.name.replace("bf16", "fp32"))
        files = [path.name for path in bf16.iterdir()][:8]
        rounded = np.concatenate([np.load(bf16 / file) for file in files])
        exact = np.concatenate([np.load(fp32 / file) for file in files]).astype(float)
        error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
        study.add(f"{name}, {bf16.name.split('-')[0]}", error)


def read_files(study: Study, name: str, n_threads: int) -> None:
    """Report the seconds of a frozen epoch whose states do not fit into memory."""
    pool = ThreadPoolExecutor(n_threads)
    limits = {"GPU_RESERVE": 2**60, "CPU_LIMIT": 0}  # bytes
    patches = limits | {"ThreadPoolExecutor": lambda n: pool}
    with mock.patch.multiple(study.code.data, **patches):
        (log,) = study.run("--frozen --max-epochs 2")
    study.add_epoch(name, log[1])


def measure(study: Study, name: str, flags: str) -> None:
    """Report the seconds of both kinds of epoch, of a step, and the peak memory."""
    (log,) = study.run(flags)
    # The first epoch of each phase is slower.
    study.add_epoch(f"{name}, frozen epoch", log[1])
    study.add_epoch(f"{name}, fine-tuning epoch", log[3])
    step = study.figures[f"{name}, fine-tuning epoch"] * 32 / N_ROWS
    study.add(f"{name}, fine-tuning step on 32 utterances", step, "s")
    if study.device == "cuda":
        peak = torch.cuda.max_memory_reserved() / 2**30
        study.add(f"{name}, peak memory", peak, "GiB")


def project(study: Study, name: str) -> None:
    """Estimate the hours of Table 1: 18 systems on 5 folds."""
    for precision in ("fp32", "bf16"):
        seconds = 0
        for fusion in model.FUSIONS:
            # The upstreams and their states take nearly all of the time.
            modalities = model.Config(fusion).modalities
            like = "mmt" if len(modalities) == 2 else f"{modalities[0]}-fc"
            like = f"{like} {precision}, micro-batch 32"
            # A guess: frozen runs take 30 epochs, and fine-tuned ones 20 + 10.
            seconds += 5 * (30 + 20) * study.figures[f"{like}, frozen epoch"]
            seconds += 5 * 10 * study.figures[f"{like}, fine-tuning epoch"]
        study.add(f"{name} {precision}, without filling the cache", seconds / 3600, "h")


# --- All parts ------------------------------------------------------------------------

CHECKS = {
    # The vanilla block on audio, text without a block, and both cross-modal blocks.
    "against the CPU": partial(check, flags="--system 4 6 18", device="cpu"),
    "micro-batches of 3": partial(check, more="--micro-batch 3"),
    "resumed": partial(check, n_commands=5),
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
    flags = f"--fusion {fusion} --precision {precision} --micro-batch {size}"
    part = partial(measure, flags=flags)
    PARTS[f"{fusion} {precision}, micro-batch {size}"] = part
PARTS["Table 1"] = project


def run_part(study: Study, name: str) -> str:
    """Run a part. Returns "done", or why it failed in one line."""
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
    end = time.perf_counter() + args.limit - 20
    content = {"torch": torch.__version__, "transformers": transformers.__version__}
    content |= {"device": "cpu", "tiny": args.tiny, "parts": {}}
    if torch.cuda.is_available():
        content["device"] = torch.cuda.get_device_name()
    print(content)
    with tempfile.TemporaryDirectory() as folder:
        study = (TinyStudy if args.tiny else Study)(Path(folder))
        content["figures"] = study.figures
        for name in PARTS:
            result = "skipped, no time left"
            if time.perf_counter() < end:
                result = run_part(study, name)
            print(f"{name}: {result}")
            content["parts"][name] = result
            Path("gpu.json").write_text(json.dumps(content, indent=1))
    right = all(content["parts"][name] == "done" for name in CHECKS)
    print(f"right: {right}. All figures are in gpu.json")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
