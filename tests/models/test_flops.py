"""The analytic count against torch's counter, and against the published figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import models.layers.attention
from data.types import Batch
from models.audio_encoder import AudioEncoder
from models.code_predictor import CodePredictor
from models.config import AudioConfig, TextConfig, ThinkerConfig, VisionConfig
from models.flops import (
    active_parameters,
    audio_flops,
    code_predictor_flops,
    flops_per_token,
    talker_flops,
    text_flops,
    vision_flops,
)
from models.init import init_weights
from models.layers.experts import Experts, _grouped_experts
from models.omni_config import CONTROL_IDS, CodePredictorConfig, TalkerConfig
from models.talker import Talker
from models.thinker import Thinker
from models.vision_encoder import VisionEncoder
from train.loss import Objective

RELEASED = TextConfig(152064, 2048, 48, 32, 4, 128, 128, 8, 768)


def test_published_convention():
    """Qwen3-30B-A3B, vocabulary 151,936, at 4,096 tokens: 23.08 GFLOP per token."""
    config = replace(RELEASED, vocab_size=151936)
    assert flops_per_token(config, 4096) == pytest.approx(23.08e9, rel=1e-3)
    assert active_parameters(config) == pytest.approx(2.730e9 + 0.311e9, rel=1e-3)


def test_packing_counts_documents_apart():
    assert text_flops(RELEASED, [1000, 1000]) == 2 * text_flops(RELEASED, [1000]) < text_flops(RELEASED, [2000])


@pytest.fixture
def counted(monkeypatch):
    """Attention by matrix products, which torch's counter counts; it does not count CPU attention."""

    def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        elif attn_mask is not None:
            bias = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, float("-inf"))
            scores = scores + (bias if attn_mask.dtype is torch.bool else attn_mask)
        return scores.softmax(-1) @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(models.layers.attention, "STRIPS_UP_TO", 0)  # whole squares, one size of them
    return count


