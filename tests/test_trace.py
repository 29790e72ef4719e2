"""The trace's numbers again, from the first line to the last, without torch and without model.py."""

import math
import re
import runpy

import pytest

from conftest import ROOT


def norm(v):
    mean = sum(v) / len(v)
    sd = math.sqrt(sum((a - mean) ** 2 for a in v) / len(v))
    return [(a - mean) / sd for a in v]


def softmax(v):
    return [math.exp(a) / sum(math.exp(b) for b in v) for a in v]


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows)]


def feature(steps):
    """Fig. 2a of the real steps ((x1, x2), (x1, x2)), one pair a layer -> (gates, s, W s, X)."""
    z = [sum(sum(step[layer]) for step in steps) / (2 * len(steps)) for layer in (0, 1)]
    h = max(0, sum(z) / 4)
    gates = [1 / (1 + math.exp(-h)), 1 / (1 + math.exp(h))]
    s = [[gates[0] * a + gates[1] * b for a, b in zip(*step)] for step in steps]
    projected = [[*v, sum(v)] for v in s]
    return gates, s, projected, [norm(v) for v in projected]


def cmt(target, source):
    """One path of Fig. 3d whose W_Q, W_K, W_V are 1 -> (scores, weights, out, x, h)."""
    scores = [[sum(map(math.prod, zip(t, s))) / math.sqrt(3) for s in source] for t in target]
    weights = [softmax(row) for row in scores]
    out = [[sum(w * s[i] for w, s in zip(row, source)) for i in range(3)] for row in weights]
    x = [norm(v) for v in out]
    return scores, weights, out, x, [norm([a, b, c + max(0, c)]) for a, b, c in x]


def test_the_trace_is_right_by_hand(capsys):
    runpy.run_path(str(ROOT / "tests" / "trace.py"))["trace"]()
    lines = capsys.readouterr().out.splitlines()

    def printed(title, n, occurrence=0):
        """Read the vectors of n lines, from the line with this title on. Column 63 starts them."""
        at = [k for k, line in enumerate(lines) if title in line][occurrence]
        found = [re.findall(r"\(([^()]*)\)", line[63:]) for line in lines[at : at + n]]
        return [[float(v) for v in vector.split()] for row in found for vector in row]

    def near(rows):
        return [pytest.approx(row, abs=1e-3) for row in rows]

    # Fig. 2a. The squeeze is 2 and 2, so h is 1.
    gates, s, projected, x_a = feature([((1, 3), (0, 2)), ((3, 1), (2, 4))])
    assert printed("squeeze", 1) == [[2, 2]] and printed("h = ReLU", 1) == [[1]]
    assert printed("gates = ", 1) == near([gates])
    assert printed("s = gate_1", 2) == near(s)
    assert printed("W s = (s1", 2) == near(projected)
    assert printed("X_A = ", 3) == near([*x_a, [0, 0, 0]])  # the padded frame

    # Fig. 2b.
    texts = [[((1, 1), (0, 2)), ((2, 0), (1, 1))], [((0, 1), (1, 2)), ((4, 0), (2, 2))], [((2, 2), (0, 0))]]
    texts = [feature(steps) for steps in texts]
    assert printed("gates of the three", 3) == near([gates for gates, *_ in texts])
    before, target, after = (x for *_, x in texts)
    after.append([0, 0, 0])  # the padded token
    assert printed("each text through", 3) == near([*before, *target, *after])
    x_t = [[a / 2 + b + c / 2 for a, b, c in zip(*rows)] for rows in zip(before, target, after)]
    assert printed("X_T = ", 2) == near(x_t)
    assert "(True True)" in next(line for line in lines if "[A5]" in line)

    # Fig. 3d. The padded frame gives no key. As a target it is computed, and pooling skips it.
    pooled = []
    for path, (q, k) in enumerate(((x_t, x_a), (x_a, x_t))):
        scores, weights, out, x, h = cmt(q, k)
        padding = [0] if path == 0 else []
        assert printed("Q K^T", 2, path) == near([row + padding for row in scores])
        assert printed("softmax over", 2, path) == near([row + padding for row in weights])
        assert printed("times V", 2, path) == near(out)
        assert printed("x = Norm", 2, path) == near(x)
        assert printed("Norm(x +", 2, path) == near(h)
        pooled.append(mean(h))
        assert printed("mean over the target", 1, path) == near([pooled[-1]])

    # The classifier.
    u = [max(0, a + b) for a, b in zip(*pooled)]
    logits = [*u, -sum(u)]
    assert printed("u = ReLU", 1) == near([u])
    assert printed("logits = ", 1) == near([logits])
    assert printed("softmax: neu", 1) == near([softmax(logits)])
