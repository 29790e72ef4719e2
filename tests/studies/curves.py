"""Draw learning curves, one picture for each system and each choice of settings.

    python -m tests.studies.curves RUNS DIR     (needs matplotlib)

Each fold has a colour, and each seed has a line style.
"""

import argparse
import json
from pathlib import Path

from data import InputError, run_command
from evaluate import TABLE_1, Runs, find_runs, grouped

PANELS = {
    "train_loss": "training loss",
    "dev_loss": "development loss",
    "dev_ua": "UA in development",
}
LINE_STYLES = ["solid", "dashed", "dotted", "dashdot"]


def read_log(path: Path) -> list[dict]:
    """Read log.jsonl, one dict per epoch. Raises InputError if it is damaged."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except ValueError as problem:
        raise InputError(f"{path}: damaged, {problem}") from None
    if not rows:
        raise InputError(f"{path}: damaged, it has no epochs")
    return rows


def describe(config: dict) -> str:
    """Name the corpus, the system and the settings of a run, from its config.json."""
    corpus, *settings = config["title"].split(", ")
    corpus = "Toy corpus" if corpus == "toy" else f"Corpus {corpus}"
    model, _, phase = TABLE_1[config["system"]][0].rpartition(" ")
    system = f"system {config['system']} ({model}, {phase})"
    return ", ".join([corpus, system, *settings])


def draw_curves(runs: Runs):
    """Draw the curves of the runs of one system: a matplotlib figure."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as problem:
        raise InputError(f"{problem}: pip install matplotlib") from None
    # Large enough for the last row of a lecture hall, on a slide 12 inches wide.
    matplotlib.rcParams.update({"font.size": 16})
    figure = Figure((12, 9), dpi=150, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    axes = figure.subplots(len(PANELS), 1, sharex=True)
    legend = {}
    folds = sorted({run.config["fold"] for run in runs})
    colours = {fold: f"C{k}" for k, fold in enumerate(folds)}
    for fold, colour in colours.items():
        legend[f"fold {fold}"] = Line2D([], [], color=colour, linewidth=3)
    seeds = sorted({run.config["seed"] for run in runs})
    styles = {seed: LINE_STYLES[k % 4] for k, seed in enumerate(seeds)}
    for seed, style in styles.items():
        legend[f"seed {seed}"] = Line2D([], [], color="black", linestyle=style)

    for run in runs:
        colour = colours[run.config["fold"]]
        log = read_log(run.folder / "log.jsonl")
        for ax, name in zip(axes, PANELS, strict=True):
            epochs = [row["epoch"] for row in log]
            values = [row[name] for row in log]
            style = styles[run.config["seed"]]
            ax.plot(epochs, values, color=colour, linestyle=style)
            marks = {epochs[-1]: "o"}
            if run.result["finetune_epoch"]:
                marks[run.result["finetune_epoch"]] = "v"
            for epoch, mark in marks.items():
                ax.plot(epoch, values[epoch - 1], mark, color=colour, markersize=8)
    legend["training stops"] = Line2D([], [], color="black", marker="o", linewidth=0)
    if any(run.result["finetune_epoch"] for run in runs):
        triangle = Line2D([], [], color="black", marker="v", linewidth=0)
        legend["fine-tuning\nstarts after"] = triangle

    for ax, label in zip(axes, PANELS.values(), strict=True):
        ax.set_ylabel(label)
    axes[-1].yaxis.set_major_formatter("{x:.0%}")
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.legend(legend.values(), legend.keys(), loc="outside right upper")
    figure.suptitle(describe(runs[0].config), parse_math=False, wrap=True)
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
