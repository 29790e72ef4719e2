"""The model of "Context-aware Multimodal Fusion for Emotion Recognition" (Li et al., 2022).

    python model.py     every block of the MMT system, with shapes and parameters at full size

Read this file with §2 of the paper and its Figures 1-3 open. "The author's other code" is
JinchaoLove/AffectiveVocalBurstRecognition on GitHub, for a sister task.

Symbol      meaning                                                      in the paper
------      ----------------------------------------------------------   --------------------------
B           utterances in a batch                                        32 (§3.2)
T           time steps: T_A frames of 20 ms, T_T word pieces             §2.2
U, N        distinct texts of a batch; the real steps of all of them     (data.batch)
L           states of an upstream: the input of its first Transformer    25, 13 (§2.1; Fig. 2
            layer, then the output of each layer                         prints "H+1")
D           width of an upstream                                         1024, 768 (§2.1)
d           width after the projector, `dim` in the code                 16 (§2.1)
C           utterances in the context: 4 before, the target, 4 after     9 (§3.2)
X_A, X_T    acoustic and textual features, (B, T_A, d) and (B, T_T, d)   Fig. 2a, 2b
x_t, x_s    target (gives the queries), source (gives keys, values)      X_t, X_s; s -> t in Eq. (1)

Masks are bool, True = real, False = padding. The data flow of the main system (MMT), one batch:

  waveforms -- WavLM --> (B, T_A, 25, 1024) -- S&E, project --> X_A (B, T_A, 16)
  9 texts each -- BERT --> (B, 9, T_T, 13, 768) -- S&E, project --> (B, 9, T_T, 16)
                                                -- context conv --> X_T (B, T_T, 16)

  queries X_T, keys X_A -- CMT A->T --> (B, T_T, 16) -- mean over time --> (B, 16) --+
  queries X_A, keys X_T -- CMT T->A --> (B, T_A, 16) -- mean over time --> (B, 16) --+
                                                                                     |
                                            logits (B, 4) <-- MLP -- (B, 32) <-------+
"""

import argparse, math, os, re, warnings, zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data import reading

# Fig. 3 and Table 1: a system is a list of paths (target, source) whose outputs are concatenated.
# Without a source, a path is the features as they are. With the target as source it is a vanilla
# Transformer, otherwise CMT (source -> target). Odd systems are frozen, even ones fine-tuned.
FUSIONS = {
    "audio-fc": [("audio", None)],  # Sys. 1, 2
    "audio-te": [("audio", "audio")],  # Sys. 3, 4
    "text-fc": [("text", None)],  # Sys. 5, 6
    "text-te": [("text", "text")],  # Sys. 7, 8
    "cmt-a2t": [("text", "audio")],  # Sys. 9, 10: queries from the text
    "cmt-t2a": [("audio", "text")],  # Sys. 11, 12: Fig. 3c
}
FUSIONS["ef"] = FUSIONS["audio-fc"] + FUSIONS["text-fc"]  # Sys. 13, 14: Fig. 3a
FUSIONS["lf"] = FUSIONS["audio-te"] + FUSIONS["text-te"]  # Sys. 15, 16: Fig. 3b
FUSIONS["mmt"] = FUSIONS["cmt-a2t"] + FUSIONS["cmt-t2a"]  # Sys. 17, 18: Fig. 3d

# The values of some fields of Config, and of train.py's flags
CHOICES = {
    "fusion": tuple(FUSIONS), "condense": ("sum", "concat"), "text_mask": ("union", "target"),
    "head": ("mlp", "linear"), "dropout_at": ("modules", "projector", "both")}  # fmt: skip

@dataclass
class Config:
    """Describe the trained part. The defaults are the paper's main system at full size."""
    fusion: str = "mmt"
    audio_layers: int = 25  # L of WavLM-Large
    audio_dim: int = 1024  # D of WavLM-Large
    text_layers: int = 13  # L of BERT-base
    text_dim: int = 768  # D of BERT-base
    dim: int = 16  # d, §2.1
    n_classes: int = 4  # §3.1
    n_context: int = 9  # C, §3.2. With 1 there is no context.
    dropout: float = 0.5  # §3.2
    condense: str = "sum"  # [A1]
    text_mask: str = "union"  # [A5]
    cma_residual: bool = False  # [A7]
    head: str = "mlp"  # [A15]
    dropout_at: str = "modules"  # [A16]

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: use {', '.join(known)}")

    @property
    def modalities(self) -> list[str]:
        """The modalities that the fusion uses, audio first."""
        return [m for m in ("audio", "text") if any(m in path for path in FUSIONS[self.fusion])]

