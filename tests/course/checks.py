"""The checks of the nine exercises. They accept every right answer, whatever its style.

    python -m tests.course.classroom check     all nine
    python -m pytest -m ex3                    the check of EXERCISE 3

Each exercise is marked in the code. Write its body from the docstring and the paper. A
check that fails asks a question that leads on. The checks never look at a solution, and
import nothing but the four files, so they can be run on another copy of those.
"""

import builtins
import contextlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn, tensor

import data
import evaluate
import model
import train

NOTHING = "nothing is returned yet: is there a return statement?"
Mistakes = Sequence[tuple[object, str]]


def compare(actual, expected, question: str, mistakes: Mistakes = ()) -> None:
    """Fail with the question if actual is not expected.

    mistakes   pairs of a wrong value that is often seen, and its own question
    """
    assert actual is not None, NOTHING
    actual = torch.as_tensor(actual).detach()
    expected = torch.as_tensor(expected, dtype=torch.float32)
    assert actual.shape == expected.shape, (
        f"the shape is {tuple(actual.shape)}, and the docstring says "
        f"{tuple(expected.shape)}"
    )
    close = torch.isclose(actual.float(), expected, atol=1e-4)
    if close.all():
        return
    for value, question_of_mistake in mistakes:
        value = torch.as_tensor(value, dtype=torch.float32)
        if torch.allclose(actual.float(), value, atol=1e-3):
            question = question_of_mistake
    if expected.numel() > 12:
        # That is too much to read, so show the first number that differs.
        first = tuple((~close).nonzero()[0].tolist())
        question += f"\nat {list(first)}:"
        actual = actual[first]
        expected = expected[first]
    expected = expected.to(actual.dtype)
    raise AssertionError(
        f"{question}\nyours:    {rounded(actual.tolist())}"
        f"\nexpected: {rounded(expected.tolist())}"
    )


def rounded(x):
    """Round the numbers of nested lists, to read them."""
    if isinstance(x, list):
        return [rounded(y) for y in x]
    return round(x, 3) if isinstance(x, float) else x


def set_weights(layer: nn.Module, weight: Sequence, bias: Sequence) -> None:
    with torch.no_grad():
        layer.weight.copy_(tensor(weight))
        layer.bias.copy_(tensor(bias))


# --- EXERCISE 1: masked_mean(x, mask) -------------------------------------------------


def check_1(masked_mean: Callable) -> None:
    x = tensor(
        [
            [[1.0, 10.0], [3.0, 30.0], [500.0, 500.0]],
            [[2.0, 4.0], [4.0, 6.0], [6.0, 8.0]],
        ]
    )
    mask = tensor([[True, True, False], [True, True, True]])
    means = [[2.0, 20.0], [4.0, 6.0]]
    total = tensor([[4.0, 40.0], [12.0, 18.0]])
    padding = "does the padding count? 500 is in a step where the mask is False"
    compare(
        masked_mean(x, mask),
        means,
        "the mean of the real steps is (1 + 3) / 2 = 2",
        [
            (x.mean(1), padding),
            (x.sum(1) / tensor([[2], [3]]), padding),
            (total / 3, "is the sum divided by all T steps? Divide by the real ones"),
            (total / 5, "is the sum divided by the real steps of the whole batch?"),
            (total / tensor([[3], [4]]), "is it divided by one more than real steps?"),
        ],
    )
    x[0, 2] = torch.nan
    compare(
        masked_mean(x, mask),
        means,
        "is it 0 * NaN? That is NaN. Replace the padding (masked_fill)",
    )
    zeros = "an utterance without a real step: is it 0 / 0? The docstring says zeros"
    compare(masked_mean(x, mask & False), torch.zeros(2, 2), zeros)
    assert x[0, 2].isnan().all(), (
        "x itself has changed: masked_fill makes a copy, masked_fill_ does not"
    )
    compare(
        masked_mean(x, mask & tensor([[False], [True]])),
        [[0.0, 0.0], [4.0, 6.0]],
        "one utterance has no real step, and one has: each needs its own count",
    )
    x[0, 0, 0] = torch.nan
    assert masked_mean(x, mask)[0, 0].isnan(), (
        "a NaN in a *real* step is hidden: it is a bug, and it must show"
    )
    x = tensor([[[1.0], [9.0], [3.0]]], requires_grad=True)
    mean = masked_mean(x, tensor([[True, False, True]]))
    compare(mean, [[2.0]], "real steps need not be the first ones: use the mask itself")
    assert mean.dtype == x.dtype, f"float32 goes in, and {mean.dtype} comes out"
    assert mean.requires_grad, "no gradient comes back: is x detached, or a number?"
    mean.sum().backward()
    compare(
        x.grad,
        [[[0.5], [0.0], [0.5]]],
        "the gradient of a mean is 1 / number of real steps, and 0 on padding",
    )


