"""The keeper's command line: to be a keeper, or a worker that one can't fork."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import socket
import stat
import sys
from collections.abc import Sequence
from typing import NoReturn

from .ending import run_and_exit
from .forkable import THREAD_VARIABLES
from .forking import Task
from .gate import wait_for_release
from .launch import Launcher
from .log import say
from .loop import Keeper
from .preload import PRELOAD, preload
from .processes import stat_fields
from .spawning import add_options, task_of

PR_SET_CHILD_SUBREAPER = 36


def bind(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    usual_umask = os.umask(0o177)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
                if other.connect_ex(path) == 0:
                    sys.exit(f"another keeper answers on {path}: connect to it instead of starting one")
            os.unlink(path)
        sock.bind(path)
    except OSError as error:
        sys.exit(f"can't listen on {path}: {error.strerror or error}")
    finally:
        os.umask(usual_umask)
    sock.listen()
    return sock


def keep(options: argparse.Namespace) -> Task:
    """Be the keeper; returns in every new process, and only there."""
    # Where a shell started it as the leader of a group, that is session enough.
    with contextlib.suppress(PermissionError):
        os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    listener = bind(options.socket)
    environ = dict(os.environ)
    # For the libraries loaded now, which start threads otherwise; each worker gets an environment of its own.
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    preloaded = preload(filter(None, options.preload.split(",")))
    if preloaded.reason:
        say(f"workers are exec'ed instead of forked: {preloaded.reason}")
    keeper = Keeper(options.job, listener, Launcher(environ, preloaded), preloaded, options.linger)
    forked = keeper.serve()
    if forked is not None:
        return forked.become(keeper.close)
    os.unlink(options.socket)
    # Nothing here needs the seconds that torch takes to tidy up.
    os._exit(0)


def show_command_line(argv: Sequence[str]) -> None:
    """Let ps, top and nvidia-smi show the worker's command, as far as there is room for it."""
    begin, end = map(int, stat_fields(os.getpid())[45:47])
    if 0 < begin < end:
        line = b"\0".join(map(os.fsencode, argv))
        ctypes.memmove(begin, line[: end - begin - 1].ljust(end - begin, b"\0"), end - begin)


def main(argv: list[str]) -> Task:
    """Returns in every process but the keeper itself."""
    parser = argparse.ArgumentParser(prog="keeper", allow_abbrev=False)
    parser.add_argument("--socket", help="the unix socket to answer on")
    parser.add_argument("--job", help="the job's name, for people who look at processes")
    parser.add_argument("--linger", type=float, help="seconds to wait for another agent (default: for ever)")
    parser.add_argument("--preload", default=",".join(PRELOAD), help="modules to import, separated by commas")
    add_options(parser)
    ours, theirs = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    options = parser.parse_args(ours)
    task = task_of(options, theirs)
    if task is not None:
        if options.gate is not None:
            wait_for_release(options.gate)
        return task
    if options.socket is None or options.job is None:
        parser.error("--socket and --job are needed")
    return keep(options)


def run(argv: list[str]) -> NoReturn:
    """Be what the command line says, in this process and in every one forked from it."""
    task = main(argv)
    show_command_line(task.command_line())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    run_and_exit(task)
