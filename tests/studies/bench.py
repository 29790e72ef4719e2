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
import subprocess
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from data import run_command
from evaluate import format_table
from tests.studies import gpu
from tests.studies.alternatives import FILES, load, read_files

WORK = ["cache fp32", "frozen epoch from files, 8 threads"]
WORK += ["audio-fc fp32, micro-batch 32", "text-fc fp32, micro-batch 32"]


class SmallStudy(gpu.Study):
    n_turns = 16
    hidden = {"hidden_size": 256, "intermediate_size": 1024}
    layers = {"num_hidden_layers": 4, "num_attention_heads": 4}
    sizes = {"TINY": hidden | layers, "TINY_CNN": {"conv_dim": (128,) * 7}}


def measure(texts: dict[str, str]) -> dict[str, float]:
    """Measure the seconds of each kind of work, with the texts of the four files."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(time, "perf_counter", clock),
    ):
        study = SmallStudy(Path(folder), load(texts, "bench"))
        for name in WORK:
            gpu.PARTS[name](study, name)
    return study.figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speed beside a commit.")
    parser.add_argument("--before", default="HEAD", metavar="COMMIT")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    texts_now = read_files()
    texts_before = {}
    for file in FILES:
        show = ["git", "show", f"{args.before}:{file}"]
        texts_before[file] = subprocess.check_output(show, encoding="utf-8")
    torch.set_num_threads(1)
    names = list(measure(texts_now))  # the first time is slower
    seconds = []
    for _ in range(args.repeats):
        pair = (measure(texts_now), measure(texts_before))
        seconds.append([list(figures.values()) for figures in pair])
    now, before = np.median(seconds, axis=0)  # seconds is (repeats, 2, work)
    ratios = np.median(np.divide(*np.swapaxes(seconds, 0, 1)), axis=0)
    table = [["", "now", args.before, "now / before"]]
    for name, *row in zip(names, now, before, ratios, strict=True):
        table.append([name, *[f"{value:.4f}" for value in row]])
    print(format_table(f"Medians in s, torch {torch.__version__}", table))


if __name__ == "__main__":
    run_command(main)
