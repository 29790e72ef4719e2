"""The pictures of the course show the numbers of the code."""

import re
import shutil

import pytest
import torch

import evaluate
import model
import train
from tests.conftest import ROOT
from tests.course import figures, pictures, which_frame

# --- Figures 1 to 3 -------------------------------------------------------------------


def test_the_figures_have_the_shapes_and_paths_of_the_code(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    texts = {}
    panels = []
    draw = figures.draw

    def keep(ax, boxes, arrows):
        texts.update({name: text for name, (_, _, text, _) in boxes.items()})
        panels.append(arrows)
        draw(ax, boxes, arrows)

    monkeypatch.setattr(figures, "draw", keep)
    figures.main([str(tmp_path)])
    names = {"figure-1.png", "figure-2.png", "figure-3.png", "cmt-block.png"}
    assert {path.name for path in tmp_path.iterdir()} == names

    net = model.EmotionRecognizer(model.Config()).eval()
    audio = torch.zeros(2 * 249, 25, 1024), torch.ones(2, 249, dtype=torch.bool)
    text = torch.zeros(2 * 9 * 20, 13, 768), torch.ones(2, 9, 20, dtype=torch.bool)
    x, mask = net.features(audio, text)
    for name, tensor in {
        "x_a": x["audio"],
        "x_t": x["text"],
        "fusion": net.fusion(x, mask),
        "logits": net(audio, text),
    }.items():
        shape = ", ".join(["B", *map(str, tensor.shape[1:])])
        assert f"({shape})" in texts[name]
    # CMT(s→t) takes its queries from t (§2.2). The last panel of Fig. 3 is MMT.
    assert set(panels[-2]) == {
        "text to-text: Q",
        "audio to-text: K, V",
        "audio to-audio: Q",
        "text to-audio: K, V",
        "to-text out",
        "to-audio out",
    }


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
    early_fusion = which_frame.learn(task, "ef", 300)
    attention = which_frame.learn(task, "cmt-a2t", 300)
    torch.manual_seed(0)
    clips = task.draw(500)
    # Without looking for the word, one of three moods is right.
    assert which_frame.accuracy(early_fusion, clips) < 0.45
    assert which_frame.accuracy(attention, clips) > 0.8

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

CONTEXT = ["hate it", "oh no oh no oh"]


@pytest.fixture(scope="module")
def runs(small_corpus, tmp_path_factory):
    """Train two systems for an epoch on a small corpus that says that it is the toy."""
    root = tmp_path_factory.mktemp("pictures")
    corpus = root / "corpus"
    shutil.copytree(small_corpus, corpus)
    (corpus / "toy.json").write_text("{}")
    command = f"--iemocap {corpus} --out {root / 'runs'} --cache {root / 'cache'}"
    train.main([*command.split(), "--max-epochs=1", "--system", "16", "18"])
    (lf,) = root.glob("runs/toy/lf-*/*")
    (mmt,) = root.glob("runs/toy/mmt-*/*")
    return lf, mmt, str(next(corpus.rglob("Ses05F_impro01_M000.wav")))


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """A function that draws the pictures of a run: their figures, by file name."""
    pytest.importorskip("matplotlib")
    drawn = []
    new_figure = pictures.new_figure

    def keep(*arguments):
        drawn.append(new_figure(*arguments))
        return drawn[-1]

    def draw(run, wav):
        command = [str(run), str(tmp_path), "--wav", wav, "--text", "lovely party"]
        pictures.main([*command, "--before", *CONTEXT])
        names = sorted(path.name for path in tmp_path.iterdir())
        return dict(zip(reversed(names), drawn, strict=True))

    monkeypatch.setattr(pictures, "new_figure", keep)
    return draw


def test_the_gates_are_those_of_the_clip_and_of_the_target(runs, draw, monkeypatch):
    lf, _, wav = runs

    # The only clip has the gates 0.1. Text 4 of 0 to 8, the target, has the gates 0.5.
    def number_gates(self, states, mask):
        gates = torch.arange(1, len(mask) + 1) / 10
        return gates.unsqueeze(1).expand(-1, states.shape[1])

    monkeypatch.setattr(model.SqueezeExcitation, "forward", number_gates)
    drawn = draw(lf, wav)
    # Late fusion has no cross-modal block, so it has no attention.png.
    assert list(drawn) == ["gates.png"]
    audio, text = drawn["gates.png"].axes[0].lines
    assert (audio.get_label(), text.get_label()) == ("audio", "text")
    assert audio.get_ydata().tolist() == pytest.approx([0.1, 0.1])
    assert text.get_ydata().tolist() == pytest.approx([0.5, 0.5])


def test_the_attention_is_that_of_both_blocks_over_tokens_and_frames(runs, draw):
    _, mmt, wav = runs
    drawn = draw(mmt, wav)
    assert list(drawn) == ["gates.png", "attention.png"]
    for figure in drawn.values():
        title = figure.get_suptitle()
        assert "Toy corpus (tones, no speech), system 18 (MMT, fine-tuned)" in title
        assert title.endswith("max_epochs=1, fold 5, seed 0")
    a_to_t, t_to_a = [ax for ax in drawn["attention.png"].axes if ax.get_title()]
    assert "token (row) sum to 1" in a_to_t.get_title()
    assert "frame (column) sum to 1" in t_to_a.get_title()
    labels = [label.get_text() for label in a_to_t.get_yticklabels()]
    context = ["(context)"] * 3  # its longest text has three tokens more
    assert labels == ["[CLS]", "lovely", "party", "[SEP]", *context]

    recognizer = evaluate.Recognizer(mmt)
    with torch.no_grad():
        inputs = recognizer.inputs(wav, "lovely party", CONTEXT, [])
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
