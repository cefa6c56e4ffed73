"""A manager in a worker that an agent started: the agent sees its death and its steps.

The kernel tells an agent of a worker's canary threads before it frees the worker's memory; connecting to the worker's
listener is refused only after. This module refuses to know quorums.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import zmq

from seamark.environment import WorkerEnvironment
from seamark.progress import ProgressPage, worker_page
from seamark.protocol.codec import encode
from seamark.protocol.messages import WorkerHello
from seamark.protocol.sockets import check_address, make_socket

HELLO_TIMEOUT = 5.0
"""Seconds; an agent that is being restarted is back by then, and without it only its own watch is missing."""
HELLO_INTERVAL = 0.5


def introduce(context: zmq.Context[Any], environ: Mapping[str, str] = os.environ) -> ProgressPage:
    """Starts this worker's canaries and tells the agent of them, unless its restart wrapper did.

    Args:
        context: a ZeroMQ context of this process.
        environ: what the agent gave the worker.

    Returns:
        The progress page.
    """
    who = WorkerEnvironment.read(environ)
    page = worker_page(who.incarnation)
    if page.wrapped:
        return page
    hello = encode(WorkerHello(who.job, who.member, who.incarnation, os.getpid(), wrapped=False))
    socket = make_socket(context, zmq.DEALER, identity=who.incarnation.encode())
    try:
        socket.connect(check_address(who.address))
        until = time.monotonic() + HELLO_TIMEOUT
        while time.monotonic() < until:
            socket.send_multipart(hello)
            if socket.poll(int(HELLO_INTERVAL * 1_000)):
                break
    finally:
        socket.close()
    return page
