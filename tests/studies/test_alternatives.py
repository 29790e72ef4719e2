"""Every patch of alternatives.py fits, changes the result, and is what it says."""

import copy
import functools
import importlib
import json
import shutil
import sys
from pathlib import Path
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
PATCHES = alternatives.read_patches(alternatives.PATCHES)
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
del FLAGS["A17"]  # see the losses below

# Loading from a folder takes most of the time of a small run.
load_pretrained = functools.cache(model.load_pretrained)


def read_four_files():
    return [(alternatives.ROOT / file).read_bytes() for file in alternatives.FILES]


@pytest.fixture
def patched(tmp_path, monkeypatch):
    """A function that imports the four files with patches, beside the real ones."""

    def load(*names):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        before = read_four_files()
        alternatives.write_copy(names, folder)
        assert read_four_files() == before
        monkeypatch.syspath_prepend(folder)
        for name in MODULES:
            monkeypatch.delitem(sys.modules, name)
        modules = {name: importlib.import_module(name) for name in MODULES}
        assert Path(modules["train"].data.__file__).parent == folder
        return SimpleNamespace(**modules)

    return load


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
    """A function that trains with some modules and flags: (folder, log, result)."""
    home = tmp_path_factory.mktemp("runs")
    done = {}

    def run(modules, flags, name="plain"):
        if (flags, name) not in done or name != "plain":
            out = home / f"{name} {flags}"
            fixed = ["--iemocap", str(corpus), "--partial", "--upstream", "tiny"]
            fixed += ["--device", "cpu", "--cache", str(home / "cache")]
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(modules.model, "load_pretrained", load_pretrained)
                modules.train.main([*fixed, "--out", str(out), *flags.split()])
            done[flags, name] = next(out.rglob("fold5-seed0"))
        folder = done[flags, name]
        lines = (folder / "log.jsonl").read_text().splitlines()
        result = json.loads((folder / "result.json").read_text())
        return folder, [json.loads(line) for line in lines], result

    return run


PLAIN = SimpleNamespace(**MODULES)


@pytest.mark.parametrize("name", FLAGS)
def test_training_with_an_alternative_gives_something_else(name, patched, runs):
    _, plain_log, plain = runs(PLAIN, FLAGS[name])
    folder, log, result = runs(patched(name), FLAGS[name], name)
    assert (len(log), result["loss"]) != (len(plain_log), plain["loss"])
    assert f"alternative={name}" in str(folder)
    config = json.loads((folder / "config.json").read_text())
    assert f"alternative={name}" in config["title"]


def test_every_point_has_an_alternative():
    numbers = [name for name in PATCHES if name != "A16-both"]
    assert numbers == [f"A{number}" for number in range(1, 22)]
    assert PATCHES.keys() - set(PATCHED) == {"A7", "A14"}
    for name, flag in (("A7", "--cma-residual"), ("A14", "--seed")):
        assert PATCHES[name].sentence.endswith(flag)


# --- The trained part -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"),
    {
        "A1": 24 * 1024 * 16 + 12 * 768 * 16,
        "A2": (2 * 1024 * 40 + 40 + 1024 - 76) + (2 * 768 * 59 + 59 + 768 - 40),
        "A3": 2 * (16 * 16 + 16),
        "A4": (4 * 81 + 4) + 32 + (36 + 1) - 82,
        "A5": 0,
        "A8": 2 * (2 * 16 * 2 + 2 + 16) - 2 * (2 * 16 * 64 + 64 + 16),
        "A15": (32 * 4 + 4) - (32 * 16 + 16 + 16 * 4 + 4),
        "A16": 0,
        "A16-both": 0,
    }.items(),
)
def test_a_changed_model_has_its_parameters_and_keeps_batch_mates_apart(
    name, more, patched
):
    changed = patched(name).model
    counts = []
    for module in (model, changed):
        full_size = module.EmotionRecognizer(module.Config())
        counts.append(sum(parameter.numel() for parameter in full_size.parameters()))
    assert counts[1] - counts[0] == more

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
def test_a1_and_a2_condense_the_layers_in_other_ways(name, patched):
    extractor = patched(name).model.FeatureExtractor(3, 8, 4)
    states = torch.randn(5, 3, 8)  # five steps of one utterance
    mask = torch.ones(1, 5, dtype=torch.bool)
    z = states.mean(dim=(0, 2)) if name == "A1" else states.mean(dim=(0, 1))
    gates = torch.relu(extractor.se.reduce(z))
    gates = torch.sigmoid(extractor.se.expand(gates))
    steps = []
    for step in states:
        if name == "A1":
            scaled = [gate * layer for gate, layer in zip(gates, step, strict=True)]
            steps.append(torch.cat(scaled))
        else:
            steps.append(gates * (step[0] + step[1] + step[2]))
    expected = extractor.norm(extractor.linear(torch.stack(steps)))
    torch.testing.assert_close(extractor(states, mask)[0], expected)


