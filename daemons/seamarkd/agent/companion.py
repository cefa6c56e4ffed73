"""The process beside a monitored one: its agent, and on rank 0's host the lighthouse (``seamark.autorestart``).

    python -m seamarkd.agent.companion FD SETTINGS

``FD`` is a packet socket to the monitor, ``SETTINGS`` one JSON object. Each packet is one JSON object with ``is``:

    from the monitor                               to the monitor
    started {incarnation, pid, at} + page, pidfd   door {address, directory}
    ended {incarnation, status, at, discarded}     start {incarnation}: whom the others expect next
    last: it will not start it again               completed {yes}: its wrapped call has, on all ranks
    gone: it has ended, and was the last           over: after gone, nobody needs the lighthouse in it any more
    store: the TCPStore serves                     stopped {code}: the whole job is being ended, with this code
    store_again: it was started anew               alone {why}: the lighthouse is gone, the job is over

It ends when the monitor's end of the socket is closed. The thinking is in ``lone.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq
from msgspec import Struct

from seamark.environment import SECURITY_KEYS
from seamark.launched import ANOTHER_PORT
from seamark.progress import ProgressPage
from seamark.protocol.keys import Key, KeysError, client_key
from seamark.protocol.messages import StoreAddress
from seamarkd import logs
from seamarkd.agent.effects import Effect, EndWorker, Remember, SignalWorker, StartWorker, StopJobHere, WatchWorker
from seamarkd.agent.lone import STOP_GRACE, Launch, LoneAgent
from seamarkd.agent.memory import Memory, Remembered
from seamarkd.agent.watch import How, is_dying
from seamarkd.agent.watched import Watched
from seamarkd.agent.wires import NotThisHostError, Wires
from seamarkd.cli.exit_codes import CONFIGURATION
from seamarkd.exits import ABORT_EXIT_CODE
from seamarkd.gate import Gate
from seamarkd.lighthouse.shell import LighthouseShell
from seamarkd.paths import run_directory

log = logging.getLogger(__name__)

PACKET = 65_536
HANG_INTERVAL = 0.25
FIRST_WORD = 300.0
"""Seconds until rank 0's host must have been heard of."""
SILENCE = 60.0
"""Seconds without a word of a lighthouse that had been heard: rank 0's host is gone, and the job's store with it."""
LEFT = 5.0
"""Seconds of silence after which another rank's agent has ended, and is not just being started again."""
FAREWELL = 1.0
"""Seconds for the last reports."""


class Settings(Struct, frozen=True):
    """What the monitor says at the start.

    Attributes:
        launch: what its launcher said.
        host: numeric address of this host, as the lighthouse's host reaches it.
        hosted: the lighthouse is in rank 0's companion, and its end the job's.
        lighthouse, events: where the lighthouse answers and publishes.
        serves: whether to be that lighthouse, in its how-manieth life; 0: no.
        store_ready, again: as for ``LoneAgent``.
        directory: where an earlier companion had the worker's door; empty: none had.
    """

    launch: Launch
    host: str
    hosted: bool
    lighthouse: str
    events: str
    serves: int
    store_ready: bool
    again: bool
    directory: str


class Process(Struct):
    """The monitored process."""

    incarnation: str
    pid: int
    pidfd: int
    watched: Watched

    def close(self) -> None:
        """Lets go of its descriptors."""
        self.watched.close()
        os.close(self.pidfd)


