"""Results: Tables 1 and 2, Fig. 4, paired comparisons, and an utterance of your own.

    python evaluate.py RUNS                   Tables 1 and 2, on IEMOCAP beside the paper's numbers
    python evaluate.py RUNS --parts           the same systems on parts of the test data
    python evaluate.py RUNS --compare A B     is the difference between two systems real?
    python evaluate.py RUNS --pictures DIR    Fig. 4 and learning curves
    python evaluate.py RUN --wav x.wav --text "i never said that" --before "did you say that"

RUNS is a folder of runs, RUN the folder of one run. A and B are numbers of Table 1, or two folders,
for example of a system with and without a switch.
"""

import argparse, csv, io, json, math, re, sys, zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from data import CLASSES, CLIP_SECONDS, SAMPLE_RATE, InputError
from data import clip, load_wav, reading, run_command, write_whole
from model import FUSIONS, Config, EmotionRecognizer, Upstream

# ----- Metrics (§3.1): "weighted accuracy (WA) and unweighted accuracy (UA, balanced by class
# weights)". The names are easily confused. WA is plain accuracy, so a class counts by its size.
# UA gives every class the same weight: an utterance weighs 1 / the size of its class.
def confusion_matrix(y_true: Sequence[int], y_pred: Sequence[int]) -> np.ndarray:
    """Count (4, 4): entry [i, j] is the number of utterances of class i predicted as class j.

    >>> confusion_matrix([0, 0, 0, 1], [0, 0, 2, 1])[:3, :3].tolist()
    [[2, 0, 1], [0, 1, 0], [0, 0, 0]]
    """
    counts = np.zeros((len(CLASSES), len(CLASSES)), dtype=int)  # rows: the truth
    np.add.at(counts, (np.asarray(y_true), np.asarray(y_pred)), 1)  # adds up repeated pairs
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
    y_true is left out of the mean.

    >>> round(unweighted_accuracy([0, 0, 0, 1], [0, 0, 2, 1]), 4)  # (2/3 + 1/1) / 2
    0.8333
    """
    counts = confusion_matrix(y_true, y_pred)  # (4, 4)
    size = counts.sum(axis=1)  # (4,): utterances of each class
    return float((counts.diagonal()[size > 0] / size[size > 0]).mean())  # mean recall

def metrics(y_true: Sequence[int], y_pred: Sequence[int]) -> dict:
    """Compute {"wa", "ua", "confusion"} of N class indices, as result.json holds them."""
    wa, ua = weighted_accuracy(y_true, y_pred), unweighted_accuracy(y_true, y_pred)
    return {"wa": wa, "ua": ua, "confusion": confusion_matrix(y_true, y_pred).tolist()}

@torch.no_grad()
def predict(model: nn.Module, rows: Tensor, batch: Callable, size: int = 32) -> Tensor:
    """Predict log-probabilities (N, 4) of utterances (N,). batch(rows) gives the model's input."""
    model.eval()  # no dropout
    logits = [model(**batch(part)) for part in rows.split(size)]  # (size, 4) each
    return torch.cat(logits).log_softmax(dim=1).cpu()  # (N, 4)

