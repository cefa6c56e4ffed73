"""The agent's side of a keeper: start one, connect to one that lives, ask it for things, hear of exits.

Nothing here decides anything, and nothing here needs torch: what the keeper imports, it imports in the job's
interpreter. `keeper` documents the messages.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from seamarkd.agent.keeper.requests import MAX_PACKET_BYTES, Message
from seamarkd.agent.keeper_answers import (
    Held,
    KeeperError,
    Packet,
    Process,
    Ready,
    close_all,
    descriptors,
    held_of,
    process_of,
)
from seamarkd.exits import exit_cause

KEEPER = Path(__file__).with_name("keeper") / "__main__.py"
CONNECT_PAUSE = 0.01
LOG_TAIL_CHARACTERS = 2000
_SPACE_FOR_TWO = socket.CMSG_SPACE(2 * array.array("i").itemsize)

# Importing torch can take a minute from a cold network file system.
READY_TIMEOUT = 180.0
REQUEST_TIMEOUT = 10.0


class KeeperClient:
    """One connection to a keeper. Made by `spawn` or `connect`, for use in the running event loop.

    An exit can be reported to `on_exited` before the `start` of that process returns: both arrive together.
    """

    ready: Ready
    superseded = False
    """Whether a newer agent has taken the keeper over."""

    def __init__(
        self,
        sock: socket.socket,
        on_exited: Callable[[Process], None],
        on_closed: Callable[[str], None],
        child: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self._sock = sock
        self._child = child
        self._on_exited = on_exited
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._next_id = 0
        self._answers: dict[int, asyncio.Queue[Packet]] = {}
        self._unsent: deque[bytes] = deque()
        self._buffer = bytearray(MAX_PACKET_BYTES)
        self._why_closed: str | None = None
        self._closed = asyncio.Event()
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 2 * MAX_PACKET_BYTES)
        self._loop.add_reader(sock, self._receive)

    @classmethod
    async def spawn(
        cls,
        python: str,
        socket_path: str,
        *,
        job: str,
        env: Mapping[str, str],
        cwd: str,
        log: str,
        epoch: int,
        on_exited: Callable[[Process], None],
        on_closed: Callable[[str], None],
        linger: float | None = None,
        preload: Sequence[str] | None = None,
        timeout: float = READY_TIMEOUT,
    ) -> KeeperClient:
        """Start a keeper that outlives this process, and connect to it.

        Args:
            python: the job's interpreter.
            socket_path: where the keeper is to listen; the directory is the caller's, mode 0700.
            job: the job's name.
            env: the job's environment. A worker that asks for another value of something that is read when
                a program starts (``PYTHONPATH``, ``LD_LIBRARY_PATH``, ``TORCH_LOGS``, ...) isn't forked but
                exec'ed.
            cwd: the job's working directory.
            log: file for what the keeper itself prints.
            epoch: this agent's epoch.
            on_exited: called for every exit, again in each new connection until it is acknowledged.
            on_closed: called once with a sentence when the connection is lost, but not after `close`.
            linger: seconds that the keeper waits for another agent once this one is gone, before it ends
                everything and itself; None: for ever.
            preload: modules to import ahead of the workers instead of the keeper's own list.
            timeout: seconds until it has to be ready.

        Raises:
            KeeperError: it could not be started, ended at once, or was not ready in time and was killed; `code` is
                "killed" where somebody else has killed it, and the next one may come to more.
        """
        command = [python, str(KEEPER), "--socket", socket_path, "--job", job]
        if linger is not None:
            command += ["--linger", str(linger)]
        if preload is not None:
            command += ["--preload", ",".join(preload)]
        try:
            with open(log, "ab") as output:
                process = subprocess.Popen(
                    command,
                    env=dict(env),
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
        except OSError as error:
            raise KeeperError("spawn", f"can't start a keeper with {python} in {cwd}: {error}") from error
        try:
            async with asyncio.timeout(timeout):
                sock = await _connect_to(process, socket_path, log)
                client = cls(sock, on_exited, on_closed, process)
                await client._first_hello(epoch, timeout, process, log)
        except TimeoutError:
            _end(process)
            raise KeeperError("timeout", f"the keeper of {job} was not ready after {timeout:g} s") from None
        except BaseException:
            _end(process)
            raise
        return client

    @classmethod
    async def connect(
        cls,
        socket_path: str,
        *,
        epoch: int,
        on_exited: Callable[[Process], None],
        on_closed: Callable[[str], None],
        timeout: float = READY_TIMEOUT,
    ) -> KeeperClient:
        """Connect to a keeper that lives, one that still preloads included.

        Args:
            socket_path: where it listens.
            epoch: this agent's epoch: not below that of any agent that the keeper has seen.
            on_exited: called for every exit not acknowledged yet, and for every further one.
            on_closed: called once with a sentence when the connection is lost, but not after `close`.
            timeout: seconds until it has to answer.

        Raises:
            KeeperError: nobody listens there, or the keeper refused, or did not answer and was killed.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(socket_path)
        except OSError as error:
            sock.close()
            raise KeeperError("closed", f"no keeper answers on {socket_path}: {error.strerror}") from error
        client = cls(sock, on_exited, on_closed)
        try:
            await client._hello(epoch, timeout)
        except BaseException as error:
            if isinstance(error, KeeperError) and error.code == "timeout":
                # It was stopped, say. Killed, it can come back to no socket and to no worker that another has now.
                _kill_listener(sock)
            client.close()
            raise
        return client

    async def start_worker(
        self,
        slot: str,
        incarnation: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str,
        log: str,
        num_threads: int,
        module: bool = False,
        cpus: Sequence[int] = (),
        held: bool = False,
        timeout: float = REQUEST_TIMEOUT,
    ) -> Held:
        """Start a worker; asked again for the same slot and incarnation, the same answer.

        One that it can't tell of, in time or for want of descriptors, is killed as soon as it is there.

        Args:
            slot: whose place it takes.
            incarnation: the id of this start.
            argv: the script and its arguments; with `module`, the module's name and its arguments.
            env: the worker's whole environment; the keeper sets OMP_NUM_THREADS and SEAMARK_PROGRESS_FD.
            cwd: its working directory.
            log: the file its output is appended to.
            num_threads: threads of torch and of numpy's linear algebra.
            module: run it as ``python -m``.
            cpus: the processors it is bound to; none for all that the keeper has.
            held: nothing of it runs before `release`; if the keeper is killed before that, it ends.
            timeout: seconds.

        Raises:
            KeeperError: it could not be started; `code` is "bad_cwd", "bad_log", "stopping" or "system", ...
        """
        request = {
            "type": "start",
            "kind": "worker",
            "slot": slot,
            "incarnation": incarnation,
            "argv": list(argv),
            "env": dict(env),
            "cwd": cwd,
            "log": log,
            "num_threads": num_threads,
            "module": module,
            "cpus": list(cpus),
            "held": held,
        }
        return await self._start(request, timeout)

    async def release(self, slot: str, incarnation: str, *, timeout: float = REQUEST_TIMEOUT) -> None:
        """Let a worker run that was started as held; again, it has no effect.

        Raises:
            KeeperError: the keeper has no such process (`code` "unknown_process").
        """
        await self._ask({"type": "release", "slot": slot, "incarnation": incarnation}, timeout)

    async def start_store(
        self,
        slot: str,
        incarnation: str,
        *,
        host: str,
        port: int,
        env: Mapping[str, str],
        log: str,
        timeout: float = REQUEST_TIMEOUT,
    ) -> Held:
        """Start the server of the job's TCPStore; after its death, start it again on the same host and port.

        The keeper listens, so clients wait in line from the first moment on and while no store lives.

        Args:
            slot: a name of its own, beside the workers' slots.
            incarnation: the id of this start.
            host: a numeric address of this node.
            port: 0 for any; the answer has the port.
            env: the store's whole environment.
            log: the file its output is appended to.
            timeout: seconds.

        Raises:
            KeeperError: `code` is "port_in_use", "bad_host", "bad_log", "stopping" or "system", ...
        """
        request = {
            "type": "start",
            "kind": "store",
            "slot": slot,
            "incarnation": incarnation,
            "host": host,
            "port": port,
            "env": dict(env),
            "log": log,
        }
        return await self._start(request, timeout)

    async def signal(
        self,
        slot: str,
        incarnation: str,
        signum: int,
        *,
        group: bool = True,
        timeout: float = REQUEST_TIMEOUT,
    ) -> bool:
        """Signal a process, or its whole process group, of which members may outlive it.

        Returns:
            whether there was anybody to signal.

        Raises:
            KeeperError: the keeper has no such process (`code` "unknown_process").
        """
        process = {"slot": slot, "incarnation": incarnation}
        packet = await self._ask({"type": "signal", **process, "signum": signum, "group": group}, timeout)
        return int(packet.message["reached"]) > 0

    async def list_processes(self, *, timeout: float = REQUEST_TIMEOUT) -> list[Held]:
        """All processes whose exit was not acknowledged, the living ones with their descriptors.

        Raises:
            KeeperError: no answer.
        """
        found: list[Held] = []
        request_id, answers = self._begin({"type": "list"})
        try:
            while True:
                packet = await self._answer(answers, "list", timeout)
                if packet.message["type"] == "listed":
                    return found
                found.append(held_of(packet))
        except BaseException:
            for held in found:
                held.close()
            raise
        finally:
            self._end(request_id)

    async def acknowledge(self, slot: str, incarnation: str, *, timeout: float = REQUEST_TIMEOUT) -> None:
        """Have the keeper forget a process that ended; what is left of its group is out of reach then.

        Raises:
            KeeperError: it lives (`code` "alive"), or is unknown (`code` "unknown_process").
        """
        await self._ask({"type": "acknowledge", "slot": slot, "incarnation": incarnation}, timeout)

    async def stop(self, grace: float, *, final: bool = True, timeout: float | None = None) -> list[int]:
        """End all workers and all that they left behind: SIGTERM, and SIGKILL after `grace` seconds.

        Args:
            grace: seconds between the two.
            final: end the stores and the keeper as well. `on_closed` isn't called for that.
            timeout: seconds until the keeper has to answer; by default the grace and 15 more.

        Returns:
            the process ids that not even SIGKILL ended.

        Raises:
            KeeperError: the keeper has ended (`code` "closed"), or did not answer. Where it was to end for good it was
                killed then: what it leaves lives on without it.
        """
        timeout = grace + 15.0 if timeout is None else timeout
        request = {"type": "stop", "grace": grace, "final": final}
        if not final:
            return list((await self._ask(request, timeout)).message["left"])
        self._on_closed = lambda _: None
        keeper: int | None
        try:
            keeper = os.pidfd_open(self.ready.pid)
        except ProcessLookupError:
            raise KeeperError("closed", "the keeper has ended already") from None
        except OSError:
            # No descriptor is left for it: the end of the connection says the same, if some moments early.
            keeper = None
        try:
            left = list((await self._ask(request, timeout)).message["left"])
            await self._until_gone(keeper, timeout)
        except KeeperError as error:
            if error.code == "timeout":
                self._kill(keeper)
            raise
        finally:
            if keeper is not None:
                os.close(keeper)
        self.close()
        return left

    def close(self) -> None:
        """Close the connection; the keeper and its processes live on, up to its linger time."""
        self._on_closed = lambda _: None
        self._lose("the connection to the keeper was closed here")

    # -- requests and answers --------------------------------------------------------------------------------

    async def _start(self, request: Message, timeout: float) -> Held:
        try:
            return held_of(await self._ask(request, timeout))
        except KeeperError as error:
            if error.code in ("timeout", "system"):
                # It may run, or will once the keeper comes to it, and nobody would ever look after it.
                process = {"slot": request["slot"], "incarnation": request["incarnation"]}
                with contextlib.suppress(KeeperError):
                    order = {"type": "signal", **process, "signum": int(signal.SIGKILL), "group": True}
                    self._end(self._begin(order)[0])
            raise

    async def _hello(self, epoch: int, timeout: float) -> None:
        answer = (await self._ask({"type": "hello", "epoch": epoch}, timeout)).message
        fields = {name: answer[name] for name in Ready.__struct_fields__ if name != "modules"}
        self.ready = Ready(modules=[(name, seconds) for name, seconds in answer["modules"]], **fields)

    async def _first_hello(self, epoch: int, timeout: float, process: subprocess.Popen[bytes], log: str) -> None:
        """As `_hello`, and says of a keeper that ended instead how it did."""
        try:
            await self._hello(epoch, timeout)
        except KeeperError as error:
            if error.code != "closed" or self.superseded:
                raise
            while process.poll() is None:
                await asyncio.sleep(CONNECT_PAUSE)
            raise _ended_at_start(process.returncode, log) from None

    async def _until_gone(self, pidfd: int | None, timeout: float) -> None:
        gone = self._closed if pidfd is None else asyncio.Event()
        if pidfd is not None:
            self._loop.add_reader(pidfd, gone.set)
        try:
            async with asyncio.timeout(timeout):
                await gone.wait()
        except TimeoutError:
            raise KeeperError("timeout", f"the keeper did not end within {timeout:g} s") from None
        finally:
            if pidfd is not None:
                self._loop.remove_reader(pidfd)

    def _kill(self, pidfd: int | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            if pidfd is not None:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            elif not self._closed.is_set():
                # So long the number is the keeper's.
                os.kill(self.ready.pid, signal.SIGKILL)

    async def _ask(self, request: Message, timeout: float) -> Packet:
        request_id, answers = self._begin(request)
        try:
            return await self._answer(answers, str(request["type"]), timeout)
        finally:
            self._end(request_id)

    def _begin(self, request: Message) -> tuple[int, asyncio.Queue[Packet]]:
        if self._why_closed is not None:
            raise KeeperError("closed", self._why_closed)
        self._next_id += 1
        packet = json.dumps(request | {"id": self._next_id}).encode()
        if len(packet) > MAX_PACKET_BYTES:
            sentence = f"a request to the keeper may have {MAX_PACKET_BYTES} bytes: shorten the environment"
            raise KeeperError("too_large", sentence)
        answers: asyncio.Queue[Packet] = asyncio.Queue()
        self._answers[self._next_id] = answers
        self._unsent.append(packet)
        self._send()
        return self._next_id, answers

    async def _answer(self, answers: asyncio.Queue[Packet], request: str, timeout: float) -> Packet:
        try:
            async with asyncio.timeout(timeout):
                packet = await answers.get()
        except TimeoutError:
            sentence = f"the keeper did not answer {request!r} within {timeout:g} s"
            raise KeeperError("timeout", sentence) from None
        if packet.message["type"] == "error":
            raise KeeperError(packet.message["code"], packet.message["error"])
        return packet

    def _end(self, request_id: int) -> None:
        answers = self._answers.pop(request_id)
        while not answers.empty():
            close_all(answers.get_nowait().fds)

    # -- the socket ------------------------------------------------------------------------------------------

    def _send(self) -> None:
        while self._unsent:
            try:
                self._sock.send(self._unsent[0])
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._send)
                return
            except OSError as error:
                self._lose(f"can't write to the keeper: {error.strerror}")
                return
            self._unsent.popleft()
        self._loop.remove_writer(self._sock)

    def _receive(self) -> None:
        while self._why_closed is None:
            try:
                size, ancillary, _, _ = self._sock.recvmsg_into([self._buffer], _SPACE_FOR_TWO, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError as error:
                self._lose(f"can't read from the keeper: {error.strerror}")
                return
            if size == 0:
                self._lose("the keeper closed the connection")
                return
            self._dispatch(Packet(json.loads(self._buffer[:size]), descriptors(ancillary)))

    def _dispatch(self, packet: Packet) -> None:
        message = packet.message
        if message["type"] == "exited":
            self._on_exited(process_of(message))
        elif message["type"] == "superseded":
            self.superseded = True
            self._lose(f"an agent of epoch {message['epoch']} has taken the keeper over")
        elif message["id"] in self._answers:
            self._answers[message["id"]].put_nowait(packet)
        else:
            close_all(packet.fds)

    def _lose(self, why: str) -> None:
        if self._why_closed is not None:
            return
        self._why_closed = why
        self._closed.set()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        if self._child is not None:
            self._child.poll()
        refusal = {"type": "error", "code": "closed", "error": why}
        for answers in self._answers.values():
            answers.put_nowait(Packet(refusal, ()))
        self._on_closed(why)


async def _connect_to(process: subprocess.Popen[bytes], socket_path: str, log: str) -> socket.socket:
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(socket_path)
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
        except OSError as error:
            sock.close()
            raise KeeperError("spawn", f"can't connect to {socket_path}: {error}") from error
        else:
            if _listener_pid(sock) == process.pid:
                return sock
            # An older keeper answers there; ours will say so and end.
            sock.close()
        if process.poll() is not None:
            raise _ended_at_start(process.returncode, log)
        await asyncio.sleep(CONNECT_PAUSE)


def _ended_at_start(status: int, log: str) -> KeeperError:
    tail = Path(log).read_text(errors="replace")[-LOG_TAIL_CHARACTERS:].strip()
    said = f": {tail}" if tail else f"; {log} is empty"
    if status < 0:
        return KeeperError("killed", f"the keeper was {exit_cause(status).text} while it started{said}")
    return KeeperError("spawn", f"the keeper ended at its start with status {status}{said}")


def _kill_listener(sock: socket.socket) -> None:
    """While it is connected its number is its own; 0 stands for one of another process id namespace."""
    pid = _listener_pid(sock)
    if pid > 0:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _listener_pid(sock: socket.socket) -> int:
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills it; it is reaped when it is gone, which on a file system that hangs can take for ever."""
    if process.poll() is not None:
        return
    process.kill()
    loop = asyncio.get_running_loop()
    pidfd = os.pidfd_open(process.pid)

    def reap() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        process.wait()

    loop.add_reader(pidfd, reap)
