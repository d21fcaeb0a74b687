"""Reading ranges of tensors from a checkpoint, or weights from a folder in the released layout.

    read(kind, our name, shape, start, length) -> released_pieces -> slices of the files -> fp32 [length]

Files are mapped, not loaded: memory and time go with what is read. Neither class verifies checksums: resume.choose and
resume.verify do that, before any tensor is used. Nothing is ever unpickled.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.hf import TRAINING
from train.checkpoint.format import MANIFEST, Manifest, ReleasedPieces, identity_pieces, tensor_key
from train.checkpoint.resume import candidates, verify
from train.engines import VALUE, WEIGHT, StateReader
from train.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_INDEX_BYTES = 64 << 20
_WEIGHT_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")


class CheckpointReader:
    """A StateReader over a verified checkpoint."""

    def __init__(
        self,
        manifest: Manifest,
        released_pieces: ReleasedPieces = identity_pieces,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises CheckpointError naming the first differing key when `identity` is given and not the checkpoint's."""
        if identity is not None:
            check_identity(manifest, identity)
        self.manifest, self.step = manifest, manifest.step
        self._pieces = released_pieces
        self._files = _Files(manifest.folder)

    def kinds(self, name: str) -> frozenset[str]:
        """See train.engines.StateReader. A Thinker's names begin with `thinker.` or not, here and there."""
        bare, stored = name.removeprefix("thinker."), self.manifest.parameters
        return next((stored[each] for each in (name, bare, f"thinker.{bare}") if each in stored), frozenset())

    def names(self) -> Mapping[str, tuple[int, ...]]:
        """Released name -> shape of every weight of the model itself."""
        weights = {name: entry.shape for name, entry in self.manifest.tensors.items() if WEIGHT in entry.ranges}
        return {name: shape for name, shape in weights.items() if not name.startswith(TRAINING)}

    def read(self, kind: str, name: str, shape: Sequence[int], start: int, length: int) -> Tensor:
        """See train.engines.StateReader."""
        cut = identity_pieces if kind == VALUE else self._pieces
        out = torch.empty(length, dtype=torch.float32)
        for released, released_shape, at, offset, count in cut(name, tuple(shape), start, length):
            entry = self.manifest.tensors.get(released)
            if entry is not None and entry.shape != tuple(released_shape):
                raise CheckpointError(
                    f"{self.manifest.folder}: {released} has shape {list(entry.shape)}, the model wants "
                    f"{list(released_shape)}"
                )
            out[offset : offset + count] = self.read_released(kind, released, at, count)
        return out

    def read_released(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flat released tensor, fp32; CheckpointError if one is missing."""
        folder, entry = self.manifest.folder, self.manifest.tensors.get(name)
        ranges = entry.ranges.get(kind) if entry else None
        if entry is None or ranges is None:
            raise CheckpointError(f"{folder}: holds no {kind} of {name}")
        end = start + length
        if not 0 <= start <= end <= math.prod(entry.shape):
            raise CheckpointError(
                f"{folder}: {kind} of {name} has {math.prod(entry.shape)} elements; {start} to {end} was asked for"
            )
        out = torch.empty(length, dtype=torch.float32)
        first = bisect.bisect_right(ranges, start, key=lambda row: row[0]) - 1
        for low, high, number in ranges[max(0, first) :]:
            if low >= end:
                break
            a, b = max(start, low), min(end, high)
            file = self.manifest.files[number].name
            out[a - start : b - start] = self._files.slice(file, tensor_key(kind, name, low, high), a - low, b - low)
        return out


class WeightsReader:
    """A StateReader of weights alone, over a folder of safetensors in the released layout."""

    step = 0

    def __init__(
        self,
        folder: str | os.PathLike[str],
        released_pieces: ReleasedPieces = identity_pieces,
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """`shapes`: parameter -> shape of the model in memory; `kinds` needs it where released names differ."""
        self.folder, self._pieces, self._shapes = Path(folder), released_pieces, shapes or {}
        self._files = _Files(self.folder)
        self._file_of = _weight_files(self.folder, self._files)

    def kinds(self, name: str) -> frozenset[str]:
        """See train.engines.StateReader."""
        if self._pieces is identity_pieces:
            return frozenset({WEIGHT} if name in self._file_of else ())
        pieces = self._pieces(name, tuple(self._shapes.get(name, (1,))), 0, 1)  # shapes matter for experts alone
        return frozenset({WEIGHT} if pieces[0][0] in self._file_of else ())

    def names(self) -> Mapping[str, tuple[int, ...]]:
        """Released name -> shape of every weight."""
        return {name: self._files.shape(file, name) for name, file in self._file_of.items()}

    def read(self, kind: str, name: str, shape: Sequence[int], start: int, length: int) -> Tensor:
        """See train.engines.StateReader."""
        out = torch.empty(length, dtype=torch.float32)
        for released, released_shape, at, offset, count in self._pieces(name, tuple(shape), start, length):
            stored = self._files.shape(self._file(released), released)
            if stored != tuple(released_shape):
                raise CheckpointError(
                    f"{self.folder}: {released} has shape {list(stored)}, the model wants {list(released_shape)}"
                )
            out[offset : offset + count] = self.read_released(kind, released, at, count)
        return out

    def read_released(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flattened released tensor, fp32."""
        if kind != WEIGHT:
            raise CheckpointError(f"{self.folder}: released weights hold no {kind} of {name}")
        file = self._file(name)
        shape = self._files.shape(file, name)
        row = math.prod(shape[1:])  # elements; a slice is made of whole rows
        low, high = start // row, -(-(start + length) // row)
        if length < 0 or start < 0 or high > (shape[0] if shape else 1):
            raise CheckpointError(f"{self.folder}: {name} has no elements {start} to {start + length}")
        rows = self._files.slice(file, name, low, high) if shape else self._files.whole(file, name)
        return rows.reshape(-1)[start - low * row :][:length].float()

    def _file(self, name: str) -> str:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder}: holds no weight {name}")
        return self._file_of[name]


