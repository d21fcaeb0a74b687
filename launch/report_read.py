"""A run's folder, or a curriculum's, as it lies on disk: nothing is changed, nothing is waited for.

    RUN/recipe.yaml, metrics.jsonl, checkpoints/, heartbeats/ --> Stage
    RUN/lineage.json --> its stages in their order, RUN/STAGE each  --> Run
    RUN/metrics.jsonl --> a Run of one stage

What a run does not have is empty. What is there and cannot be read is a note, not an error: the report is of the rest.

State of a stage: running while a writer of checkpoints holds its lock or a heartbeat is young; done at the last step of
its phases, or when the lineage says so; stopped when its last step is in a checkpoint; failed otherwise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data.errors import DataError
from launch.report_metrics import Metrics, number_of
from train.checkpoint import candidates
from train.checkpoint.format import MANIFEST, MAX_MANIFEST_BYTES, folder_step
from train.checkpoint.lock import PATTERN, is_held
from train.errors import RecipeError

METRICS, LINEAGE, RECIPE = "metrics.jsonl", "lineage.json", "recipe.yaml"
MAX_JSON, MAX_RECIPE = 64 << 20, 4 << 20  # bytes that are read of such a file
YOUNG_S = 120.0  # age of a heartbeat that shows a living process
STATES = ("waiting", "running", "stopped", "done", "failed")


@dataclass(frozen=True)
class Checkpoint:
    """A published one."""

    name: str
    step: int
    size: int  # bytes
    at: float  # unix seconds
    kinds: tuple[str, ...]
    """latest, best: what the files of these names say."""


@dataclass
class Stage:
    """A run folder of the ordinary shape."""

    name: str
    folder: Path
    recipe: dict[str, Any]
    recipe_text: str
    metrics: Metrics
    checkpoints: list[Checkpoint]  # oldest first
    manifest: dict[str, Any]  # of the newest; empty without one
    state: str
    total: int  # steps of all phases; 0 where unknown
    written: float  # unix seconds of the last line
    began: float  # of the last start
    offset: int = 0  # what is added to its steps where stages are drawn one after the other


@dataclass
class Run:
    """What one argument names: a run, or a curriculum of several."""

    name: str
    folder: Path
    stages: list[Stage]
    lineage: dict[str, Any] = field(default_factory=dict)  # of a curriculum
    notes: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """Of the whole: that of its most telling stage."""
        states = [entry["state"] for entry in self.lineage.get("stages", {}).values()]
        states = states or [stage.state for stage in self.stages]
        for state in ("running", "failed", "stopped"):
            if state in states:
                return state
        return states[0] if len(set(states)) == 1 else "stopped"


def open_run(folder: Path) -> Run:
    """Read what there is. Raises RecipeError where it is no run."""
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder; give the folder of a run")
    run = Run(folder.resolve().name, folder, [])
    if (folder / LINEAGE).is_file():
        run.lineage = _lineage(folder, run.notes)
    stages = [(name, _stage_folder(folder, name, entry)) for name, entry in run.lineage.get("stages", {}).items()]
    if not stages and not (folder / METRICS).is_file():
        raise RecipeError(
            f"{folder}: has neither {METRICS} nor {LINEAGE}; give the folder of a run that has written its first line"
        )
    for name, path in stages or [(run.name, folder)]:
        if path.is_dir() and (path / METRICS).is_file():
            run.stages.append(open_stage(name, path, run.notes))
    offset = 0
    for stage in run.stages:
        stage.offset, offset = offset, offset + stage.metrics.step
        if entry := run.lineage.get("stages", {}).get(stage.name):
            stage.state = entry["state"] = _agreed(stage.state, entry["state"])
    return run


def open_stage(name: str, folder: Path, notes: list[str]) -> Stage:
    """Read a run folder; what cannot be read is noted."""
    recipe, recipe_text = _recipe(folder / RECIPE, notes)
    metrics = Metrics.read(folder / METRICS)
    for count, what in (
        (metrics.num_damaged, "damaged lines, which are left out"),
        (metrics.num_nonfinite, "lines with a loss that is not finite, drawn as gaps"),
        (metrics.num_unnamed, "numbers of too many names, which are left out"),
    ):
        notes += [f"{folder / METRICS}: {count:,} {what}"] * (count > 0)
    checkpoints = list(_checkpoints(folder))
    manifest = {}
    if checkpoints:
        path = folder / "checkpoints" / checkpoints[-1].name / MANIFEST
        manifest = dictionary(read_json(path, notes, MAX_MANIFEST_BYTES))
    total = _total(recipe)
    state = _state(folder, metrics, checkpoints, total)
    written, began = _time(folder / METRICS), _time(folder / RECIPE)
    return Stage(name, folder, recipe, recipe_text, metrics, checkpoints, manifest, state, total, written, began)


def read_json(path: Path, notes: list[str], most: int = MAX_JSON) -> Any:
    """What a file says; None, and a note, where it cannot be read."""
    try:
        if path.stat().st_size > most:
            notes.append(f"{path}: left out: larger than {most >> 20} MB")
            return None
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path}: left out: {' '.join(str(error).split())}")
        return None


def dictionary(value: Any) -> dict[str, Any]:
    """The value where it is one, else an empty one: files of others may hold anything."""
    return value if isinstance(value, dict) else {}


def _recipe(path: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    """Plain, unchecked, since runs of earlier versions have other settings; and as it is written."""
    written = ""
    try:
        if path.stat().st_size > MAX_RECIPE:
            raise DataError(f"larger than {MAX_RECIPE >> 20} MB")
        written = path.read_text(encoding="utf-8", errors="replace")
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        return {}, ""
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError, DataError) as error:
        notes.append(f"{path}: cannot be read as settings: {' '.join(str(error).split())}")
        return {}, written
    return {str(key): value for key, value in dictionary(found).items()}, written


def _lineage(folder: Path, notes: list[str]) -> dict[str, Any]:
    found = dictionary(read_json(folder / LINEAGE, notes))
    stages = {}
    for name, entry in dictionary(found.get("stages")).items():
        if isinstance(entry, dict) and Path(name).name == name:
            state = entry.get("state") if entry.get("state") in STATES else "waiting"
            said = entry.get("after")
            after = [each for each in said if isinstance(each, str)] if isinstance(said, list) else []
            stages[name] = {**entry, "state": state, "after": after}
        else:
            notes.append(f"{folder / LINEAGE}: stage {name!r} cannot be read and is left out")
    return {**found, "stages": _in_order(stages)}


def _in_order(stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Predecessors first, otherwise as written. A cycle, which no runner writes, stays as it is."""
    done: dict[str, dict[str, Any]] = {}
    while len(done) < len(stages):
        ready = [
            name for name in stages if name not in done and all(a in done for a in stages[name]["after"] if a in stages)
        ]
        for name in ready[:1] or [next(name for name in stages if name not in done)]:
            done[name] = stages[name]
    return done


