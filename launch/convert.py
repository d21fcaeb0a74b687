"""Released checkpoints in and out, checked; and first weights from several sources.

    python -m launch.convert check  model=qwen3_omni_30b_a3b | FOLDER
    python -m launch.convert import from=FOLDER to=FOLDER
    python -m launch.convert export from=FOLDER|RUN to=FOLDER [part=all|thinker|talker] [checkpoint=latest]
    python -m launch.convert export from=RUN to=FOLDER adapter=true [part=all|thinker]
    python -m launch.convert merge  from=FOLDER adapter=FOLDER to=FOLDER
    python -m launch.convert init   to=FOLDER model=NAME [text=FOLDER] [vision=FOLDER] [audio=FOLDER]
                                    [tokenizer=FOLDER] [seed=0]

All that write take dtype=bf16|fp32 and max_file_gb=5.

check   counts the parameters of every part on the meta device; of a folder it also compares every name, shape and
        dtype with its configuration, by headers alone.
import  any folder that transformers writes (models/hf.py names the layouts) into the released layout: safetensors under
        released names, config.json and the files beside it. That is what `init=` of a recipe and `export` read.
export  from such a folder, or from a run's checkpoint, a folder for transformers: all that is there, the Thinker alone,
        or the Talker alone, whose experts are fused because transformers fails to fuse them there. A run's weights are
        fp32 unless dtype=bf16 is given; its tokenizer is saved beside them.
        Adapters of a run with `lora` are merged into its weights; adapter=true writes them alone, in peft's format.
merge   an adapter in peft's format into the weights of a folder.
init    see launch/sources.py.

Without `dtype` tensors of a folder have the dtype that its config.json names; one that it cannot hold exactly is an
error. Memory: one block of 16 MB and the headers, whatever the model's size. A folder appears only when it is whole.
Only safetensors are read: pickled weights (.bin) never are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.tokenizer import ENDOFTEXT, IM_END, Tokenizer, load_tokenizer
from launch.adapters import merged, write_adapter
from launch.arguments import guarded, parse
from launch.released import (
    KINDS,
    Released,
    check_dtypes,
    check_weights,
    counts,
    expected_shapes,
    open_released,
    recipe_config,
)
from launch.sources import initial_weights, with_tokens_of
from launch.weights import (
    PRECISION,
    Weight,
    check_lossless,
    checkpoint_weights,
    fused_weights,
    new_folder,
    plain_name,
    write_weights,
)
from models.config import ThinkerConfig, TranscriberConfig
from models.hf import released_pieces
from models.hf_config import TALKER, THINKER, omni_to_released, to_released_config
from models.lora import is_lora
from models.omni_config import OmniConfig, TalkerConfig
from train.adapter import open_adapter
from train.checkpoint import CheckpointReader, Manifest, choose
from train.errors import CheckpointError, RecipeError
from train.finetune import BASE, copy_beside
from train.lora_config import LoraConfig
from train.opening import model_config
from train.recipe import load_saved
from train.typed import nearest

_WRITING = {"from": None, "to": None, "dtype": "", "max_file_gb": "5"}


def check(argv: Sequence[str]) -> None:
    """Count, and compare a folder's headers with its configuration."""
    given, rest = parse(argv, {"model": None})
    _no_more(rest)
    folder = Path(given["model"])
    if not folder.is_dir():
        shapes = expected_shapes(recipe_config(given["model"]))
        print(f"{given['model']}: built on the meta device")
    else:
        released = open_released(folder)
        check_dtypes(released)
        shapes = {name: weight.shape for name, weight in released.weights.items()}
        print(f"{folder}: {KINDS[type(released.config)][0]}; all {len(shapes)} tensors are as config.json says")
    for part, count in counts(shapes).items():
        print(f"  {part:20}{count:>18,}")


def import_(argv: Sequence[str]) -> None:
    """A folder of transformers into the released layout."""
    given, rest = parse(argv, _WRITING)
    _no_more(rest)
    source = Path(given["from"])
    released = open_released(source)
    _write(given, released, released.config_json, released.weights, partial(copy_beside, source))


