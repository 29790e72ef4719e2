"""The checks of the nine exercises. They never look at a solution.

    python -m pytest -m ex3      the check of EXERCISE 3

The code marks each exercise where it stands. Write the body below the docstring from the docstring
and the paper (in the repository, delete it first), and run its check. A check that fails asks a
question.
"""

import builtins
import random
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import data
import evaluate
import model
import train


def same(found, expected, question):
    """Fail with the question where found is not expected, shape included."""
    assert found is not None, "nothing comes back yet: does it return?"
    expected = torch.as_tensor(expected, dtype=torch.float32)
    found = torch.as_tensor(found)
    assert found.shape == expected.shape, (
        f"the shape is {tuple(found.shape)}, the docstring says {tuple(expected.shape)}"
    )
    close = torch.isclose(found.float(), expected, atol=1e-4)
    if not close.all():
        if len(close.flatten()) > 12:  # too many to read: the first that differs
            first = tuple((~close).nonzero()[0].tolist())
            question, found, expected = f"{question}\nat {list(first)}:", found[first], expected[first]
        expected = expected.to(found.dtype)
        raise AssertionError(f"{question}\nyours:    {plain(found.tolist())}\nexpected: {plain(expected.tolist())}")


def plain(x):
    """Round the numbers of nested lists, to read them."""
    return [plain(y) for y in x] if isinstance(x, list) else round(x, 3) if isinstance(x, float) else x


# --- EXERCISE 1: masked_mean(x, mask)


