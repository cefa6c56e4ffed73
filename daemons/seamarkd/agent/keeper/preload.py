"""Importing the job's modules ahead of its workers, up to the first that makes a fork unsafe."""

from __future__ import annotations

import ctypes
import gc
import importlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from .forkable import why_unsafe_to_fork

# torch._dynamo is what the first DistributedDataParallel imports anyway, at a cost of seconds.
PRELOAD = ("numpy", "torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo", "seamark.inprocess.wrapper")
# Whose absence is no fault: the job's interpreter needn't have them.
OPTIONAL = ("seamark.inprocess.wrapper",)

# madvise(2), since Linux 6.1, whatever the system's setting of transparent huge pages is.
MADV_COLLAPSE = 25
HUGE_PAGE_BYTES = 2 << 20


@dataclass
class Preloaded:
    """What was imported ahead of the workers (name, seconds), and why they can't be forked from it, if so."""

    modules: list[tuple[str, float]] = field(default_factory=list)
    culprit: str | None = None
    reason: str | None = None


def preload(names: Iterable[str]) -> Preloaded:
    """Import the modules one by one, up to the first that makes a fork unsafe."""
    done = Preloaded()
    # The imports leave little garbage; looking for it takes a seventh of their time.
    gc.disable()
    for name in names:
        began = time.monotonic()
        try:
            importlib.import_module(name)
        except Exception as error:
            if name in OPTIONAL and isinstance(error, ModuleNotFoundError):
                continue
            done.reason = f"importing {name} failed: {type(error).__name__}: {error}"
        else:
            done.modules.append((name, time.monotonic() - began))
            done.reason = why_unsafe_to_fork(f"importing {name}")
        if done.reason:
            done.culprit = name
            break
    # Frozen, what is here stays unwritten by the garbage collector of a child, and so isn't copied.
    gc.collect()
    gc.freeze()
    gc.enable()
    use_huge_pages()
    return done


def use_huge_pages() -> None:
    """Move the memory filled so far into huge pages, of which a fork copies one entry each instead of 512.

    With torch loaded that is a fork of 4 ms instead of 15. A kernel that can't (Linux < 6.1) refuses, and nothing
    is lost.
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with open("/proc/self/maps") as maps:
        mappings = [line.split() for line in maps]
    for addresses, permissions, _, _, _, *name in mappings:
        if permissions == "rw-p" and name in ([], ["[heap]"]):
            begin, end = (int(address, 16) for address in addresses.split("-"))
            begin += -begin % HUGE_PAGE_BYTES
            end -= end % HUGE_PAGE_BYTES
            if begin < end:
                madvise(begin, end - begin, MADV_COLLAPSE)
