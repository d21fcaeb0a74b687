"""The whole program: recipe -> data -> for each phase: engine, state, loop -> curves.

    python train.py recipe=demo [KEY=VALUE ...]
    python train.py recipe=curriculum [from=STAGE] [to=STAGE] [STAGE.KEY=VALUE ...]
    torchrun --nproc-per-node 8 train.py recipe=stage2 engine=deepspeed engine.ep=8

A run's state is the number of its next step: the phase, the learning rate and the order of the data follow from it. A
phase has its own trainable parameters and so its own engine; between phases the weights pass through the checkpoint.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.errors import DataError
from data.loader import stream
from data.tokenizer import load_tokenizer
from models.config import ConfigError
from models.omni_config import OmniConfig
from train import ranks
from train.checkpoint import Manifest, choose
from train.config import Recipe
from train.curriculum import is_curriculum, load_curriculum
from train.engines.build import build_engine
from train.errors import CheckpointError, EngineError, RecipeError
from train.evaluate import Evaluator
from train.feed import Feed, open_evaluator, open_feed
from train.finetune import keep_files
from train.guard import Back
from train.heartbeat import Heart
from train.hidden import cached_course
from train.journey import travel
from train.loop import fit
from train.metrics import draw_curves
from train.opening import (
    engine_setup,
    model_config,
    open_guard,
    open_heart,
    open_run,
    stored_state,
    updates_before,
)
from train.parallel import Model
from train.progress import Progress
from train.recipe import Span, load_recipe, spans
from train.run import Position, Run

USER_ERRORS = (RecipeError, DataError, ConfigError, CheckpointError, EngineError)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def main(argv: Sequence[str], stopped: int = 0) -> int:
    """Run a recipe; 0 when it ended, 2 for an error that the user can cure.

    `stopped` when it was stopped as asked, by Ctrl-C or SIGTERM: commands that go on after training ask for another.
    """
    try:
        done = travel(load_curriculum(argv), train) if is_curriculum(argv) else train(load_recipe(argv))
        return 0 if done else stopped
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"error: {error.filename or 'a file of the run'}: {error.strerror}; the last checkpoint is whole: make "
              "room, and the same command goes on", file=sys.stderr)  # fmt: skip
        return 2
    except KeyboardInterrupt:
        print("left at once; the last checkpoint is whole", file=sys.stderr)
        return 130
    finally:
        ranks.stop()


def train(recipe: Recipe) -> bool:
    """Run every phase that is not done yet; False where it was stopped as asked. Raises this project's errors."""
    device = ranks.choose_device(recipe.engine.device)
    ranks.start(device, recipe.guard.patience_s)
    tokenizer = load_tokenizer(Path(recipe.data.tokenizer))
    model = model_config(recipe, tokenizer)
    feed = open_feed(recipe, tokenizer, model)
    evaluator = open_evaluator(recipe, tokenizer, model)
    folder = Run.open_folder(recipe)
    recipe = keep_files(recipe)
    tell = tqdm.write if ranks.rank() == 0 else _silent
    with closing(open_heart(recipe, folder)) as heart:
        return run_phases(Session(recipe, model, feed, evaluator, folder, device, heart, tell))


@dataclass(frozen=True)
class Session:
    """What all phases of a run share."""

    recipe: Recipe
    model: Model
    feed: Feed
    evaluator: Evaluator
    folder: Path
    device: torch.device
    heart: Heart
    tell: Callable[[str], None]

    @property
    def total(self) -> int:
        """The step after which the run is over, or stops."""
        end = spans(self.recipe)[-1].stop
        return min(end, self.recipe.max_steps or end)


