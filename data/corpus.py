"""All shards of a run as one numbered list of samples, checked once at the start.

    paths, addresses and globs --Store.expand--> tars --open, verify each--> Corpus: sample id <-> (shard, row)

Ids run through the shards in the order listed (globs sorted).  Memory: a few numbers per shard and at most MAX_OPEN
mapped indexes.  Cost of opening: 0.2 ms and at most 16 small reads per shard; the indexes of remote shards are fetched
together.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.code_store import ShardCodes
from data.costs import Costs
from data.errors import DataError
from data.pair_store import ShardPairs
from data.shard_index import ShardIndex, index_location
from data.store import Missing, Store, StoreSettings

MAX_OPEN = 1024  # a window of a plan should find its shards open; a mapped index holds no file


class Corpus:
    """The samples of several shards, numbered from 0. Build it by `Corpus.open`; workers may unpickle their own."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        names: Sequence[str],
        offsets: np.ndarray,
        fingerprint: str,
        store: Store | None = None,
        codec: str = "",
    ) -> None:
        self.codec = codec  # identity of the codec whose codes are read with the samples; empty for none
        self.pairs = False  # read preference pairs instead, data.pair_store
        self.voices: tuple[str, ...] = ()  # whose speech is read; empty: everybody's
        self.speakers: frozenset[str] = frozenset()  # of their speech; known to who opened the corpus
        self.paths = tuple(map(str, paths))  # or addresses
        self.store = store or Store(StoreSettings(cache_gb=0))
        self.names = tuple(names)  # of the shards, as they appear in the names of samples
        self.offsets = offsets  # int64 [shards + 1]: ids of shard s are offsets[s] to offsets[s + 1] - 1
        self.fingerprint = fingerprint  # same fingerprint, same samples under the same ids
        self._starts: list[int] = offsets.tolist()  # the same, for one sample at a time
        self.num_samples = self._starts[-1]
        self._open: dict[int, ShardIndex] = {}

    @classmethod
    def open(
        cls,
        patterns: Sequence[str],
        tokenizer_fingerprint: str | None = None,
        settings: StoreSettings | None = None,
        codec: str = "",
        pairs: bool = False,
        voices: Sequence[str] = (),
    ) -> Corpus:
        """Open and check every shard that `patterns` name.

        Raises DataError, naming the shard, for a missing shard or index, an index that is not its tar's, and an index
        made with another tokenizer than the one of `tokenizer_fingerprint`. With the identity of a `codec`, also for
        shards without codes, or with those of another codec; with `pairs` the same of preference pairs. Where `voices`
        are named, samples of other speakers count as not spoken.
        """
        store = Store(settings)
        paths = store.expand(patterns)
        names = _short_names(paths)
        _fetch_indexes(store, paths)
        counts, digest, speakers = [0], hashlib.sha256(), set()
        for path, name in zip(paths, names, strict=True):
            index = ShardIndex.open(path, store)
            index.verify()
            about = index.about
            if tokenizer_fingerprint is not None and about["tokenizer"] != tokenizer_fingerprint:
                raise DataError(
                    f"{path}: its index was made with another tokenizer; run python -m data.index with data.tokenizer"
                )
            counts.append(index.num_samples)
            digest.update(repr((name, about["tar_size"], about["header_digest"], about["cost_digest"])).encode())
            if codec:
                codes = _open_codes(path, index, codec, store, pairs, voices)
                made = codes.about.get("made", "")  # pairs may be made anew in many ways
                digest.update((made + codec).encode() + codes.frames(slice(None)).tobytes())
                speakers |= codes.speakers
        corpus = cls(paths, names, np.cumsum(counts, dtype=np.int64), digest.hexdigest(), store, codec)
        corpus.speakers, corpus.pairs, corpus.voices = frozenset(speakers), pairs, tuple(voices)
        return corpus

    @property
    def sought(self) -> str:
        """What samples have that take part, where speech is read."""
        what = "preference pairs" if self.pairs else "speech codes"
        return f"{what} of {', '.join(self.voices)}" if self.voices else what

    def __reduce__(self) -> tuple:
        """Travel without open files."""
        arguments = self.paths, self.names, self.offsets, self.fingerprint, self.store, self.codec
        return Corpus, arguments, {"pairs": self.pairs, "voices": self.voices}

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard; the MAX_OPEN last used ones stay open."""
        index = self._open.pop(shard, None)
        if index is None:
            index = ShardIndex.open(self.paths[shard], self.store)
            if self.codec:
                index.codes = _open_codes(self.paths[shard], index, self.codec, self.store, self.pairs, self.voices)
        self._open[shard] = index
        if len(self._open) > MAX_OPEN:
            del self._open[next(iter(self._open))]
        return index

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, row in the shard) of a sample id."""
        shard = bisect_right(self._starts, sample) - 1
        return shard, sample - self._starts[shard]

    def costs(self, sample: int) -> Costs:
        """What the index says of one sample."""
        shard, row = self.locate(sample)
        return self.index(shard).costs(slice(row, row + 1))

    def name(self, sample: int) -> str:
        """ "shard.tar:key" of a sample id."""
        shard, row = self.locate(sample)
        return f"{self.names[shard]}:{self.index(shard).key(row)}"

    def left_out(self) -> list[str]:
        """One line for every sample that indexing found unusable."""
        lines = [str(line) for shard in range(len(self.paths)) for line in self.index(shard).about["left_out"]]
        return [line if line.isprintable() else repr(line)[1:-1] for line in lines]  # they go to terminals


def _open_codes(
    path: str, index: ShardIndex, codec: str, store: Store, pairs: bool, voices: Sequence[str]
) -> ShardCodes:
    codes = (ShardPairs if pairs else ShardCodes).open(path, index, codec, store=store)
    if voices:
        codes.only(voices)
    return codes


def _fetch_indexes(store: Store, paths: Sequence[str]) -> None:
    """Bring the indexes of remote shards into the cache, many at a time, and ask for the sizes of all shards."""
    try:
        store.sizes(paths)
        store.local_copies([index_location(path) for path in paths])
    except Missing:  # find out which; where it is an index, opening it says so
        for path in paths:
            try:
                store.size(path)
            except Missing:
                raise DataError(f"{path}: no such shard") from None


def _short_names(paths: Sequence[str]) -> list[str]:
    """File names of the shards, with the folder in front where file names repeat."""
    names = [path.rpartition("/")[2] for path in paths]
    if len(set(names)) == len(names):
        return names
    names = ["/".join(path.split("/")[-2:]) for path in paths]
    return names if len(set(names)) == len(names) else list(paths)
