"""What §3.3 and §4 report: metrics, Tables 1 and 2, the confusion matrices of Fig. 4.

python evaluate.py RUNS       ours beside the paper's, for whatever runs are found below RUNS
"""

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import CLASSES, Utterance
from model import FUSIONS

# ------------------------------------------------------------------------------------------------
# Metrics (§3.1): "averaged weighted accuracy (WA) and unweighted accuracy (UA, balanced by class
# weights)". The names are easily swapped: WA weighs the classes by their size, UA does not.
# ------------------------------------------------------------------------------------------------


def confusion_matrix(y_true: Sequence[int], y_pred: Sequence[int]) -> np.ndarray:
    """Counts (4, 4): entry [i, j] is how many of class i were taken for class j; order CLASSES.

    >>> confusion_matrix([0, 0, 0, 1], [0, 0, 2, 1])[:3, :3].tolist()
    [[2, 0, 1], [0, 1, 0], [0, 0, 0]]
    """
    counts = np.zeros((len(CLASSES), len(CLASSES)), dtype=int)
    np.add.at(counts, (np.asarray(y_true), np.asarray(y_pred)), 1)
    return counts


def weighted_accuracy(y_true: Sequence[int], y_pred: Sequence[int]) -> float:
    """WA: the share of utterances that are right.

    >>> weighted_accuracy([0, 0, 0, 1], [0, 0, 2, 1])  # 3 of 4
    0.75
    """
    return float(np.mean(np.asarray(y_true) == np.asarray(y_pred)))


def unweighted_accuracy(y_true: Sequence[int], y_pred: Sequence[int]) -> float:
    """UA: the mean over the classes of the share that is right, alias macro-averaged recall.

    Classes of which y_true has no utterance do not count.

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
def predict(model: nn.Module, rows: Tensor, inputs: Callable, batch: int = 32) -> Tensor:
    """Log-probabilities (N, 4) of the utterances at `rows` (N,), without dropout, on the CPU.

    inputs: a batch of rows -> the keyword arguments of the model.
    """
    model.eval()
    batches = tqdm(rows.split(batch), desc="predicting", leave=False, delay=3, disable=None)
    logits = [model(**inputs(part)) for part in batches]
    return torch.cat(logits).float().log_softmax(dim=1).cpu()


# ------------------------------------------------------------------------------------------------
# The run folder
# ------------------------------------------------------------------------------------------------

COLUMNS = ["utterance", "speaker", "label", "prediction", *CLASSES, "seen_text"]


class RunError(RuntimeError):
    """A run folder does not hold what it should; the message names the file."""


def write_predictions(
    path: Path, utterances: list[Utterance], log_probs: Tensor, seen_text: list[bool]
) -> None:
    """predictions.csv: all that the reports need. seen_text: another session has the same words."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for u, p, seen in zip(utterances, log_probs.exp().tolist(), seen_text):
            guess = CLASSES[p.index(max(p))]
            rows.writerow(
                [u.id, u.speaker, CLASSES[u.label], guess, *(f"{x:.6f}" for x in p), int(seen)]
            )
    temporary.replace(path)


