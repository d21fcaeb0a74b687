"""A checkpoint's weights under the released checkpoint's names, loadable by transformers.

    python -m launch.export run=outputs/demo out=weights [checkpoint=latest] [dtype=bf16]

Writes safetensors of at most 5 GB with an index, config.json and the tokenizer. Memory: one tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data.tokenizer import load_tokenizer
from launch.arguments import guarded, parse
from models.hf import released_pieces, to_released_config
from train.checkpoint import CheckpointReader, choose, export_weights
from train.errors import CheckpointError, RecipeError
from train.main import model_config
from train.recipe import load_saved

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export(argv: Sequence[str]) -> None:
    """Read, write, say where. Raises this project's errors."""
    given, rest = parse(argv, {"run": None, "out": None, "checkpoint": "latest", "dtype": "bf16"})
    if given["dtype"] not in DTYPES:
        raise RecipeError(f"dtype={given['dtype']}: it is bf16 or fp32")
    folder = Path(given["run"])
    recipe = load_saved(folder / "recipe.yaml", rest)
    tokenizer = load_tokenizer(Path(recipe.data.tokenizer))
    manifest = choose(folder, given["checkpoint"], wait_s=0)
    if manifest is None:
        raise CheckpointError(f"{folder}: no checkpoint yet")
    config = to_released_config(model_config(recipe, tokenizer))
    reader = CheckpointReader(manifest, released_pieces)
    out = export_weights(reader, given["out"], config, dtype=DTYPES[given["dtype"]])
    tokenizer.save(out)
    print(f"step {manifest.step} of {folder} written to {out}, {given['dtype']}")


if __name__ == "__main__":
    sys.exit(guarded(export, sys.argv[1:]))
