"""Bad corpora and tables: each is an error that names the place, or harmless.

The reader of IEMOCAP leaves a damaged dialogue out, with one line about it. The reader
of tables refuses the table, with one line for each bad row.
"""

import re
import struct

import pytest

import data
import train
from data import InputError
from tests.conftest import change, write_dialog, write_wav
from tests.robust.conftest import mutations

# --- One damaged dialogue beside a good one -------------------------------------------


@pytest.fixture
def dialog(tmp_path):
    """Write two dialogues. Returns the files of the first, which a test may damage."""
    turns = [("F000", 0, 1, "neu", "hm"), ("M000", 2, 2.1, "sad", "so")]
    for name in ("Ses01F_impro01", "Ses02F_impro01"):
        write_dialog(tmp_path, name, turns)
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
        ("labels", b"[0.0000 - 1.0", b"[0.0000 - 0.89", "_F000.wav lasts 1.00 s"),
        ("labels", b"[0.0000 - 1.0", b"[0.0000 - 1.11", "_F000.wav lasts 1.00 s"),
        ("labels", b"impro01_F000", b"impro01_F009", "_F009"),
        ("labels", b"01_M000", b"01_F000", "_F000 is a duplicate"),
        ("words", b"impro01_F000", b"impro01_FXX0", "_F000"),
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
@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html>\n", "[0 - 1]: hm\n".encode("utf-16"), None]
)
def test_another_file_or_a_folder_in_the_place_of_one(file, content, dialog, tmp_path):
    dialog[file].unlink()
    assert_left_out(tmp_path, dialog[file])
    if content is None:
        dialog[file].mkdir()
    else:
        dialog[file].write_bytes(content)
    assert_left_out(tmp_path, dialog[file])


