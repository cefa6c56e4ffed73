"""Which processors, and which GPU, each local rank of a job gets.

The modes are torchrun's ``--numa-binding`` with its rules: a rank belongs to the NUMA node of the GPU with its local
rank's number. Ranks without a GPU are spread over the nodes in order, where torchrun gives up. ``cpu_sets`` is a pure
function of a topology; ``read_topology`` reads this host's from sysfs.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from msgspec import Struct

from seamark.protocol.messages import CpuBinding

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
UNKNOWN = -1

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Cpu(Struct, frozen=True):
    """A logical processor. Core and cache are named by the lowest number of those that share them."""

    number: int
    core: int
    cache: int
    """The last level that holds data; a core complex."""
    node: int
    socket: int


class Topology(Struct, frozen=True):
    """The processors that this process may use, and the NUMA node of each GPU in the order of their numbers."""

    cpus: tuple[Cpu, ...]
    gpus: tuple[int, ...] = ()


def cpu_sets(topology: Topology, count: int, mode: CpuBinding) -> list[frozenset[int]]:
    """The processors of each local rank, none of them empty.

    Args:
        topology: of the host; with one processor at least.
        count: how many ranks of the job are there.
        mode: ``node``: all of the rank's NUMA node; ``socket``: all of that node's socket; ``exclusive``: a share of
            the node's cores that no other rank has, as long as there are enough; ``core-complex``: one group of cores
            that share a last-level cache; ``none``: all.
    """
    homes = _homes(topology, count)
    if mode == "none":
        return [_numbers(topology.cpus)] * count
    nodes = _grouped(topology.cpus, lambda cpu: cpu.node)
    if mode == "node":
        return [_numbers(nodes[home]) for home in homes]
    if mode == "socket":
        sockets = [{cpu.socket for cpu in nodes[home]} for home in homes]
        return [_numbers(cpu for cpu in topology.cpus if cpu.socket in one) for one in sockets]
    sets: list[frozenset[int]] = []
    for rank, home in enumerate(homes):
        place, neighbours = homes[:rank].count(home), homes.count(home)
        if mode == "exclusive":
            cores = [group for _, group in sorted(_grouped(nodes[home], lambda cpu: cpu.core).items())]
            sets.append(_numbers(cpu for core in _share(cores, place, neighbours) for cpu in core))
        else:
            groups = _grouped(nodes[home], lambda cpu: cpu.cache).items()
            largest_first = sorted(groups, key=lambda item: (-len(item[1]), item[0]))
            sets.append(_numbers(largest_first[place % len(largest_first)][1]))
    return sets


def _homes(topology: Topology, count: int) -> list[int]:
    """The NUMA node of each rank."""
    nodes = sorted({cpu.node for cpu in topology.cpus})
    spread = [nodes[rank * len(nodes) // count] for rank in range(count)]
    gpus = topology.gpus[:count]
    return [gpu if gpu in nodes else other for gpu, other in zip(gpus, spread, strict=False)] + spread[len(gpus) :]


def _share(cores: Sequence[T], place: int, count: int) -> Sequence[T]:
    """An even part, the first ones with one more; one each in turn where there are fewer than ``count``."""
    if len(cores) < count:
        return [cores[place % len(cores)]]
    each, more = divmod(len(cores), count)
    start = place * each + min(place, more)
    return cores[start : start + each + (place < more)]


def _grouped(cpus: Iterable[Cpu], key: Callable[[Cpu], int]) -> dict[int, list[Cpu]]:
    found: dict[int, list[Cpu]] = defaultdict(list)
    for cpu in cpus:
        found[key(cpu)].append(cpu)
    return found


def _numbers(cpus: Iterable[Cpu]) -> frozenset[int]:
    return frozenset(cpu.number for cpu in cpus)


def visible(topology: Topology, env: Mapping[str, str]) -> Topology:
    """The same host with the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; one that it names otherwise than by
    its number is on no known node."""
    if VISIBLE_DEVICES not in env:
        return topology
    names = [name.strip() for name in env[VISIBLE_DEVICES].split(",") if name.strip()]
    numbers = [int(name) if name.isascii() and name.isdecimal() else UNKNOWN for name in names]
    gpus = tuple(topology.gpus[one] if 0 <= one < len(topology.gpus) else UNKNOWN for one in numbers)
    return Topology(topology.cpus, gpus)


def single_gpu(env: Mapping[str, str], local_rank: int) -> str:
    """CUDA_VISIBLE_DEVICES for a rank that is to see one GPU: its own; empty where the job's list has no such one."""
    if VISIBLE_DEVICES not in env:
        return str(local_rank)
    names = [name.strip() for name in env[VISIBLE_DEVICES].split(",") if name.strip()]
    return names[local_rank] if local_rank < len(names) else ""


# --- this host


@functools.cache
def host_topology() -> Topology:
    """This host's, read once: a replacement doesn't wait for some thousand small files."""
    return read_topology()


def read_topology(root: Path = Path("/"), allowed: Iterable[int] | None = None) -> Topology:
    """From sysfs; what it doesn't say (in some virtual machines) counts as one for all.

    Args:
        root: where ``/sys``, ``/proc`` and ``/dev`` are found.
        allowed: the processors this process may use; by default those it may.
    """
    nodes = {
        cpu: int(path.parent.name.removeprefix("node"))
        for path in root.glob("sys/devices/system/node/node[0-9]*/cpulist")
        for cpu in parse_list(_read(path))
    }
    cpus = [
        _read_cpu(root / f"sys/devices/system/cpu/cpu{number}", number, nodes.get(number, 0))
        for number in sorted(os.sched_getaffinity(0) if allowed is None else allowed)
    ]
    return Topology(tuple(cpus), tuple(_read_gpus(root)))


def _read_cpu(path: Path, number: int, node: int) -> Cpu:
    cache, highest = UNKNOWN, UNKNOWN
    for index in sorted(path.glob("cache/index[0-9]*")):
        level = _number(index / "level")
        if _read(index / "type") in ("Unified", "Data") and level > highest:
            cache, highest = min(parse_list(_read(index / "shared_cpu_list")), default=UNKNOWN), level
    return Cpu(
        number=number,
        core=min(parse_list(_read(path / "topology/thread_siblings_list")), default=number),
        cache=cache,
        node=node,
        socket=_number(path / "topology/physical_package_id"),
    )


def _read_gpus(root: Path) -> list[int]:
    """NVIDIA's, in the order of the PCI bus, as CUDA numbers equal ones; not those that this container doesn't have."""
    found: list[int] = []
    for path in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        minor = [line.split(":")[1].strip() for line in _read(path).splitlines() if line.startswith("Device Minor")]
        if not minor or (root / f"dev/nvidia{minor[0]}").exists():
            found.append(_number(root / f"sys/bus/pci/devices/{path.parent.name}/numa_node"))
    return found


def parse_list(text: str) -> list[int]:
    """The numbers of a list as the kernel writes it: ``0-3,8``."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int:
    with contextlib.suppress(ValueError):
        return int(_read(path))
    return UNKNOWN
