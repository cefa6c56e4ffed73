"""Whether a worker may be forked from the keeper, or has to be exec'ed, and why."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

# One of these is open once a GPU runtime is initialised (CUDA, ROCm), which then doesn't work in a fork.
GPU_RUNTIME = ("/dev/nvidia-uvm", "/dev/kfd")

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# What the loader, Python, the threading runtimes and torch read once, when they start: a forked worker has
# its keeper's values, so one that asks for others is exec'ed.
READ_AT_START = (
    "LANG", "LC_", "TZ", "LD_", "GLIBC_", "MALLOC_", "PYTHON", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_",
    "TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "PYTORCH_",
)  # fmt: skip
READ_LATER = ("TORCH_NCCL_", "TORCHINDUCTOR_CACHE_DIR")


def why_unsafe_to_fork(cause: str) -> str | None:
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"{cause} left {threads} threads running, and a fork keeps only one"
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith(GPU_RUNTIME):
                return f"{cause} initialised the GPU, and a fork can't use it"
    return None


def why_other_at_start(env: Mapping[str, str], environ: Mapping[str, str]) -> str | None:
    """Of a worker's environment and the one that the keeper was started with: which difference comes too late."""
    for name in sorted(env.keys() | environ.keys()):
        early = name.startswith(READ_AT_START) and not name.startswith(READ_LATER)
        if early and name not in THREAD_VARIABLES and env.get(name) != environ.get(name):
            return f"{name} is read when a program starts, and the keeper was started with another value"
    return None
