"""model.py against numbers by hand, naive loops, PyTorch's blocks, and transformers.

masked_mean has its numbers in tests/course/checks.py, as all nine exercises have.
"""

import copy
import itertools
import json
import re
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import model
from model import FUSIONS, Config, EmotionRecognizer, Upstream

MODALITIES = ["audio", "text"]
close = torch.testing.assert_close


def random_states(*shape):
    """Make states (N, 4, 5), a mask of this shape, and a list of the states of each.

    The first two utterances have no real step. The states fit into 16 bits.
    """
    torch.manual_seed(1)
    mask = torch.rand(shape) > 0.4
    mask.flatten(0, -2)[:2] = False
    states = torch.randn(int(mask.sum()), 4, 5).half().float()
    return states, mask, states.split(mask.sum(dim=-1).flatten().tolist())


# --- The blocks -----------------------------------------------------------------------


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


def test_fig_2_by_hand():
    """S&E: the gates are sigmoid(W_2 relu(W_1 z + b_1) + b_2), z over the real steps.

    [A1], [A3]: the layers are scaled and summed, then come one matrix and a LayerNorm.
    [A4], [A5], [A6]: nine maps are the channels, a missing neighbour is zeros.
    """
    states, mask, parts = random_states(2, 9, 5)
    fig_2b = model.TextFeatureExtractor(4, 5, 16, n_context=9)
    fig_2a = fig_2b.each_text
    w_1, w_2 = fig_2a.se.reduce.weight[0], fig_2a.se.expand.weight[:, 0]
    nn.init.constant_(fig_2a.se.reduce.bias, 0.1)
    maps = torch.zeros(2 * 9, 5, 16)
    hidden = []
    for text, own in enumerate(parts):
        z = own.sum(dim=(0, 2)) / max(5 * len(own), 1)
        hidden.append((w_1 @ z + 0.1).item())
        gates = 1 / (1 + (-w_2 * max(hidden[-1], 0.0) - fig_2a.se.expand.bias).exp())
        total = sum(gates[layer] * own[:, layer] for layer in range(4))  # (n, D)
        maps[text, mask.flatten(0, 1)[text]] = fig_2a.norm(fig_2a.linear(total))
    assert min(hidden) < 0 < max(hidden), "the ReLU has nothing to do here"
    close(fig_2a(states.half(), mask.flatten(0, 1)), maps)  # 16 bits [D1]

    out, out_mask = fig_2b(states, mask)
    assert torch.equal(out_mask, mask.any(dim=1))
    padded = F.pad(maps.view(2, 9, 5, 16), (1, 1, 1, 1))
    for b, t, f in itertools.product(range(2), range(5), range(16)):
        products = fig_2b.conv.weight[0] * padded[b, :, t : t + 3, f : f + 3]
        expected = products.sum() + fig_2b.conv.bias[0]
        close(out[b, t, f], expected, atol=1e-4, rtol=1e-4)


def test_the_relu_of_squeeze_and_excitation_starts_alive():
    """[D2]: its bias starts at 1, so the first gradient is not zero for any seed."""
    states, mask = 0.1 * torch.randn(80, 25, 16), torch.ones(8, 10, dtype=torch.bool)
    for seed in range(20):
        torch.manual_seed(seed)
        se = model.SqueezeExcitation(25)
        se(states, mask).sum().backward()
        assert se.reduce.weight.grad.any()


# --- The whole recognizer -------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("fusion", "cma_residual"), [*[(name, False) for name in PATHS], ("mmt", True)]
)
def test_a_system_by_hand_with_its_residuals_and_dropouts(
    fusion, cma_residual, monkeypatch
):
    """[A7]: a block adds its target if it is a vanilla one, CMT only with the flag.

    [A8]: a block is post-norm with a ReLU, and a dropout of 0.1 behind both its parts.
    [A16]: a dropout of 0.5 is between the boxes of Fig. 1: before the fusion, and
    behind it where there is one, so in CMT(A->T) and CMT(T->A) alone too.
    """
    assert list(FUSIONS) == list(PATHS) and not Config().cma_residual
    # Every dropout does what it does to a number that it keeps.
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x / (1 - self.p))
    torch.manual_seed(0)
    config = Config(fusion, 4, 5, 4, 5, n_context=3, cma_residual=cma_residual)
    recognizer = EmotionRecognizer(config)
    batch = {"audio": random_states(4, 6)[:2], "text": random_states(4, 3, 5)[:2]}
    batch = {modality: batch[modality] for modality in config.modalities}
    logits = recognizer(**batch)

    x = {m: recognizer.extractor[m](*inputs) for m, inputs in batch.items()}
    mask = {m: inputs[1] for m, inputs in batch.items()}
    if "text" in x:
        x["text"], mask["text"] = x["text"]
    averages = []
    for target, source, vanilla in PATHS[fusion]:
        out = x[target] / 0.5
        if source:
            block = recognizer.fusion.blocks[f"{source}-to-{target}"]
            matrices = block.w_q, block.w_k, block.w_v
            inputs = x[target] / 0.5, x[source] / 0.5, *matrices, mask[source]
            out = model.cross_modal_attention(*inputs)[0] / 0.9
            if vanilla or cma_residual:
                out = out + x[target] / 0.5
            out = block.norm1(out)
            first, _, last = block.feed_forward
            out = block.norm2(out + last(first(out).clamp(min=0)) / 0.9)
        real = mask[target].unsqueeze(-1)
        averages.append((out * real).sum(dim=1) / real.sum(dim=1).clamp(min=1))
    fused = torch.cat(averages, dim=1)
    if fusion in ("cmt-a2t", "cmt-t2a", "ef", "lf", "mmt"):
        fused = fused / 0.5
    first, _, last = recognizer.classifier  # §2.3: an MLP
    expected = last(first(fused).clamp(min=0))
    message = f"{fusion}: its residual connections or dropouts are not those of Fig. 3"
    close(logits, expected, atol=1e-5, rtol=1e-4, msg=message)
    (logits * torch.randn(4, 4)).sum().backward()
    assert all(p.grad.any() for p in recognizer.parameters()), "no gradient"


