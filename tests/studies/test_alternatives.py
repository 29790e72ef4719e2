"""Every patch of alternatives.py fits, changes the result, and is what it says."""

import copy
import functools
import importlib
import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import data
import evaluate
import model
import train
from tests.studies import alternatives

MODULES = {"model": model, "data": data, "evaluate": evaluate, "train": train}
PLAIN = SimpleNamespace(**MODULES)
PATCHES = alternatives.read_patches()
PATCHED = [name for name, patch in PATCHES.items() if patch.edits]

FROZEN = "--fusion mmt --frozen --max-epochs 2"
# The first phase has a rate of 0. So the second epoch is not better than the first, and
# fine-tuning starts. It has a rate of 1, so no later epoch is better than the first.
FINETUNED = (
    "--fusion text-fc --lr-frozen 0 --lr-finetune 1 --finetune-after 1 --stop-after 2 "
    "--max-epochs 4"
)
STOPPING = "--fusion text-fc --frozen --lr-frozen 0 --finetune-after 1 --stop-after 3"
FLAGS = dict.fromkeys(PATCHED, FROZEN)
FLAGS.update(dict.fromkeys(["A9", "A10", "A11", "A12", "A21"], FINETUNED), A20=STOPPING)

# Loading from a folder takes most of the time of a small run.
load_pretrained = functools.cache(model.load_pretrained)


@functools.cache
def patched(name):
    """Import the four files with a patch, beside the real ones, which stay the same."""
    before = [(alternatives.ROOT / f"{module}.py").read_bytes() for module in MODULES]
    with pytest.MonkeyPatch.context() as monkeypatch, TemporaryDirectory() as folder:
        alternatives.write_copy([name], Path(folder))
        monkeypatch.syspath_prepend(folder)
        for module in MODULES:
            monkeypatch.delitem(sys.modules, module)
        modules = {module: importlib.import_module(module) for module in MODULES}
        assert Path(modules["train"].data.__file__).parent == Path(folder)
    assert [
        (alternatives.ROOT / f"{module}.py").read_bytes() for module in MODULES
    ] == before
    return SimpleNamespace(**modules)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, small_corpus):
    """The small corpus with tags in its texts and silence in its clips."""
    root = tmp_path_factory.mktemp("corpus") / "small"
    shutil.copytree(small_corpus, root)
    for path in root.rglob("transcriptions/*.txt"):
        path.write_text(path.read_text().replace(" oh", " [LAUGHTER]"))
    for path in root.rglob("*.wav"):
        content = path.read_bytes()
        begin = 44 + 2 * 400  # behind the header and 25 ms
        path.write_bytes(content[:begin] + bytes(1600) + content[begin + 1600 :])
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus):
    """A function that trains with some modules and flags.

    Returns the folder of the run, its log, its result, and the number of new states.
    """
    home = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(name, flags):
        modules = patched(name) if name else PLAIN
        before = list(home.glob("cache/*/*.npy"))
        out = home / f"{name} {flags}"
        fixed = ["--iemocap", str(corpus), "--partial", "--upstream", "tiny"]
        fixed += ["--device", "cpu", "--cache", str(home / "cache")]
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(modules.model, "load_pretrained", load_pretrained)
            modules.train.main([*fixed, "--out", str(out), *flags.split()])
        folder = next(out.rglob("fold5-seed0"))
        log = (folder / "log.jsonl").read_text().splitlines()
        result = json.loads((folder / "result.json").read_text())
        n_new = len(list(home.glob("cache/*/*.npy"))) - len(before)
        return folder, [json.loads(line) for line in log], result, n_new

    return run


@pytest.mark.parametrize("name", PATCHED)
def test_training_with_an_alternative_gives_something_else(name, runs):
    runs("", FROZEN)  # fills the cache
    _, plain_log, plain, _ = runs("", FLAGS[name])
    folder, log, result, n_new = runs(name, FLAGS[name])
    # Two epochs are too few for A17. See its losses below.
    same = (len(log), result["loss"]) == (len(plain_log), plain["loss"])
    assert same == (name == "A17")
    # The cache is shared, unless the upstreams read something else.
    assert (n_new > 0) == (name in ("A13", "A19"))
    config = json.loads((folder / "config.json").read_text())
    for title in (str(folder), config["title"]):
        assert f"alternative={name}" in title


