"""The index of one shard: what each sample costs and where its bytes lie, in columns that are mapped.

    NAME.tar.index (safetensors) --mmap--> ShardIndex --costs--> plan
                                                      --byte ranges--> pread + crc32 --> bytes of one sample

Columns: N samples, B members that samples use, M media in order of the sample's parts. About 100 bytes a sample, and 45
more for each medium. Cost: opening 0.2 ms, `verify` one read of 512 bytes for at most 16 members, never the tar as a
whole.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
from isal.isal_zlib import crc32  # the same as zlib's in a tenth of the time
from safetensors.numpy import save
from torch import Tensor

from data.costs import FILM, KINDS, Costs
from data.errors import BadSample, DataError
from data.files import write_atomically
from data.sample import SPEECH
from data.store import Missing, Store, StoreSettings
from data.tar import BLOCK

FORMAT = "omniloom-index-2"
MAX_HEADERS = 16  # tar headers behind the digest: enough to notice another tar of the same size

COLUMNS = {
    "key_offsets": np.int64,  # N + 1; sample i's key is key_bytes[key_offsets[i] : key_offsets[i + 1]]
    "key_bytes": np.uint8,
    "member_offsets": np.int64,  # N + 1; sample i's members are rows member_offsets[i] to [i + 1]
    "member_start": np.int64,  # B; where the member's bytes start in the tar
    "member_size": np.int64,  # B
    "member_crc": np.uint32,  # B; crc32 of the member's bytes
    "member_extension": np.uint16,  # B; code into about["extensions"]
    "media_offsets": np.int64,  # N + 1; sample i's media are rows media_offsets[i] to [i + 1]
    "media_kind": np.uint8,  # M; data.costs.AUDIO, IMAGE, VIDEO or FILM
    "media_samples": np.int64,  # M; of audio and of sound, at 16 kHz, after decoding
    "media_height": np.int32,  # M; pixels of an image or video, upright
    "media_width": np.int32,  # M
    "media_frames": np.int32,  # M; frames that a video has
    "media_seconds": np.float64,  # M; that a video lasts
    "media_text": np.int32,  # M; text tokens between the medium before and this one
    "text_tokens": np.int32,  # N; all tokens but placeholders
    "document": np.uint8,  # N; 1 a document, 0 a conversation
    "language": np.uint16,  # N; code into about["languages"]
    "source": np.uint16,  # N; code into about["sources"]
}
# as safetensors names them
_KINDS = {"U8": "u1", "U16": "<u2", "U32": "<u4", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8"}
_RAGGED = {"key_offsets": "key_bytes", "member_offsets": "member_start", "media_offsets": "media_kind"}
_MEMBERS = ("member_size", "member_crc", "member_extension")
_MEDIA = (
    "media_samples",
    "media_height",
    "media_width",
    "media_frames",
    "media_seconds",
    "media_text",
)
_SAMPLES = ("document", "language", "source")
_LOOKED_UP = ("key_offsets", "key_bytes", "member_offsets", "member_start", *_MEMBERS)
_COSTS = ("text_tokens", "document", "media_offsets", "media_kind", *_MEDIA)
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
    "groups": list,  # [code of source, code of language, samples] of each pair that occurs
    "max_text_tokens": int,  # of one sample, as are the next two: upper bounds of its length without a scan
    "max_samples": int,  # of audio and sound together
    "max_media": list,  # media of each of data.costs.KINDS
}


def index_path(tar: Path) -> Path:
    """Where the index of `tar` lies."""
    return tar.with_name(tar.name + ".index")


def index_location(tar: str) -> str:
    """Where the index of a shard lies, a path or an address."""
    scheme, query, rest = tar.partition("?")  # what follows a question mark in an address names no file
    return f"{scheme}.index{query}{rest}"


class Codes(Protocol):
    """Codec codes of the samples' speech: data.code_store.ShardCodes."""

    def frames(self, rows: np.ndarray | slice) -> np.ndarray:
        """int64: frames of each sample, 0 for one without speech."""
        ...

    def codes(self, row: int) -> Tensor | None:
        """int64 [G, F]."""
        ...

    def speaker(self, row: int) -> str:
        """Who speaks."""
        ...


