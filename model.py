"""The model of "Context-aware Multimodal Fusion for Emotion Recognition" (Li et al., 2022).

    python model.py           every block of the MMT system, its shapes and parameters, at full size
    python model.py --trace   one utterance through every block, in numbers to check by hand

Read this file with §2 of the paper and its Figures 1-3 open. It goes from the equations to the
blocks (Fig. 2), to the fusions (Fig. 3), to the whole (Fig. 1), to the pre-trained upstreams.

Symbol      meaning                                                      in the paper
------      ----------------------------------------------------------   ---------------------
B           utterances in a batch                                        32 (§3.2)
T           time steps: T_A frames of 20 ms, T_T word pieces; of a       T_s, T_t (§2.2)
            path of attention: T_s of its source, T_t of its target
L           states of an upstream: the input of its first Transformer    25, 13 (§2.1; "H+1"
            layer, then the output of each layer                         in Fig. 2)
D           width of an upstream                                         1024, 768 (§2.1)
d           width after the projector, here `dim`                        16 (§2.1)
C           utterances in the context: 4 before, the target, 4 after     9 (§3.2)
X_A, X_T    acoustic and textual features, (B, T_A, d) and (B, T_T, d)   Fig. 2a, 2b
x_t, x_s    a path's target, which asks the queries, and its source,     X_t, X_s (§2.2),
            which gives keys and values                                  s -> t in Eq. (1)

Masks are bool, True = real, False = padding. The data flow of the main system (MMT), one batch:

  waveforms -- WavLM --> (B, T_A, 25, 1024) -- S&E, project --> X_A (B, T_A, 16)
  9 texts each -- BERT --> (B, 9, T_T, 13, 768) -- S&E, project --> (B, 9, T_T, 16)
                                                -- context conv --> X_T (B, T_T, 16)

  X_T asks, X_A answers -- CMT A->T --> (B, T_T, 16) -- mean over time --> (B, 16) --+
  X_A asks, X_T answers -- CMT T->A --> (B, T_A, 16) -- mean over time --> (B, 16) --+
                                                                                     |
                                            logits (B, 4) <-- MLP -- (B, 32) <-------+
"""

import math
import os
import sys
import warnings
import zlib
from dataclasses import dataclass
from functools import partial

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

# Fig. 3 and Table 1 in one table. A system is a list of paths (target, source), as Eq. (1) takes
# its arguments, whose pooled outputs are concatenated:  source None: the features as they are;
# source = target: a vanilla Transformer;  source != target: CMT (source -> target), so "cmt-a2t" is
# ("text", "audio"). Then "a ⊕ b" of Table 1 is literally a + b. Of the two numbers of an entry the
# odd one is the frozen system, the even one the fine-tuned.
FUSIONS = {
    "audio-fc": [("audio", None)],  # Sys. 1, 2
    "audio-te": [("audio", "audio")],  # Sys. 3, 4
    "text-fc": [("text", None)],  # Sys. 5, 6
    "text-te": [("text", "text")],  # Sys. 7, 8
    "cmt-a2t": [("text", "audio")],  # Sys. 9, 10: text asks, audio answers
    "cmt-t2a": [("audio", "text")],  # Sys. 11, 12: Fig. 3c
}
FUSIONS["ef"] = FUSIONS["audio-fc"] + FUSIONS["text-fc"]  # Sys. 13, 14: Fig. 3a
FUSIONS["lf"] = FUSIONS["audio-te"] + FUSIONS["text-te"]  # Sys. 15, 16: Fig. 3b
FUSIONS["mmt"] = FUSIONS["cmt-a2t"] + FUSIONS["cmt-t2a"]  # Sys. 17, 18: Fig. 3d


