"""The replica has the counts and the lengths of the full release, and is read whole."""

from collections import Counter

import numpy as np
import pytest

import data
from tests.robust import replica


def test_the_plan_has_the_counts_of_the_release():
    """The replica's table of counts is its own, so it checks that of data.py."""
    corpus = []
    for dialog, turns in replica.plan_release(np.random.default_rng(1)).items():
        for letter, emotion in turns:
            place = (int(dialog[4]), dialog, dialog[:5] + letter)
            corpus.append(data.Utterance("", *place, 0, 1, "", emotion, None))
    assert len(corpus) == 10039 and data.reference_problems(corpus) == []
    found = Counter((u.speaker, u.label) for u in corpus)
    for speaker, counts in replica.SPEAKERS.items():
        assert counts == tuple(found[f"Ses0{speaker}", label] for label in (2, 1, 3, 0))
    assert Counter(u.emotion for u in corpus if u.label is None) == replica.OTHERS


@pytest.mark.slow
def test_its_files_are_read_whole_and_have_the_lengths_of_the_release(tmp_path):
    replica.main([str(tmp_path / "full"), "--shorten", "0.02"])
    corpus, problems = data.read_iemocap(tmp_path / "full")
    assert problems == data.reference_problems(corpus) == []
    seconds = np.array([u.end - u.start for u in corpus]) / 0.02
    assert abs(np.median(seconds) - 3.58) < 0.15 and abs(seconds.mean() - 4.55) < 0.2
    words = [len(u.text.split()) - 1 for u in corpus]
    assert abs(np.median(words) - 8) <= 1 and abs(np.mean(words) - 11.5) < 1.5
    overlaps = [b.start < a.end for a, b in zip(corpus, corpus[1:], strict=False)]
    assert sum(overlaps) > 1000
