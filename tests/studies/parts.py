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

    Case and punctuation do not count. A text that occurs twice in one session is not
    seen, because one session is never both trained and tested on.
    """
    texts = {u.id: " ".join(re.findall(r"\w+", u.text.lower())) for u in corpus}
    sessions = defaultdict(set)  # by text
    for u in corpus:
        sessions[texts[u.id]].add(u.session)
    return {u.id: len(sessions[texts[u.id]]) > 1 for u in corpus}


def parts_of(row: dict[str, str], seen: dict[str, bool]) -> list[str]:
    """Name the parts that a prediction belongs to.

    seen   by id, empty if the corpus is not at hand
    """
    name = row["utterance"]
    parts = ["all", f"speaker {row['speaker']}", f"class {row['label']}"]
    # Only the dialogues of IEMOCAP have these names, so other corpora lack these parts.
    if re.match(r"Ses\d\d[FM]_impro", name):
        parts.append("improvised")
    if re.match(r"Ses\d\d[FM]_script", name):
        parts.append("scripted")
    if seen:
        if name not in seen:
            raise InputError(f"{name} is not in the corpus of --iemocap")
        parts.append("text seen" if seen[name] else "text not seen")
    return parts


def describe_parts(runs: Runs, seen: dict[str, bool]) -> str:
    """Format one table for the runs of one title, a row for each system and part."""
    table = [["Sys.", "part", "predictions", "WA", "UA"]]
    for system, group in grouped(runs, "system").items():
        classes = defaultdict(list)  # by part: (truth, guess)
        for run in group:
            for row in run.predictions:
                truth = CLASSES.index(row["label"])
                guess = CLASSES.index(row["prediction"])
                for part in parts_of(row, seen):
                    classes[part].append((truth, guess))
        for part, pairs in sorted(classes.items()):
            truth, guesses = zip(*pairs, strict=True)
            scores = metrics(truth, guesses)
            percents = [f"{100 * scores[name]:.2f}" for name in ("wa", "ua")]
            table.append([str(system), part, str(len(pairs)), *percents])
    title = runs[0].config["title"]
    title = f"Parts of the test data, {title}, in %, all runs pooled"
    return format_table(title, table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Results on parts of the test data.")
    parser.add_argument("runs", type=Path, metavar="RUNS", help="a folder of runs")
    parser.add_argument("--iemocap", type=Path, help="the corpus of these runs")
    args = parser.parse_args(arguments)
    runs, damaged = find_runs(args.runs)
    corpus = []
    if args.iemocap:
        corpus, _ = read_iemocap(args.iemocap)
    seen = seen_elsewhere(corpus)
    for group in grouped(runs, "title").values():
        print(describe_parts(group, seen))
    if damaged:
        raise InputError("\n".join(damaged))


if __name__ == "__main__":
    run_command(main)
