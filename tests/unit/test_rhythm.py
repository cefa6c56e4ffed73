"""When timers fire."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamarkd.rhythm import next_beat


@pytest.mark.parametrize(
    ("now", "period", "expected"),
    [
        (12.34, 0.1, 12.4),
        (12.34, 0.25, 12.5),
        (12.34, 1.0, 13.0),
        (12.5, 0.5, 13.0),
        (12.499999, 0.5, 13.0),  # a timer that fired too early by the clock's resolution is not fired again
        (12.51, 0.5, 13.0),
        (14.2, 0.5, 14.5),  # beats that were missed are not made up for
    ],
)
def test_the_next_multiple_that_is_still_to_come(now: float, period: float, expected: float) -> None:
    assert next_beat(now, period) == pytest.approx(expected)


@given(st.floats(0.0, 1e8), st.sampled_from([0.1, 0.25, 0.5, 1.0]))
def test_a_timer_goes_on_and_keeps_its_rhythm(now: float, period: float) -> None:
    due = next_beat(now, period)
    assert 0 < due - now <= period * 1.0011
    assert next_beat(due, period) - due == pytest.approx(period, abs=1e-6)


@given(st.floats(0.0, 1e8))
def test_who_has_half_the_period_fires_together_with_the_other(now: float) -> None:
    long = next_beat(now, 0.5)
    assert next_beat(long - 0.05, 0.25) == pytest.approx(long, abs=1e-6)
    assert next_beat(long - 0.05, 0.1) == pytest.approx(long, abs=1e-6)
