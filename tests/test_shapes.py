"""Every block of §2 at the paper's own sizes: shapes, and parameters counted by hand.

    python -m pytest tests/test_shapes.py -v

Read this page first, with §2 and Figures 1 to 3 open. Each test quotes the sentence of
the paper that it checks. The batch has two utterances: clips of 5 s, and nine texts of
20 word pieces each. All numbers in it are zero, because only shapes matter here.
"""

import inspect

import pytest
import torch

import model
from model import Config, EmotionRecognizer

B, FRAMES, TOKENS = 2, 249, 20
AUDIO = torch.zeros(B * FRAMES, 25, 1024), torch.ones(B, FRAMES, dtype=torch.bool)
TEXT = torch.zeros(B * 9 * TOKENS, 13, 768), torch.ones(B, 9, TOKENS, dtype=torch.bool)

# The parameters of each block, by hand. A Linear(n, m) has n * m weights and m biases,
# and a LayerNorm(n) has n gains and n biases.
SE_25 = (25 * 1 + 1) + (1 * 25 + 25)
SE_13 = (13 * 1 + 1) + (1 * 13 + 13)
PROJECT_1024 = (1024 * 16 + 16) + (16 + 16)
PROJECT_768 = (768 * 16 + 16) + (16 + 16)
CONV2D = 9 * 3 * 3 + 1
X_A = SE_25 + PROJECT_1024
X_T = SE_13 + PROJECT_768 + CONV2D
FEED_FORWARD = (16 * 64 + 64) + (64 * 16 + 16)
BLOCK = 3 * 16 * 16 + FEED_FORWARD + 2 * (16 + 16)  # W_Q, W_K, W_V; two LayerNorms
MLP_1 = (16 * 16 + 16) + (16 * 4 + 4)  # on one path
MLP_2 = (32 * 16 + 16) + (16 * 4 + 4)  # on two paths


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# --- §2.1 High-level feature extractor ------------------------------------------------


def test_2_1_wavlm_gives_249_frames_of_25_layers_of_1024_features():
    """§2.1: "a shape of 50 x 25 x 1024 (dimensions of time, layer and feature
    respectively) for each second". Exactly, 1 s has 49 frames and 5 s have 249 [E3]."""
    from transformers import WavLMConfig, WavLMModel

    with torch.device("meta"):  # shapes alone: no memory, no computation
        wavlm = WavLMModel(WavLMConfig(**model.WAVLM_LARGE)).eval()
        output = wavlm(torch.zeros(1, 5 * 16000), output_hidden_states=True)
    assert len(output.hidden_states) == 25
    assert {tuple(x.shape) for x in output.hidden_states} == {(1, 249, 1024)}
    assert model.frame_count(1 * 16000, wavlm.config) == 49
    assert model.frame_count(5 * 16000, wavlm.config) == 249


def test_2_1_bert_gives_13_layers_of_768_features_for_each_token():
    """§2.1: "a feature map with a size of 1 x 13 x 768 for each token"."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        bert = BertModel(BertConfig()).eval()
        tokens = torch.zeros(1, TOKENS, dtype=torch.long)
        output = bert(tokens, output_hidden_states=True)
    assert len(output.hidden_states) == 13
    assert {tuple(x.shape) for x in output.hidden_states} == {(1, TOKENS, 768)}


@pytest.mark.parametrize(
    ("n_layers", "batch", "parameters"), [(25, AUDIO, SE_25), (13, TEXT, SE_13)]
)
def test_2_1_squeeze_and_excitation_gives_one_gate_for_each_layer(
    n_layers, batch, parameters
):
    """§2.1: "to calibrate layer-wise feature responses adaptively, where the reduction
    ratio is simply the number of layers". So the bottleneck has one unit [A2]."""
    states, mask = batch
    mask = mask.flatten(0, -2)  # each text of a window has its own gates
    se = model.SqueezeExcitation(n_layers)
    assert se(states, mask).shape == (len(mask), n_layers)
    assert count(se) == parameters


