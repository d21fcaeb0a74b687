"""Suites by name, and the choice of a metric: `SET.METRIC`, refused before training where there is none.

eval.sets, eval.suite --suite_of--> Suite --metrics_of--> names, and whether higher is better
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from train.config import EvalConfig, shards_of
from train.errors import RecipeError
from train.suites import Suite, asr, caption, likelihood, long_qa, qa, text, vqa
from train.typed import nearest

_ALL: tuple[Suite, ...] = (asr, vqa, caption, qa, long_qa, likelihood, text)
SUITES: Mapping[str, Suite] = {suite.NAME: suite for suite in _ALL}


def suite_named(name: str, where: str = "suite") -> Suite:
    """A suite. Raises RecipeError with the nearest name; `where` is the setting."""
    if name not in SUITES:
        raise RecipeError(f"{where}={name}{nearest(name, [*SUITES])}; there is only {', '.join(SUITES)}")
    return SUITES[name]


def suite_of(config: EvalConfig, name: str) -> Suite:
    """The suite of a set: its own, or `eval.suite`. Raises RecipeError for one that there is not."""
    entry = config.sets.get(name, [])
    if isinstance(entry, list) or not entry.suite:
        return suite_named(config.suite, "eval.suite")
    return suite_named(entry.suite, f"eval.sets.{name}.suite")


def metrics_of(config: EvalConfig, name: str) -> dict[str, bool]:
    """Metrics that a set may have, and whether higher is better; `loss` is of its documents, where it has some."""
    return {**suite_of(config, name).METRICS, "loss": False}


def check_sets(config: EvalConfig) -> None:
    """Raise RecipeError for a suite that there is not, and for a set without shards."""
    suite_named(config.suite, "eval.suite")
    for name, entry in config.sets.items():
        suite_of(config, name)
        if not shards_of(entry):
            raise RecipeError(f"eval.sets.{name} names no shards: give eval.sets.{name}=[PATTERN]")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise RecipeError(f"eval.sets: {name!r} names files: take letters, digits, - and _")


def chosen_metric(config: EvalConfig, choice: str, where: str) -> tuple[str, str, bool]:
    """Set, metric and whether higher is better, of a choice `SET.METRIC`. Raises RecipeError with the nearest name."""
    known = {f"{name}.{metric}": higher for name in config.sets for metric, higher in metrics_of(config, name).items()}
    if not known:
        raise RecipeError(f"{where}={choice}: there are no eval.sets to choose by")
    if choice not in known:
        raise RecipeError(f"{where}={choice}{nearest(choice, [*known])}; it is one of {', '.join(known)}")
    name, _, metric = choice.rpartition(".")
    return name, metric, known[choice]
