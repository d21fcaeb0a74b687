"""A run's model from its folder, to be asked: one process, whatever trained it.

RUN/recipe.yaml + settings --> Opened: recipe, tokenizer, sizes --restore a checkpoint--> engine, step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.tokenizer import Tokenizer, load_tokenizer
from models.hf import released_pieces
from models.omni import Omni
from train import ranks
from train.checkpoint import CheckpointReader, choose
from train.config import EngineConfig, Phase, Recipe
from train.engines import Engine
from train.engines.build import build_engine
from train.engines.local import LocalEngine
from train.engines.setup import EngineSetup
from train.errors import CheckpointError
from train.opening import model_config
from train.parallel import Model
from train.recipe import load_saved


@dataclass(frozen=True)
class Opened:
    """What a run's folder says of its model."""

    folder: Path
    recipe: Recipe
    tokenizer: Tokenizer
    model: Model

    @property
    def device(self) -> torch.device:
        """Where the model will be."""
        return ranks.choose_device(self.recipe.engine.device)

    def engine(self, checkpoint: str = "latest") -> tuple[Engine, int]:
        """The model of a checkpoint, and its step. Raises CheckpointError where there is none."""
        manifest = choose(self.folder, checkpoint, wait_s=0)
        if manifest is None:
            raise CheckpointError(f"{self.folder}: no checkpoint yet")
        recipe, phase = self.recipe, Phase(steps=1)
        if recipe.lora is not None and recipe.model.talker is not None:
            phase = Phase(steps=1, speech="detached")  # adapters may all be the Talker's
        engine = build_engine(
            EngineSetup(
                self.model,
                recipe.engine,
                recipe.optim,
                recipe.loss,
                phase,
                "evaluate",
                recipe.seed,
                self.device,
                lora=recipe.lora,
            )
        )
        engine.restore(CheckpointReader(manifest, released_pieces), optimizer_step=0)
        return engine, manifest.step


def open_run(folder: Path, settings: Sequence[str]) -> Opened:
    """Read a run's recipe, with `settings` KEY=VALUE changed, for the local engine. Raises RecipeError, DataError."""
    recipe = load_saved(folder / "recipe.yaml", settings)
    recipe = replace(recipe, engine=EngineConfig(device=recipe.engine.device, precision=recipe.engine.precision))
    tokenizer = load_tokenizer(Path(recipe.data.tokenizer))
    return Opened(folder, recipe, tokenizer, model_config(recipe, tokenizer))


def omni_of(engine: Engine) -> Omni:
    """The whole model in a local engine, ready to generate."""
    assert isinstance(engine, LocalEngine)
    omni = engine.objective.model
    assert isinstance(omni, Omni), "the recipe has a talker"
    return omni.train(False)
