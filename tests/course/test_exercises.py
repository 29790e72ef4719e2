"""The nine exercises: the check of each, and the checks themselves.

    python -m pytest -m ex3      the check of EXERCISE 3

Each exercise has a right answer here in another style than that of the code. A wrong one
differs in one place, as people's answers do. The check must turn it away with the question
that fits, and accept every right one.
"""

import inspect
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import data
import model
from tests.course.checks import EXERCISES, compare, verdict


@pytest.mark.parametrize(
    "n", [pytest.param(n, marks=getattr(pytest.mark, f"ex{n}")) for n in EXERCISES]
)
def test_exercise(n):
    question = verdict(*EXERCISES[n])
    if question != "passed":
        # Without the traceback, which would give half of the answer away.
        pytest.fail(question, pytrace=False)


def changed(answer, *changes):
    """Return the function with its source changed: pairs of old and new text."""
    source = inspect.getsource(answer)
    for old, new in changes:
        assert source.count(old) == 1, f"{old} occurs {source.count(old)} times"
        source = source.replace(old, new)
    namespace = dict(globals())
    exec(source, namespace)
    return namespace[answer.__name__]


# --- EXERCISE 1: masked_mean(x, mask) -------------------------------------------------


def answer_1(x, mask):
    count = mask.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask[..., None], x, 0.0).sum(1) / count


first_steps = "torch.arange(x.shape[1]) < mask.sum(1, keepdim=True)"
WRONG_1 = [
    ("nothing is returned", ("return ", "")),
    ("padding count", ("torch.where(mask[..., None], x, 0.0)", "x")),
    ("all T steps", ("/ count", "/ x.shape[1]")),
    ("of the whole batch", ("/ count", "/ mask.sum()")),
    ("one more than", ("/ count", "/ (count + 1)")),
    ("is it 0 / 0", (".clamp(min=1)", "")),
    ("each needs its own count", ("min=1", "min=0 if mask.any() else 1")),
    ("0 . NaN", ("torch.where(mask[..., None], x, 0.0)", "(x * mask[..., None])")),
    (
        "x itself has changed",
        ("torch.where(mask[..., None], x, 0.0)", "x.masked_fill_(~mask[..., None], 0)"),
    ),
    ("is hidden", (" x, 0.0", " x.nan_to_num(), 0.0")),
    ("need not be the first", ("    count", f"    mask = {first_steps}\n    count")),
    ("no gradient", (" x, 0.0", " x.detach(), 0.0")),
]


# --- EXERCISE 2: cross_modal_attention(x_t, x_s, w_q, w_k, w_v, mask_s) ---------------


def answer_2(x_t, x_s, w_q, w_k, w_v, mask_s):
    real = mask_s[:, None]
    q, k = x_t @ w_q, x_s @ w_k
    scores = torch.einsum("btk,bsk->bts", q, k) / w_k.shape[1] ** 0.5
    weights = torch.where(real, scores, -1e30).softmax(-1)
    weights = torch.where(real, weights, 0.0)
    return weights @ x_s @ w_v, weights


unsafe = (
    ".exp()\n    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)"
)
first_steps = "(torch.arange(x_s.shape[1]) < mask_s.sum(1, keepdim=True))"
WRONG_2 = [
    ("over the queries", (".softmax(-1)", ".softmax(1)")),
    ("is sqrt.d_k. missing", (" / w_k.shape[1] ** 0.5", "")),
    ("root of d_t or d_v", ("w_k.shape[1]", "w_q.shape[0]")),
    ("root of d_s or T_s", ("w_k.shape[1]", "w_k.shape[0]")),
    ("Eq. .1. has its root", (" ** 0.5", "")),
    ("where is mask_s", ("mask_s[:, None]", "(mask_s | True)[:, None]")),
    ("masked after the softmax", ("torch.where(real, scores, -1e30)", "scores")),
    ("needs an axis", ("mask_s[:, None]", "mask_s")),
    ("not reshaped", ('einsum("btk,bsk->bts", q, k)', "matmul(q, k.view(-1, 4, 2))")),
    ("NaN, or weights on padding", ("torch.where(real, weights, 0.0)", "weights")),
    ("its gradient is NaN", ("-1e30).softmax(-1)", "-torch.inf).softmax(-1)")),
    ("its own mask", ("torch.where(real, weights, 0.0)", "weights * mask_s.any()")),
    ("subtracts the highest", (".softmax(-1)", unsafe)),
    ("is the padding's lower", ("-1e30", "-100.0")),
    ("any finite number", ("where(real, scores, -1e30)", "add(scores, -1e4 * ~real)")),
    ("need not be the first", ("mask_s[:, None]", f"{first_steps}[:, None]")),
    ("weights detached", ("softmax(-1)", "softmax(-1).detach()")),
]


