"""Finetuning a released checkpoint: what its folder says takes the place of what a recipe says.

    model.weights=FOLDER   --settle-->  model.* from config.json, init=FOLDER, data.tokenizer=FOLDER where none is given
    lora.adapter=FOLDER    --settle-->  lora.rank, alpha and targets from adapter_config.json
    init, adapters         --train.start-->  what the engine restores before the first step
    the folder's other files  --keep_files-->  RUN/base: the tokenizer, and what export lays beside the weights

The resolved recipe is whole, and RUN/base has the tokenizer: a run goes on, is evaluated and exported when the folder
is gone. The command that started it may be given again: what it settled then is read from RUN/recipe.yaml.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from models.config import ConfigError, ThinkerConfig
from models.lora import is_lora
from models.omni_config import OmniConfig
from train import ranks
from train.adapter import open_adapter
from train.checkpoint import CheckpointReader
from train.config import Recipe
from train.engines import StateReader
from train.errors import CheckpointError, RecipeError
from train.folder_weights import MAX_JSON_BYTES
from train.lora import LoraState
from train.released import ReleasedState, open_released
from train.typed import MISSING

BASE, TOKENIZER = "base", "tokenizer.json"
# Copied as they are from folder to folder, where they exist.
BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)


def settle(plain: dict[str, Any]) -> dict[str, Any]:
    """The settings with those that model.weights and lora.adapter decide. Raises RecipeError for a bad folder."""
    weights, adapter = _given(plain, "model", "weights"), _given(plain, "lora", "adapter")
    saved = _saved(plain, weights, adapter) if weights or adapter else {}
    if weights:
        if _given(plain, "init") not in (None, weights):
            raise RecipeError(
                f"init={plain['init']} and model.weights={weights}: give one, both are what to start from"
            )
        model = saved.get("model") or {"weights": weights, **_sizes(Path(weights))}
        plain = plain | {"model": model, "init": weights}
        data = dict(plain.get("data") or {})
        if not _given(plain, "data", "tokenizer"):
            data["tokenizer"] = saved["data"]["tokenizer"] if saved else _tokenizer(weights)
        plain["data"] = data
    if adapter:
        if not _given(plain, "init"):
            raise RecipeError(f"lora.adapter={adapter}: there is nothing to add it to; give model.weights or init")
        plain = plain | {"lora": saved.get("lora") or _adapter_settings(adapter)}
    return plain


def _given(plain: Mapping[str, Any], *path: str) -> Any:
    """A setting, None where it is not given."""
    value: Any = plain
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value in (MISSING, "") else value


def _saved(plain: Mapping[str, Any], weights: Any, adapter: Any) -> dict[str, Any]:
    """What RUN/recipe.yaml holds, where the run there began from the same folders."""
    path = Path(str(plain["run"])) / "recipe.yaml"
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError):
        return {}
    if not isinstance(found, dict) or _given(found, "model", "weights") != weights:
        return {}
    return found if _given(found, "lora", "adapter") == adapter else {}


def _sizes(folder: Path) -> dict[str, Any]:
    try:
        config = open_released(folder).config
    except (CheckpointError, ConfigError) as error:
        raise RecipeError(f"model.weights: {error}") from None
    if not isinstance(config, ThinkerConfig | OmniConfig):
        raise RecipeError(f"model.weights: {folder}: holds a Talker alone; give the whole model or a Thinker")
    whole = config if isinstance(config, OmniConfig) else OmniConfig(config)
    parts = {
        "text": whole.thinker.text,
        "audio": whole.thinker.audio,
        "vision": whole.thinker.vision,
        "talker": whole.talker,
        "code2wav": whole.code2wav,
    }
    return {name: None if part is None else asdict(part) for name, part in parts.items()}


def _tokenizer(weights: str) -> str:
    if not (Path(weights) / TOKENIZER).is_file():
        raise RecipeError(f"data.tokenizer is not set, and {weights} has no {TOKENIZER}: name the folder of one")
    return weights


def _adapter_settings(folder: str) -> dict[str, Any]:
    try:
        found = open_adapter(Path(folder))
    except (CheckpointError, ConfigError) as error:
        raise RecipeError(f"lora.adapter: {error}") from None
    own = {"rank": found.rank, "alpha": found.alpha, "rslora": found.rslora, "targets": list(found.targets)}
    return own | {"adapter": folder}


def check(recipe: Recipe) -> None:
    """Raise RecipeError for settings of adapters that do not go with others."""
    for name, phase in recipe.phases.items():
        if recipe.lora is not None and phase.speech == "cached":
            raise RecipeError(
                f"phases.{name}.speech=cached: hidden states are those of a Thinker without adapters; take frozen, or "
                "leave lora out"
            )


def about(recipe: Recipe) -> str:
    """Comments at the top of a resolved recipe: which of its settings a folder decided."""
    lines = []
    if recipe.model.weights:
        lines.append(f"# model: its sizes are those of {recipe.model.weights}/config.json\n")
    if recipe.lora is not None and recipe.lora.adapter:
        lines.append(f"# lora: rank, alpha and targets are those of {recipe.lora.adapter}\n")
    return "".join(lines)


def open_released_weights(recipe: Recipe, model: Any) -> StateReader:
    """Those of model.weights.

    Raises CheckpointError or ConfigError for a folder that cannot be used, RecipeError for one of another model.
    """
    released = open_released(Path(recipe.model.weights or ""))
    _check_same(recipe, asdict(model), asdict(released.config))
    return ReleasedState(released)


def with_adapters(recipe: Recipe, state: StateReader) -> StateReader:
    """Weights to start from, with adapters where the recipe has some. Raises RecipeError for a run that has its own."""
    if recipe.lora is not None:
        return LoraState(state, recipe.lora, recipe.seed)
    if isinstance(state, CheckpointReader) and any(is_lora(name) for name in state.names()):
        raise RecipeError(
            f"init={recipe.init}: that run has adapters; export it (launch.convert export), which merges them, and "
            "start from the export, or give lora"
        )
    return state


def _check_same(recipe: Recipe, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Token ids follow from the tokenizer here, and from config.json there."""
    found = dict(_flat(theirs))
    for key, value in _flat(ours):
        if key in found and found[key] != value:
            raise RecipeError(
                f"model.weights={recipe.model.weights}: {key} is {found[key]} in its config.json, and {value} by "
                f"data.tokenizer={recipe.data.tokenizer}; give the tokenizer that the model was trained with"
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def identity_of(setup: Any) -> dict[str, Any]:
    """What a checkpoint and the recipe that goes on from it must agree on: sizes, and shapes of adapters."""
    model, lora = asdict(setup.model), setup.lora
    if lora is None:
        return model
    return model | {"lora": {key: value for key, value in asdict(lora).items() if key != "adapter"}}


def keep_files(recipe: Recipe) -> Recipe:
    """Copy what lies beside the weights to RUN/base, once; the recipe with the tokenizer there, if it was the folder's.

    Collective.
    """
    if recipe.model.weights is None:
        return recipe
    source, kept = Path(recipe.model.weights), Path(recipe.run) / BASE
    if ranks.rank() == 0 and source.is_dir() and not kept.is_dir():
        part = kept.with_name(f".{BASE}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        copy_beside(source, part)
        part.rename(kept)
    ranks.barrier()
    if recipe.data.tokenizer != recipe.model.weights or not (kept / TOKENIZER).is_file():
        return recipe
    return replace(recipe, data=replace(recipe.data, tokenizer=str(kept)))


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what is BESIDE the weights. Raises CheckpointError for a file that is too large."""
    for name in BESIDE:
        path = source / name
        if path.is_file():
            if path.stat().st_size > MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
            shutil.copyfile(path, folder / name)
