"""What the tests share: a writer of small corpora that knows nothing of the code under test, and
tiny upstreams. Tests marked slow are left out unless asked for: python -m pytest -m slow."""

import math
import struct
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it gives


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes and gigabytes; run with -m slow")
    for n in range(1, 10):
        config.addinivalue_line("markers", f"ex{n}: the check of EXERCISE {n}")


def pytest_collection_modifyitems(config, items):
    if "slow" not in (config.option.markexpr or ""):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run it with -m slow"))


def write_wav(path, samples, rate=16000):
    """16-bit mono PCM, header and all, by hand."""
    pcm = b"".join(struct.pack("<h", round(32767 * max(-1, min(1, x)))) for x in samples)
    header = b"RIFF" + struct.pack("<I", 36 + len(pcm)) + b"WAVEfmt "
    header += struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + b"data" + struct.pack("<I", len(pcm)) + pcm)


def change(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def write_dialog(root, dialog, turns, rate=16000, with_wavs=True):
    """turns: (suffix, start, end, emotion, words), written in the order in which they come."""
    session = root / f"Session{dialog[4]}"
    labels = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
    words = ""
    for suffix, start, end, emotion, text in turns:
        id = f"{dialog}_{suffix}"
        labels += f"[{start:.4f} - {end:.4f}]\t{id}\t{emotion}\t[2.5000, 2.5000, 2.5000]\n"
        labels += "C-E2:\tNeutral;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\n\n"
        words += f"{id} [{start:08.4f}-{end:08.4f}]: {text}\n"
        if with_wavs:
            n = round((end - start) * rate)
            tone = 200 + 40 * (sum(map(ord, id)) % 7)
            samples = [0.3 * math.sin(2 * math.pi * tone * i / rate) for i in range(n)]
            write_wav(session / "sentences" / "wav" / dialog / f"{id}.wav", samples, rate)
    for folder, text in (("EmoEvaluation", labels), ("transcriptions", words)):
        path = session / "dialog" / folder / f"{dialog}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return session


WORDS = {
    "neu": "paper street",
    "hap": "lovely party",
    "ang": "hate it",
    "sad": "all alone",
    "fru": "oh no",
}


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """Five sessions of one dialogue of 14 turns of 0.1 s and more; one turn in five is out of class."""
    root = tmp_path_factory.mktemp("corpus") / "small"
    for session in range(1, 6):
        turns, t, counts = [], 1.0, {"F": 0, "M": 0}
        for k in range(14):
            emotion = ("neu", "hap", "ang", "sad", "fru")[(2 * k + k // 5 + session) % 5]
            letter = "FM"[(k // 2) % 2]
            end = t + 0.1 + 0.02 * (k % 5)
            turns.append(
                (
                    f"{letter}{counts[letter]:03}",
                    t,
                    end,
                    emotion,
                    f"{WORDS[emotion]} {k}" + " oh" * (k % 3),
                )
            )
            counts[letter] += 1
            t = end + 0.3
        write_dialog(root, f"Ses0{session}F_impro01", sorted(turns))
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """{"audio": Upstream, "text": Upstream} with random weights, loaded from disk."""
    import model

    texts = ["i hate it", "lovely party , so lovely", "all alone again and again and again"]
    folders = model.make_tiny_upstreams(str(tmp_path_factory.mktemp("tiny")), texts)
    return {m: model.Upstream(folder, m) for m, folder in folders.items()}
