"""A training loop that times its own steps, and how long a call of ping() and a section takes in it.

A step is matrix products of about 20 ms and a one-element all_reduce. Rank 0 writes one JSON object to the file
``$BENCHMARK_REPORTS/costs``. The first argument says what wraps the loop: nothing, seamark or nvrx.
"""

import json
import os
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist

SECONDS = 0.02
WARM_UP = 20
TIMED = 200
CALLS = 100_000


def loop(steps: int, ping: Callable[[], None] | None, section: Callable[[str], object]) -> None:
    matrix = torch.rand(256, 256)
    for _ in range(WARM_UP):
        matrix @ matrix
    began = time.perf_counter()
    for _ in range(TIMED):
        matrix @ matrix
    products = max(1, round(SECONDS / ((time.perf_counter() - began) / TIMED)))
    # Every process of a run, and every run, does the same work.
    products = int(os.environ.get("PRODUCTS", products))
    shared = torch.tensor([products])
    dist.broadcast(shared, 0)
    products, samples, one = int(shared), [], torch.ones(1)
    for _ in range(WARM_UP + steps):
        began = time.perf_counter()
        with section("step"):
            for _ in range(products):
                matrix @ matrix
        dist.all_reduce(one)
        if ping is not None:
            ping()
        samples.append(time.perf_counter() - began)
    line = {"wrapped_by": sys.argv[1], "products": products, "step": statistics.median(samples[WARM_UP:])}
    if ping is not None:

        def enter_section() -> None:
            with section("step"):
                pass

        line["ping"] = min(timeit.repeat(ping, number=CALLS, repeat=5)) / CALLS
        line["section"] = min(timeit.repeat(enter_section, number=CALLS, repeat=5)) / CALLS
    if dist.get_rank() == 0:
        path = os.path.join(os.environ["BENCHMARK_REPORTS"], "costs")
        with open(f"{path}.part", "w") as file:
            file.write(json.dumps(line))
        os.rename(f"{path}.part", path)
    dist.barrier()


def main() -> None:
    steps = int(sys.argv[2])
    torch.set_num_threads(1)
    if sys.argv[1] == "nothing":
        dist.init_process_group("gloo")
        loop(steps, None, lambda _: nullcontext())
        dist.destroy_process_group()
        return
    if sys.argv[1] == "seamark":
        import seamark

        @seamark.Wrapper()
        def train(call: seamark.CallWrapper) -> None:
            dist.init_process_group("gloo")
            loop(steps, call.ping, seamark.section)

        train()
        return
    import nvidia_resiliency_ext.inprocess as inprocess

    @inprocess.Wrapper(store_kwargs={"port": int(os.environ["MASTER_PORT"]) + 2})
    def train_there(call: inprocess.CallWrapper | None = None) -> None:
        assert call is not None
        dist.init_process_group("gloo")
        loop(steps, call.ping, lambda _: nullcontext())
        dist.destroy_process_group()

    train_there()


if __name__ == "__main__":
    main()
