"""The lighthouse: membership, quorum, failure broadcast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seamarkd.lighthouse.embedded import Served as Served
    from seamarkd.lighthouse.embedded import serve as serve

__all__ = ["Served", "serve"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from seamarkd.lighthouse import embedded

        return getattr(embedded, name)
    raise AttributeError(f"module 'seamarkd.lighthouse' has no attribute {name!r}")
