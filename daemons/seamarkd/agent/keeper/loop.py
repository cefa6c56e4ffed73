"""The event loop: requests of one agent, exits of the children, the deadlines of linger and stop."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from types import FrameType

from .connection import Connection
from .forking import Forked
from .launch import Launcher
from .log import say
from .preload import Preloaded
from .processes import Look, descendants, kill, kill_group, start_time
from .records import Record, Records
from .requests import MAX_PACKET_BYTES, Message, Refused, flag, integer, parse, process_key, request_id, seconds, text
from .stop import Left, Signal, Stop

# With --linger, how long a fresh keeper waits for its first agent.
FIRST_AGENT_SECONDS = 60.0
LINGER_GRACE_SECONDS = 5.0
SIGTERM_GRACE_SECONDS = 10.0
# Without a descriptor for whoever wants to connect, how long until it is tried again.
DEAF_SECONDS = 0.5


class Keeper:
    """Serves one agent at a time, the newest.

    Args:
        job: its name.
        listener: where agents connect.
        launcher: starts the processes.
        preloaded: what to tell of it.
        linger: seconds to wait for another agent when one is gone; None for ever.
    """

    def __init__(
        self,
        job: str,
        listener: socket.socket,
        launcher: Launcher,
        preloaded: Preloaded,
        linger: float | None,
    ) -> None:
        self._job = job
        self._listener = listener
        self._launcher = launcher
        self._preloaded = preloaded
        self._linger = linger
        self._alone_until = None if linger is None else time.monotonic() + max(linger, FIRST_AGENT_SECONDS)
        self._deaf_until = 0.0
        self._connections: dict[int, Connection] = {}
        self._agent: Connection | None = None
        self._epoch = 0
        self._records = Records()
        self._look = Look()
        self._stop: Stop | None = None
        self._await_stop: list[tuple[Connection, int | None]] = []
        self._terminated = False
        self._childless = True
        self._wakeup, self._waker = socket.socketpair()
        self._wakeup.setblocking(False)
        self._waker.setblocking(False)
        self._requests: dict[str, Callable[[Connection, Message], Forked | None]] = {
            "start": self._on_start,
            "release": self._on_release,
            "signal": self._on_signal,
            "list": self._on_list,
            "acknowledge": self._on_acknowledge,
            "stop": self._on_stop,
        }

    def serve(self) -> Forked | None:
        """Run until all is stopped (None), or until this is a new process that has its own way to go."""
        self._take_signals()
        while True:
            for fd in self._wait():
                if fd == self._listener.fileno():
                    self._accept()
                elif fd == self._wakeup.fileno():
                    self._wakeup.recv(4096)
                elif fd in self._connections:
                    forked = self._receive(self._connections[fd])
                    if forked is not None:
                        return forked
            self._reap()
            now = time.monotonic()
            if self._terminated:
                self._terminated = False
                say("terminated, stopping")
                self._begin_stop(now + SIGTERM_GRACE_SECONDS, final=True)
            if self._alone_until is not None and now >= self._alone_until:
                self._alone_until = None
                say("no agent came back, stopping")
                self._begin_stop(now + LINGER_GRACE_SECONDS, final=True)
            if self._stop is not None and self._advance_stop(self._stop, now):
                self._flush()
                return None

    def close(self) -> None:
        """Let go of every descriptor; nothing is shut down, for in a new process they are still another's."""
        self._listener.close()
        self._wakeup.close()
        self._waker.close()
        for connection in self._connections.values():
            connection.close()
        for record in self._records:
            record.close()
        self._launcher.close()
        self._look.close()

    # -- the loop ----------------------------------------------------------------------------------------

    def _take_signals(self) -> None:
        # A signal ignored at the keeper's start would be ignored in every worker. The two are Python's own.
        for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        self._terminated = True

    def _wait(self) -> list[int]:
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        for fd, connection in self._connections.items():
            poll.register(fd, connection.events)
        now = time.monotonic()
        pauses = [] if self._alone_until is None else [self._alone_until - now]
        if now < self._deaf_until:
            pauses.append(self._deaf_until - now)
        else:
            poll.register(self._listener, select.POLLIN)
        if self._stop is not None:
            pauses.append(self._stop.pause(now))
        return [fd for fd, _ in poll.poll(max(0.0, min(pauses)) * 1000 if pauses else None)]

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            # Whoever waits there goes on waiting, and the listener readable.
            self._deaf_until = time.monotonic() + DEAF_SECONDS
            say(f"can't accept a connection: {error.strerror}: raise the limit of open files (ulimit -n)")
            return
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.getuid()):
            say(f"refused a connection by user {uid}")
            sock.close()
            return
        self._connections[sock.fileno()] = Connection(sock)

    def _receive(self, connection: Connection) -> Forked | None:
        connection.flush()
        if connection.backlog:
            return None
        try:
            packet = connection.sock.recv(MAX_PACKET_BYTES + 1)
        except BlockingIOError:
            return None
        except ConnectionError:
            packet = b""
        if not packet:
            self._drop(connection)
            return None
        request: Message = {}
        try:
            request = parse(packet)
            return self._handle(connection, request)
        except Refused as refusal:
            code, sentence = refusal.code, str(refusal)
        except OSError as error:
            code, sentence = "system", f"the system refused: {error}"
        connection.send({"type": "error", "id": request_id(request), "code": code, "error": sentence})
        return None

    def _handle(self, connection: Connection, request: Message) -> Forked | None:
        kind = text(request, "type")
        if kind == "hello":
            self._on_hello(connection, request)
            return None
        if kind not in self._requests:
            raise Refused("unknown", f"a keeper knows no request {kind[:80]!r}")
        if connection is not self._agent:
            raise Refused("hello_first", "say hello with your epoch before anything else")
        return self._requests[kind](connection, request)

    def _flush(self) -> None:
        for connection in self._connections.values():
            connection.sock.settimeout(1.0)
            connection.flush()

    def _drop(self, connection: Connection) -> None:
        del self._connections[connection.sock.fileno()]
        connection.close()
        if connection is self._agent:
            self._agent = None
            if self._linger is not None:
                self._alone_until = time.monotonic() + self._linger

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self._childless = True
                return
            self._childless = False
            if pid == 0:
                return
            record = self._records.ended(pid, status, time.monotonic())
            if record is not None:
                self._push_exit(record)

    def _push_exit(self, record: Record) -> None:
        if self._agent is not None:
            self._agent.send({"type": "exited", **record.describe()})

    # -- requests ----------------------------------------------------------------------------------------

    def _on_hello(self, connection: Connection, request: Message) -> None:
        epoch = integer(request, "epoch", 0, 1 << 63)
        if epoch < self._epoch:
            sentence = f"an agent of epoch {self._epoch} has come since; epoch {epoch} is refused"
            raise Refused("old_epoch", sentence)
        if self._agent is not None and self._agent is not connection:
            self._agent.send({"type": "superseded", "epoch": epoch})
            self._drop(self._agent)
        self._agent, self._epoch, self._alone_until = connection, epoch, None
        ready = {
            "job": self._job,
            "pid": os.getpid(),
            "start_time": start_time(os.getpid()),
            "python": sys.version.split()[0],
            "modules": self._preloaded.modules,
            "forks": self._preloaded.reason is None,
            "culprit": self._preloaded.culprit,
            "reason": self._preloaded.reason,
        }
        connection.send({"type": "ready", "id": request_id(request), **ready})
        for record in self._records:
            if record.status is not None:
                self._push_exit(record)

    def _on_start(self, connection: Connection, request: Message) -> Forked | None:
        record = self._records.get(process_key(request))
        if record is None:
            if self._stop is not None:
                raise Refused("stopping", "the keeper is stopping and starts nothing more")
            launched = self._launcher.launch(request, self._records)
            if isinstance(launched, Forked):
                return launched
            self._records.add(launched)
            record = launched
        answer = {**record.describe(), "type": "started", "id": request_id(request)}
        connection.send(answer, [record.pidfd, record.page])
        return None

    def _on_release(self, connection: Connection, request: Message) -> None:
        record = self._records.of(request)
        if record.gate is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(record.gate, b"1")
            record.close_gate()
        connection.send({"type": "released", "id": request_id(request)})

    def _on_signal(self, connection: Connection, request: Message) -> None:
        record = self._records.of(request)
        number = integer(request, "signum", 1, signal.NSIG - 1)
        whole_group = flag(request, "group")
        if record.status is None:
            reached = int(kill_group(record.pid, number) if whole_group else kill(record.pid, number))
        elif whole_group:
            # By now the number may be another group's elsewhere, so only our own descendants are meant.
            members = [pid for pid, group in descendants(os.getpid()).items() if group == record.pid]
            reached = sum(kill(pid, number) for pid in members)
        else:
            reached = 0
        connection.send({"type": "signalled", "id": request_id(request), "reached": reached})

    def _on_list(self, connection: Connection, request: Message) -> None:
        for record in self._records:
            fds = [record.pidfd, record.page] if record.status is None else []
            connection.send({**record.describe(), "type": "known", "id": request_id(request)}, fds)
        connection.send({"type": "listed", "id": request_id(request), "count": len(self._records)})

    def _on_acknowledge(self, connection: Connection, request: Message) -> None:
        record = self._records.of(request)
        self._records.forget(record)
        connection.send({"type": "acknowledged", "id": request_id(request)})

    # -- the end -----------------------------------------------------------------------------------------

    def _on_stop(self, connection: Connection, request: Message) -> None:
        self._begin_stop(time.monotonic() + seconds(request, "grace"), flag(request, "final", True))
        self._await_stop.append((connection, request_id(request)))

    def _begin_stop(self, deadline: float, final: bool) -> None:
        if self._stop is None:
            self._stop = Stop(deadline, final)
            send_signals(self._stop.ask(self._records.workers()))
        self._stop.hasten(deadline, final)

    def _advance_stop(self, stop: Stop, now: float) -> bool:
        """Whether all is over, the keeper's own life included."""
        left = Left(self._records.workers(), self._records.stores(), None if self._childless else self._below(stop))
        if not stop.over(now, left):
            send_signals(stop.signals(now, left))
            return False
        unkillable = left.pids(stores=stop.final)
        if unkillable:
            say(f"gave up on processes that can't be killed: {unkillable}")
        for connection, asked_as in self._await_stop:
            connection.send({"type": "stopped", "id": asked_as, "left": unkillable})
        self._await_stop.clear()
        self._stop = None
        return stop.final

    def _below(self, stop: Stop) -> dict[int, int]:
        """Every process below this one; those that were started, where the system does not let it look for others."""
        try:
            return self._look.below(os.getpid())
        except OSError as error:
            if not stop.blind:
                stop.blind = True
                say(f"can't look for processes that the workers left behind: {error}")
            return {pid: pid for pid in self._records.living}


def send_signals(signals: list[Signal]) -> None:
    for target, number, group in signals:
        # Who became another user's is not this one's to signal: it is named with those that can't be killed.
        with contextlib.suppress(PermissionError):
            if group:
                kill_group(target, number)
            else:
                kill(target, number)
