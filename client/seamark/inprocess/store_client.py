"""A client of a TCPStore that is being connected, and that nobody has to wait for.

torch bounds the time until a connection stands, but then waits for the store's first answer without a limit
(c10d/TCPStore.cpp, ``ping``): a host that goes off the network in between would hold its caller for ever. So a client
is connected on a thread of its own, which is cut free when its time is over or its caller does not want it any more.

Which connections a thread has made is told by when they came and by their port. So what is given up is not cut while
another client of that port is being connected, and the connection that this one gets is not taken for its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from seamark.inprocess.abort import shut_down
from seamark.inprocess.groups import Socket, open_sockets
from seamark.inprocess.resolver import no_name_server

LOOK_AGAIN = 0.02
"""Seconds between two looks at what a client that is given up has connected: torch tries again until its time-out."""

TORCH_SPEAKS = 30.0
"""Seconds that torch may take on top of its time-out: the first backtrace that it makes takes some."""

_telling_apart = threading.Lock()
_connecting: set[StoreConnection] = set()
"""Those whose connection is not known yet."""


class StoreConnection:
    """Begins to connect at once.

    Args:
        host: of the store.
        port: of the store.
        timeout: seconds to connect and to be answered.
        first: may use the client on the connecting thread, before anybody else.
    """

    def __init__(self, host: str, port: int, timeout: float, first: Callable[[Any], None] = lambda _: None) -> None:
        self._host, self._port = host, port
        self._timeout = timeout
        self._first = first
        self._before: set[int] | None = None
        self._own: Socket | None = None
        self._changed = threading.Condition()
        self._made: tuple[Any, Socket] | None = None
        self._error: RuntimeError | None = None
        self._given_up = False
        self._cutting: threading.Thread | None = None
        self._thread = threading.Thread(target=self._connect, name="seamark-store-client", daemon=True)
        self._thread.start()

    def client(self) -> tuple[Any, Socket]:
        """The ``TCPStore`` client and its connection, once it is there.

        Raises:
            RuntimeError: nobody answers within the time, or it was given up.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._made or self._error or self._given_up, self._timeout)
            made, self._made = self._made, None
            error = self._error
        if made is not None and not self._given_up:
            return made
        self.give_up()
        raise error or RuntimeError(f"no answer within {self._timeout:g} s")

    def give_up(self) -> None:
        """Nobody wants it any more: who waits for it is freed, and its thread ends. Waits for nothing."""
        with self._changed:
            self._given_up = True
            self._made = None
            self._changed.notify_all()
            if self._cutting is None and self._thread.is_alive():
                self._cutting = threading.Thread(target=self._cut, name="seamark-store-cut", daemon=True)
                self._cutting.start()

    def join(self) -> None:
        """Waits until its threads have ended.

        Torch tries again until its time-out however often it is cut, and sleeps between two tries: so it can take
        until some seconds after that, and until another client of the same port is connected or given up.
        """
        for thread in (self._thread, self._cutting):
            if thread is not None:
                thread.join(self._timeout + TORCH_SPEAKS)

    @property
    def over(self) -> bool:
        """Whether none of its threads is left."""
        return not self._thread.is_alive() and (self._cutting is None or not self._cutting.is_alive())

    def _connect(self) -> None:
        made: tuple[Any, Socket] | None = None
        failed: RuntimeError | None = None
        try:
            made = self._find_out()
            if made is not None:
                self._first(made[0])
        except RuntimeError as error:
            failed = error
        except Exception as error:
            failed = RuntimeError(f"{type(error).__name__}: {error}")
        with _telling_apart:
            _connecting.discard(self)
        with self._changed:
            if failed is not None:
                self._error = failed
            elif not self._given_up:
                self._made = made
            self._changed.notify_all()

    def _find_out(self) -> tuple[Any, Socket] | None:
        """A client, and which connection is its own; None once it is given up."""
        # The store tells its socket only by repr(), which looks its address up by name: 5 s with a slow resolver.
        from torch.distributed import TCPStore

        while not self._given_up:
            with _telling_apart:
                _connecting.add(self)
                self._before = {one.inode for one in open_sockets()}
            with no_name_server():
                client = TCPStore(self._host, self._port, is_master=False, timeout=timedelta(seconds=self._timeout))
            with _telling_apart:
                new = self._opened()
                if len(new) == 1:
                    self._own = new[0]
                    _connecting.remove(self)
                    for other in _connecting:
                        if other._before is not None:
                            other._before.add(self._own.inode)
                    return client, self._own
        return None

    def _opened(self) -> list[Socket]:
        """The connections to that port that were not there before."""
        before = self._before
        if before is None:
            return []
        return [one for one in open_sockets() if one.inode not in before and (one.peer() or ("", 0))[1] == self._port]

    def _cut(self) -> None:
        while self._thread.is_alive():
            # Without a descriptor to spare there is nothing to be seen: next time.
            with suppress(OSError), _telling_apart:
                for one in self._to_cut():
                    shut_down(one)
            self._thread.join(LOOK_AGAIN)

    def _to_cut(self) -> list[Socket]:
        if self._own is not None:
            return [self._own]
        wanted = (one for one in _connecting if one is not self and not one._given_up)
        return [] if any(one._port == self._port for one in wanted) else self._opened()
