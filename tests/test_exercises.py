"""Wrong and right answers to the exercises, and the silent bugs of bugs.py.

The wrong answers are what people write. A test holds that test_checks.py turns each away with the
right question, and that it accepts right answers in other styles.
"""

import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import bugs
import data
import evaluate
import model
import test_checks
from conftest import ROOT
from test_checks import SOLUTIONS, same, verdict

CHECKS = {n: getattr(test_checks, f"check_{n}") for n in SOLUTIONS}


# --- EXERCISE 1: masked_mean(x, mask)


def zero_for_a_whole_empty_batch(x, m):
    if not m.any():
        return x.new_zeros(x.shape[0], x.shape[2])
    return x.masked_fill(~m[..., None], 0).sum(1) / m.sum(1, keepdim=True)


WRONG_1 = [
    (zero_for_a_whole_empty_batch, "each has its own count"),
    (lambda x, m: x.masked_fill(~m[..., None], 0).sum(1) / (m.sum(1, keepdim=True) + 1), "one more than"),
    (lambda x, m: x.mean(1), "padding count"),
    (lambda x, m: (x * m[..., None]).sum(1) / x.shape[1], "all steps T"),
    (lambda x, m: (x * m[..., None]).sum(1) / m.sum(), "whole batch"),
    (lambda x, m: x.masked_fill(~m[..., None], 0).sum(1) / m.sum(1, keepdim=True), "0 / 0"),
    (lambda x, m: (x * m[..., None]).sum(1) / m.sum(1, keepdim=True).clamp(min=1), "0 . NaN"),
    (lambda x, m: None, "nothing comes back"),
    (lambda x, m: x.masked_fill_(~m[..., None], 0).sum(1) / m.sum(1, keepdim=True).clamp(min=1), "x itself"),
    (lambda x, m: (x.nan_to_num() * m[..., None]).sum(1) / m.sum(1, keepdim=True).clamp(min=1), "is hidden"),
    (lambda x, m: torch.stack([r[:n].sum(0) / max(1, n) for r, n in zip(x, m.sum(1).tolist())]), "need not be the first"),
    (lambda x, m: x.detach().masked_fill(~m[..., None], 0).sum(1) / m.sum(1, keepdim=True).clamp(min=1), "no gradient"),
]


# --- EXERCISE 2: Eq. (1), cross_modal_attention(x_t, x_s, w_q, w_k, w_v, mask_s)


def filled(lowest):
    return lambda scores, mask: scores.masked_fill(~mask[:, None], lowest)


def zeroed(weights, mask):
    return weights.masked_fill(~mask[:, None], 0)


def reshaping(x_t, x_s, w_q, w_k, w_v, mask=None):
    k = x_s @ w_k
    scores = x_t @ w_q @ k.reshape(k.shape[0], k.shape[2], k.shape[1]) / k.shape[-1] ** 0.5
    if mask is not None:
        scores = filled(-1e30)(scores, mask)
    weights = scores.softmax(-1) if mask is None else zeroed(scores.softmax(-1), mask)
    return weights @ (x_s @ w_v), weights


def queries_under_a_mask(x_t, x_s, w_q, w_k, w_v, mask=None):
    """Right without a mask, over the queries with one."""
    right = eq1(after=zeroed)(x_t, x_s, w_q, w_k, w_v, mask)
    if mask is None:
        return right
    k = x_s @ w_k
    weights = zeroed((x_t @ w_q @ k.transpose(1, 2) / k.shape[-1] ** 0.5).softmax(1), mask)
    return weights @ (x_s @ w_v), weights


def eq1(scale=lambda q, k: k.shape[-1] ** 0.5, dim=-1, before=filled(-1e30), after=lambda w, m: w,
        normalise=torch.softmax):  # fmt: skip
    """before and after: what is done with the mask to the scores, to the weights."""

    def attention(x_t, x_s, w_q, w_k, w_v, mask=None):
        q, k, v = x_t @ w_q, x_s @ w_k, x_s @ w_v
        scores = q @ k.transpose(1, 2) / scale(x_t, k)
        weights = normalise(scores if mask is None else before(scores, mask), dim)
        weights = weights if mask is None else after(weights, mask)
        return weights @ v, weights

    return attention


