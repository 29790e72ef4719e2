"""IEMOCAP (§3.1) and everything between its files and the model's inputs (§3.2).

    python data.py check DIR              the corpus against the reference counts: every problem
    python data.py toy DIR [--full-size]  a toy corpus in IEMOCAP's layout, quirks included

One utterance on its way from the disk to a tensor, by example:

    Session1/dialog/EmoEvaluation/Ses01F_impro01.txt
        [6.2901 - 8.2357]<TAB>Ses01F_impro01_F000<TAB>neu<TAB>[2.5000, 2.5000, 2.5000]
    Session1/dialog/transcriptions/Ses01F_impro01.txt
        Ses01F_impro01_F000 [006.2901-008.2357]: <the words>
    Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav

    read_iemocap   Utterance(id="Ses01F_impro01_F000", session=1, dialog="Ses01F_impro01",
                   speaker="Ses01F", start=6.2901, end=8.2357, text=..., emotion="neu"): label 0
    split          fold 5, seed 0: its speaker, Ses01F, is the one drawn for development: in dev
    load_wav       31,129 samples at 16 kHz in [-1, 1]; clip: leading silence off (none here), 5 s
    WavLM          31,129 samples -> 97 frames x 25 layers x 1024; 16 bits each in the cache
    BERT           its words -> k word pieces x 13 x 768; so the 4 turns after it; before it: none
    a batch        audio: states (32, 249, 25, 1024), mask (32, 249)
                   text:  states (U, T, 13, 768), mask (U, T), context (32, 9) into the U rows
"""

import argparse
import ast
import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import random
import re
import shutil
import sys
import textwrap
import wave
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

SAMPLE_RATE = 16000  # Hz; files of the other rates are resampled to it
SAMPLE_RATES = (8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000)
CLASSES = ("neu", "hap", "ang", "sad")  # the order of Fig. 4
LABELS = {"neu": 0, "hap": 1, "exc": 1, "ang": 2, "sad": 3}  # §3.1: happy is merged with excited


class CorpusError(ValueError):
    """A corpus is not as it should be: one line a problem, each naming the file and the remedy."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


# ------------------------------------------------------------------------------------------------
# IEMOCAP (§3.1)
#
# Five sessions, in each of them one woman and one man in 28 to 32 dialogues, improvised ("impro")
# or scripted ("script"). Three places hold a dialogue: its labels, its words, its wavs. What is
# easy to get wrong, each of it covered by a test:
#   - the letter in a dialog's name is not the speaker; the letter in the utterance's suffix is;
#   - the files are not in time order, and the two speakers' turns overlap;
#   - 48 transcript lines have an id with XX but no label and no wav; others have no id at all;
#   - only 5,531 of 10,039 utterances are of the four classes, but all of them are context.
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Utterance:
    """One turn of a dialogue. A corpus is a list of these: dialogue by dialogue, in time order."""

    id: str  # Ses01F_impro01_M003
    session: int  # 1 to 5: the fold that tests on it
    dialog: str  # Ses01F_impro01: here F is who wore the markers, *not* who speaks
    speaker: str  # Ses01M: session and the letter of the id's last part; 10 speakers in all
    start: float  # seconds in the dialogue
    end: float
    text: str
    emotion: str  # one of the corpus's eleven codes
    wav: Path

    @property
    def label(self) -> int | None:
        """Index into CLASSES, or None where the emotion is not one of the paper's four."""
        return LABELS.get(self.emotion)


EMOTIONS = {  # every code of the full release, with its count
    "xxx": 2507, "fru": 1849, "neu": 1708, "ang": 1103, "sad": 1084, "exc": 1041, "hap": 595,
    "sur": 107, "fea": 40, "oth": 3, "dis": 2,
}  # fmt: skip
# PAPER-ERROR [E1]: §3.1 counts 1,626 happy; 5,531 in all leaves 1,636, as does the corpus.
SESSION_COLUMNS = ("utterances", "ang", "hap", "exc", "sad", "neu", "improvised", "scripted")
SESSIONS = {  # all but the first column: of the four classes
    1: (1819, 229, 135, 143, 194, 384, 521, 564),
    2: (1811, 137, 117, 210, 197, 362, 530, 493),
    3: (2136, 240, 135, 151, 305, 320, 627, 524),
    4: (2103, 327, 65, 238, 143, 258, 534, 497),
    5: (2170, 170, 143, 299, 245, 384, 731, 510),
}
SPEAKER_COLUMNS = ("ang", "hap", "sad", "neu")  # hap with exc
SPEAKERS = {
    "Ses01F": (147, 132, 78, 171), "Ses01M": (82, 146, 116, 213),
    "Ses02F": (67, 166, 113, 135), "Ses02M": (70, 161, 84, 227),
    "Ses03F": (92, 128, 172, 130), "Ses03M": (148, 158, 133, 190),
    "Ses04F": (205, 185, 62, 76), "Ses04M": (122, 118, 81, 182),
    "Ses05F": (78, 159, 132, 221), "Ses05M": (92, 283, 113, 163),
}  # fmt: skip


def dialog_names(session: int) -> list[str]:
    """The dialogs of a session of the full release: 28, 30, 32, 30, 31, together 151.

    First those in which the woman wore the markers: Ses01F_impro01 ... Ses01M_script03_2.
    """
    scripts = ["01_1", "01_2", "01_3", "02_1", "02_2", "03_1", "03_2"]
    names = []
    for letter in "FM":
        acts = [f"impro{n:02}" for n in range(1, 8 if session == 1 else 9)]  # seven, then eight
        if (session, letter) == (3, "M"):  # 05 and 08 were played twice
            acts = [a for a in acts if a not in ("impro05", "impro08")]
            acts = sorted(acts + ["impro05a", "impro05b", "impro08a", "impro08b"])
        acts += [f"script{n}" for n in scripts]
        if (session, letter) == (5, "M"):
            acts.append("script01_1b")
        names += [f"Ses{session:02}{letter}_{act}" for act in acts]
    return names


