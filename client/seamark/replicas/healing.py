"""A state, straight from the memory of a living replica into that of one that returned.

A `StateServer` offers the state of one (quorum, step); `fetch_state` brings it over one TCP connection. Nothing is
pickled, so nothing that arrives is run: a state is tensors and plain data (None, bool, int, float, str, bytes, list,
tuple, dict and OrderedDict with str or int keys), and each comes back as the type it was. Tensors arrive on the CPU,
contiguous, without gradient; two names of one tensor arrive as two tensors.

On the wire, all numbers big-endian:

1. the fetcher: ``SMHQ``, quorum id, step, the seconds that it waits;
2. the server: ``SMHA``, 1 or 2, a length, and so many bytes. After a 2 they are a sentence that says why not;
   after a 1 they are the skeleton: the state in msgpack, each tensor replaced by its type and shape;
3. the bytes of the tensors, in the order of the skeleton, whose shapes give their lengths.

Memory is taken tensor by tensor, as the bytes come. A stream that ends early or is no such stream is a `HealingError`
that leaves nothing behind. The bytes are not digested, and who may connect is not asked: like the process group itself,
this belongs on the network of the job.

This module refuses to know what a quorum is, which process heals from which, and where a state goes in the end.
"""

from __future__ import annotations

import json
import logging
import math
import socket
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgpack
import torch

__all__ = ["HealingError", "StateServer", "fetch_state", "pack"]

REQUEST = struct.Struct(">4sQQd")
ANSWER = struct.Struct(">4sBQ")
ASKS, ANSWERS = b"SMHQ", b"SMHA"
STATE, REFUSED = 1, 2

HEADER_LIMIT = 32 << 20
"""Bytes of the largest skeleton."""
SENTENCE_LIMIT = 16_384
"""Bytes of the longest refusal."""
DEPTH_LIMIT = 100
DIMENSIONS_LIMIT = 64
TIMEOUT_LIMIT = 86_400.0
FETCHES_AT_ONCE = 16
REQUEST_TIMEOUT = 5.0
"""Seconds from a connection to its whole request, so that a silent peer does not hold a place for long."""
GRACE = 1.0
"""Seconds that the server holds out longer than the fetcher, who then knows that it was its own time that ended."""
LOOK_INTERVAL = 0.25
"""Seconds between two looks whether a fetcher that waits for an offer is still there."""
CLOSE_TIMEOUT = 10.0
"""Seconds that `StateServer.close` waits for a thread: the state's callable may hang."""

# The first element of every array in a skeleton.
LIST, TUPLE, DICT, ORDERED, INT, TENSOR = range(6)

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q")  # a quantized tensor is more than bytes
}
# Types that are copied bit by bit, by size: not every kernel knows every type.
CARRIERS: dict[int, torch.dtype] = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}

_log = logging.getLogger(__name__)


class HealingError(RuntimeError):
    """A state could not be fetched: from where, and why. Whoever fetched it has what it had before."""


def fetch_state(address: str, *, quorum_id: int, step: int, timeout: float) -> object:
    """The state that a `StateServer` offers for this quorum and step, waiting for the offer if there is none yet.

    Args:
        address: the server's ``HOST:PORT``.
        quorum_id: the quorum that the plan to heal follows from.
        step: the step that the state is wanted at.
        timeout: seconds for all of it: connection, waiting and transfer; at most a day.

    Returns:
        The state, with its tensors on the CPU.

    Raises:
        HealingError: nobody listens there, it was refused, cut or malformed, or took longer than `timeout`.
        ValueError: `timeout`, `quorum_id` or `step` is out of range.
    """
    if not 0 < timeout <= TIMEOUT_LIMIT:
        raise ValueError(f"timeout must be more than 0 and at most {TIMEOUT_LIMIT:g} seconds, not {timeout}")
    _check_key(quorum_id, step)
    deadline = time.monotonic() + timeout
    try:
        with _connection_to(address, timeout) as connection:
            stream = _Stream(connection, deadline)
            stream.send(REQUEST.pack(ASKS, quorum_id, step, stream.remaining()))
            return _receive_state(stream)
    except (HealingError, OSError) as error:
        why = f"it took longer than {timeout:g} s" if isinstance(error, TimeoutError) else _sentence_of(error)
    # Raised here, without a cause: its traceback would keep what had arrived in memory.
    raise HealingError(f"The state of {_name_of((quorum_id, step))} could not be fetched from {address}: {why}.")


