"""The scripts of the course run, and their numbers are right."""

import codecs
import math
import re

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.course import first_hour, trace

# --- The first hour -------------------------------------------------------------------


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


# --- The trace, again with NumPy and without model.py ---------------------------------


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)


def feature(steps):
    """Fig. 2a of steps (T, 2 layers, 2): gates, s, W s, X."""
    h = max(0, steps.mean((0, 2)).sum() / 4)
    gates = 1 / (1 + np.exp([-h, h]))
    s = np.einsum("l,tld->td", gates, steps)
    projected = np.column_stack([s, s.sum(1)])
    return gates, s, projected, norm(projected)


def cmt(target, source):
    """One path of Fig. 3d whose W_Q, W_K, W_V are 1: scores, weights, out, x, h."""
    scores = target @ source.T / math.sqrt(3)
    weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    x = norm(weights @ source)
    fed = x + np.maximum(0, x) * [0, 0, 1]
    return scores, weights, weights @ source, x, norm(fed)


def read_trace(text):
    """Collect [(title, numbers)]. The numbers start in column 63 of a line."""
    blocks = []
    for line in text.splitlines():
        numbers = [float(x) for x in re.findall(r"-?\d[\d.e-]*", line[63:])]
        if line[:63].strip():
            blocks.append((line[:63], []))
        blocks[-1][1].extend(numbers)
    return blocks


def test_the_trace_is_right(capsys):
    trace.main()
    out = capsys.readouterr().out
    blocks = read_trace(out)

    def check(title, expected, occurrence=0):
        found = [numbers for name, numbers in blocks if title in name][occurrence]
        assert found == pytest.approx(np.ravel(expected).tolist(), abs=1e-3), title

    # Fig. 2a. The squeeze is 2 and 2, so h is 1. The third step is padding.
    gates, s, projected, x_a = feature(np.array([[[1, 3], [0, 2]], [[3, 1], [2, 4]]]))
    check("squeeze", [2, 2])
    check("h = ReLU", 1)
    check("gates = ", gates)
    check("s = gate_1", s)
    check("W s = (s1", projected)
    check("X_A = ", [*x_a, np.zeros(3)])

    # Fig. 2b. The last text has one token less than the others.
    before = feature(np.array([[[1, 1], [0, 2]], [[2, 0], [1, 1]]]))
    target = feature(np.array([[[0, 1], [1, 2]], [[4, 0], [2, 2]]]))
    after = feature(np.array([[[2, 2], [0, 0]]]))
    maps = np.array([before[3], target[3], [*after[3], np.zeros(3)]])
    x_t = maps[0] / 2 + maps[1] + maps[2] / 2
    check("gates of the three", [before[0], target[0], after[0]])
    check("each text through", maps)
    check("X_T = ", x_t)
    assert re.search(r"\[A5\] +\(True True\)", out)

    # Fig. 3d. Padding of the source has a score and no weight.
    pooled = []
    for path, (target, source) in enumerate([(x_t, x_a), (x_a, x_t)]):
        scores, weights, out, x, h = cmt(target, source)
        padding = ((0, 0), (0, 1 - path))
        check("Q K^T", np.pad(scores, padding), path)
        check("softmax over", np.pad(weights, padding), path)
        check("times V", out, path)
        check("x = Norm", x, path)
        check("Norm(x +", h, path)
        check("mean over the target", h.mean(0), path)
        pooled.append(h.mean(0))
    u = np.maximum(0, sum(pooled))
    logits = np.array([*u, -u.sum()])
    check("u = ReLU", u)
    check("logits = ", logits)
    check("softmax: neu", np.exp(logits) / np.exp(logits).sum())
