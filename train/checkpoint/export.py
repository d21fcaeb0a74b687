"""`weights/`: a checkpoint's weights under released names, loadable by transformers and other programs.

    manifest -> one tensor at a time -> model-0000K-of-0000N.safetensors, model.safetensors.index.json, config.json

Memory: one tensor. Published by a rename, like a checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.format import safetensors_header
from train.checkpoint.reader import INDEX, ReleasedTensors
from train.engines import WEIGHT
from train.errors import CheckpointError

_NAME_OF = {torch.bfloat16: "BF16", torch.float32: "F32"}


def export_weights(
    reader: ReleasedTensors,
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_file_bytes: int = 5 << 30,
) -> Path:
    """Write every weight of `reader` into a new `folder`, with `config` as config.json. Returns the folder.

    dtype: bfloat16 or float32. Raises CheckpointError when the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; remove it or choose another folder")
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    part.mkdir(parents=True)
    try:
        _write_files(reader, part, dtype, max_file_bytes)
        (part / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder


def _write_files(reader: ReleasedTensors, part: Path, dtype: torch.dtype, max_file_bytes: int) -> None:
    shapes = reader.names()
    files: list[list[str]] = [[]]
    filled = total = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if files[-1] and filled + size > max_file_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled, total = filled + size, total + size
    file_of = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file_of |= dict.fromkeys(names, file)
        entries = [(n, _NAME_OF[dtype], shapes[n], math.prod(shapes[n]) * dtype.itemsize) for n in names]
        with open(part / file, "wb") as out:
            out.write(safetensors_header(entries, {"format": "pt"}))
            for name in names:
                out.write(_bytes(reader.read_released(WEIGHT, name, 0, math.prod(shapes[name])).to(dtype)))
            out.flush()
            os.fsync(out.fileno())
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (part / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().view(torch.uint8).numpy().data
