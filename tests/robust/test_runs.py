"""Damaged files, hostile files, full disks, kills and bugs: no loss, no silence."""

import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import warnings
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from data import InputError
from tests.conftest import write_run
from tests.robust.conftest import mutations


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def command(small_corpus, cache):
    """The flags of a run, without --out. All of its runs share one cache."""
    # The server of the last tests imports the libraries while others run.
    forkserver.ensure_running()
    flags = ["--iemocap", str(small_corpus), "--partial", "--upstream", "tiny"]
    flags += ["--cache", str(cache), "--device", "cpu", "--fusion", "ef"]
    # At a rate of 0 the loss stays the same. So fine-tuning starts after epoch 2.
    return [*flags, *"--lr-frozen 0 --finetune-after 1 --max-epochs 4".split()]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs")
    train.main([*command, "--out", str(out)])
    return next(out.rglob("result.json")).parent


def outcome(root):
    """What the finished run below this folder has computed: losses and weights."""
    (path,) = root.rglob("result.json")
    state = torch.load(path.with_name("checkpoint.pt"), weights_only=True)
    keys = ("phase", "train_loss", "dev_loss")
    losses = [[row[key] for key in keys] for row in state["log"]]
    weights = []
    for part in [state["model"], *state["upstreams"].values()]:
        weights += [(name, value.numpy().tobytes()) for name, value in part.items()]
    return losses, weights, path.with_name("predictions.csv").read_text()


# --- Damaged and hostile files --------------------------------------------------------

FILES = ["config.json", "result.json", "predictions.csv", "checkpoint.pt"]


@pytest.mark.parametrize("name", FILES)
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
    for content in [b"", states[:-50], Path("hostile.npy").read_bytes()]:
        source.files[0].write_bytes(content)
        with pytest.raises(InputError, match=source.files[0].name):
            source([0])
    # An upstream with pickled weights.
    shutil.copytree(next(cache.glob("tiny-*/text")), "upstream")
    Path("upstream", "model.safetensors").unlink()
    torch.save({"embeddings": Hostile()}, "upstream/pytorch_model.bin")
    with pytest.raises(InputError, match="upstream"):
        evaluate.load_upstream(str(tmp_path / "upstream"), "text", "fp32")
    assert not Path("ran").exists()


def test_what_is_half_deleted_is_named_with_the_folder_that_may_go(
    command, finished, cache, small_corpus, tmp_path
):
    """The toy and the tiny upstreams are written again."""
    toy = shutil.copytree(small_corpus, tmp_path / "toy")
    (toy / "toy.json").touch()
    next(toy.rglob("*.wav")).unlink()
    with pytest.raises(InputError, match=f"Delete {toy}, then: python data.py toy"):
        train.main(["--iemocap", str(toy)])
    tiny = next(cache.glob("tiny-*"))
    copy = shutil.copytree(tiny, tmp_path / tiny.name)
    (copy / "text" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=f"{tiny.name}.*tiny-... can be deleted"):
        train.main([*command, "--cache", str(tmp_path)])


def test_an_upstream_that_moved_is_found_by_its_new_path(
    small_corpus, finished, cache, tmp_path
):
    wav = next(small_corpus.rglob("*.wav"))
    folder = shutil.copytree(finished, tmp_path / "run")
    config = evaluate.read_json(folder / "config.json")
    config["upstreams"] = {m: str(tmp_path / "new" / m) for m in ("audio", "text")}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="new path into the run's config.json"):
        evaluate.Recognizer(folder)
    shutil.copytree(next(cache.glob("tiny-*")), tmp_path / "new")
    answers = [evaluate.Recognizer(x).recognize(wav, "oh") for x in (folder, finished)]
    assert answers[0] == answers[1]


# --- Reports --------------------------------------------------------------------------


def test_runs_of_unlike_corpora_are_not_in_one_mean(tmp_path):
    for fold, checksum in ((1, "0"), (2, "0"), (3, "1")):
        write_run(tmp_path / str(fold), fold=fold, corpus_checksum=checksum)
    runs, (problem,) = evaluate.find_runs(tmp_path)
    assert [run.config["fold"] for run in runs] == [1, 2]
    other = runs[0].folder
    assert problem == f"{tmp_path / '3'}: left out, on other data than {other}"


def test_a_folder_that_is_no_run_names_the_runs_below_it(tmp_path):
    run = write_run(tmp_path / "runs" / "toy" / "fold5-seed0")
    with pytest.raises(InputError) as problem:
        evaluate.Recognizer(tmp_path / "runs")
    assert str(run) in str(problem.value)
    assert "delete" not in str(problem.value)