def export(argv: Sequence[str]) -> None:
    """A folder of weights, or a run, for transformers."""
    given, rest = parse(argv, {**_WRITING, "part": "all", "checkpoint": "latest", "adapter": "false"})
    if given["adapter"] not in ("true", "false"):
        raise RecipeError(f"adapter={given['adapter']}: it is true or false")
    if given["part"] not in ("all", "thinker", "talker"):
        raise RecipeError(f"part={given['part']}: it is all, thinker or talker")
    source = Path(given["from"])
    if given["adapter"] == "true":
        _export_adapter(given, rest)
        return
    if (source / "recipe.yaml").is_file():
        released, beside = _open_run(source, given["checkpoint"], rest)
    else:
        _no_more(rest)
        released, beside = open_released(source), partial(copy_beside, source)
    config_json, weights = _part(released, given["part"], source)
    _write(given, released, config_json, weights, beside)


def _export_adapter(given: Mapping[str, str], changes: Sequence[str]) -> None:
    """The adapters of a run alone."""
    folder = Path(given["from"])
    recipe = load_saved(folder / "recipe.yaml", changes)
    if recipe.lora is None:
        raise RecipeError(f"adapter=true: {folder} has no lora: nothing but its weights learnt")
    if given["part"] == "talker":
        raise RecipeError("part=talker: adapters are written for the whole model, or for part=thinker")
    manifest = _manifest(folder, given["checkpoint"])
    weights = checkpoint_weights(CheckpointReader(manifest, released_pieces))
    bare = given["part"] == "thinker" or recipe.model.talker is None
    to, dtype = Path(given["to"]), _precision(given) or torch.float32
    base = recipe.model.weights or recipe.init
    count = write_adapter(to, weights, recipe.lora, base, bare=bare, dtype=dtype)
    print(f"step {manifest.step} of {folder}")
    print(f"adapters of {count} parameters written to {to}, {plain_name(dtype)}")


def merge(argv: Sequence[str]) -> None:
    """An adapter into the weights of a folder."""
    given, rest = parse(argv, {**_WRITING, "adapter": None})
    _no_more(rest)
    source = Path(given["from"])
    released, adapter = open_released(source), open_adapter(Path(given["adapter"]))
    scale = LoraConfig(adapter.rank, adapter.alpha, adapter.rslora).scale
    weights = merged(released.weights, adapter.weights, scale)
    print(f"adapters of {len(adapter.targets)} parameters merged, rank {adapter.rank}, scale {scale:g}")
    _write(given, released, released.config_json, weights, partial(copy_beside, source))


def init(argv: Sequence[str]) -> None:
    """First weights of a recipe's whole model, from several sources and a seed."""
    known = {"to": None, "model": None, "text": "", "vision": "", "audio": "", "tokenizer": "", "seed": "0"}
    given, rest = parse(argv, {**known, "dtype": "fp32", "max_file_gb": "5"})
    _no_more(rest)
    folders = {key: Path(given[key]) if given[key] else None for key in ("text", "vision", "audio")}
    tokenizer = load_tokenizer(Path(given["tokenizer"])) if given["tokenizer"] else None
    config = recipe_config(given["model"])
    if tokenizer is not None:
        config = with_tokens_of(tokenizer, config)
    weights, report = initial_weights(config, _number(given, "seed", int), **folders)
    config_json = omni_to_released(config) | {"dtype": plain_name(_precision(given) or torch.float32)}
    released = Released(config_json, config, weights)
    beside = partial(_save_tokenizer, tokenizer) if tokenizer else lambda folder: None
    for line in report:
        print(line)
    _write(given, released, config_json, weights, beside)


def _precision(given: Mapping[str, str]) -> torch.dtype | None:
    if given["dtype"] and given["dtype"] not in PRECISION:
        raise RecipeError(f"dtype={given['dtype']}: it is {' or '.join(PRECISION)}")
    return PRECISION.get(given["dtype"])


