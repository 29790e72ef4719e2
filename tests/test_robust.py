"""Nothing lost, nothing silent: bad corpora, mutated files, full disks, kills, hostile pickles."""

import csv
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from conftest import ROOT, change, write_dialog, write_wav
from data import InputError

# --- one table of what can be wrong with a corpus: an error that names the file, or a treatment


def wav_of(channels=1, bits=16, form=1, rate=16000, seconds=1.0):
    """A WAV header and zeros, by hand."""
    size = channels * bits // 8
    n = round(rate * seconds) * size
    head = b"RIFF" + struct.pack("<I", 36 + n) + b"WAVEfmt "
    head += struct.pack("<IHHIIHH", 16, form, channels, rate, rate * size, size, bits)
    return head + b"data" + struct.pack("<I", n) + bytes(n)


def recode(path, encoding):
    path.write_bytes(path.read_text().encode(encoding))


def lines(path, change):
    path.write_text("\n".join(change(path.read_text().split("\n"))))


def loop(path):
    path.unlink()
    path.symlink_to(path)


FINE = None
CORPUS = {  # what is done to the label file, the transcript, the wav -> what the error must say
    "unknown emotion": (
        lambda lab, wor, wav: change(lab, b"\tneu\t", b"\tjoy\t"),
        "unknown emotion 'joy'",
    ),
    "end before start": (
        lambda lab, wor, wav: change(lab, b"[0.0000 - 1.0", b"[2.0000 - 1.0"),
        "other times",
    ),
    "no words": (
        lambda lab, wor, wav: change(wor, b"impro01_F000", b"impro01_F009"),
        "has no words",
    ),
    "no label": (
        lambda lab, wor, wav: change(lab, b"impro01_F000", b"impro01_F009"),
        "has no label in",
    ),
    "words twice": (lambda lab, wor, wav: wor.write_bytes(wor.read_bytes() * 2), "second time"),
    "label twice": (lambda lab, wor, wav: lab.write_bytes(lab.read_bytes() * 2), "second time"),
    "half a label": (
        lambda lab, wor, wav: change(lab, b"\tneu\t[2.5000, 2.5000, 2.5000]", b"\tne"),
        "expected",
    ),
    "half the words": (
        lambda lab, wor, wav: wor.write_text("Ses01F_impro01_F000 [000.00"),
        "another form expected",
    ),
    "other dialog": (
        lambda lab, wor, wav: change(lab, b"impro01_F000", b"impro02_F000"),
        "not an utterance of",
    ),
    "other times": (lambda lab, wor, wav: change(wor, b"001.0000]", b"001.5000]"), "other times"),
    "no transcript": (lambda lab, wor, wav: wor.unlink(), "missing"),
    "no label file": (lambda lab, wor, wav: lab.unlink(), "missing"),
    "binary": (lambda lab, wor, wav: lab.write_bytes(b"\xff\xfe\x00["), "'utf-8' codec"),
    "no wav": (lambda lab, wor, wav: wav.unlink(), "missing"),
    "empty wav": (lambda lab, wor, wav: wav.write_bytes(b""), "not usable as a WAV"),
    "no samples": (lambda lab, wor, wav: write_wav(wav, []), "no samples"),
    "cut wav": (
        lambda lab, wor, wav: wav.write_bytes(wav.read_bytes()[:5000]),
        "shorter than its header",
    ),
    "short wav": (
        lambda lab, wor, wav: write_wav(wav, [0.1] * 8000),
        "0.50 s long, 1.00 s by its label",
    ),
    "8 bits": (lambda lab, wor, wav: wav.write_bytes(wav_of(bits=8)), "8 bits; expected"),
    "24 bits": (lambda lab, wor, wav: wav.write_bytes(wav_of(bits=24)), "24 bits; expected"),
    "32 bits": (lambda lab, wor, wav: wav.write_bytes(wav_of(bits=32)), "32 bits; expected"),
    "float": (lambda lab, wor, wav: wav.write_bytes(wav_of(bits=32, form=3)), "format 3"),
    "stereo": (lambda lab, wor, wav: wav.write_bytes(wav_of(channels=2)), "2 channel(s)"),
    "odd rate": (lambda lab, wor, wav: wav.write_bytes(wav_of(rate=16001)), "16001 Hz; convert"),
    "8 kHz": (lambda lab, wor, wav: wav.write_bytes(wav_of(rate=8000)), FINE),
    "22.05 kHz": (lambda lab, wor, wav: wav.write_bytes(wav_of(rate=22050)), FINE),
    "44.1 kHz": (lambda lab, wor, wav: wav.write_bytes(wav_of(rate=44100)), FINE),
    "48 kHz": (lambda lab, wor, wav: wav.write_bytes(wav_of(rate=48000)), FINE),
    "silence": (lambda lab, wor, wav: wav.write_bytes(wav_of()), FINE),  # kept whole
    "clipped": (lambda lab, wor, wav: write_wav(wav, [1.0, -1.0] * 8000), FINE),
    "lying header": (
        lambda lab, wor, wav: wav.write_bytes(wav_of()[:40] + struct.pack("<I", 64000) + bytes(32000)),
        "shorter than its header",
    ),
    "text as wav": (lambda lab, wor, wav: wav.write_text("no audio"), "not usable as a WAV"),
    "wav too long": (lambda lab, wor, wav: wav.write_bytes(wav_of(seconds=2)), "1.00 s by its label"),
    "wav loop": (lambda lab, wor, wav: loop(wav), "symbolic links"),
    "wav a folder": (lambda lab, wor, wav: (wav.unlink(), wav.mkdir()), "Is a directory"),
    "label loop": (lambda lab, wor, wav: loop(lab), "symbolic links"),
    "words a folder": (lambda lab, wor, wav: (wor.unlink(), wor.mkdir()), "Is a directory"),
    "empty labels": (lambda lab, wor, wav: lab.write_text(""), "has no label in"),
    "empty words": (lambda lab, wor, wav: wor.write_text(""), "has no words"),
    "both empty": (lambda lab, wor, wav: (lab.write_text(""), wor.write_text("")), "no utterance"),
    "binary words": (lambda lab, wor, wav: wor.write_bytes(bytes(range(256))), "'utf-8' codec"),
    "UTF-16 words": (lambda lab, wor, wav: recode(wor, "utf-16"), "'utf-8' codec"),
    "UTF-16 labels": (lambda lab, wor, wav: recode(lab, "utf-16"), "'utf-8' codec"),
    "UTF-16 without mark": (lambda lab, wor, wav: recode(wor, "utf-16-le"), "has no words"),
    "byte order mark": (lambda lab, wor, wav: (recode(lab, "utf-8-sig"), recode(wor, "utf-8-sig")), FINE),
    "CRLF": (lambda lab, wor, wav: [lines(f, lambda ls: [x + "\r" for x in ls]) for f in (lab, wor)], FINE),
    "out of order": (lambda lab, wor, wav: [lines(f, lambda ls: ls[::-1]) for f in (lab, wor)], FINE),
    "half the labels": (lambda lab, wor, wav: lab.write_text(lab.read_text()[:-130]), "no label"),
    "only a tag": (lambda lab, wor, wav: wor.write_text(wor.read_text().replace("hm", "[LAUGHTER]")), FINE),
    "no words at all": (lambda lab, wor, wav: wor.write_text(wor.read_text().replace("hm", "")), FINE),
    "600 words": (lambda lab, wor, wav: wor.write_text(wor.read_text().replace("hm", "hm " * 600)), FINE),
    "a path for an id": (
        lambda lab, wor, wav: lab.write_text(lab.read_text().replace("impro01_F000", "impro01/../../x_F000")),
        "not an utterance",
    ),
}  # fmt: skip