def check_1(masked_mean):
    x = torch.tensor([[[1.0, 10.0], [3.0, 30.0], [500.0, 500.0]], [[2.0, 4.0], [4.0, 6.0], [6.0, 8.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    found = masked_mean(x, mask)
    assert found is None or found[0].max() < 100, (
        "does padding count? 500 stands where no one spoke. True is real, False is padding"
    )
    if found is not None and found.shape == (2, 2):
        four = torch.tensor([[[1.0], [3.0], [0.0], [0.0]]]), torch.tensor([[True, True, False, False]])
        alone = masked_mean(*four)
        assert abs(alone.flatten()[0] - 4 / 3) > 1e-3, "divided by one more than the real steps?"
        assert abs(found[0, 0] - 4 / 3) > 1e-3, "divided by all steps T, not by the real ones?"
        assert abs(found[0, 0] - 4 / 5) > 1e-3, "divided by the real steps of the whole batch?"
    same(found, [[2.0, 20.0], [4.0, 6.0]], "the mean of the real steps is (1 + 3) / 2 = 2")
    x[0, 2] = float("nan")
    same(masked_mean(x, mask), [[2.0, 20.0], [4.0, 6.0]],
         "0 * NaN? It is NaN: replace the padding (masked_fill), do not multiply it")  # fmt: skip
    nothing = masked_mean(x, torch.zeros(2, 3, dtype=torch.bool))
    same(nothing, torch.zeros(2, 2), "no real step: 0 / 0? At a dialogue's edge that happens")
    assert x[0, 2].isnan().all(), "x itself was changed: masked_fill makes a copy, masked_fill_ does not"
    some = masked_mean(x, torch.tensor([[False, False, False], [True, True, True]]))
    same(some, [[0.0, 0.0], [4.0, 6.0]], "one utterance without a real step, one with: each has its own count")
    x[0, 0, 0] = float("nan")
    assert masked_mean(x, mask)[0, 0].isnan(), "a NaN in a *real* step is hidden: it is a bug that should show"
    hole = masked_mean(torch.tensor([[[1.0], [9.0], [3.0]]]), torch.tensor([[True, False, True]]))
    same(hole, [[2.0]], "real steps need not be the first ones: count where the mask is")
    x = torch.ones(1, 3, 1, requires_grad=True)
    found = masked_mean(x, torch.tensor([[True, False, True]]))
    assert found.requires_grad, "no gradient comes back: was x copied, detached or made a number?"
    assert found.dtype == x.dtype, f"float32 goes in, {found.dtype} comes out"
    found.sum().backward()
    same(x.grad, [[[0.5], [0.0], [0.5]]], "the gradient of a mean is 1 / number of real steps, 0 on padding")


# --- EXERCISE 2: Eq. (1), cross_modal_attention(x_t, x_s, w_q, w_k, w_v, mask_s)


def check_2(attention):
    # d_t = 1, d_s = 2, d_k = 4: Q = 2, K = (ln 9, 0): scores 2 ln 9 / sqrt(4) = ln 9 and 0.
    x_t = torch.tensor([[[1.0], [0.0]]])
    x_s = torch.tensor([[[torch.log(torch.tensor(9.0)), 10.0], [0.0, 20.0]]])
    w_q, w_k = torch.tensor([[2.0, 0, 0, 0]]), torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    w_v = torch.tensor([[0.0], [1.0]])
    answer = attention(x_t, x_s, w_q, w_k, w_v)
    assert answer is not None, "nothing comes back yet: does it return?"
    out, weights = answer
    assert weights.shape == (1, 2, 2), f"weights are (B, T_t, T_s), not {tuple(weights.shape)}"
    assert not torch.allclose(weights.sum(1), torch.ones(1, 2)) or torch.allclose(
        weights.sum(2), torch.ones(1, 2)
    ), "softmax over the queries, not the keys? What a query takes must sum to 1"
    p = weights[0, 0, 0].item()
    assert abs(p - 81 / 82) > 1e-3, "is sqrt(d_k) missing? Or d_t, or d_v, taken for d_k?"
    assert abs(p - 9**2**0.5 / (9**2**0.5 + 1)) > 1e-3, "the root of d_s or T_s, not of d_k?"
    assert abs(p - 9**0.5 / (9**0.5 + 1)) > 1e-3, "divided by d_k, not by its root?"
    same(weights, [[[0.9, 0.1], [0.5, 0.5]]], "scores ln 9 and 0 give 9/10 and 1/10")
    same(out, [[[11.0], [15.0]]], "V carries 10 and 20: 9/10 of 10 and 1/10 of 20 is 11")
    out, weights = attention(x_t, x_s, w_q, w_k, w_v, torch.tensor([[True, False]]))
    assert abs(weights[0, :, 0].sum() - 1) > 1e-4 or weights[0, 0, 0] > 0.99, (
        "softmax over the queries, not the keys? What a query takes must sum to 1"
    )
    assert weights[0, 0, 1] == 0, "a padded step of the source gets weight: where is mask_s?"
    same(weights, [[[1.0, 0.0], [1.0, 0.0]]], "masked after the softmax? The rest must sum to 1 again")
    own = torch.tensor([[True, True], [True, False]])
    own = attention(x_t.repeat(2, 1, 1), x_s.repeat(2, 1, 1), w_q, w_k, w_v, own)[1]
    same(own, [[[0.9, 0.1], [0.5, 0.5]], [[1.0, 0.0]] * 2],
         "two utterances, two masks: mask_s (B, T_s) needs an axis for the queries")  # fmt: skip
    # K = [[1, 2], [3, 4]], two queries: reshaped to (d_k, T_s) it differs from K^T.
    eye, k = torch.eye(2), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    mine = attention(q, k, eye, eye, eye)[1]
    e = torch.exp(torch.tensor(2 / 2**0.5)).item()  # scores 1, 3 and 2, 4, over sqrt(2)
    same(mine, [[[1 / (1 + e), e / (1 + e)]] * 2], "K is transposed, not reshaped: row t of K is step t")
    masked = attention(q, k, eye, eye, eye, torch.tensor([[True, False]]))[1]
    assert not torch.allclose(masked.sum(1), torch.tensor([[1.0, 0.0]]), atol=1e-4), (
        "softmax over the queries, not the keys? What a query takes must sum to 1"
    )
    w_q.requires_grad_(True)
    out, weights = attention(x_t, x_s, w_q, w_k, w_v, torch.tensor([[False, False]]))
    same(weights.detach(), torch.zeros(1, 2, 2), "no real step: NaN, or weights on padding? The docstring says zero")
    if out.requires_grad:
        out.sum().backward()
        assert w_q.grad is None or w_q.grad.isfinite().all(), (
            "a row of nothing but -inf: the answer is zero, its gradient NaN"
        )
    far = attention(300 * x_t, x_s, w_q.detach(), w_k, w_v)[1]
    same(far[:, :1], [[[1.0, 0.0]]], "exp(659) is infinite: a softmax takes the highest score off first")
    far = attention(300 * x_t, -x_s, w_q.detach(), w_k, w_v, torch.tensor([[True, False]]))[1]
    same(far[:, :1], [[[1.0, 0.0]]], "the only real step has a score of -659: is the padding's lower? Fill with the lowest number")
    loud = torch.tensor([[[0.0, 10.0], [1e6, 20.0]]])  # the padding's score is far above the real one's
    same(attention(x_t, loud, w_q.detach(), w_k, w_v, torch.tensor([[True, False]]))[1], [[[1.0, 0.0]] * 2],
         "padding may hold any finite number: adding -10000 is not enough, fill with the lowest")  # fmt: skip
    same(attention(x_t, loud, w_q.detach(), w_k, w_v, torch.tensor([[False, True]]))[1], [[[0.0, 1.0]] * 2],
         "real steps need not be the first ones: use the mask itself")  # fmt: skip
    two = torch.tensor([[False, False], [True, False]])
    both = attention(x_t.repeat(2, 1, 1), x_s.repeat(2, 1, 1), w_q.detach(), w_k, w_v, two)[1]
    same(both, [[[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]],
         "one utterance without a real step, one with: each has its own mask")  # fmt: skip
    w_q.grad = None
    out, _ = attention(x_t, x_s, w_q, w_k, w_v)
    assert out.requires_grad, "no gradient reaches W_Q: are the weights detached?"
    out.sum().backward()
    assert w_q.grad is not None and w_q.grad.abs().max() > 0, "no gradient reaches W_Q: are the weights detached?"


# --- EXERCISE 3: SqueezeExcitation.gates(self, x, mask)


def check_3(gates):
    se = model.SqueezeExcitation(2)
    with torch.no_grad():
        se.reduce.weight.copy_(torch.tensor([[1.0, 2.0]]))
        se.reduce.bias.fill_(0.0)
        se.expand.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        se.expand.bias.copy_(torch.tensor([0.0, 2.0]))
    # One utterance, four steps (one real), two layers, three features: layer means 0.3 and 0.1.
    x = torch.tensor([[[0.2, 0.4, 0.3], [0.0, 0.2, 0.1]], *[[[9.0] * 3, [-9.0] * 3]] * 3])[None]
    real_1 = torch.tensor([[True, False, False, False]])
    found = gates(se, x, real_1)
    assert found is not None, "nothing comes back yet: does it return?"
    assert found.shape == (1, 2), f"one gate a layer and utterance, (B, L), not {tuple(found.shape)}"
    assert abs(found.sum() - 1) > 1e-4, "a softmax? Gates are sigmoids: layers need not compete"
    assert not torch.allclose(found, torch.tensor([[0.5, 1.5]]), atol=1e-3), (
        "no sigmoid? 0.5 and 1.5 are the excitation itself, not gates in (0, 1)"
    )
    assert found.max() < 1, "a gate above 1: is the sigmoid the last step?"
    unmasked = torch.sigmoid(torch.tensor([0.0, 2.0]))  # means 6.8 and -6.7: the ReLU gives 0
    assert not torch.allclose(found[0], unmasked, atol=1e-3), (
        "do padded steps count in the squeeze? The padding mask of Fig. 2 leads there"
    )
    assert not torch.allclose(found[0], torch.sigmoid(torch.tensor([0.125, 1.875])), atol=1e-3), (
        "are padded steps zeroed, and the sum divided by T? Divide by the real steps"
    )
    linear = torch.sigmoid(torch.tensor([0.5, 1.5]))
    same(found, linear[None], "squeeze 0.3 and 0.1; 0.3 + 2 * 0.1 = 0.5; ReLU; gates sigmoid(0.5), sigmoid(2 - 0.5)")
    pair = torch.cat([x, 10 * x])
    found = gates(se, pair, real_1.repeat(2, 1))
    same(found[:1], linear[None], "the gates of one utterance depend on the other: keep the batch apart")
    same(found[1], torch.sigmoid(torch.tensor([5.0, -3.0])), "squeeze 3 and 1; 3 + 2 * 1 = 5; sigmoid(5), sigmoid(2 - 5)")
    pair.requires_grad_(True)
    gates(se, pair, real_1.repeat(2, 1)).sum().backward()
    assert pair.grad is not None and pair.grad.abs().max() > 0, "the squeeze has no gradient (detach, no_grad?)"
    # Three steps, a hole in the middle. Layer means: (1, 0) and (-0.4, 0); the bias of reduce is 0.1.
    with torch.no_grad():
        se.reduce.bias.fill_(0.1)
    hole = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]], [[50.0, 50.0], [50.0, 50.0]], [[-0.4, -0.4], [0.0, 0.0]]]])
    found, real = gates(se, hole, torch.tensor([[True, False, True]])), torch.tensor
    steps = torch.sigmoid(real([[0.55, 1.45]]))  # ReLU of each step, 1.1 and 0, then the mean
    assert not torch.allclose(found, steps, atol=1e-3), "squeeze first, then one excitation for each utterance"
    assert not torch.allclose(found, torch.sigmoid(real([[0.7, 1.3]])), atol=1e-3), "a sum over time? The squeeze is a mean"
    assert not torch.allclose(found, torch.sigmoid(real([[0.3, 1.7]])), atol=1e-3), (
        "is b_1 missing, or are padded steps zeroed and divided by T?"
    )
    same(found, torch.sigmoid(real([[0.4, 1.6]])), "squeeze (1 - 0.4) / 2 = 0.3 and 0; 0.3 + 0.1 = 0.4; sigmoid(0.4), sigmoid(1.6)")
    with torch.no_grad():
        se.reduce.bias.fill_(0.0)
    mixed = gates(se, torch.cat([x, x]), torch.cat([real_1 & False, real_1]))
    assert mixed.isfinite().all(), "an utterance with no real step at all: 0 / 0? Use masked_mean"
    same(mixed, torch.stack([unmasked, linear]), "one utterance without a real step, one with: each has its own squeeze")
    nothing = gates(se, x, real_1 & False)
    assert nothing.isfinite().all(), "an utterance with no real step at all: 0 / 0? Use masked_mean"
    same(nothing, unmasked[None], "no real step: the squeeze is 0, and sigmoid of the bias is left")
    x = -x
    same(gates(se, x, real_1), unmasked[None],
         "where is the ReLU? A bottleneck below 0 says 0: sigmoid of the bias is left")  # fmt: skip


