"""Codec codes of answers' speech, beside a shard: written utterance by utterance, then mapped and read by row.

    data.codes --record after record--> NAME.tar.codes.partial --all done--> NAME.tar.codes (safetensors, whole or not)
    NAME.tar.codes --mmap, checked--> ShardCodes: frames, codes and speaker of a row of NAME.tar.index

The file names the codec, the very tar and the keys that it was made from; anything else is refused. The partial file is
only ever appended to, and each of its records has a checksum: a process that is killed loses the utterance in work, and
the next one goes on behind the last whole record, to the same bytes. Cost: 2 bytes a code, 400 a second of speech with
16 codebooks at 12.5 frames; opening reads the offsets; a row is copied and its crc32 compared. Writing holds the codes
of one shard in memory at its end.

Letters: N samples of the shard, F frames of all, T frames of one utterance, G codebooks.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import safetensors
import torch
from isal.isal_zlib import crc32
from safetensors.numpy import save
from torch import Tensor

from data.codec import Codec
from data.errors import BadSample, DataError
from data.files import write_atomically
from data.shard_index import ShardIndex, mapped
from data.store import Missing, Store, StoreSettings

FORMAT = "omniloom-codes-1"
MAX_CODEBOOK = 1 << 16  # codes are kept as uint16
COLUMNS = {
    "offsets": np.int64,  # N + 1; sample i's frames are rows offsets[i] to [i + 1] of the codes
    "sums": np.uint32,  # N; crc32 of the bytes of its codes
    "codes": np.uint16,  # F * G, frame after frame
    "speakers": np.uint16,  # N; code into about["speakers"]
}
_ABOUT = {  # metadata besides the columns, and its types
    "format": str,
    "codec": str,  # identity
    "codebooks": int,
    "codebook_size": int,
    "frame_rate": float,
    "max_seconds": float,  # longer utterances were left out
    "tar_size": int,
    "header_digest": str,  # of the index, as is the next one
    "keys_digest": str,
    "speakers": list,
    "left_out": list,  # "key: reason" of each sample whose speech cannot be used
}
_HEAD = struct.Struct("<II")  # of a record: bytes and their crc32


def codes_location(tar: str) -> str:
    """Where the codes of a shard lie, a path or an address."""
    return ShardCodes.location(tar)


def about_codes(index: ShardIndex, codec: Codec, max_seconds: float) -> dict[str, Any]:
    """What codes of this shard by this codec say of themselves, but for speakers and what is left out."""
    if "://" in index.tar:
        raise DataError(f"{index.tar}: codes are written beside local shards only; copy the shard to a disk")
    if not 1 <= codec.codebook_size <= MAX_CODEBOOK:
        raise DataError(f"codec {codec.identity} has codebooks of {codec.codebook_size}, at most {MAX_CODEBOOK} fit")
    return {
        "format": FORMAT,
        "codec": codec.identity,
        "codebooks": codec.num_codebooks,
        "codebook_size": codec.codebook_size,
        "frame_rate": float(codec.frame_rate),
        "max_seconds": float(max_seconds),
        **_shard(index),
    }


class ShardCodes:
    """The codes of one shard, mapped. Use `ShardCodes.open`. A subclass is another file of the same make."""

    suffix, format, what = "codes", FORMAT, "codec codes"
    command = "python -m data.codes codec=FOLDER shards={tar}"
    columns: Mapping[str, type[np.generic]] = COLUMNS
    about_types: Mapping[str, type] = _ABOUT

    def __init__(self, about: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> None:
        self.about = about
        self.num_codebooks: int = about["codebooks"]
        self._offsets, self._sums, self._codes, self._speakers = (columns[name] for name in COLUMNS)
        self._muted: np.ndarray | None = None  # bool [N]

    @classmethod
    def location(cls, tar: str) -> str:
        """Where the file of a shard lies, a path or an address."""
        return f"{tar}.{cls.suffix}"

    @classmethod
    def open(
        cls,
        tar: str | Path,
        index: ShardIndex,
        identity: str | None = None,
        codebooks: int | None = None,
        store: Store | None = None,
    ) -> Self:
        """Map the codes beside `tar`, whose index is `index`.

        Raises DataError where they are missing or damaged, and for codes of another shard, of another codec than
        `identity` or of another number of codebooks than `codebooks`, where these are given.
        """
        path, command = cls.location(str(tar)), cls.command.format(tar=tar)
        again = f"make it again with: {command} replace=true"
        try:
            columns, metadata = mapped((store or Store(StoreSettings(cache_gb=0))).local_copy(path))
            about = json.loads(metadata.get("omniloom", "{}"))
        except (Missing, FileNotFoundError):
            raise DataError(f"{tar}: has no {cls.what}; make them with: {command}") from None
        except DataError:
            raise
        except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"{path}: damaged {cls.suffix} ({error}); {again}") from None
        if problem := cls.problem(about, columns):
            raise DataError(f"{path}: damaged {cls.suffix} ({problem}); {again}")
        if any(about[name] != value for name, value in _shard(index).items()):
            raise DataError(f"{path}: made from another shard or index than is there now; {again}")
        if identity is not None and about["codec"] != identity:
            raise DataError(f"{path}: its codes are those of codec {about['codec']}, needed is {identity}; {again}")
        if codebooks is not None and about["codebooks"] != codebooks:
            raise DataError(
                f"{path}: codec {about['codec']} has {about['codebooks']} codebooks, needed are {codebooks}; {again}"
            )
        return cls(about, columns)

    @classmethod
    def problem(cls, about: Any, columns: Mapping[str, np.ndarray]) -> str | None:
        """What makes a file unusable as a whole, None where nothing does."""
        if not isinstance(about, dict) or about.get("format") != cls.format:
            return f"its format is {about.get('format') if isinstance(about, dict) else None}, needed is {cls.format}"
        for name, kind in cls.about_types.items():
            if type(about.get(name)) is not kind:
                return f"metadata {name} is missing or no {kind.__name__}"
        if not (0 < about["codebooks"] < 1 << 16 and 0 < about["codebook_size"] <= MAX_CODEBOOK):
            return "its codebooks are out of bounds"
        if not all(isinstance(name, str) for name in about["speakers"] + about["left_out"]):
            return "speakers or left_out are not all text"
        for name, dtype in cls.columns.items():
            if name not in columns or columns[name].dtype != dtype:
                return f"column {name} is missing or not {np.dtype(dtype).name}"
        offsets, sums, codes, speakers = (columns[name] for name in COLUMNS)
        if len(offsets) != len(sums) + 1 or len(speakers) != len(sums):
            return "its columns differ in length"
        frames = int(offsets[-1])
        if offsets[0] != 0 or frames * about["codebooks"] != len(codes) or (offsets[1:] < offsets[:-1]).any():
            return "its offsets make no sense"
        if speakers.max(initial=0) >= max(len(about["speakers"]), 1):
            return "a speaker has no name"
        return None

    def frames(self, rows: np.ndarray | slice) -> np.ndarray:
        """int64: frames of the samples of `rows`, 0 where there is no speech, or none that can be used."""
        if isinstance(rows, slice):
            first, last, _ = rows.indices(len(self._sums))
            frames = np.diff(self._offsets[first : last + 1])
        else:
            frames = self._offsets[rows + 1] - self._offsets[rows]
        return frames if self._muted is None else np.where(self._muted[rows], 0, frames)

    def only(self, speakers: Collection[str]) -> None:
        """Have no frames of anybody but `speakers` any more."""
        spoken = [code for code, name in enumerate(self.about["speakers"]) if name in speakers]
        self._muted = ~np.isin(self._speakers, spoken)

    def codes(self, row: int) -> Tensor | None:
        """int64 [G, T] of sample `row`, None where it has no frames. Raises BadSample where the bytes have changed."""
        first, last = self._offsets[row : row + 2].tolist()
        if first == last or (self._muted is not None and self._muted[row]):
            return None
        codes = self._codes[first * self.num_codebooks : last * self.num_codebooks]
        if crc32(codes.tobytes()) != self._sums[row] or codes.max() >= self.about["codebook_size"]:
            raise BadSample("its codec codes have changed since they were made (crc32 differs)")
        return torch.from_numpy(codes.reshape(-1, self.num_codebooks).T.astype(np.int64, order="C"))

    @property
    def speakers(self) -> set[str]:
        """Who speaks in the samples that have codes; "" where that is unknown."""
        spoken = self.frames(slice(None)) > 0
        return {self.about["speakers"][code] for code in np.unique(self._speakers[spoken]).tolist()}

    def speaker(self, row: int) -> str:
        """Who speaks in sample `row`, "" where that is unknown or it has no codes."""
        return self.about["speakers"][self._speakers[row]]


class RowsWriter:
    """Writes a file of a shard, row after row, and goes on where an earlier one was killed."""

    def __init__(self, index: ShardIndex, about: dict[str, Any], kind: type[ShardCodes], replace: bool) -> None:
        """Open the partial file and cut off what is not whole; `about` is what a `kind` says but for who speaks.

        Raises DataError where another process writes it, and for one that is about something else, which `replace`
        begins anew.
        """
        self.path, self._index = Path(kind.location(index.tar)), index
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        self._about = about
        self._file: BinaryIO = open(self._partial, "a+b")  # noqa: SIM115 (open as long as the lock is held)
        try:
            self._resume(replace)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def leave_out(self, row: int, reason: str) -> None:
        """Note why the speech of sample `row` cannot be used."""
        self._append({"row": row, "left_out": f"{self._index.key(row)}: {reason}"})

    def finish(self) -> None:
        """Write the codes under their name, and drop the partial file."""
        samples, groups = self._index.num_samples, self._about["codebooks"]
        frames, sums, speakers = np.zeros(samples, np.int64), np.zeros(samples, np.uint32), np.zeros(samples, np.uint16)
        names, pieces, left_out, heads = {"": 0}, [], [], {}
        self._file.seek(0)
        for head, codes in _records(self._file):
            if "left_out" in head:
                left_out.append(head["left_out"])
            if not codes:
                continue
            row, name = head["row"], head["speaker"]
            heads[row] = head
            if name not in names and len(names) == MAX_CODEBOOK:
                raise DataError(f"{self.path}: its shard has more than {MAX_CODEBOOK:,} different speakers; divide it")
            speakers[row] = names.setdefault(name, len(names))
            frames[row], sums[row] = len(codes) // (2 * groups), crc32(codes)
            pieces.append(codes)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(frames)])
        arrays = {
            "offsets": offsets,
            "sums": sums,
            "codes": np.frombuffer(b"".join(pieces), "<u2"),
            "speakers": speakers,
            **self._more_columns(heads),
        }
        about = self._about | {"speakers": list(names), "left_out": left_out}
        write_atomically(self.path, save(arrays, metadata={"omniloom": json.dumps(about, ensure_ascii=False)}))
        self._partial.unlink()

    def _more_columns(self, heads: Mapping[int, Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Columns of a subclass, from what it kept beside the codes of each row."""
        return {}

    def _checked(self, codes_GT: Tensor) -> bytes:
        """Codes as they are kept. Raises ValueError where they are no codes of this codec."""
        groups, size = self._about["codebooks"], self._about["codebook_size"]
        if codes_GT.ndim != 2 or len(codes_GT) != groups or codes_GT.dtype is not torch.int64:
            raise ValueError(f"codes are {codes_GT.dtype} {list(codes_GT.shape)}, not int64 [{groups}, frames]")
        if codes_GT.numel() and not 0 <= codes_GT.min() <= codes_GT.max() < size:
            raise ValueError(f"codes run from {codes_GT.min()} to {codes_GT.max()}, they must lie in 0 .. {size - 1}")
        return codes_GT.T.numpy().astype("<u2").tobytes()

    def _resume(self, replace: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{self._partial}: another process is writing it") from None
        self._file.seek(0)
        found, end = None, 0
        self.next_row = 0  # the first one that is not done
        for head, _ in _records(self._file):
            found = found or head
            self.next_row, end = head.get("row", -1) + 1, self._file.tell()
        if found is not None and found != self._about:
            if not replace:
                raise DataError(f"{self._partial}: {difference(found, self._about)}; replace=true begins it anew")
            found, self.next_row, end = None, 0, 0
        self._file.truncate(end)
        if found is None:
            self._append(self._about)

    def _append(self, head: Mapping[str, Any], codes: bytes = b"") -> None:
        payload = json.dumps(head).encode() + b"\n" + codes
        self._file.write(_HEAD.pack(len(payload), crc32(payload)) + payload)
        self._file.flush()
        self.next_row = head.get("row", -1) + 1


class CodesWriter(RowsWriter):
    """Writes the codes of a shard."""

    def __init__(self, index: ShardIndex, codec: Codec, max_seconds: float, replace: bool = False) -> None:
        """See RowsWriter."""
        super().__init__(index, about_codes(index, codec, max_seconds), ShardCodes, replace)

    def add(self, row: int, codes_GT: Tensor, speaker: str) -> None:
        """The codes of sample `row`, int64 [G, T]. Raises BadSample where there are none."""
        payload = self._checked(codes_GT)
        if not payload:
            raise BadSample("the codec made no codes of it")
        self._append({"row": row, "speaker": speaker}, payload)


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first thing in which codes that were found are not those that are wanted."""
    name = next(name for name in wanted if found.get(name) != wanted[name])
    return f"made with {name}={found.get(name)}, asked for is {name}={wanted[name]}"


def _records(file: BinaryIO) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Heads and bytes of codes of all whole records from where the file stands; the file stands behind each."""
    size = os.fstat(file.fileno()).st_size
    while len(start := file.read(_HEAD.size)) == _HEAD.size:
        length, expected = _HEAD.unpack(start)
        if not 0 < length <= size - file.tell():  # a length of 0 with the sum of nothing is a hole of zeros
            return
        payload = file.read(length)
        if crc32(payload) != expected:
            return
        head, _, codes = payload.partition(b"\n")
        yield json.loads(head), codes


def _shard(index: ShardIndex) -> dict[str, Any]:
    """What tells one shard and its rows from another."""
    digest = hashlib.sha256(index.columns["key_offsets"].tobytes() + index.columns["key_bytes"].tobytes())
    sizes = {name: index.about[name] for name in ("tar_size", "header_digest")}
    return sizes | {"keys_digest": digest.hexdigest()}
