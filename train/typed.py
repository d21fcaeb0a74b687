"""Plain values to frozen dataclasses, with every type checked.

    {"optim": {"lr": "1e-3"}}  --build(Recipe, ...)-->  Recipe(optim=OptimConfig(lr=0.001))

OmegaConf composes and interpolates, but it takes a frozen dataclass for a read-only node, and its messages speak of
nodes; this names the setting and the nearest valid one. It knows what recipes need: dataclasses, dict, list, tuple,
optional and plain types.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from train.errors import RecipeError

MISSING = "???"


def build(cls: type, value: Any, path: str = "") -> Any:
    """An instance of `cls` from plain values. Raises RecipeError naming the setting."""
    if not isinstance(value, Mapping):
        raise RecipeError(f"{path.rstrip('.') or 'the recipe'}: expected settings, got {value!r}")
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for key in value:
        if key not in fields:
            raise RecipeError(f"unknown setting {path}{key!s}{nearest(str(key), list(fields))}")
    arguments = {}
    for name, item in fields.items():
        if name in value and value[name] == MISSING:
            raise RecipeError(f"{path}{name} is not set: give {path}{name}=VALUE")
        if name in value:
            arguments[name] = _convert(hints[name], value[name], path + name)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{path}{name} is not set: give {path}{name}=VALUE")
    try:
        return cls(**arguments)
    except ValueError as error:  # what the dataclass itself checks
        raise RecipeError(f"{path.rstrip('.') or 'recipe'}: {error}") from None


def paths(cls: type, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every dotted setting, and whether keys below it are free (a dictionary)."""
    for name, hint in typing.get_type_hints(cls).items():
        if type(None) in typing.get_args(hint):
            (hint,) = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        yield prefix + name, typing.get_origin(hint) is dict
        if dataclasses.is_dataclass(hint):
            yield from paths(typing.cast(type, hint), f"{prefix}{name}.")


def nearest(name: str, known: Sequence[str]) -> str:
    """`, did you mean 'x'?`, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:  # a right last part below a wrong parent
        close = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:1]
    return f", did you mean {close[0]!r}?" if close else ""


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        kinds = [kind for kind in inner if kind is not type(None)]
        if len(kinds) > 1:  # settings, or their short form
            kinds = [kind for kind in kinds if dataclasses.is_dataclass(kind) == isinstance(value, Mapping)]
        return _convert(kinds[0], value, path)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, f"{path}.")
    if origin is dict:
        if not isinstance(value, Mapping):
            raise RecipeError(f"{path}: expected NAME: VALUE pairs, got {value!r}")
        return {str(key): _convert(inner[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin in (list, tuple):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise RecipeError(f"{path}: expected a list such as [a,b], got {value!r}")
        return origin(_convert(inner[0], item, f"{path}[{place}]") for place, item in enumerate(value))
    return _plain(hint, value, path)


def _plain(kind: type, value: Any, path: str) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
        return int(value)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except ValueError:
            pass
    if kind is str and value is False:
        return "off"  # YAML reads off as false, and log.view, log.wandb and phases.X.speech have it
    if kind is str and isinstance(value, str | int | float):
        return str(value)
    raise RecipeError(f"{path}: expected {_NAMES[kind]}, got {value!r}")


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
