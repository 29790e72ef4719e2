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
PADS_LEFT = {"padding_side": "left"}
TRUNCATES_LEFT = {"truncation_side": "left"}
EIGHT_KHZ = {"sampling_rate": 8000}
NO_MASK = {"return_attention_mask": False}
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


def write_text(folder, kind="Bert", tokenizer=None, entries=SPECIAL + WORDS, **config):
    """Write a text encoder with a tokenizer of word pieces."""
    import transformers

    torch.manual_seed(0)
    numbers = {entry: i for i, entry in enumerate(entries)}
    if kind in ("Roberta", "GPT2"):
        tokenizer = getattr(transformers, f"{kind}Tokenizer")(vocab=numbers, merges=[])
    else:
        tokenizer = transformers.BertTokenizer(vocab=numbers, **(tokenizer or {}))
    tokenizer.save_pretrained(folder)
    config = SIZE | {"vocab_size": len(entries)} | config
    config = getattr(transformers, f"{kind}Config")(**config)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)


def write_bytes(folder, kind, special, **config):
    """Write a RoBERTa or GPT-2, which have a tokenizer of bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    entries = special.split() + sorted(bytes_to_unicode().values())
    write_text(folder, kind, entries=entries, **config)


def write_roberta(folder, positions):
    special = "<s> <pad> </s> <unk> <mask>"
    settings = {"pad_token_id": 1, "max_position_embeddings": positions}
    write_bytes(folder, "Roberta", special, **settings)


def edit(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_weights(folder, rename, file="model.safetensors"):
    """Save the weights under other names, and leave out those that get none."""
    from safetensors.torch import load_file, save_file

    old = load_file(folder / "model.safetensors")
    new = {rename(name): x for name, x in old.items() if rename(name)}
    assert new.keys() != old.keys()
    (folder / "model.safetensors").unlink()
    if file.endswith(".bin"):
        torch.save(new, folder / file)
    else:
        save_file(new, folder / file, {"format": "pt"})


def drop(folder, part):
    rename_weights(folder, lambda name: "" if part in name else name)


# --- Encoders that run ----------------------------------------------------------------

RUNNING = {
    "WavLM": ("audio", lambda f: write_audio(f, "WavLM")),
    "HuBERT": ("audio", lambda f: write_audio(f, "Hubert")),
    "HuBERT, group norm": ("audio", lambda f: write_audio(f, "Hubert", GROUP_NORM)),
    "wav2vec2": ("audio", write_audio),
    "wav2vec2, group norm": ("audio", lambda f: write_audio(f, norm=GROUP_NORM)),
    "UniSpeech-SAT": ("audio", lambda f: write_audio(f, "UniSpeechSat")),
    "extractor pads left": ("audio", lambda f: write_audio(f, extractor=PADS_LEFT)),
    "extractor masks nothing": ("audio", lambda f: write_audio(f, extractor=NO_MASK)),
    "BERT": ("text", write_text),
    "BERT without pooler": ("text", lambda f: (write_text(f), drop(f, "pooler"))),
    "BERT of 64 positions": (
        "text",
        lambda f: write_text(f, max_position_embeddings=64),
    ),
    "RoBERTa of 514 positions": ("text", lambda f: write_roberta(f, 514)),
    "RoBERTa of 130 positions": ("text", lambda f: write_roberta(f, 130)),
    "ELECTRA": ("text", lambda f: write_text(f, "Electra", embedding_size=16)),
    "tokenizer pads left": ("text", lambda f: write_text(f, tokenizer=PADS_LEFT)),
    "truncates left": ("text", lambda f: write_text(f, tokenizer=TRUNCATES_LEFT)),
}


@pytest.mark.parametrize("kind", RUNNING)
def test_a_known_kind_gives_the_states_of_the_library(kind, tmp_path):
    import transformers

    modality, write = RUNNING[kind]
    write(tmp_path)
    upstream = load_upstream(str(tmp_path), modality, "fp32")
    assert upstream.one_by_one == ("group norm" in kind)
    # Each input alone through the library, against our batch of unlike lengths.
    if modality == "audio":
        g = torch.Generator().manual_seed(8)
        raw = [torch.randn(n, generator=g) for n in (2500, 9000, 4000)]
        normalised = [(x - x.mean()) / x.std(correction=0) for x in raw]
        inputs = [{"input_values": x.unsqueeze(0)} for x in normalised]
    else:
        raw = ["yes", "i know that you are angry and so sad", "happy or not"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        inputs = [tokenizer(x, return_tensors="pt") for x in raw]
    library = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        states = upstream([upstream.prepare(x) for x in raw])
        for ours, one in zip(states, inputs, strict=True):
            output = library(**one, output_hidden_states=True)
            layers = (*output.hidden_states[:-1], output.last_hidden_state)
            expected = torch.stack(layers, dim=2)[0]
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)
    if modality == "text":
        # The longest text that the positions allow, with its beginning.
        longest = {"BERT of 64 positions": 64, "RoBERTa of 130 positions": 128}
        tokens = upstream.prepare("sad " + "you know " * 600)
        assert len(tokens) == longest.get(kind, 512) == upstream.max_tokens
        assert tokens[1] == upstream.prepare("sad")[1]
        assert len(upstream([tokens])[0]) == len(tokens)


def old_bert(name):
    """bert-base-uncased is saved as part of a larger model, in an old spelling."""
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
    return "bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")


def old_wavlm(name):
    """wavlm-large has old names for the two parts of its weight norm."""
    name = name.replace("parametrizations.weight.original0", "weight_g")
    return name.replace("parametrizations.weight.original1", "weight_v")


@pytest.mark.parametrize(
    "modality, kind, rename, file",
    [
        ("text", "Bert", old_bert, "model.safetensors"),
        ("text", "Bert", old_bert, "pytorch_model.bin"),
        ("audio", "WavLM", old_wavlm, "pytorch_model.bin"),
        ("audio", "Wav2Vec2", lambda n: f"wav2vec2.{n}", "model.safetensors"),  # CTC
    ],
)
def test_old_formats_of_the_hub_load_whole(modality, kind, rename, file, tmp_path):
    write = {"audio": write_audio, "text": write_text}[modality]
    write(tmp_path, kind)
    before = Upstream(str(tmp_path), modality).model.state_dict()
    rename_weights(tmp_path, rename, file)
    after = Upstream(str(tmp_path), modality).model.state_dict()
    for name, weights in before.items():
        assert torch.equal(after[name], weights), name


# --- Encoders that are refused --------------------------------------------------------


def refusal(folder, modality):
    """The sentence that a user sees instead of a traceback."""
    with pytest.raises(InputError) as error:
        load_upstream(str(folder), modality, "fp32")
    sentence = str(error.value)
    flag = {"audio": "--wavlm", "text": "--bert"}[modality]
    assert flag in sentence and str(folder) in sentence
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    "modality, reason, write",
    [
        ("text", " gpt2", lambda f: write_bytes(f, "GPT2", "<|endoftext|>")),
        ("text", " wav2vec2", write_audio),
        ("audio", " bert", write_text),
        ("audio", " wav2vec2-conformer", lambda f: write_audio(f, "Wav2Vec2Conformer")),
        ("audio", " data2vec-audio", lambda f: write_audio(f, "Data2VecAudio")),
        ("audio", " 8000 ", lambda f: write_audio(f, extractor=EIGHT_KHZ)),
        ("text", " 15 ", lambda f: write_text(f, vocab_size=15)),
        ("text", " 60 ", lambda f: write_text(f, vocab_size=60)),
        ("text", "Unrecognized model", lambda f: None),  # an empty folder
        ("audio", "", lambda f: f.rmdir()),
    ],
)
def test_another_kind_is_refused_in_one_sentence(modality, reason, write, tmp_path):
    write(tmp_path)
    assert reason in refusal(tmp_path, modality)


@pytest.mark.parametrize(
    "reason, damage",
    [
        # weights
        (" encoder.layers.1.", lambda f: drop(f, "layers.1.attention.k")),
        (" encoder.layer_norm", lambda f: drop(f, "encoder.layer_norm")),
        (" encoder.pos_conv", lambda f: drop(f, "weight.original0")),
        (" encoder.layers.2.", lambda f: edit(f, num_hidden_layers=3)),
        (" encoder.layers.1.", lambda f: edit(f, num_hidden_layers=1)),
        ("model.safetensors", lambda f: (f / "model.safetensors").unlink()),
        # the other files
        ("other", lambda f: edit(f, model_type="other")),
        ("not a valid JSON", lambda f: (f / "config.json").write_text("{")),
        ("feature extractor", lambda f: (f / "preprocessor_config.json").unlink()),
    ],
)
def test_a_damaged_audio_encoder_is_refused_in_one_sentence(reason, damage, tmp_path):
    write_audio(tmp_path, "WavLM")
    damage(tmp_path)
    assert reason in refusal(tmp_path, "audio")


def tear(path, size):
    path.write_bytes(path.read_bytes()[:size])


def tear_bin(folder):
    rename_weights(folder, old_bert, "pytorch_model.bin")
    tear(folder / "pytorch_model.bin", 3000)


@pytest.mark.parametrize(
    "reason, damage",
    [
        (" encoder.layer.1.", lambda f: drop(f, "1.attention.self.key")),
        (" embeddings.LayerNorm", lambda f: drop(f, "embeddings.LayerNorm")),
        (" encoder.layer.1.", lambda f: edit(f, num_hidden_layers=1)),
        ("tokenizer", lambda f: (f / "tokenizer.json").unlink()),
        ("", lambda f: tear(f / "model.safetensors", 3000)),
        ("", tear_bin),
        ("", lambda f: edit(f, hidden_size=48)),
    ],
)
def test_a_damaged_text_encoder_is_refused_in_one_sentence(reason, damage, tmp_path):
    write_text(tmp_path)
    damage(tmp_path)
    assert reason in refusal(tmp_path, "text")


def test_a_name_that_the_hub_does_not_give_is_refused(monkeypatch):
    # Offline, so that the library does not try for 23 seconds.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refusal("nobody/no-such-model-anywhere", "audio")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_with_the_first_state(value, tmp_path):
    write_text(tmp_path)
    upstream = load_upstream(str(tmp_path), "text", "fp32")
    upstream.model.encoder.layer[1].output.dense.bias.data[0] = value
    utterance = Utterance("d_000", 1, "d", "s", 0.0, 0.0, "yes", "neu", None)
    inputs = {0: upstream.prepare(utterance.text)}
    source = Source(upstream, inputs, [utterance], tmp_path / "cache", "cpu")
    with pytest.raises(InputError, match="d_000.*not finite"):
        source.fill()
    assert not list(tmp_path.glob("cache/*"))


def test_code_in_a_folder_never_runs(tmp_path, monkeypatch):
    write_text(tmp_path)
    (tmp_path / "code.py").write_text(
        "from transformers import BertConfig, BertModel\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class C(BertConfig):\n    model_type = 'other'\n"
        "class M(BertModel):\n    config_class = C\n"
    )
    auto = {"AutoConfig": "code.C", "AutoModel": "code.M"}
    edit(tmp_path, model_type="other", auto_map=auto)
    asked = []
    # A user who says yes to every question.
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    refusal(tmp_path, "text")
    assert not asked and not (tmp_path / "ran").exists()