def additive(x_t, x_s, w_q, w_k, w_v, mask=None):
    """BERT's way: -10000 on padded scores."""
    s = (x_t @ w_q) @ (x_s @ w_k).transpose(1, 2) / w_k.shape[1] ** 0.5
    s = s if mask is None else s + (1.0 - mask[:, None].float()) * -1e4
    w = s.softmax(-1)
    w = w if mask is None else w * mask.any(1)[:, None, None]
    return w @ (x_s @ w_v), w


def first_steps(x_t, x_s, w_q, w_k, w_v, mask=None):
    mask = mask if mask is None else torch.arange(x_s.shape[1]) < mask.sum(1, keepdim=True)
    return model.cross_modal_attention(x_t, x_s, w_q, w_k, w_v, mask)


WRONG_2 = [
    (additive, "any finite number"),
    (first_steps, "need not be the first"),
    (reshaping, "transposed, not reshaped"),
    (queries_under_a_mask, "softmax over the queries"),
    (eq1(dim=1), "softmax over the queries"),
    (eq1(scale=lambda q, k: 1.0), "sqrt.d_k. missing"),
    (eq1(scale=lambda q, k: q.shape[-1] ** 0.5), "d_t, or d_v, taken for d_k"),
    (eq1(scale=lambda q, k: k.shape[-1]), "not by its root"),
    (eq1(scale=lambda q, k: 2**0.5), "of d_s or T_s"),
    (eq1(before=lambda s, m: s, after=zeroed), "sum to 1 again"),
    (eq1(before=lambda s, m: s), "where is mask_s"),
    (eq1(), "weights on padding"),
    (eq1(before=lambda s, m: s + m[:, None].float().log(), after=lambda w, m: w.nan_to_num()), "its gradient NaN"),
    (eq1(before=filled(-100), after=zeroed), "is the padding's lower"),
    (eq1(before=lambda s, m: s.masked_fill(~m, -1e30), after=lambda w, m: w.masked_fill(~m, 0.0)), "needs an axis for the queries"),
    (eq1(after=zeroed, normalise=lambda s, d: s.exp() / s.exp().sum(d, keepdim=True)), "takes the highest score off"),
    (eq1(after=lambda w, m: w * m.any()), "each has its own mask"),
    (eq1(after=zeroed, normalise=lambda s, d: s.softmax(d).detach()), "weights detached"),
]


# --- EXERCISE 3: SqueezeExcitation.gates(self, x, mask)


def se(squeeze=lambda x, m: model.masked_mean(x.mean(-1), m), middle=torch.relu, end=torch.sigmoid):
    def gates(self, x, m):
        return end(self.expand(middle(self.reduce(squeeze(x, m)))))

    return gates


def unguarded(x, m):
    return (x.mean(-1) * m[..., None]).sum(1) / m.sum(1, keepdim=True)


def excited(z_of):
    return lambda self, x, m: self.expand(self.reduce(z_of(self, x.mean(-1), m)).relu()).sigmoid()


def each_step(self, x, m):
    return self.expand(model.masked_mean(self.reduce(x.mean(-1)).relu(), m)).sigmoid()


def no_bias(self, x, m):
    return self.expand((model.masked_mean(x.mean(-1), m) @ self.reduce.weight.T).relu()).sigmoid()


