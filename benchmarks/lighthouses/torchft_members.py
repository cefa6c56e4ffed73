"""Replicas of torchft in one process: each order is a round in which all of them ask for a quorum.

Runs in torchft's environment. Its client's call blocks, so each replica has a thread, as well as a client, of its own.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

os.environ.setdefault("PYTHONWARNINGS", "ignore")

from torchft.coordination import LighthouseClient

PATIENCE = timedelta(seconds=30)


def main() -> None:
    """Take the first order, connect, then one round for each line."""
    order = json.loads(sys.stdin.readline())
    names = order["names"]
    with ThreadPoolExecutor(len(names)) as pool:
        clients = list(pool.map(lambda _: LighthouseClient(order["address"], PATIENCE), names))
        released = threading.Barrier(len(names))
        print(json.dumps({"ready": len(names)}), flush=True)
        for line in sys.stdin:
            if json.loads(line).get("introduce"):
                list(pool.map(lambda client, name: client.heartbeat(name), clients, names))
                answer: dict[str, object] = {"introduced": len(names)}
            else:
                step = json.loads(line)["round"]

                def ask(client: LighthouseClient, name: str, step: int = step) -> tuple[float, float, Any]:
                    released.wait()
                    joined = time.monotonic()
                    quorum = client.quorum(name, PATIENCE, "127.0.0.1:1", "127.0.0.1:1", step, 1)
                    return joined, time.monotonic(), quorum

                answers = list(pool.map(ask, clients, names))
                last = answers[-1][2]
                answer = {
                    "joined": max(joined for joined, _, _ in answers),
                    "answered": max(answered for _, answered, _ in answers),
                    "quorum_id": last.quorum_id,
                    "participants": len(last.participants),
                    "resets": 0,
                }
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
