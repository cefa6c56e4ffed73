"""When a worker hangs: tables of what its page says over time, and what its watch says to that."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamark.progress import OpenSection, Phase, Timeouts
from seamarkd.agent.hang import WINDOW, HangWatch, Observed, Reading

LIMITS = Timeouts(soft=2.0, hard=3.0, grace=5.0)
EVERY = 0.25


@dataclass
class Worker:
    """A worker that is looked at four times a second, and what its watch said."""

    limits: Timeouts = LIMITS
    phase: Phase = Phase.WORKING
    iteration: int = 0
    signs: int = 0
    pings: int = 0
    sections: tuple[OpenSection, ...] = ()
    stopped: bool = False
    now: float = 50.0
    watch: HangWatch = field(default_factory=HangWatch)
    said: list[tuple[float, str, str]] = field(default_factory=list)

    def go(self, seconds: float, *, signs: bool = False, pings: bool = False) -> Worker:
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + EVERY)
            self.signs += signs
            self.pings += pings
            self.look()
        return self

    def look(self) -> None:
        reading = Reading(
            self.phase, self.iteration, self.signs, self.pings, 0, self.limits, self.sections, self.stopped
        )
        verdict = self.watch.look(self.now, reading)
        if verdict is not None:
            self.said.append((self.now, verdict.kind, verdict.text))

    @property
    def verdicts(self) -> list[str]:
        return [kind for _, kind, _ in self.said]


def test_who_gives_signs_of_life_is_left_alone() -> None:
    assert Worker().go(60.0, signs=True).said == []
    assert Worker().go(60.0, pings=True).said == []


def test_who_runs_no_python_is_interrupted_and_then_ended() -> None:
    worker = Worker().go(3.5)
    assert worker.verdicts == ["soft", "hard"]
    assert worker.said[0] == (52.25, "soft", "it ran no Python for 2.0 s (2 s are allowed)")
    assert 3.0 <= worker.said[1][0] - 50.25 < 3.0 + EVERY


def test_who_pinged_once_has_to_go_on_pinging() -> None:
    worker = Worker().go(5.0, signs=True)
    worker.pings += 1
    worker.go(2.5, signs=True)
    assert [text for _, _, text in worker.said] == ["it did not call ping() for 2.0 s (2 s are allowed)"]


def test_the_first_ping_has_a_time_of_its_own() -> None:
    slow = Worker(limits=LIMITS._replace(initial=5.0)).go(4.5, signs=True)
    assert slow.said == []
    slow.go(1.0, signs=True)
    assert slow.said[0][2] == "it did not call ping() the first time for 5.0 s (5 s are allowed)"


@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.OUTSIDE])
def test_nobody_is_judged_while_it_waits_for_others(phase: Phase) -> None:
    assert Worker(phase=phase).go(60.0).said == []


def test_a_new_phase_or_iteration_begins_anew() -> None:
    worker = Worker().go(1.75)
    worker.iteration += 1
    worker.go(1.75)
    worker.phase = Phase.WAITING
    worker.go(10.0)
    worker.phase = Phase.WORKING
    assert worker.go(1.75).said == []


def test_without_a_timeout_nobody_hangs() -> None:
    assert Worker(limits=Timeouts()).go(600.0).said == []


def test_every_open_section_is_looked_at() -> None:
    outer, inner = OpenSection(1, 1.0, "step"), OpenSection(2, 30.0, "forward")
    worker = Worker(sections=(outer, inner)).go(1.5, signs=True, pings=True)
    assert worker.said == [(51.25, "soft", "it has been in section 'step' for 1.0 s (1 s are allowed)")]
    worker.go(1.0, signs=True, pings=True)
    assert worker.verdicts == ["soft", "hard"]


def test_a_section_with_a_timeout_is_judged_by_that_alone() -> None:
    worker = Worker(sections=(OpenSection(1, 30.0, "checkpoint"),)).go(20.0)
    assert worker.said == []
    worker.sections = ()
    worker.go(1.75)
    assert worker.said == [], "the general clocks begin when it ends"
    worker.go(0.5)
    assert worker.verdicts == ["soft"]


def test_a_section_that_is_opened_again_begins_anew() -> None:
    worker = Worker()
    for number in range(1, 20):
        worker.sections = (OpenSection(number, 1.0, "forward"),)
        worker.go(0.75, signs=True)
    assert worker.said == []


def test_time_between_sections_is_limited_once_there_was_one() -> None:
    worker = Worker(limits=LIMITS._replace(outside=1.0)).go(5.0, signs=True)
    assert worker.said == []
    worker.sections = (OpenSection(1, 0.0, "forward"),)
    worker.go(5.0, signs=True)
    worker.sections = ()
    worker.go(1.25, signs=True)
    assert worker.said[0][2] == "it was in no section for 1.0 s (1 s are allowed)"


def test_who_is_stopped_by_a_signal_is_found_in_any_phase() -> None:
    worker = Worker(phase=Phase.OUTSIDE, stopped=True).go(1.0)
    assert worker.verdicts == ["stopped"]
    worker = Worker(stopped=True).go(0.25)
    worker.stopped = False
    assert worker.go(0.5).said == []


def test_an_agent_that_stood_still_blames_nobody() -> None:
    worker = Worker(sections=(OpenSection(1, 1.5, "forward"),)).go(0.5)
    worker.now += 600.0
    worker.look()
    assert worker.go(0.5).said == []
    worker.stopped = True
    worker.look()
    worker.now += 600.0
    worker.look()
    assert worker.said == []


def test_a_verdict_is_repeated_but_not_at_every_look() -> None:
    worker = Worker(limits=Timeouts(soft=1.0)).go(8.0)
    assert worker.verdicts == ["soft"] * 4


@given(
    soft=st.floats(0.1, 100.0),
    more=st.floats(0.01, 100.0),
    quiet=st.floats(0.0, 300.0),
    chatter=st.integers(0, 20),
)
def test_nobody_is_judged_before_its_time_and_everybody_soon_after(
    soft: float, more: float, quiet: float, chatter: int
) -> None:
    worker = Worker(limits=Timeouts(soft, soft + more, 1.0)).go(EVERY * chatter, signs=True)
    worker.go(quiet)
    first = {kind: at - 50.0 - EVERY * chatter for at, kind, _ in reversed(worker.said)}
    slack = 2 * EVERY
    if quiet > soft + slack:
        assert soft - slack <= min(first.values()) <= soft + slack
    if quiet > soft + more + slack:
        assert soft + more - slack <= first["hard"] <= soft + more + slack
    if quiet < soft - slack:
        assert worker.said == []


CALCULATED = Timeouts(soft=60.0, hard=90.0, safety=5.0)


def test_a_calculated_timeout_is_so_many_times_what_was_observed() -> None:
    worker = Worker(limits=CALCULATED)
    for _ in range(45):
        worker.go(2.0, signs=True).go(EVERY, pings=True)
    worker.go(5 * 2.25 - 2 * EVERY, signs=True)
    assert worker.said == []
    worker.go(3 * EVERY, signs=True)
    assert worker.verdicts == ["soft"]


def test_nothing_is_calculated_below_what_a_pause_may_take_nor_above_what_was_given() -> None:
    quick = Worker(limits=CALCULATED).go(30.0, pings=True)
    assert quick.go(4.5, signs=True).said == []
    assert quick.go(1.0, signs=True).verdicts == ["soft"]
    slow = Worker(limits=CALCULATED._replace(soft=8.0))
    for _ in range(45):
        slow.go(6.0, signs=True).go(EVERY, pings=True)
    assert slow.go(8.5, signs=True).verdicts == ["soft"]


def test_without_the_option_nothing_is_calculated() -> None:
    worker = Worker(limits=CALCULATED._replace(safety=0.0)).go(30.0, pings=True)
    assert worker.go(50.0, signs=True).said == []


def test_a_section_has_a_calculated_timeout_of_its_own() -> None:
    worker = Worker(limits=CALCULATED)
    for number in range(1, 45):
        worker.sections = (OpenSection(number, 0.0, "forward"),)
        worker.go(1.5, signs=True)
        worker.sections = ()
        worker.go(EVERY, pings=True)
    worker.sections = (OpenSection(99, 0.0, "forward"),)
    worker.go(6.5, signs=True)
    assert worker.said == []
    worker.go(2.0, signs=True)
    assert worker.verdicts == ["soft"]
    assert "'forward'" in worker.said[0][2]


def test_windows_are_merged() -> None:
    observed = Observed()
    for seconds in (*[1.0] * (WINDOW - 1), 10.0, *[2.0] * WINDOW):
        observed.add(seconds)
    assert observed.limit(5.0, 0.0) == 5.0 * (0.5 * 2.0 + 0.5 * 10.0)
