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
RECIPES = dict(re.findall(r"```python\n# recipe: (\S+)\n(.+?)```", README, re.S))
FOUR = {"neutral": 0, "calm": 0, "happy": 1, "happiness": 1, "joy": 1}
FOUR |= {"angry": 2, "anger": 2, "sad": 3, "sadness": 3}
SOUND = [0.1] * 50


def run_recipe(name, root, out):
    """Run a recipe with another ROOT and OUT. Returns the rows of its table."""
    code = re.sub(r"(?m)^(ROOT|OUT) = .*$", "", RECIPES[name])
    exec(compile(code, f"recipe of {name}", "exec"), {"ROOT": root, "OUT": out})
    with open(out, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


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
        rows = [line for line in lines if line.startswith(part)]
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
    names = "03a01Nc 08a01Nc 09a01Nc 10a01Nc 11a01Nc 12a01Nc 13a01Nc 14a01Nc 15a01Nc "
    names += "16a01Nc 03b01Wa 08b10Fb 16b10Td 16b10La 14a04Ea 13a07Ac"
    for name in names.split():
        write_wav(root / "wav" / f"{name}.wav", SOUND)


def write_esd(root):
    encodings = {"0012": "utf-16", "0015": "utf-16-le", "0016": "cp1252"}
    for speaker in [f"{number:04}" for number in range(1, 21)]:
        lines = []
        for k, emotion in enumerate(["Neutral", "Angry", "Happy", "Sad", "Surprise"]):
            name = f"{speaker}_{350 * k + 1:06}"
            lines.append(f"{name}\tDon’t go, {k}…\t{emotion}\r\n")
            train = "" if speaker == "0016" else "train"
            write_wav(root / speaker / emotion / train / f"{name}.wav", SOUND)
        if speaker == "0013":
            lines[2] = lines[2].replace("\t", " ")
        content = "".join(lines).encode(encodings.get(speaker, "utf-8"))
        (root / speaker / f"{speaker}.txt").write_bytes(content)
    (root / "ReadMe.txt").write_text("about")


def write_nemo(root):
    lines = ["file_id emotion raw_text normalized_text speaker_id gender age".split()]
    for speaker in ("EB0", "KS0", "IC0", "MP0", "SM0"):
        sex = "female" if speaker in ("EB0", "IC0") else "male"
        for emotion in ("anger", "neutral", "surprised"):
            wav = f"{speaker}_{emotion}_64.wav"
            text = '"Ucho" wykrywa dźwięki.'
            lines.append([wav, emotion, text, "ucho", f"    {speaker}", sex, "23"])
            write_wav(root / "samples" / wav, SOUND, 24000)
    table = "\n".join("\t".join(line) for line in lines)
    (root / "data.tsv").write_text(table, encoding="utf-8")


WRITERS = {
    "MELD": write_meld,
    "CREMA-D": write_crema,
    "RAVDESS": write_ravdess,
    "EmoDB": write_emodb,
    "ESD": write_esd,
    "nEMO": write_nemo,
}
# By corpus: the speakers of sessions 1 to 5.
SPEAKERS = {
    "MELD": ["Chandler Ross", "", "Ross", "Chandler others", "Ross"],
    "CREMA-D": ["1001 1006 1091", "1002", "", "", "1005"],
    "EmoDB": ["03 08", "09 10", "11 13", "12 14", "15 16"],
    "ESD": ["0011 0015", "0012 0016", "0013 0017", "0014 0018", "0019 0020"],
    "nEMO": ["EB0 KS0", "IC0 MP0", "SM0", "", ""],
}
RAVDESS = ["01 02 11 12 21 22", "03 04 13 14 23 24", "05 06 15 16", "07 08 17 18"]
SPEAKERS["RAVDESS"] = [*RAVDESS, "09 10 19 20"]
# One line of ESD has no tabs, and one file of CREMA-D is broken.
COUNTS = {"MELD": 7, "CREMA-D": 6, "RAVDESS": 27, "EmoDB": 16, "ESD": 49, "nEMO": 15}
ROWS = {
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
        03a01Nc | neutral | Der Lappen liegt auf dem Eisschrank.
        03b01Wa | anger | Was sind denn das für Tüten, die da unter dem Tisch stehen?
        08b10Fb | happiness | Die wird auf dem Platz sein, wo wir sie immer hinlegen.
        16b10Td | sadness | Die wird auf dem Platz sein, wo wir sie immer hinlegen.
        16b10La | other | Die wird auf dem Platz sein, wo wir sie immer hinlegen.
        14a04Ea | disgust | Heute abend könnte ich es ihm sagen.
        13a07Ac | fear | In sieben Stunden wird es soweit sein.""",
    "ESD": """
        0011_000001 | Neutral | Don’t go, 0…
        0012_000351 | Angry | Don’t go, 1…
        0015_000701 | Happy | Don’t go, 2…
        0016_001051 | Sad | Don’t go, 3…
        0013_001401 | Surprise | Don’t go, 4…""",
    "nEMO": """
        KS0_anger_64 | anger | "Ucho" wykrywa dźwięki.
        KS0_neutral_64 | neutral | "Ucho" wykrywa dźwięki.
        KS0_surprised_64 | surprised | "Ucho" wykrywa dźwięki.""",
}


@pytest.fixture
def make_table(tmp_path):
    """A function that runs a recipe: the rows of the table, and its path."""

    def make_table(name):
        # The download is in a folder of that name, and the table is in another one.
        WRITERS[name](tmp_path / "Happy")
        out = tmp_path / "tables" / "corpus.csv"
        out.parent.mkdir()
        return run_recipe(name, str(tmp_path / "Happy"), str(out)), out

    return make_table


@pytest.mark.parametrize("name", WRITERS)
def test_the_table_has_the_documented_rows_and_the_reader_accepts_it(name, make_table):
    rows, out = make_table(name)
    expected = set()
    for session, speakers in enumerate(SPEAKERS[name], 1):
        expected |= {(str(session), speaker) for speaker in speakers.split()}
    found = set()
    for row in rows:
        speaker = row["speaker"].removeprefix("actor ")
        speaker = speaker.removesuffix(f" (session {row['session']})")
        found.add((row["session"], speaker))
    assert found == expected
    by_name = {row["id" if name == "MELD" else "dialog"]: row for row in rows}
    assert len(rows) == len(by_name) == COUNTS[name]
    for line in ROWS[name].strip().splitlines():
        utterance, emotion, text = line.strip().split(" | ")
        row = by_name[utterance]
        assert (row["emotion"], row["text"]) == (emotion, text)

    corpus = data.read_csv(out)
    labels = Counter(FOUR.get(row["emotion"].lower()) for row in rows)
    assert Counter(u.label for u in corpus) == labels
    # An acted utterance has no neighbours.
    if name != "MELD":
        assert len({u.dialog for u in corpus}) == len(rows)
        assert all(len(data.load_wav(u.wav)) > 0 for u in corpus)
    # A recipe needs the standard library alone.
    modules = re.findall(r"^ *(?:import|from) (\w+)", RECIPES[name], re.M)
    assert "csv" in modules and set(modules) <= sys.stdlib_module_names


@pytest.mark.parametrize("name", ["CREMA-D", "RAVDESS", "EmoDB"])
def test_a_recipe_names_a_wrong_folder(name, tmp_path):
    with pytest.raises(SystemExit, match="elsewhere"):
        run_recipe(name, tmp_path / "elsewhere", tmp_path / "corpus.csv")
    assert not (tmp_path / "corpus.csv").exists()


def test_every_recipe_is_tested():
    assert README.count("# recipe: ") == len(RECIPES)
    assert list(RECIPES) == list(WRITERS) == list(ROWS)


def test_meld_has_the_turns_of_a_dialogue_in_order(make_table):
    _, out = make_table("MELD")
    turns = [u.text for u in data.read_csv(out) if u.dialog == "train_dia10"]
    assert turns == ["“Yes”…", "No!"]


def test_ravdess_copies_the_left_channel_of_a_stereo_file_and_no_other_file(make_table):
    rows, out = make_table("RAVDESS")
    (copy,) = (out.parent / "mono").iterdir()
    (calm,) = [row for row in rows if row["emotion"] == "calm"]
    assert out.parent / calm["wav"] == copy
    with wave.open(str(copy)) as file:
        assert file.getparams()[:4] == (1, 2, 48000, 3)
        assert file.readframes(3) == b"\1\0\2\0\3\0"


def test_esd_prints_how_many_utterances_are_left_out(make_table, capsys):
    make_table("ESD")
    assert capsys.readouterr().out == "49 utterances, 1 left out without a transcript\n"