# --- EXERCISE 4: ContextConv.forward(self, x, mask)


def check_4(forward):
    conv = model.ContextConv(3)
    with torch.no_grad():  # the middle of the kernel: 1, 10, 100 for the three utterances
        conv.conv.weight.zero_()
        conv.conv.weight[0, :, 1, 1] = torch.tensor([1.0, 10.0, 100.0])
        conv.conv.weight[0, 1, 0, 1] = 1000.0  # and the target's token before
        conv.conv.bias.zero_()
    x = torch.arange(1.0, 7.0).view(1, 3, 2, 1)  # utterances (1 2), (3 4), (5 6), one feature
    every = torch.ones(1, 3, 2, dtype=torch.bool)
    answer = forward(conv, x, every)
    assert answer is not None, "nothing comes back yet: does it return?"
    out, _ = answer
    assert out.shape == (1, 2, 1), f"x_t is (B, T, d), a sequence still, not {tuple(out.shape)}"
    same(out, [[[531.0], [3642.0]]], "utterances are channels; 1 + 10 * 3 + 100 * 5 = 531 [A4]")
    mask = torch.tensor([[[True, True], [True, False], [False, False]]])
    out, found = forward(conv, x, mask)
    same(out[:, :1], [[[31.0]]], "an utterance that does not exist still speaks: zero it first [A6]")
    same(out, [[[31.0], [3002.0]]], "a padded token still speaks: zero it before the convolution")
    assert found.tolist() != [[True, False]], "the target's mask alone? By default any of the nine [A5]"
    assert found.tolist() != [[False, False]], "all instead of any? [A5]"
    same(found, [[1.0, 1.0]], "a step of X_T is real where any utterance has a token [A5]")
    assert torch.equal(x, torch.arange(1.0, 7.0).view(1, 3, 2, 1)), "x itself was changed: masked_fill, not masked_fill_"
    assert found.dtype == torch.bool, f"masks are bool: True = real; this one is {found.dtype}"
    # Two windows of two features, a bias, and a kernel that looks at the feature before.
    with torch.no_grad():
        conv.conv.weight[0, 1, 1, 0] = 0.5
        conv.conv.bias.fill_(-7.0)
    pair = torch.cat([x.repeat(1, 1, 1, 2), -x.repeat(1, 1, 1, 2)])
    out, _ = forward(conv, pair, mask.repeat(2, 1, 1))
    assert out.shape == (2, 2, 2), f"two windows of two tokens and two features come in; {tuple(out.shape)} comes out"
    expected = [[[24.0, 25.5], [2995.0, 2995.0]], [[-38.0, -39.5], [-3009.0, -3009.0]]]
    same(out, expected, "the whole Conv2D: its bias, its three features, and nothing behind it [A4]")
    five = model.ContextConv(5, "target")
    odd = torch.tensor([[[True, False], [False, True], [True, True], [False, False], [True, False]]])
    same(forward(five, torch.zeros(1, 5, 2, 1), odd)[1], [[1.0, 1.0]], "of five utterances the target is the third: C // 2")
    conv.text_mask = "target"
    out, found = forward(conv, x, mask)
    same(found, [[1.0, 0.0]], "--text-mask target: the tokens of the target, which stands in the middle [A5]")
    same(out[found], [[24.0]], "--text-mask target changes the mask alone: padding is zeroed as before [A6]")


