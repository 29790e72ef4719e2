"""Damaged runs, hostile files, full disks, kills and bugs: no loss, no silence."""

import ast
import importlib.util
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from data import InputError
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def command(small_corpus, work):
    """The flags of a run, without --out. All of its runs share one cache.

    At a rate of 0 the loss stays the same. So fine-tuning starts after epoch 2.
    """
    flags = ["--iemocap", str(small_corpus), "--partial", "--upstream", "tiny"]
    flags += ["--cache", str(work / "cache"), "--device", "cpu", "--fusion", "ef"]
    flags += ["--max-epochs", "4"]
    return [*flags, "--lr-frozen", "0", "--finetune-after", "1", "--stop-after", "2"]


@pytest.fixture(scope="module")
def finished(command, work):
    """The folder of a finished run."""
    train.main([*command, "--out", str(work / "runs")])
    (path,) = (work / "runs").rglob("result.json")
    return path.parent


def python(*arguments, **options):
    """Start Python in the project's folder."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


# --- Damaged files --------------------------------------------------------------------


def mutate(content, rng):
    """Change one bit, or cut out, double, zero or replace a piece, or cut the end."""
    start = rng.randrange(len(content))
    size = rng.choice((1, 2, 8, 60, 1000))
    head, piece, tail = content[:start], content[start:][:size], content[start + size :]
    bit = bytes([piece[0] ^ 1 << rng.randrange(8)])
    middle = [bit + piece[1:], b"", piece * 2, bytes(len(piece)), rng.randbytes(size)]
    return rng.choice([*[head + new + tail for new in middle], head])


@pytest.mark.parametrize("name", ["config.json", "result.json", "predictions.csv"])
def test_mutated_run_folders_are_named_or_count_the_same(name, finished, tmp_path):
    folder = tmp_path / "fold5-seed0"
    shutil.copytree(finished, folder)
    path = folder / name
    content = path.read_bytes()
    ((clean,), _) = evaluate.find_runs(tmp_path)
    n_damaged = 0
    for seed in range(200):
        path.write_bytes(mutate(content, random.Random(seed)))
        runs, damaged = evaluate.find_runs(tmp_path)
        n_damaged += len(damaged)
        for line in damaged:
            assert str(folder) in line
        for run in runs:
            assert evaluate.metrics(*answers(run)) == evaluate.metrics(*answers(clean))
        evaluate.print_tables(runs)
        assert len(runs) + len(damaged) == 1
    assert n_damaged > 50


def answers(run):
    rows = run.predictions
    truth = [data.CLASSES.index(row["label"]) for row in rows]
    return truth, [data.CLASSES.index(row["prediction"]) for row in rows]


def test_mutated_checkpoints_are_one_sentence_and_nothing_is_deleted(
    finished, tmp_path
):
    content = (finished / "checkpoint.pt").read_bytes()
    run = {key: evaluate.read_json(finished / "config.json")[key] for key in KEYS}
    clean = evaluate.load_checkpoint(finished / "checkpoint.pt", run)
    path = tmp_path / "checkpoint.pt"
    n_damaged = 0
    for seed in range(100):
        path.write_bytes(mutate(content, random.Random(seed)))
        try:
            state = evaluate.load_checkpoint(path, run)
            for name, value in clean["model"].items():
                assert torch.equal(value, state["model"][name])
        except InputError as error:
            n_damaged += 1
            assert str(path) in str(error)
            assert not re.search("delete|remove", str(error).lower())
    assert n_damaged > 80


KEYS = ("corpus", "fusion", "frozen", "fold", "seed")


def test_states_that_end_too_early_are_named(finished, work, small_corpus, tmp_path):
    corpus, _ = data.read_iemocap(small_corpus)
    source = data.Source(None, {0: torch.zeros(3)}, corpus, tmp_path, "cpu")
    path = source.files[0]
    content = next((work / "cache").glob("audio-fp32-*/*.npy")).read_bytes()
    for length in range(0, len(content), 50):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=path.name):
            source([0])


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_a_hostile_pickle_runs_no_code(
    finished, work, small_corpus, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "checkpoint.pt"
    torch.save({"run": Hostile()}, checkpoint)
    with pytest.raises(InputError, match="checkpoint.pt"):
        evaluate.load_checkpoint(checkpoint, {})

    # A file of the cache that is an array of objects.
    corpus, _ = data.read_iemocap(small_corpus)
    source = data.Source(None, {0: torch.zeros(3)}, corpus, tmp_path, "cpu")
    np.save(source.files[0], np.array([Hostile()]), allow_pickle=True)
    with pytest.raises(InputError, match=source.files[0].name):
        source([0])

    # An upstream with pickled weights, and then with code of its own.
    folder = tmp_path / "upstream"
    (tiny,) = (work / "cache").glob("tiny-*")
    shutil.copytree(tiny / "text", folder)
    (folder / "model.safetensors").unlink()
    torch.save({"embeddings": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises((InputError, pickle.UnpicklingError)):
        evaluate.load_upstream(str(folder), "text", "fp32")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.Evil"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("import os\nos.mkdir('ran')")
    with pytest.raises(InputError):
        evaluate.load_upstream(str(folder), "text", "fp32")
    assert not (tmp_path / "ran").exists()


# --- Disks, memory, terminals ---------------------------------------------------------


# At the end of a disk, np.save to an open file cuts the numbers without an error.
@pytest.mark.parametrize(
    ("limit", "what"),
    [
        (700, "states"),
        (20_000, "checkpoint"),
    ],
)
def test_a_full_disk_is_an_error_and_the_same_command_goes_on(
    limit, what, command, finished, work, tmp_path
):
    """A limit on the size of files stands for the disk."""
    resource = pytest.importorskip("resource")
    (tiny,) = (work / "cache").glob("tiny-*")
    shutil.copytree(tiny, tmp_path / "cache" / tiny.name)
    folders = ["--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError):
            train.main([*command, *folders])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # There is no run before all of its states are there.
    assert (tmp_path / "runs").exists() == (what == "checkpoint")
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("checkpoint.pt"))
    train.main([*command, *folders])
    (path,) = tmp_path.rglob("predictions.csv")
    assert path.read_text() == (finished / "predictions.csv").read_text()


def test_wrong_input_is_one_sentence_for_the_user(command, tmp_path):
    """sys.exit prints a string and exits with 1."""

    def without_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    def interrupted():
        raise KeyboardInterrupt

    (tmp_path / "file").write_text("")
    blocked = [*command, "--out", str(tmp_path / "file")]
    for main, words in [
        (lambda: train.main(blocked), f"error: .*{tmp_path / 'file'}"),
        (lambda: train.main([*command, "--fold", "6"]), "error: --fold 6"),
        (without_memory, "error: .*GPU memory.*--micro-batch"),
        (interrupted, "(?i)the same command"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            data.run_command(main)
        assert re.search(words, stopped.value.code)


def test_output_fits_poor_terminals_and_arrives_at_once(monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii"))
    found = []

    def main():
        print("CMT(A→T) 1 ± 2")
        found.append(content.getvalue())

    data.run_command(main)
    assert found == [b"CMT(A?T) 1 ? 2\n"]


# --- Processes ------------------------------------------------------------------------


def test_an_interrupted_run_says_how_to_go_on(command, tmp_path):
    """The lines of a run arrive one by one, also in a pipe."""
    endless = [*command, "--stop-after", 10**6, "--max-epochs", 10**6]
    process = python(
        "train.py",
        *endless,
        *("--out", tmp_path, "--frozen"),
        # A command that a script starts in the background ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        for line in process.stdout:
            if re.search(r"epoch +3 ", line):
                break
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "the same command" in error.lower()
    assert "Traceback" not in error
    (path,) = tmp_path.rglob("log.jsonl")
    assert len(path.read_text().splitlines()) >= 3


# Windows has none of these modules and functions.
WITHOUT_UNIX = """
import os
import sys
import warnings

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("posix_fallocate", "fork", "getuid"):
    vars(os).pop(name, None)