# Where the header of a WAV file has a number, in which form, and another number.
HEADERS = {
    "RIFF size left open": (4, "<I", 0),
    "a chunk too long": (16, "<I", 40000),
    "float": (20, "<H", 3),
    "stereo": (22, "<H", 2),
    "0 Hz": (24, "<I", 0),
    "11024 Hz": (24, "<I", 11024),
    "1 GHz": (24, "<I", 2**30 + 16000),
    "24 bits": (34, "<H", 24),
    "no samples": (40, "<I", 0),
    "data size left open": (40, "<I", 2**32 - 1),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_another_kind_of_recording_is_refused(kind, dialog, tmp_path, monkeypatch):
    # Resampling from an unusual rate takes minutes.
    monkeypatch.setattr("torchaudio.functional.resample", None)
    offset, form, number = HEADERS[kind]
    content = bytearray(dialog["wav"].read_bytes())
    struct.pack_into(form, content, offset, number)
    dialog["wav"].write_bytes(content)
    assert_left_out(tmp_path, dialog["wav"], "ffmpeg -i OLD.wav -ac 1 -ar 16000")


def test_lines_of_another_dialogue_leave_it_out(dialog, tmp_path):
    for file in ("labels", "words"):
        change(dialog[file], b"Ses01F_impro01_F", b"Ses01F_impro02_F")
    assert_left_out(tmp_path, dialog["labels"], "impro02_F000 belongs to another")


def test_each_damaged_dialogue_or_session_has_a_line(dialog, tmp_path):
    """A folder without any session has one line too, whatever the flags are."""
    dialog["labels"].write_text("")
    dialog["words"].write_text("")
    (tmp_path / "Session2").rename(tmp_path / "Session3")
    (tmp_path / "Session4" / "dialog" / "EmoEvaluation").mkdir(parents=True)
    corpus, problems = data.read_iemocap(tmp_path)
    assert corpus == [] and len(problems) == 3
    assert str(dialog["labels"]) in problems[0]
    assert "Ses02F_impro01_F000 belongs to another" in problems[1]
    assert "Session4" in problems[2] and "No such file" in problems[2]
    for wrong in (tmp_path / "Session1", dialog["labels"], tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"^{wrong}: no Session1, "):
            train.main(["--iemocap", str(wrong), "--partial"])


def test_unusual_recordings_and_words_are_read(dialog, tmp_path, tiny):
    """Silence, two scripts, and no words."""
    write_wav(dialog["wav"].with_name("Ses01F_impro01_M000.wav"), [0] * 1600)
    change(dialog["words"], b"hm", "żółć 感情".encode())
    change(dialog["words"], b" so", b"")
    corpus, problems = data.read_iemocap(tmp_path)
    assert [u.text for u in corpus] == ["żółć 感情", "", "hm", "so"]
    assert problems == []
    silence = data.clip(data.load_wav(corpus[1].wav))
    (states,) = tiny["audio"]([tiny["audio"].prepare(silence)])
    assert len(silence) == 1600 and states.isfinite().all()


@pytest.mark.parametrize("file", ["labels", "words", "wav"])
def test_a_mutated_file_is_read_whole_or_its_dialogue_is_left_out(
    file, dialog, tmp_path
):
    """A mutation raises no other error, and changes no more than its own dialogue."""
    clean, _ = data.read_iemocap(tmp_path)
    n_damaged = 0
    for _ in mutations(dialog[file], 40):
        corpus, problems = data.read_iemocap(tmp_path)
        assert corpus[-2:] == clean[2:] and len(problems) <= 1
        if problems:
            n_damaged += 1
            assert len(corpus) == 2
        else:
            assert [u.id for u in corpus] == [u.id for u in clean]
            x = data.clip(data.load_wav(dialog["wav"]))
            assert x.isfinite().all() and 400 <= len(x) <= 80000
    assert n_damaged > 5


# --- Tables ---------------------------------------------------------------------------

HEADER = "text,emotion,session,dialog,speaker"
GOOD = "hm,sad,1,a,x\n"
TABLES = [
    # columns and cells
    (GOOD, "line 1 .*columns"),
    (f"{HEADER},age\nhm,sad,1,a,x,30", "line 1 .*columns"),
    (f"{HEADER},text\nhm,sad,1,a,x,oh", "line 1 .*columns"),
    (f"{HEADER}\nhm,sad,1,a", "line 2: .*cells"),
    (f"{HEADER}\noh, no,sad,1,a,x", "line 2: .*cells"),
    # quotes
    (f'{HEADER}\n{GOOD}"well,sad,1,a,x\n{GOOD}bye",sad,1,a,x\n', "line 3: .*quotes"),
    (f'{HEADER}\n"hm"s,sad,1,a,x', "line 2: .*quotes"),
    # values
    (f"{HEADER}\n{GOOD}\n\nhm,,1,a,x", "line 5: .*emotion"),
    (f"{HEADER}\nhm,sad,0,a,x", "line 2: session is '0' instead of a number"),
    (f"{HEADER}\nhm,sad,1.0,a,x", "line 2: session is '1.0' instead of a number"),
    (f"{HEADER}\nhm,sad,1,a\0,x", r"line 2: dialog is 'a\\x00' instead of a name"),
    (f'{HEADER}\nhm,sad,1,a,x"', "line 2: speaker is 'x\"' instead of a name"),
    (f"{HEADER}\n{'x' * 200_000},sad,1,a,x", "line 2: field larger than field limit"),
    (f"{HEADER},start\nhm,sad,1,a,x,1:30", "line 2: start is '1:30'"),
    (f"{HEADER},wav\nhm,sad,1,a,x,no.wav", "line 2: .*no.wav"),
    (f"{HEADER},wav\nhm,sad,1,a,x,.", "line 2: there is no file"),
    (f"{HEADER},wav\nhm,sad,1,a,x,{'a sentence ' * 50}", "line 2: .*name too long"),
    # what lines and sessions share
    (f"{HEADER},wav\n,sad,1,a,x,t.csv\n,sad,1,a,x,t.csv", "t.csv: .*line 2 .*line 3"),
    (f"{HEADER},id\nhm,sad,1,a,x,a_7\noh,sad,1,a,x,7", "a_7: .*line 2 .*line 3"),
    (f"{HEADER},id\nhm,sad,1,a,x,1_2\noh,sad,1,a,x,1-2", "line 3: .*a_1-2"),
    (f"{HEADER}\n{GOOD}hm,sad,2,b,x", "line 3: .*speaker x"),
    (f"{HEADER}\n{GOOD}hm,sad,2,a,y", "line 3: .*dialogue a"),
    # another encoding
    (f"{HEADER}\nné,sad,1,a,x".encode("latin-1"), "UTF-8"),
]


@pytest.mark.parametrize("content, expected", TABLES, ids=[row[1] for row in TABLES])
def test_a_bad_table_is_an_error_with_the_line(content, expected, tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as problem:
        data.read_csv(path)
    message = str(problem.value)
    assert re.search(expected, message, re.IGNORECASE)
    assert str(path) in message and "\n" not in message and len(message) < 1000


def test_all_problems_of_a_table_come_at_once(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(f"{HEADER}\nhm,,1,a,x\n{GOOD}hm,sad,0,a,x\nhm,sad,2,a,y\nhm,sad\n")
    with pytest.raises(InputError) as problem:
        data.read_csv(path)
    for line, number in zip(str(problem.value).split("\n"), (2, 4, 5, 6), strict=True):
        assert line.startswith(f"{path}, line {number}: ")


def test_a_table_without_recordings_trains_and_needs_every_class(tmp_path, capsys):
    table = f"{HEADER}\n"
    for session in (1, 2):
        for number, emotion in enumerate(["neutral", "joy", "angry", "sad"] * 2):
            table += f"hm,{emotion},{session},d{session},s{session}{number}\n"
    path = tmp_path / "mine.csv"
    path.write_text(table.replace("joy", "难过"), encoding="utf-8")
    flags = ["--corpus", str(path), "--fold", "2", "--out", str(tmp_path / "runs")]
    flags += ["--cache", str(tmp_path), "--device", "cpu", "--fusion", "text-fc"]
    with pytest.raises(InputError, match="a class has no .*'happiness', 'joy'"):
        train.main(flags)
    assert "neu 4, hap 0, ang 4, sad 4" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    path.write_text(table)
    train.main([*flags, "--upstream", "tiny", "--max-epochs", "1"])
    assert "mine, upstream=tiny, max_epochs=1: WA" in capsys.readouterr().out
