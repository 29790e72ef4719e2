"""model.py against numbers by hand, naive loops, PyTorch's blocks, and transformers."""

import copy
import dataclasses
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
from model import FUSIONS, Config, EmotionRecognizer, TransformerBlock, Upstream

MODALITIES = ["audio", "text"]


def small(fusion, **changes):
    """A recognizer on upstreams of 3 layers and 8 features, with windows of 3 texts."""
    torch.manual_seed(0)
    return EmotionRecognizer(Config(fusion, 3, 8, 3, 8, n_context=3, **changes)).eval()


def batch(seed=1):
    """Four clips, and four windows: complete, without its first, and its last text."""
    g = torch.Generator().manual_seed(seed)
    audio_mask = torch.arange(6) < torch.tensor([6, 3, 2, 4]).unsqueeze(-1)
    lengths = torch.tensor([[3, 4, 1], [0, 5, 2], [2, 2, 0], [1, 3, 3]])
    text_mask = torch.arange(5) < lengths.unsqueeze(-1)
    audio = torch.randn(int(audio_mask.sum()), 3, 8, generator=g)
    text = torch.randn(int(text_mask.sum()), 3, 8, generator=g)
    return (audio, audio_mask), (text, text_mask)


def of_utterance(batch, i):
    """The i-th utterance of a batch alone, without any padding."""
    states, mask = batch
    own = states[mask.nonzero()[:, 0] == i]
    length = int(mask[i].any(dim=0).sum() if mask.ndim == 3 else mask[i].sum())
    return own, mask[i : i + 1, ..., :length]


# --- Equations ------------------------------------------------------------------------


def test_masked_mean_is_the_mean_of_the_real_steps():
    torch.manual_seed(0)
    x, mask = torch.randn(5, 7, 3), torch.rand(5, 7) > 0.4
    mask[2] = False  # an utterance without a real step
    x[~mask] = math.nan
    x.requires_grad_()
    out = model.masked_mean(x, mask)
    for b in range(5):
        real = [x[b, t] for t in range(7) if mask[b, t]]
        expected = sum(real) / len(real) if real else torch.zeros(3)
        torch.testing.assert_close(out[b], expected)
    out.sum().backward()
    assert x.grad.isfinite().all() and not x.grad[2].any()


def test_equation_1_by_hand():
    # One target step and d_k = 4, so sqrt(d_k) = 2. The query x_t W_Q is (2, 0, 0, 0).
    # The keys are (ln 9, 0, 0, 0) and 0, so the scores are 2 ln 9 / 2 = ln 9 and 0. The
    # softmax gives 9/10 and 1/10. The values are 10 and 20, so the output is 9 + 2. A
    # third step has by far the highest score, and is padding.
    x_t = torch.tensor([[[1.0]]])
    x_s = torch.tensor([[[1.0, 10.0], [0.0, 20.0], [9.0, 99.0]]])
    w_q = torch.tensor([[2.0, 0, 0, 0]])
    w_k = torch.tensor([[math.log(9), 0, 0, 0], [0, 0, 0, 0]])
    w_v = torch.tensor([[0.0], [1.0]])
    mask = torch.tensor([[True, True, False]])
    out, weights = model.cross_modal_attention(x_t, x_s, w_q, w_k, w_v, mask)
    torch.testing.assert_close(weights, torch.tensor([[[0.9, 0.1, 0.0]]]))
    torch.testing.assert_close(out, torch.tensor([[[11.0]]]))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_equation_1_is_scaled_dot_product_attention(scale):
    torch.manual_seed(0)
    x_t, x_s = scale * torch.randn(3, 5, 6), scale * torch.randn(3, 7, 8)
    matrices = [
        torch.randn(n, m, requires_grad=True) for n, m in [(6, 4), (8, 4), (8, 9)]
    ]
    mask = torch.tensor([[1] * 7, [1, 0, 1, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0]]).bool()
    out, weights = model.cross_modal_attention(x_t, x_s, *matrices, mask)
    q, k, v = x_t @ matrices[0], x_s @ matrices[1], x_s @ matrices[2]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 5))
    if scale == 1.0:
        for found, right in zip(
            torch.autograd.grad(out.square().sum(), matrices, retain_graph=True),
            torch.autograd.grad(expected.square().sum(), matrices),
            strict=True,
        ):
            torch.testing.assert_close(found, right, atol=1e-3, rtol=1e-3)


