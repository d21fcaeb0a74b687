"""The files of a checkpoint, without torch: safetensors headers and the manifest.

    RUN/checkpoints/
      step-00001234/            published: complete and fsynced before it got this name
        rank0.safetensors ...   one per rank. Body: its fragments' fp32 bytes, one after the other;
                                header: keys "kind|released name|start|end", flat ranges of the released tensors
        manifest.json           step, what the run says of itself, versions, SHA-256 of every file, table of ranges
        manifest.sha256         of manifest.json; `sha256sum -c manifest.sha256` checks it
      .step-00001250.LAUNCH/    being written, or left over from a killed run
      latest                    name of the newest published folder
      best                      name of the one with the best evaluation, where the recipe names a metric (eval.best)
      .lock-rank0 ...           held by a writer process while it lives

Parsing costs a few microseconds per range; everything read from a file is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import CheckpointError

FORMAT, VERSION = "omniloom-checkpoint", 1
MANIFEST, CHECKSUM = "manifest.json", "manifest.sha256"
ITEM_BYTES = 4  # every stored value is fp32
MAX_MANIFEST_BYTES = 256 << 20
MAX_NUMEL = 1 << 44

Shape = tuple[int, ...]
# (name, shape, start, length) of ours -> [(released name, released shape, released start, offset in the range, length)]
ReleasedPieces = Callable[[str, Shape, int, int], Sequence[tuple[str, Shape, int, int, int]]]

_RANK_FILE = re.compile(r"rank(0|[1-9][0-9]{0,5})\.safetensors")
_STEP_FOLDER = re.compile(r"step-([0-9]{8,15})")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file of tensors."""

    name: str
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """Where a released tensor lies: per kind, (start, end, file number) in order of start, without a gap."""

    shape: tuple[int, ...]
    ranges: Mapping[str, tuple[tuple[int, int, int], ...]]


@dataclass(frozen=True)
class Manifest:
    """A parsed manifest.json."""

    folder: Path
    step: int
    world: int
    info: Mapping[str, Any]  # what the run said of itself: identity, recipe, engine, seed, cursor, counters
    versions: Mapping[str, str]
    files: tuple[FileEntry, ...]
    tensors: Mapping[str, TensorEntry]  # by released name
    parameters: Mapping[str, frozenset[str]]  # by the name of the model in memory: kinds stored

    @property
    def name(self) -> str:
        """Of the folder, such as step-00001234."""
        return self.folder.name


def identity_pieces(name: str, shape: Shape, start: int, length: int) -> list[tuple[str, Shape, int, int, int]]:
    """ReleasedPieces of tensors whose name and layout in memory are the released ones."""
    return [(name, shape, start, 0, length)]


def step_folder(step: int) -> str:
    """Name of the published folder."""
    return f"step-{step:08d}"


def folder_step(name: str) -> int | None:
    """Inverse of `step_folder`; None for any other name."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def best_step(info: Mapping[str, Any]) -> int | None:
    """Of the evaluation that the run thinks its best, from what a manifest says of the run."""
    best = info.get("progress", {}).get("best", {})
    return best["step"] if best.get("value") is not None else None


def name_best(folder: Path, step: int) -> None:
    """Let checkpoints/best name the checkpoint of a step, if it is there."""
    if (folder / step_folder(step)).is_dir():
        part = folder / ".best.part"
        part.write_text(f"{step_folder(step)}\n")
        part.replace(folder / "best")


def rank_file(rank: int) -> str:
    """Name of a rank's file of tensors."""
    return f"rank{rank}.safetensors"


def tensor_key(kind: str, name: str, start: int, end: int) -> str:
    """Key inside a file of tensors."""
    return f"{kind}|{name}|{start}|{end}"


def safetensors_header(entries: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of a safetensors file whose body is written apart.

    entries: key, dtype, shape and number of bytes of each tensor, in body order.
    Why not the library: it wants every tensor in memory and shows no bytes to a checksum on the way.
    Layout: https://huggingface.co/docs/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for key, dtype, shape, num_bytes in entries:
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + num_bytes]}
        at += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# A layout tells what a rank's body holds: per fragment a row [name, kinds, [[released name, shape, start, length]...]].
# Of a fragment the kinds follow each other, and inside a kind its pieces.


def layout_ranges(layout: Sequence[Any]) -> Iterator[tuple[str, str, Sequence[int], int, int]]:
    """(kind, released name, released shape, start, length) in body order."""
    for _, kinds, pieces in layout:
        for kind in kinds:
            for name, shape, start, length in pieces:
                yield kind, name, shape, start, length


def layout_header(layout: Sequence[Any]) -> bytes:
    """Header of a rank's file."""
    return safetensors_header(
        (
            (tensor_key(kind, name, start, start + length), "F32", (length,), length * ITEM_BYTES)
            for kind, name, _, start, length in layout_ranges(layout)
        ),
        {"format": "pt"},
    )


