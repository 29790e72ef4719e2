"""data.py on files that the tests write: IEMOCAP, clips, states, tables, the toy.

split and gather have their checks in tests/course/checks.py, with the other exercises.
"""

import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import data
from data import InputError
from tests.conftest import write_dialog, write_wav

close = torch.testing.assert_close


def read(root):
    corpus, problems = data.read_iemocap(root)
    assert problems == []
    return corpus


# --- IEMOCAP --------------------------------------------------------------------------

TURNS = [
    ("F000", 5, 8, "exc", "third"),
    ("F001", 7, 7.5, "sad", "fourth"),
    ("M000", 1.2901, 2.2357, "neu", "Excuse  me. \t[LAUGHTER] "),
    ("M001", 5, 5.5, "hap", "second"),
    ("M003", 9, 9.1, "ang", "sixth"),
    ("F002", 9, 9.1, "xxx", "fifth"),
]
for number, name in enumerate(["fru", "sur", "fea", "oth", "dis"], start=10):
    TURNS.append((f"M{number:03}", number, number + 0.1, name, "more"))


@pytest.mark.parametrize(
    ("end", "mark"), [(b"\n", b""), (b"\r\n", b"\xef\xbb\xbf"), (b"\r", b"")]
)
def test_a_dialogue_is_in_the_order_of_time_with_the_speaker_of_each_turn(
    end, mark, tmp_path
):
    """The order is by start, end and id. The speaker is the letter of the turn.

    Happy and excited are one class (§3.1), and the other emotions none. Lines and files
    of other kinds are skipped, whatever the line ends are.
    """
    dialog = "Ses02M_script01_1"
    write_dialog(tmp_path, dialog, TURNS)
    # The name of a dialogue may be the beginning of another.
    write_dialog(tmp_path, f"{dialog}b", [("F000", 0, 0.1, "neu", "last")])
    for path in tmp_path.rglob("*.txt"):
        others = f"F: and so\nM:\n\n{dialog}_FXX3 [000.1000-000.2000]: ah\n".encode()
        content = mark + others + path.read_bytes() + others
        path.write_bytes(content.replace(b"\n", end))
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07\xff")
    single = tmp_path / f"Session2/dialog/EmoEvaluation/Categorical/{dialog}_e2.txt"
    single.parent.mkdir()
    single.write_text(f"{dialog}_F000 :Anger; ()\n")
    (tmp_path / "Session1.zip").write_bytes(b"PK")

    found = read(tmp_path)
    wav = tmp_path / "Session2/sentences/wav" / dialog / f"{dialog}_M000.wav"
    expected = (f"{dialog}_M000", 2, dialog, "Ses02M", 1.2901, 2.2357)
    words = "Excuse me. [LAUGHTER]"
    assert found[0] == data.Utterance(*expected, words, "neu", wav)
    words = "second third fourth fifth sixth" + 5 * " more" + " last"
    assert [u.text for u in found[1:]] == words.split()
    assert [u.speaker for u in found] == [f"Ses02{x}" for x in "MMFFFMMMMMMF"]
    assert [u.label for u in found] == [0, 1, 1, 3, None, 2, *[None] * 5, 0]
    assert [u.dialog for u in found] == [dialog] * 11 + [f"{dialog}b"]
    assert data.CLASSES == ("neu", "hap", "ang", "sad")  # Fig. 4


def test_a_window_is_four_before_and_four_after_in_the_same_dialogue():
    """§3.2. Neighbours have any speaker and any emotion, and -1 is beyond the edge."""
    same = {"session": 1, "speaker": "Ses01F", "emotion": "xxx", "label": None}
    corpus = [SimpleNamespace(dialog=name, **same) for name in "aaaaaabbb"]
    assert data.context_windows(corpus).tolist() == [
        [-1, -1, -1, -1, 0, 1, 2, 3, 4],
        [-1, -1, -1, 0, 1, 2, 3, 4, 5],
        [-1, -1, 0, 1, 2, 3, 4, 5, -1],
        [-1, 0, 1, 2, 3, 4, 5, -1, -1],
        [0, 1, 2, 3, 4, 5, -1, -1, -1],
        [1, 2, 3, 4, 5, -1, -1, -1, -1],
        [-1, -1, -1, -1, 6, 7, 8, -1, -1],
        [-1, -1, -1, 6, 7, 8, -1, -1, -1],
        [-1, -1, 6, 7, 8, -1, -1, -1, -1],
    ]
    assert data.context_windows(corpus, 1).tolist() == [[row] for row in range(9)]


