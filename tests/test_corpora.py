"""The recipes of CORPORA.md, run on small trees in each corpus's own layout, and on real files."""

import ast
import csv
import os
import re
import sys
import wave
from collections import Counter
from pathlib import Path

import pytest

import data
from conftest import ROOT, write_dialog, write_wav

SHARED = ROOT.parent / "shared" / "corpora"
RECIPES = {
    name: code
    for code, name in re.findall(
        r"```python\n(# recipe: (\S+)\n.*?)```", (ROOT / "tests" / "CORPORA.md").read_text("utf-8"), re.S
    )
}
FOUR = {  # the names that the table may use for the four classes
    "neutral": 0, "calm": 0, "happy": 1, "happiness": 1, "joy": 1, "angry": 2, "anger": 2,
    "sad": 3, "sadness": 3,
}  # fmt: skip
OTHER = {"surprise", "surprised", "fear", "fearful", "disgust", "other"}
COLUMNS = ["text", "emotion", "session", "dialog", "speaker"]
SOUND = [0.1] * 50


def run_recipe(name, root, out):
    """Run a recipe with ROOT and OUT changed, and read its table: one dict a row."""
    code = RECIPES[name]
    for variable, path in (("ROOT", root), ("OUT", out)):
        code, n = re.subn(rf"(?m)^{variable} = .*$", lambda _: f"{variable} = {str(path)!r}", code)
        assert n == 1
    exec(compile(code, f"CORPORA.md, {name}", "exec"), {})
    return read_table(out)


def read_table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def values(row, *names):
    return tuple(row[name] for name in names)


def sessions_of(rows):
    """{speaker: session}; fails if a speaker or a dialogue is in two sessions."""
    for name in ("speaker", "dialog"):
        pairs = {values(row, name, "session") for row in rows}
        assert len(pairs) == len({who for who, _ in pairs}), f"a {name} is in two sessions"
    return {row["speaker"]: int(row["session"]) for row in rows}


# --- small trees: file names as each corpus's documentation gives them


def write_meld(root):
    header = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,"
    header += "StartTime,EndTime\n"
    times = '"00:16:16,059","00:16:21,731"\n'
    root.mkdir(parents=True)
    (root / "train_sent_emo.csv").write_text(
        header + f"1,also I was,Chandler,neutral,neutral,0,0,8,21,{times}"
        f'2,"You, he said ""yes"".",The Interviewer,joy,positive,0,1,8,21,{times}'
        f"3,No!,Ross,anger,negative,10,1,1,2,{times}4,“Yes”…,Chandler,sadness,negative,10,0,1,2,{times}"
        f"5,Third,Ross,surprise,positive,2,0,2,3,{times}",
        encoding="utf-8",
    )
    (root / "dev_sent_emo.csv").write_text(header + f"1,Oh,Ross,fear,negative,0,0,9,7,{times}")
    (root / "test_sent_emo.csv").write_text(header + f"1,Why,Ross,disgust,negative,0,0,5,1,{times}")


def write_crema(root):
    for name in ("1001_DFA_ANG_XX", "1001_IEO_HAP_HI", "1002_TSI_NEU_XX", "1005_WSI_SAD_XX",
                 "1006_MTI_DIS_XX", "1091_IOM_FEA_XX", "1076_MTI_NEU_XX"):  # fmt: skip
        write_wav(root / "AudioWAV" / f"{name}.wav", SOUND)
    (root / "AudioWAV" / "._1001_DFA_ANG_XX.wav").write_bytes(b"\0\5\x16\7")  # macOS


def write_ravdess(root):
    for actor in range(1, 25):
        write_wav(root / f"Actor_{actor:02}" / f"03-01-05-01-01-01-{actor:02}.wav", SOUND, 48000)
    write_wav(root / "Actor_12" / "03-01-06-01-02-01-12.wav", SOUND, 48000)
    write_wav(root / "Actor_12" / "03-01-01-01-02-02-12.wav", SOUND, 48000)
    write_wav(root / "Actor_12" / "03-02-02-01-01-01-12.wav", SOUND, 48000)  # a song
    with wave.open(str(root / "Actor_12" / "03-01-02-01-01-02-12.wav"), "wb") as file:
        file.setparams((2, 2, 48000, 3, "NONE", ""))
        file.writeframes(b"\1\0\7\0" b"\2\0\7\0" b"\3\0\7\0")  # left 1, 2, 3; right 7, 7, 7