@pytest.fixture
def dialog(tmp_path):
    session = write_dialog(
        tmp_path, "Ses01F_impro01", [("F000", 0, 1, "neu", "hm"), ("M000", 2, 3, "sad", "so")]
    )
    return (
        session / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt",
        session / "dialog" / "transcriptions" / "Ses01F_impro01.txt",
        session / "sentences" / "wav" / "Ses01F_impro01" / "Ses01F_impro01_F000.wav",
    )


@pytest.mark.parametrize("case", CORPUS)
def test_a_bad_corpus_is_an_error_or_a_known_treatment(case, dialog, tmp_path, tiny):
    harm, message = CORPUS[case]
    harm(*dialog)
    if message is not FINE:
        with pytest.raises(InputError) as error:
            data.read_iemocap(tmp_path)
        assert message in str(error.value)
        assert str(tmp_path / "Session1") in str(error.value)  # the file, or the folder without it
        return
    corpus = data.read_iemocap(tmp_path)
    assert [(u.id[-4:], u.emotion) for u in corpus] == [("F000", "neu"), ("M000", "sad")]
    clips = data.load_clips(corpus)
    assert [len(x) for x in clips] == [16000, 16000] and all(x.isfinite().all() for x in clips)
    for m, raw in (("audio", [clips[0]]), ("text", [corpus[0].text])):
        states, mask = tiny[m](raw)
        assert states.isfinite().all() and 2 <= mask.sum() <= 512, m


