"""The server of a job's TCPStore, and the socket that it listens on."""

from __future__ import annotations

import ctypes
import errno
import importlib
import ipaddress
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

from .requests import Refused


@dataclass
class Store:
    """The server of a job's TCPStore, on a listening socket that the keeper holds, too."""

    host: str
    port: int
    listener: int

    def command_line(self) -> list[str]:
        return [sys.executable, "-m", "torch.distributed.TCPStore", self.host, str(self.port)]

    def run(self, serving: Callable[[], None] = lambda: None) -> None:
        # Slurm sends it to every process of a job: ranks that save then, and who waits for them, need their store.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        look_up_hosts_in_files()
        distributed = importlib.import_module("torch.distributed")
        # The server brings a client of its own, which must have an address to go to.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        store = distributed.TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=self.listener
        )
        serving()
        while store is not None:
            signal.pause()


def look_up_hosts_in_files() -> None:
    """Ask no name server in this process.

    The store looks the name of every client up when it accepts it, on the thread that serves all of them: with a slow
    resolver the whole job waits for seconds, for a name that only a log would show.
    """
    configure = getattr(ctypes.CDLL(None), "__nss_configure_lookup", None)
    if configure is not None:
        configure(b"hosts", b"files")


def listen(host: str, port: int) -> socket.socket:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError as error:
        # A name look-up can take seconds, and all of the keeper with it.
        sentence = f"host must be a numeric address of this node, not {host[:80]!r}"
        raise Refused("bad_host", sentence) from error
    sock = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if version == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((host, port))
        sock.listen(socket.SOMAXCONN)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise Refused("port_in_use", f"port {port} of {host} is in use by another process") from error
        raise Refused("bad_host", f"can't listen on port {port} of {host}: {error.strerror}") from error
    return sock
