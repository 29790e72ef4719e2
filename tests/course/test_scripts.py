"""The scripts of the course run, and their numbers are right."""

import codecs
import re

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.course import first_hour, trace


def test_the_first_hour_shows_every_tensor_and_its_loss_is_right(monkeypatch, capsys):
    tensors = {}
    show = first_hour.show

    def keep(name, x, meaning):
        tensors[name] = x.detach().clone()
        show(name, x, meaning)

    monkeypatch.setattr(first_hour, "show", keep)
    first_hour.main()
    shapes = {name: list(x.shape) for name, x in tensors.items()}
    assert shapes["audio"] == [6 + 4 + 5, 3, 8]
    assert shapes["text"] == [7 + 10 + 5, 3, 8]
    assert shapes["weights"] == [3, 5, 6]
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


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def test_each_line_of_the_trace_follows_from_the_lines_above_it(capsys):
    trace.main()
    lines = []  # (equation, rows of numbers), which start in column 63
    for line in capsys.readouterr().out.splitlines():
        if line[10:63].strip():
            lines.append((line[10:62].strip(), []))
        rows = re.findall(r"\((.+?)\)", line[62:])
        lines[-1][1].extend([float(x) for x in row.split()] for row in rows)

    def check(equation, expected):
        """Compare the next line with this equation. Returns its numbers."""
        name, rows = next((name, rows) for name, rows in lines if equation in name)
        np.testing.assert_allclose(rows, expected, atol=6e-3, err_msg=name)
        del lines[: lines.index((name, rows)) + 1]
        return np.array(rows)

    def first(equation):
        return np.array(next(rows for name, rows in lines if equation in name))

    # Fig. 2a. Each layer has a mean of 2, so h is 1. The third step is padding.
    frames = first("WavLM's states").reshape(2, 2, 2)  # (T, L, D)
    check("squeeze", [frames.mean((0, 2))])
    check("h = ReLU", [[(2 + 2) / 4]])
    gates = check("gates = ", [[1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))]])
    s = check("s = gate_1", np.einsum("l,tld->td", gates[0], frames))
    projected = check("W s = (s1", np.column_stack([s, s.sum(1)]))
    x_a = check("X_A = ", [*norm(projected), [0, 0, 0]])

    # Fig. 2b. The squeezes of the three texts are 1 and 1, 1.25 and 1.75, 2 and 0.
    h = np.array([2, 3, 2]) / 4
    check("gates of the three", 1 / (1 + np.exp([-h, h])).T)
    before, target, after = first("each text through").reshape(3, 2, 3)
    x_t = check("X_T = ", before / 2 + target + after / 2)

    # Fig. 3d. Padding of the source has a score and no weight.
    pooled = []
    for target, source, n in [(x_t, x_a, 2), (x_a[:2], x_t, 2)]:
        scores = check("Q K^T", target @ source.T / 3**0.5)
        padding = [[0] * (len(source) - n)] * len(scores)
        weights = check("softmax", np.hstack([softmax(scores[:, :n]), padding]))
        x = check("x = Norm", norm(check("times V", weights @ source)))
        h = check("Norm(x +", norm(x + np.maximum(0, x) * [0, 0, 1]))
        pooled.append(check("mean over the target", [h.mean(0)]))
    (u,) = check("u = ReLU", np.maximum(0, sum(pooled)))
    logits = check("logits = ", [[*u, -u.sum()]])
    check("softmax: neu", softmax(logits))