LABEL_LINE = re.compile(r"\[(\d+\.\d+) - (\d+\.\d+)\]\s+(\S+)\s+([a-z]+)\s+\[.+\]")
WORDS_LINE = re.compile(r"(\S+)\s+\[(\d+\.\d+)-(\d+\.\d+)\]:(.*)")
UTTERANCE_ID = re.compile(r"(Ses\d\d)[FM]_\w+_([FM])\d{3}")
EXTRA_ID = re.compile(r"Ses\d\d[FM]_\w+_[FM]XX\d")  # words that have neither a wav nor a label


def read_iemocap(root: str | Path, full: bool = False) -> list[Utterance]:
    """The corpus in `root`, the folder that holds Session1 ... Session5.

    Dialogues by name, each in time order with both speakers and all labels, as the context needs
    them. Raises CorpusError with every problem found; `full` also demands the reference counts.
    """
    corpus, problems = scan(Path(root))
    if full:
        problems += reference_problems(corpus)
    if problems:
        raise CorpusError(problems)
    return corpus


def scan(root: Path) -> tuple[list[Utterance], list[str]]:
    """Read whatever can be read: (the utterances that are whole, a line for each problem)."""
    # Problems are collected, not raised: a licensed corpus of 10,000 files that arrives damaged
    # should be mended once, not once a problem.
    corpus: list[Utterance] = []
    problems: list[str] = []
    sessions = sorted(p for p in root.glob("Session[1-9]") if p.is_dir())
    if not sessions:
        # The usual slip: the root is named one folder too high, or one too low.
        near = {p.resolve().parent for to in ("*/Session1", "../Session1") for p in root.glob(to)}
        hint = f"name {' or '.join(map(str, near))}" if near else "name the folder that holds them"
        problems.append(f"{root}: holds no Session1 ... Session5; {hint}")
    for session in sessions:
        # "Ses*": some copies hold macOS's ._* files; no recursion: sub-folders hold single raters.
        labels = sorted((session / "dialog" / "EmoEvaluation").glob("Ses*.txt"))
        words = sorted((session / "dialog" / "transcriptions").glob("Ses*.txt"))
        if not labels:
            problems.append(f"{session}/dialog/EmoEvaluation: holds no label file Ses*.txt")
        for name in sorted({f.name for f in words} - {f.name for f in labels}):
            problems.append(
                f"{session}/dialog/EmoEvaluation/{name}: missing, its transcript is there"
            )
        for file in labels:
            corpus += _read_dialog(file, session, problems)
    if not corpus and not problems:
        problems.append(f"{root}: no utterance in any label file")
    whole = []
    # (Here and below, disable=None: no bar where the output is no terminal.)
    for u in tqdm(corpus, desc="wav headers", leave=False, delay=3, disable=None):
        try:
            seconds, meant = wav_seconds(u.wav), u.end - u.start
        except CorpusError as error:
            problems += error.problems
            continue
        if abs(seconds - meant) > 0.1:  # more than rounding: a file cut off, or another one
            problems.append(
                f"{u.wav}: {seconds:.2f} s long, {meant:.2f} s by its label; fetch it again"
            )
        else:
            whole.append(u)
    return whole, problems


def _read_dialog(file: Path, session: Path, problems: list[str]) -> list[Utterance]:
    """One dialogue: its label file, its transcript, the places of its wavs.

    Labels and words are matched by id, and must agree on the times: a transcript of another take
    would pass unseen otherwise. What does not agree is left out, and said in `problems`.
    """
    dialog = file.stem
    if not dialog.startswith(f"Ses0{session.name[-1]}"):
        problems.append(f"{file}: a dialog of another session; it does not belong in {session}")
        return []
    transcript = session / "dialog" / "transcriptions" / file.name
    spoken: dict[str, tuple[float, float, str]] = {}  # id -> start, end, words
    for place, line in _lines(transcript, problems):
        id = line.split()[0] if line else ""
        if not id.startswith("Ses") or EXTRA_ID.fullmatch(id):
            continue  # "M: ..." and "F: ..." without an id, and the 48 lines with XX
        match = WORDS_LINE.fullmatch(line)
        if not match:
            problems.append(f"{place}: expected 'ID [start-end]: words', not {line!r:.60}")
        elif id in spoken:
            problems.append(f"{place}: {id} stands there for the second time; keep one line")
        else:
            spoken[id] = float(match[2]), float(match[3]), " ".join(match[4].split())

    utterances: dict[str, Utterance] = {}
    labelled = set()  # ids, those of faulty lines too: a bad label is not also a missing one
    for place, line in _lines(file, problems):
        if not line.startswith("["):
            continue  # the header, blank lines, the lines of single raters
        match = LABEL_LINE.fullmatch(line)
        if not match:
            problems.append(
                f"{place}: expected '[start - end] ID emotion [V, A, D]', not {line!r:.60}"
            )
            continue
        start, end, id, emotion = float(match[1]), float(match[2]), match[3], match[4]
        who = UTTERANCE_ID.fullmatch(id)
        labelled.add(id)
        # Compared whole: Ses05M_script01_1 is also how an id of Ses05M_script01_1b begins.
        if not who or id.rsplit("_", 1)[0] != dialog:
            problems.append(f"{place}: {id} is not an utterance of {dialog}")
        elif id in utterances:
            problems.append(f"{place}: {id} stands there for the second time; keep one line")
        elif emotion not in EMOTIONS:
            problems.append(f"{place}: unknown emotion {emotion!r}; known are {' '.join(EMOTIONS)}")
        elif end <= start:
            problems.append(f"{place}: {id} ends at {end} s but starts at {start} s")
        elif id not in spoken:
            problems.append(f"{place}: {id} has no words in {transcript}")
        elif max(abs(spoken[id][0] - start), abs(spoken[id][1] - end)) > 0.01:
            problems.append(f"{place}: {id} has other times in {transcript}; fetch both again")
        else:
            utterances[id] = Utterance(
                id, int(session.name[-1]), dialog, who[1] + who[2], start, end, spoken[id][2],
                emotion, session / "sentences" / "wav" / dialog / f"{id}.wav",
            )  # fmt: skip
    for id in sorted(spoken.keys() - labelled):
        problems.append(f"{transcript}: {id} has words but no label in {file}")
    if not labelled and not spoken:
        problems.append(f"{file}: holds no utterance, nor does its transcript; fetch both again")
    # Neither file is in order: labels come all F, then all M; transcripts have inversions.
    return sorted(utterances.values(), key=lambda u: (u.start, u.end, u.id))


