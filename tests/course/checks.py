"""The checks of the nine exercises. They accept every right answer, whatever its style.

    python -m tests.course.classroom check                  all nine
    python -m tests.course.classroom check --exercise 5     one

Each exercise is marked in the code. Write its body from the docstring and the paper. A
check that fails asks a question that leads on. The checks never look at a solution, and
import nothing but the four files. So they can run on any copy of these. Each imports
what it needs itself, because an error in one file must not fail the others.
"""

import builtins
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn, tensor

NOTHING = "nothing is returned yet: is there a return statement?"


def compare(actual, expected, question: str, *mistakes: tuple) -> None:
    """Fail with the question if actual is not expected.

    Each mistake is a wrong value that is often seen, with a question of its own.
    """
    assert actual is not None, NOTHING
    actual = torch.as_tensor(actual).detach()
    expected = torch.as_tensor(expected, dtype=torch.float32)
    shapes = f"Your shape: {(*actual.shape,)}. Expected: {(*expected.shape,)}"
    assert actual.shape == expected.shape, with_facts(question, shapes)
    close = torch.isclose(actual.float(), expected, atol=1e-4)
    if close.all():
        return
    for value, question_of_mistake in mistakes:
        if torch.allclose(actual.float(), torch.as_tensor(value).float(), atol=1e-3):
            question = question_of_mistake
    place = ""
    if expected.numel() > 12:
        # That is too much to read, so show the first number that differs.
        first = tuple((~close).nonzero()[0].tolist())
        place = f" at {list(first)}"
        actual, expected = actual[first], expected[first]
    expected = expected.to(actual.dtype)
    facts = f"Yours{place}: {rounded(actual)}. Expected: {rounded(expected)}"
    raise AssertionError(with_facts(question, facts))


def with_facts(question: str, facts: str) -> str:
    """End the question, and put the facts in the next line.

    A table shows both in one line, so the question needs an end.
    """
    end = "" if question.endswith(("?", ".")) else "."
    return f"{question}{end}\n{facts}"


def rounded(x: Tensor) -> list:
    """Round the numbers of a tensor, to read them."""
    if x.is_floating_point():
        x = x.double().round(decimals=3)
    return x.tolist()


def set_weights(layer: nn.Module, weight, bias) -> None:
    layer.weight.data.copy_(torch.as_tensor(weight))
    layer.bias.data.copy_(torch.as_tensor(bias))


# --- EXERCISE 1: masked_mean(x, mask) -------------------------------------------------


def check_1(masked_mean: Callable) -> None:
    x = tensor([[[1.0, 10], [3, 30], [500, 500]], [[2, 4], [4, 6], [6, 8]]])
    mask = tensor([[True, True, False], [True, True, True]])
    means = [[2.0, 20.0], [4.0, 6.0]]
    total = tensor([[4.0, 40.0], [12.0, 18.0]])
    padding = "does the padding count? 500 is in a step where the mask is False"
    compare(
        masked_mean(x, mask),
        means,
        "the mean of the real steps is (1 + 3) / 2 = 2",
        (x.mean(1), padding),
        (x.sum(1) / tensor([[2], [3]]), padding),
        (total / 3, "is the sum divided by all T steps? Divide by the real ones"),
        (total / 5, "is the sum divided by the real steps of the whole batch?"),
        (total / tensor([[3], [4]]), "is it divided by one more than the real steps?"),
    )
    x[0, 2] = torch.nan
    question = "is it 0 * NaN? That is NaN. Replace the padding (masked_fill)"
    compare(masked_mean(x, mask), means, question)
    question = "an utterance without a real step: is it 0 / 0? The docstring says zeros"
    compare(masked_mean(x, mask & False), torch.zeros(2, 2), question)
    assert x[0, 2].isnan().all(), "x itself has changed: masked_fill_ makes no copy"
    question = "one utterance has no real step, one has: each needs its own count"
    second = mask & tensor([[False], [True]])
    compare(masked_mean(x, second), [[0.0, 0.0], [4.0, 6.0]], question)
    x[0, 0, 0] = torch.nan
    is_shown = masked_mean(x, mask)[0, 0].isnan()
    assert is_shown, "a NaN in a *real* step is hidden: it is a bug, and it must show"
    x = tensor([[[1.0], [9.0], [3.0]]], requires_grad=True)
    mean = masked_mean(x, tensor([[True, False, True]]))
    compare(mean, [[2.0]], "real steps need not be the first ones: use the mask itself")
    assert mean.dtype == x.dtype, f"float32 goes in, and {mean.dtype} comes out"
    assert mean.requires_grad, "no gradient comes back: is x detached, or a number?"
    mean.sum().backward()
    question = "the gradient of a mean is 1 / number of real steps, and 0 on padding"
    compare(x.grad, [[[0.5], [0.0], [0.5]]], question)


