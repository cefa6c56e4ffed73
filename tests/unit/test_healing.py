"""What a returning replica may rely on when it fetches a state, and what the giving one may when it takes it back."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import socket
import struct
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seamark.replicas import healing
from seamark.replicas.healing import HealingError, StateServer, fetch_state, pack

PATIENCE = 60.0
LARGE = 32 << 20  # bytes: more than the buffers of a connection hold


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.002)


def serving_threads() -> int:
    return sum(thread.name == "seamark-healing" for thread in threading.enumerate())


def sockets() -> set[str]:
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    before = sockets()
    yield
    assert serving_threads() == 0
    assert sockets() <= before


@pytest.fixture
def server() -> Iterator[StateServer]:
    server = StateServer()
    yield server
    server.close()


def fetch(server: StateServer, quorum_id: int = 1, step: int = 1, timeout: float = PATIENCE) -> Any:
    return fetch_state(server.address, quorum_id=quorum_id, step=step, timeout=timeout)


def sent(state: object) -> Any:
    """A state after its way over a connection."""
    server = StateServer()
    try:
        server.offer(1, 1, lambda: state)
        return fetch(server)
    finally:
        server.close()


def bits(tensor: torch.Tensor) -> bytes:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    if tensor.numel():
        carrier = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[
            tensor.itemsize
        ]
        copy.view(carrier).copy_(tensor.resolve_conj().resolve_neg().cpu().view(carrier))
        return bytes(copy.view(carrier).reshape(-1).view(torch.uint8).numpy())
    return b""


def same(left: object, right: object) -> bool:
    """Equal, and of the same types all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)
    if isinstance(left, dict) and isinstance(right, dict):
        keys = zip(left, right, strict=False)
        return len(left) == len(right) and all(same(a, b) and same(left[a], right[b]) for a, b in keys)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, float) and isinstance(right, float):
        return struct.pack("d", left) == struct.pack("d", right)
    return left == right


# --- what arrives is what was offered

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**200), max_value=2**200)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(st.characters(exclude_categories=()), max_size=20)
    | st.binary(max_size=20)
)
keys = st.text(max_size=8) | st.integers(min_value=-(2**80), max_value=2**80)
plain_data = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=25,
)


@settings(max_examples=150)
@given(state=plain_data)
def test_plain_data_keeps_its_values_and_types(state: object) -> None:
    assert same(sent(state), state)


@pytest.mark.parametrize("number", [2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 2**4000, -(2**4000)])
def test_an_int_of_any_size(number: int) -> None:
    assert same(sent({"n": number, number: "key"}), {"n": number, number: "key"})


def test_the_order_of_a_dict_stays() -> None:
    assert list(sent({"b": 1, 7: 2, "a": 3, -7: 4})) == ["b", 7, "a", -7]


SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda base: base,
    "scalar": lambda base: base[1, 2],
    "empty": lambda base: base[:0],
    "transposed": lambda base: base.t(),
    "every other": lambda base: base[:, ::2],
    "expanded": lambda base: base[0, 0].expand(3, 2),
    "offset": lambda base: base[1:],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("ignore:.*ComplexHalf|BComplex32.*")
def test_a_tensor_of_any_type_and_shape(shape: str) -> None:
    def tensor_of(dtype: torch.dtype) -> torch.Tensor:
        content = random.Random(0).randbytes(4 * 6 * dtype.itemsize)
        if dtype is torch.bool:
            content = bytes(byte & 1 for byte in content)
        base = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype).reshape(4, 6)
        return SHAPES[shape](base)

    state = {name: tensor_of(dtype) for name, dtype in healing.DTYPES.items()}
    assert {"bfloat16", "bool", "float8_e4m3fn", "complex64", "uint64"} <= state.keys()
    assert not any(name.startswith(("q", "torch")) for name in state)
    arrived = sent(state)
    assert same(arrived, state)
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in arrived.values())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        torch.tensor([math.nan, math.inf, -0.0]),
        torch.empty(0, 5, 0),
        torch.ones(2, requires_grad=True) * 2,
    ],
    ids=["conjugated", "negated", "channels last", "nan", "empty", "with a gradient"],
)
def test_a_tensor_that_is_not_just_its_memory(tensor: torch.Tensor) -> None:
    arrived = sent(tensor)
    assert arrived.shape == tensor.shape
    assert torch.equal(arrived.nan_to_num(7.0), tensor.detach().nan_to_num(7.0))
    assert not arrived.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_on_a_gpu_arrives_on_the_cpu() -> None:
    tensor = torch.arange(1000, dtype=torch.bfloat16, device="cuda")[::3]
    arrived = sent({"t": tensor})["t"]
    assert arrived.device.type == "cpu"
    assert same(arrived, tensor.cpu())