class ShardIndex:
    """An open index. Use `ShardIndex.open`."""

    def __init__(
        self, tar: str | Path, about: Mapping[str, Any], columns: Mapping[str, np.ndarray], store: Store | None = None
    ) -> None:
        self.tar = str(tar)  # a path or an address
        self.about = about
        self.columns = columns
        # looking up one sample in a memoryview takes half the time that it takes in an array
        self._views = {name: columns[name].data for name in _LOOKED_UP if name in columns}
        self.num_samples = len(columns.get("text_tokens", ()))
        self.codes: Codes | None = None  # of the answers' speech, where a corpus was opened with a codec
        self._store = store or Store(StoreSettings(cache_gb=0))

    @classmethod
    def open(cls, tar: str | Path, store: Store | None = None) -> ShardIndex:
        """Map the index beside `tar`. Raises DataError where it is missing, damaged or of another format."""
        store = store or Store(StoreSettings(cache_gb=0))
        path = index_location(str(tar))
        try:
            columns, metadata = mapped(store.local_copy(path))
            about = json.loads(metadata.get("omniloom", "{}"))
        except (Missing, FileNotFoundError):
            raise DataError(f"{tar}: has no index; make it with: python -m data.index {tar} tokenizer=FOLDER") from None
        except DataError:
            raise
        except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"{path}: damaged index ({error}); run python -m data.index again") from None
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            found = about.get("format") if isinstance(about, dict) else None
            raise DataError(f"{path}: index has format {found}, needed is {FORMAT}; run python -m data.index")
        index = cls(tar, about, columns, store)
        if problem := _problem(about, columns):
            raise index._damaged(problem)
        return index

    def verify(self) -> None:
        """Raise DataError unless the tar is the one that the index was made from: size and sampled headers."""
        try:
            size = self._store.size(self.tar)
        except Missing:
            raise DataError(f"{self.tar}: no such shard") from None
        expected = self.about["tar_size"]
        if size < expected:
            raise DataError(f"{self.tar}: truncated: {size} bytes, its index was made from {expected}")
        if size > expected or self._header_digest() != self.about["header_digest"]:
            raise DataError(f"{self.tar}: changed since its index was made; run python -m data.index")

    def _header_digest(self) -> str:
        starts = headers(self.columns["member_start"])
        if not all(0 <= start <= self.about["tar_size"] for start in starts):
            raise self._damaged("a member lies outside its tar")
        ranges = [(max(start - BLOCK, 0), min(start, BLOCK)) for start in starts]
        return header_digest(starts, self._store.read_many(self.tar, ranges, direct=True))

    def costs(self, rows: np.ndarray | slice) -> Costs:
        """What the samples of `rows` cost. Raises DataError where the columns make no sense."""
        columns = self.columns
        if isinstance(rows, slice):
            first, last, _ = rows.indices(self.num_samples)
            offsets = columns["media_offsets"][first : last + 1]
            counts, media = np.diff(offsets), slice(offsets[0], offsets[-1])
        else:
            starts = columns["media_offsets"][rows]
            counts = columns["media_offsets"][rows + 1] - starts
            media = None if counts.min(initial=0) < 0 else ranges(starts, counts)
        if media is None or counts.min(initial=0) < 0:
            raise self._damaged("media_offsets go back")
        taken = {name: columns[name][media] for name in ("media_kind", *_MEDIA)}
        text = columns["text_tokens"][rows]
        seconds = taken.pop("media_seconds")
        lowest = min(text.min(initial=0), *(values.min(initial=0) for values in taken.values()))
        if (
            len(taken["media_kind"]) != counts.sum()
            or lowest < 0
            or taken["media_kind"].max(initial=0) > FILM
            or not np.isfinite(seconds).all()
        ):
            raise self._damaged("a cost is out of bounds")
        return Costs(
            text_tokens_N=text.astype(np.int64),
            document_N=columns["document"][rows] != 0,
            owner_M=np.repeat(np.arange(len(text)), counts),
            kind_M=taken["media_kind"],
            samples_M=taken["media_samples"],
            height_M=taken["media_height"].astype(np.int64),
            width_M=taken["media_width"].astype(np.int64),
            frames_M=taken["media_frames"].astype(np.int64),
            seconds_M=seconds,
            text_before_M=taken["media_text"].astype(np.int64),
            speech_N=None if self.codes is None else self.codes.frames(rows),
        )

    def media_samples(self, row: int) -> list[int]:
        """Samples at 16 kHz of each medium of sample `row`, 0 for what is not heard."""
        return self._slice("media_offsets", "media_samples", row).tolist()

    def key(self, row: int) -> str:
        """Key of sample `row`."""
        first, last = self._views["key_offsets"][row : row + 2]
        return str(self._views["key_bytes"][first:last], "utf-8", "replace")

    def name(self, kind: str, row: int) -> str:
        """The sample's name of a `kind`: "language" or "source"."""
        return self._decode(f"{kind}s", self.columns[kind][row])

    @cached_property
    def _speech(self) -> frozenset[int]:
        """Codes of the extensions of speech."""
        return frozenset(code for code, name in enumerate(self.about["extensions"]) if name.startswith(SPEECH))

    def speech_rows(self) -> np.ndarray:
        """int64: samples with speech, in order."""
        places = np.flatnonzero(np.isin(self.columns["member_extension"], list(self._speech)))
        return np.unique(np.searchsorted(self.columns["member_offsets"], places, side="right") - 1)

    def read(self, row: int, max_bytes: int = 1 << 30, *, speech: bool = False) -> dict[str, bytes]:
        """Bytes of sample `row`'s members by extension, checked against their crc32; speech only where asked for.

        Raises BadSample for bytes that are missing, too many or changed.
        """
        if not self._speech or speech:
            return self._read(row, max_bytes)
        return self._read(row, max_bytes, lambda code: code not in self._speech)

    def read_speech(self, row: int, max_bytes: int = 1 << 30) -> dict[str, bytes]:
        """As `read`, but the .json and the speech alone: what the Thinker hears and sees stays unread."""
        extensions = self.about["extensions"]
        return self._read(row, max_bytes, lambda code: code in self._speech or extensions[code] == "json")

    def read_json(self, row: int, max_bytes: int = 1 << 30) -> bytes:
        """The .json of a sample alone; nothing where there is none. Raises BadSample as `read` does."""
        extensions = self.about["extensions"]
        return self._read(row, max_bytes, lambda code: extensions[code] == "json").get("json", b"")

    def _read(self, row: int, max_bytes: int, wants: Callable[[int], bool] | None = None) -> dict[str, bytes]:
        """The members of a sample whose code of an extension is wanted."""
        views = self._views
        first, last = views["member_offsets"][row : row + 2]
        starts, sizes = views["member_start"][first:last].tolist(), views["member_size"][first:last].tolist()
        codes, sums = views["member_extension"][first:last].tolist(), views["member_crc"][first:last].tolist()
        extensions = self.about["extensions"]
        if wants is not None:
            kept = [place for place, code in enumerate(codes) if code >= len(extensions) or wants(code)]
            starts, sizes, codes, sums = ([column[place] for place in kept] for column in (starts, sizes, codes, sums))
        for code, start, size in zip(codes, starts, sizes, strict=True):  # min and max would take as long as a read
            if code >= len(extensions):
                raise self._damaged(f"code {code} is not among its extensions")
            if start < 0 or size < 0:
                raise self._damaged(f"a member of sample {row} lies outside its tar")
            if size > max_bytes:
                raise BadSample(f".{extensions[code]} has {size} bytes, the limit is {max_bytes}")
        names = [extensions[code] for code in codes]
        wanted = list(zip(starts, sizes, strict=True))
        payloads = self._store.read_many(self.tar, wanted)
        if list(map(crc32, payloads)) != sums:
            self._store.forget(self.tar, wanted)  # what was kept of a remote shard may have rotted
            payloads = self._store.read_many(self.tar, wanted)
            for extension, payload, crc in zip(names, payloads, sums, strict=True):
                if crc32(payload) != crc:
                    raise BadSample(f".{extension} has changed since its index was made (crc32 differs)")
        return dict(zip(names, payloads, strict=True))

    def _slice(self, offsets: str, values: str, row: int) -> np.ndarray:
        first, last = self.columns[offsets][row : row + 2]
        return self.columns[values][first:last]

    def _decode(self, table: str, code: int | np.integer) -> str:
        if code >= len(self.about[table]):
            raise self._damaged(f"code {code} is not among its {table}")
        return self.about[table][code]

    def _damaged(self, problem: str) -> DataError:
        return DataError(f"{index_location(self.tar)}: damaged index ({problem}); run python -m data.index again")


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (sizes[0] of them), starts[1], ... as one array."""
    ends = np.cumsum(sizes)
    return np.repeat(starts - ends + sizes, sizes) + np.arange(ends[-1] if len(ends) else 0)


def save_index(tar: Path, about: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
    """Write the index of `tar`: whole or not at all."""
    arrays = {name: np.ascontiguousarray(columns[name], dtype) for name, dtype in COLUMNS.items()}
    digest = hashlib.sha256(b"".join(arrays[name].tobytes() for name in _COSTS)).hexdigest()
    about = {"format": FORMAT, **about, "cost_digest": digest}
    metadata = {"omniloom": json.dumps(about, ensure_ascii=False)}
    write_atomically(index_path(tar), save(arrays, metadata=metadata))


def mapped(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Columns and metadata of a safetensors file, mapped; its own reader takes 40 us for each column."""
    with safetensors.safe_open(path, "np") as file:  # checks that header and file agree
        metadata = file.metadata() or {}
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(mapped[:8], "little")
    columns = {}
    for name, about in json.loads(mapped[8:start]).items():
        if name != "__metadata__":
            kind, (first, last) = np.dtype(_KINDS[about["dtype"]]), about["data_offsets"]
            columns[name] = np.frombuffer(mapped, kind, (last - first) // kind.itemsize, start + first)
    return columns, metadata


def headers(starts: np.ndarray) -> list[int]:
    """Where up to MAX_HEADERS members begin, evenly spaced among `starts`: what the digest looks at."""
    count = min(len(starts), MAX_HEADERS)
    return [int(starts[i * len(starts) // count]) for i in range(count)]


def header_digest(starts: Sequence[int], blocks: Sequence[bytes]) -> str:
    """SHA-256 over where members begin and the tar headers in front of them."""
    digest = hashlib.sha256()
    for start, block in zip(starts, blocks, strict=True):
        digest.update(struct.pack("<q", start) + block)
    return digest.hexdigest()


def _problem(about: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> str | None:
    """What makes an index unusable as a whole, None where nothing does. Values are checked where they are used."""
    for name, kind in _ABOUT.items():
        if not isinstance(about.get(name), kind):
            return f"metadata {name} is missing or no {kind.__name__}"
    for table in ("extensions", "languages", "sources"):
        if not all(isinstance(name, str) for name in about[table]):
            return f"{table} are not all names"
    counts = [about["max_text_tokens"], about["max_samples"], *about["max_media"]]
    if len(counts) != 2 + len(KINDS) or not all(type(count) is int and 0 <= count < 1 << 60 for count in counts):
        return "a maximum is out of bounds"
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
    lengths = dict.fromkeys(_MEMBERS, members) | dict.fromkeys(_MEDIA, len(columns["media_kind"]))
    for name, length in (lengths | dict.fromkeys(_SAMPLES, samples)).items():
        if len(columns[name]) != length:
            return f"column {name} has {len(columns[name])} rows, not {length}"
    if not _groups_fit(about, samples):
        return "groups do not fit the samples"
    return None


def _groups_fit(about: Mapping[str, Any], samples: int) -> bool:
    known = range(len(about["sources"])), range(len(about["languages"])), range(1, samples + 1)
    for group in about["groups"]:
        if not isinstance(group, list) or len(group) != 3 or not all(type(value) is int for value in group):
            return False
        if not all(value in allowed for value, allowed in zip(group, known, strict=True)):
            return False
    return sum(group[2] for group in about["groups"]) == samples
