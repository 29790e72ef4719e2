"""Every patch of alternatives.py fits, and changes what train.py gives.

Those that can be wrong in a way that is hard to see in their lines have a test of their
own.
"""

import functools
import json
import shutil
import sys
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
from tests.studies.alternatives import PATCHES

NO_PATCH = {"A7", "A14"}  # flags of train.py
FROZEN = "--fusion mmt --frozen --max-epochs 2"
# The first phase has a rate of 0. So the second epoch is not better than the first, and
# fine-tuning starts. It has a rate of 1, so no later epoch is better than the first.
FINETUNED = (
    "--fusion text-fc --lr-frozen 0 --lr-finetune 1 --finetune-after 1 --stop-after 2 "
    "--max-epochs 4"
)
FLAGS = dict.fromkeys(["A9", "A10", "A11", "A12", "A21"], FINETUNED)
FLAGS["A20"] = "--fusion text-fc --frozen --lr-frozen 0 --finetune-after 1"
# The loss decreases by less than one part in 10,000.
FLAGS["A17"] = "--fusion text-fc --frozen --lr-frozen 1e-6 --stop-after 2"


@functools.cache
def patched(*names):
    return alternatives.load_patched(names)


@pytest.fixture(scope="module")
def fixed_flags(tmp_path_factory, small_corpus):
    """Two sessions of the small corpus, with tags in texts and silence in clips."""
    home = tmp_path_factory.mktemp("alternatives")
    for session in ("Session1", "Session5"):
        shutil.copytree(small_corpus / session, home / "small" / session)
    for path in home.rglob("transcriptions/*.txt"):
        path.write_text(path.read_text().replace(" oh", " [LAUGHTER]"))
    for path in home.rglob("*.wav"):
        content = path.read_bytes()
        begin = 44 + 2 * 400  # behind the header and 25 ms
        path.write_bytes(content[:begin] + bytes(1600) + content[begin + 1600 :])
    flags = f"--iemocap {home / 'small'} --partial --upstream tiny --device cpu "
    return flags + f"--cache {home / 'cache'} --batch-size 4 --max-epochs 6 "


@pytest.fixture(scope="module")
def run(tmp_path_factory, fixed_flags):
    """A function that trains with patches, and returns the run."""
    # Loading from a folder takes most of the time of a small run.
    load_pretrained = functools.cache(model.load_pretrained)

    @functools.cache
    def run(flags, *names):
        code = patched(*names)
        out = tmp_path_factory.mktemp("runs")
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(code.model, "load_pretrained", load_pretrained)
            code.train.main([*fixed_flags.split(), *flags.split(), "--out", str(out)])
        return evaluate.read_run(next(out.rglob("fold5-seed0")))

    return run


@pytest.mark.parametrize("name", sorted(PATCHES.keys() - NO_PATCH))
def test_training_with_an_alternative_gives_something_else(name, run):
    flags = FLAGS.get(name, FROZEN)
    plain, changed = run(flags), run(flags, name)
    results = [(r.result["loss"], r.result["epochs"]) for r in (plain, changed)]
    assert results[0] != results[1]
    for title in (str(changed.folder), changed.config["title"]):
        assert f"alternative={name}" in title


def test_a6_repeats_the_first_and_the_last_utterance():
    utterances = [SimpleNamespace(dialog=dialog) for dialog in "aaab"]
    windows = patched("A6").data.context_windows(utterances, 5)
    expected = [[0, 0, 0, 1, 2], [0, 0, 1, 2, 2], [0, 1, 2, 2, 2], [3, 3, 3, 3, 3]]
    assert windows.tolist() == expected


def test_a8_attends_with_two_heads():
    block = patched("A8").model.TransformerBlock(4, False).eval()
    block.norm1 = nn.Identity()
    block.norm2 = nn.Identity()
    block.feed_forward = nn.Identity()  # which doubles the output of the attention
    x_t, x_s = torch.randn(1, 3, 4), torch.randn(1, 5, 4)
    output = block(x_t, x_s, torch.ones(1, 5, dtype=torch.bool))
    heads = []
    for x, w in ((x_t, block.w_q), (x_s, block.w_k), (x_s, block.w_v)):
        heads.append((x @ w).unflatten(-1, (2, 2)).transpose(1, 2))  # (1, 2, T, 2)
    expected = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(output, 2 * expected)


@pytest.mark.parametrize("rate", ["1", "0.001"])
def test_a10_tests_the_best_epoch(rate, run):
    flags = FINETUNED.replace("--lr-finetune 1", f"--lr-finetune {rate}")
    changed = run(flags, "A10")
    lines = (changed.folder / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["dev_loss"] for line in lines]
    best = losses.index(min(losses)) + 1
    # A run of the four files that ends there has the same weights.
    shorter = run(flags.replace("-epochs 4", f"-epochs {best}"))
    assert changed.result["loss"] == shorter.result["loss"]


# --- The command ----------------------------------------------------------------------


def test_the_command_lists_and_shows(capsys):
    alternatives.main([])
    assert len(capsys.readouterr().out.splitlines()) == len(PATCHES)
    alternatives.main(["A5"])
    shown = capsys.readouterr().out
    assert "[A5] " in shown and "\n+ return x, mask[:, C // 2]" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A5,A99", "--"], "A99: unknown"),
        (["A7", "--"], "no patch.*--cma-residual"),
        (["A1,A2", "--"], "A2 does not fit"),
        (["A5", "--seed", "1"], "write -- before"),
    ],
)
def test_a_patch_that_cannot_be_applied_is_named(arguments, message):
    with pytest.raises(data.InputError, match=message):
        alternatives.main(arguments)


def test_the_command_trains_with_several_patches(fixed_flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alternatives.main(["A5,A9", "--", *fixed_flags.split(), *FROZEN.split()])
    (result,) = tmp_path.glob("runs-A5,A9/*/*/*/result.json")
    assert "alternative=A5,A9" in str(result)
    # In memory, the four files are the same as before.
    assert sys.modules["train"] is train and train.data is data
