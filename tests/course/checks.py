"""The checks of the nine exercises. They accept every right answer, whatever its style.

    python -m tests.course.classroom check

A check that fails asks a question that leads on. The checks never look at a solution.
Each imports the file that it needs itself, because an error in one of the four files
must not fail the other exercises.
"""

import random
from collections.abc import Callable
from math import log, nan
from unittest import mock

import torch
from torch import nn, tensor


def compare(actual, expected, question: str, *mistakes: tuple) -> None:
    """Fail with the question if actual is not expected.

    Each mistake is a wrong value that is often seen, with a question of its own.
    """
    actual = torch.as_tensor(actual).detach().float()
    expected = torch.as_tensor(expected).float()
    shapes = f"your shape: {(*actual.shape,)}, expected: {(*expected.shape,)}"
    assert actual.shape == expected.shape, f"{question} ({shapes})"
    if torch.allclose(actual, expected, atol=1e-4):
        return
    for value, its_question in mistakes:
        value = torch.as_tensor(value).float()
        if torch.allclose(actual, value, atol=1e-3, equal_nan=True):
            question = its_question
    yours, expected = [x.double().round(decimals=3) for x in (actual, expected)]
    numbers = f"yours: {yours.tolist()}, expected: {expected.tolist()}"
    raise AssertionError(f"{question} ({numbers})")


def check_1(masked_mean: Callable) -> None:
    # The padding is in the middle, because real steps need not be the first ones.
    x = tensor([[[1.0, 10], [500, 500], [3, 30]], [[2, 4], [4, 6], [6, 8]]])
    mask = tensor([[True, False, True], [True, True, True]])
    means = [[2.0, 20.0], [4.0, 6.0]]
    padding = "does the padding count? 500 is in a step where the mask is False"
    by_all_steps = "is the sum divided by all T steps? Divide by the real ones"
    compare(
        masked_mean(x, mask),
        means,
        "the mean of the real steps is (1 + 3) / 2 = 2",
        (x.mean(1), padding),
        (x.sum(1) / tensor([[2], [3]]), padding),
        ([[4 / 3, 40 / 3], [4.0, 6.0]], by_all_steps),
    )
    x[0, 1] = nan
    question = "is it 0 * NaN? That is NaN. Replace the padding (masked_fill)"
    compare(masked_mean(x, mask), means, question)
    assert x[0, 1].isnan().all(), "x itself has changed: masked_fill_ makes no copy"
    question = "an utterance without a real step: is it 0 / 0? The docstring says zeros"
    mask[0] = False
    compare(masked_mean(x, mask), [[0.0, 0.0], [4.0, 6.0]], question)
    mean = masked_mean(x.requires_grad_(), mask)
    assert mean.requires_grad, "no gradient comes back: is x detached, or a number?"