# --- EXERCISE 2: cross_modal_attention(x_t, x_s, w_q, w_k, w_v, mask_s), Eq. (1) ------


def check_2(attention: Callable) -> None:
    # d_t = 1, d_s = 2, d_k = 4, d_v = 1. The first query is 2, the first key ln 9.
    # So the scores are 2 ln 9 / sqrt(4) = ln 9 and 0. The second query is 0.
    x_t = tensor([[[1.0], [0.0]]])
    x_s = tensor([[[np.log(9), 10.0], [0.0, 20.0]]]).float()
    w_q = tensor([[2.0, 0, 0, 0]], requires_grad=True)
    w_k = tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    w_v = tensor([[0.0], [1.0]])
    both = tensor([[True, True]])
    first = tensor([[True, False]])

    def weights_of(mask, x_t=x_t, x_s=x_s):
        return attention(x_t, x_s, w_q, w_k, w_v, mask)[1]

    def scaled_by(root):
        p = 9 ** (2 / root)
        return tensor([[[p / (p + 1), 1 / (p + 1)], [0.5, 0.5]]])

    answer = attention(x_t, x_s, w_q, w_k, w_v, both)
    assert answer is not None, NOTHING
    out, weights = answer
    over_queries = "is the softmax over the queries? Each query's weights sum to 1"
    compare(
        weights,
        [[[0.9, 0.1], [0.5, 0.5]]],
        "the scores ln 9 and 0 give weights of 9/10 and 1/10",
        ([[[0.9, 0.5], [0.1, 0.5]]], over_queries),
        (scaled_by(1), "is sqrt(d_k) missing, or is it the root of d_t or d_v?"),
        (scaled_by(2**0.5), "is it the root of d_s or T_s? Eq. (1) has d_k"),
        (scaled_by(4), "are the scores divided by d_k? Eq. (1) has its root"),
    )
    compare(out, [[[11.0], [15.0]]], "V has 10 and 20: 9/10 of 10 and 1/10 of 20 is 11")
    compare(
        weights_of(first),
        [[[1.0, 0.0], [1.0, 0.0]]],
        "a padded step of the source gets weight: where is mask_s?",
        ([[[0.9, 0.0], [0.5, 0.0]]], "masked after the softmax? Rows must sum to 1"),
        ([[[0.9, 0.0], [0.1, 0.0]]], over_queries),
    )
    # K = [[1, 2], [3, 4]] and two unit queries: scores 1, 3 and 2, 4, over sqrt(2).
    eye = torch.eye(2)
    k = tensor([[[1.0, 2.0], [3.0, 4.0]]])
    p = 1 / (1 + np.exp(2**0.5))
    question = "K must be transposed, not reshaped: row t of K is step t"
    weights = attention(eye[None], k, eye, eye, eye, both)[1]
    compare(weights, [[[p, 1 - p]] * 2], question)

    # No real step.
    out, weights = attention(x_t, x_s, w_q, w_k, w_v, both & False)
    question = "no real step in the source: NaN, or weights on padding? Make them zero"
    compare(weights, torch.zeros(1, 2, 2), question)
    if out.requires_grad:
        out.sum().backward()
        question = "a row of nothing but -inf: its answer is zero, its gradient is NaN"
        assert w_q.grad is None or w_q.grad.isfinite().all(), question
    question = "each utterance has its own mask_s (B, T_s), and the queries are an axis"
    mask = torch.cat([first, both & False])
    weights = weights_of(mask, x_t.repeat(2, 1, 1), x_s.repeat(2, 1, 1))
    compare(weights, [[[1.0, 0.0]] * 2, [[0.0, 0.0]] * 2], question)

    # Large numbers, in real steps and in padding.
    question = "exp(659) is infinite: a softmax subtracts the highest score first"
    compare(weights_of(both, 300 * x_t)[:, :1], [[[1.0, 0.0]]], question)
    question = "a real score of -659: is the padding's lower? Fill in the lowest number"
    compare(weights_of(first, 300 * x_t, -x_s)[:, :1], [[[1.0, 0.0]]], question)
    loud = tensor([[[0.0, 10.0], [1e6, 20.0]]])
    question = "padding may hold any finite number: adding -10000 is not enough"
    compare(weights_of(first, x_s=loud), [[[1.0, 0.0]] * 2], question)
    question = "real steps need not be the first ones: use the mask itself"
    compare(weights_of(~first, x_s=loud), [[[0.0, 1.0]] * 2], question)

    w_q.grad = None
    out, _ = attention(x_t, x_s, w_q, w_k, w_v, both)
    if out.requires_grad:
        out.sum().backward()
    has_gradient = w_q.grad is not None and w_q.grad.any()
    assert has_gradient, "no gradient reaches W_Q: are the weights detached?"