def _stage_folder(folder: Path, name: str, entry: dict[str, Any]) -> Path:
    """Beside the lineage, where a run that was moved has it; else where the lineage says."""
    inside, said = folder / name, entry.get("run")
    return inside if inside.is_dir() or not isinstance(said, str) else Path(said)


def _checkpoints(folder: Path) -> Iterator[Checkpoint]:
    named = [(kind, folder / "checkpoints" / kind) for kind in ("latest", "best")]
    try:
        said = {kind: path.read_text(errors="replace").strip() for kind, path in named if path.is_file()}
        found = candidates(folder)
    except OSError:
        return
    for path in reversed(found):
        try:
            size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
            kinds = tuple(kind for kind, name in said.items() if name == path.name)
            yield Checkpoint(path.name, folder_step(path.name) or 0, size, path.stat().st_mtime, kinds)
        except OSError:  # being deleted by a running run
            continue


def _total(recipe: dict[str, Any]) -> int:
    phases = dictionary(recipe.get("phases")).values()
    total = sum(int(number_of(dictionary(phase).get("steps")) or 0) for phase in phases)
    return min(total, int(number_of(recipe.get("max_steps")) or 0) or total)


def _state(folder: Path, metrics: Metrics, checkpoints: Sequence[Checkpoint], total: int) -> str:
    locks = (folder / "checkpoints").glob(PATTERN)
    if any(map(_held, locks)) or (metrics.step < total and _beats(folder)):
        return "running"
    if total and metrics.step >= total:
        return "done"
    return "stopped" if checkpoints and checkpoints[-1].step >= metrics.step else "failed"


def _held(path: Path) -> bool:
    try:
        return is_held(path)
    except OSError:  # no flock there, or somebody else's file
        return False


def _beats(folder: Path) -> bool:
    ages = (
        time.time() - (number_of(dictionary(read_json(p, [])).get("at")) or 0) for p in folder.glob("heartbeats/*.json")
    )
    return any(age < YOUNG_S for age in ages)


def _agreed(seen: str, said: str) -> str:
    """State by the folder and by the lineage, which knows of ends by other rules but not of a sudden death."""
    if seen == "running" or said == "done":
        return seen if seen == "running" else "done"
    return said if said in ("stopped", "failed") else seen


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
