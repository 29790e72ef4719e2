"""Write a replica of the full release of IEMOCAP: tones and made-up sentences.

    python -m tests.robust.replica DIR                  1.5 GB, in ten minutes
    python -m tests.robust.replica DIR --shorten 0.02   the same with 2 % of the audio

The dialogues, speakers and labels are as many as in the release. Use it to try the
reader, the cache and the trainer at full size without the licensed corpus.
DIR/toy.json marks it as a toy, and every report says so.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from tests import conftest

# By session: the dialogues, all utterances, and how many of these emotions the woman
# and the man have. The two share out the happy and the excited ones in proportion.
EMOTIONS = ["ang", "hap", "exc", "sad", "neu"]
SESSIONS = {
    1: (28, 1819, (147, 64, 68, 78, 171), (82, 71, 75, 116, 213)),
    2: (30, 1811, (67, 59, 107, 113, 135), (70, 58, 103, 84, 227)),
    3: (32, 2136, (92, 60, 68, 172, 130), (148, 75, 83, 133, 190)),
    4: (30, 2103, (205, 40, 145, 62, 76), (122, 25, 93, 81, 182)),
    5: (31, 2170, (78, 51, 108, 132, 221), (92, 92, 191, 113, 163)),
}
OTHERS = {"xxx": 2507, "fru": 1849, "sur": 107, "fea": 40, "oth": 3, "dis": 2}
WORDS = "well you know i think that it was the one we had there and so he said".split()


def plan_release(rng) -> dict[str, list[tuple[str, str]]]:
    """Deal out all turns: {dialogue: [(letter of who speaks, emotion), ...]}."""
    others = list(rng.permutation(np.repeat(list(OTHERS), list(OTHERS.values()))))
    plan = {}
    for session, (n_dialogs, n_turns, woman, man) in SESSIONS.items():
        turns = [("F", emotion) for emotion in np.repeat(EMOTIONS, woman)]
        turns += [("M", emotion) for emotion in np.repeat(EMOTIONS, man)]
        while len(turns) < n_turns:
            turns.append((rng.choice(["F", "M"]), others.pop()))
        order = rng.permutation(n_turns)
        for number, part in enumerate(np.array_split(order, n_dialogs)):
            # The letter says who wears the markers.
            name = f"Ses0{session}{'FM'[number % 2]}_impro{number:02}"
            plan[name] = [turns[i] for i in part]
    return plan


def write_dialog(root: Path, dialog: str, turns, shorten, rng) -> None:
    """Write the files of one dialogue. Turns overlap, and all turns of F come first."""
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a replica of IEMOCAP.")
    parser.add_argument("dir", type=Path, help="a new folder")
    parser.add_argument("--shorten", type=float, default=1.0, metavar="SHARE")
    args = parser.parse_args(arguments)
    args.dir.mkdir(parents=True)
    (args.dir / "toy.json").touch()
    rng = np.random.default_rng(9)
    for dialog, turns in tqdm(plan_release(rng).items(), leave=False, disable=None):
        write_dialog(args.dir, dialog, turns, args.shorten, rng)


if __name__ == "__main__":
    data.run_command(main)
