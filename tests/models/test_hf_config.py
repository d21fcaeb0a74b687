"""config.json both ways: ours, transformers', of old and new layout; another model is refused by its key."""

from __future__ import annotations

import copy
import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from models.config import ConfigError
from models.hf_config import (
    from_released_config,
    omni_from_released,
    omni_to_released,
    talker_from_released,
    to_released_config,
)
from models.omni_config import Code2WavConfig, OmniConfig
from tests.models import helpers as h
from tests.models import random_model as r
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
    talker = json.loads(json.dumps(written(config)["talker_config"]))
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


def test_positions_of_the_exported_talker_are_the_thinkers() -> None:
    """Own token ids, a video with sound: transformers' Talker and Thinker count alike."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe")
    config = random_omni_config(0)
    assert config.talker is not None and config.thinker.vision is not None
    theirs = transformers.Qwen3OmniMoeConfig(**written(config))
    thinker = modeling.Qwen3OmniMoeThinkerForConditionalGeneration(theirs.thinker_config)
    talker = modeling.Qwen3OmniMoeTalkerForConditionalGeneration(theirs.talker_config)
    talker.config.audio_config = theirs.thinker_config.audio_config  # transformers' class has no place for it
    mixed = [r.VIDEO, r.AUDIO] * 4 + [r.AUDIO] * (13 - 4)
    starts, ends = [r.VISION_START, r.AUDIO_START], [r.AUDIO_END, r.VISION_END]
    ids = torch.tensor([[30, 31, *starts, *mixed, *ends, 32, r.AUDIO_START, *[r.AUDIO] * 13, r.AUDIO_END, 33, 34]])
    media = dict(
        attention_mask=torch.ones_like(ids),
        video_grid_thw=torch.tensor([[1, 4, 4]]),
        audio_seqlens=torch.tensor([100, 100]),
    )
    media |= dict(use_audio_in_video=True, second_per_grids=torch.tensor([0.5]))
    (wanted, delta), (found, other) = (part.get_rope_index(ids, **media) for part in (thinker, talker))
    assert torch.equal(found, wanted) and torch.equal(other, delta)
    assert wanted.max() < ids.shape[1] - 4  # the video's frames share positions: it was found


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
        ((*TEXT, "rope_parameters", "rope_type"), "llama3", "rope_type 'llama3'"),
        ((*TEXT, "rope_parameters", "rope_type"), "yarn", "lacks the key 'factor' in thinker_config.text_config"),
        ((*TEXT, "rope_parameters", "mrope_interleaved"), False, "positions that are not interleaved"),
        ((*TEXT, "attention_bias"), True, "thinker_config.text_config.attention_bias is True"),
        ((*TEXT, "norm_topk_prob"), False, "thinker_config.text_config.norm_topk_prob is False"),
        ((*TEXT, "mlp_only_layers"), [0], r"mlp_only_layers is \[0\]"),
        ((*TEXT, "num_attention_heads"), 0, "text_config: num_attention_heads must be above 0"),
        (("talker_config", "text_config", "intermediate_size"), 7, "talker_config.text_config.intermediate_size is 7"),
        (("talker_config", "num_code_groups"), 77, "talker_config.num_code_groups is 77"),
        (("code2wav_config", "hidden_act"), "gelu", "code2wav_config.hidden_act is 'gelu'"),
        (("code2wav_config", "num_attention_heads"), 5, "code2wav_config: hidden_size"),
        (("thinker_config", "vision_config", "num_heads"), "2", "vision_config.num_heads is '2', a value"),
        ((*TEXT, "num_attention_heads"), "x", "thinker_config.text_config.num_attention_heads is 'x'"),
        ((*TEXT, "rms_norm_eps"), "x", "thinker_config.text_config.rms_norm_eps is 'x'"),
        ((*TEXT, "num_experts"), [8], r"thinker_config.text_config.num_experts is \[8\]"),
        ((*TEXT, "rope_parameters"), "x", "thinker_config.text_config.rope_parameters is 'x'"),
        ((*TEXT, "rope_parameters", "rope_theta"), "x", "thinker_config.text_config.rope_theta is 'x'"),
        ((*TEXT, "rope_parameters", "mrope_section"), 5, "thinker_config.text_config.mrope_section is 5"),
        (("thinker_config", "vision_config", "deepstack_visual_indexes"), ["x"], "deepstack_visual_indexes is"),
        (("thinker_config", "position_id_per_seconds"), "x", "thinker_config.position_id_per_seconds is 'x'"),
        (("thinker_config", "audio_token_id"), None, "thinker_config.audio_token_id is None"),
        (("talker_config", "accept_hidden_layer"), True, "talker_config.accept_hidden_layer is True"),
        (("talker_config", "speaker_id"), "x", "talker_config.speaker_id is 'x'"),
        (("talker_config", "speaker_id"), {"a": "x"}, "talker_config.speaker_id is {'a': 'x'}"),
        (("code2wav_config", "upsample_rates"), 5, "code2wav_config.upsample_rates is 5"),
        (("im_start_token_id",), "x", "config.json: im_start_token_id is 'x'"),
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


@pytest.mark.parametrize("name", [item.name for item in fields(OmniConfig) if item.name.endswith("_token_id")])
def test_a_talker_needs_its_ids_in_the_vocabulary(name: str) -> None:
    config = random_omni_config(0)
    size = config.thinker.text.vocab_size
    with pytest.raises(ConfigError, match=rf"{name} \({size}\) must lie below vocab_size \({size}\)"):
        replace(config, **{name: size})
    replace(config, talker=None, **{name: size})
