"""The replica of the full release has the release's counts, quirks and lengths."""

import re
import wave
from collections import Counter

import numpy as np
import pytest

import data
import full_size

# From the release itself, so a slip in data.py's tables shows.
LABELS = {
    "xxx": 2507, "fru": 1849, "neu": 1708, "ang": 1103, "sad": 1084, "exc": 1041, "hap": 595,
    "sur": 107, "fea": 40, "oth": 3, "dis": 2,
}  # fmt: skip
SPEAKERS = {  # ang, hap with exc, sad, neu
    "1F": (147, 132, 78, 171), "1M": (82, 146, 116, 213), "2F": (67, 166, 113, 135),
    "2M": (70, 161, 84, 227), "3F": (92, 128, 172, 130), "3M": (148, 158, 133, 190),
    "4F": (205, 185, 62, 76), "4M": (122, 118, 81, 182), "5F": (78, 159, 132, 221),
    "5M": (92, 283, 113, 163),
}  # fmt: skip


@pytest.fixture(scope="module")
def replica(tmp_path_factory):
    return full_size.write_full_size(tmp_path_factory.mktemp("replica") / "full", shorten=0.02)


@pytest.fixture(scope="module")
def labels(replica):
    """The label lines by dialogue: [(start, end, id, label), ...], read without data.py."""
    line = re.compile(r"^\[([\d.]+) - ([\d.]+)\]\t(\S+)\t(\w+)\t\[", re.M)
    files = sorted(replica.glob("Session*/dialog/EmoEvaluation/Ses*.txt"))
    return {file.stem: line.findall(file.read_text()) for file in files}


@pytest.fixture(scope="module")
def transcripts(replica):
    files = sorted(replica.glob("Session*/dialog/transcriptions/Ses*.txt"))
    return {file.stem: file.read_text().splitlines() for file in files}


def test_the_labels_are_those_of_the_release(labels):
    lines = [line for dialog in labels.values() for line in dialog]
    assert Counter(label for *_, label in lines) == LABELS
    ids = [id for _, _, id, _ in lines]
    assert Counter(id[4] for id in ids) == {"1": 1819, "2": 1811, "3": 2136, "4": 2103, "5": 2170}
    found = Counter(
        (id[4] + id.rsplit("_", 1)[1][0], "hap" if label == "exc" else label)
        for _, _, id, label in lines
    )
    for speaker, row in SPEAKERS.items():
        assert tuple(found[speaker, e] for e in ("ang", "hap", "sad", "neu")) == row, speaker

    assert len(labels) == 151 and sum("impro" in dialog for dialog in labels) == 80
    sizes = [len(dialog) for dialog in labels.values()]
    assert 24 <= min(sizes) and max(sizes) <= 167


def test_the_quirks_are_those_of_the_release(replica, labels, transcripts):
    # An id of a transcript may have no label. Two of these ids are there twice.
    ids = [
        line.split()[0] for lines in transcripts.values() for line in lines if line[:3] == "Ses"
    ]
    assert len(ids) == 10087
    extra = [id for id in ids if "XX" in id]
    assert len(extra) == 48 and sorted(Counter(extra).values()) == [1] * 44 + [2] * 2
    assert sum("M: hm." in lines for lines in transcripts.values()) == 151

    # The turns of F come first. Sorted by time, turns overlap, and one pair starts together.
    together, overlaps, inversions = [], 0, 0
    for dialog, turns in labels.items():
        letters = [id.rsplit("_", 1)[1][0] for _, _, id, _ in turns]
        assert letters == sorted(letters) and set(letters) == {"F", "M"}
        times = sorted((float(start), float(end)) for start, end, *_ in turns)
        overlaps += sum(b < end for (_, end), (b, _) in zip(times, times[1:]))
        together += [dialog for (a, _), (b, _) in zip(times, times[1:]) if a == b]
        starts = re.findall(r"\[([\d.]+)-", "\n".join(x for x in transcripts[dialog] if "XX" not in x))
        inversions += starts != sorted(starts)
    assert together == ["Ses02F_impro01"] and overlaps > 1000 and inversions == 151

    # Beside the label files are files that are none.
    assert len(list(replica.glob("Session*/dialog/EmoEvaluation/*/*_cat.txt"))) == 151
    assert len(list(replica.glob("Session*/dialog/EmoEvaluation/._*.txt"))) == 151


def test_lengths_are_distributed_as_in_the_release(replica, labels, transcripts):
    seconds = np.array([float(e) - float(s) for turns in labels.values() for s, e, *_ in turns]) / 0.02
    assert abs(np.median(seconds) - 3.58) < 0.15 and abs(seconds.mean() - 4.55) < 0.2
    lines = [x for lines in transcripts.values() for x in lines if "XX" not in x and "]: " in x]
    words = [len(x.split("]: ")[1].split()) for x in lines]
    assert len(words) == 10039 and max(words) <= 98
    assert abs(np.median(words) - 8) <= 1 and abs(np.mean(words) - 11.5) < 1.5

    (start, end, id, _), *_ = labels["Ses03M_impro05b"]
    with wave.open(str(replica / f"Session3/sentences/wav/Ses03M_impro05b/{id}.wav")) as file:
        assert file.getparams()[:3] == (1, 2, 16000)
        assert abs(file.getnframes() / 16000 - (float(end) - float(start))) < 2e-4
    assert len(list(replica.glob("Session*/sentences/wav/*/*.wav"))) == 10039


def test_the_reader_finds_the_full_release_and_says_that_it_is_a_toy(replica, capsys):
    data.main(["check", str(replica)])
    out = capsys.readouterr().out
    assert "10039 utterances in 151 dialogues" in out and "10 speakers" in out and "toy" in out
    assert "neu 1708, hap 1636, ang 1103, sad 1084" in out


def test_a_missing_session_is_reported_by_row(replica, tmp_path):
    for session in replica.glob("Session[1-4]"):
        (tmp_path / session.name).symlink_to(session)
    corpus = data.read_iemocap(tmp_path)
    assert len(corpus) == 10039 - 2170
    text = "\n".join(data.reference_problems(corpus))
    assert "session 5: dialogues 0 (not 31), utterances 0 (not 2170)" in text
    assert "woman 0 (not 590), man 0 (not 651)" in text and "all sessions: xxx" in text
    assert "session 4" not in text


def test_it_is_never_written_over_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit, match="not empty"):
        full_size.main([str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
