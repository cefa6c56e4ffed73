"""Directories of keys for tests, made by the functions that ``seamark keys`` uses."""

from __future__ import annotations

from pathlib import Path

from seamark.protocol.keys import Key, read, write
from seamark.protocol.sockets import new_pair


def make(directory: Path, role: str, name: str) -> Key:
    """A new key, in the directory."""
    public, secret = new_pair()
    daemon = public if role == "daemon" else read(directory / "daemon.key").public
    key = Key(name, role, public, secret, daemon)  # type: ignore[arg-type]
    assert write(directory, key)
    return key


def keyring(directory: Path, **names: str) -> Path:
    """A new directory with the daemons' key, and those that are named, by name and role."""
    directory.mkdir(mode=0o700)
    make(directory, "daemon", "daemon")
    for name, role in names.items():
        make(directory, role, name)
    return directory
