"""Balance: every pack and every atom once, equal counts, ranks within 2 %, the same everywhere."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.balance import Stretches, deal, deal_encoder
from data.costs import Work
from data.packing import pack

WORKS = st.lists(st.one_of(st.floats(0, 1e6), st.integers(0, 5).map(float)), max_size=80)
MEDIA = st.lists(st.tuples(st.floats(0.1, 1e4), st.floats(0.1, 500), st.integers(0, 100)), max_size=60)


def longest_first(works: list[float], num_ranks: int) -> float:
    """Heaviest rank by longest processing time first with equal counts, one pack at a time."""
    small, larger = divmod(len(works), num_ranks)
    loads = [(0.0, rank, 0) for rank in range(num_ranks)]
    done = [0.0]
    for work in sorted(works, reverse=True):
        while loads[0][2] == small and not larger:
            done.append(heapq.heappop(loads)[0])
        load, rank, count = heapq.heappop(loads)
        larger -= count == small
        if count + 1 > small:
            done.append(load + work)
        else:
            heapq.heappush(loads, (load + work, rank, count + 1))
    return max(done + [load for load, _, _ in loads])


@settings(max_examples=300, deadline=None)
@given(WORKS, st.integers(1, 12))
def test_every_pack_at_one_rank_and_counts_equal(works, num_ranks) -> None:
    dealt = deal(works, num_ranks)
    assert dealt == deal(np.array(works), num_ranks)
    assert sorted(pack for packs in dealt for pack in packs) == list(range(len(works)))
    assert len(dealt) == num_ranks
    assert {len(packs) for packs in dealt} <= {len(works) // num_ranks, -(-len(works) // num_ranks)}
    for packs in dealt:
        assert [works[pack] for pack in packs] == sorted((works[pack] for pack in packs), reverse=True)
    heaviest = max(sum(works[pack] for pack in packs) for packs in dealt)
    good = 1.01 * sum(works) / num_ranks
    assert heaviest <= max(good, longest_first(works, num_ranks)) * (1 + 1e-9)


def test_swaps_mend_what_longest_first_cannot() -> None:
    works = [3.0, 3.0, 2.0, 2.0, 2.0, 0.0]  # longest first: 3 + 2 + 2 and 3 + 2 + 0
    assert longest_first(works, 2) == 7
    assert [sum(works[pack] for pack in packs) for packs in deal(works, 2)] == [6, 6]


def packs_of_mix(seed: int, count: int, capacity: int) -> np.ndarray:
    """Decoder work of packs of a long-tailed mix, its longest samples cut to the capacity."""
    rng = np.random.default_rng(seed)
    scales = np.array([350, 800, 520, 5_000])[rng.choice(4, count * capacity // 900, p=[0.45, 0.30, 0.15, 0.10])]
    lengths = np.clip(scales * np.exp(rng.normal(0, 0.8, len(scales))), 20, min(capacity, 27_000)).astype(np.int64)
    order, starts = pack(lengths, capacity)
    works = np.add.reduceat(Work().decoder(lengths[order]), starts[:-1])
    assert len(works) >= count
    return works[rng.permutation(len(works))[:count]]


@pytest.mark.parametrize("capacity", [8_192, 32_768])
@pytest.mark.parametrize("num_ranks", [8, 64, 256])
def test_sixteen_packs_a_rank_are_within_two_percent_in_step(num_ranks: int, capacity: int) -> None:
    work_P = packs_of_mix(1, 16 * num_ranks, capacity)
    work_RK = work_P[np.array(deal(work_P, num_ranks))]
    load_R = work_RK.sum(axis=1)
    robin = work_P.reshape(-1, num_ranks).sum(axis=0)
    assert load_R.max() / load_R.mean() < 1.011 < robin.max() / robin.mean()
    # waiting for each other after every pack costs little: the packs of a micro-batch are alike
    assert work_RK.max(axis=0).sum() / load_R.mean() < (1.03 if capacity == 8_192 else 1.1)


def encoder(media) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns for `deal_encoder`: atoms are at most the medium."""
    work_M = np.array([work for work, _, _ in media])
    atom_M = np.minimum(np.array([atom for _, atom, _ in media]), work_M)
    return work_M, atom_M, np.array([home for _, _, home in media], np.int64)


