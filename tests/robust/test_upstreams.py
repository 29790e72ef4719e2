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


def load(folder, kind):
    return load_upstream(str(folder), modality_of(kind), "fp32")


# --- Encoders that run ----------------------------------------------------------------

LEFT = {"padding_side": "left", "truncation_side": "left", "model_max_length": 2}


@pytest.mark.parametrize(
    "kind, config, settings",
    [
        ("Hubert", LAYER_NORM, {}),
        ("Wav2Vec2", {}, {"padding_side": "left"}),
        ("UniSpeechSat", LAYER_NORM, {"return_attention_mask": False}),
        ("Bert", {"max_position_embeddings": 64}, LEFT),
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


def rename(folder, new_name):
    """Save the weights under other names, without those that get none, by pickle."""
    old = load_file(folder / "model.safetensors")
    new = {new_name(name): x for name, x in old.items() if new_name(name)}
    assert new.keys() != old.keys()
    (folder / "model.safetensors").unlink()
    torch.save(new, folder / "pytorch_model.bin")


def old_bert(name):
    """bert-base-uncased is part of a larger model, in an old spelling."""
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
    name = name.replace("LayerNorm.bias", "LayerNorm.beta")
    return "" if "pooler" in name else f"bert.{name}"


def old_wavlm(name):
    """wavlm-large has old names for the two parts of its weight norm."""
    name = name.replace("parametrizations.weight.original0", "weight_g")
    return name.replace("parametrizations.weight.original1", "weight_v")


@pytest.mark.parametrize("kind, new_name", [("Bert", old_bert), ("WavLM", old_wavlm)])
def test_the_older_formats_of_the_hub_load_whole(kind, new_name, tmp_path):
    write(tmp_path, kind)
    expected = load_file(tmp_path / "model.safetensors")
    rename(tmp_path, new_name)
    loaded = load(tmp_path, kind).model.state_dict()
    for name, weights in expected.items():
        assert "pooler" in name or torch.equal(loaded[name], weights), name


# --- Encoders that are refused --------------------------------------------------------


def edit(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(folder, part):
    rename(folder, lambda name: "" if part in name else name)


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
        ("Bert", " gpt2", lambda f: edit(f, model_type="gpt2")),
        ("WavLM", " bert", lambda f: edit(f, model_type="bert")),
        ("WavLM", " 8000 ", lambda f: edit(f, EXTRACTOR, sampling_rate=8000)),
        ("Bert", " 14 rows", lambda f: write(f, "Bert", {"vocab_size": 14})),
        ("Bert", " 60 rows", lambda f: write(f, "Bert", {"vocab_size": 60})),
        ("Bert", "repository", bring_code),
        # a part is missing
        ("WavLM", " encoder.layers.2.", lambda f: edit(f, num_hidden_layers=3)),
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
    """A user sees one sentence instead of a traceback."""
    flag = {"audio": "--wavlm", "text": "--bert"}[modality_of(kind)]
    with pytest.raises(InputError) as error:
        load(name, kind)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert str(name) in sentence and reason in sentence and flag in sentence


def test_what_is_not_on_the_hub_is_refused(monkeypatch):
    # Offline, so that the library does not try for 23 seconds.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused("nobody/no-such-model-anywhere", "WavLM", "")


def test_unknown_words_are_measured_on_the_corpus(tiny, capsys):
    """A text has eight tokens with [CLS] and [SEP]. The tiny BERT knows no Chinese."""

    def prepare(unknown):
        text = " ".join(["难"] * unknown + ["a"] * (6 - unknown))
        corpus = [data.Utterance("d_1", 1, "d", "x", 0.0, 0.0, text, "sad", None)]
        data.prepare(tiny["text"], corpus, 1)
        return capsys.readouterr().out

    assert prepare(0) == ""
    assert "warning: " in prepare(2)
    with pytest.raises(InputError, match="75% of all tokens.*--bert"):
        prepare(6)
