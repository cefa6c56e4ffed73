"""A thread that sleeps without a sign of life is told from one that computes or answers."""

from __future__ import annotations

import threading

import pytest

from seamark.inprocess import stuck
from seamark.inprocess.stuck import Stillness


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(stuck.time, "monotonic", lambda: now[0])
    return now


def test_a_sleeping_thread_is_still_until_it_answers(clock: list[float]) -> None:
    end = threading.Event()
    sleeper = threading.Thread(target=end.wait)
    sleeper.start()
    assert sleeper.native_id is not None
    stillness = Stillness(sleeper.native_id)
    while stillness.lasted(0) == 0.0:
        clock[0] += 0.1
    clock[0] += 1.0
    assert stillness.lasted(0) >= 1.0
    assert stillness.lasted(1) == 0.0, "it answered a signal"
    clock[0] += 1.0
    stillness.restart()
    assert stillness.lasted(1) == 0.0
    end.set()
    sleeper.join()


def test_a_running_thread_is_not_still(clock: list[float]) -> None:
    stillness = Stillness(threading.get_native_id())
    for _ in range(5):
        clock[0] += 1.0
        assert stillness.lasted(0) == 0.0
