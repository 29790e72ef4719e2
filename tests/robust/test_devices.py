"""Training on a pretended GPU: an operation that mixes two devices is found on a CPU.

All tensors stay on the CPU. A tensor that was moved to "cuda" is marked, and so is all
that is computed from it.
"""

import inspect
import json
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import model
import train


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

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.copy_:
            return result
        found = tensors_in(args, kwargs)
        # CUDA takes a single number that is on the CPU.
        devices = {device_of(x) for x in found if x.ndim > 0 or device_of(x) != "cpu"}
        if len(devices) > 1:
            raise MixedDevices(f"{func}: {[(device_of(x), x.shape) for x in found]}")
        if "cuda" in devices:
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
        if func is torch.Tensor.to:
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            result = args[0].type(dtype or args[0].dtype)
        else:
            device = "cpu" if func is torch.Tensor.cpu else kwargs.pop("device", None)
            result = func(*args, **kwargs)
        return result if device is None else move(result, device)


@pytest.fixture
def run(small_corpus, tmp_path, monkeypatch):
    """A function that trains on a device, and returns the log."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    # The modes below see only their own thread.
    monkeypatch.setattr(data, "ThreadPoolExecutor", lambda n: SimpleNamespace(map=map))

    def run(fusion, device):
        flags = ["--iemocap", str(small_corpus), "--partial", "--upstream", "tiny"]
        flags += ["--cache", str(small_corpus.parent / "cache"), "--fusion", fusion]
        # At a rate of 0 the loss stays the same. So fine-tuning starts after epoch 2.
        flags += ["--lr-frozen", "0", "--finetune-after", "1", "--max-epochs", "4"]
        args = train.parse_args([*flags, "--out", str(tmp_path / device)])
        args.device = device
        with monkeypatch.context() as patch:
            patch.setattr(train, "parse_args", lambda _: args)
            train.main()
        log = next((tmp_path / device).rglob("log.jsonl")).read_text()
        return [json.loads(line) | {"seconds": 0} for line in log.splitlines()]

    return run


@pytest.mark.parametrize("fusion", ["audio-te", "mmt"])
def test_a_run_resumed_in_both_phases_mixes_no_devices(fusion, run, monkeypatch):
    """The pretended GPU computes what the CPU computes."""
    print_epoch = train.print_epoch
    printed = []

    def interrupt(corpus, row, args):
        print_epoch(corpus, row, args)
        printed.append(row["phase"])
        if len(printed) in (1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "print_epoch", interrupt)
    with Pretend(), Check():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(fusion, "cuda")
        log = run(fusion, "cuda")
    assert printed == ["frozen"] * 2 + ["finetune"] * 2
    assert log == run(fusion, "cpu")


# Pieces of the code, and what replaces them.
PLANTED = [
    (data, "gather", "mask.to(device)", "mask"),
    (data, "batch", "windows[rows]", "windows[rows.to(device)]"),
    (train, "train", "labels.to(args.device)", "labels"),
    (model, "unpack", "x.new_zeros(", "torch.zeros("),
    (model.Upstream, "forward", "mask.long().to(device)", "mask.long()"),
]


@pytest.mark.parametrize(("owner", "name", "old", "new"), PLANTED)
def test_planted_mistakes_are_found(owner, name, old, new, run, monkeypatch):
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{name} has changed, so change this test"
    changed = {}
    exec(source.replace(old, new), function.__globals__, changed)
    monkeypatch.setattr(owner, name, changed[name])
    with Pretend(), Check(), pytest.raises(MixedDevices):
        run("ef", "cuda")