def test_python_model_py_prints_every_block_at_full_size(capsys):
    """The counts of WavLM-Large and BERT-base, and of what §2.4 opens in them."""
    model.main()
    printed = " ".join(capsys.readouterr().out.split())
    for line in [
        "WavLM-Large 315,453,120 its CNN encoder, which is fine-tuned 4,206,592",
        "BERT-base 109,482,240 its input embeddings, which are fine-tuned 23,837,184",
        "extractor.audio (2, 249, 16) 16,508",
        "fusion.blocks.audio-to-text (2, 20, 16) 2,960",
        "EmotionRecognizer (2, 4) 35,482",
    ]:
        assert line in printed


# --- Upstreams ------------------------------------------------------------------------


RAW = {"text": ["i hate it", "lovely party, so lovely again", "all"]}
RAW["audio"] = [(torch.arange(n) ** 2 / 1e5).sin() + 0.3 for n in (3000, 5200, 400)]


def states_of(upstream):
    return upstream([upstream.prepare(x) for x in RAW[upstream.modality]])


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_layer_state_is_transformers_own(modality, tiny):
    """Each input alone through the library, against our batch of all.

    [A12]: dropout stays off, whatever the mode of the module around. bf16 is near fp32.
    """
    import transformers

    upstream = nn.Sequential(copy.deepcopy(tiny[modality])).train()[0]
    fp32, bf16 = (
        states_of(upstream),
        states_of(Upstream(upstream.name, modality, "bf16")),
    )
    library = transformers.AutoModel.from_pretrained(upstream.name).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny["text"].name)
    for x, ours, rough in zip(RAW[modality], fp32, bf16, strict=True):
        if modality == "audio":
            normalised = (x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt()
            inputs = {"input_values": normalised.unsqueeze(0)}
        else:
            inputs = tokenizer(x, return_tensors="pt")
        output = library(**inputs, output_hidden_states=True)
        # The last state comes after the final LayerNorm.
        layers = [output.hidden_states[0], output.last_hidden_state]
        close(ours, torch.stack(layers, dim=2)[0], atol=1e-4, rtol=1e-4)
        assert 0 < (ours - rough.float()).abs().max() < 0.2
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
    parameters = dict(upstream.model.named_parameters())
    assert not any(p.requires_grad for p in parameters.values())
    opened = upstream.open(what)
    trainable = [name for name, p in parameters.items() if p.requires_grad]
    assert trainable == [name for name in parameters if name.startswith(prefix)]
    assert [*map(id, opened)] == [id(parameters[name]) for name in trainable]
    states = torch.cat(states_of(upstream))
    if what == "bottom":  # the gradient passes through the whole encoder
        states.square().sum().backward()
        assert all(p.grad.any() for p in opened)


def test_the_checksum_covers_weights_and_configuration(tiny, tmp_path, monkeypatch):
    """Neither the place of the folder nor the version of the library matters."""
    folder = shutil.copytree(tiny["audio"].name, tmp_path / "elsewhere")
    monkeypatch.setattr("transformers.configuration_utils.__version__", "9.9")
    upstream = Upstream(str(folder), "audio")
    assert upstream.checksum == tiny["audio"].checksum
    assert re.fullmatch("[0-9a-f]{8}", upstream.checksum)
    others = {upstream.checksum}
    for p in upstream.model.parameters():
        p.data.view(-1)[0] += 1e-3
        others.add(upstream.compute_checksum())
    # These change what the encoder computes, with the same weights.
    config = json.loads((folder / "config.json").read_text())
    for change in ({"hidden_act": "relu"}, {"max_bucket_distance": 100}):
        (folder / "config.json").write_text(json.dumps(config | change))
        others.add(Upstream(str(folder), "audio").checksum)
    assert len(others) == 1 + len(list(upstream.model.parameters())) + 2
