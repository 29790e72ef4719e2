"""Draw Figures 1 to 3 with the names and shapes of the code, for slides.

    python -m tests.course.figures DIR     needs matplotlib

    figure-1.png    the unimodal and the multimodal framework
    figure-2.png    the feature extractors
    figure-3.png    the nine fusions: who asks (Q), and who answers (K, V)
    cmt-block.png   the inside of a cross-modal Transformer, CMT

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

# One look for all pictures of the course: blue is audio, orange is text, grey is both.
AUDIO = "#2b5d8c"
TEXT = "#b35900"
BOTH = "#444444"
FILLS = {AUDIO: "#dbe8f6", TEXT: "#fdebd3", BOTH: "#eeeeee"}
SYMBOLS = {"audio": "X_A", "text": "X_T"}
COLOURS = {"audio": AUDIO, "text": TEXT}


def new_figure(width: float, height: float, title: str):
    """Create an empty figure, in inches. Raises InputError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise InputError(f"{problem}: pip install matplotlib") from None
    # Large enough for the last row of a lecture hall, on a slide 12 inches wide.
    matplotlib.rcParams.update({"font.size": 14, "axes.titlesize": 14})
    figure = Figure((width, height), dpi=150, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    figure.suptitle(title, parse_math=False, wrap=True, fontsize=17)
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


def draw(ax, boxes: dict[str, tuple], arrows: list[tuple]) -> None:
    """Draw boxes and arrows.

    boxes    {name: (x, y, text, colour)}
    arrows   (from, to, label, colour), where from and to are names of boxes
    """
    drawn = {}
    for name, (x, y, text, colour) in boxes.items():
        style = {"boxstyle": "round,pad=0.4", "facecolor": FILLS[colour]}
        style["edgecolor"] = colour
        drawn[name] = ax.text(x, y, text, ha="center", va="center", bbox=style)
    for start, end, label, colour in arrows:
        properties = {
            "arrowstyle": "-|>",
            "mutation_scale": 18,
            "linewidth": 1.8,
            "color": colour,
            "patchA": drawn[start].get_bbox_patch(),
            "patchB": drawn[end].get_bbox_patch(),
        }
        x1, y1 = drawn[start].get_position()
        x2, y2 = drawn[end].get_position()
        ax.annotate("", (x2, y2), (x1, y1), arrowprops=properties)
        # A third of the way, so that the labels of crossing arrows do not meet.
        x = x1 + 0.36 * (x2 - x1)
        y = y1 + 0.36 * (y2 - y1)
        background = {"boxstyle": "round,pad=0.1", "facecolor": "w", "edgecolor": "w"}
        if label:
            middle = {"ha": "center", "va": "center", "bbox": background}
            ax.text(x, y, label, color=colour, **middle)
    ax.axis("off")


def draw_figure_1(shapes: dict[str, str], path: Path) -> None:
    """Draw Fig. 1: the unimodal and the multimodal framework."""
    figure = new_figure(
        13, 7, "Fig. 1: emotion from one modality (above), or from two (below)"
    )
    ratios = {"height_ratios": [1, 2.4]}
    top, bottom = figure.subplots(2, 1, gridspec_kw=ratios)
    acoustic = f"Feature\nExtractor\nX_A {shapes['extractor.audio']}"
    textual = f"Text Feature\nExtractor\nX_T {shapes['extractor.text']}"
    logits = f"logits\n{shapes['']}"
    boxes = {
        "in": (0, 0, "waveforms", AUDIO),
        "up": (1.7, 0, "WavLM", AUDIO),
        "x": (3.4, 0, acoustic, AUDIO),
        "c": (5.6, 0, "pooling,\nclassifier", AUDIO),
        "out": (7.2, 0, logits, AUDIO),
    }
    chain = ["in", "up", "x", "c", "out"]
    arrows = [(a, b, "", AUDIO) for a, b in zip(chain, chain[1:], strict=False)]
    draw(top, boxes, arrows)
    boxes = {
        "a": (0, 1, "waveforms", AUDIO),
        "ua": (1.7, 1, "WavLM", AUDIO),
        "xa": (3.4, 1, acoustic, AUDIO),
        "t": (0, -1, "nine texts:\n4 before, the\ntarget, 4 after", TEXT),
        "ut": (1.7, -1, "BERT", TEXT),
        "xt": (3.4, -1, textual, TEXT),
        "f": (4.9, 0, f"Fusion\n{shapes['fusion']}", BOTH),
        "c": (6.1, 0, "classifier", BOTH),
        "out": (7.2, 0, logits, BOTH),
    }
    arrows = [
        ("a", "ua", "", AUDIO),
        ("ua", "xa", "", AUDIO),
        ("xa", "f", "", AUDIO),
        ("t", "ut", "", TEXT),
        ("ut", "xt", "", TEXT),
        ("xt", "f", "", TEXT),
        ("f", "c", "", BOTH),
        ("c", "out", "", BOTH),
    ]
    draw(bottom, boxes, arrows)
    for ax in (top, bottom):
        ax.set(xlim=(-0.8, 7.6), ylim=(-1.6, 1.6))
    top.set_ylim(-0.8, 0.8)
    figure.savefig(path)


def draw_figure_2(shapes: dict[str, str], path: Path) -> None:
    """Draw Fig. 2: the feature extractors without their upstreams."""
    title = (
        "Fig. 2: from layer states to features, for audio (above) and text (below)\n"
    )
    title += "B utterances, which have N real time steps together"
    figure = new_figure(13, 7.5, title)
    axes = figure.subplots(2, 1)
    # The two rows are the same up to the convolution.
    rows = [
        ("WavLM", "(N, 25, 1024)", "(B, 249)", "extractor.audio.se", AUDIO),
        ("BERT", "(N, 13, 768)", "(B, 9, 20)", "extractor.text.each_text.se", TEXT),
    ]
    for ax, (upstream, states, mask, se, colour) in zip(axes, rows, strict=True):
        boxes = {
            "s": (0, 0, f"layer states\nof {upstream}\n{states}", colour),
            "m": (1.7, 1.1, f"padding mask {mask}", colour),
            "se": (1.7, 0, f"Squeeze &\nExcitation\ngates {shapes[se]}", colour),
            "p": (
                3.5,
                0,
                "Project & Norm:\ngates × layers,\nsummed; linear; norm",
                colour,
            ),
        }
        arrows = [
            ("s", "se", "", colour),
            ("m", "se", "", colour),
            ("se", "p", "", colour),
        ]
        if upstream == "WavLM":
            x_a = f"X_A\n{shapes['extractor.audio']}"
            boxes["x"] = (5.3, 0, x_a, colour)
            arrows.append(("p", "x", "", colour))
        else:
            boxes["e"] = (5.3, 0, "nine maps\n(B, 9, 20, 16)", colour)
            boxes["c"] = (6.5, 0, "Conv2D\n9 to 1", colour)
            x_t = f"X_T\n{shapes['extractor.text']}"
            boxes["x"] = (7.7, 0, x_t, colour)
            chain = ["p", "e", "c", "x"]
            pairs = zip(chain, chain[1:], strict=False)
            arrows += [(a, b, "", colour) for a, b in pairs]
        draw(ax, boxes, arrows)
        ax.set(xlim=(-0.6, 8.2), ylim=(-0.8, 1.4))
    figure.savefig(path)


def draw_figure_3(shapes: dict[str, str], path: Path) -> None:
    """Draw Fig. 3: the paths of the nine fusions, from FUSIONS."""
    title = "Fig. 3: the nine fusions. The target asks (Q), the source answers (K, V)"
    figure = new_figure(16, 10, title)
    axes = figure.subplots(3, 3).flat
    heights = {"audio": 1, "text": 0}
    for number, (ax, name) in enumerate(zip(axes, FUSIONS, strict=True)):
        paths = FUSIONS[name]
        boxes = {}
        for modality in Config(name).modalities:
            colour = COLOURS[modality]
            boxes[modality] = (0, heights[modality], SYMBOLS[modality], colour)
        boxes["out"] = (5.4, 0.5, f"concatenate\n(B, {16 * len(paths)})", BOTH)
        if len(paths) == 1:
            y = heights[paths[0][0]]
            boxes["out"] = (5.4, y, f"(B, {16 * len(paths)})", BOTH)
        arrows = []
        for target, source in paths:
            colour = COLOURS[target]
            block = f"block {target}"
            y = heights[target]
            if source is None:
                boxes[block] = (3, y, "mean over\ntime", colour)
                arrows.append((target, block, "", colour))
            elif source == target:
                boxes[block] = (3, y, "Transformer,\nmean", colour)
                arrows.append((target, block, "Q, K, V", colour))
            else:
                cmt = f"CMT({source[0]}→{target[0]})".upper()
                boxes[block] = (3, y, f"{cmt},\nmean", BOTH)
                arrows.append((target, block, "Q", colour))
                arrows.append((source, block, "K, V", COLOURS[source]))
            arrows.append((block, "out", "", BOTH))
        draw(ax, boxes, arrows)
        ax.set(xlim=(-0.6, 6.4), ylim=(-0.6, 1.6))
        system = 2 * number + 1
        model = TABLE_1[system][0].removesuffix(" frozen")
        ax.set_title(f"{name}: Sys. {system}, {system + 1} ({model})")
    figure.savefig(path)


def draw_cmt_block(shapes: dict[str, str], path: Path) -> None:
    """Draw the inside of CMT(A→T), as TransformerBlock computes it."""
    title = "Inside CMT(A→T): the text asks, the audio answers\n"
    title += "The result is as long as the text, and made of audio (dropout not drawn)"
    figure = new_figure(14, 7, title)
    ax = figure.subplots()
    width = shapes["fusion.blocks.audio-to-text.feed_forward.0"].strip("()").split()[-1]
    boxes = {
        "text": (0, 2, "target X_T\n(B, 20, 16)", TEXT),
        "audio": (0, 0, "source X_A\n(B, 249, 16)", AUDIO),
        "q": (1.7, 2, "Q = X_T W_Q", TEXT),
        "k": (1.7, 0.55, "K = X_A W_K", AUDIO),
        "v": (1.7, -0.55, "V = X_A W_V", AUDIO),
        "w": (3.6, 1.3, "weights =\nsoftmax(Q Kᵀ / √16)\n(B, 20, 249)", BOTH),
        "o": (5.3, 0.4, "weights × V\n(B, 20, 16)", AUDIO),
        "n": (6.7, 1.3, "Norm", AUDIO),
        "f": (7.9, 0.4, f"16 → {width} → 16\nfeed-forward", AUDIO),
        "p": (9.1, 1.3, "add, Norm", AUDIO),
        "x": (10.5, 1.3, "CMT(A→T)\n(B, 20, 16)", AUDIO),
    }
    arrows = [
        ("text", "q", "", TEXT),
        ("audio", "k", "", AUDIO),
        ("audio", "v", "", AUDIO),
        ("q", "w", "", TEXT),
        ("k", "w", "", AUDIO),
        ("w", "o", "", BOTH),
        ("v", "o", "", AUDIO),
        ("o", "n", "", AUDIO),
        ("n", "f", "", AUDIO),
        ("n", "p", "", AUDIO),
        ("f", "p", "", AUDIO),
        ("p", "x", "", AUDIO),
    ]
    draw(ax, boxes, arrows)
    bend = {"arrowstyle": "-|>", "mutation_scale": 18, "linewidth": 1.8, "color": TEXT}
    bend.update({"connectionstyle": "arc3,rad=-0.18", "linestyle": "--"})
    ax.annotate("", (6.7, 1.5), (0.3, 2.25), arrowprops=bend)
    words = "the residual of a vanilla block: our CMT leaves it out [A7]"
    ax.text(3.9, 2.85, words, color=TEXT, ha="center")
    ax.set(xlim=(-0.7, 11.2), ylim=(-0.9, 3.1))
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw Figures 1 to 3.")
    parser.add_argument("dir", type=Path, metavar="DIR", help="for the pictures")
    args = parser.parse_args(arguments)
    args.dir.mkdir(parents=True, exist_ok=True)
    shapes = find_shapes()
    pictures = {
        "figure-1": draw_figure_1,
        "figure-2": draw_figure_2,
        "figure-3": draw_figure_3,
        "cmt-block": draw_cmt_block,
    }
    for name, draw_one in pictures.items():
        path = args.dir / f"{name}.png"
        draw_one(shapes, path)
        print(path)


if __name__ == "__main__":
    data.run_command(main)