# --- Equations ------------------------------------------------------------------------------------
# EXERCISE 1 (15 min): delete the body, write it again; pytest -m ex1
def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average over the real steps: the "average time pooling" of §2.2.
    x (B, T, F), mask (B, T) -> (B, F). Example: x [[1], [3], [9]] with mask [True, True, False]
    gives [2]. An utterance without a real step gives zeros, so there is no 0/0 = NaN. Padding is
    never read, so it may contain anything, even NaN. A NaN in a real step propagates."""
    n_steps = mask.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
    return x.masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=1) / n_steps  # (B, F)

# EXERCISE 2 (30 min): delete the body, write it again; pytest -m ex2
def cross_modal_attention(
    x_t: Tensor, x_s: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, mask_s: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute Eq. (1): each step of the target takes a weighted mean of the source's values.
    x_t (B, T_t, d_t), x_s (B, T_s, d_s), w_q (d_t, d_k), w_k (d_s, d_k), w_v (d_s, d_v),
    mask_s (B, T_s) or None -> (out (B, T_t, d_v), weights (B, T_t, T_s)). Each row of the weights
    sums to 1 over the real steps of the source. Without a real step, weights and output are zero.
    Padding of the source may contain any finite number (0 * NaN is NaN)."""
    # Eq. (1), §2.2: softmax(Q_t K_s^T / sqrt(d_k)) V_s
    q, k, v = x_t @ w_q, x_s @ w_k, x_s @ w_v  # (B, T_t, d_k), (B, T_s, d_k), (B, T_s, d_v)
    scores = q @ k.transpose(1, 2) / math.sqrt(w_k.shape[1])  # (B, T_t, T_s)
    if mask_s is None:
        mask_s = torch.ones_like(x_s[..., 0], dtype=torch.bool)
    # Subtle: fill with the lowest finite number. The softmax of a row of only -inf is NaN.
    padded = ~mask_s.unsqueeze(1)  # (B, 1, T_s)
    weights = scores.masked_fill(padded, torch.finfo(scores.dtype).min).softmax(dim=-1)
    weights = weights.masked_fill(padded, 0.0)  # (B, T_t, T_s)
    return weights @ v, weights

# --- Blocks of the feature extractor (Fig. 2) -----------------------------------------------------
class SqueezeExcitation(nn.Module):
    """Squeeze-and-Excitation (S&E) over the layers of an upstream: §2.1, Fig. 2, reference [27].
    x (B, T, L, D), mask (B, T) -> (B, T, L, D). Each layer is scaled by its gate in (0, 1):

        z = mean of x over features and real steps        squeeze, (B, L)
        gates = sigmoid(W_2 ReLU(W_1 z + b_1) + b_2)      excitation, (B, L)
    """
    def __init__(self, n_layers: int):
        super().__init__()
        # UNSPECIFIED [A2]: "layer-wise", "the reduction ratio is simply the number of layers". We
        # use the layers as channels, so the bottleneck has L / L = 1 unit. Alternative: features.
        # Careful: if the ReLU gives 0 for all utterances, all get equal gates. train.py warns.
        self.reduce = nn.Linear(n_layers, 1)
        self.expand = nn.Linear(1, n_layers)
        nn.init.ones_(self.reduce.bias)  # so that the ReLU starts above 0

    # EXERCISE 3 (15 min): delete the body, write it again; pytest -m ex3
    def gates(self, x: Tensor, mask: Tensor) -> Tensor:
        """Compute one gate for each layer of each utterance: (B, T, L, D), (B, T) -> (B, L)."""
        # Squeeze. The mask is the "padding mask" arrow of Fig. 2: padded states are not zero.
        z = masked_mean(x.mean(dim=-1), mask)  # (B, L)
        hidden = torch.relu(self.reduce(z))  # (B, 1): the bottleneck of the excitation
        return torch.sigmoid(self.expand(hidden))  # (B, L)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # the paper's block (see Projector)
        return x * self.gates(x, mask)[:, None, :, None]  # (B, T, L, D)

