"""Loss spikes, found by a running median.

    value of a step --median, MAD of the window before--> robust standard deviations --bound, steps in a row--> spike

The median absolute deviation times 1.4826 is the standard deviation of a normal distribution that outliers do not move
(Iglewicz and Hoaglin 1993, "How to Detect and Handle Outliers"; their modified z-score). ZClip (Kumar et al. 2025,
arXiv 2504.02507) watches gradient norms by a z-score over running mean and variance, which one spike widens. Norms are
compared by their logarithm: they scatter by factors. Only upwards: a fall is no spike. What a spike calls for is PaLM's
(Chowdhery et al. 2022, section 5.1): back to a checkpoint before it, and past the data around it.

Cost: two medians of `window` numbers a step and series, about 20 microseconds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from train.guard_config import SpikeConfig

NORMAL = 1.4826  # standard deviations in a median absolute deviation
LEAST = {"loss": 0.01, "norm": 0.05}  # scatter that is taken for granted: of the loss as a share of it, of log norms


class Series:
    """The last values of one number, and how far a new one lies above them."""

    def __init__(self, kind: str, bound: float, config: SpikeConfig, values: Iterable[float] = ()) -> None:
        self.kind, self.bound, self.least = kind, bound, config.least
        self.values = deque((float(value) for value in values), config.window)

    def above(self, value: float) -> float:
        """Robust standard deviations of `value` above the median of those before; 0 while there are too few."""
        if not self.bound or len(self.values) < self.least:
            return 0.0
        middle = median(self.values)
        scatter = NORMAL * median(abs(each - middle) for each in self.values)
        floor = LEAST[self.kind] * (abs(middle) if self.kind == "loss" else 1.0)
        return (value - middle) / max(scatter, floor, 1e-12)

    def take(self, value: float) -> float:
        """Note a value, a spike's too: half a window of them is the new level. How far it lies above those before."""
        found = self.above(value)
        self.values.append(value)
        return found


class SpikeDetector:
    """Watches loss and gradient norm of a phase."""

    def __init__(self, config: SpikeConfig, memory: Mapping[str, Any] | None = None) -> None:
        """`memory` is what `state` gave, maybe in another process."""
        memory = memory or {}
        self.config = config
        self.series = {
            "loss": Series("loss", config.loss, config, memory.get("loss", ())),
            "norm": Series("norm", config.norm, config, memory.get("norm", ())),
        }
        self.runs = {kind: int(memory.get("runs", {}).get(kind, 0)) for kind in self.series}

    def take(self, loss: float, norm: float) -> dict[str, float]:
        """Note a step. What has just become a spike, and by how many deviations; once, until it is back below."""
        found = {}
        values = {"loss": loss, "norm": math.log(max(norm, 1e-30))}
        for kind, series in self.series.items():
            above = series.take(values[kind])
            self.runs[kind] = self.runs[kind] + 1 if series.bound and above > series.bound else 0
            if self.runs[kind] == self.config.steps:
                found[kind] = above
        return found

    def state(self) -> dict[str, Any]:
        """All that a later `take` depends on, as JSON."""
        return {**{kind: list(series.values) for kind, series in self.series.items()}, "runs": dict(self.runs)}