def test_every_point_has_an_alternative():
    numbers = [name for name in PATCHES if name != "A16-both"]
    assert numbers == [f"A{number}" for number in range(1, 22)]
    assert PATCHES.keys() - set(PATCHED) == {"A7", "A14"}
    for name, flag in (("A7", "--cma-residual"), ("A14", "--seed")):
        assert PATCHES[name].sentence.endswith(flag)


# --- The trained part -----------------------------------------------------------------

# How many parameters more there are at full size.
MORE = {
    "A1": 24 * 1024 * 16 + 12 * 768 * 16,
    "A2": (2 * 1024 * 40 + 40 + 1024 - 76) + (2 * 768 * 59 + 59 + 768 - 40),
    "A3": 2 * (16 * 16 + 16),
    "A4": (4 * 81 + 4) + 32 + (36 + 1) - 82,
    "A5": 0,
    "A8": 2 * (2 * 16 * 2 + 2 + 16) - 2 * (2 * 16 * 64 + 64 + 16),
    "A15": (32 * 4 + 4) - (32 * 16 + 16 + 16 * 4 + 4),
    "A16": 0,
    "A16-both": 0,
}


@pytest.mark.parametrize("name", MORE)
def test_a_changed_model_has_its_parameters_and_keeps_batch_mates_apart(name):
    changed = patched(name).model
    counts = []
    for module in (model, changed):
        full_size = module.EmotionRecognizer(module.Config())
        counts.append(sum(parameter.numel() for parameter in full_size.parameters()))
    assert counts[1] - counts[0] == MORE[name]

    torch.manual_seed(0)
    small = changed.EmotionRecognizer(changed.Config("mmt", 3, 8, 2, 8)).eval()
    # Two utterances. The second has more frames, and its texts have more tokens.
    frames = torch.arange(9) < torch.tensor([[4], [9]])  # (B, T)
    tokens = torch.arange(7) < torch.tensor([[[5]], [[7]]])  # (B, 1, T)
    tokens = tokens.repeat(1, 9, 1)  # (B, C, T)
    tokens[0, 0] = False
    audio = torch.randn(int(frames.sum()), 3, 8)
    text = torch.randn(int(tokens.sum()), 2, 8)
    together = small((audio, frames), (text, tokens))
    alone = small((audio[:4], frames[:1, :4]), (text[: 8 * 5], tokens[:1, :, :5]))
    torch.testing.assert_close(together[:1], alone)


@pytest.mark.parametrize("name", ["A1", "A2"])
def test_a1_and_a2_condense_the_layers_in_other_ways(name):
    extractor = patched(name).model.FeatureExtractor(3, 8, 4)
    states = torch.randn(5, 3, 8)  # five steps of one utterance
    mask = torch.ones(1, 5, dtype=torch.bool)
    z = states.mean(dim=(0, 2)) if name == "A1" else states.mean(dim=(0, 1))
    gates = torch.relu(extractor.se.reduce(z))
    gates = torch.sigmoid(extractor.se.expand(gates))
    steps = []
    for first, second, third in states:
        if name == "A1":
            scaled = [gates[0] * first, gates[1] * second, gates[2] * third]
            steps.append(torch.cat(scaled))
        else:
            steps.append(gates * (first + second + third))
    expected = extractor.norm(extractor.linear(torch.stack(steps)))
    torch.testing.assert_close(extractor(states, mask)[0], expected)


def test_a5_takes_the_tokens_of_the_target():
    extractor = patched("A5").model.TextFeatureExtractor(2, 8, 4, 3)
    mask = torch.tensor([[[True, True, True], [True, False, False], [False] * 3]])
    _, found = extractor(torch.randn(4, 2, 8), mask)
    assert found.tolist() == [[True, False, False]]


def test_a6_repeats_the_first_and_the_last_utterance():
    utterances = [SimpleNamespace(dialog=dialog) for dialog in "aaab"]
    windows = patched("A6").data.context_windows(utterances, 5)
    expected = [[0, 0, 0, 1, 2], [0, 0, 1, 2, 2], [0, 1, 2, 2, 2], [3, 3, 3, 3, 3]]
    assert windows.tolist() == expected


