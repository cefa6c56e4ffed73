"""A person's connection to the coordinator: questions and answers, with a deadline."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

import click
import zmq

from seamark.protocol.codec import decode, encode
from seamark.protocol.keys import Key
from seamark.protocol.messages import Message, Refused
from seamark.protocol.sockets import connect, encrypted, make_socket

T = TypeVar("T", bound=Message)
REPEAT_INTERVAL = 1.0
"""Seconds after which an unanswered question is asked again."""
SILENT = 2.0
"""Seconds without an answer after which a person is told what is waited for."""


class RefusedError(Exception):
    """The coordinator refused; the sentence is its reason."""


class UnreachableError(Exception):
    """Nobody answers at the coordinator's address."""


class Operator:
    """Asks the coordinator at this address.

    Args:
        address: where it listens.
        key: the person's own; None to speak in the clear.
    """

    def __init__(self, address: str, key: Key | None = None) -> None:
        self._address = address
        self._key = key if key is not None and encrypted(address) else None
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = make_socket(self._context, zmq.DEALER)
        connect(self._socket, address, key)
        self._requests = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._context.term()

    @property
    def doubt(self) -> str:
        """What else than a missing daemon may be behind silence: who refuses a key says nothing to its owner."""
        if self._key is None:
            return ""
        return f" (to the key {self._key.name}: does seamark keys list still show it on the head?)"

    def tell(self, make: Callable[[int], Message]) -> int:
        """Sends a request without waiting; returns its number."""
        request = next(self._requests)
        self._send(make(request))
        return request

    def _send(self, message: Message) -> None:
        # With a daemon away, the queue fills in thousands of seconds; what is dropped then is asked again.
        with suppress(zmq.Again):
            self._socket.send_multipart(encode(message), zmq.NOBLOCK)

    def receive(self, timeout: float) -> Message | None:
        """The next message, or None after ``timeout`` seconds."""
        if not self._socket.poll(max(0, int(timeout * 1_000))):
            return None
        return decode(self._socket.recv_multipart())

    def ask(self, make: Callable[[int], Message], answer: type[T], timeout: float) -> T:
        """Asks and waits for the answer, repeating the question: a daemon that is restarted costs a moment.

        Raises:
            RefusedError: the coordinator refused.
            UnreachableError: no answer within ``timeout`` seconds.
        """
        request = self.tell(make)
        now = time.monotonic()
        deadline = now + timeout
        repeat_at = now + REPEAT_INTERVAL
        said_at = now + SILENT
        while (now := time.monotonic()) < deadline:
            if now >= repeat_at:
                repeat_at = now + REPEAT_INTERVAL
                self._send(make(request))
            if now >= said_at:
                said_at = deadline
                click.echo(f"waits for the coordinator at {self._address}", err=True)
            message = self.receive(min(deadline, repeat_at) - now)
            if isinstance(message, Refused) and message.request == request:
                raise RefusedError(message.reason)
            if isinstance(message, answer) and getattr(message, "request", None) == request:
                return message
        raise UnreachableError(
            f"no answer from the coordinator at {self._address} within {timeout:g} s{self.doubt}: seamark status tells "
            "what runs here, seamark up starts a suite, seamark run --standalone needs none"
        )
