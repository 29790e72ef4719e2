"""Training as in §2.4 and §3.2: frozen upstreams first, then fine-tuning, then the test.

    python train.py --fusion mmt --fold 5                    the toy corpus
    python train.py --iemocap DIR --fusion mmt --fold 5      the paper's Sys. 18, Session 5
    python train.py --iemocap DIR --system all --fold all    Table 1
    python train.py --corpus FILE.csv --fold all             a corpus of your own

A run trains one system on one fold with one seed, in a folder of its own:

    RUNS/<corpus>/<fusion>-<frozen|finetuned>[-<setting>=<value>...]/fold<k>-seed<n>/
        config.json       everything that tells this run from another
        log.jsonl         one line per epoch
        checkpoint.pt     the state after the last epoch
        predictions.csv   one line per test utterance
        result.json       written last, so a run that has it is finished

The folder's name lists every setting that differs from the defaults of its corpus. The
same command resumes a run after the last epoch of its checkpoint.

Read `Patience` first, then `train`, from top to bottom.
"""

import argparse
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import data
import evaluate
from data import InputError, Utterance
from model import (
    FUSIONS,
    Config,
    EmotionRecognizer,
    SqueezeExcitation,
    Upstream,
    make_tiny_upstreams,
)


@dataclass(frozen=True)
class Run:
    """What tells a run from the others of one command."""

    corpus: str
    fusion: str
    frozen: bool
    fold: int
    seed: int


class Patience:
    """The two triggers of §3.2. Call step() with the development loss after each epoch.

    "If the loss has not decreased for 5 epochs, the fine-tuning process starts; if the loss
    has not decreased for 10 epochs, the training stops." A frozen system has no
    fine-tuning: finetune_after is None. With finetune_after = 2 and stop_after = 4, these
    losses give these answers:

        1.0  0.8   "continue"  "continue"      a lower loss each time
        0.9  0.8   "continue"  "finetune"      2 epochs without one (equal is not lower)
        0.7        "continue"                  lower, so the counter is 0; fine-tuning goes on
        0.8 x 4    "continue" x 3  "stop"      4 epochs without a lower loss
    """

    def __init__(self, finetune_after: int | None = 5, stop_after: int = 10):
        self.finetune_after = finetune_after
        self.stop_after = stop_after
        self.best = math.inf  # the lowest loss so far
        self.since_best = 0  # epochs
        self.finetuning = False

    # EXERCISE 8 (30 min): delete the body, write it again; pytest -m ex8
    def step(self, dev_loss: float) -> str:
        """Count an epoch. Returns "continue", "finetune" (once), or "stop".

        If both are due, the answer is "stop".
        """
        # UNSPECIFIED [A17]: what "decreased" means. We take any lower loss. Another reading:
        # lower by one part in 10,000, as in the author's other code (tests/studies).
        if dev_loss < self.best:
            self.best = dev_loss
            self.since_best = 0
        else:
            self.since_best += 1
        # UNSPECIFIED [A20]: when a frozen system stops. We wait 10 epochs for every system.
        # Another reading: a frozen system stops where another starts to fine-tune
        # (tests/studies).
        if self.since_best >= self.stop_after:
            return "stop"
        if self.finetune_after is None or self.finetuning:
            return "continue"
        # UNSPECIFIED [A9]: whether the 10 epochs count from the trigger again. We use one
        # counter, so 5 more epochs without a decrease stop the training. Another reading:
        # the counter starts again at 0 (tests/studies).
        if self.since_best >= self.finetune_after:
            self.finetuning = True
            return "finetune"
        return "continue"


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Callable,
    rows: Tensor,
    args: argparse.Namespace,
) -> float:
    """Train once on all utterances, in shuffled batches of 32 (§3.2): their mean loss.

    batch   turns rows of the corpus into (arguments of the model, labels)
    rows    the utterances to train on (n,)
    """
    model.train()
    total = torch.zeros((), device=args.device)
    shuffled = rows[torch.randperm(len(rows))]
    # UNSPECIFIED [A18]: the last, smaller batch. We keep it. Another reading: drop it, as in
    # the author's other code (tests/studies).
    batches = shuffled.split(args.batch_size)
    for batch_rows in tqdm(batches, leave=False, delay=3, disable=None):
        optimizer.zero_grad()
        # One part, unless GPU memory is short. The gradients of the parts add up.
        for part in batch_rows.split(args.micro_batch or args.batch_size):
            inputs, labels = batch(part)
            logits = model(**inputs)  # (B, 4)
            # §2.4: cross-entropy. [A15]: every class has the same weight.
            loss = F.cross_entropy(logits, labels, reduction="sum")
            (loss / len(batch_rows)).backward()
            total += loss.detach()
        optimizer.step()  # [A15]: the gradient is not clipped
    return total.item() / len(rows)


