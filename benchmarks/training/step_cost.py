"""A training loop that times its own steps, and how long a call of ping() and a section takes in it.

A step is matrix products of about 20 ms, always as many and into the same memory, and a one-element all_reduce. Rank
0 does what it is told by the lines of the FIFO ``$BENCHMARK_REPORTS/turns``, and answers each with a JSON object on the
FIFO ``answers``: ``about`` (how many products make a step, and the process ids of all ranks), ``steps`` (seconds of
each step of a block), ``calls`` (seconds of a ping and of a section), ``end``. The arguments say what wraps the loop
(nothing, seamark or nvrx), and how many steps a block has.
"""

import json
import os
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TextIO

import torch
import torch.distributed as dist

SECONDS = 0.02
WARM_UP = 20
TIMED = 200
BLOCKS = 20
ORDERS = ("about", "steps", "calls", "end")
SIZE = 128
"""Of the matrices: all three stay in a core's own cache, wherever their pages lie."""
CALLS = 100_000


def loop(steps: int, ping: Callable[[], None], section: Callable[[str], object]) -> None:
    matrix, product = torch.rand(SIZE, SIZE), torch.empty(SIZE, SIZE)
    products = int(os.environ.get("PRODUCTS", 0)) or count_products(matrix, product)
    # Every process of a run, and every run, does the same work.
    shared = torch.tensor([products])
    dist.broadcast(shared, 0)
    products, one = int(shared), torch.ones(1)
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(pids, torch.tensor([os.getpid()]))

    def step() -> float:
        began = time.perf_counter()
        with section("step"):
            for _ in range(products):
                torch.mm(matrix, matrix, out=product)
        dist.all_reduce(one)
        ping()
        return time.perf_counter() - began

    def enter_section() -> None:
        with section("step"):
            pass

    def obey(order: str) -> dict[str, object]:
        if order == "about":
            return {"products": products, "pids": [int(pid) for pid in pids]}
        if order == "steps":
            return {"steps": [step() for _ in range(steps)]}
        calls = {"ping": ping, "section": enter_section}
        return {name: min(timeit.repeat(call, number=CALLS, repeat=5)) / CALLS for name, call in calls.items()}

    for _ in range(WARM_UP):
        step()
    with nullcontext((None, None)) if dist.get_rank() else fifos() as (turns, answers):
        while True:
            told = torch.tensor([ORDERS.index(turns.readline().strip()) if turns else 0])
            dist.broadcast(told, 0)
            if ORDERS[int(told)] == "end":
                return
            answer = obey(ORDERS[int(told)])
            if answers:
                print(json.dumps(answer), file=answers, flush=True)


def count_products(matrix: torch.Tensor, product: torch.Tensor) -> int:
    """How many products make a step; by the fastest of several blocks, which nobody disturbed."""

    def block() -> None:
        torch.mm(matrix, matrix, out=product)

    return max(1, round(SECONDS / (min(timeit.repeat(block, number=TIMED, repeat=BLOCKS)) / TIMED)))


@contextmanager
def fifos() -> Iterator[tuple[TextIO, TextIO]]:
    """Where rank 0 hears what to do and answers; the others hear it from rank 0."""
    turns, answers = (os.path.join(os.environ["BENCHMARK_REPORTS"], name) for name in ("turns", "answers"))
    os.mkfifo(answers)
    os.mkfifo(turns)
    with open(turns) as heard, open(answers, "w") as said:
        yield heard, said


def main() -> None:
    steps = int(sys.argv[2])
    torch.set_num_threads(1)
    if sys.argv[1] == "nothing":
        dist.init_process_group("gloo")
        loop(steps, lambda: None, lambda _: nullcontext())
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
