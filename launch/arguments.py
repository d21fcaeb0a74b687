"""Arguments of the small commands, KEY=VALUE, their help, and their end: one line and status 2 for a user's error."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from train import ranks
from train.errors import RecipeError
from train.main import USER_ERRORS
from train.typed import nearest


def parse(argv: Sequence[str], known: Mapping[str, str | None]) -> tuple[dict[str, str], list[str]]:
    """Values of the `known` keys (default None: it must be given) and the other words. Raises RecipeError."""
    values = {key: default for key, default in known.items() if default is not None}
    rest = []
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals:
            raise RecipeError(f"cannot read {word!r}: arguments are KEY=VALUE, with {', '.join(known)}")
        if key in known:
            values[key] = value
        elif "." in key:
            rest.append(word)
        else:
            raise RecipeError(f"unknown argument {key!r}{nearest(key, list(known))}")
    missing = [key for key in known if key not in values]
    if missing:
        raise RecipeError(f"give {missing[0]}=...")
    return values, rest


def number(given: Mapping[str, str], key: str, least: float, most: float) -> float:
    """A value as a number within bounds. Raises RecipeError."""
    try:
        value = float(given[key])
    except ValueError:
        raise RecipeError(f"{key} must be a number, not {given[key]!r}") from None
    if not least <= value <= most:  # no NaN either
        raise RecipeError(f"{key} must be from {least:g} to {most:g}, not {given[key]}")
    return value


def whole(given: Mapping[str, str], key: str, least: int, most: int) -> int:
    """A value as a whole number within bounds. Raises RecipeError."""
    try:
        value = int(given[key])
    except ValueError:
        raise RecipeError(f"{key} must be a whole number, not {given[key]!r}") from None
    if not least <= value <= most:
        raise RecipeError(f"{key} must be from {least} to {most}, not {value}")
    return value


def guarded(command: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Run a command; 0, or 2 after one line on what is wrong. `-h` or `--help` prints the docstring of its module.

    SIGTERM raises SystemExit(143) in it, so that what it has begun is cleaned up.
    """
    if {"-h", "--help"} & set(argv):
        print((sys.modules[command.__module__].__doc__ or "").strip())
        return 0
    try:
        with _sigterm_exits():
            command(argv)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        ranks.stop()
    return 0


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers nowhere else
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
