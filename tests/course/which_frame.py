"""See cross-modal attention at work: which frames answer the question?

    python -m tests.course.which_frame DIR     less than a minute; needs matplotlib

A speaker says three words, each in one of four moods. The text asks for one of them:
"how was table said". The answer is the mood of this word. So a model has to look for
the frames of the word that the text names. This task was built to need attention, so
it says nothing about emotion recognition. No sound is made: the frames are numbers that
a feature extractor could give. Fusion and Eq. (1) are those of model.py.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import data
from model import Config, Fusion, cross_modal_attention
from tests.course.figures import AUDIO, FILLS, new_figure, save

WORDS = ["party", "table", "coffee", "garden", "letter", "window"]
MOODS = ["neutral", "happy", "angry", "sad"]
TOKENS = ["how", "was", "<word>", "said"]  # the text, with a place for a word
ASKED = 2  # the place of the word
N_FRAMES = 24  # a clip of half a second
DIM = 16  # d
N_STEPS = 600  # of the optimizer, seconds of training

# The meaning of all vectors is fixed by a seed. One half of a frame tells the word, the
# other half tells the mood. A written word has a vector of its own. So the model has to
# learn which spoken word belongs to which written word.
SEED = torch.Generator().manual_seed(0)
SPOKEN = torch.randn(len(WORDS), DIM // 2, generator=SEED)
SPOKEN_MOODS = torch.randn(len(MOODS), DIM // 2, generator=SEED)
WRITTEN = torch.randn(len(WORDS), DIM, generator=SEED)
FILLERS = torch.randn(len(TOKENS), DIM, generator=SEED)


def draw_clips(n: int) -> dict[str, Tensor]:
    """Draw n clips, each with a question.

    audio    (n, 24, 16)
    text     (n, 4, 16)
    label    (n,), the mood of the asked word
    asked    (n,), the word that the text names
    spoken   (n, 24), the word of each frame, -1 for none
    mood     (n, 24), the mood of each frame, -1 for none
    """
    # Three different words, in three different moods.
    words = torch.rand(n, len(WORDS)).argsort(dim=1)[:, :3]
    moods = torch.rand(n, len(MOODS)).argsort(dim=1)[:, :3]
    # Each word has a third of the clip, and fills 3 to 5 of its 8 frames.
    start = torch.randint(4, (n, 3, 1))
    stop = start + torch.randint(3, 6, (n, 3, 1))
    frame = torch.arange(N_FRAMES // 3)
    inside = (start <= frame) & (frame < stop)  # (n, 3, 8)
    spoken = torch.where(inside, words.unsqueeze(2), -1).flatten(1)
    mood = torch.where(inside, moods.unsqueeze(2), -1).flatten(1)
    which = torch.randint(3, (n, 1))
    asked = words.gather(1, which).squeeze(1)
    label = moods.gather(1, which).squeeze(1)
    audio = torch.cat([SPOKEN[spoken], SPOKEN_MOODS[mood]], dim=-1)
    audio[spoken < 0] = 0.0
    audio += 0.3 * torch.randn(n, N_FRAMES, DIM)
    clips = {"audio": audio, "label": label, "spoken": spoken, "mood": mood}
    return {**clips, "text": ask(asked), "asked": asked}


def ask(asked: Tensor) -> Tensor:
    """Make the texts that ask for these words: (n,) -> (n, 4, 16)."""
    text = FILLERS.repeat(len(asked), 1, 1)
    text[:, ASKED] = WRITTEN[asked]
    return text


class Listener(nn.Module):
    """A fusion of Fig. 3 with a linear classifier: clips -> logits (n, 4)."""

    def __init__(self, fusion: str):
        super().__init__()
        self.fusion = Fusion(Config(fusion))
        self.classifier = nn.Linear(DIM * len(self.fusion.paths), len(MOODS))

    def forward(self, clips: dict[str, Tensor]) -> Tensor:
        # Every frame and every token is real.
        mask = {m: torch.ones(clips[m].shape[:2]) > 0 for m in ("audio", "text")}
        return self.classifier(self.fusion(clips, mask))


def learn(fusion: str, n_steps: int) -> Listener:
    """Train a listener. Every step draws new clips, so nothing can be memorised."""
    torch.manual_seed(1)
    listener = Listener(fusion)
    optimizer = torch.optim.AdamW(listener.parameters(), lr=3e-3)
    for _ in range(n_steps):
        clips = draw_clips(64)
        loss = F.cross_entropy(listener(clips), clips["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return listener.eval()


@torch.no_grad()
def accuracy(listener: Listener, clips: dict[str, Tensor]) -> float:
    """Compute the share of right answers."""
    right = listener(clips).argmax(dim=1) == clips["label"]
    return right.float().mean().item()


@torch.no_grad()
def look(listener: Listener, clips: dict[str, Tensor]) -> Tensor:
    """Compute the weights of Eq. (1), CMT(A→T): (n, 4, 24), one row for each token."""
    block = listener.fusion.blocks["audio-to-text"]
    mask = torch.ones(clips["audio"].shape[:2]) > 0
    w = (block.w_q, block.w_k, block.w_v)
    return cross_modal_attention(clips["text"], clips["audio"], *w, mask)[1]


def weight_on_asked(listener: Listener, clips: dict[str, Tensor]) -> float:
    """Add up the weight that the asked token gives to the frames of its word."""
    frames = clips["spoken"] == clips["asked"].unsqueeze(1)  # (n, 24)
    return (look(listener, clips)[:, ASKED] * frames).sum(dim=1).mean().item()


def draw_picture(before: Listener, after: Listener):
    """Draw one clip, and the weights for questions about it."""
    torch.manual_seed(4)
    clips = draw_clips(1)
    title = "Cross-modal attention finds the word that the question names\n"
    title += "A made-up task, built to show it: CMT(A→T), one clip of 24 frames"
    figure = new_figure(10, 8.5, title)
    top, *panels = figure.subplots(4, 1, sharex=True)

    # Above is the clip: where each word is said, and in which mood.
    top.set(title="the clip: three words, each in a mood", yticks=[], ylim=(0, 1))
    spoken = clips["spoken"][0]
    edges = {}  # of each word, in frames. A frame is one unit wide around its number
    for word in sorted(set(spoken.tolist()) - {-1}):
        frames = (spoken == word).nonzero()
        edges[word] = (frames.min().item() - 0.5, frames.max().item() + 0.5)
        mood = clips["mood"][0, frames[0]].item()
        top.axvspan(*edges[word], color=FILLS[AUDIO])
        name = f"{WORDS[word]}\n{MOODS[mood]}"
        top.text(sum(edges[word]) / 2, 0.5, name, ha="center", va="center")

    # Below are the weights. The asked word is in a red box, in the third of four rows.
    first, second, _ = edges
    questions = [(before, first), (after, first), (after, second)]
    for ax, (listener, word) in zip(panels, questions, strict=True):
        when = "before training" if listener is before else "after training"
        clips["text"] = ask(torch.tensor([word]))
        weights = look(listener, clips)[0].numpy()
        image = ax.imshow(weights, aspect="auto", cmap="Blues", vmin=0, vmax=0.6)
        tokens = [*TOKENS[:ASKED], WORDS[word], *TOKENS[ASKED + 1 :]]
        ax.set_yticks(range(4), tokens)
        ax.set_ylabel("token")
        ax.set_title(f"{when}, the question: how was {WORDS[word]} said?")
        red = {"edgecolor": "#c0392b", "linewidth": 3, "fill": False}
        ax.axvspan(*edges[word], ymin=0.25, ymax=0.5, **red)
    panels[-1].set_xlabel("frame of the audio (red: where the asked word is said)")
    figure.colorbar(image, ax=panels, label="weight of Eq. (1): each row sums to 1")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="See cross-modal attention at work.")
    parser.add_argument("dir", type=Path, metavar="DIR", help="for the picture")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the tensors are small

    torch.manual_seed(2)
    test = draw_clips(2000)
    print("Made-up task: in which mood is the word said that the text asks for?")
    print("A model that cannot look for the word is right in a third of the clips.")
    for fusion in ("text-te", "audio-te", "ef", "lf", "cmt-a2t"):
        listener = learn(fusion, N_STEPS)
        print(f"made-up task: {fusion:8} {accuracy(listener, test):6.1%} right")
    before = learn("cmt-a2t", 0)
    what = "weight of the asked token on the frames of its word"
    print(f"{what}, before: {weight_on_asked(before, test):.0%}")
    print(f"{what}, after: {weight_on_asked(listener, test):.0%}")
    save({"which-frame.png": draw_picture(before, listener)}, args.dir)


if __name__ == "__main__":
    data.run_command(main)
