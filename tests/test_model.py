"""model.py against hand-worked numbers, naive loops, PyTorch's own blocks, and gradients."""

import math
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import model
from conftest import ROOT
from model import FUSIONS, Config, EmotionRecognizer, TransformerBlock, Upstream, UpstreamError


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
    config = Config("audio-fc", audio_layers=4, audio_dim=5, condense=condense)
    extractor = model.FeatureExtractor(4, 5, config)
    expected = extractor.projector(extractor.se(x, mask))  # S&E's output, then Project & Norm
    found, _ = extractor(x, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # Without padding: the real steps alone, one utterance after another.
    packed, same = extractor(x[mask], mask)
    torch.testing.assert_close(packed[mask], expected[mask], atol=1e-5, rtol=1e-5)
    assert (packed[~mask] == 0).all() and same is mask
    grads = []
    for out in (expected[mask], packed[mask]):
        extractor.zero_grad()
        out.square().sum().backward()
        grads.append([p.grad.clone() for p in extractor.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_nothing_of_the_head_stays_on_another_device(fusion):
    """On torch's meta device, an operand that was left on the CPU raises."""
    recognizer = EmotionRecognizer(Config(fusion, 3, 8, 3, 8)).to("meta").train()
    audio = torch.empty(2, 5, 3, 8, device="meta"), torch.ones(2, 5, device="meta", dtype=torch.bool)
    text = torch.empty(4, 6, 3, 8, device="meta"), torch.ones(4, 6, device="meta", dtype=torch.bool)
    context = torch.zeros(2, 9, device="meta", dtype=torch.long)
    assert recognizer(audio, (*text, context)).shape == (2, 4)


def test_which_blocks_have_a_residual():  # A7
    of = {f: EmotionRecognizer(Config(f, 3, 8, 3, 8)).fusion.blocks for f in FUSIONS}
    found = {f: {n: b.residual for n, b in blocks.items()} for f, blocks in of.items()}
    assert found == {
        "audio-fc": {}, "audio-te": {"audio-to-audio": True}, "text-fc": {},
        "text-te": {"text-to-text": True}, "cmt-a2t": {"audio-to-text": False},
        "cmt-t2a": {"text-to-audio": False}, "ef": {},
        "lf": {"audio-to-audio": True, "text-to-text": True},
        "mmt": {"audio-to-text": False, "text-to-audio": False},
    }  # fmt: skip
    switched = EmotionRecognizer(Config("mmt", 3, 8, 3, 8, cma_residual=True)).fusion.blocks
    assert all(block.residual for block in switched.values())


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


def test_windows_spelled_out_equal_shared_rows(tiny):
    _, text, context = sample(tiny)
    recognizer = EmotionRecognizer(small_config("text-te", tiny)).eval()
    with torch.no_grad():
        states, mask = tiny["text"](text)
        shared = recognizer(None, (states, mask, context))
        spelled = (
            states[context.clamp(min=0)],
            mask[context.clamp(min=0)] & (context >= 0)[..., None],
        )
        torch.testing.assert_close(recognizer(None, spelled), shared)


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
    t = torch.randn(8, 9, 4, tiny["text"].n_layers, tiny["text"].dim, generator=g)
    a_mask, t_mask = torch.ones(8, 5, dtype=torch.bool), torch.ones(8, 9, 4, dtype=torch.bool)
    labels = torch.tensor([0, 1, 2, 3] * 2)
    recognizer = EmotionRecognizer(small_config(fusion, tiny))
    recognizer.eval()
    first = F.cross_entropy(recognizer((a, a_mask), (t, t_mask)), labels)
    assert abs(first.item() - math.log(4)) < 0.25
    optimizer = torch.optim.AdamW(recognizer.parameters(), lr=1e-2)
    for _ in range(150):
        loss = F.cross_entropy(recognizer((a, a_mask), (t, t_mask)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("fusion, between", [("text-fc", 1), ("text-te", 1), ("ef", 2), ("mmt", 2)])
def test_dropout_of_one_half_stands_between_the_modules(fusion, between, tiny):  # A16
    config = small_config(fusion, tiny)
    assert config.dropout == 0.5
    recognizer, seen = EmotionRecognizer(config).train(), []
    for layer in (recognizer.dropout, recognizer.fusion_dropout):
        layer.register_forward_hook(lambda layer, args, out: seen.append((layer.p, args[0], out)))
    audio, text, context = sample(tiny)
    recognizer(tiny["audio"](audio), (*tiny["text"](text), context))
    active = [(x, out) for p, x, out in seen if p]
    extracted = len(config.modalities)
    assert len(active) == extracted + (between == 2)
    for x, out in active:  # what is kept is doubled, about half is not kept
        kept = out != 0
        torch.testing.assert_close(out[kept], 2 * x[kept])
        assert 0.3 < kept.float().mean() < 0.7


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


def test_upstreams_stay_in_eval_mode_and_open_only_what_they_are_told(tiny):
    for m, part in (("audio", "feature_extractor."), ("text", "embeddings.")):
        upstream = tiny[m].train()
        assert not any(module.training for module in upstream.modules())
        names = {n for n, _ in upstream.model.named_parameters()}
        before = {n: p.clone() for n, p in upstream.model.named_parameters()}
        for what, expected in (
            ("nothing", set()), ("bottom", {n for n in names if n.startswith(part)}), ("all", names)
        ):  # fmt: skip
            opened = upstream.open(what)
            assert {n for n, p in upstream.model.named_parameters() if p.requires_grad} == expected
            assert len(opened) == len(expected) and set(upstream.weights()) == expected
            for p in opened:
                p.data += 1.0
            upstream.close()  # the pre-trained bits are back
            assert all(torch.equal(p, before[n]) for n, p in upstream.model.named_parameters())
            assert not any(p.requires_grad for p in upstream.parameters())


def test_every_layer_state_is_transformers_own(tiny):
    clips = [torch.randn(4000), torch.randn(3000)]
    texts = ["i hate it", "lovely party, so lovely"]
    for m, raw in (("audio", clips), ("text", texts)):
        states, mask = tiny[m](raw)
        for i, x in enumerate(raw):  # each input alone, straight through the library
            given = (
                tiny[m].preprocessor(x.numpy(), sampling_rate=16000, return_tensors="pt")
                if m == "audio" else tiny[m].preprocessor(x, return_tensors="pt")
            )  # fmt: skip
            given.pop("attention_mask")
            out = tiny[m].model(**given, output_hidden_states=True)
            n = int(mask[i].sum())
            for layer in range(states.shape[2] - 1):
                theirs = out.hidden_states[layer][0]
                torch.testing.assert_close(states[i, :n, layer], theirs, atol=1e-4, rtol=1e-4)
            last = out.last_hidden_state[0]
            torch.testing.assert_close(states[i, :n, -1], last, atol=1e-4, rtol=1e-4)


def test_truncation_keeps_the_beginning(tiny):
    words = [f"{a}{b}" for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz"]
    ids = tiny["text"].preprocessor(" ".join(words))["input_ids"]
    assert len(ids) > 512 and tiny["text"].max_tokens == 512
    whole, _ = tiny["text"]([" ".join(words)])
    start = tiny["text"].model.embeddings(torch.tensor([ids[:511] + [ids[-1]]]))
    torch.testing.assert_close(whole[:, :, 0], start, atol=1e-5, rtol=1e-5)


def test_models_that_normalise_over_time_see_one_clip_at_a_time(tmp_path):
    import transformers as hf

    config = model.wavlm_config(
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
    with pytest.raises(UpstreamError, match="no weights for .*pos_conv_embed.*whole audio encoder"):
        Upstream(str(tmp_path), "audio")


def test_weights_that_cannot_be_had_are_one_sentence(tmp_path):
    with pytest.raises(UpstreamError) as error:
        Upstream("nobody/no-such-model-anywhere", "audio")
    assert "--wavlm nobody/no-such-model-anywhere" in str(error.value) and "\n" not in str(
        error.value
    )
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UpstreamError, match="--bert .*download it again"):
        Upstream(str(tmp_path), "text")


def test_python_model_py_prints_every_block_at_full_size():
    done = subprocess.run(
        [sys.executable, ROOT / "model.py"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for pattern in (
        r"WavLM-Large.*249, 25, 1024.*315,453,120", r"CNN encoder.*4,206,592",
        r"BERT-base.*13, 768.*109,482,240", r"embeddings.*23,837,184", r"projector.*16,432",
        r"projector.*12,336", r"context.*\(2, 9, 20, 16\).*82", r"EmotionRecognizer.*\(2, 4\)",
    ):  # fmt: skip
        assert re.search(pattern, done.stdout), pattern