# ----- The files of a run (train.py lists them)
def read_run(folder: Path) -> SimpleNamespace:
    """Read a finished run, or raise InputError if it is unfinished, damaged or contradictory."""
    run, remedy = SimpleNamespace(folder=folder), f"restore it, or delete {folder} and train again"
    with reading(folder / "config.json", remedy):
        vars(run).update(json.loads((folder / "config.json").read_bytes()))
        run.system = system_number(run.fusion, run.frozen)  # in Table 1
        switches = [f"{k}={Path(str(x)).name}" for k, x in run.switches.items()]  # no folders
        run.title = ", ".join([run.corpus, *switches])  # runs of one title share a table
        run.name = f"Sys. {run.system} ({TABLE_1[run.system][0]}), {run.title}"
        expected = {k: vars(run)[k] for k in ("corpus", "fusion", "frozen", "fold", "seed")}
        run.sessions = sorted(run.sessions)  # all folds of the corpus
    if not (folder / "result.json").exists():  # training writes it last
        epochs = sum(1 for path in folder.glob("log.jsonl") for _ in path.open("rb"))
        advice = "the same train.py command goes on"  # after the last whole epoch
        raise InputError(f"unfinished: {folder} ({epochs} epochs so far); {advice}")
    with reading(folder / "predictions.csv", remedy):
        text = (folder / "predictions.csv").read_text(encoding="utf-8")
        run.rows = list(csv.DictReader(text.splitlines()))  # a row an utterance. We add to each:
        for row in run.rows:
            row["dialog"] = row["utterance"].rpartition("_")[0]  # Ses05F_impro01 of ..._F000
            row["speaker"] = row["speaker"] or "unknown"  # raises KeyError without the column
            row["truth"], row["guess"] = map(CLASSES.index, (row["label"], row["prediction"]))
            row["seen"] = bool(int(row["seen_text"]))  # another session has the same words
            p = [float(row[c]) for c in CLASSES]  # probabilities
            if not (min(p) >= 0 and abs(sum(p) - 1) < 1e-4):  # NaN fails, too
                raise ValueError(f"the probabilities of {row['utterance']} do not sum to 1")
        expected |= metrics(column([run], "truth"), column([run], "guess"))  # of result.json
        expected["n_test"] = len(set(column([run], "utterance")))  # fewer if one occurs twice
    with reading(folder / "result.json", remedy):
        run.result = json.loads((folder / "result.json").read_bytes())
        wrong = [f"{k} is not {x}" for k, x in expected.items() if run.result[k] != x]
        if wrong or not (0 <= run.result["loss"] < math.inf and run.result["epochs"] > 0):
            raise ValueError(f"config.json or predictions.csv disagrees: {wrong or 'loss, epochs'}")
    return run

def find_runs(root: Path) -> tuple[list, list[str]]:
    """Read all runs below a folder -> (the usable ones, a sentence for each of the others)."""
    runs, others = {}, []  # by title, system, fold and seed. Upstreams have a config.json, too:
    configs = [p for p in root.rglob("config.json") if b'"model_type"' not in p.read_bytes()]
    for folder in sorted({p.parent for p in (*configs, *root.rglob("result.json"))}):
        try:
            run = read_run(folder)
            first = runs.setdefault((run.title, run.system, run.fold, run.seed), run)
            if first is not run:  # averages must not count it twice
                others.append(f"{folder}: duplicate of {first.folder}; delete one of them")
        except InputError as error:
            others.append(str(error))  # unfinished or damaged
    return list(runs.values()), others

def grouped(runs: list, key: str) -> dict:
    """Group runs by their "title", "system", "fold" or "seed", in order."""
    values = sorted({getattr(run, key) for run in runs})
    return {value: [run for run in runs if getattr(run, key) == value] for value in values}

def column(runs: list, name: str) -> np.ndarray:
    """Join a column of predictions.csv over several runs -> (N,) for their N rows in all."""
    return np.array([row[name] for run in runs for row in run.rows])

def write_predictions(path: Path, utterances: list, log_probs: Tensor, seen: set[str]) -> None:
    """Write predictions.csv: one row an utterance. seen: ids whose words another session has."""
    text = io.StringIO(newline="")  # the csv module ends the lines itself
    table = csv.writer(text)  # quotes what needs it
    table.writerow(["utterance", "speaker", "label", "prediction", *CLASSES, "seen_text"])
    guesses = log_probs.argmax(dim=1)  # before exp, which can make unequal numbers equal
    for u, guess, p in zip(utterances, guesses, log_probs.exp().tolist()):
        p = [f"{x:.6f}" for x in p]  # of the four classes
        table.writerow([u.id, u.speaker, CLASSES[u.label], CLASSES[guess], *p, int(u.id in seen)])
    write_whole(path, text.getvalue().encode())

