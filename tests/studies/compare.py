"""Is the difference between two systems real? The paper has no test of this.

    python -m tests.studies.compare FOLDER_A FOLDER_B

Each folder holds the runs of one system, for example runs/toy/mmt-frozen. A run of A
and a run of B are a pair if they have the same fold and seed. Both were tested on the
same utterances. The command answers two questions:

1. How large is the difference, and do all seeds show it? B minus A has a mean and a
   standard deviation over all pairs, and a mean for each seed.
2. Can the difference be an accident of which utterances were tested? McNemar's test and
   a bootstrap over dialogues answer this. Here each fold has one pair, of its lowest
   seed, so that each utterance counts once.

Read `mcnemar` and `bootstrap` first. The rest finds the pairs and prints.
"""

import argparse
import itertools
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from data import CLASSES, InputError, run_command
from evaluate import TABLE_1, FinishedRun, Runs, find_runs, format_table

METRICS = ("wa", "ua")
DRAWS = 2000


# --- The two tests --------------------------------------------------------------------


def mcnemar(only_a: int, only_b: int) -> float:
    """Compute the p-value of McNemar's exact test: are A and B right equally often?

    only_a, only_b   utterances that A alone, or B alone, predicts right

    Utterances that both predict right, or both wrong, do not tell the systems apart. If
    the systems are equally good, each of the others falls to A or to B like a fair
    coin. p is the probability that so many coins fall at least as unevenly as these
    did. For 1 to A and 5 to B, at least as uneven are 0, 1, 5 and 6 heads in 6 tosses:
    14 of the 64 outcomes.
    """
    n = only_a + only_b
    fewer = min(only_a, only_b)
    outcomes = sum(math.comb(n, heads) for heads in range(fewer + 1))  # of one side
    # Both sides are equally likely. If the coins fall evenly, the sides overlap.
    return min(1.0, 2 * outcomes / 2**n)


def accuracies(counts: np.ndarray) -> np.ndarray:
    """Compute WA and UA (2,) of a confusion matrix (4, 4). Its rows are the truth."""
    size = counts.sum(axis=1)  # (4,)
    correct = counts.diagonal()  # (4,)
    recalls = correct[size > 0] / size[size > 0]
    return np.array([correct.sum() / size.sum(), recalls.mean()])


def bootstrap(counts_a: np.ndarray, counts_b: np.ndarray) -> np.ndarray:
    """Compute the 95 % intervals of B minus A: low and high, for WA and for UA (2, 2).

    counts_a, counts_b   one confusion matrix per dialogue (n, 4, 4)

    How different can the result be with other dialogues of the same kind? We have none,
    so we draw n dialogues from ours with replacement, the same ones for A and B, and
    measure the difference on them. We do this 2,000 times. The interval leaves out the
    lowest and the highest 2.5 % of the differences. This is the percentile bootstrap
    (Efron and Tibshirani 1993, chapter 13). It draws whole dialogues instead of single
    utterances, because neighbouring turns are similar.
    """
    n = len(counts_a)
    rng = np.random.default_rng(0)
    differences = np.zeros((DRAWS, len(METRICS)))
    for draw in range(DRAWS):
        drawn = rng.integers(n, size=n)
        # The confusion matrix of several dialogues is the sum of theirs.
        a = accuracies(counts_a[drawn].sum(axis=0))
        b = accuracies(counts_b[drawn].sum(axis=0))
        differences[draw] = b - a
    return np.percentile(differences, [2.5, 97.5], axis=0)


# --- The pairs and the report ---------------------------------------------------------

Pairs = list[tuple[FinishedRun, FinishedRun]]


def read_system(folder: Path) -> tuple[str, Runs]:
    """Read the runs of one system, and name it. Raises InputError for a mixture."""
    runs, damaged = find_runs(folder)
    names = set()
    for run in runs:
        system = run.config["system"]
        names.add(f"Sys. {system} ({TABLE_1[system][0]}), {run.config['title']}")
    if damaged or len(names) != 1:
        problems = [*damaged, f"{folder} must have one system, and has {sorted(names)}"]
        raise InputError("\n".join(problems))
    folds = {(run.config["fold"], run.config["seed"]) for run in runs}
    if len(folds) < len(runs):
        raise InputError(f"{folder} has more than one run of one fold and seed")
    return names.pop(), runs


