"""How commands speak: what they print, whoever reads it, and how they end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from data.errors import DataError


def ended(command: Callable[[], None], interrupted: str, errors: tuple[type[Exception], ...] = ()) -> int:
    """Exit status of a command: 0, 2 after one line on what is wrong, 130 after the line `interrupted` on Ctrl-C.

    What a user can cure are DataError, OSError and `errors`; all else is a bug and raised.
    """
    try:
        command()
    except (DataError, OSError, *errors) as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename:
            text = f"{error.filename}: {error.strerror}"
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0


def say(text: str = "") -> None:
    """Print a text and its line's end at once; where the reader has left, as `head` does, it goes nowhere.

    So a command finishes what else it has to do, and ends as if all had been read. Letters that the terminal's encoding
    lacks become question marks.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)
    try:
        print(text, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # what is still in buffers goes there too, when Python ends
        os.close(nowhere)
