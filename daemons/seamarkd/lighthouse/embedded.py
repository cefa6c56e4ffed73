"""A lighthouse inside another process: for tests and small set-ups, without supervisord and without a state directory.

with seamarkd.lighthouse.serve() as lighthouse:
    manager = seamark.Manager(lighthouse_addr=lighthouse.address, ...)
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zmq
from msgspec import Struct

from seamark.protocol.keys import own
from seamarkd.gate import Gate
from seamarkd.lighthouse.replicas import ReplicaOptions
from seamarkd.lighthouse.shell import LighthouseShell


class Served(Struct, frozen=True):
    """Where a lighthouse answers and publishes its events; both ``tcp://HOST:PORT``."""

    address: str
    events: str


@contextmanager
def serve(
    address: str = "tcp://127.0.0.1:0",
    events: str = "tcp://127.0.0.1:0",
    *,
    min_replicas: int = 1,
    join_timeout: float = 60.0,
    heartbeat_timeout: float = 5.0,
    failure_tick: float = 1.0,
    epoch: int = 1,
    keys: Path | None = None,
) -> Iterator[Served]:
    """Serves on a thread of its own until the block ends.

    Args:
        address: where peers' requests arrive; port 0: any.
        events: where subscribers listen; port 0: any.
        min_replicas: fewer replica groups form no quorum.
        join_timeout: seconds a quorum waits for who beats and does not join, where the joiners say nothing else.
        heartbeat_timeout: seconds of silence after which a replica group is lost.
        failure_tick: seconds between two looks for such silence.
        epoch: higher than that of an earlier lighthouse which the same managers knew.
        keys: the directory of ``seamark keys init``; with None it speaks in the clear, and to everybody.

    Raises:
        zmq.ZMQError: an address is in use.
        KeysError: the keys can't be used.
    """
    options = ReplicaOptions(min_replicas, join_timeout, heartbeat_timeout, failure_tick)
    loop = asyncio.new_event_loop()
    context: zmq.Context[Any] = zmq.Context()

    async def start() -> tuple[LighthouseShell, Gate | None]:
        gate = Gate(context, own(keys, "daemon"), keys) if keys is not None else None
        return LighthouseShell(context, address, events, epoch, options, gate=gate), gate

    try:
        shell, gate = loop.run_until_complete(start())
    except BaseException:
        loop.close()
        context.destroy(linger=0)
        raise
    thread = threading.Thread(target=loop.run_forever, name="seamark-lighthouse", daemon=True)
    thread.start()
    try:
        yield Served(shell.address, shell.events)
    finally:
        loop.call_soon_threadsafe(shell.close)
        if gate is not None:
            loop.call_soon_threadsafe(gate.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        context.term()
