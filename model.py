"""The model of "Context-aware Multimodal Fusion for Emotion Recognition".

    python model.py     print every block of the main system with shapes and parameters

Read this file with §2 of the paper and its Figures 1 to 3 open. After FUSIONS come the
equations, Fig. 2, Fig. 3 and Fig. 1, and then the pre-trained encoders.

Symbol      meaning                                              in the paper
------      --------------------------------------------------   ---------------------
B           utterances in a batch                                32 (§3.2)
T           time steps: T_A frames of 20 ms, T_T word pieces     §2.2
N           real time steps of all clips, or of all texts, of a batch
L           layer states of an upstream: the input of its        25 and 13 (§2.1)
            first Transformer layer, and every layer's output
D           width of an upstream                                 1024 and 768 (§2.1)
d           width after the projector, `dim` in the code         16 (§2.1)
C           texts in a context: 4 before, the target, 4 after    9 (§3.2)
X_A, X_T    acoustic and textual features, (B, T, d)             Fig. 2
x_t, x_s    target (gives queries), source (keys and values)     X_t, X_s in Eq. (1)

Masks are bool: True is a real time step, False is padding. Layer states are large, so
the model gets them without padding. A batch of them is (N, L, D): the real steps of all
its clips or texts, one after another. The mask tells where each step belongs. This is
the data flow of the main system, MMT, for one batch:

  waveforms ---- WavLM ---> (N, 25, 1024) -- S&E, project --> X_A (B, T_A, 16)
  9 texts each -- BERT ---> (N, 13, 768) --- S&E, project --> (B, 9, T_T, 16)
                                             context conv --> X_T (B, T_T, 16)

  queries X_T, keys X_A -- CMT A->T --> (B, T_T, 16) -- mean over time --> (B, 16) --+
  queries X_A, keys X_T -- CMT T->A --> (B, T_A, 16) -- mean over time --> (B, 16) --+
                                                                                     |
                                          logits (B, 4) <--- MLP --- (B, 32) <-------+

The code of this paper is not public. In all four files, "the author's other code" is
JinchaoLove/AffectiveVocalBurstRecognition on GitHub, for a related task. For "another
reading", tests/studies/alternatives.py has a patch, or names a flag.
"""

import json
import math
import re
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

# Fig. 3 and Table 1. A fusion is a list of paths (target, source) whose outputs are
# concatenated. A path without a source passes on the features of the target. With the
# target itself as source it is a vanilla Transformer block. With the other modality as
# source it is a cross-modal Transformer, CMT (source -> target).
FUSIONS = {
    "audio-fc": [("audio", None)],  # Sys. 1, 2
    "audio-te": [("audio", "audio")],  # Sys. 3, 4
    "text-fc": [("text", None)],  # Sys. 5, 6
    "text-te": [("text", "text")],  # Sys. 7, 8
    "cmt-a2t": [("text", "audio")],  # Sys. 9, 10
    "cmt-t2a": [("audio", "text")],  # Sys. 11, 12: Fig. 3c
    "ef": [("audio", None), ("text", None)],  # Sys. 13, 14: Fig. 3a
    "lf": [("audio", "audio"), ("text", "text")],  # Sys. 15, 16: Fig. 3b
    "mmt": [("text", "audio"), ("audio", "text")],  # Sys. 17, 18: Fig. 3d
}

# Sys. 1 to 18, as (fusion, frozen). The frozen system of a fusion has the odd number.
SYSTEMS = []
for fusion in FUSIONS:
    SYSTEMS += [(fusion, True), (fusion, False)]


@dataclass
class Config:
    """Describe the trained part. The defaults are the main system of the paper."""

    fusion: str = "mmt"
    audio_layers: int = 25  # L of WavLM-Large
    audio_dim: int = 1024  # D of WavLM-Large
    text_layers: int = 13  # L of BERT-base
    text_dim: int = 768  # D of BERT-base
    dim: int = 16  # d (§2.1)
    n_classes: int = 4  # §3.1
    n_context: int = 9  # C (§3.2)
    dropout: float = 0.5  # §3.2
    cma_residual: bool = False  # [A7]

    @property
    def modalities(self) -> list[str]:
        """The modalities that the fusion uses, audio first."""
        used = set()
        for target, source in FUSIONS[self.fusion]:
            used.update([target, source])
        return [modality for modality in ("audio", "text") if modality in used]


