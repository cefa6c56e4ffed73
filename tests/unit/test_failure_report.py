"""Of which kind an exception is: torch's own, the built-in ones, the script's; alone or with what caused it."""

from __future__ import annotations

import errno
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

import seamark
from seamark import failure_report
from seamark.failure_kinds import KINDS
from seamark.failure_report import kind_of, map_failure


@pytest.fixture(autouse=True)
def _no_mapping_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_report, "_mapped", {})


CUDA_HINT = "\nCUDA kernel errors might be asynchronously reported at some other API call"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."), "oom"),
        (torch.OutOfMemoryError("said in other words"), "oom"),
        (torch.cuda.OutOfMemoryError("HIP out of memory."), "oom"),
        (RuntimeError("CUDA error: out of memory" + CUDA_HINT), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom"),
        (MemoryError(), "oom"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "oom"),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered" + CUDA_HINT), "hardware"),
        (RuntimeError("CUDA error: uncorrectable NVLink error detected during the execution"), "hardware"),
        (RuntimeError("CUDA error: hardware stack error"), "hardware"),
        (RuntimeError("CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error"), "hardware"),
        (RuntimeError("CUDA error: no CUDA-capable device is detected"), "hardware"),
        (dist.DistBackendError("NCCL error: unhandled cuda error: uncorrectable ECC error encountered"), "hardware"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered" + CUDA_HINT), "transient"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "transient"),
        (RuntimeError("CUDA error: unspecified launch failure"), "transient"),
        (dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited"), "transient"),
        (dist.DistBackendError("said in other words"), "transient"),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), "transient"),
        (dist.DistStoreError("wait timeout after 300000ms"), "transient"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1"), "transient"),
        (ConnectionResetError(104, "Connection reset by peer"), "transient"),
        (BrokenPipeError(), "transient"),
        (TimeoutError("timed out"), "timeout"),
        (ValueError("CUDA out of memory"), ""),
        (RuntimeError("zoom"), ""),
        (KeyError("x"), ""),
        (KeyboardInterrupt(), ""),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_is_known_of_exceptions(error: BaseException, kind: str) -> None:
    assert kind_of(error) == kind


def raised(error: BaseException, cause: BaseException | None, *, handled: BaseException | None = None) -> BaseException:
    try:
        try:
            if handled is not None:
                raise handled
        finally:
            if cause is not None:
                raise error from cause
            raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (raised(ValueError("bad"), MemoryError()), "oom"),
        (raised(ValueError("bad"), None, handled=MemoryError()), "oom"),
        (raised(TimeoutError(), MemoryError()), "timeout"),
        (raised(ValueError("bad"), KeyError("x"), handled=MemoryError()), ""),
        (raised(ValueError("bad"), raised(KeyError("x"), MemoryError())), "oom"),
        (ExceptionGroup("two", [ValueError("bad"), TimeoutError(), MemoryError()]), "timeout"),
        (ExceptionGroup("none", [ValueError("bad")]), ""),
    ],
)
def test_the_nearest_cause_that_says_something_counts(error: BaseException, kind: str) -> None:
    assert kind_of(error) == kind


def test_causes_that_run_in_a_circle_come_to_an_end() -> None:
    first, second = ValueError("1"), ValueError("2")
    first.__cause__, second.__cause__ = second, first
    assert kind_of(first) == ""


def test_an_exception_that_can_t_be_shown_is_still_looked_at() -> None:
    class Mute(RuntimeError):
        def __str__(self) -> str:
            raise KeyError("no words")

    assert kind_of(Mute()) == ""


class BadSample(ValueError):
    """As a data loader might raise it."""


class Corrupted(BadSample):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_the_script_s_own_exceptions_are_what_it_says(kind: str) -> None:
    assert kind_of(BadSample()) == ""
    seamark.map_failure(BadSample, kind)
    assert kind_of(BadSample()) == kind_of(Corrupted()) == kind
    assert kind_of(ValueError()) == ""
    assert kind_of(raised(RuntimeError("in worker 3"), BadSample())) == kind


def test_the_nearest_ancestor_counts_and_a_mapping_goes_before_what_is_known() -> None:
    map_failure(Exception, "unknown")
    map_failure(BadSample, "poison_input")
    assert kind_of(Corrupted()) == "poison_input"
    assert kind_of(torch.OutOfMemoryError("CUDA out of memory")) == "unknown"
    map_failure(torch.OutOfMemoryError, "hardware")
    map_failure(Corrupted, "transient")
    map_failure(Corrupted, "timeout")
    assert kind_of(torch.OutOfMemoryError("CUDA out of memory")) == "hardware"
    assert kind_of(Corrupted()) == "timeout"


@pytest.mark.parametrize("wrong", [ValueError("x"), int, "ValueError", None])
def test_only_exception_classes_are_mapped(wrong: Any) -> None:
    with pytest.raises(TypeError, match="takes an exception class such as ValueError, not "):
        map_failure(wrong, "oom")


@pytest.mark.parametrize("wrong", ["OOM", "", None, 3])
def test_only_to_kinds(wrong: Any) -> None:
    with pytest.raises(ValueError, match="is no kind of failure; there are spot_preemption, poison_input, oom, "):
        map_failure(ValueError, wrong)
    assert kind_of(ValueError()) == ""


def test_it_works_without_torch() -> None:
    code = (
        "import seamark, sys; from seamark.failure_report import kind_of; seamark.map_failure(KeyError, 'oom');"
        "print(kind_of(KeyError()), kind_of(MemoryError()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["oom", "oom", "False"]
