"""A model by its recipe or by its folder: configuration, expected tensors, and a check of one against the other.

recipes/model/NAME.yaml + recipes/model/omni/NAME.yaml --recipe_config--> OmniConfig
FOLDER/config.json, headers of its safetensors --open_released--> Released
a configuration --modules on the meta device--> expected names and shapes; nothing is allocated
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from launch.weights import Weight, open_folder, plain_name, read_json, released_weights
from models.config import ConfigError, ThinkerConfig
from models.hf import Shape, check_names, released_shapes
from models.hf_config import from_released_config, omni_from_released, talker_from_released
from models.omni import Omni
from models.omni_config import OmniConfig, TalkerConfig
from models.talker import Talker
from models.thinker import Thinker
from train.errors import CheckpointError, RecipeError
from train.recipe import RECIPES
from train.typed import build, nearest

AnyConfig = OmniConfig | ThinkerConfig | TalkerConfig
KINDS: dict[type, tuple[str, str]] = {  # what a folder holds, and the prefix of its names in the whole model
    OmniConfig: ("the whole model", ""),
    ThinkerConfig: ("the Thinker alone", "thinker."),
    TalkerConfig: ("the Talker alone", "talker."),
}
PARTS = (
    ("audio encoder", ("thinker.audio_tower.",)),
    ("vision encoder", ("thinker.visual.",)),
    ("Thinker decoder", ("thinker.model.",)),
    ("Thinker head", ("thinker.lm_head.",)),
    ("Talker backbone", ("talker.model.",)),
    ("Talker head", ("talker.codec_head.",)),
    ("Talker projections", ("talker.text_projection.", "talker.hidden_projection.")),
    ("code predictor", ("talker.code_predictor.",)),
    ("code2wav", ("code2wav.",)),
)


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


def check_dtypes(released: Released) -> None:
    """Raise CheckpointError for the first tensor whose dtype is not the one of config.json."""
    for name, weight in released.weights.items():
        if released.dtype not in (None, weight.dtype):
            raise CheckpointError(
                f"{weight.source}: {name} is {plain_name(weight.dtype)}, but config.json says "
                f"{plain_name(released.dtype)}"
            )


def recipe_config(name: str, folder: Path = RECIPES / "model") -> OmniConfig:
    """The whole model of a recipe, by its name in recipes/model/. Raises RecipeError."""
    names = sorted(path.stem for path in (folder / "omni").glob("*.yaml"))
    if name not in names:
        raise RecipeError(
            f"model={name}: no folder, and no recipe of a whole model{nearest(name, names)}; there are "
            f"{', '.join(names)}"
        )
    try:
        sizes, beside = (OmegaConf.load(path / f"{name}.yaml") for path in (folder, folder / "omni"))
        assert isinstance(sizes, DictConfig) and isinstance(beside, DictConfig)
        context = OmegaConf.merge({"model": sizes, "thinker": sizes}, beside)
        plain: Any = OmegaConf.to_container(context, resolve=True)
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        raise RecipeError(f"recipes/model/{name}.yaml: {' '.join(str(error).split())}") from None
    del plain["model"]
    return build(OmniConfig, plain)


def counts(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Parameters of every part that there is, by its name in PARTS, and of the whole."""
    numel = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    rows = {part: sum(n for name, n in numel.items() if name.startswith(prefixes)) for part, prefixes in PARTS}
    return {part: count for part, count in rows.items() if count} | {"whole": sum(numel.values())}
