"""The loop: every line is independent of engine, model and modality.

data of a step -> engine.train_step -> meters -> evaluation when due -> checkpoint when due
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from data.types import Batch
from train import ranks
from train.config import Recipe
from train.engines import Engine
from train.errors import EngineError
from train.optim import lr_at
from train.recipe import Span
from train.run import Run


def fit(engine: Engine, stream: Iterable[tuple[int, Sequence[Batch]]], span: Span, recipe: Recipe, run: Run) -> bool:
    """Train through a phase, or until the run is asked to stop; returns whether it was. Saves at the end either way."""
    asked, end = time.monotonic(), min(span.stop, recipe.max_steps or span.stop)
    for step, microbatches in stream:
        waited = time.monotonic() - asked
        lr = lr_at(step, span.start, span.phase, recipe.optim)
        stats = engine.train_step(microbatches, lr, run.meters.look(step + 1))
        step += 1
        run.consumed(step, microbatches)
        run.meters.update(step, stats, microbatches, lr=lr, phase=span.name, wait=waited)
        run.report_skipped(microbatches)
        stopped = ranks.agree(run.stop_requested)
        last = step == end
        best = run.is_due(recipe.eval.every, step) and not (stopped or last) and run.evaluate(engine, step)
        too_many_bad = run.meters.num_skipped > recipe.data.max_bad_samples
        if run.is_due(recipe.save.every, step) or stopped or last or best or run.ended or too_many_bad:
            run.save(engine, step)
        if too_many_bad:
            raise EngineError(
                f"{run.meters.num_skipped} samples could not be read, more than data.max_bad_samples="
                f"{recipe.data.max_bad_samples}; the lines above name them. Repair the shards or raise the limit"
            )
        if stopped or run.ended:
            return stopped
        asked = time.monotonic()
    return False
