"""A conversation with the supervisord of this host, over its unix socket.

Knows programs and processes, nothing of what they do, and never starts supervisord itself.
"""

from __future__ import annotations

import http.client
import xmlrpc.client
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from supervisor.xmlrpc import SupervisorTransport  # type: ignore[import-untyped]

SOCKET = "supervisor.sock"
"""In the run directory; conf/supervisord.conf says the same."""

FINAL_EXIT_CODES = (78, 143)
"""``exitcodes`` of the program files. After any other, EXITED lasts only until supervisord starts it again."""


class NotRunningError(Exception):
    """No supervisord answers at the socket."""


class Program(msgspec.Struct, frozen=True, rename={"state": "statename", "log": "stdout_logfile"}):
    """One process that supervisord looks after."""

    name: str
    group: str
    state: str
    """RUNNING, STARTING, BACKOFF, STOPPING, STOPPED, EXITED or FATAL."""
    pid: int
    exitstatus: int
    spawnerr: str
    log: str

    @property
    def full_name(self) -> str:
        """The name by which supervisord takes requests."""
        return f"{self.group}:{self.name}"

    @property
    def ended(self) -> bool:
        """Whether supervisord is not going to start it again by itself."""
        if self.state == "EXITED":
            return self.exitstatus in FINAL_EXIT_CODES
        return self.state in ("STOPPED", "FATAL")


class Supervisor:
    """The supervisord whose socket lies in this run directory."""

    def __init__(self, run: Path) -> None:
        self._transport = SupervisorTransport(None, None, f"unix://{run / SOCKET}")
        self._proxy = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=self._transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._transport.close()

    def _call(self, method: str, *arguments: object) -> Any:
        try:
            return getattr(self._proxy.supervisor, method)(*arguments)
        except (OSError, http.client.HTTPException) as error:
            self._transport.close()
            raise NotRunningError(f"no supervisord answers: {error}") from None

    def pid(self) -> int:
        """supervisord's own process id.

        Raises:
            NotRunningError: it does not answer; so say all the others.
        """
        return int(self._call("getPID"))

    def programs(self) -> list[Program]:
        """All its programs, in the order in which they are started."""
        return msgspec.convert(self._call("getAllProcessInfo"), list[Program])

    def start(self, program: Program) -> None:
        """Starts a program that is not running; does not wait.

        Raises:
            xmlrpc.client.Fault: it can't be started, or runs already.
        """
        self._call("startProcess", program.full_name, False)

    def stop(self, program: Program) -> None:
        """Stops a program; returns when it is gone. Raises xmlrpc.client.Fault if it does not run."""
        self._call("stopProcess", program.full_name, True)

    def hang_up(self, program: Program) -> None:
        """Sends SIGHUP: the daemon exits with 0 and is started again. Raises xmlrpc.client.Fault if it does not run."""
        self._call("signalProcess", program.full_name, "HUP")

    def shut_down(self) -> None:
        """Asks supervisord to stop everything, last started first, and then itself; does not wait."""
        self._call("shutdown")
