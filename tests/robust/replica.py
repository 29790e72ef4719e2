"""Write a replica of the full release of IEMOCAP: tones and made-up sentences.

    python -m tests.robust.replica DIR                  10,039 recordings, 1.5 GB
    python -m tests.robust.replica DIR --shorten 0.02   the same with 2 % of the audio

The dialogues, speakers, labels and counts are those of the release, and so are the
quirks of its files. Use it to try the reader, the cache and the trainer at full size
without the licensed corpus. DIR/toy.json marks it as a toy, and every report says so.
"""

import argparse
import wave
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

RATE = 16000  # Hz

# By speaker: angry, happy or excited, sad, neutral.
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
# By session: all utterances, the excited among the happy, and the improvised of the
# four classes.
SESSIONS = {
    1: (1819, 143, 521),
    2: (1811, 210, 530),
    3: (2136, 151, 627),
    4: (2103, 238, 534),
    5: (2170, 299, 731),
}
OTHERS = {"xxx": 2507, "fru": 1849, "sur": 107, "fea": 40, "oth": 3, "dis": 2}
PITCHES = {"neu": 200, "hap": 800, "exc": 800, "ang": 400, "sad": 100}  # Hz

FILLERS = (
    "well you know i think that it was the one we had there and so he said".split()
)

HEADER = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
RATERS = "C-E2:\tNeutral;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\n\n"


def write_replica(root: Path, shorten: float = 1.0) -> None:
    """Write the replica into the new folder `root`, with a share of each clip."""
    root.mkdir(parents=True)
    (root / "toy.json").write_text("{}\n")
    rng = np.random.default_rng(9)
    dialogs = plan_release(rng).items()
    for number, (dialog, turns) in enumerate(tqdm(dialogs, leave=False, disable=None)):
        write_dialog(root, number, dialog, turns, shorten, rng)


def plan_release(rng) -> dict[str, list[tuple[str, str]]]:
    """Deal out all turns: {dialogue: [(letter of who speaks, emotion), ...]}."""
    others = np.repeat(list(OTHERS), list(OTHERS.values()))
    rng.shuffle(others)
    plan = {}
    for session, (total, excited, improvised) in SESSIONS.items():
        targets = []
        for letter in "FM":
            counts = SPEAKERS[f"{session}{letter}"]
            for emotion, count in zip(
                ("ang", "hap", "sad", "neu"), counts, strict=True
            ):
                targets += [(letter, emotion)] * count
        n_others = total - len(targets)
        rest = [(rng.choice(["F", "M"]), other) for other in others[:n_others]]
        others = others[n_others:]
        order = rng.permutation(len(targets))
        targets = [targets[i] for i in order]
        happy = [i for i, (_, emotion) in enumerate(targets) if emotion == "hap"]
        for i in happy[:excited]:
            targets[i] = (targets[i][0], "exc")

        cut = n_others * improvised // len(targets)
        names = dialog_names(session)
        impro = [name for name in names if "impro" in name]
        script = [name for name in names if "script" in name]
        plan |= deal(impro, targets[:improvised] + rest[:cut], rng)
        plan |= deal(script, targets[improvised:] + rest[cut:], rng)
    return plan


def deal(names: list[str], turns: list, rng) -> dict[str, list]:
    """Deal turns out to dialogues, in random order."""
    order = rng.permutation(len(turns))
    dialogs = {}
    for name, part in zip(names, np.array_split(order, len(names)), strict=True):
        dialogs[name] = [turns[i] for i in part]
    return dialogs


def dialog_names(session: int) -> list[str]:
    """List the dialogues of a session: 28, 30, 32, 30 and 31 of them."""
    names = []
    for letter in "FM":  # who wears the markers
        acts = [f"impro0{number}" for number in range(1, 8 if session == 1 else 9)]
        if (session, letter) == (3, "M"):
            acts = [act for act in acts if act[-1] not in "58"]
            acts += ["impro05a", "impro05b", "impro08a", "impro08b"]
        acts += [f"script{act}" for act in "01_1 01_2 01_3 02_1 02_2 03_1 03_2".split()]
        if (session, letter) == (5, "M"):
            acts.append("script01_1b")
        names += [f"Ses0{session}{letter}_{act}" for act in acts]
    return names