def check_whole(stretches: Stretches, work_M: np.ndarray, atom_M: np.ndarray) -> None:
    """Every atom of every medium in one stretch, in order, with its work."""
    atoms_M = np.ceil(work_M / atom_M - 1e-6).astype(int)
    done_M, sum_M = np.zeros(len(work_M), int), np.zeros(len(work_M))
    rows = zip(stretches.medium_S, stretches.start_S, stretches.stop_S, stretches.work_S, strict=True)
    for medium, start, stop, work in rows:
        assert start == done_M[medium] < stop
        done_M[medium] = stop
        sum_M[medium] += work
    assert (done_M == atoms_M).all()
    np.testing.assert_allclose(sum_M, work_M)
    assert (np.diff(stretches.medium_S) >= 0).all()


@settings(max_examples=300, deadline=None)
@given(MEDIA, st.integers(1, 12))
def test_every_atom_encoded_once_and_no_rank_above_the_mean_by_more_than_one(media, num_ranks) -> None:
    work_M, atom_M, home_M = encoder(media)
    home_M %= num_ranks
    stretches = deal_encoder(work_M, atom_M, home_M, num_ranks)
    check_whole(stretches, work_M, atom_M)
    again = deal_encoder(work_M, atom_M, home_M, num_ranks)
    assert all(
        (ours == theirs).all() for ours, theirs in zip(vars(stretches).values(), vars(again).values(), strict=True)
    )
    load_R = np.bincount(stretches.rank_S, stretches.work_S, num_ranks)
    assert load_R.max() <= load_R.mean() + atom_M.max(initial=0) * (1 + 1e-5)
    excess = np.maximum(np.bincount(home_M, work_M, num_ranks) - work_M.sum() / num_ranks, 0).sum()
    assert stretches.moved(home_M) * work_M.sum() <= excess + 1e-6 * (1 + work_M.sum())  # nothing moves for nothing
    listed = [(rank, *stretch) for rank in range(num_ranks) for stretch in stretches.of(rank)]
    columns = (stretches.rank_S, stretches.medium_S, stretches.start_S, stretches.stop_S)
    assert sorted(listed) == sorted(zip(*(column.tolist() for column in columns), strict=True))


def test_balanced_media_stay_at_home() -> None:
    home_M = np.array([2, 0, 1, 0, 1, 2])
    stretches = deal_encoder(np.full(6, 50.0), np.full(6, 50.0), home_M, 3)
    assert stretches.moved(home_M) == 0 and len(stretches.rank_S) == 6
    assert stretches.of(0) == [(1, 0, 1), (3, 0, 1)]


def test_large_images_stay_where_they_need_not_fit() -> None:
    home_M = np.array([0, 0, 0, 0, 1])
    work_M = np.array([10.0, 10.0, 10.0, 100.0, 60.0])
    stretches = deal_encoder(work_M, work_M, home_M, 2)
    assert np.bincount(stretches.rank_S, stretches.work_S).tolist() == [100, 90]


def test_one_long_recording_is_encoded_by_all_ranks() -> None:
    """40 minutes at one of 64 ranks: the case that otherwise leaves 63 of them idle."""
    window = float(Work().audio(np.array(800)))
    frames = np.array([240_000])
    stretches = deal_encoder(Work().audio(frames), np.array([window]), np.array([7]), 64)
    load_R = np.bincount(stretches.rank_S, stretches.work_S, 64)
    assert set(np.diff(np.append(stretches.start_S, 300))) <= {4, 5} and (load_R > 0).all()
    assert stretches.stop_S[-1] == 300


@pytest.mark.parametrize("num_ranks", [8, 64, 1024])
def test_encoder_is_within_two_percent_where_the_decoders_deal_is_far_off(num_ranks: int) -> None:
    rng = np.random.default_rng(num_ranks)
    count = 16 * 60 * num_ranks // 10
    frames = np.clip(4_000 * np.exp(rng.normal(0, 0.9, count)), 50, 180_000)
    home_M = rng.integers(0, num_ranks, count)
    work_M, atom_M = Work().audio(frames), np.full(count, float(Work().audio(np.array(800))))
    stretches = deal_encoder(work_M, atom_M, home_M, num_ranks)
    load_R, home_R = np.bincount(stretches.rank_S, stretches.work_S), np.bincount(home_M, work_M)
    assert load_R.max() / load_R.mean() < 1.02 < 1.15 < home_R.max() / home_R.mean()
    assert stretches.moved(home_M) < 0.12