def read_result(folder: Path) -> dict:
    """The result.json of a run. Raises RunError naming the file and what is wrong with it."""
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text())
        counts = np.array(result["confusion"])
        sound = (
            counts.shape == (4, 4)
            and counts.sum() == result["n_test"]
            and result["fusion"] in FUSIONS
            and abs(counts.trace() / counts.sum() - result["wa"]) < 1e-6
            and {type(result["corpus"]), type(result["frozen"])} == {str, bool}
            and {type(result["fold"]), type(result["seed"])} == {int}
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: {type(error).__name__}: {error}") from None
    if not sound:
        raise RunError(f"{path}: its entries contradict each other")
    return result


# ------------------------------------------------------------------------------------------------
# Reports (§3.3, §4)
# ------------------------------------------------------------------------------------------------

# Table 1: WA, UA of the frozen and of the fine-tuned system, in %, 5-fold means on IEMOCAP.
# PAPER-ERROR [E5]: "fine-tuned systems generally outperform": not UA of Sys. 10 and 16.
# PAPER-ERROR [E6]: "MMT is best": by WA; by UA Sys. 15 (LF, frozen) is.
# PAPER-ERROR [E7]: "CMT (T->A) slightly improves over the textual": not UA of Sys. 12 against 6.
# PAPER-ERROR [E8]: Sys. 18 "surpasses the accuracy of every class" of Sys. 8: angry ties at .85.
TABLE_1 = {
    "audio-fc": ("WavLM+FC", "A", 66.15, 65.35, 66.70, 66.71),
    "audio-te": ("WavLM+TE", "A", 63.51, 64.67, 67.99, 68.24),
    "text-fc": ("BERT+FC", "T", 74.33, 76.57, 77.67, 78.76),
    "text-te": ("BERT+TE", "T", 74.55, 76.41, 76.09, 76.57),
    "cmt-a2t": ("CMT(A→T)", "A+T", 67.76, 69.37, 68.07, 67.93),
    "cmt-t2a": ("CMT(T→A)", "A+T", 74.98, 76.85, 77.75, 78.60),
    "ef": ("EF", "A+T", 77.61, 77.85, 79.80, 80.65),
    "lf": ("LF", "A+T", 79.91, 81.88, 79.91, 81.15),
    "mmt": ("MMT", "A+T", 78.58, 80.72, 80.36, 81.70),
}
# Table 2, Session 5: WA, UA. PAPER-ERROR [E2]: §5 prints 84.35, the abstract and Table 2 84.45.
TABLE_2 = {True: (78.32, 80.56), False: (84.45, 84.39)}  # frozen, fine-tuned

SWITCHES = {  # of train.py, with the defaults that the paper's systems have
    "n_context": 9, "dropout": 0.5, "condense": "sum", "text_mask": "union",
    "cma_residual": False, "reset_patience": False, "select": "last",
}  # fmt: skip


def system_number(fusion: str, frozen: bool) -> int:
    """Table 1's number: 1 to 18, odd = frozen, even = fine-tuned."""
    return 2 * list(FUSIONS).index(fusion) + (1 if frozen else 2)


def system_name(fusion: str, frozen: bool) -> str:
    return f"{TABLE_1[fusion][0]} {'frozen' if frozen else 'fine-tuned'}"


def describe(result: dict) -> str:
    """WA and UA of one run beside chance, and its confusion matrix (Fig. 4), as text."""
    counts = np.array(result["confusion"])
    size = counts.sum(axis=1)
    share = counts / size[:, None].clip(min=1)
    lines = [
        f"{result['corpus']}: WA {result['wa']:.2%}  UA {result['ua']:.2%}  on {result['n_test']} "
        f"test utterances of Session{result['fold']}, after {result['epochs']} epochs"
        + (f" in {result['seconds']:.0f} s" if "seconds" in result else ""),
        f"{result['corpus']}: always the largest class would have "
        f"WA {size.max() / size.sum():.2%}  UA {1 / (size > 0).sum():.2%}",
        f"{result['corpus']}, share of each true class (row) taken for (column):",
        "        " + "".join(f"{c:>7}" for c in CLASSES),
    ]
    for c, row, n in zip(CLASSES, share, size):
        lines.append(f"    {c:4}" + "".join(f"{x:7.2f}" for x in row) + f"   of {n}")
    return "\n".join(lines)


def mean_sd(values: Sequence[float]) -> str:
    """ "81.70 ± 1.20" in percent; the sample's standard deviation, none of a single value."""
    sd = f" ± {100 * statistics.stdev(values):5.2f}" if len(values) > 1 else " " * 8
    return f"{100 * statistics.fmean(values):5.2f}{sd}"


def tables(title: str, results: list[dict]) -> str:
    """Tables 1 and 2, ours beside the paper's, for the systems that were run; one corpus only."""
    sessions = {r["fold"] for r in results}
    if "partial" not in title:  # a partial corpus has the sessions that it has
        sessions |= {1, 2, 3, 4, 5}

    def row(fusion: str, frozen: bool, runs: list[dict], wa: float, ua: float) -> str:
        ours = [f"{mean_sd([r[m] for r in runs])} ({p:5.2f})" for m, p in (("wa", wa), ("ua", ua))]
        number, modality = system_number(fusion, frozen), TABLE_1[fusion][1]
        name = system_name(fusion, frozen)
        return f"{number:4} {name:21} {modality:4} {len(runs):4}  {'  '.join(ours)}"

    lines = [
        f"Table 1 with {title}: mean ± sd over runs, in %; (the paper's, on IEMOCAP)",
        f"Sys. {'Model':26} runs  {'WA':14}{'(paper)':9}{'UA':14}{'(paper)':9}",
    ]
    for fusion, (_, _, *paper) in TABLE_1.items():
        for frozen in (True, False):
            runs = [r for r in results if (r["fusion"], r["frozen"]) == (fusion, frozen)]
            if runs:
                lines.append(row(fusion, frozen, runs, *(paper[:2] if frozen else paper[2:])))
                missing = sorted(sessions - {r["fold"] for r in runs})
                if missing:
                    lines[-1] += f"  folds missing: {' '.join(map(str, missing))}"
    fifth = [r for r in results if r["fusion"] == "mmt" and r["fold"] == 5]
    if fifth:
        lines.append(
            f"Table 2, Session 5, with {title}; (the paper's, of a system it does not name)"
        )
    for frozen in (True, False):
        runs = [r for r in fifth if r["frozen"] == frozen]
        if runs:
            lines.append(row("mmt", frozen, runs, *TABLE_2[frozen]))
    return "\n".join(lines)


def find_runs(root: Path) -> tuple[dict[str, list[dict]], list[str]]:
    """({title: results}, what was left out and why) of all runs below `root`.

    The title is the corpus and each switch that is not at its default: a table never mixes two.
    """
    found: dict[str, list[dict]] = {}
    left_out = []
    for config in sorted(root.rglob("config.json")):
        folder = config.parent
        try:
            if not (folder / "result.json").exists():
                raise RunError(
                    f"{folder}: no result.json; the same train.py command goes on with it"
                )
            result = read_result(folder)
            settings = json.loads(config.read_text())
            flips = [
                f"{k} {settings.get(k, v)}" for k, v in SWITCHES.items() if settings.get(k, v) != v
            ]
            if result.get("select") == "test":
                flips.append("SELECTED ON TEST")
            found.setdefault(", ".join([result["corpus"], *flips]), []).append(result)
        except (RunError, OSError, ValueError) as error:
            left_out.append(f"{folder}: {error}")
    return found, left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="a folder of runs, or one run")
    args = parser.parse_args()
    found, left_out = find_runs(args.runs)
    if not found and not left_out:
        sys.exit(f"error: {args.runs}: no run in it; `python train.py --out {args.runs}` makes one")
    for title, results in sorted(found.items()):
        print(tables(title, results) + "\n")
        if len(results) == 1:
            print(describe(results[0]) + "\n")
    if left_out:
        sys.exit("Left out:\n" + "\n".join(left_out))


if __name__ == "__main__":
    main()
