"""Silent bugs to hunt: the code runs and trains with each of them, and is wrong.

    python tests/bugs.py hide      put one into the code, at random, without a word about it
    python tests/bugs.py reveal    tell which it was, and take it out again

Between the two, find it: train, read, run the tests. Do not read on here before you have.
"""

import random
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

BUGS = {  # what is wrong -> (file, what stands there, what to put there instead), ...
    "padding counts in the pooling over time": [
        ("model.py", "pooled.append(masked_mean(h, mask[target]))", "pooled.append(h.mean(dim=1))"),
    ],
    "WA and UA are swapped": [
        ("evaluate.py", 'return {"wa": wa, "ua": ua,', 'return {"wa": ua, "ua": wa,'),
    ],
    "the development speaker is left in training": [
        ("data.py", "train = [u for u in rest if u.speaker != dev_speaker]", "train = list(rest)"),
    ],
    "the context reaches into other dialogues": [
        ("data.py", "inside &= dialog[windows.clamp(0, n - 1)] == dialog[:, None]", "inside &= dialog[:, None] >= 0"),
    ],
    "the last hidden state is the one before the final norm": [
        ("model.py", "(*output.hidden_states[:-1], output.last_hidden_state)", "output.hidden_states"),
    ],
    "the optimiser does not know the weights that fine-tuning opens": [
        ("train.py", "for group in opened.values() if group]", "for group in opened.values() if not opened]"),
    ],
    "dropout stays on while predicting": [
        ("evaluate.py", "    model.eval()  # no dropout", "    model.train()  # no dropout"),
    ],
    "Eq. (1) normalises over the queries": [
        ("model.py", "torch.finfo(scores.dtype).min).softmax(dim=-1)", "torch.finfo(scores.dtype).min).softmax(dim=1)"),
    ],
}  # fmt: skip


def swap(changes, root=ROOT, back=False):
    """Put a bug in, or take it out: all of its changes or none."""
    texts = {name: (root / name).read_text() for name, _, _ in changes}
    for name, old, new in changes:
        old, new = (new, old) if back else (old, new)
        if texts[name].count(old) != 1:
            sys.exit(f"{name} is not as this bug expects it: git checkout {name}, then try again")
        texts[name] = texts[name].replace(old, new)
    for name, text in texts.items():
        (root / name).write_text(text)


def hidden(root=ROOT):
    """The bugs that are in the code now."""
    return [
        what for what, changes in BUGS.items()
        if all(new in (root / name).read_text() and old not in (root / name).read_text()
               for name, old, new in changes)
    ]  # fmt: skip


def forget(root=ROOT):
    """Delete the toy's runs and the cache, because neither knows the code that made it."""
    for folder in (root / "cache", *root.glob("runs/toy*")):
        shutil.rmtree(folder, ignore_errors=True)


def main(command, root=ROOT):
    if command == ["hide"]:
        if hidden(root):
            sys.exit("There is one in the code already: find it, or reveal it.")
        swap(random.choice(list(BUGS.values())), root)
        forget(root)
        print("Something is wrong now. git diff would be cheating.")
    elif command == ["reveal"]:
        for what in hidden(root) or sys.exit("No bug of ours is in the code."):
            swap(BUGS[what], root, back=True)
            forget(root)
            print(f"It was: {what}. The code is whole again; what you trained meanwhile is not.")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