def _lines(path: Path, problems: list[str]) -> list[tuple[str, str]]:
    """("FILE:NUMBER", line without white space at its ends) of a text file, [] where unreadable."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        problems.append(f"{path}: missing")
    except (UnicodeDecodeError, OSError) as error:
        problems.append(f"{path}: cannot be read as UTF-8 text ({error}); fetch it again")
    else:
        return [(f"{path}:{n}", line.strip()) for n, line in enumerate(text.split("\n"), 1)]
    return []


def reference_problems(corpus: list[Utterance]) -> list[str]:
    """How the corpus differs from the full release: a line for each row of the tables above.

    Nothing where the corpus is empty: then something else is wrong, and said already.
    """
    if not corpus:
        return []
    expected = {"labels": EMOTIONS}
    expected |= {f"session {s}": dict(zip(SESSION_COLUMNS, row)) for s, row in SESSIONS.items()}
    expected |= {f"speaker {s}": dict(zip(SPEAKER_COLUMNS, row)) for s, row in SPEAKERS.items()}
    found: Counter = Counter()  # as in ("session 3", "exc"): 151
    for u in corpus:
        found["labels", u.emotion] += 1
        found[f"session {u.session}", "utterances"] += 1
        if u.label is not None:
            found[f"session {u.session}", u.emotion] += 1
            found[f"session {u.session}", "improvised" if improvised(u) else "scripted"] += 1
            found[f"speaker {u.speaker}", CLASSES[u.label]] += 1
    problems = []
    dialogs = {name for session in SESSIONS for name in dialog_names(session)}
    here = {u.dialog for u in corpus}
    for what, names in (("missing", dialogs - here), ("unknown", here - dialogs)):
        if names:
            some = " ".join(sorted(names)[:10]) + (" ..." if len(names) > 10 else "")
            problems.append(f"full release: {len(names)} dialogs {what}: {some}")
    for row, cells in expected.items():
        wrong = [f"{c} {found[row, c]} (not {n})" for c, n in cells.items() if found[row, c] != n]
        if wrong:
            problems.append(f"full release: {row}: {', '.join(wrong)}")
    return problems


def improvised(u: Utterance) -> bool:
    """Whether the dialogue is improvised, not scripted."""
    return "impro" in u.dialog


# EXERCISE 7 (20 min): delete the body, write it again; pytest -m ex7
def split(
    corpus: list[Utterance], fold: int, seed: int
) -> tuple[list[Utterance], list[Utterance], list[Utterance]]:
    """Leave-one-session-out (§3.1): the four-class utterances as (train, dev, test).

    Test is session `fold`; dev is one speaker of the rest, drawn by fold and seed (§3.2); train is
    all others. Raises CorpusError (a list of one line) where one of the three would be empty. Which
    generator draws is free, but with another the README's numbers are others.
    """
    targets = [u for u in corpus if u.label is not None]
    rest = [u for u in targets if u.session != fold]
    speakers = sorted({u.speaker for u in rest})
    if len(speakers) < 2 or len(rest) == len(targets):
        raise CorpusError([
            f"fold {fold} needs four-class utterances in Session{fold} and two speakers in the "
            f"others; the corpus has sessions {sorted({u.session for u in targets})}"
        ])  # fmt: skip
    # UNSPECIFIED [A14]: "randomly select one speaker as a development set" (§3.2): of the training
    # speakers, we presume, drawn by the seed. His or her partner stays in training, so the words of
    # the development speaker do stand in the *context* of training utterances, without labels.
    dev_speaker = random.Random(f"fold {fold}, seed {seed}").choice(speakers)
    train = [u for u in rest if u.speaker != dev_speaker]
    dev = [u for u in rest if u.speaker == dev_speaker]
    test = [u for u in targets if u.session == fold]
    a, b, c = ({u.speaker for u in part} for part in (train, dev, test))
    if a & b or a & c or b & c:  # only where a corpus's ids and sessions contradict each other
        raise CorpusError([f"fold {fold}: {a & b | a & c | b & c} in two parts of it; check ids"])
    return train, dev, test


def texts_elsewhere(corpus: list[Utterance]) -> set[str]:
    """Ids of the utterances whose words another session speaks too, letter case and marks aside:

        "I know, you know." in session 1, "i know you know" in session 2: both; a third time in
        session 2: that one as well. Twice in session 3 alone: neither.

    A quarter of IEMOCAP's scripted lines do: leaving a session out does not leave its texts out.
    """
    plain = {u.id: " ".join(re.findall(r"\w+", u.text.lower())) for u in corpus}
    sessions: dict[str, set[int]] = {}
    for u in corpus:
        sessions.setdefault(plain[u.id], set()).add(u.session)
    return {u.id for u in corpus if len(sessions[plain[u.id]]) > 1}


def context_windows(corpus: list[Utterance], size: int = 9) -> Tensor:
    """For each utterance the positions of its neighbours in time (§3.2): (N, size), -1 for none.

    Column size // 2 is the utterance itself. Both speakers and every label count as neighbours;
    nothing of another dialogue does. A dialogue of three in rows 0 to 2, with size 3:
    [[-1, 0, 1], [0, 1, 2], [1, 2, -1]].
    """
    n, half = len(corpus), size // 2
    windows = torch.arange(n)[:, None] + torch.arange(-half, half + 1)  # (N, size)
    _, number = np.unique([u.dialog for u in corpus], return_inverse=True)
    dialog = torch.from_numpy(number)  # (N,): which dialogue, by number
    inside = (windows >= 0) & (windows < n)
    inside &= dialog[windows.clamp(0, n - 1)] == dialog[:, None]
    return torch.where(inside, windows, -1)


# ------------------------------------------------------------------------------------------------
# Waveforms (§3.2): "audios are clipped into 5 seconds ... by trimming or padding"
#
# Padding happens a batch at a time, to its longest clip, not always to 5 s. It is masked wherever
# it could be seen, so more of it would change no real frame (a test holds that). Zero mean and unit
# variance are the work of WavLM's own preprocessor (model.Upstream).
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_wav(path: str | Path):
    """A 16-bit mono WAV file, opened; CorpusError with the reason where it is not one."""
    try:
        with wave.open(str(path), "rb") as file:
            form = f"{file.getnchannels()} channel(s) of {8 * file.getsampwidth()} bits"
            if form != "1 channel(s) of 16 bits":
                raise wave.Error(f"{form}; convert it to mono, 16 bits")
            if file.getframerate() not in SAMPLE_RATES:  # a damaged header may say anything
                raise wave.Error(f"{file.getframerate()} Hz; convert it to {SAMPLE_RATE} Hz")
            if file.getnframes() == 0:
                raise wave.Error("no samples in it")
            file.setpos(file.getnframes() - 1)
            if len(file.readframes(1)) < 2:  # the last sample: with it, all are there
                raise wave.Error("shorter than its header says")
            file.rewind()
            yield file
    except FileNotFoundError:
        raise CorpusError([f"{path}: missing"]) from None
    except (wave.Error, EOFError, OSError, RuntimeError, ValueError) as error:  # what wave raises
        reason = str(error) or "shorter than its header says"
        raise CorpusError([f"{path}: not usable as a WAV file: {reason}"]) from None


def wav_seconds(path: str | Path) -> float:
    """Length in seconds by the file's header. Raises CorpusError as load_wav does."""
    with _open_wav(path) as file:
        return file.getnframes() / file.getframerate()


