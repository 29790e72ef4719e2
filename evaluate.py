"""Results (§3.3, §4): WA and UA, Tables 1 and 2, Fig. 4, and the use of a model.

    python evaluate.py tables RUNS       Tables 1 and 2, on IEMOCAP beside the paper's
    python evaluate.py draw RUNS DIR     Fig. 4 (needs matplotlib)
    python evaluate.py recognize RUN --wav x.wav --text "I never said that."
        --before "Did you say that?"     the emotion of an utterance of your own

RUNS is a folder of runs, for example `runs`. RUN is the folder of one run, for example
runs/toy/mmt-finetuned/fold5-seed0.
"""

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from statistics import fmean, stdev
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

import data
from data import CLASSES, Corpus, InputError, Source, Utterance
from model import SYSTEMS, Config, EmotionRecognizer, Upstream

# --- Metrics (§3.1) -------------------------------------------------------------------
# "The averaged weighted accuracy (WA) and unweighted accuracy (UA, balanced by class
# weights)." The names are easily confused. WA is the usual accuracy, so large classes
# count more. UA counts every class equally.


def confusion_matrix(y_true: Sequence[int], y_pred: Sequence[int]) -> np.ndarray:
    """Count the utterances of class i that were predicted as class j: (4, 4).

    >>> confusion_matrix([0, 0, 0, 1], [0, 0, 2, 1])[:3, :3].tolist()
    [[2, 0, 1], [0, 1, 0], [0, 0, 0]]
    """
    n = len(CLASSES)
    counts = np.zeros((n, n), dtype=int)
    for truth, prediction in zip(y_true, y_pred, strict=True):
        counts[truth, prediction] += 1
    return counts


def weighted_accuracy(y_true: Sequence[int], y_pred: Sequence[int]) -> float:
    """Compute WA: the fraction of utterances that are predicted correctly.

    >>> weighted_accuracy([0, 0, 0, 1], [0, 0, 2, 1])  # 3 of 4
    0.75
    """
    counts = confusion_matrix(y_true, y_pred)
    return float(counts.trace() / counts.sum())


# EXERCISE 6 (10 min): delete the body, write it again; pytest -m ex6
def unweighted_accuracy(y_true: Sequence[int], y_pred: Sequence[int]) -> float:
    """Compute UA: the mean recall of the classes.

    y_true and y_pred are lists, arrays or tensors of n class indices. A class without
    an utterance in y_true does not count.

    >>> round(unweighted_accuracy([0, 0, 0, 1], [0, 0, 2, 1]), 4)  # (2/3 + 1/1) / 2
    0.8333
    """
    counts = confusion_matrix(y_true, y_pred)
    size = counts.sum(axis=1)  # (4,)
    correct = counts.diagonal()  # (4,)
    recalls = correct[size > 0] / size[size > 0]
    return float(recalls.mean())


def metrics(y_true: Sequence[int], y_pred: Sequence[int]) -> dict:
    """Compute {"wa", "ua", "confusion"} as in result.json."""
    return {
        "wa": weighted_accuracy(y_true, y_pred),
        "ua": unweighted_accuracy(y_true, y_pred),
        "confusion": confusion_matrix(y_true, y_pred).tolist(),
    }


# --- Tables 1 and 2 (§3.3, §4.1) ------------------------------------------------------
# PAPER-ERROR [E5]: "the fine-tuned systems generally outperform the frozen systems"
# (§4.2.1), but not by UA in Sys. 10 and 16.
# PAPER-ERROR [E6]: "the fusion of CMT models is best" (§3.3.2). By UA, Sys. 15 (LF) is.
# PAPER-ERROR [E7]: "CMT(T->A) slightly improves over the textual performance". By UA,
# Sys. 6 (BERT+FC) is better than Sys. 12.
# PAPER-ERROR [E8]: Sys. 18 "surpasses the accuracy of every emotion class" of Sys. 8
# (§4.2.2). In Fig. 4 both have .85 for angry.