# --- Equations ------------------------------------------------------------------------


# EXERCISE 1 (15 min): delete the body, write it again; pytest -m ex1
def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average over the real steps. This is the "average time pooling" of §2.2.

    x (B, T, F), mask (B, T) -> (B, F)

    For example, [[1], [3], [9]] with the mask [True, True, False] gives [2]. Padding is
    never read, so it may be anything, even NaN. Without a real step, the result is 0.
    """
    total = x.masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=1)  # (B, F)
    # Careful: without the clamp, an utterance without a real step is 0 / 0 = NaN.
    n_steps = mask.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
    return total / n_steps


# EXERCISE 2 (30 min): delete the body, write it again; pytest -m ex2
def cross_modal_attention(
    x_t: Tensor, x_s: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, mask_s: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute Eq. (1) of §2.2, from source s to target t.

    x_t (B, T_t, d_t), x_s (B, T_s, d_s), mask_s (B, T_s)
    w_q (d_t, d_k), w_k (d_s, d_k), w_v (d_s, d_v)
    returns  out (B, T_t, d_v) and weights (B, T_t, T_s)

    Each step of the target takes a weighted mean of the values of the source. The
    weights of a step (a row) sum to 1 over the real steps of the source. A source
    without a real step gives zeros. The padding of the source may be any finite number.
    """
    q = x_t @ w_q  # (B, T_t, d_k)
    k = x_s @ w_k  # (B, T_s, d_k)
    v = x_s @ w_v  # (B, T_s, d_v)

    # Eq. (1), §2.2: softmax(Q_t K_s^T / sqrt(d_k)) V_s
    d_k = w_k.shape[1]
    scores = q @ k.transpose(1, 2) / math.sqrt(d_k)  # (B, T_t, T_s)
    # Padding gets no weight. Subtle: we fill in the lowest finite number, because the
    # softmax of a row that is all -inf is NaN.
    padding = ~mask_s.unsqueeze(1)  # (B, 1, T_s)
    lowest = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(padding, lowest).softmax(dim=-1)
    # If every step is padding, the softmax gives them equal weights. Make them zero.
    weights = weights.masked_fill(padding, 0.0)  # (B, T_t, T_s)
    return weights @ v, weights


def unpack(x: Tensor, mask: Tensor) -> Tensor:
    """Put the N real steps where the mask is True, in order, and zeros elsewhere.

    x (N, F), mask (B, T) -> (B, T, F)
    """
    padded = x.new_zeros(*mask.shape, x.shape[1])
    padded[mask] = x
    return padded


# --- Feature extractors (§2.1, Fig. 2) ------------------------------------------------


class SqueezeExcitation(nn.Module):
    """Squeeze-and-Excitation (S&E) over the layers of an upstream (§2.1, [27]).

    states (N, L, D), mask (B, T) -> gates (B, L), each between 0 and 1

        z = mean of the states over features and real steps     squeeze, (B, L)
        gates = sigmoid(W_2 relu(W_1 z + b_1) + b_2)            excitation, (B, L)
    """

    def __init__(self, n_layers: int):
        super().__init__()
        # UNSPECIFIED [A2]: the channels of S&E. The paper says "layer-wise", and "the
        # reduction ratio is simply the number of layers". We take the layers as
        # channels, so the bottleneck has L / L = 1 unit. Another reading: the features.
        self.reduce = nn.Linear(n_layers, 1)  # W_1, b_1
        self.expand = nn.Linear(1, n_layers)  # W_2, b_2
        # DEVIATION [D2]: b_1 starts at 1, not at PyTorch's random value. The paper
        # names none. Why: if the ReLU gives 0 for all utterances, it passes no
        # gradient, and their gates stay equal. Starting at 1 makes that unlikely.
        nn.init.ones_(self.reduce.bias)

    # EXERCISE 3 (15 min): delete the body, write it again; pytest -m ex3
    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        # Squeeze. The mask is the arrow "padding mask" in Fig. 2a.
        layer_means = states.mean(dim=-1)  # (N, L)
        z = masked_mean(unpack(layer_means, mask), mask)  # (B, L)
        # Excitation: each gate depends on all layers, through a bottleneck of one unit.
        hidden = torch.relu(self.reduce(z))  # (B, 1)
        return torch.sigmoid(self.expand(hidden))  # (B, L)