def test_equation_1_of_an_empty_source_is_zero_with_a_zero_gradient():
    x_s = torch.randn(1, 3, 4, requires_grad=True)
    eye, nothing = torch.eye(4), torch.zeros(1, 3, dtype=torch.bool)
    out, weights = model.cross_modal_attention(
        torch.randn(1, 2, 4), x_s, eye, eye, eye, nothing
    )
    out.sum().backward()
    assert not out.any() and not weights.any() and not x_s.grad.any()


# --- Feature extractors ---------------------------------------------------------------


def test_squeeze_and_excitation_against_loops():
    torch.manual_seed(1)
    mask = torch.rand(3, 6) > 0.4
    mask[0] = False  # a missing text
    states = torch.randn(int(mask.sum()), 4, 5)
    se = model.SqueezeExcitation(4)
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


def test_the_unit_of_squeeze_and_excitation_starts_alive_and_can_die():  # D2
    states, mask = 0.1 * torch.randn(80, 25, 16), torch.ones(8, 10, dtype=torch.bool)
    for seed in range(20):
        torch.manual_seed(seed)
        se = model.SqueezeExcitation(25)
        se(states, mask).sum().backward()
        assert se.reduce.weight.grad.any()
    se.zero_grad()
    nn.init.constant_(
        se.reduce.bias, -100.0
    )  # dead: every utterance has the same gates
    gates = se(states, mask)
    gates.sum().backward()
    assert not se.reduce.weight.grad.any()
    torch.testing.assert_close(gates, se.expand.bias.sigmoid().expand(8, 25))


