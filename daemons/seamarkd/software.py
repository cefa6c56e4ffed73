"""Which Seamark this is."""

from __future__ import annotations

import functools


@functools.cache
def software() -> str:
    """Name and version, for people; looked up when somebody asks, which takes a tenth of a daemon's start."""
    from importlib.metadata import version

    return f"seamark {version('seamark')}"