# --- EXERCISE 3: SqueezeExcitation.forward(self, states, mask) ------------------------


def answer_3(self, states, mask):
    z = []
    for steps in states.split(mask.sum(1).tolist()):
        z.append(steps.mean(-1).sum(0) / max(len(steps), 1))
    hidden = self.reduce(torch.stack(z)).relu()
    return self.expand(hidden).sigmoid()


WRONG_3 = [
    ("where is the sigmoid", (".sigmoid()", "")),
    ("a softmax", (".sigmoid()", ".softmax(-1)")),
    ("divided by T", ("max(len(steps), 1)", "mask.shape[1]")),
    ("sum over the features", ("steps.mean(-1)", "steps.sum(-1)")),
    ("where is the ReLU", (".relu()", "")),
    ("depend on the other", ("stack(z)", "stack(z).mean(0).expand(len(z), -1)")),
    (
        "excite once",
        ("steps.mean(-1)", "self.reduce(steps.mean(-1)).relu()"),
        ("self.reduce(torch.stack(z)).relu()", "torch.stack(z)"),
    ),
    ("a sum over time", (" / max(len(steps), 1)", "")),
    (
        "b_1 missing",
        ("self.reduce(torch.stack(z))", "F.linear(torch.stack(z), self.reduce.weight)"),
    ),
    (
        "steps are whose",
        ("mask.sum(1).tolist()", "mask.sum(1).flip(0).tolist()"),
        ("stack(z)", "stack(z[::-1])"),
    ),
    ("no gradient", ("stack(z)", "stack(z).detach()")),
    ("an utterance without a real step", ("max(len(steps), 1)", "len(steps)")),
    (
        "no utterance has",
        ("    z = []", "    z = []\n    states = states / mask.any()"),
    ),
]


# --- EXERCISE 4: TextFeatureExtractor.forward(self, states, mask) ---------------------


def answer_4(self, states, mask):
    x = self.each_text(states, mask.flatten(0, 1))
    x = self.conv(x.reshape(*mask.shape, -1))[:, 0]
    return x, mask.any(1)


WRONG_4 = [
    ("the shape is", ("[:, 0]", "")),
    ("texts are the channels", ("*mask.shape, -1)", "*mask.shape, -1).flip(1)")),
    ("share their gates", ("mask.flatten(0, 1)", "mask.flatten(1)")),
    ("the target's mask alone", ("mask.any(1)", "mask[:, mask.shape[1] // 2]")),
    ("instead of .any.", ("mask.any(1)", "mask.all(1)")),
    ("a mask is bool", ("mask.any(1)", "mask.any(1).float()")),
    ("nothing behind it", ("[:, 0]", "[:, 0].relu()")),
    (
        "the whole Conv2d",
        ("self.conv(", "(lambda x: F.conv2d(x, self.conv.weight, padding=1))("),
    ),
    ("the shape is", ("[:, 0]", "[0]")),
    (
        "steps belong to which",
        ("mask.flatten(0, 1)", "mask.transpose(0, 1).flatten(0, 1)"),
    ),
]


# --- EXERCISE 5: TransformerBlock.forward(self, x_t, x_s, mask_s) ---------------------


def answer_5(self, x_t, x_s, mask_s):
    x = self.attend(x_t, x_s, mask_s)[0]
    x = F.dropout(x, 0.1, self.training)
    x = self.norm1(x_t + x if self.residual else x)
    x = x + self.dropout(self.feed_forward(x))
    return self.norm2(x)


def norm_first(self, x_t, x_s, mask_s):
    x = x_t + self.attend(self.norm1(x_t), self.norm1(x_s), mask_s)[0]
    return x + self.feed_forward(self.norm2(x))


