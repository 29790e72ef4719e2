"""The recipes of README.md, on small copies of the layout of each corpus.

File names, columns and encodings are those that the documentation of each corpus gives.
"""

import ast
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


def write_meld(root):
    header = (
        "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,"
    )
    header += "Episode,StartTime,EndTime"
    times = '"00:16:16,059","00:16:21,731"'
    files = {
        "train": [
            "1,also I was,Chandler,neutral,neutral,0,0,8,21",
            '2,"You, he said ""yes"".",The Interviewer,joy,positive,0,1,8,21',
            "3,No!,Chandler,anger,negative,10,1,1,2",
            "4,“Yes”…,Ross,sadness,negative,10,0,1,2",
            "5,Third,Ross,surprise,positive,2,0,2,3",
        ],
        "dev": ["1,Oh,Ross,fear,negative,0,0,9,7"],
        "test": ["1,Why,Ross,disgust,negative,0,0,5,1"],
    }
    root.mkdir(parents=True)
    for part, lines in files.items():
        text = "\n".join([header, *[f"{line},{times}" for line in lines]])
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
        # Left 1, 2, 3, and right 7, 7, 7.
        file.writeframes(b"\1\0\7\0\2\0\7\0\3\0\7\0")


def write_emodb(root):
    names = [f"{speaker:02}a01Nc" for speaker in (3, *range(8, 17))]
    names += ["03b01Wa", "08a05Fb", "16b10Td", "16b10La", "14a04Ea", "13b09Ac"]
    for name in names:
        write_wav(root / "wav" / f"{name}.wav", SOUND)


ESD_EMOTIONS = ["Neutral", "Angry", "Happy", "Sad", "Surprise"]
ESD_TEXTS = ["The nine the eggs, I keep.", "Don’t go…"]


def write_esd(root):
    encodings = {"0012": "utf-16", "0015": "utf-16-le", "0016": "cp1252"}
    for number in range(1, 21):
        speaker = f"{number:04}"
        lines = []
        for k, emotion in enumerate(ESD_EMOTIONS):
            name = f"{speaker}_{350 * k + 1:06}"
            lines.append(f"{name}\t{ESD_TEXTS[k % 2]}\t{emotion}\r\n")
            folder = root / speaker / emotion
            if speaker != "0016":
                folder = folder / "train"
            write_wav(folder / f"{name}.wav", SOUND)
        if speaker == "0013":
            lines[2] = lines[2].replace("\t", " ")
        content = "".join(lines).encode(encodings.get(speaker, "utf-8"))
        (root / speaker / f"{speaker}.txt").write_bytes(content)
    (root / "ReadMe.txt").write_text("about")


def write_nemo(root):
    people = {"EB0": "female", "KS0": "male", "IC0": "female", "MP0": "male"}
    people["SM0"] = "male"
    header = "file_id emotion raw_text normalized_text speaker_id gender age".split()
    lines = ["\t".join(header)]
    for speaker, sex in people.items():
        for emotion in ("anger", "neutral", "surprised"):
            name = f"{speaker}_{emotion}_64.wav"
            cells = [name, emotion, '"Ucho" wykrywa dźwięki.', "ucho", f"    {speaker}"]
            lines.append("\t".join([*cells, sex, "23"]))
            write_wav(root / "samples" / name, SOUND, 24000)
    (root / "data.tsv").write_text("\n".join(lines), encoding="utf-8")


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


