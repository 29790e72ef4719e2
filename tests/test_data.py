"""data.py on files that the tests write: IEMOCAP, clips, states, tables, the toy."""

import csv
import os
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import data
from data import InputError
from tests.conftest import change, write_dialog, write_wav

# --- IEMOCAP --------------------------------------------------------------------------


def read(root):
    corpus, problems = data.read_iemocap(root)
    assert problems == []
    return corpus


def test_one_utterance_as_it_is_on_the_disk(tmp_path):
    session = tmp_path / "Session1"
    files = {
        "EmoEvaluation": "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
        "[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]\n"
        "C-E2:\tNeutral;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\nA-F1:\tdom  ;\t()\n",
        "transcriptions": "Ses01F_impro01_F000 [006.2901-008.2357]: Excuse  me.\t \r\n",
    }
    for folder, text in files.items():
        (session / "dialog" / folder).mkdir(parents=True)
        (session / "dialog" / folder / "Ses01F_impro01.txt").write_bytes(text.encode())
    wav = session / "sentences" / "wav" / "Ses01F_impro01" / "Ses01F_impro01_F000.wav"
    write_wav(wav, [0.1] * 31130)
    (u,) = read(tmp_path)
    assert u.id == "Ses01F_impro01_F000"
    assert (u.session, u.dialog, u.speaker) == (1, "Ses01F_impro01", "Ses01F")
    assert (u.start, u.end, u.text) == (6.2901, 8.2357, "Excuse me.")
    assert (u.emotion, u.label, u.wav) == ("neu", 0, wav)


def test_the_speaker_is_the_letter_of_the_suffix(tmp_path):
    turns = [("F000", 0, 1, "neu", "a"), ("M000", 2, 3, "neu", "b")]
    write_dialog(tmp_path, "Ses02M_script01_1", turns)
    assert [u.speaker for u in read(tmp_path)] == ["Ses02F", "Ses02M"]


def test_the_order_is_by_start_then_end_then_id(tmp_path):
    turns = [
        ("F000", 5, 6, "neu", "third"),
        ("F001", 7, 8, "sad", "fourth"),
        ("M000", 1, 2, "neu", "first"),
        ("M001", 5, 5.5, "ang", "second"),
        ("M003", 9, 10, "neu", "sixth"),
        ("F002", 9, 10, "neu", "fifth"),
    ]
    write_dialog(tmp_path, "Ses02F_impro01", turns)
    texts = [u.text for u in read(tmp_path)]
    assert texts == ["first", "second", "third", "fourth", "fifth", "sixth"]


def test_happy_and_excited_are_one_class_and_other_emotions_none(tmp_path):
    emotions = "neu hap exc ang sad xxx fru sur fea oth dis".split()
    turns = [(f"F{i:03}", i, i + 0.1, e, "w") for i, e in enumerate(emotions)]
    write_dialog(tmp_path, "Ses01F_impro01", turns)
    corpus = read(tmp_path)
    assert [u.emotion for u in corpus] == emotions
    assert [u.label for u in corpus] == [0, 1, 1, 2, 3] + 6 * [None]
    assert data.CLASSES == ("neu", "hap", "ang", "sad")  # Fig. 4


def test_a_dialogue_name_may_be_the_beginning_of_another(tmp_path):
    for dialog in ("Ses05M_script01_1", "Ses05M_script01_1b"):
        write_dialog(tmp_path, dialog, [("F000", 0, 0.1, "neu", dialog)])
    assert [(u.dialog, u.text) for u in read(tmp_path)] == [
        ("Ses05M_script01_1", "Ses05M_script01_1"),
        ("Ses05M_script01_1b", "Ses05M_script01_1b"),
    ]


