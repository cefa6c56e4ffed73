"""Messages to frames and back: one decoder, total over all bytes.

A message is two frames: a header of four bytes (``SM``, protocol version, message type) and a msgpack body.
Whatever arrives, ``decode`` returns a message or raises ``ProtocolError`` with a reason code; it knows no
socket and keeps no state. Bodies are unpacked under small limits, because msgpack can expand a frame many
times over, and validated field by field.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgpack
import msgspec

from seamark.protocol.messages import TYPES, VERSION, Message

MAGIC = b"SM"
MAX_BODY = 8 << 20
"""Bytes of the largest body; sockets are told the same limit (ZMQ_MAXMSGSIZE)."""
MAX_ITEMS = 200_000
SMALL_BODY = 65_536
"""Bytes of a body that is decoded to its type in one pass; a larger one is unpacked under ``MAX_ITEMS`` first."""

_encode_body = msgspec.msgpack.Encoder().encode
_decoders = {number: msgspec.msgpack.Decoder(kind) for number, kind in TYPES.items()}


class Reason(StrEnum):
    """Why bytes are not a message. One counter each."""

    FRAME_COUNT = "frame_count"
    HEADER = "header"
    VERSION = "version"
    UNKNOWN_TYPE = "unknown_type"
    TOO_LARGE = "too_large"
    MSGPACK = "msgpack"
    FIELDS = "fields"


class ProtocolError(Exception):
    """Bytes that are not a message of this protocol.

    Attributes:
        reason: the code under which it is counted.
    """

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def encode(message: Message) -> list[bytes]:
    """The two frames of a message. Environment values that are not UTF-8 travel by surrogate escapes."""
    try:
        return [_HEADERS[message.type_id], _encode_body(message)]
    except UnicodeEncodeError:
        body = msgpack.packb(msgspec.to_builtins(message), unicode_errors="surrogateescape")
        return [_HEADERS[message.type_id], body]


_HEADERS = {number: MAGIC + bytes((VERSION, number)) for number in TYPES}


def decode(frames: Sequence[bytes]) -> Message:
    """The message in these frames (without ZeroMQ's routing id).

    Raises:
        ProtocolError: for anything else, with the reason.
    """
    if len(frames) != 2:
        raise ProtocolError(Reason.FRAME_COUNT, f"a message has 2 frames, this one has {len(frames)}")
    header, body = frames
    if len(header) != 4 or header[:2] != MAGIC:
        raise ProtocolError(Reason.HEADER, "the header is not that of a Seamark message")
    if header[2] != VERSION:
        raise ProtocolError(
            Reason.VERSION,
            f"the peer speaks protocol version {header[2]}, this side speaks {VERSION}: upgrade the older one",
        )
    kind = TYPES.get(header[3])
    if kind is None:
        raise ProtocolError(Reason.UNKNOWN_TYPE, f"no message has type {header[3]}")
    if len(body) > MAX_BODY:
        raise ProtocolError(Reason.TOO_LARGE, f"{kind.__name__}: body of {len(body)} bytes, {MAX_BODY} are allowed")
    if len(body) <= SMALL_BODY:
        try:
            message: Message = _decoders[header[3]].decode(body)
            return message
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass  # what follows says what is wrong with it, or takes its surrogate escapes
    try:
        fields = msgpack.unpackb(
            body,
            raw=False,
            unicode_errors="surrogateescape",
            strict_map_key=True,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_str_len=MAX_BODY,
            max_bin_len=0,
            max_ext_len=0,
        )
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(Reason.MSGPACK, f"{kind.__name__}: not msgpack within the limits ({error})") from None
    try:
        return msgspec.convert(fields, type=kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(Reason.FIELDS, f"{kind.__name__}: {error}") from None
