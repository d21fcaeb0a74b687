"""What a launcher must know of a run before it starts one: that its settings are right, and where its folder is.

    python -m launch.checked recipe=stage2 [KEY=VALUE ...]

prints the folder, then the number of processes for this machine: one a GPU, or one. A mistake is one line and status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from launch.arguments import guarded
from train.curriculum import is_curriculum, load_curriculum
from train.recipe import as_yaml, load_recipe


@dataclass(frozen=True)
class Checked:
    """A run that can be: its folder, its name, and all of its settings as YAML."""

    folder: Path
    name: str
    recipe: str


def checked(words: Sequence[str]) -> Checked:
    """Compose and check `recipe=NAME KEY=VALUE ...`, of a curriculum every stage. Raises RecipeError."""
    if is_curriculum(words):
        found = load_curriculum(words)
        stages = {stage.name: asdict(stage.recipe) for stage in found.stages}
        return Checked(found.folder.absolute(), found.name, OmegaConf.to_yaml(OmegaConf.create(stages)))
    recipe = load_recipe(words)
    return Checked(Path(recipe.run).absolute(), recipe.name, as_yaml(recipe))


def show(argv: Sequence[str]) -> None:
    """The command. Raises RecipeError."""
    print(checked(argv).folder)
    print(max(1, torch.cuda.device_count()))


if __name__ == "__main__":
    sys.exit(guarded(show, sys.argv[1:]))
