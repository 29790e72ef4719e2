"""Check on a GPU that the code is right, and measure how fast it is and what it needs.

    python -m tests.studies.gpu [--tiny] [--limit 520] [--json gpu.json]

It needs no corpus and no download. Inputs and weights are random, in the sizes of
IEMOCAP, WavLM-Large and BERT-base. It prints one line per figure, and rewrites the JSON
file after every part. A part that fails prints one line, and the next one starts. The
exit code is 1 if one of the first four parts failed, did not run, or printed WRONG.
--tiny tries the script itself in seconds, on a CPU too.
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
from torch import Tensor, nn
from torch.nn import functional as F

import data
import model
import train

# A fold's mean: 4/5 of 5,531 utterances, without one speaker for training.
N_TRAIN, N_DEV = 3872, 553
# All inputs of the cache. The texts are at most this many.
N_INPUTS = {"audio": 5531, "text": 10039}
# A guess: epochs of a frozen run, and of both phases of a fine-tuned run.
FROZEN_EPOCHS, EPOCHS_BEFORE, EPOCHS_AFTER = 30, 20, 10


class Forgetful(dict):
    """A dict that keeps nothing, so that every epoch reads the files."""

    def __setitem__(self, key, value):
        pass


class Bench:
    """What the parts have in common: device, clock, figures, corpus, upstreams."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.device = args.device
        self.tiny = args.tiny
        self.limit = args.limit
        self.folder = folder
        self.start = time.perf_counter()
        self.figures = {}
        self.wrong = []
        self.results = {}  # by part: "done", or why not
        # A corpus in the shape of IEMOCAP: dialogues of 66 turns, clips of 0.6 to 5 s,
        # texts of 1 to 98 words.
        n = 32 if self.tiny else 1000
        rng = np.random.default_rng(0)
        seconds = rng.lognormal(np.log(3.6), 0.7, n).clip(0.6, 0.7 if self.tiny else 5)
        words = rng.lognormal(np.log(8), 0.85, n).clip(1, 98)
        samples = (16000 * seconds).astype(int)
        tokens = (1.2 * words + 3).astype(int)
        self.lengths = {"audio": samples.tolist(), "text": tokens.tolist()}
        self.corpus = []
        for row in range(n):
            self.corpus.append(SimpleNamespace(id=f"u{row}", dialog=f"d{row // 66}"))
        self.windows = data.context_windows(self.corpus)
        self.rows = torch.randperm(n, generator=torch.Generator().manual_seed(0))

    @cached_property
    def upstreams(self) -> dict[str, model.Upstream]:
        """Make WavLM-Large and BERT-base on the device, with random weights."""
        sizes, cnn = {}, {}
        if self.tiny:
            sizes, cnn = model.TINY, model.TINY_CNN
        wavlm_config = transformers.WavLMConfig(**model.WAVLM_LARGE | sizes | cnn)
        with torch.device(self.device):
            wavlm = transformers.WavLMModel(wavlm_config)
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
            inputs[row] = torch.randn(length)
            if modality == "text":
                inputs[row] = torch.randint(1000, 30000, (length,))
        upstream = self.upstreams[modality]
        folder = self.folder / f"{modality}-{name}"
        return data.Source(upstream, inputs, self.corpus, folder, self.device)

    def make_head(self, fusion: str) -> model.EmotionRecognizer:
        torch.manual_seed(0)
        sizes = {}
        for modality, upstream in self.upstreams.items():
            sizes[f"{modality}_layers"] = upstream.n_layers
            sizes[f"{modality}_dim"] = upstream.dim
        return model.EmotionRecognizer(model.Config(fusion, **sizes)).to(self.device)

    def make_args(self, micro_batch: int | None = None) -> argparse.Namespace:
        args = train.make_parser().parse_args([])
        args.device = self.device
        args.micro_batch = micro_batch
        return args

    def make_batch(self, sources: dict) -> Callable:
        """Make the function that train.train_epoch calls for every batch."""

        def batch(rows: Tensor) -> tuple[dict, Tensor]:
            inputs = data.batch(rows, self.windows, sources, self.device)
            return inputs, (rows % 4).to(self.device)

        return batch

    def left(self) -> float:
        """Return the seconds until the limit."""
        return self.limit - (time.perf_counter() - self.start)

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.start:5.1f} s] {text}", flush=True)

    def report(self, name: str, value: float, unit: str = "") -> None:
        self.figures[name] = value
        self.say(f"{name}: {value:.4g} {unit}")

    def check(self, name: str, value: float, limit: float) -> None:
        """Report a difference that must not be larger than `limit`, nor NaN."""
        self.figures[name] = value
        verdict = "ok"
        if not value <= limit:
            verdict = "WRONG"
            self.wrong.append(name)
        self.say(f"{name}: {value:.2g}, at most {limit:g}: {verdict}")

    def seconds(self, work: Callable, *arguments) -> float:
        """Measure how long some work takes, until the device is done."""
        start = time.perf_counter()
        work(*arguments)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

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
        outputs = []
        for device in (bench.device, "cpu"):
            head.to(device).zero_grad()
            inputs = {}
            for m in head.config.modalities:
                inputs[m] = (states[m].to(device), masks[m].to(device))
            logits = head(**inputs)
            F.cross_entropy(logits, (torch.arange(8) % 4).to(device)).backward()
            gradients = [p.grad.flatten().cpu() for p in head.parameters()]
            outputs.append((logits, torch.cat(gradients)))
        for name, ours, cpu in zip(("logits", "gradient"), *outputs, strict=True):
            bench.check(f"{fusion}, {name} against the CPU", relative(ours, cpu), 1e-4)


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
    rows = torch.arange(8)
    sources = {m: bench.make_source(m, "unused", n=32) for m in bench.upstreams}
    gradients = []
    for size in (None, 3):
        head = bench.make_head("mmt")
        for module in head.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        args = bench.make_args(size)
        optimizer = train.start_finetuning(head, sources, args)
        train.train_epoch(head, optimizer, bench.make_batch(sources), rows, args)
        parameters = optimizer.param_groups[0]["params"]
        used = [p.grad.flatten() for p in parameters if p.grad is not None]
        gradients.append(torch.cat(used))
    name = "gradient in micro-batches of 3, against 8 at once"
    bench.check(name, relative(gradients[1], gradients[0]), 1e-3)


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
    flags = ["--iemocap", str(toy), "--device", bench.device, "--max-epochs", "4"]
    flags += ["--cache", str(bench.folder / "cache")]

    def losses(name: str, interrupted_after: int | None) -> Tensor:
        """Train, again if that was interrupted. Returns the losses of all epochs."""

        def print_epoch(corpus, row, args):
            if row["epoch"] == interrupted_after:
                raise KeyboardInterrupt

        run = [*flags, "--out", str(bench.folder / name)]
        with mock.patch.multiple(
            train, Patience=FinetuneAfterTwo, print_epoch=print_epoch
        ):
            with contextlib.suppress(KeyboardInterrupt):
                train.main(run)
            train.main(run)
        (path,) = (bench.folder / name).rglob("log.jsonl")
        log = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["phase"] for row in log] == 2 * ["frozen"] + 2 * ["finetune"]
        return torch.tensor([(row["train_loss"], row["dev_loss"]) for row in log])

    with contextlib.redirect_stdout(io.StringIO()):
        whole, again = losses("whole", None), losses("again", None)
        frozen, finetune = losses("frozen", 1), losses("finetune", 3)
    # A GPU adds in any order, so that two whole runs may differ. On a CPU they do not.
    noise = float((again - whole).abs().max())
    bench.report("two whole runs, largest difference of a loss", noise)
    limit = 0.0 if bench.device == "cpu" else max(1e-3, 10 * noise)
    for phase, resumed in (("frozen", frozen), ("fine-tuning", finetune)):
        name = f"resumed in the {phase} phase, largest difference of a loss"
        bench.check(name, float((resumed - whole).abs().max()), limit)


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
            upstream.bf16 = False
            bench.report(f"cache, {modality} {precision}, per input", seconds, "s")
            files = list(source.files.values())[:8]
            states[precision] = [torch.from_numpy(np.load(file)) for file in files]
        bf16, fp32 = torch.cat(states["bf16"]), torch.cat(states["fp32"])
        for layer in (0, upstream.n_layers // 2, upstream.n_layers - 1):
            difference = relative(bf16[:, layer], fp32[:, layer])
            bench.report(f"{modality}, layer {layer}, bf16 against fp32", difference)


def frozen_epoch(bench: Bench) -> None:
    sources = {m: bench.make_source(m, "random") for m in bench.upstreams}
    kept = {m: {} for m in sources}
    for modality, source in sources.items():
        source.folder.mkdir()
        for row, length in enumerate(bench.lengths[modality]):
            if modality == "audio":
                length = model.frame_count(length, source.upstream.model.config)
            shape = (length, source.upstream.n_layers, source.upstream.dim)
            states = torch.randn(shape, dtype=torch.float16, device=bench.device)
            kept[modality][row] = states
            np.save(source.files[row], states.cpu().numpy())

    def report_epoch(fusion: str, where: str) -> None:
        """Time an epoch of all rows, and report one of IEMOCAP's size."""
        head = bench.make_head(fusion)
        args = bench.make_args()
        optimizer = train.make_adamw(head.parameters(), 1e-3, args)
        batch = bench.make_batch({m: sources[m] for m in head.config.modalities})
        train.train_epoch(head, optimizer, batch, bench.rows[:64], args)
        training = bench.seconds(
            train.train_epoch, head, optimizer, batch, bench.rows, args
        )
        testing = bench.seconds(train.measure, head, batch, bench.rows, args)
        seconds = (training * N_TRAIN + testing * N_DEV) / len(bench.rows)
        bench.report(f"frozen epoch, {fusion}, states {where}", seconds, "s")

    for modality, source in sources.items():
        source.kept = kept[modality]
    for fusion in ("mmt", "audio-fc", "text-fc"):
        report_epoch(fusion, "on the device")
    for source in sources.values():
        source.kept = Forgetful()  # so every epoch reads the files
    report_epoch("mmt", "from the page cache")
    files = list(sources["audio"].files.values())
    size = sum(file.stat().st_size for file in files) / 1e9
    for threads in (1, 8):
        seconds = bench.seconds(read_all, files, threads)
        bench.report(f"reading with {threads} thread(s)", size / seconds, "GB/s")


def read_all(files: list[Path], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(np.load, files):
            pass


def finetuning(bench: Bench) -> None:
    everything = {m: bench.make_source(m, "unused") for m in bench.upstreams}
    steps = bench.rows[:128].split(32)
    rows = torch.cat(steps)
    # The first six are those of the projection.
    jobs = []
    for fusions, sizes in ((("mmt", "audio-fc", "text-fc"), [32]), (["mmt"], (8, 16))):
        jobs += itertools.product(("fp32", "bf16"), fusions, sizes)
    for precision, fusion, size in jobs:
        name = f"fine-tuning step, {fusion} {precision}, micro-batch {size}"
        if bench.left() < 20:
            bench.say(f"{name}: skipped, no time left")
            continue
        head = bench.make_head(fusion)
        sources = {m: everything[m] for m in head.config.modalities}
        args = bench.make_args(size)
        try:
            for source in sources.values():
                source.upstream.bf16 = precision == "bf16"  # and that of its copy
            optimizer = train.start_finetuning(head, sources, args)
            work = (head, optimizer, bench.make_batch(sources))
            train.train_epoch(*work, rows[:64], args)
            seconds = bench.seconds(train.train_epoch, *work, rows, args)
            bench.report(name, seconds / len(steps), "s")
            if bench.device == "cuda":
                allocated = torch.cuda.max_memory_allocated() / 2**30
                reserved = torch.cuda.max_memory_reserved() / 2**30
                bench.report(f"{name}, peak of tensors", allocated, "GiB")
                bench.report(f"{name}, peak of the process", reserved, "GiB")
        except torch.OutOfMemoryError:
            bench.say(f"{name}: out of memory")
        work = optimizer = None
        for source in sources.values():
            source.upstream.bf16 = False
            source.close()
        bench.clean()


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
            frozen_epochs = FROZEN_EPOCHS + EPOCHS_BEFORE
            seconds += 5 * (frozen_epochs * frozen + EPOCHS_AFTER * epoch)  # 5 folds
        bench.report(f"projection for Table 1, {precision}", seconds / 3600, "h")


# --- All parts ------------------------------------------------------------------------

CHECKS = [nine_fusions, tiny_upstreams, micro_batches, resume]
PARTS = [*CHECKS, cache, finetuning, frozen_epoch, projection]


def run_part(bench: Bench, part: Callable) -> None:
    """Run a part. Its error becomes one line."""
    result = "done"
    # Each of the parts needs about this long. The projection only adds up.
    if bench.left() < 20 and part is not projection:
        result = "skipped, no time left"
    else:
        try:
            part(bench)
        except Exception as problem:
            words = " ".join(str(problem).split())
            result = f"failed, {type(problem).__name__}: {words:.200}"
    bench.results[part.__name__] = result
    bench.say(f"{part.__name__}: {result}")
    bench.clean()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Is it right and how fast on a GPU?")
    parser.add_argument("--tiny", action="store_true", help="try the script itself")
    parser.add_argument("--limit", type=float, default=520, help="seconds")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="FILE")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=best, choices=["cuda", "cpu"])
    args = parser.parse_args(arguments)
    torch.backends.cudnn.allow_tf32 = False  # as in train.load_sources
    model.import_transformers()  # without progress bars
    machine = f"torch {torch.__version__}, transformers {transformers.__version__}, "
    machine += "CPU" if args.device == "cpu" else torch.cuda.get_device_name()

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        bench.say(f"device {args.device}: {machine}")
        for part in PARTS:
            run_part(bench, part)
            content = {"device": args.device, "machine": machine, "tiny": args.tiny}
            content |= {"parts": bench.results, "wrong": bench.wrong}
            content["figures"] = bench.figures
            with data.write_whole(args.json) as new:
                new.write_text(json.dumps(content, indent=1))
    right = not bench.wrong
    for check in CHECKS:
        right = right and bench.results.get(check.__name__) == "done"
    bench.say(f"right on {args.device}: {right}. All figures are in {args.json}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
