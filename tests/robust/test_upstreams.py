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

GROUP_NORM = {"feat_extract_norm": "group"}
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
        config = TINY_CNN | {"num_feat_extract_layers": 2} | LAYER_NORM | dict(config)
    preprocessor.save_pretrained(folder)
    config = TINY | {"num_hidden_layers": 2} | config
    config = getattr(transformers, f"{kind}Config")(**config)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with two encoders in it: WavLM and Bert."""
    folder = tmp_path_factory.mktemp("encoders")
    for kind in ("WavLM", "Bert"):
        write(folder / kind, kind)
    return folder


# --- Encoders that run ----------------------------------------------------------------

LEFT = {"padding_side": "left", "truncation_side": "left", "model_max_length": 2}


@pytest.mark.parametrize(
    "kind, config, settings",
    [
        ("Hubert", {}, {}),
        ("Wav2Vec2", GROUP_NORM, {"padding_side": "left"}),
        ("UniSpeechSat", {}, {"return_attention_mask": False}),
        ("Bert", {"max_position_embeddings": 64}, LEFT),
        ("Roberta", {"max_position_embeddings": 130}, {}),
        ("Electra", {"max_position_embeddings": 600}, {}),
    ],
)
def test_a_known_kind_gives_the_states_of_the_library(kind, config, settings, tmp_path):
    """Each input alone through the library, against our batch of unlike lengths."""
    write(tmp_path, kind, config, settings)
    upstream = load_upstream(str(tmp_path), modality_of(kind), "fp32")
    assert upstream.one_by_one == (config == GROUP_NORM)
    if upstream.modality == "audio":
        g = torch.Generator().manual_seed(8)
        raw = [torch.randn(n, generator=g) for n in (2500, 9000, 4000)]
        normalised = [(x - x.mean()) / x.std(correction=0) for x in raw]
        inputs = [{"input_values": x.unsqueeze(0)} for x in normalised]
    else:
        raw = ["sad", "i know that you am happy and so sad", "happy or not"]
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
def test_the_older_formats_of_the_hub_load_whole(kind, new_name, whole, tmp_path):
    folder = shutil.copytree(whole / kind, tmp_path / kind)
    rename(folder, new_name)
    loaded = load_upstream(str(folder), modality_of(kind), "fp32").model.state_dict()
    for name, weights in load_file(whole / kind / "model.safetensors").items():
        assert "pooler" in name or torch.equal(loaded[name], weights), name


# --- Encoders that are refused --------------------------------------------------------


def edit(folder, changes, file="config.json"):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(folder, part):
    rename(folder, lambda name: "" if part in name else name)


def delete(folder, file):
    (folder / file).unlink()


def tear(folder, file):
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])


def bring_code(folder):
    code = f"open({str(folder / 'ran')!r}, 'w').close()"
    (folder / "code.py").write_text(code)
    auto = {"AutoConfig": "code.C", "AutoModel": "code.M"}
    edit(folder, {"model_type": "other", "auto_map": auto})


EXTRACTOR = "preprocessor_config.json"


@pytest.mark.parametrize(
    "kind, reason, damage, arguments",
    [
        # another kind
        ("Bert", " gpt2", edit, [{"model_type": "gpt2"}]),
        ("Bert", " wav2vec2", edit, [{"model_type": "wav2vec2"}]),
        ("WavLM", " bert", edit, [{"model_type": "bert"}]),
        ("WavLM", " 8000 ", edit, [{"sampling_rate": 8000}, EXTRACTOR]),
        ("Bert", " 14 rows", write, ["Bert", {"vocab_size": 14}]),
        ("Bert", " 60 rows", write, ["Bert", {"vocab_size": 60}]),
        ("Bert", "repository", bring_code, []),
        # a part is missing
        ("WavLM", " encoder.layer_norm", drop, ["encoder.layer_norm"]),
        ("WavLM", " encoder.layers.2.", edit, [{"num_hidden_layers": 3}]),
        ("WavLM", "feature extractor", delete, [EXTRACTOR]),
        ("Bert", " embeddings.LayerNorm", drop, ["embeddings.LayerNorm"]),
        ("Bert", "model.safetensors", delete, ["model.safetensors"]),
        ("Bert", "tokenizer", delete, ["tokenizer.json"]),
        ("Bert", "Unrecognized model", delete, ["config.json"]),
        # a file is damaged
        ("WavLM", "not a valid JSON", tear, ["config.json"]),
        ("Bert", "", tear, ["model.safetensors"]),
        ("Bert", "", edit, [{"hidden_size": 96}]),
    ],
)
def test_it_is_refused_in_one_sentence(
    kind, reason, damage, arguments, whole, tmp_path, monkeypatch
):
    # A user who says yes to every question, for example whether to run code.
    monkeypatch.setattr("builtins.input", lambda *text: "y")
    folder = shutil.copytree(whole / kind, tmp_path / kind)
    damage(folder, *arguments)
    assert reason in refusal(folder, modality_of(kind))
    assert not (folder / "ran").exists()


def refusal(name, modality):
    """Return the sentence that a user sees instead of a traceback."""
    with pytest.raises(InputError) as error:
        load_upstream(str(name), modality, "fp32")
    sentence = str(error.value)
    flag = {"audio": "--wavlm", "text": "--bert"}[modality]
    assert flag in sentence and str(name) in sentence and "\n" not in sentence
    return sentence


def test_what_is_no_folder_and_no_name_on_the_hub_is_refused(tmp_path, monkeypatch):
    # Offline, so that the library does not try for 23 seconds.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refusal("nobody/no-such-model-anywhere", "audio")
    refusal(tmp_path / "nowhere", "audio")


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
