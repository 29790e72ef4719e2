"""What does it add to select the epoch on the test session? Never do this in a paper.

    python -m tests.studies.select_on_test --system 17 --fold all --seed 0 1 2

Takes the flags of train.py. The test session takes the place of the development
speaker, so it decides when fine-tuning starts and when training stops. The log then has
the result on the test session after every epoch. The last epoch is not selected. The
command prints its result beside that of two selected epochs: the one of the lowest
loss, and the one of the highest UA.

No test utterance is trained on, so the gain comes from the selection alone. The name of
the corpus says SELECTED-ON-TEST, and so does every report on these runs.
"""

import sys
from pathlib import Path
from statistics import fmean
from unittest import mock

import data
import train
from evaluate import format_table
from tests.studies.curves import read_log

MARK = "SELECTED-ON-TEST"
honest_split = data.split
honest_read_corpus = train.read_corpus


def split_with_test_as_dev(corpus: data.Corpus, fold: int, seed: int) -> tuple:
    """Split as data.split does, but with the test session in place of the dev speaker.

    The development speaker stays out of training, so the training data is the same.
    """
    train_rows, _, test_rows = honest_split(corpus, fold, seed)
    return train_rows, test_rows, test_rows


def read_marked_corpus(args) -> tuple[str, data.Corpus]:
    name, corpus = honest_read_corpus(args)
    return f"{name}-{MARK}", corpus


def describe_selection(system: Path) -> str:
    """Format the UA of the last epoch beside the UA of two selected ones, in %.

    system   the folder of the runs of one system
    """
    table = [["run", "last epoch", "lowest test loss", "highest test UA"]]
    rows = []
    for result in sorted(system.glob("fold*-seed*/result.json")):
        log = read_log(result.with_name("log.jsonl"))
        lowest_loss = min(log, key=lambda row: row["dev_loss"])
        highest_ua = max(log, key=lambda row: row["dev_ua"])
        uas = [100 * row["dev_ua"] for row in (log[-1], lowest_loss, highest_ua)]
        rows.append(uas)
        table.append([result.parent.name, *[f"{ua:.2f}" for ua in uas]])
    means = [fmean(column) for column in zip(*rows, strict=True)]
    table.append(["mean", *[f"{mean:.2f}" for mean in means]])
    title = f"{system.parent.name}, {system.name}: UA on the test session, in %"
    return format_table(title, table)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    with (
        mock.patch.object(data, "split", split_with_test_as_dev),
        mock.patch.object(train, "read_corpus", read_marked_corpus),
    ):
        train.main(arguments)
    out = train.parse_args(arguments).out
    results = out.glob(f"*-{MARK}/*/fold*-seed*/result.json")
    for system in sorted({result.parent.parent for result in results}):
        print(describe_selection(system))


if __name__ == "__main__":
    data.run_command(main)
