"""Retries: each rule as a row, and what must hold of every history as a property."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamark.failure_kinds import KINDS, Kind
from seamark.runtime_config import RuntimeConfig
from seamarkd.coordinator.classification import Verdict
from seamarkd.coordinator.retry import (
    MAX_TRIED,
    Budgets,
    Decision,
    Failure,
    GiveUp,
    Quarantine,
    Retry,
    Tried,
    decide,
)

CHARGED: tuple[Kind, ...] = ("oom", "transient", "timeout", "unknown")
FREE: tuple[Kind, ...] = ("spot_preemption", "hardware")
FRESH = Budgets()
DEFAULTS = RuntimeConfig()
PATIENT = RuntimeConfig(no_progress_cycles=1_000)
NOW = 1_000.0


class Highest(random.Random):
    """Draws the longest delay that there can be."""

    def uniform(self, a: float, b: float) -> float:
        return b


def failure(kind: Kind, **known: Any) -> Failure:
    where = {"shard": "s7", "worker": "w1", "node": "n1"}
    return Failure(verdict=Verdict(kind, "it fell over", 0.9), **(where | known))


def decided(one: Failure, budgets: Budgets = FRESH, config: RuntimeConfig = DEFAULTS) -> Decision:
    return decide(one, budgets, config, Highest(), NOW)


def history(
    failures: Iterable[Failure | Kind], config: RuntimeConfig = DEFAULTS, budgets: Budgets = FRESH
) -> list[Decision]:
    """The decisions on these failures, one after the other, up to and with the one that gives up."""
    decisions: list[Decision] = []
    for one in failures:
        decisions.append(decided(one if isinstance(one, Failure) else failure(one), budgets, config))
        budgets = decisions[-1].budgets
        if isinstance(decisions[-1].action, GiveUp):
            break
    return decisions


def actions(decisions: list[Decision]) -> list[str]:
    return [type(decision.action).__name__ for decision in decisions]


# --- budgets of the shard ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHARGED)
@pytest.mark.parametrize("retries", [0, 1, 3, 7])
@pytest.mark.parametrize("cycles", [7, 1_000])
def test_three_retries_are_four_runs(kind: Kind, retries: int, cycles: int) -> None:
    config = RuntimeConfig(no_progress_cycles=cycles, **{f"{kind}_retries": retries})  # type: ignore[arg-type]
    decisions = history([kind] * 20, config)
    assert actions(decisions) == ["Retry"] * retries + ["GiveUp"]
    assert f"{kind} once more after {retries} of {retries} retries ({kind}_retries)" in decisions[-1].action.reason


@pytest.mark.parametrize("kind", CHARGED)
def test_the_delay_is_up_to_two_to_the_number_of_the_retry_and_never_above_a_minute(kind: Kind) -> None:
    config = RuntimeConfig(no_progress_cycles=1_000, **{f"{kind}_retries": 8})  # type: ignore[arg-type]
    delays = [one.action.at - NOW for one in history([kind] * 8, config) if isinstance(one.action, Retry)]
    assert delays == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]


def test_the_jitter_is_full_and_the_caller_s() -> None:
    drawn = [decide(failure("transient"), Budgets(), RuntimeConfig(), random.Random(seed), 0.0) for seed in range(200)]
    delays = [one.action.at for one in drawn if isinstance(one.action, Retry)]
    assert min(delays) < 0.2 < 1.8 < max(delays) < 2.0
    again = decide(failure("transient"), Budgets(), RuntimeConfig(), random.Random(3), 0.0)
    assert again == drawn[3]


@pytest.mark.parametrize("kind", CHARGED)
def test_a_shorter_limit_bounds_every_delay(kind: Kind) -> None:
    (decision,) = history([kind], RuntimeConfig(max_delay=0.5))
    assert isinstance(decision.action, Retry)
    assert decision.action.at == NOW + 0.5


def test_fifty_preemptions_cost_a_transient_failure_nothing() -> None:
    decisions = history(["spot_preemption"] * 50 + ["transient"])
    assert decisions[-1].budgets == Budgets(transient=1, fruitless=1)
    assert decisions[-1].action.reason.startswith("transient 1 of 3, retried in 2.0 s")


def test_each_kind_has_an_account_of_its_own() -> None:
    kinds: list[Kind] = [kind for kind in CHARGED for _ in range(3)]
    decisions = history(kinds, PATIENT)
    assert actions(decisions) == ["Retry"] * 12
    spent = decisions[-1].budgets
    assert (spent.oom, spent.transient, spent.timeout, spent.unknown) == (3, 3, 3, 3)
    for kind in CHARGED:
        assert isinstance(decided(failure(kind), spent, PATIENT).action, GiveUp)
    for kind in FREE:
        assert isinstance(decided(failure(kind), spent, PATIENT).action, Retry)


@pytest.mark.parametrize("kind", [*CHARGED, *FREE])
def test_a_checkpoint_clears_the_accounts_but_not_what_is_known_of_batches_and_memory(kind: Kind) -> None:
    tried = (Tried(4, ("w0",)), Tried(5, ("w0", "w1"), True))
    spent = Budgets(oom=3, transient=3, timeout=3, unknown=3, fruitless=3, tried=tried, batch_size_scale=0.5)
    one = decided(failure(kind, progressed=True), spent)
    assert isinstance(one.action, Retry)
    left = {name: getattr(one.budgets, name) for name in CHARGED}
    assert left == {name: int(name == kind) for name in CHARGED}
    assert one.budgets.fruitless == int(kind in CHARGED)
    assert one.budgets.tried == tried
    assert one.budgets.batch_size_scale == (0.25 if kind == "oom" else 0.5)


# --- what each kind does -----------------------------------------------------------------------------------


def test_out_of_memory_halves_the_batch_size_down_to_the_floor() -> None:
    config = RuntimeConfig(oom_retries=5, no_progress_cycles=9, min_batch_size_scale=0.2)
    decisions = history(["oom"] * 6, config)
    retries = [one.action for one in decisions if isinstance(one.action, Retry)]
    assert [one.batch_size_scale for one in retries] == [0.5, 0.25, 0.2, 0.2, 0.2]
    assert retries[1].reason == "oom 2 of 5, retried in 4.0 s with 0.25 of the batch size; it fell over"
    assert isinstance(decisions[-1].action, GiveUp)


def test_a_floor_that_was_raised_raises_no_batch_size() -> None:
    one = decided(failure("oom"), Budgets(batch_size_scale=0.125), RuntimeConfig(min_batch_size_scale=0.5))
    assert isinstance(one.action, Retry)
    assert one.action.batch_size_scale == one.budgets.batch_size_scale == 0.125


@pytest.mark.parametrize("kind", [*FREE, "transient", "timeout", "unknown"])
def test_other_kinds_leave_the_batch_size(kind: Kind) -> None:
    one = decided(failure(kind), Budgets(batch_size_scale=0.5))
    assert isinstance(one.action, Retry)
    assert one.action.batch_size_scale == one.budgets.batch_size_scale == 0.5


@pytest.mark.parametrize(("kind", "excluded"), [("spot_preemption", ""), ("hardware", "n1")])
def test_what_is_not_the_shard_s_fault_is_tried_again_at_once(kind: Kind, excluded: str) -> None:
    spent = Budgets(oom=3, transient=3, timeout=3, unknown=3, fruitless=3, tried=(Tried(4, ("w0",)),))
    one = decided(failure(kind), spent)
    assert one.budgets == spent
    assert isinstance(one.action, Retry)
    assert (one.action.at, one.action.exclude_node) == (NOW, excluded)


@pytest.mark.parametrize("kind", CHARGED)
def test_no_node_is_excluded_for_a_failure_of_the_shard(kind: Kind) -> None:
    action = decided(failure(kind)).action
    assert isinstance(action, Retry)
    assert action.exclude_node == ""


# --- poison ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [("w1", "w2"), ("w1", "w1")])
def test_a_batch_that_fails_twice_is_quarantined_whoever_runs_it(workers: tuple[str, str]) -> None:
    first, second = history([failure("poison_input", batch=9, worker=worker) for worker in workers])
    assert first.action == Retry(
        NOW + 1.0, 1.0, "", "poison_input: attempt 1 of 2 at batch 9 of shard s7, retried in 1.0 s; it fell over"
    )
    assert isinstance(second.action, Quarantine)
    assert second.action.batch == 9
    on = "w1 and w2" if workers[1] == "w2" else "w1"
    assert second.action.reason == (
        f"poison_input: attempt 2 of 2 at batch 9 of shard s7, quarantined after it failed on {on}; it fell over"
    )
    assert second.budgets.tried == (Tried(9, workers, True),)


def test_two_batches_that_fail_once_trip_nothing() -> None:
    decisions = history([failure("poison_input", batch=batch) for batch in (1, 2)])
    assert actions(decisions) == ["Retry", "Retry"]


def test_attempts_at_a_batch_are_counted_through_checkpoints_and_other_failures() -> None:
    between: list[Failure | Kind] = [failure("transient", progressed=True), "spot_preemption", "hardware", "oom"]
    poison = failure("poison_input", batch=3)
    assert actions(history([poison, *between, poison]))[-1] == "Quarantine"


def test_three_attempts_are_three_runs() -> None:
    config = RuntimeConfig(poison_attempts=3)
    decisions = history([failure("poison_input", batch=3)] * 3, config)
    assert actions(decisions) == ["Retry", "Retry", "Quarantine"]
    assert actions(history([failure("poison_input", batch=0)], RuntimeConfig(poison_attempts=1))) == ["Quarantine"]


def test_without_a_number_the_whole_shard_is_quarantined() -> None:
    decisions = history([failure("poison_input", batch=0), failure("poison_input"), failure("poison_input")])
    assert actions(decisions) == ["Retry", "Retry", "Quarantine"]
    assert isinstance(decisions[-1].action, Quarantine)
    assert decisions[-1].action.batch is None
    assert "attempt 2 of 2 at shard s7, quarantined" in decisions[-1].action.reason


def test_a_worker_that_runs_what_is_quarantined_ends_the_shard() -> None:
    decisions = history([failure("poison_input", batch=3)] * 9)
    assert actions(decisions) == ["Retry", "Quarantine", "GiveUp"]
    assert "batch 3 of shard s7 is quarantined, and was run nevertheless" in decisions[-1].action.reason


def test_the_account_of_batches_is_bounded() -> None:
    full = Budgets(tried=tuple(Tried(batch, ("w0",)) for batch in range(MAX_TRIED)))
    refused = decided(failure("poison_input", batch=MAX_TRIED, progressed=True), full)
    assert f"more than {MAX_TRIED} batches" in refused.action.reason
    assert isinstance(refused.action, GiveUp)
    assert isinstance(decided(failure("poison_input", batch=0, progressed=True), full).action, Quarantine)


def test_bad_batches_in_a_row_are_put_aside_until_the_breaker_trips() -> None:
    twice = [failure("poison_input", batch=batch) for batch in range(5) for _ in range(2)]
    assert actions(history(twice)) == ["Retry", "Quarantine"] * 3 + ["GiveUp"]


# --- no progress -------------------------------------------------------------------------------------------


def test_three_retries_of_any_kinds_without_a_checkpoint_end_the_shard() -> None:
    kinds: list[Kind] = ["oom", "spot_preemption", "timeout", "hardware", "transient", "unknown"]
    decisions = history(kinds)
    assert actions(decisions) == ["Retry"] * 5 + ["GiveUp"]
    assert decisions[-1].action.reason == (
        "shard s7 given up: unknown again after 3 retries in a row made no new checkpoint (no_progress_cycles); "
        "it fell over"
    )


def test_with_a_checkpoint_between_failures_it_goes_on_for_ever() -> None:
    mixed = [failure(kind, progressed=True) for kind in CHARGED] * 50
    assert set(actions(history(mixed))) == {"Retry"}


# --- of every history --------------------------------------------------------------------------------------

failures = st.builds(
    Failure,
    verdict=st.builds(Verdict, st.sampled_from(KINDS), st.just("it fell over"), st.just(0.9)),
    shard=st.just("s7"),
    worker=st.sampled_from(["w1", "w2"]),
    node=st.sampled_from(["n1", "n2"]),
    batch=st.none() | st.integers(0, 3),
    progressed=st.booleans(),
)
configs = st.builds(
    RuntimeConfig,
    **{f"{kind}_retries": st.integers(0, 8) for kind in CHARGED},
    poison_attempts=st.integers(1, 4),
    no_progress_cycles=st.integers(1, 12),
    poison_delay=st.floats(0, 60),
    max_delay=st.floats(0, 60),
    min_batch_size_scale=st.floats(0.001, 1),
)


@given(st.lists(failures, max_size=40), configs, st.integers(0, 9))
def test_no_history_overdraws_an_account(happened: list[Failure], config: RuntimeConfig, seed: int) -> None:
    rng = random.Random(seed)
    budgets = Budgets()
    since: Counter[str] = Counter()
    attempts: Counter[int | None] = Counter()
    for one in happened:
        kind = one.verdict.kind
        before = msgspec.json.encode(budgets)
        action, after = (decision := decide(one, budgets, config, rng, NOW)).action, decision.budgets
        assert msgspec.json.encode(budgets) == before
        if one.progressed:
            since.clear()
        since[kind] += 1
        attempts[one.batch] += kind == "poison_input"
        if isinstance(action, Retry):
            assert 0.0 <= action.at - NOW <= min(60.0, config.max_delay) + 1e-9
            assert action.exclude_node == (one.node if kind == "hardware" else "")
            assert action.batch_size_scale == after.batch_size_scale
            if kind in CHARGED:
                assert action.at - NOW <= 2 ** since[kind] + 1e-9
                assert since[kind] <= getattr(config, f"{kind}_retries")
        if isinstance(action, Quarantine):
            assert kind == "poison_input"
            assert (action.batch, attempts[one.batch]) == (one.batch, config.poison_attempts)
        if kind in FREE:
            assert isinstance(action, Retry)
            assert action.at == NOW
        assert config.min_batch_size_scale <= after.batch_size_scale <= budgets.batch_size_scale <= 1.0
        assert after.fruitless <= config.no_progress_cycles
        assert all(len(tried.workers) <= config.poison_attempts for tried in after.tried)
        assert one.verdict.evidence in action.reason
        if isinstance(action, GiveUp):
            break
        budgets = after


@given(st.permutations([kind for kind in CHARGED for _ in range(4)]))
def test_in_any_order_each_kind_has_its_three_retries(kinds: list[Kind]) -> None:
    budgets = Budgets()
    allowed: Counter[str] = Counter()
    for kind in kinds:
        one = decided(failure(kind), budgets, PATIENT)
        allowed[kind] += isinstance(one.action, Retry)
        budgets = one.budgets
    assert allowed == dict.fromkeys(CHARGED, 3)


@given(st.lists(st.sampled_from([*CHARGED, *FREE]), max_size=30), configs)
def test_without_a_checkpoint_a_shard_is_run_so_often_and_no_more(kinds: list[Kind], config: RuntimeConfig) -> None:
    charged = [kind for one, kind in zip(history(kinds, config), kinds, strict=False) if kind in CHARGED]
    assert len(charged) <= config.no_progress_cycles + 1


@given(st.lists(failures, max_size=20), configs)
def test_an_account_survives_the_disk(happened: list[Failure], config: RuntimeConfig) -> None:
    for one in history(happened, config):
        for codec in (msgspec.json, msgspec.msgpack):
            assert codec.decode(codec.encode(one.budgets), type=Budgets) == one.budgets
