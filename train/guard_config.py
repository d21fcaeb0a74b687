"""Settings of the guard: what a run watches itself for, and what it does then (docs/guard.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SpikeConfig:
    """When loss or gradient norm is called a spike, and whether the run then goes back."""

    window: int = 128
    """Steps that a step is compared with."""
    least: int = 32
    """Of them there must be so many before anything is called a spike."""
    loss: float = 10.0
    """Robust standard deviations above the median of the window; 0: the loss is not watched."""
    norm: float = 6.0
    """The same of the logarithm of the gradient norm; 0: it is not watched."""
    steps: int = 3
    """Steps in a row above the bound that make a spike; 1: every such step."""
    rewind: bool = False
    """When the loss spikes, go back to the last checkpoint before it and pass over the data of the steps around it."""
    before: int = 2
    """Steps before the spike whose data is passed over too."""
    after: int = 8
    """Steps from the spike's first on whose data is passed over too."""
    max_rewinds: int = 3
    """In a phase; then the run stops."""


@dataclass(frozen=True)
class StragglerConfig:
    """When a rank is called slow."""

    every: int = 20
    """Steps of a window; 0: no rank is watched."""
    factor: float = 1.5
    """Times the median of the other ranks."""
    windows: int = 3
    """Windows in a row above it."""
    least: float = 0.1
    """Share of a step's time that it must cost."""


@dataclass(frozen=True)
class GuardConfig:
    """What a run watches itself for. Everything is on by default but going back after a spike."""

    max_skipped: int = 10
    """Steps without an update, as loss or gradient were not finite, within the last `skip_window` that stop the run."""
    skip_window: int = 100
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    dead_steps: int = 200
    """An expert that receives no token for so many steps is reported; 0: none."""
    collapse: float = 0.3
    """A layer whose assignments are worth fewer evenly used experts (exp of the entropy) than this share of all..."""
    collapse_steps: int = 200
    """...for so many steps is reported; 0: none."""
    straggler: StragglerConfig = field(default_factory=StragglerConfig)
    hang_s: float = 1800.0
    """Seconds without progress of a rank, after which the run says who is behind and ends with status 70; 0: never."""
    hang_slow: float = 4.0
    """Times `hang_s` at start-up, in the first step of a phase (compilation), while saving and evaluating."""

    @property
    def patience_s(self) -> float:
        """How long a collective may wait for a rank: longer than it takes to name one that hangs."""
        return max(600.0, self.hang_s * self.hang_slow + 60.0)

    def problems(self) -> Iterator[str]:
        """What is wrong with the settings, a line each."""
        least = {
            "guard.max_skipped": (self.max_skipped, 1),
            "guard.skip_window": (self.skip_window, 1),
            "guard.spike.window": (self.spike.window, 2),
            "guard.spike.least": (self.spike.least, 2),
            "guard.spike.loss": (self.spike.loss, 0),
            "guard.spike.norm": (self.spike.norm, 0),
            "guard.spike.steps": (self.spike.steps, 1),
            "guard.spike.before": (self.spike.before, 0),
            "guard.spike.after": (self.spike.after, 1),
            "guard.spike.max_rewinds": (self.spike.max_rewinds, 1),
            "guard.dead_steps": (self.dead_steps, 0),
            "guard.collapse": (self.collapse, 0),
            "guard.collapse_steps": (self.collapse_steps, 0),
            "guard.straggler.every": (self.straggler.every, 0),
            "guard.straggler.factor": (self.straggler.factor, 1),
            "guard.straggler.windows": (self.straggler.windows, 1),
            "guard.hang_s": (self.hang_s, 0),
            "guard.hang_slow": (self.hang_slow, 1),
        }
        for key, (value, bound) in least.items():
            if not value >= bound:
                yield f"{key}={value}: it must be at least {bound}"
        if self.spike.least > self.spike.window:
            yield f"guard.spike.least={self.spike.least}: it cannot be above guard.spike.window={self.spike.window}"
        if self.spike.rewind and not self.spike.loss:
            yield "guard.spike.rewind=true, but guard.spike.loss=0: a run goes back for its loss; give it a bound"
        if self.max_skipped > self.skip_window:
            yield f"guard.max_skipped={self.max_skipped}: it cannot be above guard.skip_window={self.skip_window}"