def test_short_and_long_clips(tmp_path):
    session = write_dialog(
        tmp_path, "Ses01F_impro01", [("F000", 0, 0.04, "neu", "a"), ("F001", 1, 31, "sad", "b")], rate=8000
    )  # fmt: skip
    assert session.exists()
    clips = data.load_clips(data.read_iemocap(tmp_path))
    assert [len(x) for x in clips] == [640, 80000]


def test_a_root_one_level_off_names_the_right_one(dialog, tmp_path):
    inner = tmp_path / "IEMOCAP_full_release"
    inner.mkdir()
    (tmp_path / "Session1").rename(inner / "Session1")
    for wrong in (tmp_path, inner / "Session1"):
        with pytest.raises(InputError, match=f"name {re.escape(str(inner))}$"):
            data.read_iemocap(wrong)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_is_said(dialog, tmp_path):
    dialog[1].chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        data.read_iemocap(tmp_path)


def test_partial_leaves_out_lists_and_marks(small_corpus, tmp_path, monkeypatch, capsys):
    root = tmp_path / "small"
    shutil.copytree(small_corpus, root)
    wavs = sorted(root.rglob("Ses02*.wav"))
    wavs[0].unlink()
    wavs[3].write_bytes(b"")
    (root / "Session3" / "dialog" / "transcriptions" / "Ses03F_impro01.txt").unlink()
    monkeypatch.chdir(tmp_path)
    command = ["--iemocap", str(root), "--upstream", "tiny", "--fusion", "text-fc", "--frozen",
               "--max-epochs", "2"]  # fmt: skip
    with pytest.raises(InputError, match="--partial"):
        train.main(command)
    train.main([*command, "--partial"])
    said = capsys.readouterr().out
    for path in (wavs[0], wavs[3], "Ses03F_impro01.txt"):
        assert str(path) in said
    assert "small-partial: WA" in said
    (folder,) = [p.parent for p in tmp_path.rglob("result.json")]
    assert folder.parts[-3] == "small-partial"
    result = json.loads((folder / "result.json").read_text())
    problems = []
    corpus = data.read_iemocap(root, problems)
    targets = [u for u in corpus if u.label is not None]
    assert result["n_train"] + result["n_dev"] + result["n_test"] == len(targets)
    assert problems and not {w.stem for w in (wavs[0], wavs[3])} & {u.id for u in corpus}


# --- a corpus of one's own: one table of what can be wrong