def load_checkpoint(path: Path) -> dict:
    """Load checkpoint.pt on the CPU, or raise InputError."""
    with reading(path, "delete it and train again"):
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError("it is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)  # runs no code of the file

# ----- Reports (§3.3, §4)
# PAPER-ERROR [E5]: fine-tuned "generally outperform" (§3.3, §4.2.1). Not by UA in Sys. 10 and 16.
# PAPER-ERROR [E6]: "the fusion of CMT models is best". By UA, Sys. 15 (LF) is.
# PAPER-ERROR [E7]: "CMT(T->A) slightly improves over the textual". By UA, Sys. 6 is above Sys. 12.
# PAPER-ERROR [E8]: Sys. 18 "surpasses the accuracy of every emotion class" of Sys. 8 (§4.2.2). In
# Fig. 4, angry is .85 in both.
TABLE_1 = {  # model, modality, WA and UA in %, mean of 5 folds
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
# Table 2 has two rows "ours" on Session 5, without system numbers. By §5, the fine-tuned one is
# MMT. The frozen one may be MMT too, or LF, because the frozen row of five folds is Sys. 15 (LF).
# PAPER-ERROR [E2]: §5 prints a WA of 84.35, the abstract and Table 2 print 84.45.
TABLE_2 = {15: (78.32, 80.56), 17: (78.32, 80.56), 18: (84.45, 84.39)}

def system_number(fusion: str, frozen: bool) -> int:
    """Return Table 1's number: 1 to 18, odd numbers are frozen, even numbers fine-tuned."""
    return 2 * list(FUSIONS).index(fusion) + (1 if frozen else 2)  # in its order

def markdown(title: str, rows: list[dict]) -> str:
    """Format rows with the same keys as an aligned Markdown table below its title."""
    cells = [list(rows[0]), *([str(x) for x in row.values()] for row in rows)]  # header first
    widths = [max(map(len, column)) for column in zip(*cells)]  # of the columns
    cells.insert(1, ["-" * width for width in widths])  # Markdown's line below the header
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells]
    return "\n".join([title, "", *lines, ""])

def describe(result: dict) -> str:
    """Format WA and UA of one run, those of the largest class, and the confusion matrix."""
    corpus, counts = result["corpus"], np.array(result["confusion"])  # (4, 4)
    size, rows = counts.sum(axis=1), []  # (4,): utterances of each class
    for name, row, n in zip(CLASSES, counts / size.clip(min=1)[:, None], size):
        rows.append({"true": name} | {c: f"{x:.2f}" for c, x in zip(CLASSES, row)} | {"n": n})
    return (
        f"{corpus}: WA {result['wa']:.2%}  UA {result['ua']:.2%}  on {result['n_test']} test "
        f"utterances of session {result['fold']}, after {result['epochs']} epochs\n{corpus}: WA "
        f"{size.max() / size.sum():.2%}  UA {1 / (size > 0).sum():.2%}  by the largest class\n"
        + markdown(f"{corpus}: fraction of each true class (row) predicted as (column)", rows)
    )

def table_1(runs: list, name="Table 1", published=TABLE_1, wanted=None) -> str:
    """Format the systems that were run, for runs of one title (at least one run).
    The first ± is the standard deviation over the folds, each averaged over its seeds: how much the
    sessions differ. With several seeds, a second ± is that of the seeds, each averaged over its
    folds: the effect of initial weights, order and development speaker."""
    rows, wanted = [], set(wanted or runs[0].sessions)  # wanted: folds
    for number, mine in grouped(runs, "system").items():
        row = {"Sys.": number, "model": TABLE_1[number][0], "runs": len(mine)}
        by_fold, by_seed = grouped(mine, "fold"), grouped(mine, "seed")
        for metric, printed in zip(("WA", "UA"), published[number][-2:]):
            key = metric.lower()  # in result.json
            folds = [100 * fmean(run.result[key] for run in x) for x in by_fold.values()]  # in %
            seeds = [100 * fmean(run.result[key] for run in x) for x in by_seed.values()]
            sds = [f"{stdev(x):.2f}" if len(x) > 1 else "-" for x in (folds, seeds)]
            if len(seeds) == 1:  # one seed: the ± of the folds alone, if there are several
                sds = sds[:1] if len(folds) > 1 else []
            row[metric] = " ± ".join([f"{fmean(folds):.2f}", *sds])
            if mine[0].corpus == "iemocap":  # the paper has numbers for IEMOCAP alone
                row[f"paper {metric}"] = f"{printed:.2f}"
                row[f"diff {metric}"] = f"{fmean(folds) - printed:+.2f}"  # ours minus the paper's
        # A mean over fewer folds is not comparable with the paper's: name the folds it lacks.
        missing = {seed: wanted - {run.fold for run in x} for seed, x in by_seed.items()}
        gaps = [f"{sorted(x)} (seed {seed})" for seed, x in missing.items() if x]
        rows.append(row | {"missing folds": ", ".join(gaps)})
    return markdown(f"{name} with {runs[0].title}, in %: mean ± sd (folds) ± sd (seeds)", rows)

def table_2(runs: list) -> str:
    """Format the rows "ours" of Table 2, on Session 5 of IEMOCAP, or return ""."""
    runs = [x for x in runs if x.corpus == "iemocap" and x.fold == 5 and x.system in TABLE_2]
    return table_1(runs, "Table 2, Session 5,", TABLE_2, wanted=[5]) if runs else ""

def breakdown(runs: list) -> str:
    """Format WA and UA on parts of the test data, pooled over all runs of a system.
    A quarter of IEMOCAP's scripted lines occur in several sessions ("text seen"), so a text model
    can know them from training. Within one class, WA and UA are both its recall."""
    names, rows = ("truth", "guess", "seen", "dialog", "speaker"), []
    for number, mine in grouped(runs, "system").items():
        truth, guess, seen, dialog, speaker = (column(mine, name) for name in names)  # (N,) each
        parts = {"all": truth >= 0, "text seen": seen, "text unseen": ~seen}  # (N,) bool each
        parts["improvised"] = np.char.find(dialog, "impro") >= 0  # IEMOCAP's names
        parts["scripted"] = np.char.find(dialog, "script") >= 0  # with other names, no rows
        parts |= {f"speaker {s}": speaker == s for s in np.unique(speaker)}  # two in a session
        parts |= {f"class {c}": truth == i for i, c in enumerate(CLASSES)}
        for name, part in parts.items():
            if part.any():  # else its accuracy is 0 / 0
                x = metrics(truth[part], guess[part])
                wa, ua = f"{100 * x['wa']:.2f}", f"{100 * x['ua']:.2f}"
                rows.append({"Sys.": number, "part": name, "n": part.sum(), "WA": wa, "UA": ua})
    return markdown(f"Parts of the test data with {runs[0].title}, in %, pooled over runs", rows)

# ----- Is the difference between two systems real? (The paper has no tests.)
def mcnemar(right_a: Sequence[bool], right_b: Sequence[bool]) -> float:
    """Compute the p-value of McNemar's exact test: do a and b err equally often?
    Only utterances that exactly one of the two systems gets right carry information. If the systems
    are equally good, each falls to either side like a fair coin. p is the probability of so uneven
    a split. Example: 1 falls to a and 5 to b, so p = 2 (C(6,0) + C(6,1)) / 2^6 = 14 / 64.

    >>> mcnemar([1, 0, 0, 0, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1, 1, 0])
    0.21875
    """
    a, b = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)  # (N,)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b  # coins, with 2^n equally likely outcomes
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))  # outcomes of one tail
    return min(1.0, 2 * tail / 2**n)

