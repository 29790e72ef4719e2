"""Write a replica of the full IEMOCAP release: tones and made-up sentences in its exact layout.

    python tests/full_size.py DIR                  10,039 utterances, 12.7 hours, 1.4 GB
    python tests/full_size.py DIR --shorten 0.02   the same files with 2 % of the audio

The dialogs, speakers, labels and counts are those of the release, so `python data.py check DIR`
passes. The quirks of its files are there too. Use it to try the loader, the cache and the trainer
at full size without the licensed corpus. DIR/toy.json marks it as a toy, and every report says so.
"""

import argparse
import json
import sys
import wave
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data

SEED = 9
BLUR = 0.2  # chance that the voice follows a random emotion, so audio alone cannot be perfect
SPREAD = 0.1  # of the overtones' fall: standard deviation, and half the range over speakers
SAYS_IT = 0.35  # chance that a sentence contains the emotion's keywords
STAY = 12.0  # how much more likely the next turn keeps the emotion
REPEAT = 0.25  # chance that a scripted sentence is spoken in other sessions too

SPEAKERS = {  # of the four classes: ang, hap with exc, sad, neu
    "Ses01F": (147, 132, 78, 171), "Ses01M": (82, 146, 116, 213),
    "Ses02F": (67, 166, 113, 135), "Ses02M": (70, 161, 84, 227),
    "Ses03F": (92, 128, 172, 130), "Ses03M": (148, 158, 133, 190),
    "Ses04F": (205, 185, 62, 76), "Ses04M": (122, 118, 81, 182),
    "Ses05F": (78, 159, 132, 221), "Ses05M": (92, 283, 113, 163),
}  # fmt: skip

# An emotion sets the pitch in Hz and how fast the overtones fall.
VOICES = {"neu": (200, 1.6), "hap": (800, 1.2), "ang": (400, 0.6), "sad": (100, 2.2)}
KEYWORDS = {
    "neu": ("table", "monday", "street", "paper"),
    "hap": ("lovely", "wonderful", "laugh", "party"),
    "ang": ("stupid", "hate", "enough", "shout"),
    "sad": ("lost", "alone", "cry", "goodbye"),
}
FILLERS = "well you know i think that it was the one we had there and so he said to me".split()
# Turns of other labels carry one of the four emotions too, because they are context.
FELT = {"exc": "hap", "sur": "hap", "fru": "ang", "dis": "ang", "fea": "sad", "oth": "neu"}

HEADER = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
RATERS = "C-E2:\tNeutral;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\n\n"  # of the single raters


