"""model.py against numbers by hand, naive loops, PyTorch's blocks, and transformers."""

import copy
import json
import math
import re
import shutil
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import model
from model import FUSIONS, Config, EmotionRecognizer, Upstream

MODALITIES = ["audio", "text"]
close = torch.testing.assert_close


def small(fusion, **changes):
    """A recognizer on upstreams of 3 layers and 8 features, with windows of 3 texts."""
    torch.manual_seed(0)
    return EmotionRecognizer(Config(fusion, 3, 8, 3, 8, n_context=3, **changes)).eval()


def batch():
    """Four clips, and four windows: complete, without its first, and its last text."""
    g = torch.Generator().manual_seed(1)
    audio_mask = torch.arange(6) < torch.tensor([6, 3, 2, 4]).unsqueeze(-1)
    lengths = torch.tensor([[3, 4, 1], [0, 5, 2], [2, 2, 0], [1, 3, 3]])
    text_mask = torch.arange(5) < lengths.unsqueeze(-1)
    audio = torch.randn(int(audio_mask.sum()), 3, 8, generator=g)
    text = torch.randn(int(text_mask.sum()), 3, 8, generator=g)
    return (audio, audio_mask), (text, text_mask)


# --- Equations ------------------------------------------------------------------------


def test_masked_mean_is_the_mean_of_the_real_steps():
    """Without a real step it is zero, and NaN in the padding reaches no gradient."""
    torch.manual_seed(0)
    x, mask = torch.randn(5, 7, 3), torch.rand(5, 7) > 0.4
    mask[2] = False
    x[~mask] = math.nan
    x.requires_grad_()
    out = model.masked_mean(x, mask)
    for b in range(5):
        real = [x[b, t] for t in range(7) if mask[b, t]]
        close(out[b], sum(real) / len(real) if real else torch.zeros(3))
    out.sum().backward()
    assert x.grad.isfinite().all() and not x.grad[2].any()


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_equation_1_is_scaled_dot_product_attention(scale):
    """PyTorch's own function is the oracle. An empty source gives zeros."""
    torch.manual_seed(0)
    x_t, x_s = scale * torch.randn(4, 5, 6), scale * torch.randn(4, 7, 8)
    x_s.requires_grad_()
    w_q, w_k, w_v = torch.randn(6, 4), torch.randn(8, 4), torch.randn(8, 9)
    mask = torch.rand(4, 7) > 0.5
    mask[0] = True
    mask[3] = False
    out, weights = model.cross_modal_attention(x_t, x_s, w_q, w_k, w_v, mask)
    q, k, v = (x_t @ w_q)[:3], (x_s @ w_k)[:3], (x_s @ w_v)[:3]
    close(out[:3], F.scaled_dot_product_attention(q, k, v, mask[:3].unsqueeze(1)))
    close(weights[:3].sum(dim=-1), torch.ones(3, 5))
    out.sum().backward()
    assert not out[3].any() and not weights[3].any() and not x_s.grad[3].any()


# --- Feature extractors ---------------------------------------------------------------


def test_squeeze_and_excitation_against_loops():
    """A gate is sigmoid(W_2 relu(W_1 z + b_1) + b_2), with z over the real steps."""
    torch.manual_seed(1)
    mask = torch.rand(3, 6) > 0.4
    mask[0] = False  # a missing text
    states = torch.randn(int(mask.sum()), 4, 5)
    se = model.SqueezeExcitation(4)
    nn.init.constant_(se.reduce.bias, -0.1)  # one hidden unit is below zero
    gates = se(states, mask)
    steps_of = mask.nonzero()[:, 0].tolist()
    w_1, w_2 = se.reduce.weight[0].tolist(), se.expand.weight[:, 0].tolist()
    for i in range(3):
        own = [states[n].tolist() for n, owner in enumerate(steps_of) if owner == i]
        hidden = se.reduce.bias.item()
        for layer in range(4):
            numbers = [x for step in own for x in step[layer]]
            hidden += w_1[layer] * sum(numbers) / max(len(numbers), 1)
        for layer in range(4):
            logit = w_2[layer] * max(hidden, 0.0) + se.expand.bias[layer].item()
            assert abs(gates[i, layer].item() - 1 / (1 + math.exp(-logit))) < 1e-5