def load_wav(path: str | Path) -> Tensor:
    """Samples in [-1, 1]: (n,) float32 at 16 kHz, resampled if the file has another rate.

    Reads 16-bit mono PCM with the standard library (torchaudio.load would need FFmpeg). Raises
    CorpusError naming the file where it is missing, damaged or of another form.
    """
    with _open_wav(path) as file:
        rate = file.getframerate()
        pcm = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
    x = torch.from_numpy(pcm.astype(np.float32) / 32768)  # (n,)
    if rate != SAMPLE_RATE:
        from torchaudio.functional import resample

        x = resample(x, rate, SAMPLE_RATE)
    return x


CLIP_SECONDS = 5  # §3.2
TRIM_DB = 60  # [A13]
MIN_SAMPLES = 400  # 25 ms: WavLM's first frame, and the window of the search for silence


def clip(x: Tensor) -> Tensor:
    """The first five voiced seconds (§3.2): (n,) -> (m,) with 400 <= m <= 80,000."""
    # UNSPECIFIED [A13]: "we trim the voiced 5 seconds of audio ... at the beginning". We cut what
    # comes before the first 25 ms whose power is within 60 dB of the loudest 25 ms, and keep 5 s.
    # (torchaudio's vad gives back nothing at all where its detector never fires.)
    if len(x) > MIN_SAMPLES:
        power = x.unfold(0, MIN_SAMPLES, MIN_SAMPLES).square().mean(dim=1)
        loud = power >= power.max() * 10 ** (-TRIM_DB / 10)  # of pure silence every window is
        x = x[int(loud.nonzero()[0]) * MIN_SAMPLES :]
    x = x[: CLIP_SECONDS * SAMPLE_RATE]
    return torch.nn.functional.pad(x, (0, max(0, MIN_SAMPLES - len(x))))


# ------------------------------------------------------------------------------------------------
# Layer states: from the cache or from the live upstream
#
# While the upstreams are frozen (§2.4) an utterance's states never change. So they are computed
# once, for all systems, folds and seeds, and read back from disk: a 5 s clip has 249 x 25 x 1024
# numbers, 12.7 MB in 16 bits; the 5,531 clips, most of them shorter, at most 46 GB. In fine-tuning
# the bottom layer learns, every state changes with it, and the upstreams run on every batch. Both
# answer the same call:
#
#     states, mask = source(rows)           (U, T, L, D), (U, T) for U rows of the corpus
# ------------------------------------------------------------------------------------------------


