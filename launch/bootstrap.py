"""Paired bootstrap of two results on the same samples: differences of metrics with their intervals.

    counts of A, B [N, K] --resample the N samples, the same for both, R times--> sums [R, K] --values--> differences
      --percentiles--> 95 % interval        --how many lie on either side of zero--> p-value

The test is that of Koehn, "Statistical significance tests for machine translation evaluation", 2004, with Efron's
percentile interval. Resamples are a pure function of the seed (data/hashing.py).
Cost: R * N hashes, 10 ns each, and R * N * K multiplications, BLOCK draws at a time.

Letters: N samples, K counts, R resamples, C of them at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.hashing import hashed
from train.suites import Counts, Suite

BLOCK = 4_000_000  # draws at a time
INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Difference:
    """Of one metric, B less A."""

    metric: str
    a: float
    b: float
    low: float
    high: float
    p: float
    higher_is_better: bool

    @property
    def difference(self) -> float:
        """B less A."""
        return self.b - self.a

    @property
    def verdict(self) -> str:
        """Of B, where the interval leaves zero out."""
        if self.low <= 0 <= self.high:
            return "no difference shown"
        return "better" if (self.difference > 0) == self.higher_is_better else "worse"


def paired(
    suite: Suite, a: Sequence[Counts], b: Sequence[Counts], resamples: int = 10_000, seed: int = 0
) -> list[Difference]:
    """Differences of a suite's metrics. `a` and `b` are counts of the same samples in the same order."""
    (names, a_NK), (_, b_NK) = _table(a), _table(b)
    both_N2K = np.concatenate([a_NK, b_NK], axis=1)
    ours, theirs = (_values(suite, names, x_NK.sum(0)) for x_NK in (a_NK, b_NK))
    draws: dict[str, list[np.ndarray]] = {name: [] for name in suite.METRICS}
    num, step = len(both_N2K), max(1, BLOCK // len(both_N2K))
    for start in range(0, resamples, step):
        weights_CN = _weights(np.arange(start, min(resamples, start + step)), num, seed)
        sums_C2K = weights_CN @ both_N2K
        first, second = (_values(suite, names, part) for part in np.split(sums_C2K, 2, axis=1))
        for name in draws:
            draws[name].append(second[name] - first[name])
    found = []
    for name, higher in suite.METRICS.items():
        differences_R = np.concatenate(draws[name])
        low, high = np.percentile(differences_R, INTERVAL)
        # two-sided; the result itself counts as a resample, so p is never 0
        sides = [(differences_R <= 0).sum(), (differences_R >= 0).sum()]
        p = min(1.0, 2 * (min(sides) + 1) / (len(differences_R) + 1))
        found.append(
            Difference(name, float(ours[name]), float(theirs[name]), float(low), float(high), float(p), higher)
        )
    return found


def _weights(resamples_C: np.ndarray, num: int, seed: int) -> np.ndarray:
    """How often each of `num` samples is drawn in each resample, float64 [C, N]."""
    drawn_CN = hashed(seed, resamples_C[:, None], np.arange(num)[None]) % np.uint64(num)
    flat = drawn_CN.astype(np.int64) + np.arange(len(resamples_C))[:, None] * num
    return np.bincount(flat.ravel(), minlength=len(resamples_C) * num).reshape(-1, num).astype(np.float64)


def _table(counts: Sequence[Counts]) -> tuple[list[str], np.ndarray]:
    """Names of the counts, and float64 [N, K], the number of samples among them."""
    names = [*counts[0], "num_samples"]
    return names, np.array([[*(each[name] for name in names[:-1]), 1] for each in counts], np.float64)


def _values(suite: Suite, names: Sequence[str], sums_XK: np.ndarray) -> Mapping[str, np.ndarray]:
    return suite.values({name: sums_XK[..., k] for k, name in enumerate(names)})
