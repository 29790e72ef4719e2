"""Bad corpora and tables: each is an error that names the place, or harmless.

The reader of IEMOCAP leaves a damaged dialogue out, with one line about it. The reader
of tables refuses the table, with one line for each bad row.
"""

import csv
import os
import random
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


def riff(*chunks, kind=b"RIFF", size=None):
    body = b"WAVE" + b"".join(chunks)
    return kind + struct.pack("<I", len(body) if size is None else size) + body


def fmt(code=1, channels=1, rate=16000, bits=16, more=b""):
    step = channels * bits // 8
    numbers = code, channels, rate, rate * step, step, bits
    return chunk(b"fmt ", struct.pack("<HHIIHH", *numbers) + more)


SAMPLES = chunk(b"data", bytes(32000))  # 1 s of silence
# Files that lie in the place of another.
FOREIGN = {
    "nothing": b"",
    "text": b"no recordings here\n",
    "Git-LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "web page": b"<!DOCTYPE html>\n<html></html>",
    "FLAC": b"fLaC\0\0\0\x22" + bytes(34),
    "UTF-16": "Ses01F_impro01_F000 [000.0000-001.0000]: hm\n".encode("utf-16"),
}
REFUSED = {
    **FOREIGN,
    "MP3": b"ID3\4" + bytes(200),
    "SPHERE": b"NIST_1A\n   1024\nsample_count -i 16000\n",
    "8 bits": riff(fmt(bits=8), SAMPLES),
    "24 bits": riff(fmt(bits=24), SAMPLES),
    "32 bits": riff(fmt(bits=32), SAMPLES),
    "float": riff(fmt(code=3, bits=32), SAMPLES),
    "A-law": riff(fmt(code=6, bits=8), SAMPLES),
    "stereo": riff(fmt(channels=2), SAMPLES),
    "no channel": riff(fmt(channels=0), SAMPLES),
    "RIFX": riff(fmt(), SAMPLES, kind=b"RIFX"),
    "AVI": riff(fmt(), SAMPLES).replace(b"WAVE", b"AVI "),
    "no fmt": riff(SAMPLES),
    "no data": riff(fmt()),
    "data before fmt": riff(SAMPLES, fmt()),
    "no samples": riff(fmt(), chunk(b"data", b"")),
    "one byte": riff(fmt(), chunk(b"data", b"x")),
    "cut in the header": riff(fmt(), SAMPLES)[:30],
    "cut in the samples": riff(fmt(), SAMPLES)[:5000],
    "RIFF size left open": riff(fmt(), SAMPLES, size=0),
    "data size left open": riff(fmt(), chunk(b"data", bytes(32000), 0xFFFFFFFF)),
}


@pytest.fixture
def dialog(tmp_path):
    """Two dialogues. The files of the first, which a test may damage."""
    turns = [("F000", 0, 1, "neu", "hm"), ("M000", 2, 3, "sad", "so")]
    write_dialog(tmp_path, "Ses02F_impro01", turns)
    session = write_dialog(tmp_path, "Ses01F_impro01", turns)
    return {
        "labels": session / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt",
        "words": session / "dialog" / "transcriptions" / "Ses01F_impro01.txt",
        "wav": session / "sentences" / "wav" / "Ses01F_impro01/Ses01F_impro01_F000.wav",
    }


def assert_left_out(root, *words):
    corpus, problems = data.read_iemocap(root)
    assert [u.id for u in corpus] == ["Ses02F_impro01_F000", "Ses02F_impro01_M000"]
    (problem,) = problems
    assert "Ses01F_impro01" in problem
    assert "\n" not in problem
    for word in words:
        assert str(word) in problem


