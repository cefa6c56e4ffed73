"""What a ZeroMQ listener says of itself before any key is asked for: whether it has keys.

ZMTP 3 begins with a greeting of 64 bytes in the clear, and the mechanism is in it (rfc.zeromq.org/spec/37). Who has no
key, or the wrong one, hears nothing else: a daemon answers strangers with silence.
"""

from __future__ import annotations

import socket
from typing import Literal

Mechanism = Literal["", "NULL", "CURVE"]
TIMEOUT = 1.0
SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
VERSION = b"\x03\x00"
MECHANISM = slice(12, 32)
"""Where it is in a greeting, behind signature and version, filled up with zeros."""


def mechanism(address: str, timeout: float = TIMEOUT) -> Mechanism:
    """Whether who listens there has keys.

    Args:
        address: ``tcp://HOST:PORT`` to connect to; of another kind nothing is said.
        timeout: seconds for each step.

    Returns:
        ``CURVE`` if it has, ``NULL`` if not; empty if nobody answers, or nobody who speaks ZMTP 3.
    """
    if not address.startswith("tcp://"):
        return ""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout) as connection:
            # Not all of a greeting: one of another mechanism would be answered by a closed connection.
            connection.sendall(SIGNATURE + VERSION)
            heard = b""
            while len(heard) < MECHANISM.stop:
                part = connection.recv(64)
                if not part:
                    return ""
                heard += part
    except (OSError, UnicodeError):  # UnicodeError: a name that can't be one of a host
        return ""
    said = heard[MECHANISM].rstrip(b"\0")
    known: dict[bytes, Mechanism] = {b"NULL": "NULL", b"CURVE": "CURVE"}
    return known.get(said, "") if heard.startswith(SIGNATURE[:1]) else ""