WRONG_3 = [
    (excited(lambda self, z, m: (z * m[..., None]).sum(1)), "a sum over time"),
    (each_step, "squeeze first"),
    (excited(lambda self, z, m: z[:, 0] * m[:, :1]), "squeeze .1 - 0.4. / 2"),
    (no_bias, "b_1 missing"),
    (excited(lambda self, z, m: z.masked_fill(~m[..., None], -9e9).amax(1) * m.any(1, keepdim=True)), "squeeze .1 - 0.4. / 2"),
    (se(squeeze=unguarded), "no real step at all"),
    (se(squeeze=lambda x, m: x.mean((1, 3))), "padded steps count"),
    (se(squeeze=lambda x, m: (x.mean(-1) * m[..., None]).mean(1)), "the sum divided by T"),
    (se(middle=lambda h: h), "where is the ReLU"),
    (se(end=lambda z: z.softmax(-1)), "a softmax"),
    (se(end=lambda z: z), "no sigmoid"),
    (se(squeeze=lambda x, m: x.mean(-1)), "one gate a layer and utterance"),
    (se(squeeze=lambda x, m: model.masked_mean(x.mean(-1), m).mean(0, keepdim=True).expand(len(x), -1)), "keep the batch apart"),
    (se(squeeze=lambda x, m: model.masked_mean(x.mean(-1), m).detach()), "the squeeze has no gradient"),
]


# --- EXERCISE 4: ContextConv.forward(self, x, mask)