def test_a8_attends_with_two_heads():
    block = patched("A8").model.TransformerBlock(4, True)
    x_t, x_s = torch.randn(1, 3, 4), torch.randn(1, 5, 4)
    output, weights = block.attend(x_t, x_s, torch.ones(1, 5, dtype=torch.bool))
    heads = []
    for x, w in ((x_t, block.w_q), (x_s, block.w_k), (x_s, block.w_v)):
        heads.append((x @ w).unflatten(-1, (2, 2)).transpose(1, 2))  # (1, 2, T, 2)
    expected = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 3))
    assert block.dropout.p == 0.5


@pytest.mark.parametrize(("name", "between"), [("A16", 0.0), ("A16-both", 0.3)])
def test_a16_drops_out_before_the_projector(name, between):
    changed = patched(name).model
    recognizer = changed.EmotionRecognizer(changed.Config(dropout=0.3))
    assert recognizer.dropout.p == recognizer.fusion_dropout.p == between
    extractor = recognizer.extractor
    for block in (extractor["audio"], extractor["text"].each_text):
        assert [type(layer) for layer in block.linear] == [nn.Dropout, nn.Linear]
        assert block.linear[0].p == 0.3


# --- Inputs ---------------------------------------------------------------------------


def test_a13_removes_every_silent_window():
    clip = patched("A13").data.clip
    sound = torch.full((400,), 0.5)
    silence = torch.zeros(400)
    x = torch.cat([silence, sound, silence, sound, silence])
    assert clip(x[:-300]).tolist() == [0.5] * 800
    # The last window has less than 25 ms. It stays if it is loud.
    assert clip(torch.cat([x, sound[:50]])).tolist() == [0.5] * 850
    assert clip(torch.zeros(900)).tolist() == [0.0] * 900


def test_a19_removes_tags(tiny):
    prepare = functools.partial(patched("A19").model.Upstream.prepare, tiny["text"])
    plain = tiny["text"].prepare
    assert torch.equal(prepare("[LAUGHTER] i hate [BREATHING] it"), plain("i hate it"))
    assert torch.equal(prepare("[GARBAGE]"), plain(""))
    assert not torch.equal(plain("[LAUGHTER] it"), plain("it"))


# --- Training -------------------------------------------------------------------------


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize(
    ("name", "losses", "plain", "expected"),
    [
        # The counter starts again at the trigger.
        ("A9", [1.0, 1.1, 1.1, 1.1, 1.1, 1.1], "ccfsss", "ccfccs"),
        # A decrease of less than one part in 10,000 does not count.
        ("A17", [1.0, 0.99995, 0.99991, 0.9998], "cccc", "ccfc"),
    ],
)
def test_a9_and_a17_count_in_other_ways(name, losses, plain, expected):
    for modules, answers in ((PLAIN, plain), (patched(name), expected)):
        patience = modules.train.Patience(finetune_after=2, stop_after=3)
        assert "".join(patience.step(loss)[0] for loss in losses) == answers


@pytest.mark.parametrize("rate", ["1", "0.001"])
def test_a10_tests_the_best_epoch(rate, runs):
    flags = FINETUNED.replace("--lr-finetune 1", f"--lr-finetune {rate}")
    folder, log, result, _ = runs("A10", flags)
    losses = [row["dev_loss"] for row in log]
    best = losses.index(min(losses)) + 1
    # A run of the four files that ends there has the same weights.
    _, _, shorter, _ = runs("", flags.replace("-epochs 4", f"-epochs {best}"))
    assert result["loss"] == shorter["loss"]
    # The checkpoint has these weights, so an interrupted run ends with the same test.
    (folder / "result.json").unlink()
    _, _, resumed, _ = runs.__wrapped__("A10", flags)
    assert resumed["loss"] == result["loss"]


