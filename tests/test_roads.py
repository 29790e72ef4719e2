"""Every faster, smaller or shared road against the plain one: same gradients, same results."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import model
import train
from conftest import ROOT
from model import Config, EmotionRecognizer, Upstream

CLIPS = [torch.sin(torch.arange(n) * 0.05 * (1 + k)) for k, n in enumerate((8000, 5000, 3000))]
TEXTS = ["i hate it", "lovely party", "all alone again and again"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return model.make_tiny_upstreams(str(tmp_path_factory.mktemp("tiny")), TEXTS)


def gradients(folders, parts=(slice(0, 3),), **road):
    """Loss and gradients of one fine-tuning batch of three, head and bottoms, without dropout."""
    torch.manual_seed(0)
    upstreams = {m: Upstream(folder, m, **road) for m, folder in folders.items()}
    head = EmotionRecognizer(Config("mmt", 3, 64, 3, 64, n_context=3)).eval()
    context = torch.tensor([[-1, 0, 1], [0, 1, 2], [1, 2, -1]])
    for u in upstreams.values():
        u.finetunable().requires_grad_(True)
    total = 0.0
    for part in parts:
        audio = upstreams["audio"](CLIPS[part])
        logits = head(audio, (*upstreams["text"](TEXTS), context[part]))
        weight = len(logits) / 3
        loss = F.cross_entropy(logits, torch.tensor([0, 2, 3])[part]) * weight
        loss.backward()
        total += loss.item()
    parameters = itertools.chain(
        head.parameters(), *(u.finetunable().parameters() for u in upstreams.values())
    )
    return total, [p.grad for p in parameters if p.grad is not None]


def close(found, expected, **tolerance):
    assert found[0] == pytest.approx(expected[0], **tolerance)
    assert len(found[1]) == len(expected[1])
    for a, b in zip(found[1], expected[1]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_checkpointing_recomputes_the_layers_and_changes_no_gradient(folders, monkeypatch):
    plain = gradients(folders)
    calls = []
    again = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(a) or again(*a, **k)
    )
    found = gradients(folders, checkpoint=True)
    assert (
        len(calls) == 4
    )  # two layers of WavLM, two of BERT: it is not the switch that does nothing
    close(found, plain)


def test_checkpointing_keeps_less_for_the_backward_pass(folders):
    kept = {}
    for checkpoint in (False, True):
        upstream = Upstream(folders["audio"], "audio", checkpoint=checkpoint)
        upstream.finetunable().requires_grad_(True)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.nbytes) or x, lambda x: x
        ):
            upstream(CLIPS)
        kept[checkpoint] = sum(sizes)
    assert kept[True] < 0.8 * kept[False]


def test_parts_of_a_batch_add_up_to_its_gradient(folders):
    close(gradients(folders, (slice(0, 2), slice(2, 3))), gradients(folders))


def test_bf16_is_near_fp32_and_leaves_weights_and_head_in_fp32(folders):
    plain, half = gradients(folders), gradients(folders, precision="bf16")
    assert half[0] == pytest.approx(plain[0], rel=0.02) and half[0] != plain[0]
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (plain[1], half[1]))
    assert F.cosine_similarity(a, b, dim=0) > 0.98
    assert all(g.dtype == torch.float32 for g in half[1])


def everything(fusions=tuple(model.FUSIONS), folds=(1, 2, 3, 4, 5), seeds=(0,)):
    return [
        (f, frozen, k, s) for f in fusions for frozen in (True, False) for k in folds for s in seeds
    ]


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 90, 200])
def test_shares_are_disjoint_complete_balanced_and_keep_twins_together(parts):
    runs = everything()
    shares = [train.share(runs, f"{i}/{parts}") for i in range(1, parts + 1)]
    assert sorted(sum(shares, [])) == sorted(runs)
    for mine in shares:
        for fusion, frozen, fold, seed in mine:
            assert (fusion, not frozen, fold, seed) in mine
    if parts <= 7:  # fine-tuned runs that listen are what costs
        dear = [sum(not f and model.FUSIONS[fusion] and "audio" in Config(fusion).modalities
                    for fusion, f, *_ in mine) for mine in shares]  # fmt: skip
        assert max(dear) - min(dear) <= 1, dear


def test_two_processes_share_the_runs_of_one_command(small_corpus, tmp_path, monkeypatch, capsys):
    """The README's two lines, on one machine: one cache, all runs, none twice."""
    command = [
        sys.executable, ROOT / "train.py", "--iemocap", small_corpus, "--partial", "--upstream",
        "tiny", "--system", "1", "5", "--fold", "1", "5", "--context", "3", "--device", "cpu",
    ]  # fmt: skip
    both = [
        subprocess.Popen([*command, "--shard", f"{i}/2"], cwd=tmp_path, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for i in (1, 2)
    ]  # fmt: skip
    said = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    runs = tmp_path / "runs" / "small-partial-tiny"
    assert len(list(runs.rglob("result.json"))) == 4
    assert [text.count("Stop:") for text in said] == [2, 2]
    assert sum("layer states:" in text for text in said) == 1  # whoever came first
    monkeypatch.chdir(tmp_path)
    train.main(list(map(str, command[2:])))
    assert capsys.readouterr().out.count("done before") == 4


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_shard_that_is_none_is_said(shard, capsys):
    with pytest.raises(SystemExit):
        train.parse(["--shard", shard])
    assert f"--shard {shard}: expected I/N" in capsys.readouterr().err