def test_the_default_device_of_the_fetcher_does_not_matter() -> None:
    with torch.device("meta"):
        arrived = sent({"t": torch.ones(3, device="cpu")})
    assert arrived["t"].tolist() == [1, 1, 1]


def test_a_module_and_its_optimizer_go_on_as_the_source_would() -> None:
    def trained(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(steps)
        module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        optimizer = torch.optim.AdamW(module.parameters())
        for _ in range(steps):
            advance(module, optimizer)
        return module, optimizer

    def advance(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(torch.arange(12.0).reshape(3, 4)).square().sum().backward()
        optimizer.step()

    source, target = trained(3), trained(1)
    arrived = sent({"module": source[0].state_dict(), "optimizer": source[1].state_dict()})
    assert type(arrived["module"]) is OrderedDict
    assert arrived["module"]._metadata == source[0].state_dict()._metadata  # type: ignore[attr-defined]
    target[0].load_state_dict(arrived["module"])
    target[1].load_state_dict(arrived["optimizer"])
    for module, optimizer in (source, target):
        advance(module, optimizer)
    assert same(target[0].state_dict(), source[0].state_dict())
    assert same(target[1].state_dict(), source[1].state_dict())


# --- what cannot be sent


class Mine:
    pass


class MyDict(dict[str, int]):
    pass


def cycle() -> list[object]:
    own: list[object] = []
    own.append(own)
    return own


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"optimizer": {"x": Mine()}}, r'state\["optimizer"\]\["x"\] is test_healing.Mine: '),
        ([1, ({2: {3}},)], r"state\[1\]\[0\]\[2\] is set: "),
        (Mine, r"state is type: "),
        ({"d": MyDict()}, r'state\["d"\] is test_healing.MyDict: '),
        ({"n": np.float64(1)}, r'state\["n"\] is numpy.float64: '),
        ({"n": np.zeros(3)}, r'state\["n"\] is numpy.ndarray: '),
        ({"s": torch.Size([1])}, r'state\["s"\] is torch.Size: '),
        ({"p": torch.nn.Parameter(torch.ones(1))}, r'state\["p"\] is torch.nn.parameter.Parameter: .*detach'),
        ({"a": {(1, 2): 3}}, r'state\["a"\] is a dict with a key of type tuple: keys are str or int'),
        ({"a": {True: 3}}, r'state\["a"\] is a dict with a key of type bool: keys are str or int'),
        ({"m": torch.ones(1, device="meta")}, r'state\["m"\] is a torch.strided tensor of torch.float32 on meta: '),
        ({"m": torch.eye(2).to_sparse()}, r'state\["m"\] is a torch.sparse_coo tensor of torch.float32 on cpu: '),
        (cycle(), r"state(\[0\]){100} is nested too deeply: 100 levels are allowed, and no cycle"),
        ({'quo"ted': Mine()}, r'state\["quo\\"ted"\] is '),
    ],
)
def test_the_path_and_the_type_of_what_cannot_be_sent(state: object, sentence: str, server: StateServer) -> None:
    with pytest.raises(TypeError, match=f"^{sentence}"):
        pack(state)
    server.offer(1, 1, lambda: state)
    with pytest.raises(HealingError, match=f"its state cannot be sent: TypeError: {sentence}"):
        fetch(server)


def test_a_hundred_levels_can_be_sent() -> None:
    state: object = {"tensor": torch.ones(2), 2**80: (2**90,)}
    for _ in range(98):
        state = [state]
    assert same(sent(state), state)


def test_too_much_plain_data_cannot_be_sent(monkeypatch: pytest.MonkeyPatch, server: StateServer) -> None:
    monkeypatch.setattr(healing, "HEADER_LIMIT", 1000)
    server.offer(1, 1, lambda: b"x" * 1000)
    with pytest.raises(HealingError, match="takes 1003 bytes, 1000 are allowed: put what is large into tensors"):
        fetch(server)


