"""model.py against hand-worked numbers, naive loops, PyTorch's own blocks, and gradients."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import model
from conftest import ROOT
from data import InputError
from model import FUSIONS, Config, EmotionRecognizer, TransformerBlock, Upstream


# What model.py does not do yet. Strict: delete the mark where the test passes.


def small_config(fusion, tiny, **changes):
    return Config(
        fusion,
        tiny["audio"].n_layers,
        tiny["audio"].dim,
        tiny["text"].n_layers,
        tiny["text"].dim,
        **changes,
    )


# --- equations


def test_masked_mean_is_the_mean_of_the_real_steps():
    torch.manual_seed(0)
    x, mask = torch.randn(5, 7, 3), torch.rand(5, 7) > 0.4
    mask[2] = False  # an utterance that does not exist
    x[~mask] = float("nan")  # whatever stands in the padding
    out = model.masked_mean(x, mask)
    for b in range(5):
        real = [x[b, t] for t in range(7) if mask[b, t]]
        expected = sum(real) / len(real) if real else torch.zeros(3)
        torch.testing.assert_close(out[b], expected)


def test_masked_mean_of_nothing_has_a_finite_gradient():
    x = torch.randn(1, 4, 2, requires_grad=True)
    model.masked_mean(x, torch.zeros(1, 4, dtype=torch.bool)).sum().backward()
    assert (x.grad == 0).all()


def test_equation_1_by_hand():
    # One target step, two source steps, d_k = 4, so sqrt(d_k) = 2.
    # Q = x_t W_q = (2, 0, 0, 0); K rows (ln 9, 0, 0, 0) and (0, 0, 0, 0): scores 2 ln 9 / 2 = ln 9, 0.
    # softmax = 9/10, 1/10. V rows 10 and 20: out = 9 + 2 = 11.
    x_t = torch.tensor([[[1.0]]])
    x_s = torch.tensor([[[1.0, 10.0], [0.0, 20.0]]])
    w_q = torch.tensor([[2.0, 0, 0, 0]])
    w_k = torch.tensor([[math.log(9), 0, 0, 0], [0, 0, 0, 0]])
    w_v = torch.tensor([[0.0], [1.0]])
    out, weights = model.cross_modal_attention(x_t, x_s, w_q, w_k, w_v)
    torch.testing.assert_close(weights, torch.tensor([[[0.9, 0.1]]]))
    torch.testing.assert_close(out, torch.tensor([[[11.0]]]))


def test_equation_1_with_a_mask_by_hand():
    # As above with a third source step that would win by far, and is padding.
    x_t = torch.tensor([[[1.0]]])
    x_s = torch.tensor([[[1.0, 10.0], [0.0, 20.0], [9.0, 99.0]]])
    w_q, w_v = torch.tensor([[2.0, 0, 0, 0]]), torch.tensor([[0.0], [1.0]])
    w_k = torch.tensor([[math.log(9), 0, 0, 0], [0, 0, 0, 0]])
    mask = torch.tensor([[True, True, False]])
    out, weights = model.cross_modal_attention(x_t, x_s, w_q, w_k, w_v, mask)
    torch.testing.assert_close(weights, torch.tensor([[[0.9, 0.1, 0.0]]]))
    torch.testing.assert_close(out, torch.tensor([[[11.0]]]))


def test_equation_1_is_scaled_dot_product_attention():
    torch.manual_seed(0)
    x_t, x_s = torch.randn(3, 5, 6), torch.randn(3, 7, 8)
    w_q, w_k, w_v = torch.randn(6, 4), torch.randn(8, 4), torch.randn(8, 9)
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4, [True] + [False] * 6])
    out, weights = model.cross_modal_attention(x_t, x_s, w_q, w_k, w_v, mask)
    expected = F.scaled_dot_product_attention(
        x_t @ w_q, x_s @ w_k, x_s @ w_v, attn_mask=mask[:, None]
    )
    torch.testing.assert_close(out, expected)
    assert out.shape == (3, 5, 9) and weights.shape == (3, 5, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5))  # over the sources, per query


def test_equation_1_without_any_real_source_is_zero_and_has_a_gradient():
    x_s = torch.randn(1, 3, 4, requires_grad=True)
    w = torch.eye(4)
    out, _ = model.cross_modal_attention(
        torch.randn(1, 2, 4), x_s, w, w, w, torch.zeros(1, 3, dtype=torch.bool)
    )
    out.sum().backward()
    assert (out == 0).all() and (x_s.grad == 0).all()


def test_equation_1_stands_high_scores_and_its_weights_learn():
    x_t, x_s = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    w_q, w_k, w_v = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    for scale in (1.0, 1e4):
        out, weights = model.cross_modal_attention(scale * x_t, scale * x_s, w_q, w_k, w_v, mask)
        assert out.isfinite().all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
        assert (weights[1, :, 2:] == 0).all()
    out, _ = model.cross_modal_attention(x_t, x_s, w_q, w_k, w_v, mask)
    out.square().sum().backward()
    assert all(w.grad.abs().max() > 1e-3 for w in (w_q, w_k, w_v))


def test_dropout_stands_behind_each_sublayer_of_a_block():
    class Doubling(nn.Module):  # in dropout's place it shows where that is
        def forward(self, x):
            return 2 * x

    for residual in (True, False):
        block = TransformerBlock(8, residual=residual).eval()
        block.dropout = Doubling()
        x_t, x_s = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
        attended = 2 * block.attend(x_t, x_s)[0]
        h = block.norm1(x_t + attended if residual else attended)
        torch.testing.assert_close(
            block(x_t, x_s), block.norm2(h + 2 * block.feed_forward(h)), rtol=1e-5, atol=1e-6
        )


# --- blocks


def test_squeeze_excitation_against_loops():
    torch.manual_seed(1)
    b, t, n_layers, d = 3, 6, 4, 5
    x, mask = torch.randn(b, t, n_layers, d), torch.rand(b, t) > 0.4
    mask[0], mask[1, 0] = False, True
    se = model.SqueezeExcitation(n_layers)
    out, gates = se(x, mask), se.gates(x, mask)
    for i in range(b):
        steps = [s for s in range(t) if mask[i, s]]
        z = [
            sum(float(x[i, s, k, j]) for s in steps for j in range(d)) / max(len(steps) * d, 1)
            for k in range(n_layers)
        ]
        hidden = max(
            0.0,
            sum(w * v for w, v in zip(se.reduce.weight[0].tolist(), z)) + se.reduce.bias.item(),
        )
        for k in range(n_layers):
            gate = 1 / (
                1 + math.exp(-(se.expand.weight[k, 0].item() * hidden + se.expand.bias[k].item()))
            )
            assert abs(gates[i, k].item() - gate) < 1e-5
            torch.testing.assert_close(out[i, :, k], x[i, :, k] * gate)


def test_squeeze_excitation_starts_alive_and_a_dead_unit_has_no_gradient():
    x, mask = torch.randn(8, 10, 25, 16), torch.ones(8, 10, dtype=torch.bool)
    for seed in range(20):
        torch.manual_seed(seed)
        se = model.SqueezeExcitation(25)
        se(0.1 * x, mask).sum().backward()
        assert se.reduce.weight.grad.any()  # what train.py looks at
    se.zero_grad()
    nn.init.constant_(se.reduce.bias, -100.0)
    se(x, mask).sum().backward()
    assert not se.reduce.weight.grad.any()
    x[3] = 1000.0 * se.reduce.weight[0, :, None].sign().detach()  # one utterance of eight is enough
    se(x, mask).sum().backward()
    assert se.reduce.weight.grad.any()


@pytest.mark.parametrize("condense", ["sum", "concat"])
def test_gates_inside_the_sum_equal_the_papers_block(condense):
    torch.manual_seed(3)
    x, mask = torch.randn(3, 6, 4, 5), torch.rand(3, 6) > 0.4
    mask[1] = False
    se = model.SqueezeExcitation(4)
    projector = model.Projector(5 if condense == "sum" else 20, 16, condense)
    scaled = se(x, mask)  # S&E's output, then "Project & Norm" in plain torch
    flat = scaled.sum(dim=2) if condense == "sum" else scaled.reshape(3, 6, 20)
    linear, norm = projector.linear, projector.norm
    expected = F.linear(flat, linear.weight, linear.bias)
    expected = F.layer_norm(expected, (16,), norm.weight, norm.bias)
    for found in (projector(x, se.gates(x, mask)[:, None]), projector(scaled)):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("condense", ["sum", "concat"])
@pytest.mark.parametrize("modality", ["audio", "text"])
def test_states_without_padding_give_the_same(modality, condense):
    torch.manual_seed(4)
    config = Config("mmt", 4, 5, 4, 5, n_context=3, condense=condense)
    recognizer = EmotionRecognizer(config)
    extractor = recognizer.extractor[modality]
    mask = torch.rand(5, 6) > 0.4
    mask[1] = False  # an utterance without a real step
    assert mask.any(dim=1).sum() == 4 and not mask.all(dim=0).any()
    padded = torch.randn(5, 6, 4, 5)
    padded[~mask] = 7.0
    packed = padded[mask].requires_grad_()  # (N, L, D)
    padded.requires_grad_()
    context = torch.tensor([[-1, 0, 1], [0, 1, 2], [3, 4, -1]])
    rest = (mask, context) if modality == "text" else (mask,)
    results = []
    for states in (padded, packed):
        recognizer.zero_grad()
        x, real = extractor(states, *rest)
        (x * torch.linspace(-1, 1, x[0].numel()).view(x.shape[1:]))[real].sum().backward()
        results.append((x, real, [p.grad.clone() for p in extractor.parameters()]))
    (x, real, grads), (found, same, found_grads) = results
    assert torch.equal(real, same)
    torch.testing.assert_close(found[real], x[real], atol=1e-5, rtol=1e-5)
    for a, b in zip(grads, found_grads, strict=True):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed.grad, padded.grad[mask], atol=1e-5, rtol=1e-4)
    assert (padded.grad[~mask] == 0).all() and packed.grad.abs().sum() > 0.1
    assert (model.FeatureExtractor.forward(extractor, packed, mask)[0][~mask] == 0).all()


class OneDevice(torch.overrides.TorchFunctionMode):
    """Raise where an operation mixes devices. (Not every operation on meta tensors raises itself.)"""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def tensors(x):
            if isinstance(x, torch.Tensor):
                return [x]
            x = list(x.values()) if isinstance(x, dict) else x
            return [t for y in x for t in tensors(y)] if isinstance(x, (list, tuple)) else []

        found = {t.device.type for t in tensors([args, kwargs])}
        assert len(found) < 2, f"{func} of tensors on {found}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_nothing_of_the_head_stays_on_another_device(fusion):
    """On torch's meta device, where an operand that was left on the CPU raises."""

    def real(*shape):
        return torch.ones(*shape, device="meta", dtype=torch.bool)

    for changes in ({}, {"condense": "concat", "text_mask": "target", "head": "linear"}):
        recognizer = EmotionRecognizer(Config(fusion, 3, 8, 3, 8, **changes)).to("meta").train()
        audio = torch.empty(2, 5, 3, 8, device="meta"), real(2, 5)
        text = torch.empty(4, 6, 3, 8, device="meta"), real(4, 6)
        context = torch.zeros(2, 9, device="meta", dtype=torch.long)
        with OneDevice():
            logits = recognizer(audio, (*text, context))
            assert logits.shape == (2, 4) and logits.device.type == "meta"
            logits.sum().backward()
    x, mask = torch.empty(2, 5, 3, 8, device="meta"), real(2, 5)
    with torch.device("meta"):  # the paper's blocks, one after another
        se, projector = model.SqueezeExcitation(3), model.Projector(8)
    with OneDevice():
        assert projector(se(x, mask)).device.type == "meta"


