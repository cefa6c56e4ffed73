"""What a worker's sections, phases and timeouts look like to who reads its progress page."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

import seamark
from seamark import progress, sections
from seamark.inprocess.signs import Signs, interval
from seamark.progress import MAX_SECTIONS, PROGRESS_FD, Phase, ProgressPage, Timeouts


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ProgressPage, ProgressPage]]:
    """A worker's page as the worker and as its agent have it."""
    fd = progress.create()
    written = ProgressPage.from_env("i0", {PROGRESS_FD: str(fd)})
    read = ProgressPage(fd)
    os.close(fd)
    monkeypatch.setattr(sections, "_page", lambda pid: written)
    yield written, read
    sections.forget_open_sections()
    read.close()


def names(page: ProgressPage) -> list[str]:
    return [one.name for one in page.sections]


def test_open_sections_are_seen_with_their_timeouts(pages: tuple[ProgressPage, ProgressPage]) -> None:
    _, read = pages
    with seamark.section("step"):
        with seamark.section("forward", timeout=1.5):
            assert [(one.name, one.timeout) for one in read.sections] == [("step", 0.0), ("forward", 1.5)]
        assert names(read) == ["step"]
    assert names(read) == []


def test_each_opening_has_a_number_of_its_own(pages: tuple[ProgressPage, ProgressPage]) -> None:
    _, read = pages
    section, numbers = seamark.section("forward"), set()
    for _ in range(3):
        with section:
            numbers.add(read.sections[0].number)
    assert len(numbers) == 3


def test_a_section_that_is_left_by_an_exception_is_closed(pages: tuple[ProgressPage, ProgressPage]) -> None:
    _, read = pages
    with pytest.raises(ValueError, match="one"), seamark.section("forward"):
        raise ValueError("one")
    assert names(read) == []


def test_more_sections_than_there_is_room_for_harm_nobody(pages: tuple[ProgressPage, ProgressPage]) -> None:
    _, read = pages
    with ExitStack() as stack:
        for number in range(MAX_SECTIONS + 3):
            stack.enter_context(seamark.section(f"s{number}"))
        assert len(read.sections) == MAX_SECTIONS
    assert names(read) == []
    with seamark.section("again"):
        assert names(read) == ["again"]


@pytest.mark.parametrize("name", ["x" * 200, "ä" * 100, ""])
def test_names_are_cut_and_never_refused(pages: tuple[ProgressPage, ProgressPage], name: str) -> None:
    _, read = pages
    with seamark.section(name):
        (found,) = names(read)
    assert name.startswith(found.rstrip("\ufffd"))
    assert len(found.encode()) <= 50


def test_a_timeout_that_cannot_be_met_is_refused_at_the_call() -> None:
    for timeout in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="section 'forward': a timeout must be more than 0 seconds"):
            seamark.section("forward", timeout=timeout)


def test_a_new_phase_closes_what_an_interrupt_left_open(pages: tuple[ProgressPage, ProgressPage]) -> None:
    written, read = pages
    written.ping()
    seamark.section("forward").__enter__()
    signs = read.signs
    written.enter(Phase.WORKING)
    assert (names(read), read.phase, read.pings, read.pings_before) == ([], Phase.WORKING, 1, 1)
    assert read.signs == signs + 1


def test_timeouts_are_kept_to_the_millisecond_and_never_become_none(pages: tuple[ProgressPage, ProgressPage]) -> None:
    written, read = pages
    written.timeouts = Timeouts(60.0, 90.5, 0.0001, 0.0, 1.234)
    assert read.timeouts == Timeouts(60.0, 90.5, 0.001, 0.0, 1.234)


def test_the_main_thread_answers_when_it_runs_python_and_not_while_it_is_blocked(
    pages: tuple[ProgressPage, ProgressPage],
) -> None:
    written, read = pages
    signs = Signs(written)
    heard: list[int] = []

    def ask_for(seconds: float) -> None:
        until = time.monotonic() + seconds
        before = read.signs
        while time.monotonic() < until:
            signs.ask()
            time.sleep(0.001)
        heard.append(read.signs - before)

    for busy in (True, False):
        asking = threading.Thread(target=ask_for, args=(0.3,))
        asking.start()
        if busy:
            while asking.is_alive():
                pass
        else:
            # In one native call, which the interpreter's lock is released for.
            asking.join()
    running, blocked = heard
    assert running > 10
    assert blocked <= 1


@pytest.mark.parametrize(
    ("soft", "expected"),
    [(60.0, 1.0), (600.0, 1.0), (30.0, 0.5), (15.0, 0.25), (1.0, 0.25), (0.0, 1.0)],
)
def test_signs_come_as_often_as_the_soft_timeout_needs_them(soft: float, expected: float) -> None:
    assert interval(soft) == expected