def write_emodb(root):
    for speaker in ("03", "08", "09", "10", "11", "12", "13", "14", "15", "16"):
        write_wav(root / "wav" / f"{speaker}a01Nc.wav", SOUND)
    for name in ("03b01Wa", "08a05Fb", "16b10Td", "16b10La", "14a04Ea", "13b09Ac"):
        write_wav(root / "wav" / f"{name}.wav", SOUND)


def write_esd(root):
    lines = ("The nine the eggs, I keep.", "Don’t go…")
    files = {  # speaker -> encoding, line end, folders below the emotion
        "0011": ("utf-8", "\n", True), "0012": ("utf-16", "\r\n", True),
        "0016": ("cp1252", "\r\n", False), "0015": ("utf-16-le", "\r\n", True),
    }  # fmt: skip
    for number in range(1, 21):
        speaker = f"{number:04}"
        encoding, end, below = files.get(speaker, ("utf-8", "\n", True))
        text = ""
        for k, emotion in enumerate(["Neutral", "Angry", "Happy", "Sad", "Surprise"]):
            name, folder = f"{speaker}_{350 * k + 1:06}", root / speaker / emotion
            text += f"{name}\t{lines[k % 2]}\t{emotion}{end}"
            write_wav(folder / "train" / f"{name}.wav" if below else folder / f"{name}.wav", SOUND)
        if speaker == "0013":  # one line without tabs
            text = text.replace("\tThe nine the eggs, I keep.\tHappy", " The nine the eggs, I keep. Happy")
        (root / speaker / f"{speaker}.txt").write_bytes(text.encode(encoding))
    (root / "ReadMe.txt").write_text("about")


def write_nemo(root):
    people = {"EB0": "female", "KS0": "male", "IC0": "female", "MP0": "male", "SM0": "male"}
    emotions = ("anger", "fear", "happiness", "neutral", "sadness", "surprised")
    table = "file_id\temotion\traw_text\tnormalized_text\tspeaker_id\tgender\tage\n"
    for k, (speaker, sex) in enumerate(people.items()):
        for emotion in emotions[k % 2 :: 2]:
            name = f"{speaker}_{emotion}_64.wav"
            table += f'{name}\t{emotion}\t"Ucho" wykrywa dźwięki.\tucho wykrywa dźwięki\t'
            table += f"        {speaker}\t{sex}\t23\n"
            write_wav(root / "samples" / name, SOUND, 24000)
    (root / "data.tsv").write_text(table, encoding="utf-8")


WRITERS = {
    "MELD": write_meld, "CREMA-D": write_crema, "RAVDESS": write_ravdess, "EmoDB": write_emodb,
    "ESD": write_esd, "nEMO": write_nemo,
}  # fmt: skip


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """{corpus: (rows, path of the table)}. The table lies beside the download, not in it."""
    home = tmp_path_factory.mktemp("corpora")
    found = {}
    for name, write in WRITERS.items():
        out = home / "tables" / name / "corpus.csv"
        out.parent.mkdir(parents=True)
        write(home / "downloads" / name)
        found[name] = run_recipe(name, home / "downloads" / name, out), out
    return found


# --- what holds for every recipe


def test_there_is_a_recipe_and_a_tree_for_each_corpus():
    assert sorted(RECIPES) == sorted(WRITERS)
    for code in RECIPES.values():
        assert re.match(r"# recipe: \S+\nROOT = .+\nOUT = .+\n", code)


@pytest.mark.parametrize("name", WRITERS)
def test_a_recipe_needs_the_standard_library_alone(name):
    nodes = list(ast.walk(ast.parse(RECIPES[name])))
    modules = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    modules += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    assert modules and set(modules) <= sys.stdlib_module_names