class FeatureExtractor(nn.Module):
    """Fig. 2a without the upstream: calibrate, condense, "Project & Norm".

    states (N, L, D), mask (B, T) -> X_A, or the map of each text (B, T, d)
    """

    def __init__(self, n_layers: int, width: int, dim: int):
        super().__init__()
        self.se = SqueezeExcitation(n_layers)
        # UNSPECIFIED [A3]: the projector is "an MLP with Layer-Normalization" in §2.1,
        # "a Fully-Connected (FC) Layer and Layer Normalization" in §1. We follow §1,
        # like the author's other code. Another reading: a hidden layer.
        self.linear = nn.Linear(width, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        states = states.float()  # 16 bits in the cache [D1]
        gates = self.se(states, mask)  # (B, L)

        # UNSPECIFIED [A1]: how L layers become one vector. They are "calibrated and
        # condensed" (§1). We scale each layer by its gate and sum them. The author's
        # other code sums them too, with weights that all inputs share. Another reading:
        # lay them side by side. One product scales and sums without a scaled copy.
        utterance = mask.nonzero()[:, 0]  # (N,)
        x = torch.einsum("nl,nld->nd", gates[utterance], states)  # (N, D)

        x = self.norm(self.linear(x))  # (N, d)
        return unpack(x, mask)  # (B, T, d)


class TextFeatureExtractor(nn.Module):
    """Fig. 2b without BERT: Fig. 2a for each of C texts, then a convolution over them.

    states (N, L, D), mask (B, C, T) -> X_T (B, T, d), mask (B, T)

    The target is text number C // 2 of its window, the others are its neighbours.
    """

    def __init__(self, n_layers: int, width: int, dim: int, n_context: int):
        super().__init__()
        self.each_text = FeatureExtractor(n_layers, width, dim)
        # UNSPECIFIED [A4]: how "Conv2D" (Fig. 2b) mixes the texts. §2.1 has "a
        # convolutional layer with the stride of 1 and kernel size of 3". We take the
        # texts as channels and convolve over (token, feature), so X_T is a sequence
        # again. That makes 9 * 3 * 3 + 1 = 82 parameters. Another reading: two layers
        # with a norm. Careful: the convolution mixes tokens of several texts at the
        # same position or the next, although nothing relates them.
        self.conv = nn.Conv2d(n_context, 1, kernel_size=3, stride=1, padding=1)

    # EXERCISE 4 (25 min): delete the body, write it again; pytest -m ex4
    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        B, C, _ = mask.shape
        # UNSPECIFIED [A6]: what lies beyond the edge of a dialogue. A missing neighbour
        # has no real step, so its map is zero. Another reading: the nearest text.
        x = self.each_text(states, mask.flatten(0, 1))  # (B * C, T, d)
        x = x.unflatten(0, (B, C))  # (B, C, T, d)
        x = self.conv(x)  # (B, 1, T, d)
        x = x.squeeze(1)  # (B, T, d)
        # UNSPECIFIED [A5]: which steps of X_T are real. We take the positions where any
        # text has a token. Another reading: the target's own tokens.
        return x, mask.any(dim=1)


# --- Fusion (§2.2, Fig. 3) and the whole recognizer (Fig. 1) --------------------------


class TransformerBlock(nn.Module):
    """A Transformer block around Eq. (1): attention, then a feed-forward network.

    x_t (B, T_t, d), x_s (B, T_s, d), mask_s (B, T_s) -> (B, T_t, d)

    With the target itself as source, and `residual`, this is the vanilla encoder block
    of reference [31]. With the other modality as source it is CMT (§2.2). `residual`
    says whether x_t is added to the output of the attention [A7]. As in [31], dropout
    is applied to the output of each of the two parts, and each norm comes last.
    """

    def __init__(self, dim: int, residual: bool):
        super().__init__()
        # UNSPECIFIED [A8]: heads, depth, width, norm and positions. Eq. (1) has one
        # head and no output matrix. "The same backbone as the vanilla Transformer"
        # (§2.2) means post-norm, 4 d hidden units, ReLU, dropout 0.1. We use one block,
        # and add no positions, because both upstreams have added theirs. Another
        # reading: two heads, two hidden units, dropout 0.5.
        self.w_q = nn.Parameter(torch.empty(dim, dim))  # W_Q (d_t, d_k)
        self.w_k = nn.Parameter(torch.empty(dim, dim))  # W_K (d_s, d_k)
        self.w_v = nn.Parameter(torch.empty(dim, dim))  # W_V (d_s, d_v)
        for matrix in (self.w_q, self.w_k, self.w_v):
            nn.init.xavier_uniform_(matrix)
        self.norm1 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim)
        )
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(0.1)
        self.residual = residual

    # EXERCISE 5 (35 min): delete the body, write it again; pytest -m ex5
    def forward(self, x_t: Tensor, x_s: Tensor, mask_s: Tensor) -> Tensor:
        attended, _ = cross_modal_attention(
            x_t, x_s, self.w_q, self.w_k, self.w_v, mask_s
        )
        x = self.dropout(attended)  # (B, T_t, d)
        if self.residual:
            x = x_t + x
        x = self.norm1(x)
        x = x + self.dropout(self.feed_forward(x))
        return self.norm2(x)


