"""Curves of runs as charts for the page: what is drawn together, in which unit.

    Metrics of each stage --joined--> a curve of the whole run --> one run:      a chart of all names of a group
                                                               --> several runs: a chart of each name, a curve a run

Stages stand one after the other with a gap between them. Curves are thinned until all of the page have MAX_POINTS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from launch.report_metrics import ASKED, POINTS, Series, thinned
from launch.report_read import Run

MAX_POINTS = 200_000  # of the page: about 3 MB
MAX_CURVES = 32  # of a chart
GRID = 300  # points of a stacked area
Names = Mapping[str, Series]


@dataclass(frozen=True)
class Spec:
    """What to draw of a group of curves."""

    group: str
    title: str
    unit: str
    names: tuple[str, ...] | Callable[[str], bool] = lambda name: True
    note: str = ""
    log: bool = False  # where the values span much
    percent: bool = False
    ordered: bool = False  # the names are a sequence, such as codebooks
    area: bool = False  # stacked
    share: bool = False  # each of their sum
    dots: bool = False  # few points, each of which is shown
    exact: bool = False  # never smoothed
    change: Callable[[float], float] = lambda value: value

    def takes(self, name: str) -> bool:
        """Whether a curve of the group belongs here."""
        return name in self.names if isinstance(self.names, tuple) else self.names(name)


class Charts:
    """Makes charts of `runs`, and keeps their data for the page."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        curves = sum(len(stage.metrics.series) for run in runs for stage in run.stages)
        self.most = max(100, min(POINTS, MAX_POINTS // max(1, curves)))
        self.num_thinned = 0
        self.data: list[dict[str, Any]] = []

    def draw(self, specs: Sequence[Spec]) -> list[int]:
        """Places in `data` of the charts that have anything to show."""
        first = len(self.data)
        for spec in specs:
            self.data += self._single(spec) if len(self.runs) == 1 or spec.area else self._several(spec)
        return list(range(first, len(self.data)))

    def _single(self, spec: Spec) -> Iterator[dict[str, Any]]:
        for run in self.runs:
            curves = {name: series for name, series in joined(run, spec.group).items() if spec.takes(name)}
            if spec.area:
                curves = gridded(curves, spec.share, silences(run, curves))
            title = spec.title if len(self.runs) == 1 else f"{spec.title}: {run.name}"
            yield from self._chart(spec, title, [(name, 0, series) for name, series in curves.items()])

    def _several(self, spec: Spec) -> Iterator[dict[str, Any]]:
        of = [joined(run, spec.group) for run in self.runs]
        names = list(
            dict.fromkeys(name for curves in of for name in curves if spec.takes(name) and not name.endswith(ASKED))
        )
        for name in names[:MAX_CURVES]:
            title = spec.title if not spec.group and len(names) == 1 else f"{spec.title}: {_shown(name)}"
            found = [(run.name, at, of[at][name]) for at, run in enumerate(self.runs) if name in of[at]]
            yield from self._chart(spec, title, found, by_run=True)

    def _chart(
        self, spec: Spec, title: str, curves: Sequence[tuple[str, int, Series]], by_run: bool = False
    ) -> Iterator[dict[str, Any]]:
        drawn = [self._curve(spec, *curve, by_run) for curve in curves[:MAX_CURVES]]
        values = [y for curve in drawn for y in curve["y"] if y is not None]
        if not values or (spec.area and not any(values)):
            return
        low, high = min(values), max(values)
        more = len(curves) - len(drawn)
        yield {
            "title": title,
            "unit": spec.unit,
            "note": spec.note + (f" {more} more curves are not drawn." if more else ""),
            "log": spec.log and low > 0 and high > 8 * low,
            "percent": spec.percent,
            "ordered": spec.ordered and not by_run,
            "area": spec.area,
            "dots": spec.dots,
            "exact": spec.exact or spec.dots,
            "byRun": by_run,
            "named": bool(spec.group),
            "curves": drawn,
        }

    def _curve(self, spec: Spec, name: str, run: int, series: Series, by_run: bool) -> dict[str, Any]:
        x, y = thinned(series.x, series.y, self.most)
        self.num_thinned += len(x) < len(series.x) or len(series.x) >= POINTS
        label = name if by_run else _shown(name)
        return {
            "name": label,
            "run": run,
            "x": x,
            "y": [_rounded(spec.change(value)) for value in y],
            "dash": name.endswith(ASKED),
        }


def joined(run: Run, group: str) -> dict[str, Series]:
    """Curves of a group over all stages; a gap where one stage ends."""
    found: dict[str, Series] = {}
    for stage in run.stages:
        for name, series in stage.metrics.get(group).items():
            whole = found.setdefault(name, Series())
            if whole.x:
                whole.x.append(whole.x[-1])
                whole.y.append(math.nan)
            whole.x += [x + stage.offset for x in series.x]
            whole.y += series.y
    return found


def silences(run: Run, curves: Names) -> list[tuple[int, int]]:
    """Stages between others in which no curve has a point: the step after which one begins, and its last."""
    every = {x for series in curves.values() for x in series.x}
    stages = [(stage.offset, after.offset) for stage, after in pairwise(run.stages)]
    empty = [(start, stop) for start, stop in stages if not any(start < x <= stop for x in every)]
    return [(start, stop) for start, stop in empty if every and min(every) <= start and stop < max(every)]


def gridded(curves: Names, share: bool = False, holes: Sequence[tuple[int, int]] = ()) -> dict[str, Series]:
    """Curves with the same x, to be stacked: the middle of what lies in each stretch; 0 where there is nothing.

    A stretch without a point is bridged, but for those in `holes`, which are at 0.
    """
    every = sorted(
        {x for series in curves.values() for x in series.x} | {x for start, stop in holes for x in (start + 1, stop)}
    )
    if not every:
        return {}
    if len(every) > GRID:
        width = (every[-1] - every[0] + 1) / GRID
        edges = [every[0] + width * place for place in range(GRID + 1)]
    else:
        edges = [*map(float, every), math.inf]
    found = {name: _means(series, edges) for name, series in curves.items()}
    held = [
        place
        for place, edge in enumerate(edges[:-1])
        if any(values[place] is not None for values in found.values()) or any(a < edge <= b for a, b in holes)
    ]
    out = {}
    for name, values in found.items():
        out[name] = Series()
        out[name].x = [round(edges[place]) for place in held]
        out[name].y = [values[place] or 0.0 for place in held]
    if share:
        totals = [sum(values) or 1.0 for values in zip(*(series.y for series in out.values()), strict=True)]
        for series in out.values():
            series.y = [value / total for value, total in zip(series.y, totals, strict=True)]
    return out


def _means(series: Series, edges: Sequence[float]) -> list[float | None]:
    sums, counts, place = [0.0] * (len(edges) - 1), [0] * (len(edges) - 1), 0
    for x, y in zip(series.x, series.y, strict=True):
        if math.isnan(y):
            continue
        while place < len(sums) - 1 and x >= edges[place + 1]:
            place += 1
        sums[place], counts[place] = sums[place] + y, counts[place] + 1
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]


def marks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each run its name, its events on the steps of the charts, and where a phase or stage begins."""
    found = []
    for run in runs:
        of = f"{run.name}: " if len(runs) > 1 else ""
        events = [
            [event["step"] + stage.offset, str(event["event"]), f"{of}{event.get('text', event['event'])}"]
            for stage in run.stages
            for event in stage.metrics.events
        ]
        if len(run.stages) > 1:
            bounds = [[stage.offset, stage.name] for stage in run.stages]
        else:
            bounds = [[step, name] for stage in run.stages for step, name in stage.metrics.phases]
        found.append({"name": run.name, "events": events[-300:], "bounds": bounds if len(bounds) > 1 else []})
    return found


def _shown(name: str) -> str:
    """Names of metrics as words."""
    return name.replace("_", " ")


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