def bootstrap(truth, guess_a, guess_b, dialogs, draws: int = 2000, seed: int = 0) -> dict:
    """Compute for "wa" and "ua" the difference b - a, and the ends of its 95 % interval.
    This is the percentile bootstrap (Efron and Tibshirani 1993, ch. 13). Neighbouring utterances
    depend on each other, so we draw whole dialogues with replacement, the same for a and b.

    >>> bootstrap(np.array([0, 0, 0, 0]), np.array([0, 1, 0, 1]), np.array([0, 0, 0, 0]),
    ...           np.array(["d", "d", "e", "e"]))["wa"]
    (0.5, 0.5, 0.5)
    """
    members = [np.flatnonzero(dialogs == d) for d in np.unique(dialogs)]  # rows of each dialogue
    drawn = np.random.default_rng(seed).integers(len(members), size=(draws, len(members)))
    samples = [np.arange(len(truth)), *(np.concatenate([members[d] for d in x]) for x in drawn)]
    result = {}  # by metric
    for name, metric in (("wa", weighted_accuracy), ("ua", unweighted_accuracy)):
        values = [metric(truth[i], guess_b[i]) - metric(truth[i], guess_a[i]) for i in samples]
        low, high = np.percentile(values[1:], [2.5, 97.5]).tolist()  # of the draws
        result[name] = (values[0], low, high)  # sample 0 is the test data itself
    return result