class Projector(nn.Module):
    """Condense the layers of a step to one vector of width d: §2.1, "Project & Norm" in Fig. 2.
    x (B, T, L, D), gates (B, 1, L) or None (all 1) -> (B, T, d), or (N, L, D), (N, L) -> (N, d).
    `in_dim` is D, or L * D where `condense` is "concat". The model applies S&E's gates here and not
    in SqueezeExcitation.forward. The result is the same, and the sum needs no scaled copy."""
    def __init__(self, in_dim: int, out_dim: int = 16, condense: str = "sum", dropout: float = 0):
        super().__init__()
        self.condense = condense
        self.dropout = nn.Dropout(dropout)  # [A16]: 0 by default
        # UNSPECIFIED [A3]: "an MLP with Layer-Normalization" (§2.1), but "a Fully-Connected (FC)
        # Layer and Layer Normalization" (§1). We follow §1, as the author's other code does.
        # Alternative: a hidden layer, whose width the paper does not give.
        self.linear = nn.Linear(in_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        if gates is None:
            gates = x.new_ones(x.shape[:-1])  # (B, T, L)
        # UNSPECIFIED [A1]: how L layers become one vector. We sum them, as the author's other code,
        # S3PRL and ESPnet do. Alternative: --condense concat. Effect: tests/COURSE.md.
        if self.condense == "sum":
            x = (gates.unsqueeze(-2) @ x).squeeze(-2)  # (B, T, D): the sum of gate * layer
        else:
            x = (gates.unsqueeze(-1) * x).flatten(-2)  # (B, T, L * D)
        return self.norm(self.linear(self.dropout(x)))  # (B, T, d)

class FeatureExtractor(nn.Module):
    """Fig. 2a without the upstream: states, mask (B, T) -> (X (B, T, d), mask).
    The states are (B, T, L, D), or (N, L, D) without padding: the N real steps of all utterances,
    one after another, as data.batch gives them. The mask tells where each step belongs."""
    def __init__(self, config: Config, modality: str):
        super().__init__()
        n_layers, width = (getattr(config, f"{modality}_{x}") for x in ("layers", "dim"))  # L, D
        width *= 1 if config.condense == "sum" else n_layers
        self.se = SqueezeExcitation(n_layers)
        dropout = 0.0 if config.dropout_at == "modules" else config.dropout  # [A16]
        self.projector = Projector(width, config.dim, config.condense, dropout)

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        states = states.float()  # the cache stores 16 bits [D1], the weights have 32
        if states.ndim == 4:
            return self.projector(states, self.se.gates(states, mask)[:, None]), mask
        # Without padding. Subtle: of a step, gates() needs only its mean, a state of width 1.
        means = states.new_zeros(*mask.shape, states.shape[1], 1)  # (B, T, L, 1)
        means[mask] = states.mean(dim=-1, keepdim=True)
        gates = self.se.gates(means, mask)  # (B, L)
        gates = gates.repeat_interleave(mask.sum(dim=1), dim=0)  # (N, L): of each step's utterance
        projected = self.projector(states, gates)  # (N, d)
        x = projected.new_zeros(*mask.shape, projected.shape[1])  # (B, T, d)
        x[mask] = projected
        return x, mask

class ContextConv(nn.Module):
    """The Conv2D of Fig. 2b: the feature maps of C utterances become one map of the target.
    x (B, C, T, d), mask (B, C, T) -> (X_T (B, T, d), mask (B, T)). The target is number C // 2."""
    def __init__(self, n_context: int = 9, text_mask: str = "union"):
        super().__init__()
        # UNSPECIFIED [A4]: "a convolutional layer with the stride of 1 and kernel size of 3"
        # (§2.1). We use the utterances as channels and convolve over (token, feature), so X_T is a
        # sequence: 9 * 3 * 3 + 1 = 82 parameters. Alternative: two layers and LayerNorm, as in the
        # author's other code. Careful: it mixes tokens of different turns by their position.
        self.conv = nn.Conv2d(n_context, 1, kernel_size=3, stride=1, padding=1)
        self.text_mask = text_mask

    # EXERCISE 4 (25 min): delete the body, write it again; pytest -m ex4
    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        C = x.shape[1]
        # UNSPECIFIED [A6]: what is beyond a dialogue's edge. We put zeros, as implementations of
        # [23] do. Alternative: repeat the edge. A missing neighbour has an all-False mask, so it
        # becomes a map of zeros with the rest of the padding.
        x = x.masked_fill(~mask.unsqueeze(-1), 0.0)  # (B, C, T, d)
        x = self.conv(x).squeeze(1)  # (B, T, d)
        # UNSPECIFIED [A5]: which steps of X_T are real. We take each position where any of the C
        # utterances has a token. Alternative: --text-mask target. Effect: tests/COURSE.md.
        mask = mask.any(dim=1) if self.text_mask == "union" else mask[:, C // 2]  # (B, T)
        return x, mask

class TextFeatureExtractor(FeatureExtractor):
    """Fig. 2b without BERT: the states of U utterances -> (X_T (B, T, d), mask (B, T)).
    states (U, T, L, D) or (N, L, D), mask (U, T), and context (B, C): which of the U utterances are
    in each window, -1 for none. Windows overlap, so each distinct utterance is given once."""
    def __init__(self, config: Config, modality: str = "text"):
        super().__init__(config, modality)
        self.context_conv = ContextConv(config.n_context, config.text_mask)

    def forward(self, states: Tensor, mask: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        x, mask = super().forward(states, mask)  # (U, T, d), (U, T)
        # Append one empty utterance. In Python, index -1 is the last row: the missing neighbour.
        x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
        mask = torch.cat([mask, mask.new_zeros(1, mask.shape[1])])
        return self.context_conv(x[context], mask[context])  # of (B, C, T, d), (B, C, T)

# --- Fusion (Fig. 3) and the whole (Fig. 1) -------------------------------------------------------
class TransformerBlock(nn.Module):
    """One Transformer block around Eq. (1). The source is the target itself, or the other modality.
    x_t (B, T_t, d), x_s (B, T_s, d), mask_s (B, T_s) or None -> (B, T_t, d). There are two
    sublayers, each followed by dropout, add and norm. `residual` switches the attention's add."""
    def __init__(self, dim: int = 16, dropout: float = 0.1, residual: bool = True):
        super().__init__()
        # UNSPECIFIED [A8]: heads, depth, width, norm, positions. Eq. (1) has one head and no output
        # matrix. "The same backbone as the vanilla Transformer" (§2.2) gives post-norm, 4 d, ReLU,
        # dropout 0.1. We use one block, and no positions, because the upstreams add them.
        # Alternative: 2 heads, width 2, dropout 0.5, as in the author's other code.
        self.w_q = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, dim)))  # W_Q, (d, d_k)
        self.w_k = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, dim)))  # W_K, (d, d_k)
        self.w_v = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, dim)))  # W_V, (d, d_v)
        self.norm1 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))  # fmt: skip
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        # UNSPECIFIED [A7]: the vanilla Transformer adds the queries to the attention's output. Then
        # CMT(A->T) carries the text itself, but in Table 1 it is near audio (Sys. 9, 10). We do not
        # add them across modalities. Alternative: --cma-residual. Effect: tests/COURSE.md.
        self.residual = residual

    def attend(self, x_t: Tensor, x_s: Tensor, mask_s: Tensor | None = None):
        """Compute Eq. (1) with this block's matrices, as cross_modal_attention does."""
        return cross_modal_attention(x_t, x_s, self.w_q, self.w_k, self.w_v, mask_s)

    # EXERCISE 5 (35 min): delete the body, write it again; pytest -m ex5
    def forward(self, x_t: Tensor, x_s: Tensor, mask_s: Tensor | None = None) -> Tensor:
        x, _ = self.attend(x_t, x_s, mask_s)  # (B, T_t, d)
        x = x_t + self.dropout(x) if self.residual else self.dropout(x)  # [A7]
        x = self.norm1(x)
        x = x + self.dropout(self.feed_forward(x))
        return self.norm2(x)

