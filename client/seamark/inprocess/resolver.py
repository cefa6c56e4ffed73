"""Doing without name servers for a moment, in one thread.

Torch looks up the name of the peer of every TCPStore connection that it makes, only to have it for its logs. With a
slow or unreachable name server each look-up takes five seconds, on the path of a restart. The state of glibc's
resolver belongs to a thread, and programs may change it (resolver(3)): so the thread that connects points it at a
port where nobody listens, and the look-up fails at once. Other threads, and this one afterwards, are not affected.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Iterator
from contextlib import contextmanager

_CLOSED_PORT = 1
_MAX_SERVERS = 3


class _ServerAddress(ctypes.Structure):
    _fields_ = (
        ("family", ctypes.c_uint16),
        ("port", ctypes.c_uint16),
        ("address", ctypes.c_uint32),
        ("zero", ctypes.c_uint8 * 8),
    )


class _ResolverState(ctypes.Structure):
    """The beginning of ``struct __res_state`` (resolv/bits/types/res_state.h), unchanged since glibc 2.2."""

    _fields_ = (
        ("retrans", ctypes.c_int),
        ("retry", ctypes.c_int),
        ("options", ctypes.c_ulong),
        ("server_count", ctypes.c_int),
        ("servers", _ServerAddress * _MAX_SERVERS),
    )


@contextmanager
def no_name_server() -> Iterator[None]:
    """Within this block name look-ups of this thread ask no server; those in ``/etc/hosts`` still succeed.

    Without glibc it does nothing.
    """
    libc = ctypes.CDLL(None)
    try:
        initialise, state_of_thread = libc.__res_init, libc.__res_state
    except AttributeError:
        yield
        return
    state_of_thread.restype = ctypes.POINTER(_ResolverState)
    initialise()
    state = state_of_thread().contents
    before = bytes(state)
    closed = _ServerAddress(socket.AF_INET, socket.htons(_CLOSED_PORT), socket.htonl(socket.INADDR_LOOPBACK))
    state.server_count = 1
    state.servers[0] = closed
    try:
        yield
    finally:
        ctypes.memmove(ctypes.byref(state), before, len(before))
