"""With how many threads a worker's libraries compute."""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType


def use_threads(count: int) -> None:
    """Make the libraries compute with `count` threads, in a forked worker as in an exec'ed one.

    They read the number when they are loaded, which for a forked worker was in the keeper, with 1. It decides
    in which order sums are made, and so their last bits.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
    else:
        sys.meta_path.insert(0, ThreadsOfTorch(count))
    blas = os.environ.get("OPENBLAS_NUM_THREADS", "")
    blas_count = int(blas) if blas.isdecimal() else count
    if "numpy" in sys.modules and blas_count > 1:
        set_openblas_threads(blas_count)


class ThreadsOfTorch(importlib.abc.MetaPathFinder):
    """Sets the number of threads right after the script imported torch, and is gone."""

    def __init__(self, count: int) -> None:
        self._count = count

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            module.set_num_threads(self._count)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def set_openblas_threads(count: int) -> None:
    """Do now what OpenBLAS does with its variables when it is loaded."""
    count = min(count, len(os.sched_getaffinity(0)))
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "openblas" in line}
    for library in map(ctypes.CDLL, paths):
        for name in ("openblas_set_num_threads", "openblas_set_num_threads64_"):
            for symbol in (name, f"scipy_{name}"):
                if hasattr(library, symbol):
                    getattr(library, symbol)(count)
