"""What became of a curriculum's stages: RUN/lineage.json, and what may not change in it.

    stage ends --> Entry: state, run folder, what it started from, checkpoint, engine, times --> lineage.json

A stage that is done stays as it was trained: other settings, or another ancestor, are refused with the difference.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from train.checkpoint import best_of, candidates
from train.config import Recipe
from train.errors import CheckpointError, RecipeError
from train.recipe import as_yaml

FILE = "lineage.json"
# How a stage runs, not what comes out of it: these may change after it is done.
HARMLESS = ("run", "resume", "engine", "log", "save", "guard", "eval.batch_tokens", "data.workers", "data.prefetch")
MOST_SHOWN = 6  # differences in one line


@dataclass(frozen=True)
class Entry:
    """One stage."""

    state: str
    """waiting, running, stopped or done."""
    after: list[str]
    run: str
    recipe: str
    """Path of the resolved recipe."""
    init: list[str] = field(default_factory=list)
    ancestors: dict[str, str] = field(default_factory=dict)
    """Stage -> the checkpoint that was taken from it: its name and the first digits of its manifest's SHA-256."""
    checkpoint: str | None = None
    step: int = 0
    tokens: int = 0
    """That the model saw, by the run's log."""
    engine: str = "local"
    world: int = 1
    began: str | None = None
    ended: str | None = None


def read(folder: Path) -> dict[str, Entry]:
    """Stage -> entry; empty before the first stage began. Raises RecipeError for a file that is damaged."""
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        return {str(name): Entry(**entry) for name, entry in stages.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{path}: damaged ({error}); remove it, and the stages are looked at anew") from None


def write(folder: Path, name: str, entries: Mapping[str, Entry]) -> None:
    """Publish the file whole."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{FILE}.part"
    body = {"name": name, "stages": {stage: asdict(entry) for stage, entry in entries.items()}}
    temporary.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / FILE)


def checkpoint_of(folder: Path, hand_on: str) -> Path | None:
    """The checkpoint that a stage hands on: its latest, None where it has none, or its best.

    Raises CheckpointError for a stage that is to hand on its best and has none.
    """
    found = candidates(folder)
    if found and hand_on == "best":
        return best_of(folder)
    return found[0] if found else None


def mark(checkpoint: Path) -> str:
    """Name of a checkpoint and digits of its manifest's SHA-256: whether it is still the same one."""
    try:
        digest = (checkpoint / "manifest.sha256").read_bytes()[:64]
    except OSError as error:
        raise CheckpointError(f"{checkpoint}: {error.strerror or error}") from None
    return f"{checkpoint.name}:{hashlib.sha256(digest).hexdigest()[:16]}"


def check_done(stage: str, entry: Entry, recipe: Recipe, ancestors: Mapping[str, str]) -> None:
    """Raise RecipeError where a stage that is done was trained with other settings, or from other ancestors."""
    check_ancestors(stage, entry, ancestors)
    path = Path(entry.recipe)
    try:
        was = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    now = OmegaConf.to_container(OmegaConf.create(as_yaml(recipe)))
    assert isinstance(was, dict) and isinstance(now, dict)
    was["init"] = ",".join(_run_of(place) for place in entry.init) or None  # as the curriculum says it
    if changes := [*differences(was, now)]:
        more = f"; and {len(changes) - MOST_SHOWN} more" if len(changes) > MOST_SHOWN else ""
        raise RecipeError(
            f"stage {stage} is done, and was trained with other settings: {'; '.join(changes[:MOST_SHOWN])}{more}. "
            f"Take them back, or remove {entry.run} to train it again"
        )


def check_ancestors(stage: str, entry: Entry, ancestors: Mapping[str, str]) -> None:
    """Raise RecipeError where a stage that has begun took other checkpoints than there are now."""
    for name, taken in entry.ancestors.items():
        if name in ancestors and ancestors[name] != taken:
            raise RecipeError(
                f"stage {stage} has begun from another {name}, which was trained again since; remove {entry.run} to "
                f"train {stage} again"
            )


def differences(was: Any, now: Any, prefix: str = "") -> Iterator[str]:
    """`key: old -> new` of what differs and decides the result."""
    if prefix.rstrip(".") in HARMLESS:
        return
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in sorted({*was, *now}, key=str):
            yield from differences(was.get(key), now.get(key), f"{prefix}{key}.")
    elif was != now:
        yield f"{prefix.rstrip('.')}: {_short(was)} -> {_short(now)}"


def _run_of(place: str) -> str:
    """The run of a checkpoint that a curriculum has taken; other places as they are."""
    path = Path(place)
    return str(path.parent.parent) if path.parent.name == "checkpoints" else place


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
