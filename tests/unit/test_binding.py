"""Which processors each rank gets, on machines that there are; and what sysfs says of this one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_agent_core import roster, spec

from seamark.protocol.messages import CpuBinding, Slot
from seamarkd.agent.binding import (
    Cpu,
    Topology,
    cpu_sets,
    parse_list,
    read_topology,
    single_gpu,
    visible,
)
from seamarkd.agent.workers import environment


def machine(nodes: list[str], *, sockets: int, smt: int, cache: int, gpus: tuple[int, ...] = ()) -> Topology:
    """A machine from the processors of its NUMA nodes, as lscpu lists them.

    Args:
        nodes: of each NUMA node the list of its processors; with ``smt`` 2 the second half are the siblings.
        sockets: the nodes are divided evenly among them.
        smt: threads of a core.
        cache: cores that share a last-level cache.
        gpus: the NUMA node of each.
    """
    cpus = []
    for node, text in enumerate(nodes):
        numbers = parse_list(text)
        cores = len(numbers) // smt
        for place, number in enumerate(numbers):
            core = numbers[place % cores]
            shared = numbers[place % cores // cache * cache]
            cpus.append(Cpu(number, core, shared, node, node * sockets // len(nodes)))
    return Topology(tuple(sorted(cpus, key=lambda cpu: cpu.number)), gpus)


# As `nvidia-smi topo -m` and `lscpu` show them.
DGX_H100 = machine(["0-55,112-167", "56-111,168-223"], sockets=2, smt=2, cache=56, gpus=(0, 0, 0, 0, 1, 1, 1, 1))
DGX_A100 = machine(
    [f"{16 * node}-{16 * node + 15},{128 + 16 * node}-{128 + 16 * node + 15}" for node in range(8)],
    sockets=2,
    smt=2,
    cache=4,
    gpus=(3, 3, 1, 1, 7, 7, 5, 5),
)
EPYC_9654 = machine(["0-95", "96-191"], sockets=2, smt=1, cache=8)
LAPTOP = machine(["0-7"], sockets=1, smt=2, cache=4)
VIRTUAL = machine(["0-1"], sockets=1, smt=1, cache=2)


@pytest.mark.parametrize(
    ("topology", "mode", "count", "expected"),
    [
        (DGX_H100, "node", 8, ["0-55,112-167"] * 4 + ["56-111,168-223"] * 4),
        (DGX_H100, "socket", 8, ["0-55,112-167"] * 4 + ["56-111,168-223"] * 4),
        (
            DGX_H100,
            "exclusive",
            8,
            [f"{14 * rank}-{14 * rank + 13},{112 + 14 * rank}-{112 + 14 * rank + 13}" for rank in range(8)],
        ),
        (DGX_H100, "core-complex", 2, ["0-55,112-167"] * 2),
        (
            DGX_A100,
            "node",
            8,
            [*["48-63,176-191"] * 2, *["16-31,144-159"] * 2, *["112-127,240-255"] * 2, *["80-95,208-223"] * 2],
        ),
        (DGX_A100, "socket", 3, ["0-63,128-191"] * 3),
        (DGX_A100, "exclusive", 2, ["48-55,176-183", "56-63,184-191"]),
        (DGX_A100, "core-complex", 3, ["48-51,176-179", "52-55,180-183", "16-19,144-147"]),
        # No GPU: spread over the nodes in order.
        (EPYC_9654, "node", 2, ["0-95", "96-191"]),
        (EPYC_9654, "node", 3, ["0-95", "0-95", "96-191"]),
        (EPYC_9654, "exclusive", 4, ["0-47", "48-95", "96-143", "144-191"]),
        (EPYC_9654, "exclusive", 3, ["0-47", "48-95", "96-191"]),
        (EPYC_9654, "core-complex", 4, ["0-7", "8-15", "96-103", "104-111"]),
        (LAPTOP, "exclusive", 3, ["0-1,4-5", "2,6", "3,7"]),
        (LAPTOP, "exclusive", 4, ["0,4", "1,5", "2,6", "3,7"]),
        # More ranks than cores: in turn.
        (LAPTOP, "exclusive", 6, ["0,4", "1,5", "2,6", "3,7", "0,4", "1,5"]),
        (VIRTUAL, "exclusive", 2, ["0", "1"]),
        (VIRTUAL, "core-complex", 2, ["0-1", "0-1"]),
        (VIRTUAL, "none", 2, ["0-1", "0-1"]),
    ],
)
def test_which_processors(topology: Topology, mode: CpuBinding, count: int, expected: list[str]) -> None:
    assert cpu_sets(topology, count, mode) == [frozenset(parse_list(text)) for text in expected]


def test_more_ranks_than_gpus_and_gpus_without_a_node() -> None:
    three = msgspec.structs.replace(DGX_H100, gpus=(1, -1, 5))
    assert cpu_sets(three, 4, "node") == [
        frozenset(parse_list(text)) for text in ("56-111,168-223", "0-55,112-167", "56-111,168-223", "56-111,168-223")
    ]


def test_only_what_the_process_may_use_is_shared_out() -> None:
    allowed = set(parse_list("4-7,116-119,60"))
    part = Topology(tuple(cpu for cpu in DGX_H100.cpus if cpu.number in allowed), DGX_H100.gpus)
    assert cpu_sets(part, 2, "exclusive") == [frozenset({4, 5, 116, 117}), frozenset({6, 7, 118, 119})]
    assert cpu_sets(part, 5, "exclusive")[4] == frozenset({60})


topologies = st.builds(
    lambda cpus, gpus: Topology(tuple({cpu.number: cpu for cpu in cpus}.values()), tuple(gpus)),
    st.lists(
        st.builds(
            Cpu, *[st.integers(0, 30), st.integers(0, 9), st.integers(-1, 3), st.integers(0, 3), st.integers(-1, 1)]
        ),
        min_size=1,
    ),
    st.lists(st.integers(-1, 5)),
)


@given(topologies, st.integers(1, 20), st.sampled_from(["none", "node", "socket", "exclusive", "core-complex"]))
def test_every_rank_gets_something_that_is_there(topology: Topology, count: int, mode: CpuBinding) -> None:
    sets = cpu_sets(topology, count, mode)
    there = {cpu.number for cpu in topology.cpus}
    assert len(sets) == count
    assert all(one and one <= there for one in sets)
    if mode == "exclusive":
        cores = {cpu.number: (cpu.node, cpu.core) for cpu in topology.cpus}
        used = [{cores[number] for number in one} for one in sets]
        for first in range(count):
            for second in range(first):
                # Shared is a core only where there are too few.
                assert not used[first] & used[second] or len(used[first]) == len(used[second]) == 1


@pytest.mark.parametrize(
    ("variable", "gpus"),
    [("", ()), ("4,0", (1, 0)), ("7", (1,)), ("GPU-8932f937,1", (-1, 0)), ("9", (-1,)), (" 1 , 5 ", (0, 1))],
)
def test_the_gpus_that_a_job_sees(variable: str, gpus: tuple[int, ...]) -> None:
    assert visible(DGX_H100, {"CUDA_VISIBLE_DEVICES": variable}).gpus == gpus
    assert visible(DGX_H100, {}) == DGX_H100


@pytest.mark.parametrize(
    ("binding", "env", "expected"),
    [
        ("none", {}, None),
        ("none", {"CUDA_VISIBLE_DEVICES": "2,3"}, "2,3"),
        ("single", {}, "1"),
        ("single", {"CUDA_VISIBLE_DEVICES": "2,3"}, "3"),
        ("single", {"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"}, "GPU-b"),
        ("single", {"CUDA_VISIBLE_DEVICES": "2"}, ""),
    ],
)
def test_which_gpu_a_rank_sees(binding: str, env: dict[str, str], expected: str | None) -> None:
    job = msgspec.structs.replace(spec(), gpu_binding=binding, env=env)
    there = msgspec.structs.replace(roster(), spec=job)
    found = environment(there, Slot("job/1", 1, 1, "here", 0), "i", "a", Path("d"))
    assert found.get("CUDA_VISIBLE_DEVICES") == expected
    if binding == "single":
        assert single_gpu(env, 1) == expected


# --- reading it


@pytest.mark.parametrize(("text", "numbers"), [("", []), ("0", [0]), ("0-2,5,7-8\n", [0, 1, 2, 5, 7, 8])])
def test_lists_as_the_kernel_writes_them(text: str, numbers: list[int]) -> None:
    assert parse_list(text) == numbers


def test_this_host_is_read_as_lscpu_reads_it() -> None:
    output = subprocess.run(["lscpu", "-p=CPU,CORE,SOCKET,NODE"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(",") for line in output.splitlines() if not line.startswith("#")]
    expected = {int(cpu): (int(core), int(socket or 0), int(node or 0)) for cpu, core, socket, node in rows}
    found = read_topology().cpus
    assert {cpu.number for cpu in found} == os.sched_getaffinity(0)
    for one in found:
        for other in found:
            mine, theirs = expected[one.number], expected[other.number]
            assert (mine[0] == theirs[0]) == (one.core == other.core)
            assert (mine[1] == theirs[1]) == (one.socket == other.socket)
            assert (mine[2] == theirs[2]) == (one.node == other.node)


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


def test_gpus_and_their_nodes_are_read_and_those_of_others_are_not(tmp_path: Path) -> None:
    for number, (address, node, here) in enumerate(
        [
            ("0000:1b:00.0", "0", True),
            ("0000:43:00.0", "1", False),
            ("0000:9d:00.0", "-1", True),
            ("0001:01:00.0", "1", True),
        ]
    ):
        put(tmp_path, f"proc/driver/nvidia/gpus/{address}/information", f"Model: X\nDevice Minor: \t {number}")
        put(tmp_path, f"sys/bus/pci/devices/{address}/numa_node", node)
        if here:
            put(tmp_path, f"dev/nvidia{number}", "")
    assert read_topology(tmp_path, [0]) == Topology((Cpu(0, 0, -1, 0, -1),), (0, -1, 1))


def test_the_largest_cache_that_holds_data_makes_a_core_complex(tmp_path: Path) -> None:
    for cpu in (2, 3):
        where = f"sys/devices/system/cpu/cpu{cpu}"
        for index, (level, kind, shared) in enumerate(
            [
                ("1", "Data", str(cpu)),
                ("4", "Instruction", str(cpu)),
                ("3", "Unified", "2-3"),
                ("2", "Unified", str(cpu)),
            ]
        ):
            put(tmp_path, f"{where}/cache/index{index}/level", level)
            put(tmp_path, f"{where}/cache/index{index}/type", kind)
            put(tmp_path, f"{where}/cache/index{index}/shared_cpu_list", shared)
        put(tmp_path, f"{where}/topology/thread_siblings_list", "2-3")
        put(tmp_path, f"{where}/topology/physical_package_id", "1")
    put(tmp_path, "sys/devices/system/node/node0/cpulist", "0-1")
    put(tmp_path, "sys/devices/system/node/node1/cpulist", "2-3")
    assert read_topology(tmp_path, [3, 2]).cpus == (Cpu(2, 2, 2, 1, 1), Cpu(3, 2, 2, 1, 1))