@pytest.mark.parametrize("fusion", FUSIONS)
def test_which_blocks_have_a_residual(fusion):  # A7
    blocks = {  # by hand: each block, and whether the queries come from the source's own modality
        "audio-fc": {}, "audio-te": {"audio-to-audio": True},
        "text-fc": {}, "text-te": {"text-to-text": True},
        "cmt-a2t": {"audio-to-text": False}, "cmt-t2a": {"text-to-audio": False},
        "ef": {}, "lf": {"audio-to-audio": True, "text-to-text": True},
        "mmt": {"audio-to-text": False, "text-to-audio": False},
    }[fusion]  # fmt: skip
    for switch in (False, True):
        config = Config(fusion, 3, 8, 3, 8, cma_residual=switch)
        found = EmotionRecognizer(config).fusion.blocks
        expected = {name: own or switch for name, own in blocks.items()}
        assert {name: block.residual for name, block in found.items()} == expected
        for block in found.values():  # what it does: with W_V = 0, only the residual is left
            nn.init.zeros_(block.w_v)
            x_t, x_s = torch.randn(1, 3, 16), torch.randn(1, 4, 16)
            assert (block.eval()(x_t, x_s).std(dim=1).max() > 0.01) == block.residual


def test_context_convolution_against_loops():
    torch.manual_seed(2)
    x, mask = torch.randn(2, 9, 5, 16), torch.rand(2, 9, 5) > 0.3
    conv = model.ContextConv()
    out, out_mask = conv(x, mask)
    w, bias = conv.conv.weight[0], conv.conv.bias[0]  # (9, 3, 3)
    for b in range(2):
        for t in range(5):
            for d in range(16):
                total = bias.item()
                for c in range(9):
                    for i in (-1, 0, 1):
                        for j in (-1, 0, 1):
                            if 0 <= t + i < 5 and 0 <= d + j < 16 and mask[b, c, t + i]:
                                total += (w[c, i + 1, j + 1] * x[b, c, t + i, d + j]).item()
                assert abs(total - out[b, t, d].item()) < 1e-4
    assert (out_mask == mask.any(dim=1)).all()
    assert (model.ContextConv(text_mask="target")(x, mask)[1] == mask[:, 4]).all()