def test_2_1_fig_2a_x_a_is_a_sequence_of_16_features():
    """§2.1: "we project the calibrated features into the dimension of 16". The layers
    are summed before [A1], and the projector is one matrix and a LayerNorm [A3]."""
    extractor = model.FeatureExtractor(25, 1024, 16)
    assert extractor(*AUDIO).shape == (B, FRAMES, 16)
    assert count(extractor.linear) + count(extractor.norm) == PROJECT_1024
    assert count(extractor) == X_A


def test_2_1_fig_2b_conv2d_makes_one_map_of_nine_texts():
    """§2.1: "aggregated into a context-aware textual embedding using a convolutional
    layer with the stride of 1 and kernel size of 3" [A4]."""
    extractor = model.TextFeatureExtractor(13, 768, 16, n_context=9)
    x_t, mask = extractor(*TEXT)
    assert x_t.shape == (B, TOKENS, 16) and mask.shape == (B, TOKENS)
    assert count(extractor.each_text) == SE_13 + PROJECT_768
    assert count(extractor.conv) == CONV2D


# --- §2.2 Cross-modal fusion ----------------------------------------------------------


def test_2_2_equation_1_gives_each_target_step_a_mean_of_the_source():
    """§2.2: W_Q is "d_t x d_k", W_K "d_s x d_k" and W_V "d_s x d_v". All sizes differ
    here, so that none can take the place of another."""
    d_t, d_s, d_k, d_v = 5, 6, 7, 8
    x_t, x_s = torch.zeros(B, TOKENS, d_t), torch.zeros(B, FRAMES, d_s)
    matrices = torch.zeros(d_t, d_k), torch.zeros(d_s, d_k), torch.zeros(d_s, d_v)
    out, weights = model.cross_modal_attention(x_t, x_s, *matrices, AUDIO[1])
    assert out.shape == (B, TOKENS, d_v) and weights.shape == (B, TOKENS, FRAMES)


@pytest.mark.parametrize("residual", [True, False])
def test_2_2_fig_3c_a_transformer_block_keeps_the_steps_of_its_target(residual):
    """§2.2: "CMT has the same backbone as the vanilla Transformer, but the query and
    key-value pairs come from different modalities" [A8]."""
    block = model.TransformerBlock(16, residual)
    x_t, x_s = torch.zeros(B, TOKENS, 16), torch.zeros(B, FRAMES, 16)
    assert block(x_t, x_s, AUDIO[1]).shape == (B, TOKENS, 16)
    assert count(block) == BLOCK


def test_2_2_average_time_pooling_leaves_no_time():
    """§2.2: "An average time pooling layer follows the CMT to compress variant time
    lengths into one"."""
    assert model.masked_mean(torch.zeros(B, FRAMES, 16), AUDIO[1]).shape == (B, 16)


# --- §2.3 Classifier, and the nine systems of Table 1 ---------------------------------


@pytest.mark.parametrize(
    ("fusion", "paths", "parameters"),
    [
        ("audio-fc", 1, X_A + MLP_1),  # Sys. 1, 2: 16,848
        ("audio-te", 1, X_A + BLOCK + MLP_1),  # Sys. 3, 4: 19,808
        ("text-fc", 1, X_T + MLP_1),  # Sys. 5, 6: 12,798
        ("text-te", 1, X_T + BLOCK + MLP_1),  # Sys. 7, 8: 15,758
        ("cmt-a2t", 1, X_A + X_T + BLOCK + MLP_1),  # Sys. 9, 10: 32,266
        ("cmt-t2a", 1, X_A + X_T + BLOCK + MLP_1),  # Sys. 11, 12: 32,266
        ("ef", 2, X_A + X_T + MLP_2),  # Sys. 13, 14: 29,562
        ("lf", 2, X_A + X_T + 2 * BLOCK + MLP_2),  # Sys. 15, 16: 35,482
        ("mmt", 2, X_A + X_T + 2 * BLOCK + MLP_2),  # Sys. 17, 18: 35,482
    ],
)
def test_2_3_fig_1_a_system_gives_4_logits(fusion, paths, parameters):
    """§2.3: "we adopted a simple MLP comprised of fully connected (FC) layers as the
    classifier for the fused features" [A15]. Two paths are concatenated (Fig. 3)."""
    recognizer = EmotionRecognizer(Config(fusion))
    fused = []
    recognizer.fusion.register_forward_hook(lambda *call: fused.append(call[-1]))
    assert recognizer(AUDIO, TEXT).shape == (B, 4)
    assert fused[0].shape == (B, 16 * paths)
    assert count(recognizer) == parameters