class Companion:
    """The agent of one monitored process.

    Args:
        context: the process's ZeroMQ context.
        settings: the monitor's.
        monitor: the socket to it.
        directory: private, for the worker's door.
        lighthouse: the one in this process, if there is one.
        key: what all ranks speak with over TCP; None to speak in the clear.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        settings: Settings,
        monitor: socket.socket,
        directory: Path,
        lighthouse: LighthouseShell | None,
        key: Key | None = None,
    ) -> None:
        self._settings = settings
        self._job = settings.launch.job
        self._monitor = monitor
        self._directory = directory
        self._memory = Memory(directory / "jobs")
        self._own_lighthouse = lighthouse
        self._gone = False
        """The process has had its last life."""
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._process: Process | None = None
        self._completed = False
        self._ended = asyncio.Event()
        self._began = self._loop.time()
        self.left = asyncio.Event()
        """The monitor is gone."""
        self._core = LoneAgent(
            settings.launch,
            lambda: secrets.token_hex(8),
            store_ready=settings.store_ready,
            again=settings.again,
        )
        self._wires = Wires(
            context,
            self._core,
            self._perform,
            address=f"ipc://{directory}/agent",
            lighthouse=settings.lighthouse,
            events=settings.events,
            coordinator=None,
            key=key,
            # The lighthouse of a rank has no other key than the ranks.
            server=key.public if key is not None and settings.hosted else "",
        )

    async def start(self) -> None:
        """Opens the worker's door and serves.

        Raises:
            NotThisHostError: nothing can listen on the host's address.
        """
        remembered = next((one.job for one in self._memory.read()), None)
        self._perform(self._core.begin(time.monotonic(), remembered))
        await self._wires.start(self._settings.host, 1)
        self._wires.repeat(self._look)
        self._loop.add_reader(self._monitor, self._on_monitor)
        self._tell("door", address=self._wires.address, directory=str(self._directory))

    async def close(self) -> None:
        """Says what the lighthouse has to know, for a moment, and stops serving."""
        process = self._process
        if process is not None:
            # Its monitor was killed, and it with it: the kernel's order is not the news'.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL):
                    while not is_dying(process.pid, process.pidfd):
                        await asyncio.sleep(0.005)
            end = {"incarnation": process.incarnation, "status": -signal.SIGKILL, "at": time.monotonic()}
            self._core.last_life()
            self._end_of_a_life(time.monotonic(), end | {"discarded": process.watched.page.discarded})
        self._perform(self._core.left(time.monotonic()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL):
                while not self._core.quiet:
                    await asyncio.sleep(0.02)
        self._wires.close()

    # --- the monitor ---------------------------------------------------------------------------------------

    def _tell(self, what: str, **fields: object) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._monitor.send(json.dumps({"is": what} | fields).encode())

    def _on_monitor(self) -> None:
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._monitor, PACKET, 2)
        except ConnectionResetError:
            packet, descriptors = b"", []
        if not packet:
            self._loop.remove_reader(self._monitor)
            self.left.set()
            return
        word = json.loads(packet)
        now = time.monotonic()
        match word["is"]:
            case "started":
                self._started(now, word, descriptors)
            case "ended":
                self._end_of_a_life(now, word)
            case "last":
                self._core.last_life()
            case "gone":
                self._gone = True
                self._perform(self._core.left(now))
                self._look_for_the_others()
            case "store":
                self._perform(self._core.store_serves())
            case "store_again":
                self._store_again(now)

    def _started(self, now: float, word: dict[str, Any], descriptors: list[int]) -> None:
        page, pidfd = ProgressPage(descriptors[0]), descriptors[1]
        os.close(descriptors[0])
        incarnation, pid = word["incarnation"], word["pid"]
        self._ended.clear()

        def dying(how: How, at: float) -> None:
            self._perform(self._core.losses.dying(time.monotonic(), self._job, incarnation, how, at))

        self._process = Process(incarnation, pid, pidfd, Watched(pid, pidfd, page, dying))
        self._process.watched.arm()
        self._perform(self._core.started_anew(now, incarnation))
        self._perform(self._core.places.worker_started(now, self._job, incarnation, pid, word["at"]))
        if page.wrapped:
            self._perform(self._core.wraps(incarnation))
        if self._core.stopping:
            self._spawn(self._end(incarnation, STOP_GRACE))

    def _end_of_a_life(self, now: float, word: dict[str, Any]) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None
        self._ended.set()
        if self._job in self._core.node.jobs:
            incarnation, status, at = word["incarnation"], word["status"], word["at"]
            self._perform(self._core.ended(now, incarnation, status, at, discarded=word["discarded"]))

    def _store_again(self, now: float) -> None:
        job = self._core.node.jobs[self._job]
        job.store_incarnation = secrets.token_hex(8)
        job.store = StoreAddress(self._settings.launch.master_addr, self._settings.launch.store_port)
        self._perform(self._core.stores.restarted(now, self._job, now))

    # --- effects -------------------------------------------------------------------------------------------

    def _perform(self, effects: list[Effect]) -> None:
        if self._core.refused:
            self._tell("alone", why=self._core.refused)
        if self._core.completed != self._completed:
            self._completed = self._core.completed
            self._tell("completed", yes=self._completed)
        for effect in effects:
            if self._wires.perform(effect):
                continue
            match effect:
                case Remember(job) if job in self._core.node.jobs:
                    self._memory.write(Remembered(self._core.node.jobs[job], ""))
                case StartWorker(_, _, incarnation):
                    self._tell("start", incarnation=incarnation)
                case WatchWorker():
                    if self._process is not None:
                        self._process.watched.arm()
                case SignalWorker(_, _, incarnation, signum):
                    self._signal(incarnation, signum)
                case EndWorker(_, incarnation, grace):
                    self._spawn(self._end(incarnation, grace))
                case StopJobHere():
                    self._spawn(self._stop(effect))

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _signal(self, incarnation: str, signum: int) -> None:
        process = self._process
        if process is not None and process.incarnation == incarnation:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process.pidfd, signum)

    async def _end(self, incarnation: str, grace: float) -> None:
        if grace:
            self._signal(incarnation, signal.SIGTERM)
            await asyncio.sleep(grace)
        self._signal(incarnation, signal.SIGKILL)

    async def _stop(self, order: StopJobHere) -> None:
        self._tell("stopped", code=ABORT_EXIT_CODE)
        if self._process is None:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), order.patience)
        if self._process is not None:
            await self._end(self._process.incarnation, order.grace)

    # --- time ----------------------------------------------------------------------------------------------

    def _look(self) -> float:
        process = self._process
        if process is not None:
            now = time.monotonic()
            silence = process.watched.look(now)
            if silence is not None:
                log.warning("job %s: %s: %s", self._job, self._core.node.name, silence.verdict.text)
                self._perform(self._core.losses.hangs(now, self._job, process.incarnation, *silence))
        self._look_for_the_lighthouse()
        self._look_for_the_others()
        return HANG_INTERVAL

    def _look_for_the_others(self) -> None:
        """The lighthouse is theirs, too, and so is the store: both have to outlive this rank."""
        if self._own_lighthouse is None or not self._gone:
            return
        core = self._own_lighthouse.core
        group = core.groups.get(self._job)
        now = time.monotonic()
        others = [node for node in core.nodes.nodes.values() if node.name != self._core.node.name]
        if (group is not None and group.over) or all(now - one.last_beat > LEFT for one in others):
            self._tell("over")

    def _look_for_the_lighthouse(self) -> None:
        heard = self._wires.lighthouse_heard_at
        silent = self._loop.time() - (self._began if heard is None else heard)
        if not self._settings.hosted or self._core.completed:
            # One that runs elsewhere comes back; and nobody needs any to end well.
            return
        if silent > (FIRST_WORD if heard is None else SILENCE):
            why = f"no word of the lighthouse at {self._settings.lighthouse} for {silent:.0f} s: is rank 0 gone?"
            self._tell("alone", why=why)


async def serve(settings: Settings, monitor: socket.socket) -> None:
    """Serves until the monitor is gone.

    Raises:
        zmq.ZMQError: an address is in use.
        NotThisHostError: the host's address is not of this host.
        KeysError: the suite's keys can't be used.
    """
    key = client_key()
    context: zmq.Context[Any] = zmq.Context()
    directory = Path(settings.directory or tempfile.mkdtemp(prefix="", dir=run_directory()))
    lighthouse = gate = None
    try:
        if settings.serves:
            gate = Gate(context, key, Path(os.environ[SECURITY_KEYS])) if key is not None else None
            lighthouse = LighthouseShell(context, settings.lighthouse, settings.events, settings.serves, gate=gate)
        companion = Companion(context, settings, monitor, directory, lighthouse, key)
        await companion.start()
        await companion.left.wait()
        await companion.close()
    finally:
        if lighthouse is not None:
            lighthouse.close()
        if gate is not None:
            gate.close()
        shutil.rmtree(directory, ignore_errors=True)
        context.destroy(linger=0)


def main() -> None:
    """Entry point."""
    logs.configure("companion", "warning", "text")
    # Of the terminal's and the scheduler's signals the monitor makes what is to be made.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    settings = msgspec.json.decode(sys.argv[2], type=Settings)
    monitor = socket.socket(fileno=int(sys.argv[1]))
    try:
        asyncio.run(serve(settings, monitor))
    except zmq.ZMQError as error:
        where = f"{settings.lighthouse} or {settings.events}"
        sys.stderr.write(f"seamark: can't listen on {where} ({error.strerror}): {ANOTHER_PORT}\n")
        sys.exit(CONFIGURATION)
    except (NotThisHostError, KeysError) as error:
        sys.stderr.write(f"seamark: {error}\n")
        sys.exit(CONFIGURATION)


if __name__ == "__main__":
    main()