def write_full_size(root: str | Path, shorten: float = 1.0) -> Path:
    """Write the replica into `root`, with audio lengths times `shorten`. Returns root.

    Raises FileExistsError if `root` contains anything.
    """
    root = Path(root)
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty; name a new folder")
    root.mkdir(parents=True, exist_ok=True)
    # Write the mark first, so an interrupted copy is marked as well.
    (root / "toy.json").write_text(json.dumps({"full_size": True, "shorten": shorten}))

    rng = np.random.default_rng(SEED)
    speaker_fall = {speaker: SPREAD * rng.uniform(-1, 1) for speaker in SPEAKERS}
    plan = [dialog for session in data.SESSIONS for dialog in plan_session(session, rng)]
    for number, (name, turns) in enumerate(tqdm(plan, desc="full size", leave=False, disable=None)):
        session = root / f"Session{name[4]}"
        wavs = session / "sentences" / "wav" / name
        wavs.mkdir(parents=True)
        counts: Counter = Counter()
        labels: dict[str, list[str]] = {"F": [], "M": []}
        words = []
        felt, start, end = "neu", 0.0, 0.5
        for k, (letter, emotion) in enumerate(turns):
            # A turn labelled xxx keeps the emotion of the turn before it.
            felt = FELT.get(emotion, emotion if emotion in VOICES else felt)
            # The lengths have the release's median and mean: 3.58 and 4.55 s.
            seconds = float(np.clip(rng.lognormal(np.log(3.58), 0.69), 0.585, 34.1)) * shorten
            n = int(seconds * data.SAMPLE_RATE)
            # Turns overlap. One pair starts at the same time, as in the release.
            if not (name == "Ses02F_impro01" and k == 7):
                start = max(end + rng.uniform(-0.2, 0.8), start + 0.01)
            end = start + n / data.SAMPLE_RATE

            id = f"{name}_{letter}{counts[letter]:03}"
            counts[letter] += 1
            x = voice(felt, speaker_fall[f"{name[:5]}{letter}"], n, rng)
            write_wav(wavs / f"{id}.wav", x)
            text = sentence(felt, "script" in name, rng)
            words.append(f"{id} [{start:08.4f}-{end:08.4f}]: {text}")
            times = f"[{start:.4f} - {end:.4f}]"
            labels[letter].append(f"{times}\t{id}\t{emotion}\t[2.5000, 2.5000, 2.5000]\n{RATERS}")

        # The quirks of the transcripts: a line without an id, two turns out of order, and 48 lines
        # of XX utterances, which have no label and no wav. Two of their ids occur twice.
        words.insert(2, "M: hm.")
        words[5], words[6] = words[6], words[5]
        if name in ("Ses05F_impro03", "Ses05M_impro03"):
            words += [f"{name}_FXX0 [000.1000-000.2000]: "] * 2
        elif number % 3 == 0 and number < 44 * 3:
            words.append(f"{name}_MXX0 [000.1000-000.2000]: oh")

        # The quirks of the label files: all turns of F, then all of M. Beside them are files of
        # single raters and files that macOS leaves behind.
        for path, text in (
            (f"EmoEvaluation/{name}.txt", HEADER + "".join(labels["F"] + labels["M"])),
            (f"EmoEvaluation/Categorical/{name}_e2_cat.txt", "one rater\n"),
            (f"EmoEvaluation/._{name}.txt", "a stray file of macOS\n"),
            (f"transcriptions/{name}.txt", "\n".join(words) + "\n"),
        ):
            (session / "dialog" / path).parent.mkdir(parents=True, exist_ok=True)
            (session / "dialog" / path).write_text(text)
    return root


def dialog_names(session):
    """List the dialogues of a session of the full release: 28, 30, 32, 30, 31."""
    names = []
    for letter in "FM":  # who wore the markers
        acts = [f"impro{n:02}" for n in range(1, 8 if session == 1 else 9)]
        if (session, letter) == (3, "M"):  # 05 and 08 were played twice
            acts = [a for act in acts for a in ([act + "a", act + "b"] if act[-1] in "58" else [act])]
        acts += [f"script{n}" for n in "01_1 01_2 01_3 02_1 02_2 03_1 03_2".split()]
        if (session, letter) == (5, "M"):
            acts.append("script01_1b")
        names += [f"Ses{session:02}{letter}_{act}" for act in acts]
    return names


def plan_session(session: int, rng: np.random.Generator) -> list[tuple[str, list]]:
    """Plan a session's dialogs: [(name, [(letter of the speaker, label), ...]), ...].

    Each speaker, label and kind of dialog gets the number of utterances that data.py's tables give.
    """
    _, total, _, _, n_excited, _, _, n_improvised, _, _, _ = data.SESSIONS[session]

    # The utterances of the four classes, of which some happy ones become excited.
    four = [
        (speaker[-1], emotion)
        for speaker, row in SPEAKERS.items() if speaker.startswith(f"Ses{session:02}")
        for emotion, n in zip(("ang", "hap", "sad", "neu"), row) for _ in range(n)
    ]  # fmt: skip
    rng.shuffle(four)
    happy = [i for i, (_, emotion) in enumerate(four) if emotion == "hap"]
    for i in happy[:n_excited]:
        four[i] = (four[i][0], "exc")

    # The other labels have counts for the whole release only. Shuffle them once, in the same way
    # for all sessions. Each session takes the slice after those of the sessions before it.
    others = [e for e, n in data.EMOTIONS.items() if e not in data.LABELS for _ in range(n)]
    others = list(np.random.default_rng(SEED).permutation(others))
    before = sum(row[1] - sum(row[7:9]) for s, row in data.SESSIONS.items() if s < session)
    others = others[before : before + total - len(four)]
    rest = [("FM"[rng.integers(2)], str(emotion)) for emotion in others]

    cut = len(rest) * n_improvised // len(four)
    turns = {
        "impro": four[:n_improvised] + rest[:cut],
        "script": four[n_improvised:] + rest[cut:],
    }
    dialogs = []
    for kind in turns:
        names = [name for name in dialog_names(session) if kind in name]
        order = chain(Counter(turns[kind]), rng)
        # Dialogs have different lengths, of 24 turns or more, as in the release.
        share = rng.uniform(0.5, 1.5, len(names))
        free = len(order) - 24 * len(names)
        cuts = np.round(np.cumsum(share / share.sum()) * free).astype(int)
        ends = cuts + 24 * np.arange(1, len(names) + 1)
        dialogs += [(n, order[a:b]) for n, a, b in zip(names, [0, *ends[:-1]], ends)]
    return dialogs


