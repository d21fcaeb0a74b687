"""The loop's decisions, with an engine that only counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from data.types import Batch
from train.engines import Shard, StepStats
from train.guard import Guard
from train.loop import fit
from train.recipe import load_recipe, spans

RECIPE = load_recipe(
    ["recipe=transcribe", "phases={a: {steps: 4}, b: {steps: 6, lr: 0.5, warmup_steps: 0}}", "save.every=3"]
)


class Engine:
    shard, is_main = Shard(0, 1), True

    def __init__(self, skipped: int = 0) -> None:
        self.rates: list[float] = []
        self.skipped = skipped

    def train_step(self, microbatches, lr, look):
        assert look == "look"
        self.rates.append(lr)
        return StepStats(1.0, {"text": 1.0}, 1.0, 1.0, 1, 1, self.skipped, {"router.expert_share": torch.ones(1, 1)})


class Run:
    """Notes what the loop asks for."""

    def __init__(self, stop_at: int = 0, best_at: int = 0, ends_at: int = 0) -> None:
        self.meters, self.saved, self.evaluated, self.stop_at = self, [], [], stop_at
        self.best_at, self.ends_at = best_at, ends_at
        self.num_skipped, self.step = 0, 0
        self.guard = Guard(RECIPE.guard, spans(RECIPE)[0], torch.device("cpu"))
        self.heart = self

    def beat(self, part, step=None, *, slow=None) -> None:
        pass

    def begin(self, step, microbatches, slow) -> None:
        pass

    @property
    def ended(self) -> bool:
        return self.step == self.ends_at > 0

    @property
    def stop_requested(self) -> bool:
        return self.step == self.stop_at

    def look(self, step) -> str:
        return "look"

    def consumed(self, step, microbatches, applied) -> None:
        self.step = step

    def update(self, step, stats, microbatches, *, lr, phase, wait) -> None:
        self.num_skipped += stats.num_skipped

    def report_skipped(self, microbatches) -> None:
        pass

    @staticmethod
    def is_due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def save(self, engine, step) -> None:
        self.saved.append(step)

    def evaluate(self, engine, step) -> bool:
        self.evaluated.append(step)
        return step == self.best_at


def batches(start: int, stop: int):
    return ((step, [Batch.empty(128)]) for step in range(start, stop))


def test_phases_follow_each_other() -> None:
    first, second = spans(RECIPE)
    assert (first.start, first.stop, second.start, second.stop) == (0, 4, 4, 10)
    engine, run = Engine(), Run()
    assert fit(engine, batches(4, 10), second, RECIPE, run) is False  # type: ignore[arg-type]
    assert engine.rates[0] == 0.5 and run.saved == [6, 9, 10]


def test_a_stop_saves_and_says_so() -> None:
    engine, run = Engine(), Run(stop_at=2)
    assert fit(engine, batches(0, 4), spans(RECIPE)[0], RECIPE, run) is True  # type: ignore[arg-type]
    assert len(engine.rates) == 2 and run.saved == [2]


def test_evaluation_at_a_cadence_but_not_twice_at_the_end() -> None:
    recipe = dataclasses.replace(RECIPE, eval=dataclasses.replace(RECIPE.eval, every=2))
    run = Run()
    fit(Engine(), batches(0, 4), spans(recipe)[0], recipe, run)  # type: ignore[arg-type]
    assert run.evaluated == [2]


def test_the_best_step_is_saved_and_a_run_that_has_ended_stops() -> None:
    recipe = dataclasses.replace(RECIPE, eval=dataclasses.replace(RECIPE.eval, every=5))
    engine, run = Engine(), Run(best_at=5, ends_at=8)
    assert fit(engine, batches(4, 10), spans(recipe)[1], recipe, run) is False  # type: ignore[arg-type]
    assert run.saved == [5, 6, 8] and len(engine.rates) == 4


def test_too_many_bad_samples_save_then_stop() -> None:
    recipe = dataclasses.replace(RECIPE, data=dataclasses.replace(RECIPE.data, max_bad_samples=3))
    run = Run()
    with pytest.raises(ValueError, match="4 samples could not be read, more than data.max_bad_samples=3"):
        fit(Engine(skipped=2), batches(0, 4), spans(recipe)[0], recipe, run)  # type: ignore[arg-type]
    assert run.saved == [2]