class Ragged:
    """N arrays of unlike length in one memory-mapped file: clips, or utterances' layer states.

    lengths (N,) steps, each of shape `step`. Array i is `ragged[i]`, (lengths[i], *step); calling
    it with U rows of the corpus gives them padded: (x (U, T, *step), mask (U, T)). With lengths
    2, 0 and 3 the file holds five steps, and a call with rows [0, 2] takes those at `places`:

        file     a0 a1 c0 c1 c2        offsets 0 2 2
        places   [[0, 1, 1], [2, 3, 4]]
        mask     [[True, True, False], [True, True, True]]

    One gather copies a batch, however many utterances it has; and what is not asked for stays on
    the disk, so memory does not grow with the corpus.
    """

    def __init__(self, path: Path, lengths: Tensor, step: tuple, dtype: str, mode: str = "c"):
        self.fingerprint = ""  # of the content: cache_clips sets it, for states depend on clips
        self.lengths = lengths
        self.offsets = lengths.cumsum(0) - lengths  # (N,): the first step of each in the file
        shape = (int(lengths.sum()), *step)
        # Mode "c", not "r": torch wants memory that it may write; what is written stays in here.
        self.file = np.memmap(path, dtype=dtype, mode=mode, shape=shape)
        self.data = torch.from_numpy(self.file)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Tensor:
        if i >= len(self):
            raise IndexError(i)  # the end of `for x in ragged`
        return self.data[self.offsets[i] : self.offsets[i] + self.lengths[i]]

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        starts, lengths = self.offsets[rows, None], self.lengths[rows, None]  # (U, 1) each
        steps = torch.arange(int(lengths.max()))  # (T,)
        mask = steps < lengths  # (U, T)
        # Past the end of an array its last step is read again. A live upstream's padding is not
        # zero either: whoever forgets the mask is wrong on both roads, and the tests see it.
        places = starts + torch.minimum(steps, lengths - 1)  # (U, T)
        return self.data[places.to(self.data.device)], mask

    def move_to_gpu(self) -> None:
        """Keep a copy in GPU memory, and read that, if it takes less than half of what is free."""
        if self.file.nbytes < torch.cuda.mem_get_info()[0] / 2:
            self.data = self.data.to("cuda")


def live(upstream: Callable, raw: Sequence) -> Callable:
    """The same call as a Ragged of states, answered by the upstream: for fine-tuning."""
    return lambda rows: upstream([raw[i] for i in rows.tolist()])


# EXERCISE 9 (20 min): delete the body, write it again; pytest -m ex9
def batch(
    rows: Tensor, windows: Tensor, sources: dict[str, Callable], device: str
) -> dict[str, tuple]:
    """The keyword arguments of EmotionRecognizer for the utterances at `rows` (B,) of the corpus:

        {"audio": (states, mask), "text": (states, mask, context)}, on `device`

    sources: by modality a Ragged or `live`; which of the two, the model never knows, and a modality
    without a source is left out. Audio is asked for `rows` as they come, text for the rows in their
    windows, each once: 32 windows of 9 overlap, and hold fewer than 288. With windows
    [[-1, 5, 6], [5, 6, 7]] text is asked for rows [5, 6, 7]; context is [[-1, 0, 1], [0, 1, 2]].
    """
    arguments = {}
    if "audio" in sources:
        arguments["audio"] = sources["audio"](rows)
    if "text" in sources:
        # unique sorts: "no utterance", -1, is number 0 where it occurs. It is not asked for; every
        # other number falls by one, and its own becomes -1 again, as the model wants it.
        distinct, context = windows[rows].unique(return_inverse=True)  # (U,), (B, C)
        if distinct[0] == -1:
            distinct, context = distinct[1:], context - 1
        arguments["text"] = (*sources["text"](distinct), context)
    return {
        modality: tuple(x.to(device, non_blocking=True) for x in tensors)
        for modality, tensors in arguments.items()
    }


def cache_clips(folder: Path, corpus: list[Utterance]) -> Ragged:
    """The clips of all four-class utterances, cut once: what WavLM hears, cached or live."""
    key = clip_key(corpus)
    done = _cached(folder, key)
    if not done:
        lengths, crc = [0] * len(corpus), 0
        with open(folder / "data.bin", "wb") as file:
            for i, u in enumerate(tqdm(corpus, desc="clips", leave=False, disable=None)):
                if u.label is not None:  # the context is text: other labels need no audio
                    x = clip(load_wav(u.wav)).numpy()
                    lengths[i] = len(x)
                    file.write(x)
                    crc = zlib.crc32(x, crc)
        done = {"lengths": lengths, "crc": crc}
        _note(folder, key, done)
    clips = Ragged(folder / "data.bin", torch.tensor(done["lengths"]), (), "f4")
    clips.fingerprint = f"{done['crc']:08x}"  # of what is heard, wherever and whenever it was cut
    return clips


def clip_key(corpus: list[Utterance]) -> dict:
    """What the clips depend on: the files, by size and time of change, and how they are cut."""
    files = [u.wav.stat() for u in corpus]
    wavs = digest([[u.id, u.label, f.st_size, f.st_mtime_ns] for u, f in zip(corpus, files)])
    cut = {"seconds": CLIP_SECONDS, "trim_db": TRIM_DB, "code": code(clip, load_wav)}
    return {"wavs": wavs, **cut}


