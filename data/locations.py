"""Where shards may lie, as strings: a local path, http://, https:// or s3://, nothing else.

    "s3://bucket/x-{000..099}.tar" --check, braces--> 100 locations      "s3://bucket/x-*.tar" --list--> sorted

A location never carries a secret, so it may stand in recipes, logs and messages.  Nothing is opened here.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Callable, Sequence

from data.errors import DataError

REMOTE = ("http://", "https://", "s3://")
MAX_LOCATIONS = 1_000_000

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Missing(DataError):
    """Nothing lies at a location."""


def is_remote(location: str) -> bool:
    """Whether `location` is an address rather than a local path."""
    return location.startswith(REMOTE)


def server(location: str) -> str:
    """The part of a remote location that names a server or a bucket: "https://host:port" or "s3://bucket"."""
    scheme, _, rest = location.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def expand(patterns: Sequence[str], list_remote: Callable[[str], Sequence[str]]) -> list[str]:
    """Locations that paths, addresses, brace ranges and globs name, in the order given, those of a glob sorted.

    `list_remote` lists what an s3:// glob matches.  Raises DataError, naming the entry, where it is of another kind,
    matches nothing, or names a location twice.
    """
    found: list[str] = []
    for pattern in map(str, patterns):
        _check(pattern)
        for text in _expand_braces(pattern):
            found += _expand_glob(text, list_remote)
            if len(found) > MAX_LOCATIONS:
                raise DataError(f'data.shards: "{pattern}" names more than {MAX_LOCATIONS} shards')
    if not found:
        raise DataError("data.shards is empty: name at least one shard")
    seen = set()
    for location in found:
        real = location if is_remote(location) else os.path.realpath(location)
        if real in seen:
            raise DataError(f"data.shards: {location} is listed twice")
        seen.add(real)
    return found


def _check(text: str) -> None:
    """Refuse commands, other schemes, secrets in an address, and what no server can serve."""
    scheme, separator, rest = text.partition("://")
    authority, _, path = rest.partition("/")
    if separator and "@" in authority:
        raise DataError(
            f'data.shards: "{scheme}://***@{authority.rpartition("@")[2]}/{path.partition("?")[0]}": no user name or '
            "password in an address; http reads ~/.netrc, s3 the usual AWS settings"
        )
    if scheme in ("http", "https") and ("?" in rest or "#" in rest):
        bare = re.split(r"[?#]", text)[0]
        raise DataError(
            f'data.shards: "{bare}?***": no queries in an address: they may be secret, and the index would need its '
            "own; use s3:// with the usual AWS settings, or http with ~/.netrc"
        )
    remote = is_remote(text)
    if (separator and not remote) or text.startswith(("pipe:", "|", "-")) or not text.isprintable() or not text:
        raise DataError(
            f"data.shards: {_quoted(text)} is neither a path nor an http, https or s3 address; "
            "other addresses and commands are not read"
        )
    if remote and (not authority or not path or path.endswith("/")):
        raise DataError(f'data.shards: "{text}" names no file; needed is {scheme}://SERVER_OR_BUCKET/PATH')
    if remote and re.search(r"[*?\[\]{}]", authority):
        raise DataError(f'data.shards: "{text}": the server or bucket must be written out')


def _quoted(text: str) -> str:
    return f'"{text}"' if text.isprintable() else repr(text)


def _expand_braces(text: str) -> list[str]:
    """The texts that {first..last} and {one,two} stand for; a local file whose name has braces stands for itself."""
    if "{" not in text or (not is_remote(text) and os.path.exists(text)):
        return [text]
    parts = _BRACES.split(text)  # text, inside of braces, text, inside, ..., text
    choices = [[part] if i % 2 == 0 else _choices(text, part) for i, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MAX_LOCATIONS:
        raise DataError(f'data.shards: "{text}" names more than {MAX_LOCATIONS} shards')
    return ["".join(choice) for choice in itertools.product(*choices)]


def _choices(text: str, inside: str) -> Sequence[str]:
    match = _RANGE.fullmatch(inside)
    if not match:
        if "," not in inside:
            raise DataError(f'data.shards: "{text}": {{{inside}}} is neither {{first..last}} nor {{one,two}}')
        return inside.split(",")
    first, last = match.groups()
    if max(len(first), len(last)) > 12 or not 0 <= int(last) - int(first) < MAX_LOCATIONS:
        raise DataError(f'data.shards: "{text}": {{{inside}}} must count up, by at most {MAX_LOCATIONS}')
    width = max(len(first), len(last)) if first.startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def _expand_glob(text: str, list_remote: Callable[[str], Sequence[str]]) -> Sequence[str]:
    if text.startswith(("http://", "https://")):
        if glob.has_magic(text.partition("://")[2].partition("/")[2]):  # [::1] as a server is none
            raise DataError(f'data.shards: "{text}": http cannot list files; write a range such as x-{{000..099}}.tar')
        return [text]
    if not is_remote(text) and os.path.isdir(text):
        inside = os.path.join(text, "*.tar")
        raise DataError(f'data.shards: "{text}" is a folder; name its shards, for instance "{inside}"')
    if not glob.has_magic(text) or (not is_remote(text) and os.path.exists(text)):
        return [text]
    found = sorted(list_remote(text) if is_remote(text) else glob.glob(text, recursive=True))
    if not found:
        raise DataError(f'data.shards: no file matches "{text}"')
    return found
