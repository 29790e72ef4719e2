"""Smaller, faster and simultaneous ways against the plain one: same gradients, same results."""

import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import model
from conftest import ROOT
from model import Config, EmotionRecognizer, Upstream

CLIPS = [torch.sin(torch.arange(n) * 0.05 * (1 + k)) for k, n in enumerate((8000, 5000, 3000))]
TEXTS = ["i hate it", "lovely party", "all alone again and again"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return model.make_tiny_upstreams(str(tmp_path_factory.mktemp("tiny")), TEXTS)


def gradients(folders, parts=(slice(0, 3),), **precision):
    """Loss and gradients of one fine-tuning batch of three, head and bottoms, without dropout."""
    torch.manual_seed(0)
    upstreams = {m: Upstream(folder, m, **precision) for m, folder in folders.items()}
    head = EmotionRecognizer(Config("mmt", 3, 64, 3, 64, n_context=3)).eval()
    context = torch.tensor([[-1, 0, 1], [0, 1, 2], [1, 2, -1]])
    opened = [p for u in upstreams.values() for p in u.open("bottom").values()]
    total = 0.0
    for part in parts:
        audio = upstreams["audio"](CLIPS[part])
        logits = head(audio, (*upstreams["text"](TEXTS), context[part]))
        weight = len(logits) / 3
        loss = F.cross_entropy(logits, torch.tensor([0, 2, 3])[part]) * weight
        loss.backward()
        total += loss.item()
    return total, [p.grad for p in (*head.parameters(), *opened) if p.grad is not None]


def close(found, expected, **tolerance):
    assert found[0] == pytest.approx(expected[0], **tolerance)
    assert len(found[1]) == len(expected[1])
    for a, b in zip(found[1], expected[1]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_parts_of_a_batch_add_up_to_its_gradient(folders):
    close(gradients(folders, (slice(0, 2), slice(2, 3))), gradients(folders))


def test_bf16_is_near_fp32_and_leaves_weights_and_head_in_fp32(folders):
    plain, half = gradients(folders), gradients(folders, precision="bf16")
    assert half[0] == pytest.approx(plain[0], rel=0.02) and half[0] != plain[0]
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (plain[1], half[1]))
    assert F.cosine_similarity(a, b, dim=0) > 0.98
    assert all(g.dtype == torch.float32 for g in half[1])


def test_two_processes_at_once_fill_one_cache_and_end_alike(small_corpus, tmp_path):
    """Nothing is locked: both write the same files under other names, and rename them."""
    command = [
        sys.executable, ROOT / "train.py", "--iemocap", small_corpus, "--partial", "--upstream",
        "tiny", "--system", "1", "5", "--fold", "1", "--context", "3", "--max-epochs", "4",
        "--device", "cpu", "--cache", "shared",
    ]  # fmt: skip
    both = [
        subprocess.Popen([*command, "--out", out], cwd=tmp_path, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for out in ("same", "same")
    ]  # fmt: skip
    said = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    subprocess.run([*command, "--out", "alone", "--cache", "other"], cwd=tmp_path, check=True,
                   capture_output=True)  # fmt: skip
    found = {out: sorted((tmp_path / out).rglob("predictions.csv")) for out in ("same", "alone")}
    assert len(found["same"]) == len(found["alone"]) == 2
    for a, b in zip(*found.values()):
        assert a.read_text() == b.read_text()
    assert not list(tmp_path.rglob("*.part"))


def test_selecting_on_test_is_marked_and_trains_on_no_test_row(small_corpus, tmp_path, monkeypatch):
    import data
    import evaluate
    import select_on_test

    monkeypatch.chdir(tmp_path)
    trained, batch = set(), data.batch

    def watch(rows, *rest):
        if torch.is_grad_enabled():  # a training step
            trained.update(rows.tolist())
        return batch(rows, *rest)

    monkeypatch.setattr(data, "batch", watch)
    select_on_test.main([
        "--iemocap", str(small_corpus), "--partial", "--upstream", "tiny", "--fusion", "text-fc",
        "--frozen", "--max-epochs", "3", "--device", "cpu",
    ])  # fmt: skip
    corpus = data.read_iemocap(small_corpus)
    assert trained and not any(corpus[i].session == 5 for i in trained)
    (run,), complaints = evaluate.find_runs(tmp_path / "runs")
    assert "SELECTED-ON-TEST" in run.title and not complaints
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    best = min(log, key=lambda row: row["dev_loss"])  # its development loss is the test loss
    assert run.result["loss"] == pytest.approx(best["dev_loss"], abs=1e-6)
    assert data.split is select_on_test.honest_split