def cache_states(
    folder: Path, upstream: Callable, raw: Sequence, lengths: Tensor, identity: dict
) -> Ragged:
    """Every layer state of the raw inputs, computed once and kept in 16 bits.

    upstream: a model.Upstream; lengths (N,): the steps that it makes of each input, 0 = not
    needed; identity: what the states depend on. After a kill 50 batches at most are computed again;
    a cache of another identity is refused, with the reason, and made anew. Raises CorpusError where
    the disk has too little room, or where a state does not fit into 16 bits.
    """
    # DEVIATION [D1]: the frozen phase sees the states rounded to 16 bits, the paper says nothing of
    # it. Why: one pass of the upstreams instead of one an epoch, in half the disk space.
    key = {**identity, "lengths": digest(lengths.tolist())}
    step = (upstream.n_layers, upstream.dim)
    order = lengths.argsort(descending=True, stable=True)  # longest first: if memory fails, at once
    batches = order[: int((lengths > 0).sum())].split(32)
    done = _cached(folder, key) or 0
    if not done:
        need = 2 * int(lengths.sum()) * step[0] * step[1]
        free = shutil.disk_usage(folder).free
        print(f"layer states: {need / 1e6:,.0f} MB for {folder}; {free / 1e6:,.0f} MB are free")
        if need > free:
            raise CorpusError([f"{folder}: too little room on this disk; put cache/ on another"])
        with open(folder / "data.bin", "wb") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash later
                os.posix_fallocate(file.fileno(), 0, need)
            file.truncate(need)
    states = Ragged(folder / "data.bin", lengths, step, "f2", "r+")
    for k in tqdm(
        range(done, len(batches)), initial=done, total=len(batches), desc=folder.name, disable=None
    ):
        with torch.no_grad():
            x, mask = upstream([raw[i] for i in batches[k].tolist()])  # (U, T, L, D), (U, T)
        x = x.half().cpu()
        if not x.isfinite().all():
            raise CorpusError([
                f"{folder}: a state of {raw[int(batches[k][0])]!r:.60} or of one of the "
                f"{len(batches[k]) - 1} after it is not finite, or over 65,504: not in 16 bits; "
                f"look at the upstream, or try --precision fp32"
            ])  # fmt: skip
        for i, row, n in zip(batches[k], x, mask.sum(dim=1)):
            states[i][:] = row[:n]  # had steps() foretold another length, this would fail
        # First the states to the disk, then the note: a kill between the two repeats, never skips.
        if k % 50 == 49 or k == len(batches) - 1:
            states.file.flush()
            _note(folder, key, k + 1)
    return states


def _cached(folder: Path, key: dict):
    """What _note said was done for this key, or None; what was made for another key is deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "meta.json").exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta.pop("check") != digest(meta):  # a changed length would be believed
            raise ValueError("damaged")
        changed = [k for k in key if meta["key"].get(k) != key[k]]
        if (folder / "data.bin").stat().st_size != meta["bytes"]:
            changed.append("size of data.bin")
        if not changed:
            return meta["done"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        changed = [f"meta.json ({error!r})"]
    print(f"{folder}: made with another {', '.join(changed)}; it is made anew")
    (folder / "meta.json").unlink()
    (folder / "data.bin").unlink(missing_ok=True)  # not overwritten: a process may be reading it
    return None


def _note(folder: Path, key: dict, done) -> None:
    """Say in meta.json what is done, all at once or not at all. Of the toy's text states:

    {"key": {"weights": "442ba0ac", "inputs": "5bd8cdd0e0d1ab2f", "precision": "fp32", "libraries":
     ..., "lengths": ...}, "done": 50 (batches of 32), "bytes": 3666816 (data.bin), "check": ...}
    """
    meta = {"key": key, "done": done, "bytes": (folder / "data.bin").stat().st_size}
    meta["check"] = digest(meta)
    rewrite(folder / "meta.json", lambda file: file.write(json.dumps(meta).encode()))


def rewrite(path: Path, write: Callable) -> None:
    """Write a file under another name, sync it, rename it: whole or not at all, whenever killed.

    write is called with the file, open for bytes.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # a full disk, Ctrl-C: what stood there before still does
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def exclusive(folder: Path, wait: bool = True):
    """One process at a time writes into `folder`; the others wait, or raise BlockingIOError."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise BlockingIOError(f"{folder}: another process works in it") from None
            print(f"another process fills {folder}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest(value) -> str:
    """A short fingerprint of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def code(*things) -> str:
    """A fingerprint of what functions, classes or modules do: comments and docstrings may change.

    What was computed with other code than today's must not pass for today's.
    """
    trees = [ast.parse(textwrap.dedent(inspect.getsource(thing))) for thing in things]
    for node in (n for tree in trees for n in ast.walk(tree)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant):  # a docstring
                body[0] = ast.Pass()
    return digest([ast.unparse(tree) for tree in trees])


# ------------------------------------------------------------------------------------------------
# The toy corpus: tones and made-up sentences in IEMOCAP's layout, its quirks included
#
# It comes back through the same reader as IEMOCAP, and is tuned so that the paper's findings show:
# what is felt tends to stay from turn to turn, so context helps; a third of the sentences say it,
# so of nine turns nearly always one does, and text beats audio; all voices sound of it, but a fifth
# of them wrongly, so both together beat either. Nothing below is of the paper; a reader of the
# paper stops here.
# ------------------------------------------------------------------------------------------------

# What an emotion does to the toy's voice: pitch in Hz, and how fast the overtones fall. Every pitch
# is a multiple of 50 Hz, so all frames of 20 ms sound alike, and CMT (A->T) cannot smuggle the text
# through by choosing frames: what A7 is about shows.
VOICES = {"neu": (200, 1.6), "hap": (800, 1.2), "ang": (400, 0.6), "sad": (100, 2.2)}
KEYWORDS = {
    "neu": ("table", "monday", "street", "paper"),
    "hap": ("lovely", "wonderful", "laugh", "party"),
    "ang": ("stupid", "hate", "enough", "shout"),
    "sad": ("lost", "alone", "cry", "goodbye"),
}
FILLERS = "well you know i think that it was the one we had there and so he said to me".split()
# What is felt where the label is none of the four: such turns still carry something as context.
FELT = {"exc": "hap", "sur": "hap", "fru": "ang", "dis": "ang", "fea": "sad", "oth": "neu"}
TOY = {  # goes into toy.json, so that a change is seen
    "seed": 9,
    "turns": 32,  # of a dialogue
    "blur": 0.2,  # chance that the voice is that of any emotion: no audio system can be perfect
    "spread": 0.1,  # of the overtones' fall: standard deviation, and half the range over speakers
    "keywords": 0.35,  # chance that a sentence says what is felt
    "stay": 12.0,  # how much likelier the next turn feels the same than any other
    "repeat": 0.25,  # chance that a scripted sentence is one that other sessions speak too
}


