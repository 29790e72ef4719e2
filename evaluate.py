"""What §3.3 and §4 report: metrics, Tables 1 and 2, the confusion matrices of Fig. 4.

    python evaluate.py RUNS                     ours beside the paper's, for whatever runs are found
    python evaluate.py RUNS --pictures DIR      Fig. 4 and learning curves
    python evaluate.py RUN --wav x.wav --text "i never said that" --before "did you say that"

What a finished run left in its folder is enough for the first two. The third, an utterance of your
own, loads the model and its upstreams; in a notebook it is Recognizer, at the end of this file.
"""

import argparse
import csv
import io
import json
import math
import re
import statistics
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import CLASSES, CLIP_SECONDS, SAMPLE_RATE, CorpusError, Utterance, clip, load_wav, rewrite
from model import FUSIONS, Config, EmotionRecognizer, Upstream, UpstreamError

# ------------------------------------------------------------------------------------------------
# Metrics (§3.1): "averaged weighted accuracy (WA) and unweighted accuracy (UA, balanced by class
# weights)". The names are easily swapped: WA weighs the classes by their size, UA does not. (In UA
# an utterance weighs 1 / the size of its class: these are the "class weights".)
# ------------------------------------------------------------------------------------------------


def confusion_matrix(y_true: Sequence[int], y_pred: Sequence[int]) -> np.ndarray:
    """Counts (4, 4): entry [i, j] is how many of class i were taken for class j; order CLASSES.

    >>> confusion_matrix([0, 0, 0, 1], [0, 0, 2, 1])[:3, :3].tolist()
    [[2, 0, 1], [0, 1, 0], [0, 0, 0]]
    """
    counts = np.zeros((len(CLASSES), len(CLASSES)), dtype=int)
    for i, j in zip(y_true, y_pred, strict=True):
        counts[i, j] += 1
    return counts


def weighted_accuracy(y_true: Sequence[int], y_pred: Sequence[int]) -> float:
    """WA: the share of utterances that are right.

    >>> weighted_accuracy([0, 0, 0, 1], [0, 0, 2, 1])  # 3 of 4
    0.75
    """
    return float(np.mean(np.asarray(y_true) == np.asarray(y_pred)))


# EXERCISE 6 (10 min): delete the body, write it again; pytest -m ex6
def unweighted_accuracy(y_true: Sequence[int], y_pred: Sequence[int]) -> float:
    """UA: the mean over the classes of the share that is right, alias macro-averaged recall.

    y_true, y_pred: lists, arrays or tensors of N class numbers. Classes of which y_true has no
    utterance do not count.

    >>> round(unweighted_accuracy([0, 0, 0, 1], [0, 0, 2, 1]), 4)  # (2/3 + 1/1) / 2
    0.8333
    """
    counts = confusion_matrix(y_true, y_pred)
    size = counts.sum(axis=1)
    return float((counts.diagonal()[size > 0] / size[size > 0]).mean())


def score(labels: Tensor, log_probs: Tensor) -> dict:
    """{"wa", "ua", "loss", "confusion"} of the predictions (N, 4) for labels (N,)."""
    guess = log_probs.argmax(dim=1)
    return {
        "wa": weighted_accuracy(labels, guess),
        "ua": unweighted_accuracy(labels, guess),
        "loss": nn.functional.nll_loss(log_probs, labels).item(),
        "confusion": confusion_matrix(labels, guess).tolist(),
    }


@torch.no_grad()
def predict(model: nn.Module, rows: Tensor, batch: Callable, size: int = 32) -> Tensor:
    """Log-probabilities (N, 4) of the utterances at `rows` (N,), without dropout, on the CPU.

    batch: `size` rows of the corpus -> the keyword arguments of the model.
    """
    model.eval()
    parts = tqdm(rows.split(size), desc="predicting", leave=False, delay=3, disable=None)
    logits = [model(**batch(part)) for part in parts]
    return torch.cat(logits).log_softmax(dim=1).cpu()


# ------------------------------------------------------------------------------------------------
# The run folder, RUNS/<corpus>/<fusion>-<frozen|finetuned>/fold<k>-seed<n>/
#
#     config.json      every setting that makes the run, and the means that made it (train.train)
#     log.jsonl        a line an epoch
#     checkpoint.pt    the last epoch's state: training goes on from it, Recognizer loads it
#     trigger.pt       the state at the trigger, from which the run's twin starts (train.resume)
#     predictions.csv  a line a test utterance
#     result.json      WA, UA, the confusion matrix: written last, so a run that has it is whole
#
# Reports read config.json, result.json and predictions.csv, learning curves log.jsonl. Whoever made
# them, they are checked against each other; a run that does not agree with itself is named and left
# out of every table.
# ------------------------------------------------------------------------------------------------

COLUMNS = ["utterance", "speaker", "label", "prediction", *CLASSES, "seen_text"]  # predictions.csv
SWITCHES = {  # of train.py, and its constants (§3.2), as the paper's systems have them
    "lr": [1e-3, 1e-5], "weight_decay": 1e-3, "batch": 32, "triggers": [5, 10],
    "n_context": 9, "dropout": 0.5, "condense": "sum", "text_mask": "union",
    "cma_residual": False, "reset_patience": False, "select": "last", "precision": "fp32",
    "wavlm": None, "bert": None, "code_changed": [],
}  # fmt: skip


class RunError(RuntimeError):
    """A run folder does not hold what it should; the message names the file."""