def compare(first: list, second: list) -> str:
    """Compare the runs of two systems, A and B, paired by fold and seed, or raise InputError.
    Of each fold we take the lowest seed that both have, so that an utterance counts once."""
    a, b = ({(run.fold, run.seed): run for run in runs} for runs in (first, second))
    pairs = {fold: (a[fold, seed], b[fold, seed])  # the lowest seed comes last and stays
             for fold, seed in sorted(a.keys() & b.keys(), reverse=True)}  # fmt: skip
    if not pairs or any(len({run.name for run in runs}) > 1 for runs in (first, second)):
        raise InputError("--compare: A and B need one system each, and a fold and seed in common")
    a, b = zip(*pairs.values())  # the runs of A, and those of B
    if any(column(a, x).tolist() != column(b, x).tolist() for x in ("utterance", "truth")):
        raise InputError("--compare: A and B were tested on different utterances")
    truth, dialogs = column(a, "truth"), column(a, "dialog")  # (N,) each
    guess_a, guess_b = column(a, "guess"), column(b, "guess")  # (N,) each
    right_a, right_b = (guess_a == truth), (guess_b == truth)  # (N,) bool each
    text = (
        f"A: {a[0].name}\nB: {b[0].name}\nfolds {list(grouped(a, 'fold'))}, seeds "
        f"{list(grouped(a, 'seed'))}: {len(truth)} predictions in {len(set(dialogs))} dialogues\n"
        f"only A right: {(right_a & ~right_b).sum()}, only B right: {(right_b & ~right_a).sum()}; "
        f"McNemar's exact test: p = {mcnemar(right_a, right_b):.3g} (if independent)\n"
    )
    for metric, points in bootstrap(truth, guess_a, guess_b, dialogs).items():
        change, low, high = (f"{100 * x:+.2f}" for x in points)  # in percentage points
        text += f"{metric.upper()} of B minus A: {change} points, 95 % interval {low} to {high}"
        text += "  (contains 0: no difference shown)\n" if points[1] <= 0 <= points[2] else "\n"
    return text

# ----- Pictures (matplotlib is the one optional package)
def figure(width: float, height: float, title: str):
    """Create an empty matplotlib Figure, in inches. Raises InputError without matplotlib."""
    with reading("matplotlib", "for pictures: pip install matplotlib"):
        import matplotlib.figure  # without pyplot there is no window to close
    matplotlib.rcParams.update({"font.size": 10, "axes.titlesize": 10, "figure.dpi": 200})
    fig = matplotlib.figure.Figure((width, height), layout="constrained")
    fig.suptitle(title, wrap=True)  # as many lines as it needs
    return fig