# --- EXERCISE 5: TransformerBlock.forward(self, x_t, x_s, mask_s), vanilla and CMT


def forward_parts(block, x):
    y = block.norm1(x)
    return block.attend(y, y)[0]


def check_5(forward):
    torch.manual_seed(0)
    x_t, x_s = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    block = model.TransformerBlock(8, dropout=0.0, residual=True)
    # PyTorch's own encoder layer, one head, with the same matrices; its output matrix is the unit.
    oracle = nn.TransformerEncoderLayer(8, 1, 32, 0.0, batch_first=True).eval()
    with torch.no_grad():
        a = oracle.self_attn
        a.in_proj_weight.copy_(torch.cat([block.w_q.T, block.w_k.T, block.w_v.T]))
        a.in_proj_bias.zero_(), a.out_proj.bias.zero_(), a.out_proj.weight.copy_(torch.eye(8))
        for mine, theirs in ((block.feed_forward[0], oracle.linear1), (block.feed_forward[2], oracle.linear2)):
            theirs.load_state_dict(mine.state_dict())
        found = forward(block, x_t, x_t)
        assert found is not None, "nothing comes back yet: does it return?"
        h = x_t + forward_parts(block, x_t)
        pre = h + block.feed_forward(block.norm2(h))
        assert found.shape != pre.shape or not torch.allclose(found, pre, atol=1e-4), (
            "norm first? The vanilla Transformer of 2017 adds, then normalises [A8]"
        )
        same(found, oracle(x_t), "with itself as source it is the vanilla encoder layer [A8]")
        cross = model.TransformerBlock(8, dropout=0.0, residual=False)
        out = forward(cross, x_t, x_s)
        assert out.shape == x_t.shape, "as long as the target: its steps ask the queries"
        # All steps of the source alike: whatever is asked, the same is answered.
        out = forward(cross, x_t, x_s[:, :1].expand(1, 5, 8))
        assert torch.allclose(out[:, 0], out[:, 1], atol=1e-4), (
            "do the queries come through? Without the residual only the source's values do [A7]"
        )
        cross.norm1.weight.copy_(torch.linspace(0.5, 2, 8))
        h = cross.norm1(cross.attend(x_t, x_s)[0])
        assert not torch.allclose(forward(cross, x_t, x_s), cross.norm2(cross.feed_forward(h)), atol=1e-4), (
            "`residual` switches the first add alone: around the feed-forward it stays"
        )
        same(forward(cross, x_t, x_s), cross.norm2(h + cross.feed_forward(h)),
             "norm1 after the attention, also without residual, norm2 after the feed-forward?")  # fmt: skip
        torch.manual_seed(0)
        wet = model.TransformerBlock(8, dropout=0.5, residual=True).train()
        assert not torch.equal(forward(wet, x_t, x_t), forward(wet, x_t, x_t)), "where is the dropout?"
        # A dropout of 1 drops both sublayers whole, so what was added is left.
        gone = model.TransformerBlock(8, dropout=1.0, residual=True).train()
        for p in gone.parameters():
            p.copy_(torch.randn(p.shape))
        same(forward(gone, x_t, x_t), gone.norm2(gone.norm1(x_t)),
             "dropout stands behind each of the two sublayers, before its add: x + dropout(sublayer(x))")  # fmt: skip
        h = block.norm1(x_t + block.attend(x_t, x_s)[0])
        found = forward(block, x_t, x_s)
        assert not torch.allclose(found, block.norm2(x_t + block.feed_forward(h)), atol=1e-4), (
            "the second add takes the first sublayer's output, not x_t again"
        )
        same(found, block.norm2(h + block.feed_forward(h)),
             "what is added is the target, x_t, whenever self.residual says so")  # fmt: skip
        mask = torch.tensor([[True, True, False, False, False]])
        masked = forward(cross, x_t, x_s, mask)
        same(masked, forward(cross, x_t, x_s[:, :2]), "does mask_s reach Eq. (1)?")
        long = torch.randn(1, 5, 8)  # as long as the source
        same(forward(cross, long, x_s, mask), forward(cross, long, x_s[:, :2]),
             "mask_s is the source's: it says nothing of the target's steps")  # fmt: skip
        same(forward(block, long, long, mask), forward(block, long, long[:, :2]),
             "does mask_s reach Eq. (1) in the encoder, too, and nothing else?")  # fmt: skip


