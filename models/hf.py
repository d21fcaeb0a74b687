"""Names and shapes of the released Qwen3-Omni checkpoint, and how our parameters lie in its tensors.

    our parameter, flat:   model.layers.3.mlp.experts.gate_up_proj [E, 2F, D]
    released tensors:      | 0.gate_proj | 0.up_proj | 1.gate_proj | 1.up_proj | ...   [F, D] each, end to end
    every other parameter is one released tensor of the same shape

Laid end to end, the released tensors of a parameter are its flat memory, so a flat range of ours is a run of
contiguous pieces of theirs: checkpoints address both ways with integers and copy nothing. Released names begin with
`thinker.`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from models.config import AudioConfig, ConfigError, TextConfig, ThinkerConfig

PREFIX = "thinker."
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
NOT_HERE = "thinker.visual."  # part of the released Thinker that this model does not have yet
Shape = tuple[int, ...]


def released_tensors(name: str, shape: Shape) -> list[tuple[str, Shape]]:
    """Names and shapes of the released tensors that make up our parameter `name`, in the order of its memory."""
    fused = re.fullmatch(r"(.*\.mlp\.experts)\.(\w+)", name)
    if fused is None:
        return [(PREFIX + name, tuple(shape))]
    stem, parts = fused[1], FUSED[fused[2]]
    part_shape = shape[1] // len(parts), shape[2]
    return [(f"{PREFIX}{stem}.{e}.{part}.weight", part_shape) for e in range(shape[0]) for part in parts]


def released_pieces(name: str, shape: Shape, start: int, length: int) -> list[tuple[str, Shape, int, int, int]]:
    """Cut the flat range [start, start + length) of our parameter `name` at the bounds of released tensors.

    Returns (released name, released shape, start in that tensor, offset from `start`, length) for each piece, in order.
    """
    tensors = released_tensors(name, shape)
    numel = torch.Size(shape).numel() // len(tensors)  # all parts of a parameter are of one size
    end, pieces = start + length, []
    for index in range(start // numel, -(-end // numel) if length else 0):
        low, high = max(start, index * numel), min(end, (index + 1) * numel)
        pieces.append((*tensors[index], low - index * numel, low - start, high - low))
    return pieces


def released_shapes(thinker: nn.Module) -> dict[str, Shape]:
    """Every released tensor that `thinker`'s parameters make up: name -> shape."""
    return {
        released: released_shape
        for name, parameter in thinker.named_parameters()
        for released, released_shape in released_tensors(name, tuple(parameter.shape))
    }


def released_state(thinker: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights as (released name, tensor); the tensors are views of the parameters."""
    for name, parameter in thinker.named_parameters():
        flat = parameter.detach().reshape(-1)
        for released, shape, _, offset, length in released_pieces(name, tuple(parameter.shape), 0, len(flat)):
            yield released, flat[offset : offset + length].view(shape)


@torch.no_grad()
def load_released(thinker: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights under released names into `thinker`, casting to its dtypes. Tensors of other towers are left alone.

    Raises ConfigError, before anything is written, where a tensor is missing, of another shape, or one of the
    Thinker that this model has no place for: it is then a checkpoint of another model.
    """
    wanted = released_shapes(thinker)
    ours = [name for name in tensors if name.startswith(PREFIX) and not name.startswith(NOT_HERE)]
    if missing := sorted(wanted.keys() - set(ours)):
        raise ConfigError(f"the weights lack {missing[0]} and {len(missing) - 1} more that this model has")
    if unknown := sorted(set(ours) - wanted.keys()):
        raise ConfigError(f"the weights hold {unknown[0]} and {len(unknown) - 1} more that this model has not")
    for name, shape in wanted.items():
        if (found := tuple(tensors[name].shape)) != shape:
            raise ConfigError(f"the weights hold {name} with shape {found}, but this model needs {shape}")
    for name, place in released_state(thinker):
        place.copy_(tensors[name])


def from_released_config(config: Mapping[str, Any]) -> ThinkerConfig:
    """The Thinker's shapes from a released config.json, of the whole model or of the Thinker alone."""
    thinker = config.get("thinker_config", config)
    try:
        text, audio = dict(thinker["text_config"]), thinker["audio_config"]
        rope = text.get("rope_parameters") or {"rope_theta": text.get("rope_theta"), **(text.get("rope_scaling") or {})}
        text |= {"rope_theta": rope["rope_theta"], "mrope_section": tuple(rope["mrope_section"])}
        return ThinkerConfig(
            TextConfig(**{key: text[key] for key in TextConfig.__dataclass_fields__}),
            AudioConfig(**{key: audio[key] for key in AudioConfig.__dataclass_fields__}),
            thinker["audio_token_id"],
        )
    except KeyError as error:
        raise ConfigError(f"config.json lacks the key {error} of a Qwen3-Omni Thinker") from error


def to_released_config(config: ThinkerConfig) -> dict[str, Any]:
    """config.json for transformers' Qwen3OmniMoeThinkerForConditionalGeneration to go with `released_state`.

    Its class always builds an image encoder; the smallest one stands in, with random weights, until there is one here.
    """
    text, audio = asdict(config.text), asdict(config.audio)
    theta, section = text.pop("rope_theta"), list(text.pop("mrope_section"))
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": section, "mrope_interleaved": True}
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8, "deepstack_visual_indexes": [0]}
    return {
        "architectures": ["Qwen3OmniMoeThinkerForConditionalGeneration"],
        "model_type": "qwen3_omni_moe_thinker",
        "text_config": {**text, "norm_topk_prob": True, "rope_parameters": rope},
        "audio_config": audio,
        "vision_config": {**vision, "out_hidden_size": config.text.hidden_size},
        "audio_token_id": config.audio_token_id,
        "vision_start_token_id": 151652,  # transformers reads it and its class default lacks it
    }
