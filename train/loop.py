"""The loop: every line is independent of engine, model and modality.

data of a step -> engine.train_step -> meters -> guard -> evaluation when due -> checkpoint when due
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
    """Train through a phase, or until the run is asked to stop; returns whether it was. Saves at the end either way.

    Where the guard decides to go back (`run.guard.back`) it returns early and saves nothing.
    """
    asked, end, first = time.monotonic(), min(span.stop, recipe.max_steps or span.stop), True
    run.heart.beat("data", span.start, slow=True)
    for step, microbatches in stream:
        waited = time.monotonic() - asked
        lr = lr_at(step, span.start, span.phase, recipe.optim)
        run.heart.begin(step + 1, microbatches, slow=first)  # the first step may compile
        stats = run.guard.step(engine, step, microbatches, lr, run.meters.look(step + 1))
        step += 1
        run.consumed(step, microbatches, stats.applied)
        run.meters.update(step, stats, microbatches, lr=lr, phase=span.name, wait=waited)
        run.report_skipped(microbatches)
        run.guard.note(run, step, stats, microbatches, waited)
        stopped, odd = ranks.votes(run.stop_requested, run.guard.odd)
        if odd and run.guard.act(run, engine, step):
            return stopped
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
        asked, first = time.monotonic(), False
        run.heart.beat("data", step + 1)
    return False
