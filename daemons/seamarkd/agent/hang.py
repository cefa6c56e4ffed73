"""Whether a worker hangs: judged by what it writes into its progress page, on the agent's own clock.

Two clocks run. One restarts at every sign that the main thread runs Python; it catches whoever is blocked, stopped, or
holds the interpreter's lock in C. The other restarts at every ``ping()`` once there was one in this iteration; it
catches whoever computes and gets nowhere. Past the soft timeout of either a worker is to be interrupted, past the hard
one to be ended. Each open section has a clock of its own. Where nothing is watched, no clock runs: not while a worker
waits for others, and not while this agent itself was stopped. Pure: readings and the time come in.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Literal, NamedTuple

from seamark.progress import OpenSection, Phase, ProgressPage, Timeouts

STOPPED_TIMEOUT = 0.5
"""Seconds that a worker may be stopped by a signal (state T, not by a debugger)."""
UNEVEN = 0.02
"""Seconds: two looks are so much nearer to each other where the first one was late."""
PAUSE = 1.0
"""Seconds between two looks; after a longer pause it was the agent, or the whole host, that stood still."""
REPEAT_INTERVAL = 2.0
"""Seconds after which an unanswered verdict is given again."""


WINDOW = 20
"""So many observations give one figure."""
SMOOTHING = 0.5
"""The weight of the latest window: NVRx's launcher merges what it calculates so, too."""
LEAST_CALCULATED = 5.0
"""Seconds; a look every quarter of a second is no fine measure, and a short pause is no hang."""


class Observed:
    """How long something took: the longest of each window, merged with those before."""

    def __init__(self) -> None:
        self._count = 0
        self._longest = 0.0
        self._merged = 0.0

    def add(self, seconds: float) -> None:
        """It took so long this time."""
        self._count += 1
        self._longest = max(self._longest, seconds)
        if self._count == WINDOW:
            known = self._merged or self._longest
            self._merged = SMOOTHING * self._longest + (1 - SMOOTHING) * known
            self._count, self._longest = 0, 0.0

    def limit(self, safety: float, given: float) -> float:
        """Seconds that it may take: what was given, or less where enough was observed; 0.0: for ever."""
        if not safety or not self._merged:
            return given
        calculated = max(LEAST_CALCULATED, safety * self._merged)
        return min(given, calculated) if given else calculated


class Reading(NamedTuple):
    """A progress page as of one moment."""

    phase: Phase
    iteration: int
    signs: int
    pings: int
    pings_before: int
    timeouts: Timeouts
    sections: tuple[OpenSection, ...]
    stopped: bool

    @classmethod
    def of(cls, page: ProgressPage, *, stopped: bool) -> Reading:
        """What the page says now."""
        return cls(
            page.phase,
            page.iteration,
            page.signs,
            page.pings,
            page.pings_before,
            page.timeouts,
            page.sections,
            stopped,
        )


class Verdict(NamedTuple):
    """What is to be done with a worker, and a sentence why."""

    kind: Literal["soft", "hard", "stopped"]
    text: str


class HangWatch:
    """The clocks of one worker."""

    def __init__(self) -> None:
        self._looked = -1.0
        self._last: Reading | None = None
        self._sign = 0.0
        self._ping = 0.0
        self._outside = 0.0
        self._opened: dict[int, float] = {}
        self._names: dict[int, str] = {}
        self._pings = Observed()
        self._in_section: defaultdict[str, Observed] = defaultdict(Observed)
        self._had_section = False
        self._stopped: float | None = None
        self._said: tuple[Verdict | None, int, float] = (None, -1, 0.0)

    def look(self, now: float, reading: Reading) -> Verdict | None:
        """The verdict as of now; the same one again only after a while.

        Args:
            now: seconds of the agent's monotonic clock.
            reading: the page.
        """
        self._run_clocks(now, reading)
        verdict = self._judge(now, reading)
        said, iteration, at = self._said
        if verdict is None:
            return None
        if (
            said is not None
            and (said.kind, iteration) == (verdict.kind, reading.iteration)
            and now - at < REPEAT_INTERVAL
        ):
            return None
        self._said = (verdict, reading.iteration, now)
        return verdict

    def _run_clocks(self, now: float, reading: Reading) -> None:
        last, paused = self._last, now - self._looked if self._looked >= 0 else 0.0
        self._last, self._looked = reading, now
        if paused > PAUSE:
            self._sign += paused
            self._ping += paused
            self._outside += paused
            self._opened = {number: at + paused for number, at in self._opened.items()}
            self._stopped = None
        fresh = last is None or (last.phase, last.iteration) != (reading.phase, reading.iteration)
        if fresh or reading.pings_before != getattr(last, "pings_before", -1):
            self._sign = self._ping = self._outside = now
            self._had_section = False
        if last is not None and reading.signs != last.signs:
            self._sign = now
        if last is not None and reading.pings != last.pings:
            if not fresh and last.pings != last.pings_before:
                self._pings.add(now - self._ping)
            self._ping = self._sign = now
        if reading.sections or not self._had_section:
            self._outside = now
        self._had_section = self._had_section or bool(reading.sections)
        if any(one.timeout for one in reading.sections):
            # What has a time of its own is not held to the general one.
            self._sign = self._ping = now
        open_now = {one.number: one.name for one in reading.sections}
        for number, name in self._names.items():
            if number not in open_now and not fresh:
                self._in_section[name].add(now - self._opened[number])
        self._names = open_now
        self._opened = {number: self._opened.get(number, now) for number in open_now}
        self._stopped = (now if self._stopped is None else self._stopped) if reading.stopped else None

    def _judge(self, now: float, reading: Reading) -> Verdict | None:
        if self._stopped is not None and now - self._stopped >= STOPPED_TIMEOUT - UNEVEN:
            return Verdict("stopped", f"stopped by a signal for more than {STOPPED_TIMEOUT:g} s")
        if reading.phase is not Phase.WORKING:
            return None
        limits = reading.timeouts
        first = reading.pings == reading.pings_before
        clocks = [
            (now - self._sign, limits.soft, "ran no Python"),
            (now - self._ping, limits.initial, "did not call ping() the first time")
            if first
            else (now - self._ping, self._pings.limit(limits.safety, limits.soft), "did not call ping()"),
            (now - self._outside, limits.outside, "was in no section"),
            *(
                (
                    now - self._opened[one.number],
                    self._limit_of(one, limits.safety),
                    f"has been in section {one.name!r}",
                )
                for one in reading.sections
            ),
        ]
        more = max(0.0, limits.hard - limits.soft)
        late = [
            (seconds - limit, f"it {what} for {seconds:.1f} s ({limit:g} s are allowed)")
            for seconds, limit, what in clocks
            if 0 < limit <= seconds
        ]
        if not late:
            return None
        over, sentence = max(late)
        return Verdict("hard" if limits.hard > 0 and over >= more else "soft", sentence)

    def _limit_of(self, section: OpenSection, safety: float) -> float:
        known = self._in_section.get(section.name)
        return known.limit(safety, section.timeout) if known else section.timeout
