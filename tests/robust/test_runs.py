"""Damaged files, hostile files, full disks, kills and bugs: no loss, no silence."""

import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import model
import train
from data import InputError
from tests.conftest import write_dialog

# At a rate of 0 the loss stays the same. So fine-tuning starts after epoch 2.
CONSTANT = "--lr-frozen 0 --finetune-after 1"


@pytest.fixture(scope="module")
def command(small_corpus, tmp_path_factory):
    """The flags of a run, without --out. All of its runs share one cache."""
    flags = ["--iemocap", str(small_corpus), "--partial", "--upstream", "tiny"]
    flags += ["--cache", str(tmp_path_factory.mktemp("cache")), "--device", "cpu"]
    return [*flags, *f"--fusion ef --max-epochs 4 {CONSTANT} --stop-after 2".split()]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs")
    train.main([*command, "--out", str(out)])
    return next(out.rglob("result.json")).parent


@pytest.fixture(scope="module")
def cache(command, finished):
    return Path(command[command.index("--cache") + 1])


# --- Damaged and hostile files --------------------------------------------------------


def mutate(content, rng):
    """Change one bit, or cut out, double, zero or replace a piece, or cut the end."""
    start = rng.randrange(len(content))
    size = rng.choice((1, 2, 8, 60, 1000))
    head, piece, tail = content[:start], content[start:][:size], content[start + size :]
    bit = bytes([piece[0] ^ 1 << rng.randrange(8)])
    middle = [bit + piece[1:], b"", piece * 2, bytes(len(piece)), rng.randbytes(size)]
    return rng.choice([*[head + new + tail for new in middle], head])


def test_a_mutated_corpus_is_whole_or_a_dialogue_is_left_out(tmp_path):
    """A mutation raises no other error, and changes no more than its own dialogue."""
    turns = [("F000", 0, 0.1, "neu", "i hate it"), ("M000", 0.5, 0.6, "fru", "so")]
    for session in (1, 2):
        write_dialog(tmp_path, f"Ses0{session}F_impro01", turns)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    clean, _ = data.read_iemocap(tmp_path)
    n_damaged = 0
    for seed in range(250):
        rng = random.Random(seed)
        path = rng.choice(files)
        content = path.read_bytes()
        path.write_bytes(mutate(content, rng))
        corpus, problems = data.read_iemocap(tmp_path)
        others = [u for u in clean if u.dialog != path.stem[:14]]
        assert [u for u in corpus if u in others] == others
        if problems:
            assert corpus == others and len(problems) == 1
            n_damaged += 1
        else:
            assert [u.id for u in corpus] == [u.id for u in clean]
            clips = [data.clip(data.load_wav(u.wav)) for u in corpus]
            assert all(x.isfinite().all() and 400 <= len(x) <= 80000 for x in clips)
        path.write_bytes(content)
    assert n_damaged > 60


# How many of 100 mutations are noticed, at least. A checkpoint has a checksum.
FILES = {"config.json": 50, "result.json": 50, "predictions.csv": 50}
FILES |= {"checkpoint.pt": 90}