@torch.no_grad()
def measure(
    model: nn.Module, batch: Callable, rows: Tensor, args: argparse.Namespace
) -> dict:
    """Measure loss, WA, UA and the confusion matrix on some utterances, without dropout.

    `log_probs` (n, 4) of the result has the logarithms of the probabilities.
    """
    model.eval()
    logits = []
    truth = []
    for part in rows.split(args.micro_batch or args.batch_size):
        inputs, labels = batch(part)
        logits.append(model(**inputs))
        truth.append(labels)
    labels = torch.cat(truth).cpu()
    log_probs = torch.cat(logits).log_softmax(dim=1).cpu()
    result = evaluate.metrics(labels, log_probs.argmax(dim=1))
    result["loss"] = F.nll_loss(log_probs, labels).item()
    result["log_probs"] = log_probs
    return result


def start_finetuning(
    model: nn.Module, sources: dict[str, data.Source], args: argparse.Namespace
) -> torch.optim.Optimizer:
    """Open the bottom of the upstreams (§2.4). Returns the optimizer of the second phase."""
    parameters = list(model.parameters())
    for source in sources.values():
        parameters += source.open(args.open)
    # §3.2: the learning rate is 1e-5 during fine-tuning.
    # UNSPECIFIED [A11]: whether the part that is trained from scratch keeps 1e-3, and AdamW
    # its averages. One rate is named, so all parameters get 1e-5 from a new AdamW. Another
    # reading: 1e-3 for what is trained from scratch, as in the author's other code
    # (tests/studies).
    return torch.optim.AdamW(
        parameters, lr=args.lr_finetune, weight_decay=args.weight_decay
    )