class StateServer:
    """Serves one state at a time, from a thread per fetch; fetches beyond `FETCHES_AT_ONCE` wait for a place.

    Between `offer` and `withdraw` the owner leaves the tensors of the state as they are: they are sent from where
    they lie. Threads are daemons, so that a process may end with a fetch under way.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        """Listens at once, on a free port.

        Args:
            host: name or address of this host, as its peers reach it.

        Raises:
            OSError: nothing can listen there.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        port = self._listener.getsockname()[1]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._changed = threading.Condition()
        self._offered: _Offer | None = None
        self._withdrawn = (-1, -1)
        self._connections: set[socket.socket] = set()
        self._transfers: set[socket.socket] = set()
        self._places = threading.Semaphore(FETCHES_AT_ONCE)
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._acceptor = threading.Thread(target=self._accept, name="seamark-healing", daemon=True)
        self._acceptor.start()

    @property
    def address(self) -> str:
        """Where `fetch_state` finds it: ``HOST:PORT``."""
        return self._address

    def offer(self, quorum_id: int, step: int, state: Callable[[], object]) -> None:
        """Offers a state, instead of the one before; transfers of that one go on.

        Args:
            quorum_id: the quorum that the state is offered in.
            step: the step that it is at.
            state: makes the state. Called by the thread of the first fetch, once per offer; what it raises, and
                what `pack` says of its result, is logged and told to those who fetch.

        Raises:
            ValueError: `quorum_id` or `step` is out of range.
            RuntimeError: the server is closed.
        """
        _check_key(quorum_id, step)
        with self._changed:
            if self._closed:
                raise RuntimeError(f"the state server at {self._address} is closed and offers nothing more")
            self._offered = _Offer((quorum_id, step), state)
            self._changed.notify_all()

    def withdraw(self, timeout: float) -> int:
        """Offers nothing more; afterwards the tensors may change, and no fetch ends with a mixture.

        A fetch of what was withdrawn, or of anything older, is refused from now on; one of what may still come waits.

        Args:
            timeout: seconds to wait for transfers under way; what is left of them then is cut.

        Returns:
            How many transfers were cut.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            if self._offered is not None:
                self._withdrawn = max(self._withdrawn, self._offered.key)
                self._offered = None
            self._changed.notify_all()
            while self._transfers and (remaining := deadline - time.monotonic()) > 0:
                self._changed.wait(remaining)
            cut = len(self._transfers)
            for connection in self._transfers:
                _shut(connection)
            self._transfers.clear()
        if cut:
            _log.warning("The state is withdrawn: %d transfers that took longer than %g s were cut.", cut, timeout)
        return cut

    def close(self) -> None:
        """Cuts what is under way and ends the threads; a second call does nothing."""
        with self._changed:
            if not self._closed:
                self._closed = True
                self._offered = None
                _shut(self._listener)  # which wakes the acceptor
                for connection in self._connections:
                    _shut(connection)
                self._changed.notify_all()
        self._acceptor.join(CLOSE_TIMEOUT)
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT)
            if thread.is_alive():
                _log.warning("A fetch did not end within %g s: the state is still being made.", CLOSE_TIMEOUT)
        self._listener.close()

    # --- threads

    def _accept(self) -> None:
        while True:
            self._places.acquire()
            try:
                connection, peer = self._listener.accept()
            except OSError as error:
                self._places.release()
                with self._changed:
                    if not self._closed:
                        _log.warning("The state server at %s cannot accept: %s.", self._address, error)
                        self._changed.wait(LOOK_INTERVAL)  # out of descriptors: let a fetch end
                    if self._closed:
                        return
                continue
            thread = threading.Thread(
                target=self._serve, args=(connection, f"{peer[0]}:{peer[1]}"), name="seamark-healing", daemon=True
            )
            with self._changed:
                self._connections.add(connection)
                if self._closed:
                    _shut(connection)
                self._threads = [other for other in self._threads if other.is_alive()]
                try:
                    thread.start()
                    self._threads.append(thread)
                except RuntimeError as error:
                    _log.warning("The state server at %s cannot serve %s: %s.", self._address, peer, error)
                    self._connections.discard(connection)
                    connection.close()
                    self._places.release()

    def _serve(self, connection: socket.socket, peer: str) -> None:
        try:
            self._answer(connection)
        except (OSError, RuntimeError) as error:  # RuntimeError is torch's, too: a copy to the CPU failed
            _log.warning("The fetch of the state by %s was not completed: %s.", peer, _sentence_of(error))
        finally:
            with self._changed:
                self._connections.discard(connection)
                self._transfers.discard(connection)
                connection.close()  # under the lock: nobody may shut a descriptor that is another's by now
                self._changed.notify_all()
            self._places.release()

    def _answer(self, connection: socket.socket) -> None:
        stream = _Stream(connection, time.monotonic() + REQUEST_TIMEOUT)
        request = bytearray(REQUEST.size)
        stream.receive(memoryview(request))
        magic, quorum_id, step, timeout = REQUEST.unpack(request)
        if magic != ASKS or not 0 < timeout <= TIMEOUT_LIMIT:
            raise HealingError("it asked for nothing that a state server knows")
        stream.deadline = time.monotonic() + timeout + GRACE
        offer = self._wait_for_offer(stream, (quorum_id, step))
        packed = offer if isinstance(offer, str) else offer.packed(stream)
        if isinstance(packed, str):
            sentence = packed.encode(errors="replace")[:SENTENCE_LIMIT]
            stream.send(ANSWER.pack(ANSWERS, REFUSED, len(sentence)) + sentence)
            return
        skeleton, tensors = packed
        stream.send(ANSWER.pack(ANSWERS, STATE, len(skeleton)))
        stream.send(skeleton)
        for tensor in tensors:
            if tensor.numel():
                stream.send(_bytes_of(_on_cpu(tensor)))

    def _wait_for_offer(self, stream: _Stream, key: tuple[int, int]) -> _Offer | str:
        """The offer, from now on counted as a transfer, or why there is none."""
        with self._changed:
            while not self._closed:
                if self._offered is not None:
                    if self._offered.key != key:
                        return f"it offers {_name_of(self._offered.key)}"
                    self._transfers.add(stream.connection)
                    return self._offered
                if key <= self._withdrawn:
                    return f"it offers nothing now, and {_name_of(self._withdrawn)} no longer"
                if stream.peer_left():
                    raise HealingError("it left before there was an offer")
                self._changed.wait(min(stream.remaining(), LOOK_INTERVAL))
        return "it is closing"


class _Offer:
    """A state on offer, made when it is first wanted."""

    def __init__(self, key: tuple[int, int], state: Callable[[], object]) -> None:
        self.key = key
        self._state = state
        self._lock = threading.Lock()
        self._packed: tuple[bytes, list[torch.Tensor]] | str | None = None

    def packed(self, stream: _Stream) -> tuple[bytes, list[torch.Tensor]] | str:
        """The state as `pack` returns it, or why it cannot be sent."""
        if not self._lock.acquire(timeout=stream.remaining()):
            raise TimeoutError
        try:
            if self._packed is None:
                try:
                    self._packed = pack(self._state())
                except Exception as error:  # the callable is the user's and may raise anything
                    _log.exception("The state of %s cannot be sent.", _name_of(self.key))
                    self._packed = f"its state cannot be sent: {type(error).__name__}: {error}"
            return self._packed
        finally:
            self._lock.release()


class _Stream:
    """A connection whose every call ends by one deadline, in seconds of the monotonic clock."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self.connection = connection
        self.deadline = deadline

    def remaining(self) -> float:
        """Seconds to the deadline, more than 0.

        Raises:
            TimeoutError: there are none.
        """
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("it took longer than the fetcher waits")
        return remaining

    def send(self, data: bytes | memoryview) -> None:
        self.connection.settimeout(self.remaining())
        self.connection.sendall(data)

    def receive(self, into: memoryview) -> None:
        done = 0
        while done < len(into):
            self.connection.settimeout(self.remaining())
            count = self.connection.recv_into(into[done:])
            if count == 0:
                raise HealingError("the connection ended before all had come")
            done += count

    def peer_left(self) -> bool:
        """Whether the peer, which has nothing more to say, closed its end."""
        self.connection.setblocking(False)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False


