"""metrics.jsonl as curves: each line is read once, and what is kept does not grow with the file.

    lines --Metrics.read--> Series by (group, name): the lowest and highest of every stretch
                        --> Frames of expert loads: every k-th   events, sums, the last of each kind

Groups are the keys of a line that hold dictionaries ("terms", "lrs", ...), "" for plain numbers, "eval.METRIC" for
evaluations (name: the set). Cost: about 80 us for a line of 2 kB. Memory: 6,000 points a curve.

A line that is no JSON object with a step is damaged: it is counted. A last line without its end is being written: it is
left for the next time. Steps that come again (after a rewind) replace what was there.

L layers, E experts, P points.
"""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError

POINTS = 1500  # of a curve, after thinning
FRAMES = 60  # of a heatmap
MAX_LINE = 32 << 20  # bytes; loads of a thousand layers of experts have less
MAX_SERIES = 1000  # of a run: what has more names than that has numbers for names
MAX_EVENTS = 2000
ASKED = " (asked)"  # ends the name of the curve of what a mixture was to be
NO_METRIC = {"words", "targets", "samples", "utterances", "step"}  # of an evaluation: they say of how much it is


class Series:
    """Points with rising x. Beyond `4 * POINTS` the lowest and highest of every stretch stay."""

    __slots__ = ("x", "y")

    def __init__(self) -> None:
        self.x: list[int] = []
        self.y: list[float] = []  # NaN: a gap

    def add(self, x: int, y: float) -> None:
        """One point more; it takes the place of those at its x and after."""
        while self.x and self.x[-1] >= x:
            self.x.pop()
            self.y.pop()
        self.x.append(x)
        self.y.append(y if math.isfinite(y) else math.nan)
        if len(self.x) > 4 * POINTS:
            self.x, self.y = thinned(self.x, self.y, POINTS)