@pytest.mark.parametrize("name", FILES)
def test_mutated_files_of_a_run_are_named_or_say_the_same(name, finished, tmp_path):
    folder = tmp_path / "fold5-seed0"
    shutil.copytree(finished, folder)
    run = evaluate.read_json(folder / "config.json")

    def read():
        if name == "checkpoint.pt":
            state = evaluate.load_checkpoint(folder / name, run)
            return {key: value.tolist() for key, value in state["model"].items()}
        rows = evaluate.read_run(folder).predictions
        return Counter((row["label"], row["prediction"]) for row in rows)

    clean = read()
    content = (folder / name).read_bytes()
    n_damaged = 0
    for seed in range(100):
        (folder / name).write_bytes(mutate(content, random.Random(seed)))
        try:
            assert read() == clean
        except InputError as error:
            n_damaged += 1
            assert str(folder) in str(error)
            assert not re.search("delete|remove", str(error).lower())
    assert n_damaged >= FILES[name]


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_damaged_and_hostile_files_are_named_and_run_no_code(
    cache, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    torch.save({"run": Hostile()}, "checkpoint.pt")
    with pytest.raises(InputError, match="checkpoint.pt"):
        evaluate.load_checkpoint(Path("checkpoint.pt"), {})
    # States that end too early, and an array of objects.
    utterance = data.Utterance("d_000", 1, "d", "s", 0.0, 0.0, "", "neu", None)
    source = data.Source(None, {0: torch.zeros(3)}, [utterance], tmp_path, "cpu")
    states = next(cache.glob("audio-fp32-*/*.npy")).read_bytes()
    np.save("hostile.npy", np.array([Hostile()]), allow_pickle=True)
    pieces = [states[:length] for length in range(0, len(states), 50)]
    for content in [*pieces, Path("hostile.npy").read_bytes()]:
        source.files[0].write_bytes(content)
        with pytest.raises(InputError, match=source.files[0].name):
            source([0])
    # An upstream with pickled weights.
    shutil.copytree(next(cache.glob("tiny-*/text")), "upstream")
    Path("upstream", "model.safetensors").unlink()
    torch.save({"embeddings": Hostile()}, "upstream/pytorch_model.bin")
    with pytest.raises(InputError):
        evaluate.load_upstream(str(tmp_path / "upstream"), "text", "fp32")
    assert not Path("ran").exists()


# --- Disks, systems, bugs -------------------------------------------------------------


def test_a_full_disk_is_an_error_and_the_same_command_goes_on(
    command, cache, finished, tmp_path
):
    """A limit on the size of files stands for the disk."""
    resource = pytest.importorskip("resource")
    tiny = next(cache.glob("tiny-*"))
    shutil.copytree(tiny, tmp_path / "cache" / tiny.name)
    flags = ["--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # First the states do not fit, then the checkpoint.
    for limit, started in ((700, False), (20_000, True)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError):
                train.main([*command, *flags])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        # There is no run before all of its states are there.
        assert (tmp_path / "runs").exists() == started
        assert not [*tmp_path.rglob("*.part"), *tmp_path.rglob("checkpoint.pt")]
    train.main([*command, *flags])
    assert same_predictions(tmp_path, finished)


def same_predictions(root, finished):
    (path,) = root.rglob("predictions.csv")
    return path.read_text() == (finished / "predictions.csv").read_text()


def test_nothing_of_unix_is_needed_and_imports_do_not_warn(
    command, finished, tmp_path, monkeypatch
):
    """Windows has none of these modules and functions."""
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("posix_fallocate", "fork", "getuid"):
        monkeypatch.delattr(os, name, raising=False)
    for name in ("model", "data", "evaluate", "train"):
        monkeypatch.delitem(sys.modules, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = importlib.import_module("train")
    again.main([*command, "--out", str(tmp_path)])
    assert same_predictions(tmp_path, finished)


class Bug(NameError, TypeError, ValueError, KeyError, RuntimeError):
    """All that a mistake in the code may raise, in one."""


@pytest.mark.parametrize(
    "owner, name",
    [
        (data, "read_dialog"),
        (data, "load_wav"),
        (data, "clip"),
        (data, "split"),
        (data, "gather"),
        (model, "masked_mean"),
        (model.Upstream, "prepare"),
        (evaluate, "metrics"),
        (train.Patience, "step"),
        (train, "train_epoch"),
    ],
)
def test_a_bug_is_a_traceback(owner, name, command, tmp_path, monkeypatch):
    """No part of the four files takes a bug for a fault of the user's files."""

    def wrong(*args, **options):
        raise Bug(name)

    monkeypatch.setattr(owner, name, wrong)
    flags = [*command, "--fusion", "mmt", "--out", str(tmp_path)]
    with pytest.raises(Bug, match=name):
        data.run_command(lambda: train.main(flags))


# --- Processes ------------------------------------------------------------------------

# The server imports the libraries once, and each new process is a fork of it.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__, "transformers.models.wavlm.modeling_wavlm"])


def train_until(n_renames, output, flags):
    """Train. Before it renames a file for the n-th time, the process kills itself.

    Every file is written by another name first, so only renaming changes the disk.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    rename = os.replace
    done = []

    def replace(old, new):
        done.append(new)
        if len(done) == n_renames:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(old, new)

    os.replace = replace
    data.run_command(lambda: train.main(flags))


def start(root, flags, n_renames=None):
    output = root.with_suffix(".output")
    output.parent.mkdir(exist_ok=True)
    output.touch()
    arguments = (n_renames, output, [*flags, "--out", str(root)])
    process = SERVER.Process(target=train_until, args=arguments, daemon=True)
    process.start()
    return process


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


# The first has frozen upstreams, the second changes them from epoch 3 on.
PHASES = ["--frozen --lr-frozen 0.01 --max-epochs 3", "--lr-finetune 0.01"]


@pytest.mark.parametrize("phase", PHASES)
def test_killed_between_two_files_a_run_ends_with_the_same_bits(
    phase, command, tmp_path
):
    flags = [*command, "--stop-after", "9", *phase.split()]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    codes = []
    # The first kill is before the checkpoint, the next is after it, and so on.
    while 0 not in codes:
        process = start(tmp_path / "killed", flags, 3 + len(codes))
        process.join()
        codes.append(process.exitcode)
    assert codes == [-signal.SIGKILL] * 3 + [0]
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_two_processes_fill_one_cache_and_end_alike(command, finished, tmp_path):
    """Nothing is locked: both write the same files by other names, and rename them."""
    flags = [*command, "--cache", str(tmp_path / "cache")]
    both = [start(tmp_path / "runs", flags) for _ in range(2)]
    for process in both:
        process.join()
        assert process.exitcode == 0, (tmp_path / "runs.output").read_text()
    assert same_predictions(tmp_path, finished)
    assert not list(tmp_path.rglob("*.part"))


def test_an_interrupted_run_says_how_to_go_on(command, tmp_path):
    """Its lines arrive one by one, in a file too."""
    endless = ["--stop-after", "1000000", "--max-epochs", "1000000", "--frozen"]
    process = start(tmp_path / "runs", [*command, *endless])
    output = tmp_path / "runs.output"
    while process.is_alive() and "epoch  3 " not in output.read_text():
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 1
    assert "the same command" in output.read_text()
    assert "Traceback" not in output.read_text()


@pytest.mark.slow
def test_killed_thirty_times_at_any_moment_a_run_ends_with_the_same_bits(
    command, tmp_path
):
    """From nothing to the end, with the tiny upstreams and the cache."""
    flags = [*command, "--stop-after", "9", *PHASES[1].split(), "--cache"]
    # Measure the second process, because the first one waits for the server.
    for name in ("first", "whole"):
        started = time.monotonic()
        start(tmp_path / name, [*flags, str(tmp_path / name / "cache")]).join()
        seconds = time.monotonic() - started
    rng = random.Random(0)
    n_kills = 0
    while n_kills < 30:
        root = tmp_path / f"killed{n_kills}"
        while not list(root.rglob("result.json")):
            process = start(root, [*flags, str(root / "cache")])
            process.join(timeout=rng.uniform(0, 0.8) * seconds)
            n_kills += process.is_alive()
            process.kill()
            process.join()
        assert outcome(root) == outcome(tmp_path / "whole")


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
    early, late = usage
    assert late[0] < 1.1 * early[0] and late[1] == early[1]
