"""IEMOCAP (§3.1), corpora of your own, and the way from their files to a batch (§3.2).

    python data.py check DIR     compare a corpus with IEMOCAP's reference counts: every problem
    python data.py toy DIR       write the toy corpus, in IEMOCAP's layout

One utterance on its way from the disk to the model, by example:

    Session1/dialog/EmoEvaluation/Ses01F_impro01.txt
        [6.2901 - 8.2357]<TAB>Ses01F_impro01_F000<TAB>neu<TAB>[2.5000, 2.5000, 2.5000]
    Session1/dialog/transcriptions/Ses01F_impro01.txt
        Ses01F_impro01_F000 [006.2901-008.2357]: <the words>
    Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav

    read_iemocap   Utterance(id="Ses01F_impro01_F000", session=1, dialog="Ses01F_impro01",
                   speaker="Ses01F", start=6.2901, end=8.2357, text=..., emotion="neu"): label 0
    split          fold 5, seed 0: its speaker, Ses01F, is drawn for development, so it is in dev
    load_wav       31,129 samples at 16 kHz in [-1, 1]
    clip           leading silence removed (there is none), at most 5 s kept
    WavLM          31,129 samples -> 97 frames x 25 layers x 1024, as 16-bit numbers in the cache
    BERT           its words -> k word pieces x 13 x 768; the 4 turns after it, too
    a batch        audio: states (N, 25, 1024) of all N real frames, mask (32, T)
                   text:  states (N, 13, 768), mask (U, T), context (32, 9) into the U utterances
"""

import argparse, contextlib, csv, io, itertools, math, os
import random, re, shutil, signal, struct, sys, wave, zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

SAMPLE_RATE = 16000  # Hz
CLASSES = ("neu", "hap", "ang", "sad")  # the order of Fig. 4
LABELS = {"neu": 0, "hap": 1, "exc": 1, "ang": 2, "sad": 3}  # §3.1: happy is merged with excited

class InputError(ValueError):
    """A file, a folder or a flag is unusable: one line for each problem, with the remedy."""

@contextlib.contextmanager
def reading(place: str | Path, remedy: str):
    """Turn any exception inside into InputError("PLACE: what is wrong; what to do")."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as problem:
        missing = isinstance(problem, FileNotFoundError)  # its own text repeats the path
        reason = "missing" if missing else " ".join(str(problem).split()) or repr(problem)
        raise InputError(f"{place}: {reason:.200}; {remedy}") from problem

def read_bytes(path: str | Path) -> bytes:
    """Read a file. Raises ValueError if it begins like another kind of file."""
    content = Path(path).read_bytes()  # the whole file
    for beginning, kind in {
        b"version https://git-lfs": "a Git-LFS pointer in its place: run `git lfs pull`",
        b"<": "a web page in its place: the download failed",
        b"NIST_1A": "a NIST SPHERE file", b"fLaC": "a FLAC file"}.items():  # fmt: skip
        if content.startswith(beginning):
            raise ValueError(kind)
    return content

def write_whole(path: Path, content: bytes | Callable) -> None:
    """Write a file, or a folder by content(path): it is complete, or it is not there."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # a kill may leave it
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        content(part) if callable(content) else part.write_bytes(content)
        os.replace(part, path)  # at once, also over an older file
    except OSError:
        if not path.is_dir():  # otherwise, another process wrote the folder first
            raise
    finally:  # what a full disk left, for example
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)