def check_2(attention: Callable) -> None:
    # d_t = 1, d_s = 2, d_k = 4, d_v = 1. The first query is (2, 0, 0, 0), and the keys
    # begin with ln 9 and 0. So the scores are 2 ln 9 / sqrt(4) = ln 9 and 0. The second
    # query is 0. A loud padding is before these two steps. Another utterance has no
    # real step.
    x_t = tensor([[[1.0], [0.0]]] * 2)
    x_s = tensor([[[1e6, 0.0], [log(9), 10.0], [0.0, 20.0]]] * 2)
    w_q = tensor([[2.0, 0, 0, 0]], requires_grad=True)
    w_k = tensor([[1.0, 0, 0, 0], [0, 0.1, 0, 0]])
    matrices = w_q, w_k, tensor([[0.0], [1.0]])
    mask = tensor([[False, True, True], [False, False, False]])

    def with_weight(p, other=0.0):
        """Give the first real step the weight p, and the other utterance this one."""
        return [[[0.0, p, 1 - p], [0.0, 0.5, 0.5]], [[other] * 3] * 2]

    out, weights = attention(x_t, x_s, *matrices, mask)
    thirds = [1 / 3, 1 / 3, 1 / 3]
    zeros = [[0.0, 0.0, 0.0]] * 2
    over_queries = [[[0.0, 0.9, 0.5], [0.0, 0.1, 0.5]], zeros]
    masked_late = [[[0.0, 0.0, 0.0], [0.0, 1 / 3, 1 / 3]], zeros]
    no_step = "no real step in the source: NaN, or weights on padding? Make them zero"
    compare(
        weights,
        with_weight(0.9),
        "the weights are 9/10 and 1/10. Which steps are real? mask_s is (B, T_s)",
        (over_queries, "is the softmax over the queries? A query's weights sum to 1"),
        (with_weight(81 / 82), "is sqrt(d_k) missing, or the root of d_t or d_v?"),
        (with_weight(3 / 4), "is it divided by d_k? Eq. (1) has its root"),
        (with_weight(1 / 2), "K must be transposed, not reshaped"),
        ([[[1.0, 0.0, 0.0], thirds]] * 2, "padding gets weight: where is mask_s?"),
        (masked_late, "masked after the softmax? Rows must sum to 1"),
        (with_weight(0.9, 1 / 3), no_step),
        (with_weight(0.9, nan), no_step),
    )
    question = "V has 10 and 20: 9/10 of 10 and 1/10 of 20 is 11"
    compare(out, [[[11.0], [15.0]], [[0.0], [0.0]]], question)
    out.sum().backward()
    assert w_q.grad.isfinite().all(), "a row of nothing but -inf: its gradient is NaN"

    # The only real step has scores of 659 and -659.
    mask = tensor([[True, False]])
    x_t = tensor([[[300.0], [-300.0]]])
    weights = attention(x_t, x_s[:1, 1:], *matrices, mask)[1]
    question = "scores of 659 and -659: is exp(659) infinite, or is the padding higher?"
    compare(weights, [[[1.0, 0.0], [1.0, 0.0]]], question)


def check_3(forward: Callable) -> None:
    import model

    se = model.SqueezeExcitation(2)
    se.reduce.weight.data = tensor([[1.0, 2.0]])
    se.reduce.bias.data = tensor([0.1])
    se.expand.weight.data = tensor([[1.0], [-1.0]])
    se.expand.bias.data = tensor([0.0, 2.0])

    def gates(*hidden):
        return tensor([[h, 2 - h] for h in hidden]).sigmoid()

    # Four utterances with 2, 1, 1 and 0 real steps. The real steps of the first are not
    # next to each other. The means of the two layers, and h = z_1 + 2 z_2 + 0.1:
    # (1, 0) and (-0.4, 0): 0.4;  (0.2, 0.1): 0.5;  (-0.3, -0.1): -0.4;  none: 0.1
    states = tensor([[1.0, 0.0], [-0.4, 0.0], [0.2, 0.1], [-0.3, -0.1]])
    states = states.unsqueeze(-1) * tensor([0.5, 1.0, 1.5])  # features, of this mean
    states.requires_grad_(True)
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[[0, 0, 1, 2], [0, 2, 1, 0]] = True
    answer = forward(se, states, mask)
    right = gates(0.4, 0.5, 0.0, 0.1)
    raw = right.logit()
    compare(
        answer,
        right,
        "which of the four steps are whose? The first squeeze is ((1 - 0.4) / 2, 0)",
        (raw, "where is the sigmoid? A gate is between 0 and 1"),
        (raw.softmax(1), "a softmax? Each gate is a sigmoid"),
        (gates(0.3, 0.7 / 3, 0.0, 0.1), "divided by T? Divide by the real steps"),
        (gates(0.4, 0.5, -0.4, 0.1), "where is the ReLU? It makes -0.4 zero"),
        (gates(0.55, 0.5, 0.0, 0.0), "squeeze over time first, then excite once"),
        (gates(0.4, 0.5, 0.0, nan), "no real step: is it 0 / 0? The squeeze is 0"),
    )
    answer.sum().backward()
    assert states.grad is not None, "the squeeze has no gradient: is it detached?"


