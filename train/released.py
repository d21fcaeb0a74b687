"""A folder of released weights: its configuration, expected tensors, and a check of one against the other.

FOLDER/config.json, headers of its safetensors --open_released--> Released --released_state--> weights of an engine
a configuration --modules on the meta device--> expected names and shapes; nothing is allocated
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.config import ConfigError, ThinkerConfig
from models.hf import Shape, check_names, full_name, fused_name, released_pieces, released_shapes
from models.hf_config import from_released_config, omni_from_released, talker_from_released
from models.omni import Omni
from models.omni_config import OmniConfig, TalkerConfig
from models.talker import Talker
from models.thinker import Thinker
from train.engines import WEIGHT
from train.errors import CheckpointError
from train.folder_weights import Weight, open_folder, read_json, released_weights

AnyConfig = OmniConfig | ThinkerConfig | TalkerConfig
KINDS: dict[type, tuple[str, str]] = {  # what a folder holds, and the prefix of its names in the whole model
    OmniConfig: ("the whole model", ""),
    ThinkerConfig: ("the Thinker alone", "thinker."),
    TalkerConfig: ("the Talker alone", "talker."),
}


@dataclass(frozen=True)
class Released:
    """A folder of weights: its config.json, the shapes that means, and its tensors under released names."""

    config_json: dict[str, Any]
    config: AnyConfig
    weights: dict[str, Weight]

    @property
    def dtype(self) -> torch.dtype | None:
        """What config.json says that the tensors are."""
        for section in (self.config_json, self.config_json.get("thinker_config") or {}):
            name = section.get("dtype") or section.get("torch_dtype")
            if name is not None:
                dtype = getattr(torch, str(name).removeprefix("torch."), None)
                if not isinstance(dtype, torch.dtype):
                    raise ConfigError(f"config.json: dtype is {name!r}; it is float32, bfloat16 or float16")
                return dtype
        return None


def model_on_meta(config: AnyConfig) -> nn.Module:
    """The modules that a configuration describes, without memory."""
    with torch.device("meta"):
        if isinstance(config, OmniConfig):
            return Omni(config)
        return Thinker(config) if isinstance(config, ThinkerConfig) else Talker(config)


def expected_shapes(config: AnyConfig) -> dict[str, Shape]:
    """Released name -> shape of every tensor of the model."""
    return released_shapes(model_on_meta(config), KINDS[type(config)][1])


def read_config(config: Mapping[str, Any]) -> AnyConfig:
    """Shapes from a config.json, whatever part of the model it describes. Raises ConfigError."""
    if "thinker_config" in config:
        return omni_from_released(config)
    if "audio_config" in config:
        return from_released_config(config)
    if "code_predictor_config" in config:
        return talker_from_released(config)
    raise ConfigError("config.json has no thinker_config, audio_config or code_predictor_config: not a Qwen3-Omni")


def open_released(folder: Path) -> Released:
    """A folder whose names, shapes and configuration agree. Reads headers only.

    Accepts the released layout and both of transformers in memory (models.hf.LAYOUTS). Raises CheckpointError or
    ConfigError for the first key that is missing, too many or of another shape, naming it.
    """
    config_json = read_json(folder / "config.json")
    try:
        config = read_config(config_json)
        weights = released_weights(open_folder(folder), KINDS[type(config)][1])
        check_weights(weights, expected_shapes(config), f"{folder}: the weights")
    except ConfigError as error:
        where = "" if str(error).startswith(str(folder)) else f"{folder}: "
        raise ConfigError(f"{where}{error}") from None
    if not isinstance(config, TalkerConfig):
        thinker = config.thinker if isinstance(config, OmniConfig) else config
        if thinker.vision is None:  # transformers' stand-in
            weights = {name: weight for name, weight in weights.items() if not name.startswith("thinker.visual.")}
    return Released(config_json, config, weights)


def check_weights(weights: Mapping[str, Weight], shapes: Mapping[str, Shape], source: str) -> None:
    """Raise ConfigError where a tensor is missing, too many, or of another shape than its configuration makes it."""
    components = tuple({name.split(".")[0] + "." for name in shapes})
    for name in weights:
        if not name.startswith(components):
            raise ConfigError(f"{source} hold {name}, which the model of config.json has not")
    for name, shape in shapes.items():  # before the names: a wrong count of experts or heads shows both ways
        if name in weights and weights[name].shape != tuple(shape):
            raise ConfigError(
                f"{source} hold {name} with shape {list(weights[name].shape)}, but config.json makes it {list(shape)}"
            )
    check_names(weights, shapes, source)


class ReleasedState:
    """The weights of such a folder, whatever its layout, as train.engines.StateReader: what a run starts from."""

    step = 0

    def __init__(self, released: Released) -> None:
        """Tensors are read when they are asked for."""
        self._weights = released.weights
        self._fused = {place[0] for name in released.weights if (place := fused_name(name))}

    def kinds(self, name: str) -> frozenset[str]:
        """See train.engines.StateReader."""
        whole = full_name(name)
        return frozenset({WEIGHT} if whole in self._weights or whole in self._fused else ())

    def read(self, kind: str, name: str, shape: Sequence[int], start: int, length: int) -> Tensor:
        """See train.engines.StateReader."""
        out = torch.empty(length)
        for released, wanted, at, offset, count in released_pieces(name, tuple(shape), start, length):
            weight = self._weights.get(released) if kind == WEIGHT else None
            if weight is None:
                raise CheckpointError(f"the weights that the run starts from hold no {kind} of {released}")
            if weight.shape != tuple(wanted):
                raise CheckpointError(
                    f"{weight.source}: {released} has shape {list(weight.shape)}, the model wants {list(wanted)}"
                )
            out[offset : offset + count] = weight.read(at, count)
        return out
