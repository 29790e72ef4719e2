"""Measure speed and memory beside an older commit, in one run.

    python -m tests.studies.bench [--before COMMIT] [--n 64] [--repeats 5]

Each row of the table does the same work with the code of now and with the code of the
commit, in turns, and gives the median of the ratios now / before. On a CPU the time is
that of the process, on one thread, so that other programs matter little. On a GPU it is
the time until the GPU is done.

The states have the sizes of WavLM-Large (25 x 1024) and BERT-base (13 x 768).
Fine-tuning and the cache use smaller upstreams with random weights. Peak memory is what
a row needs beside the states that it keeps, in a process of its own (Linux or CUDA).

The older commit needs the functions of 773f506: data.CachedStates, data.live, and
batches of (states, mask, context).
"""

import argparse
import contextlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import torch
import transformers
from torch.nn import functional as F

import data
import model

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BATCH = 32
# (layers, width) of WavLM-Large and of BERT-base.
SIZES = {"audio": (25, 1024), "text": (13, 768)}
SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}


def load_before(commit: str) -> tuple[ModuleType, ModuleType]:
    """Load model.py and data.py of a commit: (model, data)."""
    modules = {}
    # Its model.py imports names from its data.py, so data.py comes first.
    for name in ("data", "model"):
        show = ["git", "show", f"{commit}:{name}.py"]
        code = subprocess.run(show, check=True, capture_output=True).stdout
        module = ModuleType(f"before_{name}")
        sys.modules[module.__name__] = module  # dataclasses look for it there
        with mock.patch.dict(sys.modules, modules):
            exec(compile(code, f"{commit}:{name}.py", "exec"), vars(module))
        modules[name] = module
    return modules["model"], modules["data"]


# --- The frozen phase: states from memory or from files, and the head -----------------


def make_states(modality: str, n: int) -> list[torch.Tensor]:
    """Make random states in 16 bits: 3 to 5 s of audio each, or 3 to 25 word pieces."""
    torch.manual_seed(0)
    shortest, longest = {"audio": (149, 249), "text": (3, 25)}[modality]
    lengths = torch.randint(shortest, longest + 1, (n,)).tolist()
    return [torch.randn(t, *SIZES[modality]).half() for t in lengths]


def make_corpus(n: int) -> list[SimpleNamespace]:
    """Make what the cache and the windows read of utterances: dialogues of 50 turns."""
    corpus = []
    for row in range(n):
        dialog = f"dialog{row // 50}"
        corpus.append(SimpleNamespace(id=f"{dialog}_{row}", dialog=dialog, session=1))
    return corpus


def frozen_epoch(
    modality: str, in_memory: bool, before: tuple, n: int, folder: Path
) -> list[Callable]:
    """Prepare an epoch of n utterances forward and backward: [now, before]."""
    # As in IEMOCAP, few of the texts in a batch of windows occur in two of them.
    corpus = make_corpus(n if modality == "audio" else 16 * n)
    states = make_states(modality, len(corpus))
    windows = data.context_windows(corpus)
    torch.manual_seed(1)
    batches = torch.randperm(len(corpus))[:n].split(BATCH)

    inputs = {row: torch.tensor([row]) for row in range(len(corpus))}
    source = data.Source(None, inputs, corpus, folder, DEVICE)
    cached = before[1].CachedStates(list(source.files.values()), DEVICE)
    if in_memory:
        cached.kept = [x.to(DEVICE) for x in states]
        source.kept = dict(enumerate(cached.kept))
    else:
        for file, x in zip(source.files.values(), states, strict=True):
            np.save(file, x.numpy())
        del states
        source.kept = Forgetful()

    work = []
    for (code, data_code), one in zip(
        [(model, data), before], [source, cached], strict=True
    ):
        head = make_head(code, modality, *SIZES[modality])
        arguments = (windows, {modality: one}, DEVICE)
        work.append(make_epoch(head, data_code, batches, arguments))
    return work


class Forgetful(dict):
    """A dict that keeps nothing, so that every epoch reads the files."""

    def __setitem__(self, key, value):
        pass


def make_head(code: ModuleType, modality: str, layers: int, width: int):
    torch.manual_seed(0)
    sizes = {f"{modality}_layers": layers, f"{modality}_dim": width}
    config = code.Config(fusion=f"{modality}-fc", **sizes)
    return code.EmotionRecognizer(config).to(DEVICE)


def make_epoch(head, data_code, batches, arguments, optimizer=None) -> Callable:
    """Make a function that runs an epoch, and steps if there is an optimizer."""

    def epoch():
        for rows in batches:
            head.zero_grad()
            if optimizer:
                optimizer.zero_grad()
            logits = head(**data_code.batch(rows, *arguments))
            labels = torch.zeros(len(rows), dtype=torch.long, device=DEVICE)
            F.cross_entropy(logits, labels).backward()
            if optimizer:
                optimizer.step()

    return epoch


# --- Fine-tuning and the cache: upstreams with random weights -------------------------


def make_upstreams(modality: str, before: tuple, folder: Path) -> list:
    """Write a smaller WavLM or BERT, and load it with both codes: [now, before]."""
    torch.manual_seed(0)
    words = [f"word{number}" for number in range(200)]
    model.make_tiny_upstreams(folder, [" ".join(words)])
    path = folder / modality
    if modality == "audio":
        sizes = model.WAVLM_LARGE | SMALL | {"conv_dim": (128,) * 7}
        encoder = transformers.WavLMModel(transformers.WavLMConfig(**sizes))
    else:
        vocabulary = len(transformers.AutoTokenizer.from_pretrained(path))
        config = transformers.BertConfig(vocab_size=vocabulary, **SMALL)
        encoder = transformers.BertModel(config)
    encoder.save_pretrained(path)
    codes = [model, before[0]]
    return [code.Upstream(str(path), modality).to(DEVICE) for code in codes]


