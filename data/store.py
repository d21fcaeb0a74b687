"""Reads byte ranges of shards, wherever they lie: the one door between the data plane and disks and servers.

    local path ------------------------------------pread--> bytes
    http, https, s3 --blocks--> cache folder, hit? --pread--> bytes
                                    miss --request of the whole block, tried again--> bytes, and into the folder

All processes of a machine share the cache folder, so a block is fetched about once for each machine, or more often
where several miss it in the same moment.  Without a cache, ranges that lie together are one request.  A server that
stays away ends the run with a DataError; it is never taken for a damaged sample (BadSample: left out and counted).

Cost: a local read is that of its pread and 0.1 microseconds; a cached one 0.05 ms and up (data/cache.py); a missed one
a request of `block_mb`.  The first use of a file asks its server for size and version.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from data.cache import BlockCache
from data.errors import BadSample, DataError
from data.locations import Missing, expand, is_remote
from data.tar import read_range

if TYPE_CHECKING:
    from data.remote import Remote, RemoteFile

__all__ = ["Missing", "Store", "StoreSettings"]

MAX_OPEN = 256  # local files
GAP = 64 << 10  # ranges no further apart are read as one: tar headers lie between the members of a sample
PIECE = 8 << 20  # of a range that is read past the cache: each piece is a request of its own
COPY_BYTES = 128 << 20  # of whole files that are fetched together
MAX_COPY_BYTES = 1 << 32


def tell(line: str) -> None:
    """Say what went wrong without stopping the run, as one line on stderr."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class StoreSettings:
    """How shards on servers are read. Credentials are no setting: they come from the environment and AWS's files."""

    cache: str = ""
    """Folder that keeps what was fetched, best on the machine's own disk; empty is ~/.cache/omniloom/shards."""
    cache_gb: float = 50.0
    """Most that the folder may hold, in 10^9 bytes; the least recently used goes first. 0 keeps nothing."""
    block_mb: int = 4
    """MiB that are fetched at a time: more serves neighbours, less wastes less on samples that lie apart."""
    timeout_s: float = 60.0
    """Seconds for one request; it is tried again after that."""
    retry_s: float = 300.0
    """Seconds for which a server that does not answer, or answers 429 or 5xx, is tried before the run stops."""
    anonymous: bool = False
    """Send S3 no credentials: for public buckets."""

    def validate(self) -> None:
        """Raise DataError naming the first setting that cannot be used."""
        for name in ("cache_gb", "retry_s"):
            if not 0 <= getattr(self, name) < 1e9:
                raise DataError(f"data.store.{name}={getattr(self, name)}: must be 0 or more")
        if not 1 <= self.block_mb <= 256:
            raise DataError(f"data.store.block_mb={self.block_mb}: must be 1 to 256")
        if not 0 < self.timeout_s < 1e9:
            raise DataError(f"data.store.timeout_s={self.timeout_s}: must be above 0")
        if "://" in self.cache or not (self.cache or "-").isprintable():
            raise DataError(f"data.store.cache={self.cache!r}: must be a local folder")
        if 0 < self.cache_gb * 1e9 < 16 * self.block_bytes:
            raise DataError(
                f"data.store.cache_gb={self.cache_gb}: must hold 16 blocks of data.store.block_mb={self.block_mb}, "
                "or be 0 for no cache"
            )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.block_mb << 20

    @property
    def folder(self) -> Path:
        """The cache folder."""
        if self.cache:
            return Path(self.cache).expanduser()
        base = os.environ.get("XDG_CACHE_HOME", "")
        return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "omniloom" / "shards"