with warnings.catch_warnings(action="error"):
    import data
    import train
data.run_command(train.main)
"""


def test_two_processes_without_unix_fill_one_cache_and_end_alike(
    command, finished, tmp_path
):
    """Nothing is locked: both write the same files by other names, and rename them.

    The imports of the files do not warn.
    """
    # PyTorch asks pwd for the name of the user if no variable has it.
    environment = {**os.environ, "LOGNAME": "me"}
    flags = [*command, "--cache", tmp_path / "cache", "--out", tmp_path / "runs"]
    both = [python("-c", WITHOUT_UNIX, *flags, env=environment) for _ in range(2)]
    for process in both:
        _, error = process.communicate(timeout=200)
        assert process.returncode == 0, error
    (path,) = tmp_path.rglob("predictions.csv")
    assert path.read_text() == (finished / "predictions.csv").read_text()
    assert not list(tmp_path.rglob("*.part"))


# --- A bug is a traceback -------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "data.read_dialog",
        "data.load_wav",
        "data.clip",
        "data.split",
        "data.gather",
        "model.masked_mean",
        "model.prepare",
        "evaluate.metrics",
        "train.step",
        "train.train_epoch",
    ],
)
def test_a_misspelt_name_is_a_traceback_that_shows_its_line(
    place, command, tmp_path, monkeypatch
):
    """No part of the four files takes a bug for a fault of the user's files."""
    module_name, _, function = place.partition(".")
    for name in ("model", "data", "evaluate", "train"):
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        if name == module_name:
            source, wrong_line = misspell(source, function)
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    for name in ("model", "data", "evaluate", "train"):
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    flags = [*command, "--fusion", "mmt", "--out", str(tmp_path / "runs")]
    with pytest.raises(NameError) as error:
        module.data.run_command(lambda: module.main(flags))
    assert wrong_line in "".join(traceback.format_exception(error.value))


