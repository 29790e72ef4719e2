"""Write a replica of the full release of IEMOCAP: tones and made-up sentences.

    python -m tests.robust.replica DIR                  10,039 recordings, 1.5 GB
    python -m tests.robust.replica DIR --shorten 0.02   the same with 2 % of the audio

The dialogues, speakers and labels are as many as in the release, and its files have
the same quirks. Use it to try the reader, the cache and the trainer at full size
without the licensed corpus. DIR/toy.json marks it as a toy, and every report says so.
"""

import argparse
import wave
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data

RATE = 16000  # Hz
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
PITCHES = {"neu": 200, "hap": 800, "exc": 800, "ang": 400, "sad": 100}  # Hz
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


def write_dialog(session: Path, dialog: str, turns, shorten, rng) -> None:
    """Write the files of one dialogue. Each has all quirks that some have in IEMOCAP.

    Turns overlap. The label file has all turns of F first. The transcript has lines
    out of order, without an id, and with an XX id that occurs twice.
    """
    wavs = session / "sentences" / "wav" / dialog
    wavs.mkdir(parents=True)
    labels = {"F": [], "M": []}
    words = []
    start = 0.5
    for letter, emotion in turns:
        # The median of the release is 3.58 s and the mean 4.55 s, 8 and 11.5 words.
        seconds = np.clip(rng.lognormal(np.log(3.58), 0.69), 0.585, 34.1) * shorten
        n_words = int(np.clip(rng.lognormal(np.log(8), 0.85), 1, 98))
        name = f"{dialog}_{letter}{len(labels[letter]):03}"
        tone = np.sin(2 * np.pi * PITCHES.get(emotion, 300) / RATE * np.arange(RATE))
        samples = 5000 * np.resize(tone, int(seconds * RATE))
        with wave.open(str(wavs / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))  # 1 channel, 2 bytes
            file.writeframes(samples.astype("<i2").tobytes())
        end = start + seconds
        labels[letter].append(
            f"[{start:.4f} - {end:.4f}]\t{name}\t{emotion}\t[2.5, 2.5, 2.5]\n"
            "C-E2:\tNeutral;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\n\n"
        )
        text = " ".join([*rng.choice(WORDS, n_words), emotion])
        words.append(f"{name} [{start:08.4f}-{end:08.4f}]: {text}.\n")
        start += max(0.01, seconds + rng.uniform(-0.2, 0.8))
    words[3], words[4] = words[4], words[3]
    words += ["M: hm.\n"] + 2 * [f"{dialog}_MXX0 [000.1000-000.2000]: oh\n"]
    header = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
    for path, text in (
        (f"EmoEvaluation/{dialog}.txt", "".join([header, *labels["F"], *labels["M"]])),
        (f"EmoEvaluation/Categorical/{dialog}_e2_cat.txt", "one rater\n"),
        (f"EmoEvaluation/._{dialog}.txt", "a file of macOS\n"),
        (f"transcriptions/{dialog}.txt", "".join(words)),
    ):
        (session / "dialog" / path).parent.mkdir(parents=True, exist_ok=True)
        (session / "dialog" / path).write_text(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a replica of IEMOCAP.")
    parser.add_argument("dir", type=Path, help="a new folder")
    parser.add_argument("--shorten", type=float, default=1.0, metavar="SHARE")
    args = parser.parse_args(arguments)
    args.dir.mkdir(parents=True)
    (args.dir / "toy.json").write_text("{}\n")
    rng = np.random.default_rng(9)
    for dialog, turns in tqdm(plan_release(rng).items(), leave=False, disable=None):
        session = args.dir / f"Session{dialog[4]}"
        write_dialog(session, dialog, turns, args.shorten, rng)
    print(f"{args.dir}: written. Compare it: python data.py check {args.dir}")


if __name__ == "__main__":
    data.run_command(main)