def write_dialog(root: Path, number: int, dialog: str, turns, shorten, rng) -> None:
    """Write the files of one dialogue, with the quirks of the release."""
    session = root / f"Session{dialog[4]}"
    wavs = session / "sentences" / "wav" / dialog
    wavs.mkdir(parents=True)
    counts = Counter()
    labels = {"F": "", "M": ""}
    words = []
    start = 0.0
    end = 0.5
    for k, (letter, emotion) in enumerate(turns):
        # The median is 3.58 s and the mean 4.55 s, as in the release.
        seconds = np.clip(rng.lognormal(np.log(3.58), 0.69), 0.585, 34.1) * shorten
        n = int(seconds * RATE)
        # Turns overlap. One pair of the release starts at the same time.
        if (dialog, k) != ("Ses02F_impro01", 7):
            start = max(end + rng.uniform(-0.2, 0.8), start + 0.01)
        end = start + n / RATE
        name = f"{dialog}_{letter}{counts[letter]:03}"
        counts[letter] += 1
        labels[letter] += f"[{start:.4f} - {end:.4f}]\t{name}\t{emotion}"
        labels[letter] += f"\t[2.5000, 2.5000, 2.5000]\n{RATERS}"
        text = make_sentence(emotion, "script" in dialog, rng)
        words.append(f"{name} [{start:08.4f}-{end:08.4f}]: {text}")
        write_tone(wavs / f"{name}.wav", emotion, n, rng)

    # 67 transcripts have lines out of order, at 149 places.
    if number < 67:
        for k in range(3 if number < 15 else 2):
            words[4 * k + 1], words[4 * k + 2] = words[4 * k + 2], words[4 * k + 1]
    # There are lines without an id, and 48 lines with XX. Two of these ids occur twice.
    words.insert(2, "M: hm.")
    if dialog in ("Ses05F_impro03", "Ses05M_impro03"):
        words += [f"{dialog}_FXX0 [000.1000-000.2000]:"] * 2
    elif number < 44:
        words.append(f"{dialog}_MXX0 [000.1000-000.2000]: oh")

    # A label file has all turns of F, and then all of M. Files of single raters and of
    # macOS lie beside it.
    for path, text in (
        (f"EmoEvaluation/{dialog}.txt", HEADER + labels["F"] + labels["M"]),
        (f"EmoEvaluation/Categorical/{dialog}_e2_cat.txt", "one rater\n"),
        (f"EmoEvaluation/._{dialog}.txt", "a file of macOS\n"),
        (f"transcriptions/{dialog}.txt", "\n".join(words) + "\n"),
    ):
        (session / "dialog" / path).parent.mkdir(parents=True, exist_ok=True)
        (session / "dialog" / path).write_text(text)


def write_tone(path: Path, emotion: str, n: int, rng) -> None:
    """Write n samples of a tone. Above 0.2 s it begins with 50 ms of silence."""
    pitch = PITCHES.get(emotion, 300)
    tone = np.sin(2 * np.pi * pitch * np.arange(n) / RATE)
    samples = rng.uniform(1000, 10000) * tone + rng.standard_normal(n)
    if n > 3200:
        samples[:800] = 0
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, n, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())


def make_sentence(emotion: str, scripted: bool, rng) -> str:
    """Make a sentence: the median is 8 words and the mean 11.5, as in the release."""
    if scripted and rng.random() < 0.25:
        # One of twenty lines that the actors of every session speak.
        rng = np.random.default_rng(rng.integers(20))
    elif rng.random() < 0.006:
        return "[LAUGHTER]"
    n = int(np.clip(rng.lognormal(np.log(8), 0.85), 1, 98))
    words = list(rng.choice(FILLERS, n))
    if rng.random() < 0.35:
        words[n // 2] = emotion
    return " ".join(words).capitalize() + "."


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dir", type=Path, help="a new folder")
    parser.add_argument("--shorten", type=float, default=1.0, metavar="SHARE")
    args = parser.parse_args(arguments)
    if args.dir.exists():
        parser.error(f"{args.dir} exists already. Name a new folder")
    write_replica(args.dir, args.shorten)
    print(f"{args.dir}: written. Compare it: python data.py check {args.dir}")


if __name__ == "__main__":
    main()