class Fusion(nn.Module):
    """Fig. 3: run each path, average its output over time, concatenate the averages.

    x and mask are dicts by modality, (B, T, d) and (B, T) -> (B, d * number of paths)
    """

    def __init__(self, config: Config):
        super().__init__()
        self.paths = FUSIONS[config.fusion]
        self.blocks = nn.ModuleDict()
        for target, source in self.paths:
            if source is None:
                continue
            # UNSPECIFIED [A7]: whether CMT has the residual connection of the vanilla
            # block around its attention. With it, the text itself would pass through
            # CMT(A->T), which should then score like BERT. In Table 1 it scores like
            # audio (Sys. 9, 10). So we leave it out. Another reading: --cma-residual.
            residual = source == target or config.cma_residual
            name = f"{source}-to-{target}"
            self.blocks[name] = TransformerBlock(config.dim, residual)

    def forward(self, x: dict[str, Tensor], mask: dict[str, Tensor]) -> Tensor:
        pooled = []
        for target, source in self.paths:
            features = x[target]  # (B, T, d)
            if source is not None:
                block = self.blocks[f"{source}-to-{target}"]
                features = block(features, x[source], mask[source])
            pooled.append(masked_mean(features, mask[target]))  # (B, d)
        return torch.cat(pooled, dim=-1)