all_real = "torch.ones(x_t.shape[:2], dtype=torch.bool)"
WRONG_5 = [
    ("for training alone", ("self.training", "True")),
    ("as long as the target", ("x_t, x_s, mask_s)[0]", f"x_s, x_t, {all_real})[0]")),
    ("do the queries come through", ("x_t + x if self.residual else x", "x_t + x")),
    ("switches the first add", ("x = x + self", "x = x * self.residual + self")),
    ("norm2 after the feed", ("self.norm2", "self.norm1")),
    ("what is added is the target", ("if self.residual", "if x_t is x_s")),
    ("does mask_s reach", ("x_s, mask_s)[0]", "x_s, mask_s | True)[0]")),
    (
        "nothing about the target",
        (
            "    return",
            "    if x_t.shape == x_s.shape:\n        x = x * mask_s[..., None]\n    return",
        ),
    ),
    ("where is the dropout", ("self.training", "False"), ("self.dropout(", "(")),
    ("each of the two", ("self.training", "False")),
    ("each of the two", ("self.dropout(self.feed_forward(x))", "self.feed_forward(x)")),
    ("each of the two", ("x + self.dropout(", "self.dropout(x + ")),
    ("dropout of this block is 0.1", (" 0.1,", " 0.5,")),
]


# --- EXERCISE 6: unweighted_accuracy(y_true, y_pred) ----------------------------------


def answer_6(y_true, y_pred):
    truth = np.asarray(y_true)
    guess = np.asarray(y_pred)
    recalls = []
    for c in np.unique(truth):
        correct = np.sum((truth == c) & (guess == c))
        recalls.append(correct / max(1, np.sum(truth == c)))
    return float(np.mean(recalls))


WRONG_6 = [
    ("NaN", ("np.unique(truth)", "range(4)"), ("max(1, ", "(")),
    ("that is WA", ("np.mean(recalls)", "np.mean(truth == guess)")),
    ("mean precision", ("np.sum(truth == c)", "np.sum(guess == c)")),
    ("count as 0", ("np.unique(truth)", "range(4)")),
    ("only predicted", ("np.unique(truth)", "{*truth, *guess}")),
    ("a percentage", ("float(", "100 * float(")),
    ("tensors do not", ("np.unique(truth)", "set(y_true)")),
    ("return a float", ("float(", "torch.tensor(")),
]


# --- EXERCISE 7: split(corpus, fold, seed) --------------------------------------------


def answer_7(corpus, fold, seed):
    draw = random.Random(f"{seed}-{fold}")
    four = [k for k, u in enumerate(corpus) if u.label is not None]
    test = [k for k in four if corpus[k].session == fold]
    rest = [k for k in four if corpus[k].session != fold]
    speakers = sorted({corpus[k].speaker for k in rest})
    if not test or len(speakers) < 2:
        raise data.InputError("too few")
    speaker = draw.choice(speakers)
    dev = [k for k in rest if corpus[k].speaker == speaker]
    return [k for k in rest if k not in dev], dev, test


WRONG_7 = [
    ("rows of the corpus", ("dev, test", "dev, [corpus[k] for k in test]")),
    ("only the four classes", (" if u.label is not None", "")),
    (
        "the test session: that is",
        ("speaker for k in rest", "speaker for k in four"),
        ("dev = [k for k in rest", "dev = [k for k in four"),
    ),
    ("nothing to develop on: is", ("speaker for k in rest", "speaker for k in four")),
    ("of one speaker", ("corpus[k].speaker == speaker]", "draw.random() < 0.3]")),
    ("left in training", (" if k not in dev", "")),
    ("does the seed draw", ('f"{seed}-{fold}"', "fold")),
    ("does the fold draw", ('f"{seed}-{fold}"', "seed")),
    ("is the seed a factor", ('f"{seed}-{fold}"', "seed * fold")),
    ("differs in every process", ('f"{seed}-{fold}"', 'hash(f"{seed}-{fold}")')),
    ("a set has another order", ("sorted(", "list(")),
    (
        "global random numbers",
        ('random.Random(f"{seed}-{fold}")', "random"),
        ("    speaker =", '    random.seed(f"{seed}-{fold}")\n    speaker ='),
    ),
    ("out of reach", ("(speakers)\n", "(speakers[1:])\n")),
    (
        "a speaker without an utterance",
        (
            "{corpus[k].speaker for k in rest}",
            "{u.speaker for u in corpus if u.session != fold}",
        ),
    ),
    ("test is empty, and", ("not test or ", "")),
    ("train is empty, and", ("< 2", "< 1")),
    ("not IndexError", ("len(speakers) < 2", "len(speakers) == 1")),
    ("not the id", ("dev = [k for k in rest if corpus[k].speaker == speaker]", "pass")),
]


