"""Interrupts arrive inside the function or not at all, and none is lost: shots at random moments."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
import time

import pytest

from seamark.inprocess.exceptions import RestartError, RestartInterrupt
from seamark.inprocess.interrupt import DEFAULT_SIGNAL, REPEAT_INTERVAL, Interrupter

SHOTS = int(os.environ.get("SEAMARK_SHOTS", "1000"))
"""The proof is 10,000: ``SEAMARK_SHOTS=10000 scripts/test.sh tests/unit/test_interrupt.py``."""
LONGEST_RUN = 5e-4


@pytest.fixture
def interrupter() -> object:
    made = Interrupter()
    yield made
    made.close()
    assert signal.getsignal(DEFAULT_SIGNAL) is signal.SIG_DFL


class Shooter:
    """Gives up one iteration after the other, each at a random moment after it was entered."""

    def __init__(self, interrupter: Interrupter, seed: int) -> None:
        self._interrupter = interrupter
        self._random = random.Random(seed)
        self._target = threading.Semaphore(0)
        self._iteration = -1
        self.outside = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._shoot, daemon=True)
        self._thread.start()

    def aim(self, iteration: int) -> None:
        self._iteration = iteration
        self._target.release()

    def _shoot(self) -> None:
        while True:
            self._target.acquire()
            if self._iteration < 0:
                return
            time.sleep(self._random.random() * LONGEST_RUN)
            self._interrupter.abort(self._iteration)
            while not self._interrupter.interrupt(REPEAT_INTERVAL):
                pass
            self.outside.release()

    def stop(self) -> None:
        self.aim(-1)
        self._thread.join()


def test_shots_at_random_moments_arrive_inside_and_none_is_lost(interrupter: Interrupter) -> None:
    shooter = Shooter(interrupter, seed=7)
    chance = random.Random(8)
    interrupted = 0

    def work() -> None:
        until = time.perf_counter() + chance.random() * LONGEST_RUN
        while time.perf_counter() < until:
            sum(range(10))

    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for iteration in range(SHOTS):
            shooter.aim(iteration)
            try:
                interrupter.run(iteration, work)
            except RestartInterrupt:
                interrupted += 1
            # Clean-up: an interrupt that arrived here, now or later, would end the test.
            sum(range(100))
            shooter.outside.acquire()
            assert interrupter.aborted(iteration)
    finally:
        sys.setswitchinterval(switch_interval)
        shooter.stop()
    assert 0 < interrupted < SHOTS


def test_no_lock_that_the_function_takes_stays_locked(interrupter: Interrupter) -> None:
    """A Condition and a logging handler take their locks in Python code, where a signal can arrive."""
    condition = threading.Condition(threading.Lock())
    handler = logging.Handler()
    shooter = Shooter(interrupter, seed=2)
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)

    def lock_for_ever() -> None:
        while True:
            with condition:
                sum(range(100))
            handler.acquire()
            try:
                sum(range(100))
            finally:
                handler.release()

    try:
        for iteration in range(SHOTS):
            shooter.aim(iteration)
            with pytest.raises(RestartInterrupt):
                interrupter.run(iteration, lock_for_ever)
            shooter.outside.acquire()
            assert condition.acquire(blocking=False), f"locked for ever by shot {iteration}"
            condition.release()
            assert _from_another_thread(handler.lock), f"locked for ever by shot {iteration}"
    finally:
        sys.setswitchinterval(switch_interval)
        shooter.stop()


def _from_another_thread(lock: threading.RLock) -> bool:  # type: ignore[valid-type]
    """True if somebody else than the owner can take it."""
    taken = []

    def take() -> None:
        if lock.acquire(timeout=1.0):  # type: ignore[attr-defined]
            taken.append(True)
            lock.release()  # type: ignore[attr-defined]

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return bool(taken)


def test_a_wait_for_a_lock_that_nobody_gives_back_is_interrupted(interrupter: Interrupter) -> None:
    condition = threading.Condition(threading.Lock())
    condition.acquire()

    def wait() -> None:
        with condition:
            pytest.fail("it was locked")

    def monitor() -> None:
        interrupter.abort(0)
        while not interrupter.interrupt(REPEAT_INTERVAL):
            pass

    timer = threading.Timer(0.05, monitor)
    timer.start()
    with pytest.raises(RestartInterrupt):
        interrupter.run(0, wait)
    timer.join()


def test_a_blocked_main_thread_is_woken(interrupter: Interrupter) -> None:
    blocked = threading.Event()
    timer = threading.Thread(target=lambda: (blocked.wait(), interrupter.abort(0), interrupter.interrupt(5.0)))
    timer.start()

    def sleep() -> None:
        blocked.set()
        time.sleep(60.0)

    began = time.monotonic()
    with pytest.raises(RestartInterrupt):
        interrupter.run(0, sleep)
    assert time.monotonic() - began < 30.0
    timer.join()


def test_an_interrupt_that_is_swallowed_comes_again(interrupter: Interrupter) -> None:
    swallowed = 0
    ready = threading.Event()

    def monitor() -> None:
        ready.wait()
        interrupter.abort(0)
        while not interrupter.interrupt(REPEAT_INTERVAL):
            pass

    thread = threading.Thread(target=monitor)
    thread.start()

    def stubborn() -> None:
        nonlocal swallowed
        while swallowed < 2:
            try:
                ready.set()
                time.sleep(60.0)
            except BaseException:
                swallowed += 1
        time.sleep(60.0)

    with pytest.raises(RestartInterrupt):
        interrupter.run(0, stubborn)
    assert swallowed == 2
    thread.join()


def test_a_function_that_returns_while_an_abort_is_pending_has_not_completed(interrupter: Interrupter) -> None:
    with pytest.raises(RestartInterrupt):
        interrupter.run(3, lambda: interrupter.abort(3))


def test_an_iteration_given_up_before_its_entry_is_not_entered(interrupter: Interrupter) -> None:
    interrupter.abort(5)
    with pytest.raises(RestartInterrupt):
        interrupter.run(5, pytest.fail)
    assert interrupter.run(6, lambda: "entered") == "entered"


def test_an_atomic_block_is_finished_first(interrupter: Interrupter) -> None:
    reached = []

    def work() -> None:
        with interrupter.atomic():
            with interrupter.atomic():
                interrupter.abort(0)
                signal.raise_signal(DEFAULT_SIGNAL)
                reached.append("inner")
            signal.raise_signal(DEFAULT_SIGNAL)
            reached.append("outer")
        reached.append("after")

    with pytest.raises(RestartInterrupt):
        interrupter.run(0, work)
    assert reached == ["inner", "outer"]


def test_outside_the_main_thread_it_refuses_in_one_sentence() -> None:
    caught: list[BaseException] = []

    def make() -> None:
        try:
            Interrupter()
        except RestartError as error:
            caught.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


def test_a_taken_signal_is_refused(interrupter: Interrupter) -> None:
    with pytest.raises(RestartError, match="interrupt_signal"):
        Interrupter()
