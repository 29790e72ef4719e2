"""Encoders as users may give them: which run, and which are refused in one sentence.

Each is a tiny folder with random weights, written as the hub stores them.
"""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

import data
from data import InputError
from evaluate import load_upstream
from model import TINY, TINY_CNN

# Without these settings, the CNN of an audio encoder has a group norm.
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] you know that i am so happy or not sad"
NUMBERS = {entry: i for i, entry in enumerate(VOCABULARY.split())}


def modality_of(kind):
    return "text" if kind in ("Bert", "Roberta", "Electra") else "audio"


def write(folder, kind, config=(), settings=()):
    """Write an encoder with its tokenizer, or with its feature extractor."""
    torch.manual_seed(0)
    if modality_of(kind) == "text":
        settings = {"vocab": NUMBERS} | dict(settings)
        preprocessor = transformers.BertTokenizer(**settings)
        config = {"vocab_size": len(NUMBERS)} | dict(config)
    else:
        settings = {"return_attention_mask": True} | dict(settings)
        preprocessor = transformers.Wav2Vec2FeatureExtractor(**settings)
        config = TINY_CNN | dict(config)
    preprocessor.save_pretrained(folder)
    config = TINY | {"num_hidden_layers": 2} | config
    config = getattr(transformers, f"{kind}Config")(**config)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)


def load(name, kind):
    return load_upstream(str(name), modality_of(kind), "fp32")


# --- Encoders that run ----------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, config, settings",
    [
        ("Hubert", LAYER_NORM, {}),
        ("Wav2Vec2", {}, {"padding_side": "left"}),
        ("UniSpeechSat", LAYER_NORM, {"return_attention_mask": False}),
        ("Bert", {"max_position_embeddings": 64}, {"truncation_side": "left"}),
        ("Roberta", {"max_position_embeddings": 130}, {}),
        ("Electra", {"max_position_embeddings": 600}, {}),
    ],
)
def test_a_known_kind_gives_the_states_of_the_library(kind, config, settings, tmp_path):
    """Each input alone through the library, against our batch of unlike lengths."""
    write(tmp_path, kind, config, settings)
    upstream = load(tmp_path, kind)
    assert upstream.one_by_one == (kind == "Wav2Vec2")
    if upstream.modality == "audio":
        g = torch.Generator().manual_seed(8)
        raw = [torch.randn(n, generator=g) for n in (2500, 9000, 4000)]
        normalised = [(x - x.mean()) / x.std(correction=0) for x in raw]
        inputs = [{"input_values": x.unsqueeze(0)} for x in normalised]
    else:
        raw = ["sad", "i know that you am happy or so sad", "happy or not"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        inputs = [tokenizer(x, return_tensors="pt") for x in raw]
        # RoBERTa does not use its first two positions. The beginning of a text stays,
        # and a cap in the configuration of the tokenizer does not matter.
        longest = {"Bert": 64, "Roberta": 128, "Electra": 512}[kind]
        tokens = upstream.prepare("sad " + "you know " * 600)
        assert len(tokens) == longest and tokens[1] == NUMBERS["sad"]
        assert len(upstream([tokens])[0]) == longest
    library = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        states = upstream([upstream.prepare(x) for x in raw])
        for ours, one in zip(states, inputs, strict=True):
            output = library(**one, output_hidden_states=True)
            layers = (*output.hidden_states[:-1], output.last_hidden_state)
            expected = torch.stack(layers, dim=2)[0]
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)


def pickle(folder, weights):
    """Store other weights, in the older format of the hub."""
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