# By number of the system: name, WA and UA in %, averaged over five folds.
TABLE_1 = {
    1: ("WavLM+FC frozen", 66.15, 65.35),
    2: ("WavLM+FC fine-tuned", 66.70, 66.71),
    3: ("WavLM+TE frozen", 63.51, 64.67),
    4: ("WavLM+TE fine-tuned", 67.99, 68.24),
    5: ("BERT+FC frozen", 74.33, 76.57),
    6: ("BERT+FC fine-tuned", 77.67, 78.76),
    7: ("BERT+TE frozen", 74.55, 76.41),
    8: ("BERT+TE fine-tuned", 76.09, 76.57),
    9: ("CMT(A→T) frozen", 67.76, 69.37),
    10: ("CMT(A→T) fine-tuned", 68.07, 67.93),
    11: ("CMT(T→A) frozen", 74.98, 76.85),
    12: ("CMT(T→A) fine-tuned", 77.75, 78.60),
    13: ("EF frozen", 77.61, 77.85),
    14: ("EF fine-tuned", 79.80, 80.65),
    15: ("LF frozen", 79.91, 81.88),
    16: ("LF fine-tuned", 79.91, 81.15),
    17: ("MMT frozen", 78.58, 80.72),
    18: ("MMT fine-tuned", 80.36, 81.70),
}
# The rows marked "ours" on Session 5 have no system numbers. By §5 the fine-tuned one
# is MMT. The frozen one may be MMT or LF, because the frozen row of five folds is LF
# (Sys. 15).
# PAPER-ERROR [E2]: §5 has a WA of 84.35, the abstract and Table 2 have 84.45.
TABLE_2 = {
    15: ("LF frozen", 78.32, 80.56),
    17: ("MMT frozen", 78.32, 80.56),
    18: ("MMT fine-tuned", 84.45, 84.39),
}


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as read from the files of its folder.

    config["title"] is the corpus, followed by the settings that are not defaults, and
    config["system"] is the number in Table 1.
    """

    folder: Path
    config: dict
    result: dict
    predictions: list[dict[str, str]]  # one row per test utterance


Runs = list[FinishedRun]


def table(name: str, runs: Runs, published: dict) -> str:
    """Format one row per system: mean ± standard deviation over the folds, in %.

    runs        at least one, all with the same title
    published   TABLE_1 or TABLE_2. The paper's numbers stand beside ours on IEMOCAP.
    """
    rows = [["Sys.", "model", "folds", "runs", "WA", "UA"]]
    on_iemocap = runs[0].config["corpus"] == "iemocap"
    if on_iemocap:
        rows[0] += ["paper's WA", "paper's UA"]
    for system, group in grouped(runs, "system").items():
        model, paper_wa, paper_ua = published[system]
        folds = grouped(group, "fold")
        row = [str(system), model, " ".join(map(str, folds)), str(len(group))]
        for metric in ("wa", "ua"):
            # Average over the seeds of a fold first, so that every fold counts once.
            means = []
            for fold in folds.values():
                means.append(100 * fmean(run.result[metric] for run in fold))
            cell = f"{fmean(means):.2f}"
            if len(means) > 1:
                cell += f" ± {stdev(means):.2f}"
            row.append(cell)
        if on_iemocap:
            row += [f"{paper_wa:.2f}", f"{paper_ua:.2f}"]
        rows.append(row)
    title = f"{name}, {runs[0].config['title']}, in %: mean ± sd over folds"
    return format_table(title, rows)


def grouped(runs: Runs, key: str) -> dict:
    """Group runs by "title", "system" or "fold", in order. A missing group is empty."""
    groups = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.config[key]):
        groups[run.config[key]].append(run)
    return groups


def format_table(title: str, rows: list[list[str]]) -> str:
    """Format rows of strings, the header first, as an aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width for width in widths]
    text = f"{title}\n\n"
    for row in [rows[0], rule, *rows[1:]]:
        cells = map(str.ljust, row, widths)
        text += f"| {' | '.join(cells)} |\n"
    return text


