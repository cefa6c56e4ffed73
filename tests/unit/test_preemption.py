"""An emergency checkpoint: at the next ping after SIGTERM, once, and then the end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import seamark
from seamark import preemption
from seamark.progress import ProgressPage


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProgressPage]:
    """A wrapper's page, and what this process had."""
    before = signal.getsignal(signal.SIGTERM)
    for name in ("_asked", "_save"):
        monkeypatch.setattr(preemption, name, getattr(preemption, name))
    page = ProgressPage.from_env("i", {})
    yield page
    preemption.attach(None, preemption.nullcontext)
    signal.signal(signal.SIGTERM, before)


def attach(page: ProgressPage) -> list[str]:
    """As the wrapper does; returns what happens."""
    happened: list[str] = []

    @contextmanager
    def atomic() -> Iterator[None]:
        happened.append("atomic")
        yield
        happened.append("not")

    preemption.attach(lambda action: setattr(page, "at_ping", action), atomic)
    return happened


def test_it_is_saved_at_the_next_ping_and_the_process_ends(page: ProgressPage) -> None:
    happened = attach(page)
    seamark.on_preemption(lambda: happened.append("saved"))
    page.ping()
    os.kill(os.getpid(), signal.SIGTERM)
    assert happened == []
    with pytest.raises(SystemExit, match="143"):
        page.ping()
    assert happened == ["atomic", "saved", "not"]
    page.ping()
    assert page.pings == 3


def test_a_checkpoint_that_fails_keeps_nobody_from_ending(page: ProgressPage) -> None:
    attach(page)
    seamark.on_preemption(lambda: 1 / 0)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        page.ping()


def test_who_is_asked_before_the_wrapper_begins_saves_in_it(page: ProgressPage) -> None:
    seamark.on_preemption(lambda: None)
    os.kill(os.getpid(), signal.SIGTERM)
    attach(page)
    with pytest.raises(SystemExit):
        page.ping()


def test_a_loop_may_ask_by_itself(page: ProgressPage) -> None:
    attach(page)
    assert not seamark.preempted()
    os.kill(os.getpid(), signal.SIGTERM)
    assert seamark.preempted()
    page.ping()


def test_a_thread_that_can_not_be_signalled_is_refused(page: ProgressPage) -> None:
    errors = []

    def register() -> None:
        try:
            seamark.on_preemption(lambda: None)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=register)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]
