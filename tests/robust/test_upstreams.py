"""Encoders as users may give them: which run, and which are refused in one sentence.

Each is a tiny folder with random weights, written as the hub stores them.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

from data import InputError
from evaluate import load_upstream
from model import TINY, TINY_CNN, Upstream

SIZE = TINY | {"num_hidden_layers": 2}
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
GROUP_NORM = {"feat_extract_norm": "group"}
WORDS = "you know that i am so happy and are not sad or angry yes".split()
ENTRIES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
BYTES = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "<mask>",
    *sorted(bytes_to_unicode().values()),
]


def write(folder, kind, settings=(), config=()):
    """Write an encoder with its tokenizer, or with its feature extractor."""
    torch.manual_seed(0)
    settings = dict(settings)
    config = dict(config)
    if kind in ("Roberta", "GPT2"):
        numbers = {entry: i for i, entry in enumerate(BYTES)}
        tokenizer = getattr(transformers, f"{kind}Tokenizer")(vocab=numbers, merges=[])
        config = {"vocab_size": len(numbers), "pad_token_id": 1} | config
    elif kind in ("Bert", "Electra"):
        numbers = {entry: i for i, entry in enumerate(ENTRIES)}
        tokenizer = transformers.BertTokenizer(vocab=numbers, **settings)
        config = {"vocab_size": len(numbers)} | config
    else:
        settings = {"return_attention_mask": True} | settings
        tokenizer = transformers.Wav2Vec2FeatureExtractor(**settings)
        config = TINY_CNN | {"num_feat_extract_layers": 2} | LAYER_NORM | config
    tokenizer.save_pretrained(folder)
    config = getattr(transformers, f"{kind}Config")(**(SIZE | config))
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)


def edit(folder, changes, file="config.json"):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_weights(folder, rename, file="model.safetensors"):
    """Save the weights under other names, and leave out those that get none."""
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

LEFT = {"padding_side": "left", "truncation_side": "left"}


@pytest.mark.parametrize(
    "modality, kind, settings, config",
    [
        ("audio", "WavLM", {}, {}),
        ("audio", "Hubert", {}, {}),
        ("audio", "Hubert", {}, GROUP_NORM),
        ("audio", "Wav2Vec2", {"padding_side": "left"}, {}),
        ("audio", "Wav2Vec2", {}, GROUP_NORM),
        ("audio", "UniSpeechSat", {"return_attention_mask": False}, {}),
        ("text", "Bert", {}, {}),
        ("text", "Bert", LEFT, {"max_position_embeddings": 64}),
        ("text", "Roberta", {}, {"max_position_embeddings": 130}),
        ("text", "Electra", {}, {"max_position_embeddings": 600}),
    ],
)
def test_a_known_kind_gives_the_states_of_the_library(
    modality, kind, settings, config, tmp_path
):
    write(tmp_path, kind, settings, config)
    upstream = load_upstream(str(tmp_path), modality, "fp32")
    assert upstream.one_by_one == (config == GROUP_NORM)
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
        # RoBERTa does not use its first two positions. The beginning of a text stays.
        longest = {"Bert": 64 if settings else 512, "Roberta": 128, "Electra": 512}
        tokens = upstream.prepare("sad " + "you know " * 600)
        assert len(tokens) == longest[kind] == upstream.max_tokens
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
        ("text", "Bert", lambda n: "" if "pooler" in n else n, "model.safetensors"),
        ("audio", "WavLM", old_wavlm, "pytorch_model.bin"),
        ("audio", "Wav2Vec2", lambda n: f"wav2vec2.{n}", "model.safetensors"),  # CTC
    ],
)
def test_other_formats_of_the_hub_load_whole(modality, kind, rename, file, tmp_path):
    write(tmp_path, kind)
    before = load_file(tmp_path / "model.safetensors")
    rename_weights(tmp_path, rename, file)
    after = Upstream(str(tmp_path), modality).model.state_dict()
    for name, weights in before.items():
        if rename(name):
            assert torch.equal(after[name], weights), name


# --- Encoders that are refused --------------------------------------------------------


def delete(folder, file):
    (folder / file).unlink()


def tear(folder, file, size=3000):
    if file.endswith(".bin"):
        rename_weights(folder, old_bert, file)
    (folder / file).write_bytes((folder / file).read_bytes()[:size])


def bring_code(folder):
    code = f"open({str(folder / 'ran')!r}, 'w').close()"
    (folder / "code.py").write_text(code)
    auto = {"AutoConfig": "code.C", "AutoModel": "code.M"}
    edit(folder, {"model_type": "other", "auto_map": auto})


EXTRACTOR = "preprocessor_config.json"


@pytest.mark.parametrize(
    "modality, kind, reason, damage",
    [
        # another kind
        ("text", "GPT2", " gpt2", []),
        ("text", "Wav2Vec2", " wav2vec2", []),
        ("audio", "Bert", " bert", []),
        ("audio", "Wav2Vec2Conformer", " wav2vec2-conformer", []),
        ("audio", "Data2VecAudio", " data2vec-audio", []),
        ("audio", "WavLM", " 8000 ", [edit, {"sampling_rate": 8000}, EXTRACTOR]),
        ("text", "Bert", " 15 rows", [write, "Bert", {}, {"vocab_size": 15}]),
        ("text", "Bert", " 60 rows", [write, "Bert", {}, {"vocab_size": 60}]),
        ("text", "Bert", "repository", [bring_code]),
        # a part is missing
        ("audio", "WavLM", " encoder.layers.1.", [drop, "1.attention.k"]),
        ("audio", "WavLM", " encoder.layer_norm", [drop, "encoder.layer_norm"]),
        ("audio", "WavLM", " encoder.pos_conv", [drop, "weight.original0"]),
        ("audio", "WavLM", " feature_projection", [drop, "projection.projection"]),
        ("audio", "WavLM", " encoder.layers.2.", [edit, {"num_hidden_layers": 3}]),
        ("audio", "WavLM", "feature extractor", [delete, EXTRACTOR]),
        ("audio", "WavLM", "model.safetensors", [delete, "model.safetensors"]),
        ("text", "Bert", " encoder.layer.1.", [drop, "1.attention.self.key"]),
        ("text", "Bert", " embeddings.LayerNorm", [drop, "embeddings.LayerNorm"]),
        ("text", "Bert", "tokenizer", [delete, "tokenizer.json"]),
        ("text", "Bert", "Unrecognized model", [delete, "config.json"]),
        # a file is damaged
        ("audio", "WavLM", "not a valid JSON", [tear, "config.json", 100]),
        ("text", "Bert", "", [tear, "model.safetensors"]),
        ("text", "Bert", "", [tear, "pytorch_model.bin"]),
        ("text", "Bert", "", [edit, {"hidden_size": 96}]),
    ],
)
def test_it_is_refused_in_one_sentence(
    modality, kind, reason, damage, tmp_path, monkeypatch
):
    # A user who says yes to every question, for example whether to run code.
    monkeypatch.setattr("builtins.input", lambda *text: "y")
    write(tmp_path, kind)
    if damage:
        function, *arguments = damage
        function(tmp_path, *arguments)
    assert reason in refusal(tmp_path, modality)
    assert not (tmp_path / "ran").exists()


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
