"""The same process by exec, safe to do with threads around: what it is goes by its command line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

from .forking import Task
from .page import PROGRESS_FD
from .store import Store
from .worker import Worker

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py")


def arguments(task: Task, *, held: bool) -> list[str]:
    """The command line of this program that makes it that task, with its descriptors where `spawn` puts them."""
    if isinstance(task, Store):
        return ["--serve-store", "4", "--host", task.host, "--port", str(task.port)]
    options = ["--run", str(task.num_threads), "--cwd", task.cwd, *(["--module"] if task.module else [])]
    options += ["--cpus", ",".join(map(str, task.cpus))] if task.cpus else []
    options += ["--gate", "4"] if held else []
    return [*options, "--", *task.argv]


def add_options(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("used by the keeper itself, where it can't fork")
    own.add_argument("--run", type=int, metavar="NUM_THREADS")
    own.add_argument("--cwd")
    own.add_argument("--cpus", default="")
    own.add_argument("--gate", type=int, metavar="FD")
    own.add_argument("--module", action="store_true")
    own.add_argument("--serve-store", type=int, metavar="FD")
    own.add_argument("--host")
    own.add_argument("--port", type=int)


def task_of(options: argparse.Namespace, argv: list[str]) -> Task | None:
    """The task that a command line names, if it names one."""
    if options.run is not None:
        cpus = [int(cpu) for cpu in options.cpus.split(",") if cpu]
        return Worker(argv, options.module, options.cwd, options.run, cpus)
    if options.serve_store is not None:
        return Store(options.host, options.port, options.serve_store)
    return None


def spawn(task: Task, env: dict[str, str], log: int, page: int, gate: int | None) -> int:
    """The same process by exec, safe to do with threads around."""
    # Of 3 and 4 the keeper's own sockets were made long ago: nothing here is overwritten before its turn.
    actions: list[tuple[Any, ...]] = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, log, 1),
        (os.POSIX_SPAWN_DUP2, log, 2),
        (os.POSIX_SPAWN_DUP2, page, 3),
    ]
    if isinstance(task, Store):
        actions.append((os.POSIX_SPAWN_DUP2, task.listener, 4))
    if gate is not None:
        actions.append((os.POSIX_SPAWN_DUP2, gate, 4))
    return os.posix_spawn(
        sys.executable,
        [sys.executable, PROGRAM, *arguments(task, held=gate is not None)],
        env | {PROGRESS_FD: "3"},
        file_actions=actions,
        setpgroup=0,
        setsigmask=(),
        setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
    )
