"""The replica has the counts, the quirks and the lengths of the full release."""

import re
from collections import Counter

import numpy as np
import pytest

import data
from tests.robust import replica


def check_counts(corpus):
    """The replica's table of counts is its own, so it checks that of data.py."""
    assert len(corpus) == 10039 and len({u.dialog for u in corpus}) == 151
    assert data.reference_problems(corpus) == []
    found = Counter((u.speaker, u.label) for u in corpus)
    for speaker, counts in replica.SPEAKERS.items():
        expected = [found[f"Ses0{speaker}", label] for label in (2, 1, 3, 0)]
        assert list(counts) == expected
    assert Counter(u.emotion for u in corpus if u.label is None) == replica.OTHERS
    improvised = [u for u in corpus if "impro" in u.dialog]
    assert len({u.dialog for u in improvised}) == 80
    assert sum(u.label is not None for u in improvised) == 2943


def test_the_plan_has_the_counts_of_the_release():
    corpus = []
    for dialog, turns in replica.plan_release(np.random.default_rng(1)).items():
        assert 24 <= len(turns) <= 167  # as in the release
        for number, (letter, emotion) in enumerate(turns):
            name = f"{dialog}_{letter}{number:03}"
            session, speaker = int(dialog[4]), dialog[:5] + letter
            u = data.Utterance(name, session, dialog, speaker, 0, 1, "", emotion, None)
            corpus.append(u)
    check_counts(corpus)
    # A count that is not that of the release is found.
    missing = data.reference_problems([u for u in corpus if u.session != 5])
    assert any("31" in line and "dialogues" in line for line in missing)
    assert all("session 5" in line for line in missing)


@pytest.mark.slow
def test_the_files_have_the_counts_the_quirks_and_the_lengths(tmp_path):
    root = tmp_path / "full"
    replica.main([str(root), "--shorten", "0.02"])
    corpus, problems = data.read_iemocap(root)
    assert problems == []
    check_counts(corpus)
    seconds = np.array([u.end - u.start for u in corpus]) / 0.02
    assert abs(np.median(seconds) - 3.58) < 0.15 and abs(seconds.mean() - 4.55) < 0.2
    words = [len(u.text.split()) for u in corpus]
    assert abs(np.median(words) - 8) <= 1 and abs(np.mean(words) - 11.5) < 1.5
    assert max(words) <= 98 and "[LAUGHTER]" in {u.text for u in corpus}

    # Each label file has all turns of F first. Turns overlap, and one pair is a tie.
    pairs = list(zip(corpus, corpus[1:], strict=False))
    pairs = [(u, after) for u, after in pairs if u.dialog == after.dialog]
    assert sum(after.start < u.end for u, after in pairs) > 1000
    ties = [u.dialog for u, after in pairs if u.start == after.start]
    assert ties == ["Ses02F_impro01"]
    for file in root.glob("Session*/dialog/EmoEvaluation/Ses*.txt"):
        letters = re.findall(r"_([FM])\d\d\d\t", file.read_text())
        assert letters == sorted(letters) and set(letters) == {"F", "M"}
    assert len(list(root.glob("Session*/dialog/EmoEvaluation/*/*_cat.txt"))) == 151

    # Transcripts have lines out of order, and 48 lines without a label.
    unlabelled = Counter()
    inversions = []
    for file in root.glob("Session*/dialog/transcriptions/Ses*.txt"):
        names = re.findall(r"^(Ses\w+) \[", file.read_text(), re.M)
        unlabelled.update(name for name in names if "XX" in name)
        starts = re.findall(r"^Ses\w+_[FM]\d+ \[(\S+)-", file.read_text(), re.M)
        later = zip(starts, starts[1:], strict=False)
        inversions.append(sum(after < start for start, after in later))
    assert sorted(unlabelled.values()) == 44 * [1] + 2 * [2]
    assert sum(inversions) == 149 and sum(map(bool, inversions)) == 67


def test_it_is_never_written_over_other_files(tmp_path):
    with pytest.raises(SystemExit):
        replica.main([str(tmp_path)])
    assert not list(tmp_path.iterdir())