# --- Waveforms ------------------------------------------------------------------------


def test_load_wav_scales_16_bits_to_one(tmp_path):
    """-32768 becomes -1."""
    path = tmp_path / "a.wav"
    write_wav(path, [0.0] * 4)
    numbers = np.array([0, 16384, -32768, 1], "<i2").tobytes()
    path.write_bytes(path.read_bytes()[:44] + numbers)
    assert data.load_wav(path).tolist() == [0.0, 0.5, -1.0, 2**-15]


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_a_recording_of_another_rate_becomes_16_khz_without_aliases(rate, tmp_path):
    """A tone of 10.5 kHz is above what 16 kHz can hold, so it disappears."""

    def tones(n, rate, pitches):
        seconds = np.arange(n) / rate
        return sum(0.2 * np.sin(2 * np.pi * pitch * seconds) for pitch in pitches)

    low = (150, 440, 2900)  # Hz
    high = (10500,) if rate > 22050 else ()
    write_wav(tmp_path / "a.wav", tones(rate // 2, rate, low + high), rate)
    x = data.load_wav(tmp_path / "a.wav")
    assert len(x) == 8000
    error = x.numpy() - tones(8000, 16000, low)
    assert np.abs(error[200:-200]).max() < 0.02


SPEECH = 0.5 + torch.arange(96000) / 1e6  # 6 s, and no two samples are equal
LOUD = SPEECH[:16000]
QUIET = torch.full((8000,), 1e-5)  # 94 dB below
WHISPER = torch.full((8000,), 0.001)  # 54 dB below, which is no silence
SILENCE = torch.zeros(32000)  # 2 s


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([QUIET, LOUD, QUIET, LOUD, QUIET], [LOUD, QUIET, LOUD, QUIET]),
        ([WHISPER, LOUD], [WHISPER, LOUD]),
        ([SPEECH], [SPEECH[:80000]]),
        ([SILENCE, SPEECH], [SPEECH[:80000]]),
    ],
)
def test_five_seconds_are_counted_from_the_first_sound(parts, expected):
    """[A13]: 2 s of silence before 6 s of voice give 5 s of voice."""
    clip = data.clip(torch.cat(parts))
    message = "the clip should begin with the first sound, and last 5 s from there"
    assert torch.equal(clip, torch.cat(expected)), message


@pytest.mark.parametrize("n", [1, 399, 400, 401, 799, 16000])
def test_clip_is_never_empty(n):
    """WavLM needs 400 samples, even of silence, or of a click at the end."""
    assert len(data.clip(torch.zeros(n))) == max(n, 400)
    click = torch.zeros(n)
    click[-1] = 0.5
    assert 400 <= len(data.clip(click)) <= 800


# --- Layer states ---------------------------------------------------------------------


class Fake(nn.Module):
    """An upstream whose states are easy to compute: the input, times two weights."""

    name = "fake"

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(1, 2, bias=False).requires_grad_(False)
        self.model.weight.data = torch.tensor([[1.0], [10.0]])
        self.calls = []  # the lengths of the inputs of each

    def forward(self, inputs):
        self.calls.append([len(x) for x in inputs])
        return [x[:, None, None] * self.model.weight for x in inputs]

    def open(self, what):
        return [self.model.weight.requires_grad_()]


def make_source(folder, inputs, upstream=None, ids="abcdefghi"):
    """Make a source for the inputs by row, and fill its cache."""
    corpus = [SimpleNamespace(id=name) for name in ids]
    source = data.Source(upstream or Fake(), inputs, corpus, folder, "cpu")
    source.fill()
    return source


def ramps(*lengths):
    return {row: torch.arange(1.0, n + 1) for row, n in enumerate(lengths)}


