"""Whether this node is fit to take workers: checks that are programs, and what they find.

    python -m seamarkd.agent.health CHECK [DIRECTORY ...]

A check is a command: it passes with exit code 0; with any other its last line says why not (Slurm's HealthCheckProgram
is the model). Those that come with Seamark are commands, too, ``disk``, ``shm`` and ``gpu``: a driver or file system
that never answers can be killed, or at least left behind, and no heartbeat waits for it. What follows from a failure is
not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from msgspec import Struct

from seamarkd.settings import HEALTH_CHECKS

LEAST_DISK = 256 << 20
"""Bytes. A rank's log alone may take a fourth of it."""
LEAST_SHM = 16 << 20
"""Bytes. What NCCL's and a DataLoader's shared memory need at least."""
SHM = Path("/dev/shm")
LONGEST_REASON = 200
TAIL_BYTES = 4_096
PIPE_BYTES = 1 << 16
LAST_MOMENT = 1.0
"""Seconds that a killed check has to be gone; who waits for a broken disk may never be."""


class HealthChecks(Struct, frozen=True):
    """What is checked: names of Seamark's own checks, or executable files.

    ``interval`` seconds are between two rounds, each check has ``timeout``; ``directories`` have to be writable.
    """

    checks: tuple[str, ...] = ()
    interval: float = 60.0
    timeout: float = 30.0
    directories: tuple[Path, ...] = ()


class Finding(Struct, frozen=True):
    """What a check found; ``problem`` is empty where it passed."""

    check: str
    problem: str = ""


def summary(findings: Sequence[Finding]) -> str:
    """All problems in a line, empty without any; short enough for a message."""
    text = "; ".join(f"{Path(one.check).name}: {one.problem}" for one in findings if one.problem)
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


def command(check: str, directories: Sequence[Path]) -> list[str]:
    """What to run for a check: one of Seamark's own, or an executable file."""
    if check in HEALTH_CHECKS:
        return [sys.executable, "-m", "seamarkd.agent.health", check, *map(str, directories)]
    return [check]


async def probe(checks: Sequence[str], directories: Sequence[Path], timeout: float) -> list[Finding]:
    """Runs all checks at once.

    Args:
        checks: names of Seamark's own, or paths of executable files.
        directories: which ones have to be writable.
        timeout: seconds that each has; then it is killed, with all that it started.
    """
    return list(await asyncio.gather(*(_run(check, command(check, directories), timeout) for check in checks)))


async def _run(check: str, arguments: Sequence[str], timeout: float) -> Finding:
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.set_blocking(writer, True)
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, start_new_session=True
        )
    except OSError as error:
        os.close(reader)
        return Finding(check, f"can't be run: {error.strerror}")
    finally:
        os.close(writer)
    output = _Output(reader)
    pidfd = os.pidfd_open(process.pid)
    try:
        with output.reading():
            if await _ended(pidfd, timeout):
                output.read_on()
                status = process.wait()
                return Finding(check, (output.last_line() or f"exit code {status}") if status else "")
        return Finding(check, f"no answer within {timeout:g} s")
    finally:
        # The whole group, which outlives its leader if that left somebody behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.returncode is None and await _ended(pidfd, LAST_MOMENT):
            process.wait()
        os.close(pidfd)
        os.close(reader)


async def _ended(pidfd: int, timeout: float) -> bool:
    """Whether the process ends within so many seconds."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), timeout)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True


class _Output:
    """What a check prints; only its end is kept, however much that is."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._tail = b""

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._descriptor, self._take)
        try:
            yield
        finally:
            loop.remove_reader(self._descriptor)

    def _take(self) -> bool:
        try:
            block = os.read(self._descriptor, PIPE_BYTES)
        except BlockingIOError:
            return False
        self._tail = (self._tail + block)[-TAIL_BYTES:]
        if not block:
            asyncio.get_running_loop().remove_reader(self._descriptor)
        return bool(block)

    def read_on(self) -> None:
        """What is in the pipe at the end of the process; somebody whom it left may go on writing."""
        for _ in range(16):
            if not self._take():
                return

    def last_line(self) -> str:
        """The last one that says anything."""
        lines = [line.strip() for line in self._tail.decode(errors="replace").splitlines() if line.strip()]
        return "".join(letter if letter.isprintable() else "?" for letter in lines[-1]) if lines else ""


