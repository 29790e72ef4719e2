r"""Try another reading of a point that the paper leaves open.

    python -m tests.studies.alternatives             list the alternatives
    python -m tests.studies.alternatives A5          show what one of them changes
    python -m tests.studies.alternatives A5,A9 -- --system 17 --fold all --seed 0 1 2
        train with two of them together; the flags are those of train.py

The four files have one reading of each open point. PATCHES has another one. To train,
this script copies the four files into a temporary folder and patches the copies. The
runs go to runs-A5,A9 in the current folder, unless you name another --out. They use the
same cache as the four files. Where a patch changes what an upstream reads, the layer
states get other names there.

Every run is marked: the name of its folder and its title have alternative=A5,A9. To
compare it with a run of the four files:

    python -m tests.studies.compare FOLDER_A FOLDER_B

Do not use evaluate.py recognize on these runs. It has the model of the four files.
"""

import difflib
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from data import InputError, run_command

ROOT = Path(__file__).resolve().parents[2]
FILES = ("model.py", "data.py", "train.py", "evaluate.py")

# In a patch, the lines after "+" replace the lines after "-" above them, which the file
# has exactly once. All lines are indented like the place where they go.
PATCHES = r"""
[A1] The layers are laid side by side, so the projector has L * D inputs.
model.py
- self.linear = nn.Linear(width, dim)
+ self.linear = nn.Linear(n_layers * width, dim)
- x = torch.einsum("nl,nld->nd", gates[utterance], states)
+ x = (gates[utterance].unsqueeze(-1) * states).flatten(1)

[A2] The features are the channels of S&E, and the reduction ratio is still L.
model.py
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
model.py
- self.linear = nn.Linear(width, dim)
+ self.linear = nn.Sequential(
+     nn.Linear(width, dim), nn.ReLU(), nn.Linear(dim, dim)
+ )

[A4] Two convolutions mix the texts, with four maps and a LayerNorm between them.
model.py
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
model.py
- return x, mask.any(dim=1)
+ return x, mask[:, C // 2]

[A6] Beyond the edge of a dialogue, its first or its last text is repeated.
data.py
- return torch.from_numpy(windows)
+ for row, window in enumerate(windows):
+     inside = window[window >= 0]
+     neighbours = np.arange(row - size // 2, row + size // 2 + 1)
+     windows[row] = neighbours.clip(inside[0], inside[-1])
+ return torch.from_numpy(windows)

[A7] CMT adds its queries. This is a flag of train.py: --cma-residual

[A8] A block has two heads, feed-forward width 2 and dropout 0.5, but no output matrix.
model.py
- nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim)
+ nn.Linear(dim, 2), nn.ReLU(), nn.Linear(2, dim)
- self.dropout = nn.Dropout(0.1)
+ self.dropout = nn.Dropout(0.5)
- return cross_modal_attention(x_t, x_s, self.w_q, self.w_k, self.w_v, mask_s)
+ outputs = []
+ weights = []
+ width = self.w_q.shape[1] // 2
+ for head in (slice(0, width), slice(width, 2 * width)):
+     matrices = (self.w_q[:, head], self.w_k[:, head], self.w_v[:, head])
+     output, weight = cross_modal_attention(x_t, x_s, *matrices, mask_s)
+     outputs.append(output)
+     weights.append(weight)
+ return torch.cat(outputs, dim=-1), sum(weights) / 2

[A9] At the trigger the counter starts again at 0, so 10 more epochs stop the training.
train.py
- self.finetuning = True
+ self.finetuning = True
+ self.since_best = 0
- if row["since_best"] == 0:
+ if row["since_best"] == 0 and row["event"] != "finetune":

[A10] The test uses the weights of the last epoch that lowered the development loss.
train.py
- import argparse
+ import argparse
+ import copy
- model.load_state_dict(state["model"])
+ model.load_state_dict(state["model"])
+ model.best = state["best"]
- event = patience.step(dev["loss"])
+ event = patience.step(dev["loss"])
+ if dev["loss"] == patience.best:
+     opened = {m: source.state_dict() for m, source in sources.items()}
+     model.best = copy.deepcopy([model.state_dict(), opened])
- "model": model.state_dict(),
+ "model": model.state_dict(),
+ "best": model.best,
- test, log_probs = measure(model, batch, test_rows, args)
+ weights, opened = model.best
+ model.load_state_dict(weights)
+ for modality, source in sources.items():
+     if opened[modality]:
+         source.load_state_dict(opened[modality])
+     else:
+         source.close()  # in the best epoch it was frozen
+ test, log_probs = measure(model, batch, test_rows, args)

[A11] While fine-tuning, all that is trained from scratch keeps its rate of 1e-3.
train.py
- parameters = list(model.parameters())
+ scratch = {"params": list(model.parameters()), "lr": args.lr_frozen}
+ parameters = []
- return AdamW(
+ parameters = [{"params": parameters}, scratch]
+ return AdamW(

[A12] The upstreams' dropout is on while fine-tuning, without layerdrop and SpecAugment.
data.py
- self.live = copy.deepcopy(self.upstream)
+ self.live = copy.deepcopy(self.upstream)
+ self.live.model.config.layerdrop = 0.0
+ self.live.model.config.apply_spec_augment = False
- groups = defaultdict(list)
+ # Gradients are on in training and off in measuring.
+ self.live.model.train(torch.is_grad_enabled())
+ groups = defaultdict(list)

[A13] Every silent window of a clip is removed.
data.py
- first = int((power >= threshold).nonzero()[0])
- x = x[first * WINDOW :]
+ rest = x[len(power) * WINDOW :]  # less than a window
+ x = x.unfold(0, WINDOW, WINDOW)[power >= threshold].flatten()
+ if len(rest) and rest.square().mean() >= threshold:
+     x = torch.cat([x, rest])

[A14] Another development speaker is drawn. This is a flag of train.py: --seed

[A15] The classifier is one linear layer.
model.py
- nn.Linear(dim * len(self.fusion.paths), dim),
- nn.ReLU(),
- nn.Linear(dim, config.n_classes),
+ nn.Linear(dim * len(self.fusion.paths), config.n_classes),

[A16] Dropout stands before the projector, not between the modules.
model.py
- self.fusion = Fusion(config)
+ self.fusion = Fusion(config)
+ for block in list(self.extractor.modules()):
+     if isinstance(block, FeatureExtractor):
+         block.linear = nn.Sequential(nn.Dropout(config.dropout), block.linear)
- self.dropout = nn.Dropout(config.dropout)
+ self.dropout = nn.Dropout(0.0)
- self.fusion_dropout = nn.Dropout(config.dropout)
+ self.fusion_dropout = nn.Dropout(0.0)

[A16]-both Dropout stands before the projector and between the modules.
model.py
- self.fusion = Fusion(config)
+ self.fusion = Fusion(config)
+ for block in list(self.extractor.modules()):
+     if isinstance(block, FeatureExtractor):
+         block.linear = nn.Sequential(nn.Dropout(config.dropout), block.linear)

[A17] A loss has decreased if it is lower by one part in 10,000.
train.py
- if dev_loss < self.best:
+ if dev_loss < self.best * (1 - 1e-4):

[A18] The last batch is dropped if it is smaller than the others.
train.py
- batches = shuffled.split(args.batch_size)
+ rows = shuffled[: max(len(rows) // args.batch_size, 1) * args.batch_size]
+ batches = rows.split(args.batch_size)

[A19] Tags such as [LAUGHTER] are removed from the text.
model.py
- prepared = self.preprocessor(raw, truncation=True, max_length=self.max_tokens)
+ raw = " ".join(re.sub(r"\[[A-Z]+\]", " ", raw).split())
+ prepared = self.preprocessor(raw, truncation=True, max_length=self.max_tokens)

[A20] A frozen system stops where another one starts to fine-tune.
train.py
- patience = Patience(finetune_after, args.stop_after)
+ stop_after = args.finetune_after if run.frozen else args.stop_after
+ patience = Patience(finetune_after, stop_after)

[A21] The LayerNorm of BERT's embeddings stays frozen.
model.py
- if what == "all" or (what == "bottom" and name.startswith(bottom)):
+ if what == "bottom" and name.startswith("embeddings.LayerNorm"):
+     continue
+ if what == "all" or (what == "bottom" and name.startswith(bottom)):
"""

