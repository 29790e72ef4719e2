"""The scripts of the course run, and their numbers and pictures are right."""

import math
import re
import shutil

import pytest
import torch

import data
import evaluate
import model
import train
from tests.conftest import ROOT
from tests.course import figures, first_hour, pictures, trace

# --- The first hour -------------------------------------------------------------------


def test_the_first_hour_shows_every_tensor_and_its_loss_is_right(monkeypatch, capsys):
    tensors = {}
    show = first_hour.show

    def keep(name, x, meaning):
        tensors[name] = x.detach().clone()
        show(name, x, meaning)

    monkeypatch.setattr(first_hour, "show", keep)
    first_hour.main()
    shapes = {
        "audio": (15, 3, 8),
        "text": (22, 3, 8),
        "text_mask": (3, 3, 5),
        "gates": (3, 3),
        "condensed": (15, 8),
        "X_A": (3, 6, 4),
        "each": (3, 3, 5, 4),
        "X_T": (3, 5, 4),
        "weights": (3, 5, 6),
        "CMT A->T": (3, 5, 4),
        "CMT T->A": (3, 6, 4),
        "pooled": (3, 8),
        "logits": (3, 4),
        "loss": (),
    }
    assert {name: tuple(tensors[name].shape) for name in shapes} == shapes
    lengths = tensors["text_mask"].sum(dim=2).tolist()
    assert lengths == [[0, 5, 2], [5, 2, 3], [2, 3, 0]]
    # The pieces give what the whole model gives.
    torch.testing.assert_close(tensors["in one call"], tensors["logits"])
    torch.testing.assert_close(tensors["by hand"], tensors["loss"])
    assert tensors["loss after"] < tensors["loss"]
    step = tensors["step"].abs()
    torch.testing.assert_close(step, torch.full((3,), 1e-3), rtol=0.01, atol=0)
    out = capsys.readouterr().out
    assert re.search("^row sums .* 1.000 1.000 1.000 1.000 ", out, re.MULTILINE)
    zeros = re.search(r"\d+ of \d+ weights", out)[0]
    answers = ROOT / "tests" / "course" / "ANSWERS.md"
    assert zeros in answers.read_text(encoding="utf-8")


# --- The trace, by hand: without torch and without model.py ---------------------------


def norm(v):
    mean = sum(v) / len(v)
    sd = math.sqrt(sum((a - mean) ** 2 for a in v) / len(v))
    return [(a - mean) / sd for a in v]


def softmax(v):
    return [math.exp(a) / sum(math.exp(b) for b in v) for a in v]


def dot(a, b):
    return sum(map(math.prod, zip(a, b, strict=True)))


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def feature(steps):
    """Fig. 2a of steps with a pair for each layer: gates, s, W s, X."""
    z = [sum(sum(s[layer]) for s in steps) / (2 * len(steps)) for layer in (0, 1)]
    h = max(0, sum(z) / 4)
    gates = [1 / (1 + math.exp(-h)), 1 / (1 + math.exp(h))]
    summed = [[dot(gates, pair) for pair in zip(*step, strict=True)] for step in steps]
    projected = [[*v, sum(v)] for v in summed]
    return gates, summed, projected, [norm(v) for v in projected]


def cmt(target, source):
    """One path of Fig. 3d whose W_Q, W_K, W_V are 1: scores, weights, out, x, h."""
    scores = [[dot(t, s) / math.sqrt(3) for s in source] for t in target]
    weights = [softmax(row) for row in scores]
    columns = list(zip(*source, strict=True))
    out = [[dot(row, column) for column in columns] for row in weights]
    x = [norm(v) for v in out]
    return scores, weights, out, x, [norm([a, b, c + max(0, c)]) for a, b, c in x]


def test_the_trace_is_right_by_hand(capsys):
    trace.main()
    lines = capsys.readouterr().out.splitlines()

    def check(title, rows, occurrence=0):
        """Compare the lines from this title on. Their vectors start in column 63."""
        start = [k for k, line in enumerate(lines) if title in line][occurrence]
        text = "".join(line[63:] for line in lines[start : start + len(rows)])
        vectors = [v.split() for v in re.findall(r"\((.*?)\)", text)]
        expected = [vector for row in rows for vector in row]
        assert len(vectors) == len(expected)
        for found, vector in zip(vectors, expected, strict=True):
            assert [float(v) for v in found] == pytest.approx(vector, abs=1e-3), title

    def column(vectors):
        return [[vector] for vector in vectors]  # one vector in each line

    # Fig. 2a. The squeeze is 2 and 2, so h is 1. The third place is padding.
    gates, s, projected, x_a = feature([((1, 3), (0, 2)), ((3, 1), (2, 4))])
    check("squeeze", [[[2, 2]]])
    check("h = ReLU", [[[1]]])
    check("gates = ", [[gates]])
    check("s = gate_1", column(s))
    check("W s = (s1", column(projected))
    check("X_A = ", column([*x_a, [0, 0, 0]]))

    # Fig. 2b. The last text has one token less than the others.
    before = feature([((1, 1), (0, 2)), ((2, 0), (1, 1))])
    target = feature([((0, 1), (1, 2)), ((4, 0), (2, 2))])
    after = feature([((2, 2), (0, 0))])
    check("gates of the three", column([before[0], target[0], after[0]]))
    maps = [before[3], target[3], [*after[3], [0, 0, 0]]]
    check("each text through", maps)
    x_t = []
    for a, b, c in zip(*maps, strict=True):
        x_t.append([a[i] / 2 + b[i] + c[i] / 2 for i in range(3)])
    check("X_T = ", column(x_t))
    assert any("[A5]" in line and "(True True)" in line for line in lines)

    # Fig. 3d. Padding of the source has a score and no weight.
    pooled = []
    for path, (q, k) in enumerate([(x_t, x_a), (x_a, x_t)]):
        scores, weights, out, x, h = cmt(q, k)
        padding = [0] if path == 0 else []
        check("Q K^T", column([row + padding for row in scores]), path)
        check("softmax over", column([row + padding for row in weights]), path)
        check("times V", column(out), path)
        check("x = Norm", column(x), path)
        check("Norm(x +", column(h), path)
        pooled.append(mean(h))
        check("mean over the target", [[pooled[-1]]], path)

    u = [max(0, a + b) for a, b in zip(*pooled, strict=True)]
    logits = [*u, -sum(u)]
    check("u = ReLU", [[u]])
    check("logits = ", [[logits]])
    check("softmax: neu", [[softmax(logits)]])


# --- Pictures -------------------------------------------------------------------------


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
    names = [f"figure-{number}.png" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.iterdir())


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
        assert "Sys. 18 (MMT fine-tuned), fold 5, seed 0\ntrained on toy" in title
        assert "no speech" in title
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
