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


def write_wavs(folder, names, rate=16000):
    for name in names.split():
        write_wav(folder / f"{name}.wav", SOUND, rate)


def write_crema(root):
    names = "1001_DFA_ANG_XX 1001_IEO_HAP_HI 1002_TSI_NEU_XX 1005_WSI_SAD_XX "
    names += "1006_MTI_DIS_XX 1091_IOM_FEA_XX 1076_MTI_NEU_XX"
    write_wavs(root / "AudioWAV", names)
    # macOS leaves such files.
    (root / "AudioWAV" / "._1001_DFA_ANG_XX.wav").write_bytes(b"\0\5\x16\7")


def write_ravdess(root):
    for actor in range(1, 25):
        write_wavs(root / f"Actor_{actor:02}", f"03-01-05-01-01-01-{actor:02}", 48000)
    # The last one is a song.
    names = "03-01-06-01-02-01-12 03-01-01-01-02-02-12 03-02-02-01-01-01-12"
    write_wavs(root / "Actor_12", names, 48000)
    with wave.open(str(root / "Actor_12" / "03-01-02-01-01-02-12.wav"), "wb") as file:
        file.setparams((2, 2, 48000, 3, "NONE", ""))
        file.writeframes(b"\1\0\7\0\2\0\7\0\3\0\7\0")  # left 1, 2, 3 and right 7


def write_emodb(root):
    names = "03a01Nc 08a01Nc 09a01Nc 10a01Nc 11a01Nc 12a01Nc 13a01Nc 14a01Nc 15a01Nc "
    names += "16a01Nc 03b01Wa 08a02Fb 16a02Td 16a02La 14a04Ea 13a07Ac"
    write_wavs(root / "wav", names)


def write_esd(root):
    encodings = {"0012": "utf-16", "0015": "utf-16-le", "0016": "cp1252"}
    for speaker in [f"{number:04}" for number in range(10, 21)]:
        lines = ""
        for k, emotion in enumerate(["Neutral", "Angry", "Happy", "Sad", "Surprise"]):
            name = f"{speaker}_{350 * k + 1:06}"
            # One line has no tabs.
            tab = " " if name == "0013_000701" else "\t"
            lines += f"{name}{tab}Don’t go, {k}…{tab}{emotion}\r\n"
            train = "" if speaker == "0016" else "train"
            write_wavs(root / speaker / emotion / train, name)
        content = lines.encode(encodings.get(speaker, "utf-8"))
        (root / speaker / f"{speaker}.txt").write_bytes(content)
    (root / "ReadMe.txt").write_text("about")


def write_nemo(root):
    table = "file_id emotion raw_text normalized_text speaker_id gender age\n"
    table = table.replace(" ", "\t")
    for speaker in ("EB0", "KS0", "IC0", "MP0", "SM0"):
        sex = "female" if speaker in ("EB0", "IC0") else "male"
        for emotion in ("anger", "neutral", "surprised"):
            name = f"{speaker}_{emotion}_64"
            write_wavs(root / "samples", name, 24000)
            text = '"Ucho" wykrywa dźwięki.\tucho'
            table += f"{name}.wav\t{emotion}\t{text}\t    {speaker}\t{sex}\t23\n"
    (root / "data.tsv").write_text(table, encoding="utf-8")