# --- EXERCISE 3: SqueezeExcitation.forward(self, states, mask) ------------------------


def check_3(forward: Callable) -> None:
    import model

    se = model.SqueezeExcitation(2)
    set_weights(se.reduce, [[1.0, 2.0]], [0.0])
    set_weights(se.expand, [[1.0], [-1.0]], [0.0, 2.0])

    def gates(*hidden):
        return tensor([[h, 2 - h] for h in hidden]).sigmoid()

    # One real step, two layers with means 0.3 and 0.1, three features.
    states = tensor([[[0.2, 0.4, 0.3], [0.0, 0.2, 0.1]]])
    mask = tensor([[True, False, False, False]])
    compare(
        forward(se, states, mask),
        gates(0.5),
        "squeeze 0.3 and 0.1; 0.3 + 2 * 0.1 = 0.5; sigmoid(0.5) and sigmoid(2 - 0.5)",
        ([[0.5, 1.5]], "where is the sigmoid? A gate is between 0 and 1"),
        (tensor([[0.5, 1.5]]).softmax(1), "a softmax? Each gate is a sigmoid"),
        (gates(0.125), "is the sum divided by T? Divide by the real steps"),
        (gates(1.5), "is the squeeze a sum over the features? It is a mean"),
    )
    question = "layer means -0.3 and -0.1 give -0.5, which the ReLU makes 0"
    mistake = (gates(-0.5), "where is the ReLU?")
    compare(forward(se, -states, mask), gates(0.0), question, mistake)
    question = "squeeze (0.3, 0.1) and (3, 1): each utterance has gates of its own"
    mistake = (gates(2.75, 2.75), "the gates of one utterance depend on the other")
    answer = forward(se, torch.cat([states, 10 * states]), mask.repeat(2, 1))
    compare(answer, gates(0.5, 5.0), question, mistake)

    # Two real steps with a hole between them, layer means (1, 0) and (-0.4, 0). And one
    # real step, layer means (0.2, 0.1). The bias of `reduce` is 0.1.
    set_weights(se.reduce, [[1.0, 2.0]], [0.1])
    states = tensor([[1.0, 0.0], [-0.4, 0.0], [0.2, 0.1]])
    states = states.unsqueeze(-1).repeat(1, 1, 3).requires_grad_(True)
    answer = forward(se, states, tensor([[True, False, True], [False, True, False]]))
    compare(
        answer,
        gates(0.4, 0.5),
        "which of the three steps are whose? Squeeze ((1 - 0.4) / 2, 0) and (0.2, 0.1)",
        (gates(0.55, 0.5), "squeeze over time first, then excite once per utterance"),
        (gates(0.7, 0.5), "a sum over time? The squeeze is a mean"),
        (gates(0.3, 0.4), "is b_1 missing?"),
    )
    answer.sum().backward()
    has_gradient = states.grad is not None and states.grad.any()
    assert has_gradient, "the squeeze has no gradient: is it detached?"
    question = "an utterance without a real step: is it 0 / 0? Its squeeze is 0"
    one_empty = forward(se, states[:1], tensor([[False], [True]]))
    compare(one_empty, gates(0.1, 1.1), question)
    compare(forward(se, states[:0], tensor([[False]])), gates(0.1), question)