def print_tables(runs: Runs) -> None:
    """Print Table 1 for each title, and Table 2 for runs on Session 5 of IEMOCAP."""
    for group in grouped(runs, "title").values():
        print(table("Table 1", group, TABLE_1))
        if group[0].config["corpus"] == "iemocap":
            session_5 = grouped(group, "fold")[5]
            chosen = [run for run in session_5 if run.config["system"] in TABLE_2]
            if chosen:
                print(table("Table 2, Session 5", chosen, TABLE_2))


# --- Fig. 4 (§4.2) --------------------------------------------------------------------


def draw_confusions(runs: Runs, path: Path) -> None:
    """Draw Fig. 4: one confusion matrix per run, each row divided by its sum."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib: pip install matplotlib") from None
    figure = Figure((3.4 * len(runs) + 1, 4.6), dpi=200, layout="constrained")
    figure.suptitle(f"Fig. 4 on {runs[0].config['title']}", parse_math=False)
    axes = figure.subplots(1, len(runs), squeeze=False)[0]
    for ax, run in zip(axes, runs, strict=True):
        counts = np.array(run.result["confusion"])  # (4, 4)
        size = counts.sum(axis=1)  # (4,)
        # A row shows the fractions of one class. The test session may lack a class.
        fractions = counts / size.clip(min=1).reshape(4, 1)
        ax.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
        for (row, column), value in np.ndenumerate(fractions):
            color = "white" if value > 0.5 else "black"
            ax.text(column, row, f"{value:.2f}", color=color, ha="center", va="center")
        ax.set_xticks(range(4), CLASSES)
        sizes = [f"{name}\nn = {n}" for name, n in zip(CLASSES, size, strict=True)]
        ax.set_yticks(range(4), sizes)
        system = run.config["system"]
        title = "Sys. {system} (UA: {ua:.2%})\n{name}, fold {fold}, seed {seed}"
        title = title.format(system=system, name=TABLE_1[system][0], **run.result)
        ax.set(title=title, xlabel="Predictions", ylabel="Groundtruth")
    figure.savefig(path)


def draw(runs: Runs, folder: Path) -> None:
    """Draw one picture for each title, and print the path of the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for title, group in grouped(runs, "title").items():
        # Fig. 4 has Sys. 4, 8, 18 and 7 on Session 5. Draw these, or any four.
        session_5 = grouped(group, "fold")[5]
        systems = grouped(session_5, "system")
        panels = [systems[n][0] for n in (4, 8, 18, 7) if n in systems]
        path = folder / f"{title}.png"
        draw_confusions(panels or group[:4], path)
        print(path)


# --- An utterance of your own ---------------------------------------------------------


