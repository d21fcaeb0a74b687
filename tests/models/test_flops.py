"""The analytic count against torch's counter, and against the published figure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.audio_encoder import AudioEncoder
from models.config import AudioConfig, TextConfig, VisionConfig
from models.flops import active_parameters, audio_flops, flops_per_token, text_flops, vision_flops
from models.vision_encoder import VisionEncoder

RELEASED = TextConfig(152064, 2048, 48, 32, 4, 128, 128, 8, 768)


def test_published_convention():
    """Qwen3-30B-A3B, vocabulary 151,936, at 4,096 tokens: 23.08 GFLOP per token."""
    config = replace(RELEASED, vocab_size=151936)
    assert flops_per_token(config, 4096) == pytest.approx(23.08e9, rel=1e-3)
    assert active_parameters(config) == pytest.approx(2.730e9 + 0.311e9, rel=1e-3)


def test_packing_counts_documents_apart():
    assert text_flops(RELEASED, [1000, 1000]) == 2 * text_flops(RELEASED, [1000]) < text_flops(RELEASED, [2000])


def test_audio_against_torch_counter():
    """Full seconds and windows, where nothing is padded; torch does not count CPU attention, so it is added here."""
    config = AudioConfig(32, 2, 2, 64, 48, downsample_hidden_size=8)
    encoder = AudioEncoder(config)
    frames = 1600
    with FlopCounterMode(display=False) as counter:
        encoder(torch.randn(frames, 128, requires_grad=True), (frames,)).sum().backward()
    tokens, window = 208, 104
    attention = 3 * 4 * config.d_model * config.encoder_layers * tokens * window
    assert counter.get_total_flops() + attention == pytest.approx(audio_flops(config, [frames]), rel=0.01)


def test_vision_against_torch_counter():
    """Frames of one size, which share a bucket without padding; positions, a thousandth of it all, are not counted."""
    config = VisionConfig(2, 64, 128, 2, 48, (0,), 16)
    grids = [(3, 8, 6), (1, 8, 6)]
    with FlopCounterMode(display=False) as counter:
        pixels_PX = torch.randn(4 * 48, config.patch_dim, requires_grad=True)
        features_TD, deepstack = VisionEncoder(config)(pixels_PX, grids)
        (features_TD.sum() + deepstack[0].sum()).backward()
    attention = 3 * 4 * config.hidden_size * config.depth * 4 * 48**2
    assert counter.get_total_flops() + attention == pytest.approx(vision_flops(config, grids), rel=0.01)
