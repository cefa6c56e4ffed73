"""A process group across replica groups that is made anew at every quorum, and that anybody can cut.

Outside torch's registries: the training script's own groups and this one know nothing of each other. It refuses to know
quorums; it is told a store, a rank and a size.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from seamark.inprocess.abort import call_as_every_peer, end_reading, shut_down
from seamark.inprocess.groups import Creation, GlooLoop, Socket
from seamark.inprocess.resolver import no_name_server
from seamark.inprocess.store_client import StoreConnection

Backend = Literal["gloo", "nccl"]
DROP_TIMEOUT = 5.0
"""Seconds that the end waits for the destructor of a group, which joins threads."""


CREATION_PATIENCE = 0.5
"""Seconds that a group's creation is looked at to cut what it opens; it ends by its own timeout at the latest."""
LOOK_AGAIN = 0.002


class GroupUnavailable(RuntimeError):
    """There is no process group: none was made yet, or it was cut."""


class ReconfigurableGroup:
    """The process group of one rank across all replica groups.

    Args:
        backend: ``"gloo"`` or ``"nccl"``.
        timeout: of its collectives, seconds.
    """

    def __init__(self, backend: Backend = "gloo", timeout: float = 60.0) -> None:
        self.backend = backend
        self._timeout = timedelta(seconds=timeout)
        self._lock = threading.Lock()
        self._group: Any = None
        self._loops: list[GlooLoop] = []
        self._held: list[socket.socket] = []
        self._dropping: list[threading.Thread] = []
        self._connecting: StoreConnection | None = None
        self._under_way: tuple[Creation, Socket] | None = None
        self._was_cut = False
        self._size = 0
        self._rank = 0

    @property
    def size(self) -> int:
        """How many ranks it has; 0 without a group."""
        return self._size

    @property
    def rank(self) -> int:
        """This process's rank in it."""
        return self._rank

    def configure(
        self, store_address: str, prefix: str, rank: int, size: int, timeout: float, gone: Callable[[], bool] = bool
    ) -> None:
        """Replaces the group by one whose ranks meet under a prefix of a store; all have to call it.

        Args:
            store_address: of a TCPStore, ``HOST:PORT``.
            prefix: used for no other group.
            rank, size: of this process.
            timeout: seconds to reach the store.
            gone: whether one of the ranks is known to be lost; asked once ``cut`` ends what follows.

        Raises:
            GroupUnavailable: it was cut meanwhile, or a rank is gone.
            torch.distributed.DistError: the store or a peer could not be reached.
        """
        self.cut()
        host, _, port = store_address.rpartition(":")
        client, connection = self._connected(host, int(port), timeout, gone)
        creation = Creation(size)
        with self._lock:
            self._under_way = (creation, connection)
            self._was_cut = gone()
        group: Any = None
        try:
            if not self._was_cut:
                with no_name_server():
                    group = self._make(dist.PrefixStore(prefix, client), rank, size)
        except RuntimeError:
            if not self._was_cut:
                raise
        finally:
            loops = creation.loops() if self.backend == "gloo" else []
            with self._lock:
                self._under_way = None
                cut = self._was_cut
                self._group, self._loops, self._rank, self._size = group, loops, rank, size
                held, self._held = self._held, []
            if cut:
                self.cut()
        if cut:
            raise GroupUnavailable("a replica group was lost while the process group was made")
        # Every rank has left the group before this one: nobody's send can be broken any more (see end_reading).
        for duplicate in held:
            duplicate.close()

    def _connected(self, host: str, port: int, timeout: float, gone: Callable[[], bool]) -> tuple[Any, Socket]:
        connecting = StoreConnection(host, port, timeout)
        with self._lock:
            self._connecting = connecting
        try:
            if gone():
                connecting.give_up()
            return connecting.client()
        except RuntimeError:
            if gone():
                raise GroupUnavailable("a replica group was lost while the store was connected to") from None
            raise
        finally:
            with self._lock:
                self._connecting = None

    def _make(self, store: Any, rank: int, size: int) -> Any:
        if self.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            return dist.ProcessGroupNCCL(store, rank, size, options)
        return dist.ProcessGroupGloo(store, rank, size, self._timeout)

    def allreduce(self, tensor: torch.Tensor, op: Any = None) -> Any:
        """Starts an allreduce; the work that torch returns.

        Args:
            tensor: any shape; reduced in place.
            op: a ``torch.distributed.ReduceOp``, SUM by default.

        Raises:
            GroupUnavailable: there is no group.
        """
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM if op is None else op
        return self._now().allreduce([tensor], options)

    def _now(self) -> Any:
        group = self._group
        if group is None:
            raise GroupUnavailable("there is no process group across replicas: start a quorum first")
        return group

    def cut(self) -> None:
        """Frees every thread that waits in the group, and gives it up. From any thread; again without effect."""
        with self._lock:
            group, self._group = self._group, None
            loops, self._loops = self._loops, []
            self._size = 0
            self._was_cut = True
            connecting = self._connecting
        if connecting is not None:
            connecting.give_up()
        if group is None:
            self._cut_creation()
            return
        if self.backend == "nccl":
            threading.Thread(target=group.abort, name="seamark-nccl-abort", daemon=True).start()
            return
        connections = [connection for loop in loops for connection in loop.connections()]
        held = [duplicate for duplicate in map(end_reading, connections) if duplicate is not None]
        with self._lock:
            self._held += held
        # Gloo's destructor joins threads, which can take long: not on the caller's.
        dropped = [group]
        del group
        thread = threading.Thread(target=dropped.clear, name="seamark-drop-group", daemon=True)
        thread.start()
        with self._lock:
            self._dropping = [one for one in self._dropping if one.is_alive()] + [thread]

    def _cut_creation(self) -> None:
        """Frees the thread that makes a group: in the store, on its connections, and where it waits for a peer."""
        called: set[Socket] = set()
        until = time.monotonic() + CREATION_PATIENCE
        while time.monotonic() < until:
            with self._lock:
                if self._under_way is None:
                    return
                creation, connection = self._under_way
            shut_down(connection)
            for loop in creation.loops():
                for one in loop.connections():
                    shut_down(one)
                if loop.listener not in called:
                    called.add(loop.listener)
                    call_as_every_peer(loop.listener, creation.size)
            time.sleep(LOOK_AGAIN)

    def close(self) -> None:
        """Gives the group and all connections up."""
        self.cut()
        with self._lock:
            held, self._held = self._held, []
        for duplicate in held:
            duplicate.close()
        # An interpreter that ends inside Gloo's destructor takes the process down with it (std::terminate, 134).
        for thread in self._dropping:
            thread.join(DROP_TIMEOUT)
