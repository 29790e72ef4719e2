"""Draw learning curves, one picture for each system and each choice of settings.

    python -m tests.studies.curves RUNS DIR     (needs matplotlib)

Above is the loss over the epochs, and below the UA on the development speaker. Each
colour is a run. A triangle marks the last epoch before fine-tuning.
"""

import argparse
import json
from pathlib import Path

from data import InputError, run_command
from evaluate import TABLE_1, FinishedRun, find_runs, grouped


def read_log(path: Path) -> list[dict]:
    """Read log.jsonl, one dict per epoch. Raises InputError if it is damaged."""
    rows = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line))
    except ValueError as problem:
        raise InputError(f"{path}: damaged, {problem}") from None
    if not rows:
        raise InputError(f"{path}: damaged, it has no epochs")
    return rows


def draw_curves(runs: list[FinishedRun]):
    """Draw the curves of the runs of one system: a matplotlib figure."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as problem:
        raise InputError(f"{problem}: pip install matplotlib") from None
    figure = Figure((7, 6.5), dpi=200, layout="constrained")
    loss, ua = figure.subplots(2, 1, sharex=True)
    # Careful: without points, the curve of a single epoch is invisible.
    style = {"marker": ".", "markersize": 4}
    for number, run in enumerate(runs):
        log = read_log(run.folder / "log.jsonl")
        epochs = [row["epoch"] for row in log]
        dev_loss = [row["dev_loss"] for row in log]
        train_loss = [row["train_loss"] for row in log]
        dev_ua = [100 * row["dev_ua"] for row in log]
        colour = f"C{number}"
        label = f"fold {run.config['fold']}, seed {run.config['seed']}"
        loss.plot(epochs, dev_loss, colour, label=label, **style)
        loss.plot(epochs, train_loss, colour, linestyle="dotted", **style)
        ua.plot(epochs, dev_ua, colour, **style)
        for row in log:
            if row["event"] == "finetune":
                loss.plot(row["epoch"], row["dev_loss"], colour, marker="v")
                ua.plot(row["epoch"], 100 * row["dev_ua"], colour, marker="v")
    # One entry in the legend explains all triangles.
    if any(run.result["finetune_epoch"] for run in runs):
        loss.plot([], [], "kv", label="fine-tuning starts after this epoch")
    loss.legend(ncols=2)
    loss.set_ylabel("cross-entropy (dotted: training)")
    ua.set_ylabel("UA on the development speaker, in %")
    ua.set_xlabel("epoch")
    ua.xaxis.set_major_locator(MaxNLocator(integer=True))
    system = runs[0].config["system"]
    figure.suptitle(
        f"Emotion recognition: training of {TABLE_1[system][0]} (Sys. {system})\n"
        f"corpus and settings: {runs[0].config['title']}",
        parse_math=False,
    )
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw learning curves.")
    parser.add_argument("runs", type=Path, metavar="RUNS", help="a folder of runs")
    parser.add_argument("dir", type=Path, metavar="DIR", help="for the pictures")
    args = parser.parse_args(arguments)
    runs, damaged = find_runs(args.runs)
    args.dir.mkdir(parents=True, exist_ok=True)
    number = 0
    for title, group in grouped(runs, "title").items():
        for system, members in grouped(group, "system").items():
            number += 1
            path = args.dir / f"curves-{number}.png"
            draw_curves(members).savefig(path)
            print(f"{path}: {title}, Sys. {system}")
    if damaged:
        raise InputError("\n".join(damaged))


if __name__ == "__main__":
    run_command(main)
