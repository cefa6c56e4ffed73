"""The counters of a job in its TCPStore, and the key space of an iteration (D4, D8).

Rank 0 of an iteration sets them before it enters; everybody may read them. Nothing here computes an iteration.
"""

from __future__ import annotations

import re
from typing import Any

GLOBAL_ITERATION = "global_iteration_counter"
JOB_RESTARTS = "job_restart_counter"


def ranks_restarted(iteration: int) -> str:
    """The key that says how many ranks entered this iteration."""
    return f"iteration_{iteration}_ranks_restart_counter"


def process_group_prefix(iteration: int) -> str:
    """The prefix under which this iteration's process groups meet."""
    return f"iteration_{iteration}_pg"


def announce(store: Any, *, iteration: int, restarts: int, ranks: int) -> None:
    """Sets the counters, and reads one back: a ``set`` on a store that just died returns as if it had worked.

    Args:
        store: a TCPStore client.
        iteration: the iteration about to be entered.
        restarts: restarts of either kind so far.
        ranks: ranks that enter.

    Raises:
        torch.distributed.DistError: the store is gone.
    """
    store.set(JOB_RESTARTS, str(restarts))
    store.set(ranks_restarted(iteration), str(ranks))
    store.set(GLOBAL_ITERATION, str(iteration))
    store.get(GLOBAL_ITERATION)


def forget_before(store: Any, iteration: int) -> None:
    """Deletes the key spaces of all iterations before this one, which nobody can be in any more.

    Raises:
        torch.distributed.DistError: the store is gone.
    """
    if not hasattr(store, "list_keys"):
        # Before torch 2.11 a store can't be asked what it holds.
        return
    for key in store.list_keys():
        number = _KEY.match(key)
        if number is not None and int(number[1]) < iteration:
            store.delete_key(key)


_KEY = re.compile(r"iteration_(\d+)_")