# --- EXERCISE 8: Patience.step(self, dev_loss) ----------------------------------------


def answer_8(self, dev_loss):
    self.since_best = 0 if dev_loss < self.best else self.since_best + 1
    self.best = min(self.best, dev_loss)
    if self.since_best == self.stop_after:
        return "stop"
    if self.finetuning or self.since_best != self.finetune_after:
        return "continue"
    self.finetuning = True
    return "finetune"


WRONG_8 = [
    ("is an equal loss lower", ("dev_loss < self.best", "dev_loss <= self.best")),
    ("a second trigger", ("self.finetuning or ", "")),
    ("two counters", ("finetuning = True", "finetuning, self.since_best = True, 0")),
    ("has no fine-tuning", ("!= self.finetune_after", "!= (self.finetune_after or 5)")),
    ("is None for a frozen", ("!= self.finetune_after", "< self.finetune_after")),
    ("than the epoch before", ("min(self.best, dev_loss)", "dev_loss")),
    ("too early or too late", ("self.since_best !=", "self.since_best - 1 !=")),
    ("names no tolerance", ("dev_loss < self.best", "dev_loss < self.best - 1e-4")),
    ("answers 'continue' when", ("== self.stop_after", "> self.stop_after")),
    (
        "both are due",
        ("== self.stop_after:", "== self.stop_after != self.finetune_after:"),
    ),
    (
        "the phase",
        ("self.finetuning or", 'hasattr(self, "fired") or'),
        ("self.finetuning =", "self.fired ="),
    ),
]


# --- EXERCISE 9: gather(source, rows, device) -----------------------------------------


def answer_9(source, rows, device):
    flat = rows.flatten().tolist()
    states = source([row for row in flat if row >= 0])
    lengths = [len(x) for x in states]
    mask = torch.zeros(len(flat), max(lengths), dtype=torch.bool)
    remaining = iter(lengths)
    for k, row in enumerate(flat):
        if row >= 0:
            mask[k, : next(remaining)] = True
    return torch.cat(states).to(device), mask.unflatten(0, rows.shape).to(device)


WRONG_9 = [
    ("what does tolist", ("[row for row in flat if row >= 0]", "rows[rows >= 0]")),
    ("row -1 means none", (" if row >= 0]", "]")),
    ("itself has changed", ("    states =", "    rows.clamp_(min=0)\n    states =")),
    ("called 2 times", ("[len(x) for x in states]", "[len(x) for x in source([row for row in flat if row >= 0])]")),
    ("all, one after another", ("torch.cat(states)", "nn.utils.rnn.pad_sequence(states)")),
    ("in this order", ("source([row for row in flat if row >= 0])", "source(sorted(row for row in flat if row >= 0))")),
    ("comes twice", ("source([row for row in flat if row >= 0])", "source(list(dict.fromkeys(row for row in flat if row >= 0)))"), ("next(remaining)", "next(remaining, 0)")),
    ("the longest of the batch", ("max(lengths)", "max(lengths) + 1")),
    ("a mask is bool", ("torch.bool", "torch.long")),
    ("no real step, and", ("        if row >= 0:\n            mask[k, : next(remaining)]", "        mask[k, : next(remaining) if row >= 0 else 1]")),
    ("may have any shape", ("mask.unflatten(0, rows.shape)", "mask.view(*rows.shape[:2], -1)")),
    ("no gradient", ("torch.cat(states)", "torch.cat(states).detach()")),
    ("the model casts", ("torch.cat(states)", "torch.cat(states).float()")),
    ("where is .device", ("torch.cat(states).to(device)", "torch.cat(states)")),
    ("where is .device", ("rows.shape).to(device)", "rows.shape)")),
]  # fmt: skip


# --- All of them ----------------------------------------------------------------------

CASES = []
for n in EXERCISES:
    for question, *changes in globals()[f"WRONG_{n}"]:
        CASES.append((n, question, changes))


@pytest.mark.parametrize("n, question, changes", CASES)
def test_wrong_answer_is_turned_away_with_the_question_that_fits(n, question, changes):
    check, _ = EXERCISES[n]
    with pytest.raises(AssertionError, match=question):
        check(changed(globals()[f"answer_{n}"], *changes))