# --- EXERCISE 6: unweighted_accuracy(y_true, y_pred)


def check_6(unweighted_accuracy):
    truth, guess = [0] * 8 + [1, 1], [0] * 8 + [0, 1]  # 8 of 8, 1 of 2
    found = unweighted_accuracy(truth, guess)
    assert found is not None, "nothing comes back yet: does it return?"
    assert found == found, "NaN: 0 / 0 for a class without an utterance? Leave it out of the mean"
    assert abs(found - 0.9) > 1e-3, "9 of 10 are right: that is WA. Each class must weigh the same"
    assert abs(found - (8 / 9 + 1) / 2) > 1e-3, "the mean precision? Divide by how many *are* of the class"
    assert abs(found - 1.5 / 4) > 1e-3, "classes that do not occur count as wrong?"
    assert abs(found - 75) > 1e-3, "a percentage? Everywhere in the code accuracies are fractions of 1"
    same(found, 0.75, "recall 8/8 and 1/2: (1 + 0.5) / 2")
    found = unweighted_accuracy([2, 2, 3], [1, 2, 0])
    assert abs(found - 0.125) > 1e-3, "classes 0 and 1 are only guessed: leave them out of the mean"
    same(found, 0.25, "recall 1/2 and 0/1")
    found = unweighted_accuracy(torch.tensor(truth), torch.tensor(guess))
    same(found, 0.75, "as lists they gave 0.75, as tensors not: elements of tensors are no numbers to a dict or set")
    assert isinstance(found, float), f"a float, for result.json; this is a {type(found).__name__}"


