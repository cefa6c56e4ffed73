"""Starting a process: its descriptors, its way (fork or exec), and its record."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Mapping

from .forkable import why_other_at_start, why_unsafe_to_fork
from .forking import Forked, Task, fork
from .page import PROGRESS_FD, blank_page
from .preload import Preloaded
from .processes import start_time
from .records import Record, Records
from .requests import Message, Refused, environment, flag, integer, process_key, text, worker_task
from .spawning import spawn
from .store import Store, listen
from .worker import Worker


class Launcher:
    """Starts what requests ask for.

    Args:
        environ: the environment that the keeper was started with.
        preloaded: what its workers are forked from.
    """

    def __init__(self, environ: Mapping[str, str], preloaded: Preloaded) -> None:
        self._environ = environ
        self._preloaded = preloaded
        self._store_sockets: dict[tuple[str, int], socket.socket] = {}

    def launch(self, request: Message, records: Records) -> Record | Forked:
        """The new process's record; in a forked process itself, what it has to become."""
        kind = text(request, "kind")
        if kind == "worker":
            return self._start(request, worker_task(request))
        if kind == "store":
            return self._start(request, self._store_task(request, records))
        raise Refused("malformed", f"kind must be 'worker' or 'store', not {kind[:80]!r}")

    def close(self) -> None:
        for sock in self._store_sockets.values():
            sock.close()

    def _start(self, request: Message, task: Task) -> Record | Forked:
        slot, incarnation = process_key(request)
        with contextlib.ExitStack() as child_owned, contextlib.ExitStack() as undo:
            if isinstance(task, Store):
                child_owned.callback(os.close, task.listener)
            env = environment(request)
            if isinstance(task, Worker):
                env["OMP_NUM_THREADS"] = str(task.num_threads)
            log = open_log(text(request, "log"))
            child_owned.callback(os.close, log)
            page = blank_page()
            undo.callback(os.close, page)
            gate = gate_here = None
            if isinstance(task, Worker) and flag(request, "held"):
                gate, gate_here = os.pipe()
                child_owned.callback(os.close, gate)
                undo.callback(os.close, gate_here)
            why_exec = self._why_exec(env)
            forked_at = time.monotonic()
            pid = fork() if why_exec is None else spawn(task, env, log, page, gate)
            if pid == 0:
                child_owned.pop_all()
                undo.pop_all()
                if gate_here is not None:
                    os.close(gate_here)
                return Forked(task, env | {PROGRESS_FD: str(page)}, log, page, gate)
            fork_seconds = time.monotonic() - forked_at
            undo.callback(os.kill, pid, signal.SIGKILL)
            record = Record(
                slot=slot,
                incarnation=incarnation,
                kind="store" if isinstance(task, Store) else "worker",
                pid=pid,
                start_time=start_time(pid),
                forked=why_exec is None,
                forked_at=forked_at,
                fork_seconds=fork_seconds,
                why_exec=why_exec,
                port=task.port if isinstance(task, Store) else None,
                pidfd=os.pidfd_open(pid),
                page=page,
                gate=gate_here,
            )
            undo.pop_all()
        return record

    def _why_exec(self, env: Mapping[str, str]) -> str | None:
        return (
            self._preloaded.reason or why_other_at_start(env, self._environ) or why_unsafe_to_fork("what was preloaded")
        )

    def _store_task(self, request: Message, records: Records) -> Store:
        host, port = text(request, "host"), integer(request, "port", 0, 65535)
        if any(record.port == port for record in records.living.values()):
            raise Refused("port_in_use", f"port {port} is served by the store that is running here")
        sock = self._store_sockets.get((host, port))
        if sock is None:
            sock = listen(host, port)
            port = sock.getsockname()[1]
            # Held as long as the keeper lives: while no store runs, clients wait in line instead of failing.
            self._store_sockets[host, port] = sock
        return Store(host, port, os.dup(sock.fileno()))


def open_log(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Refused("bad_log", f"can't open the log file {path}: {error.strerror}") from error
