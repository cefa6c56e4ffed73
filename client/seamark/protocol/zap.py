"""ZeroMQ's question whether a peer may connect (ZAP, RFC 27), answered from an allow-list; frames in, frames out.

Who is not on the list is told to come again (300), for it may be on it later; a peer that is told 400 never asks again,
and that is for a revoked key. The ``User-Id`` of whoever may connect is its public key, not its name: a name that is
given to another key must give nothing to the connections of the one before.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import NamedTuple

from seamark.protocol.keys import AllowList

ENDPOINT = "inproc://zeromq.zap.01"
VERSION = b"1.0"
CURVE_FRAMES = 7
"""Version, request, domain, address, identity, mechanism, and the one credential: the key's 32 bytes."""
_TO_Z85 = bytes.maketrans(
    b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~",
    b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#",
)


class Answer(NamedTuple):
    """The frames to answer with; and, for who is refused, the code to count it under, why, and the peer's address."""

    frames: list[bytes]
    reason: str = ""
    sentence: str = ""
    address: str = ""


def answer(frames: Sequence[bytes], allowed: AllowList) -> Answer:
    """The answer to one question of libzmq."""
    request = frames[1] if len(frames) > 1 else b""
    if len(frames) != CURVE_FRAMES or frames[0] != VERSION or frames[5] != b"CURVE" or len(frames[6]) != 32:
        return Answer(_frames(request, b"400", b"a key is wanted"), "unknown_key", "a peer without a key")
    public = z85(frames[6])
    if allowed.find(public) is not None:
        return Answer(_frames(request, b"200", b"", public))
    address = frames[3].decode(errors="replace")
    name = allowed.was_revoked(public)
    if name:
        return Answer(_frames(request, b"400", b"revoked"), "revoked_key", f"the key {name} was revoked", address)
    return Answer(_frames(request, b"300", b"unknown"), "unknown_key", f"nobody knows the key {public}", address)


def z85(key: bytes) -> str:
    """A key's 32 bytes as text."""
    return base64.b85encode(key).translate(_TO_Z85).decode()


def _frames(request: bytes, status: bytes, text: bytes, user: str = "") -> list[bytes]:
    return [VERSION, request, status, text, user.encode(), b""]
