"""``seamark.section``: a named part of the training that may take only so long.

Writes into the progress page, which the agent reads; costs a few memory writes and knows nothing of who looks.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import deque
from types import TracebackType
from typing import Self

from seamark.environment import INCARNATION
from seamark.progress import MAX_SECTIONS, ProgressPage, name_words, worker_page

_numbers = itertools.count(1)
_free: deque[int] = deque(range(MAX_SECTIONS))
_words = functools.lru_cache(maxsize=1_024)(name_words)


class section:  # noqa: N801 - it reads as a statement, like contextlib.suppress
    """``with seamark.section("forward", timeout=30.0):`` says what the training is at, and how long that may take.

    A section with a timeout is judged by that alone: the wrapper's own timeouts stand still meanwhile. Past its timeout
    the rank is interrupted and everybody restarts in process; who does not leave it is ended as late after that as
    ``hard_timeout`` is after ``soft_timeout``. Sections may be nested; all that are open are looked at. Of more than 16
    open ones those that were opened last are not watched. Without an agent it does nothing.

    Args:
        name: for people; 48 bytes of it are kept.
        timeout: seconds; None for no limit of its own.

    Raises:
        ValueError: the timeout is not above 0.
    """

    __slots__ = ("_name", "_page", "_slot", "_timeout")

    def __init__(self, name: str, timeout: float | None = None) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"section {name!r}: a timeout must be more than 0 seconds, not {timeout}")
        self._name = _words(name)
        self._timeout = timeout or 0.0
        self._slot = -1
        self._page = _page(os.getpid())

    def __enter__(self) -> Self:
        if _free:
            self._slot = _free.popleft()
            self._page.open_section(self._slot, next(_numbers), self._timeout, self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._slot >= 0:
            self._page.close_section(self._slot)
            _free.append(self._slot)
            self._slot = -1


@functools.cache
def _page(pid: int) -> ProgressPage:
    return worker_page(os.environ.get(INCARNATION, ""))


def forget_open_sections() -> None:
    """After an interrupt, which may have come between the opening of a section and its being known as open."""
    _free.clear()
    _free.extend(range(MAX_SECTIONS))