# --- EXERCISE 7: split(corpus, fold, seed)


def corpus_of(sessions=5):
    """Sessions of two speakers, three turns each, one of them out of the four classes."""
    return [
        data.Utterance(f"Ses0{s}F_impro01_{w}{k:03}", s, f"Ses0{s}F_impro01", f"Ses0{s}{w}", k, k + 1, "oh",
                       ("neu", "sad", "xxx")[k], Path("x.wav"))
        for s in range(1, sessions + 1) for w in "FM" for k in range(3)
    ]  # fmt: skip


class Salted(str):
    """A string whose place in a set depends on `salt`, as those of a new process do."""

    def __new__(cls, text, salt):
        s = super().__new__(cls, text)
        s.salt = salt
        return s

    def __hash__(self):
        return hash((self.salt, str(self))) if self.salt else 0


def check_7(split):
    corpus, devs = corpus_of(), set()
    for seed in range(12):
        answer = split(corpus, 2, seed)
        assert answer is not None, "nothing comes back yet: does it return?"
        parts = [[u.id for u in part] for part in answer]
        train_set, dev, test = answer
        who = [{u.speaker for u in part} for part in answer]
        assert not any(u.label is None for part in answer for u in part), "only the four classes are targets"
        assert who[2] == {"Ses02F", "Ses02M"}, "test on the whole session of the fold, and nothing else"
        assert not who[1] & who[2], "the development speaker is of the test session: that is cheating"
        assert not who[0] & who[2], "test speakers in training: that is cheating"
        assert who[1], "no development utterances: was the speaker drawn from the test session, too?"
        assert len(who[1]) == 1, "development is one speaker, not some utterances"
        assert not who[0] & who[1], "the development speaker is left in training"
        assert len(sum(parts, [])) == 20 == len(set(sum(parts, []))), "an utterance is lost, or there twice"
        assert [[u.id for u in part] for part in split(corpus, 2, seed)] == parts, "the same seed, another split"
        devs |= who[1]
    assert len(devs) > 2, "does the seed draw the speaker? Twelve seeds drew the same"
    states = random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    split(corpus, 2, 0)
    assert states == (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()), (
        "the global random numbers moved on: draw from a generator of your own, random.Random(...)"
    )

    def place(fold, seed):
        rest = sorted({u.speaker for u in corpus if u.session != fold})
        return rest.index(split(corpus, fold, seed)[1][0].speaker)

    places = [[place(fold, seed) for seed in range(12)] for fold in (2, 3)]
    assert places[0] != places[1], "does the fold draw, too? Else all folds of a seed share their luck"
    assert len({place(fold, 0) for fold in range(1, 6)}) > 1, "with seed 0, the default, all folds draw alike: is 0 a factor of what draws?"
    drawn, builtin = [], hash
    for salt in (0, 1):  # the hash of a string differs from process to process
        with mock.patch.object(builtins, "hash", lambda x, salt=salt: builtin(x) + salt):
            drawn.append([split(corpus, 2, seed)[1][0].speaker for seed in range(12)])
    assert drawn[0] == drawn[1], "hash() of a string differs in every process: the run that resumes draws another speaker"
    salted = [
        [split([replace(u, speaker=Salted(u.speaker, salt)) for u in corpus], 2, seed)[1][0].speaker
         for seed in range(12)] for salt in range(6)
    ]  # fmt: skip
    assert all(drawn == salted[0] for drawn in salted), (
        "a set has another order in every process, so the same seed draws another speaker: sort them"
    )
    assert corpus == corpus_of(), "the corpus itself was changed: its other turns are context still"
    drawn = {split(corpus, 2, seed)[1][0].speaker for seed in range(200)}
    assert len(drawn) == 8, f"200 seeds draw {len(drawn)} of the eight training speakers: is one out of reach?"
    mute = ("Ses01F", "Ses03M")
    quiet = [replace(u, emotion="xxx") if u.speaker in mute else u for u in corpus]
    assert all(split(quiet, 2, seed)[1] for seed in range(12)), (
        "a speaker who has no utterance of the four classes was drawn: development is empty"
    )
    for empty, part in (
        ("test", [u for u in corpus if u.session != 2]),
        ("training", [u for u in corpus if u.session == 2 or u.speaker == "Ses01F"]),
        ("development", [u for u in corpus if u.session == 2]),
    ):  # fmt: skip
        try:
            split(part, 2, 0)
        except data.InputError:
            pass
        except Exception as error:
            raise AssertionError(f"{empty} is empty: raise InputError, not {error!r}") from None
        else:
            raise AssertionError(f"{empty} is empty, and it goes unsaid: raise InputError")
    solo = [replace(u, speaker="solo" if u.session == 1 else u.speaker) for u in corpus_of()]
    for seed in range(12):
        train_set, dev, _ = split(solo, 2, seed)
        assert not {u.speaker for u in train_set} & {u.speaker for u in dev}, (
            "who speaks is told by u.speaker, not by the id: other corpora have other ids"
        )


