"""Bad corpora and tables: each is an error that names the place, or harmless.

The reader of IEMOCAP leaves a damaged dialogue out, with one line about it. The reader
of tables refuses the table, with one line for each bad row.
"""

import csv
import shutil
import struct

import pytest
import torch

import data
import train
from data import InputError
from tests.conftest import change, write_dialog, write_wav

# --- One damaged dialogue beside a good one -------------------------------------------


def chunk(name, body, size=None):
    """Make one chunk of a RIFF file. A body of odd length is followed by a zero."""
    size = len(body) if size is None else size
    return name + struct.pack("<I", size) + body + b"\0" * (len(body) % 2)


def riff(*chunks, size=None):
    return chunk(b"RIFF", b"WAVE" + b"".join(chunks), size)


def fmt(code=1, channels=1, rate=16000, bits=16, more=b""):
    step = channels * bits // 8
    numbers = code, channels, rate, rate * step, step, bits
    return chunk(b"fmt ", struct.pack("<HHIIHH", *numbers) + more)


SAMPLES = chunk(b"data", bytes(32000))  # 1 s of silence
FFMPEG = "ffmpeg -i OLD.wav -ac 1 -ar 16000"
# Files that lie in the place of another.
FOREIGN = {
    "nothing": b"",
    "web page": b"<!DOCTYPE html>\n<html></html>",
    "FLAC": b"fLaC\0\0\0\x22" + bytes(34),
    "UTF-16": "Ses01F_impro01_F000 [000.0000-001.0000]: hm\n".encode("utf-16"),
}
WAVS = {
    "8 bits": riff(fmt(bits=8), SAMPLES),
    "24 bits": riff(fmt(bits=24), SAMPLES),
    "float": riff(fmt(code=3, bits=32), SAMPLES),
    "stereo": riff(fmt(channels=2), SAMPLES),
    "RIFX": b"RIFX" + riff(fmt(), SAMPLES)[4:],
    "no data": riff(fmt()),
    "no samples": riff(fmt(), chunk(b"data", b"")),
    "one byte": riff(fmt(), chunk(b"data", b"x")),
    "cut in the header": riff(fmt(), SAMPLES)[:30],
    "cut in the samples": riff(fmt(), SAMPLES)[:5000],
    "a chunk too long": riff(chunk(b"LIST", b"", 40000), fmt(), SAMPLES),
    "RIFF size left open": riff(fmt(), SAMPLES, size=0),
    "data size left open": riff(fmt(), chunk(b"data", bytes(32000), 0xFFFFFFFF)),
}
for rate in (0, 11024, 16001, 2**30 + 16000):
    WAVS[f"{rate} Hz"] = riff(fmt(rate=rate), SAMPLES)


