"""Hidden states of a frozen Thinker, kept beside a shard so that training a Talker need not compute them again.

    NAME.tar + NAME.tar.index --train/hidden.py--> NAME.tar.hidden (safetensors) --mmap--> rows of one sample

One row for each placeholder of the sample's user segments, in their order. The file names the model, the layer and the
very tar that it was made from; anything else is refused. Written row after row to a temporary file whose header, of
fixed size, comes last, so memory is one pack's whatever the shard holds. Cost on disk: 2 bytes a value in bf16, which
is 4 KiB a placeholder at width 2,048: 53 KiB a second of speech.

Letters: N samples of the shard, M rows of one, R rows of all, H width of the Thinker.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from types import TracebackType

import safetensors
import torch
from torch import Tensor

from data.errors import DataError
from data.files import publish
from data.shard_index import ShardIndex

FORMAT = "omniloom-hidden-1"
HEADER_BYTES = 4096 - 8  # padded with spaces, as the format allows
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def hidden_path(tar: str | Path) -> Path:
    """Where the hidden states of `tar` lie. Raises DataError for a shard on a server: they lie beside local ones."""
    if "://" in str(tar):
        raise DataError(f"{tar}: hidden states lie beside local shards only; copy the shard to a disk")
    return Path(f"{tar}.hidden")


class HiddenWriter:
    """Writes the states of a shard's samples in their order; the file appears when the block ends without an error."""

    def __init__(
        self, index: ShardIndex, *, model: str, layer: int, width: int, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """`model` says which weights: states of another are refused when they are read."""
        if dtype not in DTYPES:
            raise DataError(f"hidden states are kept in bf16 or fp32, not {dtype}")
        self.path, self.width, self.dtype = hidden_path(index.tar), width, dtype
        self.about = _about(index, model, layer)
        self.num_samples, self.offsets = index.num_samples, [0]
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self.file = open(self.temporary, "wb")
        self.file.seek(8 + HEADER_BYTES + 8 * (self.num_samples + 1))

    def add(self, states_MH: Tensor) -> None:
        """The states of the next sample, float [M, H]; M may be 0. Raises DataError for values that are not finite."""
        if states_MH.shape[1:] != (self.width,):
            raise ValueError(f"states have shape {tuple(states_MH.shape)}, their width must be {self.width}")
        states_MH = states_MH.detach().to("cpu", self.dtype).contiguous()
        if not bool(states_MH.isfinite().all()):
            raise DataError(f"{self.path.name}: sample {len(self.offsets) - 1} has hidden states that are not finite")
        self.file.write(states_MH.view(torch.uint8).numpy().tobytes())
        self.offsets.append(self.offsets[-1] + len(states_MH))

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
        if len(self.offsets) != self.num_samples + 1:
            raise ValueError(f"{len(self.offsets) - 1} samples were added, the shard has {self.num_samples}")
        counts, rows = 8 * len(self.offsets), self.offsets[-1]
        size = rows * self.width * self.dtype.itemsize
        header = json.dumps(
            {
                "__metadata__": {"omniloom": json.dumps(self.about)},
                "offsets": {"dtype": "I64", "shape": [len(self.offsets)], "data_offsets": [0, counts]},
                "hidden": {
                    "dtype": DTYPES[self.dtype],
                    "shape": [rows, self.width],
                    "data_offsets": [counts, counts + size],
                },
            }
        ).encode()
        assert len(header) <= HEADER_BYTES
        self.file.seek(0)
        self.file.write(struct.pack("<Q", HEADER_BYTES) + header.ljust(HEADER_BYTES))
        self.file.write(torch.tensor(self.offsets).numpy().astype("<i8").tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        publish(self.temporary, self.path)


class HiddenShard:
    """The hidden states of a shard, mapped."""

    def __init__(self, index: ShardIndex, *, model: str, layer: int) -> None:
        """Raises DataError where they are missing, damaged, or of another shard, model or layer."""
        path = hidden_path(index.tar)
        again = "make them with: python -m launch.cache_hidden"
        if not path.exists():
            raise DataError(f"{index.tar}: has no hidden states of the Thinker; {again}")
        again = "delete it and make it again with: python -m launch.cache_hidden"
        try:
            self._file = safetensors.safe_open(path, "pt")
            about = json.loads((self._file.metadata() or {}).get("omniloom", "{}"))
            self._offsets = self._file.get_tensor("offsets").tolist()
            self._hidden = self._file.get_slice("hidden")
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path}: damaged ({error}); {again}") from None
        wanted = _about(index, model, layer)
        if different := [name for name in wanted if about.get(name) != wanted[name]]:
            name = different[0]
            raise DataError(f"{path}: made with {name} {about.get(name)}, needed is {wanted[name]}; {again}")
        bounds, rows = self._offsets, self._hidden.get_shape()[0]
        if len(bounds) != index.num_samples + 1 or bounds[0] or bounds[-1] != rows or sorted(bounds) != bounds:
            raise DataError(f"{path}: damaged (its offsets make no sense); {again}")

    def states(self, row: int) -> Tensor:
        """Of the sample in `row` of the index, [M, H] in the dtype of the file."""
        return self._hidden[self._offsets[row] : self._offsets[row + 1]]


def _about(index: ShardIndex, model: str, layer: int) -> dict[str, str | int]:
    about = index.about
    return {
        "format": FORMAT,
        "model": model,
        "layer": layer,
        "tar_size": about["tar_size"],
        "header_digest": about["header_digest"],
        "tokenizer": about["tokenizer"],
    }