def test_what_the_callable_raises_is_told_once_to_all(server: StateServer, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def state() -> object:
        calls.append(1)
        raise KeyError("no such part")

    server.offer(1, 1, state)
    for _ in range(2):
        with pytest.raises(HealingError, match="its state cannot be sent: KeyError: 'no such part'"):
            fetch(server)
    assert len(calls) == 1
    assert "The state of quorum 1 at step 1 cannot be sent" in caplog.text


# --- which state is offered, and when


def test_a_fetch_waits_for_the_offer(server: StateServer) -> None:
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(fetch, server, 7, 30)
        until(lambda: serving_threads() == 2)
        assert not future.done()
        server.offer(7, 30, lambda: "state")
        assert future.result(PATIENCE) == "state"


def test_an_offer_of_something_else_ends_the_waiting(server: StateServer) -> None:
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(fetch, server, 7, 30)
        until(lambda: serving_threads() == 2)
        server.offer(8, 30, lambda: "state")
        with pytest.raises(HealingError, match="it offers quorum 8 at step 30"):
            future.result(PATIENCE)


@pytest.mark.parametrize(("quorum_id", "step"), [(6, 30), (8, 30), (7, 29), (7, 31)])
def test_a_fetch_of_something_else_is_refused(server: StateServer, quorum_id: int, step: int) -> None:
    server.offer(7, 30, lambda: pytest.fail("nobody wanted this"))
    sentence = (
        f"^The state of quorum {quorum_id} at step {step} could not be fetched from {server.address}: "
        "it offers quorum 7 at step 30.$"
    )
    with pytest.raises(HealingError, match=sentence):
        fetch(server, quorum_id, step)


def test_what_was_withdrawn_is_refused_and_what_may_come_is_waited_for(server: StateServer) -> None:
    server.offer(7, 30, lambda: "state")
    assert server.withdraw(0) == 0
    for quorum_id, step in [(7, 30), (7, 29), (6, 99)]:
        with pytest.raises(HealingError, match="it offers nothing now, and quorum 7 at step 30 no longer"):
            fetch(server, quorum_id, step)
    with pytest.raises(HealingError, match="took longer than 0.1 s"):
        fetch(server, 7, 31, timeout=0.1)
    server.offer(7, 30, lambda: "again")
    assert fetch(server, 7, 30) == "again"


def test_withdrawing_nothing_refuses_nothing(server: StateServer) -> None:
    assert server.withdraw(0) == 0
    server.offer(0, 0, lambda: "state")
    assert fetch(server, 0, 0) == "state"


def test_the_state_is_made_once_per_offer_and_only_when_wanted(server: StateServer) -> None:
    calls: list[str] = []

    def state() -> object:
        calls.append(threading.current_thread().name)
        return len(calls)

    server.offer(1, 1, state)
    server.offer(1, 2, state)
    assert calls == []
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: fetch(server, 1, 2), range(8))) == [1] * 8
    assert calls == ["seamark-healing"]
    server.offer(1, 2, state)
    assert fetch(server, 1, 2) == 2


def test_a_withdrawn_state_is_let_go(server: StateServer) -> None:
    class Owner:
        def state(self) -> object:
            return torch.ones(10)

    owner = Owner()
    gone = weakref.ref(owner)
    server.offer(1, 1, owner.state)
    del owner
    assert fetch(server).sum() == 10
    gc.collect()
    assert gone() is not None
    server.withdraw(PATIENCE)

    def collected() -> bool:
        gc.collect()
        return gone() is None

    until(collected)


# --- transfers under way


@contextmanager
def stalled(server: StateServer, quorum_id: int = 1, step: int = 1) -> Iterator[tuple[socket.socket, int]]:
    """A fetcher that read the skeleton and then nothing more; with the bytes that are still to come."""
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(healing.REQUEST.pack(healing.ASKS, quorum_id, step, PATIENCE))
        _, kind, length = healing.ANSWER.unpack(exactly(connection, healing.ANSWER.size))
        assert kind == healing.STATE
        skeleton = msgpack.unpackb(exactly(connection, length), use_list=False)
        assert skeleton[:2] == (healing.TENSOR, "uint8")
        yield connection, skeleton[2]


def exactly(connection: socket.socket, count: int) -> bytes:
    content = b""
    while len(content) < count:
        more = connection.recv(count - len(content))
        assert more
        content += more
    return content


def rest(connection: socket.socket) -> int:
    """How many bytes come until the connection ends."""
    total = 0
    try:
        while count := len(connection.recv(1 << 20)):
            total += count
    except ConnectionResetError:
        pass
    return total


def large() -> torch.Tensor:
    return torch.zeros(LARGE, dtype=torch.uint8)


