"""Rank assignment as tables: who was started, who is left, and what becomes of their ranks."""

from __future__ import annotations

import re
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamark.inprocess import Compose
from seamark.inprocess.exceptions import RestartAbort
from seamark.inprocess.rank_assignment import (
    ActivateAllRanks,
    ActiveWorldSizeDivisibleBy,
    FillGaps,
    FilterGroupedByKey,
    MaxActiveWorldSize,
    Place,
    ShiftRanks,
    assign,
    keys_of,
)


def places(left, assignment, hosts=None):
    """The members of these initial ranks, each with what it would say in its join."""
    hosts = hosts or {}
    return [
        Place(f"m{rank}", rank, keys_of(assignment, rank, 8, {"HOST": hosts.get(rank, "h")})) for rank in sorted(left)
    ]


def new_ranks(assignment, left, world_size=8, hosts=None):
    ranks = assign(assignment, places(left, assignment, hosts), world_size)
    return {int(place.member[1:]): place.rank for place in ranks.places}, ranks


@pytest.mark.parametrize(
    ("assignment", "left", "expected"),
    [
        pytest.param(ShiftRanks(), range(8), {rank: rank for rank in range(8)}, id="nobody is gone"),
        pytest.param(ShiftRanks(), (1, 2, 3), {1: 0, 2: 1, 3: 2}, id="shift: rank 0 is gone"),
        pytest.param(ShiftRanks(), (0, 1, 3, 6, 7), {0: 0, 1: 1, 3: 2, 6: 3, 7: 4}, id="shift: several are gone"),
        pytest.param(FillGaps(), (1, 2, 3, 4, 5, 6, 7), {7: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6}, id="fill rank 0"),
        pytest.param(FillGaps(), (0, 1, 3, 6, 7), {0: 0, 1: 1, 6: 2, 3: 3, 7: 4}, id="fill: several are gone"),
        pytest.param(FillGaps(), (0, 1, 2), {0: 0, 1: 1, 2: 2}, id="fill: the tail is gone"),
        pytest.param(Compose(ActivateAllRanks(), ShiftRanks()), (2, 5), {2: 0, 5: 1}, id="composed"),
    ],
)
def test_gaps_are_closed(assignment, left, expected):
    assert new_ranks(assignment, left)[0] == expected


@pytest.mark.parametrize(
    ("active", "left", "takes_part"),
    [
        pytest.param(MaxActiveWorldSize(4), 8, 4, id="four spares"),
        pytest.param(MaxActiveWorldSize(4), 3, 3, id="the spares are used up"),
        pytest.param(MaxActiveWorldSize(), 8, None, id="no limit"),
        pytest.param(ActiveWorldSizeDivisibleBy(4), 7, 4, id="divisible by 4"),
        pytest.param(ActiveWorldSizeDivisibleBy(1), 7, 7, id="divisible by 1"),
        pytest.param(Compose(ActiveWorldSizeDivisibleBy(4), MaxActiveWorldSize(6)), 8, 4, id="both"),
        pytest.param(Compose(ActivateAllRanks(), MaxActiveWorldSize(2)), 8, None, id="all after all"),
    ],
)
def test_some_take_part_and_others_are_spares(active, left, takes_part):
    _, ranks = new_ranks(Compose(active, ShiftRanks()), range(left))
    assert ranks.active_world_size == takes_part


def test_whole_groups_are_dropped():
    by_host = FilterGroupedByKey("HOST", lambda count: count == 2)
    hosts = {0: "a", 1: "a", 2: "b", 3: "b", 4: "c", 5: "c"}
    assignment = Compose(ShiftRanks(), by_host)
    after, ranks = new_ranks(assignment, (0, 1, 3, 4, 5), 6, hosts)
    assert after == {0: 0, 1: 1, 4: 2, 5: 3}
    assert set(ranks.discarded) == {"m3"}
    assert "'b' has 1 ranks" in ranks.discarded["m3"]


