"""Weights that are never in memory as a whole: safetensors folders read range by range.

    folder --open_folder--> {name: Weight} --rename, cut, join: integers only--> {name: Weight} --read--> a block
                            headers only

Memory: one block, whatever the tensors' sizes, plus the headers; files are read, not mapped, so the process stays as
small as it looks. Only safetensors are read: pickled weights (.bin, .pt) run code when they are loaded and are refused.
launch/weights.py writes such folders.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.hf import COMPONENTS, fused_name, released_name, released_tensors
from train.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_JSON_BYTES = 100_000_000  # of a header, an index or a configuration
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A tensor by its shape, its dtype, where it comes from, and how to read a flat range of it: `read(start, length)`.

    `exact` False: values made here for the first time, which any dtype may hold.
    """

    shape: Shape
    dtype: torch.dtype
    source: str
    read: Callable[[int, int], Tensor]
    exact: bool = True

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def part(self, start: int, shape: Shape) -> Weight:
        """The tensor of `shape` that begins at flat element `start` of this one."""
        return replace(self, shape=shape, read=lambda at, length: self.read(start + at, length))


def join(parts: Sequence[Weight], shape: Shape) -> Weight:
    """Tensors of one size, end to end, as one tensor of `shape`."""
    size = parts[0].numel

    def read(start: int, length: int) -> Tensor:
        end, pieces = start + length, []
        for index in range(start // size, -(-end // size)):
            low, high = max(start, index * size), min(end, (index + 1) * size)
            pieces.append(parts[index].read(low - index * size, high - low))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return replace(parts[0], shape=shape, read=read)


def released_weights(found: Mapping[str, Weight], prefix: str) -> dict[str, Weight]:
    """Any layout of models.hf under released names: renamed, fused experts cut apart. `prefix` is for bare names."""
    out: dict[str, Weight] = {}
    for name, weight in found.items():
        whole = released_name(name if name.startswith(COMPONENTS) else prefix + name)
        start = 0
        for released, shape in released_tensors(whole, weight.shape):
            if released in out:
                raise CheckpointError(f"{weight.source}: holds {released} twice, the second time as {name}")
            out[released] = weight.part(start, shape)
            start += math.prod(shape)
    return out


def fused_weights(released: Mapping[str, Weight]) -> dict[str, Weight]:
    """Released names with each layer's experts joined again, as models and transformers have them in memory."""
    out: dict[str, Weight] = {}
    experts: dict[str, dict[tuple[int, int], Weight]] = {}
    for name, weight in released.items():
        if place := fused_name(name):
            experts.setdefault(place[0], {})[place[1:]] = weight
        else:
            out[name] = weight
    for name, parts in experts.items():
        count, each = 1 + max(e for e, _ in parts), 1 + max(p for _, p in parts)
        rows, columns = parts[0, 0].shape
        out[name] = join([parts[e, p] for e in range(count) for p in range(each)], (count, each * rows, columns))
    return out


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises CheckpointError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def open_folder(folder: Path) -> dict[str, Weight]:
    """Every tensor of a folder of safetensors under its own name. Reads headers only. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / INDEX).exists():
        file_of = _weight_map(folder / INDEX)
    elif (folder / SINGLE).exists():
        file_of = dict.fromkeys(open_file(folder / SINGLE), SINGLE)
    else:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        hint = f"; {pickled[0]} is a pickle, which is never read: save it as safetensors first" if pickled else ""
        raise CheckpointError(f"{folder}: no {INDEX} and no {SINGLE}{hint}")
    for file in sorted(set(file_of.values())):
        if not (folder / file).is_file():
            keys = [name for name, other in file_of.items() if other == file]
            raise CheckpointError(
                f"{folder}: the file {file} is missing; {INDEX} has {keys[0]} and {len(keys) - 1} more tensors in it"
            )
    out: dict[str, Weight] = {}
    for file in sorted(set(file_of.values())):
        header = open_file(folder / file)
        listed = {name for name, other in file_of.items() if other == file}
        if wrong := sorted(listed ^ header.keys()):
            where = "does not hold" if wrong[0] in listed else "holds"
            there = "has it" if wrong[0] in listed else "has it not there"
            raise CheckpointError(f"{folder / file}: {where} {wrong[0]}, but {INDEX} {there}")
        out |= header
    return {name: out[name] for name in file_of}


def _weight_map(index: Path) -> dict[str, str]:
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise CheckpointError(f"{index}: no weight_map in it: not an index of weights")
    for name, file in file_of.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise CheckpointError(f"{index}: the file name {str(file)[:100]!r} of {name} is refused")
    return file_of


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """A file to read without a buffer. Raises CheckpointError where opening or reading fails."""
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def open_file(path: Path) -> dict[str, Weight]:
    """The tensors of one file; every number in the header is checked against the file's size."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
            raise CheckpointError(f"{path}: not a whole safetensors file: its {size} bytes cannot hold its header")
        try:
            header = json.loads(file.read(length))
            tensors = {str(name): row for name, row in header.items() if name != "__metadata__"}
        except (ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a safetensors file: {error}") from None
    body, out, ends = size - 8 - length, {}, []
    for name, row in tensors.items():
        code, shape, start, end = _entry(path, name, row)
        if end > body:
            raise CheckpointError(f"{path}: truncated: {name} ends at byte {end} of its data, which has {body}")
        ends.append((start, end))
        read = partial(_read_range, path, 8 + length + start, DTYPES[code])
        out[name] = Weight(shape, DTYPES[code], str(path), read)
    ends.sort()
    if [start for start, _ in ends] + [body] != [0] + [end for _, end in ends]:
        raise CheckpointError(f"{path}: not a safetensors file: its tensors overlap or leave gaps")
    return out


def _entry(path: Path, name: str, row: Any) -> tuple[str, Shape, int, int]:
    """dtype, shape and range of bytes of one tensor of a header. Raises CheckpointError."""
    try:
        code, shape, (start, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: not a safetensors file: no dtype, shape and offsets of {name[:200]}") from None
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise CheckpointError(f"{path}: not a safetensors file: shape or offsets of {name[:200]} make no sense")
    if code not in DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {str(code)[:20]}; weights are {', '.join(DTYPES)}")
    if end - start != math.prod(shape) * DTYPES[code].itemsize:
        raise CheckpointError(f"{path}: {name} has shape {list(shape)} of {code}, but {end - start} bytes")
    return code, shape, start, end


def _read_range(path: Path, offset: int, dtype: torch.dtype, start: int, length: int) -> Tensor:
    """Elements [start, start + length) of the tensor whose bytes begin at `offset`."""
    out = torch.empty(length, dtype=dtype)
    view = out.view(torch.uint8).numpy().data
    with _opened(path) as file:
        file.seek(offset + start * dtype.itemsize)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{path}: truncated while it was read")
            done += count
    return out


def plain_name(dtype: torch.dtype) -> str:
    """As config.json has it: bfloat16, float32."""
    return str(dtype).removeprefix("torch.")