class Fusion(nn.Module):
    """Fig. 3: run the paths of FUSIONS, pool each over time (§2.2), concatenate.
    x and mask are dicts by modality, (B, T_m, d) and (B, T_m) -> (B, d * number of paths)."""
    def __init__(self, config: Config):
        super().__init__()
        self.paths = FUSIONS[config.fusion]
        self.blocks = nn.ModuleDict()
        for target, source in self.paths:
            if source is not None:
                residual = source == target or config.cma_residual  # [A7]
                self.blocks[f"{source}-to-{target}"] = TransformerBlock(config.dim, 0.1, residual)

    def forward(self, x: dict[str, Tensor], mask: dict[str, Tensor]) -> Tensor:
        pooled = []
        for target, source in self.paths:
            h = x[target]  # (B, T_t, d)
            if source is not None:
                h = self.blocks[f"{source}-to-{target}"](h, x[source], mask[source])
            pooled.append(masked_mean(h, mask[target]))  # (B, d)
        return torch.cat(pooled, dim=-1)

class EmotionRecognizer(nn.Module):
    """Fig. 1: everything that is trained from scratch. Layer states of a batch -> logits (B, 4).
    audio  (states, mask) as in FeatureExtractor, or None for the text systems
    text   (states, mask, context) as in TextFeatureExtractor, or None for the audio systems
    The classes are in the order of Fig. 4: neu, hap, ang, sad (data.CLASSES)."""
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.extractor = nn.ModuleDict()
        for m in config.modalities:
            kind = FeatureExtractor if m == "audio" else TextFeatureExtractor  # Fig. 2a, 2b
            self.extractor[m] = kind(config, m)
        self.fusion = Fusion(config)
        # UNSPECIFIED [A16]: "a dropout layer (0.5) between every two modules" (§3.2). We take the
        # boxes of Fig. 1: extractor, fusion (if there are two modalities), classifier. Alternative:
        # --dropout-at projector, as in the author's other code, or both. Effect: tests/COURSE.md.
        between = 0.0 if config.dropout_at == "projector" else config.dropout
        self.dropout = nn.Dropout(between)
        self.fusion_dropout = nn.Dropout(between if len(config.modalities) == 2 else 0.0)
        # PAPER-ERROR [E10]: "a simple MLP" (§2.3), but "a fully-connected (FC) layer" (§2.2).
        # UNSPECIFIED [A15]: the classifier. We follow §2.3, with one hidden layer of width d.
        # Alternative: --head linear, as in the author's other code. Effect: tests/COURSE.md.
        width, layers = config.dim * len(self.fusion.paths), []
        if config.head == "mlp":
            width, layers = config.dim, [nn.Linear(width, config.dim), nn.ReLU()]
        self.classifier = nn.Sequential(*layers, nn.Linear(width, config.n_classes))

    def features(self, audio: tuple | None = None, text: tuple | None = None) -> tuple[dict, dict]:
        """Compute X_A, X_T: by modality x (B, T, d), mask (B, T). Raises ValueError without one."""
        x, mask, given = {}, {}, {"audio": audio, "text": text}
        for m, extractor in self.extractor.items():
            if given[m] is None:
                raise ValueError(f"fusion {self.config.fusion!r} needs {m} states")
            x[m], mask[m] = extractor(*given[m])
        return x, mask

    def forward(self, audio: tuple | None = None, text: tuple | None = None) -> Tensor:
        x, mask = self.features(audio, text)
        x = {m: self.dropout(features) for m, features in x.items()}  # (B, T, d) each
        fused = self.fusion_dropout(self.fusion(x, mask))  # (B, d * paths)
        return self.classifier(fused)