def write_predictions(
    path: Path, utterances: list[Utterance], log_probs: Tensor, seen_text: list[bool]
) -> None:
    """predictions.csv, a line for each utterance; seen_text: another session has its words too."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(COLUMNS)
    guesses = log_probs.argmax(dim=1)  # as in score: exp can make a near tie a tie
    for u, guess, p, seen in zip(utterances, guesses, log_probs.exp().tolist(), seen_text):
        numbers = [f"{x:.6f}" for x in p]
        rows.writerow([u.id, u.speaker, CLASSES[u.label], CLASSES[guess], *numbers, int(seen)])
    rewrite(path, lambda file: file.write(text.getvalue().encode()))


@dataclass
class Run:
    """A finished run as its folder tells it; no model is loaded."""

    folder: Path
    title: str  # the corpus and every switch that is not at its default
    settings: dict  # config.json
    result: dict  # result.json; of it come the attributes system, fold and seed
    ids: list[str]  # of the N test utterances
    speakers: np.ndarray  # (N,)
    truth: np.ndarray  # (N,) indices into CLASSES
    guess: np.ndarray  # (N,)
    confidence: np.ndarray  # (N,) the probability of the guess
    seen_text: np.ndarray | None  # (N,) bool; None where the file has no such column

    def __post_init__(self):
        self.system = system_number(self.result["fusion"], self.result["frozen"])
        self.fold, self.seed = self.result["fold"], self.result["seed"]
        self.dialogs = np.array([id.rsplit("_", 1)[0] for id in self.ids])  # (N,)


def demand(holds: bool, complaint: str) -> None:
    """assert, but also where Python was told to skip those (-O)."""
    if not holds:
        raise RunError(complaint)


def read_run(folder: Path) -> Run:
    """config.json, result.json and predictions.csv of a run, checked against each other.

    Raises RunError naming the file and what is wrong with it.
    """
    if not (folder / "config.json").exists():
        raise RunError(f"{folder}: not a run; name a folder that ends like mmt-frozen/fold5-seed0")
    if not (folder / "result.json").exists():
        raise RunError(f"{folder}: no result.json; the same train.py command goes on with this run")
    path = folder / "config.json"  # what is being read, for the error below
    try:
        settings = json.loads(path.read_text())
        path = folder / "result.json"
        result = json.loads(path.read_text())
        kinds = {"corpus": str, "fusion": str, "frozen": bool, "fold": int, "seed": int}
        for key, kind in kinds.items():
            demand(isinstance(result[key], kind), f"{key} is {result[key]!r}")
        demand(result["fusion"] in FUSIONS, f"unknown fusion {result['fusion']!r}")
        describe(result)  # raises KeyError where it would miss something
        # An edit of config.json must not make an honest run of one that was selected on test.
        settings["select"] = result.get("select", "last")
        flips = [f"{k} {settings[k]}" for k, v in SWITCHES.items() if settings.get(k, v) != v]
        title = ", ".join([result["corpus"], *flips]).replace("select test", "SELECTED ON TEST")

        path = folder / "predictions.csv"
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        ids = [row["utterance"] for row in rows]
        speakers = np.array([row["speaker"] for row in rows])
        truth = np.array([CLASSES.index(row["label"]) for row in rows])
        guess = np.array([CLASSES.index(row["prediction"]) for row in rows])
        confidence = np.array([float(row[row["prediction"]]) for row in rows])
        seen = [row.get("seen_text") for row in rows]
        seen = None if None in seen else np.array(seen) == "1"
        demand(len(set(ids)) == len(ids), "an utterance stands there twice")
        same = confusion_matrix(truth, guess) == np.array(result["confusion"])
        demand(same.all(), "it is not what result.json counted")
        for name, metric in (("wa", weighted_accuracy), ("ua", unweighted_accuracy)):
            right = abs(metric(truth, guess) - result[name]) < 1e-6
            demand(right, f"{name} in result.json is not that of these predictions")
        return Run(folder, title, settings, result, ids, speakers, truth, guess, confidence, seen)
    except (RunError, OSError, ValueError, LookupError, TypeError, AttributeError,
            csv.Error) as error:  # fmt: skip
        plain = isinstance(error, (RunError, OSError))
        raise RunError(f"{path}: {error if plain else repr(error)}") from None


def load_checkpoint(path: Path) -> dict:
    """A checkpoint's dict; weights_only: a hostile file runs no code. RunError if it is damaged."""
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at the checksums
        if damaged:
            raise ValueError(f"{damaged} in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("it holds no dict")
        return state
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise RunError(f"{path}: cannot be read ({reason}); delete it and train again") from None


def find_runs(root: Path) -> tuple[list[Run], list[str]]:
    """(runs, what was left out and why) of all run folders below `root`.

    A run is known by its title, system, fold and seed: of two alike the second is left out, since
    a mean over both would count it double.
    """
    runs: dict[tuple, Run] = {}
    left_out = []
    for config in sorted(root.rglob("config.json")):
        if b'"model_type"' in config.read_bytes():
            continue  # of an upstream in cache/, not of a run
        try:
            run = read_run(config.parent)
            first = runs.setdefault((run.title, run.system, run.fold, run.seed), run)
            if first is not run:
                raise RunError(f"{run.folder}: the same system, fold and seed as {first.folder}")
        except RunError as error:
            left_out.append(str(error))
    return list(runs.values()), left_out


# ------------------------------------------------------------------------------------------------
# Reports (§3.3, §4)
# ------------------------------------------------------------------------------------------------

# Table 1, row by row: WA and UA in %, 5-fold means on IEMOCAP.
# PAPER-ERROR [E5]: "fine-tuned systems generally outperform": not UA of Sys. 10 and 16, WA of 16.
# PAPER-ERROR [E6]: MMT "is best among other systems": by WA, Sys. 18 is. By UA it is Sys. 15 (LF),
# and of the frozen systems LF beats MMT in both.
# PAPER-ERROR [E7]: "CMT (T->A) slightly improves over the textual": not UA of Sys. 12 against 6.
# PAPER-ERROR [E8]: Sys. 18 "surpasses the accuracy of every emotion class" of Sys. 8, text alone:
# angry ties at .85.
TABLE_1 = {
    1: ("WavLM+FC frozen", "A", 66.15, 65.35),
    2: ("WavLM+FC fine-tuned", "A", 66.70, 66.71),
    3: ("WavLM+TE frozen", "A", 63.51, 64.67),
    4: ("WavLM+TE fine-tuned", "A", 67.99, 68.24),
    5: ("BERT+FC frozen", "T", 74.33, 76.57),
    6: ("BERT+FC fine-tuned", "T", 77.67, 78.76),
    7: ("BERT+TE frozen", "T", 74.55, 76.41),
    8: ("BERT+TE fine-tuned", "T", 76.09, 76.57),
    9: ("CMT(A→T) frozen", "A+T", 67.76, 69.37),
    10: ("CMT(A→T) fine-tuned", "A+T", 68.07, 67.93),
    11: ("CMT(T→A) frozen", "A+T", 74.98, 76.85),
    12: ("CMT(T→A) fine-tuned", "A+T", 77.75, 78.60),
    13: ("EF frozen", "A+T", 77.61, 77.85),
    14: ("EF fine-tuned", "A+T", 79.80, 80.65),
    15: ("LF frozen", "A+T", 79.91, 81.88),
    16: ("LF fine-tuned", "A+T", 79.91, 81.15),
    17: ("MMT frozen", "A+T", 78.58, 80.72),
    18: ("MMT fine-tuned", "A+T", 80.36, 81.70),
}
# Table 2, Session 5: WA, UA of "ours", frozen and fine-tuned, without the systems' numbers. §5 says
# that the second is MMT. The first may be that too, or LF: the frozen 5-fold row of that table is
# Sys. 15, by its figures. So both stand beside it.
# PAPER-ERROR [E2]: §5 prints 84.35, the abstract and Table 2 84.45.
TABLE_2 = {15: (78.32, 80.56), 17: (78.32, 80.56), 18: (84.45, 84.39)}


def system_number(fusion: str, frozen: bool) -> int:
    """Table 1's number: 1 to 18, odd = frozen, even = fine-tuned.

    >>> system_number("audio-fc", frozen=True), system_number("mmt", frozen=False)
    (1, 18)
    """
    return 2 * list(FUSIONS).index(fusion) + (1 if frozen else 2)


def normalized(counts: np.ndarray) -> np.ndarray:
    """Fig. 4: confusion counts (4, 4) as shares of the true class, the row; 0 in an empty row.

    >>> normalized(np.array([[3, 1], [0, 0]])).tolist()
    [[0.75, 0.25], [0.0, 0.0]]
    """
    return counts / counts.sum(axis=1, keepdims=True).clip(min=1)


def describe(result: dict) -> str:
    """WA and UA of one run beside chance, and its confusion matrix (Fig. 4), as text."""
    counts = np.array(result["confusion"])
    size = counts.sum(axis=1)
    lines = [
        f"{result['corpus']}: WA {result['wa']:.2%}  UA {result['ua']:.2%}  on {result['n_test']} "
        f"test utterances of Session{result['fold']}, after {result['epochs']} epochs"
        + (f" in {result['seconds']:.0f} s" if "seconds" in result else ""),
        f"{result['corpus']}: always the largest class would have "
        f"WA {size.max() / size.sum():.2%}  UA {1 / (size > 0).sum():.2%}",
        f"{result['corpus']}, share of each true class (row) taken for (column):",
        "        " + "".join(f"{c:>7}" for c in CLASSES),
    ]
    for c, row, n in zip(CLASSES, normalized(counts), size):
        lines.append(f"    {c:4}" + "".join(f"{x:7.2f}" for x in row) + f"   of {n}")
    return "\n".join(lines)


@dataclass
class Table:
    """A title, a header and rows of strings; printed as text, Markdown or CSV."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def render(self, form: str) -> str:
        rows = [self.header, *self.rows]
        if form == "csv":
            out = io.StringIO()
            csv.writer(out).writerows([["table", *rows[0]], *([self.title, *r] for r in rows[1:])])
            return out.getvalue()
        columns = []
        for cells in zip(*rows):  # words to the left, numbers to the right
            align = "<" if any(c[:1].isalpha() for c in cells[1:]) else ">"
            columns.append([f"{c:{align}{max(map(len, cells))}}" for c in cells])
        lines = ["  ".join(cells).rstrip() for cells in zip(*columns)]
        if form == "markdown":
            rows.insert(1, ["---"] * len(self.header))
            lines = ["", *(f"| {' | '.join(row)} |" for row in rows)]
        return "\n".join([self.title, *lines])


def percent(x: float, sign: str = "") -> str:
    return f"{100 * x:{sign}.2f}"


def mean_sd(values: Sequence[float]) -> str:
    """ "81.70 ± 1.20" in percent, with the sample's standard deviation; no ± for a single value.

    >>> mean_sd([0.5, 0.75, 1.0])
    '75.00 ± 25.00'
    """
    values = list(values)
    sd = f" ± {percent(statistics.stdev(values))}" if len(values) > 1 else ""
    return percent(statistics.fmean(values)) + sd


def table_1(runs: list[Run]) -> Table:
    """Table 1: the systems that were run, in the paper's order, ours beside the paper's.

        Sys.  Model             runs            WA  paper   diff            UA  paper   diff
          17  MMT frozen   A+T     5  74.28 ± 3.52  78.58  -4.30  74.57 ± 3.18  80.72  -6.15

    ± is the standard deviation over the folds, each averaged over its seeds first: how much the
    sessions differ. Where there are several seeds, a second ± gives that of their means over the
    folds: how much luck there is in initial weights, order and development speaker. Folds that a
    seed misses are named: a mean over other folds than the paper's is not comparable with it.
    """
    sessions = {r.fold for r in runs}
    if "partial" not in runs[0].result["corpus"]:  # part of the name (train.read_corpus)
        sessions |= {1, 2, 3, 4, 5}
    rows = []
    for number, (name, modality, *published) in TABLE_1.items():
        mine = [r.result for r in runs if r.system == number]
        if not mine:
            continue
        row = [str(number), name, modality, str(len(mine))]
        for metric, p in zip(("wa", "ua"), published):
            seeds = grouped(mine, "seed", metric)
            over_seeds = f" ± {percent(statistics.stdev(seeds))}" if len(seeds) > 1 else ""
            row += beside(grouped(mine, "fold", metric), p, over_seeds)
        gaps = []
        for seed in sorted({r["seed"] for r in mine}):
            missing = sessions - {r["fold"] for r in mine if r["seed"] == seed}
            if missing:
                gaps.append(f"seed {seed} misses folds {' '.join(map(str, sorted(missing)))}")
        rows.append([*row, "; ".join(gaps)])
    header = ["Sys.", "Model", "", "runs", "WA", "paper", "diff", "UA", "paper", "diff", ""]
    return Table(f"Table 1 with {runs[0].title}, in % (paper: IEMOCAP)", header, rows)


def grouped(results: list[dict], key: str, metric: str) -> list[float]:
    """The mean of the metric for each value of the key, in the order of the values.

    >>> runs = [{"fold": 1, "wa": 0.5}, {"fold": 1, "wa": 0.75}, {"fold": 2, "wa": 0.25}]
    >>> grouped(runs, "fold", "wa")
    [0.625, 0.25]
    """
    values = sorted({r[key] for r in results})
    return [statistics.fmean(r[metric] for r in results if r[key] == v) for v in values]


def beside(values: Sequence[float], published: float, more: str = "") -> list[str]:
    """Three cells in %: ours (with `more` behind it), the paper's, the difference."""
    difference = statistics.fmean(values) - published / 100
    return [mean_sd(values) + more, f"{published:.2f}", percent(difference, "+")]


def table_2(runs: list[Run]) -> Table:
    """Table 2's own rows on Session 5."""
    rows = []
    for number, published in TABLE_2.items():
        mine = [r.result for r in runs if (r.system, r.fold) == (number, 5)]
        if mine:
            row = [str(number), TABLE_1[number][0], str(len(mine))]
            for metric, p in zip(("wa", "ua"), published):
                row += beside([r[metric] for r in mine], p)
            rows.append(row)
    header = ["Sys.", "Model", "runs", "WA", "paper", "diff", "UA", "paper", "diff"]
    return Table(f"Table 2 with {runs[0].title}, Session 5, in % (paper: IEMOCAP)", header, rows)


# ------------------------------------------------------------------------------------------------
# What the paper left out: is a difference real, and what does the average hide?
# ------------------------------------------------------------------------------------------------


def mcnemar(right_a: Sequence[bool], right_b: Sequence[bool]) -> float:
    """McNemar's exact test (McNemar 1947): the p-value of "a and b err equally often".

    Only utterances on which one is right and the other wrong speak. If neither system is better,
    each of these n falls to either side like a fair coin: p is twice the probability of a split at
    least as uneven, at most 1. It takes utterances for independent, which neighbours are not; the
    bootstrap below does not. Example: a alone is right once, b alone five times, so n = 6 and
    p = 2 (C(6,0) + C(6,1)) / 2^6 = 14 / 64.

    >>> mcnemar([1, 0, 0, 0, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1, 1, 0])
    0.21875
    """
    a, b = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def bootstrap(
    truth: np.ndarray, guess_a: np.ndarray, guess_b: np.ndarray, dialogs: np.ndarray,
    draws: int = 2000, seed: int = 0,
) -> dict[str, tuple[float, float, float]]:  # fmt: skip
    """{"wa", "ua"}: (b - a, and the ends of its 95 % interval), paired, by dialogue.

    The percentile bootstrap (Efron and Tibshirani 1993, ch. 13) of the difference. Whole dialogues
    are drawn with replacement, not utterances, for neighbours are alike; both systems are scored
    on the same draw. An interval that holds 0 shows no difference. Example: b is right on one more
    of the two utterances of each dialogue, so every draw gives the same.

    >>> bootstrap(np.array([0, 0, 0, 0]), np.array([0, 1, 0, 1]), np.array([0, 0, 0, 0]),
    ...           np.array(["d", "d", "e", "e"]))["wa"]
    (0.5, 0.5, 0.5)
    """
    names = sorted(set(dialogs))
    # Confusion counts by system and dialogue add up to those of any draw: (2, dialogues, 4, 4).
    counts = np.array([
        [confusion_matrix(truth[dialogs == d], guess[dialogs == d]) for d in names]
        for guess in (guess_a, guess_b)
    ])  # fmt: skip
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(names), [1 / len(names)] * len(names), size=draws)
    # How often each draw has each dialogue, (1 + draws, dialogues); draw 0: the data as they are.
    times = np.vstack([np.ones(len(names), dtype=int), times])
    total = np.tensordot(times, counts, axes=(1, 1))  # (1 + draws, 2, 4, 4)
    size, right = total.sum(axis=3), total.diagonal(axis1=2, axis2=3)  # (1 + draws, 2, 4)
    # A class that a draw misses does not count, as in unweighted_accuracy.
    recall = np.where(size > 0, right / size.clip(min=1), np.nan)
    values = {"wa": right.sum(axis=2) / size.sum(axis=2), "ua": np.nanmean(recall, axis=2)}
    result = {}
    for metric, value in values.items():  # (1 + draws, 2)
        difference = value[:, 1] - value[:, 0]
        low, high = np.percentile(difference[1:], [2.5, 97.5])
        result[metric] = (float(difference[0]), float(low), float(high))
    return result


