"""Folders of safetensors written block by block, as they are read (train/folder_weights.py).

    {name: Weight} --blocks of 16 MB--> files of 5 GB, an index

Memory: one block. A folder being written has another name until it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from train.checkpoint import CheckpointReader
from train.checkpoint.format import safetensors_header
from train.engines import WEIGHT
from train.errors import CheckpointError
from train.folder_weights import DTYPES, INDEX, Weight, plain_name
from train.folder_weights import MAX_JSON_BYTES as MAX_JSON_BYTES
from train.folder_weights import Shape as Shape
from train.folder_weights import fused_weights as fused_weights
from train.folder_weights import join as join
from train.folder_weights import open_folder as open_folder
from train.folder_weights import read_json as read_json
from train.folder_weights import released_weights as released_weights

PRECISION = {"bf16": torch.bfloat16, "fp32": torch.float32}  # what the commands take as dtype=
_CODE = {dtype: code for code, dtype in DTYPES.items()}
MAX_FILE_BYTES = 5 * 10**9
BLOCK_BYTES = 16 << 20


def checkpoint_weights(reader: CheckpointReader) -> dict[str, Weight]:
    """Every weight of a training checkpoint under its released name, fp32."""
    source = str(reader.manifest.folder)
    return {
        name: Weight(tuple(shape), torch.float32, source, partial(reader.read_released, WEIGHT, name))
        for name, shape in reader.names().items()
    }


def check_lossless(weights: Mapping[str, Weight], dtype: torch.dtype | None, advice: str) -> None:
    """Raise CheckpointError for the first weight that `dtype` (None: its own) cannot hold exactly."""
    for name, weight in weights.items():
        if dtype is not None and weight.exact and torch.promote_types(weight.dtype, dtype) != dtype:
            raise CheckpointError(
                f"{weight.source}: {name} is {plain_name(weight.dtype)}, and {plain_name(dtype)} would lose "
                f"precision; {advice}"
            )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that gets its name at the end; nothing stays of it after an error. Raises CheckpointError."""
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; remove it or choose another folder")
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(f"{folder}: cannot be written: {error}") from None
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_weights(
    folder: Path, weights: Mapping[str, Weight], dtype: torch.dtype | None, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write `weights`, in their order, as safetensors of at most `max_file_bytes` with an index.

    dtype None: as they are. A tensor larger than a file has a file of its own. Raises CheckpointError.
    """
    entries = [(name, weight, dtype or weight.dtype) for name, weight in weights.items()]
    total = sum(weight.numel * kind.itemsize for _, weight, kind in entries)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise CheckpointError(f"{folder.parent}: {total} bytes are to be written, and {free} are free")
    files = list(_shards(entries, max_file_bytes))
    file_of = {}
    for number, rows in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file_of |= dict.fromkeys((name for name, _, _ in rows), file)
        head = [(name, _CODE[kind], weight.shape, weight.numel * kind.itemsize) for name, weight, kind in rows]
        with open(folder / file, "wb") as out:
            out.write(safetensors_header(head, {"format": "pt"}))
            for _, weight, kind in rows:
                for block in _blocks(weight):
                    out.write(block.to(kind).contiguous().view(torch.uint8).numpy().data)
            out.flush()
            os.fsync(out.fileno())
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


Entry = tuple[str, Weight, torch.dtype]


def _shards(entries: Iterable[Entry], max_file_bytes: int) -> Iterator[list[Entry]]:
    rows: list[Entry] = []
    filled = 0
    for entry in entries:
        size = entry[1].numel * entry[2].itemsize
        if rows and filled + size > max_file_bytes:
            yield rows
            rows, filled = [], 0
        rows.append(entry)
        filled += size
    yield rows


def _blocks(weight: Weight) -> Iterator[Tensor]:
    step = BLOCK_BYTES // 4
    for start in range(0, weight.numel, step):
        yield weight.read(start, min(step, weight.numel - start))
