"""Draw learning curves, one picture for each system and each choice of settings.

    python -m tests.studies.curves RUNS DIR     (needs matplotlib)

Each fold has a colour, and each seed has a line style. Dots mark the last epoch before
fine-tuning, and the last epoch of all.
"""

import argparse
import json
from pathlib import Path

from data import InputError, run_command
from evaluate import TABLE_1, Runs, find_runs, grouped, reading

PANELS = {
    "train_loss": "training loss",
    "dev_loss": "development loss",
    "dev_ua": "UA in development",
}
LINE_STYLES = ["solid", "dashed", "dotted", "dashdot"]


def read_log(path: Path) -> list[dict]:
    """Read log.jsonl, one dict per epoch. Raises InputError if it is damaged."""
    with reading(path, "Restore it from a copy"):
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def draw_curves(runs: Runs):
    """Draw the curves of the runs of one system: a matplotlib figure."""
    from matplotlib.figure import Figure

    # On a slide, the words are large enough for the last row of a lecture hall.
    figure = Figure((9, 7), dpi=200, layout="constrained")
    config = runs[0].config
    system = f"Sys. {config['system']} ({TABLE_1[config['system']][0]})"
    figure.suptitle(f"{config['title']}, {system}", parse_math=False, wrap=True)
    axes = figure.subplots(len(PANELS), 1, sharex=True)
    for run in runs:
        fold, seed = run.config["fold"], run.config["seed"]
        style = {"color": f"C{fold}", "linestyle": LINE_STYLES[seed % 4]}
        log = read_log(run.folder / "log.jsonl")
        epochs = [row["epoch"] for row in log]
        dots = {len(log) - 1}
        if run.result["finetune_epoch"]:
            dots.add(run.result["finetune_epoch"] - 1)
        for ax, name in zip(axes, PANELS, strict=True):
            values = [row[name] for row in log]
            ax.plot(epochs, values, **style, marker="o", markevery=sorted(dots))
            ax.set_ylabel(PANELS[name])
        ax.lines[-1].set_label(f"fold {fold}, seed {seed}")
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.set_xlabel("epoch")
    ax.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right upper")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw learning curves.")
    parser.add_argument("runs", type=Path, metavar="RUNS", help="a folder of runs")
    parser.add_argument("dir", type=Path, metavar="DIR", help="for the pictures")
    args = parser.parse_args(arguments)
    runs, damaged = find_runs(args.runs)
    args.dir.mkdir(parents=True, exist_ok=True)
    for title, group in grouped(runs, "title").items():
        for system, members in grouped(group, "system").items():
            path = args.dir / f"{title}, Sys. {system}.png"
            draw_curves(members).savefig(path)
            print(path)
    if damaged:
        raise InputError("\n".join(damaged))


if __name__ == "__main__":
    run_command(main)
