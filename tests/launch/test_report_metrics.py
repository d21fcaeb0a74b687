"""launch.report_metrics: what is kept of a long metrics.jsonl."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import report_metrics
from launch.report_charts import gridded, silences
from launch.report_metrics import Metrics, Series, cells, thinned


@given(st.floats(1 / 16, 16))
def test_a_cell_is_within_a_fiftieth_of_its_load(load):
    found = cells([[load / 20, *[0.0] * 19]])
    assert found and found[0] == (1, 20) and found[1][1:] == bytes(19)
    assert 2 ** ((found[1][0] - 1) / 254 * 8 - 4) == pytest.approx(load, rel=0.02)


@pytest.mark.parametrize("shares", [None, [], [[]], [[1], [1, 2]], [["a"]], "ab", 3, [[None]]])
def test_what_is_no_table_of_loads_is_left_out(shares):
    assert cells(shares) is None


def test_steps_that_come_again_replace_what_was_there():
    series = Series()
    for step in (10, 20, 30, 40, 30, 40, 50):
        series.add(step, float(len(series.x)))
    assert series.x == [10, 20, 30, 40, 50]


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=400), st.integers(10, 60))
def test_thinning_keeps_ends_order_lowest_and_highest(values, most):
    x = list(range(0, 3 * len(values), 3))
    thin_x, thin_y = thinned(x, values, most)
    assert len(thin_x) <= most + 2 and thin_x == sorted(set(thin_x)) and {x[0], x[-1]} <= set(thin_x)
    finite = [value for value in values if not math.isnan(value)]
    kept = [value for value in thin_y if not math.isnan(value)]
    assert not finite or (min(kept), max(kept)) == (min(finite), max(finite))
    known = dict(zip(x, values, strict=True))
    assert all(y == known[at] or math.isnan(known[at]) for at, y in zip(thin_x, thin_y, strict=True))


def test_metrics_do_not_grow_with_the_file(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 30_001):
            file.write(f'{{"step": {step}, "loss": 1.0}}\n')
            if step % 10 == 0:
                file.write(f'{{"step": {step}, "experts": {{"thinker": {{"all": [[0.5, 0.5]]}}}}}}\n')
                file.write(f'{{"step": {step}, "event": "spike", "text": "high"}}\n')
    found = Metrics.read(path)
    assert len(found.series["", "loss"].x) <= 4 * report_metrics.POINTS
    assert len(found.experts["thinker"].kept) <= 2 * report_metrics.FRAMES
    assert len(found.events) == report_metrics.MAX_EVENTS and found.num_events == 3000
    shape, frames = found.experts["thinker"].chosen(60)
    assert shape == (1, 2) and len(frames) <= 60 and frames[-1][0] == 30_000


@pytest.mark.parametrize("most", [10, 1000])  # a point for every step, and cells of several steps
def test_a_stage_without_points_is_no_slope_in_a_stacked_area(most: int) -> None:
    before, after = range(1, most), range(3 * most + 1, 4 * most)
    curves = {"image": Series(), "text": Series()}
    for step in (*before, *after):
        curves["image"].add(step, 1.0)
    for step in after:
        curves["text"].add(step, 3.0)
    stages = [SimpleNamespace(offset=offset) for offset in (0, most, 3 * most)]
    (hole,) = found = silences(SimpleNamespace(stages=stages), curves)  # pyright: ignore[reportArgumentType]
    assert hole == (most, 3 * most)
    image, text = gridded(curves, share=True, holes=found).values()
    assert image.x == text.x == sorted(image.x)
    inside = [y for x, y in zip(image.x, image.y, strict=True) if most < x < 2.9 * most]
    assert set(inside) == {0.0}
    assert {y for x, y in zip(image.x, image.y, strict=True) if x < most} == {1.0}
    assert {y for x, y in zip(text.x, text.y, strict=True) if x > 3 * most} == {0.75}
