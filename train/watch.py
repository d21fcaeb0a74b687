"""What a step tells beside its loss, and what an engine does for it.

    Look      asked with a step: gradient norms of towers, experts by kind of token      (train/metrics.py says when)
    Clock     marks in a step -> seconds of its parts, and seconds of this rank's own work
    Tally     sums of micro-batches by media and kind --with the sums that are added over ranks anyway--> Seen
    Towers    gradients by parameter -> sum of squares of each tower

Cost: of every step, a few additions. Of a looked-at step, one pass over the gradients, and where there are ranks one
reduction of a number a tower; with `experts` one more top-k a layer.

Times are the clock's on a CPU, and events' on a GPU: nobody waits for those before the step's end, when its numbers
have come from the GPU anyway. A rank's own seconds are on a CPU those that it computed, all threads together, since
waiting for others takes none. On a GPU they are its forward passes: where these wait for other ranks, as under ZeRO-3
and with expert, tensor or pipeline parallelism, a slow rank slows all and the difference shrinks.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from train.config import OptimConfig
from train.loss import SHARE, Sums
from train.media import GROUPS, KINDS
from train.optim import group_of

PARTS = {"audio_tower": "audio", "visual": "vision", "model": "language", "lm_head": "language"}


@dataclass(frozen=True)
class Look:
    """What is asked of a step beside its numbers. The same on all ranks."""

    norms: bool = False
    """Gradient norm of each tower."""
    experts: bool = False
    """Assignments of the Thinker's experts by the kind of the routed token."""


NOTHING = Look()


@dataclass(frozen=True)
class Seen:
    """What a step tells beside its numbers. Sums and norms are global, times are this rank's."""

    media: Tensor = field(default_factory=lambda: torch.zeros(2, GROUPS, dtype=torch.float64))
    """Text loss summed over documents that hold the same media (train.media.group_name), and its targets: [2, G]."""
    kinds: Tensor | None = None
    """Assignments by train.media.KINDS, [kinds, L, E], where they were asked for and a Thinker learns."""
    norms: Mapping[str, float] = field(default_factory=dict)
    """Tower -> gradient norm before clipping, where asked for."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """Tower -> multiplier of its learning rate, the highest of its parameters'."""
    times: Mapping[str, float] = field(default_factory=dict)
    """Seconds of forward, backward (or forward_backward) and optimizer."""
    own: float = 0.0
    """Seconds of this rank's own work."""


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._began = device.type == "cuda", time.process_time()
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, part: str = "") -> None:
        """What was done since the last mark is of `part`; without a name it is nobody's."""
        self._marks.append((part, self._now()))

    def read(self) -> tuple[dict[str, float], float]:
        """Seconds of each part, and of this rank's own work."""
        found: Counter[str] = Counter()
        if self._cuda:
            self._marks[-1][1].synchronize()
        for (_, before), (part, now) in pairwise(self._marks):
            if part:
                found[part] += before.elapsed_time(now) / 1000 if self._cuda else now - before
        own = found["forward"] + found["forward_backward"] if self._cuda else time.process_time() - self._began
        return {part: seconds for part, seconds in found.items() if seconds}, own


class Tally:
    """Sums of the micro-batches of one step."""

    def __init__(self, objective: Any, look: Look, device: torch.device, scales: Mapping[str, float]) -> None:
        """`objective` is told what to count; `scales` are Towers.scales."""
        self.scales = scales
        routers = objective.routers[0] if objective.routers and objective.routers[0].name == SHARE else None
        objective.counts_kinds = look.experts and routers is not None
        self.media = torch.zeros(2, GROUPS, dtype=torch.float64, device=device)
        self.kinds: Tensor | None = None
        if objective.counts_kinds and routers is not None:
            shape = len(KINDS), routers.layers, routers.experts
            self.kinds = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, sums: Sums) -> None:
        """Of a micro-batch."""
        if sums.media is not None:
            self.media += sums.media
        if self.kinds is not None and sums.kinds is not None:
            self.kinds += sums.kinds

    def vector(self) -> Tensor:
        """All sums, float64, to be added over ranks."""
        return torch.cat([self.media.flatten(), *([] if self.kinds is None else [self.kinds.flatten()])])

    def seen(self, clock: Clock, norms: Mapping[str, float], vector: Tensor | None = None) -> Seen:
        """What the step tells; `vector` is that of all ranks, where there are others."""
        media_N, *kinds_N = (
            (self.vector() if vector is None else vector)
            .cpu()
            .split([self.media.numel(), *([] if self.kinds is None else [self.kinds.numel()])])
        )
        kinds = None if self.kinds is None else kinds_N[0].view(self.kinds.shape)
        return Seen(media_N.view(2, GROUPS), kinds, norms, self.scales, *clock.read())


def tower_of(name: str) -> str:
    """The tower of a parameter, by its released name."""
    if name.startswith("talker.code_predictor."):
        return "code_predictor"
    first = name.removeprefix("thinker.").partition(".")[0]
    return PARTS.get(first, first)


class Towers:
    """The towers that learn, in the same order on all ranks."""

    def __init__(self, model: nn.Module, optim: OptimConfig) -> None:
        """`model` has released names and says what learns."""
        scales: dict[str, float] = {}  # of the learning rate: the highest of a tower's parameters
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                tower, scale = tower_of(name), group_of(name, parameter, optim)[0]
                scales[tower] = max(scale, scales.get(tower, 0.0))
        self.names = sorted(scales)
        self.scales = {name: scales[name] for name in self.names}

    def squares(self, gradients: Iterable[tuple[str, Tensor]]) -> Tensor:
        """Sum of squares of each tower, float64 on the CPU, from gradients by the names of their parameters."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for name, gradient in gradients:
            found[tower_of(name)].append(gradient)
        return torch.tensor(
            [float(nn.utils.get_total_norm(found[name])) ** 2 if found[name] else 0.0 for name in self.names],
            dtype=torch.float64,
        )

    def norms(self, squares: Tensor) -> dict[str, float]:
        """From sums of squares over all ranks."""
        return dict(zip(self.names, squares.sqrt().tolist(), strict=True))