def test_the_snippet_of_the_launchers_documentation_works_as_pasted():
    rank_assignment = (
        Compose(
            ShiftRanks(),
            FilterGroupedByKey(
                key_or_fn=lambda *_: socket.gethostname(),
                condition=lambda count: count == 8,
            ),
        ),
    )
    from seamark import Wrapper

    assignment = Wrapper(rank_assignment=rank_assignment).components.assignment
    after, ranks = new_ranks(assignment, range(8))
    assert after == {rank: rank for rank in range(8)}
    assert not ranks.discarded


def test_a_key_is_looked_up_by_the_member_itself():
    assignment = FilterGroupedByKey(lambda rank, world_size: (rank * 2) // world_size, condition=bool)
    assert keys_of(assignment, 5, 8)[assignment.key] == "1"
    with pytest.raises(KeyError, match="RACK"):
        keys_of(FilterGroupedByKey("RACK", condition=bool), 0, 1, {})


def test_members_that_assign_differently_are_found_out():
    mine, theirs = MaxActiveWorldSize(2), MaxActiveWorldSize(3)
    mixed = [*places((0, 1), mine), *places((2,), theirs)]
    with pytest.raises(RestartAbort, match="give all of them the same script"):
        assign(mine, mixed, 3)


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (ShiftRanks(), FillGaps(), False),
        (Compose(ShiftRanks(), MaxActiveWorldSize(2)), Compose(MaxActiveWorldSize(2), ShiftRanks()), False),
        (Compose(ShiftRanks()), Compose(Compose(ShiftRanks())), True),
        (FilterGroupedByKey("A", lambda n: n == 8), FilterGroupedByKey("A", lambda n: n == 4), False),
        (FilterGroupedByKey("A", lambda n: n == 8), FilterGroupedByKey("A", lambda n: n == 8), True),
    ],
)
def test_what_an_assignment_is_known_by(one, other, alike):
    known = [keys_of(assignment, 0, 1, {"A": "x"})["assignment"] for assignment in (one, other)]
    assert (known[0] == known[1]) is alike


@pytest.mark.parametrize(
    ("assignment", "left", "sentence"),
    [
        (MaxActiveWorldSize(2), (0, 2), "nobody has rank 1: compose the rank assignment with ShiftRanks"),
        (Compose(ActiveWorldSizeDivisibleBy(4), ShiftRanks()), (0, 1, 2), "of 3 ranks .* none take part"),
    ],
)
def test_an_assignment_that_leads_nowhere_ends_the_job(assignment, left, sentence):
    with pytest.raises(RestartAbort) as ended:
        new_ranks(assignment, left, 3)
    assert ended.value.code == 130
    assert re.search(sentence, ended.value.reason)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MaxActiveWorldSize(0), "max_active_world_size must be at least 1, not 0"),
        (lambda: ActiveWorldSizeDivisibleBy(0), "divisor must be at least 1, not 0"),
        (lambda: FilterGroupedByKey(7, bool), "key_or_fn is the name of an environment variable or a function"),
        (lambda: FilterGroupedByKey("A", 8), "condition is a function of the number of ranks"),
        (lambda: Compose(ShiftRanks(), 3), "Compose takes functions of one argument, not 3"),
    ],
)
def test_wrong_components_are_refused_where_they_are_made(make, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        make()


@given(
    left=st.sets(st.integers(0, 40), min_size=1),
    most=st.integers(1, 50),
    divisor=st.integers(1, 5),
    closing=st.sampled_from([ShiftRanks(), FillGaps()]),
)
def test_all_members_have_one_rank_each_and_keep_theirs_where_they_can(left, most, divisor, closing):
    assignment = Compose(ActiveWorldSizeDivisibleBy(divisor), MaxActiveWorldSize(most), closing)
    active = min(len(left), most) // divisor * divisor
    members = places(left, assignment)
    if active == 0:
        with pytest.raises(RestartAbort):
            assign(assignment, members, 41)
        return
    ranks = assign(assignment, members, 41)
    assert [place.rank for place in ranks.places] == list(range(len(left)))
    assert ranks.active_world_size == active
    before = {place.member: place.rank for place in members}
    if isinstance(closing, FillGaps):
        assert all(place.rank == before[place.member] for place in ranks.places if before[place.member] < len(left))
    else:
        assert [before[place.member] for place in ranks.places] == sorted(left)