def train(
    args: argparse.Namespace,
    run: Run,
    corpus: list[Utterance],
    sources: dict[str, data.Source],
) -> None:
    """Train one system on one fold with one seed, and test it.

    args      the flags
    corpus    all utterances
    sources   the layer states of the modalities that the system uses

    Resumes if there is a checkpoint. Raises InputError if the folder holds another run, or
    if a loss is not finite.
    """
    folder = run_folder(args, run)
    checkpoint = folder / "checkpoint.pt"
    config = claim_folder(folder, args, run, corpus, sources)
    if (folder / "result.json").exists():
        print(f"{folder} is finished already")
        return

    # The three parts of the fold (§3.1), as rows of the corpus.
    parts = data.split(corpus, run.fold, run.seed)
    train_rows, dev_rows, test_rows = [torch.tensor(rows) for rows in parts]
    dev_speaker = corpus[dev_rows[0]].speaker
    print(
        f"{folder}: train on {len(train_rows)} utterances, develop on {len(dev_rows)} "
        f"of {dev_speaker}, test on {len(test_rows)} of session {run.fold}"
    )
    labels = torch.tensor([-1 if u.label is None else u.label for u in corpus])
    windows = data.context_windows(corpus, args.context)

    def batch(rows: Tensor) -> tuple[dict, Tensor]:
        inputs = data.batch(rows, windows, sources, args.device)
        return inputs, labels[rows].to(args.device)

    # §3.2: AdamW with a learning rate of 1e-3 and a weight decay of 1e-3. The upstreams are
    # frozen at first (§2.4).
    torch.manual_seed(1000 * run.seed)
    model = EmotionRecognizer(Config(**config["model"])).to(args.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr_frozen, weight_decay=args.weight_decay
    )
    finetune_after = None if run.frozen else args.finetune_after
    patience = Patience(finetune_after, args.stop_after)
    log = []  # one dict per epoch
    event = "continue"

    # Resume. The losses so far tell again which phase the run is in.
    if checkpoint.exists():
        state = evaluate.load_checkpoint(checkpoint, config)
        log = state["log"]
        for row in log:
            event = patience.step(row["dev_loss"])
            if event == "finetune":
                optimizer = start_finetuning(model, sources, args)
        model.load_state_dict(state["model"])
        for modality, source in sources.items():
            source.load_state_dict(state["upstreams"][modality])
        optimizer.load_state_dict(state["optimizer"])
        print(f"Resuming after epoch {len(log)}")

    # The phases follow the development loss (§3.2): no decrease for 5 epochs starts the
    # fine-tuning, no decrease for 10 epochs ends the training.
    while event != "stop" and len(log) != args.max_epochs:
        started = time.perf_counter()
        # Each epoch has a seed of its own, for the order of the batches and for dropout. So
        # a run that was interrupted draws the same numbers again.
        torch.manual_seed(1000 * run.seed + len(log) + 1)
        phase = "finetune" if patience.finetuning else "frozen"
        rate = optimizer.param_groups[0]["lr"]
        train_loss = train_epoch(model, optimizer, batch, train_rows, args)
        dev = measure(model, batch, dev_rows, args)
        require_finite(train_loss + dev["loss"], f"epoch {len(log) + 1}")
        warn_of_dead_units(model)

        # "If the loss has not decreased for 5 epochs, the fine-tuning process starts."
        event = patience.step(dev["loss"])
        if event == "finetune":
            optimizer = start_finetuning(model, sources, args)

        log.append(
            {
                "epoch": len(log) + 1,
                "phase": phase,
                "lr": rate,
                "train_loss": train_loss,
                "dev_loss": dev["loss"],
                "dev_wa": dev["wa"],
                "dev_ua": dev["ua"],
                "since_best": patience.since_best,
                "event": event,
                "seconds": time.perf_counter() - started,
            }
        )
        save_epoch(folder, config, log, model, sources, optimizer)
        print(describe_epoch(run, log[-1], args))

    # "The last model is selected and then evaluated" (§3.2). Nothing has been computed on
    # the test session before.
    # UNSPECIFIED [A10]: whether "the last model" is that of the last epoch. We say yes.
    # Another reading: the last one that lowered the loss (tests/studies).
    test = measure(model, batch, test_rows, args)
    require_finite(test["loss"], "the test")
    finetune_epochs = [row["epoch"] for row in log if row["event"] == "finetune"]
    result = {
        **asdict(run),
        "wa": test["wa"],
        "ua": test["ua"],
        "loss": test["loss"],
        "confusion": test["confusion"],
        "epochs": len(log),
        "finetune_epoch": finetune_epochs[0] if finetune_epochs else None,
        "dev_speaker": dev_speaker,
        "n_train": len(train_rows),
        "n_dev": len(dev_rows),
        "n_test": len(test_rows),
        "seconds": sum(row["seconds"] for row in log),
    }
    utterances = [corpus[row] for row in test_rows]
    evaluate.write_predictions(
        folder / "predictions.csv", utterances, test["log_probs"]
    )
    write_json(folder / "result.json", result)
    print(evaluate.describe(result))
    for source in sources.values():
        source.close()


def require_finite(loss: float, where: str) -> None:
    """Raise InputError if a loss is inf or NaN, because a model does not recover from it."""
    if not math.isfinite(loss):
        raise InputError(
            f"the loss is {loss} in {where}. The checkpoint of the epoch before is kept. Try "
            "a lower --lr-frozen or --lr-finetune, or --precision fp32"
        )


def warn_of_dead_units(model: nn.Module) -> None:
    """Warn if the ReLU of an S&E block passed no gradient in the last batch [A2]."""
    for name, module in model.named_modules():
        if isinstance(module, SqueezeExcitation):
            if not module.reduce.weight.grad.any():
                print(f"warning: {name} is dead, so all utterances have equal gates")


def describe_epoch(run: Run, row: dict, args: argparse.Namespace) -> str:
    """Format one row of the log as a line for the screen."""
    text = (
        f"{run.corpus} epoch {row['epoch']:3} {row['phase']:8} "
        f"train loss {row['train_loss']:.4f}  dev loss {row['dev_loss']:.4f} "
        f"WA {row['dev_wa']:6.2%} UA {row['dev_ua']:6.2%}  {row['seconds']:4.1f} s  "
    )
    if row["since_best"] == 0:
        text += "dev loss improved"
    else:
        text += f"no improvement for {row['since_best']} of {args.stop_after} epochs"
    if row["event"] == "finetune":
        text += f"\n{run.corpus}: fine-tuning starts ({args.open} of the upstreams)"
    if row["event"] == "stop":
        text += f"\n{run.corpus}: training stops"
    return text