@pytest.mark.parametrize("name", WRITERS)
def test_a_table_has_the_columns_known_emotions_and_wavs_that_are_there(name, tables):
    rows, out = tables[name]
    extra = ["id"] if name == "MELD" else ["wav"]
    assert list(rows[0]) == COLUMNS + extra
    assert {row["emotion"].lower() for row in rows} <= FOUR.keys() | OTHER
    assert all(all(row.values()) for row in rows), "an empty cell"
    for row in rows if name != "MELD" else []:
        assert not os.path.isabs(row["wav"])
        with wave.open(str(out.parent / row["wav"])) as file:
            assert (file.getnchannels(), file.getsampwidth()) == (1, 2)


@pytest.mark.parametrize("name", WRITERS)
def test_no_speaker_is_in_two_sessions(name, tables):
    sessions = sessions_of(tables[name][0])
    assert len(sessions) > len(set(sessions.values())) > 2


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "MELD"])
def test_an_acted_utterance_has_no_neighbours(name, tables):
    rows, _ = tables[name]
    assert len({row["dialog"] for row in rows}) == len(rows)


@pytest.mark.skipif(not hasattr(data, "read_csv"), reason="data.py has no reader of tables yet")
@pytest.mark.parametrize("name", WRITERS)
def test_the_reader_accepts_the_table(name, tables):
    rows, out = tables[name]
    corpus = data.read_csv(out)
    found = Counter((u.text, u.label, u.session, u.dialog, u.speaker) for u in corpus)
    assert found == Counter(
        (row["text"], FOUR.get(row["emotion"].lower()), int(row["session"]), *values(row, "dialog", "speaker"))
        for row in rows
    )
    if name == "MELD":
        assert [u.text for u in corpus if u.dialog == "train_dia10"] == ["“Yes”…", "No!"]
    else:
        assert all(len(data.load_wav(u.wav)) > 0 for u in corpus if u.label is not None)


# --- each recipe, against values written by hand


def test_meld(tables):
    rows, _ = tables["MELD"]
    assert [values(row, "text", "emotion", "session", "dialog", "speaker", "id") for row in rows] == [
        ("also I was", "neutral", "4", "train_dia0", "Chandler (session 4)", "train_dia0_utt0"),
        ('You, he said "yes".', "joy", "4", "train_dia0", "others (session 4)", "train_dia0_utt1"),
        ("Third", "surprise", "1", "train_dia2", "Ross (session 1)", "train_dia2_utt0"),
        ("“Yes”…", "sadness", "1", "train_dia10", "Chandler (session 1)", "train_dia10_utt0"),
        ("No!", "anger", "1", "train_dia10", "Ross (session 1)", "train_dia10_utt1"),
        ("Oh", "fear", "5", "dev_dia0", "Ross (session 5)", "dev_dia0_utt0"),
        ("Why", "disgust", "3", "test_dia0", "Ross (session 3)", "test_dia0_utt0"),
    ]


def test_crema_d(tables):
    rows, _ = tables["CREMA-D"]
    assert [values(row, "dialog", "text", "emotion", "session", "speaker") for row in rows] == [
        ("1001_DFA_ANG_XX", "Don't forget a jacket.", "angry", "1", "1001"),
        ("1001_IEO_HAP_HI", "It's eleven o'clock.", "happy", "1", "1001"),
        ("1002_TSI_NEU_XX", "The surface is slick.", "neutral", "2", "1002"),
        ("1005_WSI_SAD_XX", "We'll stop in a couple of minutes.", "sad", "5", "1005"),
        ("1006_MTI_DIS_XX", "Maybe tomorrow it will be cold.", "disgust", "1", "1006"),
        ("1091_IOM_FEA_XX", "I'm on my way to the meeting.", "fear", "1", "1091"),
    ]
    assert Path(rows[0]["wav"]).parts[-2:] == ("AudioWAV", "1001_DFA_ANG_XX.wav")