def build_manifest(
    step: int, info: Mapping[str, Any], versions: Mapping[str, str], reports: Sequence[Mapping[str, Any]]
) -> bytes:
    """manifest.json from the ranks' reports {"size", "sha256", "layout"}, in order of rank.

    Raises CheckpointError when the ranks' ranges do not cover every tensor exactly once: an unusable checkpoint is
    never published.
    """
    tensors: dict[str, dict[str, Any]] = {}
    parameters: dict[str, list[str]] = {}
    for rank, report in enumerate(reports):
        for name, kinds, _ in report["layout"]:
            parameters[name] = sorted({*parameters.get(name, ()), *kinds})
        for kind, name, shape, start, length in layout_ranges(report["layout"]):
            entry = tensors.setdefault(name, {"shape": shape, "ranges": {}})
            if entry["shape"] != shape:
                raise CheckpointError(f"{name}: rank {rank} gives shape {shape}, another {entry['shape']}")
            entry["ranges"].setdefault(kind, []).append([start, start + length, rank])
    for entry in tensors.values():
        for ranges in entry["ranges"].values():
            ranges.sort()
    files = [
        {"name": rank_file(rank), "size": report["size"], "sha256": report["sha256"]}
        for rank, report in enumerate(reports)
    ]
    tree = {"format": FORMAT, "version": VERSION, "step": step, "world": len(reports), "info": info}
    tree |= {"versions": versions, "files": files, "parameters": parameters, "tensors": tensors}
    lines = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in tree.items())
    text = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    parse_manifest(text, Path(step_folder(step)))
    return text


def checksum_line(manifest: bytes) -> str:
    """Content of manifest.sha256."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n"


def parse_manifest(text: bytes, folder: Path) -> Manifest:
    """Checked manifest; raises CheckpointError naming what is wrong."""
    path = folder / MANIFEST
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    _require(isinstance(tree, dict) and tree.get("format") == FORMAT, path, f"is no {FORMAT} manifest")
    if tree.get("version") != VERSION:
        raise CheckpointError(f"{path}: format version {tree.get('version')}, this program reads {VERSION}")
    fields = {
        "step": int,
        "world": int,
        "info": dict,
        "versions": dict,
        "files": list,
        "parameters": dict,
        "tensors": dict,
    }
    for key, kind in fields.items():
        _require(type(tree.get(key)) is kind, path, f"key {key!r} is missing or no {kind.__name__}")
    _require(tree["step"] >= 0, path, "negative step")
    files = tuple(_parse_file(entry, path) for entry in tree["files"])
    _require(len({entry.name for entry in files}) == len(files) > 0, path, "a file is listed twice, or none")
    parameters = {}
    for name, kinds in tree["parameters"].items():
        _require(isinstance(kinds, list) and all(isinstance(k, str) for k in kinds), path, f"kinds of {name!r}")
        parameters[name] = frozenset(kinds)
    return Manifest(
        folder=folder,
        step=tree["step"],
        world=tree["world"],
        info=tree["info"],
        versions=tree["versions"],
        files=files,
        tensors={name: _parse_tensor(name, entry, len(files), path) for name, entry in tree["tensors"].items()},
        parameters=parameters,
    )


def _parse_file(entry: Any, path: Path) -> FileEntry:
    _require(isinstance(entry, dict), path, "an entry of 'files' is no object")
    name, size, sha256 = (entry.get(key) for key in ("name", "size", "sha256"))
    # the pattern admits no separator and no "..": a manifest cannot lead outside its own folder
    _require(
        isinstance(name, str) and bool(_RANK_FILE.fullmatch(name)),
        path,
        f"file name {str(name)[:100]!r} refused",
    )
    _require(type(size) is int and size >= 0, path, f"size of {name}")
    _require(isinstance(sha256, str) and bool(_SHA256.fullmatch(sha256)), path, f"SHA-256 of {name}")
    return FileEntry(name, size, sha256)


def _parse_tensor(name: str, entry: Any, num_files: int, path: Path) -> TensorEntry:
    _require(isinstance(entry, dict), path, f"entry of {name!r}")
    shape, kinds = entry.get("shape"), entry.get("ranges")
    _require(isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape), path, f"shape of {name!r}")
    numel = math.prod(shape)
    _require(numel <= MAX_NUMEL, path, f"{name!r} claims {numel} elements, the limit is {MAX_NUMEL}")
    _require(isinstance(kinds, dict) and len(kinds) > 0, path, f"ranges of {name!r}")
    for kind, ranges in kinds.items():
        _require(isinstance(ranges, list), path, f"ranges of {kind} of {name!r}")
        at = 0
        for row in ranges:
            _require(
                isinstance(row, list) and [type(n) for n in row] == [int] * 3,
                path,
                f"a range of {kind} of {name!r}",
            )
            start, end, file = row
            _require(
                start == at < end,
                path,
                f"{kind} of {name!r}: elements {at} to {start} are stored twice or never",
            )
            _require(0 <= file < num_files, path, f"{kind} of {name!r}: file number {file} of {num_files}")
            at = end
        _require(at == numel, path, f"{kind} of {name!r}: {at} of {numel} elements are stored")
    return TensorEntry(tuple(shape), {kind: tuple(tuple(row) for row in ranges) for kind, ranges in kinds.items()})


def _require(condition: bool, path: Path, what: str) -> None:
    if not condition:
        raise CheckpointError(f"{path}: {what}")
