"""Hosts on one machine: network namespaces joined by a router that loses, cuts and counts what it is told to.

Each host has a TUN device; the router is a thread that reads packets from one and writes them to another. No bridge,
no firewall, no netem: nothing of it needs more than root, and nothing of it is left when the descriptors are closed.
A host that is cut off keeps its link and its addresses, and nobody gets a reset: its packets go nowhere.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import select
import struct
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
MTU = 1_500
DEVICE = "tun0"
_libc = ctypes.CDLL(None, use_errno=True)


class NoNamespaces(Exception):
    """This machine or this user can't make network namespaces."""


@dataclass(frozen=True)
class Host:
    """A network namespace with one address.

    Attributes:
        address: its IPv4 address, which all other hosts reach.
        prefix: what a command is run by on this host.
    """

    address: str
    namespace: int
    tun: int

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("nsenter", f"--net=/proc/{os.getpid()}/fd/{self.namespace}")


class Network:
    """The router and its hosts, 10.99.0.1 and on.

    Args:
        hosts: how many.
        seed: of what is lost.

    Raises:
        NoNamespaces: with the reason.
    """

    def __init__(self, hosts: int, seed: int = 0) -> None:
        self.hosts = [_make_host(f"10.99.0.{number}") for number in range(1, hosts + 1)]
        self.loss = 0.0
        """The share of packets that is lost, on the way between any two hosts."""
        self._random = random.Random(seed)
        self._cut: frozenset[tuple[str, str]] = frozenset()
        self._end, end = os.pipe()
        self._thread = threading.Thread(target=self._route, args=(end,), name="router", daemon=True)
        self._thread.start()

    def cut(self, host: Host, *, sends: bool = True, hears: bool = True) -> None:
        """From now on what it sends, what it should hear, or both goes nowhere."""
        others = [other for other in self.hosts if other is not host]
        lost = {(host.address, other.address) for other in others} if sends else set()
        lost |= {(other.address, host.address) for other in others} if hears else set()
        self._cut |= lost

    def mend(self) -> None:
        """Nothing is cut any more."""
        self._cut = frozenset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the router; the namespaces end with the last process in them."""
        os.close(self._end)
        self._thread.join()
        for host in self.hosts:
            os.close(host.tun)
            os.close(host.namespace)

    def _route(self, end: int) -> None:
        ways = {_packed(host.address): host.tun for host in self.hosts}
        waiting = select.poll()
        for descriptor in (end, *ways.values()):
            waiting.register(descriptor, select.POLLIN | select.POLLHUP)
        while True:
            for descriptor, _ in waiting.poll():
                if descriptor == end:
                    os.close(end)
                    return
                self._forward(descriptor, ways)

    def _forward(self, descriptor: int, ways: dict[bytes, int]) -> None:
        try:
            packet = os.read(descriptor, 65_536)
        except BlockingIOError:
            return
        way = ways.get(packet[16:20])
        if packet[0] >> 4 != 4 or way is None:
            return
        if self._cut and (_printed(packet[12:16]), _printed(packet[16:20])) in self._cut:
            return
        if self.loss and self._random.random() < self.loss:
            return
        try:
            os.write(way, packet)
        except OSError:
            return  # its queue is full: routers drop then, too


def _make_host(address: str) -> Host:
    """A namespace, made by a thread that stays in it only so long."""

    def make() -> Host:
        if _libc.unshare(CLONE_NEWNET):
            raise NoNamespaces(f"unshare: {os.strerror(ctypes.get_errno())}")
        namespace = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
        try:
            tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
        except OSError as error:
            raise NoNamespaces(f"/dev/net/tun: {error.strerror}") from None
        for command in (
            "link set lo up",
            f"link set {DEVICE} mtu {MTU} up",
            f"address add {address}/24 dev {DEVICE}",
        ):
            subprocess.run(["ip", *command.split()], check=True)
        return Host(address, namespace, tun)

    if not Path("/dev/net/tun").exists():
        raise NoNamespaces("there is no /dev/net/tun")
    return _in_a_thread(make)


def _in_a_thread(work: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _packed(address: str) -> bytes:
    return bytes(map(int, address.split(".")))


def _printed(address: bytes) -> str:
    return ".".join(map(str, address))