# --- Upstreams: WavLM and BERT (§2.1), and what fine-tuning opens in them (§2.4) ------------------
class Upstream(nn.Module):
    """A pre-trained encoder with its preprocessor: raw inputs -> all of its layer states.
    name       a Hugging Face name or a local folder: WavLM, HuBERT or wav2vec 2.0 for "audio",
               BERT or RoBERTa for "text"
    precision  "fp32", or "bf16": matrix products in 16 bits
    call       list of B waveforms (n,) at 16 kHz, or of B strings
               -> (states (B, T, L, D), mask (B, T))
    Raises InputError if the model cannot be loaded or fails a check."""
    def __init__(self, name: str, modality: str, precision: str = "fp32"):
        super().__init__()
        self.name, self.modality, self.precision = name, modality, "fp32"  # fp32 for the checks
        label = f"{'--wavlm' if modality == 'audio' else '--bert'} {name}"
        with reading(label, f"use a whole {modality} encoder, or download it again"):
            self.preprocessor, self.model = load_pretrained(name, modality, label)
            self.preprocessor.padding_side = "right"  # some configurations say left
            self.preprocessor.truncation_side = "right"  # keep the beginning (§3.2)
            self.requires_grad_(False)
            self.eval()
            config = self.model.config
            self.n_layers, self.dim = config.num_hidden_layers + 1, config.hidden_size
            if modality == "text":
                # Careful: RoBERTa's positions start at padding_idx + 1, so there is less room.
                offset = getattr(self.model.embeddings, "padding_idx", -1) + 1
                room = getattr(config, "max_position_embeddings", 512) - offset
                self.max_tokens = min(512, room, self.preprocessor.model_max_length)
            self.one_by_one = False  # check() runs forward(), which asks for it
            self.one_by_one = self.check()
        self.precision = precision
        # A checksum of the weights and of the preprocessor's rules, for the cache's name.
        rules = getattr(self.preprocessor, "backend_tokenizer", None)
        rules = rules.to_str() if rules else repr(self.preprocessor)
        crc = zlib.crc32(rules.encode())
        for p in self.model.state_dict().values():
            crc = zlib.crc32(p.contiguous().numpy(), crc)
        self.fingerprint = f"{crc:08x}"

    def train(self, mode: bool = True) -> "Upstream":
        # UNSPECIFIED [A12]: dropout inside the upstreams. A cache needs eval mode, and we keep it
        # while fine-tuning. Alternative: train mode then, as in the author's other code. Careful:
        # in train mode, WavLM drops layers and masks its input, too.
        return super().train(False)

    def forward(self, raw: list) -> tuple[Tensor, Tensor]:
        if self.one_by_one and len(raw) > 1:
            parts = [self([x]) for x in raw]  # (states (1, T, L, D), mask (1, T)) of each
            both = zip(*parts)  # all states, all masks
            return tuple(pad_sequence([x[0] for x in xs], batch_first=True) for xs in both)
        # Preprocess and pad. WavLM-Large's preprocessor makes mean 0 and variance 1.
        device = next(self.model.parameters()).device
        if self.modality == "audio":
            inputs = self.preprocessor(
                [clip.numpy() for clip in raw], sampling_rate=16000, padding=True,
                return_attention_mask=True, return_tensors="pt")  # fmt: skip
            frames = frame_count(inputs["attention_mask"].sum(dim=1), self.model.config)  # (B,)
            mask = torch.arange(int(frames.max())) < frames[:, None]  # (B, T)
        else:
            # §3.2: 512 tokens. PAPER-ERROR [E9]: it says "512 words" too. The limit is in tokens.
            # UNSPECIFIED [A19]: tags such as [LAUGHTER]. We leave them in the text.
            limit = {"truncation": True, "max_length": self.max_tokens}
            inputs = self.preprocessor(raw, padding=True, return_tensors="pt", **limit)
            mask = inputs["attention_mask"].bool()  # (B, T)
        cast = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with cast, warnings.catch_warnings():  # torch warns of two kinds of mask: harmless
            warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
            output = self.model(**inputs.to(device), output_hidden_states=True)
        # Take all L states (§2.1). PAPER-ERROR [E4]: "information leakage" there means loss. State
        # 0 is the input of the first Transformer layer. Careful: the last of `hidden_states` may
        # come before the final LayerNorm, so we take last_hidden_state.
        states = (*output.hidden_states[:-1], output.last_hidden_state)
        if len({x.shape for x in states}) > 1:
            raise ValueError("its layers differ in shape (an adapter?)")
        return torch.stack(states, dim=2), mask.to(device)  # (B, T, L, D), (B, T)

    def open(self, what: str) -> dict[str, nn.Parameter]:
        """Make "nothing", the "bottom" (§2.4) or "all" trainable. Return these parameters."""
        # §2.4: the CNN encoder of WavLM, the input embeddings of BERT.
        # UNSPECIFIED [A21]: whether the embeddings' LayerNorm is part of the "input embeddings". We
        # say yes, because it is in the same module. Alternative: the three tables alone.
        bottom = "feature_extractor." if self.modality == "audio" else "embeddings."
        start = {"nothing": (), "bottom": bottom, "all": ""}[what]  # no name starts with ()
        named = self.model.named_parameters()
        return {n: p.requires_grad_(True) for n, p in named if n.startswith(start)}

    @torch.no_grad()
    def check(self) -> bool:
        """Run inputs of unlike length, alone and in one batch. Raises ValueError for a bad model.
        Returns whether padding changes an input's states, because some models normalise over time,
        padding included. Such a model then gets one input at a time."""
        if self.modality == "audio":
            time = torch.arange(9000) / 16000
            inputs = [(2764 * time).sin(), (942 * time[:5000]).sin()]
            if (rate := getattr(self.preprocessor, "sampling_rate", 16000)) != 16000:
                raise ValueError(f"it was trained on {rate} Hz, and this project uses 16,000 Hz")
        else:
            inputs = ["you know that i am so happy and you are not sad or angry", "yes"]
            rows, known = self.model.get_input_embeddings().num_embeddings, len(self.preprocessor)
            ids = self.preprocessor(inputs[0])["input_ids"]
            unknown = ids.count(self.preprocessor.unk_token_id)
            if not (rows / 2 < known <= rows) or 2 * unknown > len(ids):
                has = f"the tokenizer has {known:,} entries, the embedding {rows:,}"
                raise ValueError(f"{has}, and {unknown} of {len(ids)} ordinary tokens are unknown")
            self([inputs[0] * 200])  # the greatest length must run
        depends = False
        for x, states, real in zip(inputs, *self(inputs)):
            alone, expected = self([x])[0][0], (int(real.sum()), self.n_layers, self.dim)
            if alone.shape != expected:
                raise ValueError(f"it gives states of shape {tuple(alone.shape)}, not {expected}")
            if not alone.isfinite().all():
                raise ValueError("its states are not finite")
            depends |= bool((states[: len(alone)] - alone).norm() > 0.01 * alone.norm())  # 1 %
        return depends

