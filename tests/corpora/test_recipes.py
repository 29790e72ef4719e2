"""The recipes of README.md, on small copies of the layout of each corpus.

File names, columns and encodings are those that the documentation of each corpus gives.
"""

import csv
import re
import sys
import wave
from collections import Counter
from pathlib import Path

import pytest

import data
from tests.conftest import write_wav

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
PATTERN = r"```python\n(# recipe: (\S+)\nROOT = [^\n]+\nOUT = .+?)```"
RECIPES = {name: code for code, name in re.findall(PATTERN, README, re.S)}
LABELS = {"neutral": 0, "calm": 0, "happy": 1, "happiness": 1, "joy": 1}
LABELS |= {"angry": 2, "anger": 2, "sad": 3, "sadness": 3}
OTHERS = {"surprise", "surprised", "fear", "fearful", "disgust", "other"}
COLUMNS = ["text", "emotion", "session", "dialog", "speaker"]
SOUND = [0.1] * 50


def run_recipe(name, root, out):
    """Run a recipe with another ROOT and OUT. Returns the rows of its table."""
    code = RECIPES[name]
    for variable, path in (("ROOT", root), ("OUT", out)):
        line = f"{variable} = {str(path)!r}"
        code = re.sub(rf"(?m)^{variable} = .*$", lambda _, line=line: line, code)
    exec(compile(code, f"recipe of {name}", "exec"), {})
    with open(out, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def values(rows, *names):
    return [tuple(row[name] for name in names) for row in rows]


# --- Small copies of the downloads ----------------------------------------------------


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


def write_meld(root):
    root.mkdir(parents=True)
    header, *lines = MELD.splitlines()
    for part in ("train", "dev", "test"):
        rows = [line.removeprefix(f"{part} ") for line in lines if part in line[:6]]
        rows = [f'{row},"00:16:16,059","00:16:21,731"' for row in rows]
        text = "\n".join([header, *rows])
        (root / f"{part}_sent_emo.csv").write_text(text, encoding="utf-8")


def write_crema(root):
    names = "1001_DFA_ANG_XX 1001_IEO_HAP_HI 1002_TSI_NEU_XX 1005_WSI_SAD_XX "
    names += "1006_MTI_DIS_XX 1091_IOM_FEA_XX 1076_MTI_NEU_XX"
    for name in names.split():
        write_wav(root / "AudioWAV" / f"{name}.wav", SOUND)
    # macOS leaves such files.
    (root / "AudioWAV" / "._1001_DFA_ANG_XX.wav").write_bytes(b"\0\5\x16\7")


def write_ravdess(root):
    names = [f"03-01-05-01-01-01-{actor:02}" for actor in range(1, 25)]
    names += ["03-01-06-01-02-01-12", "03-01-01-01-02-02-12"]
    names += ["03-02-02-01-01-01-12"]  # a song
    for name in names:
        write_wav(root / f"Actor_{name[-2:]}" / f"{name}.wav", SOUND, 48000)
    with wave.open(str(root / "Actor_12" / "03-01-02-01-01-02-12.wav"), "wb") as file:
        file.setparams((2, 2, 48000, 3, "NONE", ""))
        file.writeframes(b"\1\0\7\0\2\0\7\0\3\0\7\0")  # left 1, 2, 3 and right 7


def write_emodb(root):
    names = [f"{speaker:02}a01Nc" for speaker in (3, *range(8, 17))]
    names += ["03b01Wa", "08a05Fb", "16b10Td", "16b10La", "14a04Ea", "13b09Ac"]
    for name in names:
        write_wav(root / "wav" / f"{name}.wav", SOUND)


ESD_EMOTIONS = ["Neutral", "Angry", "Happy", "Sad", "Surprise"]
ESD_TEXTS = ["The nine the eggs, I keep.", "Don’t go…"]


def write_esd(root):
    encodings = {"0012": "utf-16", "0015": "utf-16-le", "0016": "cp1252"}
    for speaker in [f"{number:04}" for number in range(1, 21)]:
        lines = []
        for k, emotion in enumerate(ESD_EMOTIONS):
            name = f"{speaker}_{350 * k + 1:06}"
            lines.append(f"{name}\t{ESD_TEXTS[k % 2]}\t{emotion}\r\n")
            train = "" if speaker == "0016" else "train"
            write_wav(root / speaker / emotion / train / f"{name}.wav", SOUND)
        if speaker == "0013":
            lines[2] = lines[2].replace("\t", " ")
        content = "".join(lines).encode(encodings.get(speaker, "utf-8"))
        (root / speaker / f"{speaker}.txt").write_bytes(content)
    (root / "ReadMe.txt").write_text("about")


def write_nemo(root):
    text = "file_id emotion raw_text normalized_text speaker_id gender age\n"
    text = text.replace(" ", "\t")
    for speaker in ("EB0", "KS0", "IC0", "MP0", "SM0"):
        sex = "female" if speaker in ("EB0", "IC0") else "male"
        for emotion in ("anger", "neutral", "surprised"):
            name = f"{speaker}_{emotion}_64.wav"
            text += f'{name}\t{emotion}\t"Ucho" wykrywa dźwięki.\tucho\t    {speaker}'
            text += f"\t{sex}\t23\n"
            write_wav(root / "samples" / name, SOUND, 24000)
    (root / "data.tsv").write_text(text, encoding="utf-8")


WRITERS = {
    "MELD": write_meld,
    "CREMA-D": write_crema,
    "RAVDESS": write_ravdess,
    "EmoDB": write_emodb,
    "ESD": write_esd,
    "nEMO": write_nemo,
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Rows and path of each table, by corpus. Tables and downloads have two folders."""
    home = tmp_path_factory.mktemp("corpora")
    found = {}
    for name, write in WRITERS.items():
        out = home / "tables" / name / "corpus.csv"
        out.parent.mkdir(parents=True)
        write(home / "downloads" / name)
        found[name] = run_recipe(name, home / "downloads" / name, out), out
    return found


# --- What every recipe does -----------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_the_reader_accepts_the_table(name, tables):
    rows, out = tables[name]
    assert list(rows[0]) == COLUMNS + (["id"] if name == "MELD" else ["wav"])
    expected = []
    for row in rows:
        emotion = row["emotion"].lower()
        assert emotion in LABELS.keys() | OTHERS
        cells = values([row], "text", "session", "dialog", "speaker")[0]
        expected.append((*cells, LABELS.get(emotion)))
    corpus = data.read_csv(out)
    found = [(u.text, str(u.session), u.dialog, u.speaker, u.label) for u in corpus]
    assert Counter(found) == Counter(expected)
    # An acted utterance has no neighbours.
    if name != "MELD":
        assert len({u.dialog for u in corpus}) == len(rows)
        assert all(len(data.load_wav(u.wav)) > 0 for u in corpus)
    # A recipe needs the standard library alone.
    modules = re.findall(r"^ *(?:import|from) (\w+)", RECIPES[name], re.M)
    assert "csv" in modules and set(modules) <= sys.stdlib_module_names


def test_there_is_a_recipe_for_each_corpus_and_it_names_a_wrong_folder(tmp_path):
    assert list(RECIPES) == list(WRITERS)
    assert README.count("# recipe: ") == len(RECIPES)
    for name in ("CREMA-D", "RAVDESS", "EmoDB"):
        with pytest.raises(SystemExit, match="elsewhere"):
            run_recipe(name, tmp_path / "elsewhere", tmp_path / "corpus.csv")
    assert not (tmp_path / "corpus.csv").exists()


# --- Each recipe, against values that were written by hand ----------------------------

SESSIONS = {
    "CREMA-D": ["1001 1006 1091", "1002", "", "", "1005"],
    "EmoDB": ["03 08", "09 10", "11 13", "12 14", "15 16"],
    "ESD": ["0011 0015", "0012 0016", "0013 0017", "0014 0018", "0019 0020"],
    "nEMO": ["EB0 KS0", "IC0 MP0", "SM0", "", ""],
}
TEXTS = {
    "MELD": """
        train_dia0_utt0 | neutral | also I was
        train_dia0_utt1 | joy | You, he said "yes".
        train_dia2_utt0 | surprise | Third
        train_dia10_utt0 | sadness | “Yes”…
        train_dia10_utt1 | anger | No!
        dev_dia0_utt0 | fear | Oh
        test_dia0_utt0 | disgust | Why""",
    "CREMA-D": """
        1001_DFA_ANG_XX | angry | Don't forget a jacket.
        1001_IEO_HAP_HI | happy | It's eleven o'clock.
        1002_TSI_NEU_XX | neutral | The surface is slick.
        1005_WSI_SAD_XX | sad | We'll stop in a couple of minutes.
        1006_MTI_DIS_XX | disgust | Maybe tomorrow it will be cold.
        1091_IOM_FEA_XX | fear | I'm on my way to the meeting.""",
    "RAVDESS": """
        03-01-01-01-02-02-12 | neutral | Dogs are sitting by the door.
        03-01-02-01-01-02-12 | calm | Kids are talking by the door.
        03-01-05-01-01-01-12 | angry | Kids are talking by the door.
        03-01-06-01-02-01-12 | fearful | Dogs are sitting by the door.""",
    "EmoDB": """
        03a01Nc | neutral | Der Lappen l
        03b01Wa | anger | Was sind den
        08a05Fb | happiness | Das schwarze
        16b10Td | sadness | Die wird auf
        16b10La | other | Die wird auf
        14a04Ea | disgust | Heute abend
        13b09Ac | fear | Ich will das""",
    "nEMO": """
        KS0_anger_64 | anger | "Ucho" wykrywa dźwięki.
        KS0_neutral_64 | neutral | "Ucho" wykrywa dźwięki.
        KS0_surprised_64 | surprised | "Ucho" wykrywa dźwięki.""",
}


@pytest.mark.parametrize("name", SESSIONS)
def test_each_speaker_is_in_one_session(name, tables):
    expected = set()
    for session, speakers in enumerate(SESSIONS[name], 1):
        expected |= {(str(session), speaker) for speaker in speakers.split()}
    assert set(values(tables[name][0], "session", "speaker")) == expected


@pytest.mark.parametrize("name", TEXTS)
def test_emotions_and_texts_are_those_of_the_documentation(name, tables):
    column = "id" if name == "MELD" else "dialog"
    rows = {row[column]: row for row in tables[name][0]}
    for line in TEXTS[name].strip().splitlines():
        utterance, emotion, text = line.strip().split(" | ")
        row = rows[utterance]
        assert row["emotion"] == emotion
        assert row["text"] == text or (name == "EmoDB" and row["text"].startswith(text))
    counts = {"MELD": 7, "CREMA-D": 6, "RAVDESS": 27, "EmoDB": 16, "nEMO": 15}
    assert len(rows) == len(tables[name][0]) == counts[name]


def test_meld_has_sessions_by_season_and_turns_in_order(tables):
    rows, out = tables["MELD"]
    leads = [("4", "Chandler (session 4)"), ("4", "others (session 4)")]
    leads += [("1", "Ross (session 1)"), ("1", "Ross (session 1)")]
    leads += [("1", "Chandler (session 1)"), ("5", "Ross (session 5)")]
    assert values(rows, "session", "speaker") == [*leads, ("3", "Ross (session 3)")]
    turns = [u.text for u in data.read_csv(out) if u.dialog == "train_dia10"]
    assert turns == ["“Yes”…", "No!"]


def test_ravdess_pairs_a_man_and_a_woman_and_copies_stereo_files(tables):
    rows, out = tables["RAVDESS"]
    sessions = dict(values(rows, "speaker", "session"))
    found = [int(sessions[f"actor {actor:02}"]) for actor in range(1, 25)]
    assert found[0::2] == found[1::2] == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]
    # Of the stereo file there is a copy of the left channel, and of no other file.
    (copy,) = (out.parent / "mono").iterdir()
    (calm,) = [row for row in rows if row["emotion"] == "calm"]
    assert out.parent / calm["wav"] == copy
    with wave.open(str(copy)) as file:
        assert file.getparams()[:4] == (1, 2, 48000, 3)
        assert file.readframes(3) == b"\1\0\2\0\3\0"


def test_esd_reads_every_encoding_and_takes_no_label_from_a_path(
    tables, tmp_path, capsys
):
    expected = []
    for speaker in range(11, 21):
        for k, emotion in enumerate(ESD_EMOTIONS):
            name = f"{speaker:04}_{350 * k + 1:06}"
            expected.append((name, ESD_TEXTS[k % 2], emotion))
    # One line of this speaker has no tabs.
    expected.remove(("0013_000701", ESD_TEXTS[0], "Happy"))
    found = values(tables["ESD"][0], "dialog", "text", "emotion")
    assert sorted(found) == sorted(expected)
    write_esd(tmp_path / "Happy")
    rows = run_recipe("ESD", tmp_path / "Happy", tmp_path / "esd.csv")
    assert values(rows, "dialog", "text", "emotion") == found
    assert capsys.readouterr().out == "49 utterances, 1 left out without a transcript\n"
