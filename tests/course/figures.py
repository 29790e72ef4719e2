"""Draw Figures 1 to 3 with the names and shapes of the code, for slides.

    python -m tests.course.figures DIR     needs matplotlib

    figure-1.png    the unimodal and the multimodal framework
    figure-2.png    the feature extractors
    figure-3.png    the nine fusions: who asks (Q), and who answers (K, V)
    cmt-block.png   the inside of a cross-modal Transformer, CMT

The shapes are those of clips of 5 s and texts of 20 tokens, at the size of WavLM-Large
and BERT-base. B is the number of utterances, and N is the number of their real time
steps.
"""

import argparse
from pathlib import Path

import data
from data import InputError
from evaluate import TABLE_1
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


def draw(ax, boxes: dict[str, tuple], arrows: list[str]) -> None:
    """Draw boxes, and arrows in the colours of the boxes where they start.

    boxes    {name: (x, y, text, colour)}
    arrows   names of boxes that are connected, "a b c", or with a label, "a b: Q"
    """
    drawn = {}
    for name, (x, y, text, colour) in boxes.items():
        style = {"boxstyle": "round,pad=0.4", "facecolor": FILLS[colour]}
        style["edgecolor"] = colour
        drawn[name] = ax.text(x, y, text, ha="center", va="center", bbox=style)
    white = {"boxstyle": "round,pad=0.1", "facecolor": "w", "edgecolor": "w"}
    for chain in arrows:
        names, _, label = chain.partition(": ")
        names = names.split()
        for start, end in zip(names, names[1:], strict=False):
            x1, y1, _, colour = boxes[start]
            x2, y2, _, _ = boxes[end]
            style = {"arrowstyle": "-|>", "mutation_scale": 18, "linewidth": 1.8}
            style["color"] = colour
            style["patchA"] = drawn[start].get_bbox_patch()
            style["patchB"] = drawn[end].get_bbox_patch()
            ax.annotate("", (x2, y2), (x1, y1), arrowprops=style)
            if label:
                # A third of the way, so that labels of crossing arrows do not meet.
                x = x1 + 0.36 * (x2 - x1)
                y = y1 + 0.36 * (y2 - y1)
                middle = {"ha": "center", "va": "center", "bbox": white}
                ax.text(x, y, label, color=colour, **middle)
    ax.axis("off")


def draw_figure_1(path: Path) -> None:
    """Draw Fig. 1: the unimodal and the multimodal framework."""
    title = "Fig. 1: emotion from one modality (above), or from two (below)"
    figure = new_figure(13, 7, title)
    ax = figure.subplots()
    boxes = {
        # one modality
        "waveforms": (0, 2.9, "waveforms", AUDIO),
        "encoder": (1.7, 2.9, "WavLM", AUDIO),
        "extractor": (3.4, 2.9, "Feature\nExtractor\nX_A (B, 249, 16)", AUDIO),
        "pooling": (5.6, 2.9, "pooling,\nclassifier", AUDIO),
        "answer": (7.2, 2.9, "logits\n(B, 4)", AUDIO),
        # two modalities
        "wav": (0, 1, "waveforms", AUDIO),
        "wavlm": (1.7, 1, "WavLM", AUDIO),
        "x_a": (3.4, 1, "Feature\nExtractor\nX_A (B, 249, 16)", AUDIO),
        "texts": (0, -1, "nine texts:\n4 before, the\ntarget, 4 after", TEXT),
        "bert": (1.7, -1, "BERT", TEXT),
        "x_t": (3.4, -1, "Text Feature\nExtractor\nX_T (B, 20, 16)", TEXT),
        "fusion": (4.9, 0, "Fusion\n(B, 32)", BOTH),
        "classifier": (6.1, 0, "classifier", BOTH),
        "logits": (7.2, 0, "logits\n(B, 4)", BOTH),
    }
    arrows = ["waveforms encoder extractor pooling answer"]
    arrows += ["wav wavlm x_a fusion classifier logits", "texts bert x_t fusion"]
    draw(ax, boxes, arrows)
    ax.set(xlim=(-0.8, 7.6), ylim=(-1.6, 3.5))
    figure.savefig(path)


