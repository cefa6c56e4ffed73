"""All three daemons in one process: what ``seamark run --standalone`` embeds.

The same shells, cores and sockets as under supervisord, on one event loop in a thread of its own, on ``ipc://``
addresses in a private directory. Nothing of it outlives the process but the manifest and the logs. Where the process
is killed its keepers end the workers at once; the next one with that name waits for them, and puts the books in order.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq
from msgspec.structs import replace

from seamark.protocol.sockets import IPC_PATH_LIMIT
from seamarkd.agent.shell import AgentShell
from seamarkd.coordinator.effects import Persist
from seamarkd.coordinator.job import ENDED, JobRecord
from seamarkd.coordinator.manifest import Manifest
from seamarkd.coordinator.shell import CoordinatorShell
from seamarkd.errors import StateError
from seamarkd.lighthouse.shell import LighthouseShell
from seamarkd.paths import private, run_directory

EPOCH = 1
"""A standalone suite lives once: nothing of an earlier start can be taken for it."""
STOP_TIMEOUT = 30.0
BEAT_INTERVAL = 1.0
"""Seconds. Who would miss its only node dies with it, and each beat takes a processor from the training."""
ADDRESS_FILE = "coordinator.address"
"""Beside the manifest while the suite lives: where its coordinator answers."""
LONGEST = "12345678/keeper-123456"
"""The longest path of a socket, below the directory of all run directories."""
KEEPERS = "keeper-*"
KEEPERS_END = 30.0
"""Seconds until the keepers of a command that was killed have ended their workers: they take 15 at most."""
LOOK_INTERVAL = 0.1
KILLED = "the seamark run that had it was killed"
"""What became of a standalone job whose command could not say how it ended."""


class Standalone:
    """A suite for one job, from ``with`` to the end of the block.

    Args:
        state: the directory of its manifest, made if missing.
        slots: worker places of its one node.

    Raises:
        ManifestError: another suite uses this directory.
        StateError: the run directory's name is too long, or what a killed command has left does not end.
    """

    def __init__(self, state: Path, slots: int) -> None:
        self._state = private(state)
        self._slots = slots
        base = run_directory()
        if len(os.fsencode(base / LONGEST)) > IPC_PATH_LIMIT:
            raise StateError(
                f"{base}: the paths of sockets below it would have more than {IPC_PATH_LIMIT} bytes: "
                "set XDG_RUNTIME_DIR to a directory with a shorter name"
            )
        self._run = Path(tempfile.mkdtemp(prefix="", dir=base))
        self.coordinator = f"ipc://{self._run}/coordinator"
        self._loop = asyncio.new_event_loop()
        self._stopping: asyncio.Event | None = None
        self._serving = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="seamark-daemons", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._serving.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stopping is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(STOP_TIMEOUT)

    def _main(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._loop.close()
            shutil.rmtree(self._run, ignore_errors=True)
            self._serving.set()

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        context: zmq.Context[Any] = zmq.Context()
        lighthouse_address = lighthouse_beside(self.coordinator)
        events_address = f"ipc://{self._run}/events"
        try:
            manifest = Manifest(self._state / "manifest.db")
            await self._after_a_kill(manifest)
            lighthouse = LighthouseShell(
                context, lighthouse_address, events_address, EPOCH, beat_interval=BEAT_INTERVAL
            )
            coordinator = CoordinatorShell(context, self.coordinator, lighthouse_address, events_address, manifest)
            agent = AgentShell(
                context,
                node=socket.gethostname(),
                slots=self._slots,
                run_directory=self._run,
                lighthouse=lighthouse_address,
                events=events_address,
                coordinator=self.coordinator,
                host="127.0.0.1",
                epoch=EPOCH,
                linger=0.0,
            )
            await agent.start()
            address = self._state / ADDRESS_FILE
            address.write_text(self.coordinator)
            self._serving.set()
            await self._stopping.wait()
            await agent.shut_down(0.0)
            await coordinator.close()
            lighthouse.close()
            address.unlink()
        finally:
            context.destroy(linger=0)

    async def _after_a_kill(self, manifest: Manifest) -> None:
        """Whoever holds the manifest is alone: what an earlier command has left is over, as soon as its workers are."""
        address = self._state / ADDRESS_FILE
        left = run_directory_of(address)
        if left is not None:
            await self._until_ended(left)
            if left.parent == self._run.parent:
                shutil.rmtree(left, ignore_errors=True)
        address.unlink(missing_ok=True)
        now = time.monotonic()
        manifest.commit([Persist(over(record, now), ()) for record in manifest.jobs() if record.state not in ENDED])

    async def _until_ended(self, left: Path) -> None:
        deadline = time.monotonic() + KEEPERS_END
        while living := [path for path in left.glob(KEEPERS) if listens(path)]:
            if time.monotonic() > deadline:
                raise StateError(
                    f"the seamark run that had the name {self._state.name} was killed, and its workers still end "
                    f"({living[0]}): try again in a minute, or give this one another name with --name"
                )
            await asyncio.sleep(LOOK_INTERVAL)


def run_directory_of(address: Path) -> Path | None:
    """The directory of sockets that a file beside a manifest names; None if there is no such file, or half of one."""
    try:
        scheme, _, path = address.read_text().partition("://")
    except FileNotFoundError:
        return None
    return Path(path).parent if scheme == "ipc" and path.endswith("/coordinator") else None


def serving(state: Path) -> str:
    """The address of the coordinator of a standalone job; empty if nobody serves it (any more).

    Args:
        state: the directory of its manifest.
    """
    directory = run_directory_of(state / ADDRESS_FILE)
    alive = directory is not None and listens(directory / "coordinator", socket.SOCK_STREAM)
    return f"ipc://{directory}/coordinator" if alive else ""


def lighthouse_beside(coordinator: str) -> str:
    """The address of the lighthouse of the standalone suite whose coordinator has this one."""
    return f"{coordinator.removesuffix('coordinator')}lighthouse"


def listens(path: Path, kind: socket.SocketKind = socket.SOCK_SEQPACKET) -> bool:
    """Whether a process listens on this socket: a keeper, or (SOCK_STREAM) a daemon."""
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def over(record: JobRecord, now: float) -> JobRecord:
    """What is true of a standalone job that nobody serves.

    Args:
        record: of the job, as its coordinator wrote it down last.
        now: seconds of the monotonic clock.
    """
    return record if record.state in ENDED else replace(record, state="FAILED", result=KILLED, ended_at=now)
