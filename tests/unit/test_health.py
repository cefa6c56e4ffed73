"""Health checks: what each finds, and that none of them, whatever it does, holds up who asked."""

from __future__ import annotations

import asyncio
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from seamarkd.agent.core import Agent
from seamarkd.agent.effects import Introduce
from seamarkd.agent.health import (
    LEAST_DISK,
    LEAST_SHM,
    LONGEST_REASON,
    Finding,
    Gpu,
    check_disk,
    check_gpu,
    check_shm,
    disk_problem,
    gpu_problem,
    probe,
    summary,
)
from seamarkd.agent.node import UNCHECKED
from seamarkd.settings import HEALTH_CHECKS

# --- the rules


@pytest.mark.parametrize(
    ("free", "error", "problem"),
    [
        (LEAST_DISK, "", ""),
        (LEAST_DISK - 1, "", "/d has 255 MiB left, less than 256"),
        (LEAST_DISK, "Read-only file system", "/d can't be written: Read-only file system"),
    ],
)
def test_when_a_disk_is_fit(free: int, error: str, problem: str) -> None:
    assert disk_problem(Path("/d"), free, error) == problem


@pytest.mark.parametrize(
    ("devices", "gpus", "problem"),
    [
        (0, [], ""),
        (2, [Gpu("GPU 0"), Gpu("GPU 1")], ""),
        (2, [Gpu("GPU 0")], "1 of 2 GPUs are there"),
        (2, [Gpu("the driver", "Unknown Error")], "the driver does not answer: Unknown Error"),
        (2, [Gpu("GPU 0"), Gpu("GPU 1", uncorrected=3)], "GPU 1 had 3 uncorrectable memory errors: reset it"),
        (1, [Gpu("GPU 0", "", 3, True)], "GPU 0: rows of its memory could not be remapped; it is to be replaced"),
        (2, [Gpu("GPU 0"), Gpu("GPU 1", "GPU is lost")], "GPU 1 does not answer: GPU is lost"),
    ],
)  # fmt: skip
def test_when_gpus_are_fit(devices: int, gpus: list[Gpu], problem: str) -> None:
    assert gpu_problem(devices, gpus) == problem


@pytest.mark.parametrize(
    ("findings", "said"),
    [
        ([Finding("disk"), Finding("shm")], ""),
        ([Finding("disk", "full"), Finding("shm"), Finding("/etc/net.sh", "down")], "disk: full; net.sh: down"),
    ],
)  # fmt: skip
def test_all_problems_are_said_in_a_line(findings: list[Finding], said: str) -> None:
    assert summary(findings) == said


def test_a_long_reason_fits_into_a_message() -> None:
    said = summary([Finding("disk", "x" * 1_000)])
    assert len(said) == LONGEST_REASON
    assert said.endswith("…")


def test_a_node_introduces_itself_anew_when_its_health_changes() -> None:
    agent = Agent("here", lambda: "i")
    assert agent.node.serve() == [Introduce()]
    assert agent.node.unhealthy == "", "without checks there is nothing to wait for"
    agent.node.begin_checks()
    assert agent.node.unhealthy == UNCHECKED
    assert agent.node.checked("disk: full") == [Introduce()]
    assert agent.node.checked("disk: full") == []
    assert agent.node.checked("") == [Introduce()]
    assert agent.node.checked("") == []
    agent.node.drain("a new driver")
    agent.node.serve()
    assert agent.node.unhealthy == UNCHECKED, "whatever was done to it meanwhile"


# --- Seamark's own checks


def test_this_host_s_disk_and_shared_memory() -> None:
    assert check_disk([Path("/"), Path("/tmp")]) == ""
    assert check_shm() == "" or psutil.disk_usage("/dev/shm").free < LEAST_SHM


def test_what_can_t_be_written_is_named(tmp_path: Path) -> None:
    assert check_disk([tmp_path, tmp_path / "gone"]) == f"{tmp_path}/gone can't be written: No such file or directory"
    assert check_shm(tmp_path / "gone") == f"{tmp_path}/gone can't be written: No such file or directory"
    assert check_disk([Path("/proc")]).startswith("/proc can't be written: ")


def test_without_gpus_there_is_nothing_to_find(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    assert check_gpu(tmp_path) == ""


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):  # noqa: N801 - as the library calls it
    pass