def check_4(forward: Callable) -> None:
    import model

    # Three texts, one layer, and no projection. A gate is half the number of tokens.
    torch.manual_seed(0)
    extractor = model.TextFeatureExtractor(1, 2, 2, 3)
    extractor.each_text.se.forward = lambda states, mask: mask.sum(1, keepdim=True) / 2
    extractor.each_text.linear = nn.Identity()
    extractor.each_text.norm = nn.Identity()
    # The texts of two windows: none, (-5 -6), (-7), and (1 2), (3), none. The second of
    # the two features is twice the first.
    two_features = tensor([1.0, 2.0])
    states = tensor([-5.0, -6, -7, 1, 2, 3]).view(6, 1, 1) * two_features
    mask = torch.arange(2) < tensor([[[0], [2], [1]], [[2], [1], [0]]])
    maps = tensor([[[0, 0], [-5, -6], [-3.5, 0]], [[1, 2], [1.5, 0], [0, 0]]])
    expected = extractor.conv(maps.unsqueeze(-1) * two_features).squeeze(1)
    x, x_mask = forward(extractor, states, mask)
    compare(
        x,
        expected,
        "has each text its own gates and row of the mask? Is it a channel of conv?",
    )
    question = "a step of X_T is real where any of the texts has a token [A5]"
    compare(x_mask, torch.ones(2, 2), question)
    assert x_mask.dtype == torch.bool, f"a mask is bool, and yours is {x_mask.dtype}"


@torch.no_grad()
def check_5(forward: Callable) -> None:
    import model

    torch.manual_seed(0)
    # The target is as long as the source, so their masks are easily confused.
    x_t, x_s = torch.randn(2, 1, 3, 4)
    mask = tensor([[True, True, False]])
    block = model.TransformerBlock(4, residual=True).eval()
    for parameter in block.parameters():
        parameter.copy_(torch.randn(parameter.shape))

    def feed(x):
        return block.norm2(x + block.feed_forward(x))

    x = forward(block, x_t, x_s, mask)
    is_equal = torch.equal(x, forward(block, x_t, x_s, mask))
    assert is_equal, "two answers in evaluation mode: dropout is for training alone"
    w = (block.w_q, block.w_k, block.w_v)
    attended = model.cross_modal_attention(x_t, x_s, *w, mask)[0]
    question = "are norm1 and norm2 after each add [A8]? mask_s is that of the source"
    compare(x, feed(block.norm1(x_t + attended)), question)
    block.residual = False
    question = "without `residual`, are x_t, and nothing else, left out [A7]?"
    x = forward(block, x_t, x_s, mask)
    compare(x, feed(block.norm1(attended)), question)

    # Drop everything. Only what the two sublayers are added to is left.
    block.residual = True
    shapes = []

    def drop(x, p=0.5, training=True, inplace=False):
        shapes.append(x.shape)
        return x * 0 if training else x

    # nn.Dropout calls this function, too.
    with mock.patch("torch.nn.functional.dropout", drop):
        x = forward(block.train(), x_t, x_s[:, :2], mask[:, :2])
    question = "self.dropout is applied to the output of each sublayer, (B, T_t, d)"
    assert shapes == [x_t.shape] * 2, question
    compare(x, block.norm2(block.norm1(x_t)), "dropout comes before each add")


def check_6(unweighted_accuracy: Callable) -> None:
    # 8 of 8 are right, and 1 of 2. Class 3 is only predicted.
    y_true = tensor([0] * 8 + [1, 1])
    y_pred = tensor([0] * 8 + [3, 1])
    answer = unweighted_accuracy(y_true.tolist(), y_pred.tolist())
    compare(
        answer,
        0.75,
        "the recalls are 8/8 and 1/2, and their mean is (1 + 0.5) / 2",
        (nan, "NaN: is it 0 / 0 for a class without an utterance?"),
        (0.9, "9 of 10 are right: that is WA. Here each class counts equally"),
        (1.0, "the mean precision? Divide by how many *are* of the class"),
        (1.5 / 4, "do classes without an utterance count as 0? Leave them out"),
        (1.5 / 3, "class 3 is only predicted: leave it out of the mean"),
        (75, "a percentage? All accuracies in the code are fractions of 1"),
    )
    assert isinstance(answer, float), "return a float, for result.json"
    question = "tensors do not give 0.75: in a set, equal elements of a tensor differ"
    compare(unweighted_accuracy(y_true, y_pred), 0.75, question)