def run_command(main: Callable) -> None:
    """Run a command of the four files. An unusable input is one sentence, and the exit is 1."""
    for stream in (sys.stdout, sys.stderr):  # a line arrives at once, in files and pipes too
        stream.reconfigure(errors="replace", line_buffering=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler stops like Ctrl-C
    try:
        main()  # prints as it goes
    except BrokenPipeError:  # for example `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if "out of memory" not in str(error):  # the words of CUDA and of MPS
            raise
        sys.exit("error: out of GPU memory. train.py resumes with --micro-batch 8 added.")
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command resumes after the last whole epoch.")

# --- IEMOCAP (§3.1) ------------------------------------------------------------------------------
# Five sessions of one woman and one man, in 28 to 32 dialogues each, improvised ("impro") or
# scripted ("script"). A test covers each of these pitfalls:
#   - The letter in a dialogue's name is not the speaker. The letter in the id's suffix is.
#   - The files are not in time order, and the turns of the two speakers overlap.
#   - 48 transcript lines have an id with XX, but no label and no wav. Others have no id at all.
#   - Only 5,531 of 10,039 utterances are of the four classes, but all of them are context.
@dataclass(frozen=True)
class Utterance:
    """One turn of a dialogue. A corpus is a list of these: dialogue by dialogue, in time order."""
    id: str  # Ses01F_impro01_M003
    session: int  # the fold that tests on it
    dialog: str  # Ses01F_impro01: F wore the markers. Either person may be the speaker.
    speaker: str  # Ses01M: the session, and the letter of the id's last part
    start: float  # seconds in the dialogue
    end: float
    text: str
    emotion: str  # one of the corpus's codes
    wav: Path | None  # None: a corpus of your own without audio

    @property
    def label(self) -> int | None:
        """The index into CLASSES, or None where the emotion is not one of the paper's four."""
        return LABELS.get(self.emotion)

# Every code of the full release, with its count
EMOTIONS = {"xxx": 2507, "fru": 1849, "neu": 1708, "ang": 1103, "sad": 1084, "exc": 1041,
            "hap": 595, "sur": 107, "fea": 40, "oth": 3, "dis": 2}  # fmt: skip
# PAPER-ERROR [E1]: 1,626 happy (§3.1). The total of 5,531 leaves 1,636, as the corpus has.
SESSION_COLUMNS = "dialogues utterances ang hap exc sad neu impro script woman man".split()
SESSIONS = {  # from "ang" on, the columns count the four classes alone
    1: (28, 1819, 229, 135, 143, 194, 384, 521, 564, 528, 557),
    2: (30, 1811, 137, 117, 210, 197, 362, 530, 493, 481, 542),
    3: (32, 2136, 240, 135, 151, 305, 320, 627, 524, 522, 629),
    4: (30, 2103, 327, 65, 238, 143, 258, 534, 497, 528, 503),
    5: (31, 2170, 170, 143, 299, 245, 384, 731, 510, 590, 651)}  # fmt: skip

def read_iemocap(root: str | Path, problems: list[str] | None = None) -> list[Utterance]:
    """Read the corpus in `root`, the folder that holds Session1 ... Session5.
    Raises InputError with every problem found. If a list is given, the problems go into it, and the
    utterances without a problem are returned."""
    root, corpus, found = Path(root), [], [] if problems is None else problems
    sessions = sorted(p for p in root.glob("*") if re.fullmatch(r"session[1-9]", p.name, re.I))
    if not sessions:
        # The usual slip: the folder given is one level too high or too low.
        near = {p.resolve().parent for to in ("*/Session1", "../Session1") for p in root.glob(to)}
        hint = f"name {' or '.join(map(str, near))}" if near else "name the folder that holds them"
        found.append(f"{root}: holds no Session1 ... Session5; {hint}")
    for session in tqdm(sessions, leave=False, delay=3, disable=None):
        # Not wanted: macOS's ._* files, and sub-folders with the labels of single raters.
        folders = session / "dialog" / "EmoEvaluation", session / "dialog" / "transcriptions"
        names = sorted({p.name for folder in folders for p in folder.glob("Ses*.txt")})
        found += [] if names else [f"{folders[0]}: holds no label file Ses*.txt; fetch it again"]
        for name in names:
            corpus += _read_dialog(*(folder / name for folder in folders), session, found)
    if found and problems is None:  # nobody asked for a list
        raise InputError("\n".join(found))
    return corpus

ID, TIMES = r"(?P<id>\S+)", r"\[(?P<start>\d+\.\d+) ?- ?(?P<end>\d+\.\d+)\]"
def _read_dialog(labels: Path, words: Path, session: Path, problems: list) -> list[Utterance]:
    """Read one dialogue in time order. Labels, words and wavs are matched by id and must agree."""
    number, dialog, utterances = int(session.name[-1]), labels.stem, []  # 1, "Ses01F_impro01"
    labelled = _entries(labels, r"\[", rf"{TIMES}\s+{ID}\s+(?P<rest>[a-z]+)\s+\[.+\]", problems)
    said = _entries(words, r"Ses(?!\S+_[FM]XX\d\s)", rf"{ID}\s+{TIMES}:(?P<rest>.*)", problems)
    folder = session / "sentences" / "wav" / dialog  # one wav for each utterance
    wavs = {p.name.lower(): p for p in folder.glob("*")}  # .WAV is as good as .wav
    for id in sorted(labelled.keys() | said.keys()):  # in either file
        letter = re.fullmatch(rf"{re.escape(dialog)}_([FM])\d\d\d", id)  # not the dialogue's letter
        start, end, emotion = labelled.get(id, (0, 0, ""))  # a missing line is reported below
        from_, to, text = said.get(id, (0, 0, ""))  # times as the transcript has them
        wav = wavs.get(f"{id}.wav".lower(), folder / f"{id}.wav")
        wrong = ""  # nothing yet
        if not letter or not dialog.startswith(f"Ses{number:02}"):
            wrong = f"is not an utterance of {dialog} in session {number}"
        elif id not in said or id not in labelled:
            wrong = f"of {words} has no label in it" if id in said else f"has no words in {words}"
        elif emotion not in EMOTIONS:
            wrong = f"has the unknown emotion {emotion!r}"
        elif max(abs(from_ - start), abs(to - end)) > 0.01:
            wrong = f"has other times in {words}"
        else:
            try:
                seconds = len(load_wav(wav)) / SAMPLE_RATE
            except InputError as error:
                problems.append(str(error))
                continue  # with the next utterance
            if abs(seconds - (end - start)) > 0.1:  # cut off, or the wav of another utterance
                wrong = f"has {wav}, {seconds:.2f} s long, {end - start:.2f} s by its label"
        if wrong:
            problems.append(f"{labels}: {id} {wrong}; fetch it again")
        else:
            who = number, dialog, f"Ses{number:02}{letter[1]}"  # session, dialogue, speaker
            utterances.append(Utterance(id, *who, start, end, " ".join(text.split()), emotion, wav))
    if not labelled and not said:
        problems.append(f"{labels}: no utterance in it, nor in {words}; fetch both again")
    # Neither file is in order: the labels come all F, then all M.
    return sorted(utterances, key=lambda u: (u.start, u.end, u.id))

def _entries(path: Path, begin: str, form: str, problems: list) -> dict[str, tuple]:
    """Read the utterances' lines: {id: (start, end, emotion or words)}. Bad lines are problems."""
    entries, text = {}, ""
    try:
        with reading(path, "fetch it again"):
            text = read_bytes(path).decode("utf-8-sig")  # with or without a byte order mark
    except InputError as error:
        problems.append(str(error))
    for number, line in enumerate(text.split("\n" if "\n" in text else "\r"), 1):
        begins, match = re.match(begin, line), re.fullmatch(form, line.strip())  # or None
        if begins and match and match["id"] not in entries:
            entries[match["id"]] = float(match["start"]), float(match["end"]), match["rest"]
        elif begins:
            why = f"{match['id']} for the second time" if match else "another form expected"
            problems.append(f"{path}:{number}: {why}: {line!r:.60}; fetch it again")
    return entries

def reference_problems(corpus: list[Utterance]) -> list[str]:
    """Compare with the full release: one line for each row of the tables above that differs."""
    found = Counter(("all sessions", u.emotion) for u in corpus)  # ("session 3", "exc"): 151
    found.update((f"session {s}", "dialogues") for s, _ in {(u.session, u.dialog) for u in corpus})
    for u in corpus:
        act = "impro" if "impro" in u.dialog else "script"  # from the dialogue's name
        columns = u.emotion, act, "woman" if u.speaker[-1] == "F" else "man"
        for kind in ("utterances", *(columns if u.label is not None else ())):
            found[f"session {u.session}", kind] += 1
    rows = {f"session {s}": dict(zip(SESSION_COLUMNS, row)) for s, row in SESSIONS.items()}
    problems = []  # a line for each row
    for row, cells in {"all sessions": EMOTIONS, **rows}.items():
        wrong = [f"{c} {found[row, c]} (not {n})" for c, n in cells.items() if found[row, c] != n]
        problems += [f"full release: {row}: {', '.join(wrong)}"] if wrong else []
    return problems

# --- A corpus of your own: a table of utterances (the README shows one) --------------------------
COLUMNS = ("text", "emotion", "session", "dialog", "speaker", "wav", "start", "id")
PLAIN_NAMES = {"neutral": "neu", "calm": "neu", "happy": "hap", "happiness": "hap", "joy": "hap",
               "excited": "exc", "excitement": "exc", "angry": "ang", "anger": "ang",
               "sadness": "sad"}  # fmt: skip

def read_csv(path: str | Path) -> list[Utterance]:
    """Read a corpus from a CSV file: UTF-8, one row an utterance, separated by , ; or tab.
    wav, start and id are optional. Raises InputError with every problem and its line."""
    with reading(path, "save it as CSV in UTF-8, with every quote closed"):
        text = read_bytes(path).decode("utf-8-sig")
        separator = max(",;\t", key=text.partition("\n")[0].count)  # the one in the first line
        table = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        header = [name.strip().lower() for name in next(table, [])]  # the names of the columns
        rows = [(table.line_num, [" ".join(x.split()) for x in row]) for row in table if row]
        known = set(COLUMNS[:5]) <= set(header) <= set(COLUMNS)
        if not rows or not known or len(set(header)) < len(header):
            has = f"line 1 has the columns {header}, and {len(rows)} rows follow"
            raise ValueError(f"{has}; expected {', '.join(COLUMNS)} (the last three are optional)")
    corpus, problems, home = {}, [], {}  # home: speaker or dialogue -> session of its first row
    for line, cells in rows:
        row = dict.fromkeys(COLUMNS, "") | {"start": "0"} | dict(zip(header, cells))  # by column
        # evaluate.py takes what precedes the last "_" of an id for the dialogue.
        id = row["id"].removeprefix(row["dialog"] + "_").replace("_", "-") or f"{len(corpus):05}"
        id, wav = f"{row['dialog']}_{id}", Path(path).parent / row["wav"] if row["wav"] else None
        sessions = {home.setdefault((k, row[k]), row["session"]) for k in ("speaker", "dialog")}
        sessions.add(row["session"])
        passed = {f"no {name}": row[name] for name in COLUMNS[1:5]} | {  # message: is it right?
            f"{len(cells)} cells, expected {len(header)}": len(cells) == len(header),
            "session must be a number from 1 on": re.fullmatch(r"[1-9]\d*", row["session"]),
            "start must be a number of seconds": re.fullmatch(r"\d+(\.\d*)?", row["start"]),
            f"{wav} is missing": not wav or wav.is_file(),
            f"id {row['id']} is there for the second time": id not in corpus,
            f"its speaker or dialogue is in sessions {sorted(sessions)}": len(sessions) == 1,
        }
        wrong = [f"{path}:{line}: {x}; change the row" for x, right in passed.items() if not right]
        problems += wrong
        if not wrong:  # the row is an utterance
            start, emotion = float(row["start"]), row["emotion"].lower()  # seconds, a name
            who = int(row["session"]), row["dialog"], row["speaker"]
            code = PLAIN_NAMES.get(emotion, emotion)
            corpus[id] = Utterance(id, *who, start, start, row["text"], code, wav)
    if problems:
        raise InputError("\n".join(problems))
    # Sorting is stable: without start times, a dialogue keeps the order of its rows.
    return sorted(corpus.values(), key=lambda u: (u.session, u.dialog, u.start))

# --- Folds and contexts (§3.1, §3.2) -------------------------------------------------------------
# EXERCISE 7 (30 min): delete the body, write it again; pytest -m ex7
def split(corpus: list[Utterance], fold: int, seed: int) -> tuple[list, list, list]:
    """Leave one session out (§3.1): the four-class utterances as (train, dev, test).
    Test is session `fold`. Dev is one speaker of the rest, drawn by fold and seed (§3.2). Train is
    everyone else. Raises InputError if one of the three would be empty."""
    targets = [u for u in corpus if u.label is not None]  # of the four classes
    rest = [u for u in targets if u.session != fold]  # for training and development
    speakers = sorted({u.speaker for u in rest})  # a set has no fixed order
    if len(speakers) < 2 or len(rest) == len(targets):
        needs = f"four-class utterances in session {fold} and two speakers in the others"
        have = sorted({u.session for u in targets})
        raise InputError(f"fold {fold} needs {needs}; the corpus has sessions {have}")
    # UNSPECIFIED [A14]: "randomly select one speaker as a development set" (§3.2). The seed draws.
    # Alternative: another --seed. The partner stays in training, with this speaker as context.
    dev_speaker = random.Random(f"fold {fold}, seed {seed}").choice(speakers)
    train = [u for u in rest if u.speaker != dev_speaker]  # seven speakers of IEMOCAP
    dev = [u for u in rest if u.speaker == dev_speaker]  # one speaker
    test = [u for u in targets if u.session == fold]  # two speakers
    return train, dev, test

def texts_elsewhere(corpus: list[Utterance]) -> set[str]:
    """Find the ids of utterances whose words occur in another session, too, whatever the case and
    punctuation. About a quarter of IEMOCAP's scripted lines do, and training reads them."""
    plain = {u.id: " ".join(re.findall(r"\w+", u.text.lower())) for u in corpus}
    spoken = Counter(text for text, _ in {(plain[u.id], u.session) for u in corpus})  # sessions
    return {u.id for u in corpus if spoken[plain[u.id]] > 1}

def context_windows(corpus: list[Utterance], size: int = 9) -> Tensor:
    """Find each utterance's neighbours in time (§3.2): rows of the corpus (N, size), -1 for none.
    Column size // 2 is the utterance itself. Both speakers and every emotion count. Windows never
    reach into another dialogue. A dialogue of three in rows 0 to 2, with size 3, gives
    [[-1, 0, 1], [0, 1, 2], [1, 2, -1]]."""
    n, half = len(corpus), size // 2  # half: neighbours on each side
    windows = torch.arange(n)[:, None] + torch.arange(-half, half + 1)  # (N, size)
    _, number = np.unique([u.dialog for u in corpus], return_inverse=True)
    dialog = torch.from_numpy(number)  # (N,)
    inside = (windows >= 0) & (windows < n)  # a row of the corpus
    inside &= dialog[windows.clamp(0, n - 1)] == dialog[:, None]
    return torch.where(inside, windows, -1)  # (N, size)

# --- Waveforms (§3.2): "audios are clipped into 5 seconds ... by trimming or padding" ------------
# A batch is padded to its longest clip. Padding is masked, so padding to 5 s would change nothing.
CLIP_SECONDS = 5  # §3.2
TRIM_DB = 60  # [A13]
MIN_SAMPLES = 400  # 25 ms: WavLM's first frame, and the window of the search for silence

def load_wav(path: str | Path) -> Tensor:
    """Load a 16-bit mono PCM file: (n,) float32 in [-1, 1] at 16 kHz, resampled if need be.
    Raises InputError with the reason and the command that converts the file."""
    with reading(path, "convert it: ffmpeg -i OLD.wav -ac 1 -ar 16000 -c:a pcm_s16le NEW.wav"):
        raw = read_bytes(path)  # the whole file
        if raw[:4] != b"RIFF" or raw[8:12] != b"WAVE":
            raise ValueError("not usable as a WAV file")
        # A RIFF file is a list of chunks: a name, a size, a body. Two of them matter.
        place, name, form = 12, b"", (0, 0, 0, 0, 0, 0)
        while name != b"data" and place + 8 <= len(raw):
            name, size = struct.unpack_from("<4sI", raw, place)
            start, place = place + 8, place + 8 + size + size % 2
            if name == b"fmt ":
                form = struct.unpack_from("<HHIIHH", raw, start)
                if form[0] == 65534:  # WAVE_FORMAT_EXTENSIBLE: the format comes later
                    form = (*struct.unpack_from("<H", raw, start + 24), *form[1:])
        kind, channels, rate, _, _, bits = form  # rate in Hz
        if (kind, channels, bits) != (1, 1, 16):
            has = f"format {kind}, {channels} channel(s) of {bits} bits"
            raise ValueError(f"{has}; expected format 1 (PCM), 1 channel of 16 bits")
        if not 8000 <= rate <= 192000 or math.gcd(rate, SAMPLE_RATE) < 25:
            raise ValueError(f"{rate} Hz")  # resampling an unusual rate takes minutes
        left = len(raw) - start  # bytes after the header of the data
        size = left if size in (0, 0x7FFFF000, 0xFFFFFFFF) else size  # written to a pipe: unknown
        if name != b"data" or size > left or size < 2:
            raise ValueError("no samples, or shorter than its header says")
    x = torch.from_numpy(np.frombuffer(raw, "<i2", size // 2, start).astype(np.float32) / 32768)
    if rate != SAMPLE_RATE:
        import torchaudio  # torchaudio.load would need FFmpeg
        x = torchaudio.functional.resample(x, rate, SAMPLE_RATE)
    return x

def clip(x: Tensor, trim: str = "leading") -> Tensor:
    """Keep five seconds from the first sound (§3.2): (n,) -> (m,) with 400 <= m <= 80,000."""
    # UNSPECIFIED [A13]: "we trim the voiced 5 seconds of audio ... at the beginning for long
    # utterances". Of every clip, we remove what precedes the first window with sound. A window of
    # 25 ms is silent if its power is over 60 dB below the loudest's. Alternative: --trim all,
    # every silent window, as in the author's other code.
    if len(x) > MIN_SAMPLES:
        windows = x.unfold(0, MIN_SAMPLES, MIN_SAMPLES)  # (n // 400, 400)
        power = windows.square().mean(dim=1)  # (n // 400,)
        loud = power >= power.max() * 10 ** (-TRIM_DB / 10)  # in pure silence: every window
        x = windows[loud].flatten() if trim == "all" else x[int(loud.nonzero()[0]) * MIN_SAMPLES :]
    x = x[: CLIP_SECONDS * SAMPLE_RATE]  # §3.2: 5 s
    return torch.nn.functional.pad(x, (0, max(0, MIN_SAMPLES - len(x))))

def load_clips(corpus: list[Utterance], trim: str = "leading") -> list[Tensor | None]:
    """Load what WavLM hears of each utterance. The context is text, so other emotions get None."""
    if silent := [u.id for u in corpus if u.label is not None and u.wav is None]:
        hint = "fill the column wav, or use a text system: --fusion text-fc or text-te"
        raise InputError(f"no wav for {len(silent)} utterances, as {silent[0]}; {hint}")
    return [None if u.label is None else clip(load_wav(u.wav), trim) for u in corpus]

# --- Layer states: from the cache, or from the live upstream -------------------------------------
# While the upstreams are frozen (§2.4), an utterance's states never change. They are computed once
# and kept in files: 249 x 25 x 1024 numbers of a 5 s clip take 12.7 MB in 16 bits. Most clips are
# shorter: IEMOCAP's 5,531 take at most 46 GB. Once opened by fine-tuning, an upstream runs live.
KEEP_ON_CPU = 4 * 2**30  # bytes of one modality's states that may stay in memory, without CUDA
GPU_RESERVE = 8 * 2**30  # bytes that a frozen step on 32 clips needs beside them, by estimate

class CachedStates:
    """Layer states of a corpus, in one .npy file an utterance.
    Called with U rows of the corpus, it returns their N real steps without padding:
    (states (N, L, D), mask (U, T)). Careful: all calls share one buffer, so call again only after
    backward(). A fresh tensor of this size costs more time than filling it."""
    def __init__(self, files: list[Path | None], device: str):
        self.files, self.device = files, device  # None: no states are needed
        self.kept: list[Tensor | None] = []  # states in memory, by row
        self.buffer: Tensor | None = None  # (at least N, L, D)

    def read(self, row: int) -> Tensor:
        """Read one utterance's states (T, L, D) from its file."""
        with reading(self.files[row], "delete it, and the same command computes it again"):
            return torch.from_numpy(np.load(self.files[row]))

    def keep(self) -> None:
        """Read all states once and keep them, if they fit beside what training needs."""
        where = "cuda" if self.device == "cuda" else "cpu"  # MPS shares the memory of the CPU
        torch.cuda.empty_cache()  # what the run before has freed is room
        room = torch.cuda.mem_get_info()[0] - GPU_RESERVE if where == "cuda" else KEEP_ON_CPU
        if not self.kept and sum(file.stat().st_size for file in self.files if file) <= room:
            self.kept = [self.read(i).to(where) if f else None for i, f in enumerate(self.files)]

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self.kept[i] if self.kept else self.read(i) for i in rows.tolist()]
        lengths = torch.tensor([len(part) for part in parts])  # (U,)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (U, T)
        n, gpu = int(lengths.sum()), self.device == "cuda"  # N
        if self.buffer is None or len(self.buffer) < n:  # grow it
            # On the CPU, convert to 32 bits on the way. For a GPU, 16 bits are half to transfer.
            dtype, pin = torch.float16 if gpu else torch.float32, gpu and not self.kept
            self.buffer = parts[0].new_empty((n, *parts[0].shape[1:]), dtype=dtype, pin_memory=pin)
        for part, place in zip(parts, self.buffer[:n].split(lengths.tolist())):
            place.copy_(part)  # the place of one utterance in the buffer
        return self.buffer[:n], mask  # (N, L, D), (U, T)

def live(upstream: Callable, inputs: Sequence) -> Callable:
    """Make a source that runs the upstream on every batch, for fine-tuning. It takes and returns
    what CachedStates does. Where over two thirds of one run would be padding (often so for texts),
    only inputs whose lengths, in samples or letters, differ by less than a factor of 2 share it."""
    def source(rows: Tensor) -> tuple[Tensor, Tensor]:
        lengths, parts = [len(inputs[i]) for i in rows], {}  # samples, or letters
        padded = 3 * sum(lengths) < len(lengths) * max(lengths)  # by two thirds
        sizes = [n.bit_length() if padded else 0 for n in lengths]  # 8 to 15 have 4 bits
        for size in sorted(set(sizes)):
            some = [i for i, x in zip(rows.tolist(), sizes) if x == size]  # rows
            states, mask = upstream([inputs[i] for i in some])  # (some, T, L, D), (some, T)
            parts |= zip(some, states[mask].split(mask.sum(dim=1).tolist()))  # (T, L, D) each
        steps = [parts[i] for i in rows.tolist()]  # in the order asked for
        n_steps = torch.tensor([len(x) for x in steps])  # (U,)
        mask = torch.arange(int(n_steps.max())) < n_steps[:, None]  # as in CachedStates
        return torch.cat(steps), mask  # (N, L, D), (U, T)
    return source

def cache_states(folder: Path, upstream: Callable, corpus: list, inputs: Sequence, device: str):
    """Compute the layer states that are not yet in `folder`, and return a CachedStates.
    inputs: a clip (n,) or a text of each utterance, None where no states are needed. A file is
    named by id and checksum of the input. Raises InputError for states beyond 16 bits."""
    # DEVIATION [D1]: the frozen phase reads states rounded to 16 bits, the paper does not mention a
    # cache. Why: the upstreams run once and not once an epoch, and files have half the size.
    files = []  # a Path, or None, for each utterance
    for u, x in zip(corpus, inputs):
        content = x.encode() if isinstance(x, str) else b"" if x is None else x.numpy().tobytes()
        name = re.sub(r"[^A-Za-z0-9.-]", "_", u.id)  # an id of your own may hold anything
        files.append(None if x is None else folder / f"{name}-{zlib.crc32(content):08x}.npy")
    # The last bits of a state depend on its batch. We never mix sessions in a batch and always
    # compute all of it. So a state depends neither on the test session nor on a kill.
    parts = []  # rows of each batch
    for session in sorted({u.session for u in corpus}):
        rows = [i for i, u in enumerate(corpus) if files[i] and u.session == session]
        rows.sort(key=lambda i: -len(inputs[i]))  # equal lengths together: little padding
        parts += [rows[k : k + 32] for k in range(0, len(rows), 32)]
    parts = [part for part in parts if not all(files[i].exists() for i in part)]
    if parts:  # otherwise everything is there
        print(f"layer states of {sum(map(len, parts))} utterances to compute, into {folder}")
    for rows in tqdm(parts, desc=folder.name, leave=False, disable=None):
        with torch.no_grad():
            states, mask = upstream([inputs[i] for i in rows])  # (U, T, L, D), (U, T)
        for i, x, real in zip(rows, states.half().cpu(), mask.cpu()):
            if not x[real].isfinite().all():
                why = "a layer state is not finite, or over 65,504 and too large for 16 bits"
                raise InputError(f"{corpus[i].id}: {why}; look at it, or try --precision fp32")
            content = io.BytesIO()  # in memory first: a file is complete or absent
            np.save(content, x[real].numpy())  # (T, L, D)
            write_whole(files[i], content.getvalue())
    return CachedStates(files, device)

# EXERCISE 9 (40 min): delete the body, write it again; pytest -m ex9
def batch(rows: Tensor, windows: Tensor, sources: dict, device: str) -> dict[str, tuple]:
    """Make the keyword arguments of EmotionRecognizer for the utterances at `rows` (B,):

        {"audio": (states, mask), "text": (states, mask, context)}, on `device`

    sources: by modality, functions that return states and mask of rows. Audio is asked for `rows`
    as they come. Text is asked for the rows in their windows, each once, because windows overlap.
    With windows [[-1, 5, 6], [5, 6, 7]] it is asked for [5, 6, 7], and context is [[-1, 0, 1],
    [0, 1, 2]]."""
    arguments = {}  # by modality
    if "audio" in sources:
        arguments["audio"] = sources["audio"](rows)  # (states, mask)
    if "text" in sources:
        # unique() sorts, so a missing neighbour (-1) comes first. Drop it, shift all indices down.
        distinct, context = windows[rows].unique(return_inverse=True)  # (U,), (B, C)
        if distinct[0] == -1:
            distinct, context = distinct[1:], context - 1  # -1 is a missing neighbour again
        arguments["text"] = (*sources["text"](distinct), context)
    return {m: tuple(x.to(device) for x in tensors) for m, tensors in arguments.items()}

# --- The toy corpus: tones and made-up sentences in IEMOCAP's layout (nothing of the paper) -------
# It is built to show the paper's ordering, so it is no evidence for it. An emotion tends to stay
# from turn to turn, and two sentences in five name it: context helps, and text beats audio. The
# voice shows the emotion of two turns in three: both modalities together beat either. Every pitch
# is a multiple of 50 Hz, so all frames of 20 ms sound the same, and CMT(A->T) cannot pass the text
# on by its choice of frames [A7]. Of each voice: its pitch in Hz, how fast its overtones fall.
VOICES = {"neu": (200, 1.6), "hap": (800, 1.2), "ang": (400, 0.6), "sad": (100, 2.2)}
KEYWORDS = {"neu": ["table", "monday"], "hap": ["lovely", "wonderful"],
            "ang": ["stupid", "hate"], "sad": ["lost", "alone"]}  # fmt: skip
FILLERS = "well you know i think that it was".split()
TOY = dict(seed=9, dialogs=10, turns=24, stay=0.75, named=0.42, voice=0.65)

def write_toy(root: str | Path) -> Path:
    """Write 1,200 utterances of 0.15 to 0.25 s into `root`, if it is empty. Returns root."""
    root = Path(root)
    if not (root / "toy.json").exists():
        with reading(root, "name an empty folder, or one that holds the toy corpus"):
            root.exists() and root.rmdir()  # raises unless it is empty
            write_whole(root, _write_toy)
    return root

def _write_toy(root: Path) -> None:
    """Write five sessions of ten dialogues, six improvised and four scripted."""
    rng = np.random.default_rng(TOY["seed"])  # the same toy everywhere
    for session, k in itertools.product(SESSIONS, range(TOY["dialogs"])):
        act = f"impro{k + 1:02}" if k < 6 else f"script{k - 5:02}_1"
        name = f"Ses{session:02}{'FM'[k % 2]}_{act}"
        folder = root / f"Session{session}"
        felt, end, labels, words = "neu", 0.0, {"F": [], "M": []}, []
        for _ in range(TOY["turns"]):
            felt = felt if rng.random() < TOY["stay"] else str(rng.choice(CLASSES))
            emotion = "xxx" if rng.random() < 0.1 else felt  # the raters disagree
            emotion = "exc" if emotion == "hap" and rng.random() < 0.5 else emotion
            letter = "FM"[rng.integers(2)]  # who speaks
            id = f"{name}_{letter}{len(labels[letter]):03}"  # ids count each speaker's turns
            text = rng.choice(FILLERS, rng.integers(2, 5))  # words without an emotion
            if rng.random() < TOY["named"]:
                text = rng.choice(KEYWORDS[felt], len(text))  # a sentence that names the emotion
            text = "[LAUGHTER]" if rng.random() < 0.01 else " ".join(text).capitalize() + "."
            # A steady tone with overtones. A voice that does not show the emotion shows any.
            pitch, fall = VOICES[felt if rng.random() < TOY["voice"] else str(rng.choice(CLASSES))]
            n, overtone = int(rng.uniform(0.15, 0.25) * SAMPLE_RATE), np.arange(1, 13)[:, None]
            turn = overtone * pitch * np.arange(n) / SAMPLE_RATE + rng.random((12, 1))
            tone = (overtone**-fall * np.sin(2 * np.pi * turn)).sum(axis=0)
            tone += 1e-4 * rng.standard_normal(n)
            pcm = (tone / np.abs(tone).max() * rng.uniform(3000, 10000)).astype("<i2")  # loudness
            with wave.open(content := io.BytesIO(), "wb") as file:
                file.setparams((1, 2, SAMPLE_RATE, n, "NONE", ""))  # mono, 2 bytes
                file.writeframes(pcm.tobytes())
            write_whole(folder / "sentences" / "wav" / name / f"{id}.wav", content.getvalue())
            start = max(end + rng.uniform(-0.1, 0.8), 0.5)  # the speakers interrupt each other
            end = start + n / SAMPLE_RATE  # seconds
            words.append(f"{id} [{start:08.4f}-{end:08.4f}]: {text}\n")
            labels[letter].append(f"[{start:.4f} - {end:.4f}]\t{id}\t{emotion}\t[2.5, 2.5, 2.5]\n")
        # As in the original: labels come all F then all M, transcripts are out of order.
        words[2:2] = [words.pop(5), "M: hm.\n", f"{name}_MXX0 [000.1000-000.2000]: oh\n"]
        texts = {"EmoEvaluation": labels["F"] + labels["M"], "transcriptions": words}
        for kind, lines in texts.items():
            write_whole(folder / "dialog" / kind / f"{name}.txt", "".join(lines).encode())
    write_whole(root / "toy.json", b"{}")

def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("check", "toy"))
    parser.add_argument("dir", type=Path, help="check: holds Session1 ... Session5; toy: is empty")
    args, problems = parser.parse_args(arguments), []  # exits with a message for a wrong flag
    corpus = read_iemocap(write_toy(args.dir) if args.command == "toy" else args.dir, problems)
    problems += reference_problems(corpus) if args.command == "check" and corpus else []
    if problems:
        raise InputError("\n".join([*problems, f"{len(problems)} problem(s) in {args.dir}"]))
    labels = [u.label for u in corpus if u.label is not None]  # of the four classes
    classes = ", ".join(f"{c} {labels.count(i)}" for i, c in enumerate(CLASSES))
    kind = "a toy corpus" if (args.dir / "toy.json").exists() else "the full release"
    dialogs, speakers = len({u.dialog for u in corpus}), len({u.speaker for u in corpus})
    print(f"{args.dir}: {kind}; {len(corpus)} utterances in {dialogs} dialogues of {speakers} "
          f"speakers; four classes: {len(labels)} ({classes})")  # fmt: skip

if __name__ == "__main__":
    run_command(main)
