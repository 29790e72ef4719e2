"""What speed there is, measured side by side: python tests/bench.py [--n 96] [--repeats 5] [--full]

Each row does the same work in two ways in one process, in turns, and gives the median of the
ratios; noise of the machine falls on both. Upstreams have random weights: their speed does not
depend on them. --full: WavLM-Large and BERT-base shapes, for a GPU. --growth: time an utterance and
memory as the corpus grows, with tiny upstreams. It is not part of the tests.
"""

import argparse
import contextlib
import io
import math
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model
from train import BATCH, LR_FROZEN, WEIGHT_DECAY

warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")  # as Upstream does

WORDS = [f"word{i}" for i in range(200)]


def seconds(work) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def row(name, ours, other, repeats):
    """Print the medians of both and of their ratio; returns the seconds of ours."""
    ours(), other()  # once for nothing: page cache, allocators, kernels
    pairs = [(seconds(ours), seconds(other)) for _ in range(repeats)]
    a, b = (statistics.median(side) for side in zip(*pairs))
    ratio = statistics.median(x / y for x, y in pairs)
    shown = f"{ratio:.2f} x" if ratio > 0.2 else f"1/{1 / ratio:.0f}"
    print(f"{name:68} {a:8.3f} s {b:8.3f} s   {shown}", flush=True)
    return a


def upstreams(folder, full, precision="fp32", checkpoint=False):
    """Random weights in the shapes asked for, through the same from_pretrained as all others."""
    paths = {m: f"{folder}/{m}" for m in ("audio", "text")}
    if not Path(paths["audio"]).exists():
        tiny = model.make_tiny_upstreams(f"{folder}/tiny", [" ".join(WORDS)])
        size = dict(hidden_size=256, num_attention_heads=4, intermediate_size=1024)
        vocabulary = transformers.AutoTokenizer.from_pretrained(tiny["text"]).vocab_size
        wavlm = model.wavlm_config(**({} if full else dict(
            num_hidden_layers=12, conv_dim=(256,) * 7, num_conv_pos_embeddings=32, **size)))
        bert = transformers.BertConfig(**({} if full else dict(
            num_hidden_layers=6, vocab_size=vocabulary, **size)))
        transformers.WavLMModel(wavlm).save_pretrained(paths["audio"])
        transformers.BertModel(bert).save_pretrained(paths["text"])
        for m, loader in (("audio", "AutoFeatureExtractor"), ("text", "AutoTokenizer")):
            getattr(transformers, loader).from_pretrained(tiny[m]).save_pretrained(paths[m])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {m: model.Upstream(p, m, precision, checkpoint).to(device) for m, p in paths.items()}


