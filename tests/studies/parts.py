"""How good is a system on parts of the test data?

    python -m tests.studies.parts RUNS [--iemocap DIR]

The parts are the improvised and the scripted dialogues of IEMOCAP, each speaker and
each class. With the corpus, there are two more: utterances whose text also occurs in
another session, and the others. A quarter of the scripted lines of IEMOCAP occur in
several sessions, so a model of text can know them from training.

All runs of a system are pooled. Within one class, WA and UA are both its recall.
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path

from data import CLASSES, InputError, Utterance, read_iemocap, run_command
from evaluate import FinishedRun, find_runs, format_table, grouped, metrics


def seen_elsewhere(corpus: list[Utterance]) -> dict[str, bool]:
    """Tell for each id whether its text also occurs in another session.

    Ignores case and punctuation. A text that occurs twice in one session is not seen,
    because one session is never both trained and tested on.
    """
    sessions = defaultdict(set)  # by text
    for u in corpus:
        sessions[plain(u.text)].add(u.session)
    return {u.id: len(sessions[plain(u.text)]) > 1 for u in corpus}


def plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def parts_of(
    rows: list[dict[str, str]], seen: dict[str, bool]
) -> dict[str, list[dict[str, str]]]:
    """Sort predictions into parts, by name.

    seen   by id, empty if the corpus is not at hand
    """
    parts = {"all": rows}
    # Only the dialogues of IEMOCAP have these names, so other corpora lack these parts.
    for part, kind in (("improvised", "impro"), ("scripted", "script")):
        pattern = re.compile(rf"Ses\d\d[FM]_{kind}")
        parts[part] = [row for row in rows if pattern.match(row["utterance"])]
    if seen:
        parts["text seen"] = [row for row in rows if seen[row["utterance"]]]
        parts["text not seen"] = [row for row in rows if not seen[row["utterance"]]]
    for speaker in sorted({row["speaker"] for row in rows}):
        parts[f"speaker {speaker}"] = [row for row in rows if row["speaker"] == speaker]
    for label in CLASSES:
        parts[f"class {label}"] = [row for row in rows if row["label"] == label]
    return {part: members for part, members in parts.items() if members}


def describe_parts(runs: list[FinishedRun], seen: dict[str, bool]) -> str:
    """Format one table for the runs of one title, a row for each system and part."""
    table = [["Sys.", "part", "predictions", "WA", "UA"]]
    for system, group in grouped(runs, "system").items():
        predictions = [row for run in group for row in run.predictions]
        for part, rows in parts_of(predictions, seen).items():
            truth = [CLASSES.index(row["label"]) for row in rows]
            guesses = [CLASSES.index(row["prediction"]) for row in rows]
            scores = metrics(truth, guesses)
            wa = f"{100 * scores['wa']:.2f}"
            ua = f"{100 * scores['ua']:.2f}"
            table.append([str(system), part, str(len(rows)), wa, ua])
    title = runs[0].config["title"]
    title = f"Parts of the test data, {title}, in %, all runs pooled"
    return format_table(title, table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Results on parts of the test data.")
    parser.add_argument("runs", type=Path, metavar="RUNS", help="a folder of runs")
    help_text = "the corpus of these runs, for the texts"
    parser.add_argument("--iemocap", type=Path, metavar="DIR", help=help_text)
    args = parser.parse_args(arguments)

    runs, damaged = find_runs(args.runs)
    seen = {}
    if args.iemocap:
        corpus, _ = read_iemocap(args.iemocap)
        seen = seen_elsewhere(corpus)
        for run in runs:
            for row in run.predictions:
                if row["utterance"] not in seen:
                    raise InputError(
                        f"{run.folder}: {row['utterance']} is not in {args.iemocap}. "
                        "Name the corpus of these runs"
                    )
    for group in grouped(runs, "title").values():
        print(describe_parts(group, seen))
    if damaged:
        raise InputError("\n".join(damaged))


if __name__ == "__main__":
    run_command(main)
