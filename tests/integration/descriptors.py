"""A process that is short of file descriptors."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def descriptors(spare: int) -> Iterator[None]:
    """Within this block no more than so many can be opened."""
    lowest = [os.open(os.devnull, os.O_RDONLY) for _ in range(spare + 1)]
    for one in lowest:
        os.close(one)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(lowest), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