# --- The folder of a run --------------------------------------------------------------


def run_folder(args: argparse.Namespace, run: Run) -> Path:
    """Name the folder of a run, with the settings that differ from the defaults."""
    system = f"{run.fusion}-{'frozen' if run.frozen else 'finetuned'}"
    for name, value in args.changed.items():
        system += f"-{name}={Path(str(value)).name}"
    return args.out / run.corpus / system / f"fold{run.fold}-seed{run.seed}"


def claim_folder(
    folder: Path,
    args: argparse.Namespace,
    run: Run,
    corpus: list[Utterance],
    sources: dict[str, data.Source],
) -> dict:
    """Write config.json and return it. Raises InputError if another run has the folder."""
    model = {
        "fusion": run.fusion,
        "n_context": args.context,
        "dropout": args.dropout,
        "cma_residual": args.cma_residual,
    }
    for modality, source in sources.items():
        model[f"{modality}_layers"] = source.upstream.n_layers
        model[f"{modality}_dim"] = source.upstream.dim
    config = {
        **asdict(run),
        "changed": {name: str(value) for name, value in args.changed.items()},
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "model": model,
        "folds": data.folds(corpus),
        "utterances": data.checksum(corpus),
        "upstreams": {m: source.upstream.name for m, source in sources.items()},
        "weights": {m: source.upstream.checksum for m, source in sources.items()},
    }
    path = folder / "config.json"
    if not path.exists():
        write_json(path, config)
        return config
    old = evaluate.read_json(path)
    for key in config.keys() - {"upstreams", "changed"}:
        if old.get(key) != config[key]:
            raise InputError(
                f"{folder} holds a run with {key} {old.get(key)}, and yours has "
                f"{config[key]}. Choose another --out"
            )
    return config


