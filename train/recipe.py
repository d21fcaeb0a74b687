"""A recipe: everything that decides a run, as frozen dataclasses.

    recipes/NAME.yaml + groups (model/ engine/)  --hydra.compose-->  plain values
    + KEY=VALUE from the command line            --train.typed---->  Recipe, types checked
    Recipe  -->  printed, and saved as recipe.yaml in the run folder (its fields: train/config.py)

Hydra composes and no more: `@hydra.main` would give every rank an output folder of its own, and nothing here is ever
instantiated by a name in a file. A choice is a plain string, looked up where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data.augment import Augment
from data.errors import DataError
from train.config import Phase, Recipe
from train.errors import RecipeError
from train.finetune import about, check, settle
from train.parallel import ENGINES
from train.progress import check_progress
from train.suites.registry import check_sets
from train.transcribe_check import check_transcriber
from train.typed import build, nearest, paths
from train.waveform_config import DECODER_PHASES

WAYS = ("off", "live", "detached", "frozen", "cached", "preference", *DECODER_PHASES)  # of phases.X.speech
VIEWS = ("auto", "bar", "rich", "off")  # of log.view
RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@dataclass(frozen=True)
class Span:
    """A phase and the steps it covers: from `start` up to, not including, `stop`."""

    name: str
    phase: Phase
    start: int
    stop: int


def spans(recipe: Recipe) -> list[Span]:
    """The phases of a recipe one after the other."""
    found, start = [], 0
    for name, phase in recipe.phases.items():
        found.append(Span(name, phase, start, start + phase.steps))
        start += phase.steps
    return found


def load_recipe(argv: Sequence[str], folder: Path = RECIPES) -> Recipe:
    """Compose `recipe=NAME KEY=VALUE ...`. Raises RecipeError with the nearest valid name for a typo."""
    given = [split_word(word) for word in argv]
    name = chosen_recipe(given, folder)
    groups = recipe_groups(folder)
    composed = composed_recipe(name, [(key, value) for key, value in given if key in groups], folder)
    values = [(key, value) for key, value in given if key not in groups | {"recipe"}]
    return typed(composed, values, where=f"recipe {name}", settle=settle)


def chosen_recipe(given: Sequence[tuple[str, str]], folder: Path = RECIPES) -> str:
    """The NAME of recipe=NAME, or the path of a file of the user's. Raises RecipeError with the nearest name."""
    names = recipe_names(folder)
    chosen = [value for key, value in given if key == "recipe"]
    if len(chosen) != 1:
        raise RecipeError(f"give one recipe=NAME, or the path of a .yaml file; there are {', '.join(names)}")
    if chosen[0].endswith(".yaml"):
        if not Path(chosen[0]).is_file():
            raise RecipeError(f"recipe={chosen[0]}: no such file")
        return chosen[0]
    if chosen[0] not in names:
        raise RecipeError(f"unknown recipe {chosen[0]!r}{nearest(chosen[0], names)}; there are {', '.join(names)}")
    return chosen[0]


def recipe_groups(folder: Path = RECIPES) -> set[str]:
    """Groups that a recipe picks from, such as model and engine."""
    return {path.name for path in folder.iterdir() if path.is_dir()}


def composed_recipe(name: str, choices: Sequence[tuple[str, str]], folder: Path = RECIPES) -> DictConfig:
    """recipes/NAME.yaml with (group, option) chosen, as plain values. Raises RecipeError for an unknown option.

    A file of the user's own, given by its path, may build on recipes and groups of `folder` in its defaults.
    """
    for group, value in choices:
        options = sorted(path.stem for path in (folder / group).glob("*.yaml"))
        if value not in options:
            raise RecipeError(f"unknown {group}={value}{nearest(value, options)}; there are {', '.join(options)}")
    GlobalHydra.instance().clear()
    overrides, home = [f"{key}={value}" for key, value in choices], folder
    if name.endswith(".yaml"):
        overrides, home = [f"hydra.searchpath=[file://{folder.resolve()}]", *overrides], Path(name).parent
    try:
        with initialize_config_dir(str(home.resolve()), version_base="1.3"):
            return compose(Path(name).stem, overrides=overrides)
    except (OmegaConfBaseException, HydraException, YAMLError) as error:
        raise RecipeError(f"recipe {name}: {' '.join(str(error).split())}") from None


