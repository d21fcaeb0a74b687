"""KEY=VALUE arguments of the small commands, and their end: one line and exit status 2 for a user's error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

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


def guarded(command: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Run a command; 0, or 2 after one line on what is wrong."""
    try:
        command(argv)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        ranks.stop()
    return 0
