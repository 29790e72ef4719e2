"""Look inside a trained model: draw its gates and its attention for one utterance.

    python -m tests.course.pictures RUN DIR [--wav x.wav] [--text "..."]
        [--before "..." ...] [--after "..." ...]     needs matplotlib

    gates.png        the gates of squeeze and excitation (S&E), one for each layer
    attention.png    the weights of Eq. (1), for systems with a cross-modal Transformer

RUN is the folder of a finished run, for example runs/toy/mmt-finetuned/fold5-seed0.
"""

import argparse
from pathlib import Path

import torch

import data
from evaluate import Recognizer
from model import cross_modal_attention
from tests.course.figures import COLOURS, new_figure, save


def figure_of(recognizer: Recognizer, height: float, title: str):
    """Create a figure whose title names the run: corpus, settings, system, fold."""
    run = "{title}, Sys. {system}, fold {fold}, seed {seed}"
    return new_figure(12, height, f"{title}\n{run.format(**recognizer.run.config)}")


def draw_gates(recognizer: Recognizer, inputs: dict):
    """Draw the gates of one utterance over the layers, one line for each modality."""
    title = "How much does each layer of WavLM and BERT count? Gates of one utterance"
    figure = figure_of(recognizer, 6, title)
    ax = figure.subplots()
    ax.set(ylabel="gate (0: closed, 1: open)", ylim=(0, 1))
    ax.set_xlabel("layer (0: the input of the first Transformer layer)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    for modality, (states, mask) in inputs.items():
        extractor = recognizer.model.extractor[modality]
        if modality == "text":
            extractor = extractor.each_text
        # The texts of the window have gates of their own. The target is in the middle.
        gates = extractor.se(states, mask.flatten(0, -2))  # (1 or C, L)
        gates = gates[len(gates) // 2].numpy()
        ax.plot(gates, "o-", color=COLOURS[modality], label=modality)
    ax.legend()
    return figure


def draw_attention(recognizer: Recognizer, inputs: dict, text: str):
    """Draw the weights of Eq. (1), one panel for each cross-modal block."""
    net = recognizer.model
    x_t, x_t_mask = net.extractor["text"](*inputs["text"])
    x = {"audio": net.extractor["audio"](*inputs["audio"]), "text": x_t}
    mask = {"audio": inputs["audio"][1], "text": x_t_mask}
    upstream = recognizer.upstreams["text"]
    numbers = upstream.prepare(text).tolist()
    tokens = upstream.preprocessor.convert_ids_to_tokens(numbers)
    # X_T is as long as the longest text of the window.
    n_tokens = x["text"].shape[1]
    tokens += ["(context)"] * (n_tokens - len(tokens))
    title = "Which frames does a token attend to? Weights of Eq. (1) for one utterance"
    figure = figure_of(recognizer, 1.5 + 5 * len(net.fusion.paths), title)
    axes = figure.subplots(len(net.fusion.paths), 1, squeeze=False)[:, 0]
    for ax, (target, source) in zip(axes, net.fusion.paths, strict=True):
        block = net.fusion.blocks[f"{source}-to-{target}"]
        w = (block.w_q, block.w_k, block.w_v)
        _, weights = cross_modal_attention(x[target], x[source], *w, mask[source])
        weights = weights[0]  # (T_t, T_s)
        title = "CMT(A→T): the weights of each token (row) sum to 1"
        if target == "audio":
            title = "CMT(T→A): the weights of each frame (column) sum to 1"
            weights = weights.T  # both panels are (T_T, T_A)
        image = ax.imshow(weights.numpy(), aspect="auto", cmap="Blues", vmin=0)
        figure.colorbar(image, ax=ax, label="weight")
        every = 1 + n_tokens // 20  # at most 20 labels
        ax.set_yticks(range(0, n_tokens, every), tokens[::every])
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set(title=title, xlabel="frame, 20 ms each", ylabel="token of the text")
    return figure


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the gates and the attention.")
    parser.add_argument("run", type=Path, help="the folder of one run")
    parser.add_argument("dir", type=Path, help="for the pictures")
    parser.add_argument("--wav", type=Path, help="16-bit mono WAV")
    parser.add_argument("--text", help="its words")
    parser.add_argument("--before", nargs="+", default=[], help="texts of turns")
    parser.add_argument("--after", nargs="+", default=[], help="texts of turns")
    args = parser.parse_args(arguments)

    recognizer = Recognizer(args.run)
    inputs = recognizer.inputs(args.wav, args.text, args.before, args.after)
    figures = {"gates.png": draw_gates(recognizer, inputs)}
    paths = recognizer.model.fusion.paths
    if all(source not in (None, target) for target, source in paths):
        figures["attention.png"] = draw_attention(recognizer, inputs, args.text)
    save(figures, args.dir)


if __name__ == "__main__":
    data.run_command(main)