def test_the_relu_of_squeeze_and_excitation_starts_alive():
    """[D2]: its bias starts at 1, so the first gradient is not zero for any seed."""
    states, mask = 0.1 * torch.randn(80, 25, 16), torch.ones(8, 10, dtype=torch.bool)
    for seed in range(20):
        torch.manual_seed(seed)
        se = model.SqueezeExcitation(25)
        se(states, mask).sum().backward()
        assert se.reduce.weight.grad.any()


def test_the_feature_extractor_scales_each_layer_by_its_gate_and_sums():
    """[A1], [A3]: then come one matrix and a LayerNorm, which is 1 and 0 at first."""
    torch.manual_seed(3)
    mask = torch.rand(3, 6) > 0.4
    mask[1] = False
    states = torch.randn(int(mask.sum()), 4, 5).half()  # as in the cache [D1]
    extractor = model.FeatureExtractor(4, 5, 16)
    out = extractor(states, mask)
    gates = extractor.se(states.float(), mask)
    for n, (b, t) in enumerate(mask.nonzero().tolist()):
        total = sum(gates[b, layer] * states[n, layer].float() for layer in range(4))
        y = extractor.linear.weight @ total + extractor.linear.bias
        y = (y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt()
        close(out[b, t], y, atol=1e-5, rtol=1e-4)
    assert not out[~mask].any()


def test_the_context_convolution_against_loops():
    """[A4], [A5], [A6]: nine maps are the channels, a missing neighbour is zeros."""
    torch.manual_seed(2)
    mask = torch.rand(2, 9, 5) > 0.3
    mask[0, :3] = False  # missing neighbours
    states = torch.randn(int(mask.sum()), 3, 4)
    extractor = model.TextFeatureExtractor(3, 4, 16, n_context=9)
    out, out_mask = extractor(states, mask)
    assert torch.equal(out_mask, mask.any(dim=1))
    maps = torch.zeros(2, 9, 5, 16)
    owner = mask.flatten(0, 1).nonzero()[:, 0]
    for i in owner.unique().tolist():  # each text alone
        b, c = divmod(i, 9)
        maps[b, c] = extractor.each_text(states[owner == i], mask[b, c].unsqueeze(0))[0]
    w, bias = extractor.conv.weight[0], extractor.conv.bias
    padded = F.pad(maps, (1, 1, 1, 1))
    for b in range(2):
        for t in range(5):
            for f in range(16):
                expected = bias[0] + (w * padded[b, :, t : t + 3, f : f + 3]).sum()
                close(out[b, t, f], expected, atol=1e-4, rtol=1e-4)


# --- Transformer blocks and fusion ----------------------------------------------------


class Kept(nn.Module):
    """In the place of a dropout, it does what that does to a number that it keeps."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x / (1 - self.p)


# Fig. 3 and Table 1 once more: (target, source, vanilla) of each path. CMT(T->A) takes
# its queries from the audio, and its keys and values from the text.
PATHS = {
    "audio-fc": [("audio", None, None)],
    "audio-te": [("audio", "audio", True)],
    "text-fc": [("text", None, None)],
    "text-te": [("text", "text", True)],
    "cmt-a2t": [("text", "audio", False)],
    "cmt-t2a": [("audio", "text", False)],
}
PATHS["ef"] = PATHS["audio-fc"] + PATHS["text-fc"]
PATHS["lf"] = PATHS["audio-te"] + PATHS["text-te"]
PATHS["mmt"] = PATHS["cmt-a2t"] + PATHS["cmt-t2a"]


@pytest.mark.parametrize("cma_residual", [True, False])
@pytest.mark.parametrize("fusion", PATHS)
def test_a_system_by_hand_with_its_residuals_and_dropouts(fusion, cma_residual):
    """[A7]: a block adds its target if it is a vanilla one, CMT only with the flag.

    [A8]: a block is post-norm with a ReLU, and a dropout of 0.1 behind both its parts.
    [A16]: a dropout of 0.5 is between the boxes of Fig. 1: before the fusion, and
    behind it where there is one, so in CMT(A->T) and CMT(T->A) alone too.
    """
    assert list(FUSIONS) == list(PATHS) and not Config().cma_residual
    recognizer = small(fusion, cma_residual=cma_residual)
    for module in list(recognizer.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, Kept(child.p))
    received = []
    recognizer.classifier.register_forward_pre_hook(lambda _, x: received.extend(x))
    logits = recognizer(*batch())

    x, mask = recognizer.features(*batch())
    averages = []
    for target, source, vanilla in PATHS[fusion]:
        out = x[target] / 0.5
        if source:
            block = recognizer.fusion.blocks[f"{source}-to-{target}"]
            out, _ = block.attend(out, x[source] / 0.5, mask[source])
            out = out / 0.9
            if vanilla or cma_residual:
                out = out + x[target] / 0.5
            out = block.norm1(out)
            first, _, last = block.feed_forward
            hidden = first(out).clamp(min=0)
            out = block.norm2(out + last(hidden) / 0.9)
        real = mask[target].unsqueeze(-1)
        averages.append((out * real).sum(dim=1) / real.sum(dim=1))
    fused = torch.cat(averages, dim=1)
    if fusion in ("cmt-a2t", "cmt-t2a", "ef", "lf", "mmt"):
        message = f"{fusion}: there should be a dropout behind the fusion"
        fused = fused / 0.5
    else:
        message = f"{fusion} has no fusion, so no dropout should stand behind it"
    for scale in (0.5, 2.0):
        off = torch.allclose(received[0], scale * fused, atol=1e-5, rtol=1e-4)
        assert not off, message
    close(received[0], fused, atol=1e-5, rtol=1e-4)
    first, _, last = recognizer.classifier  # §2.3: an MLP
    close(logits, last(first(fused).clamp(min=0)), atol=1e-5, rtol=1e-4)


# --- The whole recognizer -------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_reach_every_parameter_and_every_step_of_what_is_used(fusion):
    """The first loss is near chance. An input that a system does not use may be absent.

    A tensor that is made without a device lands on "meta" here, and fits no other.
    """
    recognizer = small(fusion)
    given = dict(zip(MODALITIES, batch(), strict=True))
    for states, _ in given.values():
        states.requires_grad_()
    with torch.device("meta"):
        logits = recognizer(**given)
    labels = torch.tensor([0, 1, 2, 3])
    assert abs(F.cross_entropy(logits, labels).item() - math.log(4)) < 0.3
    (logits * torch.randn(4, 4)).sum().backward()
    assert all(p.grad.any() for p in recognizer.parameters())
    used = {m: given[m] for m in recognizer.config.modalities}
    for modality, (states, _) in given.items():
        if modality in used:
            assert states.grad.flatten(1).any(dim=1).all()
        else:
            assert states.grad is None
    assert torch.equal(recognizer(**used), logits)


def test_python_model_py_prints_every_block_at_full_size(capsys, monkeypatch):
    """The counts of WavLM-Large and BERT-base, and of what §2.4 opens in them."""
    monkeypatch.setattr(sys, "argv", ["model.py"])
    model.main()
    printed = capsys.readouterr().out
    for title, shape, parameters in [
        ("WavLM-Large", "", 315_453_120),
        ("", "", 4_206_592),  # its CNN encoder
        ("BERT-base", "", 109_482_240),
        ("", "", 23_837_184),  # its input embeddings
        ("extractor.audio", "(2, 249, 16)", 76 + 16_432),
        ("audio-to-text", "(2, 20, 16)", 2_960),
        ("EmotionRecognizer", "(2, 4)", 35_482),
    ]:
        line = f"{re.escape(title)} +{re.escape(shape)} +{parameters:,}$"
        assert re.search(line, printed, re.MULTILINE), line


# --- Upstreams ------------------------------------------------------------------------


RAW = {"text": ["i hate it", "lovely party, so lovely again", "all"], "audio": []}
for n in (3000, 5200, 400):
    noise = torch.randn(n, generator=torch.Generator().manual_seed(n))
    RAW["audio"].append(0.1 * noise + 0.3)


def states_of(upstream):
    return upstream([upstream.prepare(x) for x in RAW[upstream.modality]])


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_layer_state_is_transformers_own(modality, tiny):
    """Each input alone through the library, against our batch of all."""
    import transformers

    upstream = tiny[modality]
    library = transformers.AutoModel.from_pretrained(upstream.name).eval()
    for x, ours in zip(RAW[modality], states_of(upstream), strict=True):
        if modality == "audio":
            normalised = (x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt()
            inputs = {"input_values": normalised.unsqueeze(0)}
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(upstream.name)
            inputs = tokenizer(x, return_tensors="pt")
        output = library(**inputs, output_hidden_states=True)
        # The last state comes after the final LayerNorm.
        layers = [output.hidden_states[0], output.last_hidden_state]
        close(ours, torch.stack(layers, dim=2)[0], atol=1e-4, rtol=1e-4)
    assert (upstream.n_layers, upstream.dim) == ours.shape[1:] == (2, 48)


def test_prepared_inputs_are_normal_waveforms_and_the_first_512_tokens(tiny):
    """Audio has mean 0 and variance 1. A long text keeps its beginning (§3.2)."""
    x = tiny["audio"].prepare(torch.tensor([1.0, 3.0] * 200))
    close(x, torch.tensor([-1.0, 1.0] * 200), atol=1e-5, rtol=0)
    words = tiny["text"].preprocessor.get_vocab()
    tokens = tiny["text"].prepare("hate " * 500 + "lovely " * 100)
    expected = [words["hate"]] * 500 + [words["lovely"]] * 10
    assert tokens.tolist() == [words["[CLS]"], *expected, words["[SEP]"]]
    assert len(tiny["text"]([tokens])[0]) == 512


@pytest.mark.parametrize("what", ["nothing", "bottom", "all"])
@pytest.mark.parametrize("modality", MODALITIES)
def test_open_makes_trainable_what_it_names_and_nothing_else(modality, what, tiny):
    """§2.4: "CNN encoders in WavLM and input embeddings in BERT"."""
    upstream = copy.deepcopy(tiny[modality])
    bottom = {"audio": "feature_extractor.", "text": "embeddings."}[modality]
    prefix = {"nothing": "nothing", "bottom": bottom, "all": ""}[what]
    parameters = dict(upstream.named_parameters())
    expected = {n for n in parameters if n.startswith(f"model.{prefix}")}
    assert not any(p.requires_grad for p in parameters.values())
    opened = upstream.open(what)
    assert {n for n, p in parameters.items() if p.requires_grad} == expected
    assert sorted(map(id, opened)) == sorted(id(parameters[n]) for n in expected)
    states = torch.cat(states_of(upstream))
    assert states.requires_grad == bool(expected)
    if what == "bottom":  # the gradient passes through the whole encoder
        states.square().sum().backward()
        assert all(p.grad.any() for p in opened)


@pytest.mark.parametrize("modality", MODALITIES)
def test_upstreams_stay_in_evaluation_mode_and_bf16_is_near_fp32(modality, tiny):
    """[A12]: their own dropout stays off, whatever the mode of the module around."""
    upstream = nn.Sequential(copy.deepcopy(tiny[modality])).train()[0]
    assert not any(module.training for module in upstream.modules())
    half = Upstream(upstream.name, modality, "bf16")
    for x, y in zip(states_of(upstream), states_of(half), strict=True):
        assert 0 < (x - y.float()).abs().max() < 0.2


def test_the_vector_of_a_tiny_word_depends_on_nothing_but_the_word(tmp_path):
    """So the words of the test session change nothing in training.

    A word with a capital letter is the same word.
    """
    texts = {"1": "i hate it", "2": "i hate it", "3": "it is so, Hate"}
    for name, text in texts.items():
        torch.manual_seed(int(name))
        model.make_tiny_upstreams(tmp_path / name, [text])
    files = [p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*.*")]
    names = {p.name for p in files}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json"}
    for file in files:
        first, second = (tmp_path / name / file for name in "12")
        assert first.read_bytes() == second.read_bytes(), file
    vectors = []
    for name in "13":
        upstream = Upstream(str(tmp_path / name / "text"), "text")
        _, row, _ = upstream.prepare("hate").tolist()
        vectors.append((row, upstream.model.get_input_embeddings().weight[row]))
    assert vectors[0][0] != vectors[1][0]
    close(vectors[0][1], vectors[1][1])


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_checksum_covers_weights_and_configuration(
    modality, tiny, tmp_path, monkeypatch
):
    """Neither the place of the folder nor the version of the library matters."""

    def load_with(**changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(tiny[modality].name, folder)
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        return Upstream(str(folder), modality)

    with monkeypatch.context() as patch:
        patch.setattr("transformers.configuration_utils.__version__", "9.9")
        upstream = load_with()
    assert upstream.checksum == tiny[modality].checksum
    assert re.fullmatch("[0-9a-f]{8}", upstream.checksum)
    # These change what the encoder computes, with the same weights.
    changes = [{"hidden_act": "relu"}, {"layer_norm_eps": 1e-3}]
    changes.append({"max_bucket_distance": 100})
    if modality == "text":
        changes[-1] = {"num_attention_heads": 4}
    others = {load_with(**change).checksum for change in changes}
    for p in upstream.model.parameters():
        p.data.view(-1)[0] += 1e-3
        others.add(upstream.compute_checksum())
    n_parameters = len(list(upstream.model.parameters()))
    assert len(others - {upstream.checksum}) == 3 + n_parameters