def write_toy(root: str | Path, full_size: bool = False, shorten: float = 1.0) -> Path:
    """Write the toy corpus into `root`, unless it stands there already; returns the root.

    By default 1,600 utterances of 0.15 to 0.25 s. `full_size`: the dialogs, utterances, speakers
    and labels of the full release, so that the check against the reference counts passes, and
    lengths distributed like its own, times `shorten`. Raises CorpusError where other files stand
    in `root`.
    """
    root = Path(root)
    tables = digest([VOICES, KEYWORDS, FILLERS, FELT])
    settings = {**TOY, "tables": tables, "full_size": full_size, "shorten": shorten}
    if toy_settings(root) == settings:
        return root
    if root.exists() and any(root.iterdir()) and not (root / "toy.json").exists():
        raise CorpusError([f"{root}: holds other files; name an empty folder for the toy corpus"])
    root.mkdir(parents=True, exist_ok=True)
    (root / "toy.json").write_text("{}")  # ours, not finished
    for old in root.glob("Session[1-5]"):
        shutil.rmtree(old)
    rng = np.random.default_rng(TOY["seed"])
    speaker_fall = {s: TOY["spread"] * rng.uniform(-1, 1) for s in SPEAKERS}
    plan = [
        (session, name, turns)
        for session in SESSIONS
        for name, turns in _toy_dialogs(session, full_size, rng)
    ]
    bar = tqdm(plan, desc="toy corpus", leave=False, disable=None)
    for number, (session, name, turns) in enumerate(bar):
        folder = root / f"Session{session}"
        wavs = folder / "sentences" / "wav" / name
        wavs.mkdir(parents=True)
        counts: Counter = Counter()
        labels: dict[str, list[str]] = {"F": [], "M": []}
        words = []
        felt, start, end = "neu", 0.0, 0.0
        for k, (letter, code) in enumerate(turns):
            felt = FELT.get(code, code if code in VOICES else felt)  # "xxx": as before
            seconds = rng.uniform(0.15, 0.25)
            if full_size:  # median 3.58 s, mean 4.55 s
                seconds = float(np.clip(rng.lognormal(np.log(3.58), 0.69), 0.585, 34.1)) * shorten
            n = int(seconds * SAMPLE_RATE)
            # Speakers interrupt each other; once, as in the original, two start together.
            if not (name == "Ses02F_impro01" and k == 7):
                start = max(end + rng.uniform(-0.2, 0.8), 0.5)
            end = start + n / SAMPLE_RATE
            id = f"{name}_{letter}{counts[letter]:03}"
            counts[letter] += 1
            x = _toy_voice(felt, speaker_fall[f"Ses{session:02}{letter}"], n, rng)
            _write_wav(wavs / f"{id}.wav", x)
            text = _toy_text(felt, "script" in name, full_size, rng)
            words.append(f"{id} [{start:08.4f}-{end:08.4f}]: {text}")
            labels[letter].append(
                f"[{start:.4f} - {end:.4f}]\t{id}\t{code}\t[2.5000, 2.5000, 2.5000]\n"
                f"C-E2:\tNeutral;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\n\n"
            )
        # Quirks of the transcripts: a line without an id; lines with XX, at full size 48, with two
        # ids twice; a turn out of order. (Of the label files: all F, then all M; raters' lines.)
        words.insert(2, "M: hm.")
        words[5], words[6] = words[6], words[5]
        if name in ("Ses05F_impro03", "Ses05M_impro03"):
            words += [f"{name}_FXX0 [000.1000-000.2000]: "] * 2
        elif number % 3 == 0 and number < 44 * 3:
            words.append(f"{name}_MXX0 [000.1000-000.2000]: oh")
        header = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
        for path, text in (
            (f"dialog/EmoEvaluation/{name}.txt", header + "".join(labels["F"] + labels["M"])),
            (f"dialog/EmoEvaluation/Categorical/{name}_e2_cat.txt", "one rater\n"),
            (f"dialog/EmoEvaluation/._{name}.txt", "a stray of macOS\n"),
            (f"dialog/transcriptions/{name}.txt", "\n".join(words) + "\n"),
        ):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
    (root / "toy.json").write_text(json.dumps(settings))
    return root


def toy_settings(root: Path) -> dict | None:
    """What the toy corpus in `root` was made with; None where `root` is no toy corpus."""
    try:
        return json.loads((root / "toy.json").read_text())
    except (OSError, ValueError):
        return None


