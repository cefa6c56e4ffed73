"""By how much one is above the other, from pairs of figures: an estimate, and how far from the truth it may be.

A pair is taken at nearly the same moment, so that what a machine does slowly is in both. Ratios are taken as
logarithms, so that twice and half weigh the same and noise alone is no difference. Pairs of one start of the processes
have in common whatever that start was dealt (the addresses of their memory, the processors they are on), so each start
is one observation, however many pairs it has.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

TRIMMED = 0.2
"""Of the values at either end: what Wilcox and Yuen recommend."""
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""The 0.975 quantile of Student's t, from one degree of freedom on."""


class Estimate(NamedTuple):
    """A figure and its 95 % interval; all NaN without an observation, the interval infinite with one."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2%} ({self.low:+.2%} to {self.high:+.2%})"


def trimmed_mean(values: Sequence[float]) -> float:
    """The mean without a fifth of the values at either end.

    Raises:
        statistics.StatisticsError: there is no value.
    """
    cut = int(TRIMMED * len(values))
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def excess(
    pairs: Iterable[tuple[int, float, float]], middle: Callable[[Sequence[float]], float] = statistics.fmean
) -> list[float]:
    """By how much the second figure is above the first, one value for each start; 0.01 is one percent.

    Args:
        pairs: (start, first figure, second figure); the figures are above 0.
        middle: makes one value of the pairs of a start.
    """
    ratios: defaultdict[int, list[float]] = defaultdict(list)
    for start, first, second in pairs:
        ratios[start].append(math.log(second / first))
    return [math.expm1(middle(found)) for found in ratios.values()]


def estimate(observations: Sequence[float]) -> Estimate:
    """Their mean, and the interval in which it would lie in 95 of 100 repetitions if they are about normal."""
    if not observations:
        return Estimate(math.nan, math.nan, math.nan)
    mean, freedom = statistics.fmean(observations), len(observations) - 1
    if not freedom:
        return Estimate(mean, -math.inf, math.inf)
    # Beyond the table the last entry, which is too wide rather than too narrow.
    t = T_95[min(freedom, len(T_95)) - 1]
    half = t * statistics.stdev(observations) / math.sqrt(len(observations))
    return Estimate(mean, mean - half, mean + half)