# --- Seamark's own


def disk_problem(path: Path, free: int, error: str) -> str:
    """Why a directory can't be worked in; ``error`` is why nothing could be written."""
    if error:
        return f"{path} can't be written: {error}"
    return f"{path} has {free >> 20} MiB left, less than {LEAST_DISK >> 20}" if free < LEAST_DISK else ""


def check_disk(directories: Sequence[Path]) -> str:
    """The first problem of these directories."""
    for path in directories:
        error = _write_error(path)
        if problem := disk_problem(path, 0 if error else psutil.disk_usage(str(path)).free, error):
            return problem
    return ""


def check_shm(path: Path = SHM) -> str:
    """The problem of shared memory."""
    error = _write_error(path)
    if error:
        return f"{path} can't be written: {error}"
    free = psutil.disk_usage(str(path)).free
    if free >= LEAST_SHM:
        return ""
    return f"{path} has {free >> 20} MiB left, less than {LEAST_SHM >> 20}: remove what ended jobs left, or enlarge it"


def _write_error(path: Path) -> str:
    try:
        with tempfile.TemporaryFile(dir=path, buffering=0) as file:
            file.write(b"x")
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


class Gpu(Struct, frozen=True):
    """What the driver says of a GPU; ``error`` where it says nothing."""

    name: str
    error: str = ""
    uncorrected: int = 0
    """Memory errors since the driver was loaded that could not be corrected."""
    remapping_failed: bool = False


def gpu_problem(devices: int, gpus: Sequence[Gpu]) -> str:
    """Why the GPUs can't be used: fewer than there are device files, or one that is broken."""
    for gpu in gpus:
        if gpu.error:
            return f"{gpu.name} does not answer: {gpu.error}"
        if gpu.remapping_failed:
            return f"{gpu.name}: rows of its memory could not be remapped; it is to be replaced"
        if gpu.uncorrected:
            return f"{gpu.name} had {gpu.uncorrected} uncorrectable memory errors: reset it"
    return f"{len(gpus)} of {devices} GPUs are there" if len(gpus) < devices else ""


def check_gpu(devices: Path = Path("/dev")) -> str:
    """The problem of this node's NVIDIA GPUs; none where there are none."""
    count = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    if not count:
        return ""
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return f"{count} GPUs can't be asked: pip install nvidia-ml-py for {sys.executable}, or leave gpu out"
    return gpu_problem(count, _ask_gpus(nvml))


def _ask_gpus(nvml: Any) -> list[Gpu]:
    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        return [Gpu("the driver", str(error))]
    return [_ask_gpu(nvml, number) for number in range(count)]


def _ask_gpu(nvml: Any, number: int) -> Gpu:
    name = f"GPU {number}"
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
        nvml.nvmlDeviceGetMemoryInfo(handle)
        kind, counter = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        uncorrected = _where_supported(nvml, lambda: int(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, counter)), 0)
        # (correctable, uncorrectable, pending, failed)
        failed = _where_supported(nvml, lambda: bool(nvml.nvmlDeviceGetRemappedRows(handle)[3]), False)
    except nvml.NVMLError as error:
        return Gpu(name, str(error))
    return Gpu(name, uncorrected=uncorrected, remapping_failed=failed)


def _where_supported(nvml: Any, ask: Callable[[], Any], otherwise: Any) -> Any:
    """Consumer GPUs have no ECC, older ones no remapping."""
    try:
        return ask()
    except nvml.NVMLError_NotSupported:
        return otherwise


def main(check: str, *directories: str) -> int:
    """One check as a program."""
    problem = {
        "disk": lambda: check_disk([Path(path) for path in directories]),
        "shm": check_shm,
        "gpu": check_gpu,
    }[check]()
    if problem:
        print(problem)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