@dataclass
class Config:
    """What the trainable part is built from; by default the paper's main system at full size.

    Raises ValueError for a fusion, condense or text_mask that there is not.
    """

    fusion: str = "mmt"  # a key of FUSIONS
    audio_layers: int = 25  # L of WavLM-Large
    audio_dim: int = 1024  # D of WavLM-Large
    text_layers: int = 13  # L of BERT-base
    text_dim: int = 768  # D of BERT-base
    dim: int = 16  # d, §2.1
    n_classes: int = 4  # §3.1
    n_context: int = 9  # C, §3.2; 1 = the target alone
    dropout: float = 0.5  # "between every two modules", §3.2
    condense: str = "sum"  # [A1] "sum" or "concat"
    text_mask: str = "union"  # [A5] "union" or "target"
    cma_residual: bool = False  # [A7]

    def __post_init__(self):
        for name, known in (
            ("fusion", FUSIONS),
            ("condense", ("sum", "concat")),
            ("text_mask", ("union", "target")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: take one of {', '.join(known)}")

    @classmethod
    def of(cls, settings: dict) -> "Config":
        """The Config in a run's settings (config.json), which hold more than that."""
        return cls(**{name: settings[name] for name in cls.__dataclass_fields__})

    @property
    def modalities(self) -> list[str]:
        """The modalities that the fusion uses, in the order audio, text."""
        return [m for m in ("audio", "text") if any(m in path for path in FUSIONS[self.fusion])]


# ------------------------------------------------------------------------------------------------
# Equations
# ------------------------------------------------------------------------------------------------


# EXERCISE 1 (10 min): delete the body, write it again; pytest -m ex1
def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average over the real steps: the "average time pooling" of §2.2.

    x (B, T, D) of any width D, mask (B, T) -> (B, D): with x [[1], [3], [9]] and mask
    [True, True, False] it is [2]. Where no step is real (an utterance that a
    dialogue's edge cut off) the result is zero, never 0/0 = NaN. What stands in the padding may be
    anything, NaN included; a NaN in a real step comes out, for training stops on it.
    """
    steps = mask.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
    return x.masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=1) / steps  # (B, D)


# EXERCISE 2 (15 min): delete the body, write it again; pytest -m ex2
def cross_modal_attention(
    x_t: Tensor, x_s: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, mask_s: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. (1): what the target's steps take from the source's.

    x_t (B, T_t, d_t), x_s (B, T_s, d_s), w_q (d_t, d_k), w_k (d_s, d_k), w_v (d_s, d_v),
    mask_s (B, T_s) or None -> (out (B, T_t, d_v), weights (B, T_t, T_s)). Rows of the weights sum
    to 1 over the real steps of the source; with no real step they, and the output, are zero. The
    source's padding may hold any number, but a number: 0 * NaN is NaN.
    """
    # Eq. (1), §2.2: softmax(Q_t K_s^T / sqrt(d_k)) V_s
    q, k, v = x_t @ w_q, x_s @ w_k, x_s @ w_v  # (B, T_t, d_k), (B, T_s, d_k), (B, T_s, d_v)
    scores = q @ k.transpose(1, 2) / math.sqrt(w_k.shape[1])  # (B, T_t, T_s)
    if mask_s is None:
        weights = scores.softmax(dim=-1)
    else:
        # The lowest finite number, not -inf: the softmax of nothing but -inf is NaN. masked_fill
        # would hide that, but torch's anomaly detection would stop there.
        padded = ~mask_s.unsqueeze(1)  # (B, 1, T_s)
        weights = scores.masked_fill(padded, torch.finfo(scores.dtype).min).softmax(dim=-1)
        weights = weights.masked_fill(padded, 0.0)
    return weights @ v, weights


# ------------------------------------------------------------------------------------------------
# Blocks of the feature extractor (Fig. 2)
# ------------------------------------------------------------------------------------------------


class SqueezeExcitation(nn.Module):
    """Squeeze-and-Excitation over the layers of an upstream: §2.1, Fig. 2, reference [27].

    x (B, T, L, D), mask (B, T) -> (B, T, L, D), each layer scaled by its gate in (0, 1):

        z = mean of x over features and real steps        squeeze, (B, L)
        gates = sigmoid(W_2 ReLU(W_1 z + b_1) + b_2)      excitation, (B, L)
    """

    def __init__(self, n_layers: int):
        super().__init__()
        # UNSPECIFIED [A2]: "layer-wise", "the reduction ratio is simply the number of layers". We
        # take the layers for S&E's channels, so the bottleneck is L / L = 1 unit. That one ReLU
        # can be born dead; then the gates are sigmoid(expand.bias), alike for every utterance. We
        # start it alive, with reduce.bias 1, and train.log_epoch warns where it dies.
        self.reduce = nn.Linear(n_layers, 1)
        self.expand = nn.Linear(1, n_layers)
        nn.init.ones_(self.reduce.bias)
        self.fired = False  # whether the ReLU was above 0 since train.log_epoch looked

    # EXERCISE 3 (15 min): delete the body, write it again; pytest -m ex3
    def gates(self, x: Tensor, mask: Tensor) -> Tensor:
        """One gate for each layer of each utterance: (B, T, L, D), (B, T) -> (B, L).

        Sets `fired` where the ReLU is above 0 for any of them, and never takes it back.
        """
        # Squeeze. The mask is the "padding mask" arrow of Fig. 2: an upstream's padded rows are not
        # zero, and would count.
        z = masked_mean(x.mean(dim=-1), mask)  # (B, L)

        # Excitation: down to the bottleneck and back.
        hidden = torch.relu(self.reduce(z))  # (B, 1)
        self.fired = self.fired | (hidden > 0).any()
        return torch.sigmoid(self.expand(hidden))  # (B, L)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        gates = self.gates(x, mask)  # (B, L)
        return x * gates[:, None, :, None]  # (B, T, L, D)


class Projector(nn.Module):
    """The layers of a step condensed to one vector of width d: §2.1, "Project & Norm" in Fig. 2.

    (B, T, L, D) -> (B, T, out_dim). `in_dim` is D, or L * D where `condense` is "concat".
    """

    def __init__(self, in_dim: int, out_dim: int = 16, condense: str = "sum"):
        super().__init__()
        self.condense = condense
        # UNSPECIFIED [A3]: "an MLP with Layer-Normalization" (§2.1) but "a Fully-Connected (FC)
        # Layer and Layer Normalization" (§1). We take §1: one linear layer.
        self.linear = nn.Linear(in_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        # UNSPECIFIED [A1]: the paper never says how L layers become one vector. We sum them, as
        # every toolkit does that weights layers; alternative: --condense concat, L times as wide.
        x = x.sum(dim=2) if self.condense == "sum" else x.flatten(2)  # (B, T, D) or (B, T, L * D)
        return self.norm(self.linear(x))  # (B, T, d)


class FeatureExtractor(nn.Module):
    """Fig. 2a without the upstream: states (B, T, L, D), mask (B, T) -> (X (B, T, d), mask).

    The mask is handed through, because the extractor of Fig. 2b answers with another one.
    """

    def __init__(self, n_layers: int, in_dim: int, config: Config):
        super().__init__()
        self.se = SqueezeExcitation(n_layers)
        width = in_dim if config.condense == "sum" else n_layers * in_dim
        self.projector = Projector(width, config.dim, config.condense)

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        states = states.float()  # the cache stores 16 bits [D1], the weights have 32
        return self.projector(self.se(states, mask)), mask


class ContextConv(nn.Module):
    """The Conv2D of Fig. 2b: C feature maps of C utterances become one map of the target.

    x (B, C, T, d), mask (B, C, T) -> (X_T (B, T, d), mask (B, T)). The target is utterance C // 2.
    """

    def __init__(self, n_context: int = 9, text_mask: str = "union"):
        super().__init__()
        # UNSPECIFIED [A4]: "a convolutional layer with the stride of 1 and kernel size of 3"
        # (§2.1). We take the utterances for the input channels and convolve over (token,
        # feature), so that X_T is still a sequence: 9 * 3 * 3 + 1 = 82 parameters. Token t of one
        # utterance thus meets tokens t - 1 to t + 1 of the others: they share a position, no more.
        # Neighbouring features mix as well, though their order means nothing before training: the
        # price of taking "Conv2D" (Fig. 2b) at its word.
        self.conv = nn.Conv2d(n_context, 1, kernel_size=3, stride=1, padding=1)
        self.text_mask = text_mask

    # EXERCISE 4 (15 min): delete the body, write it again; pytest -m ex4
    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        C = x.shape[1]

        # UNSPECIFIED [A6]: a window that reaches over a dialogue's edge. Who is missing there comes
        # with a mask that is False throughout, and so is a map of zeros after this line. Padded
        # tokens are zeroed too: the result must not depend on how far the batch was padded.
        x = x.masked_fill(~mask.unsqueeze(-1), 0.0)  # (B, C, T, d)

        x = self.conv(x).squeeze(1)  # (B, T, d)

        # UNSPECIFIED [A5]: which cells of X_T are real. We take every position at which any of the
        # C utterances has a token; alternative: --text-mask target, the target's own tokens.
        mask = mask.any(dim=1) if self.text_mask == "union" else mask[:, C // 2]  # (B, T)
        return x, mask


class TextFeatureExtractor(nn.Module):
    """Fig. 2b without BERT: the layer states of C utterances -> (X_T (B, T, d), mask (B, T)).

    Either the window is spelled out, states (B, C, T, L, D) and mask (B, C, T), or neighbours share
    their states: states (U, T, L, D) and mask (U, T) of the U distinct utterances of a batch, and
    context (B, C), which names rows of `states`, -1 where there is no utterance. The second does
    each utterance's work once (windows overlap), and is what training uses.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.utterance = FeatureExtractor(config.text_layers, config.text_dim, config)
        self.context = ContextConv(config.n_context, config.text_mask)

    @property
    def se(self) -> SqueezeExcitation:
        """The S&E block, under the name that it has in Fig. 2a's: extractor[m].se for both."""
        return self.utterance.se

    def forward(
        self, states: Tensor, mask: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if context is None:  # spelled out: utterance c of window b is row b * C + c, none is shared
            B, C, _ = mask.shape
            context = torch.arange(B * C, device=mask.device).view(B, C)
            states, mask = states.flatten(0, 1), mask.flatten(0, 1)  # (B * C, T, L, D), (B * C, T)
        x, mask = self.utterance(states, mask)  # (U, T, d), (U, T)
        # One empty utterance at the end: the row that index -1 means, in Python and here [A6].
        x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
        mask = torch.cat([mask, mask.new_zeros(1, mask.shape[1])])
        return self.context(x[context], mask[context])  # of (B, C, T, d), (B, C, T)


# ------------------------------------------------------------------------------------------------
# Fusion (Fig. 3) and the whole (Fig. 1)
# ------------------------------------------------------------------------------------------------


class TransformerBlock(nn.Module):
    """One Transformer block around Eq. (1): with itself as source the vanilla encoder, else CMT.

    x_t (B, T_t, d), x_s (B, T_s, d), mask_s (B, T_s) or None -> (B, T_t, d). Twice: a sublayer,
    dropout, add, norm; `residual` switches the first add alone. Padded steps of the target get
    values too: mask them when pooling.
    """

    def __init__(self, dim: int = 16, dropout: float = 0.1, residual: bool = True):
        super().__init__()
        # UNSPECIFIED [A8]: heads, depth, width, norm, positions. Eq. (1) has one head and no output
        # matrix; "the same backbone as the vanilla Transformer" (§2.2) gives post-norm, a
        # feed-forward of 4 d with ReLU, dropout 0.1. One block; no positions are added, because
        # both upstreams have put theirs into the states.
        self.w_q = nn.Parameter(torch.empty(dim, dim))
        self.w_k = nn.Parameter(torch.empty(dim, dim))
        self.w_v = nn.Parameter(torch.empty(dim, dim))
        for w in (self.w_q, self.w_k, self.w_v):
            nn.init.xavier_uniform_(w)
        self.norm1 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim)
        )
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        # UNSPECIFIED [A7]: the vanilla Transformer adds the queries to what attention brings. With
        # them CMT(A->T) would carry the text itself, but in Table 1 it is nearer to audio than to
        # text (Sys. 9 and 10). So we add them in the encoder and not across modalities;
        # alternative: --cma-residual.
        self.residual = residual

    def attend(self, x_t: Tensor, x_s: Tensor, mask_s: Tensor | None = None):
        """Eq. (1) with this block's matrices -> (out (B, T_t, d), weights (B, T_t, T_s))."""
        return cross_modal_attention(x_t, x_s, self.w_q, self.w_k, self.w_v, mask_s)

    # EXERCISE 5 (20 min): delete the body, write it again; pytest -m ex5
    def forward(self, x_t: Tensor, x_s: Tensor, mask_s: Tensor | None = None) -> Tensor:
        x, _ = self.attend(x_t, x_s, mask_s)  # (B, T_t, d)
        x = x_t + self.dropout(x) if self.residual else self.dropout(x)  # [A7]
        x = self.norm1(x)
        x = x + self.dropout(self.feed_forward(x))
        return self.norm2(x)


class Fusion(nn.Module):
    """Fig. 3: the paths of FUSIONS, each pooled over time (§2.2), concatenated.

    x and mask are dicts by modality, (B, T_m, d) and (B, T_m) -> (B, d * number of paths).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.paths = FUSIONS[config.fusion]
        # Inside the blocks dropout stays at the vanilla 0.1 [A8]; 0.5 is between modules [A16].
        self.blocks = nn.ModuleDict()
        for target, source in self.paths:
            if source is not None:
                residual = source == target or config.cma_residual  # [A7]
                block = TransformerBlock(config.dim, residual=residual)
                self.blocks[f"{source}-to-{target}"] = block

    def forward(self, x: dict[str, Tensor], mask: dict[str, Tensor]) -> Tensor:
        pooled = []
        for target, source in self.paths:
            h = x[target]  # (B, T_t, d)
            if source is not None:
                h = self.blocks[f"{source}-to-{target}"](h, x[source], mask[source])  # (B, T_t, d)
            pooled.append(masked_mean(h, mask[target]))  # (B, d)
        return torch.cat(pooled, dim=-1)


class EmotionRecognizer(nn.Module):
    """Fig. 1: all that is trained from scratch. Layer states of a batch -> logits (B, 4).

    audio  (states (B, T, L, D), mask (B, T)), or None for the text systems
    text   (states, mask) or (states, mask, context) as in TextFeatureExtractor, or None
    The order of the logits is that of Fig. 4: neu, hap, ang, sad (data.CLASSES). Raises ValueError
    where a modality that the fusion needs is missing.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.extractor = nn.ModuleDict()
        if "audio" in config.modalities:
            self.extractor["audio"] = FeatureExtractor(
                config.audio_layers, config.audio_dim, config
            )
        if "text" in config.modalities:
            self.extractor["text"] = TextFeatureExtractor(config)
        self.fusion = Fusion(config)
        # UNSPECIFIED [A16]: what counts as a module in "a dropout layer (0.5) between every two
        # modules". We take the boxes of Fig. 1: extractor -> (fusion ->) classifier. A unimodal
        # system has no fusion box, hence one dropout; its Transformer or pooling is "classifier".
        self.dropout = nn.Dropout(config.dropout)
        self.fusion_dropout = nn.Dropout(config.dropout if len(config.modalities) == 2 else 0.0)
        # UNSPECIFIED [A15]: the width of the "simple MLP comprised of FC layers" (§2.3): one hidden
        # layer of d. (Uncased BERT, no class weights, no epoch cap, no clipping: see train.py.)
        width = config.dim * len(self.fusion.paths)
        self.classifier = nn.Sequential(
            nn.Linear(width, config.dim), nn.ReLU(), nn.Linear(config.dim, config.n_classes)
        )

    def features(self, audio: tuple | None = None, text: tuple | None = None) -> tuple[dict, dict]:
        """X_A and X_T of Fig. 2: by modality x (B, T, d) and mask (B, T)."""
        x, mask = {}, {}
        for modality, given in (("audio", audio), ("text", text)):
            if modality in self.extractor:
                if given is None:
                    raise ValueError(f"fusion {self.config.fusion!r} needs {modality} states")
                x[modality], mask[modality] = self.extractor[modality](*given)
        return x, mask

    def forward(self, audio: tuple | None = None, text: tuple | None = None) -> Tensor:
        x, mask = self.features(audio, text)
        x = {modality: self.dropout(features) for modality, features in x.items()}  # (B, T, d)
        fused = self.fusion_dropout(self.fusion(x, mask))  # (B, d * paths)
        return self.classifier(fused)


# ------------------------------------------------------------------------------------------------
# Upstreams: WavLM and BERT (§2.1), and what fine-tuning opens in them (§2.4)
# ------------------------------------------------------------------------------------------------


class UpstreamError(RuntimeError):
    """A pre-trained model cannot be had, or is not what it should be; says what to do."""


class Upstream(nn.Module):
    """A pre-trained encoder with its preprocessor: raw inputs -> all of its layer states.

    name        a Hugging Face name or a local folder: any WavLM, HuBERT or wav2vec 2.0 where
                modality is "audio", any BERT or RoBERTa where it is "text"
    precision   "fp32", or "bf16": matrix products, and most of what is kept of them, in 16 bits
    checkpoint  keep only each layer's input for the backward pass, and compute the layer again
    call        list of B waveforms (n,) at 16 kHz, or of B strings
                -> (states (B, T, L, D), mask (B, T))
    """

    def __init__(
        self, name: str, modality: str, precision: str = "fp32", checkpoint: bool = False
    ):
        super().__init__()
        self.name, self.modality, self.precision = name, modality, precision
        self.preprocessor, self.model = _load(name, modality)
        if modality == "text":  # a smaller model may have room for fewer than 512
            room = self.model.config.max_position_embeddings, self.preprocessor.model_max_length
            self.max_tokens = min(512, *room)
        self.n_layers = self.model.config.num_hidden_layers + 1
        self.dim = self.model.config.hidden_size
        self.fingerprint = _fingerprint(self.preprocessor, self.model)
        self.requires_grad_(False)
        self.eval()
        if checkpoint:  # by hand: transformers' own switch does nothing in eval mode [A12]
            encoder = self.model.encoder
            for layer in encoder.layers if modality == "audio" else encoder.layer:
                layer.forward = partial(torch.utils.checkpoint.checkpoint, layer.forward,
                                        use_reentrant=False)  # fmt: skip

    def train(self, mode: bool = True) -> "Upstream":
        # UNSPECIFIED [A12]: dropout inside the upstreams. We keep them in eval mode, also while
        # they are fine-tuned: in train mode WavLM drops whole layers and masks its input.
        return super().train(False)

    def finetunable(self) -> nn.Module:
        """What fine-tuning opens, §2.4: the CNN encoder of WavLM, the input embeddings of BERT.

        §2.4 and transformers call the CNN a "feature extractor": not to be taken for Fig. 2's.
        """
        return self.model.feature_extractor if self.modality == "audio" else self.model.embeddings

    def forward(self, raw: list) -> tuple[Tensor, Tensor]:
        if len(raw) > 1 and getattr(self.model.config, "feat_extract_norm", None) == "group":
            return self._one_by_one(raw)  # only *base* audio models: not the paper's
        device = next(self.model.parameters()).device
        if self.modality == "audio":
            # Zero mean and unit variance where the upstream was trained so (wavlm-large was).
            inputs = self.preprocessor(
                [clip.numpy() for clip in raw], sampling_rate=16000, padding=True,
                return_attention_mask=True, return_tensors="pt",
            )  # fmt: skip
            frames = self.frames(inputs["attention_mask"].sum(dim=1))  # (B,)
            mask = torch.arange(int(frames.max())) < frames[:, None]  # (B, T)
        else:
            # §3.2: 512 tokens. PAPER-ERROR [E9]: it says "512 words" too; the limit is in tokens.
            inputs = self.preprocessor(
                raw, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            )
            mask = inputs["attention_mask"].bool()  # (B, T)
        cast = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with cast, warnings.catch_warnings():  # torch warns of two kinds of mask in WavLM: harmless
            warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
            output = self.model(**inputs.to(device), output_hidden_states=True)
        # All L states (§2.1; PAPER-ERROR [E4]: to avoid "leakage", read: loss, of information).
        # State 0 is what enters the first Transformer layer: BERT's embeddings, or WavLM's CNN
        # output, 512 wide, projected to D: the one "output of the feature encoder" that is D wide.
        # The last of `hidden_states` may come before the final LayerNorm: we take the one after it.
        states = (*output.hidden_states[:-1], output.last_hidden_state)
        return torch.stack(states, dim=2), mask.to(device)  # (B, T, L, D), (B, T)

    def _one_by_one(self, raw: list) -> tuple[Tensor, Tensor]:
        """What forward answers, a clip at a time: for upstreams that normalise over time, padding
        included, there is no other way in which a clip's states do not depend on its batch."""
        states, masks = zip(*(self([r]) for r in raw))
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
        return pad([s[0] for s in states]), pad([m[0] for m in masks])

    def steps(self, raw: list) -> Tensor:
        """How many steps each input will have, as the cache must know before it asks: (N,)."""
        if self.modality == "audio":  # an utterance without a clip: 0, not -1
            return self.frames(torch.tensor([len(x) for x in raw])).clamp(min=0)
        ids = self.preprocessor(raw, truncation=True, max_length=self.max_tokens)["input_ids"]
        return torch.tensor([len(x) for x in ids])

    def frames(self, samples: Tensor | int) -> Tensor | int:
        """Frames that the CNN encoder makes of so many samples: 249 for 5 s = 80,000 samples.

        PAPER-ERROR [E3]: "50 x 25 x 1024 for each second" (§2.1) is nominal: 1 s gives 49 frames.
        """
        return frame_count(samples, self.model.config)


def frame_count(samples: Tensor | int, config) -> Tensor | int:
    """floor((n - kernel) / stride) + 1, layer by layer; for WavLM floor((n - 400) / 320) + 1."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride):
        samples = (samples - kernel) // stride + 1
    return samples


def _transformers():
    """The library: imported only when needed (it takes seconds), and made quiet."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def _load(name: str, modality: str):
    """(preprocessor, model) through `from_pretrained`, or UpstreamError in one sentence."""
    hf = _transformers()
    flag = "--wavlm" if modality == "audio" else "--bert"
    loader = hf.AutoFeatureExtractor if modality == "audio" else hf.AutoTokenizer

    def load(local: bool):
        (hf.logging.disable_progress_bar if local else hf.logging.enable_progress_bar)()
        # Never trust_remote_code (the default): a model folder must not run code of its own.
        return loader.from_pretrained(name, local_files_only=local), hf.AutoModel.from_pretrained(
            name, local_files_only=local, output_loading_info=True, dtype=torch.float32
        )

    try:
        try:
            preprocessor, (model, info) = load(local=True)  # a folder, or downloaded before
        except Exception:
            if os.path.isdir(name):
                raise
            _ask_hub(name, flag)
            preprocessor, (model, info) = load(local=False)
    except UpstreamError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UpstreamError(
            f"{flag} {name} cannot be loaded (is it a model for {modality}?): {reason}"
        ) from None
    # The hub's old checkpoints name WavLM's positional convolution weight_g / weight_v: if that, or
    # anything else that is used, failed to load, it would be random, and nothing would show it.
    unused = ("pooler", "masked_spec_embed")  # no pooled output is read, no input masked [A12]
    missing = [key for key in info["missing_keys"] if not any(u in key for u in unused)]
    part = "feature_extractor" if modality == "audio" else "embeddings"
    if missing or not hasattr(model, part):
        raise UpstreamError(
            f"{flag} {name} is not a whole {modality} encoder: "
            + (f"no weights for {', '.join(missing[:3])}" if missing else f"it has no {part}")
        )
    return preprocessor, model


def _ask_hub(name: str, flag: str) -> None:
    """UpstreamError where the hub does not give `name`: transformers would retry for half a minute,
    and raise a page."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=5)
    except Exception as error:
        raise UpstreamError(
            f"{flag} {name}: no such folder here, not in the download cache, and the Hugging Face "
            f"hub does not give it ({type(error).__name__}); on a machine without a network, copy "
            f"the model's folder there and pass its path, or take --upstream tiny for a dry run"
        ) from None


def _fingerprint(preprocessor, model: nn.Module) -> str:
    """Of the weights and of the preprocessor's rules: what cached layer states depend on."""
    if hasattr(preprocessor, "to_json_string"):  # audio
        rules = preprocessor.to_json_string()
    elif getattr(preprocessor, "backend_tokenizer", None):
        rules = preprocessor.backend_tokenizer.to_str()
    else:  # a tokenizer written in Python
        rules = str(sorted(preprocessor.get_vocab().items()))
    crc = zlib.crc32(rules.encode())
    for p in model.state_dict().values():
        crc = zlib.crc32(p.contiguous().numpy().tobytes(), crc)
    return f"{crc:08x}"


def make_tiny_upstreams(folder: str, texts: list[str]) -> dict[str, str]:
    """Write WavLM and BERT of a few layers with random weights, as the hub would have them.

    They come back through the same `from_pretrained` as the real ones: a dry run, no science. The
    vocabulary is made from `texts`. It knows no label, and its embeddings are random, so it may see
    the test session's words. Returns {"audio": folder, "text": folder}.
    """
    hf = _transformers()
    hf.logging.disable_progress_bar()
    paths = {m: os.path.join(folder, m) for m in ("audio", "text")}
    pieces = hf.BertTokenizer().backend_tokenizer  # BERT's own rules: lower case, split at marks
    words = {
        word
        for text in texts
        for word, _ in pieces.pre_tokenizer.pre_tokenize_str(pieces.normalizer.normalize_str(text))
    }
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        audio = hf.WavLMModel(wavlm_config(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
            conv_dim=(8,) * 7, num_conv_pos_embeddings=2, num_conv_pos_embedding_groups=4,
        ))  # fmt: skip
        text = hf.BertModel(hf.BertConfig(
            vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=128,
        ))  # fmt: skip
    audio.save_pretrained(paths["audio"])
    hf.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(paths["audio"])
    text.save_pretrained(paths["text"])
    tokenizer = hf.BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(paths["text"])
    return paths


def wavlm_config(**changes):
    """The configuration of microsoft/wavlm-large, with changes."""
    large = dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        feat_extract_norm="layer", do_stable_layer_norm=True, num_buckets=320,
    )  # fmt: skip
    return _transformers().WavLMConfig(**{**large, **changes})


# ------------------------------------------------------------------------------------------------


def main() -> None:
    """Print every block of the MMT system at WavLM-Large / BERT-base size, nothing downloaded."""
    hf = _transformers()

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):  # shapes without memory
        wavlm, bert = hf.WavLMModel(wavlm_config()), hf.BertModel(hf.BertConfig())
    frames = frame_count(80000, wavlm.config)
    config = Config(
        "mmt", wavlm.config.num_hidden_layers + 1, wavlm.config.hidden_size,
        bert.config.num_hidden_layers + 1, bert.config.hidden_size,
    )  # fmt: skip
    acoustic = (2, frames, config.audio_layers, config.audio_dim)  # two clips of 5 s
    textual = (2, config.n_context, 20, config.text_layers, config.text_dim)  # 20 tokens each
    width = "{:36} {:42} {:22} {:>12}".format
    print(width("block", "in", "out", "parameters"))
    for name, module, source, result in (
        ("WavLM-Large (frozen)", wavlm, (2, 80000), acoustic),
        ("  CNN encoder: fine-tuned", wavlm.feature_extractor, (2, 80000), (2, 512, frames)),
        ("BERT-base (frozen)", bert, textual[:3], textual),
        ("  input embeddings: fine-tuned", bert.embeddings, textual[:3], (*textual[:3], 768)),
    ):
        print(width(name, str(source), str(result), f"{count(module):,}"))

    def shapes(x) -> str:
        if isinstance(x, Tensor):
            return str(tuple(x.shape))
        if isinstance(x, dict):
            x = x.values()
        return " ".join(shapes(item) for item in x if item is not None)

    recognizer = EmotionRecognizer(config).eval()
    names = {m: n for n, m in recognizer.named_modules() if n and count(m)}
    rows: dict = {}  # hooks fire from the inside out, and are printed from the outside in

    def report(module: nn.Module, args: tuple, out) -> None:
        name = names[module]
        depth = name.removeprefix("extractor.").replace("blocks.", "").count(".")
        title = "  " * depth + f"{name.rpartition('.')[2]} ({type(module).__name__})"
        rows[module] = width(title, shapes(args), shapes(out), f"{count(module):,}")

    for module in names:
        module.register_forward_hook(report)
    audio = torch.randn(acoustic), torch.ones(acoustic[:2], dtype=torch.bool)
    text = torch.randn(textual), torch.ones(textual[:3], dtype=torch.bool)
    logits = recognizer(audio, text)
    for module in names:
        if module in rows:
            print(rows[module])
    print(width("EmotionRecognizer (mmt)", "", shapes(logits), f"{count(recognizer):,}"))


def trace() -> None:
    """One utterance through every block of MMT, in numbers that pencil and calculator can follow.

    d = 3, two layers of width 2, one utterance of context on either side. Weights are set by hand,
    to units and simple fractions; the blocks are those above.
    """

    def numbers(x: Tensor) -> str:
        """A vector as (a b c), a matrix as its rows side by side, more as [matrix] [matrix]."""
        if x.ndim == 1:
            bools = x.dtype == torch.bool
            return f"({' '.join(str(v) if bools else f'{v:.4g}' for v in x.tolist())})"
        return " ".join(f"[{numbers(row)}]" if row.ndim > 1 else numbers(row) for row in x)

    def show(place: str, equation: str, value: Tensor) -> None:
        value = value if value.ndim > 1 else value[None]
        for row in value.detach():  # a line for each step, utterance, or layer's gate
            row = row if row.dtype == torch.bool else row.round(decimals=3) + 0.0
            print(f"{place:9} {equation:50} {numbers(row)}")
            place = equation = ""

    def fill(parameter: Tensor, values) -> None:
        parameter.data = torch.tensor(values, dtype=torch.float32).expand(parameter.shape).clone()

    config = Config("mmt", 2, 2, 2, 2, dim=3, n_context=3)
    net = EmotionRecognizer(config).eval()
    unit = torch.eye(3).tolist()
    for extractor in (net.extractor["audio"], net.extractor["text"].utterance):
        fill(extractor.se.reduce.weight, [[0.25, 0.25]]), fill(extractor.se.reduce.bias, 0.0)
        fill(extractor.se.expand.weight, [[1.0], [-1.0]]), fill(extractor.se.expand.bias, 0.0)
        fill(extractor.projector.linear.weight, [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        fill(extractor.projector.linear.bias, 0.0)
    conv = net.extractor["text"].context.conv
    fill(conv.weight, 0.0), fill(conv.bias, 0.0)
    conv.weight.data[0, :, 1, 1] = torch.tensor([0.5, 1.0, 0.5])  # the middle of each 3 x 3 kernel
    for block in net.fusion.blocks.values():
        for w in (block.w_q, block.w_k, block.w_v):
            fill(w, unit)
        for linear in (block.feed_forward[0], block.feed_forward[2]):
            fill(linear.weight, 0.0), fill(linear.bias, 0.0)
            linear.weight.data[2, 2] = 1.0  # one of the 12 hidden units: FFN(x) = (0, 0, ReLU(x3))
    first, last = net.classifier[0], net.classifier[2]
    fill(first.weight, [[1.0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 1]])
    fill(last.weight, [[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]])
    fill(first.bias, 0.0), fill(last.bias, 0.0)

    # Two frames and a padded one; three texts of two tokens, the second of the last one padded.
    states_a = torch.tensor([[[[1.0, 3], [0, 2]], [[3, 1], [2, 4]], [[9, 9], [9, 9]]]])
    states_t = torch.tensor([[
        [[[1.0, 1], [0, 2]], [[2, 0], [1, 1]]], [[[0, 1], [1, 2]], [[4, 0], [2, 2]]],
        [[[2, 2], [0, 0]], [[7, 7], [7, 7]]],
    ]])  # fmt: skip
    mask_a = torch.tensor([[True, True, False]])
    mask_t = torch.tensor([[[True, True], [True, True], [True, False]]])
    show("Fig. 2a", "WavLM's states, (T, L, D); frame 3 is padding,", states_a[0])
    print(" " * 10 + "computed as the others are, and masked wherever frames meet")
    audio = net.extractor["audio"]
    z = masked_mean(states_a.mean(-1), mask_a)
    show("S&E", "squeeze z_l: mean over real frames and features", z)
    show("", "h = ReLU((z_1 + z_2) / 4)", torch.relu(audio.se.reduce(z)))
    show("", "gates = sigmoid(h), sigmoid(-h)", audio.se.gates(states_a, mask_a))
    summed = audio.se(states_a, mask_a).sum(2)
    show("Project", "sum over layers: gate_1 x_1 + gate_2 x_2", summed[0])
    show("", "W s = (s1, s2, s1 + s2)", audio.projector.linear(summed)[0])
    features, mask = net.features((states_a, mask_a), (states_t, mask_t))
    show("& Norm", "X_A = (W s - mean) / sd (divide by 3, not 2)", features["audio"][0])
    show("Fig. 2b", "BERT's states, (C, T, L, D); one token is padding", states_t[0])
    each, _ = net.extractor["text"].utterance(states_t[0], mask_t[0])
    gates = net.extractor["text"].se.gates(states_t[0], mask_t[0])
    show("", "gates of the three texts, as above", gates)
    show("", "each through S&E, Project & Norm; padding: 0", each * mask_t[0, ..., None])
    show("Conv2D", "X_T = before / 2 + target + after / 2", features["text"][0])
    show("", "real: where any of the three has a token [A5]", mask["text"][0])
    for (target, source), at in zip(net.fusion.paths, ("CMT A->T", "CMT T->A")):
        block = net.fusion.blocks[f"{source}-to-{target}"]
        q, k = features[target], features[source]
        out, weights = block.attend(q, k, mask[source])
        show(at, "Q K^T / sqrt(3), Q and K the features", (q @ k.transpose(1, 2) / math.sqrt(3))[0])
        show("Eq. (1)", "softmax over the source's real steps", weights[0])
        show("", "times V", out[0])
        show("", "x = Norm(that): no residual [A7]", block.norm1(out)[0])
        h = block(q, k, mask[source])
        show("", "Norm(x + (0, 0, ReLU(x3)))", h[0])
        show("pooling", "mean over the target's real steps", masked_mean(h, mask[target])[0])
    pooled = net.fusion(features, mask)
    show("classify", "u = ReLU(p1 + p4, p2 + p5, p3 + p6)", torch.relu(first(pooled))[0])
    logits = net((states_a, mask_a), (states_t, mask_t))
    show("", "logits = u1, u2, u3, -(u1 + u2 + u3)", logits[0])
    show("", "softmax: neu, hap, ang, sad", logits.softmax(-1)[0])


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        print(__doc__.split("\nRead")[0])
    elif arguments not in ([], ["--trace"]):
        sys.exit("usage: python model.py [--trace]")
    else:
        trace() if arguments else main()
