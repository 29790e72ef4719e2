"""Print one utterance on its way through MMT, in numbers to check by hand.

    python -m tests.course.trace

Read it beside Figures 1 to 3. It has d = 3, two layers of width 2, and one text of
context on each side. The weights are ones and simple fractions.
"""

import math

import torch
from torch import Tensor

from model import Config, EmotionRecognizer, cross_modal_attention, masked_mean, unpack


def numbers(x: Tensor) -> str:
    """Format a vector as (a b c), and a matrix as its rows in one line."""
    if x.ndim == 2:
        return " ".join(numbers(row) for row in x)
    return f"({' '.join(f'{value:.4g}' for value in x.tolist())})"


def show(place: str, equation: str, x: Tensor) -> None:
    """Print a tensor beside its equation, with one line for each row of it."""
    x = x.float().round(decimals=3) + 0.0  # -0 becomes 0
    for row in torch.atleast_2d(x):
        print(f"{place:9} {equation:52} {numbers(row)}")
        place = equation = ""


def make_model() -> EmotionRecognizer:
    """Build MMT at its smallest size, with weights that a pencil can follow."""
    net = EmotionRecognizer(Config("mmt", 2, 2, 2, 2, dim=3, n_context=3)).eval()
    # All weights and biases are 0, but for the norms and what is set below.
    for name, parameter in net.named_parameters():
        if "norm" not in name:
            parameter.data.zero_()

    for extractor in (net.extractor["audio"], net.extractor["text"].each_text):
        extractor.se.reduce.weight.data.fill_(0.25)
        extractor.se.expand.weight.data = torch.tensor([[1.0], [-1.0]])
        extractor.linear.weight.data = torch.tensor([[1.0, 0], [0, 1], [1, 1]])

    # Only the middle of each 3 x 3 kernel is used. So tokens and features do not mix.
    kernels = net.extractor["text"].conv.weight.data  # (1, 3, 3, 3)
    kernels[0, :, 1, 1] = torch.tensor([0.5, 1.0, 0.5])

    # Q, K and V are the features. The feed-forward network gives (0, 0, ReLU(x3)).
    for block in net.fusion.blocks.values():
        for matrix in (block.w_q, block.w_k, block.w_v):
            matrix.data = torch.eye(3)
        block.feed_forward[0].weight.data[2, 2] = 1.0
        block.feed_forward[2].weight.data[2, 2] = 1.0

    first, _, last = net.classifier
    first.weight.data = torch.cat([torch.eye(3), torch.eye(3)], dim=1)
    last.weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]])
    return net


@torch.no_grad()
def main() -> None:
    """Print every intermediate result, from the layer states to the four classes."""
    net = make_model()
    acoustic, textual = net.extractor["audio"], net.extractor["text"]

    # The clip has two frames. The mask has a third place, as if another clip of the
    # batch were longer.
    frames = torch.tensor([[[1.0, 3], [0, 2]], [[3, 1], [2, 4]]])  # (N, L, D)
    audio_mask = torch.tensor([[True, True, False]])  # (B, T)
    # The window has the text before, the target and the text after. The last text has
    # one token, the others have two.
    before = [[1.0, 1], [0, 2]], [[2, 0], [1, 1]]
    target = [[0, 1], [1, 2]], [[4, 0], [2, 2]]
    tokens = torch.tensor([*before, *target, [[2, 2], [0, 0]]])  # (N, L, D)
    text_mask = torch.tensor([[[True, True], [True, True], [True, False]]])  # (B, C, T)
    x = {"audio": acoustic(frames, audio_mask)}
    mask = {"audio": audio_mask}
    x["text"], mask["text"] = textual(tokens, text_mask)

    show("Fig. 2a", "WavLM's states, (N, L, D)", frames)
    show("", "which places of X_A are real", audio_mask)
    z = masked_mean(unpack(frames.mean(dim=-1), audio_mask), audio_mask)
    gates = acoustic.se(frames, audio_mask)
    show("S&E", "squeeze z_l: mean over frames and features", z)
    show("", "h = ReLU((z_1 + z_2) / 4)", torch.relu(acoustic.se.reduce(z)))
    show("", "gates = sigmoid(h), sigmoid(-h)", gates)
    condensed = (gates.unsqueeze(-1) * frames).sum(dim=1)
    show("Project", "s = gate_1 x_1 + gate_2 x_2", condensed)
    show("", "W s = (s1, s2, s1 + s2)", acoustic.linear(condensed))
    show("& Norm", "X_A = (W s - mean) / sd (divide by 3); padding: 0", x["audio"][0])

    show("Fig. 2b", "BERT's states, (N, L, D)", tokens)
    show("", "which tokens the three texts have", text_mask[0])
    show("", "gates of the three texts", textual.each_text.se(tokens, text_mask[0]))
    each = textual.each_text(tokens, text_mask[0])
    show("", "each text through S&E, Project & Norm; padding: 0", each)
    show("Conv2D", "X_T = before / 2 + target + after / 2", x["text"][0])
    show("", "real where any of the three has a token [A5]", mask["text"])

    for target, source in net.fusion.paths:
        block = net.fusion.blocks[f"{source}-to-{target}"]
        real = mask[target]  # only these steps of the target are averaged
        scores = x[target] @ x[source].transpose(1, 2) / math.sqrt(3)
        w = (block.w_q, block.w_k, block.w_v)
        out, weights = cross_modal_attention(x[target], x[source], *w, mask[source])
        h = block(x[target], x[source], mask[source])
        place = f"CMT {source[0]}->{target[0]}".upper()
        show(place, "Q K^T / sqrt(3), where Q and K are the features", scores[real])
        show("Eq. (1)", "softmax over the source's real steps", weights[real])
        show("", "times V", out[real])
        show("", "x = Norm(that), without a residual [A7]", block.norm1(out)[real])
        show("", "Norm(x + (0, 0, ReLU(x3)))", h[real])
        show("pooling", "mean over the target's real steps", masked_mean(h, real))

    hidden = torch.relu(net.classifier[0](net.fusion(x, mask)))
    logits = net((frames, audio_mask), (tokens, text_mask))
    show("classify", "u = ReLU(p1 + p4, p2 + p5, p3 + p6)", hidden)
    show("", "logits = u1, u2, u3, -(u1 + u2 + u3)", logits)
    show("", "softmax: neu, hap, ang, sad", logits.softmax(dim=-1))


if __name__ == "__main__":
    main()