def test_the_feature_extractor_scales_each_layer_by_its_gate_and_sums():  # A1, A3
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
        y = (y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt()  # a new LayerNorm
        torch.testing.assert_close(out[b, t], y, atol=1e-5, rtol=1e-4)
    assert not out[~mask].any()


def test_the_context_convolution_against_loops():  # A4, A5, A6
    torch.manual_seed(2)
    mask = torch.rand(2, 9, 5) > 0.3
    mask[0, :3] = False  # missing neighbours
    states = torch.randn(int(mask.sum()), 3, 4)
    extractor = model.TextFeatureExtractor(3, 4, 16, n_context=9)
    out, out_mask = extractor(states, mask)
    assert torch.equal(out_mask, mask.any(dim=1))
    maps = torch.zeros(2, 9, 5, 16)  # a missing neighbour is a map of zeros
    owner = mask.flatten(0, 1).nonzero()[:, 0]
    for i in owner.unique().tolist():  # each text alone
        b, c = divmod(i, 9)
        maps[b, c] = extractor.each_text(states[owner == i], mask[b, c].unsqueeze(0))[0]
    w, bias = extractor.conv.weight[0].tolist(), extractor.conv.bias.item()
    padded = F.pad(maps, (1, 1, 1, 1)).tolist()
    for b in range(2):
        for t in range(5):
            for f in range(16):
                total = bias
                for c in range(9):
                    for i in range(3):
                        for j in range(3):
                            total += w[c][i][j] * padded[b][c][t + i][f + j]
                assert abs(total - out[b, t, f].item()) < 1e-4


# --- Transformer blocks and fusion ----------------------------------------------------


def test_the_transformer_block_is_pytorchs_encoder_layer():  # A8
    torch.manual_seed(3)
    ours = TransformerBlock(16, residual=True).eval()
    theirs = nn.TransformerEncoderLayer(16, 1, 64, 0.1, "relu", batch_first=True).eval()
    with torch.no_grad():
        attention = theirs.self_attn
        attention.in_proj_weight.copy_(torch.cat([ours.w_q.T, ours.w_k.T, ours.w_v.T]))
        attention.in_proj_bias.zero_()  # Eq. (1) has no bias
        attention.out_proj.weight.copy_(torch.eye(16))  # nor an output matrix
        attention.out_proj.bias.zero_()
    theirs.linear1.load_state_dict(ours.feed_forward[0].state_dict())
    theirs.linear2.load_state_dict(ours.feed_forward[2].state_dict())
    for norm in ("norm1", "norm2"):
        nn.init.normal_(getattr(ours, norm).weight)
        getattr(theirs, norm).load_state_dict(getattr(ours, norm).state_dict())
    x = torch.randn(4, 7, 16)
    mask = torch.arange(7) < torch.tensor([7, 5, 2, 1]).unsqueeze(1)
    expected = theirs(x, src_key_padding_mask=~mask)[mask]
    torch.testing.assert_close(ours(x, x, mask)[mask], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("residual", [True, False])
def test_dropout_comes_behind_both_sublayers_of_a_block(residual):  # A8
    class Double(nn.Module):  # in the place of dropout, it shows where that is
        def forward(self, x):
            return 2 * x

    block = TransformerBlock(8, residual)
    assert isinstance(block.dropout, nn.Dropout) and block.dropout.p == 0.1
    block.dropout = Double()
    x_t, x_s = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    mask = torch.ones(2, 5, dtype=torch.bool)
    attended = model.cross_modal_attention(
        x_t, x_s, block.w_q, block.w_k, block.w_v, mask
    )[0]
    x = block.norm1(x_t + 2 * attended if residual else 2 * attended)
    expected = block.norm2(x + 2 * block.feed_forward(x))
    torch.testing.assert_close(block(x_t, x_s, mask), expected)


def test_fusions_are_those_of_figure_3():
    # (target, source): CMT (T->A) takes its queries from the audio, and its keys and
    # values from the text.
    assert FUSIONS["cmt-t2a"] == [("audio", "text")]
    assert FUSIONS["cmt-a2t"] == [("text", "audio")]
    order = ["audio-fc", "audio-te", "text-fc", "text-te", "cmt-a2t", "cmt-t2a"]
    assert list(FUSIONS) == [*order, "ef", "lf", "mmt"]
    for fused, a, b in [("ef", 0, 2), ("lf", 1, 3), ("mmt", 4, 5)]:  # Table 1: a + b
        assert FUSIONS[fused] == FUSIONS[order[a]] + FUSIONS[order[b]]


@pytest.mark.parametrize("cma_residual", [True, False])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_cmt_passes_its_target_on_only_with_the_residual(fusion, cma_residual):  # A7
    blocks = {  # by hand: the blocks of each system, True for the vanilla Transformer
        "audio-te": {"audio-to-audio": True},
        "text-te": {"text-to-text": True},
        "cmt-a2t": {"audio-to-text": False},
        "cmt-t2a": {"text-to-audio": False},
        "lf": {"audio-to-audio": True, "text-to-text": True},
        "mmt": {"audio-to-text": False, "text-to-audio": False},
    }.get(fusion, {})
    found = small(fusion, cma_residual=cma_residual).fusion.blocks
    assert found.keys() == blocks.keys()
    # A source of one step gives every query the same output. So what the steps of the
    # target differ in comes through the residual.
    x_t, x_s = torch.randn(1, 3, 16), torch.randn(1, 1, 16)
    for name, vanilla in blocks.items():
        spread = found[name](x_t, x_s, torch.tensor([[True]])).std(dim=1).max()
        assert (spread > 0.01) == (vanilla or cma_residual)


# --- The whole recognizer -------------------------------------------------------------


def test_defaults_are_the_papers():
    upstreams = {
        "audio_layers": 25,
        "audio_dim": 1024,
        "text_layers": 13,
        "text_dim": 768,
    }
    ours = {"dim": 16, "n_classes": 4, "n_context": 9, "dropout": 0.5}
    choices = {"fusion": "mmt", "cma_residual": False}
    assert dataclasses.asdict(Config()) == upstreams | ours | choices


@pytest.mark.parametrize("fusion", FUSIONS)
def test_dropout_of_one_half_is_between_the_modules(fusion):  # A16
    class Probe(nn.Module):  # in the place of the fusion
        def forward(self, x, mask):
            self.received = x
            return torch.ones(4, 32)

    recognizer = small(fusion)
    recognizer.fusion = Probe()
    recognizer.classifier = nn.Identity()
    # A unimodal system has no fusion, so there is no dropout behind it.
    multimodal = fusion in ("cmt-a2t", "cmt-t2a", "ef", "lf", "mmt")
    modalities = MODALITIES if multimodal else [fusion.partition("-")[0]]
    for training in (True, False):
        fused = recognizer.train(training)(*batch())
        x, _ = recognizer.features(*batch())
        assert list(x) == modalities
        places = [(x[m], recognizer.fusion.received[m], training) for m in modalities]
        places.append((torch.ones(4, 32), fused, training and multimodal))
        for before, behind, active in places:
            if active:
                kept = behind != 0
                assert 0.25 < kept[before != 0].float().mean() < 0.75
                before = torch.where(kept, 2 * before, 0.0)
            torch.testing.assert_close(behind, before)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_logits_do_not_depend_on_the_batch_or_the_places_of_real_steps(fusion):
    recognizer = small(fusion)
    audio, text = batch()
    together = recognizer(audio, text)
    for i in range(4):
        (a, a_mask), (t, t_mask) = of_utterance(audio, i), of_utterance(text, i)
        alone = recognizer((a, a_mask), (t, t_mask))
        torch.testing.assert_close(alone[0], together[i])
        # Padding before, behind and between the frames. The tokens of the texts stay
        # neighbours, because the convolution sees their order.
        places = torch.tensor([1, 2, 4, 5, 8, 9])[: len(a)]
        spread = torch.zeros(1, 12, dtype=torch.bool).index_fill_(1, places, True)
        shifted = F.pad(t_mask, (2, 3))
        torch.testing.assert_close(recognizer((a, spread), (t, shifted)), alone)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_reach_every_parameter_and_every_step_of_what_is_used(fusion):
    recognizer = small(fusion)
    given = dict(zip(MODALITIES, batch(), strict=True))
    for states, _ in given.values():
        states.requires_grad_()
    logits = recognizer(**given)
    (logits * torch.randn(4, 4)).sum().backward()
    assert all(p.grad.any() for p in recognizer.parameters())
    used = {}
    for modality, (states, mask) in given.items():
        if modality in recognizer.config.modalities:
            used[modality] = states, mask
            assert states.grad.flatten(1).any(dim=1).all()
        else:
            assert states.grad is None
    assert torch.equal(recognizer(**used), logits)  # the other may be left out


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_recognizer_makes_no_tensor_on_a_device_of_its_own(fusion):
    """A tensor without a device lands on "meta" here, and does not fit the others."""
    recognizer, arguments = small(fusion), batch()
    with torch.device("meta"):
        logits = recognizer(*arguments)
        logits.sum().backward()
    assert logits.device.type == "cpu"


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_first_loss_is_near_chance_and_a_batch_can_be_learnt_by_heart(fusion):
    recognizer, labels = small(fusion), torch.tensor([0, 1, 2, 3])
    arguments = batch()
    optimizer = torch.optim.AdamW(recognizer.parameters(), lr=0.03)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(recognizer(*arguments), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(4)) < 0.3
    assert losses[-1] < 0.05


def test_python_model_py_prints_every_block_at_full_size(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["model.py"])
    model.main()
    printed = capsys.readouterr().out
    for title, shape, parameters in [
        ("WavLM-Large", "", 315_453_120),
        ("", "", 4_206_592),  # its CNN encoder
        ("BERT-base", "", 109_482_240),
        ("", "", 23_837_184),  # its input embeddings
        ("extractor.audio", "(2, 249, 16)", 76 + 16_432),
        ("extractor.text.each_text", "(18, 20, 16)", 40 + 12_336),
        ("extractor.text.conv", "(2, 1, 20, 16)", 82),
        ("audio-to-text", "(2, 20, 16)", 2_960),
        ("text-to-audio", "(2, 249, 16)", 2_960),
        ("classifier", "(2, 4)", 596),
        ("EmotionRecognizer", "(2, 4)", 35_482),
    ]:
        line = f"{re.escape(title)} +{re.escape(shape)} +{parameters:,}$"
        assert re.search(line, printed, re.MULTILINE), line


# --- Upstreams ------------------------------------------------------------------------


def raw_inputs(modality):
    if modality == "text":
        return ["i hate it", "lovely party, so lovely again", "all"]
    g = torch.Generator().manual_seed(7)
    return [0.1 * torch.randn(n, generator=g) + 0.3 for n in (3000, 5200, 400)]


def states_of(upstream, modality):
    return upstream([upstream.prepare(x) for x in raw_inputs(modality)])


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_layer_state_is_transformers_own(modality, tiny):
    """Each input alone through the library's layers, against our batch of all."""
    import transformers

    states = states_of(tiny[modality], modality)
    folder = tiny[modality].name
    library = transformers.AutoModel.from_pretrained(folder).eval()
    layers = library.encoder.layers if modality == "audio" else library.encoder.layer
    seen = []
    layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0]),
        with_kwargs=True,
    )
    for layer in layers:
        layer.register_forward_hook(
            lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    for x, ours in zip(raw_inputs(modality), states, strict=True):
        seen.clear()
        if modality == "audio":
            normalised = (x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt()
            library(normalised.unsqueeze(0))
            # The last state comes after the final LayerNorm.
            seen[-1] = library.encoder.layer_norm(seen[-1])
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            library(**tokenizer(x, return_tensors="pt"))
        expected = torch.stack(seen, dim=2)[0]  # (T, L, D)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert (tiny[modality].n_layers, tiny[modality].dim) == ours.shape[1:] == (2, 48)


def test_prepared_audio_has_mean_0_and_variance_1(tiny):
    x = tiny["audio"].prepare(torch.tensor([1.0, 3.0] * 200))
    torch.testing.assert_close(x, torch.tensor([-1.0, 1.0] * 200), atol=1e-5, rtol=0)


def test_prepared_texts_keep_their_first_512_tokens(tiny):
    words = tiny["text"].preprocessor.get_vocab()
    tokens = tiny["text"].prepare("hate " * 500 + "lovely " * 100)
    expected = [words["hate"]] * 500 + [words["lovely"]] * 10
    assert tokens.tolist() == [words["[CLS]"], *expected, words["[SEP]"]]
    assert len(tiny["text"]([tokens])[0]) == 512


@pytest.mark.parametrize("what", ["nothing", "bottom", "all"])
@pytest.mark.parametrize("modality", MODALITIES)
def test_open_makes_trainable_what_it_names_and_nothing_else(modality, what, tiny):
    upstream = copy.deepcopy(tiny[modality])
    # §2.4: "CNN encoders in WavLM and input embeddings in BERT".
    bottom = {"audio": "feature_extractor.", "text": "embeddings."}[modality]
    prefix = {"nothing": "nothing", "bottom": bottom, "all": ""}[what]
    parameters = dict(upstream.named_parameters())
    expected = {n for n in parameters if n.startswith(f"model.{prefix}")}
    assert not any(p.requires_grad for p in parameters.values())
    opened = upstream.open(what)
    assert {n for n, p in parameters.items() if p.requires_grad} == expected
    assert sorted(map(id, opened)) == sorted(id(parameters[n]) for n in expected)
    states = torch.cat(states_of(upstream, modality))
    assert states.requires_grad == bool(expected)
    if what == "bottom":  # the gradient passes through the whole encoder
        states.square().sum().backward()
        assert all(p.grad.any() for p in opened)


@pytest.mark.parametrize("modality", MODALITIES)
def test_upstreams_stay_in_evaluation_mode(modality, tiny):  # A12
    upstream = nn.Sequential(copy.deepcopy(tiny[modality])).train()[0]
    assert not any(module.training for module in upstream.modules())
    first, second = (states_of(upstream, modality)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_bf16_states_are_near_those_of_fp32(tiny):
    for m in MODALITIES:
        half = states_of(Upstream(tiny[m].name, m, "bf16"), m)
        for x, y in zip(states_of(tiny[m], m), half, strict=True):
            assert 0 < (x - y.float()).abs().max() < 0.2


def test_tiny_weights_depend_on_nothing_but_their_names(tmp_path):
    texts = {"1": "i hate it", "2": "i hate it", "3": "it is so, hate"}
    for name, text in texts.items():
        torch.manual_seed(int(name))
        model.make_tiny_upstreams(tmp_path / name, [text])
    files = [p for p in (tmp_path / "1").rglob("*") if p.is_file()]
    names = {p.name for p in files}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json"}
    for file in files:
        other = tmp_path / "2" / file.relative_to(tmp_path / "1")
        assert file.read_bytes() == other.read_bytes(), file
    # Whatever other words there are, a word has the same vector.
    vectors = []
    for folder in ("1", "3"):
        upstream = Upstream(str(tmp_path / folder / "text"), "text")
        row = upstream.preprocessor.get_vocab()["hate"]
        vectors.append((row, upstream.model.get_input_embeddings().weight[row]))
    assert vectors[0][0] != vectors[1][0]
    torch.testing.assert_close(vectors[0][1], vectors[1][1])


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_checksum_covers_weights_and_configuration(
    modality, tiny_folder, tmp_path, monkeypatch
):
    def load_with(**changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(tiny_folder / modality, folder)
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        return Upstream(str(folder), modality)

    upstream = load_with()
    assert re.fullmatch("[0-9a-f]{8}", upstream.checksum)
    # Neither the place of the folder nor the version of the library matters.
    with monkeypatch.context() as patch:
        patch.setattr("transformers.configuration_utils.__version__", "9.9")
        assert load_with().checksum == upstream.checksum
    # These change what the encoder computes, with the same weights.
    changes = [{"hidden_act": "relu"}, {"layer_norm_eps": 1e-3}]
    if modality == "audio":
        changes.append({"max_bucket_distance": 100})
    else:
        changes.append({"num_attention_heads": 4})
    others = {load_with(**change).checksum for change in changes}
    for p in upstream.model.parameters():
        p.data.view(-1)[0] += 1e-3
        others.add(upstream.compute_checksum())
    n_parameters = len(list(upstream.model.parameters()))
    assert len(others - {upstream.checksum}) == 3 + n_parameters