def load_saved(path: Path, argv: Sequence[str]) -> Recipe:
    """The recipe of an existing run, from its recipe.yaml, with settings changed. Raises RecipeError."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such file; give the folder of a run")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a recipe: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, DictConfig):
        raise RecipeError(f"{path}: not a recipe: expected settings")
    return typed(loaded, [split_word(word) for word in argv], where=str(path))


def typed(
    plain: DictConfig,
    values: Iterable[tuple[str, str]],
    where: str,
    settle: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Recipe:
    """Check plain values and overrides against the dataclasses; `settle` may replace some. Raises RecipeError."""
    known = dict(paths(Recipe))
    values = list(values)
    for key, _ in values:
        if key not in known and not any(free and key.startswith(f"{name}.") for name, free in known.items()):
            raise RecipeError(f"unknown setting {key!r}{nearest(key, list(known))}")
    try:
        OmegaConf.set_struct(plain, False)
        merged = plain.copy()
        for key, value in values:  # a value replaces what was there, dictionaries and lists too
            _require_phase(key, merged)
            given = OmegaConf.select(OmegaConf.from_dotlist([f"{key}={value}"]), key)
            OmegaConf.update(merged, key, given, merge=False)
        defaults = {"run": Recipe.run} if "run" not in merged else {}
        resolved = OmegaConf.to_container(OmegaConf.merge(defaults, merged), resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise RecipeError(f"{where}: {' '.join(str(error).split())}") from None
    assert isinstance(resolved, dict)
    recipe = _with_steps(build(Recipe, settle({str(key): value for key, value in resolved.items()})))
    _validate(recipe)
    return recipe


def _with_steps(recipe: Recipe) -> Recipe:
    """Phases that say `tokens` with the steps that hold them: all positions of the packs, the last step whole."""
    phases = {}
    for name, phase in recipe.phases.items():
        length = phase.sequence_length or recipe.data.sequence_length
        steps = math.ceil(phase.tokens / max(1, length * recipe.data.sequences_per_step))
        if phase.tokens and phase.steps not in (0, steps):
            raise RecipeError(
                f"phases.{name}: give steps or tokens, not both: {phase.tokens:,} tokens are {steps:,} steps, not "
                f"{phase.steps:,}"
            )
        phases[name] = replace(phase, steps=steps) if phase.tokens else phase
    return replace(recipe, phases=phases)


def _require_phase(key: str, merged: DictConfig) -> None:
    """Raise RecipeError for a setting of a phase that there is not: it would train as a new one, after the others."""
    parent, _, rest = key.partition(".")
    name, _, setting = rest.partition(".")
    phases = merged.get("phases")
    if parent == "phases" and setting and isinstance(phases, DictConfig) and name not in phases:
        known = [str(phase) for phase in phases]
        raise RecipeError(f"unknown phase in {key}{nearest(name, known)}; phases.{name}={{steps: ...}} adds one")


def as_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML text."""
    return about(recipe) + OmegaConf.to_yaml(OmegaConf.create(asdict(recipe)))


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """Recipes that can be run: files that do not start with an underscore."""
    return sorted(path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("_"))


def split_word(word: str) -> tuple[str, str]:
    """KEY=VALUE of the command line. Raises RecipeError."""
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise RecipeError(f"cannot read {word!r}: settings are KEY=VALUE, for instance optim.lr=1e-4")
    return key, value


