"""Check on a GPU that the code is right, and measure how fast it is and what it needs.

    python -m tests.studies.gpu [--tiny] [--limit 520]

It needs no corpus and no download. Inputs and weights are random, in the sizes of
IEMOCAP, WavLM-Large and BERT-base. It prints one line per figure, and rewrites gpu.json
after every part. A part that fails prints one line, and the next one starts. The exit
code is 1 if one of the first four parts failed, did not run, or printed WRONG. --tiny
tries the script itself in seconds, on a CPU too.
"""

import argparse
import contextlib
import gc
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

import data
import model
import train

# A fold's mean: 4/5 of 5,531 utterances, of which one speaker is for development.
N_TRAIN = 3872
N_DEV = 553
# All inputs of the cache. The texts are at most this many.
N_INPUTS = {"audio": 5531, "text": 10039}


class Bench:
    """What the parts have in common: device, clock, figures, corpus, upstreams."""

    def __init__(self, device: str, tiny: bool, limit: float, folder: Path):
        self.device = device
        self.folder = folder
        self.start = time.perf_counter()
        self.limit = limit  # seconds
        self.figures = {}
        self.wrong = []
        # A corpus in the shape of IEMOCAP: dialogues of 66 turns, clips of 0.6 to 5 s,
        # texts of 1 to 98 words.
        n = 32 if tiny else 1000
        rng = np.random.default_rng(0)
        seconds = rng.lognormal(np.log(3.6), 0.7, n).clip(0.6, 0.7 if tiny else 5)
        words = rng.lognormal(np.log(8), 0.85, n).clip(1, 98)
        self.lengths = {"audio": 16000 * seconds, "text": 1.2 * words + 3}
        self.corpus = []
        for row in range(n):
            self.corpus.append(SimpleNamespace(id=f"u{row}", dialog=f"d{row // 66}"))
        self.windows = data.context_windows(self.corpus)
        self.rows = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        self.args = train.make_parser().parse_args([])
        self.args.device = device
        self.tiny = tiny

    @cached_property
    def upstreams(self) -> dict[str, model.Upstream]:
        """Make WavLM-Large and BERT-base on the device, with random weights."""
        sizes = model.TINY if self.tiny else {}
        cnn = model.TINY_CNN if self.tiny else {}
        with torch.device(self.device):
            config = transformers.WavLMConfig(**model.WAVLM_LARGE | sizes | cnn)
            wavlm = transformers.WavLMModel(config)
            bert = transformers.BertModel(transformers.BertConfig(**sizes))
        upstreams = {}
        for modality, encoder in (("audio", wavlm), ("text", bert)):
            # There is no preprocessor, because the prepared inputs are random.
            loaded = mock.Mock(return_value=(None, encoder))
            with mock.patch.object(model, "load_pretrained", loaded):
                upstreams[modality] = model.Upstream("random", modality)
        return upstreams

    def make_source(self, modality: str, name: str, n: int | None = None):
        """Make a data.Source of the first n utterances, with a folder of its own."""
        inputs = {}
        for row, length in enumerate(self.lengths[modality][:n]):
            if modality == "audio":
                inputs[row] = torch.randn(int(length))
            else:
                inputs[row] = torch.randint(1000, 30000, (int(length),))
        upstream = self.upstreams[modality]
        folder = self.folder / f"{modality}-{name}"
        return data.Source(upstream, inputs, self.corpus, folder, self.device)

    def make_head(self, fusion: str, **settings) -> model.EmotionRecognizer:
        """Make the trained part, with the same weights at every call."""
        torch.manual_seed(0)
        for modality, upstream in self.upstreams.items():
            settings[f"{modality}_layers"] = upstream.n_layers
            settings[f"{modality}_dim"] = upstream.dim
        return model.EmotionRecognizer(model.Config(fusion, **settings)).to(self.device)

    def make_batch(self, sources: dict) -> Callable:
        """Make the function that train.train_epoch calls for every batch."""

        def batch(rows: Tensor) -> tuple[dict, Tensor]:
            inputs = data.batch(rows, self.windows, sources, self.device)
            return inputs, (rows % 4).to(self.device)

        return batch

    def has_time(self) -> bool:
        """Tell whether 20 seconds are left. Each part, or step, needs about this."""
        return time.perf_counter() - self.start < self.limit - 20

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.start:5.1f} s] {text}", flush=True)

    def report(self, name: str, value: float, unit: str = "") -> None:
        self.figures[name] = value
        self.say(f"{name}: {value:.4g} {unit}")

    def check(self, name: str, value: float, limit: float) -> None:
        """Report a difference that must not be larger than `limit`, nor NaN."""
        self.report(name, value, f"(at most {limit:g})")
        if not value <= limit:
            self.wrong.append(name)
            self.say(f"WRONG: {name}")

    def seconds(self, work: Callable, *arguments) -> float:
        """Measure how long some work takes, until the device is done."""
        # On a CPU, the time of the process, so that other programs matter little.
        clock = time.perf_counter if self.device == "cuda" else time.process_time
        start = clock()
        work(*arguments)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    def clean(self) -> None:
        """Free what nobody uses, and start the measurement of the peak again."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def relative(ours: Tensor, other: Tensor) -> float:
    """Compute the norm of the difference, divided by the norm of `other`."""
    ours = ours.detach().cpu().double()
    other = other.detach().cpu().double()
    return float((ours - other).norm() / other.norm())


def gradient(parameters) -> Tensor:
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


# --- Is it right? ---------------------------------------------------------------------


def nine_fusions(bench: Bench) -> None:
    masks = {
        "audio": torch.arange(60) < torch.randint(3, 60, (8, 1)),
        "text": torch.arange(20) < torch.randint(0, 20, (8, 9, 1)),
    }
    states = {}
    for modality, upstream in bench.upstreams.items():
        n = int(masks[modality].sum())
        states[modality] = torch.randn(n, upstream.n_layers, upstream.dim)
    for fusion in model.FUSIONS:
        head = bench.make_head(fusion).eval()
        logits = []
        gradients = []
        for device in (bench.device, "cpu"):
            head.to(device).zero_grad()
            inputs = {}
            for m in head.config.modalities:
                inputs[m] = (states[m].to(device), masks[m].to(device))
            logits.append(head(**inputs))
            labels = (torch.arange(8) % 4).to(device)
            F.cross_entropy(logits[-1], labels).backward()
            gradients.append(gradient(head.parameters()))
        bench.check(f"{fusion}, logits against the CPU", relative(*logits), 1e-4)
        bench.check(f"{fusion}, gradient against the CPU", relative(*gradients), 1e-4)


def tiny_upstreams(bench: Bench) -> None:
    model.make_tiny_upstreams(bench.folder / "tiny", ["well i know that it was lost"])
    raw = {
        "audio": [torch.randn(n) for n in (9000, 5000, 700)],
        "text": ["i know", "well", "that it was lost"],
    }
    for modality, some in raw.items():
        upstream = model.Upstream(str(bench.folder / "tiny" / modality), modality)
        inputs = [upstream.prepare(one) for one in some]
        with torch.no_grad():
            cpu = torch.cat(upstream(inputs))
            upstream.to(bench.device)
            ours = torch.cat(upstream(inputs))
            upstream.bf16 = True
            ours_bf16 = torch.cat(upstream(inputs))
        name = f"tiny {modality} states against the CPU"
        bench.check(f"{name}, fp32", relative(ours, cpu), 1e-4)
        bench.check(f"{name}, bf16", relative(ours_bf16, cpu), 3e-2)


def micro_batches(bench: Bench) -> None:
    sources = {m: bench.make_source(m, "unused", n=32) for m in bench.upstreams}
    gradients = []
    for size in (3, None):
        bench.args.micro_batch = size
        head = bench.make_head("mmt", dropout=0.0)
        for block in head.fusion.blocks.values():
            block.dropout.p = 0.0
        optimizer = train.start_finetuning(head, sources, bench.args)
        batch = bench.make_batch(sources)
        train.train_epoch(head, optimizer, batch, torch.arange(8), bench.args)
        gradients.append(gradient(optimizer.param_groups[0]["params"]))
    name = "gradient in micro-batches of 3, against 8 at once"
    bench.check(name, relative(*gradients), 1e-3)


class FinetuneAfterTwo(train.Patience):
    """Start fine-tuning after two epochs, whatever the losses are."""

    def step(self, dev_loss: float) -> str:
        self.since_best += 1
        return "finetune" if self.since_best == 2 else "continue"


def resume(bench: Bench) -> None:
    toy = bench.folder / "toy"
    rng = np.random.default_rng(0)
    for session in range(1, 6):
        dialog = f"Ses{session:02}F_impro01"
        data.write_toy_dialog(toy / f"Session{session}", dialog, rng)
    (toy / "toy.json").write_text("{}")

    def losses(name: str, interruptions: tuple = ()) -> Tensor:
        """Train, again after each interruption. Returns the losses of four epochs."""

        def print_epoch(corpus, row, args):
            if row["epoch"] in interruptions:
                raise KeyboardInterrupt

        flags = ["--iemocap", str(toy), "--device", bench.device, "--max-epochs", "4"]
        flags += ["--cache", str(bench.folder / "cache")]
        flags += ["--out", str(bench.folder / name)]
        patches = {"Patience": FinetuneAfterTwo, "print_epoch": print_epoch}
        silence = contextlib.redirect_stdout(io.StringIO())
        with mock.patch.multiple(train, **patches), silence:
            for _ in range(len(interruptions) + 1):
                with contextlib.suppress(KeyboardInterrupt):
                    train.main(flags)
        (path,) = (bench.folder / name).rglob("log.jsonl")
        log = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["phase"] for row in log] == 2 * ["frozen"] + 2 * ["finetune"]
        return torch.tensor([(row["train_loss"], row["dev_loss"]) for row in log])

    whole = losses("whole")
    # A GPU adds in any order, so that two whole runs may differ. On a CPU they do not.
    noise = float((losses("again") - whole).abs().max())
    bench.report("two whole runs, largest difference of a loss", noise)
    limit = 0.0 if bench.device == "cpu" else max(1e-3, 10 * noise)
    difference = float((losses("resumed", (1, 3)) - whole).abs().max())
    name = "resumed in both phases, largest difference of a loss"
    bench.check(name, difference, limit)


# --- How fast is it at full size, and how much memory does it need? -------------------


def cache(bench: Bench) -> None:
    for modality, upstream in bench.upstreams.items():
        states = {}
        for precision in ("fp32", "bf16"):
            torch.manual_seed(0)
            source = bench.make_source(modality, precision, n=64)
            upstream.bf16 = precision == "bf16"
            upstream([source.inputs[0]])  # the first call is slow
            with contextlib.redirect_stdout(io.StringIO()):
                seconds = bench.seconds(source.fill) / len(source.files)
            bench.report(f"cache, {modality} {precision}, per input", seconds, "s")
            states[precision] = torch.cat([source.read(row) for row in range(8)])
        upstream.bf16 = False
        difference = relative(states["bf16"], states["fp32"])
        bench.report(f"{modality} states, bf16 against fp32", difference)


def finetuning(bench: Bench) -> None:
    everything = {m: bench.make_source(m, "unused") for m in bench.upstreams}
    # The projection needs those of 32 utterances.
    jobs = [("mmt", 32), ("audio-fc", 32), ("text-fc", 32), ("mmt", 8), ("mmt", 16)]
    for (fusion, size), precision in itertools.product(jobs, ("fp32", "bf16")):
        name = f"fine-tuning step, {fusion} {precision}, micro-batch {size}"
        if not bench.has_time():
            bench.say(f"{name}: skipped, no time left")
            continue
        bench.args.micro_batch = size
        sources = {m: everything[m] for m in model.Config(fusion).modalities}
        for source in sources.values():
            source.upstream.bf16 = precision == "bf16"  # and that of its copy
        try:
            finetuning_step(bench, name, fusion, sources)
        except torch.OutOfMemoryError:
            bench.say(f"{name}: out of memory")
        for source in sources.values():
            source.upstream.bf16 = False
            source.close()
        bench.clean()


def finetuning_step(bench: Bench, name: str, fusion: str, sources: dict) -> None:
    """Report the seconds of a step of 32 utterances, and its peak memory."""
    head = bench.make_head(fusion)
    optimizer = train.start_finetuning(head, sources, bench.args)
    epoch = (train.train_epoch, head, optimizer, bench.make_batch(sources))
    bench.seconds(*epoch, bench.rows[:64], bench.args)  # the first steps are slow
    rows = bench.rows[:128]
    seconds = bench.seconds(*epoch, rows, bench.args)
    bench.report(name, 32 * seconds / len(rows), "s")
    if bench.device == "cuda":
        peak = torch.cuda.max_memory_reserved() / 2**30
        bench.report(f"{name}, peak memory", peak, "GiB")


def frozen_epoch(bench: Bench) -> None:
    bench.args.micro_batch = None
    sources = {}
    for modality, upstream in bench.upstreams.items():
        source = bench.make_source(modality, "random")
        source.folder.mkdir()
        for row, length in enumerate(bench.lengths[modality]):
            if modality == "audio":
                length = model.frame_count(int(length), upstream.model.config)
            shape = (int(length), upstream.n_layers, upstream.dim)
            states = torch.randn(shape, dtype=torch.float16, device=bench.device)
            source.kept[row] = states
            np.save(source.files[row], states.cpu().numpy())
        sources[modality] = source

    def report_epoch(fusion: str, place: str) -> None:
        """Time an epoch of all rows, and report one of IEMOCAP's size."""
        head = bench.make_head(fusion)
        optimizer = torch.optim.AdamW(head.parameters(), 1e-3, fused=True)
        batch = bench.make_batch({m: sources[m] for m in head.config.modalities})
        epoch = (train.train_epoch, head, optimizer, batch)
        bench.seconds(*epoch, bench.rows[:64], bench.args)  # the first steps are slow
        training = bench.seconds(*epoch, bench.rows, bench.args)
        testing = bench.seconds(train.measure, head, batch, bench.rows, bench.args)
        seconds = (training * N_TRAIN + testing * N_DEV) / len(bench.rows)
        bench.report(f"frozen epoch, {fusion}, states {place}", seconds, "s")

    for fusion in ("mmt", "audio-fc", "text-fc"):
        report_epoch(fusion, "on the device")
    for source in sources.values():
        source.kept.clear()  # from now on, every epoch reads the files
    for threads in (1, 8):
        for source in sources.values():
            source.readers = ThreadPoolExecutor(threads)
        report_epoch("mmt", f"from the page cache with {threads} thread(s)")


