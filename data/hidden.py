"""What a Talker reads of a frozen Thinker, kept beside a shard so that training the Talker computes none of it again.

    NAME.tar + NAME.tar.index --train/hidden.py--> NAME.tar.hidden (safetensors) --mmap--> Document of one sample

A record for each sample with speech: its tokens, their positions, and the hidden states at the placeholders of its
user turns, in order. Nothing else is needed of the sample but the codes of its answer: nothing is read from the tar,
nothing tokenised again. The file names the weights, the layer and the very tar that it was made from; anything else
is refused. Written record after record to a temporary file whose header and columns, of fixed size, come last, so
memory is one pack's whatever the shard holds. Cost on disk: 2 bytes a value in bf16, which is 4 KiB a placeholder at
width 2,048: 53 KiB a second of speech; and 16 bytes a token. Reading one copies its record and compares its crc32.

Letters: N samples of the shard, S tokens of one, R rows of them that the Talker reads, H width of the Thinker.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import safetensors
import torch
from isal.isal_zlib import crc32
from torch import Tensor

from data.corpus import Corpus
from data.costs import IMAGE, Sizing
from data.document import IGNORE, Document
from data.errors import BadSample, DataError
from data.files import publish
from data.shard_index import ShardIndex, mapped

FORMAT = "omniloom-hidden-2"
HEADER_BYTES = 4096 - 8  # padded with spaces, as the format allows
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COLUMNS = {  # besides the records, uint8, end to end
    "offsets": ("I64", "<i8", 1),  # N + 1; sample i's record is bytes offsets[i] to [i + 1], none where there is none
    "tokens": ("I64", "<i8", 0),  # N; S of each
    "sums": ("U32", "<u4", 0),  # N; crc32 of its record
}
TOKEN_BYTES = 4 * 4  # three positions and an id
MAKE = "python -m launch.cache_hidden"


@dataclass(frozen=True)
class Origin:
    """What hidden states are of."""

    model: str  # digest of the Thinker's weights and sizes: train.hidden.thinker_digest
    layer: int  # so many layers of it have run
    sizing: Sizing  # of images and videos

    def about(self, index: ShardIndex) -> dict[str, str | int]:
        """All that a file made of this shard must say of itself."""
        image, video = self.sizing.image, self.sizing.video
        sizes = f"images of {image.min_pixels} to {image.max_pixels} pixels, videos of {asdict(video)}"
        about = index.about
        return {
            "format": FORMAT,
            "tar_size": about["tar_size"],
            "header_digest": about["header_digest"],
            "tokenizer": about["tokenizer"],
            "layer": self.layer,
            "sizes": sizes if any(about["max_media"][IMAGE:]) else "",  # audio has but one
            "model": self.model,
        }


def hidden_path(tar: str | Path) -> Path:
    """Where the hidden states of `tar` lie. Raises DataError for a shard on a server: they lie beside local ones."""
    if "://" in str(tar):
        raise DataError(f"{tar}: hidden states lie beside local shards only; copy the shard to a disk")
    return Path(f"{tar}.hidden")


class HiddenWriter:
    """Writes the records of a shard's samples in their order; the file appears when the block ends without an error."""

    def __init__(self, index: ShardIndex, origin: Origin, *, width: int, dtype: str = "bf16") -> None:
        """`width` is the Thinker's, `dtype` one of DTYPES."""
        self.path, self.width, self.dtype = hidden_path(index.tar), width, DTYPES[dtype]
        self.about = origin.about(index) | {"width": width, "dtype": dtype}
        self.num_samples, self.rows = index.num_samples, 0
        self.offsets, self.tokens, self.sums = [0], [], []
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self.file = open(self.temporary, "wb")
        self.file.seek(8 + HEADER_BYTES + _columns_size(self.num_samples))

    def add(self, ids_S: Tensor, position_ids_3S: Tensor, states_RH: Tensor) -> None:
        """The next sample: tokens int64, positions float32, states float. Raises DataError where one is not finite."""
        if states_RH.shape[1:] != (self.width,):
            raise ValueError(f"states have shape {tuple(states_RH.shape)}, their width must be {self.width}")
        states_RH = states_RH.detach().to("cpu", self.dtype)
        if not bool(states_RH.isfinite().all()):
            raise DataError(f"{self.path.name}: sample {len(self.tokens)} has hidden states that are not finite")
        parts = position_ids_3S.cpu().float(), ids_S.to("cpu", torch.int32), states_RH
        self._write(b"".join(_bytes(part) for part in parts), len(ids_S))
        self.rows += len(states_RH)

    def skip(self) -> None:
        """The next sample has no speech, or cannot be read."""
        self._write(b"", 0)

    def _write(self, record: bytes, tokens: int) -> None:
        self.file.write(record)
        self.offsets.append(self.offsets[-1] + len(record))
        self.tokens.append(tokens)
        self.sums.append(crc32(record))

    def __enter__(self) -> HiddenWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self.file.close()
            self.temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        if len(self.tokens) != self.num_samples:
            raise ValueError(f"{len(self.tokens)} samples were added, the shard has {self.num_samples}")
        header: dict[str, Any] = {"__metadata__": {"omniloom": json.dumps(self.about)}}
        start, columns = 0, b""
        for name, (code, kind, more) in COLUMNS.items():
            columns += np.array(getattr(self, name), kind).tobytes()
            shape, span = [self.num_samples + more], [start, len(columns)]
            header[name] = {"dtype": code, "shape": shape, "data_offsets": span}
            start = len(columns)
        size = self.offsets[-1]
        header["records"] = {"dtype": "U8", "shape": [size], "data_offsets": [start, start + size]}
        text = json.dumps(header).encode()
        assert len(text) <= HEADER_BYTES
        self.file.seek(0)
        self.file.write(struct.pack("<Q", HEADER_BYTES) + text.ljust(HEADER_BYTES) + columns)
        self.file.flush()
        os.fsync(self.file.fileno())
        publish(self.temporary, self.path)


