"""Random numbers that are a pure function of what they are for: the same in every process and library version.

    (seed, epoch, sample, ...) --SplitMix64, word by word--> 64 bits

SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.  Cost: 10 ns a number.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def hashed(*words: int | np.ndarray) -> np.ndarray:
    """uint64 hash of the words, which are integers or broadcastable integer arrays, at least one of them an array."""
    state = np.zeros(1, np.uint64)
    for word in words:
        bits = np.uint64(word % (1 << 64)) if isinstance(word, int) else word.astype(np.uint64)
        state = _mix(state ^ bits)
    return state


def permutation(count: int, *words: int) -> np.ndarray:
    """A random order of 0 to count - 1 (int64) that depends on the words only."""
    return np.argsort(hashed(*words, np.arange(count)), kind="stable")


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _MIX1
    state = (state ^ (state >> np.uint64(27))) * _MIX2
    return state ^ (state >> np.uint64(31))