CLIPS = [torch.linspace(-1, 1, n).sin() for n in (5000, 400, 2345, 7000)]
TEXTS = ["i hate it", "", "all alone again", "lovely [LAUGHTER] party"]


@pytest.mark.parametrize(("modality", "raw"), [("audio", CLIPS), ("text", TEXTS)])
def test_states_are_cached_in_16_bits_until_fine_tuning_changes_a_copy(
    modality, raw, tiny, tmp_path
):
    """[D1]: each state is that of the utterance alone, from the files or from memory.

    state_dict() has what fine-tuning changed, and a copy that loads it is the same.
    """
    upstream = tiny[modality]
    inputs = {row: upstream.prepare(one) for row, one in enumerate(raw)}
    source, other = [make_source(tmp_path, inputs, upstream) for _ in range(2)]
    rows = [2, 0, 3, 2]
    alone = [upstream([inputs[row]])[0] for row in rows]
    cached = [states.half() for states in alone]
    assert source.open("nothing") == []
    for _ in range(2):
        assert all(map(torch.equal, source(rows), cached))
    parameters = source.open("bottom")
    for some in (rows, rows[:3]):  # with a duplicate, and without
        close(source(some), alone[: len(some)], atol=1e-5, rtol=1e-4)
    for parameter in parameters:
        parameter.data *= 1.5
    state = source.state_dict()
    assert len(state) == len(parameters)
    other.open("bottom")
    assert not torch.allclose(source([0])[0], other([0])[0])
    other.load_state_dict(state)
    assert torch.equal(source([0])[0], other([0])[0])
    source.close()
    assert all(map(torch.equal, source(rows), cached)) and source.state_dict() == {}
    assert torch.equal(upstream([inputs[2]])[0], alone[0])


def test_fill_computes_what_is_missing_one_by_one(tmp_path):
    """What a kill leaves of a file has another name, and so has a changed input."""
    inputs = ramps(3, 7, 5, 4)
    whole = make_source(tmp_path, inputs)
    assert whole.upstream.calls == [[3], [7], [5], [4]]
    states = whole([0, 1, 2, 3])
    file = whole.files[2]
    file.rename(file.with_suffix(".npy.abc.part"))
    again = make_source(tmp_path, inputs)
    assert again.upstream.calls == [[5]]
    assert all(map(torch.equal, states, again([0, 1, 2, 3])))
    changed = make_source(tmp_path, inputs | {0: torch.tensor([5.0, 2.0, 3.0])})
    assert changed.upstream.calls == [[3]]
    assert changed([0])[0][:, 0, 0].tolist() == [5.0, 2.0, 3.0]


def test_each_state_has_a_file_whatever_its_id_is_and_fits_into_16_bits(
    tmp_path, monkeypatch
):
    """Otherwise the utterance is named, and no file is written.

    Threads read the files without np.load, whose parser sometimes fails in threads.
    """
    ids = ["../a/b", "a b", "a_b", "é:*", "CON.1", "a" * 150]
    source = make_source(tmp_path / "c", ramps(1, 2, 3, 4, 5, 6), ids=ids)
    expected = [torch.from_numpy(np.load(file)) for file in source.files.values()]
    monkeypatch.setattr(np, "load", None)
    assert all(map(torch.equal, source([0, 1, 2, 3, 4, 5]), expected))
    assert [len(states) for states in expected] == [1, 2, 3, 4, 5, 6]
    for value in (float("nan"), 7000.0):  # 10 * 7000 is over 65,504
        with pytest.raises(InputError, match="an-id"):
            make_source(tmp_path / "d", {0: torch.tensor([value])}, ids=["an-id"])
    assert os.listdir(tmp_path) == ["c"] and len(os.listdir(tmp_path / "c")) == 6


def test_states_are_kept_in_memory_up_to_a_limit(tmp_path, monkeypatch):
    """All are kept, with 20 % to spare, or none. Fine-tuning needs the memory."""
    size = 2 * (128 + 4 * 2 * 2)  # two files: a header, and 4 steps of 2 layers
    for limit, kept in ((1.21 * size, [0, 1]), (1.19 * size, [])):
        monkeypatch.setattr(data, "CPU_LIMIT", limit)
        source = make_source(tmp_path, ramps(4, 4))
        source([0, 1, 0])
        assert sorted(source.memory) == kept
        source.open("bottom")
        assert source.memory == {}