def compare(runs: list[Run], a: int, b: int) -> str:
    """Systems a and b (Table 1's numbers) on the utterances that both were tested on.

    One run of each a fold, of the lowest seed that both have. Raises RunError where there is none,
    or where the two runs of a fold did not test the same utterances. In the answer

        only 16 right: 89, only 18 right: 90; McNemar's exact test p = 1
        UA of 18 less 16: +0.17 points, 95 % interval -1.73 to +2.03  (holds 0: no difference shown)

    (toy) 179 utterances are disputed; were the two systems equally good, a split at least so uneven
    would always come up; and corpora of such dialogues would, 95 times in 100, put 18 anywhere from
    1.73 points behind to 2.03 ahead.
    """
    first, second = ({(r.fold, r.seed): r for r in runs if r.system == n} for n in (a, b))
    pairs: dict[int, tuple[Run, Run]] = {}  # by fold
    for key in sorted(first.keys() & second.keys()):
        pairs.setdefault(key[0], (first[key], second[key]))
    if not pairs:
        raise RunError(
            f"{runs[0].title}: no fold on which both Sys. {a} and Sys. {b} were run; train.py "
            f"--system {a} {b} --fold all runs them"
        )
    for fold, (one, other) in pairs.items():
        if one.ids != other.ids or (one.truth != other.truth).any():
            raise RunError(f"fold {fold}: Sys. {a} and {b} were tested on different utterances")
    truth, guess_a, dialogs = (
        np.concatenate([getattr(one, name) for one, _ in pairs.values()])
        for name in ("truth", "guess", "dialogs")
    )
    guess_b = np.concatenate([other.guess for _, other in pairs.values()])
    lines = [
        f"Sys. {a} against Sys. {b} with {runs[0].title}: {len(truth)} utterances in "
        f"{len(set(dialogs))} dialogues, folds {' '.join(map(str, pairs))}"
    ]
    if (guess_a == guess_b).all():
        return lines[0] + "\nThe two predicted the same everywhere: no difference to test."
    right_a, right_b = guess_a == truth, guess_b == truth
    lines.append(
        f"only {a} right: {(right_a & ~right_b).sum()}, only {b} right: "
        f"{(right_b & ~right_a).sum()}; McNemar's exact test p = {mcnemar(right_a, right_b):.3g}"
    )
    for metric, (difference, low, high) in bootstrap(truth, guess_a, guess_b, dialogs).items():
        lines.append(
            f"{metric.upper()} of {b} less {a}: {percent(difference, '+')} points, 95 % interval "
            f"{percent(low, '+')} to {percent(high, '+')}"
            + ("  (holds 0: no difference shown)" if low <= 0 <= high else "")
        )
    return "\n".join(lines)


