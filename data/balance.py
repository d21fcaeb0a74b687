"""Deal the work of a step to ranks evenly: its packs for the decoder, and their media for each encoder.

    work of packs --sorted, cut into rows of one pack for each rank--> micro-batches
      --each row: heaviest to the least loaded--> ranks --swaps, while one is too heavy--> packs of each rank
    work of media, at the ranks of their packs --what is above the mean, end to end, fills what is below--> stretches

Packs of similar work share a micro-batch, so ranks that run in lockstep (ZeRO-3, expert parallelism) wait little. An
encoder attends within windows of audio, within temporal patches of a video and within an image: media may be cut there,
and the parts encoded anywhere. Most stay where the decoder needs them. Every rank computes the same.

Cost: for 1,024 ranks with 16 packs each 8 ms for the decoder, 0.2 us a medium for an encoder.

R ranks, K packs of a rank, M media, S stretches of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GOOD = 0.01  # above the mean by so much is good enough: evener ranks would make unevener micro-batches
MAX_ROUNDS = 32
MAX_TRIED = 64  # packs of a rank that a swap may move
ROUNDING = 1e-6  # of an atom
NONE = -1  # where a rank has no pack


def deal(works: Sequence[float] | np.ndarray, num_ranks: int) -> list[list[int]]:
    """Positions of the packs of each rank, heaviest first: every pack at one rank, counts differ by one at most.

    The heaviest rank is within 1 % of the mean, or else no heavier than by longest processing time first. The bound is
    in the packs: a rank that has the heaviest one has as many others as every rank, be they the lightest.
    """
    work_P = np.asarray(works, np.float64)
    table_RK, heaviest = _improved(_by_rows(work_P, num_ranks), work_P)
    if heaviest > (1 + GOOD) * work_P.sum() / num_ranks:
        other_RK, other = _improved(_longest_first(work_P, num_ranks), work_P)
        table_RK = other_RK if other < heaviest else table_RK
    return [sorted(row[row != NONE].tolist(), key=lambda pack: (-work_P[pack], pack)) for row in table_RK]


def _by_rows(work_P: np.ndarray, num_ranks: int) -> np.ndarray:
    """int64 [R, K]: packs in rows of similar work, the heaviest of each row to the least loaded rank."""
    order_P = np.argsort(-work_P, kind="stable")
    table_RK = np.full((num_ranks, -(-len(work_P) // num_ranks)), NONE)
    load_R = np.zeros(num_ranks)
    for k in range(table_RK.shape[1]):
        row = order_P[k * num_ranks : (k + 1) * num_ranks]
        ranks = np.argsort(load_R, kind="stable")[: len(row)]
        table_RK[ranks, k] = row
        load_R[ranks] += work_P[row]
    return table_RK


def _longest_first(work_P: np.ndarray, num_ranks: int) -> np.ndarray:
    """int64 [R, K]: the heaviest pack left goes to the least loaded rank that has room; counts as in `_by_rows`."""
    small, larger = divmod(len(work_P), num_ranks)  # `larger` ranks have one more
    table_RK = np.full((num_ranks, small + (larger > 0)), NONE)
    works, counts = work_P.tolist(), [0] * num_ranks
    loads = [(0.0, rank) for rank in range(num_ranks)]
    for pack in np.argsort(-work_P, kind="stable").tolist():
        load, rank = heapq.heappop(loads)
        while counts[rank] == small and not larger:
            load, rank = heapq.heappop(loads)
        larger -= counts[rank] == small
        table_RK[rank, counts[rank]] = pack
        counts[rank] += 1
        if counts[rank] <= small:
            heapq.heappush(loads, (load + works[pack], rank))
    return table_RK


def _improved(table_RK: np.ndarray, work_P: np.ndarray) -> tuple[np.ndarray, float]:
    """The table after swaps of one pack between heavy ranks and light ones, all pairs at once; its heaviest load.

    Of the swaps that make both ranks good the smallest is taken, since it disturbs the micro-batches least.
    """
    number_P = np.append(work_P, 0.0)  # NONE weighs nothing
    good = (1 + GOOD) * work_P.sum() / len(table_RK)
    for _ in range(MAX_ROUNDS):
        load_R = number_P[table_RK].sum(axis=1)
        order = np.argsort(-load_R, kind="stable")
        count = min(int((load_R > good).sum()), len(order) // 2)
        if not count:
            break
        heavy, light = order[:count], order[::-1][:count]
        give, take, found = _best_swaps(number_P, table_RK, load_R, heavy, light, good)
        if not found.any():
            break
        heavy, light, give, take = heavy[found], light[found], give[found], take[found]
        table_RK[heavy, give], table_RK[light, take] = table_RK[light, take], table_RK[heavy, give]
    return table_RK, float(number_P[table_RK].sum(axis=1).max(initial=0.0))


def _best_swaps(
    number_P: np.ndarray, table_RK: np.ndarray, load_R: np.ndarray, heavy: np.ndarray, light: np.ndarray, good: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns of the packs that each heavy rank gives and takes, and whether there is a swap that helps."""
    stride = -(-table_RK.shape[1] // MAX_TRIED) or 1
    given_HK, taken_HK = table_RK[heavy, ::stride], table_RK[light, ::stride]
    gap_H11 = (load_R[heavy] - load_R[light])[:, None, None]
    less_HKK = number_P[given_HK][:, :, None] - number_P[taken_HK][:, None, :]
    helps_HKK = (less_HKK > 1e-9 * gap_H11) & (less_HKK < (1 - 1e-9) * gap_H11)
    helps_HKK &= (given_HK != NONE)[:, :, None] & (taken_HK != NONE)[:, None, :]
    both_good_HKK = (load_R[heavy][:, None, None] - less_HKK <= good) & (
        load_R[light][:, None, None] + less_HKK <= good
    )
    cost_HKK = np.where(both_good_HKK, less_HKK, gap_H11 + np.abs(gap_H11 - 2 * less_HKK))
    cost_HX = np.where(helps_HKK, cost_HKK, np.inf).reshape(len(heavy), -1)
    best_H = cost_HX.argmin(axis=1)
    give, take = np.divmod(best_H, given_HK.shape[1])
    return give * stride, take * stride, np.isfinite(cost_HX[np.arange(len(heavy)), best_H])


@dataclass(frozen=True)
class Stretches:
    """Parts of media and the ranks that encode them; in the order of the media, each medium whole and once."""

    rank_S: np.ndarray  # int64
    medium_S: np.ndarray  # int64, rising
    start_S: np.ndarray  # int64: first atom, counted from the medium's start
    stop_S: np.ndarray  # int64: last atom + 1
    work_S: np.ndarray  # float64

    def of(self, rank: int) -> list[tuple[int, int, int]]:
        """(medium, first atom, last atom + 1) of what a rank encodes."""
        at = np.flatnonzero(self.rank_S == rank)
        return list(zip(self.medium_S[at].tolist(), self.start_S[at].tolist(), self.stop_S[at].tolist(), strict=True))

    def moved(self, home_M: np.ndarray) -> float:
        """Share of the work that is not done at the rank that needs it, which is the share of what must be sent."""
        return float(self.work_S[self.rank_S != home_M[self.medium_S]].sum() / max(self.work_S.sum(), 1e-300))


def deal_encoder(work_M: np.ndarray, atom_M: np.ndarray, home_M: np.ndarray, num_ranks: int) -> Stretches:
    """Deal the media of one step to the ranks that encode them, each where its pack is as far as balance allows.

    A medium of `work_M` (float64, above 0) consists of atoms of `atom_M` each, the last one maybe smaller: a window of
    audio, a temporal patch of a video, an image as a whole. `home_M` (int64) is the rank of the medium's pack, of at
    most 65,536. The heaviest rank is above the mean by one atom at most.
    """
    order_M = _line(atom_M, home_M)
    work_M, atom_M = work_M[order_M], atom_M[order_M]
    end_M = np.cumsum(work_M)
    counts_M = np.ceil(work_M / atom_M - ROUNDING).astype(np.int64)
    first_M = np.cumsum(counts_M) - counts_M  # atoms on the line before each medium
    edge_R = np.append(0.0, end_M)[np.searchsorted(home_M[order_M], np.arange(num_ranks + 1))]
    at_B, rank_B = _cuts(edge_R)
    place_B = np.searchsorted(end_M, at_B, side="right")  # the medium on the line that a cut falls into
    inside = place_B < len(end_M)
    at_B, rank_B, place_B = at_B[inside], rank_B[inside], place_B[inside]
    # rounded up, all of them: what a rank has above its due is one atom at its end, however many give to it
    offset_B = np.ceil((at_B - end_M[place_B] + work_M[place_B]) / atom_M[place_B] - ROUNDING).astype(np.int64)
    cut_B = first_M[place_B] + np.clip(offset_B, 0, counts_M[place_B])

    cut_S = np.sort(np.append(first_M, cut_B), kind="stable")
    cut_S = cut_S[np.diff(cut_S, append=counts_M.sum()) > 0]
    place_S = np.searchsorted(first_M, cut_S, side="right") - 1
    rank_S = rank_B[np.searchsorted(cut_B, cut_S, side="right") - 1]
    start_S = cut_S - first_M[place_S]
    stop_S = np.append(cut_S[1:], counts_M.sum())[: len(cut_S)] - first_M[place_S]
    work_S = np.minimum(stop_S * atom_M[place_S], work_M[place_S]) - start_S * atom_M[place_S]
    by_medium = np.argsort(order_M[place_S], kind="stable")
    return Stretches(*(column[by_medium] for column in (rank_S, order_M[place_S], start_S, stop_S, work_S)))


def _line(atom_M: np.ndarray, home_M: np.ndarray) -> np.ndarray:
    """int64 [M]: media rank by rank, those of large atoms first: they stay at home, where they need not fit."""
    coarse_M = (65_535 * (1 - atom_M / atom_M.max(initial=1e-300))).astype(np.uint16)  # sorted ten times as fast
    by_atom_M = np.argsort(coarse_M, kind="stable")
    return by_atom_M[np.argsort(home_M[by_atom_M].astype(np.uint16), kind="stable")]


def _cuts(edge_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions on the line at which stretches begin, rising, and their ranks; of equal positions the last one counts.

    `edge_R` [R + 1] is where each rank's own stretch begins and ends. A rank above the mean keeps the beginning of it;
    the rest goes to the ranks below the mean, in order, until each has the mean.
    """
    load_R = np.diff(edge_R)
    mean = load_R.mean()
    excess_R, room_R = np.maximum(load_R - mean, 0.0), np.maximum(mean - load_R, 0.0)
    given_R = np.append(0.0, np.cumsum(excess_R))  # [R + 1]: what the ranks before give away
    givers, takers = np.flatnonzero(excess_R), np.flatnonzero(room_R)
    if not len(givers) or not len(takers):
        return edge_R[:-1], np.arange(len(load_R))
    begin_T = np.append(0.0, np.cumsum(room_R[takers])[:-1])  # what the takers before each one have received
    takers, begin_T = takers[begin_T < given_R[-1]], begin_T[begin_T < given_R[-1]]  # all but for rounding
    source_T = np.searchsorted(given_R, begin_T, side="right") - 1
    at_T = edge_R[source_T + 1] - (given_R[source_T + 1] - begin_T)
    taker_G = takers[np.searchsorted(begin_T, given_R[givers], side="right") - 1]
    at_B = np.concatenate([at_T, edge_R[givers + 1] - excess_R[givers], edge_R[:-1]])
    rank_B = np.concatenate([takers, taker_G, np.arange(len(load_R))])
    order_B = np.argsort(at_B, kind="stable")
    return at_B[order_B], rank_B[order_B]
