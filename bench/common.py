"""What every benchmark shares: fair timing of two candidates in one process, and the line of JSON at the end.

    candidates --A B A B ..., CPU time--> medians, between two measurements of the machine's matmul rate --> report

One thread and process time, so that other jobs on the machine distort little; interleaved, so that what distorts
hits both; the matmul rate before and after voids a run during which the machine changed. Cost: rounds x the sum of
the candidates.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

DRIFT = 0.10  # relative change of the matmul rate that voids a run


def matmul_rate() -> float:
    """GFLOP/s of a large fp32 matmul on one thread, the best of five: what this machine gives at best right now."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    times = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(10):
            torch.mm(a, b)
        times.append(time.process_time() - start)
    return 10 * 2 * 512**3 / min(times) / 1e9


def compare(candidates: Mapping[str, Callable[[], Any]], rounds: int = 7, warmup: int = 1) -> dict[str, float]:
    """Median CPU seconds of each candidate, run in turns. A candidate does its whole piece of work when called."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(warmup + rounds):
        for name, work in candidates.items():
            start = time.process_time()
            work()
            if index >= warmup:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def resident(kind: str) -> int:
    """Bytes of the resident set: VmRSS, now, or VmHWM, its peak since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {kind}: this benchmark needs Linux")


def reset_peak() -> None:
    """Forget the peak of the resident set, and hand freed memory back, which the next candidate would find for free."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def saved_bytes(work: Callable[[], Any], exclude: torch.nn.Module) -> int:
    """Bytes that autograd keeps for backward during `work`: unique storages, the parameters of `exclude` left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in exclude.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = work()
    del kept
    return sum(storage.nbytes() for storage in storages.values())


def void_if_drifted(before: float, after: float) -> str | None:
    """Say why a run does not count, if the machine's matmul rate moved while it ran."""
    if abs(after - before) > DRIFT * before:
        return f"void: the matmul rate moved from {before:.0f} to {after:.0f} GFLOP/s; run again on a quieter machine"
    return None


def report(bench: str, *, ours: float, peer: float, ratio: float, unit: str, goal: float, met: bool) -> None:
    """Print the last line: one JSON object. `ratio` is above 1 where ours is better."""
    line = {"bench": bench, "ours": ours, "peer": peer, "ratio": ratio, "unit": unit, "goal": goal, "met": met}
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}))
