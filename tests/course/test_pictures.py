"""The pictures of the course show the numbers of the code."""

import re
from types import SimpleNamespace

import pytest
import torch

from model import Config, EmotionRecognizer
from tests.conftest import ROOT
from tests.course import figures, pictures, which_frame

# --- Figures 1 to 3 -------------------------------------------------------------------


def test_the_figures_are_drawn_with_the_paths_of_the_code(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    panels = []
    draw = figures.draw

    def keep(ax, boxes, arrows):
        panels.append(set(arrows))
        draw(ax, boxes, arrows)

    monkeypatch.setattr(figures, "draw", keep)
    figures.main([str(tmp_path)])
    names = ["cmt-block.png", "figure-1.png", "figure-2.png", "figure-3.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    # CMT(s→t) takes its queries from t (§2.2). The last panel of Fig. 3 is MMT.
    to_text = {"text to-text: Q", "audio to-text: K, V", "to-text out"}
    to_audio = {"audio to-audio: Q", "text to-audio: K, V", "to-audio out"}
    assert panels[-2] == to_text | to_audio


# --- Which frame? ---------------------------------------------------------------------


def test_the_mood_of_the_asked_word_is_the_answer():
    torch.manual_seed(0)
    clips = which_frame.Task().draw(200)
    for row, word in enumerate(clips["asked"]):
        frames = clips["spoken"][row] == word
        assert 3 <= frames.sum() <= 5
        assert (clips["mood"][row, frames] == clips["label"][row]).all()
        # Each of the three moods is right for one question.
        moods = clips["mood"][row].unique().tolist()
        words = clips["spoken"][row].unique().tolist()
        assert len(moods) == len(words) == 1 + 3  # -1 is silence


def test_only_attention_finds_the_asked_word():
    task = which_frame.Task()
    early_fusion = which_frame.learn(task, "ef", 120)
    attention = which_frame.learn(task, "cmt-a2t", 120)
    torch.manual_seed(0)
    clips = task.draw(500)
    # Without looking for the word, one of three moods is right.
    assert which_frame.accuracy(early_fusion, clips) < 0.45
    assert which_frame.accuracy(attention, clips) > 0.75

    block = attention.fusion.blocks["audio-to-text"]
    total = 0.0
    for row, word in enumerate(clips["asked"].tolist()):
        q = clips["text"][row, 2] @ block.w_q
        k = clips["audio"][row] @ block.w_k
        weights = (k @ q / 4).softmax(dim=0)  # sqrt(16) is 4
        total += weights[clips["spoken"][row] == word].sum().item()
    weight = which_frame.weight_on_asked(attention, clips)
    assert weight == pytest.approx(total / 500, abs=1e-4)
    # Four of 24 frames say the word, so equal weights would give a sixth.
    assert weight > 0.5


def test_which_frame_writes_its_picture(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(which_frame, "N_STEPS", 2)
    which_frame.main([str(tmp_path)])
    assert (tmp_path / "which-frame.png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out.count("made-up task: ") == 5


# --- Gates and attention of a run -----------------------------------------------------

TEXT = "lovely party"  # 4 tokens, with [CLS] and [SEP]
# Of the nine texts, number 3 has 7 tokens, and number 4, the target, has 4.
TEXT_MASK = torch.arange(7) < torch.tensor(
    [[0], [0], [0], [7], [4], [0], [0], [0], [0]]
)


@pytest.fixture
def load(tiny):
    """A function that makes an untrained recognizer, and its inputs."""
    pytest.importorskip("matplotlib")

    def load(fusion, system):
        torch.manual_seed(0)
        config = {"title": "toy, x=1", "system": system, "fold": 5, "seed": 0}
        audio = torch.randn(6, 2, 48), torch.ones(1, 6, dtype=torch.bool)
        inputs = {"audio": audio, "text": (torch.randn(11, 2, 48), TEXT_MASK[None])}
        recognizer = SimpleNamespace(
            run=SimpleNamespace(config=config),
            model=EmotionRecognizer(Config(fusion, 2, 48, 2, 48)).eval(),
            upstreams=tiny,
            inputs=lambda wav, text, before, after: inputs,
        )
        return recognizer, inputs

    return load


@pytest.mark.parametrize(
    ("fusion", "system", "names"),
    [("lf", 16, ["gates.png"]), ("mmt", 18, ["attention.png", "gates.png"])],
)
def test_a_run_has_its_pictures(fusion, system, names, load, tmp_path, monkeypatch):
    recognizer, _ = load(fusion, system)
    monkeypatch.setattr(pictures, "Recognizer", lambda folder: recognizer)
    savefig = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(savefig, lambda figure, path: path.touch())
    pictures.main(["RUN", str(tmp_path), "--wav", "x.wav", "--text", TEXT])
    # Late fusion has no cross-modal block, so it has no attention.png.
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@torch.no_grad()
def test_the_gates_are_those_of_the_clip_and_of_the_target(load):
    recognizer, inputs = load("mmt", 18)

    # The only clip has the gates 0.1. Text 4 of 0 to 8, the target, has the gates 0.5.
    def number_gates(states, mask):
        return torch.arange(1, len(mask) + 1).unsqueeze(1).expand(-1, 2) / 10

    extractor = recognizer.model.extractor
    for owner in (extractor["audio"], extractor["text"].each_text):
        owner.se.forward = number_gates
    figure = pictures.draw_gates(recognizer, inputs)
    title = figure.get_suptitle()
    assert title.endswith("toy, x=1, Sys. 18 (MMT fine-tuned), fold 5, seed 0")
    audio, text = figure.axes[0].lines
    assert (audio.get_label(), text.get_label()) == ("audio", "text")
    assert audio.get_ydata().tolist() == pytest.approx([0.1, 0.1])
    assert text.get_ydata().tolist() == pytest.approx([0.5, 0.5])


@torch.no_grad()
def test_the_attention_is_that_of_both_blocks_over_tokens_and_frames(load):
    recognizer, inputs = load("mmt", 18)
    figure = pictures.draw_attention(recognizer, inputs, TEXT)
    a_to_t, t_to_a = [ax for ax in figure.axes if ax.get_title()]
    assert "token (row) sum to 1" in a_to_t.get_title()
    assert "frame (column) sum to 1" in t_to_a.get_title()
    labels = [label.get_text() for label in a_to_t.get_yticklabels()]
    context = ["(context)"] * 3  # its longest text has three tokens more
    assert labels == ["[CLS]", "lovely", "party", "[SEP]", *context]

    x, _ = recognizer.model.features(**inputs)
    blocks = recognizer.model.fusion.blocks
    for ax, target, source in [(a_to_t, "text", "audio"), (t_to_a, "audio", "text")]:
        q = x[target][0] @ blocks[f"{source}-to-{target}"].w_q
        k = x[source][0] @ blocks[f"{source}-to-{target}"].w_k
        weights = (q @ k.T / 4).softmax(dim=1)  # sqrt(16) is 4
        if target == "audio":
            weights = weights.T
        image = torch.tensor(ax.images[0].get_array())
        torch.testing.assert_close(image, weights, atol=1e-6, rtol=0)


# --- The class on attention -----------------------------------------------------------


def test_exercise_a_of_the_class_is_right_with_its_answer(capsys):
    page = (ROOT / "tests" / "course" / "class-attention.md").read_text("utf-8")
    start, answer = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(start, {})
    exec(start.replace("    return x_t\n", answer), {})
    assert capsys.readouterr().out == "not yet\nright\n"