def conv(zero=True, which=lambda self, m: m.any(1) if self.text_mask == "union" else m[:, m.shape[1] // 2], swap=False,
         after=lambda y: y.squeeze(1), inplace=False):  # fmt: skip
    def forward(self, x, mask):
        if inplace:
            x.masked_fill_(~mask[..., None], 0)
        elif zero == "utterances":
            x = x * mask.any(2)[..., None, None]
        elif zero:
            x = x * mask[..., None]
        return after(self.conv(x.flip(1) if swap else x)), which(self, mask)

    return forward


def target_zeroes(self, x, m):
    t = m[:, m.shape[1] // 2]
    if self.text_mask == "target":
        return self.conv(x * t[:, None, :, None]).squeeze(1), t
    return self.conv(x * m[..., None]).squeeze(1), m.any(1)


def target_forgets(self, x, m):
    if self.text_mask == "target":
        return self.conv(x).squeeze(1), m[:, m.shape[1] // 2]
    return self.conv(x * m[..., None]).squeeze(1), m.any(1)


WRONG_4 = [
    (target_zeroes, "changes the mask alone"),
    (target_forgets, "changes the mask alone"),
    (conv(zero=False), "does not exist still speaks"),
    (conv(zero="utterances"), "a padded token still speaks"),
    (conv(which=lambda s, m: m[:, 1]), "target's mask alone"),
    (conv(which=lambda s, m: m.all(1)), "all instead of any"),
    (conv(which=lambda s, m: m.any(1)), "text-mask target"),
    (conv(which=lambda s, m: m.any(1) if s.text_mask == "union" else m[:, 0]), "the third: C // 2"),
    (conv(swap=True), "1 . 10 . 3 . 100 . 5"),
    (conv(which=lambda s, m: m.any(1) if s.text_mask == "union" else m[:, 1]), "the third: C // 2"),
    (conv(after=lambda y: y.squeeze(1).relu()), "nothing behind it"),
    (conv(after=lambda y: y[0]), "two windows of two tokens"),
    (conv(inplace=True), "x itself was changed"),
    (conv(which=lambda s, m: (m.any(1) if s.text_mask == "union" else m[:, m.shape[1] // 2]).float()), "masks are bool"),
    (lambda self, x, m: (nn.functional.conv2d(x * m[..., None], self.conv.weight, padding=1).squeeze(1),
                         m.any(1) if self.text_mask == "union" else m[:, m.shape[1] // 2]), "its bias"),
]


# --- EXERCISE 5: TransformerBlock.forward(self, x_t, x_s, mask_s), vanilla and CMT


def block(always=False, swap=False, mask=True, pre=False, drop=lambda d, x: d(x), norm=lambda s: s.norm2,
          second=lambda d, x: d(x), late=False, own=False, both=False, same_only=False):  # fmt: skip
    def forward(self, x_t, x_s, mask_s=None):
        if pre:
            h = x_t + self.attend(self.norm1(x_t), self.norm1(x_s), mask_s)[0]
            return h + self.feed_forward(self.norm2(h))
        q, s = (x_s, x_t) if swap else (x_t, x_s)
        y = drop(self.dropout, self.attend(q, s, mask_s if mask and not swap else None)[0])
        if own and mask_s is not None and mask_s.shape[1] == x_t.shape[1]:
            y = y * mask_s[..., None]
        add = x_t is x_s if same_only else always or self.residual
        y = self.norm1(y + x_t if add and y.shape == x_t.shape else y)
        if both and not self.residual:
            return norm(self)(self.feed_forward(y))
        if late:
            return norm(self)(self.dropout(y + self.feed_forward(y)))
        return norm(self)(y + second(self.dropout, self.feed_forward(y)))

    return forward


WRONG_5 = [
    (block(pre=True), "norm first"),
    (block(always=True), "do the queries come through"),
    (block(swap=True), "as long as the target"),
    (block(mask=False), "does mask_s reach"),
    (block(drop=lambda d, x: x, second=lambda d, x: x), "where is the dropout"),
    (block(drop=lambda d, x: x), "behind each of the two sublayers"),
    (block(second=lambda d, x: x), "behind each of the two sublayers"),
    (block(late=True), "behind each of the two sublayers"),
    (block(own=True), "it says nothing of the target"),
    (block(both=True), "switches the first add alone"),
    (block(same_only=True), "whenever self.residual says so"),
    (block(norm=lambda s: s.norm1), "norm2 after the feed-forward"),
]


# --- EXERCISE 6: unweighted_accuracy(y_true, y_pred)


def recalls(y, p):
    return [sum(a == b == c for a, b in zip(y, p)) / max(1, y.count(c)) for c in range(4)]


WRONG_6 = [
    (lambda y, p: float(np.mean([np.mean(np.array(p)[np.array(y) == c] == c) if c in y else float("nan") for c in range(4)])), "0 / 0 for a class"),
    (lambda y, p: float(np.mean([np.sum((np.array(y) == c) & (np.array(p) == c)) / max(1, np.sum(np.array(y) == c)) for c in {*map(int, y), *map(int, p)}])), "only guessed"),
    (lambda y, p: sum(a == b for a, b in zip(y, p)) / len(y), "that is WA"),
    (lambda y, p: recalls(p, y)[0] / 2 + recalls(p, y)[1] / 2, "mean precision"),
    (lambda y, p: sum(recalls(y, p)) / 4, "do not occur"),
    (lambda y, p: 100 * evaluate.unweighted_accuracy(y, p), "a percentage"),
    (lambda y, p: sum(sum(a == b == c for a, b in zip(y, p)) / max(1, sum(a == c for a in y)) for c in set(y)) / len(set(y)),
     "as tensors not"),
    (lambda y, p: torch.tensor(evaluate.unweighted_accuracy(y, p)), "a float, for result.json"),
]


# --- EXERCISE 7: split(corpus, fold, seed)


def splitter(dev_of=None, keep=False, label=True, by_seed=True, by_fold=True, order=sorted,
             enough=lambda speakers, rest, four: len(speakers) > 1 and len(rest) < len(four),
             own=True, skip=False, draw=None):  # fmt: skip
    def split(corpus, fold, seed):
        rng = random.Random(f"{fold if by_fold else 0} {seed}" if by_seed else 0)
        rng = random.Random(draw(fold, seed)) if draw else rng
        if not own:
            rng = random
            random.seed(f"{fold} {seed}")
        four = [u for u in corpus if u.label is not None or not label]
        rest = [u for u in four if u.session != fold]
        speakers = order({u.speaker for u in (four if dev_of == "any" else rest)})
        if dev_of == "all":
            speakers = order({u.speaker for u in corpus if u.session != fold})
        if not enough(speakers, rest, four):
            raise data.InputError("too few")
        speaker = rng.choice(speakers[:-1] if skip and len(speakers) > 1 else speakers)
        if dev_of == "utterances":
            dev = rng.sample(rest, 4)
        else:
            dev = [u for u in four if u.speaker == speaker]
        return [u for u in rest if keep or u not in dev], dev, [u for u in four if u.session == fold]

    return split


WRONG_7 = [
    (splitter(dev_of="any"), "of the test session"),
    (splitter(dev_of="utterances"), "one speaker"),
    (splitter(keep=True), "left in training"),
    (splitter(label=False), "only the four classes"),
    (splitter(by_seed=False), "does the seed draw"),
    (splitter(enough=lambda s, r, f: True), "test is empty, and it goes unsaid"),
    (splitter(enough=lambda s, r, f: 0 < len(r) < len(f)), "training is empty, and it goes unsaid"),
    (splitter(skip=True), "is one out of reach"),
    (splitter(enough=lambda s, r, f: len(s) != 1 and len(r) < len(f)), "not IndexError"),
    (splitter(by_fold=False), "does the fold draw"),
    (splitter(draw=lambda fold, seed: fold * seed), "is 0 a factor"),
    (splitter(draw=lambda fold, seed: hash(f"{fold}-{seed}")), "differs in every process"),
    (splitter(order=list), "a set has another order"),
    (splitter(own=False), "global random numbers"),
    (splitter(dev_of="all"), "no utterance of the four classes"),
]


# --- EXERCISE 8: Patience.step(self, dev_loss)


def stepper(equal=False, again=False, reset=False, frozen=True, previous=False, late=0, call=True, least=0,
            stop_first=True, relative=True, creeping=False):  # fmt: skip
    def step(self, loss):
        limit = self.best * (1 - self.min_decrease) if relative else self.best - self.min_decrease
        if loss < limit - least or (equal and loss == self.best):
            self.best, self.since_best = loss, 0
        else:
            self.since_best += 1
            self.best = loss if previous else min(self.best, loss) if creeping else self.best
        if self.since_best >= self.stop_after and stop_first:
            return "stop"
        limit = self.finetune_after or (None if frozen else 5)
        if limit and self.since_best == limit + late and (again or not self.finetuning):
            self.finetuning = True
            self.since_best = 0 if reset or (self.reset_at_finetune and call) else self.since_best
            return "finetune"
        if self.since_best >= self.stop_after:
            return "stop"
        return "continue"

    return step


def own_attributes(self, loss):
    lower = loss < getattr(self, "lowest", float("inf")) * (1 - self.min_decrease)
    self.lowest, self.since_best = (loss, 0) if lower else (getattr(self, "lowest", loss), self.since_best + 1)
    if self.since_best >= self.stop_after:
        return "stop"
    fired = getattr(self, "fired", False) or self.finetune_after is None
    if fired or self.since_best < self.finetune_after:
        return "continue"
    self.fired, self.since_best = True, 0 if self.reset_at_finetune else self.since_best
    return "finetune"


WRONG_8 = [
    (own_attributes, "a checkpoint keeps them"),
    (stepper(equal=True), "is an equal loss lower"),
    (stepper(again=True), "a second trigger"),
    (stepper(reset=True), "two counters"),
    (stepper(frozen=False), "frozen system only stops"),
    (stepper(previous=True), "lower than the epoch before"),
    (stepper(late=1), "too early or too late"),
    (stepper(call=False), "what does reset_at_finetune do"),
    (stepper(relative=False), "relative to the lowest"),
    (stepper(creeping=True), "what must 8.9 be compared with"),
    (stepper(least=1e-4), "knows no tolerance"),
    (stepper(stop_first=False), "it answers .finetune. when since_best is 2 of 2|both are due"),
]


# --- EXERCISE 9: data.batch(rows, windows, sources, device), frozen and live states alike


def batcher(always=False, edge=True, unique=True, corpus_rows=False, greedy=False, to=True, span=False,
            inplace=False, detach=False, cast=False, some=False, either=False):  # fmt: skip
    def batch(rows, windows, sources, device):
        made = {}
        if "audio" in sources or greedy:
            made["audio"] = tuple(t.to(device if to else "cpu") for t in sources["audio"](rows))
        if "text" not in sources or (made and either):
            return made
        w = windows[rows]
        if not unique:
            flat = w[w >= 0]
            context = torch.full_like(w, -1)
            context[w >= 0] = torch.arange(len(flat))
            return {"text": (*sources["text"](flat), context)}
        distinct, context = w.unique(return_inverse=True)
        if edge and (distinct[0] == -1 or always):
            distinct, context = distinct[distinct >= 0], context - 1
        if corpus_rows:
            context = w
        if span:
            distinct = torch.arange(w[w >= 0].min(), w.max() + 1)
            context = torch.where(w < 0, -1, w - distinct[0])
        if inplace:
            windows[windows < 0] = 0
        states, mask = sources["text"](distinct)
        states = states.detach() if detach else states.float() if cast else states
        mask = mask if some else mask.to(device)
        return made | {"text": (states.to(device), mask, context.to(device))}

    return batch


def all_real(rows, windows, sources, device):
    out = data.batch(rows, windows, sources, device)
    if "text" in out:
        out["text"] = (out["text"][0], torch.ones_like(out["text"][1]), out["text"][2])
    return out


def swapped(rows, windows, sources, device):
    out = data.batch(rows, windows, sources, device)
    return {m: x[::-1] if m == "audio" else x for m, x in out.items()}


WRONG_9 = [
    (all_real, "the source.s own mask"),
    (swapped, "audio is .states, mask."),
    (batcher(always=True), "one too low"),
    (batcher(edge=False), "do not ask the source"),
    (batcher(unique=False), "goes twice"),
    (batcher(corpus_rows=True), "name rows of the batch"),
    (batcher(greedy=True), "no audio source"),
    (batcher(to=False), "where is .device"),
    (batcher(some=True), "States, mask and context are on"),
    (batcher(span=True), "in no window of these two"),
    (batcher(inplace=True), "itself was changed"),
    (batcher(detach=True), "no gradient reaches the live"),
    (batcher(cast=True), "the model casts"),
    (batcher(either=True), "two sources are two modalities"),
]


@pytest.mark.parametrize(
    "n, wrong, question",
    [(n, *pair) for n in SOLUTIONS for pair in globals()[f"WRONG_{n}"]],
)
def test_a_wrong_answer_is_turned_away_with_the_right_question(n, wrong, question):
    with pytest.raises(AssertionError, match=question):
        CHECKS[n](wrong)


def mean_recall(y, p):
    y, p = np.array([*map(int, y)]), np.array([*map(int, p)])
    return float(np.mean([np.mean(p[y == c] == c) for c in np.unique(y)]))


RIGHT = {  # other answers; those below are also what each wrong answer changes in one place
    1: lambda x, m: torch.where(m[..., None], x, 0.0).sum(1) / m.sum(1, keepdim=True).clamp(min=1),
    2: eq1(after=zeroed), 3: se(), 4: conv(), 5: block(),
    6: mean_recall,
    7: splitter(), 8: stepper(), 9: batcher(),
}  # fmt: skip


def functional_dropout(self, x_t, x_s, mask_s=None):
    def drop(y):
        return nn.functional.dropout(y, self.dropout.p, self.training)

    y = drop(model.cross_modal_attention(x_t, x_s, self.w_q, self.w_k, self.w_v, mask_s)[0])
    x = self.norm1(x_t + y) if self.residual else self.norm1(y)
    return self.norm2(x + drop(self.feed_forward(x)))


def exact_counts(self, loss):
    """With == in place of >=: the loop ends at the first "stop"."""
    self.since_best += 1
    if loss < self.best * (1 - self.min_decrease):
        self.best, self.since_best = loss, 0
    if self.since_best == self.stop_after:
        return "stop"
    if self.since_best != self.finetune_after or self.finetuning:
        return "continue"
    self.finetuning = True
    self.since_best = 0 if self.reset_at_finetune else self.since_best
    return "finetune"


def looped_mean(x, m):
    rows = [[step for step, real in zip(steps, reals) if real] for steps, reals in zip(x, m.tolist())]
    return torch.stack([sum(r) / len(r) if r else torch.zeros_like(x[0, 0]) for r in rows])


def by_einsum(x_t, x_s, w_q, w_k, w_v, mask=None):
    s = torch.einsum("btd,dk,bse,ek->bts", x_t, w_q, x_s, w_k) / w_k.shape[1] ** 0.5
    if mask is None:
        return s.softmax(-1) @ x_s @ w_v, s.softmax(-1)
    w = s.masked_fill(~mask[:, None], torch.finfo(s.dtype).min).softmax(-1).masked_fill(~mask[:, None], 0)
    return w @ x_s @ w_v, w


def zeroed_behind(self, x, m):
    """X_T is zero where its mask is False: nobody reads it there."""
    y, mask = conv()(self, x, m)
    return y * mask[..., None], mask


@pytest.mark.parametrize("n, answer", [
    *RIGHT.items(), (1, looped_mean), (2, by_einsum), (4, zeroed_behind), (5, functional_dropout),
    (8, exact_counts),
])  # fmt: skip
def test_another_right_answer_is_accepted(n, answer):
    CHECKS[n](answer)


def test_a_failing_check_says_yours_and_expected():
    with pytest.raises(AssertionError, match=r"(?s)yours: +\[0.123\].*expected: +\[2.0\]"):
        same(torch.tensor([0.1234]), [2.0], "a question")
    with pytest.raises(AssertionError, match=r"yours: +\[True\]\nexpected: +\[False\]"):
        same(torch.tensor([True]), [0.0], "a question")
    with pytest.raises(AssertionError, match=r"at \[2, 3\]:\nyours: +7.0\nexpected: +1.0"):
        wrong = torch.ones(4, 4)
        wrong[2, 3] = 7.0
        same(wrong, torch.ones(4, 4), "a question")


def test_an_answer_that_stops_is_asked_about_shapes(monkeypatch):
    monkeypatch.setitem(SOLUTIONS, 1, lambda x, m: x.masked_fill(~m, 0))
    assert verdict(1).startswith("it stops with RuntimeError: ") and verdict(1).endswith("stand on that line?")
    monkeypatch.setitem(SOLUTIONS, 1, lambda x, m: sys.exit("exercise 1 is yours to write"))
    assert verdict(1) == "exercise 1 is yours to write"


# --- the silent bugs of bugs.py


@pytest.fixture
def copied(tmp_path):
    for name in ("model.py", "data.py", "train.py", "evaluate.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize("what", bugs.BUGS)
def test_a_bug_can_be_put_in_and_taken_out(what, copied):
    before = {p: p.read_text() for p in copied.glob("*.py")}
    bugs.swap(bugs.BUGS[what][1], copied)
    assert bugs.hidden(copied) == [what]
    for p in before:
        compile(p.read_text(), p, "exec")
    bugs.swap(bugs.BUGS[what][1], copied, back=True)
    assert before == {p: p.read_text() for p in copied.glob("*.py")} and not bugs.hidden(copied)


def test_hide_and_reveal_delete_what_a_bug_has_made(copied, capsys):
    before = {p: p.read_text() for p in copied.glob("*.py")}
    for command in ("hide", "reveal"):
        for folder in ("cache/tiny", "runs/toy/mmt", "runs/toy-SELECTED-ON-TEST", "runs/iemocap/mmt", "corpora/toy"):
            (copied / folder).mkdir(parents=True, exist_ok=True)
        bugs.main([command], copied)
        assert not (copied / "cache").exists() and (copied / "corpora" / "toy").exists()
        assert [p.name for p in (copied / "runs").iterdir()] == ["iemocap"]
        assert len(bugs.hidden(copied)) == (command == "hide")
    assert before == {p: p.read_text() for p in copied.glob("*.py")}
    assert "It was: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("what", bugs.BUGS)
def test_a_bug_trains_and_is_caught_by_the_suite(what, copied):
    bugs.swap(bugs.BUGS[what][1], copied)
    work = copied / "work"
    work.mkdir()
    command = [sys.executable, copied / "train.py", "--fusion", "mmt", "--fold", "5", "--device", "cpu"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0 and "toy: WA" in done.stdout, done.stderr
    suite = [sys.executable, "-m", "pytest", "-q", "-x", "--deselect",
             "tests/test_exercises.py::test_a_bug_can_be_put_in_and_taken_out"]  # fmt: skip
    done = subprocess.run(suite, cwd=copied, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout[-2000:]