class Store:
    """Open files and connections of one process. Travels to another without them."""

    def __init__(self, settings: StoreSettings | None = None, warn: Callable[[str], None] = tell) -> None:
        """`warn` takes one line about a server that is tried again, or a cache that cannot be written."""
        self.settings = settings or StoreSettings()
        self._warn = warn
        self._block = self.settings.block_bytes
        self._files: dict[str, FileIO] = {}  # local ones, the oldest first
        self._found: dict[str, RemoteFile] = {}
        self._cache: BlockCache | None = None
        if self.settings.cache_gb:
            self._cache = BlockCache(self.settings.folder, int(self.settings.cache_gb * 1e9), warn)
        self._remote: Remote | None = None
        self._pid = 0
        self._copies: tempfile.TemporaryDirectory | None = None

    def __reduce__(self) -> tuple:
        """Travel without open files and connections."""
        return Store, (self.settings, self._warn)

    def expand(self, patterns: Sequence[str]) -> list[str]:
        """Locations that paths, addresses, brace ranges and globs name. Raises DataError where one names nothing."""
        return expand(patterns, lambda pattern: self._servers(pattern).glob(pattern))

    def size(self, location: str) -> int:
        """Bytes of a file. Raises Missing, or DataError where it cannot be read."""
        return self.sizes([location])[0]

    def sizes(self, locations: Sequence[str]) -> list[int]:
        """Bytes of several files; those on servers are asked for together."""
        self._describe(locations)
        return [self._found[at].size if is_remote(at) else _stat(at).st_size for at in locations]

    def version(self, location: str) -> str:
        """A text that changes when the file does: ETag or Last-Modified, or size and time of a local file.

        Empty where a server says neither; such a file is never kept in the cache.
        """
        if is_remote(location):
            self._describe([location])
            return self._found[location].version
        about = _stat(location)
        return f"{about.st_size}-{about.st_mtime_ns}"

    def read(self, location: str, start: int, size: int) -> bytes:
        """The bytes [start, start + size). Raises as `read_many` does."""
        file = self._files.get(location)
        if file is None and is_remote(location):
            return self.read_many(location, [(start, size)])[0]
        try:
            return read_range((file or self._open(location)).fileno(), start, size)
        except OSError as error:
            raise DataError(f"{location}: cannot be read: {error.strerror}") from None

    def read_many(self, location: str, ranges: Sequence[tuple[int, int]], direct: bool = False) -> list[bytes]:
        """The bytes of each range (start, size), in few requests; `direct` reads exactly these, past the cache.

        Raises BadSample where the file ends before; DataError where it cannot be read, changed, or its server stays
        away for `retry_s`.
        """
        local = self._files.get(location)
        if local is not None or not is_remote(location):
            try:
                fd = (local or self._open(location)).fileno()
                return [read_range(fd, start, size) for start, size in ranges]
            except OSError as error:
                raise DataError(f"{location}: cannot be read: {error.strerror}") from None
        self._describe([location])
        file = self._found[location]
        for start, size in ranges:
            if start + size > file.size:
                raise BadSample(f"the shard ends {start + size - file.size} bytes too early")
        spans = _merge(ranges)
        if self._cache is None or direct or not file.version:
            payloads = self._fetch({location: spans})[0]
        else:
            payloads = self._cached(location, spans, self._cache)
        firsts = [first for first, _ in spans]
        parts = []
        for start, size in ranges:
            i = bisect_right(firsts, start) - 1
            parts.append(payloads[i][start - firsts[i] : start - firsts[i] + size] if size else b"")
        return parts

    def forget(self, location: str, ranges: Sequence[tuple[int, int]]) -> None:
        """Drop the cached blocks of ranges (start, size) whose bytes turned out to be wrong: they are fetched anew."""
        if self._cache is not None and location in self._found:
            for start, size in ranges:
                for block, _, _ in _cut(start, start + size, self._block):
                    self._cache.drop(self._key(location, block))

    def local_copy(self, location: str) -> Path:
        """A local path with the bytes of a file: itself, or a copy in the cache. Open it before the next call."""
        return self.local_copies([location])[0]

    def local_copies(self, locations: Sequence[str]) -> list[Path]:
        """Local paths of several small files, the remote ones fetched together. Raises as `read_many` does."""
        self._describe(locations)
        paths = {at: self._copy(at) if is_remote(at) else Path(at) for at in locations}
        for group in _groups([(at, self._found[at].size) for at, path in paths.items() if path is None]):
            spans = {at: [(0, self._found[at].size)] for at in group}
            for at, (payload,) in zip(group, self._fetch(spans), strict=True):
                paths[at] = self._keep_copy(at, payload)
        return [path for at in locations if (path := paths[at]) is not None]

    def _open(self, location: str) -> FileIO:
        try:
            file = FileIO(location)
        except FileNotFoundError:
            raise Missing(f"{location}: no such file") from None
        self._files[location] = file
        if len(self._files) > MAX_OPEN:
            del self._files[next(iter(self._files))]  # closes when its last reader is done
        return file

    def _servers(self, location: str) -> Remote:
        if self._remote is None or self._pid != os.getpid():  # connections do not survive a fork
            try:
                from data.remote import Remote  # only now: it needs an extra, and half a second
            except ImportError as error:
                raise DataError(f'{location}: needs {error.name}: pip install "omniloom[remote]"') from None
            settings = self.settings
            self._remote = Remote(settings.timeout_s, settings.retry_s, settings.anonymous, self._warn)
            self._pid = os.getpid()
        return self._remote

    def _describe(self, locations: Sequence[str]) -> None:
        """Ask once for size and version of each remote location."""
        new = [at for at in dict.fromkeys(locations) if is_remote(at) and at not in self._found]
        if new:
            self._found |= zip(new, self._servers(new[0]).describe(new), strict=True)

    def _key(self, location: str, block: int | str) -> str:
        file = self._found[location]
        return hashlib.sha256(repr((location, file.version, file.size, self._block, block)).encode()).hexdigest()

    def _fetch(self, spans: Mapping[str, Sequence[tuple[int, int]]]) -> list[list[bytes]]:
        """For each location the bytes of each of its spans [start, stop), none from the cache."""
        from data.remote import Piece

        pieces = [
            Piece(location, self._found[location], at, min(at + PIECE, stop))
            for location, of_one in spans.items()
            for start, stop in of_one
            for at in range(start, stop, PIECE)
        ]
        fetched = iter(self._servers(pieces[0].location).fetch(pieces) if pieces else ())
        return [
            [b"".join(next(fetched) for _ in range(start, stop, PIECE)) for start, stop in of_one]
            for of_one in spans.values()
        ]

    def _cached(self, location: str, spans: Sequence[tuple[int, int]], cache: BlockCache) -> list[bytes]:
        """The bytes of each span; blocks that are not in the cache are fetched together and put there."""
        size = self._found[location].size
        cuts = [_cut(start, stop, self._block) for start, stop in spans]
        blocks = sorted({block for cut in cuts for block, _, _ in cut})
        keys = {block: self._key(location, block) for block in blocks}
        bounds = {block: (block * self._block, min((block + 1) * self._block, size)) for block in blocks}
        pieces: dict[tuple[int, int, int], bytes | None] = {}
        for piece in itertools.chain.from_iterable(cuts):
            block, first, stop = piece
            pieces[piece] = cache.read(keys[block], bounds[block][1] - bounds[block][0], first, stop)
        missing = sorted({block for (block, _, _), payload in pieces.items() if payload is None})
        if missing and not cache.writable:
            return self._fetch({location: spans})[0]
        fetched = dict(zip(missing, self._fetch({location: [bounds[block] for block in missing]})[0], strict=True))
        for block, payload in fetched.items():
            cache.write(keys[block], payload)
        return [b"".join(pieces[piece] or fetched[piece[0]][piece[1] : piece[2]] for piece in cut) for cut in cuts]

    def _copy(self, location: str) -> Path | None:
        """Where the copy of a remote file lies, if there is one."""
        file = self._found[location]
        if file.size > MAX_COPY_BYTES:
            raise DataError(f"{location}: refused: {file.size} bytes are too many for an index")
        key = self._key(location, "whole")
        if self._cache is not None and file.version and (path := self._cache.whole(key, file.size)):
            return path
        path = Path(self._copies.name) / key if self._copies else None
        return path if path and path.exists() else None

    def _keep_copy(self, location: str, payload: bytes) -> Path:
        """Put a copy into the cache, or into a folder of this process where there is none."""
        key = self._key(location, "whole")
        if (
            self._cache is not None
            and self._found[location].version
            and (path := self._cache.write_whole(key, payload))
        ):
            return path
        try:
            self._copies = self._copies or tempfile.TemporaryDirectory(prefix="omniloom-")
            path = Path(self._copies.name) / key
            path.with_suffix(".tmp").write_bytes(payload)
            return path.with_suffix(".tmp").rename(path)
        except OSError as error:
            folder = tempfile.gettempdir()
            raise DataError(
                f"{location}: no copy in {folder}: {error.strerror}; set TMPDIR to another folder"
            ) from None


