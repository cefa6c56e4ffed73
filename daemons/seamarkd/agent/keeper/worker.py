"""A worker: a script or module to run as `__main__`, as the interpreter itself would."""

from __future__ import annotations

import builtins
import importlib
import importlib.machinery
import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

from .threads import use_threads

# As seamark.environment names them.
CHECKPOINT_DIR = "SEAMARK_CHECKPOINT_DIR"
CHECKPOINT_SECONDS = "SEAMARK_CHECKPOINT_SECONDS"

OWN_DIRECTORY = os.path.dirname(os.path.abspath(__file__))


@dataclass
class Worker:
    """A script or module to run as `__main__`, as the interpreter itself would."""

    argv: list[str]
    module: bool
    cwd: str
    num_threads: int
    cpus: list[int]
    """The processors it is bound to; none for all that the keeper has."""

    def command_line(self) -> list[str]:
        return [sys.executable, *(["-m"] if self.module else []), *self.argv]

    def run(self) -> None:
        try:
            os.chdir(self.cwd)
        except OSError as error:
            sys.exit(f"can't enter the working directory {self.cwd}: {error.strerror}")
        bind_to(self.cpus)
        prepare_checkpoints()
        use_threads(self.num_threads)
        sys.argv = list(self.argv)
        sys.orig_argv = self.command_line()
        main = ModuleType("__main__")
        sys.modules["__main__"] = main
        try:
            if self.module:
                self._run_module(main)
            else:
                self._run_script(main)
        except BaseException:
            hide_keeper_frames()
            raise

    def _run_module(self, main: ModuleType) -> None:
        name, sys.argv[0] = self.argv[0], "-m"
        if not sys.flags.safe_path:
            sys.path.insert(0, os.getcwd())
        prepare_main(main, {})
        # What `python -m` calls; runpy.run_module would not make it the one __main__ of the process.
        runpy._run_module_as_main(name)  # type: ignore[attr-defined]

    def _run_script(self, main: ModuleType) -> None:
        path = os.path.join(os.getcwd(), self.argv[0])
        try:
            with open(path, "rb") as file:
                source = file.read()
        except OSError as error:
            complaint = f"can't open file {path!r}: [Errno {error.errno}] {error.strerror}"
            print(f"{sys.executable}: {complaint}", file=sys.stderr)
            sys.exit(2)
        if not sys.flags.safe_path:
            sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
        loader = importlib.machinery.SourceFileLoader("__main__", path)
        prepare_main(main, {"__file__": path, "__cached__": None, "__loader__": loader})
        exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)


def bind_to(cpus: Sequence[int]) -> None:
    """Before any thread is started, so that all of them have it."""
    if cpus:
        try:
            os.sched_setaffinity(0, cpus)
        except OSError as error:
            print(f"seamark: can't be bound to processors {cpus}: {error.strerror}", file=sys.stderr, flush=True)


def prepare_checkpoints() -> None:
    """Have the directory of checkpoints put in order, here, where it holds up no other process.

    Whatever comes of it the script starts: a directory in disorder is nobody's failed attempt.
    """
    directory, seconds = os.environ.get(CHECKPOINT_DIR), os.environ.get(CHECKPOINT_SECONDS)
    if not directory or not seconds:
        return
    try:
        report = importlib.import_module("seamark.checkpoints").prepare(directory, seconds=float(seconds))
    except (ModuleNotFoundError, AttributeError):
        return  # the job's interpreter needn't have Seamark, or this version of it
    except (OSError, ValueError) as error:
        report = [f"{directory} can't be put in order: {error}"]
    for sentence in report:
        print(f"seamark: {sentence}", file=sys.stderr, flush=True)


def prepare_main(main: ModuleType, names: dict[str, Any]) -> None:
    """Give the module what the interpreter gives a fresh `__main__`."""
    main.__dict__.update(__builtins__=builtins, **names)
    if sys.version_info < (3, 14):
        main.__annotations__ = {}


def hide_keeper_frames() -> None:
    """Let the report of the exception in flight begin at the script's first frame."""
    report = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
        while frames is not None and os.path.dirname(frames.tb_frame.f_code.co_filename) == OWN_DIRECTORY:
            frames = frames.tb_next
        report(kind, error.with_traceback(frames), frames)

    sys.excepthook = excepthook