def draw_confusions(runs: list, path: Path) -> None:
    """Draw Fig. 4 for its own four systems on Session 5, or else for the first four runs."""
    lowest = {(run.system, run.fold): run for run in sorted(runs, key=lambda run: -run.seed)}
    shown = [lowest[n, 5] for n in (4, 8, 18, 7) if (n, 5) in lowest] or runs[:4]  # panels a to d
    fig = figure(3 * len(shown), 3.6, f"Fig. 4 with {runs[0].title}")  # one row of panels
    for ax, letter, run in zip(fig.subplots(1, len(shown), squeeze=False)[0], "abcd", shown):
        counts = np.array(run.result["confusion"])  # (4, 4)
        fractions = counts / counts.sum(axis=1, keepdims=True).clip(min=1)  # empty rows stay 0
        ax.imshow(fractions, cmap="Blues", vmin=0, vmax=1)  # the colours of the paper
        for (i, j), x in np.ndenumerate(fractions):
            ax.text(j, i, f"{x:.2f}", ha="center", va="center", color="w" if x > 0.5 else "k")
        title = f"({letter}) Sys. {run.system} (UA: {run.result['ua']:.2%})"  # as in the paper
        ax.set(title=f"{title}\nfold {run.fold}, seed {run.seed}")
        ax.set(xticks=range(4), xticklabels=CLASSES, xlabel="Predictions")
        ax.set(yticks=range(4), yticklabels=CLASSES, ylabel="Groundtruth")
    fig.savefig(path)

def draw_curves(runs: list, path: Path) -> None:
    """Draw loss and development UA of one system's runs over the epochs, one colour a run."""
    fig = figure(6.5, 6.5, runs[0].name)  # inches
    loss, ua = fig.subplots(2, 1, sharex=True)
    for k, run in enumerate(runs):
        with reading(run.folder / "log.jsonl", "restore it, or leave out --pictures"):
            log = [json.loads(x) for x in (run.folder / "log.jsonl").read_text().splitlines()]
            x = {key: [row[key] for row in log] for key in log[0]}  # a list of values by epoch
            loss.plot(x["epoch"], x["dev_loss"], f"C{k}", label=f"fold {run.fold}, seed {run.seed}")
            loss.plot(x["epoch"], x["train_loss"], f"C{k}:")  # dotted
            ua.plot(x["epoch"], x["dev_ua"], f"C{k}")
            if start := run.result["finetune_epoch"]:  # the last frozen epoch, or None
                loss.plot(start, x["dev_loss"][start - 1], f"C{k}v", label="fine-tuning starts")
    loss.legend(ncols=2)  # the lower panel has the same colours
    loss.set(ylabel="cross-entropy (dotted: training)")
    ua.set(xlabel="epoch", ylabel="development UA")
    fig.savefig(path)

