"""A model in memory from a folder of released weights.

    FOLDER --open_released: names, shapes, configuration agree--> modules on the meta device --tensor by tensor--> Omni

Cost: one copy of the weights in the dtype asked for, and a block of 16 MB.
"""

from __future__ import annotations

from pathlib import Path

import torch

from launch.released import open_released
from launch.weights import PRECISION, fused_weights
from models.config import ThinkerConfig
from models.omni import Omni
from models.omni_config import OmniConfig
from train.errors import CheckpointError, RecipeError

BLOCK = 4 << 20  # elements read at a time


@torch.no_grad()
def load_model(folder: Path, dtype: str | None = None, device: str = "cpu") -> Omni:
    """The whole model, or a Thinker alone as one without a Talker, ready to generate.

    `dtype` is bf16 or fp32, by default that of the file's first tensor. Raises CheckpointError, ConfigError or
    RecipeError for a folder or a setting that cannot be used.
    """
    released = open_released(folder)
    config = released.config
    if isinstance(config, ThinkerConfig):
        config = OmniConfig(config)
    if not isinstance(config, OmniConfig):
        raise CheckpointError(f"{folder}: holds a Talker alone, which has nothing to speak without a Thinker")
    if dtype is not None and dtype not in PRECISION:
        raise RecipeError(f"dtype must be {' or '.join(PRECISION)}, not {dtype!r}")
    known = ["cpu", "cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if device not in (known if torch.cuda.is_available() else known[:1]):
        raise RecipeError(f"device={device}: it is cpu, or cuda where a GPU is at hand")
    with torch.device("meta"):
        omni = Omni(config)
    weights = fused_weights(released.weights)
    kind = PRECISION[dtype] if dtype is not None else next(iter(weights.values())).dtype
    omni = omni.to(kind).to_empty(device=device)
    for name, parameter in omni.named_parameters():
        flat, weight = parameter.view(-1), weights[name]
        for start in range(0, len(flat), BLOCK):
            piece = flat[start : start + BLOCK]
            piece.copy_(weight.read(start, len(piece)))
    return omni.train(False).requires_grad_(False)
