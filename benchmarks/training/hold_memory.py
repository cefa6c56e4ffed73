"""A rank that holds memory and sleeps: how soon is its death seen, whatever the kernel has to free?"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import seamark

PAGE = 4_096


@seamark.Wrapper()
def main(call: seamark.CallWrapper) -> None:
    memory = bytearray(int(sys.argv[1]))
    for page in range(0, len(memory), PAGE):
        memory[page] = 1
    report = {"pid": os.getpid(), "at": time.monotonic(), "iteration": call.iteration}
    with Path(os.environ["BENCHMARK_REPORTS"], "holding").open("a") as file:
        file.write(json.dumps(report) + "\n")
    while True:
        time.sleep(3_600.0)


if __name__ == "__main__":
    main()