def test_transformer_block_is_pytorchs_encoder_layer():
    torch.manual_seed(3)
    ours = TransformerBlock(16).eval()
    theirs = nn.TransformerEncoderLayer(
        16, 1, 64, 0.1, "relu", batch_first=True, norm_first=False
    ).eval()
    with torch.no_grad():
        attention = theirs.self_attn
        attention.in_proj_weight.copy_(torch.cat([ours.w_q.T, ours.w_k.T, ours.w_v.T]))
        attention.in_proj_bias.zero_()  # Eq. (1) has no bias
        attention.out_proj.weight.copy_(torch.eye(16))  # nor an output matrix
        attention.out_proj.bias.zero_()
    for theirs_part, ours_part in (
        (theirs.linear1, ours.feed_forward[0]), (theirs.linear2, ours.feed_forward[2]),
        (theirs.norm1, ours.norm1), (theirs.norm2, ours.norm2),
    ):  # fmt: skip
        theirs_part.load_state_dict(ours_part.state_dict())
    x = torch.randn(4, 7, 16)
    mask = torch.arange(7) < torch.tensor([7, 5, 2, 1])[:, None]
    expected = theirs(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(ours(x, x, mask)[mask], expected[mask], atol=1e-5, rtol=1e-4)


def test_cross_modal_block_passes_the_target_on_only_with_the_residual():  # A7
    torch.manual_seed(4)
    x_t, x_s = torch.randn(1, 3, 16), torch.randn(1, 1, 16)  # one source step: weights are all 1
    without = TransformerBlock(16, residual=False).eval()
    torch.testing.assert_close(without(x_t, x_s), without(torch.randn(1, 3, 16), x_s))
    with_residual = TransformerBlock(16).eval()
    assert not torch.allclose(with_residual(x_t, x_s), with_residual(torch.randn(1, 3, 16), x_s))


def test_parameter_counts_of_the_register():  # A1 to A4
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(model.SqueezeExcitation(25)) == 25 + 1 + 25 + 25
    assert count(model.Projector(1024)) == 16432 and count(model.Projector(768)) == 12336
    assert count(model.Projector(25 * 1024, 16, "concat")) == 409648
    assert count(model.Projector(13 * 768, 16, "concat")) == 159792
    assert count(model.ContextConv()) == 82
    concat = EmotionRecognizer(Config("audio-fc", condense="concat"))
    assert count(concat.extractor["audio"].projector) == 409648


def test_fusions_are_those_of_figure_3():
    # (target, source) by the figure: CMT T->A takes Q from the audio, K and V from the text.
    assert FUSIONS["cmt-t2a"] == [("audio", "text")] and FUSIONS["cmt-a2t"] == [("text", "audio")]
    order = ["audio-fc", "audio-te", "text-fc", "text-te", "cmt-a2t", "cmt-t2a", "ef", "lf", "mmt"]
    assert list(FUSIONS) == order
    for fused, a, b in (("ef", 0, 2), ("lf", 1, 3), ("mmt", 4, 5)):  # a ⊕ b of Table 1
        assert FUSIONS[fused] == FUSIONS[order[a]] + FUSIONS[order[b]]


# --- the whole


def sample(tiny, seed=0):
    g = torch.Generator().manual_seed(seed)
    audio = [torch.randn(n, generator=g) for n in (400, 3000, 5200)]
    text = ["i hate it", "lovely party", "all alone again and again , so", "[LAUGHTER]", ""]
    context = torch.tensor([
        [-1, -1, -1, -1, 0, 1, 2, 3, 4], [-1, -1, -1, 0, 1, 2, 3, 4, -1], [-1, -1, 0, 1, 2, 3, 4, -1, -1]
    ])  # fmt: skip
    return audio, text, context


@pytest.mark.parametrize("fusion", FUSIONS)
def test_logits_do_not_depend_on_the_batch_or_the_padding(fusion, tiny):
    audio, text, context = sample(tiny)
    torch.manual_seed(0)
    recognizer = EmotionRecognizer(small_config(fusion, tiny)).eval()
    with torch.no_grad():
        together = recognizer(tiny["audio"](audio), (*tiny["text"](text), context))
        for i in range(3):
            distinct = context[i][context[i] >= 0]
            alone_text = tiny["text"]([text[j] for j in distinct])
            rows = torch.where(context[i] < 0, -1, context[i] - distinct[0])[None]
            alone = recognizer(tiny["audio"]([audio[i]]), (*alone_text, rows))
            torch.testing.assert_close(alone[0], together[i], atol=2e-5, rtol=1e-4)
            states, mask = tiny["audio"]([audio[i]])
            padded = F.pad(states, (0, 0, 0, 0, 0, 9), value=7.0), F.pad(mask, (0, 9))
            longer = (
                F.pad(alone_text[0], (0, 0, 0, 0, 0, 9), value=7.0),
                F.pad(alone_text[1], (0, 9)),
                rows,
            )
            torch.testing.assert_close(recognizer(padded, longer), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_reach_the_real_steps_and_nothing_else(fusion, tiny):
    torch.manual_seed(5)
    audio, text, context = sample(tiny)
    recognizer = EmotionRecognizer(small_config(fusion, tiny)).eval()
    (a, a_mask), (t, t_mask) = tiny["audio"](audio), tiny["text"](text)
    a, t = a.detach().requires_grad_(), t.detach().requires_grad_()
    only_first = torch.tensor([[-1, -1, -1, -1, 0, 1, -1, -1, -1]])  # rows 2 to 4: another dialogue
    # The clip of 3,000 samples. (Of 400, a single frame, CMT A->T would rightly ignore the text.)
    (recognizer((a[1:2], a_mask[1:2]), (t, t_mask, only_first)) * torch.randn(4)).sum().backward()
    for modality, states, mask in (("audio", a, a_mask), ("text", t, t_mask)):
        if modality not in recognizer.extractor:
            assert states.grad is None
            continue
        rows = [1] if modality == "audio" else [0, 1]
        real = torch.zeros_like(mask)
        real[rows] = mask[rows]
        touched = states.grad.abs().sum(dim=(2, 3)) > 0
        assert (touched == real).all()
    assert all(p.grad is not None for p in recognizer.parameters())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_first_loss_is_near_chance_and_one_batch_can_be_learnt_by_heart(fusion, tiny):
    torch.manual_seed(6)
    g = torch.Generator().manual_seed(6)
    a = torch.randn(8, 5, tiny["audio"].n_layers, tiny["audio"].dim, generator=g)
    t = torch.randn(72, 4, tiny["text"].n_layers, tiny["text"].dim, generator=g)
    a_mask, t_mask = torch.ones(8, 5, dtype=torch.bool), torch.ones(72, 4, dtype=torch.bool)
    windows = torch.arange(72).view(8, 9)
    labels = torch.tensor([0, 1, 2, 3] * 2)
    recognizer = EmotionRecognizer(small_config(fusion, tiny))
    recognizer.eval()
    first = F.cross_entropy(recognizer((a, a_mask), (t, t_mask, windows)), labels)
    assert abs(first.item() - math.log(4)) < 0.25
    optimizer = torch.optim.AdamW(recognizer.parameters(), lr=1e-2)
    for _ in range(150):
        loss = F.cross_entropy(recognizer((a, a_mask), (t, t_mask, windows)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("dropout_at", ["modules", "projector", "both"])
@pytest.mark.parametrize("fusion", ["text-fc", "text-te", "audio-te", "ef", "mmt"])
def test_dropout_of_one_half_acts_at_its_place(fusion, dropout_at, tiny):  # A16
    torch.manual_seed(9)
    config = small_config(fusion, tiny, dropout_at=dropout_at)
    assert config.dropout == 0.5
    recognizer, seen = EmotionRecognizer(config).train(), []
    for name, layer in recognizer.named_modules():
        if isinstance(layer, nn.Dropout) and "blocks" not in name:  # a block has its own, of 0.1
            layer.register_forward_hook(
                lambda layer, args, out, name=name: seen.append((name, args[0], out))
            )
    audio, text, context = sample(tiny)
    recognizer(tiny["audio"](audio), (*tiny["text"](text), context))
    active = [(name, x, out) for name, x, out in seen if not torch.equal(x, out)]
    projectors = {"audio": "extractor.audio.projector.dropout",
                  "text": "extractor.text.projector.dropout"}  # fmt: skip
    modalities = [m for m in ("audio", "text") if m in fusion or fusion in ("ef", "mmt")]
    expected = []
    if dropout_at != "modules":
        expected += [projectors[m] for m in modalities]
    if dropout_at != "projector":
        expected += ["dropout"] * len(modalities) + ["fusion_dropout"] * (len(modalities) == 2)
    assert [name for name, _, _ in active] == expected
    for _, x, out in active:  # what is kept is doubled, about half is not kept
        kept = out != 0
        torch.testing.assert_close(out[kept], 2 * x[kept])
        assert 0.3 < kept.float().mean() < 0.7
    recognizer.eval()
    seen.clear()
    recognizer(tiny["audio"](audio), (*tiny["text"](text), context))
    assert seen and all(torch.equal(x, out) for _, x, out in seen)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_linear_head_is_one_matrix(fusion):  # A15
    paths = 2 if fusion in ("ef", "lf", "mmt") else 1
    kinds = {}
    for head in ("linear", "mlp"):
        recognizer = EmotionRecognizer(Config(fusion, 3, 8, 3, 8, head=head)).eval()
        kinds[head] = [type(layer) for layer in recognizer.classifier]
        first, last = recognizer.classifier[0], recognizer.classifier[-1]
        assert first.in_features == 16 * paths and last.out_features == 4
        caught = []
        recognizer.fusion.register_forward_hook(lambda *call: caught.append(call[2]))
        audio = torch.randn(2, 5, 3, 8), torch.ones(2, 5, dtype=torch.bool)
        text = torch.randn(18, 6, 3, 8), torch.ones(18, 6, dtype=torch.bool)
        text = *text, torch.arange(18).view(2, 9)
        logits, h = recognizer(audio, text), caught[0]
        if head == "mlp":
            assert last.in_features == 16
            h = (h @ first.weight.T + first.bias).clamp(min=0)
        torch.testing.assert_close(logits, h @ last.weight.T + last.bias)
    assert kinds == {"linear": [nn.Linear], "mlp": [nn.Linear, nn.ReLU, nn.Linear]}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_transformer_block_has_the_vanilla_dropout_and_width(fusion):  # A8
    recognizer = EmotionRecognizer(Config(fusion, 3, 8, 3, 8, dropout=0.4))
    for block in recognizer.fusion.blocks.values():
        assert block.dropout.p == 0.1  # --dropout is that between modules
        assert block.feed_forward[0].out_features == 64 == block.feed_forward[2].in_features
        assert [w.shape for w in (block.w_q, block.w_k, block.w_v)] == [(16, 16)] * 3


def test_defaults_are_the_papers():
    import train

    assert dataclasses.asdict(Config()) == {
        "fusion": "mmt", "audio_layers": 25, "audio_dim": 1024, "text_layers": 13, "text_dim": 768,
        "dim": 16, "n_classes": 4, "n_context": 9, "dropout": 0.5, "condense": "sum",
        "text_mask": "union", "cma_residual": False, "head": "mlp", "dropout_at": "modules",
    }  # fmt: skip
    settings = train.flags().parse_args([])
    assert settings.wavlm == "microsoft/wavlm-large" and settings.bert == "bert-base-uncased"
    assert settings.upstream == "paper" and settings.open == "bottom"
    same = "fusion dropout condense text_mask cma_residual head dropout_at".split()
    assert all(getattr(settings, name) == getattr(Config(), name) for name in same)
    assert settings.context == 9


def test_the_audio_is_normalised_before_the_upstream(tiny):
    x = 0.1 * torch.randn(4000)
    torch.testing.assert_close(
        tiny["audio"]([3 * x + 0.2])[0], tiny["audio"]([x])[0], atol=1e-3, rtol=0
    )


def test_unknown_fusion_and_missing_modality_are_said():
    with pytest.raises(ValueError, match="unknown fusion 'early'.*ef"):
        EmotionRecognizer(Config("early"))
    with pytest.raises(ValueError, match="unknown condense 'mean'"):
        Config(condense="mean")
    with pytest.raises(ValueError, match="needs audio"):
        EmotionRecognizer(Config("ef"))(None, None)


# --- upstreams


def test_states_are_all_layers_and_the_last_is_after_the_final_norm(tiny):
    states, mask = tiny["audio"]([torch.randn(4000), torch.randn(400)])
    assert states.shape == (2, (4000 - 400) // 320 + 1, 3, 64)
    assert mask.sum(dim=1).tolist() == [12, 1]
    # A LayerNorm with its initial gain leaves mean 0 and variance 1; the state before it has not.
    torch.testing.assert_close(states[0, :, -1].mean(-1), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        states[0, :, -1].var(-1, correction=0), torch.ones(12), atol=1e-2, rtol=0
    )
    assert (states[0, :, -2].var(-1, correction=0) - 1).abs().max() > 0.05


def test_texts_are_cut_at_512_tokens(tiny):
    assert tiny["text"](["hate " * 600])[0].shape[1] == 512


def raw_inputs(modality):
    if modality == "text":
        return ["i hate it", "lovely party, so lovely"]
    g = torch.Generator().manual_seed(7)
    return [torch.randn(3000, generator=g), torch.randn(4000, generator=g)]


@pytest.mark.parametrize("what", ["nothing", "bottom", "all"])
@pytest.mark.parametrize("modality", ["audio", "text"])
def test_upstreams_stay_in_eval_mode_and_open_only_what_they_are_told(modality, what, tiny):
    upstream = tiny[modality].train()
    assert not any(module.training for module in upstream.modules())
    before = {n: x.clone() for n, x in upstream.model.state_dict().items()}
    bottom = {"audio": "feature_extractor.", "text": "embeddings."}[modality]
    names = {n for n, _ in upstream.model.named_parameters()}
    starts = {"nothing": "nothing", "bottom": bottom, "all": ""}[what]
    expected = {n for n in names if n.startswith(starts)}
    opened = upstream.open(what)
    try:
        assert {n for n, p in upstream.model.named_parameters() if p.requires_grad} == expected
        assert set(opened) == expected
        states, _ = upstream(raw_inputs(modality))
        assert states.requires_grad == bool(expected)
        if expected:  # a step of an optimizer changes what is open, and nothing else
            states.square().sum().backward()
            torch.optim.AdamW(opened.values(), lr=0.1, weight_decay=0.1).step()
        now = upstream.model.state_dict()
        changed = {n for n, x in now.items() if not torch.equal(x, before[n])}
        learnt = {n for n, p in upstream.model.named_parameters() if p.grad is not None}
        assert changed <= expected and changed >= {n for n in learnt if before[n].any()}
        assert bool(learnt) == bool(expected)
    finally:
        upstream.model.load_state_dict(before)
        upstream.requires_grad_(False)
        upstream.zero_grad()


@pytest.mark.parametrize("modality", ["audio", "text"])
def test_every_layer_state_is_transformers_own(modality, tiny):
    """By hooks on the library's layers: input of the first, output of each, last after the norm."""
    import transformers as hf

    folder, raw = tiny[modality].name, raw_inputs(modality)
    states, mask = tiny[modality](raw)
    library = hf.AutoModel.from_pretrained(folder).eval()
    layers = library.encoder.layers if modality == "audio" else library.encoder.layer
    seen = []

    def note(layer, args, kwargs, out):
        if layer is layers[0]:
            seen.append(args[0] if args else kwargs["hidden_states"])
        seen.append(out[0] if isinstance(out, tuple) else out)

    for layer in layers:
        layer.register_forward_hook(note, with_kwargs=True)
    for i, x in enumerate(raw):  # each input alone
        seen.clear()
        if modality == "audio":
            library(((x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt())[None])
            seen[-1] = library.encoder.layer_norm(seen[-1])
        else:
            library(**hf.AutoTokenizer.from_pretrained(folder)(x, return_tensors="pt"))
        n = int(mask[i].sum())
        assert len(seen) == states.shape[2] == 3 and mask[i, :n].all() and seen[0].shape[1] == n
        for k in range(3):
            torch.testing.assert_close(states[i, :n, k], seen[k][0], atol=1e-4, rtol=1e-4)
            assert (seen[k] - seen[k - 1]).abs().max() > 0.01  # no two layers give the same


@pytest.fixture(scope="module")
def six_hundred_words(tmp_path_factory):
    words = [f"w{i}" for i in range(600)]
    return words, model.make_tiny_upstreams(str(tmp_path_factory.mktemp("long")), [" ".join(words)])


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_keeps_the_beginning(side, six_hundred_words):
    words, folders = six_hundred_words
    edit(Path(folders["text"]) / "tokenizer_config.json", truncation_side=side)
    upstream = Upstream(folders["text"], "text")
    n = upstream.max_tokens - 2  # without [CLS] and [SEP]
    assert n == 510
    whole, mask = upstream([" ".join(words)])
    torch.testing.assert_close(whole, upstream([" ".join(words[:n])])[0], atol=1e-5, rtol=1e-5)
    assert mask.shape == (1, 512) and mask.all()
    assert not torch.allclose(whole, upstream([" ".join(words[-n:])])[0], atol=1e-2)


def test_tiny_weights_do_not_depend_on_the_random_state(tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        model.make_tiny_upstreams(str(tmp_path / str(seed)), ["i hate it", "lovely party"])
    files = {p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*") if p.is_file()}
    assert {p.name for p in files} >= {"model.safetensors", "config.json", "tokenizer.json"}
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file


# --- kinds of upstreams: tiny folders with random weights, as a user may give them

SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
CNN = dict(
    conv_dim=(16, 16), conv_kernel=(40, 16), conv_stride=(20, 16), num_feat_extract_layers=2,
    num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=4,
)  # fmt: skip
LAYER = dict(feat_extract_norm="layer", do_stable_layer_norm=True)
VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] you know that i am so happy and are not sad or angry yes"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def audio_folder(folder, kind="Wav2Vec2", preprocessor={}, change=None, drop=None, **config):
    import transformers as hf

    torch.manual_seed(0)
    encoder = getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**{**SIZE, **CNN, **config}))
    save(encoder, folder, change, drop)
    preprocessor = {"return_attention_mask": True, **preprocessor}
    hf.Wav2Vec2FeatureExtractor(**preprocessor).save_pretrained(folder)


def text_folder(
    folder, kind="Bert", words=VOCABULARY, tokenizer={}, change=None, drop=None, **config
):
    import transformers as hf

    torch.manual_seed(0)
    words = words.split()
    if tokenizer is not None:
        vocabulary = {word: i for i, word in enumerate(words)}
        hf.BertTokenizer(vocab=vocabulary, **tokenizer).save_pretrained(folder)
    config = getattr(hf, f"{kind}Config")(**{**SIZE, "vocab_size": len(words), **config})
    save(getattr(hf, f"{kind}Model")(config), folder, change, drop)


def bytes_folder(folder, kind, special, **config):
    """RoBERTa and GPT-2: the tokenizer knows every byte, and merges none."""
    import transformers as hf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    torch.manual_seed(0)
    entries = special.split() + sorted(bytes_to_unicode().values())
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    getattr(hf, f"{kind}Tokenizer")(vocab=vocabulary, merges=[]).save_pretrained(folder)
    config = getattr(hf, f"{kind}Config")(vocab_size=len(entries), **SIZE, **config)
    getattr(hf, f"{kind}Model")(config).save_pretrained(folder)


def roberta_folder(folder, positions):
    special = "<s> <pad> </s> <unk> <mask>"
    bytes_folder(folder, "Roberta", special, pad_token_id=1, max_position_embeddings=positions)


def save(encoder, folder, change, drop):
    weights = encoder.state_dict()
    if change:  # (name, value): one number of one tensor
        weights[change[0]].view(-1)[0] = change[1]
    kept = {n: x for n, x in weights.items() if not drop or drop not in n}
    assert bool(drop) == (len(kept) < len(weights))
    encoder.save_pretrained(folder, state_dict=kept)


def after(make, file, **changes):
    def both(folder):
        make(folder)
        edit(folder / file, **changes)

    return both


def remove(make, file):
    def both(folder):
        make(folder)
        (folder / file).unlink()

    return both


def damaged(folder):
    text_folder(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])


def of(make, *args, **kwargs):
    return lambda folder: make(folder, *args, **kwargs)


BATCH, ALONE = "runs in a batch", "runs one by one"
KINDS = {  # modality, folder, and what Upstream makes of it: one of the two, or the reason it gives
    # audio
    "WavLM": ("audio", of(audio_folder, "WavLM", **LAYER), BATCH),
    "wav2vec2, layer norm": ("audio", of(audio_folder, **LAYER), BATCH),
    "wav2vec2, group norm": ("audio", of(audio_folder), ALONE),
    "wav2vec2, fine-tuned for CTC": (
        "audio",
        after(of(audio_folder, **LAYER), "config.json", architectures=["Wav2Vec2ForCTC"]), BATCH),
    "HuBERT, layer norm": ("audio", of(audio_folder, "Hubert", **LAYER), BATCH),
    "HuBERT, group norm": ("audio", of(audio_folder, "Hubert"), ALONE),
    "wav2vec2-conformer": ("audio", of(audio_folder, "Wav2Vec2Conformer", **LAYER), ALONE),
    "data2vec-audio": ("audio", of(audio_folder, "Data2VecAudio", conv_pos_kernel_size=3), ALONE),
    "UniSpeech-SAT": ("audio", of(audio_folder, "UniSpeechSat", **LAYER), BATCH),
    "extractor pads left": (
        "audio", of(audio_folder, preprocessor={"padding_side": "left"}, **LAYER), BATCH),
    "extractor without masks": (
        "audio", of(audio_folder, preprocessor={"return_attention_mask": False}, **LAYER), BATCH),
    "8 kHz": ("audio", of(audio_folder, preprocessor={"sampling_rate": 8000}, **LAYER), "8000 Hz"),
    "add_adapter": ("audio", of(audio_folder, add_adapter=True, **LAYER), ""),
    "no extractor": (
        "audio", remove(of(audio_folder, **LAYER), "preprocessor_config.json"), "extractor"),
    "audio: weights missing": (
        "audio", of(audio_folder, drop="layers.1.attention.k_proj", **LAYER),
        "no weights for encoder.layers.1.attention.k_proj"),
    "audio: more layers than weights": (
        "audio", after(of(audio_folder, **LAYER), "config.json", num_hidden_layers=3),
        "no weights for encoder.layers.2"),
    "audio: fewer layers than weights": (
        "audio", after(of(audio_folder, **LAYER), "config.json", num_hidden_layers=1),
        "no layer for encoder.layers.1"),
    "audio: NaN": (
        "audio",
        of(audio_folder, change=("encoder.layers.0.attention.k_proj.bias", math.nan), **LAYER),
        "not finite"),
    "audio: inf": (
        "audio",
        of(audio_folder, change=("encoder.layers.1.final_layer_norm.weight", math.inf), **LAYER),
        "not finite"),
    "text given as audio": ("audio", of(text_folder), ""),
    "unknown kind": (
        "audio", after(of(audio_folder, **LAYER), "config.json", model_type="other"),
        "model type `other`"),
    # text
    "BERT": ("text", of(text_folder), BATCH),
    "BERT without pooler": ("text", of(text_folder, drop="pooler"), BATCH),
    "BERT of 64 positions": ("text", of(text_folder, max_position_embeddings=64), BATCH),
    "RoBERTa of 514 positions": ("text", of(roberta_folder, 514), BATCH),
    "RoBERTa of 130 positions": ("text", of(roberta_folder, 130), BATCH),
    "ELECTRA": ("text", of(text_folder, "Electra", embedding_size=16), BATCH),
    "tokenizer pads left": ("text", of(text_folder, tokenizer={"padding_side": "left"}), BATCH),
    "no tokenizer files": ("text", of(text_folder, tokenizer=None), "tokenizer has 5 entries"),
    "embedding too small": (
        "text", of(text_folder, vocab_size=15), "tokenizer has 19 entries, the embedding 15"),
    "tokenizer of another model": (
        "text", of(text_folder, vocab_size=60), "tokenizer has 19 entries, the embedding 60"),
    "ordinary words unknown": (
        "text", of(text_folder, words="[PAD] [UNK] [CLS] [SEP] [MASK] foo bar baz"),
        "14 of 16 ordinary tokens are unknown"),
    "no pad token": (
        "text", after(of(text_folder), "tokenizer_config.json", pad_token=None), "padding token"),
    "GPT-2": ("text", of(bytes_folder, "GPT2", "<|endoftext|>"), ""),
    "text: weights missing": (
        "text", of(text_folder, drop="layer.1.attention.self.key"),
        "no weights for encoder.layer.1.attention.self.key"),
    "text: fewer layers than weights": (
        "text", after(of(text_folder), "config.json", num_hidden_layers=1),
        "no layer for encoder.layer.1"),
    "text: NaN": ("text", of(text_folder, change=("encoder.layer.1.output.dense.bias", math.nan)),
                  "not finite"),
    "damaged weights": ("text", damaged, ""),
    "audio given as text": ("text", of(audio_folder, **LAYER), ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_upstreams(kind, tmp_path):
    import transformers as hf

    modality, make, verdict = KINDS[kind]
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder)
    flag = {"audio": "--wavlm", "text": "--bert"}[modality]
    if verdict not in (BATCH, ALONE):
        with pytest.raises(InputError) as error:
            Upstream(str(folder), modality)
        sentence = str(error.value)
        assert sentence.startswith(f"{flag} {folder}: ") and verdict in sentence
        assert "\n" not in sentence
        assert sentence.endswith(f"use a whole {modality} encoder, or download it again")
        return

    upstream = Upstream(str(folder), modality)
    assert upstream.one_by_one == (verdict == ALONE)
    # Each input alone, straight through the library, against a batch of unlike lengths.
    g = torch.Generator().manual_seed(8)
    if modality == "audio":
        raw = [torch.randn(n, generator=g) for n in (2500, 9000, 4000)]
        given = [{"input_values": ((x - x.mean()) / x.std(correction=0))[None]} for x in raw]
    else:
        raw = ["yes", "i know that you are angry and so sad", "happy or not"]
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        given = [tokenizer(x, return_tensors="pt") for x in raw]
    library = hf.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states, mask = upstream(raw)
        for x, real, inputs in zip(states, mask, given, strict=True):
            out = library(**inputs, output_hidden_states=True)
            expected = torch.stack((*out.hidden_states[:-1], out.last_hidden_state), dim=2)[0]
            n = len(expected)
            assert real.tolist() == [True] * n + [False] * (len(real) - n)
            torch.testing.assert_close(x[:n], expected, atol=1e-4, rtol=1e-3)
        if modality == "text":  # the longest text that the positions allow
            longest = {"BERT of 64 positions": 64, "RoBERTa of 130 positions": 128}.get(kind, 512)
            assert upstream(["you know " * 400])[0].shape[1] == longest == upstream.max_tokens


@pytest.mark.parametrize("kind", ["add_adapter", "GPT-2", "audio given as text"])
def test_a_refusal_gives_a_reason_that_a_user_understands(kind, tmp_path):
    modality, make, _ = KINDS[kind]
    make(tmp_path)
    with pytest.raises(InputError) as error:
        Upstream(str(tmp_path), modality)
    assert not re.search("has no attribute|NoneType|stack expects", str(error.value))


def test_code_in_a_folder_never_runs(tmp_path, monkeypatch):
    text_folder(tmp_path)
    (tmp_path / "code.py").write_text(
        "from transformers import BertConfig, BertModel\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class C(BertConfig):\n    model_type = 'other'\n"
        "class M(BertModel):\n    config_class = C\n"
    )
    auto = {"AutoConfig": "code.C", "AutoModel": "code.M"}
    edit(tmp_path / "config.json", model_type="other", auto_map=auto)
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")  # an eager user
    with pytest.raises(InputError):
        Upstream(str(tmp_path), "text")
    assert not asked and not (tmp_path / "ran").exists()


def test_models_that_normalise_over_time_see_one_clip_at_a_time(tmp_path):
    import transformers as hf

    config = hf.WavLMConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8,) * 7, feat_extract_norm="group", do_stable_layer_norm=False,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    hf.WavLMModel(config).save_pretrained(tmp_path)
    hf.Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(tmp_path)
    upstream = Upstream(str(tmp_path), "audio")
    clips = [torch.randn(2000), torch.randn(6000)]
    states, mask = upstream(clips)
    torch.testing.assert_close(states[0][mask[0]], upstream(clips[:1])[0][0], atol=1e-5, rtol=1e-4)


def test_the_hubs_old_checkpoint_format_loads_whole(tiny, tmp_path):
    old = {}
    for name, value in tiny["audio"].model.state_dict().items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        old[name.replace("parametrizations.weight.original1", "weight_v")] = value
    assert "encoder.pos_conv_embed.conv.weight_g" in old
    tiny["audio"].model.config.save_pretrained(tmp_path)
    tiny["audio"].preprocessor.save_pretrained(tmp_path)
    torch.save(old, tmp_path / "pytorch_model.bin")
    loaded = Upstream(str(tmp_path), "audio")
    for name, value in tiny["audio"].model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    del old["encoder.pos_conv_embed.conv.weight_g"]
    torch.save(old, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="no weights for .*pos_conv_embed.*whole audio encoder"):
        Upstream(str(tmp_path), "audio")


def test_weights_that_cannot_be_had_are_one_sentence(tmp_path):
    with pytest.raises(InputError) as error:
        Upstream("nobody/no-such-model-anywhere", "audio")
    assert "--wavlm nobody/no-such-model-anywhere" in str(error.value) and "\n" not in str(
        error.value
    )
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="--bert .*download it again"):
        Upstream(str(tmp_path), "text")


def test_python_model_py_prints_every_block_at_full_size():
    done = subprocess.run(
        [sys.executable, ROOT / "model.py"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for pattern in (
        r"WavLM-Large.*249, 25, 1024.* 315,453,120$", r"CNN encoder.* 4,206,592$",
        r"BERT-base.*13, 768.* 109,482,240$", r"embeddings.* 23,837,184$", r"projector.* 16,432$",
        r"projector.* 12,336$", r"context.*\(2, 9, 20, 16\).* 82$", r"EmotionRecognizer.*\(2, 4\)",
    ):  # fmt: skip
        assert re.search(pattern, done.stdout, re.MULTILINE), pattern
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    for block in ("audio-to-text", "text-to-audio"):  # the matrices of Eq. (1), after their block
        (i,) = [i for i, line in enumerate(lines) if line.strip().startswith(block)]
        assert [line.split() for line in lines[i + 1 : i + 4]] == [
            [w, "(16,", "16)", "256"] for w in ("W_Q", "W_K", "W_V")
        ]
    # The paper's equations by hand: S&E, projector, context; two blocks; an MLP of 32-16-4.
    (total,) = [line for line in lines if "EmotionRecognizer" in line]
    block = 3 * 16 * 16 + 4 * 16 + (16 * 64 + 64) + (64 * 16 + 16)
    parts = (76 + 16432) + (40 + 12336 + 82) + 2 * block + (32 * 16 + 16) + (16 * 4 + 4)
    assert total.endswith(f" {parts:,}")
