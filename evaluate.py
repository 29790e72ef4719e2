"""Results: Tables 1 and 2, Fig. 4, paired comparisons, and an utterance of your own.

    python evaluate.py RUNS                   Tables 1 and 2, on IEMOCAP beside the paper's figures
    python evaluate.py RUNS --parts           the same systems on parts of the test data
    python evaluate.py RUNS --compare A B     is the difference between two systems real?
    python evaluate.py RUNS --pictures DIR    Fig. 4 and learning curves
    python evaluate.py RUN --wav x.wav --text "i never said that" --before "did you say that"

RUNS is a folder that contains runs, RUN is the folder of one run. A and B are two of Table 1's
numbers, or two folders. Runs below the first are then compared with runs below the second, for
example one system with and without a switch.

Reports read config.json, result.json and predictions.csv of each run, and learning curves read
log.jsonl. Only an utterance of your own needs checkpoint.pt and the upstreams.
"""

import argparse
import csv
import io
import json
import math
import re
import sys
import textwrap
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor, nn

from data import CLASSES, CLIP_SECONDS, SAMPLE_RATE, clip, load_wav, reading, run_command, write_whole
from model import FUSIONS, Config, EmotionRecognizer, Upstream, UpstreamError

# ------------------------------------------------------------------------------------------------
# Metrics (§3.1): "weighted accuracy (WA) and unweighted accuracy (UA, balanced by class weights)"
#
# The names are easily confused. WA is plain accuracy, so a class counts by its size. UA gives every
# class the same weight: an utterance weighs 1 / the size of its class.
# ------------------------------------------------------------------------------------------------


def confusion_matrix(y_true: Sequence[int], y_pred: Sequence[int]) -> np.ndarray:
    """Count (4, 4): entry [i, j] is the number of utterances of class i predicted as class j.

    >>> confusion_matrix([0, 0, 0, 1], [0, 0, 2, 1])[:3, :3].tolist()
    [[2, 0, 1], [0, 1, 0], [0, 0, 0]]
    """
    counts = np.zeros((len(CLASSES), len(CLASSES)), dtype=int)
    np.add.at(counts, (np.asarray(y_true), np.asarray(y_pred)), 1)
    return counts


def weighted_accuracy(y_true: Sequence[int], y_pred: Sequence[int]) -> float:
    """Compute WA: the fraction of utterances that are right.

    >>> weighted_accuracy([0, 0, 0, 1], [0, 0, 2, 1])  # 3 of 4
    0.75
    """
    return float(np.mean(np.asarray(y_true) == np.asarray(y_pred)))


# EXERCISE 6 (10 min): delete the body, write it again; pytest -m ex6
def unweighted_accuracy(y_true: Sequence[int], y_pred: Sequence[int]) -> float:
    """Compute UA: the average of the recalls of the classes (macro-averaged recall).

    y_true, y_pred: lists, arrays or tensors of N class indices. A class without an utterance in
    y_true does not count.

    >>> round(unweighted_accuracy([0, 0, 0, 1], [0, 0, 2, 1]), 4)  # (2/3 + 1/1) / 2
    0.8333
    """
    counts = confusion_matrix(y_true, y_pred)
    size = counts.sum(axis=1)
    return float((counts.diagonal()[size > 0] / size[size > 0]).mean())


METRICS = {"wa": weighted_accuracy, "ua": unweighted_accuracy}


def score(labels: Tensor, log_probs: Tensor) -> dict:
    """Compute {"wa", "ua", "loss", "confusion"} from labels (N,) and log-probabilities (N, 4)."""
    guess = log_probs.argmax(dim=1)
    return {
        "wa": weighted_accuracy(labels, guess),
        "ua": unweighted_accuracy(labels, guess),
        "loss": nn.functional.nll_loss(log_probs, labels).item(),
        "confusion": confusion_matrix(labels, guess).tolist(),
    }