def _one_of(key: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise RecipeError(f"{key}={value}{nearest(value, options)}; it is one of {', '.join(options)}")


def _check_decoder(where: str, recipe: Recipe) -> None:
    if recipe.model.code2wav is None:
        raise RecipeError(f"{where}: the model has no code2wav; choose one that has")
    piece = recipe.loss.waveform.frames + recipe.loss.waveform.context
    if piece > recipe.data.sequence_length:
        raise RecipeError(
            f"{where}: loss.waveform.frames and context are {piece} frames, above "
            f"data.sequence_length={recipe.data.sequence_length}; raise it or take shorter pieces"
        )


def _validate(recipe: Recipe) -> None:
    """What types cannot say. Checks that need other parts (tokenizer, ranks) live with those parts."""
    _one_of("engine.name", recipe.engine.name, ENGINES)
    _one_of("engine.dispatcher", recipe.engine.dispatcher, ("alltoall", "deepep"))
    _one_of("engine.device", recipe.engine.device, ("auto", "cpu", "cuda"))
    _one_of("engine.precision", recipe.engine.precision, ("fp32", "bf16"))
    _one_of("optim.schedule", recipe.optim.schedule, ("cosine", "wsd"))
    _one_of("log.wandb", recipe.log.wandb, ("off", "offline", "online"))
    check_sets(recipe.eval)
    _one_of("carry", recipe.carry, ("weights", "optimizer"))
    _one_of("log.view", recipe.log.view, VIEWS)
    if recipe.log.experts_every < 0:
        raise RecipeError(f"log.experts_every={recipe.log.experts_every}: it must be 0 (off) or more")
    try:
        recipe.data.validate()
        for name, phase in recipe.phases.items():
            if phase.mixture is not None:
                phase.mixture.validate(f"phases.{name}.mixture")
    except DataError as error:
        raise RecipeError(str(error)) from None
    check_transcriber(recipe)
    for name, phase in recipe.phases.items():
        _one_of(f"phases.{name}.speech", phase.speech, WAYS)
        if phase.speech != "off" and recipe.model.talker is None:
            raise RecipeError(f"phases.{name}.speech={phase.speech}: the model has no talker; choose one that has")
        if phase.speech != "off" and not recipe.data.codec:
            raise RecipeError(f"phases.{name}.speech={phase.speech}: data.codec is not set: name the codec's folder")
        if phase.speech == "cached" and (set(recipe.data.speeds) != {1.0} or recipe.data.augment != Augment()):
            raise RecipeError(
                f"phases.{name}.speech=cached: hidden states are of recordings as they are: set data.speeds=[1.0] and "
                "leave data.augment out"
            )
        if phase.speakers and phase.speech == "off":
            raise RecipeError(f"phases.{name}.speakers: the phase has no speech; set phases.{name}.speech too")
        if phase.speech in DECODER_PHASES:
            _check_decoder(f"phases.{name}.speech={phase.speech}", recipe)
    check(recipe)
    for problem in recipe.guard.problems():
        raise RecipeError(problem)
    if recipe.engine.zero not in (1, 2, 3):
        raise RecipeError(f"engine.zero={recipe.engine.zero}: it is 1, 2 or 3")
    if not recipe.phases:
        raise RecipeError("phases is empty: give at least one, for instance phases.all.steps=1000")
    at_least_one: Mapping[str, float] = {
        **{f"phases.{name}.steps": phase.steps for name, phase in recipe.phases.items()},
        **{
            f"phases.{name}.sequence_length": phase.sequence_length
            for name, phase in recipe.phases.items()
            if phase.sequence_length is not None
        },
        "engine.ep": recipe.engine.ep,
        "save.every": recipe.save.every,
        "save.keep": recipe.save.keep,
        "log.every": recipe.log.every,
        "loss.max_logits": recipe.loss.max_logits,
        "eval.max_new_tokens": recipe.eval.max_new_tokens,
        "eval.batch_tokens": recipe.eval.batch_tokens,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise RecipeError(f"{key}={value}: it must be at least 1")
    check_progress(recipe)
