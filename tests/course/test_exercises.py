"""The check of each exercise, and tests of these checks.

    python -m pytest -m ex3      the check of EXERCISE 3

Below, each exercise has a right answer in another style than that of the code. Each
wrong answer differs from it in one place, as people's answers do. A check must turn it
away with the question that fits, and must accept every right answer.
"""

import inspect
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn  # noqa: F401, for changed answers
from torch.nn import functional as F

import data
from tests.course.checks import EXERCISES, compare, verdict


@pytest.mark.parametrize(
    "n", [pytest.param(n, marks=getattr(pytest.mark, f"ex{n}")) for n in EXERCISES]
)
def test_exercise(n):
    question = verdict(*EXERCISES[n])
    if question != "passed":
        # Without the traceback, which gives half of the answer away.
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


SUM = "torch.where(mask[..., None], x, 0.0)"
FIRST_ONES = "torch.arange(x.shape[1]) < mask.sum(1, keepdim=True)"
WRONG_1 = [
    ("nothing is returned", ("return ", "")),
    ("padding count", (SUM, "x")),
    ("all T steps", ("/ count", "/ x.shape[1]")),
    ("of the whole batch", ("/ count", "/ mask.sum()")),
    ("one more than", ("/ count", "/ (count + 1)")),
    ("0 . NaN", (SUM, "(x * mask[..., None])")),
    ("is it 0 / 0", (".clamp(min=1)", "")),
    ("x itself has changed", (SUM, "x.masked_fill_(~mask[..., None], 0)")),
    ("each needs its own count", ("min=1", "min=0 if mask.any() else 1")),
    ("is hidden", (" x, 0.0", " x.nan_to_num(), 0.0")),
    ("need not be the first", ("    count", f"    mask = {FIRST_ONES}\n    count")),
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


MASKED = "torch.where(real, scores, -1e30)"
FIRST_ONES = "(torch.arange(x_s.shape[1]) < mask_s.sum(1, keepdim=True))[:, None]"
UNSAFE = (
    ".exp()\n    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)"
)
WRONG_2 = [
    ("over the queries", (".softmax(-1)", ".softmax(1)")),
    ("is sqrt.d_k. missing", (" / w_k.shape[1] ** 0.5", "")),
    ("root of d_t or d_v", ("w_k.shape[1]", "w_q.shape[0]")),
    ("root of d_s or T_s", ("w_k.shape[1]", "w_k.shape[0]")),
    ("Eq. .1. has its root", (" ** 0.5", "")),
    ("where is mask_s", ("mask_s[:, None]", "(mask_s | True)[:, None]")),
    ("masked after the softmax", (MASKED, "scores")),
    ("not reshaped", ('einsum("btk,bsk->bts", q, k)', "matmul(q, k.view_as(k.mT))")),
    ("NaN, or weights on padding", ("torch.where(real, weights, 0.0)", "weights")),
    (
        "its gradient is NaN",
        (MASKED, "(scores + real.log())"),
        ("real, weights,", "real, weights.nan_to_num(),"),
    ),
    ("its own mask_s", ("torch.where(real, weights, 0.0)", "weights * mask_s.any()")),
    ("queries are an axis", ("mask_s[:, None]", "mask_s")),
    ("subtracts the highest", (".softmax(-1)", UNSAFE)),
    ("is the padding's lower", ("-1e30", "-100.0")),
    ("any finite number", (MASKED, "(scores - 1e4 * ~real)")),
    ("need not be the first", ("mask_s[:, None]", FIRST_ONES)),
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
    ("steps are whose", ("mask.sum(1)", "mask.sum(1).flip(0)")),
    (
        "excite once",
        ("steps.mean(-1)", "self.reduce(steps.mean(-1)).relu()"),
        ("self.reduce(torch.stack(z)).relu()", "torch.stack(z)"),
    ),
    ("a sum over time", (" / max(len(steps), 1)", "")),
    (
        "b_1 missing",
        ("self.reduce(torch.stack(z))", "(torch.stack(z) @ self.reduce.weight.mT)"),
    ),
    ("no gradient", ("stack(z)", "stack(z).detach()")),
    ("without a real step", ("max(len(steps), 1)", "len(steps)")),
]


# --- EXERCISE 4: TextFeatureExtractor.forward(self, states, mask) ---------------------


def answer_4(self, states, mask):
    x = self.each_text(states, mask.flatten(0, 1))
    x = x.reshape(*mask.shape, -1)
    return self.conv(x)[:, 0], mask.any(1)


WRONG_4 = [
    ("your shape is", ("[:, 0]", "")),
    ("texts are the channels", ("self.conv(x)", "self.conv(x.flip(1))")),
    ("share gates", ("mask.flatten(0, 1)", "mask.flatten(1)")),
    ("the target's mask alone", ("mask.any(1)", "mask[:, mask.shape[1] // 2]")),
    ("instead of .any.", ("mask.any(1)", "mask.all(1)")),
    ("a mask is bool", ("mask.any(1)", "mask.any(1).float()")),
    ("whole Conv2d", ("self.conv(x)", "F.conv2d(x, self.conv.weight, padding=1)")),
    ("nothing behind it", ("[:, 0]", "[:, 0].relu()")),
    ("your shape is", ("[:, 0]", "[0]")),
    ("Which steps are whose", ("mask.flatten", "mask.transpose(0, 1).flatten")),
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


OF_TARGET = "x * mask_s[..., None] if x_t.shape == x_s.shape else x"
ALL = "torch.ones(x_t.shape[:2], dtype=torch.bool)"
WRONG_5 = [
    ("for training alone", ("self.training", "True")),
    ("as long as the target", ("x_t, x_s, mask_s)[0]", f"x_s, x_t, {ALL})[0]")),
    ("do the queries come through", ("x_t + x if self.residual else x", "x_t + x")),
    ("switches the first add", ("x = x + self", "x = x * self.residual + self")),
    ("norm2 after the feed", ("self.norm2", "self.norm1")),
    ("what is added is the target", ("if self.residual", "if x_t is x_s")),
    ("does mask_s reach", ("x_s, mask_s)[0]", "x_s, mask_s | True)[0]")),
    ("nothing about the target", ("norm2(x)", f"norm2({OF_TARGET})")),
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
    ("NaN", ("np.unique(truth)", "range(4)"), ("max(1, ", "(np.nan if c > 1 else ")),
    ("that is WA", ("np.mean(recalls)", "np.mean(truth == guess)")),
    ("mean precision", ("np.sum(truth == c)", "np.sum(guess == c)")),
    ("count as 0", ("np.unique(truth)", "range(4)")),
    ("a percentage", ("float(", "100 * float(")),
    ("only predicted", ("np.unique(truth)", "{*map(int, truth), *map(int, guess)}")),
    ("tensors do not", ("np.unique(truth)", "map(int, set(y_true))")),
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


DRAW = 'random.Random(f"{seed}-{fold}")'
SEEDED = '    random.seed(f"{seed}-{fold}")\n    four ='
SPEAKER = "corpus[k].speaker"
BY_ID = "corpus[k].id[:5] + corpus[k].id[-4]"
WRONG_7 = [
    ("return rows", ("dev, test", "dev, [corpus[k] for k in test]")),
    ("only the four classes", (" if u.label is not None", "")),
    (
        "is of the test session",
        (" rest}", " four}"),
        ("dev = [k for k in rest", "dev = [k for k in four"),
    ),
    ("nothing to develop on", (" rest}", " four}")),
    ("of one speaker", (f"{SPEAKER} == speaker]", "draw.random() < 0.5]")),
    ("left in training", (" if k not in dev", "")),
    ("does the seed draw", (DRAW, "random.Random(fold)")),
    ("global random numbers", (DRAW, "random"), ("    four =", SEEDED)),
    ("does the fold draw", (DRAW, "random.Random(seed)")),
    ("is the seed a factor", (DRAW, "random.Random(seed * fold)")),
    ("every process, so", (DRAW, 'random.Random(hash(f"{seed}-{fold}"))')),
    ("sort the speakers", ("sorted(", "list(")),
    ("out of reach", ("(speakers)\n", "(speakers[1:] or speakers)\n")),
    (
        "a speaker without",
        (f"{SPEAKER} for k in rest", "u.speaker for u in corpus if u.session != fold"),
    ),
    ("test is empty", ("not test or ", "")),
    ("train is empty", ("< 2", "< 1")),
    ("not IndexError", ("len(speakers) < 2", "len(speakers) == 1")),
    (
        "not the id",
        (f"{SPEAKER} for", f"{BY_ID} for"),
        (f"{SPEAKER} ==", f"{BY_ID} =="),
    ),
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


LOWER = "dev_loss < self.best"
WRONG_8 = [
    ("is None for a frozen", ("!= self.finetune_after", "< self.finetune_after")),
    ("it only stops", ("!= self.finetune_after", "!= (self.finetune_after or 5)")),
    ("answers 'continue' at", ("== self.stop_after", "> self.stop_after")),
    ("too early or too late", ("self.since_best !=", "self.since_best - 1 !=")),
    ("is an equal loss lower", (LOWER, "dev_loss <= self.best")),
    ("than the epoch before", ("min(self.best, dev_loss)", "dev_loss")),
    ("two counters", ("finetuning = True", "finetuning, self.since_best = True, 0")),
    ("a second trigger", ("self.finetuning or ", "")),
    (
        "both are due",
        ("== self.stop_after", "== self.stop_after != self.finetune_after"),
    ),
    ("NaN is not lower", (LOWER, "not dev_loss >= self.best")),
    ("names no tolerance", (LOWER, "dev_loss < self.best - 1e-4")),
    (
        "the phase",
        ("self.finetuning or", "'f' in vars(self) or"),
        (".finetuning =", ".f ="),
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


ASKED = "[row for row in flat if row >= 0]"
CAT = "torch.cat(states)"
WRONG_9 = [
    ("what does tolist", (ASKED, "rows[rows >= 0]")),
    ("row -1 means none", (ASKED, "flat")),
    ("itself has changed", ("    states =", "    rows.clamp_(min=0)\n    states =")),
    ("called 2 times", ("for x in states]", f"for x in source({ASKED})]")),
    ("one after another", (CAT, "nn.utils.rnn.pad_sequence(states)")),
    ("in this order", (ASKED, f"sorted({ASKED})")),
    ("the longest of the batch", ("max(lengths)", "max(lengths) + 1")),
    ("a mask is bool", ("torch.bool", "torch.long")),
    (
        "comes twice",
        (ASKED, f"[*dict.fromkeys({ASKED})]"),
        ("(remaining)", "(remaining, 0)"),
    ),
    (
        "a missing text has",
        (
            "next(remaining)] = True",
            "next(remaining)] = True\n        mask[k, 0] = True",
        ),
    ),
    ("any shape", ("mask.unflatten(0, rows.shape)", "mask.view(*rows.shape[:2], -1)")),
    ("no gradient", (CAT, "torch.cat(states).detach()")),
    ("the model casts", (CAT, "torch.cat(states).float()")),
    ("where is .device", ("torch.cat(states).to(device)", "torch.cat(states)")),
    ("where is .device", ("rows.shape).to(device)", "rows.shape)")),
]


# --- All of them ----------------------------------------------------------------------

WRONG = [(5, "norm first", norm_first)]
for n in EXERCISES:
    for question, *changes in globals()[f"WRONG_{n}"]:
        WRONG.append((n, question, changed(globals()[f"answer_{n}"], *changes)))


@pytest.mark.parametrize("n, question, answer", WRONG)
def test_a_wrong_answer_is_turned_away_with_the_question_that_fits(n, question, answer):
    check, _ = EXERCISES[n]
    with pytest.raises(AssertionError, match=question):
        check(answer)


def looped_mean(x, mask):
    means = torch.zeros(len(x), x.shape[2])
    for k, (steps, is_real) in enumerate(zip(x, mask, strict=True)):
        if is_real.any():
            means[k] = steps[is_real].mean(0)
    return means


def gates_by_index(self, states, mask):
    owner = mask.nonzero()[:, 0]
    z = torch.zeros(len(mask), states.shape[1]).index_add(0, owner, states.mean(2))
    count = mask.sum(1, keepdim=True)
    z = z / torch.where(count == 0, 1, count)
    return 1 / (1 + torch.exp(-self.expand(F.relu(self.reduce(z)))))


def window_by_window(self, states, mask):
    owner = mask.nonzero()[:, 0]
    windows = [self.each_text(states[owner == k], mask[k]) for k in range(len(mask))]
    real = mask.sum(1) > 0
    return self.conv(torch.stack(windows)).squeeze(1) * real.unsqueeze(2), real


def counted_up(self, dev_loss):
    self.since_best += 1
    if dev_loss < self.best:
        self.best, self.since_best = dev_loss, 0
    if self.since_best >= self.stop_after:
        return "stop"
    patience = self.finetune_after or self.stop_after
    if self.since_best >= patience and not self.finetuning:
        self.finetuning = True
        return "finetune"
    return "continue"


def distinct_rows(source, rows, device):
    """Ask for each row once, in the order of the corpus."""
    distinct = rows[rows >= 0].unique().tolist()
    states = dict(zip(distinct, source(distinct), strict=True))
    states[-1] = next(iter(states.values()))[:0]
    flat = [states[row] for row in rows.flatten().tolist()]
    lengths = torch.tensor([len(x) for x in flat]).view(*rows.shape, 1)
    mask = lengths > torch.arange(int(lengths.max()))
    return torch.cat(flat).to(device), mask.to(device)


RIGHT = [
    *[(n, globals()[f"answer_{n}"]) for n in EXERCISES],
    (1, looped_mean),
    (2, changed(answer_2, ("-1e30", "-torch.inf"))),
    (3, gates_by_index),
    (4, window_by_window),
    (5, changed(answer_5, ("F.dropout(x, 0.1, self.training)", "self.dropout(x)"))),
    (5, changed(answer_5, ("F.dropout(", "torch.dropout("))),
    (7, changed(answer_7, ("dev, test\n", "np.array(dev), tuple(test)\n"))),
    (8, counted_up),
    (9, distinct_rows),
]


@pytest.mark.parametrize("n, answer", RIGHT)
def test_a_right_answer_is_accepted_in_any_style(n, answer):
    check, _ = EXERCISES[n]
    check(answer)


@pytest.mark.parametrize(
    "actual, expected, message",
    [
        ([0.1234], [2.0], "why\nyours:    [0.123]\nexpected: [2.0]"),
        ([True], [0.0], "why\nyours:    [True]\nexpected: [False]"),
        ([1.0] * 14 + [7], [1.0] * 15, "why\nat [14]:\nyours:    7.0\nexpected: 1.0"),
        ([1.0], [1.0, 1.0], "why\nyour shape is (1,), expected (2,)"),
        (None, [1.0], "nothing is returned yet: is there a return statement?"),
    ],
)
def test_a_check_that_fails_shows_the_answer_and_the_truth(actual, expected, message):
    with pytest.raises(AssertionError) as failure:
        compare(actual, expected, "why")
    assert str(failure.value) == message


def test_a_verdict_is_a_sentence_whatever_the_answer_does():
    check, _ = EXERCISES[1]
    sentence = verdict(check, lambda x, mask: x.masked_fill(~mask, 0))
    assert sentence.startswith("it stops with RuntimeError: ")
    assert sentence.endswith("What shapes and types are on that line?")
    assert (
        verdict(check, lambda x, mask: sys.exit("yours to write")) == "yours to write"
    )
