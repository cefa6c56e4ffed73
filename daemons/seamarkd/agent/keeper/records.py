"""What is known of each process that was started, until its exit is acknowledged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from .page import says_discarded
from .requests import Message, Refused, process_key


@dataclass
class Record:
    """One process that was started, until its exit is acknowledged."""

    slot: str
    incarnation: str
    kind: str
    pid: int
    start_time: int
    forked: bool
    forked_at: float
    fork_seconds: float
    why_exec: str | None
    port: int | None
    pidfd: int
    page: int
    gate: int | None = None
    status: int | None = None
    core: bool = False
    at: float | None = None
    discarded: bool = False

    def describe(self) -> Message:
        return {name: value for name, value in vars(self).items() if name not in ("pidfd", "page", "gate")}

    def ended(self, status: int, at: float) -> None:
        """`status` is that of wait(2)."""
        self.status = os.waitstatus_to_exitcode(status)
        self.core = os.WIFSIGNALED(status) and os.WCOREDUMP(status)
        self.at = at
        # The page goes with the process: whoever asks later hears it from here.
        self.discarded = says_discarded(self.page)

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.page)
        self.close_gate()

    def close_gate(self) -> None:
        if self.gate is not None:
            os.close(self.gate)
            self.gate = None


class Records:
    """All of them: the living, and those whose exit is not acknowledged."""

    def __init__(self) -> None:
        self._all: dict[tuple[str, str], Record] = {}
        self.living: dict[int, Record] = {}
        """By process id."""

    def __iter__(self) -> Iterator[Record]:
        return iter(self._all.values())

    def __len__(self) -> int:
        return len(self._all)

    def get(self, key: tuple[str, str]) -> Record | None:
        return self._all.get(key)

    def add(self, record: Record) -> None:
        self._all[record.slot, record.incarnation] = self.living[record.pid] = record

    def of(self, request: Message) -> Record:
        """The one that a request names."""
        slot, incarnation = process_key(request)
        record = self._all.get((slot, incarnation))
        if record is None:
            sentence = f"no process of slot {slot[:80]} and incarnation {incarnation[:80]} is known here"
            raise Refused("unknown_process", sentence)
        return record

    def ended(self, pid: int, status: int, at: float) -> Record | None:
        """None for an orphan that a worker left behind."""
        record = self.living.pop(pid, None)
        if record is not None:
            record.ended(status, at)
        return record

    def forget(self, record: Record) -> None:
        if record.status is None:
            sentence = f"{record.slot} (pid {record.pid}) is alive: there is nothing to acknowledge"
            raise Refused("alive", sentence)
        del self._all[record.slot, record.incarnation]
        record.close()

    def stores(self) -> set[int]:
        """The process ids of living stores."""
        return {pid for pid, record in self.living.items() if record.kind == "store"}

    def workers(self) -> set[int]:
        """The process ids of living workers."""
        return self.living.keys() - self.stores()
