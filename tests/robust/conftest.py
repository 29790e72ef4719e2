"""What these tests share: mutated files, and a finished run."""

import json
import random

import pytest

import train


def mutations(path, n):
    """Mutate a file n times, each time from what it was at first."""
    content = path.read_bytes()
    for seed in range(n):
        rng = random.Random(seed)
        start = rng.randrange(len(content))
        size = rng.choice((1, 2, 8, 60, 1000))
        head, piece, tail = content[:start], content[start:][:size], content[start:]
        # Change one bit, or cut out, double or zero a piece, or cut the end.
        bit = bytes([piece[0] ^ 1 << rng.randrange(8)])
        rest = tail[size:]
        changed = [bit + tail[1:], rest, piece + tail, bytes(len(piece)) + rest, b""]
        path.write_bytes(head + rng.choice(changed))
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def command(small_corpus, cache):
    """The flags of a run, without --out. All of its runs share one cache."""
    flags = ["--iemocap", str(small_corpus), "--partial", "--upstream", "tiny"]
    flags += ["--cache", str(cache), "--device", "cpu"]
    # At a rate of 0 the loss stays the same. So fine-tuning starts after epoch 2.
    return [*flags, *"--lr-frozen 0 --finetune-after 1 --max-epochs 4".split()]


@pytest.fixture(scope="session")
def finished(command, tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs")
    train.main([*command, "--out", str(out)])
    return next(out.rglob("result.json")).parent


@pytest.fixture
def encoders(finished, cache):
    """The folder of its tiny upstreams."""
    return next(cache.glob("tiny-*"))


def outcome(root):
    """What the finished run below this folder has computed, to the last bit."""
    (path,) = root.rglob("result.json")
    lines = [path.read_text(), *path.with_name("log.jsonl").open()]
    numbers = [json.loads(line) | {"seconds": None} for line in lines]
    return numbers, path.with_name("predictions.csv").read_text()