# --- EXERCISE 8: Patience.step(self, dev_loss)


def check_8(step):
    counts = []

    def said(losses, **settings):
        patience = train.Patience(**settings)
        answers = []
        for loss in losses:
            answers.append(step(patience, loss))
            assert answers[-1] is not None, "nothing comes back yet: does it return?"
            assert answers[-1] in ("continue", "finetune", "stop"), f"{answers[-1]!r} is none of the three answers"
            if answers[-1] == "stop":
                break  # as train.py does
        counts.append((answers[-1], patience.since_best, patience.stop_after))
        return "".join(a[0] for a in answers)

    try:
        frozen = said([1.0] + [2.0] * 10, finetune_after=None)
    except TypeError:
        raise AssertionError("finetune_after is None for a frozen system: it only stops") from None
    assert "f" not in frozen, "a frozen system only stops"
    assert frozen[-1] == "s", "a frozen system stops, too: the tenth epoch without a lower loss, not one later"
    ten = said([1.0] + [2.0] * 10)
    assert ten.count("f") == 1, "fine-tuning starts once, after 5 epochs without a lower loss"
    assert ten[5] == "f", "an epoch too early or too late? The fifth without a lower loss triggers"
    assert said([1.0] * 6)[-1] == "f", "is an equal loss lower? It is not"
    falling = said([1.0, 2.0, 1.9, 1.8, 1.7, 1.6])
    assert falling[-1] == "f", "lower than the epoch before is not lower than the lowest"
    endless = said([1.0] + [2.0] * 30)
    assert "s" in endless, "it never stops"
    assert len(endless) != 12, "an epoch too late: the tenth without a lower loss stops"
    assert ten[-1] == "s", "two counters? One goes on: 5 epochs to the trigger, 10 to the stop [A9]"
    assert ten == "cccccfcccc" + "s", ten
    again = said([1.0] + [2.0] * 6 + [0.5] + [2.0] * 10)
    assert again.count("f") == 1, "a second trigger? Fine-tuning does not start again"
    assert again == "cccccfc" + "c" + "ccccccccc" + "s", "a lower loss sets the count to 0, also later"
    assert frozen == "c" * 10 + "s", frozen
    late = said([1.0] + [2.0] * 15, reset_at_finetune=True)
    assert late == "cccccf" + "c" * 9 + "s", "what does reset_at_finetune do? The count starts again [A9]"
    both = said([1.0, 2.0, 2.0], finetune_after=2, stop_after=2)
    assert both == "ccs", "both are due: the docstring says stop"
    relative = said([10.0, 9.5, 9.45], min_decrease=0.1, finetune_after=None, stop_after=2)
    assert relative == "ccs", "is min_decrease used? It is relative to the lowest loss [A17]"
    creeping = said([10.0, 9.5, 9.2, 8.9], min_decrease=0.1, finetune_after=None, stop_after=3)
    assert creeping == "cccc", "9.5 did not count as lower than 10, so what must 8.9 be compared with?"
    assert said([1.0] + [float("nan")] * 10)[-1] == "s", "NaN is not lower than anything"
    slow = said([1.0 - 1e-6 * k for k in range(20)])
    assert slow == "c" * 20, "however little lower is lower: §3.2 knows no tolerance"
    for answer, count, limit in counts:  # the loop of train.py ends on since_best
        assert (answer == "stop") == (count >= limit), (
            f"it answers {answer!r} when since_best is {count} of {limit}: count in `since_best`, on which the loop ends"
        )
    patience = train.Patience()
    for loss in [0.5] + [1.0] * 6:
        step(patience, loss)
    assert (patience.best, patience.finetuning) == (0.5, True), "`best` and `finetuning` hold the counts: a checkpoint keeps them"


# --- EXERCISE 9: data.batch(rows, windows, sources, device), frozen and live states alike


