"""Which ports a job may get: MASTER_PORT for scripts, and MASTER_PORT + 2 for the job's store (D8).

They lie outside the range from which the kernel gives ports to outgoing connections, where a pair that was free a
moment ago could be taken by any client of the host.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from pathlib import Path

from seamark.environment import STORE_OFFSET

LOWEST = 20_000
TRIES = 64


class PortsTaken(Exception):
    """No pair of ports is free; the sentence says what to do."""

    def __init__(self, fixed: int, host: str) -> None:
        if fixed:
            super().__init__(
                f"port {fixed} or {fixed + STORE_OFFSET} on {host} is in use (MASTER_PORT and the job's store): "
                "choose another --master-port, or leave it out to have a free pair chosen"
            )
        else:
            super().__init__(f"no free pair of ports from {LOWEST} on was found on {host}")


def candidates(host: str, fixed: int) -> Iterator[int]:
    """Values of MASTER_PORT to try, in order; only ``fixed`` if a person asked for it."""
    if fixed:
        ports = [fixed]
    else:
        ceiling = _lowest_ephemeral() - STORE_OFFSET - 1
        ports = random.sample(range(LOWEST, ceiling), min(TRIES, ceiling - LOWEST))
    for port in ports:
        if _is_free(host, port) and _is_free(host, port + STORE_OFFSET):
            yield port


def _lowest_ephemeral() -> int:
    return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True