# --- state to skeleton and tensors, and back


def pack(state: object) -> tuple[bytes, list[torch.Tensor]]:
    """The skeleton of a state and its tensors, which are not copied.

    Raises:
        TypeError: the state holds something else than tensors and plain data, or is nested too deeply; with the path.
        ValueError: the plain data takes more than `HEADER_LIMIT` bytes.
    """
    packer = _Packer()
    skeleton: bytes = msgpack.packb(packer.convert(state), unicode_errors="surrogatepass")
    if len(skeleton) > HEADER_LIMIT:
        raise ValueError(
            f"the plain data of the state takes {len(skeleton)} bytes, {HEADER_LIMIT} are allowed: put what is large "
            "into tensors"
        )
    return skeleton, packer.tensors


class _Packer:
    """Converts a state to what msgpack knows: scalars, and arrays whose first element says what they are."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._path: list[str | int] = []

    def convert(self, value: object) -> object:
        kind = type(value)
        if value is None or kind in (bool, float, str, bytes):
            return value
        if kind is int:
            return _packed_int(value)  # type: ignore[arg-type]
        if kind is torch.Tensor:
            return self._tensor(value)
        if isinstance(value, torch.Tensor):
            raise self._error(_type_name(kind), "make it a plain tensor, as `detach` does of a parameter")
        if kind not in (list, tuple, dict, OrderedDict):
            raise self._error(_type_name(kind), "send tensors and plain data only")
        if len(self._path) == DEPTH_LIMIT:
            raise self._error("nested too deeply", f"{DEPTH_LIMIT} levels are allowed, and no cycle")
        if isinstance(value, dict):
            return self._mapping(value)
        return [LIST if kind is list else TUPLE, *self._items(value)]  # type: ignore[arg-type]

    def _items(self, items: list[object] | tuple[object, ...]) -> list[object]:
        converted = []
        self._path.append(0)
        for index, item in enumerate(items):
            self._path[-1] = index
            converted.append(self.convert(item))
        self._path.pop()
        return converted

    def _mapping(self, mapping: dict[object, object]) -> list[object]:
        converted: list[object] = [DICT]
        if type(mapping) is OrderedDict:
            # What `Module.state_dict` says of its versions, which `load_state_dict` looks at.
            self._path.append("_metadata")
            converted = [ORDERED, self.convert(getattr(mapping, "_metadata", None))]
            self._path.pop()
        self._path.append("")
        for key, item in mapping.items():
            if type(key) is not str and type(key) is not int:
                self._path.pop()
                raise self._error(f"a dict with a key of type {_type_name(type(key))}", "keys are str or int")
            self._path[-1] = key
            converted += (_packed_int(key) if type(key) is int else key, self.convert(item))
        self._path.pop()
        return converted

    def _tensor(self, tensor: torch.Tensor) -> list[object]:
        dtype = str(tensor.dtype).removeprefix("torch.")
        dense = tensor.layout is torch.strided and not tensor.is_nested
        if not dense or tensor.device.type == "meta" or dtype not in DTYPES:
            layout = "nested" if tensor.is_nested else str(tensor.layout)
            raise self._error(f"a {layout} tensor of {tensor.dtype} on {tensor.device}", "send a dense one")
        if tensor.dim() > DIMENSIONS_LIMIT:
            raise self._error(f"a tensor of {tensor.dim()} dimensions", f"{DIMENSIONS_LIMIT} are allowed")
        self.tensors.append(tensor.detach())
        return [TENSOR, dtype, *tensor.shape]

    def _error(self, what: str, advice: str) -> TypeError:
        keys = [key if isinstance(key, int) else json.dumps(key[:80], ensure_ascii=False) for key in self._path]
        return TypeError(f"state{''.join(f'[{key}]' for key in keys)} is {what}: {advice}")


def _unpack(skeleton: bytes | bytearray, fill: Callable[[torch.Tensor], None]) -> object:
    """The state of a skeleton; `fill` is called for each tensor, in order, to bring its content.

    Raises:
        HealingError: these bytes are no skeleton, or the memory does not suffice.
    """
    try:
        packed = msgpack.unpackb(
            skeleton,
            raw=False,
            unicode_errors="surrogatepass",
            use_list=False,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise HealingError(f"the skeleton is not msgpack ({error})") from None
    return _restored(packed, fill, 0)


def _restored(packed: Any, fill: Callable[[torch.Tensor], None], depth: int) -> object:
    if packed is None or type(packed) in (bool, int, float, str, bytes):
        return packed
    if type(packed) is not tuple or not packed or depth > DEPTH_LIMIT:
        raise HealingError("the skeleton has something that is no value")
    tag, *rest = packed
    if tag == INT and len(rest) == 1 and type(rest[0]) is bytes:
        return int.from_bytes(rest[0], signed=True)
    if tag == TENSOR:
        tensor = _allocated(rest)
        fill(tensor)
        return tensor
    if tag in (LIST, TUPLE):
        items = [_restored(item, fill, depth + 1) for item in rest]
        return items if tag == LIST else tuple(items)
    if tag == DICT:
        return _filled({}, rest, fill, depth)
    if tag == ORDERED and rest:
        ordered: OrderedDict[object, object] = OrderedDict()
        metadata = _restored(rest[0], fill, depth + 1)
        if metadata is not None:
            ordered._metadata = metadata  # type: ignore[attr-defined]
        return _filled(ordered, rest[1:], fill, depth)
    raise HealingError("the skeleton has an array that is no value")


def _filled(
    mapping: dict[object, object], rest: list[Any], fill: Callable[[torch.Tensor], None], depth: int
) -> dict[object, object]:
    if len(rest) % 2:
        raise HealingError("the skeleton has a key without a value")
    for key, item in zip(rest[::2], rest[1::2], strict=True):
        restored = _restored(key, fill, depth + 1)
        if type(restored) not in (str, int) or restored in mapping:
            raise HealingError("the skeleton has a key that is none, or twice")
        mapping[restored] = _restored(item, fill, depth + 1)
    return mapping


def _allocated(description: list[Any]) -> torch.Tensor:
    """An empty tensor of the type and shape in a skeleton."""
    dtype = DTYPES.get(description[0]) if description and type(description[0]) is str else None
    shape = description[1:]
    if dtype is None or len(shape) > DIMENSIONS_LIMIT or any(type(size) is not int or size < 0 for size in shape):
        raise HealingError("the skeleton has a tensor of no known type and shape")
    # A zero elsewhere in the shape does not make a large size harmless: strides are its products.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**62:
        raise HealingError("the skeleton has a tensor larger than any memory")
    try:
        return torch.empty(shape, dtype=dtype, device="cpu")
    except (RuntimeError, MemoryError):
        raise HealingError(f"there is no memory for a tensor of {dtype} with the shape {tuple(shape)}") from None


def _connection_to(address: str, timeout: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    if host and port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65_535:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout)
        except ValueError:
            pass  # no host can have such a name
    raise HealingError("this is no HOST:PORT")


def _receive_state(stream: _Stream) -> object:
    answer = bytearray(ANSWER.size)
    stream.receive(memoryview(answer))
    magic, kind, length = ANSWER.unpack(answer)
    limit = {STATE: HEADER_LIMIT, REFUSED: SENTENCE_LIMIT}.get(kind, 0)
    if magic != ANSWERS or not 0 < length <= limit:
        raise HealingError("what answers there is no state server")
    header = bytearray(length)
    stream.receive(memoryview(header))
    if kind == REFUSED:
        raise HealingError(header.decode(errors="replace"))

    def fill(tensor: torch.Tensor) -> None:
        if not tensor.numel():
            return
        content = _bytes_of(tensor)
        stream.receive(content)
        if tensor.dtype is torch.bool and int(tensor.view(torch.uint8).max()) > 1:
            raise HealingError("a tensor of truth values has others")

    return _unpack(header, fill)


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, or a contiguous copy of its bits on the CPU."""
    if tensor.is_complex():
        tensor = tensor.resolve_conj()
    return tensor.resolve_neg().view(CARRIERS[tensor.itemsize]).cpu().contiguous()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _packed_int(value: int) -> object:
    if -(2**63) <= value < 2**64:
        return value
    return [INT, value.to_bytes(value.bit_length() // 8 + 1, signed=True)]


# --- sentences and checks


def _check_key(quorum_id: int, step: int) -> None:
    if not (0 <= quorum_id < 2**63 and 0 <= step < 2**63):
        raise ValueError(f"quorum_id and step must be 0 or more, not {quorum_id} and {step}")


def _name_of(key: tuple[int, int]) -> str:
    return f"quorum {key[0]} at step {key[1]}"


def _sentence_of(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there"
    if isinstance(error, ConnectionError):
        return "the connection was cut"
    return str(error)


def _type_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the peer was faster
