r"""Try another reading of a point that the paper leaves open.

    python -m tests.studies.alternatives             list the alternatives
    python -m tests.studies.alternatives A5          show what one of them changes
    python -m tests.studies.alternatives A5,A9 -- --system 17 --fold all --seed 0 1 2
        train with two of them together; the flags are those of train.py

The four files have one reading of each open point. PATCHES has another one. To train,
this script patches the texts of the four files in memory, and runs them. The runs go to
runs-A5,A9 in the current folder, unless you name another --out. The name of a run's
folder and its title have alternative=A5,A9.

Do not use evaluate.py recognize on these runs. It has the model of the four files.
"""

import importlib
import re
import sys
from pathlib import Path
from textwrap import indent
from types import ModuleType, SimpleNamespace
from unittest import mock

from data import InputError, run_command

ROOT = Path(__file__).resolve().parents[2]
# Each of them imports only those before it.
FILES = ("model.py", "data.py", "evaluate.py", "train.py")

# In a patch, the lines after "+" replace the lines after "-" above them, which only one
# of the four files has, once. All lines are indented like the place where they go.
TEXT = r"""
[A1] The layers are laid side by side, so the projector has L * D inputs.
- self.linear = nn.Linear(width, dim)
+ self.linear = nn.Linear(n_layers * width, dim)
- x = torch.einsum("nl,nld->nd", gates[utterance], states)
+ x = (gates[utterance].unsqueeze(-1) * states).flatten(1)

[A2] The features are the channels of S&E, and the reduction ratio is still L.
- def __init__(self, n_layers: int):
+ def __init__(self, n_layers: int, width: int):
- self.reduce = nn.Linear(n_layers, 1)
+ self.reduce = nn.Linear(width, width // n_layers)
- self.expand = nn.Linear(1, n_layers)
+ self.expand = nn.Linear(width // n_layers, width)
- layer_means = states.mean(dim=-1)
+ layer_means = states.mean(dim=1)
- self.se = SqueezeExcitation(n_layers)
+ self.se = SqueezeExcitation(n_layers, width)
- x = torch.einsum("nl,nld->nd", gates[utterance], states)
+ x = gates[utterance] * states.sum(dim=1)

[A3] The projector is an MLP with a hidden layer of width d.
- self.linear = nn.Linear(width, dim)
+ self.linear = nn.Sequential(
+     nn.Linear(width, dim), nn.ReLU(), nn.Linear(dim, dim)
+ )

[A4] Two convolutions mix the texts, with four maps and a LayerNorm between them.
- self.conv = nn.Conv2d(n_context, 1, kernel_size=3, stride=1, padding=1)
+ self.maps = nn.Conv2d(n_context, 4, kernel_size=3, stride=1, padding=1)
+ self.norm = nn.LayerNorm(dim)
+ self.conv = nn.Conv2d(4, 1, kernel_size=3, stride=1, padding=1)
- x = self.conv(x)
+ x = self.norm(nn.functional.leaky_relu(self.maps(x)))
+ # The padding is zero again, so it does not depend on the rest of the batch.
+ x = x * mask.any(dim=1)[:, None, :, None]
+ x = self.conv(x)

[A5] The real steps of X_T are those where the target itself has a token.
- return x, mask.any(dim=1)
+ return x, mask[:, C // 2]

[A6] Beyond the edge of a dialogue, its first or its last text is repeated.
- return torch.from_numpy(windows)
+ for row, window in enumerate(windows):
+     inside = window[window >= 0]
+     neighbours = np.arange(row - size // 2, row + size // 2 + 1)
+     windows[row] = neighbours.clip(inside[0], inside[-1])
+ return torch.from_numpy(windows)

[A7] CMT adds its queries. This is a flag of train.py: --cma-residual

[A8] A block has two heads, feed-forward width 2 and dropout 0.5, but no output matrix.
- nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim)
+ nn.Linear(dim, 2), nn.ReLU(), nn.Linear(2, dim)
- self.dropout = nn.Dropout(0.1)
+ self.dropout = nn.Dropout(0.5)
- attended, _ = cross_modal_attention(
-     x_t, x_s, self.w_q, self.w_k, self.w_v, mask_s
- )
+ heads = []
+ for w in zip(*[w.chunk(2, dim=1) for w in (self.w_q, self.w_k, self.w_v)]):
+     heads.append(cross_modal_attention(x_t, x_s, *w, mask_s)[0])
+ attended = torch.cat(heads, dim=-1)

[A9] At the trigger the counter starts again at 0, so 10 more epochs stop the training.
- self.finetuning = True
+ self.finetuning = True
+ self.since_best = 0
- if entry["since_best"] == 0:
+ if entry["since_best"] == 0 and entry["event"] != "finetune":

[A10] The test uses the weights of the last epoch that lowered the development loss.
- save(folder, state)
+ if patience.since_best == 0:
+     torch.save(state, folder / "best.pt")
+ save(folder, state)
- test, log_probs = measure(model, fetch, test_rows, args)
+ best = evaluate.load_checkpoint(folder / "best.pt", asdict(run))
+ model.load_state_dict(best["model"])
+ for modality, source in sources.items():
+     if best["upstreams"][modality]:
+         source.load_state_dict(best["upstreams"][modality])
+     else:
+         source.close()  # in the best epoch it was frozen
+ test, log_probs = measure(model, fetch, test_rows, args)

[A11] While fine-tuning, all that is trained from scratch keeps its rate of 1e-3.
- parameters = list(model.parameters())
+ scratch = {"params": list(model.parameters()), "lr": args.lr_frozen}
+ parameters = []
- return AdamW(
+ parameters = [{"params": parameters}, scratch]
+ return AdamW(

[A12] The upstreams' dropout is on while fine-tuning, without layerdrop and SpecAugment.
- self.live = copy.deepcopy(self.upstream)
+ self.live = copy.deepcopy(self.upstream)
+ self.live.model.config.layerdrop = 0.0
+ self.live.model.config.apply_spec_augment = False
- for row in sorted(set(rows)):
+ # Gradients are on in training and off in measuring.
+ self.live.model.train(torch.is_grad_enabled())
+ for row in sorted(set(rows)):

[A13] Every silent window of a clip is removed.
- first = int((power >= threshold).nonzero()[0])
- x = x[first * WINDOW :]
+ rest = x[len(power) * WINDOW :]  # less than a window
+ x = x.unfold(0, WINDOW, WINDOW)[power >= threshold].flatten()
+ if len(rest) and rest.square().mean() >= threshold:
+     x = torch.cat([x, rest])

[A14] Another development speaker is drawn. This is a flag of train.py: --seed

[A15] The classifier is one linear layer.
- nn.Linear(dim * len(self.fusion.paths), dim),
- nn.ReLU(),
- nn.Linear(dim, config.n_classes),
+ nn.Linear(dim * len(self.fusion.paths), config.n_classes),

[A16] Dropout stands before the projector, not between the modules.
- self.fusion = Fusion(config)
+ self.fusion = Fusion(config)
+ for block in list(self.extractor.modules()):
+     if isinstance(block, FeatureExtractor):
+         block.linear = nn.Sequential(nn.Dropout(config.dropout), block.linear)
- self.dropout = nn.Dropout(config.dropout)
+ self.dropout = nn.Dropout(0.0)
- self.fusion_dropout = nn.Dropout(config.dropout)
+ self.fusion_dropout = nn.Dropout(0.0)

[A17] A loss has decreased if it is lower by one part in 10,000.
- if dev_loss < self.best:
+ if dev_loss < self.best * (1 - 1e-4):

[A18] The last batch is dropped if it is smaller than the others.
- batches = shuffled.split(args.batch_size)
+ rows = shuffled[: max(len(rows) // args.batch_size, 1) * args.batch_size]
+ batches = rows.split(args.batch_size)

[A19] Tags such as [LAUGHTER] are removed from the text.
- prepared = self.preprocessor(raw, truncation=True, max_length=self.max_tokens)
+ raw = " ".join(re.sub(r"\[[A-Z]+\]", " ", raw).split())
+ prepared = self.preprocessor(raw, truncation=True, max_length=self.max_tokens)

[A20] A frozen system stops where another one starts to fine-tune.
- patience = Patience(finetune_after, args.stop_after)
+ stop_after = args.finetune_after if run.frozen else args.stop_after
+ patience = Patience(finetune_after, stop_after)

[A21] The LayerNorm of BERT's embeddings stays frozen.
- if what == "all" or (what == "bottom" and name.startswith(prefix)):
+ if what == "bottom" and name.startswith("embeddings.LayerNorm"):
+     continue
+ if what == "all" or (what == "bottom" and name.startswith(prefix)):
"""