def chain(left: Counter, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Order all turns of `left` so that an emotion tends to stay."""
    order, felt = [], None
    while left:
        keys = list(left)
        weights = [left[k] * (STAY if FELT.get(k[1], k[1]) == felt else 1.0) for k in keys]
        weights = np.array(weights)
        turn = keys[rng.choice(len(keys), p=weights / weights.sum())]
        left[turn] -= 1
        if not left[turn]:
            del left[turn]
        if turn[1] != "xxx":
            felt = FELT.get(turn[1], turn[1])
        order.append(turn)
    return order


def voice(emotion: str, speaker_fall: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """Make n samples of a steady tone with overtones. A clip over 0.2 s starts with silence."""
    if rng.random() < BLUR:
        emotion = list(VOICES)[rng.integers(4)]
    pitch, fall = VOICES[emotion]
    fall += speaker_fall + SPREAD * rng.standard_normal()
    # Every pitch is a multiple of 100 Hz, so 10 ms of the tone repeat exactly.
    t = np.arange(data.SAMPLE_RATE // 100) / data.SAMPLE_RATE
    tone = sum(
        h**-fall * np.sin(2 * np.pi * h * pitch * t + rng.uniform(0, 6)) for h in range(1, 13)
    )
    tone = np.resize(tone, n)
    tone[: 800 if n > 3200 else 0] = 0
    return 0.3 * rng.uniform(0.3, 1.0) * tone / np.abs(tone).max() + 1e-5 * rng.standard_normal(n)


def sentence(emotion: str, scripted: bool, rng: np.random.Generator) -> str:
    """Make a sentence with the release's median and mean length: 8 and 11.5 words."""
    if scripted and rng.random() < REPEAT:  # one of twenty lines that every session speaks
        rng = np.random.default_rng([list(VOICES).index(emotion), rng.integers(20)])
    if rng.random() < 0.01:
        return "[LAUGHTER]"
    n = int(np.clip(rng.lognormal(np.log(8), 0.85), 1, 98))
    words = [FILLERS[i] for i in rng.integers(len(FILLERS), size=n)]
    if rng.random() < SAYS_IT:
        for i in rng.integers(n, size=rng.integers(2, 2 * n + 1)):
            words[i] = KEYWORDS[emotion][rng.integers(4)]
    return " ".join(words).capitalize() + "."


def write_wav(path: Path, x: np.ndarray) -> None:
    """Write samples in [-1, 1] as 16-bit mono PCM."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, data.SAMPLE_RATE, len(x), "NONE", ""))
        file.writeframes((np.clip(x, -1, 1) * 32767).astype("<i2").tobytes())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dir", type=Path, help="a new folder")
    parser.add_argument("--shorten", type=float, default=1.0, metavar="F",
                        help="multiply the length of each clip by F")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.shorten <= 0:
        parser.error(f"--shorten {args.shorten}: give a number above 0")
    try:
        write_full_size(args.dir, args.shorten)
    except OSError as error:
        sys.exit(f"error: {error}")
    print(f"{args.dir}: written. Compare it with the release: python data.py check {args.dir}")


if __name__ == "__main__":
    main()