def _stat(location: str) -> os.stat_result:
    try:
        return os.stat(location)
    except FileNotFoundError:
        raise Missing(f"{location}: no such file") from None
    except OSError as error:
        raise DataError(f"{location}: cannot be read: {error.strerror}") from None


def _merge(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint spans [start, stop) that hold all ranges (start, size), those less than GAP apart as one."""
    spans: list[tuple[int, int]] = []
    for start, size in sorted(span for span in ranges if span[1] > 0):
        if spans and start <= spans[-1][1] + GAP:
            spans[-1] = (spans[-1][0], max(spans[-1][1], start + size))
        else:
            spans.append((start, start + size))
    return spans


def _cut(start: int, stop: int, block: int) -> list[tuple[int, int, int]]:
    """(block number, first byte, stop in that block) of the pieces of a span."""
    numbers = range(start // block, -(-stop // block))
    return [(number, max(start - number * block, 0), min(stop - number * block, block)) for number in numbers]


def _groups(sizes: Sequence[tuple[str, int]]) -> Iterator[list[str]]:
    """Runs of (location, size) that hold COPY_BYTES together, or one alone."""
    group, total = [], 0
    for location, size in sizes:
        if group and total + size > COPY_BYTES:
            yield group
            group, total = [], 0
        group.append(location)
        total += size
    if group:
        yield group
