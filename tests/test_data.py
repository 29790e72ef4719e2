"""data.py on files that the tests write: IEMOCAP, clips, states, tables, the toy."""

import copy
import os
import re
from dataclasses import replace
from threading import get_ident
from time import sleep
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import data
from data import InputError
from tests.conftest import write_dialog, write_wav


def read(root):
    corpus, problems = data.read_iemocap(root)
    assert problems == []
    return corpus


@pytest.fixture(scope="module")
def corpus(small_corpus):
    return read(small_corpus)


# --- IEMOCAP --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "mark"), [(b"\n", b""), (b"\r\n", b"\xef\xbb\xbf"), (b"\r", b"")]
)
def test_one_utterance_as_it_is_on_the_disk(end, mark, tmp_path):
    """Lines and files of other kinds are skipped, whatever the line ends are."""
    name = "Ses01F_impro01"
    session = tmp_path / "Session1"
    files = {
        "EmoEvaluation": "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
        f"[6.2901 - 8.2357]\t{name}_F000\tneu\t[2.5000, 2.5000, 2.5000]\n"
        "C-E2:\tNeutral;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\nA-F1:\tdom  ;\t()\n",
        "transcriptions": f"F: and so\nM:\n\n{name}_FXX3 [000.1000-000.2000]: ah\n"
        f"{name}_F000 [006.2901-008.2357]: Excuse  me. \t[LAUGHTER] \n"
        f"{name}_FXX3 [000.3000-000.4000]: oh\n{name}_MXX0 [000.1-000.2]:\n",
    }
    for folder, text in files.items():
        path = session / "dialog" / folder / f"{name}.txt"
        path.parent.mkdir(parents=True)
        path.write_bytes(mark + text.encode().replace(b"\n", end))
        (path.parent / f"._{name}.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    single = session / "dialog" / "EmoEvaluation" / "Categorical" / f"{name}_e2_cat.txt"
    single.parent.mkdir()
    single.write_text(f"{name}_F000 :Anger; ()\n")
    (tmp_path / "Session1.zip").write_bytes(b"PK")
    wav = session / "sentences" / "wav" / name / f"{name}_F000.wav"
    write_wav(wav, [0.1] * 31130)
    expected = (f"{name}_F000", 1, name, "Ses01F", 6.2901, 8.2357)
    words = "Excuse me. [LAUGHTER]"
    assert read(tmp_path) == [data.Utterance(*expected, words, "neu", wav)]


def test_order_speakers_and_labels_of_a_dialogue(tmp_path):
    """The order is by start, end and id. The speaker is the letter of the turn.

    The fourth turn begins after the third, and ends before it. Happy and excited are
    one class (§3.1), and the other emotions none.
    """
    turns = [
        ("F000", 5, 8, "exc", "third"),
        ("F001", 7, 7.5, "sad", "fourth"),
        ("M000", 1, 2, "neu", "first"),
        ("M001", 5, 5.5, "hap", "second"),
        ("M003", 9, 9.1, "ang", "sixth"),
        ("F002", 9, 9.1, "xxx", "fifth"),
    ]
    others = "fru sur fea oth dis".split()
    for i, emotion in enumerate(others, 10):
        turns.append((f"M{i:03}", i, i + 0.1, emotion, "more"))
    write_dialog(tmp_path, "Ses02M_script01_1", turns)
    # The name of a dialogue may be the beginning of another.
    write_dialog(tmp_path, "Ses02M_script01_1b", [("F000", 0, 0.1, "neu", "last")])
    found = read(tmp_path)
    words = "first second third fourth fifth sixth more more more more more last"
    assert [u.text for u in found] == words.split()
    assert [u.speaker for u in found] == [f"Ses02{x}" for x in "MMFFFMMMMMMF"]
    assert [u.label for u in found] == [0, 1, 1, 3, None, 2, *[None] * 5, 0]
    assert [u.dialog[-2:] for u in found] == ["_1"] * 11 + ["1b"]
    assert data.CLASSES == ("neu", "hap", "ang", "sad")  # Fig. 4


# --- Folds and contexts ---------------------------------------------------------------


def test_folds_are_complete_and_disjoint_in_speakers(corpus):
    """§3.1, §3.2: test is one session, dev is one speaker, no window crosses over."""
    targets = [r for r, u in enumerate(corpus) if u.emotion != "fru"]
    windows = data.context_windows(corpus)
    tested = []
    for fold in range(1, 6):
        for seed in range(5):
            train, dev, test = data.split(corpus, fold, seed)
            assert sorted(train + dev + test) == targets
            assert {corpus[r].id[4] for r in test} == {str(fold)}
            speakers = []
            for rows in (train, dev, test):
                names = [corpus[r].id for r in rows]
                speakers.append({n[:5] + n.rpartition("_")[2][0] for n in names})
            assert [len(names) for names in speakers] == [7, 1, 2]
            assert len(set.union(*speakers)) == 10
            seen = windows[train + dev].unique().tolist()
            assert all(corpus[row].session != fold for row in seen if row >= 0)
        tested += test
    assert sorted(tested) == targets


def test_seed_and_fold_draw_the_development_speaker(corpus):
    """[A14]: each training speaker has a turn, and a fold has an order of its own."""

    def draw(fold):
        rows = [data.split(corpus, fold, seed)[1][0] for seed in range(40)]
        return [corpus[row].speaker for row in rows]

    assert draw(5) == draw(5)
    assert len(set(draw(5))) == 8
    assert [s[5] for s in draw(5)] != [s[5] for s in draw(1)]  # women and men
    # A fold without test or development utterances is named.
    without = [u for u in corpus if u.session != 2]
    one_speaker = [u for u in corpus if u.speaker in ("Ses01F", "Ses02F", "Ses02M")]
    for some in (without, one_speaker):
        with pytest.raises(InputError, match="--fold 2"):
            data.split(some, 2, 0)


def test_a_window_is_four_before_and_four_after_in_the_same_dialogue():
    """§3.2. Neighbours have any speaker and any emotion, and -1 is beyond the edge."""
    same = {"session": 1, "speaker": "Ses01F", "emotion": "xxx", "label": None}
    corpus = [SimpleNamespace(dialog=name, **same) for name in "aaaaaabbb"]
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


# --- Waveforms ------------------------------------------------------------------------


def test_load_wav_scales_16_bits_to_one(tmp_path):
    """-32768 becomes -1."""
    path = tmp_path / "a.wav"
    write_wav(path, [0.0] * 4)
    numbers = np.array([0, 16384, -32768, 1], "<i2").tobytes()
    path.write_bytes(path.read_bytes()[:44] + numbers)
    x = data.load_wav(path)
    assert x.dtype == torch.float32 and x.tolist() == [0.0, 0.5, -1.0, 2**-15]


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_a_recording_of_another_rate_becomes_16_khz_without_aliases(rate, tmp_path):
    """A tone of 10.5 kHz is above what 16 kHz can hold, so it disappears."""

    def tones(n, rate, pitches):
        seconds = np.arange(n) / rate
        return sum(0.2 * np.sin(2 * np.pi * pitch * seconds) for pitch in pitches)

    low = (150, 440, 2900)  # Hz
    high = (10500,) if rate > 22050 else ()
    write_wav(tmp_path / "a.wav", tones(rate // 2, rate, low + high), rate)
    x = data.load_wav(tmp_path / "a.wav")
    assert len(x) == 8000
    error = x.numpy() - tones(8000, 16000, low)
    assert np.abs(error[200:-200]).max() < 0.02


SPEECH = 0.5 + torch.arange(96000) / 1e6  # 6 s, and no two samples are equal
LOUD = SPEECH[:16000]
QUIET = torch.full((8000,), 1e-5)  # 94 dB below
WHISPER = torch.full((8000,), 0.001)  # 54 dB below, which is no silence
SILENCE = torch.zeros(32000)  # 2 s


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([QUIET, LOUD, QUIET, LOUD, QUIET], [LOUD, QUIET, LOUD, QUIET]),
        ([WHISPER, LOUD], [WHISPER, LOUD]),
        ([SPEECH], [SPEECH[:80000]]),
        ([SILENCE, SPEECH], [SPEECH[:80000]]),
    ],
)
def test_five_seconds_are_counted_from_the_first_sound(parts, expected):
    """[A13]: 2 s of silence before 6 s of voice give 5 s of voice."""
    clip = data.clip(torch.cat(parts))
    message = "the clip should begin with the first sound, and last 5 s from there"
    assert torch.equal(clip, torch.cat(expected)), message


@pytest.mark.parametrize("n", [1, 399, 400, 401, 799, 16000])
def test_clip_is_never_empty(n):
    """WavLM needs 400 samples. Silence is kept, and so is a click at the end."""
    assert len(data.clip(torch.zeros(n))) == max(n, 400)
    spike = torch.zeros(n)
    spike[-1] = 0.5
    clip = data.clip(spike)
    assert 400 <= len(clip) <= 800
    assert n > 400 and n % 400 or 0.5 in clip


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


def make_source(folder, inputs, upstream=None, ids=None, fill=False):
    """Make a source for inputs by row, with ids u0, u1, ... and a fake upstream."""
    ids = ids or [f"u{row}" for row in range(max(inputs) + 1)]
    utterances = [SimpleNamespace(id=name) for name in ids]
    source = data.Source(upstream or Fake(), inputs, utterances, folder, "cpu")
    if fill:
        source.fill()
    return source


def ramps(*lengths):
    return {row: torch.arange(1.0, n + 1) for row, n in enumerate(lengths)}


CLIPS = [torch.linspace(-1, 1, n).sin() for n in (5000, 400, 2345, 7000)]
TEXTS = ["i hate it", "", "all alone again", "lovely [LAUGHTER] party"]
RAW = [("audio", CLIPS), ("text", TEXTS)]


@pytest.mark.parametrize(("modality", "raw"), RAW)
def test_states_are_cached_in_16_bits_until_fine_tuning_changes_them(
    modality, raw, tiny, tmp_path
):
    """[D1]: each state is that of the utterance alone, from the files or from memory.

    state_dict() has what fine-tuning changed, and a copy that loads it is the same.
    """
    upstream = tiny[modality]
    inputs = {row: upstream.prepare(one) for row, one in enumerate(raw)}
    source = make_source(tmp_path, inputs, upstream, fill=True)
    rows = [2, 0, 3, 2]
    expected = [upstream([inputs[row]])[0] for row in rows]
    for _ in range(2):
        for states, alone in zip(source(rows), expected, strict=True):
            assert torch.equal(states, alone.half())
    source.load_state_dict({})
    parameters = source.open("bottom")
    for states, alone in zip(source(rows), expected, strict=True):
        torch.testing.assert_close(states, alone, atol=1e-5, rtol=1e-4)
    assert states.requires_grad
    for parameter in parameters:
        parameter.data *= 1.5
    state = source.state_dict()
    bottom = {"audio": "feature_extractor.", "text": "embeddings."}[modality]
    assert len(state) == len(parameters) and all(bottom in name for name in state)
    other = make_source(tmp_path, inputs, upstream)
    other.open("bottom")
    assert not torch.allclose(source([0])[0], other([0])[0])
    other.load_state_dict(state)
    assert torch.equal(source([0])[0], other([0])[0])


def test_fill_computes_each_missing_file_alone_and_resumes_after_a_kill(tmp_path):
    """What a kill leaves of a file that was being written has another name."""
    inputs = ramps(3, 7, 5, 4)
    whole = make_source(tmp_path / "whole", inputs, fill=True)
    assert whole.upstream.calls == [[3], [7], [5], [4]]
    killed = make_source(tmp_path / "killed", inputs, Fake(dies_at=2))
    with pytest.raises(KeyboardInterrupt):
        killed.fill()
    (tmp_path / "killed" / f"{killed.files[2].name}.abc.part").write_bytes(b"torn")
    again = make_source(tmp_path / "killed", inputs, fill=True)
    assert again.upstream.calls == [[5], [4]]
    for a, b in zip(whole([0, 1, 2, 3]), again([0, 1, 2, 3]), strict=True):
        assert torch.equal(a, b)
    assert make_source(tmp_path / "killed", inputs, fill=True).upstream.calls == []


def test_another_input_never_reads_a_stale_file(tiny, tmp_path):
    """The name of a file has the checksum of the prepared input.

    So it changes with the tokenizer's rules, and with those of the feature extractor.
    """
    make_source(tmp_path, ramps(3, 4), fill=True)
    changed = {0: torch.tensor([5.0, 2.0, 3.0]), 1: torch.arange(1.0, 5.0)}
    source = make_source(tmp_path, changed, fill=True)
    assert source.upstream.calls == [[3]]
    assert source([0])[0][:, 0, 0].tolist() == [5.0, 2.0, 3.0]

    for modality, raw in (("audio", 3 * CLIPS[0]), ("text", "i hate it")):
        upstream, names = copy.deepcopy(tiny[modality]), []
        rules = upstream.preprocessor
        for setting in (True, False):
            if modality == "audio":
                rules.do_normalize = setting
            else:
                rules.add_tokens([] if setting else ["i hate"])
            inputs = {0: upstream.prepare(raw)}
            names.append(make_source(tmp_path, inputs, upstream).files[0].name)
        assert names[0] != names[1], f"{modality}: other rules, the same file of states"


def test_each_state_has_a_file_whatever_its_id_is_and_fits_into_16_bits(tmp_path):
    """Otherwise the utterance is named, and no file is written."""
    ids = ["../a/b", "a b", "a_b", "é:*", "CON.1", "a" * 150]
    source = make_source(tmp_path / "c", ramps(1, 2, 3, 4, 5, 6), ids=ids, fill=True)
    assert len(list((tmp_path / "c").iterdir())) == 6 and os.listdir(tmp_path) == ["c"]
    assert [len(states) for states in source([0, 1, 2, 3, 4, 5])] == [1, 2, 3, 4, 5, 6]
    for value in (float("nan"), 7000.0):  # 10 * 7000 is over 65,504
        inputs = {0: torch.tensor([value])}
        with pytest.raises(InputError, match="an-id"):
            make_source(tmp_path / "d", inputs, ids=["an-id"], fill=True)
    assert os.listdir(tmp_path) == ["c"]


def test_states_are_kept_in_memory_up_to_a_limit(tmp_path, monkeypatch):
    """All of them are kept, with 8 % to spare, or none: then they are read again."""
    size = 2 * (128 + 4 * 2 * 2)  # two files: a header, and 4 steps of 2 layers
    for limit, kept in ((1.09 * size, True), (1.07 * size, False)):
        monkeypatch.setattr(data, "CPU_LIMIT", limit)
        source = make_source(tmp_path / str(kept), ramps(4, 4), fill=True)
        first = source([0, 1, 0])
        for file in source.files.values():
            file.unlink()
        if kept:
            assert all(map(torch.equal, source([0, 1, 0]), first))
            # Fine-tuning needs their memory.
            source.open("bottom")
            assert source.kept == {}
        else:
            with pytest.raises(OSError, match="u0-"):
                source([0])


def test_threads_read_files_without_pythons_parser(tmp_path, monkeypatch):
    """np.load uses the parser, which sometimes fails in threads."""
    source = make_source(tmp_path, ramps(*range(1, 33)), fill=True)
    source.keep = False
    expected = [torch.from_numpy(np.load(file)) for file in source.files.values()]
    monkeypatch.setattr(np, "load", None)
    read = source.read
    threads = set()

    def slow_read(row):
        threads.add(get_ident())
        sleep(0.002)
        return read(row)

    source.read = slow_read
    states = source(list(range(32)))
    assert all(map(torch.equal, states, expected))
    assert len(threads) > 1


def test_a_live_source_computes_each_row_once_in_groups_of_like_length(tmp_path):
    """So padding is the smaller part of a forward pass."""
    lengths = [1, 2, 3, 4, 7, 8, 100, 127, 128]
    source = make_source(tmp_path, ramps(*lengths))
    source.open("bottom")
    rows = [8, 0, 4, 0, 2, 6, 1, 5, 3, 7, 8]
    states = source(rows)
    assert [len(x) for x in states] == [lengths[row] for row in rows]
    assert all(x[-1, 1, 0] == 10 * len(x) for x in states)
    calls = sorted(sorted(call) for call in source.live.calls)
    assert calls == [[1], [2, 3], [4, 7], [8], [100, 127], [128]]
    # A batch of clips has no duplicate, and its order is that of the labels.
    assert [len(x) for x in source([7, 1, 4])] == [127, 2, 7]


def test_open_changes_a_copy_and_close_goes_back_to_the_cache(tmp_path):
    """With nothing open, the cached states stay right."""
    source = make_source(tmp_path, ramps(3), fill=True)
    before = source([0])[0]
    assert source.open("nothing") == [] and source.state_dict() == {}
    assert source([0])[0].dtype == torch.float16

    (weight,) = source.open("bottom")
    weight.data *= 3
    assert torch.equal(source([0])[0], 3 * before.float())
    source.close()
    assert torch.equal(source([0])[0], before) and source.state_dict() == {}
    assert source.upstream.model.weight.tolist() == [[1.0], [10.0]]


def test_prepare_takes_the_clips_of_the_classes_and_the_texts_around_them(tmp_path):
    """A vocabulary that knows few of the words is refused."""
    emotions = ["xxx", "fru", "sur", "neu", "fru", "xxx", "oth", "fru", "sad"]
    turns = []
    for i, emotion in enumerate(emotions):
        turns.append((f"F{i:03}", i, i + 0.1, emotion, f"text {i}"))
    write_dialog(tmp_path, "Ses01F_impro01", turns)
    found = read(tmp_path)
    upstream = SimpleNamespace(name="b", modality="audio", prepare=lambda x: x[:1])
    assert list(data.prepare(upstream, found, 3)) == [3, 8]

    upstream.modality = "text"
    upstream.preprocessor = SimpleNamespace(unk_token_id=0)
    upstream.prepare = lambda text: torch.tensor([0, int(text[-1])])
    inputs = data.prepare(upstream, found, 3)
    assert {row: x.tolist() for row, x in inputs.items()} == {
        row: [0, row] for row in (2, 3, 4, 7, 8)
    }
    upstream.prepare = lambda text: torch.tensor([0, 0, 7])
    with pytest.raises(InputError, match="b does not know 67% .*--bert"):
        data.prepare(upstream, found, 3)
    upstream.modality = "audio"
    with pytest.raises(InputError, match="impro01_F003.*wav.*--fusion text-fc"):
        data.prepare(upstream, [replace(u, wav=None) for u in found], 3)


def test_batch_collects_real_steps_in_order_and_masks_tell_their_place():
    """State t of row r is 100 r + t here, so each number says where it belongs."""
    lengths = [2, 1, 3, 4, 2]
    states = {
        r: 100.0 * r + torch.arange(n)[:, None, None] for r, n in enumerate(lengths)
    }
    windows = torch.tensor([[-1, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, -1], [-1, 4, -1]])
    asked = []

    def source(rows):
        asked.append(rows)
        return [states[row] for row in rows]

    rows = torch.tensor([3, 4, 0])
    found = data.batch(rows, windows, {"audio": source, "text": source}, "cpu")
    assert asked == [[3, 4, 0], [2, 3, 4, 0, 1]]
    for modality, places in (("audio", rows), ("text", windows[rows])):
        x, mask = found[modality]
        assert mask.dtype == torch.bool and mask.shape == (*places.shape, 4)
        expected = []
        for place in np.ndindex(*places.shape):
            row = int(places[place])
            length = lengths[row] if row >= 0 else 0
            assert mask[place].tolist() == [t < length for t in range(4)]
            expected += [100 * row + t for t in range(length)]
        assert x.flatten().tolist() == expected
    assert list(data.batch(rows, windows, {"text": source}, "cpu")) == ["text"]


# --- A corpus of your own -------------------------------------------------------------

TABLE = """text,emotion,session,dialog,speaker
oh no,sad,1,a,ann
I hate it,ANGRY,1,a,bob
lovely,joy,12,b,cy
,neutral,12,b,di
so,surprise,3,c,ed
"""


DRESSES = [(",", ","), (",", ";"), (",", "\t"), ("\n", "\r\n"), ("\n", "\r")]
DRESSES += [("text", "\ufeffText"), ("dialog,speaker", " DIALOG , Speaker")]
DRESSES += [("oh no", '" oh  no"'), ("\n", "\n\n"), ("joy", " Happiness ")]


@pytest.mark.parametrize(("old", "new"), DRESSES)
def test_a_table_in_every_dress(old, new, tmp_path):
    """Separators, line ends, a mark, spaces and capitals as spreadsheets write them."""
    path = tmp_path / "mine.csv"
    path.write_bytes(TABLE.replace(old, new).encode())
    found = data.read_csv(path)
    assert [(u.text, u.emotion, u.session, u.dialog, u.speaker) for u in found] == [
        ("oh no", "sad", 1, "a", "ann"),
        ("I hate it", "ang", 1, "a", "bob"),
        ("so", "surprise", 3, "c", "ed"),
        ("lovely", "hap", 12, "b", "cy"),
        ("", "neu", 12, "b", "di"),
    ]
    assert [u.label for u in found] == [3, 2, None, 1, 0]
    assert len({u.id for u in found}) == 5
    assert all(u.id.rpartition("_")[0] == u.dialog for u in found)
    assert all(u.wav is None for u in found)


def test_the_separator_is_that_of_the_first_line(tmp_path):
    """The texts of a table with semicolons may have more commas than semicolons."""
    text = "no" + ", no" * 20
    path = tmp_path / "mine.csv"
    path.write_text(f"text;emotion;session;dialog;speaker\n{text};sad;1;a;ann\n")
    assert [u.text for u in data.read_csv(path)] == [text]


def test_optional_columns_order_the_turns_and_name_them(tmp_path):
    """As in IEMOCAP, an id is <dialogue>_<turn>, and a wav is beside the table."""
    write_wav(tmp_path / "wavs" / "a.wav", [0.1] * 400)
    path = tmp_path / "mine.csv"
    path.write_text(
        "start,text,emotion,session,dialog,speaker,id,wav\n"
        "9.5,a9,calm,1,a_1,x,a_1_first,wavs/a.wav\n"
        "2.5,b2,anger,1,b,x,8_9,\n"
        "2,a2,happy,1,a_1,x,7,\n"
        "1.,b1,sadness,1,b,x,,\n"
        "3,c1,excited,2,c,y,,\n"
    )
    found = data.read_csv(path)
    assert [(u.text, u.start, u.emotion) for u in found] == [
        ("a2", 2.0, "hap"),
        ("a9", 9.5, "neu"),
        ("b1", 1.0, "sad"),
        ("b2", 2.5, "ang"),
        ("c1", 3.0, "exc"),
    ]
    ids = [u.id for u in found]
    assert ids[:2] + ids[3:4] == ["a_1_7", "a_1_first", "b_8-9"]
    assert ids[2].startswith("b_") and ids[4].startswith("c_")
    wav = tmp_path / "wavs" / "a.wav"
    assert [u.wav for u in found] == [None, wav, None, None, None]


# --- Counts, whole files, the toy, the commands ---------------------------------------


def test_describe_counts_classes_and_the_checksum_covers_what_is_read(corpus):
    """Of a corpus, training reads all but the times and the place of the wavs."""
    found = data.describe("my corpus", corpus)
    assert found.startswith("my corpus: ")
    assert re.findall(r"\d+", found)[:3] == ["70", "5", "10"]
    assert "neu 14, hap 14, ang 14, sad 14" in found and "fru" in found

    first, *rest = corpus
    checksum = data.checksum(corpus)
    assert len(checksum) == 8
    elsewhere = replace(first, wav=None, start=0.0, end=9.0)
    assert data.checksum([elsewhere, *rest]) == checksum
    emotion = "sad" if first.label != 3 else "neu"
    changes = [{"id": "a_1"}, {"speaker": "x"}, {"text": "x"}, {"emotion": emotion}]
    for change_one in changes:
        assert data.checksum([replace(first, **change_one), *rest]) != checksum
    assert data.checksum([*rest, first]) != checksum


def write(part, text, folder):
    if folder:
        part.mkdir()
        part = part / "file"
    part.write_text(text)


@pytest.mark.parametrize("folder", [False, True])
def test_write_whole_is_complete_or_absent(folder, tmp_path):
    """A folder stays, and a file gives way to a newer one."""
    path = tmp_path / "new" / "name"
    full = OSError(28, "No space left on device")
    for problem in (KeyboardInterrupt(), full):
        with pytest.raises(type(problem)), data.write_whole(path) as part:
            write(part, "half", folder)
            assert not path.exists()
            raise problem
    assert list(path.parent.iterdir()) == []
    # Two writers at a time: each has a part of its own, and one whole result stays.
    with data.write_whole(path) as part, data.write_whole(path) as other:
        write(part, "one", folder)
        write(other, "two", folder)
    assert list(path.parent.iterdir()) == [path]
    written = path / "file" if folder else path
    assert written.read_text() == ("two" if folder else "one")
    if folder:  # a file cannot take the place of a folder
        with pytest.raises(OSError), data.write_whole(path) as part:
            part.write_text("new")


def test_the_toy_is_a_corpus_in_the_layout_of_iemocap_and_always_the_same(tmp_path):
    """Its tones repeat after 20 ms, so that all frames of a clip sound the same."""
    toy = tmp_path / "toy"
    data.main(["toy", str(toy)])
    corpus = read(toy)
    assert len(corpus) == 900 and (toy / "toy.json").exists()
    assert len({u.dialog for u in corpus}) == 50
    assert len({u.speaker for u in corpus}) == 10
    for row in range(0, 900, 100):
        for part in data.split(corpus, corpus[row].session, 0):
            assert {corpus[r].label for r in part} == {0, 1, 2, 3}
        x = data.load_wav(corpus[row].wav)
        assert 0.15 <= len(x) / 16000 <= 0.25
        assert 0.05 < x.abs().max() < 0.4
        assert (x[320:] - x[:-320]).abs().max() < 0.01
    # The first dialogue, written again with the same random numbers.
    rng = np.random.default_rng(7)
    data.write_toy_dialog(tmp_path / "again", "Ses01F_impro01", rng)
    files = [p for p in (tmp_path / "again").rglob("*") if p.is_file()]
    assert len(files) == 18 + 2
    for file in files:
        first = toy / "Session1" / file.relative_to(tmp_path / "again")
        assert file.read_bytes() == first.read_bytes()


def test_the_commands_and_their_errors(small_corpus, tmp_path, capsys):
    """Wrong counts and other wrong input are sentences, and a bug is a traceback.

    §3.1: 5,531 utterances: 1,103 angry, 1,708 neutral, 1,084 sad, the rest happy [E1].
    """
    totals = [sum(column) for column in zip(*data.SESSION_COUNTS.values(), strict=True)]
    assert totals == [151, 10039, 1103, 595, 1041, 1084, 1708]
    assert 1103 + (595 + 1041) + 1084 + 1708 == 5531
    assert data.COUNTED[2:] == ("ang", "hap", "exc", "sad", "neu")
    with pytest.raises(InputError, match="exists"):
        data.main(["toy", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    capsys.readouterr()
    with pytest.raises(InputError) as problem:
        data.main(["check", str(small_corpus)])
    for session, count in ((1, 28), (2, 30), (3, 32), (4, 30), (5, 31)):
        line = f"session {session}: .*dialogues.*{count}"
        assert re.search(line, str(problem.value))
    assert "neu 14" in capsys.readouterr().out
    for command in ([], ["check"], ["train", "x"]):
        with pytest.raises(SystemExit):
            data.main(command)

    def fail():
        raise error

    for error in (InputError("bad row"), OSError("no disk")):
        with pytest.raises(SystemExit, match=f"^error: {error}$"):
            data.run_command(fail)
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        data.run_command(fail)
