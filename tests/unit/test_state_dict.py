"""What ranks share through the job's store (``call.state_dict``): on real stores, by several clients."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from seamark.store import counters
from seamark.store.state_dict import MAX_BYTES, StateDict


@pytest.fixture
def store() -> Iterator[Any]:
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client_of(store: Any) -> Any:
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", store.port, is_master=False)


def shared(client: Any, known: str = "", incarnation: str = "first") -> tuple[StateDict, list[tuple[int, str]]]:
    told: list[tuple[int, str]] = []
    made = StateDict(known, lambda version, text: told.append((version, text)))
    made.bind(client, incarnation)
    return made, told


def test_what_one_puts_all_get(store: Any) -> None:
    (one, told), (other, _) = shared(client_of(store)), shared(client_of(store))
    assert dict(one) == {}
    one["seen"] = {"samples": [1, 2.5, None, True], "name": "ä"}
    other["epoch"] = 3
    assert dict(one) == dict(other) == {"seen": {"samples": [1, 2.5, None, True], "name": "ä"}, "epoch": 3}
    del one["seen"]
    assert list(other) == ["epoch"]
    assert [version for version, _ in told] == [1, 3]
    assert json.loads(told[-1][1])["values"] == {"epoch": 3}
    with pytest.raises(KeyError):
        other["seen"]


def test_no_change_is_lost_however_many_change_at_once(store: Any) -> None:
    changers = [shared(client_of(store))[0] for _ in range(4)]

    def change(number: int) -> None:
        for count in range(25):
            changers[number][f"{number}-{count}"] = count

    threads = [threading.Thread(target=change, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(changers[0]) == 100


def test_a_new_store_is_given_the_latest_that_anybody_knows(store: Any) -> None:
    from torch.distributed import TCPStore

    (one, told), (other, _) = shared(client_of(store)), shared(client_of(store))
    one["step"] = 1
    _, early = told[-1]
    other["step"] = 2
    fresh = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    one.bind(client_of(fresh), "second")
    other.bind(client_of(fresh), "second")
    late, _ = shared(client_of(fresh), known=early, incarnation="second")
    assert one["step"] == other["step"] == late["step"] == 2


def test_a_process_that_starts_on_an_empty_store_brings_what_it_was_given(store: Any) -> None:
    text = json.dumps({"version": 7, "values": {"step": 70}}, separators=(",", ":"))
    given, told = shared(client_of(store), known=text)
    assert given["step"] == 70
    given["step"] = 80
    assert told[-1][0] == 8


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, {1, 2}, b"bytes", float("nan"), object()])
def test_what_json_does_not_give_back_is_refused(store: Any, value: object) -> None:
    one, _ = shared(client_of(store))
    with pytest.raises(TypeError, match=r"call.state_dict\['key'\]"):
        one["key"] = value


def test_too_much_is_refused_and_changes_nothing(store: Any) -> None:
    one, told = shared(client_of(store))
    one["small"] = 1
    with pytest.raises(ValueError, match=f"{MAX_BYTES} are allowed"):
        one["large"] = "x" * MAX_BYTES
    assert dict(one) == {"small": 1}
    assert len(told) == 1


def test_between_iterations_it_is_out_of_reach(store: Any) -> None:
    one, _ = shared(client_of(store))
    one.unbind()
    with pytest.raises(RuntimeError, match="out of reach between iterations"):
        one["key"]


def test_the_keys_of_earlier_iterations_go(store: Any) -> None:
    for iteration in (0, 1, 99, 100):
        store.set(f"iteration_{iteration}_pg/rank_0", "x")
        counters.announce(store, iteration=iteration, restarts=0, ranks=2)
    store.set("iteration_of_mine", "x")
    counters.forget_before(store, 100)
    keys = sorted(key for key in store.list_keys() if not key.startswith("init/"))
    assert keys == [
        "global_iteration_counter",
        "iteration_100_pg/rank_0",
        "iteration_100_ranks_restart_counter",
        "iteration_of_mine",
        "job_restart_counter",
    ]