@pytest.mark.parametrize(
    "file, old, new, turn, words",
    [
        ("labels", b"\tneu\t", b"\tjoy\t", "F000", "emotion joy"),
        ("labels", b"\tneu\t[2.5000, 2.5000, 2.5000]", b"\tne", "F000", ""),
        ("labels", b"\tneu", b"\tNEU", "F000", ""),
        ("labels", b"[0.0000 - 1.0", b"[0.0000 1.0", "F000", ""),
        ("labels", b"[0.0000 - 1.0", b"[2.0000 - 1.0", "F000", "other times"),
        ("labels", b"[0.0000 - 1.0", b"[nan - 1.0", "F000", ""),
        ("labels", b"impro01_F000", b"impro01_F009", "F009", ""),
        ("labels", b"impro01_F000", b"impro01/../../x_F000", "F000", ""),
        ("labels", b"01_M000", b"01_F000", "F000", "duplicate"),
        ("words", b"001.0000]", b"001.5000]", "F000", "other times"),
        ("words", b"impro01_F000", b"impro01_FXX0", "F000", ""),
        ("words", b"]: hm", b"] hm", "F000", ""),
        ("words", b"hm\n", b"hm", "M000", ""),
        ("words", b"01_M000", b"01_F000", "F000", "duplicate"),
    ],
)
def test_a_damaged_line_leaves_the_dialogue_out(
    file, old, new, turn, words, dialog, tmp_path
):
    change(dialog[file], old, new)
    assert_left_out(tmp_path, dialog[file], f"Ses01F_impro01_{turn}", words)


@pytest.mark.parametrize("name", ["Ses01F_impro02", "Ses02F_impro01"])
def test_lines_of_another_dialogue_leave_it_out(name, dialog, tmp_path):
    for file in ("labels", "words"):
        change(dialog[file], b"Ses01F_impro01_F", f"{name}_F".encode())
    assert_left_out(tmp_path, dialog["labels"], f"{name}_F000 belongs to another")


def test_a_dialogue_in_the_folder_of_another_session_is_left_out(dialog, tmp_path):
    (tmp_path / "Session1").rename(tmp_path / "Session3")
    corpus, (problem,) = data.read_iemocap(tmp_path)
    assert len(corpus) == 2
    assert "Ses01F_impro01_F000 belongs to another" in problem


@pytest.mark.parametrize("file", ["labels", "words"])
@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_another_file_in_the_place_of_labels_or_words(file, content, dialog, tmp_path):
    dialog[file].write_bytes(content)
    assert_left_out(tmp_path)


@pytest.mark.parametrize("file", ["labels", "words"])
def test_the_file_that_is_not_in_utf_8_is_named(file, dialog, tmp_path):
    dialog[file].write_bytes(FOREIGN["UTF-16"])
    assert_left_out(tmp_path, dialog[file])


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED)
def test_recordings_that_are_not_read_come_with_the_command(content, dialog, tmp_path):
    dialog["wav"].write_bytes(content)
    assert_left_out(tmp_path, dialog["wav"], "ffmpeg -i OLD.wav -ac 1 -ar 16000")


def test_a_chunk_that_is_too_long_is_refused(dialog, tmp_path):
    dialog["wav"].write_bytes(riff(chunk(b"LIST", b"", 40000), fmt(), SAMPLES))
    assert_left_out(tmp_path, dialog["wav"], "ffmpeg")