# --- What must not flow: padding, and other utterances of the batch -------------------

# Two utterances: clips of 5 and 7 frames, and nine texts of 4 and of 6 word pieces.
AUDIO_MASK = torch.arange(7) < torch.tensor([[5], [7]])  # (2, 7)
TEXT_MASK = torch.arange(6) < torch.tensor([[4], [6]])  # (2, 6)
TEXTS_MASK = TEXT_MASK.unsqueeze(1).repeat(1, 9, 1)  # (2, 9, 6)

# Inputs of blocks by name: their shape, and the real steps of the first utterance.
FIRST = torch.tensor([[True], [False]])
INPUTS = {
    "audio": ((12, 25, 1024), AUDIO_MASK.nonzero()[:, 0] == 0),
    "text": ((90, 13, 768), TEXTS_MASK.nonzero()[:, 0] == 0),
    "x_a": ((2, 7, 16), AUDIO_MASK & FIRST),
    "x_t": ((2, 6, 16), TEXT_MASK & FIRST),
}

torch.manual_seed(0)
SE = model.SqueezeExcitation(25)
FIG_2A = model.FeatureExtractor(25, 1024, 16)
FIG_2B = model.TextFeatureExtractor(13, 768, 16, 9)
CMT = model.TransformerBlock(16, residual=False).eval()
TE = model.TransformerBlock(16, residual=True).eval()
MMT = EmotionRecognizer(Config()).eval()


def attend(x_t, x_s):
    matrices = CMT.w_q, CMT.w_k, CMT.w_v
    return model.cross_modal_attention(x_t, x_s, *matrices, AUDIO_MASK)[0]


BLOCKS = {
    "2.1 S&E": lambda audio: SE(audio, AUDIO_MASK),
    "2.1 X_A": lambda audio: FIG_2A(audio, AUDIO_MASK)[:, :5],
    "2.1 X_T": lambda text: FIG_2B(text, TEXTS_MASK)[0][:, :4],
    "2.2 Eq. (1) A to T": lambda x_t, x_a: attend(x_t, x_a)[:, :4],
    "2.2 CMT A to T": lambda x_t, x_a: CMT(x_t, x_a, AUDIO_MASK)[:, :4],
    "2.2 CMT T to A": lambda x_a, x_t: CMT(x_a, x_t, TEXT_MASK)[:, :5],
    "2.2 Transformer": lambda x_a: TE(x_a, x_a, AUDIO_MASK)[:, :5],
    "2.2 time pooling": lambda x_a: model.masked_mean(x_a, AUDIO_MASK),
    "Fig. 1 MMT": lambda audio, text: MMT((audio, AUDIO_MASK), (text, TEXTS_MASK)),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_an_utterance_sees_its_own_real_steps_and_nothing_else(block):
    """Fig. 2 has an arrow "padding mask", because §2.2 has "variant time lengths". The
    gradient of the first utterance's output shows all that it depends on."""
    leaves = {}
    for name in inspect.signature(BLOCKS[block]).parameters:
        leaves[name] = torch.randn(INPUTS[name][0], requires_grad=True)
    output = BLOCKS[block](**leaves)[0]
    (output * torch.randn(output.shape)).sum().backward()
    for name, x in leaves.items():
        own = INPUTS[name][1]
        touched = (x.grad != 0).flatten(own.ndim).any(dim=-1)
        assert torch.equal(touched, own), f"{block} sees padding or a batch mate"