def thinned(x: list[int], y: list[float], most: int) -> tuple[list[int], list[float]]:
    """At most about `most` points: the ends, and the lowest and highest of each of most / 2 stretches of equal width.

    A gap stays where a stretch has nothing else.
    """
    if len(x) <= most:
        return x, y
    x_P, y_P = np.asarray(x), np.asarray(y)
    stretch_P = ((x_P - x_P[0]) * ((most // 2) / (x_P[-1] - x_P[0] + 1))).astype(np.int64)
    starts = np.flatnonzero(np.diff(stretch_P, prepend=-1))
    gap_P = np.isnan(y_P)
    lowest = np.lexsort((np.where(gap_P, np.inf, y_P), stretch_P))[starts]  # sorted by stretch, then by value
    highest = np.lexsort((np.where(gap_P, np.inf, -y_P), stretch_P))[starts]
    places = np.unique(np.concatenate(([0, len(x) - 1], lowest, highest)))
    return x_P[places].tolist(), y_P[places].tolist()


@dataclass
class Frames:
    """Loads of one decoder's experts, of every so many lines."""

    every: int = 1
    seen: int = 0
    kept: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)  # step, modality -> shares [L][E]
    last: tuple[int, Mapping[str, Any]] | None = None

    def add(self, step: int, shares: Mapping[str, Any]) -> None:
        """Shares [L][E] of each modality."""
        while self.kept and self.kept[-1][0] >= step:
            self.kept.pop()
        self.last = (step, shares)
        if self.seen % self.every == 0:
            self.kept.append(self.last)
        self.seen += 1
        if len(self.kept) > 2 * FRAMES:
            self.kept, self.every = self.kept[::2], self.every * 2

    def chosen(self, most: int) -> tuple[tuple[int, int], list[tuple[int, dict[str, bytes]]]]:
        """L and E of the last, and at most `most` frames, evenly: step, modality -> L x E cells.

        What is no table, or has another shape than the last, is left out.
        """
        if self.last is None:
            return (0, 0), []
        stride = max(1, math.ceil(len(self.kept) / max(1, most - 1)))
        frames = self.kept[::stride]
        frames = frames if frames and frames[-1][0] == self.last[0] else [*frames, self.last]
        found = [(step, {name: cells(value) for name, value in shares.items()}) for step, shares in frames]
        shape = next((cell[0] for _, loads in reversed(found) for cell in loads.values() if cell), (0, 0))
        fitting = [(step, {n: c[1] for n, c in loads.items() if c and c[0] == shape}) for step, loads in found]
        return shape, [(step, loads) for step, loads in fitting if loads]


def cells(shares_LE: Any) -> tuple[tuple[int, int], bytes] | None:
    """Shape and one byte an expert: 0 for none, else 1 to 255 for 1/16 to 16 times the mean, by the logarithm.

    A layer that no token of the modality reached has shares of 0 throughout. None for what is no table of numbers.
    """
    try:
        rows = [[float(share) for share in row] for row in shares_LE]
    except (TypeError, ValueError):
        return None
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        return None
    return (len(rows), len(rows[0])), bytes(_cell(share * len(row)) for row in rows for share in row)


def _cell(load: float) -> int:
    if not load > 0:  # NaN neither
        return 0
    return 1 + round(254 * min(1.0, max(0.0, (math.log2(load) + 4) / 8)))


@dataclass
class Metrics:
    """What a run's metrics.jsonl says."""

    series: dict[tuple[str, str], Series] = field(default_factory=dict)
    experts: dict[str, Frames] = field(default_factory=dict)  # by decoder
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))  # the last ones
    num_events: int = 0
    phases: list[tuple[int, str]] = field(default_factory=list)  # the first step of each, and its name
    mixture: dict[str, float] = field(default_factory=dict)  # the last
    asked: dict[str, float] = field(default_factory=dict)
    slowest: Counter[int] = field(default_factory=Counter)  # rank -> lines
    last: dict[str, Any] = field(default_factory=dict)  # line of a step
    step: int = 0  # of the last line
    tokens: float = 0.0
    seconds: float = 0.0
    work: float = 0.0  # MFU times seconds
    work_seconds: float = 0.0
    peak_gb: float = 0.0
    num_lines: int = 0
    num_damaged: int = 0
    num_nonfinite: int = 0  # losses
    num_unnamed: int = 0  # numbers beyond MAX_SERIES names
    _gap: int = 1  # steps between lines

    @staticmethod
    def read(path: Path) -> Metrics:
        """All lines of a file. Raises DataError where it cannot be read."""
        found = Metrics()
        try:
            for raw in _lines(path):
                found._take(raw)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        return found

    def get(self, group: str) -> dict[str, Series]:
        """Curves of a group by name."""
        return {name: series for (of, name), series in self.series.items() if of == group}

    def _take(self, raw: bytes) -> None:
        try:
            line = json.loads(raw)
            step = line["step"]
            if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 1 << 53:
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            if raw.endswith(b"\n"):
                self.num_damaged += bool(raw.strip())
            return
        self.num_lines += 1
        if "event" in line:
            self.num_events += 1
            self.events.append(line)
        elif "eval" in line:
            for name, value in _flat(line):
                if name not in NO_METRIC and not name.startswith("num_"):
                    self._add(f"eval.{name}", str(line["eval"]), step, value)
        elif isinstance(line.get("experts"), dict):
            for decoder, shares in line["experts"].items():
                if isinstance(shares, dict):
                    self.experts.setdefault(decoder, Frames()).add(step, shares)
        elif isinstance(line.get("mixture"), dict):
            for group, known in (("mixture", self.mixture), ("asked", self.asked)):
                shares = dict(_flat(line.get(group) or {}))
                known.clear()
                known.update(shares)
                for name, share in shares.items():
                    self._add("mixture", name if group == "mixture" else name + ASKED, step, share)
        else:
            self._take_step(step, line)

    def _take_step(self, step: int, line: dict[str, Any]) -> None:
        self._gap = step - self.step if step > self.step else self._gap
        self.step, self.last = step, line
        for key, value in line.items():
            if key == "modalities" and isinstance(value, dict):
                for name, what in value.items():
                    for kind, number in _flat(what):
                        self._add(f"modalities.{kind}", name, step, number)
            elif isinstance(value, dict):
                for name, number in _flat(value):
                    self._add(key, name, step, number)
            elif key.endswith("expert_load") and isinstance(value, list):
                loads = [load for load in map(number_of, value) if load is not None]
                self._add(
                    "expert_load", key.removesuffix("expert_load").rstrip(".") or "thinker", step, max(loads or [1])
                )
            elif key != "step" and (number := number_of(value)) is not None:
                self._add("", key, step, number)
        self._sum(line)
        phase = line.get("phase")
        self.phases = [each for each in self.phases if each[0] < step]
        if isinstance(phase, str) and (not self.phases or self.phases[-1][1] != phase):
            self.phases.append((max(0, step - self._gap), phase))

    def _sum(self, line: Mapping[str, Any]) -> None:
        get = {key: number_of(line.get(key)) for key in ("seconds_per_step", "tokens_per_second", "mfu", "memory_gb")}
        seconds = (get["seconds_per_step"] or 0.0) * self._gap
        self.seconds += seconds
        self.tokens += (get["tokens_per_second"] or 0.0) * seconds
        if get["mfu"] is not None:
            self.work, self.work_seconds = self.work + get["mfu"] * seconds, self.work_seconds + seconds
        self.peak_gb = max(self.peak_gb, get["memory_gb"] or 0.0)
        loss = line.get("loss")
        self.num_nonfinite += isinstance(loss, float) and not math.isfinite(loss)
        slowest = line["imbalance"].get("slowest") if isinstance(line.get("imbalance"), dict) else None
        if isinstance(slowest, int):
            self.slowest[slowest] += 1

    def _add(self, group: str, name: str, step: int, value: float) -> None:
        series = self.series.get((group, name))
        if series is None:
            if len(self.series) >= MAX_SERIES:
                self.num_unnamed += 1
                return
            series = self.series[group, name] = Series()
        series.add(step, value)


def number_of(value: Any) -> float | None:
    """A value of JSON as a number, infinite ones too; None for anything else, and for integers beyond all bounds."""
    if type(value) is float:  # not isinstance: a bool is an int, and this runs for every number of a run
        return value
    try:
        return float(value) if type(value) is int else None
    except OverflowError:
        return None


def _flat(value: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, float]]:
    """Numbers of a dictionary, of those in it as OUTER.INNER."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        if isinstance(inner, dict) and depth < 3:
            yield from _flat(inner, f"{prefix}{name}.", depth + 1)
        elif (number := number_of(inner)) is not None:
            yield f"{prefix}{name}", number


def _lines(path: Path) -> Iterator[bytes]:
    """Lines with their ends; one that is longer than any of ours comes as a damaged one."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE):
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while (more := file.readline(MAX_LINE)) and not more.endswith(b"\n"):
                    pass
                line = b"too long\n"
            yield line
