"""One line of figures from many samples, by rules that hold for every benchmark.

The median always; the 99th percentile from 100 samples on, the maximum below; no sample is ever left out. A
sample that never came is infinite: it moves the median as a slow one does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SAMPLES_FOR_P99 = 100


@dataclass(frozen=True)
class Summary:
    """Figures in the unit of the samples. `p99` is None below 100 samples."""

    n: int
    minimum: float
    p50: float
    p99: float | None
    maximum: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        """Summarise at least one sample; the percentile is the nearest rank."""
        ordered = sorted(samples)
        p99 = ordered[math.ceil(0.99 * len(ordered)) - 1] if len(ordered) >= SAMPLES_FOR_P99 else None
        return cls(len(ordered), ordered[0], statistics.median(ordered), p99, ordered[-1])


def duration(seconds: float) -> str:
    """`seconds` for people: milliseconds below one second, seconds above, three digits that count."""
    if seconds < 0.1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
