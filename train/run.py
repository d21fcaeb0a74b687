"""A run: its folder, its meters, its checkpoints, its signals. The loop's only side effects go through here.

outputs/NAME/recipe.yaml      the resolved recipe
             metrics.jsonl    one line every log.every steps; evaluations too (docs/metrics.md)
             checkpoints/     step-00001234/, latest
             eval/            JSON of every evaluation
             curves.png
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from data.types import Batch
from train import ranks
from train.checkpoint import Saver, candidates, name_best
from train.checkpoint.format import folder_step, step_folder
from train.config import Recipe
from train.engines import Engine
from train.evaluate import Evaluator
from train.feed import Course, Feed
from train.guard import Guard
from train.heartbeat import Heart, beating
from train.journal import Journal
from train.metrics import Meters, cut_after
from train.progress import Progress
from train.recipe import as_yaml


@dataclass
class Position:
    """Where a run is: its next step, the updates that its optimizer has made, the phase."""

    step: int
    updates: int
    phase: str
    final: bool
    """Whether no phase follows."""


class Run:
    """The state of a run outside the engine."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        meters: Meters,
        saver: Saver,
        evaluator: Evaluator,
        identity: Mapping[str, Any],
        feed: Feed,
        course: Course,
        progress: Progress,
        at: Position,
        leads: bool,
        guard: Guard,
        heart: Heart,
    ) -> None:
        """`leads`: of the ranks that read the same samples, this is the one that speaks of them."""
        self.recipe, self.folder, self.meters, self.saver = recipe, folder, meters, saver
        self.evaluator, self.identity, self.feed, self.course = evaluator, identity, feed, course
        self.progress, self.at, self.leads, self.guard, self.heart = progress, at, leads, guard, heart
        self.stop_requested = False
        self._handlers: dict[signal.Signals, Any] = {}  # what signals did before `listen`
        if ranks.rank() == 0:
            part = folder / "recipe.yaml.tmp"  # a full disk must not cost the one that is there
            part.write_text(as_yaml(recipe))
            part.replace(folder / "recipe.yaml")
        self._keys = None
        if recipe.log.keys and leads:
            path = folder / f"keys-rank{ranks.rank()}.jsonl"
            cut_after(path, at.step)
            self._keys = Journal(path, tqdm.write)

    @property
    def step(self) -> int:
        """Of the update that comes next."""
        return self.at.step

    @property
    def ended(self) -> bool:
        """Whether the last phase is over before its steps are: its metric got no better (recipe.end)."""
        return self.at.final and self.progress.ended

    @staticmethod
    def open_folder(recipe: Recipe) -> Path:
        """Make the run's folder. The recipe is saved in it only once nothing can refuse it any more."""
        folder = Path(recipe.run)
        if ranks.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        ranks.barrier()
        return folder

    @staticmethod
    def is_due(every: int, step: int) -> bool:
        """Whether something that happens every so many steps happens now."""
        return every > 0 and step % every == 0

    def listen(self) -> None:
        """SIGTERM, SIGUSR1 and Ctrl-C: finish the step, save, leave. A second one ends the process at once."""

        def request(number: int, _: FrameType | None) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True
            self.meters.say(f"{signal.Signals(number).name}: finishing the step and saving; once more to leave at once")

        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._handlers[name] = signal.signal(name, request)

    def consumed(self, step: int, microbatches: Sequence[Batch], applied: bool) -> None:
        """Note how far the run is, and the samples of a step when log.keys asks for it."""
        self.at.step, self.at.updates = step, self.at.updates + applied
        if self._keys is not None:
            keys = [key for batch in microbatches for key in batch.keys]
            self._keys.write({"step": step, "keys": keys})

    def report_skipped(self, microbatches: Sequence[Batch]) -> None:
        """One line for every sample that this rank could not read."""
        for batch in microbatches if self.leads else ():
            for line in batch.skipped:
                tqdm.write(f"skipped: {line}")

    def event(self, step: int, kind: str, text: str, **more: Any) -> None:
        """A line of what is odd, in metrics.jsonl and for people. Every rank may call it; the main one speaks."""
        self.meters.record(step, {"event": kind, "text": text, **more})
        self.meters.say(f"step {step}: {kind}: {text}")

    def checkpoint_before(self, step: int, first: int) -> Path | None:
        """Newest checkpoint of a step from `first` to `step`, once the save under way is done. Collective."""
        self.saver.wait()
        kept = candidates(self.folder)[: self.recipe.save.keep]  # older ones may be being deleted
        steps = [found for path in kept if first <= (found := folder_step(path.name) or 0) <= step]
        newest = ranks.total(torch.tensor([float(max(steps, default=-1)) if ranks.rank() == 0 else 0.0]))
        chosen = int(newest[0])
        return self.folder / "checkpoints" / step_folder(chosen) if chosen >= 0 else None

    def save(self, engine: Engine, step: int) -> None:
        """Hand the state to the writer process; training goes on while it writes."""
        self.heart.beat("save", slow=True)
        info = {
            "identity": self.identity,
            "recipe": as_yaml(self.recipe),
            "engine": {
                "name": self.recipe.engine.name,
                "world": ranks.world(),
                "zero": self.recipe.engine.zero,
            },
            "seed": self.recipe.seed,  # every draw is keyed by (seed, epoch, sample): there is no other random state
            "data": self.feed.position(step),
            "optimizer_step": self.at.updates,
            "progress": self.progress.info(),
            "counters": {"skipped": self.meters.num_skipped},
            "guard": self.guard.state(),
        }
        self.meters.exclude(self.saver.save(step, engine.fragments(), info))
        if shares := self.course.shares(step):
            self.meters.record(step, {"mixture": shares, "asked": self.course.asked(step)})

    def evaluate(self, engine: Engine, step: int) -> bool:
        """Evaluate on every set and record the results; whether this step's weights are the best so far. Collective."""
        began, found = time.monotonic(), {}
        self.heart.beat("evaluate", slow=True)
        for report in self.evaluator.reports(beating(engine, self.heart), step):
            found[report.set_name] = report.metrics
            self.meters.record(step, {"eval": report.set_name, **report.metrics})
            if ranks.rank() == 0:
                self.meters.say(report.table())
                try:
                    report.write(self.folder / "eval", step)
                except OSError as error:  # a full disk: the numbers are in metrics.jsonl
                    self.meters.say(f"the answers were not written: {error}")
        best, stale = bool(found) and self.progress.update(step, self.at.phase, found), self.progress.plateau.stale
        if self.ended:
            self.meters.say(f"{self.progress.end.metric} got no better in {stale} evaluations: the end")
        self.meters.exclude(time.monotonic() - began)
        return best

    def close(self) -> None:
        """Wait until the last checkpoint is published, end the meters, and listen to signals no longer."""
        try:
            self.saver.close()
            best = self.progress.best_step  # of the last evaluation, too, which comes after the last save
            if ranks.rank() == 0 and best is not None:
                try:
                    name_best(self.folder / "checkpoints", best)
                except OSError as error:
                    self.meters.say(f"checkpoints/best could not be written: {error.strerror or error}")
        finally:
            self.meters.close()
        for name, handler in self._handlers.items():  # a command may go on with something else, which Ctrl-C must end
            signal.signal(name, handler)
        if self._keys is not None:
            self._keys.close()