def open_weights(
    path: str | os.PathLike[str],
    released_pieces: ReleasedPieces = identity_pieces,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> StateReader:
    """Weights to start from: a run's newest checkpoint or one checkpoint, both verified, or a released folder."""
    folder = Path(path)
    if (folder / MANIFEST).exists():
        return CheckpointReader(verify(folder), released_pieces)
    if (folder / "checkpoints").is_dir():
        found = candidates(folder)
        if not found:
            raise CheckpointError(f"{folder}: this run has no checkpoint yet")
        return CheckpointReader(verify(found[0]), released_pieces)
    return WeightsReader(folder, released_pieces, shapes)


def check_identity(manifest: Manifest, identity: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming the first key in which the checkpoint's model is another one."""
    stored = dict(_flatten(manifest.info.get("identity", {})))
    wanted = dict(_flatten(json.loads(json.dumps(identity))))  # tuples become lists, as they did on the way in
    for key in sorted(stored.keys() | wanted.keys()):
        there, here = stored.get(key, "absent"), wanted.get(key, "absent")
        unset = here is None and there == "absent"  # a setting that did not exist yet
        if there != here and not unset:
            raise CheckpointError(
                f"{manifest.folder}: checkpoint of another model: {key} is {there} there and {here} in this recipe; "
                "use that model, or another run folder"
            )


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _flatten(value, f"{prefix}.{key}" if prefix else key)


class _Files:
    """Safetensors files of one folder, opened when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}

    def keys(self, file: str) -> list[str]:
        return list(self._get(file).keys())

    def shape(self, file: str, key: str) -> tuple[int, ...]:
        return tuple(self._slice_of(file, key).get_shape())

    def slice(self, file: str, key: str, start: int, end: int) -> Tensor:
        part = self._slice_of(file, key)
        if end > part.get_shape()[0]:
            raise CheckpointError(f"{self.folder / file}: {key} is shorter than the manifest says")
        return part[start:end]

    def whole(self, file: str, key: str) -> Tensor:
        return self._get(file).get_tensor(key)

    def _slice_of(self, file: str, key: str) -> Any:
        try:
            return self._get(file).get_slice(key)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / file}: {key}: {error}") from None

    def _get(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(str(self.folder / file), framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / file}: not a readable safetensors file: {error}") from None
        return self._open[file]


def _weight_files(folder: Path, files: _Files) -> dict[str, str]:
    """Released name -> file."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise CheckpointError(f"{folder}: no {INDEX}, no {SINGLE} and no {MANIFEST}: nothing to read weights from")
        return dict.fromkeys(files.keys(SINGLE), SINGLE)
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{index}: larger than {MAX_INDEX_BYTES} bytes")
    try:
        file_of = json.loads(index.read_bytes())["weight_map"]
        items = dict(file_of).items()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a weight index: {error!r}") from None
    for name, file in items:
        if not isinstance(file, str) or not _WEIGHT_FILE.fullmatch(file):
            raise CheckpointError(f"{index}: file name {str(file)[:100]!r} of {name} refused")
    return dict(items)
