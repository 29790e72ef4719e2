"""data.py on written-out files: each quirk of IEMOCAP, clips, folds, contexts, the cache, the toy."""

import os
import struct
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from conftest import ROOT, change, write_dialog, write_wav
from data import InputError


def read(root):
    return {u.id: u for u in data.read_iemocap(root)}


# --- the reader


def test_one_utterance_as_it_stands_on_the_disk(tmp_path):
    session = tmp_path / "Session1"
    for folder, text in (
        ("EmoEvaluation", "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
         "[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]\n"
         "C-E2:\tNeutral;\t()\nC-F1:\tNeutral; Anger;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\n"
         "A-F1:\tval 3; act 2; dom  ;\t()\n\n"),
        ("transcriptions", "Ses01F_impro01_F000 [006.2901-008.2357]: Excuse  me.\t \r\n"),
    ):  # fmt: skip
        (session / "dialog" / folder).mkdir(parents=True)
        (session / "dialog" / folder / "Ses01F_impro01.txt").write_bytes(text.encode())
    wav = session / "sentences" / "wav" / "Ses01F_impro01" / "Ses01F_impro01_F000.wav"
    write_wav(wav, [0.1] * 31130)
    (u,) = data.read_iemocap(tmp_path)
    assert (u.id, u.session, u.dialog, u.speaker) == (
        "Ses01F_impro01_F000",
        1,
        "Ses01F_impro01",
        "Ses01F",
    )
    assert (u.start, u.end, u.text, u.emotion, u.label) == (6.2901, 8.2357, "Excuse me.", "neu", 0)
    assert u.wav == wav


def test_the_speaker_is_the_letter_of_the_suffix_not_of_the_dialog(tmp_path):
    write_dialog(
        tmp_path, "Ses02M_script01_1", [("F000", 0, 1, "neu", "a"), ("M000", 2, 3, "neu", "b")]
    )
    assert [u.speaker for u in data.read_iemocap(tmp_path)] == ["Ses02F", "Ses02M"]


def test_order_is_time_then_end_then_id_whatever_the_order_of_the_files(tmp_path):
    write_dialog(tmp_path, "Ses02F_impro01", [
        ("F000", 5, 6, "neu", "third"), ("F001", 7, 8, "sad", "fourth"),  # all F come first
        ("M000", 1, 2, "neu", "first"), ("M001", 5, 5.5, "ang", "second: same start, earlier end"),
        ("M003", 9, 10, "neu", "sixth"), ("F002", 9, 10, "neu", "fifth: same times"),
    ])  # fmt: skip
    texts = [u.text.split(":")[0] for u in data.read_iemocap(tmp_path)]
    assert texts == ["first", "second", "third", "fourth", "fifth", "sixth"]


def test_labels_and_their_merging(tmp_path):
    codes = ["neu", "hap", "exc", "ang", "sad", "xxx", "fru", "sur", "fea", "oth", "dis"]
    write_dialog(
        tmp_path, "Ses01F_impro01", [(f"F{i:03}", i, i + 0.5, c, "w") for i, c in enumerate(codes)]
    )
    labels = [u.label for u in data.read_iemocap(tmp_path)]
    assert labels == [0, 1, 1, 2, 3] + [None] * 6
    assert data.CLASSES == ("neu", "hap", "ang", "sad")  # Fig. 4


def test_one_dialog_name_may_be_the_beginning_of_another(tmp_path):
    write_dialog(tmp_path, "Ses05M_script01_1", [("F000", 0, 1, "neu", "short name")])
    write_dialog(tmp_path, "Ses05M_script01_1b", [("F000", 0, 1, "sad", "long name")])
    found = read(tmp_path)
    assert found["Ses05M_script01_1_F000"].text == "short name"
    assert found["Ses05M_script01_1b_F000"].dialog == "Ses05M_script01_1b"