class EmotionRecognizer(nn.Module):
    """Fig. 1: all that is trained from scratch, from layer states to logits (B, 4).

    audio   states (N, L, D) and mask (B, T), or None if the fusion uses text alone
    text    states (N, L, D) and mask (B, C, T), or None if it uses audio alone

    The classes are in the order of Fig. 4: neutral, happy, angry, sad.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        dim = config.dim
        self.extractor = nn.ModuleDict()
        if "audio" in config.modalities:
            self.extractor["audio"] = FeatureExtractor(
                config.audio_layers, config.audio_dim, dim
            )
        if "text" in config.modalities:
            self.extractor["text"] = TextFeatureExtractor(
                config.text_layers, config.text_dim, dim, config.n_context
            )
        self.fusion = Fusion(config)

        # UNSPECIFIED [A16]: the modules meant by "a dropout layer (0.5) between every
        # two modules" (§3.2). We take the boxes of Fig. 1: extractor, fusion,
        # classifier. Fig. 1a has no fusion, so a unimodal system has one dropout.
        # Another reading: before the projector, like the author's other code.
        self.dropout = nn.Dropout(config.dropout)
        self.fusion_dropout = nn.Identity()
        if len(config.modalities) == 2:
            self.fusion_dropout = nn.Dropout(config.dropout)

        # PAPER-ERROR [E10]: the classifier is "a simple MLP" in §2.3, but "a
        # fully-connected (FC) layer" in §2.2.
        # UNSPECIFIED [A15]: the width of the classifier. We follow §2.3, with one
        # hidden layer of width d. Another reading: one linear layer.
        self.classifier = nn.Sequential(
            nn.Linear(dim * len(self.fusion.paths), dim),
            nn.ReLU(),
            nn.Linear(dim, config.n_classes),
        )

    def forward(self, audio: tuple | None = None, text: tuple | None = None) -> Tensor:
        x = {}
        mask = {}
        if "audio" in self.extractor:
            states, mask["audio"] = audio
            x["audio"] = self.extractor["audio"](states, mask["audio"])  # X_A
        if "text" in self.extractor:
            x["text"], mask["text"] = self.extractor["text"](*text)  # X_T
        for modality in x:
            x[modality] = self.dropout(x[modality])  # (B, T, d)
        fused = self.fusion_dropout(self.fusion(x, mask))  # (B, d * paths)
        return self.classifier(fused)  # (B, 4)


# --- Upstreams: WavLM and BERT (§2.1), and what fine-tuning opens in them (§2.4) ------

# The model types that the tests have tried. Any other is refused by name.
KNOWN_TYPES = {
    "audio": ["wavlm", "hubert", "wav2vec2", "unispeech-sat"],
    "text": ["bert", "roberta", "electra"],
}


class Upstream(nn.Module):
    """A pre-trained encoder: clips or texts in, all of its layer states out.

    name        a name on the Hugging Face hub, or a folder with the same files
    modality    "audio" (WavLM and its relatives) or "text" (BERT and its relatives)
    precision   "fp32", or "bf16" for matrix products in 16 bits

    `prepare` turns one input into the numbers that the encoder reads. A call turns a
    list of prepared inputs into a list of states. The constructor raises ValueError for
    an unknown type or a missing part, and the libraries' errors for a damaged file.
    """

    def __init__(self, name: str, modality: str, precision: str = "fp32"):
        super().__init__()
        self.name = name
        self.modality = modality
        self.bf16 = precision == "bf16"
        self.preprocessor, self.model = load_pretrained(name, modality)
        self.requires_grad_(False)
        self.eval()
        config = self.model.config
        self.n_layers = config.num_hidden_layers + 1  # L
        self.dim = config.hidden_size  # D
        # A group norm averages over padding too. Such a model gets one clip at a time.
        self.one_by_one = getattr(config, "feat_extract_norm", "") == "group"
        if modality == "text":
            # §3.2: 512 tokens.
            # PAPER-ERROR [E9]: §3.2 says "512 words" too. BERT's limit is in tokens.
            # Careful: RoBERTa does not use its first padding_idx + 1 positions.
            unused = getattr(self.model.embeddings, "padding_idx", -1) + 1
            self.max_tokens = min(512, config.max_position_embeddings - unused)
        self.checksum = self.compute_checksum()

    def train(self, mode: bool = True) -> "Upstream":
        """Stay in evaluation mode, even if train() is called."""
        # UNSPECIFIED [A12]: the upstreams' own dropout. The cache needs it off, because
        # it stores each state once and dropout is random. We leave it off while
        # fine-tuning, too. Another reading: on then, as in the author's other code.
        return super().train(False)

    def prepare(self, raw: Tensor | str) -> Tensor:
        """Turn a clip (m,) at 16 kHz, or a text, into what the encoder reads: (n,).

        These are samples (for WavLM-Large of mean 0 and variance 1), or token ids.
        """
        if self.modality == "audio":
            prepared = self.preprocessor(raw.numpy(), sampling_rate=16000)
            return torch.from_numpy(prepared["input_values"][0])
        # UNSPECIFIED [A19]: tags like [LAUGHTER]. We keep them. Another reading: none.
        prepared = self.preprocessor(raw, truncation=True, max_length=self.max_tokens)
        return torch.tensor(prepared["input_ids"])

    def unknown_fraction(self, inputs: list[Tensor]) -> float:
        """Compute the fraction of the token ids that mean an unknown word."""
        is_unknown = torch.cat(inputs) == self.preprocessor.unk_token_id
        return is_unknown.float().mean().item()

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Compute all states (§2.1): prepared inputs (n_i,) -> states (T_i, L, D)."""
        if self.one_by_one and len(inputs) > 1:
            return [self([one])[0] for one in inputs]

        # Pad the inputs to the longest, and mask the padding.
        device = next(self.model.parameters()).device
        lengths = torch.tensor([len(one) for one in inputs])  # (B,)
        padded = pad_sequence(inputs, batch_first=True).to(device)  # (B, n)
        mask = torch.arange(padded.shape[1]) < lengths.unsqueeze(1)
        mask = mask.long().to(device)  # (B, n)
        if len(inputs) == 1:
            mask = None  # without padding, the encoder is faster without a mask
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            output = self.model(padded, attention_mask=mask, output_hidden_states=True)
        # PAPER-ERROR [E4]: §2.1 takes all states to avoid "information leakage". It
        # must mean information loss. State 0 is the output of the feature encoder, as
        # it enters the first Transformer layer. Careful: the last of `hidden_states`
        # may come before the final LayerNorm, so we take last_hidden_state.
        layers = [*output.hidden_states[:-1], output.last_hidden_state]
        states = torch.stack(layers, dim=2)  # (B, T, L, D)
        if self.modality == "audio":
            lengths = frame_count(lengths, self.model.config)
        real = torch.arange(states.shape[1]) < lengths.unsqueeze(1)  # (B, T)
        return list(states[real.to(device)].split(lengths.tolist()))

    def open(self, what: str) -> list[nn.Parameter]:
        """Unfreeze "nothing", the "bottom" or "all". Returns what is unfrozen."""
        # §2.4: "we only fine-tune the feature extractor part, i.e., CNN encoders in
        # WavLM and input embeddings in BERT".
        # UNSPECIFIED [A21]: whether these include the LayerNorm of BERT's embeddings.
        # We say yes. Another reading: only the embedding tables.
        prefix = "feature_extractor." if self.modality == "audio" else "embeddings."
        opened = []
        for name, parameter in self.model.named_parameters():
            if what == "all" or (what == "bottom" and name.startswith(prefix)):
                opened.append(parameter.requires_grad_(True))
        return opened

    def compute_checksum(self) -> str:
        """Compute a checksum of the weights and the configuration."""
        # The place of the model and the version of the library do not change states.
        config = self.model.config.to_dict()
        config.pop("_name_or_path", None)
        config.pop("transformers_version", None)
        crc = zlib.crc32(json.dumps(config, sort_keys=True, default=str).encode())
        for weights in self.model.state_dict().values():
            crc = zlib.crc32(weights.cpu().contiguous().numpy(), crc)
        return f"{crc:08x}"


