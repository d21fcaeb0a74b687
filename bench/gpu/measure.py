"""Fair timing of candidates on one device: in turns, medians, peaks of memory, a matmul rate before and after.

    candidates --warm-up once--> A B A B ..., each between two synchronisations --> median, least, most, peak memory

On a GPU time is wall time between synchronisations and memory is the allocator's (torch.cuda.max_memory_allocated);
on a CPU process time and the kernel's resident set, which only shows that the code runs. A candidate that runs out of
memory or fails says so and the others go on. Cost: (1 + rounds) x the sum of the candidates.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.common import DRIFT, matmul_rate, reset_peak, resident

LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Clock:
    """Until when a part may measure, by time.monotonic."""

    deadline: float

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()


@dataclass
class Timing:
    """What a candidate took: seconds of each round, bytes at the peak and how many of them were there before."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    before: int = 0
    result: Any = None
    failed: str = ""


def figure(value: float, unit: str, how: str) -> dict[str, Any]:
    """A number as the report holds it."""
    return {"value": float(f"{value:.5g}"), "unit": unit, "how": how}


def where(error: BaseException) -> str:
    """An error on one line, with the place in our own code that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    root = str(Path(__file__).resolve().parents[2])
    ours = [frame for frame in frames if frame.filename.startswith(root) and "site-packages" not in frame.filename]
    place = (ours or list(frames))[-1]
    lines = str(error).strip().splitlines() or [""]
    return f"error: {type(error).__name__}: {lines[0][:300]} ({Path(place.filename).name}:{place.lineno})"


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Hand back what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def once(work: Callable[[], Tensor], clean: Callable[[], None], device: torch.device, timing: Timing) -> None:
    """Run a candidate once and note time, memory and result. Raises what the work raises."""
    on_gpu = device.type == "cuda"
    clean()
    synchronise(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        timing.before = torch.cuda.memory_allocated(device)
    else:
        reset_peak()
        timing.before = resident("VmRSS")
    clock = time.perf_counter if on_gpu else time.process_time
    began = clock()
    result = work()
    synchronise(device)
    timing.seconds.append(clock() - began)
    timing.peak = torch.cuda.max_memory_allocated(device) if on_gpu else resident("VmHWM")
    timing.result = result.float().norm().item()


def in_turns(
    works: Mapping[str, Callable[[], Tensor]],
    clean: Callable[[], None],
    device: torch.device,
    rounds: int,
    clock: Clock,
) -> dict[str, Timing]:
    """Time of each candidate, run in turns after one round of warm-up; fewer rounds where the clock runs out.

    A candidate returns a gradient, on whose norm all must agree. `clean` runs before each,
    untimed: it drops the gradients that the one before has left.
    """
    found = {name: Timing() for name in works}
    for number in range(1 + rounds):
        for name, work in works.items():
            timing = found[name]
            if timing.failed or (number and clock.left() < 2 * max(timing.seconds, default=0.0)):
                continue
            try:
                once(work, clean, device, timing)
            except torch.OutOfMemoryError as error:
                timing.failed = f"out of memory: {str(error).splitlines()[0][:200]}"
            except Exception as error:  # a kernel that is not there: the others go on
                traceback.print_exc()
                timing.failed = where(error)
            if timing.failed:  # out here nothing holds the tensors of the failed step any more
                clean()
                free(device)
        if number == 0:
            for timing in found.values():
                timing.seconds.clear()
            free(device)
    return found


@dataclass(frozen=True)
class Work:
    """What a step does: `amount` of `unit`, tokens or frames, and floating-point operations."""

    amount: int
    flops: float
    unit: str = "tokens"


def row_of(timing: Timing, work: Work, device: torch.device) -> dict[str, Any]:
    """A candidate's figures, or why there are none."""
    if timing.failed:
        return {"status": timing.failed}
    if not timing.seconds:
        return {"status": "skipped: time"}
    seconds, rounds = median(timing.seconds), len(timing.seconds)
    clock = "wall time between synchronisations" if device.type == "cuda" else "process time"
    memory = "torch.cuda.max_memory_allocated" if device.type == "cuda" else "resident set, VmHWM"
    how = f"median of {rounds}, {clock}, in turns with the others"
    return {
        "status": "ok" if rounds >= LEAST_ROUNDS else f"few rounds: {rounds}, time ran out",
        "time": figure(1e3 * seconds, "ms", how),
        "spread": figure((max(timing.seconds) - min(timing.seconds)) / seconds, "of the median", "most - least"),
        "speed": figure(work.amount / seconds, f"{work.unit}/s", how),
        "rate": figure(work.flops / seconds / 1e12, "TFLOP/s", f"{how}; FLOPs by models/flops.py's convention"),
        "peak": figure(timing.peak / 1e9, "GB", f"{memory}, weights included"),
        "added": figure((timing.peak - timing.before) / 1e9, "GB", f"{memory}, above what the step found"),
    }


def gemm_rate(device: torch.device, side: int) -> float:
    """TFLOP/s of a square bf16 matmul, best of six runs of ten; on a CPU of an fp32 one on one thread."""
    if device.type != "cuda":
        return matmul_rate() / 1e3
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first warms the clocks
        synchronise(device)
        began = time.perf_counter()
        for _ in range(10):
            torch.mm(a, b)
        synchronise(device)
        best = min(best, time.perf_counter() - began)
    return 10 * 2 * side**3 / best / 1e12


def between_roofs(measure: Callable[[], dict[str, Any]], device: torch.device, side: int) -> dict[str, Any]:
    """A measurement with the machine's matmul rate before and after it; void where that moved."""
    before = gemm_rate(device, side)
    found = measure()
    after = gemm_rate(device, side)
    how = f"matmul of {side} x {side}, bf16, best of 6 x 10" if device.type == "cuda" else "fp32 matmul, one thread"
    found["gemm"] = [figure(rate, "TFLOP/s", how) for rate in (before, after)]
    moved = abs(after - before) > DRIFT * before
    found["void"] = f"the matmul rate moved from {before:.3g} to {after:.3g} TFLOP/s" if moved else None
    return found


def agreement(found: Mapping[str, Timing]) -> float:
    """Largest relative difference of the candidates' results from the first one's."""
    results = [timing.result for timing in found.values() if timing.result is not None]
    return max((abs(result - results[0]) / abs(results[0]) for result in results), default=0.0)


def compared(
    works: Mapping[str, Callable[[], Tensor]],
    device: torch.device,
    rounds: int,
    clock: Clock,
    *,
    clean: Callable[[], None],
    done: Work,
    side: int,
    gradient: str,
    tolerance: float = 5e-2,
) -> dict[str, Any]:
    """Candidates in turns between two matmul rates: rows, and whether they computed the same."""

    def measure() -> dict[str, Any]:
        found = in_turns(works, clean, device, rounds, clock)
        off = agreement(found)
        same = figure(off, "relative", f"largest difference of the norm of {gradient}, tolerance {tolerance:g}")
        status = "ok" if off <= tolerance else f"failed: the candidates differ by {off:.1e}, above {tolerance:g}"
        rows = {name: row_of(timing, done, device) for name, timing in found.items()}
        return {"status": status, "rows": rows, "figures": {"difference": same}}

    try:
        return between_roofs(measure, device, side)
    finally:
        free(device)