def test_withdrawing_waits_for_a_transfer(server: StateServer) -> None:
    server.offer(1, 1, large)
    with stalled(server) as (connection, coming), ThreadPoolExecutor(1) as pool:
        withdrawing = pool.submit(server.withdraw, PATIENCE)
        with pytest.raises(HealingError, match="it offers nothing now"):
            until(lambda: fetch(server, step=1, timeout=0.2) is None)
        assert not withdrawing.done()
        assert rest(connection) == coming
        assert withdrawing.result(PATIENCE) == 0


def test_withdrawing_cuts_a_transfer_that_takes_too_long(server: StateServer, caplog: pytest.LogCaptureFixture) -> None:
    server.offer(1, 1, large)
    with stalled(server) as (connection, coming):
        assert server.withdraw(0.01) == 1
        assert server.withdraw(0.01) == 0
        assert rest(connection) < coming
    assert "1 transfers that took longer than 0.01 s were cut" in caplog.text
    server.offer(2, 1, lambda: "next")
    assert fetch(server, 2) == "next"


def test_no_fetch_ends_with_a_mixture(server: StateServer) -> None:
    """The tensors change right after each withdrawal: whoever got a state got one of a single moment."""
    parameters = torch.zeros(LARGE // 8, dtype=torch.int64)
    random_times = random.Random(1)
    outcomes: list[bool] = []

    def one_fetch(step: int) -> None:
        try:
            arrived = fetch(server, 1, step)
        except HealingError:
            outcomes.append(False)
        else:
            outcomes.append(True)
            assert int(arrived.min()) == int(arrived.max()) == step

    with ThreadPoolExecutor(1) as pool:
        for step in range(12):
            parameters.fill_(step)
            server.offer(1, step, lambda: parameters)
            future = pool.submit(one_fetch, step)
            # The moment of the cut is part of what is tried: before, in and after the transfer.
            if step == 0:
                future.result(PATIENCE)
            server.withdraw(random_times.uniform(0, 0.02))
            parameters.fill_(-1)
            future.result(PATIENCE)
    assert len(outcomes) == 12
    assert outcomes[0]


def test_closing_cuts_a_transfer(server: StateServer) -> None:
    server.offer(1, 1, large)
    with stalled(server) as (connection, coming):
        server.close()
        assert serving_threads() == 0
        assert rest(connection) < coming


def test_closing_ends_the_waiting(server: StateServer) -> None:
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(fetch, server)
        until(lambda: serving_threads() == 2)
        server.close()
        with pytest.raises(HealingError, match=r"could not be fetched from .*: (the connection|it is closing)"):
            future.result(PATIENCE)


def test_closing_twice_and_what_is_refused_then() -> None:
    before = sockets()
    server = StateServer()
    server.offer(1, 1, lambda: "state")
    assert fetch(server) == "state"
    server.close()
    server.close()
    assert serving_threads() == 0
    assert sockets() == before
    assert server.withdraw(0) == 0
    with pytest.raises(RuntimeError, match="is closed and offers nothing more"):
        server.offer(1, 1, lambda: "state")
    with pytest.raises(HealingError, match="nobody listens there"):
        fetch(server)


def test_a_callable_that_hangs_does_not_hold_up_closing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(healing, "CLOSE_TIMEOUT", 0.05)
    called, free = threading.Event(), threading.Event()

    def state() -> object:
        called.set()
        free.wait(PATIENCE)
        return "too late"

    server = StateServer()
    server.offer(1, 1, state)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(fetch, server)
        assert called.wait(PATIENCE)
        server.close()
        with pytest.raises(HealingError, match="the connection"):
            future.result(PATIENCE)
    assert "A fetch did not end within 0.05 s" in caplog.text
    free.set()
    until(lambda: serving_threads() == 0)


def test_sixteen_are_served_at_once_and_more_wait(server: StateServer) -> None:
    state = {"tensor": torch.arange(100_000)}
    with ThreadPoolExecutor(24) as pool:
        futures = [pool.submit(fetch, server, 3, 4) for _ in range(24)]
        until(lambda: serving_threads() == 1 + healing.FETCHES_AT_ONCE)
        server.offer(3, 4, lambda: state)
        until(lambda: serving_threads() <= 1 + healing.FETCHES_AT_ONCE and all(map(Future.done, futures)))
        assert all(same(future.result(), state) for future in futures)


def test_a_fetcher_that_left_gives_its_place_back(server: StateServer) -> None:
    host, port = server.address.split(":")
    for _ in range(healing.FETCHES_AT_ONCE):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(healing.REQUEST.pack(healing.ASKS, 1, 1, PATIENCE))
    until(lambda: serving_threads() == 1)


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"SM",
        healing.REQUEST.pack(healing.ASKS, 1, 1, math.nan),
        healing.REQUEST.pack(healing.ASKS, 1, 1, -1.0),
        healing.REQUEST.pack(healing.ASKS, 1, 1, 1e300),
        healing.REQUEST.pack(healing.ANSWERS, 1, 1, 1.0),
    ],
)
def test_a_strange_request_is_hung_up_on(server: StateServer, request_: bytes) -> None:
    server.offer(1, 1, lambda: "state")
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        with contextlib.suppress(OSError):  # it may have hung up already
            connection.sendall(request_)
            connection.shutdown(socket.SHUT_WR)
        assert rest(connection) == 0
    assert fetch(server) == "state"