def test_a5_takes_the_tokens_of_the_target(patched):
    extractor = patched("A5").model.TextFeatureExtractor(2, 8, 4, 3)
    mask = torch.tensor([[[True, True, True], [True, False, False], [False] * 3]])
    _, found = extractor(torch.randn(4, 2, 8), mask)
    assert found.tolist() == [[True, False, False]]


def test_a6_repeats_the_first_and_the_last_utterance(patched):
    utterances = [SimpleNamespace(dialog=dialog) for dialog in "aaab"]
    windows = patched("A6").data.context_windows(utterances, 5)
    assert windows.tolist() == [
        [0, 0, 0, 1, 2],
        [0, 0, 1, 2, 2],
        [0, 1, 2, 2, 2],
        [3, 3, 3, 3, 3],
    ]


def test_a8_attends_with_two_heads(patched):
    block = patched("A8").model.TransformerBlock(4, True)
    x_t, x_s = torch.randn(1, 3, 4), torch.randn(1, 5, 4)
    output, weights = block.attend(x_t, x_s, torch.ones(1, 5, dtype=torch.bool))
    heads = []
    for x, w in ((x_t, block.w_q), (x_s, block.w_k), (x_s, block.w_v)):
        heads.append((x @ w).unflatten(-1, (2, 2)).transpose(1, 2))  # (1, 2, T, 2)
    expected = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("name", "between"), [("A16", [0.0, 0.0]), ("A16-both", [0.3, 0.3])]
)
def test_a16_drops_out_before_the_projector(name, between, patched):
    changed = patched(name).model
    recognizer = changed.EmotionRecognizer(changed.Config(dropout=0.3))
    assert [recognizer.dropout.p, recognizer.fusion_dropout.p] == between
    for block in (
        recognizer.extractor["audio"],
        recognizer.extractor["text"].each_text,
    ):
        assert [type(layer) for layer in block.linear] == [nn.Dropout, nn.Linear]
        assert block.linear[0].p == 0.3


# --- Inputs ---------------------------------------------------------------------------


def test_a13_removes_every_silent_window(patched):
    clip = patched("A13").data.clip
    sound = torch.full((400,), 0.5)
    silence = torch.zeros(400)
    x = torch.cat([silence, sound, silence, sound, silence[:100]])
    assert clip(x).tolist() == [0.5] * 800
    # The last window has less than 25 ms. It stays if it is loud.
    assert clip(torch.cat([x[:-100], silence, sound[:50]])).tolist() == [0.5] * 850
    assert clip(torch.zeros(900)).tolist() == [0.0] * 900


def test_a19_removes_tags(patched, tiny):
    prepare = functools.partial(patched("A19").model.Upstream.prepare, tiny["text"])
    plain = tiny["text"].prepare
    assert torch.equal(prepare("[LAUGHTER] i hate [BREATHING] it"), plain("i hate it"))
    assert torch.equal(prepare("[GARBAGE]"), plain(""))
    assert not torch.equal(plain("[LAUGHTER] it"), plain("it"))


# --- Training -------------------------------------------------------------------------


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_equal(first, second):
    torch.testing.assert_close(dict(first), dict(second), rtol=0, atol=0)


def events(modules, losses):
    patience = modules.train.Patience(finetune_after=2, stop_after=3)
    return [patience.step(loss) for loss in losses]


def test_a9_counts_again_from_the_trigger(patched):
    losses = [1.0, 1.1, 1.1, 1.1, 1.1, 1.1]
    assert events(PLAIN, losses)[2:4] == ["finetune", "stop"]
    expected = ["continue", "continue", "finetune", "continue", "continue", "stop"]
    assert events(patched("A9"), losses) == expected


def test_a17_ignores_a_decrease_of_less_than_one_in_10_000(patched):
    losses = [1.0, 0.99995, 0.99991, 0.9998]
    assert events(PLAIN, losses) == ["continue"] * 4
    assert events(patched("A17"), losses) == ["continue"] * 2 + ["finetune", "continue"]


