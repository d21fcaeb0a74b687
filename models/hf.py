"""Names and shapes of the released Qwen3-Omni checkpoint, and how our parameters lie in its tensors.

    our parameter, flat:   model.layers.3.mlp.experts.gate_up_proj [E, 2F, D]
    released tensors:      | 0.gate_proj | 0.up_proj | 1.gate_proj | 1.up_proj | ...   [F, D] each, end to end
    every other parameter is one released tensor of the same name and shape

Laid end to end, the released tensors of a parameter are its flat memory, so a flat range of ours is a run of
contiguous pieces of theirs: checkpoints and conversions address both ways with integers and copy nothing.

Released names begin with `thinker.`, `talker.` or `code2wav.`. Names of a Thinker by itself may leave out `thinker.`;
of a Talker or a waveform decoder by itself the caller gives the prefix. Other layouts that are met in files hold the
same tensors; `LAYOUTS` is all that tells them from the released one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from models.config import ConfigError
from models.hf_config import from_released_config as from_released_config
from models.hf_config import to_released_config as to_released_config

COMPONENTS = ("thinker.", "talker.", "code2wav.")
TRAINING = ("adversary.", "audio_decoder.")  # parts of a model while it trains: in checkpoints, in no released folder
# Our fused parameter of all experts -> the released tensors of each expert, in the order of its memory.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# Names in files -> released names, by layout. The fused experts, in every layout but the released one, are our own.
LAYOUTS: tuple[tuple[str, str], ...] = (
    (r"thinker\.model\.(audio_tower|visual)\.(.+)", r"thinker.\1.\2"),  # transformers 5.23 in memory
    (r"thinker\.model\.language_model\.(.+)", r"thinker.model.\1"),
    # transformers 5.2 to 5.7 in memory: the released names, fused experts
)
_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
Shape = tuple[int, ...]


def full_name(name: str) -> str:
    """A parameter's name in the whole model; without a component it is the Thinker's."""
    return name if name.startswith((*COMPONENTS, *TRAINING)) else COMPONENTS[0] + name


def released_name(name: str) -> str:
    """The released name of a tensor found in a file, fused experts apart (see `released_tensors`)."""
    for pattern, meant in LAYOUTS:
        if match := re.fullmatch(pattern, name):
            return match.expand(meant)
    return name


def fused_name(released: str) -> tuple[str, int, int] | None:
    """Inverse of `released_tensors`: our parameter of all experts, the expert, which of its tensors. Or None."""
    match = _EXPERT.fullmatch(released)
    if match is None:
        return None
    whole, parts = next((whole, parts) for whole, parts in FUSED.items() if match[3] in parts)
    return f"{match[1]}.{whole}", int(match[2]), parts.index(match[3])


def released_tensors(name: str, shape: Shape) -> list[tuple[str, Shape]]:
    """Names and shapes of the released tensors that make up our parameter `name`, in the order of its memory."""
    name = full_name(name)
    fused = _EXPERTS.fullmatch(name)
    if fused is None:
        return [(name, tuple(shape))]
    stem, parts = fused[1], FUSED[fused[2]]
    if len(shape) != 3 or shape[1] % len(parts):
        raise ConfigError(f"{name} has shape {list(shape)}; fused experts are [experts, {len(parts)} x rows, columns]")
    part_shape = shape[1] // len(parts), shape[2]
    return [(f"{stem}.{e}.{part}.weight", part_shape) for e in range(shape[0]) for part in parts]


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


def released_shapes(module: nn.Module, prefix: str = "") -> dict[str, Shape]:
    """Every released tensor that the parameters of `module`, which is `prefix` in the model, make up: name -> shape."""
    return {
        released: released_shape
        for name, parameter in module.named_parameters(prefix.rstrip("."))
        for released, released_shape in released_tensors(name, tuple(parameter.shape))
    }


def released_state(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The weights as (released name, tensor); the tensors are views of the parameters."""
    for name, parameter in module.named_parameters(prefix.rstrip(".")):
        flat = parameter.detach().reshape(-1)
        for released, shape, _, offset, length in released_pieces(name, tuple(parameter.shape), 0, len(flat)):
            yield released, flat[offset : offset + length].view(shape)


@torch.no_grad()
def load_released(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Copy weights under released names into `module`, casting to its dtypes. Tensors of other parts are left alone.

    Raises ConfigError, before anything is written, where a tensor is missing, of another shape, or one of the same
    part of the model that this module has no place for: it is then a checkpoint of another model.
    """
    wanted = released_shapes(module, prefix)
    check_names(tensors, wanted)
    for name, shape in wanted.items():
        if (found := tuple(tensors[name].shape)) != shape:
            raise ConfigError(f"the weights hold {name} with shape {found}, but this model needs {shape}")
    for name, place in released_state(module, prefix):
        place.copy_(tensors[name])


def check_names(found: Iterable[str], wanted: Iterable[str], source: str = "the weights") -> None:
    """Raise ConfigError for a released name that is missing or has no place here, among the components of `wanted`.

    A vision encoder that the model lacks is no error: transformers' Thinker always has one.
    """
    wanted = set(wanted)
    components = tuple({name.split(".")[0] + "." for name in wanted})
    visual = any(name.startswith("thinker.visual.") for name in wanted)
    ours = {
        name for name in found if name.startswith(components) and (visual or not name.startswith("thinker.visual."))
    }
    if missing := sorted(wanted - ours):
        raise ConfigError(f"{source} lack {missing[0]} and {len(missing) - 1} more that this model has")
    if unknown := sorted(ours - wanted):
        raise ConfigError(f"{source} hold {unknown[0]} and {len(unknown) - 1} more that this model has not")