def test_a11_keeps_the_rate_of_what_is_trained_from_scratch(runs):
    folder, log, *_ = runs("A11", FINETUNED)
    initial, *_ = runs("", FINETUNED.replace("-epochs 4", "-epochs 1"))
    weights = [dict(load(x)["model"]) for x in (folder, initial)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)  # the rate was 0
    assert (log[-1]["phase"], log[-1]["lr"]) == ("finetune", 1)
    assert load(folder)["upstreams"]["text"]


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_a12_drops_out_in_training_alone(modality, tiny, tmp_path):
    raw = {"audio": torch.sin(torch.arange(4000) / 9), "text": "all alone again"}
    inputs = {0: tiny[modality].prepare(raw[modality])}
    corpus = [SimpleNamespace(id="x")]
    source = patched("A12").data.Source(tiny[modality], inputs, corpus, tmp_path, "cpu")
    source.open("bottom")
    expected = tiny[modality]([inputs[0]])[0]
    with torch.no_grad():
        torch.testing.assert_close(source([0])[0], expected)
    first, second = source([0])[0], source([0])[0]
    assert first.shape == expected.shape and not torch.equal(first, second)
    config = source.live.model.config
    assert (config.layerdrop, config.apply_spec_augment) == (0, False)
    assert tiny[modality].model.config is not config


def test_a18_drops_the_last_smaller_batch():
    layer = nn.Linear(1, 4)
    args = SimpleNamespace(device="cpu", batch_size=2, micro_batch=None)
    seen = []

    def batch(rows):
        seen.append(len(rows))
        return {"input": torch.zeros(len(rows), 1)}, torch.zeros(len(rows)).long()

    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    train_epoch = patched("A18").train.train_epoch
    loss = train_epoch(layer, optimizer, batch, torch.arange(5), args)
    assert seen == [2, 2]
    expected = -layer.bias.log_softmax(dim=0)[0]
    assert loss == pytest.approx(expected.item())
    train_epoch(layer, optimizer, batch, torch.arange(1), args)
    assert seen == [2, 2, 1]  # there is no other


def test_a20_stops_a_frozen_system_at_the_trigger(runs):
    assert (len(runs("", STOPPING)[1]), len(runs("A20", STOPPING)[1])) == (4, 2)


@pytest.mark.parametrize(("what", "fewer"), [("bottom", 2), ("all", 0)])
def test_a21_keeps_the_layer_norm_of_the_embeddings(what, fewer, tiny):
    plain = copy.deepcopy(tiny["text"]).open(what)
    changed = patched("A21").model.Upstream.open(copy.deepcopy(tiny["text"]), what)
    assert len(plain) - len(changed) == fewer  # its weight and its bias


# --- The command ----------------------------------------------------------------------


def test_the_command_lists_and_shows(capsys):
    alternatives.main([])
    assert len(capsys.readouterr().out.splitlines()) == len(PATCHES)
    alternatives.main(["A5"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == f"A5: {PATCHES['A5'].sentence}"
    changed = [line[1:].strip() for line in lines if line.startswith(("- ", "+ "))]
    assert changed == ["return x, mask.any(dim=1)", "return x, mask[:, C // 2]"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A5,A99", "--"], "A99: unknown"),
        (["A7", "--"], "A7 needs no patch.*--cma-residual"),
        (["A1,A2", "--"], "A2 does not fit model.py"),
        (["A5", "--seed", "1"], "write -- before"),
    ],
)
def test_a_patch_that_cannot_be_applied_is_named(arguments, message):
    with pytest.raises(data.InputError, match=message):
        alternatives.main(arguments)


def test_the_command_trains_with_a_patched_copy(monkeypatch):
    def run(command):
        python, script, *flags = command
        assert python == sys.executable and Path(script).name == "train.py"
        assert flags == "--out runs-A5,A9 --system 17 --seed 0 1".split()
        copies = {path.name for path in Path(script).parent.iterdir()}
        assert copies == set(alternatives.FILES)
        text = Path(script).read_text()
        assert 'args.changed = ["alternative=A5,A9"]' in text
        assert "self.since_best = 0\n            return" in text
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(alternatives.subprocess, "run", run)
    with pytest.raises(SystemExit) as stop:
        alternatives.main(["A9,A5", "--", "--system", "17", "--seed", "0", "1"])
    assert stop.value.code == 3