def test_ravdess(tables):
    rows, out = tables["RAVDESS"]
    assert len(rows) == 27  # no song
    of_12 = [values(row, "dialog", "text", "emotion", "session") for row in rows if row["speaker"] == "actor 12"]
    assert of_12 == [
        ("03-01-01-01-02-02-12", "Dogs are sitting by the door.", "neutral", "1"),
        ("03-01-02-01-01-02-12", "Kids are talking by the door.", "calm", "1"),
        ("03-01-05-01-01-01-12", "Kids are talking by the door.", "angry", "1"),
        ("03-01-06-01-02-01-12", "Dogs are sitting by the door.", "fearful", "1"),
    ]
    # Pairs of a man and a woman go to sessions 1, 2, 3, 4, 5, 1, 2, ...
    pairs = [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]
    assert sessions_of(rows) == {f"actor {k + 1:02}": pairs[k // 2] for k in range(24)}

    # The stereo file is copied: its left channel. The others are used where they are.
    (calm,) = [row["wav"] for row in rows if row["emotion"] == "calm"]
    with wave.open(str(out.parent / calm)) as file:
        assert file.getparams()[:4] == (1, 2, 48000, 3)
        assert file.readframes(3) == b"\1\0\2\0\3\0"
    assert [p.name for p in (out.parent / "mono").iterdir()] == [Path(calm).name]


def test_emodb(tables):
    rows, _ = tables["EmoDB"]
    assert sessions_of(rows) == {
        "03": 1, "08": 1, "09": 2, "10": 2, "11": 3, "13": 3, "12": 4, "14": 4, "15": 5, "16": 5,
    }  # fmt: skip
    found = {row["dialog"]: values(row, "text", "emotion") for row in rows}
    assert len(found) == 16
    assert found["03a01Nc"] == ("Der Lappen liegt auf dem Eisschrank.", "neutral")
    assert found["03b01Wa"] == ("Was sind denn das für Tüten, die da unter dem Tisch stehen?", "anger")
    assert found["08a05Fb"][1] == "happiness" and "Stück Papier" in found["08a05Fb"][0]
    assert found["16b10Td"] == ("Die wird auf dem Platz sein, wo wir sie immer hinlegen.", "sadness")
    assert found["16b10La"][1] == "other"  # boredom
    assert (found["14a04Ea"][1], found["13b09Ac"][1]) == ("disgust", "fear")


def test_esd(tables, tmp_path, capsys):
    rows, _ = tables["ESD"]
    assert sessions_of(rows) == {
        "0011": 1, "0015": 1, "0012": 2, "0016": 2, "0013": 3, "0017": 3, "0014": 4, "0018": 4,
        "0019": 5, "0020": 5,
    }  # fmt: skip
    assert len(rows) == 49 and "0013_000701" not in {row["dialog"] for row in rows}
    for speaker in ("0011", "0012", "0015", "0016", "0020"):  # UTF-8, UTF-16 twice, Windows-1252
        found = [values(row, "dialog", "text", "emotion") for row in rows if row["speaker"] == speaker]
        assert found == [
            (f"{speaker}_000001", "The nine the eggs, I keep.", "Neutral"),
            (f"{speaker}_000351", "Don’t go…", "Angry"),
            (f"{speaker}_000701", "The nine the eggs, I keep.", "Happy"),
            (f"{speaker}_001051", "Don’t go…", "Sad"),
            (f"{speaker}_001401", "The nine the eggs, I keep.", "Surprise"),
        ]
    write_esd(tmp_path / "Happy")  # an emotion in the folder's own path is no label
    run_recipe("ESD", tmp_path / "Happy", tmp_path / "esd.csv")
    assert capsys.readouterr().out == "49 utterances, 1 left out without a transcript\n"


def test_nemo(tables):
    rows, _ = tables["nEMO"]
    assert sessions_of(rows) == {"EB0": 1, "IC0": 2, "KS0": 1, "MP0": 2, "SM0": 3}
    assert [values(row, "dialog", "emotion", "text") for row in rows if row["speaker"] == "KS0"] == [
        ("KS0_fear_64", "fear", '"Ucho" wykrywa dźwięki.'),
        ("KS0_neutral_64", "neutral", '"Ucho" wykrywa dźwięki.'),
        ("KS0_surprised_64", "surprised", '"Ucho" wykrywa dźwięki.'),
    ]
    assert len(rows) == 15


@pytest.mark.parametrize("name", ["CREMA-D", "RAVDESS", "EmoDB"])
def test_a_wrong_folder_is_named(name, tmp_path):
    with pytest.raises(SystemExit, match="elsewhere"):
        run_recipe(name, tmp_path / "elsewhere", tmp_path / "corpus.csv")
    assert not (tmp_path / "corpus.csv").exists()


# --- real files


@pytest.mark.skipif(not (SHARED / "meld").is_dir(), reason="MELD's files are not here")
def test_the_published_files_of_meld(tmp_path):
    rows = run_recipe("MELD", SHARED / "meld", tmp_path / "meld.csv")
    assert len(rows) == 13708 and len({row["dialog"] for row in rows}) == 1432
    assert Counter(row["emotion"] for row in rows) == {
        "neutral": 6436, "joy": 2308, "anger": 1607, "sadness": 1002, "surprise": 1636,
        "disgust": 361, "fear": 358,
    }  # fmt: skip
    assert Counter(row["session"] for row in rows) == {
        "1": 2247, "2": 3813, "3": 3722, "4": 3299, "5": 627,
    }  # fmt: skip
    speakers = sessions_of(rows)
    for lead in ("Chandler", "Joey", "Monica", "Phoebe", "Rachel", "Ross"):
        assert [speakers[f"{lead} (session {k})"] for k in range(1, 6)] == [1, 2, 3, 4, 5]
    assert rows[0]["text"].startswith("also I was the point person")
    if hasattr(data, "read_csv"):
        corpus = data.read_csv(tmp_path / "meld.csv")
        labels = Counter(u.label for u in corpus)
        assert [labels[k] for k in range(4)] == [6436, 2308, 1607, 1002] and len(corpus) == 13708
        rows.sort(key=lambda row: values(row, "session", "dialog"))  # stable: the order of the turns
        assert [u.text for u in corpus] == [" ".join(row["text"].split()) for row in rows]


def layout_to_csv(root, out):
    """Write a folder in IEMOCAP's layout as a table, for corpora that are to run both ways."""
    corpus = data.read_iemocap(root)
    with open(out, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS + ["wav", "start", "id"])
        for u in corpus:
            wav = os.path.relpath(u.wav, Path(out).parent)
            table.writerow([u.text, u.emotion, u.session, u.dialog, u.speaker, wav, u.start, u.id])


def test_a_folder_in_iemocaps_layout_as_a_table(tmp_path):
    write_dialog(tmp_path, "Ses02M_impro01", [
        ("F000", 1, 1.01, "exc", 'he said "no", twice'), ("M000", 0.5, 0.52, "fru", "żółw; ok"),
    ])  # fmt: skip
    (tmp_path / "tables").mkdir()
    layout_to_csv(tmp_path, tmp_path / "tables" / "corpus.csv")
    wavs = os.path.join("..", "Session2", "sentences", "wav", "Ses02M_impro01", "Ses02M_impro01_")
    assert [tuple(row.values()) for row in read_table(tmp_path / "tables" / "corpus.csv")] == [
        ("żółw; ok", "fru", "2", "Ses02M_impro01", "Ses02M", f"{wavs}M000.wav", "0.5", "Ses02M_impro01_M000"),
        ('he said "no", twice', "exc", "2", "Ses02M_impro01", "Ses02F", f"{wavs}F000.wav", "1.0", "Ses02M_impro01_F000"),
    ]


@pytest.mark.skipif(not hasattr(data, "read_csv"), reason="data.py has no reader of tables yet")
@pytest.mark.parametrize("name", ["nemo", "dailytalk"])
def test_a_corpus_is_the_same_in_either_form(name, tmp_path):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not here")
    layout_to_csv(SHARED / name, tmp_path / "corpus.csv")
    facts = [
        [(u.id, u.session, u.dialog, u.speaker, u.start, u.text, u.label, u.wav.resolve()) for u in corpus]
        for corpus in (data.read_iemocap(SHARED / name), data.read_csv(tmp_path / "corpus.csv"))
    ]
    assert len(facts[0]) > 90 and facts[0] == facts[1]