@pytest.mark.parametrize("rate", ["1", "0.001"])
def test_a10_tests_the_best_epoch(rate, patched, runs):
    flags = FINETUNED.replace("--lr-finetune 1", f"--lr-finetune {rate}")
    modules = patched("A10")
    folder, log, result = runs(modules, flags, f"A10-{rate}")
    losses = [row["dev_loss"] for row in log]
    best = losses.index(min(losses)) + 1
    # A run of the four files that ends there has the same weights.
    *_, shorter = runs(PLAIN, flags.replace("-epochs 4", f"-epochs {best}"))
    assert result["loss"] == shorter["loss"]
    # The checkpoint has these weights, so an interrupted run ends with the same test.
    (folder / "result.json").unlink()
    *_, resumed = runs(modules, flags, f"A10-{rate}")
    assert resumed["loss"] == result["loss"]


def test_a11_keeps_the_rate_of_what_is_trained_from_scratch(patched, runs):
    folder, log, _ = runs(patched("A11"), FINETUNED, "A11-again")
    initial, *_ = runs(PLAIN, FINETUNED.replace("-epochs 4", "-epochs 1"))
    assert_equal(load(folder)["model"], load(initial)["model"])  # the rate was 0
    assert (log[-1]["phase"], log[-1]["lr"]) == ("finetune", 1)
    assert load(folder)["upstreams"]["text"]


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_a12_drops_out_in_training_alone(modality, patched, tiny, tmp_path):
    modules = patched("A12")
    raw = {"audio": torch.sin(torch.arange(4000) / 9), "text": "all alone again"}
    inputs = {0: tiny[modality].prepare(raw[modality])}
    corpus = [SimpleNamespace(id="x")]
    source = modules.data.Source(tiny[modality], inputs, corpus, tmp_path, "cpu")
    source.open("bottom")
    expected = tiny[modality]([inputs[0]])[0]
    with torch.no_grad():
        torch.testing.assert_close(source([0])[0], expected)
    first, second = source([0])[0], source([0])[0]
    assert first.shape == expected.shape
    assert not torch.equal(first, second)
    config = source.live.model.config
    assert (config.layerdrop, config.apply_spec_augment) == (0, False)
    assert tiny[modality].model.config is not config


def test_a18_drops_the_last_smaller_batch(patched):
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


def test_a20_stops_a_frozen_system_at_the_trigger(patched, runs):
    _, log, _ = runs(PLAIN, STOPPING)
    _, shorter, _ = runs(patched("A20"), STOPPING, "A20-again")
    assert (len(log), len(shorter)) == (4, 2)


def test_a21_keeps_the_layer_norm_of_the_embeddings(patched, tiny):
    opened = {}
    for modules in (PLAIN, patched("A21")):
        for what in ("bottom", "all"):
            upstream = copy.deepcopy(tiny["text"])
            parameters = modules.model.Upstream.open(upstream, what)
            opened.setdefault(what, []).append(len(parameters))
    plain, changed = opened["bottom"]
    assert (plain, changed) == (5, 3)  # without its weight and its bias
    assert len(set(opened["all"])) == 1


# --- The command ----------------------------------------------------------------------


def test_the_command_lists_and_shows(capsys):
    alternatives.main([])
    assert len(capsys.readouterr().out.splitlines()) == len(PATCHES)
    alternatives.main(["A5"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == f"A5: {PATCHES['A5'].sentence}"
    assert [line[1:].strip() for line in lines if line.startswith(("- ", "+ "))] == [
        "return x, mask.any(dim=1)",
        "return x, mask[:, C // 2]",
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("A5,A99", "A99: unknown"),
        ("A7", "A7 needs no patch.*--cma-residual"),
        ("A1,A2", "A2 does not fit model.py"),
    ],
)
def test_a_patch_that_cannot_be_applied_is_named(names, message):
    with pytest.raises(data.InputError, match=message):
        alternatives.main([names, "--"])


def test_the_command_trains_with_a_patched_copy(monkeypatch):
    commands = []

    def run(command):
        commands.append(command)
        copies = {path.name for path in Path(command[1]).parent.iterdir()}
        assert copies == set(alternatives.FILES)
        text = Path(command[1]).read_text()
        assert 'args.changed = ["alternative=A5,A9"]' in text
        assert "self.since_best = 0\n            return" in text
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(alternatives.subprocess, "run", run)
    with pytest.raises(SystemExit) as stop:
        alternatives.main(["A9,A5", "--", "--system", "17", "--seed", "0", "1"])
    assert stop.value.code == 3
    ((python, script, *flags),) = commands
    assert python == sys.executable and Path(script).name == "train.py"
    assert flags == "--out runs-A5,A9 --system 17 --seed 0 1".split()
    assert not Path(script).exists()