# --- EXERCISE 4: TextFeatureExtractor.forward(self, states, mask) ---------------------


class LengthGates(nn.Module):
    """In place of S&E: half the number of an utterance's real steps, for one layer."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return mask.sum(dim=1, keepdim=True) / 2


def text_extractor(dim: int, kernel: dict, bias: float) -> nn.Module:
    """Make an extractor of three texts, with one layer and without projection."""
    import model

    extractor = model.TextFeatureExtractor(1, dim, dim, 3)
    extractor.each_text.se = LengthGates()
    extractor.each_text.linear = nn.Identity()
    extractor.each_text.norm = nn.Identity()
    weight = torch.zeros(1, 3, 3, 3)
    for index, value in kernel.items():
        weight[0][index] = value
    set_weights(extractor.conv, weight, [bias])
    return extractor


def check_4(forward: Callable) -> None:
    # The middle of the kernel: 1, 10, 100 for the three texts. And the target's token
    # before counts 1000.
    kernel = {(0, 1, 1): 1.0, (1, 1, 1): 10.0, (2, 1, 1): 100.0, (1, 0, 1): 1000.0}
    extractor = text_extractor(1, kernel, 0.0)
    states = torch.arange(1.0, 7.0).view(6, 1, 1)  # texts (1 2), (3 4), (5 6)
    answer = forward(extractor, states, torch.ones(1, 3, 2, dtype=torch.bool))
    assert answer is not None, NOTHING
    question = "the texts are the channels: 1 + 10 * 3 + 100 * 5 = 531 [A4]"
    shared = "do the texts of a window share gates? Each is an utterance for each_text"
    own_row = "does each text keep its own row of the mask?"
    compare(
        answer[0],
        [[[531.0], [3642.0]]],
        question,
        ([[[1593.0], [10926.0]]], shared),
        ([[[796.5], [5463.0]]], own_row),
    )
    # The second text has one token, so its gate is 1/2. The third does not exist.
    mask = tensor([[[True, True], [True, False], [False, False]]])
    x, x_mask = forward(extractor, states[:3], mask)
    question = "1 + 10 * 3 * 1/2 + 100 * 0 = 16: what is where no token is? [A6]"
    zeroed = "at a position where only a neighbour has a token, X_T is real [A5]: "
    zeroed += "is yours 0 there?"
    compare(
        x,
        [[[16.0], [1502.0]]],
        question,
        ([[[46.5], [4503.0]]], shared),
        ([[[16.0], [0.0]]], zeroed),
        ([[[1.0], [17.0]]], own_row),
    )
    compare(
        x_mask,
        [[1.0, 1.0]],
        "a step of X_T is real where any of the texts has a token [A5]",
        ([[1.0, 0.0]], "the target's mask alone? Take any of the texts [A5]"),
        ([[0.0, 0.0]], "is it `all` instead of `any`? [A5]"),
    )
    assert x_mask.dtype == torch.bool, f"a mask is bool, and yours is {x_mask.dtype}"

    # Two windows, two features, a bias, and a kernel that looks at the feature before.
    # Window 1, token 0: -7 - 10 * 5 * 2/2 - 100 * 7 * 1/2 = -407, and 0.5 * 5 less at
    # its second feature. The texts have 0, 2, 1 and 2, 1, 0 tokens, so a mask that is
    # transposed has another order.
    extractor = text_extractor(2, {**kernel, (1, 1, 0): 0.5}, -7.0)
    states = tensor([-5.0, -6, -7, 1, 2, 3]).view(6, 1, 1).repeat(1, 1, 2)
    window_1 = tensor([[[False, False], [True, True], [True, False]]])
    x, x_mask = forward(extractor, states, torch.cat([window_1, mask]))
    transposed = [[[-757, -759.5], [-4967, -4970]], [[9, 9.75], [1493, 1493]]]
    both_ways = [[[73, 69.5], [-6997, -6996.5]], [[-2, -1.5], [987, 987]]]
    compare(
        x,
        [[[-407, -409.5], [-5067, -5070]], [[9, 9.75], [1495, 1495]]],
        "the whole Conv2d, and nothing behind it? Which steps are whose?",
        (transposed, own_row),
        (both_ways, own_row),
    )
    compare(x_mask, [[1.0, 1.0], [1.0, 1.0]], "each window has a mask of its own")


# --- EXERCISE 5: TransformerBlock.forward(self, x_t, x_s, mask_s) ---------------------


@torch.no_grad()
def check_5(forward: Callable) -> None:
    import model

    torch.manual_seed(0)
    x_t = torch.randn(1, 3, 8)
    x_s = torch.randn(1, 5, 8)
    all_3 = torch.ones(1, 3, dtype=torch.bool)
    all_5 = torch.ones(1, 5, dtype=torch.bool)
    block = model.TransformerBlock(8, residual=True).eval()
    cross = model.TransformerBlock(8, residual=False).eval()

    x = forward(block, x_t, x_t, all_3)
    assert x is not None, NOTHING
    is_equal = torch.equal(x, forward(block, x_t, x_t, all_3))
    assert is_equal, "two answers in evaluation mode: dropout is for training alone"
    # The vanilla block of the Transformer, and one that begins with the norm.
    h = block.norm1(x_t + block.attend(x_t, x_t, all_3)[0])
    expected = block.norm2(h + block.feed_forward(h))
    h = block.norm1(x_t)
    h = x_t + block.attend(h, h, all_3)[0]
    norm_first = h + block.feed_forward(block.norm2(h))
    h = x_t + block.attend(block.norm1(x_t), x_t, all_3)[0]
    norm_of_target = h + block.feed_forward(block.norm2(h))
    question = "with itself as source it is the vanilla block: add and norm, twice [A8]"
    mistake = "is the norm before the sublayer? [A8] says post-norm"
    mistakes = [(norm_first, mistake), (norm_of_target, mistake)]
    compare(x, expected, question, *mistakes)

    # Queries of the target, keys and values of the source.
    x = forward(cross, x_t, x_s, all_5)
    assert x.shape == x_t.shape, "it is as long as the target: it has the queries"
    # If all steps of the source are equal, every query gets the same answer.
    equal = forward(cross, x_t, x_s[:, :1].expand(1, 5, 8), all_5)
    question = "do the queries come through? Without residual, only values do [A7]"
    compare(equal[:, 0], equal[:, 1], question)
    cross.norm1.weight.copy_(torch.linspace(0.5, 2, 8))
    h = cross.norm1(cross.attend(x_t, x_s, all_5)[0])
    fed = cross.feed_forward(h)
    question = "is norm1 after the attention, and norm2 after the feed-forward network?"
    mistake = "`residual` switches the first add alone: the second one stays"
    mistake = (cross.norm2(fed), mistake)
    compare(forward(cross, x_t, x_s, all_5), cross.norm2(h + fed), question, mistake)
    h = block.norm1(x_t + block.attend(x_t, x_s, all_5)[0])
    expected = block.norm2(h + block.feed_forward(h))
    question = "with `residual`, what is added is the target, whatever the source is"
    compare(forward(block, x_t, x_s, all_5), expected, question)

    # The mask is the source's, also where the target is as long as the source.
    mask = tensor([[True, True, False, False, False]])
    for target, question in [
        (x_t, "does mask_s reach Eq. (1)?"),
        (-x_s, "mask_s is the mask of the source: it says nothing about the target"),
    ]:
        expected = forward(cross, target, x_s[:, :2], all_5[:, :2])
        compare(forward(cross, target, x_s, mask), expected, question)

    # Drop everything: what is left is what the two sublayers are added to. `nn.Dropout`
    # calls one of the two functions, too.
    rates = []
    shapes = []

    def drop_everything(x, p=0.5, training=True, inplace=False):
        if not training:
            return x
        rates.append(p)
        shapes.append(x.shape)
        return torch.zeros_like(x)

    block.train()
    for parameter in block.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    with mock.patch.object(nn.functional, "dropout", drop_everything):
        with mock.patch.object(torch, "dropout", drop_everything):
            x = forward(block, x_t, x_s, all_5)
    assert rates, "where is the dropout?"
    # The weights of the attention have another shape than its output.
    question = "dropout is applied to the output of each sublayer, before the add"
    assert all(shape == x_t.shape for shape in shapes), question
    question = "dropout is after each of the two sublayers: x + dropout(sublayer(x))"
    compare(x, block.norm2(block.norm1(x_t)), question)
    assert set(rates) == {0.1}, f"the dropout of this block is 0.1, yours is {rates}"


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
        (0.9, "9 of 10 are right: that is WA. Here each class counts equally"),
        ((8 / 9 + 1) / 2, "the mean precision? Divide by how many *are* of the class"),
        (1.5 / 4, "do classes without an utterance count as 0? Leave them out"),
        (75, "a percentage? All accuracies in the code are fractions of 1"),
    )
    question = "classes 0 and 1 are only predicted: leave them out of the mean"
    answer = unweighted_accuracy([2, 2, 3], [1, 2, 0])
    compare(answer, 0.25, "the recalls are 1/2 and 0/1", (0.125, question))
    answer = unweighted_accuracy(tensor(y_true), tensor(y_pred))
    question = "tensors do not give 0.75: in a set, equal elements of a tensor differ"
    compare(answer, 0.75, question)
    question = f"return a float, for result.json. This is a {type(answer).__name__}"
    assert isinstance(answer, float), question


# --- EXERCISE 7: split(corpus, fold, seed) --------------------------------------------


class Salted(str):
    """A string with another hash for each salt, as strings have in each process."""

    salt = 0

    def __hash__(self) -> int:
        return str.__hash__(self) ^ Salted.salt


def small_corpus() -> list:
    """Five sessions of two speakers. One turn in three is not of the four classes."""
    import data

    corpus = []
    for k in range(30):
        session, speaker, turn = k // 6 + 1, "FM"[k // 3 % 2], k % 3
        dialog = f"Ses0{session}F_impro01"
        name = f"{dialog}_{speaker}{turn:03}"
        speaker = Salted(f"Ses0{session}{speaker}")
        rest = (turn, turn + 1, "oh", ["neu", "sad", "xxx"][turn], Path("x.wav"))
        corpus.append(data.Utterance(name, session, dialog, speaker, *rest))
    return corpus


def check_7(split: Callable) -> None:
    import data

    corpus = small_corpus()

    def parts_of(corpus, fold, seed):
        parts = split(corpus, fold, seed)
        assert parts is not None, NOTHING
        return [list(part) for part in parts]

    def parts_without_error(corpus, seed, question):
        try:
            return parts_of(corpus, 2, seed)
        except data.InputError:
            raise AssertionError(question) from None

    def dev_speakers(fold=2, seeds=range(12)):
        return [corpus[parts_of(corpus, fold, seed)[1][0]].speaker for seed in seeds]

    def random_states():
        numpy_state = np.random.get_state()[1].tolist()
        return random.getstate(), torch.get_rng_state().tolist(), numpy_state

    for seed in range(12):
        question = "InputError: can your draw give a speaker of the test session?"
        parts = parts_without_error(corpus, seed, question)
        rows = sum(parts, [])
        are_rows = all(isinstance(row, (int, np.integer)) for row in rows)
        assert are_rows, "return rows of the corpus, which are whole numbers"
        labels = {corpus[row].label for row in rows}
        question = "one utterance has no label (None): leave it out of all three"
        assert None not in labels, question
        learn, dev, test = ({corpus[row].speaker for row in part} for part in parts)
        assert test == {"Ses02F", "Ses02M"}, "test on the whole session, and no other"
        assert not dev & test, "the development speaker is of the test session"
        assert not learn & test, "speakers of the test session are in training"
        assert dev, "nothing to develop on: can a speaker of the test session be drawn?"
        in_both = set(parts[0]) & set(parts[1])
        assert not in_both, "the development speaker is left in training"
        question = "one speaker is in train and in dev: is dev one whole speaker?"
        assert not learn & dev, question
        assert len(dev) == 1, "develop on one speaker: your dev has more"
        assert len(rows) == len(set(rows)) == 20, "a row is missing, or is there twice"
        again = parts_of(corpus, 2, seed)
        assert again == parts, "the same seed gives another split"
    n_drawn = len(set(dev_speakers()))
    assert n_drawn > 2, f"does the seed draw the speaker? Twelve seeds drew {n_drawn}"
    before = random_states()
    parts_of(corpus, 2, 0)
    question = "the global random numbers have moved on: draw from random.Random(...)"
    assert before == random_states(), question

    # The fold draws, too. Compare the places of the speakers among those to draw from.
    def places(fold, seeds=range(12)):
        speakers = sorted({u.speaker for u in corpus if u.session != fold})
        return [speakers.index(name) for name in dev_speakers(fold, seeds)]

    question = "does the fold draw, too? Otherwise all folds of a seed share their luck"
    assert places(2) != places(3), question
    with_seed_0 = {places(fold, [0])[0] for fold in range(1, 6)}
    assert len(with_seed_0) > 1, "seed 0 draws the same in all folds: is it a factor?"

    # Another process gives strings other hashes, and sets another order.
    drawn = dev_speakers()
    with mock.patch.object(builtins, "hash", lambda x: 1 + x.__hash__()):
        question = "hash() differs in every process: a resumed run draws another"
        assert dev_speakers() == drawn, question
    question = "a set has another order in every process: sort speakers before drawing"
    for salt in (1, 2, 4, 8, 16):
        with mock.patch.object(Salted, "salt", salt):
            assert dev_speakers() == drawn, question
    assert corpus == small_corpus(), "the corpus itself has changed"
    n_drawn = len(set(dev_speakers(seeds=range(200))))
    assert n_drawn == 8, f"200 seeds draw {n_drawn} of 8 speakers: is one out of reach?"

    # Speakers without a label, empty parts, and speakers that the ids do not name.
    quiet = corpus[:]
    for k in [0, 1, 15, 16]:  # Ses01F and Ses03M
        quiet[k] = replace(quiet[k], emotion="xxx")
    question = "a speaker without an utterance of the four classes was drawn"
    for seed in range(12):
        assert parts_without_error(quiet, seed, question)[1], question
    # Session 2 has the rows 6 to 11.
    parts = {"test": corpus[12:], "train": corpus[:3] + corpus[6:12]}
    parts["dev"] = corpus[6:12]
    for empty, utterances in parts.items():
        error = "nothing"
        try:
            parts_of(utterances, 2, 0)
        except Exception as problem:
            error = type(problem).__name__
        assert error == "InputError", f"{empty} is empty: raise InputError, not {error}"
    solo = [replace(u, speaker="solo") if u.session == 1 else u for u in corpus]
    for seed in range(12):
        learn, dev, _ = parts_of(solo, 2, seed)
        shared = {solo[k].speaker for k in learn} & {solo[k].speaker for k in dev}
        assert not shared, "u.speaker tells who speaks, not the id: ids may differ"


# --- EXERCISE 8: Patience.step(self, dev_loss) ----------------------------------------


def check_8(step: Callable) -> None:
    import train

    def answers(*losses, **settings):
        """Return the first letters of the answers, up to "stop"."""
        patience = train.Patience(**settings)
        letters = ""
        for loss in losses:
            answer = step(patience, loss)
            assert answer is not None, NOTHING
            letters += answer[0]
            limit = patience.stop_after
            is_due = patience.since_best >= limit
            question = f"it answers {answer!r} at since_best = {patience.since_best} "
            question += f"of {limit}"
            if not is_due:
                assert answer != "stop", f"{question}: is that too early?"
            elif answer == "finetune":
                raise AssertionError(f"{question}. If both are due, stop")
            else:
                question += ", but the training stops there: is it > or >=?"
                assert answer == "stop", question
            if answer == "stop":
                break
        return letters

    # 1.1 and 1.3 are both higher than 1.0, so the answers must be equal.
    question = "losses 1.0, 1.2, 1.1: is 1.1 lower than the best?"
    second = answers(1.0, 1.2, 1.1, finetune_after=2)
    assert second == answers(1.0, 1.2, 1.3, finetune_after=2), question
    twos = [2.0] * 10
    try:
        frozen = answers(1.0, *twos, finetune_after=None)
    except TypeError:
        raise AssertionError("finetune_after is None for a frozen system") from None
    assert frozen == "ccccccccccs", "a frozen system does not fine-tune: it only stops"
    ten = answers(1.0, *twos)
    assert ten.count("f") == 1, "fine-tuning starts once"
    assert ten[5] == "f", "too early or late? The fifth without a lower loss triggers"
    assert answers(*[1.0] * 11)[5] == "f", "is an equal loss lower? It is not"
    question = "two counters? One goes on: 5 epochs to the trigger, 10 to the stop [A9]"
    assert ten == "cccccfccccs", question
    again = answers(1.0, *twos[:6], 0.5, *twos)
    assert again.count("f") == 1, "a second trigger? Fine-tuning starts once"
    expected = "cccccf" + "c" * 11 + "s"
    assert again == expected, "a lower loss sets the count to 0, later, too"
    both = answers(1.0, 2.0, 2.0, finetune_after=2, stop_after=2)
    assert both == "ccs", "both are due: the docstring says stop"
    nans = answers(1.0, *[torch.nan] * 10)
    assert nans[-1] == "s", "NaN is not lower than anything"
    question = "a loss that is a little lower is lower: §3.2 names no tolerance [A17]"
    assert answers(*[1.0 - 1e-6 * k for k in range(20)]) == "c" * 20, question
    patience = train.Patience()
    for loss in [0.5, *twos[:6]]:
        step(patience, loss)
    question = "`best` has the lowest loss, `finetuning` the phase: train.py reads them"
    assert (patience.best, patience.finetuning) == (0.5, True), question


# --- EXERCISE 9: gather(source, rows, device) -----------------------------------------


def check_9(gather: Callable) -> None:
    calls = []

    def source(rows):
        """Row k has k % 3 + 1 steps, 10 k, 10 k + 1, ..., of one layer of width 1."""
        are_whole = isinstance(rows, list) and all(type(row) is int for row in rows)
        assert are_whole, "the source takes a list of numbers: what does tolist() do?"
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
        question = "times, and a live one runs each time: ask once for the whole batch"
        assert len(calls) == 1, f"the source is called {len(calls)} {question}"
        states, mask = answer
        question = "expected (N, L, D): the real steps of all, one after another"
        assert states.dim() == 3, f"your states are {tuple(states.shape)}, {question}"
        return states[:, 0, 0], mask

    states, mask = gathered([2, 0])
    question = "row 2 has 20, 21, 22, and row 0 has 0: in this order"
    compare(states, [20, 21, 22, 0], question)
    question = "row 2 has three steps, row 0 has one: T is the longest of the batch"
    compare(mask, [[1, 1, 1], [1, 0, 0]], question)
    assert mask.dtype == torch.bool, f"a mask is bool, and yours is {mask.dtype}"

    # Windows with edges. Row 1 is in both, and the longest is in the second.
    states, mask = gathered([[-1, 0, 1], [1, 2, -1]])
    question = "steps of the rows 0, 1, 1, 2: a row in two windows comes twice"
    compare(states, [0, 10, 11, 10, 11, 20, 21, 22], question)
    question = "a missing text has no real step, and the others have 1, 2, 2 and 3"
    window_1 = [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    window_2 = [[1, 1, 0], [1, 1, 1], [0, 0, 0]]
    compare(mask, [window_1, window_2], question)
    states, mask = gathered([[[3], [-1]]])
    question = "rows may have any shape, for example (1, 2, 1)"
    compare(states, [30], question)
    compare(mask, [[[[1]], [[0]]]], question)

    weight = tensor(1.0, requires_grad=True)

    def live(rows):
        return [weight.half() * x for x in source(rows)]

    states, _ = gather(live, tensor([1, 2]), "cpu")
    question = "no gradient reaches a live upstream: fine-tuning changes nothing then"
    assert states.requires_grad, question
    question = f"the source gave 16 bits, and {states.dtype} comes out: the model casts"
    assert states.dtype == torch.float16, question
    devices = [x.device.type for x in gather(source, tensor([1, 2]), "meta")]
    question = f"where is `device`? States and mask are on {devices}"
    assert devices == ["meta", "meta"], question


CHECKS = [
    check_1,
    check_2,
    check_3,
    check_4,
    check_5,
    check_6,
    check_7,
    check_8,
    check_9,
]
