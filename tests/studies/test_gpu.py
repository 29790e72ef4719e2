"""The study on the GPU, tried on a CPU at a tiny size, and with planted mistakes."""

import functools
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import data
import model
from tests.studies import bench, gpu


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    # Loading from a folder takes much of the time of a small run.
    monkeypatch.setattr(
        model, "load_pretrained", functools.cache(model.load_pretrained)
    )


def read_json():
    return json.loads(Path("gpu.json").read_text())


def test_every_part_runs_and_leaves_its_figures(monkeypatch):
    # Other sizes take the same path as these.
    parts = {name: gpu.PARTS[name] for name in [*gpu.PARTS][:9]}
    assert list(parts)[-1] == "mmt fp32, micro-batch 32"
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.main(["--tiny"]) == 0
    content = read_json()
    assert content["parts"] == dict.fromkeys(parts, "done")
    figures = content["figures"]
    assert all(math.isfinite(value) for value in figures.values())
    # On a CPU, a check compares a computation with itself. Only the order of sums
    # differs in the micro-batches.
    checks = {name: value for name, value in figures.items() if "losses" in name}
    assert len(checks) == len(gpu.CHECKS)
    for name, value in checks.items():
        assert (value > 0) == ("micro-batches" in name), name
    assert 0 < figures["states in bf16 against fp32, audio"] < 0.1


def test_a_part_that_fails_is_one_line_and_the_next_one_starts(monkeypatch):
    line = "failed, RuntimeError: CUDA error: no kernel image"

    def broken(study, name):
        raise RuntimeError("CUDA error:\n  no kernel image")

    def good(study, name):
        # The file has the parts before this one already.
        assert read_json()["parts"] == {"broken": line}
        study.add("a figure", 3)

    monkeypatch.setattr(gpu, "PARTS", {"broken": broken, "good": good})
    # A measurement that fails is no reason for exit code 1.
    for check, code in (("broken", 1), ("good", 0)):
        monkeypatch.setattr(gpu, "CHECKS", [check])
        assert gpu.main(["--tiny"]) == code
        content = read_json()
        assert content["parts"] == {"broken": line, "good": "done"}
        assert content["figures"] == {"a figure": 3}


def test_without_time_no_part_starts_and_nothing_is_known_to_be_right():
    assert gpu.main(["--tiny", "--limit", "5"]) == 1
    assert set(read_json()["parts"].values()) == {"skipped, no time left"}


def test_the_bench_has_parts_of_this_script():
    assert set(bench.WORK) <= set(gpu.PARTS)


def test_the_hours_of_table_1():
    figures = {}
    for like in ("mmt", "audio-fc", "text-fc"):
        for precision in ("fp32", "bf16"):
            name = f"{like} {precision}, micro-batch 32"
            figures[f"{name}, frozen epoch"] = 36  # seconds
            figures[f"{name}, fine-tuning epoch"] = 72
    hours = []

    def add(name, value, unit):
        hours.append(value)

    gpu.project(SimpleNamespace(figures=figures, add=add), "Table 1")
    # 90 runs: 45 of 30 frozen epochs, and 45 of 20 frozen ones and 10 of fine-tuning
    assert hours == [(45 * 50 * 36 + 45 * 10 * 72) / 3600] * 2


def noisy_mean(x, mask):
    """Compute another mean at every call, as if two devices differed."""
    return x.mean(dim=1) * random.random()


def mean_of_each_part(logits, labels, reduction):
    return F.nll_loss(logits.log_softmax(dim=1), labels)


@pytest.mark.parametrize(
    ("part", "module", "name", "mistake"),
    [
        ("against the CPU", model, "masked_mean", noisy_mean),
        ("micro-batches of 3", F, "cross_entropy", mean_of_each_part),
        ("resumed", data.Source, "load_state_dict", lambda self, state: None),
    ],
)
def test_a_planted_mistake_is_wrong(part, module, name, mistake, tmp_path, monkeypatch):
    monkeypatch.setattr(module, name, mistake)
    line = gpu.run_part(gpu.TinyStudy(tmp_path), part)
    assert line == "failed, ValueError: WRONG: the losses differ"