WRITERS = {
    "MELD": write_meld,
    "CREMA-D": write_crema,
    "RAVDESS": write_ravdess,
    "EmoDB": write_emodb,
    "ESD": write_esd,
    "nEMO": write_nemo,
}
# The rows of the table, and those of the four classes. One line of ESD has no tabs, and
# one file of CREMA-D is broken.
COUNTS = {"MELD": (7, 4), "CREMA-D": (6, 4), "RAVDESS": (27, 26), "EmoDB": (16, 13)}
COUNTS |= {"ESD": (49, 39), "nEMO": (15, 10)}
# Some rows: the utterance, its session, its speaker, its emotion and its words.
ROWS = {
    "MELD": """
        train_dia0_utt0 | 4 | Chandler (session 4) | neutral | also I was
        train_dia0_utt1 | 4 | others (session 4) | joy | You, he said "yes".
        train_dia10_utt0 | 1 | Ross (session 1) | sadness | “Yes”…
        dev_dia0_utt0 | 5 | Ross (session 5) | fear | Oh
        test_dia0_utt0 | 3 | Ross (session 3) | disgust | Why""",
    "CREMA-D": """
        1001_DFA_ANG_XX | 1 | 1001 | angry | Don't forget a jacket.
        1001_IEO_HAP_HI | 1 | 1001 | happy | It's eleven o'clock.
        1002_TSI_NEU_XX | 2 | 1002 | neutral | The surface is slick.
        1005_WSI_SAD_XX | 5 | 1005 | sad | We'll stop in a couple of minutes.""",
    "RAVDESS": """
        03-01-01-01-02-02-12 | 1 | actor 12 | neutral | Dogs are sitting by the door.
        03-01-02-01-01-02-12 | 1 | actor 12 | calm | Kids are talking by the door.
        03-01-05-01-01-01-03 | 2 | actor 03 | angry | Kids are talking by the door.
        03-01-05-01-01-01-10 | 5 | actor 10 | angry | Kids are talking by the door.
        03-01-05-01-01-01-11 | 1 | actor 11 | angry | Kids are talking by the door.""",
    "EmoDB": """
        03a01Nc | 1 | 03 | neutral | Der Lappen liegt auf dem Eisschrank.
        09a01Nc | 2 | 09 | neutral | Der Lappen liegt auf dem Eisschrank.
        08a02Fb | 1 | 08 | happiness | Das will sie am Mittwoch abgeben.
        16a02Td | 5 | 16 | sadness | Das will sie am Mittwoch abgeben.
        16a02La | 5 | 16 | other | Das will sie am Mittwoch abgeben.""",
    "ESD": """
        0011_000001 | 1 | 0011 | Neutral | Don’t go, 0…
        0012_000351 | 2 | 0012 | Angry | Don’t go, 1…
        0015_000701 | 1 | 0015 | Happy | Don’t go, 2…
        0016_001051 | 2 | 0016 | Sad | Don’t go, 3…""",
    "nEMO": """
        IC0_neutral_64 | 2 | IC0 | neutral | "Ucho" wykrywa dźwięki.
        SM0_anger_64 | 3 | SM0 | anger | "Ucho" wykrywa dźwięki.""",
}


def make_table(name, folder):
    """Run a recipe on a small copy. Returns the rows of its table, and its path."""
    # The download is in a folder of that name, and the table is in another one.
    WRITERS[name](folder / "Happy")
    out = folder / "tables" / "corpus.csv"
    out.parent.mkdir()
    return run_recipe(name, str(folder / "Happy"), str(out)), out


@pytest.mark.parametrize("name", WRITERS)
def test_the_table_has_the_documented_rows_and_the_reader_accepts_it(name, tmp_path):
    rows, out = make_table(name, tmp_path)
    by_name = {row["id" if name == "MELD" else "dialog"]: row for row in rows}
    for line in ROWS[name].strip().splitlines():
        utterance, *cells = line.strip().split(" | ")
        row = by_name[utterance]
        columns = ("session", "speaker", "emotion", "text")
        assert [row[column] for column in columns] == cells
    corpus = data.read_csv(out)
    labels = [u.label for u in corpus if u.label is not None]
    assert (len(by_name), len(labels)) == COUNTS[name]
    assert len(rows) == len(by_name)
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


def test_meld_has_the_turns_of_a_dialogue_in_order(tmp_path):
    _, out = make_table("MELD", tmp_path)
    turns = [u.text for u in data.read_csv(out) if u.dialog == "train_dia10"]
    assert turns == ["“Yes”…", "No!"]


def test_ravdess_copies_the_left_channel_of_a_stereo_file_and_no_other_file(tmp_path):
    rows, out = make_table("RAVDESS", tmp_path)
    (copy,) = (out.parent / "mono").iterdir()
    (calm,) = [row for row in rows if row["emotion"] == "calm"]
    assert out.parent / calm["wav"] == copy
    with wave.open(str(copy)) as file:
        assert file.getparams()[:4] == (1, 2, 48000, 3)
        assert file.readframes(3) == b"\1\0\2\0\3\0"


def test_esd_prints_how_many_utterances_are_left_out(tmp_path, capsys):
    make_table("ESD", tmp_path)
    assert capsys.readouterr().out == "49 utterances, 1 left out without a transcript\n"
