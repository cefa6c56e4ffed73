"""A worker's conversation with its agent, on a thread of its own.

The monitor thread owns the socket. The main thread hands it messages and waits for answers; failure events go to
a callback on the monitor thread, because the main thread may be blocked in a collective when they come. Requests
are repeated until they are answered, so an agent or a lighthouse that is restarted costs a moment and no request.
A monitor thread that fails ends the call: without it nobody here would hear of a failure, or get an answer.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import zmq

from seamark.environment import WorkerEnvironment
from seamark.inprocess.exceptions import AgentConnectionError, RestartAbort, StaleMemberError
from seamark.protocol.codec import ProtocolError, decode, encode
from seamark.protocol.messages import (
    RANKS,
    AbortJob,
    Cause,
    Complete,
    Completed,
    FailureEvent,
    JobAborted,
    Join,
    MemberFaulted,
    MemberStuck,
    Message,
    QuorumAnswer,
    QuorumReset,
    Refused,
    SharedState,
    Snapshot,
    Stamps,
    Timeline,
    WorkerHello,
)
from seamark.protocol.sockets import check_address, make_socket, receive

log = logging.getLogger(__name__)

REPEAT_INTERVAL = 1.0
"""Seconds after which an unanswered request is sent again."""
INTERRUPT_INTERVAL = 0.1
"""Seconds between two attempts to free the main thread, once the monitor thread has failed."""
FLUSH_TIMEOUT = 2.0

EVERY_ITERATION = 2**53
Answer = QuorumAnswer | QuorumReset | Completed | Refused | JobAborted


class _Process:
    """What goes on through all wrapped calls of a process: what it counts, and the last quorum that it was in."""

    def __init__(self) -> None:
        self.calls = itertools.count()
        self.requests = itertools.count(1)
        self.last: QuorumAnswer | None = None


_process = _Process()


class Session:
    """The connection of one worker.

    Args:
        environment: who this worker is.
        on_failure: called on the monitor thread with the iteration that a published failure ends, again and again
            until it returns True: the main thread has left the function.
            Once this thread has failed, with an iteration beyond all (``EVERY_ITERATION``).
        on_turn: called on the monitor thread at the least every ``turn`` seconds.
        turn: seconds; each wakes this thread beside the training, which has nothing else to do there.
    """

    def __init__(
        self,
        environment: WorkerEnvironment,
        on_failure: Callable[[int], bool],
        on_turn: Callable[[], None],
        turn: float,
    ) -> None:
        self._who = environment
        self._call = next(_process.calls)
        self._on_failure = on_failure
        self._on_turn = on_turn
        self._turn = turn
        self._outgoing: deque[Message] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._awake = True
        # Reentrant: a signal handler of the script may change the shared state, too.
        self._waking = threading.RLock()
        self._answers: queue.SimpleQueue[Answer | AgentConnectionError] = queue.SimpleQueue()
        self._pending: Join | Complete | None = None
        self._closing = False
        self._ended_iteration: int | None = None
        self.aborted: str | None = None
        """Why somebody ended the whole job; None while nobody has."""
        self._broken: AgentConnectionError | None = None
        self._address = check_address(environment.address)
        self._thread = threading.Thread(target=self._serve, name="seamark-monitor", daemon=True)
        self._thread.start()

    # --- main thread ---------------------------------------------------------------------------------------

    def join(self, keys: dict[str, str], *, after_fault: bool) -> QuorumAnswer | None:
        """Waits for the next quorum, however often the wait is reset.

        Args:
            keys: what the other members are to know of this one.
            after_fault: the members' state is suspect, so that the quorum gets a new id even with equal members.

        Returns:
            The quorum, or None if the job has completed meanwhile.

        Raises:
            StaleMemberError: this process has been replaced.
            RestartAbort: somebody ended the job.
            AgentConnectionError: the monitor thread has failed.
        """
        while True:
            last = _process.last
            answer = self._ask(
                Join(
                    job=self._who.job,
                    group=RANKS,
                    generation=self._who.generation,
                    member=self._who.member,
                    incarnation=self._who.incarnation,
                    request=next(_process.requests),
                    iteration=last.iteration if last else -1,
                    restarts=last.restarts if last else 0,
                    quorum_id=last.quorum_id if last else 0,
                    quorum_members=[member.member for member in last.members] if last else [],
                    commit_failures=1 if after_fault else 0,
                    keys=keys,
                    call=self._call,
                )
            )
            if isinstance(answer, QuorumAnswer):
                _process.last = answer
                return answer
            if isinstance(answer, Completed):
                return None

    def complete(self, iteration: int) -> bool:
        """Says that the function returned and waits for the others; False if the iteration was given up instead.

        Raises:
            StaleMemberError: this process has been replaced.
            RestartAbort: somebody ended the job.
            AgentConnectionError: the monitor thread has failed.
        """
        answer = self._ask(
            Complete(
                job=self._who.job,
                group=RANKS,
                generation=self._who.generation,
                member=self._who.member,
                incarnation=self._who.incarnation,
                request=next(_process.requests),
                iteration=iteration,
                call=self._call,
            )
        )
        return isinstance(answer, Completed)

    def faulted(self, iteration: int, cause: Cause, at: float) -> None:
        """Reports that the function raised."""
        self._post(MemberFaulted(self._who.job, self._who.member, self._who.incarnation, iteration, cause, at))

    def stuck(self) -> None:
        """Asks to be replaced: the main thread can't be freed. Called on the monitor thread."""
        self._post(MemberStuck(self._who.job, self._who.member, self._who.incarnation))

    def timeline(self, ended_iteration: int, iteration: int, stamps: Stamps) -> None:
        """Reports what this worker saw of an incident."""
        who = self._who
        self._post(Timeline(who.job, who.member, who.incarnation, ended_iteration, iteration, stamps))

    def share(self, version: int, text: str) -> None:
        """Reports a change of the job's shared state."""
        self._post(SharedState(self._who.job, self._who.member, self._who.incarnation, version, text))

    def abort_job(self, reason: str) -> None:
        """Asks that the whole job end."""
        self._post(AbortJob(self._who.job, self._who.member, self._who.incarnation, reason or "RestartAbort"))

    def close(self) -> None:
        """Sends what is left and ends the thread; its socket and descriptors are closed when this returns.

        What is posted afterwards, by a thread that the function has left behind, is dropped.
        """
        self._closing = True
        self._notify()
        self._thread.join()
        with self._waking:
            self._awake = False
            os.close(self._wake)

    def check(self) -> None:
        """Whether this call can go on.

        Raises:
            RestartAbort: somebody ended the whole job.
            AgentConnectionError: the monitor thread has failed.
        """
        if self.aborted is not None:
            raise RestartAbort(self.aborted)
        if self._broken is not None:
            raise self._broken

    def _ask(self, request: Join | Complete) -> Answer:
        self._pending = request
        self.check()
        self._post(request)
        answer = self._answers.get()
        if isinstance(answer, Refused):
            raise StaleMemberError(answer.reason)
        self.check()
        if isinstance(answer, AgentConnectionError):
            raise answer
        return answer

    def _post(self, message: Message) -> None:
        self._outgoing.append(message)
        self._notify()

    def _notify(self) -> None:
        with self._waking:
            # Once it is closed, its number may be another file's.
            if self._awake:
                os.eventfd_write(self._wake, 1)

    # --- monitor thread ------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._connect()
        except Exception as error:
            self._fail(error)

    def _connect(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            socket = make_socket(context, zmq.DEALER, identity=self._who.incarnation.encode())
            try:
                socket.connect(self._address)
                self._talk(socket)
            finally:
                socket.setsockopt(zmq.LINGER, int(FLUSH_TIMEOUT * 1_000))
                socket.close()
        finally:
            context.destroy(linger=0)

    def _talk(self, socket: zmq.Socket[bytes]) -> None:
        self._send(socket, self._hello())
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        repeat_at = time.monotonic() + REPEAT_INTERVAL
        while not (self._closing and not self._outgoing):
            woken = poller.poll(self._pause_ms(repeat_at))
            self._on_turn()
            if woken:
                self._drain_wake()
                while self._outgoing:
                    self._send(socket, self._outgoing.popleft())
                    repeat_at = time.monotonic() + REPEAT_INTERVAL
                self._receive(socket)
            if self._ended_iteration is not None and self._on_failure(self._ended_iteration):
                self._ended_iteration = None
            pending = self._pending
            if pending is not None and time.monotonic() >= repeat_at:
                repeat_at = time.monotonic() + REPEAT_INTERVAL
                self._send(socket, self._hello())
                self._send(socket, pending)

    def _fail(self, error: Exception) -> None:
        """Ends the call, wherever the main thread is: it waits for an answer, runs the function, or comes later."""
        broken = AgentConnectionError(
            "the thread that talks to this node's agent has failed, and without it this rank would hear of no failure: "
            f"{type(error).__name__}: {error}"
        )
        broken.__cause__ = error
        log.error("%s", broken)
        self._broken = broken
        self._answers.put(broken)
        freed = False
        while not (freed or self._closing):
            # It may be this that has failed. What it has freed by then comes out at the next call.
            with suppress(Exception):
                freed = self._on_failure(EVERY_ITERATION)
            if not freed:
                time.sleep(INTERRUPT_INTERVAL)

    def _pause_ms(self, repeat_at: float) -> int:
        if self._ended_iteration is not None:
            return 0
        pause = self._turn if self._pending is None else min(self._turn, repeat_at - time.monotonic())
        return max(0, math.ceil(pause * 1_000))

    def _hello(self) -> WorkerHello:
        who = self._who
        return WorkerHello(who.job, who.member, who.incarnation, os.getpid(), True)

    def _drain_wake(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return

    def _send(self, socket: zmq.Socket[bytes], message: Message) -> None:
        try:
            socket.send_multipart(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            log.warning(
                "the agent does not read: %s was dropped and will be repeated if it is a request",
                type(message).__name__,
            )

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        while (frames := receive(socket)) is not None:
            try:
                message = decode(frames)
            except ProtocolError as error:
                log.warning("dropped a frame of the agent: %s", error)
                continue
            self._handle(message)

    def _handle(self, message: Message) -> None:
        match message:
            case FailureEvent(group=group) if group == RANKS:
                self._end(message.failure.iteration)
            case Snapshot():
                for event in message.failures:
                    if event.group == RANKS:
                        self._end(event.failure.iteration)
                for quorum in message.quorums:
                    # The others went on without this rank's host, under a lighthouse that knew nothing of it.
                    if quorum.group == RANKS:
                        self._end(quorum.iteration - 1)
            case QuorumAnswer() | QuorumReset() | Completed():
                mine = self._who.member
                if any(one.member == mine and self._is_pending(one.request) for one in message.recipients):
                    self._answer(message)
            case JobAborted():
                self.aborted = message.reason
                if self._pending is not None:
                    self._answer(message)
                else:
                    self._end(EVERY_ITERATION)
            case Refused():
                if message.code in ("STALE_GENERATION", "UNKNOWN_MEMBER") and self._pending is not None:
                    self._answer(message)
            case _:
                pass

    def _end(self, iteration: int) -> None:
        self._ended_iteration = max(iteration, -1 if self._ended_iteration is None else self._ended_iteration)

    def _is_pending(self, request: int) -> bool:
        pending = self._pending
        return pending is not None and pending.request == request

    def _answer(self, answer: Answer) -> None:
        self._pending = None
        self._answers.put(answer)