def test_prepare_takes_the_clips_of_the_classes_and_the_texts_around_them(tmp_path):
    wav = tmp_path / "a.wav"
    write_wav(wav, [0.1] * 400)
    found = []
    for i, emotion in enumerate("xxx fru sur neu fru xxx oth fru sad".split()):
        found.append(data.Utterance("u", 1, "d", "s", i, i, f"text {i}", emotion, wav))
    upstream = SimpleNamespace(name="b", modality="audio", prepare=len)
    assert data.prepare(upstream, found, 3) == {3: 400, 8: 400}
    with pytest.raises(InputError, match="u has no wav.*--fusion text-fc"):
        data.prepare(upstream, [replace(u, wav=None) for u in found], 3)

    upstream.modality = "text"
    upstream.unknown_fraction = lambda inputs: 0.0
    upstream.prepare = lambda text: torch.tensor([int(text[-1])])
    inputs = data.prepare(upstream, found, 3)
    assert {row: row for row in (2, 3, 4, 7, 8)} == inputs


# --- A corpus of your own -------------------------------------------------------------

TABLE = """text,emotion,session,dialog,speaker
oh no,sad,1,a,ann
I hate it,ANGRY,1,a,bob
lovely,joy,12,b,cy
,neutral,12,b,di
so,surprise,3,c,ed
"""
# Separators, line ends, a mark, spaces and capitals, as spreadsheets write them.
DRESSES = [(",", ","), (",", ";"), (",", "\t"), ("\n", "\r\n"), ("\n", "\r")]
DRESSES += [("text", "\ufeffText"), ("dialog,speaker", " DIALOG , Speaker")]
DRESSES += [("oh no", '" oh  no"'), ("\n", "\n\n"), ("joy", " Happiness ")]


