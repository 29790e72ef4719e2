"""The scripts of the course run, and their numbers are right."""

import codecs
import re

import pytest
import torch

from tests.conftest import ROOT
from tests.course import first_hour, trace


def test_the_first_hour_has_the_numbers_of_the_whole_model(monkeypatch, capsys):
    tensors = {}

    def keep(name, x, meaning):
        tensors[name] = x.detach().clone()

    monkeypatch.setattr(first_hour, "show", keep)
    first_hour.main()
    lengths = tensors["text_mask"].sum(dim=2).tolist()
    assert lengths == [[0, 5, 2], [5, 2, 3], [2, 3, 0]]
    # The pieces give what the whole model gives.
    torch.testing.assert_close(tensors["in one call"], tensors["logits"])
    torch.testing.assert_close(tensors["by hand"], tensors["loss"])
    assert tensors["loss after"] < tensors["loss"]
    assert tensors["step"].abs().tolist() == pytest.approx([1e-3] * 3, rel=0.01)
    # The answers name the number of weights without a gradient.
    zeros = re.search(r"\d+ of \d+ weights", capsys.readouterr().out)[0]
    answers = (ROOT / "tests/course/answers.rot13").read_text(encoding="utf-8")
    assert zeros in codecs.decode(answers, "rot13")


def test_the_trace_has_the_numbers_of_a_pencil(capsys):
    trace.main()
    lines = capsys.readouterr().out.splitlines()
    for equation, numbers in [
        # The layers have the means 2 and 2, so h = 1, and sigmoid(1) = 1 / (1 + 1/e).
        ("gates = sigmoid(h), sigmoid(-h)", "(0.731 0.269)"),
        # 0.731 (1 3) + 0.269 (0 2), and W appends the sum.
        ("s = gate_1 x_1 + gate_2 x_2", "(0.731 2.731)"),
        ("W s = (s1, s2, s1 + s2)", "(0.731 2.731 3.462)"),
        # The mean is 2.308, and sqrt((1.577² + 0.423² + 1.154²) / 3) = 1.154.
        ("X_A = (W s - mean) / sd (divide by 3); padding: 0", "(-1.366 0.366 1)"),
        # (-1.262 0.078 1.184) / 2 + (-1.375 0.402 0.973) + (-0.707 -0.707 1.414) / 2
        ("X_T = before / 2 + target + after / 2", "(-2.36 0.088 2.272)"),
        # (2.36 * 1.366 + 0.088 * 0.366 + 2.272) / sqrt(3). Padding has no weight.
        ("Q K^T / sqrt(3), where Q and K are the features", "(3.191 2.048 0)"),
        ("softmax over the source's real steps", "(0.758 0.242 0)"),
        # 0.758 (-1.366 0.366 1) + 0.242 (-0.259 -1.074 1.334)
        ("times V", "(-1.099 0.018 1.08)"),
        ("x = Norm(that), without a residual [A7]", "(-1.235 0.02 1.214)"),
        # Norm of (-1.235 0.02 2.428), and its mean with the second token's.
        ("Norm(x + (0, 0, ReLU(x3)))", "(-1.079 -0.253 1.331)"),
        ("mean over the target's real steps", "(-0.791 -0.573 1.364)"),
        # 1.364 + 1.372. The other sums are negative.
        ("u = ReLU(p1 + p4, p2 + p5, p3 + p6)", "(0 0 2.735)"),
        ("softmax: neu, hap, ang, sad", "(0.057 0.057 0.882 0.004)"),
    ]:
        line = next(line for line in lines if equation in line)
        assert line.endswith(f" {numbers}"), equation