class Recognizer:
    """Recognize the emotion of utterances of your own with a finished run.

    Raises InputError if the run is not finished, or if its upstreams have changed.
    """

    def __init__(self, folder: str | Path):
        self.run = read_run(Path(folder))
        config = self.run.config
        state = load_checkpoint(self.run.folder / "checkpoint.pt", config)
        self.model = EmotionRecognizer(Config(**config["model"])).eval()
        self.model.load_state_dict(state["model"])
        self.upstreams = {}
        for modality, name in config["upstreams"].items():
            precision = config["settings"]["precision"]
            upstream = load_upstream(name, modality, precision)
            if upstream.checksum != config["weights_checksums"][modality]:
                raise InputError(f"{name}: it has changed since {folder} was trained")
            # The checkpoint has only the weights that fine-tuning has changed.
            weights = upstream.state_dict() | state["upstreams"][modality]
            upstream.load_state_dict(weights)
            self.upstreams[modality] = upstream

    @torch.no_grad()
    def recognize(self, wav=None, text=None, before=(), after=()) -> dict[str, float]:
        """Return the probabilities {"neu": p, "hap": p, "ang": p, "sad": p}.

        wav      the path of a file with one utterance, for the systems that use audio
        text     its words, for the systems that use text
        before   a list with the texts of the turns before it, in their order
        after    a list with the texts of the turns after it, in their order

        Raises InputError if a modality is missing, or not used by the system.
        """
        inputs = self.inputs(wav, text, before, after)
        probabilities = self.model(**inputs)[0].softmax(dim=0)
        return dict(zip(CLASSES, probabilities.tolist(), strict=True))

    def inputs(self, wav, text, before, after) -> dict:
        """Make the arguments of the model for one utterance."""
        if isinstance(before, str) or isinstance(after, str):
            raise InputError("the turns before and after must be lists of texts")
        arguments = {"audio": wav, "text": text}
        given = {m for m, argument in arguments.items() if argument is not None}
        if given != self.upstreams.keys():
            raise InputError(
                f"{self.run.folder} uses {list(self.upstreams)}. Give a wav for audio, "
                "a text for text, and nothing else"
            )

        # Treat the turns as a corpus of one dialogue. Its sources are live, so they
        # compute the states. Only utterances with a label are prepared, so the target
        # gets one. It may be any, because the model never sees labels.
        turns = [*before, text or "", *after]
        corpus = [Utterance("", 1, "", "", 0.0, 0.0, turn, "", None) for turn in turns]
        target = len(before)
        corpus[target] = replace(corpus[target], emotion="neu", wav=wav)
        n_context = self.model.config.n_context
        sources = {}
        for modality, upstream in self.upstreams.items():
            inputs = data.prepare(upstream, corpus, n_context)
            sources[modality] = Source(upstream, inputs, corpus, Path(), "cpu")
            sources[modality].live = upstream
        windows = data.context_windows(corpus, n_context)
        return data.batch(torch.tensor([target]), windows, sources, "cpu")


def load_upstream(name: str, modality: str, precision: str) -> Upstream:
    """Load an upstream. Raises InputError if it is incomplete or of unknown type."""
    advice = "To train, choose another with --wavlm or --bert. To recognize, write its "
    advice += "new path into the run's config.json. A folder tiny-... can be deleted"
    with reading(f"{modality} encoder {name}", advice):
        return Upstream(name, modality, precision)


# --- The files of a run ---------------------------------------------------------------


# The libraries raise these for files that are missing, incomplete or damaged.
DAMAGE = (OSError, ValueError, RuntimeError, UnpicklingError, SafetensorError)
DAMAGE += (KeyError, BadZipFile, csv.Error)


@contextmanager
def reading(path: Path | str, advice: str):
    """Turn the errors that libraries raise for a damaged file into an InputError."""
    try:
        yield
    except DAMAGE as problem:
        # Some libraries raise messages of many lines.
        reason = " ".join(str(problem).split())
        raise InputError(f"{path}: {reason:.300}. {advice}") from problem


def read_run(folder: Path) -> FinishedRun:
    """Read a finished run. Raises InputError if its files are damaged or disagree."""
    if not (folder / "result.json").exists():
        below = [str(path.parent) for path in folder.rglob("result.json")]
        raise InputError(f"{folder} is not a finished run. Below it are runs: {below}")
    with reading(folder, "A file of this run is damaged"):
        config = read_json(folder / "config.json")
        result = read_json(folder / "result.json")
        with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
            predictions = list(csv.DictReader(file, strict=True))
        truth = [CLASSES.index(row["label"]) for row in predictions]
        guesses = [CLASSES.index(row["prediction"]) for row in predictions]
        if not truth or not {"title", "corpus_checksum"} <= config.keys():
            raise ValueError("predictions.csv or config.json is not complete")
        keys = ("corpus", "fusion", "frozen", "fold", "seed")
        expected = {key: config[key] for key in keys}
        system = (config["fusion"], config["frozen"])
        config["system"] = SYSTEMS.index(system) + 1
    # WA, UA and the confusion matrix must be those of the predictions.
    expected.update(metrics(truth, guesses))
    for key, value in expected.items():
        if result.get(key) != value:
            raise InputError(f"{folder}: damaged, its files disagree about {key}")
    return FinishedRun(folder, config, result, predictions)


