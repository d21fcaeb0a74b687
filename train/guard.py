"""Looks at every step of a phase, and acts: leaves out what is not finite, goes back after a spike, says what is odd.

    StepStats --not applied?-------------> event with the samples' keys, stop after too many          (train/engines)
              --train/spikes.py----------> event with the samples' keys, maybe back to a checkpoint
              --train/routing_watch.py---> event
    seconds before the first collective --train/stragglers.py--> event

A run that goes back passes over the data around the spike: those steps are steps without an update, the learning rate
stays a function of the step. Which they are, what the detector has seen and how many updates were left out is kept in
checkpoints, so a killed run that goes on is the run that was never killed. A kill between going back and the next
checkpoint loses the decision with the steps: they are run again, spike again, and it is made again.

Cost: what spikes and routing say; nothing is sent but where something is odd, and once a window for stragglers.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from data.types import Batch
from train import ranks
from train.engines import Engine, StepStats
from train.errors import EngineError
from train.guard_config import GuardConfig
from train.recipe import Span
from train.routing_watch import RoutingWatch
from train.spikes import SpikeDetector
from train.stragglers import Stragglers, probe
from train.watch import Look

MOST = 3  # samples that a line names; metrics.jsonl has all


class Speaker(Protocol):
    """What the guard needs of a run."""

    folder: Path

    def event(self, step: int, kind: str, text: str, **more: Any) -> None:
        """A line in metrics.jsonl and one for people."""
        ...

    def save(self, engine: Engine, step: int) -> None:
        """See train.run.Run."""
        ...

    def checkpoint_before(self, step: int, first: int) -> Path | None:
        """Newest checkpoint of a step from `first` to `step`. Collective."""
        ...


@dataclass(frozen=True)
class Back:
    """A decision to go back: to a checkpoint, or to the beginning of the run where there is none."""

    checkpoint: Path | None
    passed: tuple[int, ...]
    rewinds: int
    text: str
    more: Mapping[str, Any] = field(default_factory=dict)


class Guard:
    """Of one phase, on one rank. All ranks come to the same decisions."""

    def __init__(
        self,
        config: GuardConfig,
        span: Span,
        device: torch.device,
        *,
        memory: Mapping[str, Any] | None = None,
        back: Back | None = None,
        leads: bool = True,
        hosts: Sequence[str] = ("",),
    ) -> None:
        """`memory` is the `state` of a checkpoint within this phase, `back` why it was gone back to."""
        memory = memory or {}
        self.config, self.span, self.device, self.leads, self.hosts = config, span, device, leads, hosts
        self.passed = frozenset(back.passed if back else memory.get("passed", ()))
        self.rewinds = back.rewinds if back else int(memory.get("rewinds", 0))
        self.left_out = int(memory.get("left_out", 0))  # updates that this phase's steps did not make
        self._skips: list[int] = list(memory.get("skips", ()))
        self._spikes = SpikeDetector(config.spike, memory.get("spikes"))
        self._routing = RoutingWatch(config.dead_steps, config.collapse, config.collapse_steps)
        self._stragglers = Stragglers(config.straggler, len(hosts))
        self._own: list[float] = []  # seconds before the first collective, of the steps of this window
        self._since = time.monotonic()
        self._keys: deque[list[str]] = deque(maxlen=config.spike.steps)
        self._found: dict[str, float] = {}
        self._stats: StepStats | None = None
        self.odd = False  # whether the last step asks for `act`
        self.back: Back | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "phase": self.span.name,
            "passed": sorted(self.passed),
            "rewinds": self.rewinds,
            "left_out": self.left_out,
            "skips": self._skips,
            "spikes": self._spikes.state(),
        }

    def step(self, engine: Engine, step: int, microbatches: Sequence[Batch], lr: float, look: Look) -> StepStats:
        """The engine's step; without it where the data of this step is passed over. Collective."""
        if step not in self.passed:
            return engine.train_step(microbatches, lr, look)
        skipped = sum(len(batch.skipped) for batch in microbatches) if self.leads else 0
        total = int(ranks.total(torch.tensor([float(skipped)]))[0])
        return StepStats(math.nan, {}, math.nan, math.nan, 0, 0, total, {}, applied=False)

    def note(self, run: Speaker, step: int, stats: StepStats, microbatches: Sequence[Batch], waited: float) -> None:
        """Look at the step that led to `step`; `waited` is the seconds of this rank before its first collective."""
        self._stats, self._found = stats, {}
        self.odd = False
        self._keys.append([key for batch in microbatches for key in batch.keys] if self.leads else [])
        self.left_out += not stats.applied
        if stats.applied:
            self._found = self._spikes.take(stats.loss, stats.grad_norm)
            self.odd = bool(self._found)
            for event in self._routing.take(stats.expert_shares):
                run.event(step, event.kind, event.text, **event.more)
        elif step - 1 not in self.passed:
            self._skips = [each for each in self._skips if each > step - self.config.skip_window] + [step]
            self.odd = True
        self._time(run, step, waited)

    def _time(self, run: Speaker, step: int, waited: float) -> None:
        """Judge the ranks at the end of a window. Collective then."""
        every, world = self.config.straggler.every, len(self.hosts)
        if world == 1 or not every:
            return
        self._own.append(waited)
        if (step - self.span.start) % every:
            return
        now = time.monotonic()
        mine = torch.zeros(2, world, dtype=torch.float64)
        mine[:, ranks.rank()] = torch.tensor([median(self._own), probe(self.device)], dtype=torch.float64)
        own, probes = ranks.total(mine).tolist()
        self._own.clear()
        for slow in self._stragglers.take(own, probes, (now - self._since) / every):
            what = "waits for its data" if slow.what == "data" else "takes for a fixed product of matrices"
            text = (
                f"rank {slow.rank} on host {self.hosts[slow.rank]} is slow: it {what} {slow.seconds:.3g} s, the others "
                f"{slow.others:.3g} s, and all wait for it"
            )
            run.event(step, "straggler", text, rank=slow.rank, host=self.hosts[slow.rank], **{"in": slow.what})
        self._since = time.monotonic()

    def act(self, run: Speaker, engine: Engine, step: int) -> bool:
        """Do what the last step asks for; whether the run is to go back. Collective. Raises EngineError to stop it."""
        assert self._stats is not None
        if not self._stats.applied:
            self._skipped(run, engine, step, self._stats)
            return False
        mine = torch.tensor([self._found.get("loss", 0.0), self._found.get("norm", 0.0)], dtype=torch.float64)
        loss, norm = ranks.total(mine * (ranks.rank() == 0)).tolist()  # one rank's word: numbers may differ by a bit
        if not loss and not norm:
            return False
        length = self.config.spike.steps
        first = step - length  # of the steps that ran, the spike's first
        keys = self._everyones([key for keys in self._keys for key in keys])
        parts = [(loss, "loss", self._stats.loss), (norm, "gradient norm", self._stats.grad_norm)]
        told = " and ".join(f"{name} {value:.4g} ({far:.1f} deviations)" for far, name, value in parts if far)
        since = f" for {length} steps" if length > 1 else ""
        text = f"spike{since}: {told} above the median of {self.config.spike.window} steps. Samples: {named(keys)}"
        run.event(step, "spike", text, deviations={"loss": loss, "norm": norm}, first=first + 1, keys=keys)
        return bool(loss) and self.config.spike.rewind and self._go_back(run, step, first, text, keys)

    def _skipped(self, run: Speaker, engine: Engine, step: int, stats: StepStats) -> None:
        keys = self._everyones(self._keys[-1])
        what = "gradient" if math.isfinite(stats.loss) else "loss"
        count, most, window = len(self._skips), self.config.max_skipped, self.config.skip_window
        text = (
            f"the {what} is not finite: no update was made ({count} of the last {window} steps; {most} end the run). "
            f"Samples: {named(keys)}"
        )
        run.event(step, "skipped_step", text, what=what, keys=keys)
        if count >= most:
            run.save(engine, step)
            raise EngineError(
                f"loss or gradient were not finite in {count} of the last {window} steps (guard.max_skipped={most}); "
                f"the state without them is saved as step {step}. {run.folder}/metrics.jsonl names the samples: look "
                "at them, or lower optim.lr"
            )

    def _go_back(self, run: Speaker, step: int, first: int, text: str, keys: Sequence[str]) -> bool:
        """Decide where to go back to; False where nothing is left to go back to."""
        config = self.config.spike
        if self.rewinds >= config.max_rewinds:
            raise EngineError(
                f"step {step}: the loss spiked again after {self.rewinds} returns to a checkpoint "
                "(guard.spike.max_rewinds); nothing was saved since the last one. Lower optim.lr, or set "
                "guard.spike.rewind=false to go on through it"
            )
        low, high = max(self.span.start, first - config.before), min(self.span.stop, first + config.after)
        found = run.checkpoint_before(low, self.span.start)
        if found is None and self.span.start:
            run.event(
                step, "rewind", f"no checkpoint of steps {self.span.start} to {low} is left: the run goes on. Raise "
                "save.keep",
            )  # fmt: skip
            return False
        where = found.name if found else "the beginning"
        self.back = Back(
            found,
            tuple(sorted({*self.passed, *range(low, high)})),
            self.rewinds + 1,
            f"back to {where}, and past the data of steps {low + 1} to {high}: {text}",
            {"spike": first + 1, "passed": [low + 1, high], "rewinds": self.rewinds + 1, "keys": list(keys)},
        )
        return True

    def _everyones(self, keys: Sequence[str]) -> list[str]:
        return [key for part in ranks.gather_text(keys) for key in part]


def named(keys: Sequence[str]) -> str:
    """The first few keys, and how many more there are."""
    rest = f" and {len(keys) - MOST} more" if len(keys) > MOST else ""
    return ", ".join(keys[:MOST]) + rest if keys else "none"
