"""The first hour: three utterances from layer states through MMT to the loss.

    python -m tests.course.first_hour

This script does what train.py does in one step, without dropout, and prints a line for
each tensor. Read §2.1 to §2.3 of the paper beside it. The states are random numbers:
3 layers of width 8. The features have d = 4 numbers, and the context has 3 texts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from model import Config, EmotionRecognizer, cross_modal_attention, masked_mean, unpack


def show(name: str, x: Tensor, meaning: str) -> None:
    """Print a tensor: its name, its shape, its first numbers, and one sentence."""
    numbers = []
    for value in x.detach().flatten()[:4].tolist():
        numbers.append(f"{value:.3f}" if isinstance(value, float) else str(value))
    print(f"{name:12} {str(tuple(x.shape)):12} {' '.join(numbers):28} {meaning}")


def main() -> None:
    torch.manual_seed(11)
    print(f"{'tensor':12} {'shape':12} {'its first numbers':28} what it is")

    print("\n--- 1. What the upstreams leave behind (§2.1)")
    # Three turns of a dialogue: B = 3. Their clips have 6, 4 and 5 frames, their texts
    # 5, 2 and 3 tokens. The mask picks the real time steps, so no padding is left.
    audio_mask = torch.arange(6) < torch.tensor([[6], [4], [5]])
    audio = torch.randn(3, 6, 3, 8)[audio_mask]  # (N, L, D)
    token_mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    tokens = torch.randn(3, 5, 3, 8)
    # The window of a turn has the text before it, its own, and the text after it.
    windows = torch.tensor([[-1, 0, 1], [0, 1, 2], [1, 2, -1]])
    # A missing neighbour has no real step.
    text_mask = token_mask[windows] & (windows >= 0).unsqueeze(-1)
    text = tokens[windows][text_mask]  # (N, L, D)
    labels = torch.tensor([0, 2, 1])  # neu, ang, hap
    show("audio", audio, f"WavLM's states: N = {len(audio)} frames, 3 layers, width 8")
    show("audio_mask", audio_mask, "True where a turn has a frame")
    show("windows", windows, "the turns before, at and after each turn; -1: none")
    show("text", text, f"BERT's states: N = {len(text)} tokens of three windows")
    show("text_mask", text_mask, "True where a text has a token; none before turn 0")

    net = EmotionRecognizer(Config("mmt", 3, 8, 3, 8, dim=4, n_context=3)).eval()
    acoustic, textual = net.extractor["audio"], net.extractor["text"]

    print("\n--- 2. Squeeze and excitation: which layers matter? (§2.1, Fig. 2)")
    z = masked_mean(unpack(audio.mean(dim=-1), audio_mask), audio_mask)
    gates = acoustic.se(audio, audio_mask)
    show("z", z, "squeeze: one mean for each layer of each turn")
    show("gates", gates, "excitation: one number in (0, 1) for each layer")

    print("\n--- 3. Project & Norm: the layers become one vector of width d (§2.1)")
    turn = audio_mask.nonzero()[:, 0]
    condensed = (gates[turn].unsqueeze(-1) * audio).sum(dim=1)
    x_a = acoustic(audio, audio_mask)
    each = textual.each_text(text, text_mask.flatten(0, 1)).unflatten(0, (3, 3))
    show("turn", turn, f"which turn each of the {len(audio)} frames belongs to")
    show("condensed", condensed, "the layers, scaled by the turn's gates and summed")
    show("X_A", x_a, "the acoustic features: a sequence of frames for each turn")
    show("each", each, "the same for each text of each window; zeros if it is missing")

    print("\n--- 4. The context: three texts become one feature map (§2.1, Fig. 2b)")
    x_t, x_t_mask = textual(text, text_mask)
    show("X_T", x_t, "the textual features of each turn, with its context")
    show("X_T's mask", x_t_mask, "True where any of the three texts has a token")

    print("\n--- 5. Eq. (1), twice: queries from one, answers from the other (Fig. 3d)")
    a_to_t = net.fusion.blocks["audio-to-text"]
    t_to_a = net.fusion.blocks["text-to-audio"]
    w = (a_to_t.w_q, a_to_t.w_k, a_to_t.w_v)
    _, weights = cross_modal_attention(x_t, x_a, *w, audio_mask)
    h_t = a_to_t(x_t, x_a, audio_mask)
    h_a = t_to_a(x_a, x_t, x_t_mask)
    show("weights", weights, "CMT A->T: the weights of the frames for each token (row)")
    show("row sums", weights.sum(dim=-1), "each row sums to 1")
    show("CMT A->T", h_t, "as long as the text, made of audio")
    show("CMT T->A", h_a, "as long as the audio, made of text")

    print("\n--- 6. Average time pooling, concatenation, classifier (§2.2, §2.3)")
    means = masked_mean(h_t, x_t_mask), masked_mean(h_a, audio_mask)
    pooled = torch.cat(means, dim=-1)
    logits = net.classifier(pooled)
    show("pooled", pooled, "one vector for each turn: 4 numbers from each path")
    show("logits", logits, "one number for each of neu, hap, ang, sad")
    whole = net((audio, audio_mask), (text, text_mask))
    show("in one call", whole, "the same from EmotionRecognizer")

    print("\n--- 7. The loss, and what one step of AdamW does to it (§2.4, §3.2)")
    loss = F.cross_entropy(logits, labels)
    by_hand = -logits.log_softmax(dim=-1)[torch.arange(3), labels].mean()
    show("loss", loss, "cross-entropy: the mean of -log p(truth). Chance: 1.386")
    show("by hand", by_hand, "the same")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-3)
    loss.backward()
    show("gradient", acoustic.se.reduce.weight.grad, "of the first weights of S&E")
    before = acoustic.se.expand.bias.detach().clone()
    optimizer.step()
    step = acoustic.se.expand.bias - before
    show("step", step, "about 1e-3 for large and small gradients alike. Why?")
    after = F.cross_entropy(net((audio, audio_mask), (text, text_mask)), labels)
    show("loss after", after, "the loss after this step, on the same three turns")
    gradients = torch.cat([p.grad.flatten() for p in net.parameters()])
    zeros = f"{(gradients == 0).sum()} of {len(gradients)}"
    print(f"\n{zeros} weights have a gradient of 0. Which, and why?")
    print("At full size, MMT has 35,482 weights (python model.py).")
    print("Now read model.py from the top to EmotionRecognizer: you know every block.")


if __name__ == "__main__":
    main()
