"""The first hour: from frozen layer states through MMT to the loss, on three utterances.

    python tests/first_hour.py

This script does what train.py does in one step, without the dropout between modules, and prints a
line for each tensor. The blocks are those of model.py. Read §2.1 to §2.3 of the paper beside it.
The states are random numbers: there is no WavLM or BERT in this hour. Everything is small: 3 layers
of width 8, d = 4, and a context of 3 texts.
"""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import ContextConv, Projector, SqueezeExcitation, TransformerBlock, masked_mean


def show(name, x, says):
    """Print a tensor: its name, its shape, its first numbers, and one sentence."""
    first = x.detach().flatten()[:4].tolist()
    numbers = " ".join(str(v) if isinstance(v, (bool, int)) else f"{v:.3f}" for v in first)
    print(f"{name:12} {str(tuple(x.shape)):14} {numbers:28} {says}")


def main():
    torch.manual_seed(0)
    print(f"{'tensor':12} {'shape':14} {'its first numbers':28} what it is\n")

    print("--- 1. What the upstreams leave behind (§2.1)")
    audio = torch.randn(3, 6, 3, 8)  # B = 3 clips, T_A = 6 frames, L = 3 layers, D = 8
    audio_mask = torch.arange(6) < torch.tensor([6, 4, 5])[:, None]  # clips of 6, 4 and 5 frames
    text = torch.randn(3, 5, 3, 8)  # the same three turns as text, T_T = 5 tokens
    text_mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    labels = torch.tensor([0, 2, 1])  # neu, ang, hap
    show("audio", audio, "WavLM's states of three turns of a dialogue")
    show("audio_mask", audio_mask, "True where a frame is real, False where it is padding")
    show("text", text, "BERT's states of the same turns")

    print("\n--- 2. Squeeze and excitation: which layers matter? (§2.1, Fig. 2)")
    se_a, se_t = SqueezeExcitation(3), SqueezeExcitation(3)
    z = masked_mean(audio.mean(dim=-1), audio_mask)
    gates_a, gates_t = se_a.gates(audio, audio_mask), se_t.gates(text, text_mask)
    show("z", z, "squeeze: one mean for each layer of each turn")
    show("gates", gates_a, "excitation: one number in (0, 1) for each layer")

    print("\n--- 3. Project & Norm: the layers become one vector of width d (§2.1)")
    project_a, project_t = Projector(8, 4), Projector(8, 4)
    x_a = project_a(audio, gates_a[:, None])  # gates (3, 1, 3): the same for all frames of a clip
    each = project_t(text, gates_t[:, None])
    show("X_A", x_a, "the acoustic features: a sequence of frames")
    show("each", each, "every text on its own: a sequence of tokens")

    print("\n--- 4. The context: three texts become one feature map (§2.1, Fig. 2b)")
    windows = torch.tensor([[-1, 0, 1], [0, 1, 2], [1, 2, -1]])  # before, target, after; -1: none
    padded = torch.cat([each, torch.zeros(1, 5, 4)])  # index -1 is the missing neighbour
    there = torch.cat([text_mask, torch.zeros(1, 5, dtype=torch.bool)])
    conv = ContextConv(n_context=3)
    x_t, x_t_mask = conv(padded[windows], there[windows])
    show("windows", windows, "rows of the turns before, at and after each turn")
    show("X_T", x_t, "the textual features of each turn, with its context")
    show("X_T's mask", x_t_mask, "real where any of the three texts has a token")

    print("\n--- 5. Eq. (1), twice: who asks, who answers? (§2.2, Fig. 3d)")
    a_to_t, t_to_a = TransformerBlock(4, residual=False), TransformerBlock(4, residual=False)
    _, weights = a_to_t.attend(x_t, x_a, audio_mask)
    h_t, h_a = a_to_t(x_t, x_a, audio_mask), t_to_a(x_a, x_t, x_t_mask)
    show("weights", weights, "CMT A->T: each token (row) spreads a weight of 1 over the frames")
    show("row sums", weights.sum(dim=-1), "so every row sums to 1")
    show("CMT A->T", h_t, "as long as the text, made of audio")
    show("CMT T->A", h_a, "as long as the audio, made of text")

    print("\n--- 6. Average time pooling, concatenation, classifier (§2.2, §2.3)")
    pooled = torch.cat([masked_mean(h_t, x_t_mask), masked_mean(h_a, audio_mask)], dim=-1)
    classifier = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    logits = classifier(pooled)
    show("pooled", pooled, "one vector for each turn: 4 numbers from each path")
    show("logits", logits, "one number for each of neu, hap, ang, sad")

    print("\n--- 7. The loss, and what one step of AdamW does to it (§2.4, §3.2)")
    loss = F.cross_entropy(logits, labels)
    by_hand = -logits.log_softmax(dim=-1)[torch.arange(3), labels].mean()
    show("loss", loss, "cross-entropy: the mean of -log p(truth). Chance: 1.386")
    show("by hand", by_hand, "the same")
    blocks = [se_a, se_t, project_a, project_t, conv, a_to_t, t_to_a, classifier]
    parameters = [p for block in blocks for p in block.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-3)
    loss.backward()
    show("gradient", se_a.reduce.weight.grad, "it reaches even the first weights of S&E")
    before = se_a.expand.bias.detach().clone()
    optimizer.step()
    show("step", se_a.expand.bias - before, "AdamW: about 1e-3 for large and small gradients alike. Why?")
    count = sum(p.numel() for p in parameters)
    print(f"\n{count} weights here. At full size the same blocks have 35,482 (python model.py).")
    print("Now read model.py from masked_mean to EmotionRecognizer: you have met every block.")


if __name__ == "__main__":
    main()
