"""A shuffle that is computed where it is needed: any part of it, without the rest and without memory.

A Feistel network permutes the numbers below a power of four; those that fall outside of the data set are sent through
again until they fall inside (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Meant
to mix samples, not to hide them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def shuffled(start: int, stop: int, size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The samples at these places of the shuffled order; over all places each sample once.

    Args:
        start, stop: places, 0 <= start <= stop <= size.
        size: samples of the data set, 2**60 at most.
        seed: another one gives another order.
        epoch: likewise.

    Returns:
        Their numbers, of shape (stop - start,).
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = [_mixed(seed * ROUNDS + turn, epoch) for turn in range(ROUNDS)]
    found = _network(np.arange(start, stop, dtype=np.uint64), half, keys)
    outside = np.flatnonzero(found >= size)
    while outside.size:
        found[outside] = _network(found[outside], half, keys)
        outside = outside[found[outside] >= size]
    return found.astype(np.int64)


def _network(values: NDArray[np.uint64], half: int, keys: list[int]) -> NDArray[np.uint64]:
    width, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> width, values & mask
    for key in keys:
        left, right = right, left ^ (_hash(right + np.uint64(key)) & mask)
    return left << width | right


def _hash(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # The finalizer of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mixed(seed: int, epoch: int) -> int:
    start = (seed * _GOLDEN + epoch * 0xD1B54A32D192ED03 + 1) & _MASK
    return int(_hash(np.array([start], dtype=np.uint64))[0])