@pytest.mark.parametrize("rate", [0, 11024, 16001, 2**30 + 16000])
def test_a_rate_that_nobody_records_with_is_refused(rate, tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(riff(fmt(rate=rate), SAMPLES))

    def resample(x, old, new):
        raise AssertionError(f"resampled from {old} Hz")

    monkeypatch.setattr("torchaudio.functional.resample", resample)
    with pytest.raises(InputError, match=f"{rate}.*ffmpeg"):
        data.load_wav(tmp_path / "a.wav")


@pytest.mark.parametrize("seconds", [0.5, 0.85, 1.15, 2])
def test_a_recording_of_another_length_leaves_the_dialogue_out(
    seconds, dialog, tmp_path
):
    write_wav(dialog["wav"], [0.1] * int(seconds * 16000))
    assert_left_out(tmp_path, dialog["wav"], f"{seconds:.2f} s")


@pytest.mark.parametrize("file", ["labels", "words", "wav"])
@pytest.mark.parametrize("kind", ["missing", "folder", "loop", "locked"])
def test_a_file_that_cannot_be_opened_leaves_the_dialogue_out(
    file, kind, dialog, tmp_path
):
    path = dialog[file]
    if kind == "locked":
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        path.chmod(0)
    else:
        path.unlink()
    if kind == "folder":
        path.mkdir()
    if kind == "loop":
        path.symlink_to(path)
    assert_left_out(tmp_path, path)


def test_both_files_empty_leave_the_dialogue_out(dialog, tmp_path):
    dialog["labels"].write_text("")
    dialog["words"].write_text("")
    assert_left_out(tmp_path, dialog["labels"])


def test_each_damaged_dialogue_has_a_line(tmp_path):
    for session in (1, 2, 3):
        turns = [("F000", 0, 0.1, "neu", "a")]
        folder = write_dialog(tmp_path, f"Ses0{session}F_impro01", turns)
        next(folder.rglob("*.wav")).unlink()
    (tmp_path / "Session4" / "dialog" / "EmoEvaluation").mkdir(parents=True)
    corpus, problems = data.read_iemocap(tmp_path)
    assert corpus == []
    assert len(problems) == 4
    assert "Session4" in problems[3]
    assert "no label files" in problems[3]


def test_a_wrong_root_is_an_error(dialog, tmp_path):
    inner = tmp_path / "Session1"
    (inner / "file").write_text("")
    for wrong in (inner, inner / "file", tmp_path / "nowhere"):
        with pytest.raises((InputError, OSError), match=wrong.name):
            data.read_iemocap(wrong)


READ = {
    "silence": riff(fmt(), SAMPLES),
    "8 kHz": riff(fmt(rate=8000), chunk(b"data", bytes(16000))),
    "22.05 kHz": riff(fmt(rate=22050), chunk(b"data", bytes(44100))),
    "48 kHz": riff(fmt(rate=48000), chunk(b"data", bytes(96000))),
    "clipped": riff(fmt(), chunk(b"data", struct.pack("<hh", 32767, -32768) * 8000)),
    "fmt of 18 bytes": riff(fmt(more=b"\0\0"), SAMPLES),
    "other chunks": riff(
        chunk(b"JUNK", bytes(27)),
        fmt(),
        chunk(b"LIST", b"x"),
        SAMPLES,
        chunk(b"x", b""),
    ),
}


@pytest.mark.parametrize("content", READ.values(), ids=READ)
@pytest.mark.parametrize("words", ["hm", "", "[LAUGHTER]", "hm " * 600, "żółć 感情"])
def test_unusual_recordings_and_words_are_read(content, words, dialog, tmp_path, tiny):
    dialog["wav"].write_bytes(content)
    change(dialog["words"], b"hm", words.encode())
    corpus, problems = data.read_iemocap(tmp_path)
    assert problems == []
    assert (len(corpus), corpus[0].text) == (4, words.strip())
    x = data.load_clip(corpus[0])
    assert len(x) == 16000
    for modality, raw in (("audio", x), ("text", corpus[0].text)):
        upstream = tiny[modality]
        (states,) = upstream([upstream.prepare(raw)])
        assert states.isfinite().all()
        assert 2 <= len(states) <= 512


def test_every_sample_is_read_whatever_lies_around_them(tmp_path):
    samples = torch.arange(-250, 251)
    body = chunk(b"data", struct.pack("<501h", *samples.tolist()))
    (tmp_path / "a.wav").write_bytes(riff(chunk(b"LIST", b"odd"), fmt(), body, body))
    assert torch.equal(data.load_wav(tmp_path / "a.wav") * 32768, samples.float())


def test_partial_lists_what_it_leaves_out(small_corpus, tmp_path, monkeypatch, capsys):
    root = tmp_path / "small"
    shutil.copytree(small_corpus, root)
    next(root.rglob("Ses02*.wav")).unlink()
    (root / "Session3/dialog/transcriptions/Ses03F_impro01.txt").unlink()
    monkeypatch.chdir(tmp_path)
    command = ["--iemocap", str(root), "--upstream", "tiny", "--fusion", "text-fc"]
    command += ["--frozen", "--max-epochs", "1", "--device", "cpu"]
    with pytest.raises(InputError, match="(?s)Ses02F.*Ses03F.*--partial"):
        train.main(command)
    train.main([*command, "--partial"])
    lines = capsys.readouterr().out.split("\n")
    assert any("Ses02F_impro01" in line and ".wav" in line for line in lines)
    assert any("Ses03F_impro01.txt" in line for line in lines)
    (result,) = tmp_path.rglob("result.json")
    assert result.parts[-4] == "small-partial"


# --- Mutations ------------------------------------------------------------------------


def mutate(content, rng):
    """Change one bit, or cut out, double, zero or overwrite a piece."""
    first = rng.randrange(len(content))
    piece = content[first : first + rng.choice((1, 2, 8, 60, 1000))]
    bit = bytes([content[first] ^ 1 << rng.randrange(8)])
    middle = [
        bit + piece[1:],
        b"",
        piece + piece,
        bytes(len(piece)),
        rng.randbytes(len(piece)),
    ]
    return content[:first] + rng.choice(middle) + content[first + len(piece) :]


def test_a_mutated_corpus_is_whole_or_a_dialogue_is_left_out(tmp_path):
    """A mutation raises no other error, and changes no more than its own dialogue."""
    turns = [
        ("F000", 0, 0.1, "neu", "i hate it"),
        ("F001", 0.3, 0.4, "fru", "oh no"),
        ("M000", 0.5, 0.6, "sad", "so"),
    ]
    for session in (1, 2):
        write_dialog(tmp_path, f"Ses0{session}F_impro01", turns)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    clean, _ = data.read_iemocap(tmp_path)
    damaged = 0
    for seed in range(400):
        rng = random.Random(seed)
        path = rng.choice(files)
        content = path.read_bytes()
        path.write_bytes(mutate(content, rng))
        corpus, problems = data.read_iemocap(tmp_path)
        name = path.stem[:14]
        if problems:
            assert len(problems) == 1
            assert corpus == [u for u in clean if u.dialog != name]
            damaged += 1
        else:
            assert [u.id for u in corpus] == [u.id for u in clean]
            pairs = zip(corpus, clean, strict=True)
            assert sum(found != u for found, u in pairs) <= 3
            for u in corpus:
                x = data.load_clip(u)
                assert x.isfinite().all()
                assert 400 <= len(x) <= 80000
        path.write_bytes(content)
    assert damaged > 100


# --- Tables ---------------------------------------------------------------------------

HEADER = "text,emotion,session,dialog,speaker"
GOOD = "hm,sad,1,a,x\n"


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", "line 1 .*columns"),
        (GOOD, "line 1 .*columns"),
        (f"words,emotion,session,dialog,speaker\n{GOOD}", "line 1 .*columns"),
        (f"text,emotion,session,dialog\n{GOOD}", "line 1 .*columns"),
        (f"{HEADER},age\nhm,sad,1,a,x,30", "line 1 .*columns"),
        (f"{HEADER},text\nhm,sad,1,a,x,oh", "line 1 .*columns"),
        (f"{HEADER},\nhm,sad,1,a,x,", "line 1 .*columns"),
        ("<!DOCTYPE html><html></html>", "line 1 .*columns"),
        ("version https://git-lfs.github.com/spec/v1\noid", "line 1 .*columns"),
        (HEADER, "no utterance"),
        (f"{HEADER}\n{GOOD}\n\nhm,,1,a,x", "line 5: .*emotion"),
        (f"{HEADER}\nhm,sad,1, ,x", "line 2: .*dialog"),
        (f"{HEADER}\nhm,sad,1,a,", "line 2: .*speaker"),
        (f"{HEADER}\nhm,sad,,a,x", "line 2: .*session"),
        (f"{HEADER}\nhm,sad,0,a,x", "line 2: .*session is '0'"),
        (f"{HEADER}\nhm,sad,-1,a,x", "line 2: .*session is '-1'"),
        (f"{HEADER}\nhm,sad,01,a,x", "line 2: .*session is '01'"),
        (f"{HEADER}\nhm,sad,1.5,a,x", "line 2: .*session is '1.5'"),
        (f"{HEADER}\nhm,sad,one,a,x", "line 2: .*session is 'one'"),
        (f"{HEADER}\nhm,sad,1,a", "line 2: .*cells"),
        (f"{HEADER}\noh, no,sad,1,a,x", "line 2: .*cells"),
        (f"{HEADER},start\nhm,sad,1,a,x,nan", "line 2: .*start is 'nan'"),
        (f"{HEADER},start\nhm,sad,1,a,x,-1", "line 2: .*start is '-1'"),
        (f"{HEADER},start\nhm,sad,1,a,x,1:30", "line 2: .*start is '1:30'"),
        (f"{HEADER},wav\nhm,sad,1,a,x,no.wav", "line 2: .*no.wav"),
        (f"{HEADER},wav\nhm,sad,1,a,x,.", "line 2: "),
        (f'{HEADER}\n"two\nlines",sad,1,a,x\n', "line 3: .*one line"),
        (f'{HEADER}\n"hm,sad,1,a,x\n{GOOD}', "line 3: unexpected end"),
        (f'{HEADER}\n"hm"s,sad,1,a,x', "line 2: .*expected after"),
        (f"{HEADER},id\nhm,sad,1,a,x,a_7\noh,sad,1,a,x,7", "line 3: .*a_7"),
        (
            f"{HEADER},id\nhm,sad,1,a,x,1_2\noh,sad,1,a,x,1-2",
            "line 3: .*a_1-2",
        ),
        (
            f"{HEADER}\n{GOOD}hm,sad,2,b,x",
            "line 3: .*speaker x",
        ),
        (
            f"{HEADER}\n{GOOD}hm,sad,2,a,y",
            "line 3: .*dialogue a",
        ),
        (f"{HEADER}\n{GOOD}".encode("utf-16"), "UTF-8"),
        (f"{HEADER}\nné,sad,1,a,x".encode("latin-1"), "UTF-8"),
        (bytes(range(256)), "UTF-8"),
    ],
)
def test_a_bad_table_is_an_error_with_the_line(content, expected, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=expected) as problem:
        data.read_csv(path)
    assert str(path) in str(problem.value)


def test_all_problems_of_a_table_come_at_once(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(f"{HEADER}\nhm,,1,a,x\n{GOOD}hm,sad,0,a,x\nhm,sad,2,a,y\nhm,sad\n")
    with pytest.raises(InputError) as problem:
        data.read_csv(path)
    for line, number in zip(str(problem.value).split("\n"), (2, 4, 5, 6), strict=True):
        assert line.startswith(f"{path}, line {number}: ")


def test_a_table_that_is_missing_is_named(tmp_path):
    for path in (tmp_path / "mine.csv", tmp_path):
        with pytest.raises(OSError, match=path.name):
            data.read_csv(path)


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
    command = ["--upstream", "tiny", "--max-epochs", "1", "--device", "cpu"]
    train.main(["--corpus", "with_audio.csv", *command])
    train.main(["--iemocap", str(small_corpus), "--partial", *command])
    first, second = tmp_path.rglob("predictions.csv")
    assert first.read_text() == second.read_text()
    # Without recordings, a system of text alone trains.
    train.main(["--corpus", "words.csv", "--fusion", "text-fc", *command])
    with pytest.raises(InputError, match="no wav"):
        train.main(["--corpus", "words.csv", *command])