@pytest.fixture(scope="module")
def two_dialogs(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    turns = [("F000", 0, 1, "neu", "hm"), ("M000", 2, 3, "sad", "so")]
    for dialog in ("Ses01F_impro01", "Ses02F_impro01"):
        write_dialog(root, dialog, turns)
    return root


@pytest.fixture
def dialog(two_dialogs, tmp_path):
    """Copy two dialogues. Returns the files of the first, which a test may damage."""
    shutil.copytree(two_dialogs, tmp_path, dirs_exist_ok=True)
    session = tmp_path / "Session1"
    return {
        "labels": session / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt",
        "words": session / "dialog" / "transcriptions" / "Ses01F_impro01.txt",
        "wav": session / "sentences" / "wav" / "Ses01F_impro01/Ses01F_impro01_F000.wav",
    }


def assert_left_out(root, *words):
    corpus, (problem,) = data.read_iemocap(root)
    assert [u.id for u in corpus] == ["Ses02F_impro01_F000", "Ses02F_impro01_M000"]
    assert "Ses01F_impro01" in problem and "\n" not in problem
    for word in words:
        assert str(word) in problem


@pytest.mark.parametrize(
    "file, old, new, words",
    [
        ("labels", b"\tneu\t", b"\tjoy\t", "_F000"),
        ("labels", b"\tneu\t[2.5000, 2.5000, 2.5000]", b"\tne", "_F000"),
        ("labels", b"\tneu", b"\tNEU", "_F000"),
        ("labels", b"[0.0000 - 1.0", b"[0.0000 1.0", "_F000"),
        ("labels", b"[0.0000 - 1.0", b"[2.0000 - 1.0", "_F000.wav lasts 1.00 s"),
        ("labels", b"[0.0000 - 1.0", b"[nan - 1.0", "_F000"),
        ("labels", b"impro01_F000", b"impro01_F009", "_F009"),
        ("labels", b"impro01_F000", b"impro01/../../x_F000", "impro01_F000"),
        ("labels", b"01_M000", b"01_F000", "_F000 is a duplicate"),
        ("words", b"impro01_F000", b"impro01_FXX0", "_F000"),
        ("words", b"]: hm", b"] hm", "_F000"),
        ("words", b"hm\n", b"hm", "_M000"),
        ("words", b"01_M000", b"01_F000", "_F000 is a duplicate"),
    ],
)
def test_a_damaged_line_leaves_the_dialogue_out(
    file, old, new, words, dialog, tmp_path
):
    change(dialog[file], old, new)
    assert_left_out(tmp_path, dialog[file], words)


@pytest.mark.parametrize("file", ["labels", "words", "wav"])
@pytest.mark.parametrize("kind", [*FOREIGN, "missing", "folder", "loop"])
def test_another_file_in_the_place_of_one(file, kind, dialog, tmp_path):
    path = dialog[file]
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind != "missing":
        path.write_bytes(FOREIGN[kind])
    assert_left_out(tmp_path, path)
    if file == "wav" and kind in FOREIGN:
        assert_left_out(tmp_path, FFMPEG)


@pytest.mark.parametrize("kind", WAVS)
def test_another_kind_of_recording_is_refused(kind, dialog, tmp_path, monkeypatch):
    # Resampling from an unusual rate takes minutes.
    monkeypatch.setattr("torchaudio.functional.resample", None)
    dialog["wav"].write_bytes(WAVS[kind])
    assert_left_out(tmp_path, dialog["wav"], FFMPEG)


@pytest.mark.parametrize("seconds", [0.89, 1.11])
def test_a_recording_of_another_length_is_refused(seconds, dialog, tmp_path):
    write_wav(dialog["wav"], [0.1] * int(seconds * 16000))
    assert_left_out(tmp_path, dialog["wav"], f"{seconds:.2f} s")


@pytest.mark.parametrize("name", ["Ses01F_impro02", "Ses02F_impro01"])
def test_lines_of_another_dialogue_or_session_leave_it_out(name, dialog, tmp_path):
    for file in ("labels", "words"):
        change(dialog[file], b"Ses01F_impro01_F", f"{name}_F".encode())
    assert_left_out(tmp_path, dialog["labels"], f"{name}_F000 belongs to another")
    for file in ("labels", "words"):
        change(dialog[file], f"{name}_F".encode(), b"Ses01F_impro01_F")
    (tmp_path / "Session1").rename(tmp_path / "Session3")
    assert_left_out(tmp_path, "Ses01F_impro01_F000 belongs to another")


def test_each_damaged_dialogue_has_a_line(dialog, tmp_path):
    dialog["labels"].write_text("")
    dialog["words"].write_text("")
    next((tmp_path / "Session2").rglob("*.wav")).unlink()
    (tmp_path / "Session4" / "dialog" / "EmoEvaluation").mkdir(parents=True)
    corpus, problems = data.read_iemocap(tmp_path)
    assert corpus == [] and len(problems) == 3
    assert str(dialog["labels"]) in problems[0] and ".wav" in problems[1]
    assert "Session4" in problems[2] and "No such file" in problems[2]
    for wrong in (tmp_path / "Session1", dialog["labels"], tmp_path / "nowhere"):
        with pytest.raises((InputError, OSError), match=wrong.name):
            data.read_iemocap(wrong)


LOUD = struct.pack("<hh", 32767, -32768) * 8000
PIECES = (chunk(b"JUNK", bytes(27)), fmt(), chunk(b"LIST", b"x"), SAMPLES)


@pytest.mark.parametrize(
    "content, words",
    [
        (riff(fmt(), SAMPLES), ""),
        (riff(fmt(rate=8000), chunk(b"data", bytes(16000))), "[LAUGHTER]"),
        (riff(fmt(rate=22050), chunk(b"data", bytes(44100))), "hm " * 600),
        (riff(fmt(rate=48000), chunk(b"data", bytes(96000))), "żółć 感情"),
        (riff(fmt(), chunk(b"data", LOUD)), "hm"),
        (riff(fmt(more=b"\0\0"), SAMPLES), "hm"),
        (riff(*PIECES, chunk(b"x", b"")), "hm"),
    ],
)
def test_unusual_recordings_and_words_are_read(content, words, dialog, tmp_path, tiny):
    dialog["wav"].write_bytes(content)
    change(dialog["words"], b"hm", words.encode())
    corpus, problems = data.read_iemocap(tmp_path)
    assert (len(corpus), corpus[0].text, problems) == (4, words.strip(), [])
    x = data.clip(data.load_wav(corpus[0].wav))
    assert len(x) == 16000
    for modality, raw in (("audio", x), ("text", corpus[0].text)):
        (states,) = tiny[modality]([tiny[modality].prepare(raw)])
        assert states.isfinite().all()
        assert 2 <= len(states) <= 512


def test_every_sample_is_read_whatever_lies_around_them(tmp_path):
    samples = torch.arange(-250, 251)
    body = chunk(b"data", struct.pack("<501h", *samples.tolist()))
    (tmp_path / "a.wav").write_bytes(riff(chunk(b"LIST", b"odd"), fmt(), body, body))
    assert torch.equal(data.load_wav(tmp_path / "a.wav") * 32768, samples.float())


FLAGS = "--upstream tiny --device cpu --max-epochs 1".split()


def test_partial_lists_what_it_leaves_out(small_corpus, tmp_path, monkeypatch, capsys):
    root = tmp_path / "small"
    shutil.copytree(small_corpus, root)
    next(root.rglob("Ses02*.wav")).unlink()
    (root / "Session3/dialog/transcriptions/Ses03F_impro01.txt").unlink()
    monkeypatch.chdir(tmp_path)
    command = ["--iemocap", str(root), *FLAGS, "--fusion", "text-fc"]
    with pytest.raises(InputError, match="(?s)Ses02F.*Ses03F.*--partial"):
        train.main(command)
    train.main([*command, "--partial"])
    lines = capsys.readouterr().out.split("\n")
    assert any("Ses02F_impro01" in line and ".wav" in line for line in lines)
    assert any("Ses03F_impro01.txt" in line for line in lines)
    assert list(tmp_path.glob("runs/small-partial/*/*/result.json"))


# --- Tables ---------------------------------------------------------------------------

HEADER = "text,emotion,session,dialog,speaker"
GOOD = "hm,sad,1,a,x\n"
TABLES = [
    ("", "line 1 .*columns"),
    (GOOD, "line 1 .*columns"),
    (f"text,emotion,session,dialog\n{GOOD}", "line 1 .*columns"),
    (f"{HEADER},age\nhm,sad,1,a,x,30", "line 1 .*columns"),
    (f"{HEADER},text\nhm,sad,1,a,x,oh", "line 1 .*columns"),
    (f"{HEADER},\nhm,sad,1,a,x,", "line 1 .*columns"),
    (f"{HEADER}\n{GOOD}\n\nhm,,1,a,x", "line 5: .*emotion"),
    (f"{HEADER}\nhm,sad,1, ,x", "line 2: .*dialog"),
    (f"{HEADER}\nhm,sad,0,a,x", "line 2: .*session is '0'"),
    (f"{HEADER}\nhm,sad,-1,a,x", "line 2: .*session is '-1'"),
    (f"{HEADER}\nhm,sad,1.5,a,x", "line 2: .*session is '1.5'"),
    (f"{HEADER}\nhm,sad,1,a", "line 2: .*cells"),
    (f"{HEADER}\noh, no,sad,1,a,x", "line 2: .*cells"),
    (f"{HEADER},start\nhm,sad,1,a,x,nan", "line 2: .*start is 'nan'"),
    (f"{HEADER},start\nhm,sad,1,a,x,-1", "line 2: .*start is '-1'"),
    (f"{HEADER},start\nhm,sad,1,a,x,1:30", "line 2: .*start is '1:30'"),
    (f"{HEADER},wav\nhm,sad,1,a,x,no.wav", "line 2: .*no.wav"),
    (f"{HEADER},wav\nhm,sad,1,a,x,.", "line 2: "),
    (f'{HEADER}\n{GOOD}\n"hm,sad,1,a,x\n{GOOD}', "line 4: unexpected end"),
    (f'{HEADER}\n"hm"s,sad,1,a,x', "line 2: .*expected after"),
    (f"{HEADER},id\nhm,sad,1,a,x,a_7\noh,sad,1,a,x,7", "line 3: .*a_7"),
    (f"{HEADER},id\nhm,sad,1,a,x,1_2\noh,sad,1,a,x,1-2", "line 3: .*a_1-2"),
    (f"{HEADER}\n{GOOD}hm,sad,2,b,x", "line 3: .*speaker x"),
    (f"{HEADER}\n{GOOD}hm,sad,2,a,y", "line 3: .*dialogue a"),
    (f"{HEADER}\n{GOOD}".encode("utf-16"), "UTF-8"),
    (f"{HEADER}\nné,sad,1,a,x".encode("latin-1"), "UTF-8"),
    (bytes(range(256)), "UTF-8"),
]


@pytest.mark.parametrize("content, expected", TABLES)
def test_a_bad_table_is_an_error_with_the_line(content, expected, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=expected) as problem:
        data.read_csv(path)
    assert str(path) in str(problem.value)


def test_all_problems_of_a_table_come_at_once_and_a_missing_one_is_named(tmp_path):
    path = tmp_path / "mine.csv"
    for missing in (path, tmp_path):
        with pytest.raises(OSError, match=missing.name):
            data.read_csv(missing)
    path.write_text(f"{HEADER}\nhm,,1,a,x\n{GOOD}hm,sad,0,a,x\nhm,sad,2,a,y\nhm,sad\n")
    with pytest.raises(InputError) as problem:
        data.read_csv(path)
    for line, number in zip(str(problem.value).split("\n"), (2, 4, 5, 6), strict=True):
        assert line.startswith(f"{path}, line {number}: ")


def test_a_table_trains_as_the_layout_of_iemocap_does(
    small_corpus, tmp_path, monkeypatch
):
    corpus, _ = data.read_iemocap(small_corpus)
    columns = "id text emotion session dialog speaker start wav".split()
    for name, used in (("with_audio.csv", columns), ("words.csv", columns[:-1])):
        with (tmp_path / name).open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(used)
            table.writerows([getattr(u, column) for column in used] for u in corpus)
    monkeypatch.chdir(tmp_path)
    train.main(["--corpus", "with_audio.csv", *FLAGS])
    train.main(["--iemocap", str(small_corpus), "--partial", *FLAGS])
    first, second = tmp_path.rglob("predictions.csv")
    assert first.read_text() == second.read_text()
    # Without recordings, a system of text alone trains.
    train.main(["--corpus", "words.csv", "--fusion", "text-fc", *FLAGS])
    with pytest.raises(InputError, match="no wav"):
        train.main(["--corpus", "words.csv", *FLAGS])