class Salted(str):
    """A string with another hash for each salt, as strings have in each process."""

    salt = 0

    def __hash__(self) -> int:
        return str.__hash__(self) ^ Salted.salt


def check_7(split: Callable) -> None:
    import data

    # Five sessions of two speakers, with three turns each. The third turn is not of the
    # four classes. Ses01F has no label, and session 3 has one speaker for both letters.
    corpus = []
    for k in range(30):
        session, letter, turn = k // 6 + 1, "FM"[k // 3 % 2], k % 3
        speaker = Salted("ann" if session == 3 else f"Ses0{session}{letter}")
        emotion = "xxx" if k < 3 or turn == 2 else "neu"
        dialog = f"Ses0{session}F_impro01"
        rest = (turn, turn + 1, "oh", emotion, None)
        name = f"{dialog}_{letter}{turn:03}"
        corpus.append(data.Utterance(name, session, dialog, speaker, *rest))
    before = random.getstate(), torch.initial_seed()

    def parts_of(seed, fold=2):
        return [list(part) for part in split(corpus, fold, seed)]

    def speakers_of(rows):
        return {corpus[row].speaker for row in rows}

    for seed in range(12):
        parts = parts_of(seed)
        rows = sum(parts, [])
        labels = {corpus[row].label for row in rows}
        assert None not in labels, "leave out the utterances without a label (None)"
        learn, dev, test = map(speakers_of, parts)
        assert test == {"Ses02F", "Ses02M"}, "test on the whole session, and no other"
        question = "dev is one speaker with a label, of the other sessions: yours is "
        assert len(dev) == 1 and not dev & test, f"{question}{sorted(dev)}"
        assert not learn & dev, "a speaker is in train and in dev: is it u.speaker?"
        assert len(rows) == len(set(rows)) == 18, "a row is missing, or is there twice"
        assert parts_of(seed) == parts, "the same seed gives another split"
    question = "the global random numbers have moved on: draw from random.Random(...)"
    assert before == (random.getstate(), torch.initial_seed()), question

    drawn = [parts_of(seed)[1] for seed in range(200)]
    n_drawn = len(speakers_of(sum(drawn, [])))
    assert n_drawn == 6, f"200 seeds draw {n_drawn} of 6 speakers: can each be drawn?"
    # The fold draws, too. The rows of session 4 are 12 after those of session 2.
    luck = {}
    for fold in (2, 4):
        luck[fold] = [min(parts_of(seed, fold)[1]) % 12 for seed in range(12)]
    assert luck[2] != luck[4], "the folds of a seed share their luck: draw by both"
    # Another process gives strings other hashes, and sets another order.
    question = "a set or hash() differs in every process: sort the speakers, then draw"
    for salt in (1, 2, 4, 8, 16):
        with (
            mock.patch.object(Salted, "salt", salt),
            mock.patch("builtins.hash", lambda x: 1 + x.__hash__()),
        ):
            again = [parts_of(seed)[1] for seed in range(12)]
        assert again == drawn[:12], question

    # Session 2 has the rows 6 to 11.
    parts = {"test": corpus[12:], "train": corpus[3:12], "dev": corpus[6:12]}
    for empty, utterances in parts.items():
        try:
            split(utterances, 2, 0)
        except data.InputError:
            continue
        raise AssertionError(f"{empty} is empty: raise InputError")


