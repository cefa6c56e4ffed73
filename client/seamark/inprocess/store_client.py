"""A client of a TCPStore that is being connected, and that nobody has to wait for.

torch bounds the time until a connection stands, but then waits for the store's first answer without a limit
(c10d/TCPStore.cpp, ``ping``): a host that goes off the network in between would hold its caller for ever. So a client
is connected on a thread of its own, which is cut free when its time is over or its caller does not want it any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from seamark.inprocess.abort import shut_down
from seamark.inprocess.groups import Socket, open_sockets
from seamark.inprocess.resolver import no_name_server

LOOK_AGAIN = 0.02
"""Seconds between two looks at what a client that is given up has connected: torch tries again until its time-out."""

TORCH_SPEAKS = 30.0
"""Seconds that torch may take on top of its time-out: the first backtrace that it makes takes some."""


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
        self._before = {one.inode for one in open_sockets()}
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
        """Waits until its threads have ended: soon once it is given up, and little after its time-out at the latest."""
        for thread in (self._thread, self._cutting):
            if thread is not None:
                thread.join(self._timeout + TORCH_SPEAKS)

    @property
    def over(self) -> bool:
        """Whether none of its threads is left."""
        return not self._thread.is_alive() and (self._cutting is None or not self._cutting.is_alive())

    def _connect(self) -> None:
        # The store tells its socket only by repr(), which looks its address up by name: 5 s with a slow resolver.
        from torch.distributed import TCPStore

        made, failed = None, None
        try:
            while made is None and not self._given_up:
                self._before = {one.inode for one in open_sockets()}
                with no_name_server():
                    client = TCPStore(self._host, self._port, is_master=False, timeout=timedelta(seconds=self._timeout))
                new = self._opened()
                if len(new) == 1:
                    made = client, new[0]
                    self._first(client)
        except RuntimeError as error:
            failed = error
        with self._changed:
            if failed is not None:
                self._error = failed
            elif not self._given_up:
                self._made = made
            self._changed.notify_all()

    def _opened(self) -> list[Socket]:
        """The connections to that port that were not there before."""
        return [
            one for one in open_sockets() if one.inode not in self._before and (one.peer() or ("", 0))[1] == self._port
        ]

    def _cut(self) -> None:
        while self._thread.is_alive():
            for one in self._opened():
                shut_down(one)
            self._thread.join(LOOK_AGAIN)