def anonymous() -> float:
    """MiB that the process holds for itself; pages of mapped files are the kernel's to drop."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def grow(n: int) -> None:
    """Cache and one frozen epoch of n utterances of 0.25 s, in a process of its own."""
    rng, peak = random.Random(0), 0.0
    with tempfile.TemporaryDirectory() as folder:
        paths = model.make_tiny_upstreams(folder, [" ".join(WORDS)])
        ups = {m: model.Upstream(path, m) for m, path in paths.items()}
        with open(f"{folder}/clips", "wb") as file:
            for _ in range(n):
                file.write(torch.randn(4000).numpy().tobytes())
        clips = data.Ragged(Path(folder) / "clips", torch.full((n,), 4000), (), "f4")
        raw = {"audio": clips, "text": [" ".join(rng.choices(WORDS, k=8)) for _ in range(n)]}
        start, states = time.perf_counter(), {}
        for m in ups:
            states[m] = data.cache_states(
                Path(folder) / f"cache-{m}", ups[m], raw[m], ups[m].steps(raw[m]), {})
            peak = max(peak, anonymous())
        cached = time.perf_counter() - start
        head = model.EmotionRecognizer(model.Config("mmt", 3, 64, 3, 64))
        optimizer = torch.optim.AdamW(head.parameters(), lr=LR_FROZEN, weight_decay=WEIGHT_DECAY)
        windows = (torch.arange(n)[:, None] + torch.arange(-4, 5)).clamp(0, n - 1)
        start = time.perf_counter()
        for rows in torch.randperm(n).split(BATCH):
            optimizer.zero_grad()
            logits = head(**data.batch(rows, windows, states, "cpu"))
            F.cross_entropy(logits, rows % 4).backward()
            optimizer.step()
            peak = max(peak, anonymous())
        epoch = time.perf_counter() - start
    print(f"{n:8} {1e3 * cached / n:10.2f} {1e3 * epoch / n:10.2f} {peak:10.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=96, help="utterances of 3 to 5 s")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--grow", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.grow:
        return grow(args.grow)
    if args.growth:
        print("utterances ms to cache   ms epoch   MiB held (each for one utterance, but the last)")
        for n in (500, 2500, 10000):
            subprocess.run([sys.executable, __file__, "--grow", str(n)], check=True)
        return None
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    chip = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{chip}, {platform.machine()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}; {args.n} utterances of "
        f"3-5 s, {'WavLM-Large and BERT-base' if args.full else 'WavLM 12 x 256, BERT 6 x 256'}, "
        f"random weights; median of {args.repeats}\n{'':68}     ours      other   ratio"
    )
    rng = random.Random(0)
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    clips = [torch.randn(rng.randint(48000, 80000)) for _ in range(args.n)]
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 25))) for _ in range(args.n)]
    raw = {"audio": clips, "text": texts}
    windows = torch.arange(args.n)[:, None] + torch.arange(-4, 5)
    windows = torch.where((windows >= 0) & (windows < args.n), windows, -1)
    labels = torch.randint(0, 4, (args.n,)).to(device)

    with tempfile.TemporaryDirectory() as folder:
        ups = upstreams(folder, args.full)
        states = {}

        def build(m):
            """The cache of a modality, anew."""
            (Path(folder) / f"cache-{m}" / "meta.json").unlink(missing_ok=True)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                states[m] = data.cache_states(
                    Path(folder) / f"cache-{m}", ups[m], raw[m], ups[m].steps(raw[m]), {})

        def bare(m):
            """What building cannot do without: the forward passes."""
            order = ups[m].steps(raw[m]).argsort(descending=True)
            with torch.no_grad():
                for part in order.split(BATCH):
                    ups[m]([raw[m][i] for i in part.tolist()])

        for m in ups:
            row(f"cache: build | bare forward, {m}", lambda: build(m), lambda: bare(m),
                max(1, args.repeats // 2))
        if cuda:
            for m in states:
                states[m].move_to_gpu()

        config = model.Config("mmt", ups["audio"].n_layers, ups["audio"].dim,
                              ups["text"].n_layers, ups["text"].dim)
        head = model.EmotionRecognizer(config).to(device)
        live = {m: data.live(ups[m], raw[m]) for m in ups}
        order = torch.randperm(args.n)

        def epoch(batch, parameters):
            """One epoch, as in train.train."""
            optimizer = torch.optim.AdamW(parameters, lr=LR_FROZEN, weight_decay=WEIGHT_DECAY)
            for rows in order.split(BATCH):
                optimizer.zero_grad()
                loss = F.cross_entropy(head(**batch(rows)), labels[rows])
                loss.backward()
                loss.item()
                optimizer.step()

        def from_cache():
            epoch(lambda rows: data.batch(rows, windows, states, device), list(head.parameters()))

        def recomputed():
            def batch(rows):
                with torch.no_grad():
                    return data.batch(rows, windows, live, device)

            epoch(batch, list(head.parameters()))

        held = {int(rows[0]): data.batch(rows, windows, states, device) for rows in order.split(BATCH)}

        def moved():  # the same bytes, copied once, through the same head
            epoch(lambda rows: {m: tuple(x.clone() for x in part)
                                for m, part in held[int(rows[0])].items()}, list(head.parameters()))

        row("frozen epoch: from the cache | upstreams run each epoch", from_cache, recomputed,
            max(1, args.repeats // 2))
        a = row("frozen epoch: from the cache | batches ready, bytes moved once", from_cache, moved,
                4 * args.repeats)
        size = sum(x.nbytes for batch in held.values() for part in batch.values() for x in part)
        print(f"{'':4}{size / a / 1e9:.1f} GB/s of layer states")

        def bottoms():
            return [p for u in ups.values() for p in u.finetunable().parameters()]

        def finetuned():
            parameters = [*head.parameters(), *bottoms()]
            epoch(lambda rows: data.batch(rows, windows, live, device), parameters)

        def bare_finetuned():
            """Forward of the same distinct inputs, backward to the bottom, and nothing else."""
            for rows in order.split(BATCH):
                distinct = windows[rows].unique()
                for m, part in (("audio", rows), ("text", distinct[distinct >= 0])):
                    inputs = [raw[m][i] for i in part.tolist()]
                    ups[m].model.zero_grad()
                    prepared = ups[m].preprocessor(
                        [x.numpy() for x in inputs] if m == "audio" else inputs, padding=True,
                        return_tensors="pt", **({"sampling_rate": 16000, "return_attention_mask":
                                                 True} if m == "audio" else {})).to(device)
                    ups[m].model(**prepared).last_hidden_state.mean().backward()

        for u in ups.values():
            u.finetunable().requires_grad_(True)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        row("fine-tuning epoch: all of it | bare upstreams, forward and backward", finetuned,
            bare_finetuned, max(1, args.repeats // 2))
        peak(cuda, "fp32")
        held.clear()
        plain = ups
        for name, road in (("bf16", {"precision": "bf16"}), ("checkpointing", {"checkpoint": True}),
                           ("bf16, checkpointing", {"precision": "bf16", "checkpoint": True})):
            if cuda or name == "checkpointing":
                other = upstreams(folder, args.full, **road)
                for u in other.values():
                    u.finetunable().requires_grad_(True)

                def on(which):
                    nonlocal ups, live
                    ups, live = which, {m: data.live(which[m], raw[m]) for m in which}
                    finetuned()

                if cuda:  # what else is there makes room first
                    for u in plain.values():
                        u.to("cpu")
                    torch.cuda.reset_peak_memory_stats()
                    on(other)
                    peak(cuda, name)
                    for u in plain.values():
                        u.to("cuda")
                row(f"fine-tuning epoch: {name} | plain", lambda: on(other), lambda: on(plain),
                    max(1, args.repeats // 2))
        if cuda:
            print("share of peak arithmetic and bandwidth: divide by the card's data sheet; "
                  f"{math.ceil(args.n / BATCH)} batches an epoch here, 137 on IEMOCAP's 4,400")


def peak(cuda, name):
    if cuda:
        print(f"{'':4}peak GPU memory, {name}: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