@pytest.mark.parametrize(("old", "new"), DRESSES)
def test_a_table_in_every_dress(old, new, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(TABLE.replace(old, new).encode())
    found = data.read_csv(path)
    assert [(u.text, u.label, u.session, u.dialog, u.speaker) for u in found] == [
        ("oh no", 3, 1, "a", "ann"),
        ("I hate it", 2, 1, "a", "bob"),
        ("so", None, 3, "c", "ed"),
        ("lovely", 1, 12, "b", "cy"),
        ("", 0, 12, "b", "di"),
    ]
    assert {u.wav for u in found} == {None}
    assert len({u.id for u in found}) == 5
    assert all(u.id.rpartition("_")[0] == u.dialog for u in found)


def test_optional_columns_order_the_turns_and_name_them(tmp_path):
    """As in IEMOCAP, an id is <dialogue>_<turn>, and a wav is beside the table.

    The separator is that of the first line, so a text may have any number of commas.
    """
    write_wav(tmp_path / "wavs" / "a.wav", [0.1] * 400)
    path = tmp_path / "mine.csv"
    path.write_text(
        "start;text;emotion;session;dialog;speaker;id;wav\n"
        f"9.5;{40 * 'no, '}no;calm;1;a_1;x;a_1_first;wavs/a.wav\n"
        "2.5;b2;anger;1;b;x;8_9;\n"
        "2;a2;happy;1;a_1;x;7;\n"
        "1.;b1;sadness;1;b;x;;\n"
    )
    found = data.read_csv(path)
    wav = tmp_path / "wavs" / "a.wav"
    assert [(u.start, u.text[:2], u.label, u.id, u.wav) for u in found] == [
        (2.0, "a2", 1, "a_1_7", None),
        (9.5, "no", 0, "a_1_first", wav),
        (1.0, "b1", 3, found[2].id, None),
        (2.5, "b2", 2, "b_8-9", None),
    ]
    assert found[2].id.startswith("b_")


# --- Counts, whole files, the toy, the commands ---------------------------------------


def test_the_checksum_of_a_corpus_covers_what_training_reads(small_corpus):
    """That is all but the times and the place of the wavs."""
    first, *rest = read(small_corpus)
    checksum = data.checksum([first, *rest])
    elsewhere = replace(first, wav=None, start=0.0, end=9.0)
    assert data.checksum([elsewhere, *rest]) == checksum
    emotion = "sad" if first.label != 3 else "neu"
    for changes in ({"id": "x"}, {"speaker": "x"}, {"text": "x"}, {"emotion": emotion}):
        assert data.checksum([replace(first, **changes), *rest]) != checksum
    assert data.checksum([*rest, first]) != checksum


def write_folder(path, text):
    path.mkdir(exist_ok=True)
    (path / "file").write_text(text)


@pytest.mark.parametrize("write", [Path.write_text, write_folder])
def test_write_whole_is_complete_or_absent(write, tmp_path):
    """A folder stays, and a file gives way to a newer one."""
    path = tmp_path / "new" / "name"
    for problem in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        with pytest.raises(type(problem)), data.write_whole(path) as part:
            write(part, "half")
            assert not path.exists()
            raise problem
    assert list(path.parent.iterdir()) == []
    # Two writers at a time: each has a part of its own, and one whole result stays.
    with data.write_whole(path) as part, data.write_whole(path) as other:
        write(part, "one")
        write(other, "two")
    assert list(path.parent.iterdir()) == [path]
    written = path / "file" if write == write_folder else path
    assert written.read_text() == ("two" if write == write_folder else "one")


def test_a_folder_that_another_job_finishes_in_the_last_moment_stays(
    tmp_path, monkeypatch
):
    """Between the last look at the folder and the renaming, it is there."""
    path = tmp_path / "name"
    rename = os.replace

    def rename_too_late(old, new):
        write_folder(path, "first")
        rename(old, new)

    monkeypatch.setattr(os, "replace", rename_too_late)
    with data.write_whole(path) as part:
        write_folder(part, "second")
    assert list(tmp_path.iterdir()) == [path]
    assert (path / "file").read_text() == "first"


def test_the_toy_is_a_corpus_in_the_layout_of_iemocap_and_always_the_same(tmp_path):
    """Its tones repeat after 20 ms, so that all frames of a clip sound the same."""
    toy = tmp_path / "toy"
    data.main(["toy", str(toy)])
    with pytest.raises(InputError, match="exists"):
        data.main(["toy", str(toy)])
    corpus = read(toy)
    assert len(corpus) == 900 and (toy / "toy.json").exists()
    for row in range(0, 900, 100):
        for part in data.split(corpus, corpus[row].session, 0):
            assert {corpus[r].label for r in part} == {0, 1, 2, 3}
        x = data.load_wav(corpus[row].wav)
        assert x.abs().max() > 0.05
        assert (x[320:] - x[:-320]).abs().max() < 0.01
    # The first dialogue, written again with the same random numbers.
    rng = np.random.default_rng(7)
    data.write_toy_dialog(tmp_path / "again", "Ses01F_impro01", rng)
    for file in (tmp_path / "again").rglob("*.*"):
        first = toy / "Session1" / file.relative_to(tmp_path / "again")
        assert file.read_bytes() == first.read_bytes()


def test_check_describes_a_corpus_and_lists_the_counts_that_differ(
    small_corpus, capsys
):
    with pytest.raises(InputError) as problem:
        data.main(["check", str(small_corpus)])
    for session, count in ((1, 28), (2, 30), (3, 32), (4, 30), (5, 31)):
        assert f"session {session}: 1 dialogues, not {count}\n" in str(problem.value)
    printed = capsys.readouterr().out
    assert re.findall(r"\d+", printed)[:3] == ["70", "5", "10"]
    assert "neu 14, hap 14, ang 14, sad 14" in printed and "'fru': 14" in printed


def test_wrong_input_is_a_sentence_and_a_bug_is_a_traceback():
    def fail():
        raise error

    for error in (InputError("bad row"), OSError("no disk")):
        with pytest.raises(SystemExit, match=f"^error: {error}$"):
            data.run_command(fail)
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        data.run_command(fail)
