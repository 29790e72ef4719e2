"""Figures for slides, drawn from the code: Figures 1 to 3 with our names and shapes, and one on loss.

    python tests/figures.py DIR                          Figures 1, 2 and 3 (needs matplotlib)
    python tests/figures.py DIR --runs RUN [RUN ...]     the development loss of these runs, in one picture

The shapes are read off a real forward pass at full size on torch's meta device, which costs nothing.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import TABLE_1, figure, read_run, system_number
from model import FUSIONS, Config, EmotionRecognizer

BOX = dict(boxstyle="round,pad=0.45", facecolor="#dbe8f6", edgecolor="#2b5d8c")
DATA = dict(boxstyle="square,pad=0.35", facecolor="#f4f0e4", edgecolor="#9a8c5c")


def shapes():
    """Run MMT at full size without memory: {block: shape of what it returns}."""
    with torch.device("meta"):
        net = EmotionRecognizer(Config())
        audio = torch.empty(32, 249, 25, 1024), torch.ones(32, 249, dtype=torch.bool)
        text = torch.empty(200, 20, 13, 768), torch.ones(200, 20, dtype=torch.bool)
        context = torch.zeros(32, 9, dtype=torch.long)
    found = {}
    for name, module in net.named_modules():
        module.register_forward_hook(
            lambda module, given, x, name=name: found.update({name: tuple((x[0] if isinstance(x, tuple) else x).shape)})
        )
    net(audio, (*text, context))
    return found


def draw(ax, boxes, arrows):
    """Draw boxes {name: (x, y, text, style)} and arrows (from, to) on an empty axis."""
    drawn = {name: ax.text(x, y, text, ha="center", va="center", bbox=style, fontsize=11)
             for name, (x, y, text, style) in boxes.items()}  # fmt: skip
    for a, b in arrows:
        ends = dict(patchA=drawn[a].get_bbox_patch(), patchB=drawn[b].get_bbox_patch())
        ax.annotate("", drawn[b].get_position(), drawn[a].get_position(),
                    arrowprops=dict(arrowstyle="-|>", color="#444444", shrinkA=2, shrinkB=2, **ends))  # fmt: skip
    ax.set(xlim=(-0.9, 6.9), ylim=(-0.8, 1.8))
    ax.axis("off")


def figure_1(folder, s):
    fig = figure(11, 3.8, "Fig. 1: unimodal (audio, above) and multimodal (below), with the names of the code")
    top, bottom = fig.subplots(2, 1)
    draw(top, {
        "in": (0, 0.5, "waveforms", DATA), "up": (1.7, 0.5, "Upstream\n(WavLM)", BOX),
        "fe": (3.4, 0.5, "FeatureExtractor\nX_A " + str(s["extractor.audio"]), BOX),
        "c": (5.1, 0.5, "pooling and\nclassifier", BOX), "out": (6.4, 0.5, "logits\n" + str(s[""]), DATA),
    }, [("in", "up"), ("up", "fe"), ("fe", "c"), ("c", "out")])  # fmt: skip
    draw(bottom, {
        "a": (0, 1.2, "waveforms", DATA), "ua": (1.5, 1.2, "Upstream\n(WavLM)", BOX),
        "fa": (3.2, 1.2, "FeatureExtractor\nX_A " + str(s["extractor.audio"]), BOX),
        "t": (0, -0.2, "nine texts\n[..., Text -1, Text 0, Text 1, ...]", DATA), "ut": (1.5, -0.2, "Upstream\n(BERT)", BOX),
        "ft": (3.2, -0.2, "TextFeatureExtractor\nX_T " + str(s["extractor.text"]), BOX),
        "f": (4.8, 0.5, "Fusion\n" + str(s["fusion"]), BOX), "c": (5.8, 0.5, "classifier", BOX),
        "out": (6.6, 0.5, "logits\n" + str(s[""]), DATA),
    }, [("a", "ua"), ("ua", "fa"), ("fa", "f"), ("t", "ut"), ("ut", "ft"), ("ft", "f"), ("f", "c"), ("c", "out")])  # fmt: skip
    fig.savefig(folder / "figure-1.png")


def figure_2(folder, s):
    fig = figure(12, 4, "Fig. 2: feature extraction, acoustic (above) and textual (below), batch of 32")
    top, bottom = fig.subplots(2, 1)
    draw(top, {
        "s": (0, 0.5, "states of WavLM\n(32, 249, 25, 1024)", DATA), "m": (1.3, 1.5, "padding mask (32, 249)", DATA),
        "se": (2.4, 0.5, "SqueezeExcitation\ngates " + str(s["extractor.audio.se.expand"]), BOX),
        "p": (4.3, 0.5, "Projector\n(layers summed,\nLinear, LayerNorm)", BOX),
        "x": (6.1, 0.5, "X_A\n" + str(s["extractor.audio"]), DATA),
    }, [("s", "se"), ("m", "se"), ("se", "p"), ("p", "x")])  # fmt: skip
    draw(bottom, {
        "s": (0, 0.5, "states of BERT\n(200, 20, 13, 768)", DATA), "m": (0.9, 1.5, "padding mask (200, 20)", DATA),
        "se": (1.7, 0.5, "SqueezeExcitation\ngates " + str(s["extractor.text.se.expand"]), BOX),
        "p": (3.3, 0.5, "Projector\n" + str(s["extractor.text.projector"]), BOX),
        "c": (4.9, 0.5, "ContextConv\n9 maps to 1", BOX), "w": (4.3, 1.5, "windows (32, 9)", DATA),
        "x": (6.3, 0.5, "X_T\n" + str(s["extractor.text"]), DATA),
    }, [("s", "se"), ("m", "se"), ("se", "p"), ("p", "c"), ("w", "c"), ("c", "x")])  # fmt: skip
    fig.savefig(folder / "figure-2.png")


def figure_3(folder, s):
    fig = figure(11, 5, "Fig. 3: the nine systems are lists of paths (FUSIONS); time pooling, then concatenation")
    for ax, name in zip(fig.subplots(3, 3).flat, FUSIONS):
        boxes, arrows, paths = {}, [], FUSIONS[name]
        for k, (target, source) in enumerate(paths):
            y = 1.1 - 1.2 * k if len(paths) > 1 else 0.5
            X = {"audio": "X_A", "text": "X_T"}
            kind = "pooling" if source is None else "Transformer" if source == target else f"CMT {source[0].upper()}→{target[0].upper()}"
            asks = X[target] if source in (None, target) else f"Q: {X[target]}\nK, V: {X[source]}"
            boxes |= {f"x{k}": (0.4, y, asks, DATA), f"b{k}": (3.2, y, kind, BOX)}
            arrows += [(f"x{k}", f"b{k}"), (f"b{k}", "out")]
        boxes["out"] = (6, 0.5, f"(32, {16 * len(paths)})", DATA)
        draw(ax, boxes, arrows)
        n = system_number(name, True)
        ax.set_title(f"{name}: Sys. {n}, {n + 1} ({TABLE_1[n][0].removesuffix(' frozen')})")
    fig.savefig(folder / "figure-3.png")


def losses(folder, paths):
    """Draw the development loss of several runs over the epochs, and mark the trigger."""
    runs = [read_run(path) for path in paths]
    first = runs[0]
    fig = figure(8, 4.5, f"Development loss, {first.corpus}, {first.fusion}, fold {first.fold}, seed {first.seed}")
    ax = fig.add_subplot(xlabel="epoch", ylabel="cross-entropy on the development speaker")
    for k, run in enumerate(runs):
        log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
        label = "frozen" if run.frozen else f"--open {run.open}"
        epochs, values = [row["epoch"] for row in log], [row["dev_loss"] for row in log]
        ax.plot(epochs, values, f"C{k}", label=f"{label} (test UA {run.result['ua']:.1%})", lw=2 - 0.3 * k)
        if run.result["finetune_epoch"]:
            trigger = run.result["finetune_epoch"]
            ax.axvline(trigger + 0.5, color="#888888", ls=":", label="fine-tuning starts" if k == len(runs) - 1 else None)
    ax.legend()
    fig.savefig(folder / "development-loss.png")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dir", type=Path)
    parser.add_argument("--runs", nargs="+", type=Path, metavar="RUN")
    args = parser.parse_args(arguments)
    args.dir.mkdir(parents=True, exist_ok=True)
    if args.runs:
        losses(args.dir, args.runs)
    else:
        s = shapes()
        for make in (figure_1, figure_2, figure_3):
            make(args.dir, s)
    for name in ("development-loss",) if args.runs else ("figure-1", "figure-2", "figure-3"):
        print(args.dir / f"{name}.png")


if __name__ == "__main__":
    main()