def frame_count(samples: Tensor | int, config) -> Tensor | int:
    """Count the frames of a CNN encoder, layer by layer: samples -> frames of 20 ms.

    For WavLM this is floor((samples - 400) / 320) + 1.
    PAPER-ERROR [E3]: §2.1 has 50 frames per second. 1 s gives 49, and 5 s give 249.
    """
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def import_transformers():
    """Import the library where it is needed, because that takes seconds."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # PyTorch warns about the masks in WavLM's attention, but the result is right.
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
    return transformers


def load_pretrained(name: str, modality: str):
    """Load (preprocessor, model). Raises ValueError for one that is unsuitable."""
    transformers = import_transformers()
    # Careful: otherwise the library offers to run code that comes with the weights.
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    known = KNOWN_TYPES[modality]
    if config.model_type not in known:
        raise ValueError(f"its type is {config.model_type}, known types are {known}")
    model, info = transformers.AutoModel.from_pretrained(
        name, dtype=torch.float32, output_loading_info=True
    )
    # Careful: a weight that fails to load stays random without any error. The pooler
    # and the embedding of masked frames may be missing, because nothing here uses them.
    for key in info["missing_keys"]:
        if "pooler" not in key and "masked_spec_embed" not in key:
            raise ValueError(f"it has no weights for {key}")

    if modality == "audio":
        extractor = transformers.AutoFeatureExtractor.from_pretrained(name)
        if extractor.sampling_rate != 16000:
            raise ValueError(f"it wants {extractor.sampling_rate} Hz, not 16000 Hz")
        return extractor, model
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    # Long texts keep their beginning (§3.2), whatever the configuration says.
    tokenizer.truncation_side = "right"
    # Careful: without its files, a tokenizer still loads, with five special tokens. A
    # complete one has nearly as many entries as the embedding has rows.
    rows = model.get_input_embeddings().num_embeddings
    if not rows / 2 < len(tokenizer) <= rows:
        raise ValueError(f"its tokenizer has {len(tokenizer)} entries for {rows} rows")
    return tokenizer, model


# --- Tiny upstreams, for the toy corpus and for dry runs ------------------------------

# The configuration of microsoft/wavlm-large, where it is not the library's default.
WAVLM_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
# Two convolutions instead of seven, with one frame per 20 ms, like the original.
TINY_CNN = {
    "conv_dim": (16, 16),
    "conv_kernel": (40, 16),
    "conv_stride": (20, 16),
    "num_conv_pos_embeddings": 2,
    "num_conv_pos_embedding_groups": 4,
}


def make_tiny_upstreams(folder: Path, texts: list[str]) -> None:
    """Write a WavLM and a BERT of one layer with random weights, for from_pretrained.

    The vocabulary has every word of `texts`, and letters for all other words.
    """
    transformers = import_transformers()

    words = set(re.findall(r"\w+|[^\w\s]", " ".join(texts).lower()))
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [f"##{letter}" for letter in letters]
    vocabulary = special + sorted(words | set(letters)) + pieces

    wavlm_config = transformers.WavLMConfig(**(WAVLM_LARGE | TINY | TINY_CNN))
    wavlm = transformers.WavLMModel(wavlm_config)
    draw_weights(wavlm)
    wavlm.save_pretrained(folder / "audio")
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    extractor.save_pretrained(folder / "audio")

    bert_config = transformers.BertConfig(vocab_size=len(vocabulary), **TINY)
    bert = transformers.BertModel(bert_config)
    draw_weights(bert)
    # The seed of a vector is made from its word. Otherwise one more word, perhaps of
    # the test session, would change the vectors of all words after it.
    for row, word in enumerate(vocabulary):
        generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
        bert.embeddings.word_embeddings.weight.data[row].normal_(generator=generator)
    bert.save_pretrained(folder / "text")
    numbers = {word: number for number, word in enumerate(vocabulary)}
    transformers.BertTokenizer(vocab=numbers).save_pretrained(folder / "text")


def draw_weights(model: nn.Module) -> None:
    """Draw random weights that do not depend on the version of transformers."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        parameter.data.zero_()
        if parameter.ndim > 1:
            # Keep the variance: an output sums over fan_in inputs.
            fan_in = parameter[0].numel()
            parameter.data.normal_(0.0, fan_in**-0.5, generator=generator)
        elif not name.endswith("bias"):
            # The weights of a norm. If all were 1, the mean of every state would be 0,
            # and S&E would see no difference between utterances.
            parameter.data.normal_(1.0, 0.2, generator=generator)


