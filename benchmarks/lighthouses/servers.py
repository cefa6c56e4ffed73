"""Both lighthouses as people start them, each a process on ports of its own, at its default settings.

A server's start ends with its first answer: to a status request (Seamark), to a GET of its dashboard (torchft).
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import zmq

from harness.peers import Peer
from harness.processes import SystemFailed
from lighthouses.children import environment, last_words
from seamark.protocol.codec import encode
from seamark.protocol.messages import StatusRequest
from seamark.protocol.sockets import make_socket

START_DEADLINE = 60.0
STOP_DEADLINE = 5.0
LOOK_AGAIN = 0.002
FIRST_PORT, LAST_PORT = 20_000, 32_000  # below the ephemeral ports
_ports = itertools.cycle(range(FIRST_PORT + os.getpid() % 5_000, LAST_PORT))


@dataclass(frozen=True)
class Server:
    """A lighthouse that serves. `seconds`: from its start to its first answer. `events` is empty for torchft."""

    pid: int
    address: str
    events: str
    seconds: float

    def cpu_seconds(self) -> float:
        """Processor time it has used so far, user and system."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def memory(self) -> tuple[int, int]:
        """Its resident and its proportional memory, in bytes."""
        full = psutil.Process(self.pid).memory_full_info()
        return int(full.rss), int(full.pss)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    for port in itertools.islice(_ports, LAST_PORT - FIRST_PORT):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port between {FIRST_PORT} and {LAST_PORT}")


@contextmanager
def seamark(directory: Path) -> Iterator[Server]:
    """Seamark's lighthouse, over TCP, its state in a directory of its own."""
    port, events = free_port(), f"tcp://127.0.0.1:{free_port()}"
    address = f"tcp://127.0.0.1:{port}"
    command = str(Path(sys.executable).with_name("seamark-lighthouse"))
    home = directory / f"seamark-{port}"
    home.mkdir()
    env = environment(XDG_RUNTIME_DIR=str(home), XDG_STATE_HOME=str(home))
    arguments = [command, "--address", address, "--events", events]
    with _serving(arguments, env, home / "log", port, lambda: _says_status(address)) as (pid, seconds):
        yield Server(pid, address, events, seconds)


@contextmanager
def torchft(directory: Path, peer: Peer, min_replicas: int) -> Iterator[Server]:
    """torchft's lighthouse; it has no default for `min_replicas`."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    arguments = [peer.script("torchft_lighthouse"), "--min_replicas", str(min_replicas), "--bind", f"127.0.0.1:{port}"]
    env = environment()
    del env["PYTHONPATH"]
    with _serving(arguments, env, directory / f"torchft-{port}.log", port, lambda: _says_page(address)) as served:
        yield Server(served[0], address, "", served[1])


@contextmanager
def _serving(
    arguments: Sequence[str], env: dict[str, str], log: Path, port: int, answers: Callable[[], bool]
) -> Iterator[tuple[int, float]]:
    with log.open("wb") as output:
        began = time.monotonic()
        process = subprocess.Popen(
            arguments,
            env=env,
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        while not (_listens(port) and answers()):
            if process.poll() is not None:
                raise SystemFailed(f"{Path(arguments[0]).name} ended: {last_words(log)}")
            if time.monotonic() - began > START_DEADLINE:
                raise SystemFailed(f"{Path(arguments[0]).name} does not serve after {START_DEADLINE:g} s")
            time.sleep(LOOK_AGAIN)
        yield process.pid, time.monotonic() - began
        if process.poll() is not None:
            raise SystemFailed(f"{Path(arguments[0]).name} ended: {last_words(log)}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _says_status(address: str) -> bool:
    context: zmq.Context[Any] = zmq.Context()
    with context, make_socket(context, zmq.DEALER) as asking:
        asking.connect(address)
        asking.send_multipart(encode(StatusRequest(1)))
        return bool(asking.poll(1_000))


def _says_page(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=1.0) as page:
            return bool(page.status == 200)
    except (urllib.error.URLError, OSError):
        return False
