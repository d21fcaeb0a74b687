"""Initial weights: every tensor named, the statistics meant, the same values for the same seed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from models.init import RULES, init_weights
from models.thinker import Thinker
from tests.models import helpers as h


def initialised(seed, **text):
    thinker = Thinker(h.tiny_config(**text))
    for parameter in thinker.parameters():
        nn.init.constant_(parameter, float("nan"))  # what is left unset shows
    init_weights(thinker, seed)
    return thinker


def test_every_tensor_has_the_statistics_meant():
    thinker = initialised(0, hidden_size=128, num_experts=32)
    for name, p in thinker.state_dict().items():
        if "norm" in name or name.endswith("ln_post.weight") or name.endswith("bias"):
            assert bool((p == (0.0 if name.endswith("bias") else 1.0)).all()), name
            continue
        std = thinker.config.text.initializer_range
        if "conv2d" in name:
            std = math.sqrt(2 / p[0].numel())
        elif name.startswith("audio_tower"):
            std = p.shape[1] ** -0.5
        sampling = 5 / math.sqrt(p.numel())
        assert p.std() == pytest.approx(std, rel=max(0.02, sampling)), name
        assert abs(p.mean()) < sampling * std, name


def test_rules_are_all_used_and_none_overlaps():
    import re

    names = [name for name, _ in initialised(0).named_parameters()]
    assert all(any(re.fullmatch(pattern, name) for name in names) for pattern, _ in RULES)
    assert all(sum(bool(re.fullmatch(pattern, name)) for pattern, _ in RULES) == 1 for name in names)


def test_an_unknown_tensor_is_an_error():
    thinker = Thinker(h.tiny_config())
    thinker.model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"0 initialisation rules name the parameter model\.extra\.weight"):
        init_weights(thinker, 0)


def test_seed_decides_and_depth_does_not():
    a, b, c = initialised(7), initialised(7, num_hidden_layers=3), initialised(8)
    deeper = dict(b.named_parameters())
    assert all(torch.equal(p, deeper[name]) for name, p in a.named_parameters())
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    layers = a.model.layers
    assert not torch.equal(layers[0].self_attn.q_proj.weight, layers[1].self_attn.q_proj.weight)


def test_signal_survives_the_encoder():
    """Features of a fresh encoder differ between sounds: std near the decoder's embeddings' order, not vanishing."""
    thinker = initialised(0)
    features_TD = thinker.audio_tower(torch.randn(500, 128), (200, 300))
    assert 0.05 < features_TD.std(0).mean() < 20
