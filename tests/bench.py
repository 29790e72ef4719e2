"""Speed and memory, measured side by side: python tests/bench.py [--n 64] [--repeats 5] [--full]

Each row does the same work in two ways in one process, in turns, and gives the median ratio of
their times. "before" is the head and the padded gather of the commit before the redesign, loaded
from git. States have the widths of WavLM-Large and BERT-base. Peak memory is what one epoch of the
head needs beyond the states, in a process of its own (Linux or CUDA). It is no part of the tests.
"""

import argparse
import contextlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
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
    """Import model.py and data.py of the commit before the redesign: [model, data] or None."""
    found = []
    for name in ("model", "data"):
        show = ["git", "-C", str(ROOT), "show", f"{BEFORE}:{name}.py"]
        try:
            code = subprocess.run(show, check=True, capture_output=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None  # no git, or not this commit
        found.append(ModuleType(f"before_{name}"))
        sys.modules[found[-1].__name__] = found[-1]  # dataclasses look for it there
        exec(compile(code, found[-1].__name__, "exec"), vars(found[-1]))
    return found


def make_states(modality, n):
    """Make layer states of n utterances in 16 bits: 3 to 5 s of audio, or 3 to 25 word pieces."""
    torch.manual_seed(0)
    lengths = torch.randint(149, 250, (n,)) if modality == "audio" else torch.randint(3, 26, (n,))
    lengths[0] = 249 if modality == "audio" else 98  # IEMOCAP's longest text
    shape = (25, 1024) if modality == "audio" else (13, 768)
    return [torch.randn(int(t), *shape).half().to(DEVICE) for t in lengths]


def sources(states, before, folder=None):
    """Return both gathers, from memory or from files in `folder`: (rows) -> (states, mask)."""
    now = data.CachedStates([None] * len(states), DEVICE)
    ragged = before[1].Ragged.__new__(before[1].Ragged)
    ragged.lengths = torch.tensor([len(x) for x in states])
    ragged.offsets = ragged.lengths.cumsum(0) - ragged.lengths
    if folder is None:
        now.kept, ragged.data = states, torch.cat(states)
        return now, ragged
    now.files = [Path(folder) / f"{i}.npy" for i in range(len(states))]
    for file, x in zip(now.files, states):
        np.save(file, x.cpu().numpy())
    torch.cat(states).cpu().numpy().tofile(f"{folder}/all")
    form = ragged.lengths, tuple(states[0].shape[1:]), "f2"
    return now, before[1].Ragged(Path(folder) / "all", *form)


def head_epochs(modality, states, before, batch):
    """Return (now, before): an epoch of the head over the first n states, with its gradients."""
    L, D = states[0].shape[1:]
    shape = {f"{modality}_layers": L, f"{modality}_dim": D}
    # Text: the windows of 32 targets, which name each of the 200 utterances at least once.
    context = (6.2 * torch.arange(32)[:, None]).long() + torch.arange(9)  # (32, 9)

    def way(module, source):
        head = module.EmotionRecognizer(module.Config(f"{modality}-fc", **shape)).to(DEVICE)

        def epoch(n=len(states)):
            for rows in torch.arange(n).split(batch):
                given = [*source(rows), context % len(rows)][: 3 if modality == "text" else 2]
                logits = head(**{modality: tuple(x.to(DEVICE) for x in given)})
                truth = torch.zeros(len(logits), dtype=torch.long, device=DEVICE)
                F.cross_entropy(logits, truth).backward()

        return epoch

    return [way(*pair) for pair in zip((model, before[0]), sources(states, before))]


def seconds(work):
    start = time.perf_counter()
    work()
    torch.cuda.synchronize() if CUDA else None
    return time.perf_counter() - start


def row(name, now, other, repeats, memory=""):
    now(), other()  # the first call fills caches and allocators
    pairs = [(seconds(now), seconds(other)) for _ in range(repeats)]
    a, b = (statistics.median(side) for side in zip(*pairs))
    ratio = statistics.median(x / y for x, y in pairs)
    print(f"{name:56} {a:8.3f} s {b:8.3f} s {ratio:6.2f} x  {memory}", flush=True)


def peak(work):
    """Return the peak memory of the work beyond what the process holds now, in MiB."""

    def held(field):
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+)", status)[1]) / 1024

    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = held("VmRSS")
    work()
    return held("VmHWM") - before


def peaks(modality, n, batch):
    """Measure the peak memory of both ways, each in a process of its own."""
    if sys.platform != "linux" and not CUDA:
        return "no memory figures: Linux only"
    command = [sys.executable, __file__, "--peak", modality, str(n), str(batch)]
    run = [subprocess.run([*command, k], check=True, capture_output=True).stdout for k in "01"]
    a, b = map(float, run)
    return f"{a:6.0f} MiB {b:6.0f} MiB {a / b:5.2f} x"