# bert-base-uncased has old names for its norms, and wavlm-large for its weight norm.
OLD_NAMES = {
    "LayerNorm.weight": "LayerNorm.gamma",
    "LayerNorm.bias": "LayerNorm.beta",
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


@pytest.mark.parametrize("kind, prefix", [("Bert", "bert."), ("WavLM", "")])
def test_the_older_formats_of_the_hub_load_whole(kind, prefix, tmp_path):
    write(tmp_path, kind)
    expected = load_file(tmp_path / "model.safetensors")
    old_weights = {}
    for name, weights in expected.items():
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        if "pooler" not in name:
            old_weights[prefix + name] = weights
    pickle(tmp_path, old_weights)
    loaded = load(tmp_path, kind).model.state_dict()
    for name, weights in expected.items():
        assert "pooler" in name or torch.equal(loaded[name], weights), name


# --- Encoders that are refused --------------------------------------------------------


def edit(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(folder, part):
    weights = load_file(folder / "model.safetensors")
    pickle(folder, {name: x for name, x in weights.items() if part not in name})


def bring_code(folder):
    code = f"open({str(folder / 'ran')!r}, 'w').close()"
    (folder / "code.py").write_text(code)
    auto = {"AutoConfig": "code.C", "AutoModel": "code.M"}
    edit(folder, model_type="other", auto_map=auto)


EXTRACTOR = "preprocessor_config.json"


@pytest.mark.parametrize(
    "kind, reason, damage",
    [
        # another kind
        ("WavLM", " bert", lambda f: edit(f, model_type="bert")),
        ("WavLM", " 8000 ", lambda f: edit(f, EXTRACTOR, sampling_rate=8000)),
        ("Bert", " 14 rows", lambda f: write(f, "Bert", {"vocab_size": 14})),
        ("Bert", " 60 rows", lambda f: write(f, "Bert", {"vocab_size": 60})),
        ("Bert", "repository", bring_code),
        # a part is missing
        ("WavLM", " encoder.layer_norm", lambda f: drop(f, "encoder.layer_norm")),
        ("Bert", " embeddings.word_emb", lambda f: drop(f, "word_embeddings")),
        ("WavLM", "feature extractor", lambda f: (f / EXTRACTOR).unlink()),
        ("Bert", "model.safetensors", lambda f: (f / "model.safetensors").unlink()),
        ("Bert", "tokenizer", lambda f: (f / "tokenizer.json").unlink()),
        ("Bert", "Unrecognized model", lambda f: (f / "config.json").unlink()),
        ("Bert", "", shutil.rmtree),
        # a file is damaged
        ("WavLM", "not a valid JSON", lambda f: (f / "config.json").write_text("{")),
        ("Bert", "", lambda f: (f / "model.safetensors").write_bytes(b"x" * 3000)),
        ("Bert", "", lambda f: edit(f, hidden_size=96)),
    ],
)
def test_it_is_refused_in_one_sentence(kind, reason, damage, tmp_path, monkeypatch):
    # A user who says yes to every question, for example whether to run code.
    monkeypatch.setattr("builtins.input", lambda *text: "y")
    write(tmp_path / "it", kind)
    damage(tmp_path / "it")
    assert_refused(tmp_path / "it", kind, reason)
    assert not (tmp_path / "it" / "ran").exists()


def assert_refused(name, kind, reason):
    with pytest.raises(InputError) as error:
        load(name, kind)
    sentence = str(error.value)
    assert "\n" not in sentence and "--wavlm or --bert" in sentence
    assert str(name) in sentence and reason in sentence


def test_what_is_not_on_the_hub_is_refused(monkeypatch):
    # Offline, so that the library does not try for 23 seconds.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused("nobody/no-such-model-anywhere", "WavLM", "")


def test_a_few_unknown_words_give_a_warning(tiny, capsys):
    """A text has eight tokens with [CLS] and [SEP]. The tiny BERT knows no Chinese."""
    for text, warned in (("a a a a a a", False), ("a a a a 难 难", True)):
        corpus = [data.Utterance("d_1", 1, "d", "x", 0.0, 0.0, text, "sad", None)]
        data.prepare(tiny["text"], corpus, 1)
        assert ("warning: " in capsys.readouterr().out) == warned
