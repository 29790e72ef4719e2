"""Draw Fig. 3 and the inside of its blocks, with the names of the code, for slides.

    python -m tests.course.figures DIR     needs matplotlib

    figure-3.png    the nine fusions: who asks (Q), and who answers (K, V)
    cmt-block.png   the inside of a cross-modal Transformer, CMT

The shapes are those of clips of 5 s and texts of 20 tokens. B is the number of
utterances.
"""

import argparse
from pathlib import Path

import data
from data import InputError
from model import FUSIONS, Config

# One look for all pictures of the course: blue is audio, orange is text, grey is both.
AUDIO = "#2b5d8c"
TEXT = "#b35900"
BOTH = "#444444"
COLOURS = {"audio": AUDIO, "text": TEXT}
FILLS = {AUDIO: "#dbe8f6", TEXT: "#fdebd3", BOTH: "#eeeeee"}


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


def save(figures: dict, folder: Path) -> None:
    """Save figures by the names of their files, and print their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / name)
        print(folder / name)


def draw(ax, boxes: dict[str, tuple], arrows: list[str]) -> None:
    """Draw boxes, and arrows in the colours of the boxes where they start.

    boxes    {name: (x, y, text, colour)}
    arrows   names of boxes that are connected, "a b c", or with a label, "a b: Q"
    """
    middle = {"ha": "center", "va": "center"}
    drawn = {}
    for name, (x, y, text, colour) in boxes.items():
        style = {"boxstyle": "round,pad=0.4", "facecolor": FILLS[colour]}
        style["edgecolor"] = colour
        drawn[name] = ax.text(x, y, text, bbox=style, **middle).get_bbox_patch()
    for chain in arrows:
        names, _, label = chain.partition(": ")
        names = names.split()
        for start, end in zip(names, names[1:], strict=False):
            x1, y1, _, colour = boxes[start]
            x2, y2, *_ = boxes[end]
            style = {"arrowstyle": "-|>", "mutation_scale": 18, "linewidth": 1.8}
            style.update(color=colour, patchA=drawn[start], patchB=drawn[end])
            ax.annotate("", (x2, y2), (x1, y1), arrowprops=style)
            # A third of the way, so that labels of crossing arrows do not meet.
            x, y = x1 + 0.36 * (x2 - x1), y1 + 0.36 * (y2 - y1)
            ax.text(x, y, label, color=colour, backgroundcolor="w", **middle)
    ax.axis("off")


def draw_figure_3():
    """Draw Fig. 3: the paths of the nine fusions, from FUSIONS."""
    title = "Fig. 3: the nine fusions. The target asks (Q), the source answers (K, V)"
    figure = new_figure(16, 10, title)
    axes = figure.subplots(3, 3).flat
    for number, (ax, name) in enumerate(zip(axes, FUSIONS, strict=True)):
        features = {"audio": (0, 1, "X_A", AUDIO), "text": (0, 0, "X_T", TEXT)}
        boxes = {modality: features[modality] for modality in Config(name).modalities}
        boxes["out"] = (5.4, 0.5, f"(B, {16 * len(FUSIONS[name])})", BOTH)
        arrows = []
        for target, source in FUSIONS[name]:
            _, y, _, colour = features[target]
            end = f"to-{target}"
            arrows.append(f"{end} out")
            if source is None:
                boxes[end] = (3, y, "mean over\ntime", colour)
                arrows.append(f"{target} {end}")
            elif source == target:
                boxes[end] = (3, y, "Transformer,\nmean", colour)
                arrows.append(f"{target} {end}: Q, K, V")
            else:
                cmt = f"CMT({source[0]}→{target[0]})".upper()
                boxes[end] = (3, y, f"{cmt},\nmean", BOTH)
                arrows += [f"{target} {end}: Q", f"{source} {end}: K, V"]
        draw(ax, boxes, arrows)
        ax.set(xlim=(-0.8, 6.2), ylim=(-0.8, 1.8))
        ax.set_title(f"{name}: Sys. {2 * number + 1}, {2 * number + 2}")
    return figure


def draw_cmt_block():
    """Draw the inside of CMT(A→T), as TransformerBlock computes it."""
    title = "Inside CMT(A→T): the text asks, the audio answers\n"
    title += "The result is as long as the text, and made of audio (dropout not drawn)"
    figure = new_figure(14, 7, title)
    ax = figure.subplots()
    boxes = {
        "text": (0, 2, "target X_T\n(B, 20, 16)", TEXT),
        "audio": (0, 0, "source X_A\n(B, 249, 16)", AUDIO),
        "q": (1.7, 2, "Q = X_T W_Q", TEXT),
        "k": (1.7, 0.55, "K = X_A W_K", AUDIO),
        "v": (1.7, -0.55, "V = X_A W_V", AUDIO),
        "weights": (3.6, 1.3, "weights =\nsoftmax(Q Kᵀ / √16)\n(B, 20, 249)", BOTH),
        "values": (5.3, 0.4, "weights × V\n(B, 20, 16)", AUDIO),
        "norm1": (6.7, 1.3, "Norm", AUDIO),
        "ff": (7.9, 0.4, "16 → 64 → 16\nfeed-forward", AUDIO),
        "norm2": (9.1, 1.3, "add, Norm", AUDIO),
        "out": (10.5, 1.3, "CMT(A→T)\n(B, 20, 16)", AUDIO),
    }
    arrows = ["text q weights values norm1 norm2 out", "audio k weights"]
    draw(ax, boxes, [*arrows, "audio v values", "norm1 ff norm2"])
    ax.set(xlim=(-0.8, 11.3), ylim=(-1, 2.9))
    bend = {"arrowstyle": "-|>", "mutation_scale": 18, "linewidth": 1.8, "color": TEXT}
    bend.update(connectionstyle="arc3,rad=-0.18", linestyle="--")
    ax.annotate("", (6.7, 1.5), (0.3, 2.25), arrowprops=bend)
    words = "the residual of a vanilla block: our CMT leaves it out [A7]"
    ax.text(3.9, 2.6, words, color=TEXT, ha="center")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw Fig. 3 and a CMT block.")
    parser.add_argument("dir", type=Path, metavar="DIR", help="for the pictures")
    args = parser.parse_args(arguments)
    figures = {"figure-3.png": draw_figure_3(), "cmt-block.png": draw_cmt_block()}
    save(figures, args.dir)


if __name__ == "__main__":
    data.run_command(main)