def breakdown(runs: list[Run]) -> Table:
    """WA and UA of each system for parts of its test data.

    Pooled over its runs, so "all" is not Table 1's mean of folds; within one class both are its
    recall. "text seen": the words are spoken in another session too (data.texts_elsewhere).
    """
    rows = []
    for number in sorted({r.system for r in runs}):
        mine = [r for r in runs if r.system == number]
        truth, guess, speakers, dialogs = (
            np.concatenate([getattr(r, name) for r in mine])
            for name in ("truth", "guess", "speakers", "dialogs")
        )
        free = np.char.find(dialogs, "impro") >= 0
        parts = {"all": truth >= 0, "improvised": free, "scripted": ~free}
        if all(r.seen_text is not None for r in mine):
            seen = np.concatenate([r.seen_text for r in mine])
            parts |= {"text seen": seen, "text unseen": ~seen}
        parts |= {f"speaker {s}": speakers == s for s in sorted(set(speakers))}
        parts |= {f"class {c}": truth == i for i, c in enumerate(CLASSES)}
        for name, part in parts.items():
            if part.any():
                wa = percent(weighted_accuracy(truth[part], guess[part]))
                ua = percent(unweighted_accuracy(truth[part], guess[part]))
                rows.append([str(number), name, str(part.sum()), wa, ua])
    title = f"Parts of the test data with {runs[0].title}, in %, pooled over runs"
    return Table(title, ["Sys.", "part", "utterances", "WA", "UA"], rows)


