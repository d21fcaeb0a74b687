"""A file of JSON lines that is valid at every moment, also on a full disk.

    mapping --not finite: null--> one line --one write, appended--> file;  cut back to what it was where it does not fit

Cost: one system call a line. A line that cannot be written is left out whole and counted: training goes on without it,
and says so once until lines fit again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Appends lines; one process writes at a time."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        """Open the file, made where there is none. Raises OSError."""
        self.path, self._warn = path, warn
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.num_lost = 0

    def write(self, line: Mapping[str, Any]) -> bool:
        """Append one line; whether it is there now."""
        data = (json.dumps(plain(line), allow_nan=False) + "\n").encode()
        size = os.fstat(self._handle).st_size
        try:
            written = os.write(self._handle, data)
            if written == len(data):
                if self.num_lost:
                    self._warn(f"{self.path}: lines fit again; {self.num_lost} were left out")
                    self.num_lost = 0
                return True
            reason = "no space left"
        except OSError as error:
            reason = error.strerror or str(error)
        with contextlib.suppress(OSError):  # a part of a line must not stay; cutting needs no room
            os.ftruncate(self._handle, size)
        if not self.num_lost:
            self._warn(f"{self.path}: {reason}: lines are left out until there is room; training goes on")
        self.num_lost += 1
        return False

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._handle)


def plain(value: Any) -> Any:
    """The same with null for numbers that are not finite: JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value
