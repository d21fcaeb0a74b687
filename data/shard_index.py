"""The index of one shard: what each sample costs and where its bytes lie, in columns that are mapped.

    NAME.tar.index (safetensors) --mmap--> ShardIndex --costs--> plan
                                                      --byte ranges--> pread + crc32 --> bytes of one sample

Columns: N samples, M members that samples use, C clips in order of the messages. About 100 bytes a sample.
Cost: opening 0.2 ms, `verify` one read of 512 bytes for at most 64 members, never the tar as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save

from data.errors import BadSample, DataError
from data.files import write_atomically
from data.tar import BLOCK, read_range

FORMAT = "omniloom-index-1"
MAX_HEADERS = 64  # tar headers behind the digest: enough to notice another tar of the same size

COLUMNS = {
    "key_offsets": np.int64,  # N + 1; sample i's key is key_bytes[key_offsets[i] : key_offsets[i + 1]]
    "key_bytes": np.uint8,
    "member_offsets": np.int64,  # N + 1; sample i's members are rows member_offsets[i] to [i + 1]
    "member_start": np.int64,  # M; where the member's bytes start in the tar
    "member_size": np.int64,  # M
    "member_crc": np.uint32,  # M; crc32 of the member's bytes
    "member_extension": np.uint16,  # M; code into about["extensions"]
    "clip_offsets": np.int64,  # N + 1; sample i's clips are rows clip_offsets[i] to [i + 1]
    "clip_samples": np.int64,  # C; at 16 kHz, after decoding
    "text_tokens": np.int32,  # N; without audio placeholders
    "language": np.uint16,  # N; code into about["languages"]
    "source": np.uint16,  # N; code into about["sources"]
}
_RAGGED = {"key_offsets": "key_bytes", "member_offsets": "member_start", "clip_offsets": "clip_samples"}
_COSTS = ("text_tokens", "clip_offsets", "clip_samples")
_ABOUT = {  # metadata besides the columns, and its types
    "format": str,
    "tar_size": int,
    "header_digest": str,
    "cost_digest": str,  # of the columns that shape a plan
    "tokenizer": str,  # fingerprint of the tokenizer behind text_tokens
    "extensions": list,
    "languages": list,
    "sources": list,
    "left_out": list,  # one line for each sample of the tar that cannot be used
    "max_text_tokens": int,  # of one sample, as are the next two: an upper bound of its length without a scan
    "max_audio_samples": int,
    "max_clips": int,
    "total_text_tokens": int,
    "total_audio_samples": int,
}


def index_path(tar: Path) -> Path:
    """Where the index of `tar` lies."""
    return tar.with_name(tar.name + ".index")


class ShardIndex:
    """An open index and, from the first read on, its open tar.  Use `ShardIndex.open`."""

    def __init__(self, tar: Path, about: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> None:
        self.tar = tar
        self.about = about
        self.columns = columns
        self.num_samples = len(columns.get("text_tokens", ()))
        self._file: FileIO | None = None

    @classmethod
    def open(cls, tar: Path) -> ShardIndex:
        """Map the index beside `tar`. Raises DataError where it is missing, damaged or of another format."""
        path = index_path(tar)
        if not path.exists():
            raise DataError(f"{tar}: has no index; make it with: python -m data.index {tar} tokenizer=FOLDER")
        try:
            with safetensors.safe_open(path, "pt") as file:  # torch maps the file, numpy would copy it
                metadata = file.metadata() or {}
                columns = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
            about = json.loads(metadata.get("omniloom", "{}"))
        except (safetensors.SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: damaged index ({error}); run python -m data.index again") from None
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            found = about.get("format") if isinstance(about, dict) else None
            raise DataError(f"{path}: index has format {found}, needed is {FORMAT}; run python -m data.index")
        index = cls(tar, about, columns)
        if problem := _problem(about, columns):
            raise index._damaged(problem)
        return index

    def verify(self) -> None:
        """Raise DataError unless the tar is the one that the index was made from: size and sampled headers."""
        try:
            size = self.tar.stat().st_size
        except FileNotFoundError:
            raise DataError(f"{self.tar}: no such shard") from None
        expected = self.about["tar_size"]
        if size < expected:
            raise DataError(f"{self.tar}: truncated: {size} bytes, its index was made from {expected}")
        if size > expected or self.header_digest(self.columns["member_start"]) != self.about["header_digest"]:
            raise DataError(f"{self.tar}: changed since its index was made; run python -m data.index")

    def header_digest(self, starts: np.ndarray) -> str:
        """SHA-256 over offset and tar header of up to MAX_HEADERS evenly spaced members."""
        return header_digest(self._fileno(), starts)

    def costs(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of samples `first` to `last` - 1: text tokens (int64 [n]), clips of each (int64 [n]), samples of each clip.

        Raises DataError where the columns make no sense.
        """
        text = self.columns["text_tokens"][first:last].astype(np.int64)
        offsets = self.columns["clip_offsets"][first : last + 1]
        clips = self.columns["clip_samples"][offsets[0] : offsets[-1]]
        num_clips = np.diff(offsets)
        if len(clips) != num_clips.sum() or min(text.min(), num_clips.min(), clips.min(initial=0)) < 0:
            raise self._damaged("a cost is out of bounds")
        return text, num_clips, clips

    def key(self, row: int) -> str:
        """Key of sample `row`."""
        return self._slice("key_offsets", "key_bytes", row).tobytes().decode(errors="replace")

    def clip_samples(self, row: int) -> list[int]:
        """Samples at 16 kHz of each clip of sample `row`."""
        return self._slice("clip_offsets", "clip_samples", row).tolist()

    def name(self, kind: str, row: int) -> str:
        """The sample's name of a `kind`: "language" or "source"."""
        return self._decode(f"{kind}s", self.columns[kind][row])

    def read(self, row: int, max_bytes: int = 1 << 30) -> dict[str, bytes]:
        """Bytes of sample `row`'s members by extension, checked against their crc32.

        Raises BadSample for bytes that are missing, too many or changed.
        """
        columns, members = self.columns, {}
        bounds = columns["member_offsets"][row : row + 2]
        for member in range(len(columns["member_start"]))[bounds[0] : bounds[1]]:
            extension = self._decode("extensions", columns["member_extension"][member])
            start, size = int(columns["member_start"][member]), int(columns["member_size"][member])
            if size > max_bytes:
                raise BadSample(f".{extension} has {size} bytes, the limit is {max_bytes}")
            if start < 0 or size < 0:
                raise self._damaged(f"member {member} lies at {start}, {size}")
            payload = read_range(self._fileno(), start, size)
            if zlib.crc32(payload) != columns["member_crc"][member]:
                raise BadSample(f".{extension} has changed since its index was made (crc32 differs)")
            members[extension] = payload
        return members

    def _slice(self, offsets: str, values: str, row: int) -> np.ndarray:
        first, last = self.columns[offsets][row : row + 2]
        return self.columns[values][first:last]

    def _decode(self, table: str, code: np.integer) -> str:
        if code >= len(self.about[table]):
            raise self._damaged(f"code {code} is not among its {table}")
        return self.about[table][code]

    def _damaged(self, problem: str) -> DataError:
        return DataError(f"{index_path(self.tar)}: damaged index ({problem}); run python -m data.index again")

    def _fileno(self) -> int:
        if self._file is None:
            try:
                self._file = FileIO(self.tar)
            except OSError as error:
                raise DataError(f"{self.tar}: cannot be read: {error.strerror}") from None
        return self._file.fileno()


