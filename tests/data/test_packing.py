"""Packing: every sample once, no sequence too long, hardly any padding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import pack


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 50).flatmap(lambda size: st.tuples(st.just(size), st.lists(st.integers(0, size), max_size=80))))
def test_every_sample_once_and_none_too_long(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    order, starts = pack(np.array(lengths, np.int64), capacity)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert starts[0] == 0 and starts[-1] == len(lengths)
    loads = [sum(lengths[i] for i in order[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
    assert all(load <= capacity for load in loads) and all(np.diff(starts) > 0)
    # no two packs fit into one: the least that best fit promises
    assert len(loads) < 2 or sum(sorted(loads)[:2]) > capacity or len(lengths) == 0


@pytest.mark.parametrize("capacity", [8_192, 32_768])
def test_long_tailed_mix_wastes_below_half_a_percent(capacity: int) -> None:
    rng = np.random.default_rng(0)
    scales = np.array([350, 800, 520, 4_500])[rng.choice(4, 30_000, p=[0.45, 0.30, 0.15, 0.10])]
    lengths = np.clip(scales * np.exp(rng.normal(0, 0.8, 30_000)), 20, capacity * 0.8).astype(np.int64)
    _, starts = pack(lengths, capacity)
    assert 1 - lengths.sum() / ((len(starts) - 1) * capacity) < 0.005


def test_company_is_random() -> None:
    """Packs are not sorted by size: the long ones are spread over packs with short ones."""
    rng = np.random.default_rng(0)
    lengths = np.where(rng.random(20_000) < 0.5, rng.integers(20, 60, 20_000), rng.integers(200, 900, 20_000))
    order, starts = pack(lengths, 4_096)
    long_shares = [np.mean(lengths[order[a:b]] > 100) for a, b in zip(starts, starts[1:], strict=False)]
    assert np.mean([0.05 < share < 0.95 for share in long_shares]) > 0.8
