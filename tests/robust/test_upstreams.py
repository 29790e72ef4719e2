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

EXTRACTOR = "preprocessor_config.json"


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """copy(modality) copies a tiny encoder into a folder of its own."""
    return lambda modality: shutil.copytree(tiny_folder / modality, tmp_path / "it")


def edit(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save(folder, kind, **config):
    """Write the weights of another encoder into a folder."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(TINY | config))
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)


def pickle(folder, weights):
    """Store other weights, in the older format of the hub."""
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


# --- Encoders that run ----------------------------------------------------------------

# Without these settings, the CNN of an audio encoder has a group norm.
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}


@pytest.mark.parametrize("kind", ["Hubert", "UniSpeechSat", "Wav2Vec2"])
def test_a_known_audio_encoder_gives_the_states_of_the_library(kind, copy):
    """Whatever the extractor's rules for padding are, because we pad ourselves."""
    folder = copy("audio")
    edit(folder, EXTRACTOR, padding_side="left", return_attention_mask=False)
    config = TINY_CNN if kind == "Wav2Vec2" else TINY_CNN | LAYER_NORM
    save(folder, kind, num_hidden_layers=2, **config)
    upstream = load_upstream(str(folder), "audio", "fp32")
    assert upstream.one_by_one == (kind == "Wav2Vec2")
    g = torch.Generator().manual_seed(8)
    raw = [torch.randn(n, generator=g) for n in (2500, 9000, 4000)]
    normalised = [(x - x.mean()) / x.std(correction=0) for x in raw]
    inputs = [{"input_values": x.unsqueeze(0)} for x in normalised]
    assert_states(upstream, raw, inputs)


@pytest.mark.parametrize(
    "kind, positions, longest",
    # RoBERTa does not use its first two positions.
    [("Bert", 64, 64), ("Roberta", 130, 128), ("Electra", 600, 512)],
)
def test_a_known_text_encoder_gives_the_states_of_the_library(
    kind, positions, longest, copy, tiny
):
    """The beginning of a text stays, whatever the tokenizer's rules are."""
    folder = copy("text")
    rules = {"padding_side": "left", "truncation_side": "left", "model_max_length": 2}
    edit(folder, "tokenizer_config.json", **rules)
    config = {"vocab_size": tiny["text"].model.config.vocab_size}
    config["max_position_embeddings"] = positions
    save(folder, kind, num_hidden_layers=2, **config)
    upstream = load_upstream(str(folder), "text", "fp32")
    raw = ["hate", "i hate all and lovely party again", "lovely party"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert_states(upstream, raw, [tokenizer(x, return_tensors="pt") for x in raw])
    tokens = upstream.prepare("hate " + "so lovely " * 600)
    assert len(tokens) == longest and tokens[1] == upstream.prepare("hate")[1]
    assert len(upstream([tokens])[0]) == longest


@torch.no_grad()
def assert_states(upstream, raw, inputs):
    """Each input alone through the library, against our batch of unlike lengths."""
    library = transformers.AutoModel.from_pretrained(upstream.name).eval()
    states = upstream([upstream.prepare(x) for x in raw])
    for ours, one in zip(states, inputs, strict=True):
        output = library(**one, output_hidden_states=True)
        layers = (*output.hidden_states[:-1], output.last_hidden_state)
        expected = torch.stack(layers, dim=2)[0]
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)


# bert-base-uncased has old names for its norms, and wavlm-large for its weight norm.
OLD_NAMES = {
    "LayerNorm.weight": "LayerNorm.gamma",
    "LayerNorm.bias": "LayerNorm.beta",
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


@pytest.mark.parametrize("modality, prefix", [("text", "bert."), ("audio", "")])
def test_the_older_formats_of_the_hub_load_whole(modality, prefix, copy, tiny):
    folder = copy(modality)
    old_weights = {}
    for name, weights in load_file(folder / "model.safetensors").items():
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        if "pooler" not in name:
            old_weights[prefix + name] = weights
    pickle(folder, old_weights)
    loaded = load_upstream(str(folder), modality, "fp32").model.state_dict()
    for name, weights in tiny[modality].model.state_dict().items():
        assert "pooler" in name or torch.equal(loaded[name], weights), name


# --- Encoders that are refused --------------------------------------------------------


def drop(folder, part):
    weights = load_file(folder / "model.safetensors")
    pickle(folder, {name: x for name, x in weights.items() if part not in name})


def bring_code(folder):
    code = f"open({str(folder / 'ran')!r}, 'w').close()"
    (folder / "code.py").write_text(code)
    auto = {"AutoConfig": "code.C", "AutoModel": "code.M"}
    edit(folder, model_type="other", auto_map=auto)


@pytest.mark.parametrize(
    "modality, reason, damage",
    [
        # another kind
        ("audio", " bert", lambda f: edit(f, model_type="bert")),
        ("audio", " 8000 ", lambda f: edit(f, EXTRACTOR, sampling_rate=8000)),
        ("text", " 60 rows", lambda f: save(f, "Bert", vocab_size=60)),
        ("text", " 160 rows", lambda f: save(f, "Bert", vocab_size=160)),
        ("text", "repository", bring_code),
        # a part is missing
        ("audio", " encoder.layer_norm", lambda f: drop(f, "encoder.layer_norm")),
        ("text", " embeddings.word_emb", lambda f: drop(f, "word_embeddings")),
        ("audio", "feature extractor", lambda f: (f / EXTRACTOR).unlink()),
        ("text", "model.safetensors", lambda f: (f / "model.safetensors").unlink()),
        ("text", "tokenizer", lambda f: (f / "tokenizer.json").unlink()),
        ("text", "Unrecognized model", lambda f: (f / "config.json").unlink()),
        ("text", "", shutil.rmtree),
        # a file is damaged
        ("audio", "not a valid JSON", lambda f: (f / "config.json").write_text("{")),
        ("text", "", lambda f: (f / "model.safetensors").write_bytes(b"x" * 3000)),
        ("text", "", lambda f: edit(f, hidden_size=96)),
    ],
)
def test_it_is_refused_in_one_sentence(modality, reason, damage, copy, monkeypatch):
    # A user who says yes to every question, for example whether to run code.
    monkeypatch.setattr("builtins.input", lambda *text: "y")
    folder = copy(modality)
    damage(folder)
    assert_refused(str(folder), modality, reason)
    assert not (folder / "ran").exists()


def assert_refused(name, modality, reason):
    with pytest.raises(InputError) as error:
        load_upstream(name, modality, "fp32")
    sentence = str(error.value)
    assert "\n" not in sentence and "--wavlm or --bert" in sentence
    assert name in sentence and reason in sentence


def test_what_is_not_on_the_hub_is_refused(monkeypatch):
    # Offline, so that the library does not try for 23 seconds.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused("nobody/no-such-model-anywhere", "audio", "")


def test_a_few_unknown_words_give_a_warning(tiny, capsys):
    """A text has eight tokens with [CLS] and [SEP]. The tiny BERT knows no Chinese."""
    for text, warned in (("a a a a a a", False), ("a a a a 难 难", True)):
        corpus = [data.Utterance("d_1", 1, "d", "x", 0.0, 0.0, text, "sad", None)]
        data.prepare(tiny["text"], corpus, 1)
        assert ("warning: " in capsys.readouterr().out) == warned


@pytest.mark.parametrize(
    ("text", "unknown"), [("难过得很很难", 0.75), ("i hate 难", 0.2), ("i hate it", 0)]
)
def test_texts_that_the_encoder_cannot_read(text, unknown, tiny, capsys):
    """[CLS] and [SEP] count too. Above one half is an error, above a tenth a line."""
    corpus = [data.Utterance("u", 1, "d", "s", 0, 0, text, "neu", None)]
    message = f"does not know {unknown:.0%} of all tokens"
    if unknown > 0.5:
        with pytest.raises(InputError, match=f"{message}. Give --bert an encoder"):
            data.prepare(tiny["text"], corpus, 9)
    else:
        data.prepare(tiny["text"], corpus, 9)
        assert (message in capsys.readouterr().out) == (unknown > 0.1)
