"""What a power cut can leave of a directory, by the order in which it was written and synced.

Whatever was written to a file before its last sync is there. Of what was written since, any part may be: any of the
writes, and of each any of its sectors, for the page cache is written back in any order. The same holds for names: what
was created, renamed or removed before the last sync of the directory is so, and of what came later any part.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

SECTOR = 512


class Write(NamedTuple):
    """Bytes at a place of a file."""

    file: int
    offset: int
    data: bytes


class Truncate(NamedTuple):
    """A file ends here from now on."""

    file: int
    size: int


class Sync(NamedTuple):
    """What was written to this file is on disk."""

    file: int


class Create(NamedTuple):
    """A new file of this name, in the place of one that had it."""

    name: str
    file: int


class Rename(NamedTuple):
    """As rename(2)."""

    old: str
    new: str


class Remove(NamedTuple):
    """As unlink(2)."""

    name: str


class SyncDirectory(NamedTuple):
    """What was done to names is on disk."""


class Note(NamedTuple):
    """So much was acknowledged: somebody was told that it is durable."""

    what: str
    number: int


Change = Write | Truncate
Move = Create | Rename | Remove
Event = Change | Move | Sync | SyncDirectory | Note


def image(events: Iterable[Event], chance: random.Random) -> dict[str, bytes]:
    """One of the directories that there may be after a power cut behind these events.

    Returns:
        The contents of the files, by name.
    """
    files: dict[int, bytearray] = defaultdict(bytearray)
    names: dict[str, int] = {}
    written: dict[int, list[Change]] = defaultdict(list)
    moved: list[Move] = []
    for event in events:
        match event:
            case Write(file=file) | Truncate(file=file):
                written[file].append(event)
            case Sync(file):
                for change in written.pop(file, []):
                    _apply(files[file], change)
            case Create() | Rename() | Remove():
                moved.append(event)
            case SyncDirectory():
                for move in moved:
                    _move(names, move)
                moved.clear()
            case Note():
                pass
    for file, changes in written.items():
        for change in _survivors(changes, chance):
            _apply(files[file], change)
    for move in _some(moved, chance):
        _move(names, move)
    return {name: bytes(files[file]) for name, file in names.items()}


def _some(moves: list[Move], chance: random.Random) -> list[Move]:
    share = chance.choice([0.0, 0.5, 1.0])
    return [move for move in moves if chance.random() < share]


def _survivors(changes: list[Change], chance: random.Random) -> list[Change]:
    """Those of a file's unsynced changes that reached the disk, some of them in part."""
    kept, torn = chance.choice([(0.0, 0.0), (1.0, 0.0), (0.5, 0.0), (0.5, 0.5), (0.9, 0.2), (1.0, 0.1)])
    survivors: list[Change] = []
    for change in changes:
        if chance.random() >= kept:
            continue
        if isinstance(change, Write) and chance.random() < torn:
            survivors += [sector for sector in _sectors(change) if chance.random() < 0.5]
        else:
            survivors.append(change)
    return survivors


def _sectors(write: Write) -> list[Write]:
    found = []
    at = write.offset
    end = at + len(write.data)
    while at < end:
        stop = min(end, (at // SECTOR + 1) * SECTOR)
        found.append(Write(write.file, at, write.data[at - write.offset : stop - write.offset]))
        at = stop
    return found


def _apply(content: bytearray, change: Change) -> None:
    if isinstance(change, Truncate):
        del content[change.size :]
        content.extend(bytes(change.size - len(content)))
        return
    content.extend(bytes(max(0, change.offset - len(content))))
    content[change.offset : change.offset + len(change.data)] = change.data


def _move(names: dict[str, int], move: Move) -> None:
    match move:
        case Create(name, file):
            names[name] = file
        case Rename(old, new) if old in names:
            names[new] = names.pop(old)
        case Remove(name):
            names.pop(name, None)
        case _:
            # The file was never there under its old name.
            pass