# --- python model.py ------------------------------------------------------------------


def main() -> None:
    """Print every block of the main system (MMT) at the size of the paper."""
    transformers = import_transformers()

    def show(name: str, module: nn.Module, shape: str = "") -> None:
        count = sum(parameter.numel() for parameter in module.parameters())
        if count > 0:
            print(f"{name:45} {shape:18} {count:>11,}")

    print(f"{'block':45} {'output':18} {'parameters':>11}")
    # A configuration needs no download. On "meta", a tensor has a shape but no data.
    with torch.device("meta"):
        wavlm = transformers.WavLMModel(transformers.WavLMConfig(**WAVLM_LARGE))
        bert = transformers.BertModel(transformers.BertConfig())
    show("WavLM-Large", wavlm)
    show("  its CNN encoder, which is fine-tuned", wavlm.feature_extractor)
    show("BERT-base", bert)
    show("  its input embeddings, which are fine-tuned", bert.embeddings)

    recognizer = EmotionRecognizer(Config())
    names = {module: name for name, module in recognizer.named_modules()}

    def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        if isinstance(output, tuple):
            output = output[0]  # X_T comes with its mask
        show(names[module] or "EmotionRecognizer", module, str(tuple(output.shape)))

    # Each block prints its line when it has been called, so the order is that of the
    # data. The batch has two clips of 5 s, and two windows of nine texts of 20 tokens.
    for module in names:
        module.register_forward_hook(hook)
    frames = frame_count(5 * 16000, wavlm.config)
    audio_mask = torch.ones(2, frames, dtype=torch.bool)
    text_mask = torch.ones(2, 9, 20, dtype=torch.bool)
    audio = torch.zeros(2 * frames, 25, 1024)
    text = torch.zeros(2 * 9 * 20, 13, 768)
    recognizer((audio, audio_mask), (text, text_mask))


if __name__ == "__main__":
    main()
