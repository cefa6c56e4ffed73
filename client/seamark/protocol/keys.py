"""Keys as files: this process's own pair, and the list of those who may speak.

A directory of mode 0700 holds a file of mode 0600 per key: ``NAME.key`` (TOML) with both halves of the pair, its role,
and the public half of the daemons' key, which says that the daemon is the right one. The daemons' own directory is at
the same time their allow-list. A revoked key is ``NAME.TIME.revoked``: whatever else is in the directory, that pair is
refused. The list is read again whenever the directory has changed. Knows no socket.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
import tempfile
import time
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from seamark.environment import SECURITY_KEYS
from seamark.protocol.authority import KeyRole, Refusal, refusal
from seamark.protocol.messages import Message

log = logging.getLogger(__name__)

KEY, REVOKED = ".key", ".revoked"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
Z85 = r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}"
"""32 bytes in the alphabet of ZeroMQ's RFC 32."""
MODES = {True: (0o700, "chmod 700"), False: (0o600, "chmod 600")}

Half = Annotated[str, msgspec.Meta(pattern=f"^{Z85}$")]


class KeysError(ValueError):
    """A directory or file of keys can't be used; the sentence names it and says what to do."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pair, whose it is, and how its owner knows the daemons.

    ``daemon`` is the public half of the lighthouse's and the coordinator's key. The name of a node's key is the node's.
    """

    name: Annotated[str, msgspec.Meta(pattern=f"^{NAME}$")]
    role: KeyRole
    public: Half
    secret: Half
    daemon: Half

    def __repr__(self) -> str:
        """Without the secret half: this may reach a log."""
        return f"Key({self.name!r}, {self.role!r}, {self.public!r})"


def read(path: Path) -> Key:
    """The key in this file.

    Raises:
        KeysError: it can't be read, others can read it, or it is no key.
    """
    try:
        _check_private(path)
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Key)
    except OSError as error:
        raise KeysError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        if isinstance(error, KeysError):
            raise
        raise KeysError(f"{path}: is no key ({error}): make one with seamark keys add") from None


def write(directory: Path, key: Key) -> bool:
    """Writes a key's file, whole or not at all; False if there is one of this name, which stays as it is.

    Raises:
        OSError: the directory can't be written.
    """
    lines = [f'{name} = "{value}"\n' for name, value in msgspec.structs.asdict(key).items()]
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=".new-")  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("# A key of a Seamark suite. Whoever reads it can speak in its name.\n")
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, directory / f"{key.name}{KEY}")
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    return True


