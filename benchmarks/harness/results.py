"""The result file of a benchmark: JSON, with all that a figure needs to be believed."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from harness import provenance


def opening(benchmark: str, seed: int) -> dict[str, object]:
    """What is known when a benchmark starts."""
    return {
        "benchmark": benchmark,
        **provenance.commit(),
        "start": provenance.now(),
        "command": sys.argv,
        "seed": seed,
        "machine": provenance.machine(),
        "versions": {"python": platform.python_version(), "torch": metadata.version("torch")},
    }


def closing(complete: bool) -> dict[str, object]:
    """What is known when it ends. `complete`: it was not interrupted."""
    return {
        "end": provenance.now(),
        "complete": complete,
        "load_1min_at_end": round(os.getloadavg()[0], 2),
    }


def write(path: Path, result: Mapping[str, object]) -> None:
    """Write the result file whole or not at all. Infinite numbers become null, for want of a word in JSON."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_finite(result), indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
