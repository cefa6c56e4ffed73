"""The wrapper's components, each by itself: what they let pass, and what they say when they don't."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import timedelta

import pytest

import seamark
from seamark import inprocess
from seamark.inprocess.components import Components
from seamark.inprocess.exceptions import HealthCheckError, RestartAbort, RestartError, TimeoutError
from seamark.inprocess.finalize import ThreadedFinalize
from seamark.inprocess.health_check import CudaHealthCheck, FaultCounter
from seamark.inprocess.initialize import RetryController, check_minimum
from seamark.inprocess.state import Mode, State

STATE = replace(State.from_env({"RANK": "1", "WORLD_SIZE": "4"}), iteration=0, active_world_size=4, mode=Mode.ACTIVE)


@pytest.mark.parametrize(
    ("controller", "state", "verdict"),
    [
        (RetryController(max_iterations=3), {"restarts": 2}, ""),
        (RetryController(max_iterations=3), {"restarts": 3}, "was entered 3 times, max_iterations=3"),
        (RetryController(), {"restarts": 1_000}, ""),
        (RetryController(min_world_size=4), {"world_size": 3}, "3 ranks are left, min_world_size=4"),
        (RetryController(min_active_world_size=4), {"active_world_size": 2}, "2 ranks would take part"),
    ],
)
def test_retry_controller(controller, state, verdict):
    if not verdict:
        assert controller(replace(STATE, **state)) == replace(STATE, **state)
        return
    with pytest.raises(RestartAbort) as ended:
        controller(replace(STATE, **state))
    assert verdict in ended.value.reason


def test_composed_components_are_called_last_first_and_each_sees_what_the_one_before_returned():
    called = []

    def first(state):
        called.append(("first", state.restarts))
        return replace(state, restarts=7)

    def second(state):
        called.append(("second", state.restarts))

    assert inprocess.Compose(second, first)(STATE).restarts == 7
    assert called == [("first", 0), ("second", 7)]


def test_finalize_calls_its_function_on_a_thread_and_waits_for_it():
    threads = []
    finalize = ThreadedFinalize(
        timedelta(seconds=30), lambda *a, **k: threads.append((threading.get_ident(), a, k)), (1,), {"b": 2}
    )
    assert finalize(STATE) is STATE
    ((thread, args, kwargs),) = threads
    assert thread != threading.get_ident()
    assert (args, kwargs) == ((1,), {"b": 2})


def test_finalize_that_takes_too_long_is_given_up_and_one_that_raises_says_what():
    go_on = threading.Event()
    with pytest.raises(TimeoutError, match="finalize takes longer than 0.01 s"):
        ThreadedFinalize(0.01, go_on.wait)(STATE)
    go_on.set()

    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ThreadedFinalize(5.0, fail)(STATE)


def test_a_rank_that_raised_too_often_is_not_fit():
    check = FaultCounter(max_rank_faults=1)
    check(STATE)
    check(replace(STATE, fn_exception=ValueError("once")))
    check(STATE)
    with pytest.raises(HealthCheckError, match="rank 1 raised 2 times, max_rank_faults=1"):
        check(replace(STATE, fn_exception=ValueError("twice")))


def test_the_cuda_check_of_a_host_that_used_no_cuda_is_passed():
    assert CudaHealthCheck()(STATE) is STATE


def test_whatever_a_health_check_raises_is_a_health_check_error():
    def ask(state):
        raise OSError("no answer from the board")

    with pytest.raises(HealthCheckError, match="rank 1 is not fit to go on: no answer from the board"):
        Components(health_check=ask).clean_up(STATE)


def test_a_spare_has_nothing_to_finalize():
    called = []
    Components(finalize=called.append).clean_up(replace(STATE, mode=Mode.INACTIVE))
    assert called == []


def test_errors_of_abort_and_terminate_are_logged(caplog):
    def fail(state):
        raise RuntimeError("no such device")

    components = Components(abort=fail, terminate=fail)
    components.begin_abort(STATE).join()
    components.terminated(STATE)
    assert [record.message for record in caplog.records] == [
        "rank 1: abort raised; nothing follows from that",
        "rank 1: terminate raised; nothing follows from that",
    ]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: seamark.Wrapper(initialize=3), r"Wrapper\(initialize=...\) takes a function"),
        (lambda: seamark.Wrapper(rank_assignment=(1, 2)), r"Wrapper\(rank_assignment=...\) takes a function"),
        (lambda: RetryController(max_iterations=0), "max_iterations must be at least 1, not 0"),
        (lambda: FaultCounter(-1), "max_rank_faults must be at least 0, not -1"),
        (lambda: ThreadedFinalize(0.0, print), "a timeout must be more than 0 seconds, not 0.0"),
        (lambda: CudaHealthCheck(timedelta(seconds=-1)), "a timeout must be more than 0 seconds"),
    ],
)
def test_wrong_components_are_refused_at_the_call(make, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        make()


def test_a_process_group_that_is_there_already_is_refused():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RestartError, match="inside the wrapped function"):
            seamark.Wrapper()(print)()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"soft_timeout": 90.0}, "hard_timeout=90 s must be more than soft_timeout=90 s"),
        ({"soft_timeout": timedelta(minutes=2)}, "hard_timeout=90 s must be more than soft_timeout=120 s"),
        ({"timeout_safety_factor": 1.0}, "timeout_safety_factor=1 must be more than 1"),
        ({"hard_timeout": 0}, "a timeout must be more than 0 seconds, not 0"),
        ({"termination_grace_time": -1.0}, "a timeout must be more than 0 seconds, not -1.0"),
    ],
)
def test_timeouts_that_contradict_each_other_are_refused_at_the_call(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        seamark.Wrapper(**arguments)


def test_timeouts_are_seconds_or_timedeltas_or_none():
    assert seamark.Wrapper().timeouts == (60.0, 90.0, 5.0, 0.0, 0.0, 0.0)
    assert seamark.Wrapper(soft_timeout=None, hard_timeout=None).timeouts[:2] == (0.0, 0.0)
    found = seamark.Wrapper(soft_timeout=timedelta(seconds=3), initial_timeout=7).timeouts
    assert found == (3.0, 90.0, 5.0, 7.0, 0.0, 0.0)
    assert seamark.Wrapper(timeout_safety_factor=5).timeouts.safety == 5.0


def test_the_exceptions_are_the_references():
    assert issubclass(HealthCheckError, RestartError)
    assert issubclass(TimeoutError, RestartError)
    assert issubclass(inprocess.exceptions.RankDiscarded, RestartError)
    assert not issubclass(RestartAbort, Exception)


def test_arguments_of_the_reference_wrapper_are_taken_and_misspelt_ones_are_not() -> None:
    interval = timedelta(seconds=1)
    seamark.Wrapper(store_kwargs={"port": 1}, heartbeat_interval=interval, last_call_wait=interval)
    with pytest.raises(TypeError, match="no argument 'soft_time_out': did you mean soft_timeout"):
        seamark.Wrapper(soft_time_out=1.0)


@pytest.mark.parametrize(
    ("component", "refused"),
    [
        (RetryController(min_world_size=5), True),
        (inprocess.Compose(lambda state: state, RetryController(min_world_size=5)), True),
        (RetryController(min_world_size=4), False),
        (RetryController(max_iterations=3), False),
        (None, False),
    ],
)
def test_a_minimum_above_the_launcher_s_is_refused_with_both(component: object, refused: bool) -> None:
    if not refused:
        check_minimum(component, 4)
        return
    with pytest.raises(ValueError, match=r"min_world_size=5\) .* MIN x --nproc-per-node = 4 ranks"):
        check_minimum(component, 4)


def test_a_call_that_can_t_be_made_is_refused_before_anybody_waits() -> None:
    def bare(call):  # type: ignore[no-untyped-def]
        return call

    def annotated(call: seamark.CallWrapper, steps: int) -> int:
        return steps

    with pytest.raises(TypeError, match=r"bare: missing a required argument: 'call': .* annotated with it"):
        seamark.Wrapper()(bare)()
    with pytest.raises(TypeError, match=r"annotated: missing a required argument: 'steps'"):
        seamark.Wrapper()(annotated)()  # type: ignore[call-arg]
    with pytest.raises(RestartError):
        # It can be made, but for want of a launcher.
        seamark.Wrapper()(annotated)(steps=3)  # type: ignore[call-arg]
