"""Rotary positions beyond the trained length: as transformers computes them, in and out of its files."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from models.config import ConfigError, RopeScaling
from models.hf_config import from_released_config, to_released_config
from models.layers.rope import angles
from tests.models import helpers as h

SCALINGS = (
    RopeScaling("linear", 4.0),
    RopeScaling("yarn", 4.0, 8192),
    RopeScaling("yarn", 8.0, 4096, attention_factor=1.1, beta_fast=16.0, beta_slow=2.0),
    RopeScaling("yarn", 1.0, 512),
)


def scaled(scaling: RopeScaling | None) -> Any:
    config = h.tiny_config()
    return replace(config, text=replace(config.text, rope_scaling=scaling))


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_angles_are_transformers(scaling: RopeScaling) -> None:
    """For text, and for pictures, whose axes part. Written by us, read by transformers."""
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as configs
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerTextRotaryEmbedding

    config = scaled(scaling)
    theirs: Any = configs.Qwen3OmniMoeThinkerConfig(**to_released_config(config)).text_config
    text = config.text
    positions = torch.arange(0, 40_000, 37).float().expand(3, -1).clone()
    positions[1:, 100:200] += torch.rand(2, 100).mul(50).round()
    cos_TC, sin_TC = angles(positions, text.head_dim, text.rope_theta, text.mrope_section, text.rope_scaling)
    cos, sin = Qwen3OmniMoeThinkerTextRotaryEmbedding(theirs)(torch.zeros(1), positions.unsqueeze(1))
    half = text.head_dim // 2
    torch.testing.assert_close(cos_TC, cos[0], atol=5e-3, rtol=0)  # fp32 angles up to 40,000 rad
    torch.testing.assert_close(sin_TC[:, half:], sin[0][:, half:], atol=5e-3, rtol=0)


def test_scaling_changes_what_it_should() -> None:
    """Linear is the position divided; yarn leaves the fastest channel alone and stretches the slowest by factor."""
    positions = torch.arange(64).float().expand(3, -1)
    shape = 128, 1e6, (24, 20, 20)
    plain, _ = angles(positions / 4, *shape)
    linear, _ = angles(positions, *shape, RopeScaling("linear", 4.0))
    torch.testing.assert_close(linear, plain, atol=1e-5, rtol=0)
    yarn, _ = angles(positions, *shape, RopeScaling("yarn", 4.0, 4096, attention_factor=1.0))
    whole, _ = angles(positions, *shape)
    assert torch.equal(yarn[:, 0], whole[:, 0]) and not torch.equal(yarn[:, 30], whole[:, 30])
    torch.testing.assert_close(yarn[:, 63], plain[:, 63])


@pytest.mark.parametrize("scaling", [None, *SCALINGS], ids=str)
def test_config_json_keeps_it(scaling: RopeScaling | None) -> None:
    config = scaled(scaling)
    assert from_released_config(json.loads(json.dumps(to_released_config(config)))) == config


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_an_older_file_has_it_too(kind: str) -> None:
    config = scaled(SCALINGS[1])
    old = json.loads(json.dumps(to_released_config(config)))
    rope = old["text_config"].pop("rope_parameters")
    old["text_config"]["rope_theta"], rope[kind] = rope.pop("rope_theta"), rope.pop("rope_type")
    assert from_released_config(old | {"text_config": old["text_config"] | {"rope_scaling": rope}}) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "ntk", "factor": 2.0}, "rope_type is 'ntk'; it is linear or yarn"),
        ({"rope_type": "linear", "factor": 0.5}, "factor of a rope_scaling must be at least 1, not 0.5"),
        ({"rope_type": "yarn", "factor": 2.0}, "needs original_max_position_embeddings"),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 9, "beta_slow": 40.0},
            r"beta_slow \(40.0\) must be above 0 and at most beta_fast \(32.0\)",
        ),
    ],
)
def test_what_is_no_scaling(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**settings)


def test_a_file_with_what_we_do_not_do() -> None:
    released = to_released_config(scaled(SCALINGS[1]))
    released["text_config"]["rope_parameters"]["mscale"] = 2.0
    with pytest.raises(ConfigError, match=r"thinker_config.text_config scales positions with mscale=2.0; leave it out"):
        from_released_config(released)