def test_a_picture_can_have_any_title_and_needs_no_screen(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    write_run(tmp_path / "runs", corpus="cost$ of $x_1")
    evaluate.main(["draw", str(tmp_path / "runs"), str(tmp_path / "pictures")])
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1


def test_tiny_stands_beside_every_number_of_a_dry_run(finished, small_corpus, capsys):
    wav = str(next(small_corpus.rglob("*.wav")))
    evaluate.main(["tables", str(finished)])
    evaluate.main(["recognize", str(finished), "--wav", wav, "--text", "lovely"])
    printed = capsys.readouterr().out.splitlines()
    # The title of a table, and the four classes of an utterance.
    numbers = [line for line in printed if re.search("Table|%$", line)]
    assert len(numbers) == 5 and all("upstream=tiny" in line for line in numbers)


# --- Disks, memory, systems, bugs -----------------------------------------------------


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
    assert outcome(tmp_path) == outcome(finished)


def test_out_of_gpu_memory_keeps_the_checkpoint(
    command, finished, tmp_path, monkeypatch, capsys
):
    """While upstreams are frozen, their states come from the cache."""

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    flags = [*command, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr("model.Upstream.forward", fail)
        with pytest.raises(SystemExit, match="out of GPU memory. Add --micro-batch 8"):
            data.run_command(lambda: train.main(flags))
    train.main([*flags, "--micro-batch", "8"])
    assert "resuming after epoch 2" in capsys.readouterr().out
    (run,), _ = evaluate.find_runs(tmp_path)
    assert (run.result["epochs"], run.result["finetune_epoch"]) == (4, 2)


@pytest.mark.parametrize(
    "gibibytes, frozen, fits",
    [(8, False, 5), (24, False, 28), (80, False, None), (8, True, None)],
)
def test_a_small_gpu_is_warned_of_before_fine_tuning(
    gibibytes, frozen, fits, monkeypatch, capsys
):
    """4 GiB and 0.7 GiB a clip, of the whole card: 4 + 32 * 0.7 = 26.4 GiB."""
    size = (0, gibibytes * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: size)
    args = train.parse_args(["--iemocap", "x"])
    args.device = "cuda"
    train.warn_of_memory(args, frozen, {"audio": None, "text": None})
    printed = capsys.readouterr().out.strip()
    assert printed.endswith(f"--micro-batch {fits}") if fits else printed == ""


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
    assert outcome(tmp_path) == outcome(finished)


def test_a_terminal_without_unicode_gets_question_marks(monkeypatch):
    """Tables have → and ±, which the terminal of some clusters does not know."""
    for name in ("stdout", "stderr"):
        screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, name, screen)
    data.run_command(lambda: print("CMT(A→T) 1 ± 2"))
    assert sys.stdout.buffer.getvalue().decode() == "CMT(A?T) 1 ? 2\n"


class Bug(NameError, TypeError, ValueError, KeyError, RuntimeError):
    """All that a mistake in the code may raise, in one."""


BUGS = "data.read_dialog data.load_wav data.clip data.split data.gather "
BUGS += "model.masked_mean model.Upstream.prepare evaluate.metrics "
BUGS += "train.Patience.step train.train_epoch"


@pytest.mark.parametrize("name", BUGS.split())
def test_a_bug_is_a_traceback(name, command, tmp_path, monkeypatch):
    """No part of the four files takes a bug for a fault of the user's files."""

    def wrong(*args, **options):
        raise Bug(name)

    monkeypatch.setattr(name, wrong)
    with pytest.raises(Bug, match=name):
        data.run_command(lambda: train.main([*command, "--out", str(tmp_path)]))


# --- Processes ------------------------------------------------------------------------

# The server imports the libraries once, and each new process is a fork of it.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__, "transformers.models.wavlm.modeling_wavlm"])


def train_until(death, output, flags):
    """Train. The process kills itself before a file, for example the second log.jsonl.

    Every file is written by another name first, so only renaming changes the disk.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    rename = os.replace
    written = []

    def replace(old, new):
        written.append(new.suffix)
        if (new.suffix, written.count(new.suffix)) == death:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(old, new)

    os.replace = replace
    data.run_command(lambda: train.main(flags))


def start(root, flags, death=None):
    output = root.with_suffix(".output")
    output.touch()
    arguments = (death, output, [*flags, "--out", str(root)])
    process = SERVER.Process(target=train_until, args=arguments, daemon=True)
    process.start()
    return process


def test_killed_in_both_phases_a_run_ends_with_the_same_bits(
    command, finished, tmp_path
):
    """It dies in filling the cache, in epochs 2 and 4, and before its predictions."""
    flags = [*command, "--cache", str(tmp_path / "cache")]
    deaths = [(".npy", 60), (".jsonl", 2), (".pt", 3), (".csv", 1), None]
    output = tmp_path / "killed.output"
    codes = []
    for death in deaths:
        process = start(tmp_path / "killed", flags, death)
        process.join()
        codes.append(process.exitcode)
    assert codes == [-signal.SIGKILL] * 4 + [0], output.read_text()
    assert outcome(tmp_path) == outcome(finished)


def test_two_processes_fill_one_cache_and_end_alike(command, finished, tmp_path):
    """Nothing is locked: both write the same files by other names, and rename them."""
    flags = [*command, "--cache", str(tmp_path / "cache")]
    both = [start(tmp_path / "runs", flags) for _ in range(2)]
    for process in both:
        process.join()
        assert process.exitcode == 0, (tmp_path / "runs.output").read_text()
    assert outcome(tmp_path) == outcome(finished)
    assert not list(tmp_path.rglob("*.part"))


def test_an_interrupted_run_says_how_to_go_on(command, tmp_path):
    """Its lines arrive one by one, in a file too."""
    endless = "--frozen --stop-after 100000 --max-epochs 100000".split()
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