class HiddenShard:
    """The records of a shard, mapped."""

    def __init__(self, index: ShardIndex, origin: Origin) -> None:
        """Raises DataError where they are missing, damaged, or of another shard, model, layer or sizes."""
        path = hidden_path(index.tar)
        again = f"delete it and make it again with: {MAKE}"
        try:
            columns, metadata = mapped(path)
            about = json.loads(metadata.get("omniloom", "{}"))
        except FileNotFoundError:
            raise DataError(f"{index.tar}: has no hidden states of the Thinker; make them with: {MAKE}") from None
        except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"{path}: damaged ({error}); {again}") from None
        wanted = origin.about(index)
        found = about if isinstance(about, dict) else {}
        if different := [name for name in wanted if found.get(name) != wanted[name]]:
            name = different[0]
            raise DataError(f"{path}: made with {name} {found.get(name)}, needed is {wanted[name]}; {again}")
        if problem := _problem(found, columns, index.num_samples):
            raise DataError(f"{path}: damaged ({problem}); {again}")
        self._width, self._dtype = found["width"], DTYPES[found["dtype"]]
        self._offsets, self._tokens, self._sums, self._records = (columns[name] for name in (*COLUMNS, "records"))

    def record(self, row: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Tokens int64 [S], positions float32 [3, S] and states [R, H], in the dtype of the file, of sample `row`.

        None where it has none. Raises BadSample where its bytes have changed.
        """
        first, last = self._offsets[row : row + 2].tolist()
        if first == last:
            return None
        record, tokens = bytearray(self._records[first:last]), int(self._tokens[row])
        if crc32(record) != self._sums[row] or not 0 < TOKEN_BYTES * tokens <= len(record):
            raise BadSample("its hidden states have changed since they were made (crc32 differs)")
        position_ids_3S = torch.frombuffer(record, dtype=torch.float32, count=3 * tokens).view(3, tokens)
        ids_S = torch.frombuffer(record, dtype=torch.int32, count=tokens, offset=12 * tokens).long()
        if len(record) == TOKEN_BYTES * tokens:  # frombuffer wants at least a byte
            return ids_S, position_ids_3S, torch.empty(0, self._width, dtype=self._dtype)
        states = torch.frombuffer(record, dtype=self._dtype, offset=TOKEN_BYTES * tokens)
        return ids_S, position_ids_3S, states.view(-1, self._width)


class HiddenStates:
    """The records of all shards of a corpus. Workers may have their own copy: it travels without what it has mapped."""

    def __init__(self, corpus: Corpus, origin: Origin) -> None:
        self.corpus, self.origin = corpus, origin
        self._open: dict[int, HiddenShard] = {}

    def __reduce__(self) -> tuple:
        """Travel without open files."""
        return HiddenStates, (self.corpus, self.origin)

    def verify(self) -> None:
        """Raise DataError for the first shard whose file is missing or another's."""
        for shard in range(len(self.corpus.paths)):
            self._shard(shard)

    def document(self, sample: int) -> Document:
        """A sample as far as the Talker reads it: no media, no labels. Raises BadSample where it has no record."""
        shard, row = self.corpus.locate(sample)
        record = self._shard(shard).record(row)
        if record is None:
            raise BadSample("it could not be read when the hidden states were made")
        ids_S, position_ids_3S, states_RH = record
        labels_S = torch.full_like(ids_S, IGNORE)
        return Document(self.corpus.name(sample), ids_S, labels_S, position_ids_3S, (), (), (), media_RH=states_RH)

    def _shard(self, shard: int) -> HiddenShard:
        if shard not in self._open:  # mapped: no file stays open
            self._open[shard] = HiddenShard(self.corpus.index(shard), self.origin)
        return self._open[shard]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _columns_size(num_samples: int) -> int:
    return sum(np.dtype(kind).itemsize * (num_samples + more) for _, kind, more in COLUMNS.values())


def _problem(about: Mapping[str, Any], columns: Mapping[str, np.ndarray], num_samples: int) -> str | None:
    """What makes a file unusable as a whole, None where nothing does. Records are checked where they are read."""
    if type(about.get("width")) is not int or about["width"] < 1 or about.get("dtype") not in DTYPES:
        return "its width or dtype makes no sense"
    for name, kind, count in (*((name, kind, num_samples + more) for name, (_, kind, more) in COLUMNS.items()),):
        if name not in columns or columns[name].dtype != kind or len(columns[name]) != count:
            return f"column {name} is missing or of another kind or length"
    offsets, records = columns["offsets"], columns.get("records")
    if records is None or records.dtype != np.uint8:
        return "it holds no records"
    if offsets[0] != 0 or offsets[-1] != len(records) or (offsets[1:] < offsets[:-1]).any():
        return "its offsets make no sense"
    return None