# What every patched copy gets, so that no report mixes its runs with others.
MARK = ["train.py", "args.changed = []", 'args.changed = ["alternative=NAME"]']


@dataclass
class Patch:
    """One alternative: what it is, and its replacements [file, old text, new text]."""

    sentence: str
    edits: list[list[str]] = field(default_factory=list)


def read_patches() -> dict[str, Patch]:
    """Read the text of PATCHES. Returns the patches by name."""
    patches = {}
    before = ""
    for line in PATCHES.splitlines():
        kind, _, content = line.partition(" ")
        if kind.startswith("["):
            patch = Patch(content)
            patches[kind.replace("[", "").replace("]", "")] = patch
        elif kind in FILES:
            file = kind
        elif kind == "-" and before == "-":
            patch.edits[-1][1] += f"\n{content}"
        elif kind == "-":
            patch.edits.append([file, content, ""])
        elif kind == "+":
            patch.edits[-1][2] += f"{content}\n"
        before = kind
    return patches


def apply(names: list[str]) -> dict[str, str]:
    """Apply patches, one after another. Returns the texts of the four files, by name.

    Raises InputError if a patch has no edits, or does not fit.
    """
    patches = read_patches()
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in FILES}
    for name in names:
        if not patches[name].edits:
            raise InputError(f"{name} needs no patch. {patches[name].sentence}")
        for file, old, new in patches[name].edits:
            edit(texts, name, file, old, new)
    return texts


