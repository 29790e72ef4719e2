"""The replica has the counts, the quirks and the lengths of the full release."""

import re
from collections import Counter

import numpy as np
import pytest

import data
from tests.robust import replica


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("replica") / "full"
    replica.main([str(root), "--shorten", "0.02"])
    return root


def read_lines(root, folder, pattern):
    """Find a pattern in the files of all dialogues, without data.py."""
    files = sorted(root.glob(f"Session*/dialog/{folder}/Ses*.txt"))
    return {f.stem: re.findall(pattern, f.read_text(), re.M) for f in files}


def test_the_reader_finds_the_full_release(root, capsys):
    """The replica's table of counts is its own, so it checks that of data.py."""
    data.main(["check", str(root)])
    printed = capsys.readouterr().out
    assert "10039 utterances" in printed
    assert "neu 1708, hap 1636, ang 1103, sad 1084" in printed
    assert "all counts are those of the full release" in printed


def test_label_files_have_the_order_the_overlaps_and_the_strays_of_the_release(root):
    lines = read_lines(root, "EmoEvaluation", r"^\[(\S+) - (\S+)\]\t(\S+)\t(\w+)\t\[")
    assert len(lines) == 151
    assert sum("impro" in dialog for dialog in lines) == 80
    overlaps = 0
    ties = []
    for dialog, turns in lines.items():
        assert 24 <= len(turns) <= 167
        letters = [name[-4] for _, _, name, _ in turns]
        assert letters == sorted(letters)
        assert set(letters) == {"F", "M"}
        times = sorted((float(start), float(end)) for start, end, _, _ in turns)
        for (start, end), (next_start, _) in zip(times, times[1:], strict=False):
            overlaps += next_start < end
            if next_start == start:
                ties.append(dialog)
    assert ties == ["Ses02F_impro01"]
    assert overlaps > 1000
    labels = root.glob("Session*/dialog/EmoEvaluation")
    assert sum(len(list(folder.glob("*/*_cat.txt"))) for folder in labels) == 151


def test_transcripts_have_the_quirks_of_the_release(root):
    lines = read_lines(root, "transcriptions", r"^(Ses\w+) \[(\S+)-(\S+)\]:(.*)$")
    names = [line[0] for dialog in lines.values() for line in dialog]
    assert len(names) == 10087
    without_label = Counter(name for name in names if "XX" in name)
    assert sorted(without_label.values()) == 44 * [1] + 2 * [2]

    inversions = Counter()
    for dialog, found in lines.items():
        starts = [float(start) for name, start, _, _ in found if "XX" not in name]
        for start, next_start in zip(starts, starts[1:], strict=False):
            inversions[dialog] += next_start < start
    assert sum(inversions.values()) == 149
    assert sum(count > 0 for count in inversions.values()) == 67
    texts = [line[3].strip() for dialog in lines.values() for line in dialog]
    assert "[LAUGHTER]" in texts
    assert "" in texts


@pytest.fixture(scope="module")
def corpus(root):
    corpus, problems = data.read_iemocap(root)
    assert not problems
    return corpus


def test_speakers_and_rare_emotions_have_their_counts(corpus):
    found = Counter((u.speaker, u.label) for u in corpus)
    for speaker, counts in replica.SPEAKERS.items():
        expected = [found[f"Ses0{speaker}", label] for label in (2, 1, 3, 0)]
        assert list(counts) == expected
    assert Counter(u.emotion for u in corpus if u.label is None) == replica.OTHERS
    improvised = [u for u in corpus if u.label is not None and "impro" in u.dialog]
    assert len(improvised) == 2943


def test_clips_and_sentences_are_as_long_as_those_of_the_release(corpus):
    seconds = np.array([u.end - u.start for u in corpus]) / 0.02
    assert abs(np.median(seconds) - 3.58) < 0.15
    assert abs(seconds.mean() - 4.55) < 0.2
    words = [len(u.text.split()) for u in corpus]
    assert abs(np.median(words) - 8) <= 1
    assert abs(np.mean(words) - 11.5) < 1.5
    assert max(words) <= 98


def test_a_missing_session_is_reported(root, tmp_path):
    for number in (1, 2, 3, 4):
        (tmp_path / f"Session{number}").symlink_to(root / f"Session{number}")
    (tmp_path / "Session5" / "dialog").mkdir(parents=True)
    corpus, (problem,) = data.read_iemocap(tmp_path)
    assert "Session5" in problem
    assert len(corpus) == 10039 - 2170
    missing = data.reference_problems(corpus)
    assert any("31" in line and "dialogues" in line for line in missing)
    assert all("session 5" in line for line in missing)


def test_it_is_never_written_over_other_files(tmp_path):
    with pytest.raises(SystemExit):
        replica.main([str(tmp_path)])
    assert not list(tmp_path.iterdir())
