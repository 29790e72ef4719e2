"""The replica has the counts of the full release. Its table is not that of data.py."""

import numpy as np
import pytest

import data
from tests.robust import replica


def test_the_plan_has_the_counts_of_the_release():
    corpus = []
    for dialog, turns in replica.plan_release(np.random.default_rng(1)).items():
        for _, emotion in turns:
            place = (int(dialog[4]), dialog, "")
            corpus.append(data.Utterance("", *place, 0, 1, "", emotion, None))
    assert len(corpus) == 10039 and data.reference_problems(corpus) == []


@pytest.mark.slow
def test_its_files_are_read_whole(tmp_path, capsys):
    replica.main([str(tmp_path / "full"), "--shorten", "0.02"])
    data.main(["check", str(tmp_path / "full")])
    printed = capsys.readouterr().out
    assert "10039 utterances, 151 dialogues, 10 speakers" in printed
    assert "all counts match the full release" in printed
