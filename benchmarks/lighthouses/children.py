"""Programs that take orders: JSON lines in, JSON lines out, until their input ends.

A child that says nothing in time, or ends, fails the benchmark with the last line that it wrote.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness.processes import SystemFailed
from harness.provenance import REPOSITORY

HERE = Path(__file__).resolve().parent
FOREIGN = ("SEAMARK_", "SUPERVISOR_", "TORCHFT_", "RUST_")


def environment(**own: str) -> dict[str, str]:
    """The environment of a child: this checkout's sources first, nothing that a system takes for its setting."""
    sources = [str(REPOSITORY / "client"), str(REPOSITORY / "daemons"), str(HERE.parent)]
    path = os.pathsep.join(sources + [path for path in [os.environ.get("PYTHONPATH")] if path])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return {**inherited, "PYTHONPATH": path, **own}


def last_words(log: Path) -> str:
    """The last line with words in it of a log."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if any(map(str.isalpha, line))), "it wrote nothing")


class Child:
    """One program.

    Args:
        name: for people and for its log.
        arguments: its command line.
        directory: where its log is written.
        env: its whole environment.
    """

    def __init__(self, name: str, arguments: Sequence[str], directory: Path, env: Mapping[str, str]) -> None:
        self.name = name
        self._log = directory / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(env),
                cwd=directory,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self._out = self._process.stdout.fileno()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)
        self._heard = bytearray()

    @classmethod
    def of_seamark(cls, name: str, program: str, directory: Path) -> Self:
        """A program of this package, in the present environment."""
        return cls(name, [sys.executable, "-m", f"lighthouses.{program}"], directory, environment())

    @classmethod
    def of_torchft(cls, name: str, program: str, directory: Path, python: Path) -> Self:
        """A program of this package, in torchft's environment."""
        env = environment()
        del env["PYTHONPATH"]
        return cls(name, [str(python), str(HERE / f"{program}.py")], directory, env)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End its input, which ends it; kill it if it doesn't see that."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._selector.close()
        self._process.stdout.close()
        try:
            self._process.stdin.close()
            self._process.wait(0.0 if kind else 3.0)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
        self._process.wait()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def tell(self, **order: Any) -> None:
        """Give an order."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SystemFailed(f"{self.name} ended: {last_words(self._log)}") from None

    def hear(self, timeout: float) -> dict[str, Any]:
        """Its next answer, within `timeout` seconds."""
        answer = self.heard(timeout)
        if answer is None:
            raise SystemFailed(f"{self.name} said nothing for {timeout:g} s: {last_words(self._log)}")
        return answer

    def heard(self, timeout: float) -> dict[str, Any] | None:
        """Its next answer, if one comes within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._heard:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                return None
            piece = os.read(self._out, 1 << 20)
            if not piece:
                raise SystemFailed(f"{self.name} ended: {last_words(self._log)}")
            self._heard += piece
        line, _, rest = bytes(self._heard).partition(b"\n")
        self._heard = bytearray(rest)
        answer: dict[str, Any] = json.loads(line)
        return answer
