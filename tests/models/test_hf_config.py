"""config.json both ways: ours, transformers', of old and new layout; another model is refused by its key."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest

from models.config import ConfigError
from models.hf_config import (
    from_released_config,
    omni_from_released,
    omni_to_released,
    talker_from_released,
    talker_to_released,
    to_released_config,
)
from models.omni_config import Code2WavConfig, OmniConfig
from tests.models import helpers as h
from tests.models.random_speech import random_omni_config


def random_whole(seed: int) -> OmniConfig:
    """With a waveform decoder."""
    config = random_omni_config(seed)
    assert config.talker is not None
    heads = 1 + seed % 3
    code2wav = Code2WavConfig(
        codebook_size=config.talker.code_predictor.vocab_size,
        num_quantizers=config.talker.num_code_groups,
        hidden_size=8 * heads,
        intermediate_size=12 + seed,
        num_hidden_layers=1 + seed % 2,
        num_attention_heads=heads,
        num_key_value_heads=heads if seed % 2 else 1,
        decoder_dim=16,
        upsample_rates=(2, 3) if seed % 2 else (4,),
        layer_scale_initial_scale=0.01 * (1 + seed),
    )
    return replace(config, code2wav=code2wav)


def written(config: OmniConfig) -> dict[str, Any]:
    return json.loads(json.dumps(omni_to_released(config)))


@pytest.mark.parametrize("seed", range(20))
def test_every_configuration_survives_its_file(seed: int) -> None:
    config = random_whole(seed)
    assert omni_from_released(written(config)) == config
    assert config.talker is not None
    talker = json.loads(json.dumps(talker_to_released(config.talker, config.thinker, config.vision_start_token_id)))
    assert talker_from_released(talker) == talker_from_released(written(config)) == config.talker
    silent = replace(config, talker=None, code2wav=None)
    assert omni_from_released(written(silent)) == silent


@pytest.mark.parametrize("seed", range(5))
def test_transformers_reads_and_writes_the_same_configuration(seed: int) -> None:
    configuration = pytest.importorskip("transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe")
    config = random_whole(seed)
    theirs = configuration.Qwen3OmniMoeConfig(**written(config))
    assert theirs.talker_config.text_config.num_experts == config.talker.text.num_experts
    assert theirs.talker_config.code_predictor_config.rope_parameters["rope_theta"] == (
        config.talker.code_predictor.rope_theta
    )
    assert theirs.thinker_config.vision_start_token_id == config.vision_start_token_id
    assert omni_from_released(json.loads(theirs.to_json_string(use_diff=False))) == config


@pytest.mark.parametrize("text", [{}, {"num_hidden_layers": 3, "head_dim": 8, "mrope_section": (2, 1, 1)}])
def test_a_thinker_without_vision(text: dict[str, Any]) -> None:
    config = h.tiny_config(**text)
    plain = json.loads(json.dumps(to_released_config(config)))
    assert from_released_config(plain) == from_released_config({"thinker_config": plain}) == config


def test_rotary_settings_of_older_files() -> None:
    config = random_whole(3)
    old = written(config)
    for section in (
        old["thinker_config"]["text_config"],
        old["talker_config"]["text_config"],
        old["talker_config"]["code_predictor_config"],
        old["code2wav_config"],
    ):
        rope = section.pop("rope_parameters")
        section["rope_theta"] = rope.pop("rope_theta")
        section["rope_scaling"] = rope | {"type": "default"} if "mrope_section" in rope else None
    assert omni_from_released(old) == config


TEXT = ("thinker_config", "text_config")
GONE = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*TEXT, "num_experts"), GONE, "lacks the key 'num_experts' in thinker_config.text_config"),
        (("thinker_config", "audio_config", "d_model"), GONE, "lacks the key 'd_model' in thinker_config.audio_config"),
        (("thinker_config", "audio_token_id"), GONE, "lacks the key 'audio_token_id'"),
        (("thinker_config", "vision_config", "depth"), GONE, "lacks the key 'depth' in thinker_config.vision_config"),
        (("thinker_config",), GONE, "lacks the key 'thinker_config'"),
        (("talker_config",), GONE, "lacks the key 'text_config'"),
        (("talker_config", "codec_bos_id"), GONE, "lacks the key 'codec_bos_id' in talker_config"),
        ((*TEXT, "rope_parameters"), GONE, "lacks the key 'rope_theta' in thinker_config.text_config"),
        ((*TEXT, "rope_parameters", "rope_type"), "yarn", "rope_type 'yarn'"),
        ((*TEXT, "rope_parameters", "mrope_interleaved"), False, "positions that are not interleaved"),
        ((*TEXT, "attention_bias"), True, "thinker_config.text_config.attention_bias is True"),
        ((*TEXT, "norm_topk_prob"), False, "thinker_config.text_config.norm_topk_prob is False"),
        ((*TEXT, "mlp_only_layers"), [0], r"mlp_only_layers is \[0\]"),
        ((*TEXT, "num_attention_heads"), 0, "text_config: num_attention_heads must be above 0"),
        (("talker_config", "text_config", "intermediate_size"), 7, "talker_config.text_config.intermediate_size is 7"),
        (("talker_config", "num_code_groups"), 77, "talker_config.num_code_groups is 77"),
        (("code2wav_config", "hidden_act"), "gelu", "code2wav_config.hidden_act is 'gelu'"),
        (("code2wav_config", "num_attention_heads"), 5, "code2wav_config: hidden_size"),
        (("thinker_config", "vision_config", "num_heads"), "2", "vision_config has a value of a wrong type"),
    ],
)
def test_another_model_is_named(path: tuple[str, ...], value: Any, message: str) -> None:
    config = copy.deepcopy(written(random_whole(1)))
    section = config
    for key in path[:-1]:
        section = section[key]
    if value is GONE:
        del section[path[-1]]
    else:
        section[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        omni_from_released(config)
