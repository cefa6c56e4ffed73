"""Heartbeats for torchft's lighthouse, by its own client, from the threads of one process.

Runs in torchft's environment. With an interval of 0 each thread beats for its replica as fast as it is answered; else
each thread beats for many replicas in turn, so that each of them is heard once an interval.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import threading
import time
from datetime import timedelta

os.environ.setdefault("PYTHONWARNINGS", "ignore")

from torchft.coordination import LighthouseClient

PATIENCE = timedelta(seconds=10)


class Beater(threading.Thread):
    """One client and the replicas it beats for."""

    def __init__(self, address: str, names: list[str], interval: float) -> None:
        super().__init__(daemon=True)
        self._client = LighthouseClient(address, PATIENCE)
        self._names = names
        self._step = interval / len(names)
        self.latencies: list[float] = []
        self.late: list[float] = []

    def run(self) -> None:
        """Beat until the process ends."""
        due = time.monotonic()
        while True:
            for name in self._names:
                if self._step:
                    time.sleep(max(0.0, due - time.monotonic()))
                    self.late.append(time.monotonic() - due)
                    # What is overdue by a quarter of a second is not made up for.
                    due = max(due + self._step, time.monotonic() - 0.25)
                began = time.monotonic()
                self._client.heartbeat(name, PATIENCE)
                self.latencies.append(time.monotonic() - began)


def spread(samples: list[float]) -> dict[str, float]:
    """Median, 99th percentile (nearest rank) and maximum; empty without samples."""
    ordered = sorted(samples)
    if not ordered:
        return {}
    return {"p50": ordered[len(ordered) // 2], "p99": ordered[math.ceil(0.99 * len(ordered)) - 1], "max": ordered[-1]}


def cpu_seconds() -> float:
    """Processor time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Take the order, connect, beat; report on each window that is asked for."""
    order = json.loads(sys.stdin.readline())
    names, clients = order["names"], order["clients"]
    beaters = [Beater(order["address"], names[index::clients], order["interval"]) for index in range(clients)]
    for beater in beaters:
        beater.start()
    print(json.dumps({"ready": clients}), flush=True)
    for line in sys.stdin:
        began, used = time.monotonic(), cpu_seconds()
        first = [(len(beater.latencies), len(beater.late)) for beater in beaters]
        time.sleep(json.loads(line)["measure"])
        wall, cpu = time.monotonic() - began, cpu_seconds() - used
        latencies = [one for beater, (begin, _) in zip(beaters, first, strict=True) for one in beater.latencies[begin:]]
        late = [one for beater, (_, begin) in zip(beaters, first, strict=True) for one in beater.late[begin:]]
        report = {
            "seconds": wall,
            "cpu_seconds": cpu,
            "sent": len(latencies),
            "answered": len(latencies),
            "strangers": 0,
            "refused": 0,
            "refusal": "",
            "held_back": 0,
            "probes": 0,
            "answer": spread(latencies),
            "late": spread(late),
        }
        print(json.dumps(report), flush=True)
    os._exit(0)  # its threads are in calls that end nowhere else


if __name__ == "__main__":
    main()