def check_9(batch):
    windows = torch.tensor([[-1, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, -1]])
    asked = []

    def text(rows):  # a source: row k of the corpus is the number 10 k, and odd rows are not real
        asked.append(rows.tolist())
        return 10.0 * rows[:, None], rows[:, None] % 2 == 0

    def windows_seen(rows):
        try:
            answer = batch(torch.tensor(rows), windows, {"text": text}, "cpu")
        except KeyError:
            raise AssertionError("a text system has no audio source: ask those in `sources`") from None
        assert answer is not None, "nothing comes back yet: does it return?"
        assert len(answer["text"]) == 3, "text is (states, mask, context): what stands where in the windows is missing"
        states, mask, context = answer["text"]
        assert mask.tolist() == [[row % 2 == 0] for row in asked[-1]], "the second of three is the source's own mask"
        assert -1 not in asked[-1], "row -1 is no utterance: do not ask the source for it"
        assert len(asked[-1]) == len(set(asked[-1])), "a neighbour that two windows share goes twice"
        states = torch.cat([states[:, 0], torch.tensor([-1.0])])  # row -1 is the empty one
        assert context.max() < len(states) - 1, "the context must name rows of the batch's states"
        return states[context].tolist()

    found = windows_seen([2, 3])  # no edge in it
    wrong = "windows of the wrong utterances (row k reads 10 k, no utterance -1)\nyours:    {}\nexpected: {}"
    expected = [[10, 20, 30], [20, 30, 40]]
    assert found[0] not in ([-1, 10, 20], [-1, 20, 30]), "one too low: -1 is not always among the distinct ones"
    assert found == expected, wrong.format(found, expected)
    assert windows[0].tolist() == [-1, 0, 1], "`windows` itself was changed: the next batch needs it"
    found, expected = windows_seen([4, 0]), [[30, 40, -1], [-1, 0, 10]]  # edges on both sides, not in order
    assert found == expected, wrong.format(found, expected)
    assert sorted(asked[-1]) == [0, 1, 3, 4], "row 2 is in no window of these two, and was asked for"
    assert len(asked) == 2, "the source is called twice for a batch: a live one would run twice"
    live = torch.tensor([1.0], requires_grad=True)

    def living(rows):
        return live.half() * rows[:, None], rows[:, None] >= 0

    states = batch(torch.tensor([1]), windows, {"text": living}, "cpu")["text"][0]
    assert states.requires_grad, "no gradient reaches the live upstream: fine-tuning would change nothing"
    assert states.dtype == torch.float16, f"the source gave 16 bits, {states.dtype} came out: the model casts"
    moved = batch(torch.tensor([1]), windows, {"text": living}, "meta")["text"]
    where = [x.device.type for x in moved]
    assert where == ["meta"] * 3, f"where is `device`? States, mask and context are on {where}"
    seen = []

    def audio(rows):
        seen.append(rows.tolist())
        return rows[:, None], rows[:, None] >= 0

    answer = batch(torch.tensor([2, 0]), windows, {"audio": audio}, "meta")
    assert seen == [[2, 0]], "audio is asked for the batch's own rows, in their order"
    assert answer["audio"][0].device.type == "meta", "where is `device`? All that comes back must be on it"
    answer = batch(torch.tensor([2, 0]), windows, {"audio": audio, "text": text}, "cpu")
    assert set(answer) != {"audio", "text"} or answer["audio"][1].dtype == torch.bool, "audio is (states, mask), as the source gives them"
    assert set(answer) == {"audio", "text"}, f"two sources are two modalities; only {list(answer)} came back"


SOLUTIONS = {
    1: model.masked_mean, 2: model.cross_modal_attention, 3: model.SqueezeExcitation.gates,
    4: model.ContextConv.forward, 5: model.TransformerBlock.forward,
    6: evaluate.unweighted_accuracy, 7: data.split, 8: train.Patience.step, 9: data.batch,
}  # fmt: skip


def verdict(n):
    """Check an exercise: "passed", or the question that leads on."""
    try:
        globals()[f"check_{n}"](SOLUTIONS[n])
    except AssertionError as error:
        return str(error).split("\nassert ")[0]
    except SystemExit as error:  # an empty body of a student's copy
        return str(error)
    except Exception as error:
        return f"it stops with {type(error).__name__}: {error}. What shapes and types stand on that line?"
    return "passed"


@pytest.mark.parametrize(
    "n", [pytest.param(n, marks=getattr(pytest.mark, f"ex{n}")) for n in SOLUTIONS]
)
def test_the_answer(n):
    question = verdict(n)
    if question != "passed":  # alone: the check's own lines would give half of the answer away
        pytest.fail(question, pytrace=False)
