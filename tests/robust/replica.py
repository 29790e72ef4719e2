"""Write a replica of the full release of IEMOCAP: tones and made-up sentences.

    python -m tests.robust.replica DIR                  1.5 GB, in ten minutes
    python -m tests.robust.replica DIR --shorten 0.02   the same with 2 % of the audio

The dialogues, speakers and labels are as many as in the release, and its files have
the same quirks. Use it to try the reader, the cache and the trainer at full size
without the licensed corpus. DIR/toy.json marks it as a toy, and every report says so.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from tests import conftest

EMOTIONS = ["ang", "hap", "sad", "neu"]
# By speaker: the utterances of each of these emotions. Excited is happy here.
SPEAKERS = {
    "1F": (147, 132, 78, 171),
    "1M": (82, 146, 116, 213),
    "2F": (67, 166, 113, 135),
    "2M": (70, 161, 84, 227),
    "3F": (92, 128, 172, 130),
    "3M": (148, 158, 133, 190),
    "4F": (205, 185, 62, 76),
    "4M": (122, 118, 81, 182),
    "5F": (78, 159, 132, 221),
    "5M": (92, 283, 113, 163),
}
# By session: the dialogues, all utterances, and the excited ones.
DIALOGS = (28, 30, 32, 30, 31)
TOTALS = (1819, 1811, 2136, 2103, 2170)
EXCITED = (143, 210, 151, 238, 299)
OTHERS = {"xxx": 2507, "fru": 1849, "sur": 107, "fea": 40, "oth": 3, "dis": 2}
WORDS = "well you know i think that it was the one we had there and so he said".split()


def plan_release(rng) -> dict[str, list[tuple[str, str]]]:
    """Deal out all turns: {dialogue: [(letter of who speaks, emotion), ...]}."""
    others = list(rng.permutation(np.repeat(list(OTHERS), list(OTHERS.values()))))
    plan = {}
    for session in range(1, 6):
        turns = []
        for letter in "FM":
            emotions = np.repeat(EMOTIONS, SPEAKERS[f"{session}{letter}"])
            turns += [(letter, emotion) for emotion in emotions]
        happy = [i for i, (_, emotion) in enumerate(turns) if emotion == "hap"]
        for i in happy[: EXCITED[session - 1]]:
            turns[i] = (turns[i][0], "exc")
        while len(turns) < TOTALS[session - 1]:
            turns.append((rng.choice(["F", "M"]), others.pop()))
        order = rng.permutation(len(turns))
        for number, part in enumerate(np.array_split(order, DIALOGS[session - 1])):
            # The letter says who wears the markers.
            name = f"Ses0{session}{'FM'[number % 2]}_impro{number:02}"
            plan[name] = [turns[i] for i in part]
    return plan


def write_dialog(root: Path, dialog: str, turns, shorten, rng) -> None:
    """Write the files of one dialogue. Each has all quirks that some have in IEMOCAP.

    Turns overlap, and all turns of F come first. A transcript has lines without an id,
    and an XX id that occurs twice.
    """
    counts = Counter()
    rows = []
    start = 0.5
    for letter, emotion in turns:
        # The median of the release is 3.58 s and the mean 4.55 s, 8 and 11.5 words.
        seconds = np.clip(rng.lognormal(np.log(3.58), 0.69), 0.585, 34.1) * shorten
        n_words = int(np.clip(rng.lognormal(np.log(8), 0.85), 1, 98))
        text = " ".join([*rng.choice(WORDS, n_words), emotion])
        suffix = f"{letter}{counts[letter]:03}"
        counts[letter] += 1
        rows.append((suffix, start, start + seconds, emotion, text))
        start += max(0.01, seconds + rng.uniform(-0.2, 0.8))
    conftest.write_dialog(root, dialog, sorted(rows))
    folder = root / f"Session{dialog[4]}" / "dialog"
    raters = folder / "EmoEvaluation" / "Categorical"
    raters.mkdir(exist_ok=True)
    (raters / f"{dialog}_e2_cat.txt").write_text("one rater\n")
    (raters.parent / f"._{dialog}.txt").write_text("a file of macOS\n")
    with (folder / "transcriptions" / f"{dialog}.txt").open("a") as file:
        file.write("M: hm.\n" + 2 * f"{dialog}_MXX0 [000.1000-000.2000]: oh\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a replica of IEMOCAP.")
    parser.add_argument("dir", type=Path, help="a new folder")
    parser.add_argument("--shorten", type=float, default=1.0, metavar="SHARE")
    args = parser.parse_args(arguments)
    args.dir.mkdir(parents=True)
    (args.dir / "toy.json").write_text("{}\n")
    rng = np.random.default_rng(9)
    for dialog, turns in tqdm(plan_release(rng).items(), leave=False, disable=None):
        write_dialog(args.dir, dialog, turns, args.shorten, rng)
    print(f"{args.dir}: written. Compare it: python data.py check {args.dir}")


if __name__ == "__main__":
    data.run_command(main)