def draw_figure_2(path: Path) -> None:
    """Draw Fig. 2: the feature extractors without their upstreams."""
    title = "Fig. 2: from layer states to features, for audio (above) and text (below)"
    title += "\nB utterances, which have N real time steps together"
    figure = new_figure(13, 7.5, title)
    ax = figure.subplots()
    boxes = {}
    arrows = []
    # Both modalities have the same boxes up to Project & Norm.
    for y, m, colour, states, mask, gates in [
        (3, "audio", AUDIO, "WavLM\n(N, 25, 1024)", "(B, 249)", "(B, 25)"),
        (0, "text", TEXT, "BERT\n(N, 13, 768)", "(B, 9, 20)", "(9 B, 13)"),
    ]:
        project = "Project & Norm:\ngates × layers,\nsummed; linear; norm"
        boxes[f"{m}-states"] = (0, y, f"layer states\nof {states}", colour)
        boxes[f"{m}-mask"] = (1.7, y + 1.1, f"padding mask {mask}", colour)
        boxes[f"{m}-se"] = (1.7, y, f"Squeeze &\nExcitation\ngates {gates}", colour)
        boxes[f"{m}-project"] = (3.5, y, project, colour)
        arrows += [f"{m}-states {m}-se {m}-project", f"{m}-mask {m}-se"]
    boxes["x_a"] = (5.3, 3, "X_A\n(B, 249, 16)", AUDIO)
    boxes["maps"] = (5.3, 0, "nine maps\n(B, 9, 20, 16)", TEXT)
    boxes["conv"] = (6.5, 0, "Conv2D\n9 to 1", TEXT)
    boxes["x_t"] = (7.7, 0, "X_T\n(B, 20, 16)", TEXT)
    draw(ax, boxes, [*arrows, "audio-project x_a", "text-project maps conv x_t"])
    ax.set(xlim=(-0.6, 8.2), ylim=(-0.8, 4.4))
    figure.savefig(path)


def draw_figure_3(path: Path) -> None:
    """Draw Fig. 3: the paths of the nine fusions, from FUSIONS."""
    title = "Fig. 3: the nine fusions. The target asks (Q), the source answers (K, V)"
    figure = new_figure(16, 10, title)
    features = {"audio": (0, 1, "X_A", AUDIO), "text": (0, 0, "X_T", TEXT)}
    axes = figure.subplots(3, 3).flat
    for number, (ax, name) in enumerate(zip(axes, FUSIONS, strict=True)):
        boxes = {modality: features[modality] for modality in Config(name).modalities}
        arrows = []
        for target, source in FUSIONS[name]:
            _, y, _, colour = features[target]
            path_name = f"to-{target}"
            if source is None:
                boxes[path_name] = (3, y, "mean over\ntime", colour)
                arrows.append(f"{target} {path_name}")
            elif source == target:
                boxes[path_name] = (3, y, "Transformer,\nmean", colour)
                arrows.append(f"{target} {path_name}: Q, K, V")
            else:
                cmt = f"CMT({source[0]}→{target[0]})".upper()
                boxes[path_name] = (3, y, f"{cmt},\nmean", BOTH)
                arrows.append(f"{target} {path_name}: Q")
                arrows.append(f"{source} {path_name}: K, V")
            arrows.append(f"{path_name} out")
            boxes["out"] = (5.4, y, "(B, 16)", BOTH)
        if len(FUSIONS[name]) == 2:
            boxes["out"] = (5.4, 0.5, "concatenate\n(B, 32)", BOTH)
        draw(ax, boxes, arrows)
        ax.set(xlim=(-0.6, 6.4), ylim=(-0.6, 1.6))
        system = 2 * number + 1
        model = TABLE_1[system][0].removesuffix(" frozen")
        ax.set_title(f"{name}: Sys. {system}, {system + 1} ({model})")
    figure.savefig(path)


def draw_cmt_block(path: Path) -> None:
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
    arrows += ["audio v values", "norm1 ff norm2"]
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
    pictures = {
        "figure-1.png": draw_figure_1,
        "figure-2.png": draw_figure_2,
        "figure-3.png": draw_figure_3,
        "cmt-block.png": draw_cmt_block,
    }
    for name, draw_picture in pictures.items():
        draw_picture(args.dir / name)
        print(args.dir / name)


if __name__ == "__main__":
    data.run_command(main)