def run_phases(session: Session) -> bool:
    """Run what is not done yet, phase by phase; False where it was stopped as asked."""
    recipe, folder, tell = session.recipe, session.folder, session.tell
    tell(f"run folder: {folder}")
    phases = spans(recipe)
    resume, stopped, back, todo = recipe.resume, False, None, list(phases)
    world: dict[str, Any] = {"agree": ranks.agree, "rank": ranks.rank(), "world": ranks.world()}
    while todo:
        span = todo.pop(0)
        session.heart.beat("start", slow=True)
        beginning = back is not None and back.checkpoint is None  # it goes back to where there is no checkpoint
        manifest = None if beginning else choose(folder, resume, **world, warn=tell)
        step, stop = manifest.step if manifest else 0, min(span.stop, session.total)
        progress = Progress(recipe.eval, recipe.end, manifest.info.get("progress") if manifest else None)
        unheard = step == session.total and span is phases[-1] and is_unevaluated(session, step)
        if (step >= stop and not unheard) or (progress.ended and span is phases[-1]):
            tell(f"phase {span.name}: done at step {step}")
            continue
        stopped, ended, back = run_phase(session, span, manifest, progress, back)
        ranks.barrier()  # the checkpoint is published before any rank looks for it
        if stopped or (back is None and (stop == session.total or ended)):
            break
        resume = "latest"
        if back is not None:
            todo.insert(0, span)
            resume = str(back.checkpoint)
    if ranks.rank() == 0:
        farewell(folder, stopped)
    return not stopped


def is_unevaluated(session: Session, step: int) -> bool:
    """Whether a run that is at its end was killed before it had evaluated. Collective."""
    names = (f"{name}-step{step:08d}.json" for name in session.recipe.eval.sets)
    return ranks.agree(any(not (session.folder / "eval" / name).is_file() for name in names))


def run_phase(
    session: Session, span: Span, manifest: Manifest | None, progress: Progress, back: Back | None
) -> tuple[bool, bool, Back | None]:
    """Train through a phase: whether it was stopped, whether its metric ended it, and where it goes back to."""
    recipe, model, feed, tell = session.recipe, session.model, session.feed, session.tell
    course, step, stop = feed.courses[span.name], manifest.step if manifest else 0, min(span.stop, session.total)
    if manifest is None:
        feed.require(session.total)
    else:
        feed.seek(step, manifest.info.get("data", {}))
    if span.phase.speech == "cached":
        assert isinstance(model, OmniConfig), "recipes check that who speaks has a talker"
        course = cached_course(course, recipe, span, model, manifest)
    for line in course.about():
        tell(line)
    setup = replace(engine_setup(recipe, model, span, session.device), beat=session.heart.beat)
    state = stored_state(recipe, setup, manifest)  # that of another model is refused before ours is made
    engine = build_engine(setup)
    updates = 0 if state is None else updates_before(recipe, span, manifest, state)
    if state is not None:
        engine.restore(state, optimizer_step=updates)
    if manifest is not None:
        tell(f"resumed at step {step} from {manifest.folder}")
    guard = open_guard(recipe, setup, span, manifest, back, engine.shard)
    at = Position(step, updates, span.name, final=span == spans(recipe)[-1])
    reads = session.evaluator, feed, course, engine.shard
    run = open_run(recipe, session.folder, setup, span, manifest, *reads, progress, at, guard, session.heart)
    if back is not None:
        run.event(step, "rewind", back.text, **back.more)
    run.listen()
    with closing(run), closing(engine):
        batches = stream(
            course.plan,
            course.reader,
            engine.shard,
            step,
            stop,
            recipe.data.workers,
            origin=course.origin,
            prefetch=recipe.data.prefetch,
            pin_memory=session.device.type == "cuda",
        )
        with closing(batches):
            stopped = fit(engine, batches, span, recipe, run)
        if guard.back is None and not (stopped or run.ended) and stop == session.total:
            run.evaluate(engine, stop)
        for line in course.report(run.step):
            tell(line)
    return stopped, run.ended, guard.back


def farewell(folder: Path, stopped: bool) -> None:
    """Where everything is."""
    try:
        curves = draw_curves(folder)
    except OSError as error:  # a full disk
        curves = f"not drawn: {error.strerror}"
    latest = folder / "checkpoints" / "latest"
    print("stopped as asked; the same command goes on from here" if stopped else "done")
    print(f"  run folder  {folder}")
    print(f"  curves      {curves}")
    if latest.is_file():
        print(f"  checkpoint  {latest.parent / latest.read_text().strip()}")


def _silent(_: str) -> None:
    pass