def find_pairs(runs_a: Runs, runs_b: Runs) -> Pairs:
    """Pair the runs of two systems, in the order of their seeds.

    Raises InputError if there is no pair, or if the corpora of a pair differ.
    """
    pairs = []
    for a, b in itertools.product(runs_a, runs_b):
        if all(a.config[key] == b.config[key] for key in ("fold", "seed")):
            if a.config["corpus_checksum"] != b.config["corpus_checksum"]:
                raise InputError(f"{a.folder} and {b.folder} have different corpora")
            pairs.append((a, b))
    if not pairs:
        raise InputError("A and B have no run of the same fold and seed")
    return sorted(pairs, key=lambda pair: pair[0].config["seed"])


def print_differences(corpus: str, pairs: Pairs) -> None:
    """Print how much the pairs differ, over all of them and for each seed."""
    seeds = np.array([a.config["seed"] for a, _ in pairs])
    header = [f"seed {seed}" for seed in np.unique(seeds)]
    table = [["", "A", "B", "B minus A", *header]]
    for metric in METRICS:
        values = [[100 * run.result[metric] for run in pair] for pair in pairs]
        a, b = np.array(values).T  # (pairs,) each
        difference = b - a
        cell = f"{difference.mean():+.2f}"
        if len(pairs) > 1:
            cell += f" ± {difference.std(ddof=1):.2f}"
        row = [metric.upper(), f"{a.mean():.2f}", f"{b.mean():.2f}", cell]
        for seed in np.unique(seeds):
            row.append(f"{difference[seeds == seed].mean():+.2f}")
        table.append(row)
    print(format_table(f"{corpus}, in %: mean ± sd over {len(pairs)} pair(s)", table))
    print("Folds have training data in common, so these pairs are not independent.")
    print("Believe a sign that all seeds have.\n")


def print_tests(corpus: str, pairs: Pairs) -> None:
    """Print McNemar's test and the bootstrap, on one pair for each fold."""
    first = {}  # by fold, its pair of the lowest seed
    for a, b in pairs:
        first.setdefault(a.config["fold"], (a, b))
    # One confusion matrix per dialogue, of A and of B.
    counts = defaultdict(lambda: np.zeros((2, 4, 4), dtype=int))
    only_a = 0
    only_b = 0
    for a, b in first.values():
        for row_a, row_b in zip(a.predictions, b.predictions, strict=True):
            dialog = row_a["utterance"].rpartition("_")[0]
            names = (row_a["label"], row_a["prediction"], row_b["prediction"])
            truth, guess_a, guess_b = [CLASSES.index(name) for name in names]
            counts[dialog][0, truth, guess_a] += 1
            counts[dialog][1, truth, guess_b] += 1
            only_a += guess_a == truth != guess_b
            only_b += guess_b == truth != guess_a
    matrices = np.array(list(counts.values()))  # (dialogues, 2, 4, 4)
    total_a, total_b = matrices.sum(axis=0)
    print(
        f"{corpus}: {total_a.sum()} predictions in {len(counts)} dialogue(s), one pair "
        "per fold, of its lowest seed\n"
        f"{corpus}: only A is right in {only_a}, only B in {only_b}. "
        f"McNemar's exact test: p = {mcnemar(only_a, only_b):.3g}"
    )
    if len(counts) < 2:
        print("A bootstrap over dialogues needs at least two of them.")
        return
    differences = 100 * (accuracies(total_b) - accuracies(total_a))  # (2,)
    low, high = 100 * bootstrap(matrices[:, 0], matrices[:, 1])  # (2,) each
    for k, metric in enumerate(METRICS):
        line = f"{metric.upper()} of B minus A: {differences[k]:+.2f} points, "
        line += f"95 % interval {low[k]:+.2f} to {high[k]:+.2f}"
        if low[k] <= 0 <= high[k]:
            line += " (contains 0: no difference is shown)"
        print(f"{corpus}: {line}")
    print(
        "If the two tests disagree about WA, believe the interval: McNemar's test takes"
    )
    print("the turns of a dialogue for independent, but they are similar.")
    # Ten is a rule of thumb. With fewer things to draw, the interval is too narrow.
    if len(counts) < 10:
        print("But there are fewer than 10 dialogues, so do not trust the intervals.")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare two systems.")
    parser.add_argument("a", type=Path, metavar="FOLDER_A", help="runs of one system")
    parser.add_argument("b", type=Path, metavar="FOLDER_B", help="runs of another")
    args = parser.parse_args(arguments)
    name_a, runs_a = read_system(args.a)
    name_b, runs_b = read_system(args.b)
    pairs = find_pairs(runs_a, runs_b)
    corpus = " and ".join(sorted({run.config["corpus"] for run in pairs[0]}))
    print(f"A: {name_a}\nB: {name_b}\n")
    print_differences(corpus, pairs)
    print_tests(corpus, pairs)


if __name__ == "__main__":
    run_command(main)
