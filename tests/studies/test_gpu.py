"""The study on the GPU, tried on a CPU at a tiny size, and with planted mistakes."""

import functools
import json
import math
import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import data
import model
import train
from tests.studies import gpu


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    # One system instead of three.
    monkeypatch.setattr(gpu, "CHECKED", gpu.CHECKED.replace("4 6 18", "18"))
    # Loading from a folder takes much of the time of a small run.
    monkeypatch.setattr(
        model, "load_pretrained", functools.cache(model.load_pretrained)
    )


def read_json():
    with open("gpu.json") as file:
        return json.load(file)


def test_every_part_runs_and_leaves_its_figures(capsys, monkeypatch):
    # Smaller micro-batches and fewer threads take the same path.
    parts = {}
    for name, part in gpu.PARTS.items():
        if not name.endswith(("batch 8", "batch 16", "1 thread")):
            parts[name] = part
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.main(["--tiny"]) == 0
    content = read_json()
    assert content["parts"] == dict.fromkeys(parts, "done")
    figures = content["figures"]
    assert all(math.isfinite(value) for value in figures.values())
    # On a CPU, a check compares a computation with itself. Only the order of sums
    # differs in the micro-batches.
    checks = {name: value for name, value in figures.items() if "losses" in name}
    assert len(checks) == 3
    for name, value in checks.items():
        assert (value > 0) == ("micro-batches" in name), name
    assert 0 < figures["states in bf16 against fp32, audio"] < 0.1
    # One line per figure, and one per part.
    out = capsys.readouterr().out
    assert all(f"] {name}: " in out for name in [*figures, *parts])


def broken(study, name):
    raise RuntimeError("CUDA error:\n  no kernel image")


def wrong(study, name):
    # The file has the parts before this one already.
    assert list(read_json()["parts"]) == ["broken"]
    study.wrong.append("a figure")


@pytest.mark.parametrize(
    ("parts", "checks", "code"),
    [
        ([broken], ["broken"], 1),
        # A measurement that fails is no reason for exit code 1. A wrong figure is.
        ([broken], [], 0),
        ([broken, wrong], [], 1),
    ],
)
def test_a_part_that_fails_is_one_line_and_the_next_one_starts(
    parts, checks, code, monkeypatch
):
    monkeypatch.setattr(gpu, "PARTS", {part.__name__: part for part in parts})
    monkeypatch.setattr(gpu, "CHECKS", checks)
    assert gpu.main(["--tiny"]) == code
    line = "failed, RuntimeError: CUDA error: no kernel image"
    assert read_json()["parts"]["broken"] == line


def test_without_time_no_part_starts_and_nothing_is_known_to_be_right():
    assert gpu.main(["--tiny", "--limit", "5"]) == 1
    assert set(read_json()["parts"].values()) == {"skipped, no time left"}


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
    code = SimpleNamespace(model=model, data=data, train=train)
    study = gpu.TinyStudy(code, tmp_path)
    gpu.PARTS[part](study, part)
    assert study.wrong


def test_the_projection_adds_up_table_1():
    study = SimpleNamespace(figures=defaultdict(lambda: 1.0))
    hours = []
    study.add = lambda name, value, unit: hours.append(value)
    gpu.project(study, "Table 1")
    # All clips and texts, and nine fusions on five folds: 30 epochs frozen, 20 + 10 of
    # fine-tuning with (3872 + 553) / 32 steps each.
    seconds = 5531 + 10039 + 9 * 5 * (30 + 20 + 10 * 4425 / 32)
    assert hours == pytest.approx([seconds / 3600] * 2)