GOOD = """text,emotion,session,dialog,speaker
oh no,sad,1,a,ann
i hate it,angry,1,a,bob
lovely,joy,2,b,cy
hm,neutral,2,b,di
so,surprise,3,c,ed
"""
CSV = {  # what is done to the text of the table -> what the error must say
    "no column text": (lambda t: t.replace("text,", "words,"), "columns"),
    "no column emotion": (lambda t: t.replace("emotion", "feeling"), "columns"),
    "no column session": (lambda t: t.replace("session", "fold"), "columns"),
    "no column speaker": (lambda t: t.replace("speaker", "who"), "columns"),
    "unknown column": (lambda t: t.replace("speaker", "speaker,age"), "columns"),
    "empty file": (lambda t: "", "columns"),
    "only a header": (lambda t: t.split("\n")[0], "columns"),
    "no header": (lambda t: t.split("\n", 1)[1], "columns"),
    "no emotion": (lambda t: t.replace("oh no,sad", "oh no,"), ":2: no emotion"),
    "no dialog": (lambda t: t.replace("1,a,ann", "1,,ann"), ":2: no dialog"),
    "no speaker": (lambda t: t.replace("a,ann", "a,"), ":2: no speaker"),
    "no session": (lambda t: t.replace("sad,1", "sad,"), ":2: no session"),
    "session 0": (lambda t: t.replace("sad,1", "sad,0"), ":2: session must be"),
    "session -1": (lambda t: t.replace("sad,1", "sad,-1"), ":2: session must be"),
    "session a word": (lambda t: t.replace("sad,1", "sad,one"), ":2: session must be"),
    "session 1.5": (lambda t: t.replace("sad,1", "sad,1.5"), ":2: session must be"),
    "a speaker in two sessions": (lambda t: t.replace("cy", "ann"), ":4: its speaker or dialogue"),
    "a dialog in two sessions": (lambda t: t.replace("2,b,di", "2,a,di"), ":5: its speaker or dialogue"),
    "a cell too few": (lambda t: t.replace("1,a,ann", "1,a"), ":2: 4 cells"),
    "a cell too many": (lambda t: t.replace("oh no", "oh, no"), ":2: 6 cells"),
    "an open quote": (lambda t: t.replace("oh no", '"oh no'), "CSV"),
    "an id twice": (
        lambda t: t.replace("speaker\n", "speaker,id\n").replace("ann", "ann,7").replace("bob", "bob,7")
        .replace("cy", "cy,1").replace("di\n", "di,2\n").replace("ed", "ed,3"),
        ":3: id 7 is there",
    ),
    "a wav that is not there": (
        lambda t: re.sub(r"(?m)^(.*[a-z])$", r"\1,", t).replace("speaker,", "speaker,wav")
        .replace("ann,", "ann,x.wav"),
        ":2: .*x.wav is missing",
    ),
    "a start that is no number": (
        lambda t: re.sub(r"(?m)^(.*[a-z])$", r"\1,7", t).replace("speaker,7", "speaker,start")
        .replace("bob,7", "bob,1:30"),
        ":3: start must be",
    ),
    "a start that one row lacks": (
        lambda t: re.sub(r"(?m)^(.*[a-z])$", r"\1,7", t).replace("speaker,7", "speaker,start")
        .replace("bob,7", "bob,"),
        ":3: start must be",
    ),
    "UTF-16": (lambda t: t.encode("utf-16"), "UTF-8"),
    "Latin-1": (lambda t: t.replace("oh no", "oh né").encode("latin-1"), "UTF-8"),
    "binary": (lambda t: bytes(range(256)), "UTF-8"),
    "a web page": (lambda t: "<!DOCTYPE html><html></html>", "web page"),
    "a Git-LFS pointer": (lambda t: "version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "NUL bytes": (lambda t: t.replace("oh no", "oh\0no"), "CSV|line"),
}  # fmt: skip


@pytest.mark.parametrize("case", CSV)
def test_a_bad_table_is_named_with_its_line(case, tmp_path):
    harm, message = CSV[case]
    content = harm(GOOD)
    path = tmp_path / "mine.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if case == "NUL bytes":  # read by newer versions of Python
        try:
            assert data.read_csv(path)
        except InputError as error:
            assert str(path) in str(error)
        return
    with pytest.raises(InputError, match=message) as error:
        data.read_csv(path)
    assert all(str(path) in problem for problem in str(error.value).splitlines())


def test_all_problems_of_a_table_come_at_once(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(GOOD.replace("oh no,sad", "oh no,").replace("joy", "").replace("3,c", "0,c"))
    with pytest.raises(InputError) as error:
        data.read_csv(path)
    assert [p.split(":")[1] for p in str(error.value).splitlines()] == ["2", "4", "6"]


def test_a_good_table_in_every_dress(tmp_path):
    expected = [("oh no", "sad", 1, "a", "ann", 3), ("i hate it", "ang", 1, "a", "bob", 2),
                ("lovely", "hap", 2, "b", "cy", 1), ("hm", "neu", 2, "b", "di", 0),
                ("so", "surprise", 3, "c", "ed", None)]  # fmt: skip
    for k, text in enumerate((
        GOOD, "\ufeff" + GOOD, GOOD.replace(",", ";"), GOOD.replace(",", "\t"),
        GOOD.replace("\n", "\r\n"), GOOD.replace("oh no", '"oh\nno"'), GOOD.replace("text", " Text "),
    )):  # fmt: skip
        path = tmp_path / f"{k}.csv"
        path.write_bytes(text.encode())
        found = data.read_csv(path)
        assert [(u.text, u.emotion, u.session, u.dialog, u.speaker, u.label) for u in found] == expected
        assert len({u.id for u in found}) == 5 and all(u.id.startswith(u.dialog + "_") for u in found)
    timed = "text,emotion,session,dialog,speaker,start\nlast,sad,1,a,x,9.5\nfirst,sad,1,a,y,2\n"
    path.write_text(timed)
    assert [u.text for u in data.read_csv(path)] == ["first", "last"]


def test_a_table_equals_the_layout_and_trains(small_corpus, tmp_path, monkeypatch, capsys):
    corpus = data.read_iemocap(small_corpus)
    with open(tmp_path / "small.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow("id text emotion session dialog speaker start wav".split())
        for u in corpus:
            row = u.id, u.text, u.emotion, u.session, u.dialog, u.speaker, u.start, u.wav
            table.writerow(row)
    found = data.read_csv(tmp_path / "small.csv")
    for a, b in zip(found, corpus, strict=True):
        assert (a.id, a.text, a.label, a.session, a.dialog, a.speaker, a.start) == (
            b.id, b.text, b.label, b.session, b.dialog, b.speaker, b.start
        )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command = ["--upstream", "tiny", "--fusion", "mmt", "--max-epochs", "3", "--device", "cpu"]
    train.main(["--corpus", "small.csv", *command])
    train.main(["--iemocap", str(small_corpus), "--partial", *command])
    a, b = sorted(tmp_path.rglob("predictions.csv"))
    assert {p.parts[-4] for p in (a, b)} == {"small", "small-partial"}
    assert a.read_text() == b.read_text()
    # Without audio, a text system trains and an audio system says what is missing.
    text = "\n".join(",".join(line.split(",")[:-1]) for line in open("small.csv").read().splitlines())
    (tmp_path / "words.csv").write_text(text)
    train.main(["--corpus", "words.csv", "--upstream", "tiny", "--fusion", "text-fc", "--max-epochs", "2"])
    with pytest.raises(InputError, match="no wav for 56 utterances.*--fusion text-fc"):
        train.main(["--corpus", "words.csv", "--upstream", "tiny", "--max-epochs", "2"])


# --- mutations


def mutate(raw, rng):
    """One of: a byte changed, a piece cut out, doubled, moved, zeroed, replaced by noise."""
    raw, kind = bytearray(raw), rng.randrange(7)
    if not raw:
        return b"\0"
    a = rng.randrange(len(raw))
    b = min(len(raw), a + rng.choice((1, 2, 8, 60, 1000)))
    piece = bytes(raw[a:b])
    if kind == 0:
        raw[a] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del raw[a:b]
    elif kind == 2:
        raw[a:a] = piece
    elif kind == 3:
        del raw[a:b]
        k = rng.randrange(len(raw) + 1)
        raw[k:k] = piece
    elif kind == 4:
        raw[a:b] = bytes(b - a)
    elif kind == 5:
        raw[a:b] = rng.randbytes(b - a)
    else:
        del raw[a:]
    return bytes(raw)


def test_mutated_corpora_are_errors_or_hold_the_same_utterances(tmp_path):
    """1,000 mutations of label files, transcripts and wavs: no other error, no other count."""
    files = []
    for k in (1, 2):
        session = write_dialog(tmp_path, f"Ses0{k}F_impro01", [
            ("F000", 0, 0.1, "neu", "i hate it"), ("F001", 0.3, 0.4, "fru", "oh no"), ("M000", 0.5, 0.6, "sad", "so")
        ])  # fmt: skip
        files += [p for p in session.rglob("*") if p.is_file()]
    clean = [(u.id, u.emotion) for u in data.read_iemocap(tmp_path)]
    found = 0
    for seed in range(1000):
        rng = random.Random(seed)
        path = rng.choice(files)
        raw = path.read_bytes()
        path.write_bytes(mutate(raw, rng))
        try:
            problems = []
            corpus = data.read_iemocap(tmp_path, problems)
            found += bool(problems)
            if not problems:
                now = [(u.id, u.emotion) for u in corpus]
                assert [i for i, _ in now] == [i for i, _ in clean], seed
                assert sum(a != b for a, b in zip(now, clean)) <= 1, seed
                for u in corpus:
                    x = data.clip(data.load_wav(u.wav))
                    assert x.isfinite().all() and 400 <= len(x) <= 80000, seed
        except InputError:
            found += 1
        finally:
            path.write_bytes(raw)
    assert found > 400


@pytest.fixture(scope="module")
def finished(small_corpus, tmp_path_factory):
    """(folder of work, the command that made the run in it, the run's folder)."""
    work = tmp_path_factory.mktemp("finished")
    command = ["--iemocap", str(small_corpus), "--partial", "--upstream", "tiny", "--fusion", "mmt",
               "--finetune-after", "1", "--stop-after", "2", "--device", "cpu", "--out", str(work / "runs")]  # fmt: skip
    before = os.getcwd()
    os.chdir(work)
    try:
        train.main(command)
    finally:
        os.chdir(before)
    (folder,) = [p.parent for p in work.rglob("result.json")]
    return work, command, folder


def test_mutated_run_folders_are_named_or_count_the_same(finished, tmp_path):
    """700 mutations of config.json, result.json, predictions.csv."""
    folder = tmp_path / "run"
    folder.mkdir()
    names = ("config.json", "result.json", "predictions.csv")
    for name in names:
        shutil.copy(finished[2] / name, folder)
    clean = evaluate.read_run(folder)
    found = 0
    for seed in range(700):
        rng = random.Random(seed)
        path = folder / rng.choice(names)
        raw = path.read_bytes()
        path.write_bytes(mutate(raw, rng))
        try:
            run = evaluate.read_run(folder)
            pairs = [
                sorted(zip(evaluate.column([r], "truth"), evaluate.column([r], "guess")))
                for r in (run, clean)
            ]
            assert pairs[0] == pairs[1], seed  # lines may have moved
            evaluate.table_1([run]), evaluate.breakdown([run])
        except InputError as error:
            assert str(folder) in str(error)
            found += 1
            runs, complaints = evaluate.find_runs(folder)
            assert not runs and complaints == [str(error)], seed
        finally:
            path.write_bytes(raw)
    assert found > 300


def test_mutated_checkpoints_are_named(finished, tmp_path):
    """100 mutations of checkpoint.pt."""
    raw = (finished[2] / "checkpoint.pt").read_bytes()
    clean = evaluate.load_checkpoint(finished[2] / "checkpoint.pt")
    path, found = tmp_path / "checkpoint.pt", 0
    for seed in range(100):
        path.write_bytes(mutate(raw, random.Random(seed)))
        try:
            state = evaluate.load_checkpoint(path)
            for name, value in clean["weights"]["model"].items():
                assert torch.equal(value, state["weights"]["model"][name]), seed
        except InputError as error:
            assert "checkpoint.pt: " in str(error) and "delete it" in str(error)
            found += 1
    assert found > 80


def test_mutated_states_in_the_cache_are_named_or_have_the_same_shape(finished, tmp_path):
    """200 mutations of a .npy file: a changed byte among the numbers may go unnoticed."""
    files = sorted((finished[0] / "cache").glob("audio-fp32-*/*.npy"))
    raw, clean = files[0].read_bytes(), np.load(files[0])
    path, found = tmp_path / "Ses01F_impro01_F000-0.npy", 0
    source = data.CachedStates([path], "cpu")
    for seed in range(200):
        rng = random.Random(seed)
        k = 128 if seed % 2 else len(raw)  # half of them in the header
        path.write_bytes(mutate(raw[:k], rng) + raw[k:])
        try:
            assert source.read(0).shape == clean.shape, seed
        except InputError as error:
            assert str(path) in str(error) and "delete it" in str(error), seed
            found += 1
    assert found > 100


# --- untrusted files


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_a_hostile_pickle_runs_no_code(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"settings": Hostile()}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="checkpoint.pt: .*delete it"):
        evaluate.load_checkpoint(tmp_path / "checkpoint.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(InputError):
        evaluate.load_checkpoint(tmp_path / "plain.pt")
    # A file of the cache that is a pickle, whole or as an array of objects.
    np.save(tmp_path / "objects.npy", np.array([Hostile()]), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Hostile()))
    for name in ("objects.npy", "pickle.npy"):
        with pytest.raises(InputError, match=f"{name}: .*delete it"):
            data.CachedStates([tmp_path / name], "cpu").read(0)
    # An upstream folder whose weights are a pickle, and whose config asks for code of its own.
    folder = tmp_path / "upstream"
    shutil.copytree(next((finished[0] / "cache").glob("tiny-*")) / "text", folder)
    (folder / "model.safetensors").unlink()
    torch.save({"embeddings": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(data.InputError):
        train.Upstream(str(folder), "text")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil"}
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("import os; os.mkdir('ran')")
    with pytest.raises(data.InputError):
        train.Upstream(str(folder), "text")
    assert not (tmp_path / "ran").exists()


# --- bad training, bad disks


def again(finished, out, *more):
    """The finished run's command with another --out, as a process."""
    work, command, _ = finished
    return [sys.executable, ROOT / "train.py", *command[:-1], str(out), *more]


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(
    finished, tmp_path, monkeypatch
):
    work, command, folder = finished
    monkeypatch.chdir(work)
    cross_entropy, calls = train.F.cross_entropy, []

    def sick(logits, labels):
        calls.append(1)
        return cross_entropy(logits, labels) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(train.F, "cross_entropy", sick)
    with pytest.raises(InputError, match="the loss is nan in epoch 2, among utterances Ses0"):
        train.main([*command[:-1], str(tmp_path)])
    (path,) = tmp_path.rglob("checkpoint.pt")
    assert len(evaluate.load_checkpoint(path)["log"]) == 1
    monkeypatch.setattr(train.F, "cross_entropy", cross_entropy)
    train.main([*command[:-1], str(tmp_path)])  # goes on, and ends as if nothing had been
    assert (path.parent / "predictions.csv").read_text() == (folder / "predictions.csv").read_text()


def test_a_test_loss_that_is_no_number_is_no_finished_run(finished, tmp_path, monkeypatch):
    work, command, _ = finished
    monkeypatch.chdir(work)
    predict, calls = evaluate.predict, []

    def sick(*inputs):
        calls.append(1)
        return predict(*inputs) * (float("nan") if len(calls) == 3 else 1)  # two epochs, then the test

    monkeypatch.setattr(evaluate, "predict", sick)
    with pytest.raises(InputError, match="the loss is nan .* among utterances Ses0"):
        train.main([*command[:-1], str(tmp_path)])
    assert not [*tmp_path.rglob("result.json")] and not [*tmp_path.rglob("predictions.csv")]


def test_a_shortage_of_gpu_memory_is_not_blamed_on_a_file():
    with pytest.raises(torch.OutOfMemoryError):
        with data.reading("checkpoint.pt", "delete it"):
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("limit, what", [(1_500, ".npy"), (20_000, "checkpoint.pt")])
def test_a_full_disk_is_an_error_and_leaves_a_folder_that_goes_on(
    limit, what, finished, tmp_path, monkeypatch
):
    """A limit on the size of files stands for the disk: layer states or the checkpoint are too large."""
    resource = pytest.importorskip("resource")
    work, command, _ = finished
    (tiny,) = (work / "cache").glob("tiny-*")
    shutil.copytree(tiny, tmp_path / "cache" / tiny.name)
    monkeypatch.chdir(tmp_path)
    command = [*command[:-1], str(tmp_path / "runs"), "--fusion", "text-fc", "--frozen"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            train.main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    files = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert (tmp_path / "runs").exists() == (what == "checkpoint.pt")  # no run before its states
    assert "checkpoint.pt" not in files and not [name for name in files if name.endswith(".part")]
    train.main(command)
    assert list(tmp_path.rglob("result.json"))


def test_a_folder_that_cannot_be_written_is_one_sentence(finished, tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        again(finished, tmp_path / "file"), cwd=finished[0], capture_output=True, text=True
    )
    assert (
        done.returncode == 1 and done.stderr.startswith("error: ") and str(tmp_path) in done.stderr
    )


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_a_sentence_on_how_to_go_on(sign, finished, tmp_path):
    """Seen in a file, to which the lines of a running command come one by one."""
    environment = {k: x for k, x in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            again(finished, tmp_path, "--stop-after", "1000000", "--frozen"), cwd=finished[0],
            stdout=said, stderr=subprocess.PIPE, text=True, env=environment,
            # A command that a script starts with & ignores SIGINT, and so do its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            started = time.monotonic()
            while "epoch   2" not in (tmp_path / "said").read_text():
                assert process.poll() is None and time.monotonic() - started < 60
                time.sleep(0.05)
            process.send_signal(sign)
            _, complaint = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1 and "Stopped. The same command resumes" in complaint
    assert "Traceback" not in complaint
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    assert len(evaluate.load_checkpoint(checkpoint)["log"]) >= 1


def test_output_in_pipes_files_and_poor_terminals(finished, tmp_path):
    """A closed pipe is no error, ASCII replaces what it cannot print, and lines arrive at once."""
    command = again(finished, tmp_path / "runs", "--max-epochs", "3")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen(
        command, cwd=finished[0], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout.readline().startswith(b"torch")  # long before the end
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 0
    subprocess.run([*command, "--help"], env=environment, check=True, capture_output=True)
    report = [sys.executable, ROOT / "evaluate.py", finished[0] / "runs"]
    done = subprocess.run(report, env=environment, capture_output=True)
    assert done.returncode == 0 and b"Table 1" in done.stdout


def test_the_toy_runs_without_what_only_unix_has(tmp_path):
    """A toy of two dialogues a session, with python -O."""
    blocked = "fcntl resource pwd grp termios".split()
    program = (
        "import sys, os\n"
        f"for name in {blocked}: sys.modules[name] = None\n"
        "for name in ('posix_fallocate', 'fork', 'getuid'): hasattr(os, name) and delattr(os, name)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import model, data, evaluate, train\n"
        "data.TOY['dialogs'] = 2\n"
        "train.main(['--fusion', 'mmt', '--max-epochs', '2', '--device', 'cpu'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "LOGNAME": "me"},  # torch asks pwd for it where no variable has it
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "TOY" in done.stdout and "toy: WA" in done.stdout
    assert (tmp_path / "runs/toy/mmt-finetuned-max_epochs=2/fold5-seed0/result.json").exists()


def test_no_import_warns():
    command = [sys.executable, "-W", "error", "-c", "import train"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


# --- kill it anywhere, again and again (by hand: pytest -m slow)


def outcome(work):
    """What a run leaves, its clocks and memory apart."""
    (folder,) = [p.parent for p in (work / "runs").rglob("result.json")]
    result = json.loads((folder / "result.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for row in (result, *log):
        row.pop("seconds")
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["weights"]
    flat = {f"{m}.{k}": v for m, part in weights.items() for k, v in part.items()}
    with open(folder / "predictions.csv") as file:
        return result, log, list(csv.reader(file)), flat


@pytest.mark.slow
def test_killed_at_thirty_moments_and_more_the_run_ends_with_the_same_bits(tmp_path):
    """From nothing to the end, toy and cache included, in as many rounds as thirty kills need."""
    command = [sys.executable, ROOT / "train.py", "--fusion", "mmt", "--device", "cpu"]
    command += ["--max-epochs", "12", "--finetune-after", "1"]  # both phases
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return subprocess.Popen(command, cwd=tmp_path / name, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    started = time.monotonic()
    process = start("whole")
    process.communicate()
    whole, seconds = outcome(tmp_path / "whole"), time.monotonic() - started
    assert 0 < whole[0]["finetune_epoch"] < whole[0]["epochs"]
    rng, where, rounds = random.Random(0), [], 0
    while len(where) < 30:
        rounds += 1
        name = f"killed{rounds}"
        for _ in range(100):
            process = start(name)
            try:
                said = process.communicate(timeout=rng.uniform(0.02, 0.5) * seconds)[0]
                break
            except subprocess.TimeoutExpired:
                process.kill()  # SIGKILL
                process.communicate()
                made = [p.name for p in (tmp_path / name).rglob("*") if p.is_file()]
                where.append((len(made), "checkpoint.pt" in made))
        assert process.returncode == 0, said
        killed = outcome(tmp_path / name)
        assert killed[:3] == whole[:3]
        assert killed[3].keys() == whole[3].keys()
        assert all(torch.equal(killed[3][k], whole[3][k]) for k in whole[3])
    print(f"{len(where)} kills in {rounds} rounds; files at each, and a checkpoint: {where}")


@pytest.mark.slow
def test_two_hundred_runs_in_a_row_leave_nothing_behind(finished, tmp_path, monkeypatch):
    """A soak: memory, open files and child processes stay what they are after the first twenty."""
    work, command, _ = finished
    monkeypatch.chdir(work)

    def usage():
        status = open("/proc/self/status").read()
        memory = int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024  # MiB
        return memory, len(os.listdir("/proc/self/fd"))

    for k in range(200):
        train.main([*command[:-1], str(tmp_path), "--seed", str(k)])
        if k == 19:
            early = usage()
    late = usage()
    print(f"MiB, open files: after 20 runs {early}, after 200 {late}")
    assert late[0] < 1.1 * early[0] and late[1] == early[1]