def compare_with_before(before, clips, repeats, folder):
    for modality, n, batch in (("audio", clips, 32), ("text", 200, 200)):
        memory, states = peaks(modality, n, batch), make_states(modality, n)
        heads = head_epochs(modality, states, before, batch)
        row(f"frozen epoch of the head, {modality} | before", *heads, repeats, memory)
        for where in ("memory", "files"):
            both = sources(states, before, None if where == "memory" else folder)

            def gather(source):
                for rows in torch.arange(len(states)).split(batch):
                    source(rows)[0].to(DEVICE).float()  # as the head takes them

            work = [lambda s=s: gather(s) for s in both]
            row(f"gather into 32 bits from {where}, {modality} | before", *work, repeats)


def make_upstreams(folder, full):
    """Make upstreams with random weights: full size, or a quarter of the width and 4 layers."""
    words = [f"word{i}" for i in range(200)]
    paths = model.make_tiny_upstreams(folder, [" ".join(words)])
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(paths["text"]))
    size = dict(num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024)
    size = {} if full else size
    wavlm = transformers.WavLMConfig(**model.WAVLM_LARGE | size | ({} if full else {"conv_dim": (128,) * 7}))
    transformers.WavLMModel(wavlm).save_pretrained(paths["audio"])
    bert = transformers.BertConfig(**size, vocab_size=vocabulary)
    transformers.BertModel(bert).save_pretrained(paths["text"])
    return {m: model.Upstream(path, m).to(DEVICE) for m, path in paths.items()}


def compare_with_bare_upstreams(full, n, repeats, folder):
    upstreams, count = make_upstreams(folder, full), iter(range(10**6))
    ids = [SimpleNamespace(id=str(i), session=1) for i in range(n)]
    raw = {"audio": [torch.randn(48000 + 32000 * k // n) for k in range(n)]}
    raw["text"] = [" ".join(f"word{k * i % 200}" for i in range(3 + k % 23)) for k in range(n)]
    for m, upstream in upstreams.items():

        def build():
            with contextlib.redirect_stdout(None):
                data.cache_states(Path(folder) / f"{m}{next(count)}", upstream, ids, raw[m], DEVICE)

        def bare():
            longest = sorted(raw[m], key=len, reverse=True)
            with torch.no_grad():
                for k in range(0, n, 32):
                    upstream(longest[k : k + 32])

        row(f"building the cache, {m} | bare forward pass", build, bare, repeats)

    shapes = [x for upstream in upstreams.values() for x in (upstream.n_layers, upstream.dim)]
    config = model.Config("mmt", *shapes)
    head, live = model.EmotionRecognizer(config).to(DEVICE), {}
    parameters = list(head.parameters())
    for m, upstream in upstreams.items():
        parameters += upstream.open("bottom").values()
        live[m] = data.live(upstream, raw[m])
    optimizer = torch.optim.AdamW(parameters, 1e-5)
    windows = data.context_windows([SimpleNamespace(dialog=i // 12) for i in range(n)])
    rows = torch.randperm(n)[: 32 if CUDA else 8]

    def step():
        optimizer.zero_grad()
        logits = head(**data.batch(rows, windows, live, DEVICE))
        F.cross_entropy(logits, torch.zeros(len(rows), dtype=torch.long, device=DEVICE)).backward()
        optimizer.step()

    def bare_step():
        """Run the upstreams on the same distinct inputs, in both directions, and nothing else."""
        optimizer.zero_grad()
        neighbours = windows[rows].unique()
        for m, wanted in (("audio", rows), ("text", neighbours[neighbours >= 0])):
            live[m](wanted)[0].mean().backward()

    row(f"step of fine-tuning on {len(rows)} | bare upstreams", step, bare_step, repeats)
    texts = windows[rows].unique()[1:]  # without -1
    row(f"{len(texts)} texts in runs of like length | in one run", lambda: live["text"](texts)[0].mean().backward(),
        lambda: upstreams["text"]([raw["text"][i] for i in texts])[0].mean().backward(), repeats)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=64, help="clips")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="upstreams of full size, for a GPU")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    before = load_before()
    if args.peak:
        modality, n, batch, which = args.peak
        states = make_states(modality, int(n))
        epoch = head_epochs(modality, states, before, int(batch))[int(which)]
        epoch(2)  # loads what the libraries load at first use
        return print(peak(epoch))
    chip = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU thread(s)"
    print(
        f"{chip}, {platform.machine()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {args.n} clips, median of {args.repeats}\n"
        f"{'':56}      now      other   ratio  peak memory: now, before"
    )
    with tempfile.TemporaryDirectory() as folder:
        if before:
            compare_with_before(before, args.n, args.repeats, folder)
        else:
            print(f"Without git, or without commit {BEFORE}, there is no comparison with before.")
        compare_with_bare_upstreams(args.full, args.n, args.repeats, folder)


if __name__ == "__main__":
    main()