def projection(bench: Bench) -> None:
    figures = bench.figures
    for precision in ("fp32", "bf16"):
        seconds = 0
        for modality, n in N_INPUTS.items():
            seconds += n * figures[f"cache, {modality} {precision}, per input"]
        for fusion in model.FUSIONS:
            # The upstreams and their states take nearly all of the time.
            modalities = model.Config(fusion).modalities
            like = "mmt" if len(modalities) == 2 else f"{modalities[0]}-fc"
            frozen = figures[f"frozen epoch, {like}, states on the device"]
            step = figures[f"fine-tuning step, {like} {precision}, micro-batch 32"]
            epoch = step * (N_TRAIN + N_DEV) / 32
            # Five folds. A guess: frozen runs take 30 epochs, fine-tuned ones 20 + 10.
            seconds += 5 * ((30 + 20) * frozen + 10 * epoch)
        bench.report(f"projection for Table 1, {precision}", seconds / 3600, "h")


# --- All parts ------------------------------------------------------------------------

CHECKS = [nine_fusions, tiny_upstreams, micro_batches, resume]
PARTS = [*CHECKS, cache, finetuning, frozen_epoch, projection]


def run_part(bench: Bench, part: Callable) -> str:
    """Run a part. Returns "done", or why not in one line."""
    if not bench.has_time() and part is not projection:
        return "skipped, no time left"
    try:
        part(bench)
    except Exception as problem:
        words = " ".join(str(problem).split())
        return f"failed, {type(problem).__name__}: {words:.200}"
    return "done"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Is it right and how fast on a GPU?")
    parser.add_argument("--tiny", action="store_true", help="try the script itself")
    parser.add_argument("--limit", type=float, default=520, help="seconds")
    args = parser.parse_args(arguments)
    torch.backends.cudnn.allow_tf32 = False  # as in train.load_sources
    model.import_transformers()  # without progress bars
    device = "cpu"
    machine = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if torch.cuda.is_available():
        device = "cuda"
        machine += f", {torch.cuda.get_device_name()}"
    else:
        torch.set_num_threads(1)  # waiting threads would count as time of the process

    results = {}  # by part
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, args.tiny, args.limit, Path(folder))
        bench.say(f"device {device}: {machine}")
        for part in PARTS:
            name = part.__name__
            results[name] = run_part(bench, part)
            bench.say(f"{name}: {results[name]}")
            bench.clean()
            content = {"device": device, "machine": machine, "tiny": args.tiny}
            content |= {"parts": results, "wrong": bench.wrong}
            content["figures"] = bench.figures
            Path("gpu.json").write_text(json.dumps(content, indent=1))
    finished = [results[part.__name__] == "done" for part in CHECKS]
    right = all(finished) and not bench.wrong
    bench.say(f"right on {device}: {right}. All figures are in gpu.json")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
