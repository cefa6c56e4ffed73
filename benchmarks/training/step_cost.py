"""A training loop that times its own steps, and how long a call of ping() and a section takes in it.

A step is matrix products of about 20 ms and a one-element all_reduce. Rank 0 does what it is told by the lines of the
FIFO ``$BENCHMARK_REPORTS/turns``, and answers each with a JSON object on the FIFO ``answers``: ``products`` (how many
products make a step), ``steps`` (seconds of each step of a block), ``calls`` (seconds of a ping and of a section),
``end``. The arguments say what wraps the loop (nothing, seamark or nvrx), and how many steps a block has.
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
ORDERS = ("products", "steps", "calls", "end")
CALLS = 100_000


def loop(steps: int, ping: Callable[[], None], section: Callable[[str], object]) -> None:
    matrix = torch.rand(256, 256)
    products = int(os.environ.get("PRODUCTS", 0)) or count_products(matrix)
    # Every process of a run, and every run, does the same work.
    shared = torch.tensor([products])
    dist.broadcast(shared, 0)
    products, one = int(shared), torch.ones(1)

    def step() -> float:
        began = time.perf_counter()
        with section("step"):
            for _ in range(products):
                matrix @ matrix
        dist.all_reduce(one)
        ping()
        return time.perf_counter() - began

    def enter_section() -> None:
        with section("step"):
            pass

    def obey(order: str) -> dict[str, object]:
        if order == "products":
            return {"products": products}
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


def count_products(matrix: torch.Tensor) -> int:
    """How many products make a step."""
    for _ in range(WARM_UP):
        matrix @ matrix
    began = time.perf_counter()
    for _ in range(TIMED):
        matrix @ matrix
    return max(1, round(SECONDS / ((time.perf_counter() - began) / TIMED)))


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
