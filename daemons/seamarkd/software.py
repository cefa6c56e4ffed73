"""Which Seamark this is."""

from __future__ import annotations

from importlib.metadata import version

SOFTWARE = f"seamark {version('seamark')}"