def save_epoch(
    folder: Path,
    config: dict,
    log: list[dict],
    model: nn.Module,
    sources: dict[str, data.Source],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Save all that the next epoch needs in checkpoint.pt, and the log for people."""
    state = {
        "run": {key: config[key] for key in evaluate.RUN_KEYS},
        "log": log,
        "model": model.state_dict(),
        "upstreams": {m: source.state_dict() for m, source in sources.items()},
        "optimizer": optimizer.state_dict(),
    }
    # Into memory first: if the disk is full, that is an OSError and not a torn file.
    content = io.BytesIO()
    torch.save(state, content)
    with data.write_whole(folder / "checkpoint.pt") as part:
        part.write_bytes(content.getvalue())
    lines = [json.dumps(row) + "\n" for row in log]
    with data.write_whole(folder / "log.jsonl") as part:
        part.write_text("".join(lines))


def write_json(path: Path, content: dict) -> None:
    with data.write_whole(path) as part:
        part.write_text(json.dumps(content, indent=1))


# --- What the user asks for -----------------------------------------------------------

TOY = Path("corpora/toy")
# The settings of a run: its folder lists those that are not the defaults of its corpus.
SETTINGS = (
    "upstream",
    "wavlm",
    "bert",
    "precision",
    "open",
    "cma_residual",
    "lr_frozen",
    "lr_finetune",
    "weight_decay",
    "batch_size",
    "dropout",
    "context",
    "finetune_after",
    "stop_after",
    "max_epochs",
)


def positive(text: str) -> int:
    """Read a whole number from 1 on. argparse turns the errors into a message."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def fraction(text: str) -> float:
    """Read a number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def make_parser() -> argparse.ArgumentParser:
    """Declare the flags. The defaults are those of the paper, or our reading of it."""
    parser = argparse.ArgumentParser(
        description="Train the systems of Table 1. Without a corpus: on the toy corpus.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("corpus").add_argument
    add("--iemocap", type=Path, metavar="DIR", help="IEMOCAP_full_release")
    add("--corpus", type=Path, metavar="FILE.csv", help="a corpus of your own")
    add("--partial", action="store_true", help="DIR is incomplete, or another corpus")

    add = parser.add_argument_group("runs").add_argument
    add("--fusion", default="mmt", choices=FUSIONS, help="Fig. 3, Table 1")
    add("--frozen", action="store_true", help="no fine-tuning: the odd systems")
    systems = ["all", *map(str, range(1, 19))]
    add("--system", nargs="+", choices=systems, metavar="N", help="of Table 1, or all")
    add("--fold", nargs="+", default=["5"], metavar="K", help="test sessions, or all")
    add(
        "--seed", nargs="+", type=int, default=[0], metavar="N", help="also draws [A14]"
    )

    add = parser.add_argument_group("machine").add_argument
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="for the runs")
    add("--cache", type=Path, default=Path("cache"), metavar="DIR", help="for states")
    add("--device", choices=["cuda", "mps", "cpu"], help="None: a GPU if there is one")
    add(
        "--micro-batch",
        type=positive,
        metavar="N",
        help="parts of a batch: less memory",
    )

    add = parser.add_argument_group("upstreams").add_argument
    add(
        "--upstream", default="paper", choices=["paper", "tiny"], help="tiny: a dry run"
    )
    add(
        "--wavlm",
        default="microsoft/wavlm-large",
        help="a name on the hub, or a folder",
    )
    add("--bert", default="bert-base-uncased", help="the same [A15]")
    add("--precision", default="fp32", choices=["fp32", "bf16"], help="of upstreams")
    levels = ["nothing", "bottom", "all"]
    add(
        "--open", default="bottom", choices=levels, help="what fine-tuning opens (§2.4)"
    )

    add = parser.add_argument_group(
        "constants of §3.2, and one open point"
    ).add_argument
    add("--lr-frozen", type=fraction, default=1e-3, help="learning rate at first")
    add("--lr-finetune", type=fraction, default=1e-5, help="learning rate, fine-tuning")
    add("--weight-decay", type=fraction, default=1e-3, help="of AdamW")
    add("--batch-size", type=positive, default=32, help="utterances")
    add("--dropout", type=fraction, default=0.5, help="between modules")
    add("--context", type=positive, default=9, help="texts, an odd number")
    add("--finetune-after", type=positive, default=5, help="epochs without a decrease")
    add("--stop-after", type=positive, default=10, help="epochs without a decrease")
    add(
        "--max-epochs", type=positive, help="a cap, which the paper does not have [A15]"
    )
    add("--cma-residual", action="store_true", help="CMT adds its queries [A7]")
    return parser


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Read the flags. Exits with a message if two of them do not fit together."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.iemocap and args.corpus:
        parser.error("--corpus: give either --iemocap or --corpus")
    if args.partial and not args.iemocap:
        parser.error("--partial: add --iemocap DIR")
    if args.frozen and args.system:
        parser.error(
            "--frozen: leave it out, --system says it (odd numbers are frozen)"
        )
    if args.context % 2 == 0:
        parser.error("--context: expected an odd number")

    # The toy has defaults of its own, so that the first command ends within half a minute.
    no_corpus = args.iemocap is None and args.corpus is None
    toy = no_corpus or (args.iemocap and (args.iemocap / "toy.json").exists())
    if toy:
        parser.set_defaults(upstream="tiny", max_epochs=35)
        args = parser.parse_args(arguments)
    if no_corpus:
        args.iemocap = TOY
    args.toy = bool(toy)
    args.changed = {}
    for name in SETTINGS:
        value = getattr(args, name)
        if value != parser.get_default(name):
            args.changed[name] = value

    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if args.device is None:
        args.device = [device for device in available if available[device]][0]
    if not available[args.device]:
        parser.error(f"--device {args.device}: PyTorch finds none on this machine")
    return args


def read_corpus(args: argparse.Namespace) -> tuple[str, list[Utterance]]:
    """Read the corpus: its name in reports, and its utterances.

    Raises InputError with every problem of it.
    """
    problems = []
    if args.corpus:
        corpus = data.read_csv(args.corpus)
        advice = "Correct these rows"
    else:
        if args.iemocap == TOY and not TOY.exists():
            data.write_toy(TOY)
        corpus, problems = data.read_iemocap(args.iemocap)
        advice = "Or add --partial to train without these dialogues"
    # Only the full release is set beside the numbers of the paper, so only it has the name.
    root = args.corpus or args.iemocap
    name = root.resolve().stem
    if name.startswith(("toy", "iemocap")):
        name = f"my-{name}"
    if args.toy:
        name = "toy"
        advice = f"Delete the folder {root}, and the same command writes it again"
        print("This is the TOY corpus of tones and made-up sentences.")
        print("Its numbers say nothing about speech. Name a corpus with --iemocap DIR.")
    elif args.iemocap and not args.partial:
        name = "iemocap"
        problems += data.reference_problems(corpus)
    if args.partial:
        name += "-partial"
    if problems and not (args.partial and corpus):
        raise InputError(
            "\n".join([*problems, f"{len(problems)} problem(s). {advice}"])
        )
    for problem in problems:
        print(f"{name}: left out: {problem}")
    print(data.describe(name, corpus))
    return name, corpus


def require_known_words(upstream: Upstream, inputs: dict[int, Tensor]) -> None:
    """Raise InputError if the encoder does not know most of the corpus's words."""
    unknown = upstream.preprocessor.unk_token_id
    tokens = torch.cat(list(inputs.values()))
    share = (tokens == unknown).float().mean().item()
    if share > 0.5:
        raise InputError(
            f"--bert {upstream.name}: {share:.0%} of the corpus's tokens are unknown to it. "
            "Choose an encoder of the language and the script of the corpus"
        )


def chosen_systems(args: argparse.Namespace) -> list[tuple[str, bool]]:
    """List the systems to train, as (fusion, frozen)."""
    if not args.system:
        return [(args.fusion, args.frozen)]
    table = []
    for fusion in FUSIONS:
        table += [(fusion, True), (fusion, False)]  # Sys. 1, 2, then 3, 4, ...
    if "all" in args.system:
        return table
    return [table[int(number) - 1] for number in args.system]


def chosen_folds(args: argparse.Namespace, corpus: list[Utterance]) -> list[int]:
    """List the folds to train on. Raises InputError for a fold that cannot be split."""
    folds = data.folds(corpus)
    if "all" not in args.fold:
        names = {str(fold): fold for fold in folds}
        for name in args.fold:
            if name not in names:
                raise InputError(f"--fold {name}: the corpus has the sessions {folds}")
        folds = [names[name] for name in args.fold]
    for fold in folds:
        for seed in args.seed:
            data.split(corpus, fold, seed)
    return folds


def load_sources(
    args: argparse.Namespace, corpus: list[Utterance]
) -> dict[str, data.Source]:
    """Load the upstreams that the chosen systems use, and fill the cache: by modality."""
    # Careful: otherwise a GPU computes WavLM's convolutions with 10 bits instead of 23.
    torch.backends.cudnn.allow_tf32 = False
    names = {"audio": args.wavlm, "text": args.bert}
    if args.upstream == "tiny":
        # With small tensors, one thread is faster than several.
        torch.set_num_threads(1)
        folder = args.cache / f"tiny-{data.checksum(corpus)}"
        if not folder.exists():
            with data.write_whole(folder) as part:
                make_tiny_upstreams(part, [u.text for u in corpus])
        names = {"audio": str(folder / "audio"), "text": str(folder / "text")}

    used = set()
    for fusion, _ in chosen_systems(args):
        used.update(Config(fusion).modalities)
    targets = [row for row, u in enumerate(corpus) if u.label is not None]
    neighbours = data.context_windows(corpus, args.context)[targets].unique()
    sources = {}
    for modality in sorted(used):
        name = names[modality]
        upstream = evaluate.load_upstream(name, modality, args.precision, args.device)
        inputs = {}
        if modality == "audio":
            for row in targets:
                inputs[row] = upstream.prepare(data.load_clip(corpus[row]))
        else:
            for row in neighbours[neighbours >= 0].tolist():
                inputs[row] = upstream.prepare(corpus[row].text)
            require_known_words(upstream, inputs)
        states = f"{Path(name).name}-{args.precision}-{upstream.checksum}"
        source = data.Source(upstream, inputs, corpus, args.cache / states, args.device)
        source.fill()
        sources[modality] = source
    return sources


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    name, corpus = read_corpus(args)
    systems = chosen_systems(args)
    folds = chosen_folds(args, corpus)
    sources = load_sources(args, corpus)
    for fusion, frozen in systems:
        used = {m: sources[m] for m in Config(fusion).modalities}
        for fold in folds:
            for seed in args.seed:
                run = Run(name, fusion, frozen, fold, seed)
                train(args, run, corpus, used)


if __name__ == "__main__":
    data.run_command(main)
