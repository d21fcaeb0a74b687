"""config.json of the released checkpoints, and our configurations.

    config.json of the whole model, or of the Thinker or the Talker alone
        --*_from_released-->  OmniConfig | ThinkerConfig | TalkerConfig  --*_to_released-->  config.json

Field names are the same; tables here say what lies elsewhere, and what is fixed in our modules: another value there
is another model, and an error. Fields that no module reads (dropout, initial ranges of towers) are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, TypeVar

from models.config import AudioConfig, ConfigError, RopeScaling, TextConfig, ThinkerConfig, VisionConfig
from models.omni_config import CONTROL_IDS, Code2WavConfig, CodePredictorConfig, OmniConfig, TalkerConfig

Config = TypeVar("Config")

WHOLE, THINKER, TALKER = (
    "Qwen3OmniMoeForConditionalGeneration",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    "Qwen3OmniMoeTalkerForConditionalGeneration",
)

# What our modules do whatever a configuration says, by the released section: key -> the values that mean it.
_DENSE: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "attention_bias": (False,)}
_SPARSE: dict[str, tuple[Any, ...]] = {
    **_DENSE,
    "norm_topk_prob": (True,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "tie_word_embeddings": (False,),
    "sliding_window": (None,),
}
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "thinker_config.text_config": _SPARSE,
    "thinker_config.audio_config": {"activation_function": ("gelu",), "scale_embedding": (False,)},
    "thinker_config.vision_config": {"hidden_act": ("gelu_pytorch_tanh",)},
    "talker_config.text_config": _SPARSE,
    "talker_config.code_predictor_config": {**_DENSE, "sliding_window": (None,), "tie_word_embeddings": (False,)},
    "code2wav_config": _DENSE,
}
# A vision encoder of the smallest size, for a Thinker without one: transformers' class always builds it.
STAND_IN = {"depth": 1, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8, "deepstack_visual_indexes": [0]}
# Of OmniConfig, in the released file under thinker_config.
_THINKER_IDS = (
    "user_token_id",
    "audio_start_token_id",
    "audio_end_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)
_TOP_IDS = (
    "im_start_token_id",
    "im_end_token_id",
    "system_token_id",
    "user_token_id",
    "assistant_token_id",
    "tts_pad_token_id",
    "tts_bos_token_id",
    "tts_eos_token_id",
)


def omni_from_released(config: Mapping[str, Any]) -> OmniConfig:
    """The whole model's shapes from its config.json. Raises ConfigError naming the key."""
    if "thinker_config" not in config:
        raise ConfigError("config.json lacks the key 'thinker_config' of a whole Qwen3-Omni model")
    thinker = _section(config, "thinker_config")
    ids = {key: thinker[key] for key in _THINKER_IDS if key in thinker}
    ids |= {key: config[key] for key in _TOP_IDS if key in config}
    parts: dict[str, Any] = {}
    if config.get("enable_audio_output", True):
        parts["talker"] = talker_from_released(config)
        if "code2wav_config" in config:
            where, section = "code2wav_config", _section(config, "code2wav_config")
            parts["code2wav"] = _fill(Code2WavConfig, where, section, rope_theta=_rope(section, where)["rope_theta"])
    _check_types(OmniConfig, "", ids)
    return OmniConfig(from_released_config(config), **parts, **ids)


def from_released_config(config: Mapping[str, Any]) -> ThinkerConfig:
    """The Thinker's shapes from a config.json, of the whole model or of the Thinker alone. Raises ConfigError."""
    thinker, where = _section(config, "thinker_config") if "thinker_config" in config else config, "thinker_config"
    vision = None if _is_stand_in(thinker.get("vision_config")) else _section(thinker, "vision_config")
    visual: dict[str, Any] = {}
    if vision is not None:
        visual["vision"] = _fill(VisionConfig, f"{where}.vision_config", vision)
        visual |= {key: _value(thinker, key, where) for key in ("image_token_id", "video_token_id")}
    if "position_id_per_seconds" in thinker:
        visual["position_id_per_seconds"] = thinker["position_id_per_seconds"]
    visual["audio_token_id"] = _value(thinker, "audio_token_id", where)
    _check_types(ThinkerConfig, where, visual)
    return ThinkerConfig(
        _text(_section(thinker, "text_config"), f"{where}.text_config"),
        _fill(AudioConfig, f"{where}.audio_config", _section(thinker, "audio_config")),
        **visual,
    )


