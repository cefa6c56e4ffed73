"""A virtual environment for a peer's package, so that it never meets the one the benchmark runs in.

The package has an environment of its own; torch is borrowed from the present one through a .pth file, so
that all systems run the same torch and nobody's disk holds it twice.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


class PeerUnavailable(Exception):
    """The peer could not be installed or imported; the text is the last line of what was said about it."""


@dataclass(frozen=True)
class Peer:
    """An installed peer: its interpreter, its environment's `bin`, its version."""

    python: Path
    version: str

    def script(self, name: str) -> str:
        """The path of a command that the peer installed."""
        return str(self.python.parent / name)


def default_directory(package: str) -> Path:
    """Where the environment of a package is kept between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "seamark" / "bench" / package


def _run(*arguments: str) -> str:
    answer = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        said = (answer.stderr.strip() or answer.stdout.strip() or "no message").splitlines()
        raise PeerUnavailable(said[-1])
    return answer.stdout.strip()


def _version(python: Path, package: str, module: str) -> str:
    code = f"import {module}, importlib.metadata; print(importlib.metadata.version({package!r}))"
    return _run(str(python), "-W", "ignore", "-c", code).splitlines()[-1]


def ensure(directory: Path, package: str, module: str) -> Peer:
    """Return `package` as installed in the environment at `directory`, made and filled by pip when missing.

    `module` is imported as the proof that it works with the borrowed torch. Raises PeerUnavailable.
    """
    python = directory / "bin" / "python"
    if not python.exists():
        _run(sys.executable, "-m", "venv", str(directory))
    try:
        return Peer(python, _version(python, package, module))
    except PeerUnavailable:
        pass
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        raise PeerUnavailable("torch is not installed in the environment that runs the benchmark")
    purelib = _run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(purelib, "borrowed_torch.pth").write_text(f"{Path(torch.origin).parents[1]}\n")
    _run(str(python), "-m", "pip", "install", "--quiet", package)
    return Peer(python, _version(python, package, module))
