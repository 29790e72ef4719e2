"""The recipes of README.md, on small copies of the layout of each corpus.

File names, columns and encodings are those that the documentation of each corpus gives.
"""

import csv
import re
import sys
import wave
from pathlib import Path

import pytest

import data
from tests.conftest import write_wav

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"```python\n# recipe: (\S+)\n(.+?)```", README, re.S))
assert README.count("# recipe: ") == len(RECIPES) == 6


@pytest.fixture
def root(tmp_path):
    """The folder of the download, which is named like an emotion."""
    (tmp_path / "Happy").mkdir()
    return tmp_path / "Happy"


def write_wavs(folder, names, rate=16000):
    for name in names.split():
        write_wav(folder / f"{name}.wav", [0.1] * 50, rate)


def run_recipe(name, root):
    """Run a recipe. Returns its table, which is in another folder."""
    path = root.parent / "tables" / "corpus.csv"
    path.parent.mkdir()
    code = re.sub(r"(?m)^(ROOT|OUT) = .*$", "", RECIPES[name])
    exec(compile(code, name, "exec"), {"ROOT": str(root), "OUT": str(path)})
    return path


def check(name, root, n_rows, n_labels, lines):
    """Run a recipe, and look for some lines: (dialogue, session, speaker, ..., text).

    The reader accepts the table. Returns the corpus.
    """
    path = run_recipe(name, root)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    key = "id" if name == "MELD" else "dialog"
    columns = (key, "session", "speaker", "emotion", "text")
    found = [" | ".join(row[column] for column in columns) for row in rows]
    assert {line.strip() for line in lines.strip().splitlines()} <= set(found)
    corpus = data.read_csv(path)
    labels = [u.label for u in corpus if u.label is not None]
    assert len({row[key] for row in rows}) == len(corpus) == n_rows
    assert len(labels) == n_labels
    assert all(len(data.load_wav(u.wav)) > 0 for u in corpus if u.wav)
    # A recipe needs the standard library alone.
    modules = re.findall(r"^ *(?:import|from) (\w+)", RECIPES[name], re.M)
    assert "csv" in modules and set(modules) <= sys.stdlib_module_names
    return corpus


MELD = """Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,\
Episode,StartTime,EndTime
train 1,also I was,Chandler,neutral,neutral,0,0,8,21
train 2,"You, he said ""yes"".",The Interviewer,joy,positive,0,1,8,21
train 3,No!,Chandler,anger,negative,10,1,1,2
train 4,“Yes”…,Ross,sadness,negative,10,0,1,2
train 5,Third,Ross,surprise,positive,2,0,2,3
dev 1,Oh,Ross,fear,negative,0,0,9,7
test 1,Why,Ross,disgust,negative,0,0,5,1
"""


def test_meld_has_the_turns_of_a_dialogue_in_order(root):
    header, *lines = MELD.splitlines()
    for part in ("train", "dev", "test"):
        rows = [line for line in lines if line.startswith(part)]
        rows = [f'{row},"00:16:16,059","00:16:21,731"' for row in rows]
        text = "\n".join([header, *rows])
        (root / f"{part}_sent_emo.csv").write_text(text, encoding="utf-8")
    lines = """
        train_dia0_utt0 | 4 | Chandler (session 4) | neutral | also I was
        train_dia0_utt1 | 4 | others (session 4) | joy | You, he said "yes".
        train_dia10_utt0 | 1 | Ross (session 1) | sadness | “Yes”…
        dev_dia0_utt0 | 5 | Ross (session 5) | fear | Oh
        test_dia0_utt0 | 3 | Ross (session 3) | disgust | Why"""
    corpus = check("MELD", root, 7, 4, lines)
    turns = [u.text for u in corpus if u.dialog == "train_dia10"]
    assert turns == ["“Yes”…", "No!"]


def test_crema_d_leaves_out_its_broken_file(root):
    names = "1001_DFA_ANG_XX 1001_IEO_HAP_HI 1002_TSI_NEU_XX 1005_WSI_SAD_XX "
    names += "1006_MTI_DIS_XX 1091_IOM_FEA_XX 1076_MTI_NEU_XX"
    write_wavs(root / "AudioWAV", names)
    # macOS leaves such files.
    (root / "AudioWAV" / "._1001_DFA_ANG_XX.wav").write_bytes(b"\0\5\x16\7")
    lines = """
        1001_DFA_ANG_XX | 1 | 1001 | angry | Don't forget a jacket.
        1001_IEO_HAP_HI | 1 | 1001 | happy | It's eleven o'clock.
        1002_TSI_NEU_XX | 2 | 1002 | neutral | The surface is slick.
        1005_WSI_SAD_XX | 5 | 1005 | sad | We'll stop in a couple of minutes."""
    check("CREMA-D", root, 6, 4, lines)