def test_a_silent_peer_does_not_hold_a_place(server: StateServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healing, "REQUEST_TIMEOUT", 0.05)
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        assert rest(connection) == 0


# --- what the fetcher is told


class Recording:
    """A server that answers every fetch with the same bytes, then hangs up, or just stays."""

    def __init__(self, content: bytes = b"", *, stays: bool = False) -> None:
        self.content = content
        self._stays = stays
        self._left = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Recording:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    exactly(connection, healing.REQUEST.size)
                    connection.sendall(self.content)
                    if self._stays:
                        self._left.wait(PATIENCE)
                except OSError:
                    continue

    def fetch(self, timeout: float = PATIENCE) -> Any:
        return fetch_state(self.address, quorum_id=1, step=1, timeout=timeout)


def stream_of(state: object) -> bytes:
    skeleton, tensors = pack(state)
    return healing.ANSWER.pack(healing.ANSWERS, healing.STATE, len(skeleton)) + skeleton + b"".join(map(bits, tensors))


STATE = {
    "step": 12,
    "rng": (b"abc", 2**70),
    "model": OrderedDict(w=torch.arange(100.0), b=torch.ones(7, dtype=torch.bfloat16)),
    "mask": torch.tensor([True, False, True]),
    "names": ["x", None, 1.5],
}


def test_the_wire_is_what_the_module_says() -> None:
    with Recording(stream_of(STATE)) as recording:
        assert same(recording.fetch(), STATE)


def test_a_stream_that_ends_early_at_any_point() -> None:
    stream = stream_of(STATE)
    with Recording() as recording:
        for length in range(len(stream)):
            recording.content = stream[:length]
            with pytest.raises(HealingError, match="the connection (ended before all had come|was cut)") as caught:
                recording.fetch()
            assert recording.address in str(caught.value)
            assert caught.value.__cause__ is caught.value.__context__ is None  # which would keep what had come


@given(data=st.data())
def test_a_damaged_stream_is_a_healing_error_or_another_state(data: st.DataObject) -> None:
    stream = bytearray(stream_of(STATE))
    skeleton_end = len(stream) - sum(len(bits(tensor)) for tensor in pack(STATE)[1])
    for position in data.draw(st.lists(st.integers(0, skeleton_end - 1), min_size=1, max_size=5)):
        stream[position] = data.draw(st.integers(0, 255))
    with Recording(bytes(stream)) as recording, contextlib.suppress(HealingError):
        recording.fetch()


@given(content=st.binary(max_size=200))
def test_garbage_is_a_healing_error(content: bytes) -> None:
    with Recording(content) as recording, pytest.raises(HealingError):
        recording.fetch()


