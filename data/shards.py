"""Write samples as WebDataset shards, each with its index beside it.

    records --webdataset's TarWriter--> FOLDER/PREFIX-000000.tar --build_indexes--> PREFIX-000000.tar.index

A shard appears under its name only when it is whole.  Same records, same bytes: no times or users are stored.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from webdataset.writer import TarWriter

from data.document import MediaLimits
from data.errors import BadSample, DataError
from data.files import publish
from data.index import build_indexes
from data.sample import SampleRecord, check_record
from data.shard_index import ShardIndex
from data.sources import check_key
from data.tokenizer import Tokenizer

__all__ = ["SampleRecord", "WriteReport", "write_shards", "write_tar"]


@dataclass(frozen=True)
class WriteReport:
    """What `write_shards` wrote."""

    paths: list[Path]
    num_samples: int  # usable ones
    left_out: list[str]  # one line for each record that cannot be used: undecodable audio and the like


def write_shards(
    records: Iterable[SampleRecord],
    folder: Path,
    tokenizer: Tokenizer,
    samples_per_shard: int = 1000,
    *,
    prefix: str = "shard",
    workers: int = 1,
    limits: MediaLimits | None = None,
    quiet: bool = True,
) -> WriteReport:
    """Write `records` to `folder` and index them in `workers` processes.

    Raises DataError where the folder already holds shards of this prefix, and for a key or extension that no shard
    may hold. Records whose audio cannot be decoded are written but left out of the index, and reported.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob(f"{prefix}-*.tar")):
        raise DataError(f"{folder}: already holds {prefix}-*.tar; delete them or write elsewhere")
    paths = []
    keys: set[str] = set()
    waiting = iter(records)
    while write_tar(path := folder / f"{prefix}-{len(paths):06d}.tar", _checked(waiting, keys), samples_per_shard):
        paths.append(path)
    if not paths:
        raise DataError(f"{folder}: there is no sample to write")
    left_out = build_indexes(paths, tokenizer, workers, limits, quiet)
    return WriteReport(paths, sum(ShardIndex.open(path).num_samples for path in paths), left_out)


def _checked(records: Iterator[SampleRecord], keys: set[str]) -> Iterator[SampleRecord]:
    for record in records:
        if record.key in keys:
            raise DataError(f"key {record.key!r} occurs twice; keys name samples and must differ")
        keys.add(record.key)
        try:
            check_key(record.key)
            check_record(record)
        except BadSample as error:
            raise DataError(f"{record.key[:80]}: {error.reason}") from None
        yield record


def write_tar(path: Path, records: Iterator[SampleRecord], max_samples: int, max_bytes: int = sys.maxsize) -> int:
    """Take records and write them to one tar, until it has `max_samples` or `max_bytes`; returns how many.

    The tar appears when it is whole; where there is no record, there is none. Keys must differ and be fit for a tar.
    """
    first = next(records, None)
    if first is None:
        return 0
    count, size = 0, 0
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            with TarWriter(file, encoder=False, mtime=0, user="", group="") as writer:
                for record in itertools.chain([first], records):
                    members = {"json": record.to_json(), **record.media}
                    writer.write({"__key__": record.key, **members})
                    count, size = count + 1, size + sum(map(len, members.values()))
                    if count == max_samples or size >= max_bytes:
                        break
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count
