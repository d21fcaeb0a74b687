"""What evaluations decide: which checkpoint is the best, and whether a run has stopped getting better.

    evaluation --> Progress.update(step, {"heldout": {"wer": 0.1}}) --> best? ended? --> the checkpoint keeps both

Its state goes with the checkpoint, so a killed run that goes on decides as the one that was never killed.
Metrics are named SET.METRIC, a set of eval.sets and a number of its report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from train.config import EndConfig, EvalConfig, Recipe
from train.errors import RecipeError
from train.suites.registry import chosen_metric


@dataclass(frozen=True)
class Record:
    """The best value of a metric so far."""

    value: float | None = None
    step: int = 0
    stale: int = 0
    """Evaluations since then."""

    def after(self, value: float, step: int, higher: bool, min_delta: float = 0.0) -> Record:
        """With one more evaluation; a value that is not finite is never better."""
        better = self.value is None or (value - self.value if higher else self.value - value) > min_delta
        if better and math.isfinite(value):
            return Record(value, step)
        return replace(self, stale=self.stale + 1)


class Progress:
    """Follows the metrics that a recipe names (`eval.best`, `end.metric`)."""

    def __init__(self, config: EvalConfig, end: EndConfig, state: Mapping[str, Any] | None = None) -> None:
        """`state` is what `info` of an earlier Progress of the run has said."""
        self.config, self.end, self.metric = config, end, config.best
        state = state or {}
        self.best = Record(**state.get("best", {}))
        self.plateau = Record(**state.get("plateau", {}))
        self.phase = str(state.get("phase", ""))

    def update(self, step: int, phase: str, found: Mapping[str, Mapping[str, float]]) -> bool:
        """Take an evaluation's numbers; whether this step is the best so far. A phase has a plateau of its own."""
        if phase != self.phase:
            self.phase, self.plateau = phase, Record()
        before = self.best
        if self.metric:
            self.best = self.best.after(*self._value(self.metric, found, step))
        if self.end.metric:
            self.plateau = self.plateau.after(*self._value(self.end.metric, found, step), self.end.min_delta)
        return self.best.step != before.step

    @property
    def ended(self) -> bool:
        """Whether `end.patience` evaluations in a row were no better."""
        return bool(self.end.metric) and self.plateau.stale >= self.end.patience

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluation so far."""
        return self.best.step if self.best.value is not None else None

    def _value(self, choice: str, found: Mapping[str, Mapping[str, float]], step: int) -> tuple[float, int, bool]:
        name, metric, higher = chosen_metric(self.config, choice, "metric")
        if metric not in found.get(name, {}):
            has = ", ".join(found.get(name, {})) or "nothing"
            raise RecipeError(f"{choice}: the evaluation of set {name!r} has no {metric}; it has {has}")
        return found[name][metric], step, higher

    def info(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": asdict(self.best), "plateau": asdict(self.plateau), "phase": self.phase}


def check_progress(recipe: Recipe) -> None:
    """Raise RecipeError for a metric that no evaluation gives, and for an end that can never come."""
    for key, metric in (("eval.best", recipe.eval.best), ("end.metric", recipe.end.metric)):
        if metric:
            chosen_metric(recipe.eval, metric, key)
    if not recipe.end.metric:
        return
    end, last = recipe.end, [*recipe.phases.values()][-1]
    if end.patience < 1:
        raise RecipeError(f"end.patience={end.patience}: it must be at least 1")
    if end.min_delta < 0:
        raise RecipeError(f"end.min_delta={end.min_delta:g}: it must be 0 or more")
    if recipe.eval.every < 1:
        raise RecipeError(f"end.metric={end.metric} can never end the run: eval.every is 0; set it")
    if (last.steps - 1) // recipe.eval.every < end.patience + 1:  # the first value, then so many no better ones
        raise RecipeError(
            f"end.metric={end.metric} can never end the run: its last phase has {last.steps:,} steps, and "
            f"{end.patience + 1} evaluations, one every eval.every={recipe.eval.every:,} steps, take more"
        )