@torch.no_grad()
def predict(model: nn.Module, rows: Tensor, batch: Callable, size: int = 32) -> Tensor:
    """Predict log-probabilities (N, 4), on the CPU, of the utterances in `rows` (N,).

    `batch` turns up to `size` rows into the keyword arguments of the model. Dropout is off.
    """
    model.eval()
    logits = [model(**batch(part)) for part in rows.split(size)]
    return torch.cat(logits).log_softmax(dim=1).cpu()


# ------------------------------------------------------------------------------------------------
# The files of a run (train.py lists them)
# ------------------------------------------------------------------------------------------------


class RunError(RuntimeError):
    """A run, or something asked of it, is unusable. The message names the file and the remedy."""


@dataclass
class Run:
    """A finished run without its model."""

    folder: Path
    title: str  # the corpus and the settings that are not the paper's: "toy, condense=concat"
    config: dict  # config.json
    result: dict  # result.json
    system: int  # the number in Table 1
    fold: int
    seed: int
    test: dict  # arrays (N,) with one entry a test utterance: utterance, dialog, truth, guess, ...


def write_predictions(path: Path, utterances: list, log_probs: Tensor, seen_text: list) -> None:
    """Write predictions.csv: one row an utterance, with the probability of each class."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["utterance", "speaker", "label", "prediction", *CLASSES, "seen_text"])
    guesses = log_probs.argmax(dim=1)  # as in `score`: exp can make nearly equal numbers equal
    for u, guess, p, seen in zip(utterances, guesses, log_probs.exp().tolist(), seen_text):
        p = [f"{x:.6f}" for x in p]
        table.writerow([u.id, u.speaker, CLASSES[u.label], CLASSES[guess], *p, int(seen)])
    write_whole(path, text.getvalue().encode())


def read_run(folder: Path) -> Run:
    """Read the files of a finished run and check them against each other, or raise RunError."""
    remedy = f"restore it, or delete {folder} and train again"
    path = folder / "config.json"
    with reading(path, remedy, RunError):
        config = json.loads(path.read_text())
        switches = [f"{name}={value}" for name, value in config["switches"].items()]
        title = ", ".join([config["corpus"], *switches])
        system = system_number(config["fusion"], config["frozen"])

    path = folder / "predictions.csv"
    with reading(path, remedy, RunError), open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
        test = {name: np.array([row[name] for row in rows]) for name in ("utterance", "speaker")}
        test["dialog"] = np.array([id.rsplit("_", 1)[0] for id in test["utterance"]])
        test["truth"] = np.array([CLASSES.index(row["label"]) for row in rows])
        test["guess"] = np.array([CLASSES.index(row["prediction"]) for row in rows])
        test["seen"] = np.array([int(row["seen_text"]) for row in rows], dtype=bool)
        p = np.array([[float(row[c]) for c in CLASSES] for row in rows])  # (N, 4)
        if len(set(test["utterance"])) < len(rows):
            raise ValueError("an utterance occurs twice")
        if not (p.min() >= 0 and p.max() <= 1):  # NaN is refused, too
            raise ValueError("a probability is not between 0 and 1")

    path = folder / "result.json"
    with reading(path, remedy, RunError):
        result = json.loads(path.read_text())
        expected = {key: config[key] for key in ("corpus", "fusion", "frozen", "fold", "seed")}
        expected |= {name: metric(test["truth"], test["guess"]) for name, metric in METRICS.items()}
        expected["confusion"] = confusion_matrix(test["truth"], test["guess"]).tolist()
        expected["n_test"] = len(rows)
        for key, value in expected.items():
            if result[key] != value:
                raise ValueError(f"{key} is {result[key]}, but {value} in the run's other files")
        if not (0 <= result["loss"] < math.inf and result["epochs"] > 0):
            raise ValueError("the loss or the number of epochs is out of range")
    return Run(folder, title, config, result, system, config["fold"], config["seed"], test)


def find_runs(root: Path) -> tuple[list[Run], list[str]]:
    """Read all finished runs below a folder: (the usable ones, a complaint for each other one)."""
    runs, complaints = {}, []
    for path in sorted(root.rglob("result.json")):
        try:
            run = read_run(path.parent)
            first = runs.setdefault((run.title, run.system, run.fold, run.seed), run)
            if first is not run:
                raise RunError(f"{run.folder}: duplicate of {first.folder}; delete one of them")
        except RunError as error:
            complaints.append(str(error))
    return list(runs.values()), complaints


def load_checkpoint(path: Path) -> dict:
    """Load checkpoint.pt on the CPU, or raise RunError."""
    with reading(path, "delete it and train again", RunError):
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at the checksums
        if damaged:
            raise ValueError(f"{damaged} in it is damaged")
        # With weights_only=True, a downloaded file cannot run code.
        return torch.load(path, map_location="cpu", weights_only=True)


# ------------------------------------------------------------------------------------------------
# Reports (§3.3, §4)
# ------------------------------------------------------------------------------------------------

# Table 1: model, modality, WA and UA in % (mean of 5 folds).
# PAPER-ERROR [E5]: "fine-tuned features generally outperform frozen features". Exceptions: the UA
# of Sys. 10 and 16. The WA of Sys. 16 equals that of Sys. 15.
# PAPER-ERROR [E6]: "the fusion of CMT models is best". By UA, Sys. 15 (LF) is. Among the frozen
# systems, LF is best in both WA and UA.
# PAPER-ERROR [E7]: "CMT(T->A) slightly improves over the textual". Exception: the UA of Sys. 12 is
# below that of Sys. 6.
# PAPER-ERROR [E8]: Sys. 18 "surpasses the accuracy of every emotion class" of Sys. 8 (§4.2.2). In
# Fig. 4, angry is .85 in both.
TABLE_1 = {  # frozen, and fine-tuned
    1: ("WavLM+FC frozen", "A", 66.15, 65.35), 2: ("WavLM+FC fine-tuned", "A", 66.70, 66.71),
    3: ("WavLM+TE frozen", "A", 63.51, 64.67), 4: ("WavLM+TE fine-tuned", "A", 67.99, 68.24),
    5: ("BERT+FC frozen", "T", 74.33, 76.57), 6: ("BERT+FC fine-tuned", "T", 77.67, 78.76),
    7: ("BERT+TE frozen", "T", 74.55, 76.41), 8: ("BERT+TE fine-tuned", "T", 76.09, 76.57),
    9: ("CMT(A→T) frozen", "A+T", 67.76, 69.37), 10: ("CMT(A→T) fine-tuned", "A+T", 68.07, 67.93),
    11: ("CMT(T→A) frozen", "A+T", 74.98, 76.85), 12: ("CMT(T→A) fine-tuned", "A+T", 77.75, 78.60),
    13: ("EF frozen", "A+T", 77.61, 77.85), 14: ("EF fine-tuned", "A+T", 79.80, 80.65),
    15: ("LF frozen", "A+T", 79.91, 81.88), 16: ("LF fine-tuned", "A+T", 79.91, 81.15),
    17: ("MMT frozen", "A+T", 78.58, 80.72), 18: ("MMT fine-tuned", "A+T", 80.36, 81.70),
}  # fmt: skip
# Table 2 has two rows "ours" on Session 5, frozen and fine-tuned, without system numbers. §5 says
# that the second is MMT. The first is LF or MMT, because the frozen 5-fold row is Sys. 15 (LF).
# PAPER-ERROR [E2]: §5 prints a WA of 84.35, the abstract and Table 2 print 84.45.
TABLE_2 = {15: (78.32, 80.56), 17: (78.32, 80.56), 18: (84.45, 84.39)}


def system_number(fusion: str, frozen: bool) -> int:
    """Return Table 1's number: 1 to 18, odd numbers are frozen, even numbers fine-tuned.

    >>> system_number("audio-fc", frozen=True), system_number("mmt", frozen=False)
    (1, 18)
    """
    return 2 * list(FUSIONS).index(fusion) + (1 if frozen else 2)


def normalized(counts: np.ndarray) -> np.ndarray:
    """Divide each row of a confusion matrix by its sum, as in Fig. 4. Empty rows stay 0.

    >>> normalized(np.array([[3, 1], [0, 0]])).tolist()
    [[0.75, 0.25], [0.0, 0.0]]
    """
    return counts / counts.sum(axis=1, keepdims=True).clip(min=1)


def markdown(title: str, rows: list[dict]) -> str:
    """Format rows with the same keys as an aligned Markdown table below its title."""
    cells = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join([title, "", *(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells)])


def describe(result: dict) -> str:
    """Format WA and UA of one run, those of chance, and the confusion matrix (Fig. 4)."""
    corpus, counts = result["corpus"], np.array(result["confusion"])
    size, rows = counts.sum(axis=1), []
    for name, row, n in zip(CLASSES, normalized(counts), size):
        cells = {c: f"{x:.2f}" for c, x in zip(CLASSES, row)}
        rows.append({"true": name, **cells, "utterances": n})
    return (
        f"{corpus}: WA {result['wa']:.2%}  UA {result['ua']:.2%}  on {result['n_test']} test "
        f"utterances of session {result['fold']}, after {result['epochs']} epochs\n"
        f"{corpus}: WA {size.max() / size.sum():.2%}  UA {1 / (size > 0).sum():.2%}  by always "
        "predicting the largest class\n\n"
        + markdown(f"{corpus}: fraction of each true class (row) predicted as (column)", rows)
    )


def averages(runs: list[Run], key: str, metric: str) -> list[float]:
    """Average a metric, in %, over the runs with the same "fold" or the same "seed"."""
    groups = {}
    for run in runs:
        groups.setdefault(getattr(run, key), []).append(100 * run.result[metric])
    return [fmean(group) for group in groups.values()]


def compared(title: str, runs: list[Run], published: dict[int, tuple], sessions: list) -> str:
    """Format a table of the systems of `published` that were run, or return "".

    The first ± is the standard deviation over the folds, each averaged over its seeds. It shows how
    much the sessions differ. With several seeds, the last ± is that of the averages of the seeds.
    It shows the effect of initial weights, order and development speaker. Missing folds are listed,
    because a mean over other folds than the paper's is not comparable with the paper's.
    """
    rows = []
    for number, figures in published.items():
        mine = [run for run in runs if run.system == number]
        if not mine:
            continue
        row = {"Sys.": number, "model": TABLE_1[number][0], "runs": len(mine)}
        for metric, figure in zip(METRICS, figures):
            folds, seeds = (averages(mine, key, metric) for key in ("fold", "seed"))
            spread = [f" ± {stdev(group):.2f}" for group in (folds, seeds) if len(group) > 1]
            row[metric.upper()] = f"{fmean(folds):.2f}" + "".join(spread)
            if mine[0].result["corpus"] == "iemocap":  # the only corpus that the paper reports
                row[f"paper {metric.upper()}"] = f"{figure:.2f}"
                row[f"diff {metric.upper()}"] = f"{fmean(folds) - figure:+.2f}"
        missing = [
            f"{fold} (seed {seed})" for seed in sorted({run.seed for run in mine})
            for fold in sessions if (fold, seed) not in {(run.fold, run.seed) for run in mine}
        ]  # fmt: skip
        rows.append({**row, "missing folds": ", ".join(missing)})
    return markdown(title, rows) if rows else ""


def table_1(runs: list[Run]) -> str:
    """Format Table 1 for runs of one title."""
    title = f"Table 1 with {runs[0].title}, in %, mean ± sd over folds (± sd over seeds)"
    figures = {number: row[2:] for number, row in TABLE_1.items()}
    return compared(title, runs, figures, runs[0].config["sessions"])


def table_2(runs: list[Run]) -> str:
    """Format the rows "ours" of Table 2 on Session 5, or return ""."""
    title = f"Table 2 with {runs[0].title}, Session 5, in % (± sd over seeds)"
    return compared(title, [run for run in runs if run.fold == 5], TABLE_2, [5])


def pooled(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """Join the test utterances of several runs."""
    return {name: np.concatenate([run.test[name] for run in runs]) for name in runs[0].test}


def breakdown(runs: list[Run]) -> str:
    """Format WA and UA on parts of the test data, pooled over all runs of a system.

    A quarter of IEMOCAP's scripted lines occur in several sessions ("text seen"). A text model can
    know them from training. Within one class, WA and UA are both its recall.
    """
    rows = []
    for number in sorted({run.system for run in runs}):
        test = pooled([run for run in runs if run.system == number])
        parts = {
            "all": test["truth"] >= 0,
            "improvised": np.char.find(test["dialog"], "impro") >= 0,
            "scripted": np.char.find(test["dialog"], "script") >= 0,
            "text seen": test["seen"],
            "text unseen": ~test["seen"],
        }
        parts |= {f"speaker {s}": test["speaker"] == s for s in np.unique(test["speaker"])}
        parts |= {f"class {c}": test["truth"] == i for i, c in enumerate(CLASSES)}
        for name, part in parts.items():
            if part.any():
                both = test["truth"][part], test["guess"][part]
                values = {m.upper(): f"{100 * metric(*both):.2f}" for m, metric in METRICS.items()}
                rows.append({"Sys.": number, "part": name, "utterances": part.sum(), **values})
    return markdown(f"Parts of the test data with {runs[0].title}, in %, pooled over runs", rows)


# ------------------------------------------------------------------------------------------------
# Is a difference between two systems real? (The paper has no tests.)
# ------------------------------------------------------------------------------------------------


def mcnemar(right_a: Sequence[bool], right_b: Sequence[bool]) -> float:
    """Compute the p-value of McNemar's exact test: do a and b err equally often?

    Only utterances that exactly one of the two systems gets right carry information. If the systems
    are equally good, each of these n falls to either side like a fair coin. p is twice the
    probability of so uneven a split, at most 1. The test takes utterances as independent.
    Example: only a is right on 1 and only b on 5, so p = 2 (C(6,0) + C(6,1)) / 2^6 = 14 / 64.

    >>> mcnemar([1, 0, 0, 0, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1, 1, 0])
    0.21875
    """
    a, b = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def bootstrap(truth, guess_a, guess_b, dialogs, draws: int = 2000, seed: int = 0) -> dict:
    """Compute for "wa" and "ua" the difference b - a, and the ends of its 95 % interval.

    This is the percentile bootstrap (Efron and Tibshirani 1993, ch. 13). Neighbouring utterances
    depend on each other, so we draw whole dialogues with replacement. Both systems are scored on
    the same draw. Example: b is right on one more of the two utterances of each dialogue.

    >>> bootstrap(np.array([0, 0, 0, 0]), np.array([0, 1, 0, 1]), np.array([0, 0, 0, 0]),
    ...           np.array(["d", "d", "e", "e"]))["wa"]
    (0.5, 0.5, 0.5)
    """

    def differences(rows: np.ndarray) -> list[float]:
        y, a, b = truth[rows], guess_a[rows], guess_b[rows]
        return [metric(y, b) - metric(y, a) for metric in METRICS.values()]

    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(dialogs == d) for d in np.unique(dialogs)]  # rows of each dialogue
    values = []
    for _ in range(draws):
        drawn = rng.integers(len(members), size=len(members))
        values.append(differences(np.concatenate([members[d] for d in drawn])))
    low, high = np.percentile(values, [2.5, 97.5], axis=0).tolist()
    return dict(zip(METRICS, zip(differences(np.arange(len(truth))), low, high)))


def compare(first: list[Run], second: list[Run], every_seed: bool = False) -> str:
    """Compare the runs of two systems, A and B, on the folds that both have.

    Runs are paired by fold and seed. We take the lowest common seed of each fold, or with
    every_seed all of them. Raises RunError if no pair exists.
    """
    a, b = ({(run.fold, run.seed): run for run in runs} for runs in (first, second))
    if len(a) < len(first) or len(b) < len(second):
        raise RunError("--compare: several runs have the same fold and seed; name smaller folders")
    pairs = {}
    for fold, seed in sorted(a.keys() & b.keys()):
        pairs.setdefault((fold, seed if every_seed else 0), (a[fold, seed], b[fold, seed]))
    if not pairs:
        raise RunError("--compare: no fold that both have with the same seed; train more folds")
    runs_a, runs_b = zip(*pairs.values())
    in_a, in_b = pooled(runs_a), pooled(runs_b)
    if any(in_a[name].tolist() != in_b[name].tolist() for name in ("utterance", "truth")):
        raise RunError("--compare: A and B were tested on different utterances; train one again")

    right_a, right_b = in_a["guess"] == in_a["truth"], in_b["guess"] == in_b["truth"]
    folds = ", ".join(str(fold) for fold in sorted({run.fold for run in runs_a}))
    lines = [
        f"A: Sys. {runs_a[0].system}, {TABLE_1[runs_a[0].system][0]}, {runs_a[0].title}",
        f"B: Sys. {runs_b[0].system}, {TABLE_1[runs_b[0].system][0]}, {runs_b[0].title}",
        f"{len(pairs)} pairs of runs on folds {folds}: {len(right_a)} predictions in "
        f"{len(set(in_a['dialog']))} dialogues",
        f"only A right: {(right_a & ~right_b).sum()}, only B right: {(right_b & ~right_a).sum()}; "
        f"McNemar's exact test: p = {mcnemar(right_a, right_b):.3g} (takes them as independent)",
    ]
    intervals = bootstrap(in_a["truth"], in_a["guess"], in_b["guess"], in_a["dialog"])
    for metric, points in intervals.items():
        difference, low, high = (f"{100 * x:+.2f}" for x in points)
        verdict = "  (contains 0: no difference shown)" if points[1] <= 0 <= points[2] else ""
        lines.append(f"{metric.upper()} of B minus A: {difference} points, 95 % interval {low} to {high}{verdict}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# Pictures. matplotlib is the one optional package.
# ------------------------------------------------------------------------------------------------


def figure(width: float, height: float, title: str):
    """Create an empty matplotlib Figure, in inches. Raises RunError without matplotlib."""
    with reading("matplotlib", "for pictures: pip install matplotlib", RunError):
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot there is no window to close
    matplotlib.rcParams.update({"font.size": 10, "axes.titlesize": 10, "figure.dpi": 200})
    fig = Figure((width, height), layout="constrained")
    fig.suptitle(textwrap.fill(title, int(12 * width)), fontsize=11)
    return fig


def draw_confusions(runs: list[Run], path: Path) -> None:
    """Draw Fig. 4 for its own four systems on Session 5, or else for the first twelve runs."""
    # Panels a to d: fine-tuned audio, text and MMT, then frozen text. Take the lowest seed.
    lowest = {(run.system, run.fold): run for run in sorted(runs, key=lambda run: -run.seed)}
    shown = [lowest[n, 5] for n in (4, 8, 18, 7) if (n, 5) in lowest] or runs[:12]
    columns, rows = min(len(shown), 4), math.ceil(len(shown) / 4)
    fig = figure(3 * columns, 3.3 * rows, f"Fig. 4 with {runs[0].title}")
    for k, run in enumerate(shown):
        ax = fig.add_subplot(rows, columns, k + 1, xlabel="Predictions", ylabel="Groundtruth")
        fractions = normalized(np.array(run.result["confusion"]))  # (4, 4)
        ax.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
        for (i, j), x in np.ndenumerate(fractions):
            color = "white" if x > 0.5 else "black"
            ax.text(j, i, f"{x:.2f}", ha="center", va="center", color=color)
        ax.set_xticks(range(4), CLASSES)
        ax.set_yticks(range(4), CLASSES)
        name = f"({'abcdefghijkl'[k]}) Sys. {run.system} (UA: {run.result['ua']:.2%})"
        ax.set_title(f"{name}\nfold {run.fold}, seed {run.seed}")
    fig.savefig(path)


def draw_curves(runs: list[Run], path: Path) -> None:
    """Draw loss and development UA of one system's runs over the epochs, one colour a run."""
    number, title = runs[0].system, runs[0].title
    fig = figure(6.5, 6.5, f"Sys. {number}, {TABLE_1[number][0]}, {title}")
    loss, ua = fig.subplots(2, 1, sharex=True)
    starts = []
    for run in runs:
        file, start = run.folder / "log.jsonl", run.result["finetune_epoch"]
        with reading(file, "restore it, or leave out --pictures", RunError):
            log = [json.loads(line) for line in file.read_text().splitlines()]
            columns = [[row[key] for row in log] for key in ("train_loss", "dev_loss", "dev_ua")]
            train, dev, dev_ua = np.array(columns, dtype=float)  # 3 x (epochs,)
            epochs = range(1, len(log) + 1)
            starts += [(start, dev[start - 1])] if start else []
        (line,) = loss.plot(epochs, dev, label=f"fold {run.fold}, seed {run.seed}")
        loss.plot(epochs, train, ":", color=line.get_color())
        ua.plot(epochs, 100 * dev_ua)
    if starts:
        loss.plot(*zip(*starts), "kv", label="fine-tuning starts")
    loss.legend(ncols=3)
    loss.set_ylabel("cross-entropy (dotted: training)")
    ua.set(xlabel="epoch", ylabel="development UA in %")
    fig.savefig(path)


