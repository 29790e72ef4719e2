"""Print one utterance on its way through every block of MMT, in numbers to check by hand.

    python tests/trace.py

Read it beside Figures 1 to 3. It has d = 3, two layers of width 2, and one utterance of context on
each side. The weights are units and simple fractions. The blocks are those of model.py.
"""

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import Config, EmotionRecognizer, FeatureExtractor, masked_mean


def numbers(x: Tensor) -> str:
    """Format a vector as (a b c), a matrix as its rows, more dimensions as [matrix] [matrix]."""
    if x.ndim == 1:
        bools = x.dtype == torch.bool
        return f"({' '.join(str(v) if bools else f'{v:.4g}' for v in x.tolist())})"
    return " ".join(f"[{numbers(row)}]" if row.ndim > 1 else numbers(row) for row in x)


def show(place: str, equation: str, value: Tensor) -> None:
    """Print a value under its equation: one line for each time step, utterance or vector."""
    value = value if value.ndim > 1 else value[None]
    for row in value.detach():
        row = row if row.dtype == torch.bool else row.round(decimals=3) + 0.0  # no "-0"
        print(f"{place:9} {equation:52} {numbers(row)}")
        place = equation = ""


def fill(parameter: Tensor, values) -> None:
    """Set a weight by hand. A single number fills the whole of it."""
    parameter.data = torch.tensor(values, dtype=torch.float32).expand(parameter.shape).clone()


def by_hand() -> EmotionRecognizer:
    """Build MMT at its smallest size, with weights that pencil and calculator can follow."""
    net = EmotionRecognizer(Config("mmt", 2, 2, 2, 2, dim=3, n_context=3)).eval()

    for extractor in (net.extractor["audio"], net.extractor["text"]):
        fill(extractor.se.reduce.weight, [[0.25, 0.25]]), fill(extractor.se.reduce.bias, 0.0)
        fill(extractor.se.expand.weight, [[1.0], [-1.0]]), fill(extractor.se.expand.bias, 0.0)
        fill(extractor.projector.linear.weight, [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        fill(extractor.projector.linear.bias, 0.0)

    # Of each 3 x 3 kernel only the middle is used, so tokens and features do not mix.
    conv = net.extractor["text"].context_conv.conv
    fill(conv.weight, 0.0), fill(conv.bias, 0.0)
    conv.weight.data[0, :, 1, 1] = torch.tensor([0.5, 1.0, 0.5])

    # Q, K and V are the features. One of the 12 hidden units works: FFN(x) = (0, 0, ReLU(x3)).
    for block in net.fusion.blocks.values():
        for w in (block.w_q, block.w_k, block.w_v):
            fill(w, torch.eye(3).tolist())
        for linear in (block.feed_forward[0], block.feed_forward[2]):
            fill(linear.weight, 0.0), fill(linear.bias, 0.0)
            linear.weight.data[2, 2] = 1.0

    first, last = net.classifier[0], net.classifier[2]
    fill(first.weight, [[1.0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 1]])
    fill(last.weight, [[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]])
    fill(first.bias, 0.0), fill(last.bias, 0.0)
    return net


@torch.no_grad()
def trace() -> None:
    """Print every intermediate result of one utterance, from the layer states to the classes."""
    net = by_hand()

    # The clip has two frames and a padded one. There are three texts of two tokens. The second
    # token of the last text is padding. The row numbers (0, 1, 2) are the window: the text before,
    # the target, the text after.
    states_a = torch.tensor([[[[1.0, 3], [0, 2]], [[3, 1], [2, 4]], [[9, 9], [9, 9]]]])
    states_t = torch.tensor([
        [[[1.0, 1], [0, 2]], [[2, 0], [1, 1]]], [[[0, 1], [1, 2]], [[4, 0], [2, 2]]],
        [[[2, 2], [0, 0]], [[7, 7], [7, 7]]],
    ])  # fmt: skip
    mask_a = torch.tensor([[True, True, False]])
    mask_t = torch.tensor([[True, True], [True, True], [True, False]])
    batch = (states_a, mask_a), (states_t, mask_t, torch.tensor([[0, 1, 2]]))
    features, mask = net.features(*batch)
    # Padding is never read, so the model may leave anything there. Show it as 0.
    features = {m: x.masked_fill(~mask[m].unsqueeze(-1), 0.0) for m, x in features.items()}

    show("Fig. 2a", "WavLM's states, (T, L, D); frame 3 is padding", states_a[0])
    audio = net.extractor["audio"]
    z = masked_mean(states_a.mean(dim=-1), mask_a)
    show("S&E", "squeeze z_l: mean over real frames and features", z)
    show("", "h = ReLU((z_1 + z_2) / 4)", torch.relu(audio.se.reduce(z)))
    show("", "gates = sigmoid(h), sigmoid(-h)", audio.se.gates(states_a, mask_a))
    summed = audio.se(states_a, mask_a).sum(dim=2)[mask_a]
    show("Project", "s = gate_1 x_1 + gate_2 x_2, at the real frames", summed)
    show("", "W s = (s1, s2, s1 + s2)", audio.projector.linear(summed))
    show("& Norm", "X_A = (W s - mean) / sd (divide by 3); padding: 0", features["audio"][0])

    show("Fig. 2b", "BERT's states, (C, T, L, D); one token is padding", states_t)
    each, _ = FeatureExtractor.forward(net.extractor["text"], states_t, mask_t)
    each = each.masked_fill(~mask_t.unsqueeze(-1), 0.0)
    show("", "gates of the three texts", net.extractor["text"].se.gates(states_t, mask_t))
    show("", "each text through S&E, Project & Norm; padding: 0", each)
    show("Conv2D", "X_T = before / 2 + target + after / 2", features["text"][0])
    show("", "real where any of the three has a token [A5]", mask["text"][0])

    for (target, source), place in zip(net.fusion.paths, ("CMT A->T", "CMT T->A")):
        block = net.fusion.blocks[f"{source}-to-{target}"]
        q, k = features[target], features[source]
        out, weights = block.attend(q, k, mask[source])
        h = block(q, k, mask[source])
        scores = q @ k.transpose(1, 2) / math.sqrt(3)
        real = mask[target][0]  # rows of padded steps are never read
        show(place, "Q K^T / sqrt(3), where Q and K are the features", scores[0, real])
        show("Eq. (1)", "softmax over the source's real steps", weights[0, real])
        show("", "times V", out[0, real])
        show("", "x = Norm(that), without a residual [A7]", block.norm1(out)[0, real])
        show("", "Norm(x + (0, 0, ReLU(x3)))", h[0, real])
        show("pooling", "mean over the target's real steps", masked_mean(h, mask[target])[0])

    pooled, logits = net.fusion(features, mask), net(*batch)
    show("classify", "u = ReLU(p1 + p4, p2 + p5, p3 + p6)", torch.relu(net.classifier[0](pooled)))
    show("", "logits = u1, u2, u3, -(u1 + u2 + u3)", logits)
    show("", "softmax: neu, hap, ang, sad", logits.softmax(dim=-1))


if __name__ == "__main__":
    trace()
