"""A model by its recipe, checks of a folder's headers, and counts of parameters; train/released.py reads the folders.

recipes/model/NAME.yaml + recipes/model/omni/NAME.yaml --recipe_config--> OmniConfig
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from models.hf import Shape
from models.omni_config import OmniConfig
from train.errors import CheckpointError, RecipeError
from train.folder_weights import plain_name
from train.recipe import RECIPES
from train.released import KINDS as KINDS
from train.released import AnyConfig as AnyConfig
from train.released import Released
from train.released import check_weights as check_weights
from train.released import expected_shapes as expected_shapes
from train.released import model_on_meta as model_on_meta
from train.released import open_released as open_released
from train.typed import build, nearest

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
