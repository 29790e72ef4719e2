"""The study on the GPU, tried on a CPU at a tiny size, and with planted mistakes."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

import data
import model
from tests.studies import gpu


@pytest.fixture
def bench(tmp_path):
    args = gpu.argparse.Namespace(device="cpu", tiny=True, limit=500)
    return gpu.Bench(args, tmp_path)


def test_every_part_runs_and_leaves_its_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert gpu.main(["--tiny", "--device", "cpu"]) == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    names = [part.__name__ for part in gpu.PARTS]
    assert content["parts"] == dict.fromkeys(names, "done")
    assert content["wrong"] == [] and content["tiny"] and content["device"] == "cpu"
    # On a CPU, each check compares a computation with itself. Only the order of sums
    # differs in the micro-batches, and the number of bits in bf16.
    figures = content["figures"]
    checks = [name for name in figures if "against the CPU" in name]
    assert len(checks) == 2 * 9 + 4
    for name in checks:
        assert ("bf16" in name) == (figures[name] > 0), name
    assert 0 < figures["gradient in micro-batches of 3, against 8 at once"] < 1e-5
    for phase in ("frozen", "fine-tuning"):
        assert (
            figures[f"resumed in the {phase} phase, largest difference of a loss"] == 0
        )
    steps = [name for name in figures if name.startswith("fine-tuning step")]
    assert len(steps) == 10
    assert all(math.isfinite(value) for value in figures.values())
    # One line per figure, and one per part.
    out = capsys.readouterr().out
    assert all(f"] {name}: " in out for name in [*figures, *names])
    assert "device cpu" in out.splitlines()[0] and "right on cpu: True" in out
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_a_failing_part_is_one_line_and_the_next_part_starts(
    tmp_path, capsys, monkeypatch
):
    seen = []

    def broken(bench):
        raise RuntimeError("CUDA error:\n  no kernel image")

    def next_part(bench):
        # The file has the parts before this one already.
        seen.append(json.loads((tmp_path / "x.json").read_text())["parts"])
        bench.check("a check that is NaN", float("nan"), 1)

    command = ["--tiny", "--device", "cpu", "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(gpu, "CHECKS", [broken])
    monkeypatch.setattr(gpu, "PARTS", [broken, next_part])
    assert gpu.main(command) == 1
    error = "failed, RuntimeError: CUDA error: no kernel image"
    assert seen == [{"broken": error}]
    out = capsys.readouterr().out
    assert f"broken: {error}\n" in out and "WRONG" in out and "Traceback" not in out
    # A measurement that fails is no reason for exit code 1. A wrong figure is.
    monkeypatch.setattr(gpu, "CHECKS", [])
    monkeypatch.setattr(gpu, "PARTS", [broken])
    assert gpu.main(command) == 0
    monkeypatch.setattr(gpu, "PARTS", [next_part])
    assert gpu.main(command) == 1
    # Without time, no part starts, so that nothing is known to be right.
    monkeypatch.setattr(gpu, "CHECKS", [broken])
    monkeypatch.setattr(gpu, "PARTS", [broken])
    assert gpu.main([*command, "--limit", "5"]) == 1
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["parts"] == {"broken": "skipped, no time left"}


def test_planted_mistakes_are_wrong(bench, monkeypatch):
    # A mean that is another one at every call, so that two devices differ.
    with monkeypatch.context() as patch:
        calls = []

        def masked_mean(x, mask):
            calls.append(1)
            return x.mean(dim=1) * (1 + 1e-3 * len(calls))

        patch.setattr(model, "masked_mean", masked_mean)
        gpu.nine_fusions(bench)
    assert len(bench.wrong) == 18
    bench.wrong.clear()

    # The mean of each part in place of the sum over the batch.
    with monkeypatch.context() as patch:
        mean = F.cross_entropy
        patch.setattr(F, "cross_entropy", lambda x, y, reduction: mean(x, y))
        gpu.micro_batches(bench)
    assert bench.wrong == ["gradient in micro-batches of 3, against 8 at once"]
    bench.wrong.clear()

    # A resumed run that loses what fine-tuning has changed in the upstreams.
    with monkeypatch.context() as patch:
        patch.setattr(data.Source, "load_state_dict", lambda self, state: None)
        gpu.resume(bench)
    names = "resumed in the fine-tuning phase, largest difference of a loss"
    assert bench.wrong == [names]


def test_the_projection_adds_up_table_1(bench):
    # Frozen epochs of 1 and 2 and 4 s, steps of 10, 20 and 40 s, the cache for free.
    for number, fusion in enumerate(("audio-fc", "text-fc", "mmt")):
        frozen = f"frozen epoch, {fusion}, states on the device"
        bench.figures[frozen] = 2.0**number
        for precision in ("fp32", "bf16"):
            step = f"fine-tuning step, {fusion} {precision}, micro-batch 32"
            bench.figures[step] = 10 * 2.0**number
    for name in ("audio fp32", "audio bf16", "text fp32", "text bf16"):
        bench.figures[f"cache, {name}, per input"] = 1.0 if name == "text bf16" else 0.0
    gpu.projection(bench)
    # Two fusions of audio, two of text, five of both. Five folds, 30 epochs frozen, 20
    # + 10 of fine-tuning with (3872 + 553) / 32 steps each.
    weight = 2 * 1 + 2 * 2 + 5 * 4
    seconds = 5 * weight * (50 + 10 * 10 * 4425 / 32)
    figures = bench.figures
    assert figures["projection for Table 1, fp32"] == pytest.approx(seconds / 3600)
    hours = (seconds + 10039) / 3600
    assert figures["projection for Table 1, bf16"] == pytest.approx(hours)


def test_relative_is_the_norm_of_the_difference():
    ours, other = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])
    assert gpu.relative(ours, other) == pytest.approx(3 / 4)