def talker_from_released(config: Mapping[str, Any]) -> TalkerConfig:
    """The Talker's shapes from a config.json, of the whole model or of the Talker alone. Raises ConfigError."""
    talker, where = _section(config, "talker_config") if "talker_config" in config else config, "talker_config"
    text, predictor = _section(talker, "text_config"), _section(talker, "code_predictor_config")
    inner = f"{where}.code_predictor_config"
    for key, value, meant in (
        ("num_code_groups", talker.get("num_code_groups"), _value(predictor, "num_code_groups", inner)),
        ("text_config.intermediate_size", text.get("intermediate_size"), talker.get("thinker_hidden_size")),
    ):
        if value != meant:
            raise ConfigError(f"config.json: {where}.{key} is {value!r}; this model needs {meant!r} there")
    plain = {key: _value(talker, key, where) for key in ("thinker_hidden_size", "accept_hidden_layer", *CONTROL_IDS)}
    plain["speaker_id"] = talker.get("speaker_id") or {}
    _check_types(TalkerConfig, where, plain)
    return TalkerConfig(
        _text(text, f"{where}.text_config"),
        _fill(CodePredictorConfig, inner, predictor, rope_theta=_rope(predictor, inner)["rope_theta"]),
        **plain,
    )


def to_released_config(config: ThinkerConfig) -> dict[str, Any]:
    """config.json for transformers' Qwen3OmniMoeThinkerForConditionalGeneration.

    Its class always builds an image encoder; where there is none here the smallest one stands in, with random weights.
    """
    vision = asdict(config.vision) if config.vision else {**STAND_IN, "out_hidden_size": config.text.hidden_size}
    ids = {"audio_token_id": config.audio_token_id}
    if config.vision is not None:
        ids |= {"image_token_id": config.image_token_id, "video_token_id": config.video_token_id}
    return {
        "architectures": [THINKER],
        "model_type": "qwen3_omni_moe_thinker",
        "text_config": _text_to_released(config.text),
        "audio_config": asdict(config.audio),
        "vision_config": _plain(vision),
        **ids,
        "position_id_per_seconds": config.position_id_per_seconds,
        # What transformers reads and its class defaults lack or have for another model.
        **{key: OmniConfig.__dataclass_fields__[key].default for key in _THINKER_IDS},
    }


def talker_to_released(
    config: TalkerConfig, thinker: ThinkerConfig, vision_start_token_id: int, audio_start_token_id: int
) -> dict[str, Any]:
    """config.json for transformers' Qwen3OmniMoeTalkerForConditionalGeneration.

    The ids and rates of its positions are the Thinker's and the whole model's.
    """
    predictor = asdict(config.code_predictor)
    rope = {"rope_type": "default", "rope_theta": predictor.pop("rope_theta")}
    plain = {key: getattr(config, key) for key in ("thinker_hidden_size", "accept_hidden_layer", *CONTROL_IDS)}
    ids = ("audio_token_id", "image_token_id", "video_token_id")
    return {
        "architectures": [TALKER],
        "text_config": {**_text_to_released(config.text), "intermediate_size": config.thinker_hidden_size},
        "code_predictor_config": {**predictor, "rope_parameters": rope},
        "num_code_groups": config.num_code_groups,
        **plain,
        "speaker_id": dict(config.speaker_id),
        "spatial_merge_size": thinker.vision.spatial_merge_size if thinker.vision else 2,
        "position_id_per_seconds": thinker.position_id_per_seconds,
        **{key: getattr(thinker, key) for key in ids if getattr(thinker, key) is not None},
        "vision_start_token_id": vision_start_token_id,
        "audio_start_token_id": audio_start_token_id,
    }


def omni_to_released(config: OmniConfig) -> dict[str, Any]:
    """config.json for transformers' Qwen3OmniMoeForConditionalGeneration."""
    thinker = to_released_config(config.thinker) | {key: getattr(config, key) for key in _THINKER_IDS}
    out: dict[str, Any] = {
        "architectures": [WHOLE],
        "model_type": "qwen3_omni_moe",
        "enable_audio_output": config.talker is not None,
        "thinker_config": {key: value for key, value in thinker.items() if key != "architectures"},
        **{key: getattr(config, key) for key in _TOP_IDS},
    }
    if config.talker is not None:
        starts = config.vision_start_token_id, config.audio_start_token_id
        talker = talker_to_released(config.talker, config.thinker, *starts)
        out["talker_config"] = {key: value for key, value in talker.items() if key != "architectures"}
    if config.code2wav is not None:
        code2wav = _plain(asdict(config.code2wav))
        rope = {"rope_type": "default", "rope_theta": code2wav.pop("rope_theta")}
        out["code2wav_config"] = {**code2wav, "rope_parameters": rope}
    return out