def draw_gates(recognizer: "Recognizer", batch: dict[str, tuple], path: Path) -> None:
    """Draw the gates of squeeze-and-excitation over the layers, for one utterance."""
    fig = figure(6.5, 3.5, f"S&E gates of one utterance, {recognizer.name}")
    ax = fig.add_subplot(xlabel="layer (0: input of the first Transformer layer)", ylabel="gate")
    for modality, (states, mask, *context) in batch.items():
        gates = recognizer.model.extractor[modality].se.gates(states.float(), mask)  # (U, L)
        target = context[0][0, context[0].shape[1] // 2] if context else 0  # row of the utterance
        ax.plot(gates[target], "o-", label=modality)
    ax.set_ylim(0, 1)
    ax.legend()
    fig.savefig(path)


def draw_attention(recognizer: "Recognizer", batch: dict, text: str, path: Path) -> None:
    """Draw the weights of Eq. (1) for one utterance, one panel for each cross-modal block."""
    fusion = recognizer.model.fusion
    x, mask = recognizer.model.features(**batch)
    tokenizer, n = recognizer.upstreams["text"].preprocessor, x["text"].shape[1]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    tokens = (tokens + ["(context)"] * n)[:n]  # X_T is as long as the longest text of the context
    step = 1 + n // 30  # for labels that do not overlap
    fig = figure(6.5, 2 + 5 * len(fusion.blocks), f"Eq. (1) on one utterance, {recognizer.name}")
    axes = fig.subplots(len(fusion.blocks), 1, squeeze=False)[:, 0]
    for ax, (target, source) in zip(axes, fusion.paths):
        block = fusion.blocks[f"{source}-to-{target}"]
        _, weights = block.attend(x[target], x[source], mask[source])  # (1, T_t, T_s)
        weights = weights[0] if target == "text" else weights[0].T  # (T_T, T_A) in both panels
        image = ax.imshow(weights, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
        ax.set(title=f"{source} → {target}: the weights of each {target} step sum to 1", xlabel="20 ms frame")
        ax.set_yticks(range(0, n, step), tokens[::step])
        fig.colorbar(image, ax=ax)
    fig.savefig(path)


# ------------------------------------------------------------------------------------------------
# An utterance of your own
# ------------------------------------------------------------------------------------------------


class Recognizer:
    """A finished run that predicts the emotion of your own utterances. In a notebook:

        from evaluate import Recognizer
        Recognizer("runs/toy/mmt-finetuned/fold5-seed0").recognize("x.wav", "i never said that")

    Raises RunError if the run is unusable, UpstreamError if its WavLM or BERT is.
    """

    def __init__(self, folder: str | Path):
        run = read_run(Path(folder))
        self.title = run.title
        self.name = f"Sys. {run.system}, {run.title}, fold {run.fold}, seed {run.seed}"
        state = load_checkpoint(run.folder / "checkpoint.pt")
        with reading(run.folder / "checkpoint.pt", "train the run again", RunError):
            weights = (state["selected"] or state)["weights"]  # [A10]
            self.model = EmotionRecognizer(Config(**run.config["model"])).eval()
            self.model.requires_grad_(False).load_state_dict(weights["model"])
            saved, self.trim = run.config["upstreams"].items(), run.config["trim"]
            precision = run.config["precision"]
        self.upstreams = {m: Upstream(upstream["name"], m, precision) for m, upstream in saved}
        for modality, upstream in saved:
            if self.upstreams[modality].fingerprint != upstream["fingerprint"]:
                raise RunError(f"{upstream['name']}: not the weights that {folder} was trained with")
            self.upstreams[modality].load_weights(weights.get(modality, {}))  # fine-tuned ones

    def batch(self, wav=None, text=None, before=(), after=()) -> dict[str, tuple]:
        """Make the model's keyword arguments for one utterance: a batch of 1.

        before, after: the texts of the turns around it, in their order. With one turn before, none
        after and C = 9, the context is [[-1, -1, -1, 0, 1, -1, -1, -1, -1]]. The utterance is text
        1, in the middle. Inputs of a modality that the system does not use are ignored.
        """
        arguments = {}
        for modality, given in (("audio", wav), ("text", text)):
            if modality in self.upstreams and given is None:
                raise RunError(f"{self.name} needs {modality}; add --wav FILE or --text WORDS")
        if "audio" in self.upstreams:
            arguments["audio"] = self.upstreams["audio"]([clip(load_wav(wav), self.trim)])
        if "text" in self.upstreams:
            half = self.model.config.n_context // 2
            before = list(before)[max(0, len(before) - half) :]
            after = list(after)[:half]
            texts = [*before, text, *after]
            edges = [-1] * (half - len(before)), [-1] * (half - len(after))  # [A6]
            context = torch.tensor([[*edges[0], *range(len(texts)), *edges[1]]])  # (1, C)
            arguments["text"] = (*self.upstreams["text"](texts), context)
        return arguments

    def recognize(self, wav=None, text=None, before=(), after=()) -> dict[str, float]:
        """Return {"neu": p, "hap": p, "ang": p, "sad": p}. For the arguments see `batch`."""
        logits = self.model(**self.batch(wav, text, before, after))  # (1, 4)
        return dict(zip(CLASSES, logits[0].softmax(dim=0).tolist()))

    def remarks(self, wav, text, batch: dict[str, tuple]) -> list[str]:
        """List what a user must know to read the prediction, in sentences."""
        remarks = []
        if self.title.startswith("toy"):
            remarks.append("This model learned from tones. Its numbers are nothing for real speech.")
        if wav is not None and "audio" not in batch:
            remarks.append("This system uses no audio, so --wav is ignored.")
        if text is not None and "text" not in batch:
            remarks.append("This system uses no text, so --text is ignored.")
        if "audio" in batch:
            seconds = len(load_wav(wav)) / SAMPLE_RATE
            if seconds > CLIP_SECONDS:
                remarks.append(f"{wav} has {seconds:.1f} s, of which {CLIP_SECONDS} s are used.")
        if "text" in batch:
            upstream, missing = self.upstreams["text"], int((batch["text"][2] < 0).sum())
            tokens = len(upstream.preprocessor(text)["input_ids"])
            if tokens > upstream.max_tokens:
                remarks.append(f"--text has {tokens} tokens, of which {upstream.max_tokens} are used.")
            if missing:
                remarks.append(f"{missing} turns of context are missing. They count as the dialogue's edge.")
        return remarks


# ------------------------------------------------------------------------------------------------
