"""A socket on the loop: nothing is lost, in a trickle or in a rush, and one message is as good as many."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import zmq

from seamark.protocol.codec import encode
from seamark.protocol.messages import Acknowledged, Message
from seamark.protocol.sockets import make_socket
from seamarkd.channel import RUSH_DRAINS, Channel

MANY = 20_000


class Echo:
    """A ROUTER channel that answers every message, and a DEALER that talks to it."""

    def __init__(self) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        router = make_socket(self.context, zmq.ROUTER)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        self.heard: list[int] = []
        self.channel = Channel(router, self._on_message)
        self.dealer = make_socket(self.context, zmq.DEALER)
        self.dealer.connect(f"tcp://127.0.0.1:{port}")
        self.answered = 0

    def _on_message(self, route: bytes, message: Message) -> None:
        assert isinstance(message, Acknowledged)
        self.heard.append(message.request)
        self.channel.send(message, route)

    async def ask(self, number: int) -> None:
        """Sends one message and waits for its answer."""
        self.dealer.send_multipart(encode(Acknowledged(number)))
        await self.answers(self.answered + 1)

    async def answers(self, count: int) -> None:
        async with asyncio.timeout(20.0):
            while self.answered < count:
                try:
                    self.dealer.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    await asyncio.sleep(0)
                else:
                    self.answered += 1

    def close(self) -> None:
        self.channel.close()
        self.channel.close()
        self.dealer.close()
        self.context.term()


def run(scenario: Any) -> None:
    async def alone() -> None:
        echo = Echo()
        try:
            await scenario(echo)
        finally:
            echo.close()

    asyncio.run(alone())


def test_a_flood_is_read_in_order_and_a_single_message_after_it() -> None:
    async def scenario(echo: Echo) -> None:
        for number in range(MANY):
            echo.dealer.send_multipart(encode(Acknowledged(number)))
            if number % 100 == 0:
                await asyncio.sleep(0)
        await echo.answers(MANY)
        assert echo.heard == list(range(MANY))
        await echo.ask(MANY)
        assert not echo.channel.behind

    run(scenario)


@pytest.fixture
def _every_drain_is_a_rush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seamarkd.channel.RUSH_GAP", 60.0)


@pytest.mark.usefixtures("_every_drain_is_a_rush")
def test_a_rush_of_single_messages_is_let_gather_and_ends() -> None:
    async def scenario(echo: Echo) -> None:
        count = 0
        async with asyncio.timeout(20.0):
            while echo.channel._gathering is None:
                await echo.ask(count)
                count += 1
        for number in range(count, count + 1_000):
            echo.dealer.send_multipart(encode(Acknowledged(number)))
        await echo.answers(count + 1_000)
        assert count > RUSH_DRAINS
        assert echo.heard == list(range(count + 1_000))
        async with asyncio.timeout(5.0):
            while echo.channel._gathering is not None:
                await asyncio.sleep(0)
        for number in range(10):
            await echo.ask(number)

    run(scenario)


@pytest.mark.usefixtures("_every_drain_is_a_rush")
def test_it_can_be_closed_while_messages_gather() -> None:
    async def scenario(echo: Echo) -> None:
        async with asyncio.timeout(20.0):
            while echo.channel._gathering is None:
                await echo.ask(0)

    run(scenario)


def test_a_handler_that_raises_costs_its_own_message() -> None:
    async def scenario(echo: Echo) -> None:
        answer = echo.channel._handler
        assert answer is not None

        def fails_once(route: bytes, message: Message) -> None:
            echo.channel._handler = answer
            raise ValueError("asked to fail")

        echo.channel._handler = fails_once
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        echo.dealer.send_multipart(encode(Acknowledged(0)))
        async with asyncio.timeout(5.0):
            while echo.channel._handler is fails_once:
                await asyncio.sleep(0)
        await echo.ask(1)
        assert echo.heard == [1]

    run(scenario)


@pytest.mark.parametrize("frames", [[b"x"], [b"SM\x01\x04", b"\xc1"]])
def test_what_is_no_message_is_counted_and_the_next_one_is_read(frames: list[bytes]) -> None:
    async def scenario(echo: Echo) -> None:
        echo.dealer.send_multipart(frames)
        await echo.ask(1)
        assert sum(echo.channel.dropped.values()) == 1

    run(scenario)
