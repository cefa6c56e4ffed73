"""The three restart policies as a table: every happening in every standing."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest

from seamark.protocol.messages import Policy
from seamarkd.coordinator.policy import Happening, Standing, Verdict, decide

LEAST = 2


def standing(policy: Policy, **changes: Any) -> Standing:
    return Standing(**({"policy": policy, "wrapped": True, "least": LEAST, "finished": 0} | changes))


# MIN 2 of 3 groups: all well; one lost; just MIN; below it, of whom some run; nobody runs, MIN or fewer are well.
STANDINGS: dict[str, dict[str, Any]] = {
    "all well": {"well": 3, "running": 3},
    "at the minimum": {"well": 2, "running": 2},
    "below it": {"well": 1, "running": 1},
    "below it, others of lost groups run": {"well": 0, "running": 2},
    "nobody runs, enough finished": {"well": 2, "running": 0, "finished": 2},
    "nobody runs, too few finished": {"well": 1, "running": 0, "finished": 1},
    "some finished, some run": {"well": 2, "running": 1, "finished": 1},
}
G, R, S, F, P, N = "go-on", "restart", "succeed", "fail", "fill", "grow"
# In the order of STANDINGS.
TABLE: dict[tuple[str, str], list[str]] = {
    ("any-failed", "worker-failed"): [R, R, R, R, R, R, R],
    ("any-failed", "worker-replaced"): [G, G, G, G, G, G, G],
    ("any-failed", "worker-discarded"): [G, G, F, F, S, F, G],
    ("any-failed", "worker-finished"): [G, G, G, G, S, S, G],
    ("any-failed", "node-lost"): [R, R, R, R, R, R, R],
    ("any-failed", "node-new"): [N, N, N, N, G, G, G],
    ("min-healthy", "worker-failed"): [G, G, R, R, S, R, G],
    ("min-healthy", "worker-replaced"): [G, G, G, G, G, G, G],
    ("min-healthy", "worker-discarded"): [G, G, R, R, S, R, G],
    ("min-healthy", "worker-finished"): [G, G, R, R, S, R, G],
    ("min-healthy", "node-lost"): [G, G, R, R, S, R, G],
    ("min-healthy", "node-new"): [G, G, G, G, G, G, G],
    ("replace", "worker-failed"): [R, R, R, R, R, R, R],
    ("replace", "worker-replaced"): [G, G, G, G, G, G, G],
    ("replace", "worker-discarded"): [G, G, F, F, S, F, G],
    ("replace", "worker-finished"): [G, G, G, G, S, S, G],
    ("replace", "node-lost"): [P, P, P, P, R, R, P],
    ("replace", "node-new"): [P, P, P, P, G, G, G],
}


def test_the_table_is_whole() -> None:
    assert set(TABLE) == set(itertools.product(get_args(Policy), get_args(Happening)))
    assert {verdict for row in TABLE.values() for verdict in row} == set(get_args(Verdict))


@pytest.mark.parametrize(
    ("policy", "happening", "name", "verdict"),
    [
        (policy, happening, name, verdict)
        for (policy, happening), row in TABLE.items()
        for name, verdict in zip(STANDINGS, row, strict=True)
    ],
)
def test_every_happening_in_every_standing(policy: Policy, happening: Happening, name: str, verdict: Verdict) -> None:
    assert decide(happening, standing(policy, missing=1, **STANDINGS[name])) == verdict


@pytest.mark.parametrize("name", STANDINGS)
def test_without_a_wrapper_nobody_can_be_taken_in_by_survivors(name: str) -> None:
    assert decide("node-lost", standing("replace", wrapped=False, missing=1, **STANDINGS[name])) == "restart"
    assert decide("node-new", standing("replace", wrapped=False, missing=1, **STANDINGS[name])) == "go-on"


@pytest.mark.parametrize("policy", get_args(Policy))
@pytest.mark.parametrize("name", STANDINGS)
def test_a_full_job_takes_no_new_node(policy: Policy, name: str) -> None:
    assert decide("node-new", standing(policy, missing=0, **STANDINGS[name])) == "go-on"
