"""The study on the GPU, tried on a CPU at a tiny size, and with planted mistakes."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

import data
import model
from tests.studies import gpu


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bench(tmp_path):
    return gpu.Bench("cpu", True, 500, tmp_path)


def read_json():
    with open("gpu.json") as file:
        return json.load(file)


def test_every_part_runs_and_leaves_its_figures(capsys):
    assert gpu.main(["--tiny"]) == 0
    content = read_json()
    names = [part.__name__ for part in gpu.PARTS]
    assert content["parts"] == dict.fromkeys(names, "done")
    # On a CPU, each check compares a computation with itself. Only the order of sums
    # differs in the micro-batches, and the number of bits in bf16.
    figures = content["figures"]
    checks = [name for name in figures if "against the CPU" in name]
    assert len(checks) == 2 * 9 + 4
    for name in checks:
        assert ("bf16" in name) == (figures[name] > 0), name
    assert 0 < figures["gradient in micro-batches of 3, against 8 at once"] < 1e-5
    assert figures["resumed in both phases, largest difference of a loss"] == 0
    assert len([name for name in figures if name.startswith("fine-tuning step")]) == 10
    assert all(math.isfinite(value) for value in figures.values())
    # One line per figure, and one per part.
    out = capsys.readouterr().out
    assert all(f"] {name}: " in out for name in [*figures, *names])


def broken(bench):
    raise RuntimeError("CUDA error:\n  no kernel image")


def wrong(bench):
    # The file has the parts before this one already.
    assert list(read_json()["parts"]) == ["broken"]
    bench.check("a check that is NaN", float("nan"), 1)


ERROR = "failed, RuntimeError: CUDA error: no kernel image"


@pytest.mark.parametrize(
    ("parts", "checks", "flags", "code", "result"),
    [
        ([broken], [broken], [], 1, ERROR),
        # A measurement that fails is no reason for exit code 1. A wrong figure is.
        ([broken], [], [], 0, ERROR),
        ([broken, wrong], [], [], 1, ERROR),
        # Without time, no part starts, so that nothing is known to be right.
        ([broken], [broken], ["--limit", "5"], 1, "skipped, no time left"),
    ],
)
def test_a_part_that_fails_is_one_line_and_the_next_one_starts(
    parts, checks, flags, code, result, monkeypatch, capsys
):
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "CHECKS", checks)
    assert gpu.main(["--tiny", *flags]) == code
    assert read_json()["parts"]["broken"] == result
    out = capsys.readouterr().out
    assert f"broken: {result}\n" in out
    assert ("WRONG: a check that is NaN" in out) == (wrong in parts)


CALLS = [1.0]


def drifting_mean(x, mask):
    """Compute another mean at every call, as if two devices differed."""
    CALLS.append(CALLS[-1] + 1e-3)
    return x.mean(dim=1) * CALLS[-1]


def mean_of_each_part(logits, labels, reduction):
    return F.nll_loss(logits.log_softmax(dim=1), labels)


@pytest.mark.parametrize(
    ("part", "module", "name", "mistake", "n_wrong"),
    [
        (gpu.nine_fusions, model, "masked_mean", drifting_mean, 18),
        (gpu.micro_batches, F, "cross_entropy", mean_of_each_part, 1),
        (gpu.resume, data.Source, "load_state_dict", lambda self, state: None, 1),
    ],
)
def test_a_planted_mistake_is_wrong(
    part, module, name, mistake, n_wrong, bench, monkeypatch
):
    monkeypatch.setattr(module, name, mistake)
    part(bench)
    assert len(bench.wrong) == n_wrong


def test_the_projection_adds_up_table_1(bench):
    # Frozen epochs of 1, 2 and 4 s, steps of 10, 20 and 40 s, a text in 0 or 1 s.
    for scale, fusion in ((1, "audio-fc"), (2, "text-fc"), (4, "mmt")):
        bench.figures[f"frozen epoch, {fusion}, states on the device"] = scale
        for precision, text in (("fp32", 0), ("bf16", 1)):
            step = f"fine-tuning step, {fusion} {precision}, micro-batch 32"
            bench.figures[step] = 10 * scale
            bench.figures[f"cache, audio {precision}, per input"] = 0
            bench.figures[f"cache, text {precision}, per input"] = text
    gpu.projection(bench)
    # Two fusions of audio, two of text, five of both. Five folds, 30 epochs frozen, 20
    # + 10 of fine-tuning with (3872 + 553) / 32 steps each.
    weight = 2 * 1 + 2 * 2 + 5 * 4
    seconds = 5 * weight * (50 + 10 * 10 * 4425 / 32)
    figures = bench.figures
    assert figures["projection for Table 1, fp32"] == pytest.approx(seconds / 3600)
    hours = (seconds + 10039) / 3600
    assert figures["projection for Table 1, bf16"] == pytest.approx(hours)