def _text(section: Mapping[str, Any], where: str) -> TextConfig:
    rope = _rope(section, where, scaled=True)
    if not (rope.get("mrope_interleaved", True) and rope.get("interleaved", True)):
        raise ConfigError(f"config.json: {where} has positions that are not interleaved; this model's are")
    experts = "num_local_experts" if "num_local_experts" in section else "num_experts"  # transformers 5, the Talker
    return _fill(
        TextConfig,
        where,
        section,
        num_experts=_value(section, experts, where),
        rope_theta=rope["rope_theta"],
        mrope_section=rope.get("mrope_section") or (24, 20, 20),
        rope_scaling=_scaling(rope, where),
    )


def _scaling(rope: Mapping[str, Any], where: str) -> RopeScaling | None:
    """What stretches the rotary positions of a section. Raises ConfigError for what this model does not do."""
    if rope["rope_type"] == "default":
        return None
    for key, meant in (("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
        if rope.get(key, meant) != meant:
            raise ConfigError(f"config.json: {where} scales positions with {key}={rope[key]!r}; leave it out")
    _value(rope, "factor", where)
    given = {item.name: rope[item.name] for item in fields(RopeScaling) if rope.get(item.name) is not None}
    _check_types(RopeScaling, where, given)
    try:
        return RopeScaling(**given)
    except ConfigError as error:
        raise ConfigError(f"config.json: {where}: {error}") from None


def _text_to_released(config: TextConfig) -> dict[str, Any]:
    text = asdict(config)
    theta, section = text.pop("rope_theta"), list(text.pop("mrope_section"))
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": section, "mrope_interleaved": True}
    scaling = text.pop("rope_scaling")
    if config.rope_scaling is not None:
        keys = ["rope_type", "factor"] if config.rope_scaling.rope_type == "linear" else list(scaling)
        rope |= {key: scaling[key] for key in keys if scaling[key] is not None}
        if length := config.rope_scaling.original_max_position_embeddings:
            text["max_position_embeddings"] = int(length * config.rope_scaling.factor)
    return {**text, "norm_topk_prob": True, "rope_parameters": rope}


def _rope(section: Mapping[str, Any], where: str, scaled: bool = False) -> dict[str, Any]:
    """Rotary settings, of a transformers 5 file (rope_parameters) or of an older one (rope_theta, rope_scaling)."""
    old = {"rope_theta": section.get("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(section.get(key) or {}, Mapping):
            raise ConfigError(f"config.json: {where}.{key} is {section[key]!r}, which is no object")
    rope = dict(section.get("rope_parameters") or {**old, **(section.get("rope_scaling") or {})})
    rope["rope_type"] = kind = rope.get("rope_type", rope.get("type", "default"))
    known = ("default", "linear", "yarn") if scaled else ("default",)
    if kind not in known:
        raise ConfigError(
            f"config.json: {where} has rope_type {kind!r}; this model has only {', '.join(map(repr, known))}"
        )
    if rope.get("rope_theta") is None:
        raise ConfigError(f"config.json lacks the key 'rope_theta' in {where}")
    return rope


def _fill(cls: type[Config], where: str, section: Mapping[str, Any], **given: Any) -> Config:
    """An instance from the section's fields. A field without a default must be there."""
    for key, meant in FIXED[where].items():
        if key in section and section[key] not in meant:
            raise ConfigError(f"config.json: {where}.{key} is {section[key]!r}; this model has only {meant[0]!r} there")
    shapes: Any = cls  # a dataclass
    for item in fields(shapes):
        if item.name not in given and (item.name in section or item.default is MISSING):
            given[item.name] = _value(section, item.name, where)
    _check_types(cls, where, given)
    try:
        return cls(**given)
    except ConfigError as error:
        raise ConfigError(f"config.json: {where}: {error}") from None


def _check_types(cls: Any, where: str, values: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming the key, for a value that its field of the dataclass `cls` cannot hold."""
    annotation = {item.name: item.type for item in fields(cls)}
    for key, value in values.items():
        kind = annotation[key].split("[")[0].split(" |")[0]  # of int | None, tuple[int, ...], dict[str, int], a section
        parts = value if isinstance(value, list | tuple) else list(value.values()) if isinstance(value, Mapping) else []
        found = {"int": int, "float": int | float, "tuple": list | tuple, "dict": Mapping}.get(kind, object)
        if not isinstance(value, found) or any(type(part) is not int for part in parts) or isinstance(value, bool):
            name = f"{where}.{key}".lstrip(".")
            raise ConfigError(f"config.json: {name} is {value!r}, a value of a wrong type; it is {annotation[key]}")


def _value(section: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in section:
        raise ConfigError(f"config.json lacks the key {key!r} in {where}")
    return section[key]


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key)
    if not isinstance(found, Mapping):
        raise ConfigError(f"config.json lacks the key {key!r} of a Qwen3-Omni model")
    return found


def _is_stand_in(vision: Any) -> bool:
    return isinstance(vision, Mapping) and all(vision.get(key) == value for key, value in STAND_IN.items())


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tuples as JSON has them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