def revoke(directory: Path, name: str) -> Path:
    """Takes a key off the allow-list, in one step; returns the file that keeps it off.

    Raises:
        OSError: there is none of this name, or the directory can't be written.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    # Never onto the file of another key of this name, which would be let in again.
    revoked = directory / f"{name}.{stamp}-{secrets.token_hex(4)}{REVOKED}"
    os.rename(directory / f"{name}{KEY}", revoked)
    return revoked


def check_directory(directory: Path) -> None:
    """Whether secrets are safe in this directory.

    Raises:
        KeysError: it is not there, belongs to somebody else, or others can read it.
    """
    try:
        owner = directory.stat().st_uid
        _check_private(directory)
    except OSError as error:
        raise KeysError(f"{directory}: can't be read: {error.strerror}: make it with seamark keys init") from None
    if owner not in (os.geteuid(), 0):
        raise KeysError(f"{directory}: belongs to user {owner}, who could let anybody in: use a directory of your own")


def own(directory: Path, role: KeyRole, name: str = "") -> Key:
    """The key that this process speaks with.

    Args:
        directory: where it is.
        role: what it has to be for.
        name: its name; by default the role's, else that of the only key of the role.

    Raises:
        KeysError: there is none, there are several, it was revoked, or the directory can't be used.
    """
    check_directory(directory)
    if name:
        found = {name: directory / f"{name}{KEY}"} if (directory / f"{name}{KEY}").exists() else {}
    else:
        found = {path.stem: path for path in sorted(directory.glob(f"*{KEY}")) if _role(path) == role}
    chosen = found.get(name or role) or (next(iter(found.values())) if len(found) == 1 else None)
    wanted = f"key {name or 'of role ' + role}"
    if chosen is None and found:
        raise KeysError(f"{directory}: which {wanted}? There are {', '.join(found)}: leave only your own here")
    if chosen is None:
        how = f"on the head, seamark keys {_made_by(role, name)}; then copy its file here"
        raise KeysError(f"{directory}: there is no {wanted}: {how}")
    key = read(chosen)
    if key.role != role:
        raise KeysError(f"{chosen}: this key has the role {key.role}, not {role}: give that one another name")
    if AllowList(directory).find(key.public) is None:
        raise KeysError(f"{chosen}: this key was revoked: on the head, seamark keys {_made_by(role, name)}")
    return key


def client_key(environ: Mapping[str, str] = os.environ) -> Key | None:
    """The key of a manager, a listener or a monitor; None where no keys are used.

    Raises:
        KeysError: ``$SEAMARK_SECURITY_KEYS`` names a directory in which it is not.
    """
    directory = environ.get(SECURITY_KEYS)
    return own(Path(directory), "client") if directory else None


class AllowList:
    """Who may speak: the keys of a directory, as they are now.

    Args:
        directory: it is read at once, and whenever ``refresh`` finds it changed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: frozenset[tuple[str, int]] | None = None
        self._keys: dict[str, Key] = {}
        self._by_file: dict[str, Key] = {}
        self._revoked: dict[str, str] = {}
        self.refresh()

    def refresh(self) -> list[str]:
        """Looks whether the directory has changed; the names of the keys whose owners may speak no longer.

        A file that can't be read now counts as it was, so that an awkward copy throws nobody out.
        """
        try:
            with os.scandir(self._directory) as entries:
                seen = frozenset((entry.name, entry.inode()) for entry in entries)
        except OSError as error:
            log.warning("%s: can't be read, its keys stay as they were: %s", self._directory, error.strerror)
            return []
        if seen == self._seen:
            return []
        self._seen = seen
        names = {name for name, _ in seen}
        before = self._keys
        self._revoked |= {key.public: key.name for key in self._read(names, REVOKED).values()}
        self._by_file = self._read(names, KEY)
        self._keys = {key.public: key for key in self._by_file.values() if key.public not in self._revoked}
        return sorted(key.name for public, key in before.items() if public not in self._keys)

    def find(self, public: str) -> Key | None:
        """The key with this public half, if its owner may speak."""
        return self._keys.get(public)

    def was_revoked(self, public: str) -> str:
        """The name of the revoked key with this public half; empty if there is none."""
        return self._revoked.get(public, "")

    def refusal(self, public: str, message: Message) -> Refusal | None:
        """Whether the owner of this key may send this message now; None if so."""
        key = self._keys.get(public)
        if key is None:
            name = self._revoked.get(public, "")
            return Refusal("revoked_key", f"the key {name or public} is not allowed here any more")
        return refusal(key.role, key.name, message)

    def _read(self, names: Iterable[str], suffix: str) -> dict[str, Key]:
        found: dict[str, Key] = {}
        for name in sorted(name for name in names if name.endswith(suffix)):
            try:
                found[name] = read(self._directory / name)
            except KeysError as error:
                log.warning("%s", error)
                if name in self._by_file:
                    found[name] = self._by_file[name]
        return found


def _role(path: Path) -> str:
    """The role of a key; what can't be read has none, and is nobody's own."""
    try:
        return read(path).role
    except KeysError:
        return ""


def _made_by(role: KeyRole, name: str) -> str:
    return "init" if role == "daemon" else f"add {name or role}" + (f" --role {role}" if role != "node" else "")


def _check_private(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        wanted, command = MODES[path.is_dir()]
        raise KeysError(f"{path}: is open to others (mode {mode:o}, not {wanted:o}): {command} {path}")