def _write(
    given: Mapping[str, str],
    released: Released,
    config_json: dict[str, Any],
    weights: Mapping[str, Weight],
    beside: Callable[[Path], None],
) -> None:
    """All checks first, then the folder, and a line on what it holds."""
    asked, to = _precision(given), Path(given["to"])
    max_file_bytes = int(_number(given, "max_file_gb", float) * 10**9)
    dtype = asked or released.dtype
    if asked is None:
        check_lossless(weights, dtype, "give dtype=bf16 to allow it, or dtype=fp32 to keep it")
    with new_folder(to) as part:
        write_weights(part, weights, dtype, max_file_bytes)
        config_json = _with_dtype(config_json, dtype)
        (part / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")
        beside(part)
    numel = sum(weight.numel for weight in weights.values())
    kind = "as they were" if dtype is None else plain_name(dtype)
    print(f"{numel:,} parameters in {len(weights)} tensors written to {to}, {kind}")


def _part(released: Released, part: str, source: Path) -> tuple[dict[str, Any], dict[str, Weight]]:
    """config.json and tensors, under the names that transformers' class of that part reads."""
    config, config_json = released.config, released.config_json
    held = KINDS[type(config)][0]
    if part == "all":
        if isinstance(config, OmniConfig):
            return config_json, released.weights
        part = "thinker" if isinstance(config, ThinkerConfig) else "talker"
    wanted, architecture, kind = {
        "thinker": (ThinkerConfig, THINKER, "qwen3_omni_moe_thinker"),
        "talker": (TalkerConfig, TALKER, ""),
    }[part]
    weights = {name: weight for name, weight in released.weights.items() if name.startswith(f"{part}.")}
    if not weights or not isinstance(config, OmniConfig | wanted):
        raise CheckpointError(f"{source}: holds {held}, no {part}")
    config_json = dict(config_json.get(f"{part}_config", config_json))
    config_json |= {"architectures": [architecture], "model_type": kind}
    if part == "talker":
        weights = {name.removeprefix("talker."): weight for name, weight in fused_weights(weights).items()}
    return config_json, weights


def _open_run(folder: Path, checkpoint: str, changes: Sequence[str]) -> tuple[Released, Callable[[Path], None]]:
    """The weights of a run's checkpoint, verified by its checksums, as a folder's."""
    recipe = load_saved(folder / "recipe.yaml", changes)
    tokenizer = load_tokenizer(Path(recipe.data.tokenizer))
    config = model_config(recipe, tokenizer)
    if isinstance(config, TranscriberConfig):
        raise CheckpointError(
            f"{folder}: a run of an audio encoder alone: no released folder has one; give it to init="
        )
    manifest = _manifest(folder, checkpoint)
    weights = checkpoint_weights(CheckpointReader(manifest, released_pieces))
    if recipe.lora is not None:
        weights = merged(weights, {n: weight for n, weight in weights.items() if is_lora(n)}, recipe.lora.scale)
        print(f"adapters merged, rank {recipe.lora.rank}, scale {recipe.lora.scale:g}")
    check_weights(weights, expected_shapes(config), f"{manifest.folder}: the weights")
    config_json = omni_to_released(config) if isinstance(config, OmniConfig) else to_released_config(config)
    print(f"step {manifest.step} of {folder}")
    beside = partial(_save_beside, tokenizer, folder / BASE)
    return Released(config_json | {"dtype": "float32"}, config, weights), beside


def _manifest(folder: Path, checkpoint: str) -> Manifest:
    manifest = choose(folder, checkpoint, wait_s=0)
    if manifest is None:
        raise CheckpointError(f"{folder}: no checkpoint yet")
    return manifest


def _save_beside(tokenizer: Tokenizer, base: Path, folder: Path) -> None:
    """The run's tokenizer, and of a finetuned model what lay beside its weights."""
    _save_tokenizer(tokenizer, folder)
    if base.is_dir():
        copy_beside(base, folder)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(folder)
    generation = {"eos_token_id": tokenizer.id(IM_END), "pad_token_id": tokenizer.id(ENDOFTEXT)}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _with_dtype(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The dtype where config.json has one, in sections too; transformers reads the first."""
    if dtype is None:
        return config
    sections = {key: _with_dtype(value, dtype) for key, value in config.items() if key.endswith("_config") and value}
    named = {key: plain_name(dtype) for key in ("dtype", "torch_dtype") if config.get(key)}
    return {**config, **sections, **named} | ({"dtype": plain_name(dtype)} if "architectures" in config else {})


def _number(given: Mapping[str, str], key: str, kind: type) -> Any:
    try:
        value = kind(given[key])
    except ValueError:
        raise RecipeError(f"{key}={given[key]}: expected a number") from None
    if not 0 <= value < 2**63 or (key != "seed" and not value):
        raise RecipeError(f"{key}={given[key]}: out of range")
    return value


def _no_more(rest: Sequence[str]) -> None:
    if rest:
        raise RecipeError(f"unknown argument {rest[0]!r}")


COMMANDS = {"check": check, "import": import_, "export": export, "merge": merge, "init": init}


def main(argv: Sequence[str]) -> None:
    """One of COMMANDS. Raises this project's errors."""
    name = argv[0] if argv else ""
    if name not in COMMANDS:
        raise RecipeError(f"unknown command {name!r}{nearest(name, list(COMMANDS))}; give {', '.join(COMMANDS)}")
    COMMANDS[name](argv[1:])


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