# ------------------------------------------------------------------------------------------------
# Pictures, at the width of a column of the paper; matplotlib is the one optional package
# ------------------------------------------------------------------------------------------------


def figure(width: float, height: float, title: str):
    """An empty matplotlib Figure of so many inches. Raises RunError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise RunError("pictures need matplotlib: pip install matplotlib") from None
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    matplotlib.rcParams.update({"font.size": 7, "axes.titlesize": 7, "figure.dpi": 200})
    lines = textwrap.wrap(title, int(16 * width))  # letters to the inch: nothing may be cut off
    fig = Figure((width, height + 0.13 * len(lines)), layout="constrained")
    fig.suptitle("\n".join(lines), fontsize=8)
    return fig


def draw_confusions(runs: list[Run], path: Path) -> None:
    """Fig. 4: shares of each true class; its own four systems on Session 5 where they were run.

    Without any of those, all that is in `runs`, twelve at most.
    """
    where = {(r.system, r.fold): r for r in sorted(runs, key=lambda r: -r.seed)}  # the lowest seed
    # Fig. 4a to d: audio, text, MMT, all fine-tuned, and text frozen ("the same model", §4.2.1).
    shown = [where[n, 5] for n in (4, 8, 18, 7) if (n, 5) in where] or runs[:12]
    columns = min(len(shown), 2 if len(shown) <= 4 else 4)
    rows = math.ceil(len(shown) / columns)
    fig = figure(1.7 * columns, 1.75 * rows + 0.25, shown[0].title)
    axes = list(fig.subplots(rows, columns, squeeze=False).flat)
    for ax, letter, run in zip(axes, "abcdefghijkl", shown):
        share = normalized(np.array(run.result["confusion"]))
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (i, j), value in np.ndenumerate(share):
            ax.text(j, i, f"{value:.2f}", ha="center", va="center",
                    color="white" if value > 0.5 else "black")  # fmt: skip
        session = "" if run.fold == 5 else f" Session{run.fold}"
        session += f" seed {run.seed}" if run.seed else ""
        ax.set_title(f"({letter}) Sys. {run.system}{session} (UA: {run.result['ua']:.2%})")
        ax.set_xticks(range(4), CLASSES)
        ax.set_yticks(range(4), CLASSES)
        ax.set_xlabel("Predictions")
        ax.set_ylabel("Groundtruth")
    for ax in axes[len(shown) :]:
        ax.remove()
    fig.savefig(path)


def draw_curves(runs: list[Run], path: Path) -> None:
    """Loss and development UA of one system over the epochs, a colour a run; trigger and stop."""
    number = runs[0].system
    fig = figure(3.4, 3.2, f"{runs[0].title}: Sys. {number}, {TABLE_1[number][0]}")
    loss, ua = fig.subplots(2, 1, sharex=True)
    for k, run in enumerate(runs):
        path_of_log = run.folder / "log.jsonl"
        try:
            log = [json.loads(line) for line in path_of_log.read_text().splitlines()]
            epochs, train, dev, dev_ua = (
                [row[key] for row in log] for key in ("epoch", "train_loss", "dev_loss", "dev_ua")
            )
            trigger = run.result["finetune_epoch"]
            color = f"C{k}"
            label = f"fold {run.fold}" + (f" seed {run.seed}" if run.seed else "")
            loss.plot(epochs, train, ":", color=color, linewidth=0.8)
            for ax, values in ((loss, dev), (ua, [100 * x for x in dev_ua])):
                ax.plot(epochs, values, color=color, linewidth=0.8, label=label)
                ax.plot(epochs[-1], values[-1], "s", color=color, markersize=3)
                if trigger:
                    ax.plot(trigger, values[trigger - 1], "v", color=color, markersize=4)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise RunError(f"{path_of_log}: {error!r}") from None
    # A legend for the marks that does not repeat for each fold.
    for mark, label in (("-", "development"), (":", "training"), ("v", "trigger"), ("s", "stop")):
        loss.plot([], [], f"k{mark}", linewidth=0.8, markersize=3, label=label)
    loss.legend(ncols=3, fontsize=6, frameon=False)
    loss.set_ylabel("cross-entropy")
    ua.set_ylabel("development UA in %")
    ua.set_xlabel("epoch")
    ua.xaxis.get_major_locator().set_params(integer=True)
    fig.savefig(path)


# ------------------------------------------------------------------------------------------------
# An utterance of your own
# ------------------------------------------------------------------------------------------------


def turns(words: str | Sequence[str]) -> list[str]:
    """The turns before or after an utterance; a single string is one turn, not its letters.

    >>> turns("oh no"), turns(("oh", "no"))
    (['oh no'], ['oh', 'no'])
    """
    return [words] if isinstance(words, str) else list(words)


class Recognizer:
    """A finished run, for utterances of your own. In a notebook:

        from evaluate import Recognizer
        Recognizer("runs/toy/mmt-finetuned/fold5-seed0").recognize("x.wav", "i never said that")

    Raises RunError where the folder is not that of a finished run, UpstreamError where its WavLM or
    BERT cannot be had any more.
    """

    def __init__(self, folder: str | Path):
        self.run = read_run(Path(folder))
        settings, path = self.run.settings, self.run.folder / "config.json"
        state = load_checkpoint(self.run.folder / "checkpoint.pt")
        try:
            self.config = Config.of(settings)
            self.upstreams = {
                m: Upstream(settings["folders"][m], m, settings["precision"])
                for m in self.config.modalities
            }
            for m, upstream in self.upstreams.items():
                if upstream.fingerprint != settings["upstreams"][m]["weights"]:
                    raise RunError(f"{upstream.name}: not the weights that {path} was trained with")
            weights = (state["selected"] or state)["weights"]  # [A10]: selected, or the last
            self.model = EmotionRecognizer(self.config)
            self.model.load_state_dict(weights["model"])
            for m, upstream in self.upstreams.items():
                if m in weights:  # it was fine-tuned
                    upstream.finetunable().load_state_dict(weights[m])
        except (RunError, UpstreamError):
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise RunError(
                f"{path}: does not fit checkpoint.pt beside it ({reason}); train it again"
            ) from None
        self.model.eval().requires_grad_(False)

    def batch(
        self, wav: str | Path | None = None, text: str | None = None,
        before: Sequence[str] = (), after: Sequence[str] = (),
    ) -> dict[str, tuple]:  # fmt: skip
        """The model's keyword arguments for one utterance, a batch of 1.

        wav: a file as load_wav reads it; text: its words; before, after: the words of the turns
        around it, in their order. What the system has no ear or eye for is left out. With one turn
        before and none after, BERT reads two texts, 0 and 1, and the context of C = 9 is
        [[-1, -1, -1, 0, 1, -1, -1, -1, -1]]: the utterance itself, 1, stands in the middle.
        """
        arguments = {}
        if "audio" in self.upstreams:
            if wav is None:
                raise RunError(f"{self.run.folder}: this system listens; give it --wav FILE")
            arguments["audio"] = self.upstreams["audio"]([clip(load_wav(wav))])
        if "text" in self.upstreams:
            if text is None:
                raise RunError(f"{self.run.folder}: this system reads; give it --text WORDS")
            half = self.config.n_context // 2
            before, after = turns(before), turns(after)
            # (Not before[-half:], which is everything where half is 0.)
            before, after = before[max(0, len(before) - half) :], after[:half]
            edges = [-1] * (half - len(before)), [-1] * (half - len(after))  # [A6]
            texts = [*before, text, *after]
            context = torch.tensor([[*edges[0], *range(len(texts)), *edges[1]]])  # (1, C)
            arguments["text"] = (*self.upstreams["text"](texts), context)
        return arguments

    def recognize(self, wav=None, text=None, before=(), after=()) -> dict[str, float]:
        """{"neu": p, "hap": p, "ang": p, "sad": p}; arguments as for `batch`."""
        logits = self.model(**self.batch(wav, text, before, after))  # (1, 4)
        return dict(zip(CLASSES, logits[0].softmax(dim=0).tolist()))

    def explain(self, wav=None, text=None, before=(), after=()) -> str:
        """What recognize says, how sure that is, and what to think of it, in words.

            toy: ang 94.6%, then hap 3.0%, neu 2.1%, sad 0.4%
            toy: How sure: of the 50 test utterances of Session5 on which it was about as sure
            (93% to 96%), it was right on 96%.
            toy: Note: --after has 0 of the 4 turns that the model reads; it takes the rest ...
        """
        p = self.recognize(wav, text, before, after)
        first, *rest = sorted(p, key=p.get, reverse=True)
        lines = [
            f"{first} {p[first]:.1%}, then {', '.join(f'{c} {p[c]:.1%}' for c in rest)}",
            self.how_sure(p[first]),
            *self.notes(wav, text, turns(before), turns(after)),
        ]
        return "\n".join(f"{self.run.result['corpus']}: {line}" for line in lines)

    def how_sure(self, confidence: float) -> str:
        """Not the model's own word for it, but how often it was right when it said so."""
        run, session = self.run, f"Session{self.run.fold}"
        distance = np.abs(run.confidence - confidence)  # (N,), of the test utterances
        alike = distance.argsort(kind="stable")[:50]  # the nearest, and none far off
        alike = alike[distance[alike] < 0.1]
        if not len(alike):
            return f"How sure: on no test utterance of {session} was it about as sure."
        low, high = run.confidence[alike].min(), run.confidence[alike].max()
        right = np.mean(run.truth[alike] == run.guess[alike])
        return (
            f"How sure: of the {len(alike)} test utterances of {session} on which it was about "
            f"as sure ({low:.0%} to {high:.0%}), it was right on {right:.0%}."
        )

    def notes(self, wav, text, before: list[str], after: list[str]) -> Iterator[str]:
        """What of the utterance the model did not take, and what it should have had, in words."""
        if "audio" in self.upstreams:
            whole = load_wav(wav)
            seconds, heard = len(whole) / SAMPLE_RATE, len(clip(whole)) / SAMPLE_RATE
            if seconds > CLIP_SECONDS:
                yield (
                    f"Note: {wav} is {seconds:.1f} s long; the model hears {heard:.1f} s of it, "
                    f"from the first sound on."
                )
        elif wav is not None:
            yield f"Note: this system only reads; it did not hear {wav}."
        if "text" in self.upstreams:
            reader = self.upstreams["text"]
            tokens, most = len(reader.preprocessor(text)["input_ids"]), reader.max_tokens
            if tokens > most:
                yield f"Note: --text has {tokens} tokens; the model reads the first {most}."
            half = self.config.n_context // 2
            for name, given in (("before", before), ("after", after)):
                if len(given) < half:
                    yield (
                        f"Note: --{name} has {len(given)} of the {half} turns that the model reads;"
                        f" it takes the rest for the edge of the dialogue."
                    )
                elif given and not half:
                    yield f"Note: this system reads no context; --{name} is not used."
                elif len(given) > half:
                    yield f"Note: of --{name} the model reads the {half} nearest turns."
        elif text or before or after:
            yield "Note: this system only listens; it did not read the words."
        if re.match(r"toy(-|$)", self.run.result["corpus"]):
            yield (
                "Note: this model was trained on the toy corpus of tones and made-up words. "
                "What it says of real speech means nothing."
            )

    def gates(self, batch: dict[str, tuple]) -> dict[str, Tensor]:
        """The S&E gates of Fig. 2 by modality: audio (1, L), text (U, L), one row for each text."""
        return {
            m: self.model.extractor[m].se.gates(states.float(), mask)
            for m, (states, mask, *_) in batch.items()
        }

    def attention(self, batch: dict[str, tuple]) -> dict[str, Tensor]:
        """Weights (T_t, T_s) of Eq. (1) of the cross-modal blocks, by "source-to-target"."""
        x, mask = self.model.features(**batch)
        weights = {}
        for target, source in self.model.fusion.paths:
            if source not in (None, target):
                name = f"{source}-to-{target}"
                block = self.model.fusion.blocks[name]
                _, w = block.attend(x[target], x[source], mask[source])
                weights[name] = w[0]
        return weights


