"""Subscribers of a lighthouse in one process: when had the last of them been told of a failure?

Each is a ``seamark.FailureListener`` with a connection of its own. For each failure one line, once all of them have it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import ExitStack
from typing import Any

from seamark.listener import FailureListener
from seamark.listening import Delivery
from seamark.protocol.messages import FailureEvent

CONNECTING = 30.0


class Told:
    """When each failure was delivered, to how many."""

    def __init__(self, subscribers: int) -> None:
        self._subscribers = subscribers
        self._lock = threading.Lock()
        self._times: dict[str, list[float]] = {}

    def on_failure(self, delivery: Delivery) -> None:
        """One subscriber was told."""
        at = time.monotonic()
        if not isinstance(delivery, FailureEvent):
            raise SystemExit(f"a subscriber got {delivery}")
        failure = delivery.failure
        with self._lock:
            times = self._times.setdefault(f"{failure.kind} {failure.incarnation}", [])
            times.append(at)
            if len(times) < self._subscribers:
                return
        line: dict[str, Any] = {
            "kind": failure.kind,
            "job": delivery.job,
            "member": failure.member,
            "node": failure.node,
            "cause": failure.cause.kind,
            "detector": failure.detector,
            "occurred": failure.occurred_at,
            "detected": failure.detected_at,
            "published": failure.published_at,
            "first": min(times),
            "last": max(times),
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    """Take the order, subscribe, and go on until the input ends."""
    order = json.loads(sys.stdin.readline())
    told = Told(order["subscribers"])
    with ExitStack() as listening:
        for _ in range(order["subscribers"]):
            listener = FailureListener(order["lighthouse"], order["events"], on_failure=told.on_failure)
            listening.enter_context(listener)
            if not listener.wait_ready(CONNECTING):
                raise SystemExit("no lighthouse answers")
        print(json.dumps({"ready": order["subscribers"]}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