# --- EXERCISE 2: cross_modal_attention(x_t, x_s, w_q, w_k, w_v, mask_s), Eq. (1) ------


def check_2(attention: Callable) -> None:
    # d_t = 1, d_s = 2, d_k = 4, d_v = 1. The first query is 2 and the first key ln 9, so
    # its scores are 2 ln 9 / sqrt(4) = ln 9, and 0. The second query is 0.
    x_t = tensor([[[1.0], [0.0]]])
    x_s = tensor([[[float(np.log(9)), 10.0], [0.0, 20.0]]])
    w_q = tensor([[2.0, 0, 0, 0]])
    w_k = tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    w_v = tensor([[0.0], [1.0]])
    both = tensor([[True, True]])
    first = tensor([[True, False]])

    def weights_of(mask, x_t=x_t, x_s=x_s):
        return attention(x_t, x_s, w_q, w_k, w_v, mask)[1]

    def scaled(root):
        p = 9 ** (2 / root)
        return [[[p / (p + 1), 1 / (p + 1)], [0.5, 0.5]]]

    over_queries = "is the softmax over the queries? Each query's weights sum to 1"
    answer = attention(x_t, x_s, w_q, w_k, w_v, both)
    assert answer is not None, NOTHING
    out, weights = answer
    compare(
        weights,
        [[[0.9, 0.1], [0.5, 0.5]]],
        "the scores ln 9 and 0 give weights of 9/10 and 1/10",
        [
            ([[[0.9, 0.5], [0.1, 0.5]]], over_queries),
            (scaled(1), "is sqrt(d_k) missing, or is it the root of d_t or d_v?"),
            (scaled(2**0.5), "is it the root of d_s or T_s? Eq. (1) has d_k"),
            (scaled(4), "are the scores divided by d_k? Eq. (1) has its root"),
        ],
    )
    compare(out, [[[11.0], [15.0]]], "V has 10 and 20: 9/10 of 10 and 1/10 of 20 is 11")
    compare(
        weights_of(first),
        [[[1.0, 0.0], [1.0, 0.0]]],
        "a padded step of the source gets weight: where is mask_s?",
        [
            (
                [[[0.9, 0.0], [0.5, 0.0]]],
                "masked after the softmax? Then sum to 1 again",
            ),
            ([[[0.9, 0.0], [0.1, 0.0]]], over_queries),
        ],
    )
    compare(
        weights_of(torch.cat([both, first]), x_t.repeat(2, 1, 1), x_s.repeat(2, 1, 1)),
        [[[0.9, 0.1], [0.5, 0.5]], [[1.0, 0.0], [1.0, 0.0]]],
        "two utterances have two masks: mask_s (B, T_s) needs an axis for the queries",
    )
    # K = [[1, 2], [3, 4]] and two unit queries: scores 1, 3 and 2, 4, over sqrt(2).
    eye = torch.eye(2)
    k = tensor([[[1.0, 2.0], [3.0, 4.0]]])
    e = float(np.exp(2**0.5))
    compare(
        attention(eye[None], k, eye, eye, eye, both)[1],
        [[[1 / (1 + e), e / (1 + e)]] * 2],
        "K must be transposed, not reshaped: row t of K is step t",
    )

    # No real step.
    w_q.requires_grad_(True)
    out, weights = attention(x_t, x_s, w_q, w_k, w_v, both & False)
    no_weight = (
        "a source without a real step: NaN, or weights on padding? Make them zero"
    )
    compare(weights, torch.zeros(1, 2, 2), no_weight)
    if out.requires_grad:
        out.sum().backward()
        assert w_q.grad is None or w_q.grad.isfinite().all(), (
            "a row of nothing but -inf: the answer is zero, but its gradient is NaN"
        )
    compare(
        weights_of(
            both & tensor([[False], [True]]) & first,
            *[x_t.repeat(2, 1, 1)],
            *[x_s.repeat(2, 1, 1)],
        ),
        [[[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]],
        "one utterance has no real step, and one has: each has its own mask",
    )

    # Large numbers, in real steps and in padding.
    compare(
        weights_of(both, 300 * x_t)[:, :1],
        [[[1.0, 0.0]]],
        "exp(659) is infinite: a softmax subtracts the highest score first",
    )
    compare(
        weights_of(first, 300 * x_t, -x_s)[:, :1],
        [[[1.0, 0.0]]],
        "the only real step has a score of -659: is the padding's lower? Fill in the "
        "lowest number",
    )
    loud = tensor([[[0.0, 10.0], [1e6, 20.0]]])
    compare(
        weights_of(first, x_s=loud),
        [[[1.0, 0.0]] * 2],
        "padding may hold any finite number: adding -10000 is not enough",
    )
    compare(
        weights_of(~first, x_s=loud),
        [[[0.0, 1.0]] * 2],
        "real steps need not be the first ones: use the mask itself",
    )

    w_q.grad = None
    out, _ = attention(x_t, x_s, w_q, w_k, w_v, both)
    if out.requires_grad:
        out.sum().backward()
    assert w_q.grad is not None and w_q.grad.any(), (
        "no gradient reaches W_Q: are the weights detached?"
    )


# --- EXERCISE 3: SqueezeExcitation.forward(self, states, mask) ------------------------


def check_3(forward: Callable) -> None:
    se = model.SqueezeExcitation(2)
    set_weights(se.reduce, [[1.0, 2.0]], [0.0])
    set_weights(se.expand, [[1.0], [-1.0]], [0.0, 2.0])

    def gates(*hidden):
        return torch.sigmoid(tensor([[h, 2 - h] for h in hidden]))

    # One real step, two layers with means 0.3 and 0.1, three features.
    states = tensor([[[0.2, 0.4, 0.3], [0.0, 0.2, 0.1]]])
    mask = tensor([[True, False, False, False]])
    compare(
        forward(se, states, mask),
        gates(0.5),
        "squeeze 0.3 and 0.1; 0.3 + 2 * 0.1 = 0.5; sigmoid(0.5) and sigmoid(2 - 0.5)",
        [
            ([[0.5, 1.5]], "where is the sigmoid? A gate is between 0 and 1"),
            (tensor([[0.5, 1.5]]).softmax(1), "a softmax? Each gate is a sigmoid"),
            (gates(0.125), "is the sum divided by T? Divide by the real steps"),
            (gates(1.5), "is the squeeze a sum over the features? It is a mean"),
        ],
    )
    compare(
        forward(se, -states, mask),
        gates(0),
        "layer means -0.3 and -0.1 give -0.5, which the ReLU makes 0",
        [(gates(-0.5), "where is the ReLU?")],
    )
    compare(
        forward(se, torch.cat([states, 10 * states]), mask.repeat(2, 1)),
        gates(0.5, 5),
        "squeeze (0.3, 0.1) and (3, 1): the utterances have gates of their own",
        [(gates(2.75, 2.75), "the gates of one utterance depend on the other")],
    )

    # Two real steps with a hole between them, layer means (1, 0) and (-0.4, 0). And one
    # real step, layer means (0.2, 0.1). The bias of `reduce` is 0.1.
    set_weights(se.reduce, [[1.0, 2.0]], [0.1])
    means = tensor([[1.0, 0.0], [-0.4, 0.0], [0.2, 0.1]])
    states = means.unsqueeze(-1).repeat(1, 1, 3).requires_grad_(True)
    mask = tensor([[True, False, True], [False, True, False]])
    answer = forward(se, states, mask)
    compare(
        answer[:1],
        gates(0.4),
        "squeeze (1 - 0.4) / 2 = 0.3 and 0; 0.3 + 0.1 = 0.4; sigmoid(0.4) and (1.6)",
        [
            (gates(0.55), "squeeze over time first, then excite once per utterance"),
            (gates(0.7), "a sum over time? The squeeze is a mean"),
            (gates(0.3), "is b_1 missing? Or is the sum divided by T?"),
        ],
    )
    compare(
        answer,
        gates(0.4, 0.5),
        "which of the steps are whose? The first two belong to the first utterance",
    )
    answer.sum().backward()
    assert states.grad is not None and states.grad.any(), (
        "the squeeze has no gradient: is it detached?"
    )
    compare(
        forward(se, states[:1], tensor([[False], [True]])),
        gates(0.1, 1.1),
        "an utterance without a real step: is it 0 / 0? Its squeeze is 0",
    )
    compare(
        forward(se, states[:0], tensor([[False], [False]])),
        gates(0.1, 0.1),
        "no utterance has a real step: is it 0 / 0? The squeeze is 0",
    )


# --- EXERCISE 4: TextFeatureExtractor.forward(self, states, mask) ---------------------


class LengthGates(nn.Module):
    """In place of S&E: half the number of an utterance's real steps, for one layer."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return mask.sum(dim=1, keepdim=True) / 2


def text_extractor(dim: int, kernel: dict[tuple[int, int, int], float], bias: float):
    """Make an extractor of three texts, with one layer and without projection."""
    extractor = model.TextFeatureExtractor(1, dim, dim, 3)
    extractor.each_text.se = LengthGates()
    extractor.each_text.linear = nn.Identity()
    extractor.each_text.norm = nn.Identity()
    weight = torch.zeros(1, 3, 3, 3)
    for place, value in kernel.items():
        weight[0][place] = value
    set_weights(extractor.conv, weight.tolist(), [bias])
    return extractor


def check_4(forward: Callable) -> None:
    # The middle of the kernel: 1, 10, 100 for the three texts. And the target's token
    # before counts 1000.
    kernel = {(0, 1, 1): 1.0, (1, 1, 1): 10.0, (2, 1, 1): 100.0, (1, 0, 1): 1000.0}
    extractor = text_extractor(1, kernel, 0.0)
    states = torch.arange(1.0, 7.0).view(6, 1, 1)  # texts (1 2), (3 4), (5 6)
    answer = forward(extractor, states, torch.ones(1, 3, 2, dtype=torch.bool))
    assert answer is not None, NOTHING
    compare(
        answer[0],
        [[[531.0], [3642.0]]],
        "the texts are the channels: 1 + 10 * 3 + 100 * 5 = 531 [A4]",
    )
    # The second text has one token, so its gate is 1/2. The third does not exist.
    mask = tensor([[[True, True], [True, False], [False, False]]])
    x, mask_of_x = forward(extractor, states[:3], mask)
    compare(
        x,
        [[[16.0], [1502.0]]],
        "1 + 10 * 3 * 1/2 + 100 * 0 = 16: what is in the places without a token? [A6]",
        [
            (
                [[[46.5], [4503.0]]],
                "do the texts of a window share their gates? Each "
                "goes through each_text as an utterance of its own",
            ),
        ],
    )
    compare(
        mask_of_x,
        [[1.0, 1.0]],
        "a step of X_T is real where any of the texts has a token [A5]",
        [
            ([[1.0, 0.0]], "the target's mask alone? Take any of the texts [A5]"),
            ([[0.0, 0.0]], "is it `all` instead of `any`? [A5]"),
        ],
    )
    assert mask_of_x.dtype == torch.bool, (
        f"a mask is bool, and yours is {mask_of_x.dtype}"
    )

    # Two windows, two features, a bias, and a kernel that looks at the feature before.
    # Window 2, token 0: -7 + 10 * 5 * 2/2 + 100 * 7 * 1/2 = 393. The second feature has
    # 0.5 * 5 more.
    extractor = text_extractor(2, {**kernel, (1, 1, 0): 0.5}, -7.0)
    states = torch.arange(1.0, 7.0).view(6, 1, 1).repeat(1, 1, 2)
    states[3:] += 1.0
    other = tensor([[[False, False], [True, True], [True, False]]])
    x, mask_of_x = forward(extractor, states, torch.cat([mask, other]))
    compare(
        x,
        [[[9.0, 9.75], [1495.0, 1495.0]], [[393.0, 395.5], [5053.0, 5056.0]]],
        "is it the whole Conv2d, with its bias and nothing behind it? And which steps "
        "belong to which text? [A4]",
    )
    compare(mask_of_x, [[1.0, 1.0], [1.0, 1.0]], "each window has a mask of its own")


# --- EXERCISE 5: TransformerBlock.forward(self, x_t, x_s, mask_s) ---------------------


def vanilla_block(block: model.TransformerBlock) -> nn.TransformerEncoderLayer:
    """Make PyTorch's own block with these matrices, and the unit matrix as output."""
    layer = nn.TransformerEncoderLayer(8, 1, 32, 0.0, batch_first=True).eval()
    attention = layer.self_attn
    matrices = torch.cat([block.w_q.T, block.w_k.T, block.w_v.T])
    with torch.no_grad():
        attention.in_proj_weight.copy_(matrices)
        attention.in_proj_bias.zero_()
    set_weights(attention.out_proj, torch.eye(8).tolist(), [0.0] * 8)
    layer.linear1.load_state_dict(block.feed_forward[0].state_dict())
    layer.linear2.load_state_dict(block.feed_forward[2].state_dict())
    return layer


@torch.no_grad()
def check_5(forward: Callable) -> None:
    torch.manual_seed(0)
    x_t = torch.randn(1, 3, 8)
    x_s = torch.randn(1, 5, 8)
    all_3 = torch.ones(1, 3, dtype=torch.bool)
    all_5 = torch.ones(1, 5, dtype=torch.bool)
    only_2 = tensor([[True, True, False, False, False]])
    block = model.TransformerBlock(8, residual=True).eval()
    cross = model.TransformerBlock(8, residual=False).eval()

    x = forward(block, x_t, x_t, all_3)
    assert x is not None, NOTHING
    assert torch.equal(x, forward(block, x_t, x_t, all_3)), (
        "two answers in evaluation mode: dropout is for training alone"
    )
    y = block.norm1(x_t)
    h = x_t + block.attend(y, y, all_3)[0]
    norm_first = h + block.feed_forward(block.norm2(h))
    compare(
        x,
        vanilla_block(block)(x_t),
        "with itself as source it is the vanilla block, add and norm twice [A8]",
        [
            (
                norm_first,
                "norm first? The Transformer of 2017 adds, then normalises [A8]",
            )
        ],
    )

    # Queries of the target, keys and values of the source.
    x = forward(cross, x_t, x_s, all_5)
    assert x.shape == x_t.shape, (
        "the output is as long as the target, which has the queries"
    )
    # If all steps of the source are equal, every query gets the same answer.
    equal = forward(cross, x_t, x_s[:, :1].expand(1, 5, 8), all_5)
    compare(
        equal[:, 0],
        equal[:, 1],
        "do the queries come through? Without residual, only the values do [A7]",
    )
    cross.norm1.weight.copy_(torch.linspace(0.5, 2, 8))
    h = cross.norm1(cross.attend(x_t, x_s, all_5)[0])
    first_alone = "`residual` switches the first add alone: the second one stays"
    compare(
        forward(cross, x_t, x_s, all_5),
        cross.norm2(h + cross.feed_forward(h)),
        "is norm1 after the attention, and norm2 after the feed-forward network?",
        [(cross.norm2(cross.feed_forward(h)), first_alone)],
    )
    h = block.norm1(x_t + block.attend(x_t, x_s, all_5)[0])
    compare(
        forward(block, x_t, x_s, all_5),
        block.norm2(h + block.feed_forward(h)),
        "with `residual`, what is added is the target, x_t, whatever the source is",
    )

    # The mask is the source's.
    compare(
        forward(cross, x_t, x_s, only_2),
        forward(cross, x_t, x_s[:, :2], all_5[:, :2]),
        "does mask_s reach Eq. (1)?",
    )
    x_t = torch.randn(1, 5, 8)  # as long as the source
    compare(
        forward(cross, x_t, x_s, only_2),
        forward(cross, x_t, x_s[:, :2], all_5[:, :2]),
        "mask_s is the mask of the source: it says nothing about the target's steps",
    )

    # Drop everything: what is left is what the two sublayers are added to. `nn.Dropout`
    # calls `nn.functional.dropout`, too.
    rates = []

    def drop_everything(x, p=0.5, training=True, inplace=False):
        if training:
            rates.append(p)
            return torch.zeros_like(x)
        return x

    block.train()
    cross.train()
    for parameter in block.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    with mock.patch.object(nn.functional, "dropout", drop_everything):
        dropped = forward(block, x_t, x_s, all_5)
    assert rates, "where is the dropout?"
    compare(
        dropped,
        block.norm2(block.norm1(x_t)),
        "dropout comes after each of the two sublayers, before its add: "
        "x + dropout(sublayer(x))",
    )
    assert set(rates) == {0.1}, (
        f"the dropout of this block is 0.1, and yours is {rates}"
    )


# --- EXERCISE 6: unweighted_accuracy(y_true, y_pred) ----------------------------------


def check_6(unweighted_accuracy: Callable) -> None:
    y_true = [0] * 8 + [1, 1]
    y_pred = [0] * 8 + [0, 1]  # 8 of 8 right, and 1 of 2
    answer = unweighted_accuracy(y_true, y_pred)
    assert answer is not None, NOTHING
    assert answer == answer, "NaN: is it 0 / 0 for a class without an utterance?"
    compare(
        answer,
        0.75,
        "the recalls are 8/8 and 1/2, and their mean is (1 + 0.5) / 2",
        [
            (0.9, "9 of 10 are right: that is WA. Here each class counts equally"),
            (
                (8 / 9 + 1) / 2,
                "the mean precision? Divide by how many *are* of the class",
            ),
            (1.5 / 4, "do classes without an utterance count as 0? Leave them out"),
            (75, "a percentage? All accuracies in the code are fractions of 1"),
        ],
    )
    compare(
        unweighted_accuracy([2, 2, 3], [1, 2, 0]),
        0.25,
        "the recalls are 1/2 and 0/1",
        [(0.125, "classes 0 and 1 are only predicted: leave them out of the mean")],
    )
    answer = unweighted_accuracy(tensor(y_true), tensor(y_pred))
    compare(
        answer,
        0.75,
        "lists gave 0.75, and tensors do not: a set or dict takes equal elements of a "
        "tensor for different ones",
    )
    assert isinstance(answer, float), (
        f"return a float, for result.json. This is a {type(answer).__name__}"
    )


# --- EXERCISE 7: split(corpus, fold, seed) --------------------------------------------


def small_corpus() -> list[data.Utterance]:
    """Five sessions of two speakers. One turn in three is not of the four classes."""
    corpus = []
    for session in range(1, 6):
        dialog = f"Ses0{session}F_impro01"
        for letter in "FM":
            for turn, emotion in enumerate(("neu", "sad", "xxx")):
                utterance = data.Utterance(
                    id=f"{dialog}_{letter}{turn:03}",
                    session=session,
                    dialog=dialog,
                    speaker=f"Ses0{session}{letter}",
                    start=turn,
                    end=turn + 1,
                    text="oh",
                    emotion=emotion,
                    wav=Path("x.wav"),
                )
                corpus.append(utterance)
    return corpus


class Salted(str):
    """A string whose place in a set depends on a salt, as it does in a new process."""

    def __new__(cls, text: str, salt: int) -> "Salted":
        salted = super().__new__(cls, text)
        salted.salt = salt
        return salted

    def __hash__(self) -> int:
        return hash((self.salt, str(self))) if self.salt else 0


def random_states() -> tuple:
    numpy_state = np.random.get_state()[1].tolist()
    return random.getstate(), torch.get_rng_state().tolist(), numpy_state


def check_7(split: Callable) -> None:
    corpus = small_corpus()

    def dev_speakers(corpus, fold=2, seeds=range(12)):
        return [corpus[split(corpus, fold, seed)[1][0]].speaker for seed in seeds]

    for seed in range(12):
        answer = split(corpus, 2, seed)
        assert answer is not None, NOTHING
        train_rows, dev_rows, test_rows = answer
        rows = [*train_rows, *dev_rows, *test_rows]
        assert all(isinstance(row, int) for row in rows), (
            "return rows of the corpus, which are whole numbers"
        )
        speakers = [{corpus[row].speaker for row in part} for part in answer]
        train_speakers, dev_speaker, test_speakers = speakers
        assert not any(corpus[row].label is None for row in rows), (
            "an utterance without a label is in it: take only the four classes"
        )
        assert test_speakers == {"Ses02F", "Ses02M"}, (
            "test on the whole session of the fold, and on nothing else"
        )
        assert not dev_speaker & test_speakers, (
            "the development speaker is of the test session: that is cheating"
        )
        assert not train_speakers & test_speakers, (
            "speakers of the test session are in training: that is cheating"
        )
        assert dev_speaker, (
            "nothing to develop on: is the speaker drawn from the test session, too?"
        )
        assert len(dev_speaker) == 1, "develop on all utterances of one speaker"
        assert not train_speakers & dev_speaker, (
            "the development speaker is left in training"
        )
        assert len(rows) == len(set(rows)) == 20, "a row is missing, or is there twice"
        assert tuple(split(corpus, 2, seed)) == tuple(answer), (
            "the same seed gives another split"
        )
    assert len(set(dev_speakers(corpus))) > 2, (
        "does the seed draw the speaker? Twelve seeds drew one or two"
    )
    before = random_states()
    split(corpus, 2, 0)
    assert before == random_states(), (
        "the global random numbers have moved on: draw from random.Random(...)"
    )

    # The fold draws, too. Compare the places of the speakers among those to draw from.
    def places(fold, seeds=range(12)):
        speakers = sorted({u.speaker for u in corpus if u.session != fold})
        return [speakers.index(name) for name in dev_speakers(corpus, fold, seeds)]

    assert places(2) != places(3), (
        "does the fold draw, too? Otherwise all folds of a seed share their luck"
    )
    assert len({places(fold, [0])[0] for fold in range(1, 6)}) > 1, (
        "with seed 0 all folds draw the same: is the seed a factor?"
    )

    # Another process gives strings other hashes, and sets another order.
    builtin = hash
    drawn = []
    for salt in (0, 1):
        salted_hash = mock.Mock(side_effect=lambda x, salt=salt: builtin(x) + salt)
        with mock.patch.object(builtins, "hash", salted_hash):
            drawn.append(dev_speakers(corpus))
    assert drawn[0] == drawn[1], (
        "hash() of a string differs in every process: a run that resumes draws another "
        "speaker"
    )
    drawn = []
    for salt in range(6):
        salted = [replace(u, speaker=Salted(u.speaker, salt)) for u in corpus]
        drawn.append(dev_speakers(salted))
    assert all(names == drawn[0] for names in drawn), (
        "a set has another order in every process, so the same seed draws another "
        "speaker: sort them"
    )
    assert corpus == small_corpus(), "the corpus itself has changed"
    n_drawn = len(set(dev_speakers(corpus, seeds=range(200))))
    assert n_drawn == 8, (
        f"200 seeds draw {n_drawn} of the eight speakers: is one out of reach?"
    )

    # Other corpora: speakers without a label, empty parts, speakers that no id names.
    quiet = []
    for u in corpus:
        is_quiet = u.speaker in ("Ses01F", "Ses03M")
        quiet.append(replace(u, emotion="xxx") if is_quiet else u)
    assert all(split(quiet, 2, seed)[1] for seed in range(12)), (
        "a speaker without an utterance of the four classes was drawn: nothing to "
        "develop on"
    )
    for empty, utterances in {
        "test": [u for u in corpus if u.session != 2],
        "train": [u for u in corpus if u.session == 2 or u.speaker == "Ses01F"],
        "dev": [u for u in corpus if u.session == 2],
    }.items():
        try:
            split(utterances, 2, 0)
        except data.InputError:
            continue
        except Exception as error:
            raise AssertionError(
                f"{empty} is empty: raise InputError, not {error!r}"
            ) from None
        raise AssertionError(
            f"{empty} is empty, and nothing is raised: raise InputError"
        )
    solo = [replace(u, speaker="solo") if u.session == 1 else u for u in corpus]
    for seed in range(12):
        train_rows, dev_rows, _ = split(solo, 2, seed)
        train_speakers = {solo[row].speaker for row in train_rows}
        assert solo[dev_rows[0]].speaker not in train_speakers, (
            "u.speaker tells who speaks, not the id: other corpora have other ids"
        )


# --- EXERCISE 8: Patience.step(self, dev_loss) ----------------------------------------


def check_8(step: Callable) -> None:
    def answers(losses, **settings):
        """The first letters of the answers, until "stop", where train.py ends."""
        patience = train.Patience(**settings)
        letters = ""
        for loss in losses:
            answer = step(patience, loss)
            assert answer is not None, NOTHING
            assert answer in ("continue", "finetune", "stop"), (
                f"{answer!r} is none of the three answers"
            )
            letters += answer[0]
            since_best = patience.since_best
            assert (answer == "stop") == (since_best >= patience.stop_after), (
                f"it answers {answer!r} when since_best is {since_best} of "
                f"{patience.stop_after}: count in `since_best`. If both are due, stop"
            )
            if answer == "stop":
                break
        return letters

    try:
        frozen = answers([1.0] + [2.0] * 10, finetune_after=None)
    except TypeError:
        raise AssertionError(
            "finetune_after is None for a frozen system: it only stops"
        ) from None
    assert "f" not in frozen, "a frozen system has no fine-tuning: it only stops"
    assert frozen == "c" * 10 + "s", (
        "a frozen system stops, too, after ten epochs without a lower loss"
    )
    ten = answers([1.0] + [2.0] * 10)
    assert ten.count("f") == 1, (
        "fine-tuning starts once, after 5 epochs without a lower loss: a second trigger?"
    )
    assert ten[5] == "f", (
        "too early or too late? The fifth without a lower loss triggers"
    )
    assert answers([1.0] * 6)[-1] == "f", "is an equal loss lower? It is not"
    assert answers([1.0, 2.0, 1.9, 1.8, 1.7, 1.6])[-1] == "f", (
        "lower than the epoch before is not lower than the lowest"
    )
    assert ten == "cccccfccccs", (
        "two counters? One goes on: 5 epochs to the trigger, 10 to the stop [A9]"
    )
    assert (
        answers([1.0] + [2.0] * 6 + [0.5] + [2.0] * 10)
        == "cccccfccccccccccc"[:17] + "s"
    )
    assert answers([1.0, 2.0, 2.0], finetune_after=2, stop_after=2) == "ccs", (
        "both are due: the docstring says stop"
    )
    assert answers([1.0] + [torch.nan] * 10)[-1] == "s", (
        "NaN is not lower than anything"
    )
    assert answers([1.0 - 1e-6 * k for k in range(20)]) == "c" * 20, (
        "a loss that is a little lower is lower: §3.2 names no tolerance [A17]"
    )
    patience = train.Patience()
    for loss in [0.5] + [1.0] * 6:
        step(patience, loss)
    assert (patience.best, patience.finetuning) == (0.5, True), (
        "`best` has the lowest loss, and `finetuning` the phase: train.py reads them"
    )


# --- EXERCISE 9: gather(source, rows, device) -----------------------------------------


def check_9(gather: Callable) -> None:
    calls = []

    def source(rows):
        """Row k has k % 3 + 1 steps, 10 k, 10 k + 1, ..., of one layer of width 1."""
        assert isinstance(rows, list) and all(type(row) is int for row in rows), (
            "the source takes a list of whole numbers: what does tolist() do?"
        )
        assert min(rows) >= 0, "row -1 means none: do not ask the source for it"
        calls.append(rows)
        steps = [torch.arange(10.0 * k, 10 * k + k % 3 + 1) for k in rows]
        return [x.view(-1, 1, 1).half() for x in steps]

    def gathered(rows):
        rows = tensor(rows)
        before = rows.clone()
        calls.clear()
        answer = gather(source, rows, "cpu")
        assert answer is not None, NOTHING
        assert torch.equal(rows, before), "`rows` itself has changed: work on a copy"
        assert len(calls) == 1, (
            f"the source is called {len(calls)} times. Ask once for the whole batch, "
            "because a live upstream computes a batch at once"
        )
        states, mask = answer
        assert states.dim() == 3, (
            f"the states are {tuple(states.shape)}. They are (N, L, D): the real steps of "
            "all, one after another"
        )
        return states[:, 0, 0], mask

    states, mask = gathered([2, 0])
    compare(
        states, [20, 21, 22, 0], "row 2 has 20, 21, 22, and row 0 has 0, in this order"
    )
    compare(
        mask,
        [[1, 1, 1], [1, 0, 0]],
        "row 2 has three steps, and row 0 has one: T is the longest of the batch",
    )
    assert mask.dtype == torch.bool, f"a mask is bool, and yours is {mask.dtype}"

    # Windows with edges. Row 1 is in both, and the longest is in the second.
    states, mask = gathered([[-1, 0, 1], [1, 2, -1]])
    compare(
        states,
        [0, 10, 11, 10, 11, 20, 21, 22],
        "the steps of row 0, 1, 1, 2: a row that is in two windows comes twice",
    )
    compare(
        mask,
        [[[0, 0, 0], [1, 0, 0], [1, 1, 0]], [[1, 1, 0], [1, 1, 1], [0, 0, 0]]],
        "a missing text has no real step, and the others have 1, 2, 2 and 3",
    )
    states, mask = gathered([[[3], [-1]]])
    compare(states, [30], "rows may have any shape, also (1, 2, 1)")
    compare(mask, [[[[1]], [[0]]]], "rows may have any shape, also (1, 2, 1)")

    weight = tensor(1.0, requires_grad=True)

    def live(rows):
        return [weight.half() * x for x in source(rows)]

    states, _ = gather(live, tensor([1, 2]), "cpu")
    assert states.requires_grad, (
        "no gradient reaches a live upstream: fine-tuning changes nothing then"
    )
    assert states.dtype == torch.float16, (
        f"the source gave 16 bits, and {states.dtype} comes out: the model casts"
    )
    devices = [x.device.type for x in gather(source, tensor([1, 2]), "meta")]
    assert devices == ["meta", "meta"], (
        f"where is `device`? States and mask are on {devices}"
    )


# --- The verdicts ---------------------------------------------------------------------

# The check of each exercise, and the answer to check.
EXERCISES = {
    1: (check_1, model.masked_mean),
    2: (check_2, model.cross_modal_attention),
    3: (check_3, model.SqueezeExcitation.forward),
    4: (check_4, model.TextFeatureExtractor.forward),
    5: (check_5, model.TransformerBlock.forward),
    6: (check_6, evaluate.unweighted_accuracy),
    7: (check_7, data.split),
    8: (check_8, train.Patience.step),
    9: (check_9, data.gather),
}


def verdict(check: Callable, answer: Callable) -> str:
    """Check an answer: "passed", or the question that leads on."""
    try:
        check(answer)
    except (AssertionError, SystemExit) as problem:
        # SystemExit is the empty body of a student's copy.
        return str(problem)
    except Exception as problem:
        name = type(problem).__name__
        return (
            f"it stops with {name}: {problem}. What shapes and types are on that line?"
        )
    return "passed"


def main() -> None:
    """Print one line of JSON for each exercise. What the answers print is dropped."""
    for check, answer in EXERCISES.values():
        with contextlib.redirect_stdout(sys.stderr):
            result = verdict(check, answer)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
