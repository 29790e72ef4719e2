"""The pictures of the course show the numbers of the code."""

import re
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import model
from model import Config, EmotionRecognizer
from tests.conftest import ROOT
from tests.course import figures, pictures, which_frame


@pytest.fixture
def saved(monkeypatch):
    """The figures by file name, in place of files."""
    matplotlib = pytest.importorskip("matplotlib.figure")
    figures = {}

    def keep(figure, path):
        figures[path.name] = figure

    monkeypatch.setattr(matplotlib.Figure, "savefig", keep)
    return figures


def test_the_figures_are_drawn_with_the_paths_of_the_code(tmp_path, saved, monkeypatch):
    spy = Mock(wraps=figures.draw)
    monkeypatch.setattr(figures, "draw", spy)
    figures.main([str(tmp_path)])
    assert list(saved) == ["figure-3.png", "cmt-block.png"]
    # CMT(s→t) takes its queries from t (§2.2). The last panel of Fig. 3 is MMT.
    _, _, arrows = spy.call_args_list[-2].args
    to_text = ["to-text out", "text to-text: Q", "audio to-text: K, V"]
    to_audio = ["to-audio out", "audio to-audio: Q", "text to-audio: K, V"]
    assert arrows == to_text + to_audio


def test_only_attention_finds_the_word_whose_mood_is_the_answer():
    early_fusion = which_frame.learn("ef", 100)
    attention = which_frame.learn("cmt-a2t", 100)
    torch.manual_seed(0)
    clips = which_frame.draw_clips(500)
    frames = clips["spoken"] == clips["asked"].unsqueeze(1)  # (500, 24)
    answers = clips["label"].unsqueeze(1).expand(500, 24)
    assert torch.equal(clips["mood"][frames], answers[frames])
    # Three words have three moods. Without looking for the word, one of them is right.
    assert all(len(moods.unique()) == 1 + 3 for moods in clips["mood"])  # -1 is silence
    assert which_frame.accuracy(early_fusion, clips) < 0.45
    assert which_frame.accuracy(attention, clips) > 0.75
    # Four of 24 frames say the word, so equal weights would give a sixth.
    assert which_frame.weight_on_asked(attention, clips) > 0.5


def test_which_frame_draws_and_prints(tmp_path, monkeypatch, capsys, saved):
    monkeypatch.setattr(which_frame, "N_STEPS", 2)
    which_frame.main([str(tmp_path)])
    assert list(saved) == ["which-frame.png"]
    assert capsys.readouterr().out.count("made-up task: ") == 5


@pytest.fixture
def draw(tiny, tmp_path, monkeypatch, saved):
    """A function that draws an untrained model. Returns the model and its inputs."""

    def draw(fusion):
        torch.manual_seed(0)
        net = EmotionRecognizer(Config(fusion, 2, 48, 2, 48)).eval()
        audio = torch.randn(6, 2, 48), torch.ones(1, 6, dtype=torch.bool)
        # Of the nine texts, number 3 has 7 tokens, and number 4, the target, has 4.
        lengths = torch.tensor([0, 0, 0, 7, 4, 0, 0, 0, 0])
        text = torch.randn(11, 2, 48), torch.arange(7) < lengths.view(1, 9, 1)
        inputs = {"audio": audio, "text": text}
        config = {"title": "toy, x=1", "system": 18, "fold": 5, "seed": 0}
        recognizer = SimpleNamespace(
            run=SimpleNamespace(config=config),
            model=net,
            upstreams=tiny,
            inputs=lambda wav, text, before, after: inputs,
        )
        monkeypatch.setattr(pictures, "Recognizer", lambda folder: recognizer)
        pictures.main(["RUN", str(tmp_path), "--text", "lovely party"])
        return net, inputs

    return draw


def test_the_gates_are_those_of_the_clip_and_of_the_target(draw, saved, monkeypatch):
    # The only clip has the gates 0.1. Text 4 of 0 to 8, the target, has the gates 0.5.
    def number_gates(self, states, mask):
        return torch.arange(1, len(mask) + 1).unsqueeze(1).expand(-1, 2) / 10

    monkeypatch.setattr(model.SqueezeExcitation, "forward", number_gates)
    draw("lf")
    # Late fusion has no cross-modal block, so it has no attention.png.
    assert list(saved) == ["gates.png"]
    audio, text = saved["gates.png"].axes[0].lines
    assert (audio.get_label(), text.get_label()) == ("audio", "text")
    assert audio.get_ydata().tolist() == pytest.approx([0.1, 0.1])
    assert text.get_ydata().tolist() == pytest.approx([0.5, 0.5])


@torch.no_grad()
def test_the_attention_is_that_of_both_blocks_over_tokens_and_frames(draw, saved):
    net, inputs = draw("mmt")
    figure = saved["attention.png"]
    assert figure.get_suptitle().endswith("toy, x=1, Sys. 18, fold 5, seed 0")
    a_to_t, t_to_a = [ax for ax in figure.axes if ax.get_title()]
    labels = [label.get_text() for label in a_to_t.get_yticklabels()]
    context = ["(context)"] * 3  # its longest text has three tokens more
    assert labels == ["[CLS]", "lovely", "party", "[SEP]", *context]

    x_t, _ = net.extractor["text"](*inputs["text"])
    x_a = net.extractor["audio"](*inputs["audio"])
    block = net.fusion.blocks["audio-to-text"]
    scores = (x_t[0] @ block.w_q) @ (x_a[0] @ block.w_k).T / 4  # sqrt(16) is 4
    image = torch.tensor(a_to_t.images[0].get_array())
    torch.testing.assert_close(image, scores.softmax(dim=1), atol=1e-6, rtol=0)
    # In the other panel, the weights of a frame (a column) sum to 1.
    image = torch.tensor(t_to_a.images[0].get_array())
    torch.testing.assert_close(image.sum(dim=0), torch.ones(6))


def test_exercise_a_of_the_class_is_right_with_its_answer(capsys):
    page = (ROOT / "tests" / "course" / "class-attention.md").read_text("utf-8")
    start, answer = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(start, {})
    exec(start.replace("    return x_t\n", answer), {})
    assert capsys.readouterr().out == "not yet\nright\n"
