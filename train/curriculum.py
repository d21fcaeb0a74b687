"""A curriculum: stages as a graph, each a recipe of its own, checked as a whole before the first one trains.

    recipes/curriculum.yaml   stages: {NAME: {recipe: R, after: [..], set: {..}, carry: .., hand_on: ..}}
    + KEY=VALUE (all stages), STAGE.KEY=VALUE (one), model= engine= (groups), from= to=
      --load_curriculum-->  Curriculum: stages in an order in which nobody comes before what it needs

A stage's run folder is RUN/STAGE, and its `init` the runs of the stages that it comes after, the last named first, and
then an `init` of its own. train/journey.py walks along the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.config import Recipe
from train.errors import RecipeError
from train.finetune import settle
from train.recipe import RECIPES, chosen_recipe, composed_recipe, recipe_groups, split_word, typed
from train.typed import build, nearest

OWN = ("recipe", "from", "to", "run")  # words of the command line that no stage gets


@dataclass(frozen=True)
class StageConfig:
    """A stage as the file says it."""

    recipe: str
    after: list[str] = field(default_factory=list)
    """Stages whose weights it starts from; where two have a parameter, that of the later one in this list counts."""
    model: str | None = None
    """Instead of the recipe's group model."""
    engine: str | None = None
    """Instead of the recipe's group engine."""
    carry: str = "weights"
    """weights, or optimizer: AdamW's moments too, for a stage after one that trained the same parameters."""
    hand_on: str = "latest"
    """The checkpoint that the next stages get: latest, or best (its recipe's eval.best)."""


@dataclass(frozen=True)
class Stage:
    """A stage as it runs."""

    name: str
    after: tuple[str, ...]
    recipe: Recipe
    hand_on: str

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.recipe.run)


@dataclass(frozen=True)
class Curriculum:
    """Stages in the order in which they run."""

    name: str
    folder: Path
    stages: tuple[Stage, ...]
    first: int
    """Of `stages`, those from `first` up to, not including, `stop` are to run."""
    stop: int

    def stage(self, name: str) -> Stage:
        """By its name."""
        return next(stage for stage in self.stages if stage.name == name)


def is_curriculum(argv: Sequence[str], folder: Path = RECIPES) -> bool:
    """Whether recipe=NAME lists stages. Raises RecipeError where there is no such recipe."""
    name = chosen_recipe([split_word(word) for word in argv], folder)
    return "stages" in composed_recipe(name, [], folder)


def load_curriculum(argv: Sequence[str], folder: Path = RECIPES) -> Curriculum:
    """Compose and check `recipe=NAME KEY=VALUE ... [from=STAGE] [to=STAGE]`. Raises RecipeError, in one line."""
    given = [split_word(word) for word in argv]
    name = chosen_recipe(given, folder)
    plain = composed_recipe(name, [], folder)
    if unknown := sorted({str(key) for key in plain} - {"name", "run", "set", "stages"}):
        raise RecipeError(f"recipe {name}: unknown key {unknown[0]!r}; a curriculum has name, run, set and stages")
    try:
        bodies, everyone = (
            OmegaConf.to_container(plain.stages),
            OmegaConf.to_container(plain.get("set") or DictConfig({})),
        )
    except OmegaConfBaseException as error:
        raise RecipeError(f"recipe {name}: {' '.join(str(error).split())}") from None
    if not isinstance(bodies, Mapping) or not bodies:
        raise RecipeError(f"recipe {name}: stages is empty: give at least one, NAME: {{recipe: RECIPE}}")
    configs = {str(stage): _config(str(stage), body) for stage, body in bodies.items()}
    order = in_order({stage: config.after for stage, config in configs.items()})
    own = {key: value for key, value in given if key in OWN}
    run = Path(own.get("run") or plain.get("run") or f"outputs/{Path(name).stem}")
    words = [(key, value) for key, value in given if key not in OWN]
    stages: list[Stage] = []
    for stage in order:
        settings = [DictConfig(part or {}) for part in (everyone, bodies[stage].get("set"))]
        mine = [pair for key, value in words if (pair := _for_stage(stage, order, key, value)) is not None]
        stages.append(_compose(stage, configs, settings, mine, run, folder))
    bounds = [_place(key, own[key], order) if key in own else None for key in ("from", "to")]
    first, last = bounds[0] or 0, len(order) - 1 if bounds[1] is None else bounds[1]
    if first > last:
        raise RecipeError(f"from={own['from']} comes after to={own['to']}; the order is {', '.join(order)}")
    return Curriculum(str(plain.get("name", Path(name).stem)), run, tuple(stages), first, last + 1)