def _toy_dialogs(session: int, full_size: bool, rng: np.random.Generator):
    """The dialogs of a session: [(name, [(letter of the speaker, emotion code), ...]), ...]."""
    names = dialog_names(session) if full_size else dialog_names(session)[::3][:10]
    kinds = {k: [n for n in names if k in n] for k in ("impro", "script")}
    if full_size:
        total, ang, hap, exc, sad, neu, n_impro, n_script = SESSIONS[session]
        four = [
            (speaker[-1], emotion)
            for speaker, row in SPEAKERS.items() if speaker.startswith(f"Ses{session:02}")
            for emotion, n in zip(("ang", "hap", "sad", "neu"), row) for _ in range(n)
        ]  # fmt: skip
        rng.shuffle(four)
        excited = [i for i, (_, emotion) in enumerate(four) if emotion == "hap"][:exc]
        for i in excited:
            four[i] = (four[i][0], "exc")
        codes = [e for e, n in EMOTIONS.items() if e not in LABELS for _ in range(n)]
        # In one order for all sessions, of which each takes the slice after those before it.
        codes = list(np.random.default_rng(TOY["seed"]).permutation(codes))
        before = sum(row[0] - sum(row[6:]) for s, row in SESSIONS.items() if s < session)
        rest = [("FM"[rng.integers(2)], str(e)) for e in codes[before : before + total - len(four)]]
        share = len(rest) * n_impro // len(four)
        turns = {"impro": four[:n_impro] + rest[:share], "script": four[n_impro:] + rest[share:]}
    else:
        codes = ["neu", "neu", "hap", "exc", "ang", "ang", "sad", "sad", "xxx"]
        turns = {
            k: [
                ("FM"[rng.integers(2)], codes[rng.integers(9)])
                for _ in range(TOY["turns"] * len(names))
            ]
            for k, names in kinds.items()
        }
    dialogs = []
    for kind, names in kinds.items():
        order = _toy_chain(Counter(turns[kind]), rng)
        # Dialogs of unlike lengths, each of 24 turns or more, as in the original.
        share = rng.uniform(0.5, 1.5, len(names)) if full_size else np.ones(len(names))
        cuts = np.round(np.cumsum(share / share.sum()) * (len(order) - 24 * len(names))).astype(int)
        ends = cuts + 24 * np.arange(1, len(names) + 1)
        dialogs += [(n, order[a:b]) for n, a, b in zip(names, [0, *ends[:-1]], ends)]
    return dialogs


def _toy_chain(left: Counter, rng: np.random.Generator) -> list[tuple[str, str]]:
    """All turns of `left` in an order in which an emotion tends to stay."""
    order, felt = [], None
    while left:
        keys = list(left)
        weights = np.array([
            left[k] * (TOY["stay"] if FELT.get(k[1], k[1]) == felt else 1.0) for k in keys
        ])  # fmt: skip
        turn = keys[rng.choice(len(keys), p=weights / weights.sum())]
        left[turn] -= 1
        if not left[turn]:
            del left[turn]
        if turn[1] != "xxx":
            felt = FELT.get(turn[1], turn[1])
        order.append(turn)
    return order


def _toy_voice(emotion: str, speaker_fall: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """n samples of a steady tone with overtones, after 50 ms of silence where there is room."""
    if rng.random() < TOY["blur"]:
        emotion = list(VOICES)[rng.integers(4)]
    pitch, fall = VOICES[emotion]
    fall += speaker_fall + TOY["spread"] * rng.standard_normal()
    t = np.arange(n) / SAMPLE_RATE
    tone = sum(
        h**-fall * np.sin(2 * np.pi * h * pitch * t + rng.uniform(0, 6)) for h in range(1, 13)
    )
    tone[: 800 if n > 3200 else 0] = 0
    return 0.3 * rng.uniform(0.3, 1.0) * tone / np.abs(tone).max() + 1e-5 * rng.standard_normal(n)


def _toy_text(emotion: str, scripted: bool, full_size: bool, rng: np.random.Generator) -> str:
    """A sentence that says what is felt, or does not."""
    if scripted and rng.random() < TOY["repeat"]:  # one of twenty lines that every session speaks
        rng = np.random.default_rng([list(VOICES).index(emotion), rng.integers(20)])
    if rng.random() < 0.01:
        return "[LAUGHTER]"
    n = rng.integers(2, 5)
    if full_size:  # median 8 words, mean 11.5
        n = int(np.clip(rng.lognormal(np.log(8), 0.85), 1, 98))
    words = [FILLERS[i] for i in rng.integers(len(FILLERS), size=n)]
    if rng.random() < TOY["keywords"]:
        for i in rng.integers(n, size=rng.integers(2, 2 * n + 1)):
            words[i] = KEYWORDS[emotion][rng.integers(4)]
    return " ".join(words).capitalize() + "."


def _write_wav(path: Path, x: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((np.clip(x, -1, 1) * 32767).astype("<i2").tobytes())


# ------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="compare a corpus with the full release")
    check.add_argument("dir", type=Path, help="the folder that holds Session1 ... Session5")
    check.add_argument("--partial", action="store_true", help="not the full release: no counts")
    toy = commands.add_parser("toy", help="write the toy corpus in IEMOCAP's layout")
    toy.add_argument("dir", type=Path)
    toy.add_argument("--full-size", action="store_true", help="as many of everything as IEMOCAP")
    toy.add_argument("--shorten", type=float, default=1.0, metavar="F",
                     help="with --full-size: audio lengths times F (F = 1: 1.4 GB)")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.command == "toy" and args.shorten <= 0:
        parser.error(f"--shorten {args.shorten}: expected a number above 0")
    try:
        if args.command == "toy":
            write_toy(args.dir, args.full_size, args.shorten)
            print(f"the toy corpus stands in {args.dir}; read back:")
            args.partial = not args.full_size
        corpus = read_iemocap(args.dir, full=not args.partial)
    except CorpusError as error:
        sys.exit(f"{error}\n{len(error.problems)} problem(s) in {args.dir}")
    except OSError as error:
        sys.exit(f"error: {error}")
    labels = Counter(CLASSES[u.label] for u in corpus if u.label is not None)
    print(
        f"{args.dir}: {'partial' if args.partial else 'complete'}"
        f"{', a toy corpus' if toy_settings(args.dir) else ''}; {len(corpus)} utterances in "
        f"{len({u.dialog for u in corpus})} dialogs of {len({u.speaker for u in corpus})} speakers"
        f"; four classes: {sum(labels.values())} ({', '.join(f'{c} {labels[c]}' for c in CLASSES)})"
    )


if __name__ == "__main__":
    main()