def test_lines_and_files_that_are_no_utterances_are_skipped(tmp_path):
    turns = [("F000", 0, 0.1, "neu", "words [LAUGHTER] here")]
    session = write_dialog(tmp_path, "Ses05F_impro03", turns)
    words = session / "dialog" / "transcriptions" / "Ses05F_impro03.txt"
    lines = "F: and so\nM:\n\nSes05F_impro03_FXX3 [000.1000-000.2000]: ah\n"
    lines += "Ses05F_impro03_FXX3 [000.3000-000.4000]: oh\n"
    words.write_text(lines + words.read_text() + "Ses05F_impro03_MXX0 [000.1-000.2]:\n")
    labels = session / "dialog" / "EmoEvaluation"
    for folder in (labels, words.parent):
        (folder / "._Ses05F_impro03.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    (labels / "Categorical").mkdir()
    single = labels / "Categorical" / "Ses05F_impro03_e2_cat.txt"
    single.write_text("Ses05F_impro03_F000 :Anger; ()\n")
    (tmp_path / "Session1.zip").write_bytes(b"PK")
    assert [u.text for u in read(tmp_path)] == ["words [LAUGHTER] here"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_marks_do_not_matter(end, mark, tmp_path):
    turns = [("F000", 0, 0.1, "neu", "hm"), ("M000", 1, 1.1, "sad", "so \t  it is")]
    session = write_dialog(tmp_path, "Ses01F_impro01", turns)
    for folder in ("EmoEvaluation", "transcriptions"):
        path = session / "dialog" / folder / "Ses01F_impro01.txt"
        change(path, b"\n", end)
        path.write_bytes(mark + path.read_bytes())
    found = [(u.session, u.text, u.emotion) for u in read(tmp_path)]
    assert found == [(1, "hm", "neu"), (1, "so it is", "sad")]


def test_the_reference_counts_agree_with_the_paper():
    totals = [sum(column) for column in zip(*data.SESSION_COUNTS.values(), strict=True)]
    counts = dict(zip(data.COUNTED, totals, strict=True))
    assert counts.pop("dialogues") == 151
    assert counts.pop("utterances") == 10039
    # §3.1: 5,531 utterances, of which 1,103 are angry, 1,708 neutral and 1,084 sad.
    assert counts == {"ang": 1103, "hap": 595, "exc": 1041, "sad": 1084, "neu": 1708}
    assert sum(counts.values()) == 5531


# --- Folds and contexts ---------------------------------------------------------------


def speakers(corpus, rows):
    return {corpus[r].id[:5] + corpus[r].id.rpartition("_")[2][0] for r in rows}


def test_folds_are_complete_and_disjoint_in_speakers(small_corpus):
    corpus = read(small_corpus)
    targets = [r for r, u in enumerate(corpus) if u.emotion != "fru"]
    assert 0 < len(targets) < len(corpus)
    tested = []
    for fold in range(1, 6):
        for seed in range(5):
            train, dev, test = data.split(corpus, fold, seed)
            assert sorted(train + dev + test) == targets
            assert {corpus[r].id[4] for r in test} == {str(fold)}
            names = [speakers(corpus, rows) for rows in (train, dev, test)]
            assert [len(found) for found in names] == [7, 1, 2]
            assert len(set.union(*names)) == 10
        tested += test
    assert sorted(tested) == targets


def test_seed_and_fold_draw_the_development_speaker(small_corpus):
    corpus = read(small_corpus)

    def draw(fold):
        return [
            corpus[data.split(corpus, fold, seed)[1][0]].speaker for seed in range(40)
        ]

    assert draw(5) == draw(5)
    assert len(set(draw(5))) == 8  # each training speaker has a turn
    # Another fold draws anew: the women and men are in another order.
    assert [s[5] for s in draw(5)] != [s[5] for s in draw(1)]


def test_a_fold_without_test_or_development_utterances_is_an_error(small_corpus):
    corpus = read(small_corpus)
    some = [u for u in corpus if u.session != 2]
    with pytest.raises(InputError, match="--fold 2"):
        data.split(some, 2, 0)
    one_speaker = [u for u in corpus if u.speaker in ("Ses01F", "Ses02F", "Ses02M")]
    with pytest.raises(InputError, match="--fold 2"):
        data.split(one_speaker, 2, 0)


def test_a_window_is_four_before_and_four_after_in_the_same_dialogue(tmp_path):
    emotions = ["neu", "fru", "xxx", "sad", "fru", "xxx"]
    turns = []
    for i, emotion in enumerate(emotions):
        turns.append((f"{'FM'[i % 2]}{i:03}", i, i + 0.1, emotion, f"{i}"))
    write_dialog(tmp_path, "Ses01F_impro01", turns)
    write_dialog(tmp_path, "Ses01F_impro02", turns[:3])
    corpus = read(tmp_path)
    assert data.context_windows(corpus).tolist() == [
        [-1, -1, -1, -1, 0, 1, 2, 3, 4],
        [-1, -1, -1, 0, 1, 2, 3, 4, 5],
        [-1, -1, 0, 1, 2, 3, 4, 5, -1],
        [-1, 0, 1, 2, 3, 4, 5, -1, -1],
        [0, 1, 2, 3, 4, 5, -1, -1, -1],
        [1, 2, 3, 4, 5, -1, -1, -1, -1],
        [-1, -1, -1, -1, 6, 7, 8, -1, -1],
        [-1, -1, -1, 6, 7, 8, -1, -1, -1],
        [-1, -1, 6, 7, 8, -1, -1, -1, -1],
    ]
    assert data.context_windows(corpus, 1).tolist() == [[row] for row in range(9)]


def test_no_training_window_reaches_into_the_test_session(small_corpus):
    corpus = read(small_corpus)
    windows = data.context_windows(corpus)
    for fold in range(1, 6):
        train, dev, _ = data.split(corpus, fold, 0)
        seen = windows[train + dev].unique().tolist()
        assert all(corpus[row].session != fold for row in seen if row >= 0)


# --- Waveforms ------------------------------------------------------------------------


def test_load_wav_scales_16_bits_to_one(tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, [0.0] * 4)
    path.write_bytes(
        path.read_bytes()[:44] + np.array([0, 16384, -32768, 1], "<i2").tobytes()
    )
    x = data.load_wav(path)
    assert x.dtype == torch.float32
    assert x.tolist() == [0.0, 0.5, -1.0, 2**-15]


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_become_16_khz_without_aliases(rate, tmp_path):
    def tones(n, rate, pitches):
        seconds = np.arange(n) / rate
        return sum(0.2 * np.sin(2 * np.pi * pitch * seconds) for pitch in pitches)

    low = (150, 440, 2900)  # Hz
    high = (10500,) if rate > 22050 else ()  # above what 16 kHz can hold
    write_wav(tmp_path / "a.wav", tones(rate // 2, rate, low + high), rate)
    x = data.load_wav(tmp_path / "a.wav")
    assert len(x) == 8000
    error = x.numpy() - tones(8000, 16000, low)
    assert np.abs(error[200:-200]).max() < 0.02


def test_clip_removes_leading_silence_then_keeps_five_seconds():
    loud = torch.full((16000,), 0.5)
    quiet = torch.full((8000,), 1e-5)  # 94 dB below
    whisper = torch.full((8000,), 0.001)  # 54 dB below, which is no silence
    speech = 0.5 + torch.arange(96000) / 1e6  # 6 s
    silence = torch.zeros(32000)  # 2 s
    cases = [
        ([quiet, loud, quiet, loud, quiet], [loud, quiet, loud, quiet]),
        ([whisper, loud], [whisper, loud]),
        ([speech], [speech[:80000]]),
        ([silence, speech], [speech[:80000]]),
    ]
    for parts, expected in cases:
        assert torch.equal(data.clip(torch.cat(parts)), torch.cat(expected))


@pytest.mark.parametrize("n", [1, 399, 400, 401, 799, 16000])
def test_clip_is_never_empty(n):
    assert len(data.clip(torch.zeros(n))) == max(n, 400)  # silence is kept
    spike = torch.zeros(n)
    spike[-1] = 0.5
    clip = data.clip(spike)
    assert 400 <= len(clip) <= 800
    assert n > 400 and n % 400 or 0.5 in clip


def test_load_clip_cuts_the_recording_and_needs_one(tmp_path):
    write_wav(tmp_path / "a.wav", [0.0] * 4000 + [0.5] * 96000)
    clip = data.load_clip(SimpleNamespace(wav=tmp_path / "a.wav"))
    assert len(clip) == 80000
    assert clip.min() > 0.49
    with pytest.raises(InputError, match="a_1.*wav.*--fusion text-fc"):
        data.load_clip(SimpleNamespace(id="a_1", wav=None))


# --- Layer states ---------------------------------------------------------------------


class Fake(nn.Module):
    """An upstream whose states are easy to compute: the input, times two weights."""

    def __init__(self, dies_at=None):
        super().__init__()
        self.model = nn.Linear(1, 2, bias=False).requires_grad_(False)
        self.model.weight.data = torch.tensor([[1.0], [10.0]])
        self.calls = []  # the lengths of the inputs of each
        self.dies_at = dies_at

    def forward(self, inputs):
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        self.calls.append([len(x) for x in inputs])
        return [x[:, None, None] * self.model.weight for x in inputs]

    def open(self, what):
        return [self.model.weight.requires_grad_()]


def make_source(folder, inputs, upstream=None, ids=None):
    """Make a source for inputs by row, with ids u0, u1, ... and a fake upstream."""
    ids = ids or [f"u{row}" for row in range(max(inputs) + 1)]
    corpus = [SimpleNamespace(id=name) for name in ids]
    return data.Source(upstream or Fake(), inputs, corpus, folder, "cpu")


def ramps(*lengths):
    return {row: torch.arange(1.0, n + 1) for row, n in enumerate(lengths)}


CLIPS = [
    torch.randn(n, generator=torch.Generator().manual_seed(n))
    for n in (5000, 400, 2345, 7000)
]
TEXTS = ["i hate it", "", "all alone again", "lovely [LAUGHTER] party"]


@pytest.mark.parametrize("modality, raw", [("audio", CLIPS), ("text", TEXTS)])
def test_cached_states_are_the_live_ones_rounded_to_16_bits(
    modality, raw, tiny, tmp_path
):
    upstream = tiny[modality]
    inputs = {row: upstream.prepare(one) for row, one in enumerate(raw)}
    source = make_source(tmp_path, inputs, upstream)
    source.fill()
    rows = [2, 0, 3, 2]
    expected = [upstream([inputs[row]])[0] for row in rows]
    for _ in range(2):  # first from the files, then from memory
        for states, alone in zip(source(rows), expected, strict=True):
            assert torch.equal(states, alone.half())
    source.open("bottom")
    for states, alone in zip(source(rows), expected, strict=True):
        torch.testing.assert_close(states, alone, atol=1e-5, rtol=1e-4)
    assert states.requires_grad


def test_fill_computes_each_missing_file_alone_and_resumes_after_a_kill(tmp_path):
    inputs = ramps(3, 7, 5, 4)
    whole = make_source(tmp_path / "whole", inputs)
    whole.fill()
    assert whole.upstream.calls == [[3], [7], [5], [4]]

    killed = make_source(tmp_path / "killed", inputs, Fake(dies_at=2))
    with pytest.raises(KeyboardInterrupt):
        killed.fill()
    # What a kill leaves of a file that was being written has another name.
    (tmp_path / "killed" / f"{killed.files[2].name}.abc.part").write_bytes(b"torn")
    again = make_source(tmp_path / "killed", inputs)
    again.fill()
    assert again.upstream.calls == [[5], [4]]
    for a, b in zip(whole([0, 1, 2, 3]), again([0, 1, 2, 3]), strict=True):
        assert torch.equal(a, b)
    third = make_source(tmp_path / "killed", inputs)
    third.fill()
    assert third.upstream.calls == []


def test_another_input_never_reads_a_stale_file(tmp_path):
    make_source(tmp_path, ramps(3, 4)).fill()
    changed = {0: torch.tensor([5.0, 2.0, 3.0]), 1: torch.arange(1.0, 5.0)}
    source = make_source(tmp_path, changed)
    source.fill()
    assert source.upstream.calls == [[3]]
    assert source([0])[0][:, 0, 0].tolist() == [5.0, 2.0, 3.0]


def test_ids_may_have_any_characters(tmp_path):
    ids = ["../a/b", "a b", "a_b", "é:*", "CON.1", "a" * 150]
    source = make_source(tmp_path / "c", ramps(1, 2, 3, 4, 5, 6), ids=ids)
    source.fill()
    assert len(list((tmp_path / "c").iterdir())) == 6
    assert os.listdir(tmp_path) == ["c"]
    assert [len(states) for states in source([0, 1, 2, 3, 4, 5])] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("value", [float("nan"), 7000.0])  # 10 * 7000 is over 65,504
def test_states_that_16_bits_cannot_hold_are_an_error(value, tmp_path):
    source = make_source(tmp_path, {0: torch.tensor([value])}, ids=["an-id"])
    with pytest.raises(InputError, match="an-id"):
        source.fill()
    assert not list(tmp_path.iterdir())


def test_states_are_kept_in_memory_up_to_a_limit(tmp_path, monkeypatch):
    source = make_source(tmp_path, ramps(4, 4))
    source.fill()
    monkeypatch.setattr(data, "KEEP_ON_CPU", 4 * 2 * 1 * 2)  # bytes of one: 16 bits
    source([0, 1])
    for file in source.files.values():
        file.unlink()
    assert len(source([0])[0]) == 4
    with pytest.raises(OSError, match="u1-"):
        source([1])


def test_a_live_source_computes_each_row_once_in_groups_of_like_length(tmp_path):
    lengths = [1, 2, 3, 4, 7, 8, 100, 127, 128]
    source = make_source(tmp_path, ramps(*lengths))
    source.open("bottom")
    rows = [8, 0, 4, 0, 2, 6, 1, 5, 3, 7, 8]
    states = source(rows)
    assert [len(x) for x in states] == [lengths[row] for row in rows]
    assert all(x[-1, 1, 0] == 10 * len(x) for x in states)
    calls = sorted(sorted(call) for call in source.live.calls)
    assert calls == [[1], [2, 3], [4, 7], [8], [100, 127], [128]]


def test_open_changes_a_copy_and_close_goes_back_to_the_cache(tmp_path):
    source = make_source(tmp_path, ramps(3))
    source.fill()
    before = source([0])[0]
    assert source.open("nothing") == []
    assert source.state_dict() == {}
    assert source([0])[0].dtype == torch.float16  # still from the cache

    (weight,) = source.open("bottom")
    weight.data *= 3
    assert torch.equal(source([0])[0], 3 * before.float())
    source.close()
    assert torch.equal(source([0])[0], before)
    assert source.state_dict() == {}
    assert source.upstream.model.weight.tolist() == [[1.0], [10.0]]


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_state_dict_holds_what_fine_tuning_changed(modality, tiny, tmp_path):
    raw = {"audio": CLIPS[0], "text": TEXTS[0]}[modality]
    sources = []
    for _ in range(2):
        inputs = {0: tiny[modality].prepare(raw)}
        source = make_source(tmp_path, inputs, tiny[modality])
        source.load_state_dict({})
        source.open("bottom")
        sources.append(source)
    changed, other = sources
    for parameter in changed.live.parameters():
        if parameter.requires_grad:
            parameter.data *= 1.5
    state = changed.state_dict()
    bottom = {"audio": "feature_extractor.", "text": "embeddings."}[modality]
    assert state
    assert all(bottom in name for name in state)
    assert not torch.allclose(changed([0])[0], other([0])[0])
    other.load_state_dict(state)
    assert torch.equal(changed([0])[0], other([0])[0])


def test_prepare_takes_the_clips_of_the_classes_and_the_texts_around_them(tmp_path):
    emotions = ["xxx", "fru", "sur", "neu", "fru", "xxx", "oth", "fru", "sad"]
    turns = []
    for i, emotion in enumerate(emotions):
        turns.append((f"F{i:03}", i, i + 0.1, emotion, f"text {i}"))
    write_dialog(tmp_path, "Ses01F_impro01", turns)
    corpus = read(tmp_path)
    upstream = SimpleNamespace(name="b", modality="audio", prepare=lambda x: x[:1])
    assert list(data.prepare(upstream, corpus, 3)) == [3, 8]

    upstream.modality = "text"
    upstream.preprocessor = SimpleNamespace(unk_token_id=0)
    upstream.prepare = lambda text: torch.tensor([0, int(text[-1])])
    inputs = data.prepare(upstream, corpus, 3)
    assert {row: x.tolist() for row, x in inputs.items()} == {
        row: [0, row] for row in (2, 3, 4, 7, 8)
    }
    upstream.prepare = lambda text: torch.tensor([0, 0, 7])
    with pytest.raises(InputError, match="--bert b"):
        data.prepare(upstream, corpus, 3)


def test_batch_collects_real_steps_in_order_and_masks_tell_their_place():
    lengths = [2, 1, 3, 4, 2]
    states = {
        r: 100.0 * r + torch.arange(n)[:, None, None] for r, n in enumerate(lengths)
    }
    windows = torch.tensor([[-1, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, -1], [-1, 4, -1]])
    asked = {"audio": [], "text": []}

    def source(modality):
        def read(rows):
            asked[modality].append(rows)
            return [states[row] for row in rows]

        return read

    sources = {modality: source(modality) for modality in asked}
    rows = torch.tensor([3, 4, 0])
    found = data.batch(rows, windows, sources, "cpu")
    assert asked == {"audio": [[3, 4, 0]], "text": [[2, 3, 4, 0, 1]]}
    for modality, places in (("audio", rows), ("text", windows[rows])):
        x, mask = found[modality]
        assert mask.dtype == torch.bool
        assert mask.shape == (*places.shape, 4)
        n = 0
        for place in np.ndindex(*places.shape):
            row = int(places[place])
            length = lengths[row] if row >= 0 else 0
            assert mask[place].tolist() == [t < length for t in range(4)]
            for t in range(length):
                assert x[n].item() == 100 * row + t
                n += 1
        assert x.shape == (n, 1, 1)
    assert list(data.batch(rows, windows, {"text": source("text")}, "cpu")) == ["text"]


# --- A corpus of your own -------------------------------------------------------------

TABLE = """text,emotion,session,dialog,speaker
oh no,sad,1,a,ann
I hate it,ANGRY,1,a,bob
lovely,joy,12,b,cy
,neutral,12,b,di
so,surprise,3,c,ed
"""


@pytest.mark.parametrize(
    "old, new",
    [
        ("", ""),
        (",", ";"),
        (",", "\t"),
        ("\n", "\r\n"),
        ("\n", "\r"),
        ("text", "\ufeffText"),
        ("dialog,speaker", " DIALOG , Speaker"),
        ("oh no", '" oh  no"'),
        ("\n", "\n\n"),
        ("joy", " Happiness "),
    ],
)
def test_a_table_in_every_dress(old, new, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(TABLE.replace(old, new, -1 if old else 0).encode())
    corpus = data.read_csv(path)
    found = [(u.text, u.emotion, u.session, u.dialog, u.speaker) for u in corpus]
    assert found == [
        ("oh no", "sad", 1, "a", "ann"),
        ("I hate it", "ang", 1, "a", "bob"),
        ("so", "surprise", 3, "c", "ed"),
        ("lovely", "hap", 12, "b", "cy"),
        ("", "neu", 12, "b", "di"),
    ]
    assert [u.label for u in corpus] == [3, 2, None, 1, 0]
    assert len({u.id for u in corpus}) == 5
    assert all(u.id.rpartition("_")[0] == u.dialog for u in corpus)
    assert all(u.wav is None for u in corpus)


def test_plain_names_of_emotions(tmp_path):
    names = "neutral calm happy happiness joy excited angry anger sadness fear"
    expected = ["neu"] * 2 + ["hap"] * 3 + ["exc"] + ["ang"] * 2 + ["sad", "fear"]
    path = tmp_path / "mine.csv"
    rows = [f"hm,{name},1,a,x" for name in names.split()]
    path.write_text("\n".join(["text,emotion,session,dialog,speaker", *rows]))
    assert [u.emotion for u in data.read_csv(path)] == expected


def test_optional_columns_order_the_turns_and_name_them(tmp_path):
    write_wav(tmp_path / "wavs" / "a.wav", [0.1] * 400)
    path = tmp_path / "mine.csv"
    path.write_text(
        "start,text,emotion,session,dialog,speaker,id,wav\n"
        "9.5,a9,sad,1,a_1,x,a_1_first,wavs/a.wav\n"
        "2.5,b2,sad,1,b,x,8_9,\n"
        "2,a2,sad,1,a_1,x,7,\n"
        "1.,b1,sad,1,b,x,,\n"
    )
    corpus = data.read_csv(path)
    assert [u.text for u in corpus] == ["a2", "a9", "b1", "b2"]
    assert [u.start for u in corpus] == [2.0, 9.5, 1.0, 2.5]
    ids = [u.id for u in corpus]
    assert ids[:2] + ids[3:] == ["a_1_7", "a_1_first", "b_8-9"]
    assert [u.id.rpartition("_")[0] for u in corpus] == ["a_1", "a_1", "b", "b"]
    assert [u.wav for u in corpus] == [None, tmp_path / "wavs" / "a.wav", None, None]


def test_a_table_can_hold_what_the_layout_of_iemocap_holds(small_corpus, tmp_path):
    corpus = read(small_corpus)
    names = "id text emotion session dialog speaker start wav".split()
    with (tmp_path / "small.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(names)
        table.writerows([getattr(u, name) for name in names] for u in corpus)
    expected = [replace(u, end=u.start) for u in corpus]
    assert data.read_csv(tmp_path / "small.csv") == expected


# --- Counts, whole files, the toy, the commands ---------------------------------------


def test_describe_counts_classes_and_the_others(small_corpus):
    found = data.describe("my corpus", read(small_corpus))
    assert all(line.startswith("my corpus: ") for line in found.split("\n"))
    assert re.findall(r"\d+", found)[:3] == ["70", "5", "10"]
    assert "neu 14, hap 14, ang 14, sad 14" in found
    assert "fru" in found


def test_the_checksum_covers_what_training_reads(small_corpus):
    first, *rest = read(small_corpus)
    checksum = data.checksum([first, *rest])
    assert len(checksum) == 8
    same = replace(first, wav=None, start=0.0, end=9.0)
    assert data.checksum([same, *rest]) == checksum
    for change_one in (
        {"id": "a_1"},
        {"speaker": "x"},
        {"text": "x"},
        {"emotion": "sad" if first.label != 3 else "neu"},
    ):
        assert data.checksum([replace(first, **change_one), *rest]) != checksum
    assert data.checksum([*rest, first]) != checksum


def write(part, text, folder):
    if folder:
        part.mkdir()
        part = part / "file"
    part.write_text(text)


@pytest.mark.parametrize("folder", [False, True])
def test_write_whole_is_complete_or_absent(folder, tmp_path):
    path = tmp_path / "new" / "name"
    with pytest.raises(KeyboardInterrupt), data.write_whole(path) as part:
        write(part, "half", folder)
        assert not path.exists()
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="No space left"), data.write_whole(path) as part:
        write(part, "half", folder)
        raise OSError(28, "No space left on device")
    assert list(path.parent.iterdir()) == []
    # Two writers at a time: each has a part of its own, and one whole result stays.
    with data.write_whole(path) as part, data.write_whole(path) as other:
        write(part, "one", folder)
        write(other, "two", folder)
    assert list(path.parent.iterdir()) == [path]
    # A folder stays, and a file gives way to a newer one.
    written = path / "file" if folder else path
    assert written.read_text() == ("two" if folder else "one")


def test_a_file_whose_place_is_taken_by_a_folder_is_an_error(tmp_path):
    (tmp_path / "name").mkdir()
    with pytest.raises(OSError), data.write_whole(tmp_path / "name") as part:
        part.write_text("new")


def test_a_full_disk_leaves_no_half_file(tmp_path, capsys):
    """The limit on the size of files makes a write fail as a full disk does."""
    resource = pytest.importorskip("resource")
    source = make_source(tmp_path / "cache", ramps(10, 2000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(OSError):
            source.fill()
        with pytest.raises(OSError):
            data.write_toy(tmp_path / "toy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "cache").iterdir()) == [source.files[0]]
    assert os.listdir(tmp_path) == ["cache"]
    source.fill()
    assert len(source([1])[0]) == 2000


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy") / "toy"
    data.main(["toy", str(root)])
    return root


def test_the_toy_is_a_corpus_in_the_layout_of_iemocap(toy):
    corpus = read(toy)
    assert len(corpus) == 900
    assert set(Counter(u.dialog for u in corpus).values()) == {18}
    assert len({u.speaker for u in corpus}) == 10
    assert {u.emotion for u in corpus} == {"neu", "hap", "ang", "sad"}
    assert (toy / "toy.json").exists()
    for row in range(0, 900, 100):
        for part in data.split(corpus, corpus[row].session, 0):
            assert {corpus[r].label for r in part} == {0, 1, 2, 3}
        x = data.load_wav(corpus[row].wav)
        assert 0.15 <= len(x) / 16000 <= 0.25
        assert 0.05 < x.abs().max() < 0.4
        # A tone repeats after 20 ms.
        assert (x[320:] - x[:-320]).abs().max() < 0.01


def test_the_toy_is_the_same_every_time(toy, tmp_path):
    data.write_toy(tmp_path / "again")
    contents = []
    for root in (toy, tmp_path / "again"):
        files = [path for path in root.rglob("*") if path.is_file()]
        contents.append({path.relative_to(root): path.read_bytes() for path in files})
    assert len(contents[0]) == 900 + 2 * 50 + 1
    assert contents[0] == contents[1]


def test_a_kill_leaves_no_toy(tmp_path, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("wave.open", die)
    with pytest.raises(KeyboardInterrupt):
        data.write_toy(tmp_path / "toy")
    assert not list(tmp_path.iterdir())


def test_the_commands_of_data_py(toy, small_corpus, tmp_path, capsys):
    with pytest.raises(InputError, match="exists"):
        data.main(["toy", str(tmp_path)])
    assert not list(tmp_path.iterdir())

    capsys.readouterr()
    with pytest.raises(InputError) as problem:
        data.main(["check", str(small_corpus)])
    lines = str(problem.value).split("\n")
    for session, count in ((1, 28), (2, 30), (3, 32), (4, 30), (5, 31)):
        found = [line for line in lines if f"session {session}" in line]
        assert any(f"{count}" in line and "dialogues" in line for line in found)
    assert "neu 14" in capsys.readouterr().out
    for command in ([], ["check"], ["train", "x"]):
        with pytest.raises(SystemExit):
            data.main(command)


@pytest.mark.parametrize("problem", [InputError("bad row"), OSError("no disk")])
def test_run_command_prints_wrong_input_as_a_sentence(problem):
    def main():
        raise problem

    with pytest.raises(SystemExit, match=f"^error: {problem}$"):
        data.run_command(main)


def test_run_command_shows_a_bug_as_a_traceback():
    with pytest.raises(ZeroDivisionError):
        data.run_command(lambda: 1 / 0)