def edit(texts: dict[str, str], name: str, file: str, old: str, new: str) -> None:
    """Replace `old` in the text of a file. Raises InputError if that is not unique."""
    # All lines are indented as the line that has the first of them.
    line = texts[file].partition(old.split("\n")[0])[0].split("\n")[-1]
    indentation = "\n" + line[: len(line) - len(line.lstrip())]
    old = old.replace("\n", indentation)
    if texts[file].count(old) != 1:
        raise InputError(
            f"{name} does not fit {file}, which must have this once:\n{old}\n"
            "Correct this patch, or leave out another one that changes this place"
        )
    new = new.strip("\n").replace("\n", indentation)
    texts[file] = texts[file].replace(old, new)


def show(names: list[str]) -> None:
    """Print what patches are and which lines they change."""
    for name in names:
        print(f"{name}: {read_patches()[name].sentence}")
    for file, text in apply(names).items():
        before = (ROOT / file).read_text(encoding="utf-8").splitlines()
        after = text.splitlines()
        for line in difflib.unified_diff(before, after, file, file, n=0, lineterm=""):
            print(line)


def write_copy(names: list[str], folder: Path) -> None:
    """Write the four files with patches into a folder. Their runs are marked."""
    texts = apply(names)
    file, old, new = MARK
    edit(texts, "MARK", file, old, new.replace("NAME", ",".join(names)))
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")


def train(names: list[str], flags: list[str]) -> None:
    """Train in the current folder with the patched files. Exits as train.py does."""
    with tempfile.TemporaryDirectory() as folder:
        write_copy(names, Path(folder))
        command = [sys.executable, str(Path(folder) / "train.py")]
        out = ["--out", f"runs-{','.join(names)}"]
        finished = subprocess.run([*command, *out, *flags])
    sys.exit(finished.returncode)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    patches = read_patches()
    if not arguments:
        for name, patch in patches.items():
            print(f"{name:9} {patch.sentence}")
        return
    chosen = arguments[0].split(",")
    for name in chosen:
        if name not in patches:
            raise InputError(f"{name}: unknown. There are {', '.join(patches)}")
    # In one order, so that A9,A5 is the same as A5,A9.
    names = [name for name in patches if name in chosen]
    if len(arguments) == 1:
        show(names)
    elif arguments[1] == "--":
        train(names, arguments[2:])
    else:
        raise InputError("write -- before the flags of train.py")


if __name__ == "__main__":
    run_command(main)
