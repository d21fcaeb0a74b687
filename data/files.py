"""Files that are either the old ones or wholly the new ones, whenever the machine stops."""

from __future__ import annotations

import os
from pathlib import Path

from data.errors import DataError


def check_writable(path: Path) -> None:
    """Try the first step of `write_atomically`. Raises DataError where it cannot be done, and changes nothing."""
    try:
        if not path.parent.is_dir():
            raise DataError(f"{path}: there is no folder {path.parent}")
        if path.is_dir():
            raise DataError(f"{path}: is a folder; name a file in it")
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is a device or a pipe; name a file")
        temporary = _beside(path)
        open(temporary, "wb").close()
        temporary.unlink()
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None


def write_atomically(path: Path, payload: bytes) -> None:
    """Write `payload` beside `path`, flush it to disk, then rename it over `path`."""
    temporary = _beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def publish(temporary: Path, path: Path) -> None:
    """Rename a file that is already on disk, and make the rename itself durable."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
