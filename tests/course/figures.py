"""Draw Figures 1 to 3 with the names and shapes of the code, for slides.

    python -m tests.course.figures DIR     needs matplotlib

The shapes are those of a real forward pass with clips of 5 s and texts of 20 tokens, at
the size of WavLM-Large and BERT-base. B is the number of utterances, and N is the
number of their real time steps.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import data
from data import InputError
from evaluate import TABLE_1
from model import FUSIONS, Config, EmotionRecognizer

# How a block of the code looks, and how a tensor.
BLOCK = {"boxstyle": "round,pad=0.45", "facecolor": "#dbe8f6", "edgecolor": "#2b5d8c"}
TENSOR = {"boxstyle": "square,pad=0.35", "facecolor": "#f4f0e4", "edgecolor": "#9a8c5c"}


def new_figure(width: float, height: float, title: str):
    """Create an empty figure, in inches. Raises InputError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise InputError(f"{problem}: pip install matplotlib") from None
    figure = Figure((width, height), dpi=200, layout="constrained")
    figure.suptitle(title, parse_math=False, wrap=True, fontsize=11)
    return figure


def find_shapes() -> dict[str, str]:
    """Run MMT at full size: the shape of each module's output, by its name."""
    net = EmotionRecognizer(Config()).eval()
    names = {module: name for name, module in net.named_modules()}
    shapes = {}

    def note_shape(module: nn.Module, inputs: tuple, output) -> None:
        if isinstance(output, tuple):
            output = output[0]  # the textual extractor returns a mask, too
        batch, *rest = output.shape
        symbol = {2: "B", 18: "9 B"}.get(batch, "N")
        shapes[names[module]] = f"({', '.join([symbol, *map(str, rest)])})"

    for module in names:
        module.register_forward_hook(note_shape)
    audio = torch.zeros(2 * 249, 25, 1024), torch.ones(2, 249, dtype=torch.bool)
    text = torch.zeros(2 * 9 * 20, 13, 768), torch.ones(2, 9, 20, dtype=torch.bool)
    with torch.no_grad():
        net(audio, text)
    return shapes


def draw(ax, boxes: dict[str, tuple], arrows: list[str]) -> None:
    """Draw boxes {name: (x, y, text, style)} and arrows "a b", from box a to box b."""
    drawn = {}
    for name, (x, y, text, style) in boxes.items():
        drawn[name] = ax.text(
            x, y, text, ha="center", va="center", bbox=style, fontsize=11
        )
    for arrow in arrows:
        start, end = (drawn[name] for name in arrow.split())
        properties = {
            "arrowstyle": "-|>",
            "color": "#444444",
            "patchA": start.get_bbox_patch(),
            "patchB": end.get_bbox_patch(),
        }
        ax.annotate("", end.get_position(), start.get_position(), arrowprops=properties)
    ax.set(xlim=(-0.9, 6.9), ylim=(-0.8, 1.8))
    ax.axis("off")


def draw_figure_1(shapes: dict[str, str], path: Path) -> None:
    """Draw Fig. 1: the unimodal and the multimodal framework."""
    figure = new_figure(
        12, 4.2, "Fig. 1: unimodal (audio, above) and multimodal (below)"
    )
    top, bottom = figure.subplots(2, 1)
    acoustic = f"FeatureExtractor\nX_A {shapes['extractor.audio']}"
    textual = f"TextFeatureExtractor\nX_T {shapes['extractor.text']}"
    logits = f"logits\n{shapes['']}"
    boxes = {
        "in": (0, 0.5, "waveforms", TENSOR),
        "up": (1.6, 0.5, "Upstream\n(WavLM)", BLOCK),
        "x": (3.3, 0.5, acoustic, BLOCK),
        "c": (5.1, 0.5, "pooling and\nclassifier", BLOCK),
        "out": (6.5, 0.5, logits, TENSOR),
    }
    draw(top, boxes, ["in up", "up x", "x c", "c out"])
    texts = "nine texts\n[..., Text -1, Text 0, Text 1, ...]"
    boxes = {
        "a": (0, 1.2, "waveforms", TENSOR),
        "ua": (1.6, 1.2, "Upstream\n(WavLM)", BLOCK),
        "xa": (3.3, 1.2, acoustic, BLOCK),
        "t": (0, -0.2, texts, TENSOR),
        "ut": (1.6, -0.2, "Upstream\n(BERT)", BLOCK),
        "xt": (3.3, -0.2, textual, BLOCK),
        "f": (4.7, 0.5, f"Fusion\n{shapes['fusion']}", BLOCK),
        "c": (5.6, 0.5, "classifier", BLOCK),
        "out": (6.5, 0.5, logits, TENSOR),
    }
    arrows = ["a ua", "ua xa", "xa f", "t ut", "ut xt", "xt f", "f c", "c out"]
    draw(bottom, boxes, arrows)
    figure.savefig(path)