def header(value: object) -> bytes:
    skeleton = value if isinstance(value, bytes) else msgpack.packb(value)
    return healing.ANSWER.pack(healing.ANSWERS, healing.STATE, len(skeleton)) + skeleton


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "what answers there is no state server"),
        (healing.REQUEST.pack(healing.ASKS, 1, 1, 1.0), "what answers there is no state server"),
        (healing.ANSWER.pack(healing.ANSWERS, 3, 5), "what answers there is no state server"),
        (healing.ANSWER.pack(healing.ANSWERS, healing.STATE, 0), "what answers there is no state server"),
        (healing.ANSWER.pack(healing.ANSWERS, healing.STATE, 2**60), "what answers there is no state server"),
        (healing.ANSWER.pack(healing.ANSWERS, healing.REFUSED, 2**20), "what answers there is no state server"),
        (healing.ANSWER.pack(healing.ANSWERS, healing.REFUSED, 3) + b"no\xff", "no\ufffd"),
        (header(b"\xc1"), "the skeleton is not msgpack"),
        (header(b"\x01\x02"), "the skeleton is not msgpack"),
        (header(b"\x91" * 5000), "the skeleton is not msgpack"),
        (header(b"\xa2\xff\xff"), "the skeleton is not msgpack"),
        (header({}), "something that is no value"),
        (header({"a": 1}), "the skeleton is not msgpack"),
        (header(msgpack.ExtType(5, b"x")), "the skeleton is not msgpack"),
        (header([]), "something that is no value"),
        (header([9]), "an array that is no value"),
        (header([[]]), "an array that is no value"),
        (header([healing.INT, 5]), "an array that is no value"),
        (header([healing.ORDERED]), "an array that is no value"),
        (header([healing.DICT, "key"]), "a key without a value"),
        (header([healing.DICT, None, 1]), "a key that is none, or twice"),
        (header([healing.DICT, [healing.LIST], 1]), "a key that is none, or twice"),
        (header([healing.DICT, "a", 1, "a", 2]), "a key that is none, or twice"),
        (header([healing.TENSOR]), "a tensor of no known type and shape"),
        (header([healing.TENSOR, "load", 1]), "a tensor of no known type and shape"),
        (header([healing.TENSOR, "qint8", 1]), "a tensor of no known type and shape"),
        (header([healing.TENSOR, 5, 1]), "a tensor of no known type and shape"),
        (header([healing.TENSOR, "float32", -1]), "a tensor of no known type and shape"),
        (header([healing.TENSOR, "float32", True]), "a tensor of no known type and shape"),
        (header([healing.TENSOR, "float32", *[1] * 65]), "a tensor of no known type and shape"),
        (header([healing.TENSOR, "float32", 2**60]), "a tensor larger than any memory"),
        (header([healing.TENSOR, "float32", 0, 2**60]), "a tensor larger than any memory"),
        (header([healing.TENSOR, "uint8", 2**61]), "there is no memory for a tensor of torch.uint8"),
        (header([healing.TENSOR, "bool", 3]) + b"\x00\x01\x02", "a tensor of truth values has others"),
    ],
)
def test_what_is_wrong_with_a_stream_is_said(content: bytes, sentence: str) -> None:
    with Recording(content) as recording, pytest.raises(HealingError, match=f"{recording.address}: .*{sentence}"):
        recording.fetch()


def test_too_many_levels_are_refused() -> None:
    deep: list[object] = []
    for _ in range(300):
        deep = [healing.LIST, deep]
    with Recording(header(deep)) as recording, pytest.raises(HealingError, match="something that is no value"):
        recording.fetch()


@pytest.mark.parametrize("content", [b"", header([healing.TENSOR, "uint8", 100]) + bytes(50)], ids=["silent", "stuck"])
def test_a_server_that_hangs_is_given_up_on_in_time(content: bytes) -> None:
    with Recording(content, stays=True) as recording:
        started = time.monotonic()
        with pytest.raises(HealingError, match=f"from {recording.address}: it took longer than 0.2 s"):
            recording.fetch(timeout=0.2)
        assert 0.2 <= time.monotonic() - started < 10


def test_a_fetch_that_nobody_listens_to() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(HealingError, match=f"step 5 could not be fetched from {address}: nobody listens there"):
            fetch_state(address, quorum_id=2, step=5, timeout=PATIENCE)


@pytest.mark.parametrize(
    "address", ["", "localhost", ":80", "localhost:", "localhost:x", "localhost:-1", "a:99999", f"{'a' * 70}:80"]
)
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(HealingError, match="this is no HOST:PORT"):
        fetch_state(address, quorum_id=2, step=5, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("quorum_id", "step", "timeout"), [(-1, 0, 1.0), (0, -1, 1.0), (2**63, 0, 1.0), (0, 0, 0.0), (0, 0, math.nan)]
)
def test_arguments_out_of_range(quorum_id: int, step: int, timeout: float, server: StateServer) -> None:
    with pytest.raises(ValueError, match="must be"):
        fetch(server, quorum_id, step, timeout)
    if timeout == 1.0:
        with pytest.raises(ValueError, match="must be"):
            server.offer(quorum_id, step, lambda: None)


def test_ipv6() -> None:
    try:
        server = StateServer("::1")
    except OSError:
        pytest.skip("this host has no IPv6")
    try:
        assert server.address.startswith("[::1]:")
        server.offer(1, 1, lambda: "state")
        assert fetch(server) == "state"
    finally:
        server.close()
