"""The iteration rule: +1 in process, the next hundred across processes, never a number twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamarkd.lighthouse.iteration import next_iteration


@pytest.mark.parametrize(
    ("joiners", "last_issued", "base", "expected"),
    [
        pytest.param([-1, -1], -1, -1, 0, id="first quorum of a job"),
        pytest.param([0, 0], 0, -1, 1, id="all restart in process"),
        pytest.param([0, -1], 0, -1, 1, id="a replacement enters a living session"),
        pytest.param([-1, -1], 1, -1, 100, id="all processes are new"),
        pytest.param([100, 100], 100, -1, 101, id="in process after that"),
        pytest.param([-1], 101, -1, 200, id="across processes again"),
        pytest.param([104, 104], 105, -1, 106, id="an answered iteration that was never entered is skipped"),
        pytest.param([199, 199], 199, -1, 200, id="more than 99 in-process restarts run on"),
        pytest.param([-1], 205, -1, 300, id="and a later session takes the next free hundred"),
        pytest.param([-1, -1], -1, 7, 100, id="the roster knows of iterations that this lighthouse does not"),
        pytest.param([7, 3], -1, -1, 8, id="a new lighthouse learns the iteration from the joiners"),
    ],
)
def test_table(joiners: list[int], last_issued: int, base: int, expected: int) -> None:
    assert next_iteration(joiners, last_issued, base) == expected


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), max_size=250))
def test_no_iteration_is_issued_twice_and_sessions_never_share_a_hundred(quorums: list[list[bool]]) -> None:
    issued, session = -1, 0
    for fresh in quorums:
        following = next_iteration([-1 if new or issued < 0 else issued for new in fresh], issued, -1)
        assert following > issued
        if all(fresh) and issued >= 0:
            assert following % 100 == 0
            assert following > session
            session = following
        issued = following