def misspell(source, function):
    """Misspell the first name in the last statement of a function that has one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            for statement in node.body:
                names = [x for x in ast.walk(statement) if isinstance(x, ast.Name)]
                if names:
                    name = min(names, key=lambda name: (name.lineno, name.col_offset))
    lines = source.split("\n")
    line = lines[name.lineno - 1]
    end = name.col_offset + len(name.id)
    lines[name.lineno - 1] = f"{line[:end]}_misspelt{line[end:]}"
    return "\n".join(lines), lines[name.lineno - 1].strip()


# --- Slow -----------------------------------------------------------------------------

# The answers of Patience are given, so that both phases are short on every machine.
SCRIPTED = """
import data
import train


class Scripted(train.Patience):
    epoch = 0

    def step(self, dev_loss):
        self.epoch += 1
        if self.epoch == 4:
            self.finetuning = True
            return "finetune"
        return "stop" if self.epoch == 8 else "continue"


train.Patience = Scripted
print("ready", flush=True)
data.run_command(train.main)
"""


def outcome(root):
    """Everything that a run below this folder has computed, but no seconds."""
    (path,) = root.rglob("result.json")
    state = torch.load(path.with_name("checkpoint.pt"), weights_only=True)
    result = json.loads(path.read_text())
    for row in [*state["log"], result]:
        del row["seconds"]
    weights = []
    for part in [state["model"], *state["upstreams"].values()]:
        weights += [(name, value.numpy().tobytes()) for name, value in part.items()]
    return state["log"], result, weights, path.with_name("predictions.csv").read_text()


@pytest.mark.slow
def test_killed_thirty_times_a_run_ends_with_the_same_bits(small_corpus, tmp_path):
    """From nothing to the end, with the tiny upstreams and the cache."""

    def start(root):
        flags = ["--iemocap", small_corpus, "--partial", "--upstream", "tiny"]
        flags += ["--out", root / "runs", "--cache", root / "cache", "--device", "cpu"]
        process = python("-c", SCRIPTED, *flags)
        assert process.stdout.readline() == "ready\n"
        return process

    started = time.monotonic()
    process = start(tmp_path / "whole")
    process.communicate()
    seconds = time.monotonic() - started
    assert process.returncode == 0
    whole = outcome(tmp_path / "whole")
    assert whole[1]["finetune_epoch"] == 4
    rng = random.Random(0)
    n_kills = 0
    while n_kills < 30:
        root = tmp_path / f"killed{n_kills}"
        while not list(root.rglob("result.json")):
            process = start(root)
            try:
                process.communicate(timeout=rng.uniform(0, 0.5) * seconds)
                assert process.returncode == 0
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                n_kills += 1
        assert outcome(root) == whole


@pytest.mark.slow
def test_two_hundred_runs_leave_nothing_behind(command, finished, tmp_path):
    """Memory and open files stay the same after the first twenty runs."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    usage = []
    for seed in range(200):
        train.main([*command, "--out", str(tmp_path), "--seed", str(seed)])
        if seed in (19, 199):
            memory = int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1])
            usage.append((memory, len(os.listdir("/proc/self/fd"))))
    (early, late) = usage
    assert late[0] < 1.1 * early[0]
    assert late[1] == early[1]
