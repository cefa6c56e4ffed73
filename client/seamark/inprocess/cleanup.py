"""What a failed iteration leaves behind, besides its process groups: the exception.

A kept traceback holds every frame it passed through, and with them a DistributedDataParallel, its reducer, its
threads and a socket: three threads and a socket per restart. So the exception becomes text, and its frames are
cleared along the whole chain of causes.
"""

from __future__ import annotations

import re
import traceback

from seamark.protocol.messages import Cause

TEXT_LIMIT = 8_000
_PEER_WENT_AWAY = re.compile(
    r"gloo/transport|Connection closed by peer|Connection reset by peer|Broken pipe|"
    r"connection was closed|Socket is not connected|NCCL communicator was aborted|remote process exited"
)


def describe(error: BaseException) -> Cause:
    """The cause that an exception tells, as text; marked if it only says that a peer went away."""
    text = "".join(traceback.format_exception(error))
    summary = "".join(traceback.format_exception_only(error)).strip()
    return Cause(
        kind="exception",
        text=f"{summary}\n{text}"[:TEXT_LIMIT],
        communication=is_communication_error(error),
    )


def is_communication_error(error: BaseException) -> bool:
    """True for the errors by which torch.distributed says that another rank is gone."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"DistNetworkError", "DistStoreError", "IterationAborted", "StoreUnreachableError"}:
        return True
    return isinstance(error, RuntimeError) and _PEER_WENT_AWAY.search(str(error)) is not None


def let_go(error: BaseException) -> None:
    """Clears the frames of an exception and of all that caused it, and drops their tracebacks."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if one.__traceback__ is not None:
            traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None
        waiting += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