def frame_count(samples: Tensor | int, config) -> Tensor | int:
    """Count the frames of a CNN encoder, layer by layer. For WavLM floor((n - 400) / 320) + 1.
    PAPER-ERROR [E3]: "50 x 25 x 1024 for each second" (§2.1). 1 s gives 49 frames, 5 s give 249."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride):
        samples = (samples - kernel) // stride + 1
    return samples

def load_transformers():
    """Import the library when it is needed, because that takes seconds. Make it quiet."""
    # It imports torchaudio, and a torchaudio that does not match torch breaks both.
    with reading("torchaudio", f"install the one that matches torch {torch.__version__}"):
        import torchaudio, transformers  # noqa: E401, F401
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers

def load_pretrained(name: str, modality: str, label: str):
    """Load (preprocessor, model) from a folder, the download cache, or the Hugging Face hub."""
    import huggingface_hub
    hf = load_transformers()
    loader = hf.AutoFeatureExtractor if modality == "audio" else hf.AutoTokenizer
    # A model folder must not run code of its own. Careful: without False, the library asks.
    def load(local: bool):
        how = {"local_files_only": local, "trust_remote_code": False}
        kind = {"output_loading_info": True, "dtype": torch.float32}
        model, info = hf.AutoModel.from_pretrained(name, **kind, **how)
        if not hasattr(model, "feature_extractor" if modality == "audio" else "embeddings"):
            raise ValueError(f"{type(model).__name__} is no {modality} encoder of a known kind")
        return loader.from_pretrained(name, **how), model, info

    try:
        preprocessor, model, info = load(local=True)  # a folder, or downloaded before
    except Exception:
        if os.path.isdir(name):
            raise
        # Ask first, because from_pretrained retries for half a minute without a network.
        advice = "give the model's folder, or use --upstream tiny for a dry run"
        with reading(f"{label}: no such folder, and the Hugging Face hub fails", advice):
            huggingface_hub.HfApi().model_info(name, timeout=5)
        preprocessor, model, info = load(local=False)
    # A weight that fails to load stays random without any error, so we check all that we use.
    missing = [x for x in info["missing_keys"] if "pooler" not in x and "masked_spec" not in x]
    extra = [x for x in info["unexpected_keys"] if re.search(r"layers?\.\d", x)]
    if missing + extra:  # extra: config.json names fewer layers than there are
        raise ValueError(f"no {'weights' if missing else 'layer'} for {(missing + extra)[0]}")
    return preprocessor, model

# The configuration of microsoft/wavlm-large, where it is not the library's default
WAVLM_LARGE = dict(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
    feat_extract_norm="layer", do_stable_layer_norm=True, num_buckets=320)  # fmt: skip

def make_tiny_upstreams(folder: str, texts: list[str]) -> dict[str, str]:
    """Write WavLM and BERT of two layers with random weights, in the hub's file format.
    The vocabulary is made from `texts`. Letters are in it too, so no word is unknown."""
    hf = load_transformers()
    words = set(re.findall(r"\w+|[^\w\s]", " ".join(texts).lower()))
    letters = set("abcdefghijklmnopqrstuvwxyz")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary += sorted(words | letters) + sorted(f"##{x}" for x in letters)
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    cnn = dict(conv_dim=(32, 32), conv_kernel=(40, 16), conv_stride=(20, 16))  # 20 ms a frame
    cnn |= dict(num_conv_pos_embeddings=2, num_conv_pos_embedding_groups=4)
    made = {
        "audio": (hf.Wav2Vec2FeatureExtractor(return_attention_mask=True),
                  hf.WavLMModel(hf.WavLMConfig(**WAVLM_LARGE | cnn | size))),
        "text": (hf.BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}),
                 hf.BertModel(hf.BertConfig(vocab_size=len(vocabulary), **size)))}  # fmt: skip
    for modality, (preprocessor, model) in made.items():
        # Draw the weights here, because each version of the library draws others.
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            # Words count more than positions, so the toy learns faster.
            scale = 1.0 if "word_embeddings" in name else p[0].numel() ** -0.5
            p.data.fill_(0.0 if name.endswith("bias") else 1.0)
            if p.ndim > 1:
                p.data.normal_(0.0, scale, generator=generator)
        for part in (preprocessor, model):
            part.save_pretrained(os.path.join(folder, modality))
    return {modality: os.path.join(folder, modality) for modality in made}

def main() -> None:
    """Print every block of the MMT system at WavLM-Large / BERT-base size."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    hf = load_transformers()
    wavlm_class, bert_class = hf.WavLMModel, hf.BertModel  # imported here, on the CPU
    with torch.device("meta"):  # shapes without memory: nothing is downloaded or computed
        wavlm, bert = wavlm_class(hf.WavLMConfig(**WAVLM_LARGE)), bert_class(hf.BertConfig())
        recognizer = EmotionRecognizer(Config())
        # A batch of two clips of 5 s. Nine texts of 20 tokens are the context of both.
        frames = frame_count(80000, wavlm.config)  # 249
        audio = torch.empty(2, frames, 25, 1024), torch.ones(2, frames, dtype=torch.bool)
        text = torch.empty(9, 20, 13, 768), torch.ones(9, 20, dtype=torch.bool)
        context = torch.arange(9).repeat(2, 1)
    def shapes(xs) -> str:
        xs = xs if isinstance(xs, tuple) else (xs,)
        return " ".join(str(tuple(x.shape)) for x in xs if isinstance(x, Tensor))

    calls = {wavlm: ("(2, 80000)", shapes(audio)), bert: ("(9, 20)", shapes(text))}
    for module in recognizer.modules():
        module.register_forward_hook(lambda m, xs, y: calls.update({m: (shapes(xs), shapes(y))}))
    recognizer(audio, (*text, context))
    rows = [("WavLM-Large", wavlm), ("  CNN encoder: fine-tuned", wavlm.feature_extractor),
            ("BERT-base", bert), ("  input embeddings: fine-tuned", bert.embeddings)]  # fmt: skip
    for name, module in recognizer.named_modules():
        indent, last = "  " * (name.count(".") + bool(name)), name.rpartition(".")[2] or "MMT"
        rows.append((f"{indent}{last} ({type(module).__name__})", module))
    print(f"{'block':44} {'in':36} {'out':32} {'parameters':>11}")
    for title, module in rows:
        given, result = calls.get(module, ("", ""))
        if count := sum(p.numel() for p in module.parameters()):
            print(f"{title:44} {given:36} {result:32} {count:>11,}")
        for name, w in module.named_parameters(recurse=False):
            if name in ("w_q", "w_k", "w_v"):  # of Eq. (1)
                print(f"{'':8}{name.upper():73} {shapes(w):32} {w.numel():>11,}")

if __name__ == "__main__":
    main()
