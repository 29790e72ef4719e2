"""What selecting the epoch on test data adds: train.py with the development set replaced.

    python tests/select_on_test.py --system 17 --fold all --seed 0 1 2

It takes train.py's flags. Development is the test session, and the epoch with the lowest loss on it
is tested. Training never sees a test utterance, so the gain comes from the selection alone. The
corpus's name says SELECTED-ON-TEST, and so does every report. Never do this in a paper.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train


honest_split, honest_corpus = data.split, train.read_corpus


def split_with_test_as_dev(corpus, fold, seed):
    """Return (train, test, test). The development speaker stays out of training, as always."""
    train_set, _, test_set = honest_split(corpus, fold, seed)
    return train_set, test_set, test_set


def read_marked_corpus(*paths):
    name, corpus = honest_corpus(*paths)
    return f"{name}-SELECTED-ON-TEST", corpus


def main(arguments=None):
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    data.split, train.read_corpus = split_with_test_as_dev, read_marked_corpus
    try:
        train.main([*arguments, "--select", "best"])
    finally:
        data.split, train.read_corpus = honest_split, honest_corpus


if __name__ == "__main__":
    data.run_command(main)
