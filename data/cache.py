"""A folder of blocks of remote files, shared by all processes of a machine, that never outgrows its limit.

    write(key, block) --lock: count, evict the oldest, claim room--> temporary file --rename--> KEY.block
    read(key, range) --pread--> the chunks that hold the range --crc32 of each--> bytes, or None: fetch it again

A block ends in the crc32 of each of its chunks, so a torn or rotten file is noticed wherever it is read and nothing
has to be flushed to disk; whole files, which are mapped, are flushed instead.  The sum of the files' sizes is kept in
one small file under a lock, so a write does not scan the folder; only a full cache is scanned, about once for every
tenth of it.

Limit: the sizes of all files, temporary ones included, never exceed it (the disk's own overhead comes on top), as long
as nobody else writes into the folder.  MIN_FREE_BYTES of the disk stay free too.  Trouble with the disk is told once
and never an error: reads then miss, and writes are tried again after PAUSE_S.
Cost: a read checks whole chunks, 0.05 ms for 1 KB and 0.13 ms for 76 KB; a write of 4 MiB 5 ms; a scan 5 microseconds
a block.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

CHUNK = 1 << 16
MIN_FREE_BYTES = 1 << 30
PAUSE_S = 60.0  # without writes after one that failed
LOCK_S = 1.0  # of waiting for another process; then the block is not kept
TOUCH_S = 10.0  # a block read again within this time keeps its age
STALE_S = 3600.0  # a temporary file that old was left by a process that was killed
KEEP = 0.9  # of the limit, when blocks must go


class BlockCache:
    """Blocks and whole files by key, a hex digest. Any number of processes may use a folder, all of one user."""

    def __init__(self, folder: Path, limit: int, warn: Callable[[str], None], min_free: int = MIN_FREE_BYTES) -> None:
        """`limit` and `min_free` in bytes; `warn` takes a line about a disk that cannot be used."""
        self.folder, self.limit, self.min_free = folder, limit, min_free
        self._warn, self._warned = warn, False
        self._paused_until = 0.0
        self._counted = False  # the sum on disk may be from before a crash: each process counts once

    @property
    def writable(self) -> bool:
        """Whether blocks are being kept: False for a while after a write that failed."""
        return time.monotonic() >= self._paused_until

    def read(self, key: str, size: int, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of the block `key` of `size` bytes; None where it is not there, or not whole."""
        path = self.folder / f"{key}.block"
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            about = os.fstat(fd)
            chunks = -(-size // CHUNK)
            first, last = start // CHUNK, -(-stop // CHUNK)
            payload = os.pread(fd, min(last * CHUNK, size) - first * CHUNK, first * CHUNK)
            sums = os.pread(fd, 4 * (last - first), size + 4 * first)
            if about.st_size != size + 4 * chunks or _checksums(key, payload) != sums:
                self.drop(key)
                return None
            _touch(fd, about)
            return payload[start - first * CHUNK : stop - first * CHUNK]
        except OSError:
            return None
        finally:
            os.close(fd)

    def write(self, key: str, payload: bytes) -> None:
        """Keep a block, evicting the least recently used ones where there is no room."""
        sums = _checksums(key, payload)
        with self._new(f"{key}.block", len(payload) + len(sums)) as fd:
            if fd is not None:
                _write_all(fd, payload, 0)
                _write_all(fd, sums, len(payload))

    def whole(self, key: str, size: int) -> Path | None:
        """Path of the whole file `key`, None where it is not there."""
        path = self.folder / f"{key}.whole"
        with contextlib.suppress(OSError):
            about = path.stat()
            if about.st_size == size:
                _touch(path, about)
                return path
        return None

    def write_whole(self, key: str, payload: bytes) -> Path | None:
        """Keep a file and say where; None where it could not be kept."""
        with self._new(f"{key}.whole", len(payload)) as fd:
            if fd is not None:
                _write_all(fd, payload, 0)
                os.fsync(fd)  # it is mapped as it is, without checksums
        return self.whole(key, len(payload))

    def drop(self, key: str) -> None:
        """Forget a block."""
        with contextlib.suppress(OSError):
            (self.folder / f"{key}.block").unlink()

    @contextlib.contextmanager
    def _new(self, name: str, size: int) -> Iterator[int | None]:
        """A file descriptor to fill, whose file gets its name when it is filled; None where nothing may be kept."""
        temporary = ""
        try:
            fd, temporary = self._claim(size) if self.writable and size <= self.limit else (None, "")
        except OSError as error:
            fd = self._give_up(error)
        try:
            yield fd
            if fd is not None:
                with self._locked() as total:  # or a scan may come across it under both names, or neither
                    if total is not None:
                        os.replace(temporary, self.folder / name)
                        temporary = ""
        except OSError as error:  # of this disk: a fetch raises DataError
            self._give_up(error)
        finally:
            if fd is not None:
                os.close(fd)
            if temporary:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def _claim(self, size: int) -> tuple[int | None, str]:
        """An empty file that counts as `size` bytes from now on, and its path; None where others hold the lock."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        disk = os.statvfs(self.folder)
        if disk.f_bavail * disk.f_frsize < size + self.min_free:
            raise OSError(errno.ENOSPC, f"less than {self.min_free >> 20} MiB would stay free")
        with self._locked() as total:
            if total is None:
                return None, ""
            record = os.pread(total, 8, 0)
            used = struct.unpack("<q", record)[0] if len(record) == 8 else -1
            if not self._counted or used < 0 or used + size > self.limit:
                used = self._evict(size)
                self._counted = True
            fd, temporary = tempfile.mkstemp(".tmp", dir=self.folder)
            try:
                os.ftruncate(fd, size)  # so that a scan counts it before it is written
                os.pwrite(total, struct.pack("<q", used + size), 0)
            except OSError:
                os.close(fd)
                os.unlink(temporary)
                raise
            return fd, temporary

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int | None]:
        """The descriptor of the file that holds the sum, None where it stays locked by another process."""
        fd = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            give_up = time.monotonic() + LOCK_S
            locked = False
            while not locked and time.monotonic() < give_up:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    locked = True
                except BlockingIOError:
                    time.sleep(0.005)
            yield fd if locked else None
        finally:
            os.close(fd)  # which unlocks

    def _evict(self, size: int) -> int:
        """Count the bytes in the folder and, where `size` more would be too many, delete the oldest files."""
        files, used = [], 0
        stale = time.time() - STALE_S
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                about = entry.stat(follow_symlinks=False)
                if entry.name.endswith((".block", ".whole", ".tmp")):
                    used += about.st_size
                    if not entry.name.endswith(".tmp") or about.st_mtime < stale:
                        files.append((about.st_mtime_ns, about.st_size, entry.path))
        if used + size <= self.limit:
            return used
        for _, length, path in sorted(files):
            if used + size <= self.limit * KEEP:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= length
        if used + size > self.limit:
            raise OSError(errno.ENOSPC, "files in use fill the cache to its limit")
        return used

    def _give_up(self, error: OSError) -> None:
        self._paused_until = time.monotonic() + PAUSE_S
        if not self._warned:
            self._warned = True
            reason = error.strerror or type(error).__name__
            self._warn(f"data.store.cache: {self.folder}: not written ({reason}); going on, reading from afar")


def _checksums(key: str, payload: bytes) -> bytes:
    """crc32 of each chunk, seeded with the key: a file under another's name does not pass."""
    view, seed = memoryview(payload), int(key[:8], 16)
    sums = [zlib.crc32(view[at : at + CHUNK], seed) for at in range(0, len(payload), CHUNK)]
    return struct.pack(f"<{len(sums)}I", *sums)


def _write_all(fd: int, payload: bytes, at: int) -> None:
    view = memoryview(payload)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written


def _touch(file: int | Path, about: os.stat_result) -> None:
    if time.time() - about.st_mtime > TOUCH_S:
        with contextlib.suppress(OSError):  # a read-only cache still serves
            os.utime(file)