def draw_figure_2(shapes: dict[str, str], path: Path) -> None:
    """Draw Fig. 2: the feature extractors without their upstreams."""
    title = "Fig. 2: feature extraction for audio (above) and text (below)"
    figure = new_figure(12, 4.4, f"{title}. B utterances, N real time steps")
    top, bottom = figure.subplots(2, 1)
    condense = "Project & Norm\nlayers times gates,\nsummed; linear; norm"
    gates = shapes["extractor.audio.se"]
    boxes = {
        "s": (0, 0.4, "states of WavLM\n(N, 25, 1024)", TENSOR),
        "m": (1.2, 1.5, "mask (B, 249)", TENSOR),
        "se": (2.3, 0.4, f"SqueezeExcitation\ngates {gates}", BLOCK),
        "p": (4.2, 0.4, condense, BLOCK),
        "x": (6.2, 0.4, f"X_A\n{shapes['extractor.audio']}", TENSOR),
    }
    draw(top, boxes, ["s se", "m se", "se p", "p x"])
    gates = shapes["extractor.text.each_text.se"]
    boxes = {
        "s": (0, 0.4, "states of BERT\n(N, 13, 768)", TENSOR),
        "m": (0.9, 1.5, "mask (B, 9, 20)", TENSOR),
        "se": (1.8, 0.4, f"SqueezeExcitation\ngates {gates}", BLOCK),
        "p": (3.4, 0.4, f"{condense}\n(B, 9, 20, 16)", BLOCK),
        "c": (5.0, 0.4, "Conv2d\n9 maps to 1", BLOCK),
        "x": (6.3, 0.4, f"X_T\n{shapes['extractor.text']}", TENSOR),
    }
    draw(bottom, boxes, ["s se", "m se", "se p", "p c", "c x"])
    figure.savefig(path)


def draw_figure_3(shapes: dict[str, str], path: Path) -> None:
    """Draw Fig. 3: the paths of the nine systems, from FUSIONS."""
    title = (
        "Fig. 3: a system is a list of paths; their averages over time are concatenated"
    )
    figure = new_figure(12, 5.5, title)
    symbols = {"audio": "X_A", "text": "X_T"}
    axes = figure.subplots(3, 3).flat
    for number, (ax, name) in enumerate(zip(axes, FUSIONS, strict=True)):
        paths = FUSIONS[name]
        boxes = {"out": (6, 0.5, f"(B, {16 * len(paths)})", TENSOR)}
        arrows = []
        for k, (target, source) in enumerate(paths):
            x = symbols[target]
            if source is None:
                block = "pooling"
            elif source == target:
                block = "Transformer"
            else:
                block = f"CMT {source[0]}→{target[0]}".upper()
                x = f"Q: {x}\nK, V: {symbols[source]}"
            y = 0.5 if len(paths) == 1 else 1.1 - 1.2 * k
            boxes[f"x{k}"] = (0.4, y, x, TENSOR)
            boxes[f"b{k}"] = (3.2, y, block, BLOCK)
            arrows += [f"x{k} b{k}", f"b{k} out"]
        draw(ax, boxes, arrows)
        system = 2 * number + 1
        model = TABLE_1[system][0].removesuffix(" frozen")
        ax.set_title(f"{name}: Sys. {system}, {system + 1} ({model})", fontsize=10)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw Figures 1 to 3.")
    parser.add_argument("dir", type=Path, metavar="DIR", help="for the pictures")
    args = parser.parse_args(arguments)
    args.dir.mkdir(parents=True, exist_ok=True)
    shapes = find_shapes()
    for number, draw_one in enumerate([draw_figure_1, draw_figure_2, draw_figure_3], 1):
        path = args.dir / f"figure-{number}.png"
        draw_one(shapes, path)
        print(path)


if __name__ == "__main__":
    data.run_command(main)
