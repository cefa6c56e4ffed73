"""A worker's conversation with its agent: a monitor thread that fails leaves nobody waiting."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from descriptors import descriptors
from standalone import wait_for

from seamark.environment import WorkerEnvironment
from seamark.inprocess.exceptions import AgentConnectionError, RestartError, RestartInterrupt
from seamark.inprocess.interrupt import REPEAT_INTERVAL, Interrupter
from seamark.inprocess.session import EVERY_ITERATION, Session
from seamark.protocol.codec import encode
from seamark.protocol.messages import RANKS, Cause, Failure, FailureEvent
from seamark.protocol.sockets import bind, make_socket

TURN = 0.02


@pytest.fixture
def agent() -> Iterator[zmq.Socket[bytes]]:
    """The agent's end; it answers nothing."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with tempfile.TemporaryDirectory(prefix="seamark-") as directory:
        socket = make_socket(context, zmq.ROUTER)
        bind(socket, f"ipc://{Path(directory) / 'agent'}")
        yield socket
        context.destroy(linger=0)


def worker(agent: zmq.Socket[bytes]) -> WorkerEnvironment:
    address = agent.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
    return WorkerEnvironment(address, "job", "job/0", "incarnation", 1, "node", 0, 1)


def error_of(call: Callable[[], object]) -> RestartError:
    """What it raises; it fails the test to wait for ever."""
    raised: list[RestartError] = []

    def run() -> None:
        try:
            call()
        except RestartError as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_for("its end", lambda: not thread.is_alive(), 30.0)
    return raised[0]


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_without_a_descriptor_for_its_socket_a_call_ends(
    agent: zmq.Socket[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with descriptors(1):
        session = Session(worker(agent), lambda iteration: True, lambda: None, TURN)
        error = error_of(lambda: session.join({}, after_fault=False))
    assert isinstance(error, AgentConnectionError)
    assert "the thread that talks to this node's agent has failed" in str(error)
    assert str(error).endswith("Too many open files")
    assert error_of(lambda: session.complete(0)) is error
    session.close()
    assert errors(caplog) == [str(error)]


def test_who_waits_for_an_answer_is_told_that_the_monitor_thread_has_failed(agent: zmq.Socket[bytes]) -> None:
    def fail() -> None:
        raise LookupError("no such thing")

    turn: list[Callable[[], None]] = [lambda: None]
    session = Session(worker(agent), lambda iteration: True, lambda: turn[0](), TURN)
    waiting = threading.Timer(5 * TURN, lambda: turn.__setitem__(0, fail))
    waiting.start()
    error = error_of(lambda: session.join({}, after_fault=False))
    assert str(error).endswith("LookupError: no such thing")
    waiting.join()
    session.close()


def test_a_function_is_interrupted_once_the_monitor_thread_has_failed(agent: zmq.Socket[bytes]) -> None:
    interrupter = Interrupter()
    entered = threading.Event()

    def turn() -> None:
        if entered.is_set():
            raise OSError("no thread can be looked at")

    def free(iteration: int) -> bool:
        interrupter.abort(iteration)
        return interrupter.interrupt(REPEAT_INTERVAL)

    def work() -> None:
        entered.set()
        time.sleep(30.0)

    session = Session(worker(agent), free, turn, TURN)
    try:
        with pytest.raises(RestartInterrupt):
            interrupter.run(0, work)
        with pytest.raises(AgentConnectionError, match="no thread can be looked at"):
            session.check()
    finally:
        session.close()
        interrupter.close()


def test_freeing_the_function_is_tried_again_where_it_is_what_failed(agent: zmq.Socket[bytes]) -> None:
    freed: list[int] = []

    def free(iteration: int) -> bool:
        freed.append(iteration)
        if len(freed) < 3:
            raise OSError("not now")
        return True

    session = Session(worker(agent), free, lambda: None, TURN)
    route, *_ = agent.recv_multipart()
    failure = Failure("faulted", "job/1", "other", 1, "node", 4, Cause("exception"), 0.0, 0.0, 0.0, "worker")
    agent.send_multipart([route, *encode(FailureEvent("job", RANKS, 1, 1, failure))])
    wait_for("it to be freed", lambda: len(freed) == 3)
    with pytest.raises(AgentConnectionError, match="OSError: not now"):
        session.check()
    session.close()
    assert freed == [4, EVERY_ITERATION, EVERY_ITERATION]


def test_what_is_posted_after_the_end_is_written_to_nobodys_file(agent: zmq.Socket[bytes]) -> None:
    session = Session(worker(agent), lambda iteration: True, lambda: None, TURN)
    session.close()
    # One of these has the number that the session's own had.
    others = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(50)]
    session.share(1, "{}")
    for other in others:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(other)
        os.close(other)
