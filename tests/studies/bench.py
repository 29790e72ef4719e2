"""Measure speed beside another commit.

    python -m tests.studies.bench [--before COMMIT] [--repeats 5]

Each row of the table is the same work with the files in this folder and with those of
the commit, in turns. It has the medians of both, and of the ratios now / before.
Without --before, the commit is the last one, so the table shows what your changes cost.
The commit must have the names that gpu.py uses.

The upstreams are smaller than WavLM-Large and BERT-base, and have random weights. On a
CPU the time is that of the process, on one thread, so that other programs matter
little.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from data import run_command
from tests.studies import gpu
from tests.studies.alternatives import FILES, load, read_files

WORK = ["cache fp32", "frozen epoch from files, 8 threads"]
WORK += ["audio-fc fp32, micro-batch 32", "text-fc fp32, micro-batch 32"]


class SmallStudy(gpu.Study):
    n_turns = 16
    hidden = {"hidden_size": 256, "intermediate_size": 1024}
    layers = {"num_hidden_layers": 4, "num_attention_heads": 4}
    sizes = {"TINY": hidden | layers, "TINY_CNN": {"conv_dim": (128,) * 7}}


def read_commit(commit: str) -> dict[str, str]:
    """Read the texts of the four files of a commit, by name."""
    texts = {}
    for file in FILES:
        show = ["git", "show", f"{commit}:{file}"]
        texts[file] = subprocess.check_output(show, text=True, encoding="utf-8")
    return texts


def measure(texts: dict[str, str]) -> dict[str, float]:
    """Measure the seconds of each kind of work, by name."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(time, "perf_counter", clock),
    ):
        study = SmallStudy(load(texts, "bench"), Path(folder))
        for name in WORK:
            gpu.PARTS[name](study, name)
    return study.figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speed beside a commit.")
    parser.add_argument("--before", default="HEAD", metavar="COMMIT")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    measure(read_files())  # the first time is slower
    pairs = []
    for _ in range(args.repeats):
        pairs.append((measure(read_files()), measure(read_commit(args.before))))
    print(f"torch {torch.__version__}: medians now, {args.before}, and their ratio")
    for name in pairs[0][0]:
        now = [pair[0][name] for pair in pairs]
        before = [pair[1][name] for pair in pairs]
        ratios = [a / b for a, b in zip(now, before, strict=True)]
        medians = [statistics.median(values) for values in (now, before, ratios)]
        print(f"{name:60} {medians[0]:8.4f} {medians[1]:8.4f} {medians[2]:6.2f}")


if __name__ == "__main__":
    run_command(main)
