"""Training on a pretended GPU: an operation that mixes two devices is found on a CPU.

All tensors stay on the CPU. A tensor that was moved to "cuda" is marked, and so is all
that is computed from it.
"""

import inspect
import json
import textwrap
from contextlib import nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import model
import train

aten = torch.ops.aten
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class MixedDevices(Exception):
    """An operation got tensors of two devices, which CUDA refuses."""


def device_of(tensor):
    return getattr(tensor.untyped_storage(), "pretended", "cpu")


def move(tensor, device):
    if device_of(tensor) != torch.device(device).type:
        tensor = tensor.clone()
        tensor.untyped_storage().pretended = torch.device(device).type
    return tensor


def tensors_in(*structures):
    return [x for x in tree_leaves(structures) if isinstance(x, torch.Tensor)]


class Check(TorchDispatchMode):
    """Check the devices of every operation, backward included, and mark its result."""

    on_cuda = 0  # operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is aten.copy_:
            return result
        checked = tensors_in(args, kwargs)
        # CUDA takes indices that are on the CPU.
        if func.overloadpacket in INDEXING and device_of(args[0]) == "cuda":
            checked = tensors_in(args[0], args[2:])
        # It takes a single number on the CPU, too.
        devices = {device_of(x) for x in checked if x.ndim > 0}
        devices |= {device_of(x) for x in checked} - {"cpu"}
        if len(devices) > 1:
            raise MixedDevices(f"{func}: {[(device_of(x), x.shape) for x in checked]}")
        if "cuda" in devices:
            self.on_cuda += 1
            for tensor in tensors_in(result):
                tensor.untyped_storage().pretended = "cuda"
        return result


class Pretend(TorchFunctionMode):
    """Answer for the device, and take it out of the arguments of calls."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return torch.device(device_of(args[0]))
        if func is torch.Tensor.__deepcopy__:
            return args[0].detach().clone()
        device = kwargs.pop("device", None)
        if func is torch.Tensor.cpu:
            device = "cpu"
        elif func is torch.Tensor.to:
            options = [*args[1:], *kwargs.values()]
            dtypes = [x for x in options if isinstance(x, torch.dtype)]
            for option in options:
                if isinstance(option, str | torch.device):
                    device = option
            func, args, kwargs = torch.Tensor.type, [args[0], *dtypes], {}
            if not dtypes:
                return move(args[0], device)
        result = func(*args, **kwargs)
        return result if device is None else move(result, device)


@pytest.fixture
def run(small_corpus, tmp_path, monkeypatch):
    """A function that trains on a device. It returns the log of all epochs."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    flags = ["--iemocap", str(small_corpus), "--partial", "--upstream", "tiny"]
    # At a rate of 0 the loss stays the same. So fine-tuning starts after epoch 2.
    flags += ["--lr-frozen", "0", "--finetune-after", "1", "--max-epochs", "3"]

    flags += ["--device", "cpu", "--cache", str(small_corpus.parent / "cache")]

    def run(fusion, device, out="runs"):
        args = train.parse_args([*flags, "--out", str(tmp_path / out)])
        args.fusion, args.device = fusion, device
        name, corpus = train.read_corpus(args)
        sources = train.load_sources(args, corpus)
        train.train(args, train.Run(name, fusion, False, 5, 0), corpus, sources)
        (path,) = (tmp_path / out).rglob("log.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    return run


@pytest.mark.parametrize("fusion", model.FUSIONS)
def test_no_fusion_mixes_devices(fusion, run):
    with Pretend(), Check() as check:
        log = run(fusion, "cuda")
    assert [row["phase"] for row in log] == ["frozen", "frozen", "finetune"]
    assert check.on_cuda > 500


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_resumed_run_mixes_no_devices(epoch, run, monkeypatch):
    def interrupt(corpus, row, args):
        if row["epoch"] == epoch:
            raise KeyboardInterrupt

    with Pretend(), Check():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, "print_epoch", interrupt)
            run("mmt", "cuda")
        log = run("mmt", "cuda")
    # The pretended GPU computes what the CPU computes.
    for row, other in zip(log, run("mmt", "cpu", "on-cpu"), strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}


# Pieces of the code, and what replaces them. Does CUDA refuse it?
PLANTED = [
    (data, "gather", "mask.to(device)", "mask", True),
    (data, "gather", "torch.cat(states).to(device)", "torch.cat(states).cpu()", True),
    (data, "batch", "windows[rows]", "windows[rows.to(device)]", True),
    (train, "train", "labels.to(args.device)", "labels", True),
    (model, "unpack", "x.new_zeros(", "torch.zeros(", True),
    (model.Upstream, "forward", "mask.long().to(device)", "mask.long()", True),
    (model.Upstream, "forward", "real.to(device)", "real", False),  # an index
]


@pytest.mark.parametrize(("owner", "name", "old", "new", "refused"), PLANTED)
def test_planted_mistakes_are_found(owner, name, old, new, refused, run, monkeypatch):
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{name} has changed, so change this test"
    changed = {}
    exec(source.replace(old, new), function.__globals__, changed)
    monkeypatch.setattr(owner, name, changed[name])
    answer = pytest.raises(MixedDevices) if refused else nullcontext()
    with Pretend(), Check(), answer:
        run("mmt", "cuda")
