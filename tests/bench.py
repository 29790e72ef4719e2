"""Speed and memory, measured side by side: python tests/bench.py [--n 64] [--repeats 5] [--full]

Each row does the same work in two ways in one process, in turns, and gives the median ratio of
their times. The widths are those of WavLM-Large and BERT-base. "before" is the head, the padded
batch and the gather of commit 0d90829, which are loaded from git. Memory is the peak of a process
of its own beyond its inputs (Linux only). It is no part of the tests.
"""

import argparse
import gc
import importlib.util
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import model

BEFORE = "0d90829"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def load_before():
    """Import model.py and data.py of the commit before the redesign: (model, data)."""
    folder, found = tempfile.mkdtemp(), []
    for name in ("model", "data"):
        show = ["git", "show", f"{BEFORE}:{name}.py"]
        done = subprocess.run(show, cwd=ROOT, capture_output=True)
        if done.returncode:
            sys.exit(f"bench.py compares with commit {BEFORE}, and git does not have it here")
        path = Path(folder) / f"before_{name}.py"
        path.write_bytes(done.stdout)
        spec = importlib.util.spec_from_file_location(f"before_{name}", path)
        found.append(importlib.util.module_from_spec(spec))
        sys.modules[spec.name] = found[-1]
        spec.loader.exec_module(found[-1])
    return found


def utterances(modality, n):
    """Make layer states of n utterances in 16 bits: 3 to 5 s of audio, or one batch's texts."""
    generator = torch.Generator().manual_seed(0)
    if modality == "audio":
        lengths, shape = torch.randint(149, 250, (n,), generator=generator), (25, 1024)
    else:
        lengths, shape = torch.randint(3, 25, (n,), generator=generator), (13, 768)
        lengths[0] = 98  # IEMOCAP's longest
    return [torch.randn(int(t), *shape, generator=generator).half() for t in lengths]


def ways(modality, states, batch):
    """Return (now, before): one frozen epoch over the states, forward and backward of the head."""
    before_model, before_data = load_before()
    L, D = states[0].shape[1:]
    arguments = {f"{modality}_layers": L, f"{modality}_dim": D}
    fusion = f"{modality}-fc"
    heads = [m.EmotionRecognizer(m.Config(fusion, **arguments)).to(DEVICE) for m in (model, before_model)]
    cached = data.CachedStates([None] * len(states), DEVICE)
    cached.kept = states
    file = Path(tempfile.mkdtemp()) / "data.bin"
    torch.cat(states).numpy().tofile(file)
    lengths = torch.tensor([len(x) for x in states])
    ragged = before_data.Ragged(file, lengths, (L, D), "f2")
    # A window of text reaches from the target over its neighbours.
    context = (torch.arange(batch)[:, None] + torch.arange(9)).clamp(max=batch - 1).to(DEVICE)

    def epoch(head, source):
        for rows in torch.arange(len(states)).split(batch):
            given = [x.to(DEVICE) for x in source(rows)]
            given += [context[: len(rows)]] if modality == "text" else []
            logits = head(**{modality: tuple(given)})
            F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=DEVICE)).backward()

    return lambda: epoch(heads[0], cached), lambda: epoch(heads[1], ragged)


def seconds(work):
    start = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def row(name, now, other, repeats, memory=""):
    now(), other()  # warm up caches and allocators
    pairs = [(seconds(now), seconds(other)) for _ in range(repeats)]
    a, b = (statistics.median(side) for side in zip(*pairs))
    ratio = statistics.median(x / y for x, y in pairs)
    print(f"{name:52} {a:8.3f} s {b:8.3f} s {ratio:7.2f} x  {memory}", flush=True)


def anonymous():
    """Return the memory that the process holds for itself, in MiB. Mapped files do not count."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def peak_of(work):
    """Return the peak memory of the work beyond what was held before, in MiB."""
    work()  # what is kept from batch to batch, such as a buffer, counts
    gc.collect()
    peak, done = [0.0], threading.Event()

    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return peak[0]


def memory_of(modality, n, batch):
    """Measure the peak memory of both ways beyond the states themselves, each in its process."""
    values = []
    for which in ("0", "1"):
        command = [sys.executable, __file__, "--one", modality, which, "--n", str(n), "--batch", str(batch)]
        values.append(float(subprocess.run(command, capture_output=True, text=True).stdout))
    return f"{values[0]:6.0f} MiB {values[1]:6.0f} MiB {values[0] / values[1]:5.2f} x"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=64, help="clips")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="upstreams of full size too, for a GPU")
    parser.add_argument("--batch", type=int, default=32, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        base = anonymous()
        states = utterances(args.one[0], args.n)
        work = ways(args.one[0], states, args.batch)[int(args.one[1])]
        peak = peak_of(work)
        size = sum(x.nbytes for x in states) / 2**20  # both processes hold the states
        return print(peak - size - base)
    print(
        f"{torch.cuda.get_device_name() if CUDA else f'{torch.get_num_threads()} CPU threads'}, "
        f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{args.n} clips, median of {args.repeats}\n{'':52}      now       before    ratio  peak memory"
    )
    for modality, n, batch in (("audio", args.n, 32), ("text", 200, 200)):
        memory = memory_of(modality, n, batch) if Path("/proc").exists() and not CUDA else ""
        states = utterances(modality, n)
        states = [x.to(DEVICE) for x in states]
        row(f"frozen epoch of the head, {modality}", *ways(modality, states, batch), args.repeats, memory)
    upstream_rows(args)
    return None


def upstream_rows(args):
    """Cache building and a fine-tuning step, each against the bare upstream."""
    words = [f"word{i}" for i in range(200)]
    with tempfile.TemporaryDirectory() as folder:
        paths = model.make_tiny_upstreams(folder, [" ".join(words)])
        if args.full:
            wide = [f"word{i}" for i in range(30000)]
            paths = model.make_tiny_upstreams(f"{folder}/wide", [" ".join(wide)])
            wavlm, bert = model.wavlm_config(), transformers.BertConfig()
            transformers.WavLMModel(wavlm).save_pretrained(paths["audio"])
            transformers.BertModel(bert).save_pretrained(paths["text"])
        size = "full size" if args.full else "tiny"
        inputs = {
            "audio": [torch.randn(48000 + 500 * k) for k in range(args.n)],
            "text": [" ".join(words[k : k + 3 + k % 20]) for k in range(args.n)],
        }
        for m, path in paths.items():
            upstream, raw, count = model.Upstream(path, m).to(DEVICE), inputs[m], iter(range(10**6))
            order = sorted(range(args.n), key=lambda i: -len(raw[i]))

            def build():
                target = Path(folder) / f"{m}{next(count)}"
                ids = [SimpleNamespace(id=str(i), session=1) for i in range(args.n)]
                data.cache_states(target, upstream, ids, raw, DEVICE)

            def bare():
                with torch.no_grad():
                    for k in range(0, args.n, 32):
                        upstream([raw[i] for i in order[k : k + 32]])

            row(f"cache ({size}) against the bare forward pass, {m}", build, bare, args.repeats)


if __name__ == "__main__":
    main()
