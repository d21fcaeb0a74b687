"""Ranks that are slower than the others, named.

    seconds of a rank before the first collective of a step: data, host  --window's median--.
    seconds of a fixed product of matrices on its device                 --its best---------+--one reduction--> judged

From the first collective on all ranks take the time of the slowest: what a rank needs for itself is seen before it, and
in work that needs no other. A rank is slow where it takes `factor` times the median of the others, in so many windows
one after the other. Waiting for data must also cost a share of the step: a millisecond more than one is no straggler;
and a window counts by its median, so that a shard that is opened now and then is none either.

Cost: about a millisecond and 16 bytes a rank, every window.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch

from train.guard_config import StragglerConfig

TRIES = 5
SIZES = {"cpu": 192, "cuda": 2048}  # of the matrices: below a millisecond


class Slow(NamedTuple):
    """A rank that is slow: in what, its seconds, and the median of the others."""

    rank: int
    what: str
    seconds: float
    others: float


class Stragglers:
    """Judges windows of numbers that all ranks have."""

    def __init__(self, config: StragglerConfig, world: int) -> None:
        self.config = config
        self._runs = {"data": [0] * world, "arithmetic": [0] * world}

    def take(self, own: Sequence[float], probes: Sequence[float], step_s: float) -> list[Slow]:
        """Note a window: for each rank its median seconds before the first collective and its probe; seconds of a step.

        Returns those that have just been slow for so many windows; each is named once until it is no longer slow.
        """
        found = []
        for what, seconds in (("data", own), ("arithmetic", probes)):
            for rank, mine in enumerate(seconds):
                others = median([*seconds[:rank], *seconds[rank + 1 :]])
                slow = mine > self.config.factor * others
                if what == "data":
                    slow = slow and mine - others > self.config.least * step_s
                self._runs[what][rank] = self._runs[what][rank] + 1 if slow else 0
                if self._runs[what][rank] == self.config.windows:
                    found.append(Slow(rank, what, mine, others))
        return found


def probe(device: torch.device) -> float:
    """Seconds of a product of matrices on this device, the best of some tries. On a CPU, of its own time."""
    size = SIZES[device.type]
    x_NN = torch.ones(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    best = float("inf")
    for _ in range(TRIES):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            torch.mm(x_NN, x_NN)
            torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
        else:  # other processes on its core are not its fault
            began = time.thread_time()
            torch.mm(x_NN, x_NN)
            best = min(best, time.thread_time() - began)
    return best
