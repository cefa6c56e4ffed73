"""A store client connected ahead of need.

Every new TCPStore connection looks its peer's name up on both sides, which takes seconds with a bad resolver; so the
next iteration's client is connected while this one trains, and a restart finds it ready. A client of a store that has
been started anew is useless: the store's incarnation tells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from seamark.inprocess.exceptions import StoreUnreachableError
from seamark.inprocess.groups import Socket
from seamark.inprocess.store_client import StoreConnection
from seamark.protocol.messages import StoreAddress


class SpareStore:
    """At most one client in reserve.

    Args:
        timeout: seconds to connect.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._address = StoreAddress()
        self._spare: StoreConnection | None = None
        self._awaited: StoreConnection | None = None
        self._given_up: list[StoreConnection] = []

    def prepare(self, address: StoreAddress, first: Callable[[Any], None] = lambda _: None) -> None:
        """Begins to connect the next client, on a thread, where ``first`` may use it before anybody else."""
        self._address = address
        self._spare = StoreConnection(address.host, address.port, self._timeout, first)

    def take(self, address: StoreAddress, unwanted: Callable[[], bool] = bool) -> tuple[Any, Socket]:
        """A connected client of this store: the spare if it is one, else a new one.

        Args:
            address: of the store.
            unwanted: whether the iteration that it is for is over; asked once ``free`` frees this call.

        Raises:
            StoreUnreachableError: nobody answers, or it was freed.
        """
        spare, self._spare = self._spare, None
        if spare is not None and self._address == address:
            try:
                return self._wait(spare, unwanted)
            except RuntimeError:
                # The store may be there again.
                pass
        elif spare is not None:
            self._give_up(spare)
        try:
            return self._wait(StoreConnection(address.host, address.port, self._timeout), unwanted)
        except RuntimeError as error:
            why = str(error).strip().split("\n", 1)[0]
            raise StoreUnreachableError(
                f"the job's TCPStore does not answer on {address.host}:{address.port}: {why}"
            ) from None

    def free(self) -> None:
        """Frees the thread that is in ``take``, if one is; from any thread, waits for nothing."""
        awaited = self._awaited
        if awaited is not None:
            awaited.give_up()

    def close(self) -> None:
        """Gives the spare up, and waits until no thread is left that connects: see ``StoreConnection.join``."""
        spare, self._spare = self._spare, None
        if spare is not None:
            self._give_up(spare)
        for one in self._given_up:
            one.join()
        self._given_up.clear()

    def _give_up(self, connection: StoreConnection) -> None:
        connection.give_up()
        self._given_up = [one for one in (*self._given_up, connection) if not one.over]

    def _wait(self, connection: StoreConnection, unwanted: Callable[[], bool]) -> tuple[Any, Socket]:
        self._awaited = connection
        try:
            if unwanted():
                connection.give_up()
            return connection.client()
        except RuntimeError:
            self._give_up(connection)
            raise
        finally:
            self._awaited = None