def check_8(step: Callable) -> None:
    import train

    def expect(letters, losses, question, **settings):
        """Compare the first letters of the answers, up to "stop"."""
        patience = train.Patience(**settings)
        given = ""
        for loss in losses:
            given += step(patience, loss)[0]
            if given.endswith("s"):
                break
        assert given == letters, f"{question} (yours: {given}, expected: {letters})"
        return patience

    twos = [2.0] * 10
    question = "the 5th epoch without a lower loss fine-tunes, the 10th stops [A9]"
    expect("cccccfccccs", [1.0, *twos], question)
    expect("ccf", [1.0, 1.2, 1.1], "is 1.1 lower than the best?", finetune_after=2)
    question = "a frozen system, whose finetune_after is None, only stops"
    expect("ccccccccccs", [1.0, *twos], question, finetune_after=None)
    expect("cccccfccccs", [1.0] * 11, "is an equal loss lower? It is not")
    expect("cccccfccccs", [1.0] + [nan] * 10, "NaN is not lower than anything")
    question = "fine-tuning starts once, and a lower loss sets the count to 0"
    letters = "cccccfcccccccccccs"
    patience = expect(letters, [1.0, *twos[:6], 0.5, *twos], question)
    question = "`best` has the lowest loss, `finetuning` the phase: train.py reads them"
    assert (patience.best, patience.finetuning) == (0.5, True), question
    both = {"finetune_after": 2, "stop_after": 2}
    expect("ccs", [1.0, 2.0, 2.0], "both are due: the docstring says stop", **both)
    question = "a loss that is a little lower is lower: §3.2 names no tolerance [A17]"
    expect("c" * 9, [1.0 - 1e-6 * k for k in range(9)], question)


def check_9(gather: Callable) -> None:
    weight = tensor(1.0, requires_grad=True)
    calls = []

    def source(rows):
        """Row k has k % 3 + 1 steps, 10 k, 10 k + 1, ..., of one layer of width 1."""
        are_whole = isinstance(rows, list) and all(type(row) is int for row in rows)
        assert are_whole, "the source takes a list of numbers: what does tolist() do?"
        assert min(rows) >= 0, "row -1 means none: do not ask the source for it"
        calls.append(rows)
        steps = [torch.arange(10.0 * k, 10 * k + k % 3 + 1) for k in rows]
        return [(weight * x).view(-1, 1, 1).half() for x in steps]

    # Batches of rows, their steps and their masks. The second has windows with edges.
    # Row 1 is in both windows, and the longest row is in the second.
    windows = [[-1, 0, 1], [1, 2, -1]]
    of_windows = [[[0, 0, 0], [1, 0, 0], [1, 1, 0]], [[1, 1, 0], [1, 1, 1], [0, 0, 0]]]
    for rows, steps, mask in [
        ([2, 0], [20, 21, 22, 0], [[1, 1, 1], [1, 0, 0]]),
        (windows, [0, 10, 11, 10, 11, 20, 21, 22], of_windows),
    ]:
        rows = tensor(rows)
        before = rows.clone()
        calls.clear()
        states, found = gather(source, rows, "cpu")
        assert torch.equal(rows, before), "`rows` itself has changed: work on a copy"
        assert len(calls) == 1, "ask the source once, because a live one runs each time"
        question = f"rows {rows.tolist()}: (N, L, D), the real steps one after another"
        compare(states, tensor(steps).view(-1, 1, 1), question)
        question = f"rows {rows.tolist()}: a mask as long as the longest of these rows"
        compare(found, mask, question)
    assert found.dtype == torch.bool, f"a mask is bool, and yours is {found.dtype}"
    assert states.requires_grad, "no gradient reaches a live upstream"
    assert states.dtype == torch.float16, "the source gave 16 bits: the model casts"
    devices = [x.device.type for x in gather(source, tensor([1, 2]), "meta")]
    assert devices == ["meta", "meta"], f"states and mask are on {devices}: and device?"


# By number: the file, the function, its minutes (five are a point), and its check.
EXERCISES = {
    1: ("model.py", "masked_mean", 15, check_1),
    2: ("model.py", "cross_modal_attention", 30, check_2),
    3: ("model.py", "SqueezeExcitation.forward", 15, check_3),
    4: ("model.py", "TextFeatureExtractor.forward", 25, check_4),
    5: ("model.py", "TransformerBlock.forward", 35, check_5),
    6: ("evaluate.py", "unweighted_accuracy", 10, check_6),
    7: ("data.py", "split", 30, check_7),
    8: ("train.py", "Patience.step", 30, check_8),
    9: ("data.py", "gather", 40, check_9),
}
