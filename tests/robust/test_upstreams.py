"""Encoders as users may give them: which run, and which are refused in one sentence.

Each is a tiny folder with random weights, written as the hub stores them.
"""

import json
import math

import pytest
import torch

from data import InputError, Source, Utterance
from evaluate import load_upstream
from model import Upstream

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
CNN = {
    "conv_dim": (16, 16),
    "conv_kernel": (40, 16),
    "conv_stride": (20, 16),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 4,
}
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
GROUP_NORM = {"feat_extract_norm": "group"}
WORDS = "you know that i am so happy and are not sad or angry yes".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_audio(folder, kind="Wav2Vec2", norm=LAYER_NORM, extractor=None, **config):
    """Write an audio encoder with its feature extractor."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZE | CNN | norm | config))
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    settings = {"return_attention_mask": True} | (extractor or {})
    transformers.Wav2Vec2FeatureExtractor(**settings).save_pretrained(folder)


def write_text(folder, kind="Bert", tokenizer=None, **config):
    """Write a text encoder with a tokenizer of word pieces."""
    import transformers

    torch.manual_seed(0)
    numbers = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = transformers.BertTokenizer(vocab=numbers, **(tokenizer or {}))
    tokenizer.save_pretrained(folder)
    config = SIZE | {"vocab_size": len(numbers)} | config
    config = getattr(transformers, f"{kind}Config")(**config)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)


def write_bytes(folder, kind, special, **config):
    """Write a RoBERTa or GPT-2. Its tokenizer knows every byte, and merges none."""
    import transformers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    torch.manual_seed(0)
    entries = special.split() + sorted(bytes_to_unicode().values())
    numbers = {entry: i for i, entry in enumerate(entries)}
    tokenizer = getattr(transformers, f"{kind}Tokenizer")(vocab=numbers, merges=[])
    tokenizer.save_pretrained(folder)
    config = SIZE | {"vocab_size": len(entries)} | config
    config = getattr(transformers, f"{kind}Config")(**config)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)


def write_roberta(folder, positions):
    special = "<s> <pad> </s> <unk> <mask>"
    settings = {"pad_token_id": 1, "max_position_embeddings": positions}
    write_bytes(folder, "Roberta", special, **settings)


def edit(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def drop(folder, part):
    """Remove the weights whose names have `part` in them."""

    def change(weights):
        names = [name for name in weights if part in name]
        assert names
        for name in names:
            del weights[name]

    edit_weights(folder, change)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


# --- Encoders that run ----------------------------------------------------------------

# (modality, how to write it, what to change)
RUNNING = {
    "WavLM": ("audio", lambda f: write_audio(f, "WavLM")),
    "HuBERT": ("audio", lambda f: write_audio(f, "Hubert")),
    "HuBERT, group norm": ("audio", lambda f: write_audio(f, "Hubert", GROUP_NORM)),
    "wav2vec2": ("audio", write_audio),
    "wav2vec2, group norm": ("audio", lambda f: write_audio(f, norm=GROUP_NORM)),
    "UniSpeech-SAT": ("audio", lambda f: write_audio(f, "UniSpeechSat")),
    "pads left": (
        "audio",
        lambda f: write_audio(f, extractor={"padding_side": "left"}),
    ),
    "no mask": (
        "audio",
        lambda f: write_audio(f, extractor={"return_attention_mask": False}),
    ),
    "BERT": ("text", write_text),
}