def read_json(path: Path) -> dict:
    """Read a JSON file of a run. Raises InputError if it is damaged."""
    with reading(path, "Restore it from a copy"):
        return json.loads(path.read_text(encoding="utf-8"))


def write_predictions(folder: Path, utterances: Corpus, log_probs: Tensor) -> None:
    """Write predictions.csv: one row per test utterance. log_probs is (n, 4)."""
    rows = [["utterance", "speaker", "label", "prediction", *CLASSES]]
    for u, row in zip(utterances, log_probs, strict=True):
        # Choose the class first. Rounding can make the two largest numbers equal.
        prediction = CLASSES[row.argmax()]
        probabilities = [f"{p:.6f}" for p in row.exp().tolist()]
        rows.append([u.id, u.speaker, CLASSES[u.label], prediction, *probabilities])
    # The csv module ends the lines itself, so open() must not change them.
    with data.write_whole(folder / "predictions.csv") as part:
        with part.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


def load_checkpoint(path: Path, run: dict) -> dict:
    """Load checkpoint.pt on the CPU.

    run   corpus, fusion, frozen, fold and seed, for example from config.json

    Raises InputError if the file is damaged, or belongs to another run.
    """
    advice = "Restore it from a copy, or move it elsewhere to start this run again"
    with reading(path, advice):
        # Careful: torch.load does not look at the checksums in the file.
        with ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("damaged")
        # With weights_only, a checkpoint cannot run code.
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not state["run"].items() <= run.items():
            raise ValueError(f"it belongs to the run {state['run']}")
    return state


def find_runs(root: Path) -> tuple[Runs, list[str]]:
    """Find the finished runs in a folder, and the problems, one line per folder.

    Prints a line for each unfinished run. Raises InputError if there is no run.
    """
    runs = []
    first_of_title = {}
    problems = []
    # result.json is written last. A run without it is not finished.
    files = list(root.rglob("log.jsonl")) + list(root.rglob("result.json"))
    if not files:
        raise InputError(f"{root}: no run in it. Give the --out of train.py")
    for folder in sorted({file.parent for file in files}):
        if not (folder / "result.json").exists():
            print(f"{folder}: not finished. Run its train.py command again to resume")
            continue
        try:
            run = read_run(folder)
        except InputError as problem:
            problems.append(str(problem))
            continue
        # A table compares runs of one title. Their corpus must be the same.
        first = first_of_title.setdefault(run.config["title"], run)
        if run.config["corpus_checksum"] != first.config["corpus_checksum"]:
            problems.append(f"{folder}: left out, on other data than {first.folder}")
            continue
        runs.append(run)
    return runs, problems


# --- The commands ---------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Report results, or use a model.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("tables", help="print Tables 1 and 2")
    command.add_argument("runs", type=Path, help="a folder of runs")
    command = commands.add_parser("draw", help="draw Fig. 4")
    command.add_argument("runs", type=Path, help="a folder of runs")
    command.add_argument("dir", type=Path, help="for the pictures")
    command = commands.add_parser("recognize", help="an utterance of your own")
    command.add_argument("run", type=Path, help="the folder of one run")
    command.add_argument("--wav", type=Path, help="16-bit mono WAV")
    command.add_argument("--text", help="its words")
    for flag in ("--before", "--after"):
        command.add_argument(flag, nargs="+", default=[], help="texts of turns")
    args = parser.parse_args(arguments)

    if args.command == "recognize":
        recognizer = Recognizer(args.run)
        answer = recognizer.recognize(args.wav, args.text, args.before, args.after)
        title = recognizer.run.config["title"]
        for name, probability in answer.items():
            print(f"{title}: {name} {probability:.1%}")
        return
    runs, problems = find_runs(args.runs)
    if args.command == "tables":
        print_tables(runs)
    else:
        draw(runs, args.dir)
    if problems:
        raise InputError("\n".join(problems))


if __name__ == "__main__":
    data.run_command(main)
