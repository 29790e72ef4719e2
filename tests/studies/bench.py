"""Measure speed beside another commit.

    python -m tests.studies.bench [--before COMMIT] [--n 64] [--repeats 5]

Each row of the table does the same work with the files in this folder and with those of
the commit, in turns, and gives the median of the ratios now / before. Without --before,
the commit is the last one, so the table shows what your changes cost. The commit must
have the names that this script uses.

On a CPU the time is that of the process, on one thread, so that other programs matter
little. On a GPU it is the time until the GPU is done. The states have the sizes of
WavLM-Large (25 x 1024) and BERT-base (13 x 768). Fine-tuning and the cache use smaller
upstreams with random weights.
"""

import argparse
import contextlib
import functools
import itertools
import platform
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


def load_code(commit: str) -> SimpleNamespace:
    """Load model.py and data.py of a commit, or of this folder if the commit is ""."""
    modules = {}
    for name in ("data", "model"):
        text = Path(f"{name}.py").read_text(encoding="utf-8")
        if commit:
            show = ["git", "show", f"{commit}:{name}.py"]
            text = subprocess.run(show, check=True, capture_output=True).stdout
        module = ModuleType(f"{name}_{commit or 'now'}")
        sys.modules[module.__name__] = module  # dataclasses look for it there
        with mock.patch.dict(sys.modules, modules):
            exec(compile(text, f"{commit}:{name}.py", "exec"), vars(module))
        modules[name] = module
    return SimpleNamespace(**modules)


# --- The work -------------------------------------------------------------------------


def make_corpus(n: int) -> list[SimpleNamespace]:
    """Make what the cache and the windows read of utterances: dialogues of 50 turns."""
    corpus = []
    for row in range(n):
        dialog = f"dialog{row // 50}"
        corpus.append(SimpleNamespace(id=f"{dialog}_{row}", dialog=dialog, session=1))
    return corpus


def make_epoch(code, modality: str, source, corpus, n: int, size: tuple) -> Callable:
    """Make a function that trains on n utterances, forward and backward."""
    torch.manual_seed(0)
    sizes = {f"{modality}_layers": size[0], f"{modality}_dim": size[1]}
    config = code.model.Config(fusion=f"{modality}-fc", **sizes)
    head = code.model.EmotionRecognizer(config).to(DEVICE)
    windows = code.data.context_windows(corpus)
    batches = torch.randperm(len(corpus))[:n].split(BATCH)

    def epoch():
        for rows in batches:
            inputs = code.data.batch(rows, windows, {modality: source}, DEVICE)
            labels = torch.zeros(len(rows), dtype=torch.long, device=DEVICE)
            F.cross_entropy(head(**inputs), labels).backward()

    return epoch


def frozen_epoch(
    code, modality: str, n: int, folder: Path, forget: bool = False
) -> Callable:
    """Prepare an epoch of the frozen phase. If it forgets, it reads the files again."""
    # As in IEMOCAP, few of the texts in a batch of windows occur in two of them.
    corpus = make_corpus(n if modality == "audio" else 16 * n)
    inputs = {row: torch.tensor([row]) for row in range(len(corpus))}
    source = code.data.Source(None, inputs, corpus, folder, DEVICE)
    source.keep = True  # as after fill(), which decides it
    # 3 to 5 s of audio, or 3 to 25 word pieces.
    shortest, longest = {"audio": (149, 249), "text": (3, 25)}[modality]
    torch.manual_seed(0)
    for file in source.files.values():
        steps = int(torch.randint(shortest, longest + 1, ()))
        np.save(file, torch.randn(steps, *SIZES[modality]).half().numpy())
    epoch = make_epoch(code, modality, source, corpus, n, SIZES[modality])

    def forgetful_epoch():
        source.kept.clear()
        epoch()

    return forgetful_epoch if forget else epoch


def make_inputs(code, modality: str, n: int, folder: Path):
    """Make a smaller WavLM or BERT, and its inputs: clips of 3 to 5 s, or texts."""
    torch.manual_seed(0)
    words = [f"word{number}" for number in range(200)]
    path = folder / modality
    if not path.exists():
        code.model.make_tiny_upstreams(folder, [" ".join(words)])
        if modality == "audio":
            sizes = code.model.WAVLM_LARGE | SMALL | {"conv_dim": (128,) * 7}
            encoder = transformers.WavLMModel(transformers.WavLMConfig(**sizes))
        else:
            vocabulary = len(transformers.AutoTokenizer.from_pretrained(path))
            config = transformers.BertConfig(vocab_size=vocabulary, **SMALL)
            encoder = transformers.BertModel(config)
        encoder.save_pretrained(path)
    upstream = code.model.Upstream(str(path), modality).to(DEVICE)
    inputs = {}
    for row in range(n):
        raw = " ".join(words[: 1 + 7 * row % 23])
        if modality == "audio":
            raw = torch.randn(48000 + 32000 * row // n)
        inputs[row] = upstream.prepare(raw)
    return upstream, inputs


def finetuning_step(code, modality: str, n: int, folder: Path) -> Callable:
    """Prepare a step, with the bottom of the upstream open."""
    n = min(n, BATCH if CUDA else 8)
    corpus = make_corpus(n if modality == "audio" else 16 * n)
    upstream, inputs = make_inputs(code, modality, len(corpus), folder)
    source = code.data.Source(upstream, inputs, corpus, folder, DEVICE)
    source.open("bottom")
    size = (upstream.n_layers, upstream.dim)
    return make_epoch(code, modality, source, corpus, n, size)


def build_cache(code, modality: str, n: int, folder: Path) -> Callable:
    """Prepare the first computation of all states, into new folders."""
    upstream, inputs = make_inputs(code, modality, n, folder)

    def fill():
        new = Path(tempfile.mkdtemp(dir=folder))
        code.data.Source(upstream, inputs, make_corpus(n), new, DEVICE).fill()

    return fill


WORK = {
    "frozen epoch, states in memory": frozen_epoch,
    "frozen epoch, states from files": functools.partial(frozen_epoch, forget=True),
    "fine-tuning step": finetuning_step,
    "building the cache": build_cache,
}

# --- Measuring ------------------------------------------------------------------------


def seconds(work: Callable) -> float:
    clock = time.perf_counter if CUDA else time.process_time
    start = clock()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return clock() - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speed beside a commit.")
    parser.add_argument("--before", default="HEAD", metavar="COMMIT")
    parser.add_argument("--n", type=int, default=64, help="utterances in an epoch")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    chip = torch.cuda.get_device_name() if CUDA else f"one thread, {platform.machine()}"
    print(
        f"{chip}, torch {torch.__version__}, transformers {transformers.__version__}\n"
        f"{args.n} utterances, before: {args.before}, medians of {args.repeats}\n"
        f"{'':40} {'now':>9} {'before':>9} {'ratio':>6}"
    )
    codes = [load_code(""), load_code(args.before)]
    for (title, prepare), modality in itertools.product(WORK.items(), SIZES):
        pairs = []
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            works = []
            for code in codes:
                work = prepare(code, modality, args.n, Path(folder))
                work()  # the first call fills caches and allocators
                works.append(work)
            for _ in range(args.repeats):
                pairs.append([seconds(work) for work in works])
            del work, works
        now, before = [statistics.median(times) for times in zip(*pairs, strict=True)]
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{title:32} {modality:7} {now:7.3f} s {before:7.3f} s {ratio:6.2f}")


if __name__ == "__main__":
    main()
