"""A run: its folder, its meters, its checkpoints, its signals. The loop's only side effects go through here.

outputs/NAME/recipe.yaml      the resolved recipe
             metrics.jsonl    one line every log.every steps; evaluations too (docs/metrics.md)
             checkpoints/     step-00001234/, latest
             eval/            JSON of every evaluation
             curves.png
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from data.types import Batch
from train import ranks
from train.checkpoint import Saver, name_best
from train.config import Recipe
from train.engines import Engine
from train.evaluate import Evaluator
from train.feed import Course, Feed
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
    ) -> None:
        """`leads`: of the ranks that read the same samples, this is the one that speaks of them."""
        self.recipe, self.folder, self.meters, self.saver = recipe, folder, meters, saver
        self.evaluator, self.identity, self.feed, self.course = evaluator, identity, feed, course
        self.progress, self.at, self.leads = progress, at, leads
        self.stop_requested = False
        self._handlers: dict[signal.Signals, Any] = {}  # what signals did before `listen`
        if ranks.rank() == 0:
            (folder / "recipe.yaml").write_text(as_yaml(recipe))
        self._keys = None
        if recipe.log.keys and leads:
            path = folder / f"keys-rank{ranks.rank()}.jsonl"
            cut_after(path, at.step)
            self._keys = path.open("a")

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

    def consumed(self, step: int, microbatches: Sequence[Batch]) -> None:
        """Note how far the run is, and the samples of a step when log.keys asks for it."""
        self.at.step, self.at.updates = step, self.at.updates + 1
        if self._keys is not None:
            keys = [key for batch in microbatches for key in batch.keys]
            self._keys.write(json.dumps({"step": step, "keys": keys}) + "\n")
            self._keys.flush()

    def report_skipped(self, microbatches: Sequence[Batch]) -> None:
        """One line for every sample that this rank could not read."""
        for batch in microbatches if self.leads else ():
            for line in batch.skipped:
                tqdm.write(f"skipped: {line}")

    def save(self, engine: Engine, step: int) -> None:
        """Hand the state to the writer process; training goes on while it writes."""
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
        }
        self.meters.exclude(self.saver.save(step, engine.fragments(), info))
        if shares := self.course.shares(step):
            self.meters.record(step, {"mixture": shares, "asked": self.course.asked(step)})

    def evaluate(self, engine: Engine, step: int) -> bool:
        """Evaluate on every set and record the results; whether this step's weights are the best so far. Collective."""
        began, found = time.monotonic(), {}
        for report in self.evaluator.reports(engine, step):
            found[report.set_name] = report.metrics
            self.meters.record(step, {"eval": report.set_name, **report.metrics})
            if ranks.rank() == 0:
                self.meters.say(report.table())
                report.write(self.folder / "eval", step)
        best = bool(found) and self.progress.update(step, self.at.phase, found)
        if self.ended:
            self.meters.say(
                f"{self.progress.end.metric} got no better in {self.progress.plateau.stale} evaluations: the end"
            )
        self.meters.exclude(time.monotonic() - began)
        return best

    def close(self) -> None:
        """Wait until the last checkpoint is published, end the meters, and listen to signals no longer."""
        try:
            self.saver.close()
            if (
                ranks.rank() == 0 and self.progress.best_step is not None
            ):  # the last evaluation comes after the last save
                try:
                    name_best(self.folder / "checkpoints", self.progress.best_step)
                except OSError as error:
                    self.meters.say(f"checkpoints/best could not be written: {error.strerror or error}")
        finally:
            self.meters.close()
        for name, handler in self._handlers.items():  # a command may go on with something else, which Ctrl-C must end
            signal.signal(name, handler)
        if self._keys is not None:
            self._keys.close()
