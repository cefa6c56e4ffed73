"""What a benchmark makes of pairs of figures."""

from __future__ import annotations

import math
import random

import pytest

from harness.intervals import T_95, Estimate, estimate, excess, trimmed_mean


def test_the_trimmed_mean_leaves_out_a_fifth_at_either_end() -> None:
    assert trimmed_mean([100.0, 1.0, 2.0, 3.0, -50.0]) == 2.0
    assert trimmed_mean([1.0, 2.0, 6.0]) == 3.0


def test_a_start_is_one_observation_and_twice_weighs_as_much_as_half() -> None:
    assert excess([(0, 1.0, 2.0), (0, 2.0, 1.0), (1, 1.0, 1.1)]) == pytest.approx([0.0, 0.1])
    assert excess([(0, 1.0, 1.0), (0, 1.0, 1.5), (0, 2.0, 2.0)], sorted_middle) == pytest.approx([0.0])


def sorted_middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def test_without_observations_nothing_is_known_and_with_one_no_interval() -> None:
    assert all(map(math.isnan, estimate([])))
    assert estimate([0.25]) == Estimate(0.25, -math.inf, math.inf)


def test_the_interval_is_students() -> None:
    found = estimate([1.0, 2.0, 3.0])
    half = 4.303 * 1.0 / math.sqrt(3)
    assert found == pytest.approx((2.0, 2.0 - half, 2.0 + half))
    assert str(Estimate(0.004, -0.001, 0.009)) == "+0.40% (-0.10% to +0.90%)"


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    chance = random.Random(1)
    held = sum(
        one.low <= 0.0 <= one.high for one in (estimate([chance.gauss() for _ in range(10)]) for _ in range(2_000))
    )
    assert 0.93 < held / 2_000 < 0.97
    assert list(T_95) == sorted(T_95, reverse=True)