# By name, for example "A5".
PATCHES = {patch[1 : patch.index("]")]: patch for patch in TEXT.strip().split("\n\n")}


def read_files() -> dict[str, str]:
    return {file: (ROOT / file).read_text(encoding="utf-8") for file in FILES}


def apply(name: str, text: str) -> str:
    """Apply a patch to a text. Raises InputError if it has none, or does not fit."""
    edits = re.findall(r"((?:^- .*\n)+)((?:^\+ .*\n?)+)", PATCHES[name], re.M)
    if not edits:
        raise InputError(f"no patch: {PATCHES[name]}")
    for edit in edits:
        old, new = [[line[2:] for line in lines.splitlines()] for lines in edit]
        pattern = r"(?m)^( *)" + r"\n *".join(re.escape(line) for line in old)
        parts = re.split(pattern, text)
        if len(parts) != 3:
            raise InputError(
                f"{name} does not fit. One file must have this once:\n{old[0]}\n"
                "Correct this patch, or leave out another one that changes it"
            )
        before, indentation, after = parts
        text = before + indent("\n".join(new), indentation) + after
    return text


def load(texts: dict[str, str], name: str) -> SimpleNamespace:
    """Import the texts of the four files, beside the real ones, which stay the same."""
    # First load the libraries that they need. The patch below forgets new ones.
    importlib.import_module("train")
    modules = {}
    with mock.patch.dict(sys.modules):
        for file in FILES:
            module = ModuleType(file.removesuffix(".py"))
            sys.modules[module.__name__] = module
            exec(compile(texts[file], f"{file} of {name}", "exec"), vars(module))
            modules[module.__name__] = module
    return SimpleNamespace(**modules)


def load_patched(names: list[str]) -> SimpleNamespace:
    """Import the four files with patches. Their runs are marked in every report."""
    text = "\0".join(read_files().values())
    for name in names:
        text = apply(name, text)
    mark = f'args.changed = ["alternative={",".join(names)}"]'
    text = text.replace("args.changed = []", mark)
    return load(dict(zip(FILES, text.split("\0"), strict=True)), ",".join(names))


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        print("\n".join(patch.split("\n")[0] for patch in PATCHES.values()))
        return
    names = arguments[0].split(",")
    for name in names:
        if name not in PATCHES:
            raise InputError(f"{name}: unknown. There are {', '.join(PATCHES)}")
    if len(arguments) == 1:
        print("\n\n".join(PATCHES[name] for name in names))
    elif arguments[1] == "--":
        code = load_patched(names)
        flags = ["--out", f"runs-{arguments[0]}", *arguments[2:]]
        code.data.run_command(lambda: code.train.main(flags))
    else:
        raise InputError("write -- before the flags of train.py")


if __name__ == "__main__":
    run_command(main)
