"""Damaged files, hostile files, full disks, kills and bugs: no loss, no silence."""

import importlib
import io
import multiprocessing
import os
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from data import InputError
from tests.conftest import change, write_run
from tests.robust.conftest import mutations, outcome

# --- Damaged and hostile files --------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", "result.json", "predictions.csv", "checkpoint.pt"]
)
def test_mutated_files_of_a_run_are_named_or_say_the_same(name, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    run = evaluate.read_json(folder / "config.json")

    def read():
        rows = evaluate.read_run(folder).predictions
        state = evaluate.load_checkpoint(folder / "checkpoint.pt", run)
        content = io.BytesIO()
        torch.save(state, content)
        guesses = sorted((row["label"], row["prediction"]) for row in rows)
        return content.getvalue(), guesses

    clean = read()
    n_damaged = 0
    for _ in mutations(folder / name, 30):
        try:
            assert read() == clean
        except InputError as error:
            n_damaged += 1
            assert str(folder) in str(error)
            assert not re.search("delete|remove", str(error).lower())
    assert n_damaged > 12


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_damaged_and_hostile_files_are_named_and_run_no_code(
    encoders, cache, tmp_path, monkeypatch
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
    for content in [b"", states[:-50], Path("hostile.npy").read_bytes()]:
        source.files[0].write_bytes(content)
        with pytest.raises(InputError, match=source.files[0].name):
            source([0])
    # An upstream with pickled weights.
    shutil.copytree(encoders / "text", "upstream")
    Path("upstream", "model.safetensors").unlink()
    torch.save({"embeddings": Hostile()}, "upstream/pytorch_model.bin")
    with pytest.raises(InputError, match="upstream"):
        evaluate.load_upstream(str(tmp_path / "upstream"), "text", "fp32")
    assert not Path("ran").exists()


def test_what_is_half_deleted_is_named_with_the_folder_that_may_go(
    command, encoders, small_corpus, tmp_path
):
    """The toy and the tiny upstreams are written again."""
    toy = shutil.copytree(small_corpus, tmp_path / "toy")
    (toy / "toy.json").touch()
    next(toy.rglob("*.wav")).unlink()
    with pytest.raises(InputError, match=f"Delete {toy}, then: python data.py toy"):
        train.main(["--iemocap", str(toy)])
    copy = shutil.copytree(encoders, tmp_path / encoders.name)
    (copy / "text" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=f"{copy.name}.*tiny-... can be deleted"):
        train.main([*command, "--cache", str(tmp_path)])


def test_an_upstream_that_moved_is_found_by_its_new_path(finished, encoders, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    new = tmp_path / "new"
    change(folder / "config.json", str(encoders).encode(), str(new).encode())
    with pytest.raises(InputError, match="new path into the run's config.json"):
        evaluate.Recognizer(folder)
    shutil.copytree(encoders, new)
    assert evaluate.Recognizer(folder).upstreams.keys() == {"audio", "text"}
    # A folder above the run names the run.
    with pytest.raises(InputError, match=str(folder)):
        evaluate.Recognizer(tmp_path)


# --- Reports --------------------------------------------------------------------------


def test_runs_of_unlike_corpora_are_not_in_one_mean(tmp_path):
    for fold, checksum in ((1, "0"), (2, "0"), (3, "1")):
        write_run(tmp_path / str(fold), fold=fold, corpus_checksum=checksum)
    runs, (problem,) = evaluate.find_runs(tmp_path)
    assert [run.config["fold"] for run in runs] == [1, 2]
    assert str(tmp_path / "3") in problem and str(tmp_path / "1") in problem


def test_a_picture_can_have_any_title_and_needs_no_screen(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    write_run(tmp_path / "runs", corpus="100$^$")
    evaluate.main(["draw", str(tmp_path / "runs"), str(tmp_path / "pictures")])
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1


# --- Disks, memory, systems, bugs -----------------------------------------------------


def test_a_full_disk_is_an_error_and_the_same_command_goes_on(
    command, finished, encoders, tmp_path
):
    """A limit on the size of files stands for the disk."""
    resource = pytest.importorskip("resource")
    shutil.copytree(encoders, tmp_path / "cache" / encoders.name)
    flags = ["--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # First the states do not fit, then the checkpoint.
    for limit in (700, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError):
                train.main([*command, *flags])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not [*tmp_path.rglob("*.part"), *tmp_path.rglob("checkpoint.pt")]
    train.main([*command, *flags])
    assert outcome(tmp_path) == outcome(finished)


def test_a_run_that_stops_says_how_to_go_on(
    command, finished, tmp_path, monkeypatch, capsys
):
    """While upstreams are frozen, their states come from the cache."""
    flags = [*command, "--out", str(tmp_path)]
    for error, words in (
        (torch.OutOfMemoryError("CUDA"), "out of GPU memory. Add --micro-batch 8"),
        (KeyboardInterrupt(), "Run the same command again"),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=words):
            patch.setattr("model.Upstream.forward", Mock(side_effect=error))
            data.run_command(lambda: train.main(flags))
    train.main([*flags, "--micro-batch", "8"])
    assert capsys.readouterr().out.count("resuming after epoch 2") == 2
    (run,), _ = evaluate.find_runs(tmp_path)
    assert (run.result["epochs"], run.result["finetune_epoch"]) == (4, 2)


@pytest.mark.parametrize(
    "size, frozen, flag",
    [(8, False, "--micro-batch 5"), (24, False, "--micro-batch 28")]
    + [(80, False, ""), (8, True, "")],
)
def test_a_small_gpu_is_warned_of(size, frozen, flag, monkeypatch, capsys):
    """4 GiB and 0.7 GiB a clip, of the whole card: 4 + 32 * 0.7 = 26.4 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, size * 2**30))
    args = train.parse_args(["--iemocap", "x"])
    args.device = "cuda"
    train.warn_of_memory(args, frozen, {"audio": None, "text": None})
    printed = capsys.readouterr().out
    assert printed.endswith(f"{flag}\n") if flag else printed == ""


def test_nothing_of_unix_is_needed_and_imports_do_not_warn(
    command, finished, tmp_path, monkeypatch
):
    """Windows has none of the first three modules."""
    for name in ("fcntl", "resource", "pwd"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("model", "data", "evaluate", "train"):
        monkeypatch.delitem(sys.modules, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = importlib.import_module("train")
    again.main([*command, "--out", str(tmp_path)])
    assert outcome(tmp_path) == outcome(finished)


def test_a_terminal_gets_each_line_at_once_without_unicode_too(monkeypatch):
    """Tables have → and ±, which the terminal of some clusters does not know."""
    for name in ("stdout", "stderr"):
        screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, name, screen)
    data.run_command(lambda: print("CMT(A→T) 1 ± 2"))
    assert sys.stdout.buffer.getvalue().decode() == "CMT(A?T) 1 ? 2\n"


class Bug(NameError, TypeError, ValueError, KeyError, RuntimeError):
    """All that a mistake in the code may raise, in one."""


BUGS = "data.read_dialog data.load_wav data.clip data.split data.gather "
BUGS += "model.Upstream.prepare evaluate.metrics train.Patience.step"


@pytest.mark.parametrize("name", BUGS.split())
def test_a_bug_is_a_traceback(name, command, tmp_path, monkeypatch):
    """No part of the four files takes a bug for a fault of the user's files."""
    monkeypatch.setattr(name, Mock(side_effect=Bug(name)))
    with pytest.raises(Bug, match=name):
        data.run_command(lambda: train.main([*command, "--out", str(tmp_path)]))


# --- Many processes, many runs --------------------------------------------------------


def train_until(suffix, count, flags):
    """Train. The process kills itself before a file, for example the second log.jsonl.

    Every file is written by another name first, so only renaming changes the disk.
    """
    rename = os.replace
    written = []

    def replace(old, new):
        written.append(new.suffix)
        if written.count(suffix) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(old, new)

    os.replace = replace
    train.main(flags)


@pytest.mark.filterwarnings("ignore:.*multi-threaded")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="CUDA allows no fork")
def test_killed_in_both_phases_a_run_ends_with_the_same_bits(
    command, finished, tmp_path
):
    """It dies in filling the cache, in epochs 2 and 4, and before its predictions."""
    flags = [*command, "--out", str(tmp_path), "--cache", str(tmp_path / "cache")]
    fork = multiprocessing.get_context("fork")
    for death in [(".npy", 60), (".jsonl", 2), (".pt", 3), (".csv", 1)]:
        process = fork.Process(target=train_until, args=(*death, flags))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    train.main(flags)
    assert outcome(tmp_path) == outcome(finished)


@pytest.mark.slow
def test_two_hundred_runs_leave_nothing_behind(command, tmp_path):
    """Memory and open files stay the same after the first twenty runs."""
    usage = []
    for seed in range(200):
        train.main([*command, "--out", str(tmp_path), "--seed", str(seed)])
        if seed in (19, 199):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            usage.append((pages, len(os.listdir("/proc/self/fd"))))
    early, late = usage
    assert late[0] < 1.1 * early[0] and late[1] == early[1]