def count(run: Callable[[], Tensor]) -> int:
    """FLOPs of forward and backward, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run().backward()
    return counter.get_total_flops()


def other_half(heads: int, channels: int, layers: int, lengths: Sequence[int]) -> int:
    """What eager causal attention computes above the diagonal, which the convention leaves out."""
    return 3 * 4 * heads * channels * layers * sum(length**2 for length in lengths) // 2


def test_text_against_torch_counter(counted):
    """Decoder, experts, router, head and loss, forward and backward, over packed documents."""
    text = TextConfig(96, 64, 3, 4, 2, 16, 8, 2, 32, mrope_section=(4, 2, 2))
    thinker = Thinker(ThinkerConfig(text, AudioConfig(16, 1, 2, 32, 64, downsample_hidden_size=8), 1))
    init_weights(thinker, 0)
    objective = Objective(thinker, top_k=2, max_logits=1 << 20)  # one piece: torch does not count addmm_ of the others
    lengths = (64, 64, 64)
    ids_T = torch.randint(2, 96, (192,))
    batch = replace(
        Batch.empty(128),
        token_ids_T=ids_T,
        labels_T=ids_T,
        position_ids_3T=torch.arange(192).float().repeat(3, 1),
        doc_lengths=lengths,
    )
    extra = other_half(4, 16, 3, lengths)
    # no balance loss, so that the routers get their gradient from the routing weights alone
    assert counted(lambda: objective(batch).losses_K.sum()) - extra == pytest.approx(
        text_flops(text, lengths), rel=1e-3
    )


def test_audio_against_torch_counter(counted):
    config = AudioConfig(32, 2, 2, 64, 48, downsample_hidden_size=8)
    encoder, frames = AudioEncoder(config), 1600  # full seconds and windows: nothing is padded
    mel_FM = torch.randn(frames, 128, requires_grad=True)
    assert counted(lambda: encoder(mel_FM, (frames,)).sum()) == pytest.approx(audio_flops(config, [frames]), rel=1e-3)


def test_vision_against_torch_counter(counted):
    """Two videos of one size; positions are made once for all their frames."""
    config = VisionConfig(3, 64, 128, 2, 48, (0, 1), 16)
    encoder, grids = VisionEncoder(config), [(24, 8, 6)]
    pixels_PX = torch.randn(24 * 48, config.patch_dim, requires_grad=True)

    def run() -> Tensor:
        features_TD, deepstack = encoder(pixels_PX, grids)
        return features_TD.sum() + torch.stack(deepstack).sum()

    assert counted(run) == pytest.approx(vision_flops(config, grids), rel=1e-3)


SPEAKS = TalkerConfig(
    TextConfig(600, 64, 2, 4, 2, 16, 8, 2, 32, mrope_section=(4, 2, 2), shared_expert_intermediate_size=48),
    CodePredictorConfig(64, 64, 96, 2, 4, 2, 16, num_code_groups=5),
    thinker_hidden_size=80,
    accept_hidden_layer=1,
    **{name: 64 + place for place, name in enumerate(CONTROL_IDS)},
    speaker_id={},
)


def test_code_predictor_against_torch_counter(counted):
    config, frames = SPEAKS.code_predictor, 40
    predictor = CodePredictor(config)
    hidden_ND, first_ND = (torch.randn(frames, 64, requires_grad=True) for _ in range(2))
    codes_RN = torch.randint(0, 64, (4, frames))
    found = counted(lambda: predictor.logits(predictor(hidden_ND, first_ND, codes_RN)).sum())
    extra = other_half(4, 16, 2, [5] * frames)
    assert found - extra == pytest.approx(code_predictor_flops(config, frames), rel=1e-3)


def test_talker_against_torch_counter(counted):
    """Projections, backbone with its shared expert, head on the frames' rows alone, and the code predictor."""
    talker, lengths, frames = Talker(SPEAKS), (48, 48), 60
    for parameter in talker.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    text_XH, media_MH = torch.randn(56, 80, requires_grad=True), torch.randn(40, 80, requires_grad=True)
    codes_GN = torch.randint(0, 64, (5, frames))

    def run() -> Tensor:
        inputs_TD = torch.cat([talker.text_projection(text_XH), talker.hidden_projection(media_MH)])
        hidden_TD, logits = talker(inputs_TD, torch.arange(96).float().repeat(3, 1), lengths)
        first_NV = talker.codec_head(hidden_TD[:62])
        states_NRD = talker.residual_states(hidden_TD[:frames], codes_GN)
        return first_NV.sum() + talker.code_predictor.logits(states_NRD).sum()

    extra = other_half(4, 16, 2, lengths) + other_half(4, 16, 2, [5] * frames)
    expected = talker_flops(SPEAKS, lengths, frames, text_rows=56, media_rows=40)
    assert counted(run) - extra == pytest.approx(expected, rel=1e-3)


def test_torch_counts_our_experts_and_no_grouped_products():
    """What a figure from torch's counter would miss on a GPU: all of the experts."""
    tokens, hidden, width, chosen = 100, 64, 32, 2
    experts = Experts(4, hidden, width)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x_TD, weight_TK = torch.randn(tokens, hidden, requires_grad=True), torch.rand(tokens, chosen, requires_grad=True)
    chosen_TK = torch.rand(tokens, 4).topk(chosen).indices
    arguments = x_TD, experts.gate_up_proj, experts.down_proj, chosen_TK, weight_TK
    truth = 3 * 2 * tokens * chosen * 3 * hidden * width
    assert count(lambda: experts(x_TD, chosen_TK, weight_TK).sum()) == truth
    assert count(lambda: _grouped_experts(*arguments).sum()) == 0


def test_torch_does_not_count_attention_on_a_cpu():
    q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))
    assert count(lambda: F.scaled_dot_product_attention(q, k, v).sum()) == 0