def test_ravdess_copies_the_left_channel_of_a_stereo_file_and_no_other_file(root):
    for actor in range(1, 25):
        write_wavs(root / f"Actor_{actor:02}", f"03-01-05-01-01-01-{actor:02}", 48000)
    # The last one is a song.
    names = "03-01-06-01-02-01-12 03-01-01-01-02-02-12 03-02-02-01-01-01-12"
    write_wavs(root / "Actor_12", names, 48000)
    with wave.open(str(root / "Actor_12" / "03-01-02-01-01-02-12.wav"), "wb") as file:
        file.setparams((2, 2, 48000, 3, "NONE", ""))
        file.writeframes(b"\1\0\7\0\2\0\7\0\3\0\7\0")  # left 1, 2, 3 and right 7
    lines = """
        03-01-01-01-02-02-12 | 1 | actor 12 | neutral | Dogs are sitting by the door.
        03-01-02-01-01-02-12 | 1 | actor 12 | calm | Kids are talking by the door.
        03-01-05-01-01-01-03 | 2 | actor 03 | angry | Kids are talking by the door.
        03-01-05-01-01-01-10 | 5 | actor 10 | angry | Kids are talking by the door.
        03-01-05-01-01-01-11 | 1 | actor 11 | angry | Kids are talking by the door."""
    corpus = check("RAVDESS", root, 27, 26, lines)
    (copy,) = (root.parent / "tables" / "mono").iterdir()
    assert [u.emotion for u in corpus if u.wav == copy] == ["calm"]
    with wave.open(str(copy)) as file:
        assert file.getparams()[:4] == (1, 2, 48000, 3)
        assert file.readframes(3) == b"\1\0\2\0\3\0"


def test_emodb(root):
    names = "03a01Nc 08a01Nc 09a01Nc 10a01Nc 11a01Nc 12a01Nc 13a01Nc 14a01Nc 15a01Nc "
    names += "16a01Nc 03b01Wa 08a02Fb 16a02Td 16a02La 14a04Ea 13a07Ac"
    write_wavs(root / "wav", names)
    lines = """
        03a01Nc | 1 | 03 | neutral | Der Lappen liegt auf dem Eisschrank.
        09a01Nc | 2 | 09 | neutral | Der Lappen liegt auf dem Eisschrank.
        08a02Fb | 1 | 08 | happiness | Das will sie am Mittwoch abgeben.
        16a02Td | 5 | 16 | sadness | Das will sie am Mittwoch abgeben.
        16a02La | 5 | 16 | other | Das will sie am Mittwoch abgeben."""
    check("EmoDB", root, 16, 13, lines)


def test_esd_leaves_out_a_line_without_tabs_and_says_so(root, capsys):
    encodings = {"0012": "utf-16", "0015": "utf-16-le", "0016": "cp1252"}
    for speaker in [f"{number:04}" for number in range(10, 21)]:
        lines = ""
        for k, emotion in enumerate(["Neutral", "Angry", "Happy", "Sad", "Surprise"]):
            name = f"{speaker}_{350 * k + 1:06}"
            tab = " " if name == "0013_000701" else "\t"
            lines += f"{name}{tab}Don’t go, {k}…{tab}{emotion}\r\n"
            train = "" if speaker == "0016" else "train"
            write_wavs(root / speaker / emotion / train, name)
        content = lines.encode(encodings.get(speaker, "utf-8"))
        (root / speaker / f"{speaker}.txt").write_bytes(content)
    lines = """
        0011_000001 | 1 | 0011 | Neutral | Don’t go, 0…
        0012_000351 | 2 | 0012 | Angry | Don’t go, 1…
        0015_000701 | 1 | 0015 | Happy | Don’t go, 2…
        0016_001051 | 2 | 0016 | Sad | Don’t go, 3…"""
    check("ESD", root, 49, 39, lines)
    assert capsys.readouterr().out == "49 utterances, 1 left out without a transcript\n"


def test_nemo(root):
    table = "file_id\temotion\traw_text\tnormalized_text\tspeaker_id\tgender\tage\n"
    for speaker in ("EB0", "KS0", "IC0", "MP0", "SM0"):
        sex = "female" if speaker in ("EB0", "IC0") else "male"
        for emotion in ("anger", "neutral", "surprised"):
            name = f"{speaker}_{emotion}_64"
            write_wavs(root / "samples", name, 24000)
            text = '"Ucho" wykrywa dźwięki.\tucho'
            table += f"{name}.wav\t{emotion}\t{text}\t    {speaker}\t{sex}\t23\n"
    (root / "data.tsv").write_text(table, encoding="utf-8")
    lines = """
        IC0_neutral_64 | 2 | IC0 | neutral | "Ucho" wykrywa dźwięki.
        SM0_anger_64 | 3 | SM0 | anger | "Ucho" wykrywa dźwięki."""
    check("nEMO", root, 15, 10, lines)


@pytest.mark.parametrize("name", ["CREMA-D", "RAVDESS", "EmoDB"])
def test_a_recipe_names_a_wrong_folder(name, root):
    with pytest.raises(SystemExit, match="Happy"):
        run_recipe(name, root)