def make_raw(modality: str, n: int) -> list:
    """Make clips of 3 to 5 s, or texts of 1 to 23 words."""
    torch.manual_seed(0)
    raw = []
    for number in range(n):
        if modality == "audio":
            raw.append(torch.randn(48000 + 32000 * number // n))
        else:
            words = range(1 + number * 7 % 23)
            raw.append(" ".join(f"word{number * word % 200}" for word in words))
    return raw


def finetuning_step(
    modality: str, before: tuple, n: int, folder: Path
) -> list[Callable]:
    """Prepare a step, with the bottom of the upstream open: [now, before]."""
    size = min(n, BATCH if CUDA else 8)
    corpus = make_corpus(size if modality == "audio" else 16 * size)
    raw = make_raw(modality, len(corpus))
    now, old = make_upstreams(modality, before, folder)
    inputs = {row: now.prepare(one) for row, one in enumerate(raw)}
    source = data.Source(now, inputs, corpus, folder, DEVICE)
    opened = [source.open("bottom"), list(old.open("bottom").values())]
    sources = [source, before[1].live(old, raw)]
    windows = data.context_windows(corpus)
    torch.manual_seed(1)
    batches = [torch.randperm(len(corpus))[:size]]

    work = []
    for number, (code, data_code) in enumerate([(model, data), before]):
        head = make_head(code, modality, now.n_layers, now.dim)
        parameters = [*head.parameters(), *opened[number]]
        arguments = (windows, {modality: sources[number]}, DEVICE)
        optimizer = torch.optim.AdamW(parameters, 1e-5)
        work.append(make_epoch(head, data_code, batches, arguments, optimizer))
    return work


def build_cache(modality: str, before: tuple, n: int, folder: Path) -> list[Callable]:
    """Prepare the first computation of all states, into new folders: [now, before]."""
    corpus = make_corpus(n)
    raw = make_raw(modality, n)
    now, old = make_upstreams(modality, before, folder)

    def fill():
        new_folder = Path(tempfile.mkdtemp(dir=folder))
        inputs = {row: now.prepare(one) for row, one in enumerate(raw)}
        data.Source(now, inputs, corpus, new_folder, DEVICE).fill()

    def fill_before():
        new_folder = Path(tempfile.mkdtemp(dir=folder))
        before[1].cache_states(new_folder, old, corpus, raw, DEVICE)

    return [fill, fill_before]


# --- Measuring ------------------------------------------------------------------------


def prepare(row: int, before: tuple, n: int, folder: Path) -> tuple[str, list]:
    """Prepare a row of the table: its title, and the work as [now, before]."""
    modality = ("audio", "text")[row % 2]
    kind = row // 2
    if kind == 0:
        work = frozen_epoch(modality, True, before, n, folder)
        return f"frozen epoch, {modality}, states in memory", work
    if kind == 1:
        work = frozen_epoch(modality, False, before, n, folder)
        return f"frozen epoch, {modality}, states from files", work
    if kind == 2:
        work = finetuning_step(modality, before, n, folder)
        return f"fine-tuning step, {modality}", work
    return f"building the cache, {modality}", build_cache(modality, before, n, folder)


ROWS = 8


def seconds(work: Callable) -> float:
    clock = time.perf_counter if CUDA else time.process_time
    start = clock()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return clock() - start


def peak(work: Callable) -> float:
    """Measure the peak memory of some work beside what is in memory already, in MiB."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - start) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    start = read_status("VmRSS")
    work()
    return read_status("VmHWM") - start


def read_status(field: str) -> float:
    """Read a field of this process's memory on Linux, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) / 1024


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speed and memory beside a commit.")
    parser.add_argument("--before", default="773f506", metavar="COMMIT")
    parser.add_argument("--n", type=int, default=64, help="utterances in an epoch")
    parser.add_argument("--repeats", type=int, default=5)
    # For the processes that measure memory: a row of the table, and 0 now or 1 before.
    parser.add_argument("--peak", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    before = load_before(args.before)
    if args.peak:
        row, side = args.peak
        with tempfile.TemporaryDirectory() as folder:
            _, work = prepare(row, before, args.n, Path(folder))
            print(f"peak {peak(work[side])}")
        return

    chip = torch.cuda.get_device_name() if CUDA else f"one thread, {platform.machine()}"
    print(
        f"{chip}, torch {torch.__version__}, transformers {transformers.__version__}\n"
        f"{args.n} utterances, before: {args.before}, medians of {args.repeats}\n"
        f"{'':40} {'now':>9} {'before':>9} {'ratio':>6}   peak memory"
    )
    for row in range(ROWS):
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(None):
                title, (now, old) = prepare(row, before, args.n, Path(folder))
                # The first call fills caches and allocators.
                now()
                old()
                pairs = [(seconds(now), seconds(old)) for _ in range(args.repeats)]
        times_now, times_old = zip(*pairs, strict=True)
        ratios = [a / b for a, b in pairs]
        del now, old
        memory = []
        for side in ("0", "1"):
            command = [sys.executable, "-m", __spec__.name, "--before", args.before]
            command += ["--n", str(args.n), "--peak", str(row), side]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            memory.append(float(done.stdout.split("peak ")[1]))
        print(
            f"{title:40} {statistics.median(times_now):7.3f} s "
            f"{statistics.median(times_old):7.3f} s {statistics.median(ratios):6.2f}   "
            f"{memory[0]:.0f} MiB, {memory[1]:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
