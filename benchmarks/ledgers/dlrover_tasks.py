"""DLRover's task manager, in process: so many tasks got and reported, by so many workers in turn. Prints a JSON line.

Runs in the peer's own environment; nothing of it is durable, and no socket stands before it.
"""

from __future__ import annotations

import json
import logging
import sys
import time

from dlrover.proto import elastic_training_pb2
from dlrover.python.common.comm import TaskResult
from dlrover.python.master.monitor.perf_monitor import PerfMonitor
from dlrover.python.master.shard.dataset_splitter import new_dataset_splitter
from dlrover.python.master.shard.task_manager import TaskManager


def main(workers: int, seconds: float) -> None:
    """Measures for so many seconds."""
    logging.disable(logging.CRITICAL)
    manager = TaskManager(3_600, PerfMonitor())
    size = 10_000_000
    splitter = new_dataset_splitter(
        shuffle=False, shard_size=10, dataset_size=size, num_epochs=1, dataset_name="d", storage_type="table"
    )
    manager.new_dataset(10, size, "d", splitter, elastic_training_pb2.TRAINING)
    done = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for worker in range(workers):
            task = manager.get_dataset_task("worker", worker, "d")
            manager.report_dataset_task(TaskResult("d", task.task_id, ""), True)
            done += 1
    print(json.dumps({"per_second": done / (time.perf_counter() - began), "done": done}))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