def draw_gates(recognizer: "Recognizer", path: Path) -> None:
    """Draw the gates of squeeze-and-excitation (S&E) over the layers, for one utterance."""
    fig = figure(6.5, 3.5, f"S&E gates of one utterance, {recognizer.name}")
    ax = fig.add_subplot(xlabel="layer (0: input of the Transformer)", ylabel="gate", ylim=(0, 1))
    ax.xaxis.get_major_locator().set_params(integer=True)  # there is no layer 0.5
    for modality, (states, mask, *context) in recognizer.batch.items():
        gates = recognizer.model.extractor[modality].se.gates(states.float(), mask)  # (U, L)
        target = context[0][0, context[0].shape[1] // 2] if context else 0  # the utterance's row
        ax.plot(gates[target], "o-", label=modality)
    ax.legend()  # audio, text
    fig.savefig(path)

def draw_attention(recognizer: "Recognizer", text: str, path: Path) -> None:
    """Draw the weights of Eq. (1) for one utterance, one panel for each cross-modal block."""
    fusion, tokenizer = recognizer.model.fusion, recognizer.upstreams["text"].preprocessor
    x, mask = recognizer.model.features(**recognizer.batch)  # X_A and X_T by modality
    n = x["text"].shape[1]  # X_T is as long as the longest text of the context
    ids = tokenizer(text, truncation=True, max_length=n)["input_ids"]  # as the model reads it
    tokens = tokenizer.convert_ids_to_tokens(ids) + ["(context)"] * (n - len(ids))
    fig = figure(6.5, 1 + 4 * len(fusion.paths), f"Eq. (1) on one utterance, {recognizer.name}")
    axes = fig.subplots(len(fusion.paths), 1, squeeze=False)[:, 0]
    for ax, (target, source) in zip(axes, fusion.paths):
        block = fusion.blocks[f"{source}-to-{target}"]
        _, weights = block.attend(x[target], x[source], mask[source])  # (1, T_t, T_s)
        weights = weights[0] if target == "text" else weights[0].T  # (T_T, T_A) in both panels
        fig.colorbar(ax.imshow(weights.numpy(), aspect="auto", cmap="Blues", vmin=0), ax=ax)
        ax.set_yticks(range(0, n, 1 + n // 20), tokens[:: 1 + n // 20])  # at most 20 labels
        line = "row" if target == "text" else "column"
        ax.set(title=f"{source} to {target}: each {line} sums to 1", xlabel="frame of 20 ms")
    fig.savefig(path)

# ----- An utterance of your own, and the command
class Recognizer:
    """A finished run that predicts the emotion of your own utterances. In a notebook:

        from evaluate import Recognizer
        Recognizer("runs/toy/mmt-finetuned/fold5-seed0").recognize("x.wav", "i never said that")
    """
    def __init__(self, folder: str | Path):
        self.run = run = read_run(Path(folder))
        self.name = f"{run.name}, fold {run.fold}, seed {run.seed}"  # in titles and errors
        state = load_checkpoint(run.folder / "checkpoint.pt")  # of the last epoch
        with reading(run.folder, "checkpoint.pt does not fit config.json; train again"):
            weights = (state["selected"] or state)["weights"]  # [A10]
            self.trim, self.model = run.trim, EmotionRecognizer(Config(**run.model))
            self.model.requires_grad_(False).eval().load_state_dict(weights["model"])
            self.upstreams = {m: Upstream(x, m, run.precision) for m, x in run.upstreams.items()}
            for m, upstream in self.upstreams.items():  # put in what fine-tuning changed
                if upstream.fingerprint != run.weights[m]:
                    raise InputError(f"{upstream.name}: these are not the weights of {folder}")
                upstream.model.load_state_dict(upstream.model.state_dict() | weights[m])

    def recognize(self, wav=None, text=None, before=(), after=()) -> dict[str, float]:
        """Return {"neu": p, "hap": p, "ang": p, "sad": p}.
        before, after: the texts of the turns around the utterance, in their order. Afterwards
        `batch` holds the model's input, and `remarks` what a user must know about the answer."""
        self.batch, self.remarks = {}, []  # batch: the model's keyword arguments
        remark = self.remarks.append
        if self.run.title.startswith("toy"):
            remark("This model learned from toy data. It is useless for real speech.")
        for modality, given in (("audio", wav), ("text", text)):
            if modality in self.upstreams and given is None:
                raise InputError(f"{self.name} needs {modality}: add --wav FILE or --text WORDS")
            if modality not in self.upstreams and given is not None:
                remark(f"This system uses no {modality}, so yours is ignored.")
        if "audio" in self.upstreams:
            x = load_wav(wav)  # (n,)
            self.batch["audio"] = self.upstreams["audio"]([clip(x, self.trim)])
            if len(x) > CLIP_SECONDS * SAMPLE_RATE:
                remark(f"Of {len(x) / SAMPLE_RATE:.1f} s of audio, {CLIP_SECONDS} s are used.")
        if "text" in self.upstreams:
            upstream, half = self.upstreams["text"], self.model.config.n_context // 2
            before, after = ([x] if isinstance(x, str) else list(x) for x in (before, after))
            before, after = before[max(0, len(before) - half) :], after[:half]  # the nearest
            texts = [*before, text, *after]  # U texts
            window = range(len(before) - half, len(before) + half + 1)  # places in texts
            context = [i if 0 <= i < len(texts) else -1 for i in window]  # C. -1: none there [A6]
            self.batch["text"] = (*upstream(texts), torch.tensor([context]))  # context (1, C)
            if (tokens := len(upstream.preprocessor(text)["input_ids"])) > upstream.max_tokens:
                remark(f"Of {tokens} tokens, {upstream.max_tokens} are used.")
            if n := context.count(-1):
                remark(f"{n} turns of context are missing. They count as a dialogue's edge.")
        return dict(zip(CLASSES, self.model(**self.batch)[0].softmax(dim=0).tolist()))

def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="a folder of runs, or the folder of one run")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two systems or folders")
    parser.add_argument("--parts", action="store_true", help="improvised, scripted, speakers, ...")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="where to draw them")
    parser.add_argument("--wav", metavar="FILE", help="audio of an utterance of your own")
    parser.add_argument("--text", metavar="WORDS", help="its words")
    for flag in ("--before", "--after"):
        parser.add_argument(flag, nargs="+", action="extend", default=[], metavar="WORDS")
    args = parser.parse_args(arguments)
    args.pictures and args.pictures.mkdir(parents=True, exist_ok=True)
    if args.wav is not None or args.text is not None or args.before or args.after:  # your own
        recognizer = Recognizer(args.runs)  # the folder of one run
        p = recognizer.recognize(args.wav, args.text, args.before, args.after)
        answer = ", ".join(f"{c} {p[c]:.1%}" for c in sorted(p, key=p.get, reverse=True))
        for line in (answer, *recognizer.remarks):
            print(f"{recognizer.run.title}: {line}")
        if args.pictures:
            draw_gates(recognizer, args.pictures / "gates.png")
            if recognizer.run.fusion in ("cmt-a2t", "cmt-t2a", "mmt"):
                draw_attention(recognizer, args.text, args.pictures / "attention.png")
        return
    runs, others = find_runs(args.runs)
    if not runs + others:
        raise InputError(f"{args.runs}: no run in it; `python train.py --out DIR` makes one in DIR")
    damaged = [line for line in others if not line.startswith("unfinished")]  # or duplicate
    for line in others:
        print(line, file=sys.stderr if line in damaged else sys.stdout)
    groups = list(grouped(runs, "title").values())  # a table for each title
    if args.compare:  # of each title, the runs of A and those of B
        pairs = [[[run for run in x if str(run.system) == n] for n in args.compare] for x in groups]
        if not "".join(args.compare).isdigit():
            pairs = [[find_runs(Path(folder))[0] for folder in args.compare]]  # A, B: folders
        print("\n".join(compare(*pair) for pair in [x for x in pairs if all(x)] or pairs))
        groups = []  # no other report
    for group in groups:
        print(breakdown(group) if args.parts else f"{table_1(group)}\n{table_2(group)}")
        if args.pictures:
            stem = re.sub(r"\W+", "-", group[0].title)[:100]  # the title as a file name
            draw_confusions(group, args.pictures / f"{stem}-confusions.png")
            for number, mine in grouped(group, "system").items():
                draw_curves(mine, args.pictures / f"{stem}-curves-{number:02}.png")
    if len(runs) == 1:
        print(describe(runs[0].result))
    if damaged:
        sys.exit(1)

if __name__ == "__main__":
    run_command(main)
