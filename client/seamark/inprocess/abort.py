"""Frees a thread that is blocked in torch.distributed because a peer is dead or silent, and cleans up after it.

Gloo has no abort that wakes a collective, but a connection that ends does: so the connections of the groups, and the
one to the store in which their ranks meet, are shut down from another thread. This module refuses to know who decides
that an iteration is over, and how the main thread is told.
"""

from __future__ import annotations

import inspect
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from seamark.inprocess.groups import Creation, GlooLoop, GroupWatch, Socket
from seamark.inprocess.state import State

_NCCL_ABORT_TIMEOUT = 1.0
_FIRST_LOOK_AGAIN = 0.001
_LAST_LOOK_AGAIN = 0.02
_CALL_TIMEOUT = 1.0
_DROP_TIMEOUT = 2.0


class IterationAborted(RuntimeError):
    """A process group or store client was asked for between ``cut()`` and ``release()``."""


class AbortTorchDistributed:
    """The process groups are freed at every fault before anything else, whether this stands in ``abort=`` or not.

    Here so that a ``Compose(AbortTorchDistributed(), ...)`` of a script for NVRx goes on working.
    """

    def __call__(self, state: State) -> State:
        return state


class ProcessGroups:
    """The process groups and store clients of one wrapper: what belongs to them, how to cut it, how to forget it.

    ``cut()`` is called from any thread but the one that is to be freed; everything else may be called from any.

    Args:
        uninterrupted: a context in which the calling thread gets no ``RestartInterrupt``: one that arrived while a
            lock is being taken would leave it locked.
    """

    def __init__(self, uninterrupted: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._uninterrupted = uninterrupted
        self._changed = threading.Condition()
        self._aborted = False
        self._under_way: list[Creation] = []
        self._loops: list[GlooLoop] = []
        self._store_sockets: list[Socket] = []
        self._called: set[Socket] = set()
        self._held: list[socket.socket] = []
        self._made: list[Any] = []
        self._dropping: list[threading.Thread] = []
        self._ready_at: float | None = None
        self._watch = GroupWatch(begins=self._begins, ends=self._ends)

    @property
    def creating_since(self) -> float | None:
        """Monotonic time at which the oldest creation of a group that has not returned began; None without one."""
        with self._changed:
            return min((creation.since for creation in self._under_way), default=None)

    @property
    def ready_at(self) -> float | None:
        """Monotonic time at which the last creation of a group returned well; None before the first one."""
        return self._ready_at

    def install(self) -> None:
        """See every group from now on; those created before are never cut. Raises RuntimeError when installed."""
        self._watch.install()

    def uninstall(self) -> None:
        """Stop seeing groups, and wait a moment for those that are being dropped.

        A thread that comes out of Gloo while the interpreter ends is ended by it in the middle of a destructor, which
        aborts the process.
        """
        self._watch.uninstall()
        deadline = time.monotonic() + _DROP_TIMEOUT
        for dropping in self._dropping:
            dropping.join(max(0.0, deadline - time.monotonic()))
        self._dropping.clear()

    def adopt(self, client: Any, connection: Socket) -> Any:
        """The ``TCPStore`` client itself, of a ``StoreConnection``, whose connection ``cut()`` will cut from now on.

        Raises IterationAborted after ``cut()``.
        """
        with self._changed:
            self._refuse_when_aborted()
            self._store_sockets.append(connection)
        return client

    def cut(self, patience: float = 0.5) -> int:
        """Free every thread blocked in the groups or in the store, and let nothing new begin before ``release()``.

        A thread inside the creation of a group opens further connections as long as it goes on, so with a creation
        under way this looks again until it has returned, for ``patience`` seconds at most (then ``creating_since``
        still tells, and it may be called again). Returns the number of connections cut.
        """
        with self._changed:
            self._aborted = True
        _abort_nccl()
        deadline = time.monotonic() + patience
        pause = _FIRST_LOOK_AGAIN
        count = self._cut_known()
        while True:
            with self._changed:
                creations = list(self._under_way)
            for creation in creations:
                for loop in creation.loops():
                    count += self._cut_growing(loop, creation.size)
            remaining = deadline - time.monotonic()
            if not creations or remaining <= 0:
                return count
            with self._changed:
                self._changed.wait(min(pause, remaining))
            pause = min(2 * pause, _LAST_LOOK_AGAIN)

    def release(self) -> None:
        """Destroy what is left of the groups and forget their sockets; a new iteration may begin.

        To be called by the main thread, after it was freed. What still refers to a group (a model wrapped in
        DistributedDataParallel, a traceback) keeps its thread and sockets until it is gone. The last reference is
        dropped on a thread of its own: Gloo's destructor joins threads, which takes milliseconds, and for ever when
        Gloo forgot to wake one (see ``end_reading``).
        """
        c10d: Any = sys.modules.get("torch.distributed.distributed_c10d")
        if c10d is not None:
            _forget_groups(c10d)
            _unwrap_excepthook(c10d)
        with self._changed:
            self._under_way = [one for one in self._under_way if one.thread != threading.get_ident()]
            self._loops.clear()
            self._store_sockets.clear()
            self._called.clear()
            made, self._made = self._made, []
            self._aborted = False
        if made:
            dropping = threading.Thread(target=made.clear, name="seamark-drop-groups", daemon=True)
            dropping.start()
            self._dropping = [thread for thread in self._dropping if thread.is_alive()] + [dropping]

    def hang_up(self) -> None:
        """Close the connections of earlier iterations, once every rank has left them.

        A peer that is still in the old iteration may be sending: it would find its connection broken, and Gloo
        forgets such a send (see ``end_reading``).
        """
        with self._changed:
            held, self._held = self._held, []
        for connection in held:
            connection.close()

    def _refuse_when_aborted(self) -> None:
        if self._aborted:
            raise IterationAborted(
                "this iteration was aborted: no new process group or store client before the restart"
            )

    def _begins(self, creation: Creation) -> None:
        with self._uninterrupted(), self._changed:
            self._refuse_when_aborted()
            self._under_way.append(creation)

    def _ends(self, creation: Creation, made: Any) -> None:
        with self._uninterrupted():
            loops = creation.loops()
            with self._changed:
                if creation in self._under_way:
                    self._under_way.remove(creation)
                self._loops += loops
                self._made.append(made)
                if loops:
                    self._ready_at = time.monotonic()
                aborted = self._aborted
                self._changed.notify_all()
            if aborted:
                self._cut_known()

    def _cut_known(self) -> int:
        with self._changed:
            groups = [connection for loop in self._loops for connection in loop.connections()]
            stores = list(self._store_sockets)
        return sum(map(self._end_reading, groups)) + sum(map(shut_down, stores))

    def _cut_growing(self, loop: GlooLoop, size: int) -> int:
        """Ends what a creation under way has connected, and what it waits for."""
        count = sum(map(shut_down, loop.connections()))
        if loop.listener not in self._called:
            self._called.add(loop.listener)
            call_as_every_peer(loop.listener, size)
        return count

    def _end_reading(self, connection: Socket) -> bool:
        held = end_reading(connection)
        if held is None:
            return False
        with self._changed:
            self._held.append(held)
        return True


def end_reading(connection: Socket) -> socket.socket | None:
    """Ends the connection for Gloo, and for nobody else before the duplicate that is returned is closed.

    A send that fails because the connection has broken is forgotten by Gloo: its collective waits until the group's
    timeout (gloo/transport/tcp/pair.cc: ``signalException`` tells the receives, and the sends not yet begun). So
    nothing is broken: writing stays possible, and the duplicate keeps the connection whole for the peer, which is in
    the same position, when Gloo closes its own descriptor. None for a connection that is gone.
    """
    try:
        held = connection.duplicate()
    except OSError:
        return None
    try:
        held.shutdown(socket.SHUT_RD)
    except OSError:
        held.close()
        return None
    return held


def shut_down(connection: Socket) -> bool:
    # Never close(): the descriptor is its owner's. A socket that is gone or not connected needs no cutting.
    try:
        with connection.borrowed() as borrowed:
            borrowed.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    return True


def call_as_every_peer(listener: Socket, size: int) -> None:
    """Connect to a Gloo listener in the place of each of ``size`` ranks, and hang up.

    During creation a rank waits, for five times the group's timeout, until the peer that has to connect has done so
    (gloo/transport/tcp/pair.h, ``waitUntil``), and nothing else wakes it. A caller says which peer it is by the
    number of the pair, eight bytes in native order (gloo/transport/tcp/listener.cc).
    """
    try:
        with listener.borrowed() as borrowed:
            family, address = borrowed.family, borrowed.getsockname()
        for pair in range(size):
            with socket.socket(family, socket.SOCK_STREAM) as call:
                call.settimeout(_CALL_TIMEOUT)
                call.connect(address)
                call.sendall(struct.pack("=q", pair))
    except OSError:
        return


def _abort_nccl() -> None:
    """Abort the NCCL groups, each in a thread: the abort of one may wait for that of another (pytorch#119797)."""
    c10d: Any = sys.modules.get("torch.distributed.distributed_c10d")
    if c10d is None:
        return
    nccl_groups = [group for group, backends in list(c10d._world.pg_backend_config.items()) if "nccl" in str(backends)]
    if not nccl_groups:
        return
    from torch import device

    backends = [group._get_backend(device("cuda")) for group in nccl_groups]
    threads = [threading.Thread(target=backend.abort, name="seamark-nccl-abort", daemon=True) for backend in backends]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _NCCL_ABORT_TIMEOUT
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _forget_groups(c10d: Any) -> None:
    """Destroys the groups, and takes out of torch's registries those whose initialisation was left half-way.

    Their names and their count would meet the next iteration's: ranks that failed at different places have to give
    the same names to the same groups.
    """
    world = c10d._world
    if c10d.is_initialized() and world.default_pg in world.pg_map:
        c10d.destroy_process_group()
        return
    c10d._update_default_pg(None)
    for registry in (
        world.pg_map,
        world.pg_names,
        world.pg_group_ranks,
        world.pg_backend_config,
        world.pg_to_tag,
        world.tags_to_pg,
        world.pg_coalesce_state,
    ):
        registry.clear()
    c10d._unregister_all_process_groups()
    world.group_count = 0


def _unwrap_excepthook(c10d: Any) -> None:
    # Every init_process_group wraps sys.excepthook once more and nothing takes it back.
    while getattr(sys.excepthook, "__module__", None) == c10d.__name__:
        sys.excepthook = inspect.getclosurevars(sys.excepthook).nonlocals["old_hook"]
