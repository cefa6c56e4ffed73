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
    for name in ("_asked", "_save", "_listening", "_before"):
        monkeypatch.setattr(preemption, name, getattr(preemption, name))
    page = ProgressPage.from_env("i", {})
    yield page
    preemption._held.clear()
    preemption.attach(None, preemption.nullcontext)
    signal.signal(signal.SIGTERM, before)


def attach(page: ProgressPage) -> list[str]:
    """As the wrapper does; returns what happens."""
    happened: list[str] = []

    @contextmanager
    def atomic() -> Iterator[None]:
        happened.append("atomic")
        try:
            yield
        finally:
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
    assert happened == ["atomic", "saved"], "nothing may interrupt the way out, either"
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


def test_a_handler_that_the_script_had_is_called_too(page: ProgressPage) -> None:
    seen = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    assert not seamark.preempted()
    os.kill(os.getpid(), signal.SIGTERM)
    assert (seen, seamark.preempted()) == ([signal.SIGTERM], True)


def test_what_is_registered_after_the_signal_is_saved_too(page: ProgressPage) -> None:
    attach(page)
    seamark.preempted()
    os.kill(os.getpid(), signal.SIGTERM)
    page.ping()
    seamark.on_preemption(lambda: None)
    with pytest.raises(SystemExit):
        page.ping()


def test_a_ping_of_another_thread_leaves_it_to_the_main_thread(page: ProgressPage) -> None:
    happened = attach(page)
    seamark.on_preemption(lambda: happened.append("saved"))
    os.kill(os.getpid(), signal.SIGTERM)
    thread = threading.Thread(target=page.ping)
    thread.start()
    thread.join()
    assert happened == []
    with pytest.raises(SystemExit):
        page.ping()


def test_a_child_can_be_terminated(page: ProgressPage) -> None:
    seamark.preempted()
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(begun, b"!")
        signal.pause()
        os._exit(0)
    os.read(ready, 1)
    os.close(ready)
    os.close(begun)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