def draw_gates(recognizer: Recognizer, batch: dict[str, tuple], path: Path) -> None:
    """The S&E gates over the layers, for one utterance and the texts around it."""
    gates = recognizer.gates(batch)
    fig = figure(3.4, 1.4 * len(gates) + 0.4, f"{recognizer.run.title}: S&E gates")
    for ax, (m, values) in zip(fig.subplots(len(gates), 1, squeeze=False).flat, gates.items()):
        target = 0
        if m == "text":  # the row in the middle of the context
            context = batch["text"][2][0]
            target = int(context[len(context) // 2])
        others = [row for k, row in enumerate(values) if k != target]
        for k, row in enumerate(others):
            name = None if k else "its context"
            ax.plot(row, "k:", linewidth=0.7, zorder=3, label=name)
        ax.plot(values[target], "o-", color="C0", linewidth=1, markersize=2.5, label="utterance")
        ax.set_title(m)
        ax.set_ylabel("gate")
        ax.set_ylim(0, 1)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(fontsize=6, frameon=False, ncols=2)
    ax.set_xlabel("layer (0: what goes into the first Transformer layer)")
    fig.savefig(path)


def draw_attention(
    recognizer: Recognizer, batch: dict[str, tuple], wav: str | Path, text: str, path: Path
) -> None:
    """Eq. (1) on one utterance: who attends to what, tokens against seconds, over the waveform."""
    weights = recognizer.attention(batch)
    x = clip(load_wav(wav))
    seconds = len(x) / SAMPLE_RATE
    reader = recognizer.upstreams["text"]
    read = reader.preprocessor(text, truncation=True, max_length=reader.max_tokens)
    tokens = reader.preprocessor.convert_ids_to_tokens(read["input_ids"])
    n = batch["text"][0].shape[1]  # positions of X_T: as many as the longest text of the context
    tokens += ["(context)"] * (n - len(tokens))
    every = 1 + n // 30  # labels that fit
    height = 1.0 + len(weights) * (0.6 + 0.11 * n / every)
    fig = figure(3.4, height, f"{recognizer.run.title}: attention of Eq. (1)")
    axes = fig.subplots(
        len(weights) + 1, 1, sharex=True, squeeze=False,
        height_ratios=[*[max(3, n / every)] * len(weights), 3],
    ).flat  # fmt: skip
    for ax, (name, w) in zip(axes, weights.items()):  # tokens down, frames across, in both
        w = w.numpy()
        from_audio = name == "audio-to-text"
        image = ax.imshow(
            w if from_audio else w.T, aspect="auto", cmap="Blues", vmin=0,
            extent=(0, seconds, n - 0.5, -0.5), interpolation="nearest",
        )  # fmt: skip
        ax.set_title(
            "A→T: a token's weights over the frames (rows sum to 1)" if from_audio
            else "T→A: a frame's weights over the tokens (columns sum to 1)"
        )  # fmt: skip
        ax.set_yticks(range(0, n, every), tokens[::every], fontsize=6)
        fig.colorbar(image, ax=ax, pad=0.01).ax.tick_params(labelsize=5)
    ax = axes[len(weights)]
    ax.plot(np.linspace(0, seconds, len(x)), x, linewidth=0.3, color="C7")
    ax.set_ylabel("wave")
    ax.set_xlabel("seconds from the first sound")
    fig.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="a folder of runs, or one run")
    parser.add_argument("--compare", nargs=2, type=int, metavar=("A", "B"),
                        help="is the difference of two of Table 1's numbers real?")  # fmt: skip
    parser.add_argument("--parts", action="store_true", help="improvised, scripted, speakers ...")
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="where to draw them")
    own = parser.add_argument_group("an utterance of your own, for one finished run")
    own.add_argument("--wav", type=Path, metavar="FILE", help="16 bits, mono")
    own.add_argument("--text", metavar="WORDS", help="its transcript")
    own.add_argument("--before", nargs="+", action="extend", default=[], metavar="WORDS",
                     help="the turns before it, in their order")  # fmt: skip
    own.add_argument("--after", nargs="+", action="extend", default=[], metavar="WORDS",
                     help="the turns after it")  # fmt: skip
    args = parser.parse_args(arguments)
    one = args.wav is not None or args.text is not None
    pair = args.compare or (1, 2)
    for wrong, message in (
        (one and (args.compare or args.parts or args.format != "text"),
         "--wav, --text: without --compare, --parts and --format"),
        ((args.before or args.after) and not one,
         "--before, --after: of which utterance? give --wav or --text with them"),
        (args.compare and (args.pictures or args.format != "text"),
         "--compare: without --pictures and --format"),
        (pair[0] == pair[1] or not set(pair) <= set(TABLE_1),
         f"--compare {pair[0]} {pair[1]}: two systems of 1 to 18"),
    ):  # fmt: skip
        if wrong:
            parser.error(message)
    if one:
        return recognize_one(args)
    runs, left_out = find_runs(args.runs)
    if not runs and not left_out:
        sys.exit(f"error: {args.runs}: no run in it; `python train.py --out {args.runs}` makes one")
    for title in sorted({r.title for r in runs}):
        report([r for r in runs if r.title == title], args, left_out)
    if left_out:
        sys.exit("Left out:\n" + "\n".join(left_out))


