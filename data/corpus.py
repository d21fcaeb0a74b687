"""All shards of a run as one numbered list of samples, checked once at the start.

    paths and globs --expand--> sorted tars --open, verify each--> Corpus: sample id <-> (shard, row)

Ids run through the shards in the order listed (globs sorted).  Memory: a few numbers per shard and at most MAX_OPEN
mapped indexes.  Cost of opening: 0.2 ms and at most 64 small reads per shard.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.shard_index import ShardIndex

MAX_OPEN = 64


def expand(patterns: Sequence[str]) -> list[Path]:
    """Paths of the shards that paths and glob patterns name. Raises DataError where one names nothing or no path."""
    paths: list[Path] = []
    for pattern in patterns:
        text = str(pattern)
        if "://" in text or text.startswith(("pipe:", "|", "-")) or "\0" in text:
            raise DataError(f'data.shards: "{text}" is not a path of a local file; URLs and commands are not read')
        found = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else [text]
        if not found:
            raise DataError(f'data.shards: no file matches "{text}"')
        paths += [Path(name) for name in found]
    if not paths:
        raise DataError("data.shards is empty: name at least one shard")
    seen = set()
    for path in paths:
        if path.resolve() in seen:
            raise DataError(f"data.shards: {path} is listed twice")
        seen.add(path.resolve())
    return paths


class Corpus:
    """The samples of several shards, numbered from 0. Build it by `Corpus.open`; workers may unpickle their own."""

    def __init__(self, paths: Sequence[Path], names: Sequence[str], offsets: np.ndarray, fingerprint: str) -> None:
        self.paths = tuple(paths)
        self.names = tuple(names)  # of the shards, as they appear in the names of samples
        self.offsets = offsets  # int64 [shards + 1]: ids of shard s are offsets[s] to offsets[s + 1] - 1
        self.fingerprint = fingerprint  # same fingerprint, same samples under the same ids
        self.num_samples = int(offsets[-1])
        self._open: dict[int, ShardIndex] = {}

    @classmethod
    def open(cls, patterns: Sequence[str], tokenizer_fingerprint: str | None = None) -> Corpus:
        """Open and check every shard that `patterns` name.

        Raises DataError, naming the shard, for a missing shard or index, an index that is not its tar's, and an index
        made with another tokenizer than the one of `tokenizer_fingerprint`.
        """
        paths = expand(patterns)
        names = _short_names(paths)
        counts, digest = [0], hashlib.sha256()
        for path, name in zip(paths, names, strict=True):
            if not path.exists():
                raise DataError(f"{path}: no such shard")
            index = ShardIndex.open(path)
            index.verify()
            about = index.about
            if tokenizer_fingerprint is not None and about["tokenizer"] != tokenizer_fingerprint:
                raise DataError(
                    f"{path}: its index was made with another tokenizer; run python -m data.index with data.tokenizer"
                )
            counts.append(index.num_samples)
            digest.update(repr((name, about["tar_size"], about["header_digest"], about["cost_digest"])).encode())
        return cls(paths, names, np.cumsum(counts, dtype=np.int64), digest.hexdigest())

    def __reduce__(self) -> tuple:
        """Travel without open files."""
        return Corpus, (self.paths, self.names, self.offsets, self.fingerprint)

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard; the MAX_OPEN last used ones stay open."""
        index = self._open.pop(shard, None) or ShardIndex.open(self.paths[shard])
        self._open[shard] = index
        if len(self._open) > MAX_OPEN:
            del self._open[next(iter(self._open))]
        return index

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, row in the shard) of a sample id."""
        shard = int(np.searchsorted(self.offsets, sample, side="right")) - 1
        return shard, sample - int(self.offsets[shard])

    def name(self, sample: int) -> str:
        """ "shard.tar:key" of a sample id."""
        shard, row = self.locate(sample)
        return f"{self.names[shard]}:{self.index(shard).key(row)}"

    def left_out(self) -> list[str]:
        """One line for every sample that indexing found unusable."""
        return [line for shard in range(len(self.paths)) for line in self.index(shard).about["left_out"]]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """File names of the shards, with the folder in front where file names repeat."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    names = [f"{path.parent.name}/{path.name}" for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