def test_there_is_a_recipe_for_each_corpus():
    assert list(RECIPES) == list(WRITERS)
    assert README.count("# recipe: ") == len(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_needs_the_standard_library_alone(name):
    modules = set()
    for node in ast.walk(ast.parse(RECIPES[name])):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    assert "csv" in modules
    assert modules <= sys.stdlib_module_names


@pytest.mark.parametrize("name", RECIPES)
def test_the_reader_accepts_the_table(name, tables):
    rows, out = tables[name]
    assert list(rows[0]) == COLUMNS + (["id"] if name == "MELD" else ["wav"])
    assert {row["emotion"].lower() for row in rows} <= LABELS.keys() | OTHERS
    expected = []
    for row in rows:
        label = LABELS.get(row["emotion"].lower())
        session = int(row["session"])
        expected.append((row["text"], label, session, row["dialog"], row["speaker"]))
    corpus = data.read_csv(out)
    found = [(u.text, u.label, u.session, u.dialog, u.speaker) for u in corpus]
    assert Counter(found) == Counter(expected)
    # An acted utterance has no neighbours.
    if name != "MELD":
        assert len({u.dialog for u in corpus}) == len(rows)
        assert all(len(data.load_wav(u.wav)) > 0 for u in corpus)


@pytest.mark.parametrize(
    ("name", "sessions"),
    {
        "CREMA-D": ["1001 1006 1091", "1002", "", "", "1005"],
        "EmoDB": ["03 08", "09 10", "11 13", "12 14", "15 16"],
        "ESD": ["0011 0015", "0012 0016", "0013 0017", "0014 0018", "0019 0020"],
        "nEMO": ["EB0 KS0", "IC0 MP0", "SM0", "", ""],
    }.items(),
)
def test_each_speaker_is_in_one_session(name, sessions, tables):
    found = values(tables[name][0], "session", "speaker")
    expected = set()
    for session, speakers in enumerate(sessions, 1):
        expected |= {(str(session), speaker) for speaker in speakers.split()}
    assert set(found) == expected


@pytest.mark.parametrize("name", ["CREMA-D", "RAVDESS", "EmoDB"])
def test_a_wrong_folder_is_named(name, tmp_path):
    with pytest.raises(SystemExit, match="elsewhere"):
        run_recipe(name, tmp_path / "elsewhere", tmp_path / "corpus.csv")
    assert not (tmp_path / "corpus.csv").exists()


# --- Each recipe, against values that were written by hand ----------------------------


def test_meld(tables):
    rows, out = tables["MELD"]
    assert values(rows, "text", "emotion", "session", "speaker", "id") == [
        ("also I was", "neutral", "4", "Chandler (session 4)", "train_dia0_utt0"),
        ('You, he said "yes".', "joy", "4", "others (session 4)", "train_dia0_utt1"),
        ("Third", "surprise", "1", "Ross (session 1)", "train_dia2_utt0"),
        ("“Yes”…", "sadness", "1", "Ross (session 1)", "train_dia10_utt0"),
        ("No!", "anger", "1", "Chandler (session 1)", "train_dia10_utt1"),
        ("Oh", "fear", "5", "Ross (session 5)", "dev_dia0_utt0"),
        ("Why", "disgust", "3", "Ross (session 3)", "test_dia0_utt0"),
    ]
    corpus = data.read_csv(out)
    turns = [u.text for u in corpus if u.dialog == "train_dia10"]
    assert turns == ["“Yes”…", "No!"]


def test_crema_d(tables):
    rows, _ = tables["CREMA-D"]
    assert values(rows, "dialog", "text", "emotion") == [
        ("1001_DFA_ANG_XX", "Don't forget a jacket.", "angry"),
        ("1001_IEO_HAP_HI", "It's eleven o'clock.", "happy"),
        ("1002_TSI_NEU_XX", "The surface is slick.", "neutral"),
        ("1005_WSI_SAD_XX", "We'll stop in a couple of minutes.", "sad"),
        ("1006_MTI_DIS_XX", "Maybe tomorrow it will be cold.", "disgust"),
        ("1091_IOM_FEA_XX", "I'm on my way to the meeting.", "fear"),
    ]
    assert Path(rows[0]["wav"]).parts[-2:] == ("AudioWAV", "1001_DFA_ANG_XX.wav")


def test_ravdess(tables):
    rows, out = tables["RAVDESS"]
    assert len(rows) == 27  # no song
    of_12 = [row for row in rows if row["speaker"] == "actor 12"]
    assert values(of_12, "text", "emotion", "session") == [
        ("Dogs are sitting by the door.", "neutral", "1"),
        ("Kids are talking by the door.", "calm", "1"),
        ("Kids are talking by the door.", "angry", "1"),
        ("Dogs are sitting by the door.", "fearful", "1"),
    ]
    # A man and a woman each go to sessions 1, 2, 3, 4, 5, 1, 2, ...
    sessions = dict(values(rows, "speaker", "session"))
    found = [int(sessions[f"actor {actor:02}"]) for actor in range(1, 25)]
    assert found[0::2] == found[1::2] == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]
    # Of the stereo file there is a copy of the left channel, and of no other file.
    (copy,) = (out.parent / "mono").iterdir()
    assert out.parent / of_12[1]["wav"] == copy
    with wave.open(str(copy)) as file:
        assert file.getparams()[:4] == (1, 2, 48000, 3)
        assert file.readframes(3) == b"\1\0\2\0\3\0"


def test_emodb(tables):
    rows, _ = tables["EmoDB"]
    found = {row["dialog"]: (row["text"][:12], row["emotion"]) for row in rows}
    assert len(found) == 16
    assert found["03a01Nc"] == ("Der Lappen l", "neutral")
    assert found["03b01Wa"] == ("Was sind den", "anger")
    assert found["08a05Fb"] == ("Das schwarze", "happiness")
    assert found["16b10Td"] == ("Die wird auf", "sadness")
    assert found["16b10La"] == ("Die wird auf", "other")  # boredom
    assert found["14a04Ea"] == ("Heute abend ", "disgust")
    assert found["13b09Ac"] == ("Ich will das", "fear")


def test_esd(tables, tmp_path, capsys):
    rows, _ = tables["ESD"]
    expected = []
    for session in (("0011", "0015"), ("0012", "0016"), ("0013", "0017")):
        for speaker in session:
            for k, emotion in enumerate(ESD_EMOTIONS):
                expected.append(
                    (f"{speaker}_{350 * k + 1:06}", ESD_TEXTS[k % 2], emotion)
                )
    # One line of this speaker has no tabs.
    expected.remove(("0013_000701", ESD_TEXTS[0], "Happy"))
    assert values(rows, "dialog", "text", "emotion")[:29] == expected
    assert len(rows) == 49
    # An emotion in the path of the download is not a label.
    write_esd(tmp_path / "Happy")
    assert run_recipe("ESD", tmp_path / "Happy", tmp_path / "esd.csv")[0] != {}
    assert capsys.readouterr().out == "49 utterances, 1 left out without a transcript\n"


def test_nemo(tables):
    rows, _ = tables["nEMO"]
    of_ks0 = [row for row in rows if row["speaker"] == "KS0"]
    assert values(of_ks0, "dialog", "emotion", "text") == [
        ("KS0_anger_64", "anger", '"Ucho" wykrywa dźwięki.'),
        ("KS0_neutral_64", "neutral", '"Ucho" wykrywa dźwięki.'),
        ("KS0_surprised_64", "surprised", '"Ucho" wykrywa dźwięki.'),
    ]
