"""What the tests share: writers of corpora and of runs, and tiny upstreams.

The writers know nothing of the code under test. Tests marked slow are left out unless
they are asked for: python -m pytest -m slow.
"""

import json
import math
import struct
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# The models are tiny, so a second thread costs more than it gives.
torch.set_num_threads(1)
CLASSES = ["neu", "hap", "ang", "sad"]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes and gigabytes; run with -m slow")
    for n in range(1, 10):
        config.addinivalue_line("markers", f"ex{n}: the check of EXERCISE {n}")
    chosen = config.option.markexpr
    if "slow" not in chosen:
        config.option.markexpr = f"({chosen}) and not slow" if chosen else "not slow"
    # pytest shows this warning of WavLM's attention, although model.py switches it off.
    warning = "ignore:Support for mismatched key_padding_mask"
    config.addinivalue_line("filterwarnings", warning)


def write_wav(path, samples, rate=16000):
    """Write a WAV file of one channel and 16 bits by hand, with its header."""
    numbers = [round(32767 * max(-1, min(1, x))) for x in samples]
    pcm = struct.pack(f"<{len(numbers)}h", *numbers)
    header = b"RIFF" + struct.pack("<I", 36 + len(pcm)) + b"WAVEfmt "
    header += struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + b"data" + struct.pack("<I", len(pcm)) + pcm)


def change(path, old, new):
    """Replace bytes in a file, which must be there."""
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def write_dialog(root, dialog, turns):
    """Write one dialogue in the layout of IEMOCAP, with a tone for each recording.

    The turns (suffix, start, end, emotion, words) are written in their order.
    """
    session = root / f"Session{dialog[4]}"
    labels = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
    words = ""
    for suffix, start, end, emotion, text in turns:
        name = f"{dialog}_{suffix}"
        labels += f"[{start:.4f} - {end:.4f}]\t{name}\t{emotion}"
        labels += "\t[2.5000, 2.5000, 2.5000]\n"
        labels += "C-E2:\tNeutral;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\n\n"
        words += f"{name} [{start:08.4f}-{end:08.4f}]: {text}\n"
        n = round((end - start) * 16000)
        pitch = 200 + 40 * (sum(map(ord, name)) % 7)  # Hz
        step = 2 * math.pi * pitch / 16000
        samples = [0.3 * math.sin(step * i) for i in range(n)]
        write_wav(session / "sentences" / "wav" / dialog / f"{name}.wav", samples)
    for folder, text in (("EmoEvaluation", labels), ("transcriptions", words)):
        path = session / "dialog" / folder / f"{dialog}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def neutral(right, n=8, fold=5, dialogs=1):
    """Make rows for write_run: n neutral ones, the first right, the others "sad"."""
    rows = []
    for i in range(n):
        name = f"Ses0{fold}F_impro{1 + i * dialogs // n:02}_F{i:03}"
        rows.append((name, 0, 0 if i < right else 3))
    return rows


def write_run(
    folder, corpus="toy", fusion="mmt", frozen=False, fold=5, seed=0, **others
):
    """Write a finished run by hand, all its files but the checkpoint. Returns `folder`.

    others   rows: (utterance, label, prediction), classes by number. By default six of
             eight neutral utterances are right, and the others are taken for sad
             log: one dict per epoch
             the rest are values for config.json or result.json, like title="toy, x=1"
    """
    rows = others.pop("rows", None) or neutral(6, fold=fold)
    log = others.pop("log", [])
    confusion = [[0] * 4 for _ in range(4)]
    table = "utterance,speaker,label,prediction,neu,hap,ang,sad\n"
    for name, label, guess in rows:
        confusion[label][guess] += 1
        speaker = name[:5] + name.rpartition("_")[2][0]
        table += f"{name},{speaker},{CLASSES[label]},{CLASSES[guess]},.4,.2,.2,.2\n"
    recalls = [row[k] / sum(row) for k, row in enumerate(confusion) if any(row)]
    triggers = [row["epoch"] for row in log if row["event"] == "finetune"]

    run = {"corpus": corpus, "fusion": fusion, "frozen": frozen}
    run |= {"fold": fold, "seed": seed}
    config = {**run, "title": corpus, "settings": {"precision": "fp32"}, "model": {}}
    config |= {"corpus_checksum": "0", "weights_checksums": {}, "upstreams": {}}
    wa = sum(label == guess for _, label, guess in rows) / len(rows)
    result = {**run, "wa": wa, "ua": sum(recalls) / len(recalls)}
    result |= {"confusion": confusion, "finetune_epoch": max(triggers, default=None)}
    for content in (config, result):
        content |= {key: others[key] for key in content.keys() & others.keys()}
    assert others.keys() <= config.keys() | result.keys()

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "predictions.csv").write_text(table)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return folder


WORDS = {
    "neu": "paper street",
    "hap": "lovely party",
    "ang": "hate it",
    "sad": "all alone",
    "fru": "oh no",
}


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """Five sessions of one dialogue of 14 turns. One turn in five has no class."""
    root = tmp_path_factory.mktemp("corpus") / "small"
    for session in range(1, 6):
        turns = []
        counts = {"F": 0, "M": 0}
        start = 1.0
        for k in range(14):
            emotion = list(WORDS)[(2 * k + k // 5 + session) % 5]
            letter = "FM"[(k // 2) % 2]
            suffix = f"{letter}{counts[letter]:03}"
            counts[letter] += 1
            end = start + 0.1 + 0.02 * (k % 5)
            words = f"{WORDS[emotion]} {k}" + " oh" * (k % 3)
            turns.append((suffix, start, end, emotion, words))
            start = end + 0.3
        write_dialog(root, f"Ses0{session}F_impro01", sorted(turns))
    return root


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The folder of the tiny upstreams: audio and text are in it, as from the hub."""
    import model

    folder = tmp_path_factory.mktemp("tiny")
    texts = ["I Hate it", "lovely party , so", "all alone again and"]
    model.make_tiny_upstreams(folder, texts)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """{"audio": Upstream, "text": Upstream} with random weights, loaded from disk."""
    import model

    return {m: model.Upstream(str(tiny_folder / m), m) for m in ("audio", "text")}