def in_order(after: Mapping[str, Sequence[str]]) -> list[str]:
    """Names such that nobody comes before what it needs, as near to the given order as can be. Raises RecipeError."""
    for name, needs in after.items():
        for need in needs:
            if need not in after:
                raise RecipeError(f"stages.{name}.after: unknown stage {need!r}{nearest(need, list(after))}")
    done: list[str] = []
    while len(done) < len(after):
        ready = [name for name in after if name not in done and set(after[name]) <= set(done)]
        if not ready:
            raise RecipeError(f"stages: {' -> '.join(_cycle(after, done))} is a cycle; take one of them out of `after`")
        done.append(ready[0])
    return done


def _cycle(after: Mapping[str, Sequence[str]], done: Sequence[str]) -> list[str]:
    trail = [next(name for name in after if name not in done)]
    while True:
        need = next(need for need in after[trail[-1]] if need not in done)
        if need in trail:
            return [*trail[trail.index(need) :], need][::-1]
        trail.append(need)


def _config(stage: str, body: Any) -> StageConfig:
    if not isinstance(body, Mapping):
        raise RecipeError(f"stages.{stage}: expected {{recipe: RECIPE, ...}}, got {body!r}")
    if not stage.replace("_", "").isalnum() or not stage.isascii():
        raise RecipeError(f"stages.{stage}: a name has letters, digits and underscores only: it is a folder's too")
    settings = body.get("set")
    if settings is not None and not isinstance(settings, Mapping):
        raise RecipeError(f"stages.{stage}.set: expected settings, got {settings!r}")
    config = build(StageConfig, {key: value for key, value in body.items() if key != "set"}, f"stages.{stage}.")
    for key, value, options in (
        ("carry", config.carry, ("weights", "optimizer")),
        ("hand_on", config.hand_on, ("latest", "best")),
    ):
        if value not in options:
            raise RecipeError(f"stages.{stage}.{key}={value}{nearest(value, options)}; it is {' or '.join(options)}")
    if config.carry == "optimizer" and len(config.after) != 1:
        raise RecipeError(f"stages.{stage}.carry=optimizer: it takes one stage in `after`, not {len(config.after)}")
    return config


def _compose(
    stage: str,
    configs: Mapping[str, StageConfig],
    settings: Sequence[DictConfig],
    words: Sequence[tuple[str, str]],
    run: Path,
    folder: Path,
) -> Stage:
    """A stage's recipe: its file, then `set` of all and of its own, then the command line."""
    config, groups = configs[stage], recipe_groups(folder)
    named = [("model", config.model), ("engine", config.engine)]
    choices = {group: value for group, value in named if value is not None}
    choices |= {key: value for key, value in words if key in groups}
    try:
        name = chosen_recipe([("recipe", config.recipe)], folder)
        composed = composed_recipe(name, list(choices.items()), folder)
        if "stages" in composed:
            raise RecipeError(f"recipe {name} is a curriculum itself")
        OmegaConf.set_struct(composed, False)
        merged = composed
        for part in settings:
            merged = _merged(merged, part)
        values = [(key, value) for key, value in words if key not in groups]
        given = [value for key, value in values if key == "init"]
        merged["name"], merged["run"], merged["carry"] = stage, str(run / stage), config.carry
        begins = [str(run / name) for name in reversed(config.after)]
        if given:
            merged["init"] = None if given[-1] in ("null", "") else given[-1]
        elif begins and OmegaConf.is_missing(merged, "init") and not OmegaConf.is_missing(settings[-1], "init"):
            merged["init"] = None  # the stages before it are what the recipe asks for
        if begins and not OmegaConf.is_missing(merged, "init"):
            merged["init"] = ",".join([*begins, *([merged["init"]] if merged.get("init") else [])])
        values = [pair for pair in values if pair[0] != "init"]
        recipe = typed(merged, values, where=f"stage {stage}", settle=settle)
    except RecipeError as error:
        raise RecipeError(f"stage {stage}: {error}") from None
    if config.hand_on == "best" and not recipe.eval.best:
        raise RecipeError(f"stages.{stage}.hand_on=best: no metric chooses it; set eval.best=SET.METRIC in the stage")
    return Stage(stage, tuple(config.after), replace(recipe, name=stage), config.hand_on)


def _merged(composed: DictConfig, settings: DictConfig) -> DictConfig:
    """Settings over a recipe; phases and mixtures that are given replace those of the recipe as wholes."""
    merged = composed.copy()
    for key in ("phases", "data.mixture", "eval.sets"):
        if OmegaConf.select(settings, key) is not None:
            OmegaConf.update(merged, key, {}, merge=False)
    found = OmegaConf.merge(merged, settings)
    assert isinstance(found, DictConfig)
    return found


def _for_stage(stage: str, order: Sequence[str], key: str, value: str) -> tuple[str, str] | None:
    """A word of the command line as this stage sees it; None where it is another stage's."""
    owner, _, rest = key.partition(".")
    if owner in order and rest:
        return (rest, value) if owner == stage else None
    return key, value


def _place(key: str, value: str, order: Sequence[str]) -> int:
    if value not in order:
        raise RecipeError(f"{key}={value}: unknown stage{nearest(value, order)}; there are {', '.join(order)}")
    return order.index(value)
