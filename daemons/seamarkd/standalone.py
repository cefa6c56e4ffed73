"""All three daemons in one process: what ``seamark run --standalone`` embeds.

The same shells, cores and sockets as under supervisord, on one event loop in a thread of its own, on ``ipc://``
addresses in a private directory. Nothing of it outlives the process but the manifest and the logs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from seamark.protocol.sockets import IPC_PATH_LIMIT
from seamarkd.agent.shell import AgentShell
from seamarkd.coordinator.manifest import Manifest
from seamarkd.coordinator.shell import CoordinatorShell
from seamarkd.errors import StateError
from seamarkd.lighthouse.shell import LighthouseShell
from seamarkd.paths import private, run_directory

EPOCH = 1
"""A standalone suite lives once: nothing of an earlier start can be taken for it."""
STOP_TIMEOUT = 30.0
ADDRESS_FILE = "coordinator.address"
"""Beside the manifest while the suite lives: where its coordinator answers."""
LONGEST = "12345678/keeper-123456"
"""The longest path of a socket, below the directory of all run directories."""


class Standalone:
    """A suite for one job, from ``with`` to the end of the block.

    Args:
        state: the directory of its manifest, made if missing.
        slots: worker places of its one node.

    Raises:
        ManifestError: another suite uses this directory.
        StateError: the run directory's name is too long.
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
        lighthouse_address = f"ipc://{self._run}/lighthouse"
        events_address = f"ipc://{self._run}/events"
        try:
            manifest = Manifest(self._state / "manifest.db")
            lighthouse = LighthouseShell(context, lighthouse_address, events_address, EPOCH)
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
