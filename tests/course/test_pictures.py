"""The pictures of the course show the numbers of the code."""

import re
import shutil

import pytest
import torch

import data
import evaluate
import model
import train
from tests.conftest import ROOT
from tests.course import figures, pictures, which_frame

# --- Figures 1 to 3 -------------------------------------------------------------------


def test_the_figures_have_the_shapes_of_the_code(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    shapes = figures.find_shapes()
    assert shapes["extractor.audio"] == "(B, 249, 16)"
    assert shapes["extractor.text"] == "(B, 20, 16)"
    assert shapes["extractor.audio.se"] == "(B, 25)"
    assert shapes["extractor.text.each_text.se"] == "(9 B, 13)"
    assert shapes["fusion"] == "(B, 32)"
    assert shapes[""] == "(B, 4)"
    figures.main([str(tmp_path)])
    names = {"figure-1.png", "figure-2.png", "figure-3.png", "cmt-block.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.iterdir())


def test_queries_and_keys_cross_in_figure_3(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    arrows = []
    monkeypatch.setattr(figures, "draw", lambda ax, boxes, some: arrows.append(some))
    figures.draw_figure_3({}, tmp_path / "figure-3.png")
    # CMT(s→t) takes its queries from t (§2.2). The last panel is MMT.
    ends = {(start, end, label) for start, end, label, _ in arrows[-1]}
    assert ends == {
        ("text", "block text", "Q"),
        ("audio", "block text", "K, V"),
        ("audio", "block audio", "Q"),
        ("text", "block audio", "K, V"),
        ("block text", "out", ""),
        ("block audio", "out", ""),
    }


# --- Which frame? ---------------------------------------------------------------------


def test_the_mood_of_the_asked_word_is_the_answer():
    torch.manual_seed(0)
    clips = which_frame.Task().draw(200)
    frames = zip(clips["spoken"].tolist(), clips["mood"].tolist(), strict=True)
    answers = zip(clips["asked"].tolist(), clips["label"].tolist(), strict=True)
    for (spoken, moods), (asked, label) in zip(frames, answers, strict=True):
        found = {(s, m) for s, m in zip(spoken, moods, strict=True) if s >= 0}
        # Three words, three moods: each of the moods is right for one question.
        assert len(found) == len({mood for _, mood in found}) == 3
        assert (asked, label) in found
        for word, _ in found:
            assert 3 <= spoken.count(word) <= 5


@pytest.fixture(scope="module")
def listeners():
    task = which_frame.Task()
    trained = {name: which_frame.learn(task, name, 300) for name in ("ef", "cmt-a2t")}
    torch.manual_seed(0)
    return trained, task.draw(500)


def test_only_attention_finds_the_asked_word(listeners):
    trained, clips = listeners
    # Without looking for the word, one of three moods is right.
    assert which_frame.accuracy(trained["ef"], clips) < 0.45
    assert which_frame.accuracy(trained["cmt-a2t"], clips) > 0.8


def test_the_share_is_the_weight_on_the_frames_of_the_asked_word(listeners):
    trained, clips = listeners
    block = trained["cmt-a2t"].fusion.blocks["audio-to-text"]
    weights = which_frame.look(block, clips)
    share = which_frame.share_on_asked(weights, clips)
    total = 0.0
    for row, word in enumerate(clips["asked"].tolist()):
        q = clips["text"][row, 2] @ block.w_q
        k = clips["audio"][row] @ block.w_k
        by_hand = (k @ q / 4).softmax(dim=0)  # sqrt(16) is 4
        for frame, spoken in enumerate(clips["spoken"][row].tolist()):
            total += by_hand[frame].item() * (spoken == word)
    assert share == pytest.approx(total / 500, abs=1e-4)
    # Four of 24 frames say the word, so equal weights would give a sixth.
    assert share > 0.5


def test_which_frame_writes_its_picture(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(which_frame, "N_STEPS", 2)
    which_frame.main([str(tmp_path)])
    assert (tmp_path / "which-frame.png").read_bytes()[:4] == b"\x89PNG"
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("made-up task: ") for line in lines) == 5


# --- Gates and attention of a run -----------------------------------------------------


@pytest.fixture(scope="module")
def runs(small_corpus, tmp_path_factory):
    """Train two systems for an epoch on a small corpus that says that it is the toy."""
    root = tmp_path_factory.mktemp("pictures")
    corpus = root / "corpus"
    shutil.copytree(small_corpus, corpus)
    (corpus / "toy.json").write_text("{}")
    command = f"--iemocap {corpus} --out {root / 'runs'} --cache {root / 'cache'}"
    train.main([*command.split(), "--max-epochs=1", "--system", "16", "18"])
    folders = {}
    for path in root.rglob("result.json"):
        fusion = path.parent.parent.name.partition("-")[0]
        folders[fusion] = path.parent
    wav = next(corpus.rglob("Ses05F_impro01_M000.wav"))
    return folders, wav


@pytest.fixture
def drawn(monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    new_figure = pictures.new_figure

    def keep(*arguments):
        drawn.append(new_figure(*arguments))
        return drawn[-1]

    monkeypatch.setattr(pictures, "new_figure", keep)
    return drawn


WORDS = "lovely party"
CONTEXT = ["hate it", "oh no oh no oh"]


def draw(run, wav, folder):
    command = [str(run), str(folder), "--wav", str(wav), "--text", WORDS]
    pictures.main([*command, "--before", *CONTEXT])
    return sorted(path.name for path in folder.iterdir())


def test_the_gates_are_those_of_the_utterance(runs, drawn, tmp_path, monkeypatch):
    folders, wav = runs
    # Late fusion has no cross-modal block, so it has no attention.png.
    assert draw(folders["lf"], wav, tmp_path) == ["gates.png"]
    (ax,) = drawn[0].axes
    assert [line.get_label() for line in ax.lines] == ["audio", "text"]
    recognizer = evaluate.Recognizer(folders["lf"])
    upstream = recognizer.upstreams["audio"]
    clip = data.clip(data.load_wav(wav))
    z = upstream([upstream.prepare(clip)])[0].mean(dim=(0, 2))  # (L,)
    se = recognizer.model.extractor["audio"].se
    hidden = (se.reduce.weight @ z + se.reduce.bias).clamp(min=0)
    gates = 1 / (1 + torch.exp(-(se.expand.weight @ hidden + se.expand.bias)))
    found = ax.lines[0].get_ydata().tolist()
    assert found == pytest.approx(gates.tolist(), abs=1e-6)

    # The tiny BERT gives all texts the same gates. These are 0.4 for text 4 of 0 to 8.
    def number_gates(self, states, mask):
        return torch.arange(len(mask)).unsqueeze(1) / 10 + torch.zeros(states.shape[1])

    monkeypatch.setattr(model.SqueezeExcitation, "forward", number_gates)
    draw(folders["lf"], wav, tmp_path)
    (ax,) = drawn[1].axes
    assert ax.lines[1].get_ydata().tolist() == pytest.approx([0.4, 0.4])


def test_the_attention_is_that_of_both_blocks_over_tokens_and_frames(
    runs, drawn, tmp_path
):
    folders, wav = runs
    names = draw(folders["mmt"], wav, tmp_path)
    assert names == ["attention.png", "gates.png"]
    for figure in drawn:
        title = figure.get_suptitle()
        assert "Toy corpus (tones, no speech), system 18 (MMT, fine-tuned)" in title
        assert title.endswith("max_epochs=1, fold 5, seed 0")
    a_to_t, t_to_a = [ax for ax in drawn[1].axes if ax.get_title()]
    labels = [label.get_text() for label in a_to_t.get_yticklabels()]
    context = ["(context)"] * 3  # its longest text has three tokens more
    assert labels == ["[CLS]", "lovely", "party", "[SEP]", *context]

    recognizer = evaluate.Recognizer(folders["mmt"])
    inputs = recognizer.inputs(wav, WORDS, CONTEXT, [])
    with torch.no_grad():
        x, _ = recognizer.model.features(**inputs)
        for ax, target, source in [
            (a_to_t, "text", "audio"),
            (t_to_a, "audio", "text"),
        ]:
            block = recognizer.model.fusion.blocks[f"{source}-to-{target}"]
            q = x[target][0] @ block.w_q
            k = x[source][0] @ block.w_k
            weights = (q @ k.T / 4).softmax(dim=1)  # sqrt(16) is 4
            if target == "audio":
                weights = weights.T
            image = ax.images[0].get_array()
            assert image.shape == (7, x["audio"].shape[1])
            assert torch.allclose(torch.tensor(image), weights, atol=1e-6)
    assert "token (row) sum to 1" in a_to_t.get_title()
    assert "frame (column) sum to 1" in t_to_a.get_title()


# --- The class on attention -----------------------------------------------------------


def test_exercise_a_of_the_class_is_right_with_its_answer(capsys):
    page = (ROOT / "tests" / "course" / "class-attention.md").read_text("utf-8")
    start, answer = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(start, {})
    exec(start.replace("    return x_t\n", answer), {})
    assert capsys.readouterr().out == "not yet\nright\n"