def report(runs: list[Run], args: argparse.Namespace, left_out: list[str]) -> None:
    """Print and draw what was asked for, of runs of one title: alike but in system, fold, seed."""
    if args.compare:
        try:
            print(compare(runs, *args.compare) + "\n")
        except RunError as error:
            left_out.append(str(error))
        return
    for table in [breakdown(runs)] if args.parts else [table_1(runs), table_2(runs)]:
        if table.rows:
            print(table.render(args.format) + "\n")
    if len(runs) == 1 and args.format == "text" and not args.parts:
        print(describe(runs[0].result) + "\n")
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        stem = "-".join(re.findall(r"\w+", runs[0].title))[:200]
        pictures = {"confusions": (draw_confusions, runs)}
        for number in sorted({r.system for r in runs}):
            same = [r for r in runs if r.system == number]
            pictures[f"curves-{number:02}"] = draw_curves, same
        for name, (draw, some) in pictures.items():
            path = args.pictures / f"{stem}-{name}.png"
            try:
                draw(some, path)
                print(f"drawn: {path}", file=sys.stderr)
            except RunError as error:
                left_out.append(str(error))


def recognize_one(args: argparse.Namespace) -> None:
    """What `evaluate.py RUN --wav ... --text ...` says and draws."""
    recognizer = Recognizer(args.runs)
    print(recognizer.explain(args.wav, args.text, args.before, args.after))
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        batch = recognizer.batch(args.wav, args.text, args.before, args.after)
        draw_gates(recognizer, batch, args.pictures / "gates.png")
        print(f"drawn: {args.pictures / 'gates.png'}")
        if recognizer.attention(batch):
            path = args.pictures / "attention.png"
            draw_attention(recognizer, batch, args.wav, args.text, path)
            print(f"drawn: {path}")


if __name__ == "__main__":
    try:
        main()
    except (CorpusError, RunError, UpstreamError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