def library(count: int, **changes: Any) -> SimpleNamespace:
    """As much of pynvml as is used: there is no GPU where this runs."""

    def not_supported(*_: object) -> None:
        raise NVMLError_NotSupported("Not Supported")

    names: dict[str, Any] = {
        "NVMLError": NVMLError,
        "NVMLError_NotSupported": NVMLError_NotSupported,
        "NVML_MEMORY_ERROR_TYPE_UNCORRECTED": 1,
        "NVML_VOLATILE_ECC": 0,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: count,
        "nvmlDeviceGetHandleByIndex": lambda number: number,
        "nvmlDeviceGetMemoryInfo": lambda handle: None,
        "nvmlDeviceGetTotalEccErrors": not_supported,
        "nvmlDeviceGetRemappedRows": not_supported,
    }
    return SimpleNamespace(**(names | changes))


def lost(handle: int) -> None:
    if handle == 1:
        raise NVMLError("GPU is lost")


@pytest.mark.parametrize(
    ("nvml", "problem"),
    [
        (library(2), ""),
        (library(1), "1 of 2 GPUs are there"),
        (library(2, nvmlDeviceGetMemoryInfo=lost), "GPU 1 does not answer: GPU is lost"),
        (library(2, nvmlInit=lambda: lost(1)), "the driver does not answer: GPU is lost"),
        (library(2, nvmlDeviceGetTotalEccErrors=lambda *_: 2), "GPU 0 had 2 uncorrectable memory errors: reset it"),
        (library(2, nvmlDeviceGetRemappedRows=lambda handle: (0, 1, 0, handle)), "GPU 1: rows of its memory"),
        (None, "2 GPUs can't be asked: pip install nvidia-ml-py"),
    ],
)
def test_what_the_driver_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvml: SimpleNamespace | None, problem: str
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = check_gpu(tmp_path)
    assert found.startswith(problem)
    assert bool(found) == bool(problem)


# --- checks are programs


def program(path: Path, text: str) -> str:
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(text))
    path.chmod(0o700)
    return str(path)


PROGRAMS = {
    "passes": ("print('fine')", ""),
    "says why not": ("import sys; print('first'); sys.exit('link 3 is down')", "link 3 is down"),
    "says nothing": ("import sys; sys.exit(4)", "exit code 4"),
    "ends by a signal": ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
    "prints anything": ("import os; os.write(1, b'\\x1b[31m\\xff bad\\n'); os._exit(1)", "?[31m\ufffd bad"),
    "prints without end": ("while True: print('x' * 1000)", "no answer within 1 s"),
    "never answers": ("import time; time.sleep(600)", "no answer within 1 s"),
    "leaves a child behind": ("import os, time; os.fork() or time.sleep(600)", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_passes_or_says_why_not(tmp_path: Path, name: str) -> None:
    text, problem = PROGRAMS[name]
    check = program(tmp_path / "check", text)
    assert asyncio.run(probe([check], [], 1.0)) == [Finding(check, problem)]
    deadline = time.monotonic() + 20.0
    while any(check in (one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline, "what it started outlives it"
        time.sleep(0.01)


def test_a_program_that_can_t_be_run_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not executable")
    checks = [str(tmp_path / "gone"), str(tmp_path / "text")]
    assert asyncio.run(probe(checks, [], 5.0)) == [
        Finding(checks[0], "can't be run: No such file or directory"),
        Finding(checks[1], "can't be run: Permission denied"),
    ]


def test_seamark_s_own_checks_are_programs_too(tmp_path: Path) -> None:
    found = asyncio.run(probe(HEALTH_CHECKS, [tmp_path / "gone"], 30.0))
    assert found[0] == Finding("disk", f"{tmp_path}/gone can't be written: No such file or directory")
    assert [one.check for one in found] == list(HEALTH_CHECKS)


def test_the_loop_goes_on_while_checks_run(tmp_path: Path) -> None:
    check = program(tmp_path / "check", "import time; time.sleep(600)")
    beats = 0

    async def scenario() -> None:
        nonlocal beats
        probing = asyncio.create_task(probe([check] * 3, [], 1.0))
        while not probing.done():
            beats += 1
            await asyncio.sleep(0.01)

    asyncio.run(scenario())
    assert beats > 20
