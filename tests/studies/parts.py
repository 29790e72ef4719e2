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

from data import CLASSES, Corpus, InputError, read_iemocap, run_command
from evaluate import Runs, find_runs, format_table, grouped, metrics


def seen_elsewhere(corpus: Corpus) -> dict[str, bool]:
    """Tell for each id whether its text also occurs in another session.

    Case and punctuation do not count.
    """
    texts = {u.id: " ".join(re.findall(r"\w+", u.text.lower())) for u in corpus}
    sessions = defaultdict(set)  # by text
    for u in corpus:
        sessions[texts[u.id]].add(u.session)
    return {u.id: len(sessions[texts[u.id]]) > 1 for u in corpus}


def parts_of(row: dict[str, str], seen: dict[str, bool]) -> list[str]:
    """Name the parts that a prediction belongs to."""
    name = row["utterance"]
    parts = ["all", f"speaker {row['speaker']}", f"class {row['label']}"]
    # Only the dialogues of IEMOCAP have these names, so other corpora lack these parts.
    part = re.match(r"Ses\d\d[FM]_(impro|script)", name)
    if part:
        parts.append({"impro": "improvised", "script": "scripted"}[part[1]])
    if name in seen:
        parts.append("text seen" if seen[name] else "text not seen")
    return parts


def describe_parts(runs: Runs, seen: dict[str, bool]) -> str:
    """Format one table for the runs of one title, a row for each system and part."""
    table = [["Sys.", "part", "predictions", "WA", "UA"]]
    for system, group in grouped(runs, "system").items():
        parts = defaultdict(list)
        for run in group:
            for row in run.predictions:
                for part in parts_of(row, seen):
                    parts[part].append(row)
        for part, rows in sorted(parts.items()):
            truth = [CLASSES.index(row["label"]) for row in rows]
            guesses = [CLASSES.index(row["prediction"]) for row in rows]
            scores = metrics(truth, guesses)
            percents = [f"{100 * scores[name]:.2f}" for name in ("wa", "ua")]
            table.append([str(system), part, str(len(rows)), *percents])
    title = f"Parts of the test data, {runs[0].config['title']}, in %, all runs pooled"
    return format_table(title, table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Results on parts of the test data.")
    parser.add_argument("runs", type=Path, metavar="RUNS", help="a folder of runs")
    parser.add_argument("--iemocap", type=Path, help="the corpus of these runs")
    args = parser.parse_args(arguments)
    runs, damaged = find_runs(args.runs)
    seen = {}
    if args.iemocap:
        seen = seen_elsewhere(read_iemocap(args.iemocap)[0])
    for group in grouped(runs, "title").values():
        print(describe_parts(group, seen))
    if damaged:
        raise InputError("\n".join(damaged))


if __name__ == "__main__":
    run_command(main)
