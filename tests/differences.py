"""The statistic of COURSE.md's tables: how two systems differ over all folds and seeds.

    python tests/differences.py A B

A and B are folders of runs, each of one system. Runs of the same fold and seed are paired. Prints, in
points, B minus A: the mean and standard deviation over the pairs, then the mean of each seed.
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import InputError, run_command
from evaluate import find_runs, grouped


def differences(first, second):
    """Pair two lists of runs: {"ua": {(fold, seed): B minus A in points}, "wa": ...}."""
    a, b = ({(run.fold, run.seed): run.result for run in runs} for runs in (first, second))
    mixed = any(len({run.name for run in runs}) > 1 for runs in (first, second))
    if mixed or len(a) < len(first) or len(b) < len(second) or not a.keys() & b.keys():
        raise InputError("A and B need one system each, and a fold and seed in common")
    return {m: {k: 100 * (b[k][m] - a[k][m]) for k in sorted(a.keys() & b.keys())} for m in ("ua", "wa")}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs=2, type=Path, metavar=("A", "B"))
    found = [find_runs(folder)[0] for folder in parser.parse_args(arguments).folders]
    for letter, runs in zip("AB", found):
        print(f"{letter}: {', '.join(grouped(runs, 'name'))}, {len(runs)} runs")
    for metric, points in differences(*found).items():
        a, b = (100 * fmean(x.result[metric] for x in runs if (x.fold, x.seed) in points) for runs in found)
        sd = f" ± {stdev(points.values()):.1f}" if len(points) > 1 else ""
        seeds = sorted({seed for _, seed in points})
        by_seed = [fmean(d for (_, s), d in points.items() if s == seed) for seed in seeds]
        print(f"{metric.upper()}: {fmean(points.values()):+.1f}{sd} over {len(points)} pairs ({a:.1f} to {b:.1f}); "
              f"by seed {', '.join(f'{x:+.1f}' for x in by_seed)}")  # fmt: skip


if __name__ == "__main__":
    run_command(main)
