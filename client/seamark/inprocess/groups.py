"""Which sockets belong to the process groups of this process.

Gloo runs each group on an event loop of its own: an epoll descriptor that watches a pipe, one listening socket and
the connections to the other ranks. The kernel tells what an epoll descriptor watches (``/proc/self/fdinfo``, proc(5)),
so nothing is guessed from ports, and a group can be looked at while it is still being created. What has to be
remembered is which loops came into being during the creation of a group: a hook on torch's constructors does that.

This module refuses to know why anybody wants to cut a socket, and never changes one.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

_WATCHED = re.compile(r"^tfd:\s*(\d+) .*\bino:([0-9a-f]+)", re.MULTILINE)
# SOCK_NONBLOCK keeps Python from applying socket.setdefaulttimeout() to a descriptor that is not its own.
_BORROWED_TYPE = socket.SOCK_STREAM | socket.SOCK_NONBLOCK


class Socket(NamedTuple):
    """A descriptor and the inode it had when it was seen, which tells when the descriptor was closed and reused."""

    fd: int
    inode: int

    @contextmanager
    def borrowed(self) -> Iterator[socket.socket]:
        """The socket as a Python object that leaves the descriptor open.

        Raises OSError when the descriptor is no longer this socket.
        """
        self._check(self.fd)
        borrowed = socket.socket(-1, _BORROWED_TYPE, -1, fileno=self.fd)
        try:
            yield borrowed
        finally:
            borrowed.detach()

    def duplicate(self) -> socket.socket:
        """The same connection on a descriptor of its own, which outlives the owner's ``close``.

        Only for a connection whose owner takes it out of its epoll set before closing it; else the set would go on
        reporting it to a handler that is gone. Raises OSError when the descriptor is no longer this socket.
        """
        fd = os.dup(self.fd)
        try:
            self._check(fd)
            return socket.socket(-1, _BORROWED_TYPE, -1, fileno=fd)
        except OSError:
            os.close(fd)
            raise

    def _check(self, fd: int) -> None:
        if _socket_inode(fd) != self.inode:
            raise OSError(f"descriptor {self.fd} is no longer the socket with inode {self.inode}")

    def peer(self) -> Any:
        """The address that the socket is connected to, None when it is not."""
        try:
            with self.borrowed() as connected:
                return connected.getpeername()
        except OSError:
            return None


class GlooLoop(NamedTuple):
    """The event loop of one Gloo group: an epoll descriptor, known again by the listener that it watches."""

    epoll_fd: int
    listener: Socket

    def connections(self) -> list[Socket]:
        """The sockets watched besides the listener; none when the loop has ended or its descriptor was reused."""
        watched = _watched(self.epoll_fd)
        if self.listener not in watched:
            return []
        return [s for s in watched if s != self.listener and _socket_inode(s.fd) == s.inode]


class Creation:
    """One creation of a group by ``size`` ranks, in the calling thread, since the monotonic time ``since``."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.thread = threading.get_ident()
        self.since = time.monotonic()
        self._before = frozenset(s.inode for s in open_sockets())

    def loops(self) -> list[GlooLoop]:
        """The event loops that came into being since the creation began, as far as they exist by now."""
        return [loop for loop in _gloo_loops() if loop.listener.inode not in self._before]


class GroupWatch:
    """Sees every process group come into being, in whatever thread.

    ``begins`` is called before each creation and may raise to refuse it; ``ends`` after each, also after one that
    failed or was refused. An interrupt of the thread can get between the end of a creation and ``ends``.
    """

    def __init__(self, begins: Callable[[Creation], None], ends: Callable[[Creation, Any], None]) -> None:
        self._begins = begins
        self._ends = ends
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        """Hook torch's constructors of process groups. Raises RuntimeError when this was done already."""
        import torch.distributed.distributed_c10d as c10d

        if self._undo:
            raise RuntimeError("the process group hook is installed already: call uninstall() first")
        bind = inspect.signature(c10d._new_process_group_helper).bind
        self._hook(c10d, "_new_process_group_helper", lambda *a, **k: bind(*a, **k).arguments["group_size"])
        self._hook(c10d.ProcessGroup, "split_group", lambda parent, ranks, *_, **__: len(ranks))

    def uninstall(self) -> None:
        """Put torch's own constructors back; groups created meanwhile are left alone."""
        while self._undo:
            self._undo.pop()()

    def _hook(self, owner: Any, name: str, size: Callable[..., int]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def create(*args: Any, **kwargs: Any) -> Any:
            creation = Creation(size(*args, **kwargs))
            made: Any = None
            try:
                self._begins(creation)
                made = original(*args, **kwargs)
                return made
            finally:
                self._ends(creation, made)

        setattr(owner, name, create)
        self._undo.append(lambda: setattr(owner, name, original))


def open_sockets() -> list[Socket]:
    """Every socket that is open in this process."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        inode = _socket_inode(int(name))
        if inode is not None:
            found.append(Socket(int(name), inode))
    return found


def _socket_inode(fd: int) -> int | None:
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_ino if stat.S_ISSOCK(status.st_mode) else None


def _watched(epoll_fd: int) -> list[Socket]:
    try:
        with open(f"/proc/self/fdinfo/{epoll_fd}") as info:
            return [Socket(int(fd), int(inode, 16)) for fd, inode in _WATCHED.findall(info.read())]
    except OSError:
        return []


def _gloo_loops() -> Iterator[GlooLoop]:
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") != "anon_inode:[eventpoll]":
                continue
        except OSError:
            continue
        listener = _gloo_listener(_watched(int(name)))
        if listener is not None:
            yield GlooLoop(int(name), listener)


def _gloo_listener(watched: list[Socket]) -> Socket | None:
    # Pipes and TCP sockets only, and exactly one of them listening: asyncio and ZeroMQ wake themselves by a Unix
    # socket or an eventfd, and so does the server of a TCPStore.
    listeners = []
    pipes = 0
    for member in watched:
        try:
            status = os.fstat(member.fd)
            if status.st_ino != member.inode:
                continue
            if stat.S_ISFIFO(status.st_mode):
                pipes += 1
            elif not stat.S_ISSOCK(status.st_mode):
                return None
            else:
                with member.borrowed() as connected:
                    if connected.family not in (socket.AF_INET, socket.AF_INET6):
                        return None
                    if connected.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        listeners.append(member)
        except OSError:
            continue  # closed since the list was read
    return listeners[0] if pipes and len(listeners) == 1 else None