def save_index(tar: Path, about: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
    """Write the index of `tar`: whole or not at all."""
    arrays = {name: np.ascontiguousarray(columns[name], dtype) for name, dtype in COLUMNS.items()}
    digest = hashlib.sha256(b"".join(arrays[name].tobytes() for name in _COSTS)).hexdigest()
    about = {"format": FORMAT, **about, "cost_digest": digest}
    metadata = {"omniloom": json.dumps(about, ensure_ascii=False)}
    write_atomically(index_path(tar), save(arrays, metadata=metadata))


def header_digest(fd: int, starts: np.ndarray) -> str:
    """SHA-256 over offset and tar header of up to MAX_HEADERS members, evenly spaced among `starts`."""
    digest = hashlib.sha256()
    count = min(len(starts), MAX_HEADERS)
    for i in range(count):
        start = int(starts[i * len(starts) // count])
        digest.update(struct.pack("<q", start) + os.pread(fd, BLOCK, max(start - BLOCK, 0)))
    return digest.hexdigest()


def _problem(about: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> str | None:
    """What makes an index unusable as a whole, None where nothing does. Values are checked where they are used."""
    for name, kind in _ABOUT.items():
        if not isinstance(about.get(name), kind):
            return f"metadata {name} is missing or no {kind.__name__}"
    for name, dtype in COLUMNS.items():
        if name not in columns or columns[name].dtype != dtype or columns[name].ndim != 1:
            return f"column {name} is missing or not {np.dtype(dtype).name}"
    samples, members = len(columns["text_tokens"]), len(columns["member_start"])
    if not samples:
        return "it holds no sample"
    for name, values in _RAGGED.items():
        offsets = columns[name]
        if len(offsets) != samples + 1 or offsets[0] != 0 or offsets[-1] != len(columns[values]):
            return f"column {name} does not fit {values}"
    if any(len(columns[name]) != members for name in ("member_size", "member_crc", "member_extension")):
        return "columns of members differ in length"
    if any(len(columns[name]) != samples for name in ("language", "source")):
        return "columns of samples differ in length"
    return None
