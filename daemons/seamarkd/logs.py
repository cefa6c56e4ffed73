"""How the daemons log: to stderr, one line per record, for people or for machines.

Knows nothing of files and rotation (supervisord has them) and writes no colours.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Hashable
from datetime import UTC, datetime

UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Whatever ends a line somewhere, or tells a terminal to do something."""
NEEDS_QUOTES = re.compile(r'[\s"=]|^$')
SPARING_INTERVAL = 60.0
"""Seconds between two lines about what one peer does wrong."""
SPARING_PEERS = 1_000
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Sparing:
    """Says whether a line about a peer is due: one a minute for each, so that nobody can fill the log."""

    def __init__(self) -> None:
        self._said: dict[Hashable, float] = {}

    def due(self, peer: Hashable) -> bool:
        """Whether a line about it is to be written now; then it is not again for ``SPARING_INTERVAL`` seconds."""
        now = time.monotonic()
        if now - self._said.get(peer, -SPARING_INTERVAL) < SPARING_INTERVAL:
            return False
        if len(self._said) >= SPARING_PEERS:
            self._said.clear()
        self._said[peer] = now
        return True


def configure(role: str, level: str, format: str) -> None:
    """Sends every record of this process to stderr, in place of any earlier configuration.

    Args:
        role: the word that names this daemon in each line, as ``lighthouse``.
        level: ``debug``, ``info``, ``warning`` or ``error``; less important records are dropped.
        format: ``text`` or ``json``.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(role) if format == "json" else TextFormatter(role))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


class TextFormatter(logging.Formatter):
    """``2026-11-22T20:01:02.123Z INFO lighthouse message key=value``."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        values = {name: str(value) for name, value in _values(record).items()}
        if trace := _trace(self, record):
            values["exception"] = trace
        pairs = [f"{name}={_quoted(value)}" for name, value in values.items()]
        line = " ".join([_time(record), record.levelname, self._role, record.getMessage(), *pairs])
        return _one_line(line)


class JsonFormatter(logging.Formatter):
    """One object per record: time, level, role, message, exception, and the values given with it."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        fixed = {"time": _time(record), "level": record.levelname, "role": self._role, "message": record.getMessage()}
        if trace := _trace(self, record):
            fixed["exception"] = trace
        return json.dumps(
            fixed | {name: value for name, value in _values(record).items() if name not in fixed}, default=str
        )


def _values(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in STANDARD}


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts)


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def _quoted(value: str) -> str:
    return '"' + value.replace('"', '\\"') + '"' if NEEDS_QUOTES.search(value) else value


def _one_line(text: str) -> str:
    return UNSAFE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