def test_lines_and_files_that_are_no_utterances_are_passed_over(tmp_path):
    session = write_dialog(
        tmp_path, "Ses05F_impro03", [("F000", 0, 1, "neu", "words [LAUGHTER] here")]
    )
    words = session / "dialog" / "transcriptions" / "Ses05F_impro03.txt"
    words.write_text(
        "F: and so\nM:\n\nSes05F_impro03_FXX3 [000.1-000.2]: ah\nSes05F_impro03_FXX3 [000.3-000.4]: oh\n"
        "Ses05F_impro03_MXX0 [000.1000-000.2000]:\n" + words.read_text()
    )
    labels = session / "dialog" / "EmoEvaluation"
    (labels / "._Ses05F_impro03.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    (labels / "Categorical").mkdir()
    (labels / "Categorical" / "Ses05F_impro03_e2_cat.txt").write_text(
        "Ses05F_impro03_F000 :Anger; ()\n"
    )
    (words.parent / "._Ses05F_impro03.txt").write_bytes(b"\xff\xfe")
    (u,) = data.read_iemocap(tmp_path)
    assert u.text == "words [LAUGHTER] here"


def test_a_dialog_in_another_sessions_folder_is_said(tmp_path):
    write_dialog(tmp_path, "Ses01F_impro01", [("F000", 0, 1, "neu", "hm")])
    (tmp_path / "Session1").rename(tmp_path / "Session2")
    with pytest.raises(InputError, match="not an utterance of Ses01F_impro01 in session 2"):
        data.read_iemocap(tmp_path)


def test_tabs_and_carriage_returns_in_transcripts_are_white_space(tmp_path):
    session = write_dialog(tmp_path, "Ses01F_impro01", [("F000", 0, 1, "neu", "lovely\r party")])
    words = session / "dialog" / "transcriptions" / "Ses01F_impro01.txt"
    change(words, b"F000 [", b"F000 \t[")
    assert data.read_iemocap(tmp_path)[0].text == "lovely party"


def test_all_problems_come_at_once(tmp_path):
    for k in (1, 2, 3):
        session = write_dialog(tmp_path, f"Ses0{k}F_impro01", [("F000", 0, 1, "neu", "hm")])
        change(
            session / "dialog" / "EmoEvaluation" / f"Ses0{k}F_impro01.txt", b"\tneu\t", b"\tjoy\t"
        )
    with pytest.raises(InputError) as error:
        data.read_iemocap(tmp_path)
    assert len(str(error.value).splitlines()) == 3


def test_a_wrong_root_is_said(tmp_path):
    with pytest.raises(InputError, match="no Session1"):
        data.read_iemocap(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["session1", "SESSION1", "Session1"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_case_of_names_and_line_ends_do_not_matter(name, end, tmp_path):
    turns = [("F000", 0, 1, "neu", "hm"), ("M000", 1, 2, "sad", "so it is")]
    session = write_dialog(tmp_path, "Ses01F_impro01", turns)
    for folder in ("EmoEvaluation", "transcriptions"):
        change(session / "dialog" / folder / "Ses01F_impro01.txt", b"\n", end.encode())
    for wav in list(session.rglob("*.wav")):
        wav.rename(wav.with_suffix(".WAV"))
    session.rename(tmp_path / name)
    corpus = data.read_iemocap(tmp_path)
    assert [(u.session, u.text, u.emotion) for u in corpus] == [(1, "hm", "neu"), (1, "so it is", "sad")]
    assert all(u.wav.is_file() and u.wav.suffix == ".WAV" for u in corpus)


def test_scan_returns_what_is_whole_and_a_line_for_each_problem(tmp_path):
    for k in (1, 2):
        session = write_dialog(
            tmp_path, f"Ses0{k}F_impro01", [("F000", 0, 1, "neu", "a"), ("M000", 2, 3, "sad", "b")]
        )
    wav = next(session.rglob("*_M000.wav"))
    wav.unlink()
    problems = []
    corpus = data.read_iemocap(tmp_path, problems)
    assert [u.id for u in corpus] == ["Ses01F_impro01_F000", "Ses01F_impro01_M000", "Ses02F_impro01_F000"]
    assert len(problems) == 1 and problems[0].startswith(f"{wav}: missing")
    rows = data.reference_problems(corpus)
    assert len(rows) == 6 and "session 3: dialogues 0 (not 32)" in rows[3]


# --- a corpus of one's own; the table of what can be wrong with it is in test_robust.py

HEADER = "text,emotion,session,dialog,speaker"


def table(tmp_path, text):
    path = tmp_path / "mine.csv"
    path.write_bytes(text.encode())
    return data.read_csv(path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_with_any_line_end_keeps_the_order_of_its_rows(end, separator, tmp_path):
    rows = [HEADER, "z,sad,1,a,x", "y,fru,1,a,y", "", "x,calm,1,a,x"]
    corpus = table(tmp_path, end.join(rows).replace(",", separator))
    assert [(u.text, u.emotion, u.label, u.start) for u in corpus] == [
        ("z", "sad", 3, 0), ("y", "fru", None, 0), ("x", "neu", 0, 0)
    ]  # fmt: skip


def test_dialogues_in_pieces_are_put_together_and_ordered_by_start(tmp_path):
    rows = ["b2,sad,1,b,x,2", "a9,sad,1,a,x,9.5", "b1,sad,1,b,x,1", "a2,sad,1,a,x,2"]
    corpus = table(tmp_path, "\n".join([f"{HEADER},start", *rows]))
    assert [u.text for u in corpus] == ["a2", "a9", "b1", "b2"]


@pytest.mark.parametrize("name, code", {
    "neutral": "neu", "Neutral": "neu", "calm": "neu", "happy": "hap", "happiness": "hap", "joy": "hap",
    "excited": "exc", "excitement": "exc", "ANGRY": "ang", "anger": "ang", "sadness": "sad", "sad": "sad",
    "exc": "exc", "fear": "fear",
}.items())  # fmt: skip
def test_plain_names_of_emotions(name, code, tmp_path):
    (u,) = table(tmp_path, f"{HEADER}\nhm,{name},1,a,x")
    assert u.emotion == code


@pytest.mark.parametrize("text, message", [
    (f"{HEADER},text\nhm,sad,1,a,x,oh", "mine.csv.*(columns|cells)"),
    (f"{HEADER},text\nhm,sad,1,a,x", "mine.csv.*columns"),
    (f"{HEADER},\nhm,sad,1,a,x,", "columns"),
    (f"{HEADER}\n\n\nhm,,1,a,x", "mine.csv:4: no emotion"),
    (f'{HEADER}\n"two\nlines",sad,1,a,x\nhm,sad,1,a,', "mine.csv:4: no speaker"),
    (f"{HEADER},start\nhm,sad,1,a,x,nan", "mine.csv:2: start must be"),
    (f"{HEADER},start\nhm,sad,1,a,x,-1", "mine.csv:2: start must be"),
    (f"{HEADER},wav\nhm,sad,1,a,x,.", "mine.csv:2: .* is missing"),
    (f"{HEADER}\nhm,sad,01,a,x", "mine.csv:2: session must be"),
    (f'{HEADER}\n"hm"s,sad,1,a,x', "mine.csv: .*CSV"),
    (f"{HEADER},id\nhm,sad,1,a,x,a_7\nhm,sad,1,a,x,7", "mine.csv:3: id 7 is there"),
])  # fmt: skip
def test_more_that_can_be_wrong_with_a_table(text, message, tmp_path):
    with pytest.raises(InputError, match=message):
        table(tmp_path, text)


# --- folds and contexts


def test_folds_are_disjoint_in_speakers_and_complete(small_corpus):
    corpus = data.read_iemocap(small_corpus)
    four = {u.id for u in corpus if u.emotion in ("neu", "hap", "exc", "ang", "sad")}
    tested = Counter()
    for fold in range(1, 6):
        for seed in range(5):
            train, dev, test = data.split(corpus, fold, seed)
            speakers = [
                {u.id[:5] + u.id.rsplit("_", 1)[1][0] for u in part} for part in (train, dev, test)
            ]
            assert len(speakers[1]) == 1 and len(speakers[0]) == 7 and len(speakers[2]) == 2
            assert not speakers[0] & speakers[1] and not (speakers[0] | speakers[1]) & speakers[2]
            assert {u.id for u in train + dev + test} == four
            assert {u.id[4] for u in test} == {str(fold)}
        tested.update(u.id for u in test)
    assert set(tested) == four and set(tested.values()) == {1}


def test_the_development_speaker_is_drawn_by_the_seed(small_corpus):
    corpus = data.read_iemocap(small_corpus)
    drawn = [data.split(corpus, 5, seed)[1][0].speaker for seed in range(40)]
    assert drawn == [data.split(corpus, 5, seed)[1][0].speaker for seed in range(40)]
    assert len(set(drawn)) == 8  # all training speakers have their turn


def test_a_fold_that_cannot_be_is_said(small_corpus):
    corpus = [u for u in data.read_iemocap(small_corpus) if u.session != 2]
    with pytest.raises(InputError, match="fold 2"):
        data.split(corpus, 2, 0)


def test_context_is_four_before_and_four_after_in_the_same_dialogue(tmp_path):
    # Out-of-class turns and both speakers count; the two dialogues never meet.
    turns = [
        (f"{'FM'[i % 2]}{i:03}", i, i + 0.5, ("neu", "fru", "xxx")[i % 3], f"{i}") for i in range(6)
    ]
    write_dialog(tmp_path, "Ses01F_impro01", turns)
    write_dialog(tmp_path, "Ses01F_impro02", turns[:3])
    corpus = data.read_iemocap(tmp_path)
    windows = data.context_windows(corpus)
    assert windows.tolist() == [
        [-1, -1, -1, -1, 0, 1, 2, 3, 4], [-1, -1, -1, 0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 3, 4, 5, -1],
        [-1, 0, 1, 2, 3, 4, 5, -1, -1], [0, 1, 2, 3, 4, 5, -1, -1, -1], [1, 2, 3, 4, 5, -1, -1, -1, -1],
        [-1, -1, -1, -1, 6, 7, 8, -1, -1], [-1, -1, -1, 6, 7, 8, -1, -1, -1],
        [-1, -1, 6, 7, 8, -1, -1, -1, -1],
    ]  # fmt: skip
    assert data.context_windows(corpus, 1).tolist() == [[i] for i in range(9)]


def test_no_training_window_reaches_into_the_test_session(small_corpus):
    corpus = data.read_iemocap(small_corpus)
    row = {u.id: i for i, u in enumerate(corpus)}
    windows = data.context_windows(corpus)
    for fold in range(1, 6):
        train, dev, _ = data.split(corpus, fold, 0)
        seen = windows[[row[u.id] for u in train + dev]].unique()
        assert all(corpus[i].session != fold for i in seen.tolist() if i >= 0)


# --- waveforms


def test_load_wav_scales_16_bit_samples(tmp_path):
    write_wav(tmp_path / "a.wav", [0.0, 0.5, -1.0, 1.0])
    x = data.load_wav(tmp_path / "a.wav")
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.tensor([0.0, 0.5, -1.0, 1.0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled(rate, tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    write_wav(tmp_path / "a.wav", tone, rate)
    x = data.load_wav(tmp_path / "a.wav")
    assert len(x) == 16000
    expected = torch.from_numpy(np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)).float()
    assert (x - expected)[500:-500].abs().max() < 0.02


def chunk(name, body, size=None):
    """One chunk of a RIFF file; a body of odd length gets a byte of padding."""
    size = len(body) if size is None else size
    return name + struct.pack("<I", size) + body + b"\0" * (len(body) % 2)


def riff(*chunks, size=None, kind=b"RIFF"):
    body = b"WAVE" + b"".join(chunks)
    return kind + struct.pack("<I", len(body) if size is None else size) + body


def form(code=1, channels=1, rate=16000, bits=16, rest=b""):
    step = channels * bits // 8
    return chunk(b"fmt ", struct.pack("<HHIIHH", code, channels, rate, rate * step, step, bits) + rest)


def extensible(code, bits=16):
    """WAVE_FORMAT_EXTENSIBLE: the format is the first part of a GUID."""
    guid = struct.pack("<H", code) + bytes.fromhex("000000001000800000aa00389b71")
    return form(65534, bits=bits, rest=struct.pack("<HHI", 22, bits, 4) + guid)


PCM = struct.pack("<501h", *range(-250, 251))
DATA, INFO = chunk(b"data", PCM), chunk(b"LIST", b"INFOISFT\x05\0\0\0Lavf\0")  # odd
READ = {
    "plain": riff(form(), DATA),
    "extensible": riff(extensible(1), DATA),
    "fmt of 18 bytes": riff(form(rest=b"\0\0"), DATA),
    "LIST before": riff(form(), INFO, DATA),
    "LIST after": riff(form(), DATA, INFO),
    "LIST on both sides": riff(chunk(b"JUNK", bytes(27)), form(), INFO, DATA, INFO),
    "an even chunk": riff(form(), chunk(b"fact", bytes(4)), DATA),
    "data of odd size": riff(form(), chunk(b"data", PCM + b"x")),
    "size 0 left open": riff(form(), chunk(b"data", PCM, 0), size=0),
    "size -1 left open": riff(form(), INFO, chunk(b"data", PCM, 0xFFFFFFFF), size=0xFFFFFFFF),
    "no padding at the end": riff(form(), chunk(b"data", PCM + b"x"))[:-1],
}


@pytest.mark.parametrize("case", READ)
def test_wavs_as_people_have_them_are_read(case, tmp_path):
    (tmp_path / "a.wav").write_bytes(READ[case])
    assert torch.equal(data.load_wav(tmp_path / "a.wav") * 32768, torch.arange(-250.0, 251.0))


FOREIGN = {  # other files under the name of a wav, a label file or a transcript
    "Git-LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html>\n<html></html>", "web page in its place"),
    "SPHERE": (b"NIST_1A\n   1024\nsample_count -i 16000\n", "NIST SPHERE"),
    "FLAC": (b"fLaC\0\0\0\x22" + bytes(34), "FLAC file"),
}
REFUSED = {
    "24 bit": (riff(form(bits=24), DATA), "format 1, 1 channel.* of 24 bits"),
    "24 bit, extensible": (riff(extensible(1, 24), DATA), "format 1, 1 channel.* of 24 bits"),
    "32 bit": (riff(form(bits=32), DATA), "format 1, 1 channel.* of 32 bits"),
    "8 bit": (riff(form(bits=8), DATA), "format 1, 1 channel.* of 8 bits"),
    "float": (riff(form(3, bits=32), DATA), "format 3, 1 channel.* of 32 bits"),
    "float, extensible": (riff(extensible(3, 32), DATA), "format 3, 1 channel.* of 32 bits"),
    "float of 16 bit": (riff(form(3), DATA), "format 3, 1 channel.* of 16 bits"),
    "A-law": (riff(form(6, bits=8), DATA), "format 6, "),
    "mu-law": (riff(form(7, bits=8), DATA), "format 7, "),
    "stereo": (riff(form(channels=2), DATA), "format 1, 2 channel"),
    "RIFX": (riff(form(), DATA, kind=b"RIFX"), "not usable as a WAV"),
    "RF64": (riff(form(), DATA, kind=b"RF64"), "not usable as a WAV"),
    "AVI": (riff(form(), DATA).replace(b"WAVE", b"AVI "), "not usable as a WAV"),
    "MP3": (b"ID3\4" + bytes(200), "not usable as a WAV"),
    "data before fmt": (riff(DATA, form()), "format 0"),
    "no fmt": (riff(INFO, DATA), "format 0"),
    "no data": (riff(form(), INFO), "no samples"),
    "one byte": (riff(form(), chunk(b"data", b"x")), "no samples"),
    "cut in its header": (riff(form(), DATA)[:30], "a.wav: "),
    **FOREIGN,
}


@pytest.mark.parametrize("case", REFUSED)
def test_forms_that_are_not_read_are_named_with_the_command_that_converts(case, tmp_path):
    content, message = REFUSED[case]
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        data.load_wav(tmp_path / "a.wav")
    (said,) = str(error.value).splitlines()
    assert said.startswith(f"{tmp_path}/a.wav: ") and "ffmpeg -i OLD.wav" in said


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("folder", ["EmoEvaluation", "transcriptions"])
def test_another_file_in_the_place_of_labels_or_words_is_named(case, folder, tmp_path):
    session = write_dialog(tmp_path, "Ses01F_impro01", [("F000", 0, 1, "neu", "hm")])
    path = session / "dialog" / folder / "Ses01F_impro01.txt"
    path.write_bytes(FOREIGN[case][0])
    with pytest.raises(InputError, match=FOREIGN[case][1]) as error:
        data.read_iemocap(tmp_path)
    assert str(error.value).splitlines()[0].startswith(f"{path}: ")


def test_clip_trims_leading_silence_and_keeps_five_seconds():
    loud, quiet = torch.full((16000,), 0.5), torch.full((8000,), 1e-5)  # 94 dB apart
    assert torch.equal(data.clip(torch.cat([quiet, loud, quiet])), torch.cat([loud, quiet]))
    whisper = torch.full((8000,), 0.001)  # 54 dB below: not silence
    assert len(data.clip(torch.cat([whisper, loud]))) == 24000
    ramp = 0.5 + torch.arange(100000) / 1e6
    assert torch.equal(data.clip(ramp), ramp[:80000])


def test_clip_never_gives_back_nothing():
    assert len(data.clip(torch.zeros(16000))) == 16000  # all silence: kept
    assert len(data.clip(torch.tensor([0.5]))) == 400  # 25 ms: one frame
    spike = torch.zeros(16000)
    spike[-1] = 1.0
    assert len(data.clip(spike)) >= 400


# --- the cache


def test_clips_are_trimmed_cut_and_only_of_the_four_classes(tmp_path):
    session = write_dialog(tmp_path, "Ses01F_impro01", [
        ("F000", 0, 7, "neu", "long"), ("M000", 8, 9, "fru", "out of class"), ("F001", 9, 10, "sad", "x"),
    ])  # fmt: skip
    quiet = session / "sentences" / "wav" / "Ses01F_impro01" / "Ses01F_impro01_F001.wav"
    write_wav(quiet, [0.0] * 8000 + [0.5] * 8000)
    corpus = data.read_iemocap(tmp_path)
    clips = data.load_clips(corpus)
    assert clips[1] is None and [len(clips[i]) for i in (0, 2)] == [80000, 8000]
    torch.testing.assert_close(clips[0], data.load_wav(corpus[0].wav)[:80000])


def test_clip_all_removes_every_silent_window():
    loud, quiet = torch.full((800,), 0.5), torch.full((1200,), 1e-5)
    x = torch.cat([quiet, loud, quiet, 2 * loud, quiet])
    assert torch.equal(data.clip(x, "all"), torch.cat([loud, 2 * loud]))
    assert len(data.clip(torch.zeros(16000), "all")) == 16000


RAW = {
    "audio": [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (5000, 400, 2345, 7000)],
    "text": ["i hate it", "", "all alone again", "lovely [LAUGHTER] party"],
}  # fmt: skip


def named(ids):
    return [SimpleNamespace(id=id, session=1) for id in ids]


def test_a_cached_state_never_depends_on_another_session(tiny, tmp_path):
    """To the last bit: batches hold one session, whatever the lengths in the others."""
    corpus = [SimpleNamespace(id=f"{k}", session=1 + k % 2) for k in range(20)]
    texts = [" ".join(["hate"] * (1 + k % 7)) for k in range(20)]
    other = [t if u.session == 1 else "so lovely , all alone again " * 4 for u, t in zip(corpus, texts)]
    a = data.cache_states(tmp_path / "a", tiny["text"], corpus, texts, "cpu")
    b = data.cache_states(tmp_path / "b", tiny["text"], corpus, other, "cpu")
    for k in range(0, 20, 2):
        assert torch.equal(a.read(k), b.read(k))


@pytest.mark.parametrize("kept", [True, False])
def test_cached_states_are_the_live_ones_rounded_to_16_bits(kept, tiny, tmp_path):
    for m, upstream in tiny.items():
        cached = data.cache_states(tmp_path / m, upstream, named("abcd"), RAW[m], "cpu")
        if kept:
            cached.keep()
        for rows in (torch.tensor([2, 0, 3]), torch.tensor([1])):
            x, mask = cached(rows)
            y, live_mask = data.live(upstream, RAW[m])(rows)
            assert torch.equal(mask, live_mask)
            torch.testing.assert_close(x, y.detach(), atol=1e-3, rtol=2**-10)
            assert torch.equal(x, x.half().float())  # 16 bits were stored
        address = cached(torch.tensor([0]))[0].data_ptr()
        assert cached(torch.tensor([1]))[0].data_ptr() == address  # one kept buffer
        cached.kept, cached.buffer = [], None
        assert torch.equal(cached(torch.tensor([1]))[0], x)


def test_live_states_are_those_of_each_input_alone_in_the_order_asked_for(tiny):
    """Forty inputs of unlike length. The texts are mostly padding, so they take several runs."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1 + 7 * k % 11 for k in range(40)]
    raw = {"text": [" ".join(["hate"] * (30 if k % 13 == 5 else 1 + k % 4)) for k in range(40)],
           "audio": [torch.randn(400 + 320 * n, generator=generator) for n in lengths]}  # fmt: skip
    rows = torch.randperm(40, generator=generator)
    for m, upstream in tiny.items():
        seen = []
        spy = lambda x: (seen.append(len(x)), upstream(x))[1]  # noqa: E731
        states, mask = data.live(spy, raw[m])(rows)
        assert sum(seen) == 40 and (len(seen) > 1) == (m == "text")
        assert mask.sum(dim=1).tolist() == [upstream([raw[m][i]])[1].sum() for i in rows]
        alone = torch.cat([upstream([raw[m][i]])[0][0] for i in rows])
        torch.testing.assert_close(states, alone, atol=1e-4, rtol=1e-3)


class Counting:
    """Counts the utterances that an upstream is asked for, and dies at one call."""

    def __init__(self, upstream, dies_at=None):
        self.upstream, self.dies_at, self.calls = upstream, dies_at, 0

    def __call__(self, raw):
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        return self.upstream(raw)


def test_the_cache_goes_on_after_a_kill_and_never_reads_a_stale_state(tiny, tmp_path, monkeypatch):
    raw = [f"i hate it {'so ' * (i % 9)}" for i in range(32 * 6)]
    ids = named(map(str, range(len(raw))))

    def cache(folder, raw=raw, dies_at=None):
        upstream = Counting(tiny["text"], dies_at)
        try:
            return upstream.calls, data.cache_states(folder, upstream, ids, raw, "cpu"), upstream
        except KeyboardInterrupt:
            return None

    def everything(cached):
        return [np.load(file) for file in cached.files]

    _, whole, _ = cache(tmp_path / "a")
    assert len(list((tmp_path / "a").glob("*.npy"))) == len(raw)
    assert cache(tmp_path / "a")[2].calls == 0
    # A kill between two batches, then one in the middle of a batch.
    assert cache(tmp_path / "b", dies_at=3) is None
    write, written = data.write_whole, []

    def dying(path, content):
        written.append(path)
        if len(written) == 50:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(data, "write_whole", dying)
    assert cache(tmp_path / "b") is None
    monkeypatch.setattr(data, "write_whole", write)
    _, again, upstream = cache(tmp_path / "b")
    assert upstream.calls == 3  # of six batches two and one were whole
    assert all(np.array_equal(a, b) for a, b in zip(everything(whole), everything(again)))
    # Another text of the same id has another file.
    changed = ["lovely party", *raw[1:]]
    _, other, upstream = cache(tmp_path / "b", changed)
    assert upstream.calls >= 1 and other.files[0] != again.files[0] and other.files[1:] == again.files[1:]
    expected, _ = tiny["text"](["lovely party"])
    torch.testing.assert_close(other(torch.tensor([0]))[0], expected[0].detach(), atol=2e-3, rtol=2e-3)


def test_a_batch_of_the_cache_holds_inputs_of_like_length(tmp_path):
    """Otherwise most of a batch would be padding."""
    asked = []

    def upstream(raw):
        asked.append([len(x) for x in raw])
        mask = torch.tensor([[t < len(x) for t in range(max(map(len, raw)))] for x in raw])
        return torch.ones(*mask.shape, 2, 3), mask

    clips = [torch.zeros(1 + 37 * k % 101) for k in range(100)]
    data.cache_states(tmp_path, upstream, named(map(str, range(100))), clips, "cpu")
    assert sum(asked, []) == sorted(map(len, clips), reverse=True) and len(asked) == 4


def test_states_are_kept_only_where_they_fit(tiny, tmp_path, monkeypatch):
    cached = data.cache_states(tmp_path, tiny["text"], named("ab"), ["i hate it", None], "cpu")
    monkeypatch.setattr(data, "KEEP_ON_CPU", 0)
    cached.keep()
    assert not cached.kept and len(cached(torch.tensor([0]))[0])
    monkeypatch.setattr(data, "KEEP_ON_CPU", cached.files[0].stat().st_size)
    cached.keep()
    cached.files[0].unlink()  # from now on, it comes from memory
    assert len(cached(torch.tensor([0]))[0]) and cached.kept[1] is None
    cached.kept, cached.buffer = [], None
    with pytest.raises(InputError, match="missing"):
        cached(torch.tensor([0]))


@pytest.mark.parametrize("where", ["write_bytes", "replace"])
def test_a_kill_leaves_no_half_file(where, tiny, tmp_path, monkeypatch):
    def dies(*args):
        if where == "write_bytes":
            args[0].touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(*((data.Path, where) if where == "write_bytes" else (os, where)), dies)
    with pytest.raises(KeyboardInterrupt):
        data.cache_states(tmp_path, tiny["text"], named("a"), ["i hate it"], "cpu")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    # A kill that leaves no time for cleaning up: the half file has another name.
    cached = data.cache_states(tmp_path, tiny["text"], named("a"), ["i hate it"], "cpu")
    whole = cached.files[0].read_bytes()
    cached.files[0].rename(f"{cached.files[0]}.1.part")
    again = data.cache_states(tmp_path, tiny["text"], named("a"), ["i hate it"], "cpu")
    assert again.files == cached.files and again.files[0].read_bytes() == whole


def test_ids_of_ones_own_are_names_of_files_in_the_folder(tiny, tmp_path):
    ids = ["../a/b", "a b", "é:*", "CON.1"]
    cached = data.cache_states(tmp_path / "c", tiny["text"], named(ids), RAW["text"], "cpu")
    assert {p.name for p in (tmp_path / "c").iterdir()} == {p.name for p in cached.files}
    assert len(set(cached.files)) == 4 and list(tmp_path.iterdir()) == [tmp_path / "c"]


def test_a_damaged_state_is_named(tiny, tmp_path):
    cached = data.cache_states(tmp_path, tiny["text"], named("a"), ["i hate it"], "cpu")
    cached.files[0].write_bytes(cached.files[0].read_bytes()[:100])
    with pytest.raises(InputError, match=r"a-.*\.npy: .*delete it"):
        cached(torch.tensor([0]))


def test_a_state_that_does_not_fit_16_bits_is_an_error_not_infinity(tmp_path):
    def loud(raw):
        return torch.full((len(raw), 1, 1, 1), 70000.0), torch.ones(len(raw), 1, dtype=torch.bool)

    with pytest.raises(InputError, match="an-id.*16 bits"):
        data.cache_states(tmp_path, loud, named(["an-id"]), ["a"], "cpu")


def test_a_batch_embeds_each_distinct_utterance_once():
    windows = torch.tensor([[-1, 0, 1], [0, 1, 2], [1, 2, -1], [-1, 3, -1]])
    asked = []

    def text(rows):
        asked.append(rows.tolist())
        return rows[:, None].float(), rows[:, None] >= 0

    sources = {"text": text}
    states, mask, context = data.batch(torch.tensor([1, 2]), windows, sources, "cpu")["text"]
    assert asked == [[0, 1, 2]]
    assert context.tolist() == [[0, 1, 2], [1, 2, -1]]
    states, mask, context = data.batch(torch.tensor([3, 1]), windows, sources, "cpu")["text"]
    assert asked[-1] == [0, 1, 2, 3] and context.tolist() == [[-1, 3, -1], [0, 1, 2]]


# --- the full release's counts, and the toy


def test_reference_tables_agree_with_the_paper_and_with_themselves():
    assert sum(data.EMOTIONS.values()) == 10039
    columns = dict(zip(data.SESSION_COLUMNS, zip(*data.SESSIONS.values())))
    totals = {name: sum(column) for name, column in columns.items()}
    assert totals == {
        "dialogues": 151, "utterances": 10039, "ang": 1103, "hap": 595, "exc": 1041, "sad": 1084,
        "neu": 1708, "impro": 2943, "script": 2588, "woman": 2649, "man": 2882,
    }  # fmt: skip
    assert totals["hap"] + totals["exc"] == 1636
    for row in data.SESSIONS.values():
        assert sum(row[2:7]) == row[7] + row[8] == row[9] + row[10]


def test_the_toy_is_written_once_and_never_over_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="name an empty folder"):
        data.write_toy(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    root = data.write_toy(tmp_path / "toy")
    files = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert data.write_toy(root) == root
    emotions = {u.emotion for u in data.read_iemocap(root)}
    assert emotions == {"neu", "hap", "exc", "ang", "sad", "xxx"}  # happy merged with excited, and others
    again = data.write_toy(tmp_path / "again")
    assert {p.relative_to(again): p.read_bytes() for p in again.rglob("*") if p.is_file()} == {
        p.relative_to(root): content for p, content in files.items()
    }


def test_data_py_check_lists_every_problem_and_fails(small_corpus, capsys):
    command = [sys.executable, ROOT / "data.py", "check", small_corpus]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "session 1: dialogues 1 (not 28)" in done.stderr
    assert "problem(s)" in done.stderr and "Traceback" not in done.stderr


def test_texts_spoken_in_another_session_are_found(tmp_path):
    for s, text in ((1, "I know, you know."), (2, "i know you know"), (3, "something else")):
        write_dialog(tmp_path, f"Ses0{s}F_script01_1", [("F000", 0, 1, "neu", text)])
    found = data.texts_elsewhere(data.read_iemocap(tmp_path))
    assert found == {"Ses01F_script01_1_F000", "Ses02F_script01_1_F000"}
