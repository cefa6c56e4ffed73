"""The kinds of failure that differ in what is done about them (docs/retries.md).

Worker and coordinator use the same words: a worker names the kind of what it raised, the coordinator decides by it.
"""

from __future__ import annotations

from typing import Literal, TypeGuard, get_args

Kind = Literal["spot_preemption", "poison_input", "oom", "transient", "timeout", "hardware", "unknown"]

KINDS: tuple[Kind, ...] = get_args(Kind)


def is_kind(word: object) -> TypeGuard[Kind]:
    """True if this is the name of a kind."""
    return word in KINDS


MESSAGES: tuple[tuple[str, Kind], ...] = (
    (r"\buncorrectable (NVLink|ECC) error\b", "hardware"),
    (r"\bInvalid access of peer GPU memory over nvlink or a hardware error\b", "hardware"),
    (r"\bhardware stack error\b", "hardware"),
    (r"\bno CUDA-capable device is detected\b", "hardware"),
    (r"\b(CUDA|HIP|XPU) out of memory\b", "oom"),
    (r"\bCUDA error: out of memory\b", "oom"),
    (r"\bCU(BLAS|DNN)_STATUS_ALLOC_FAILED\b", "oom"),
    (r"\bCannot allocate memory\b", "oom"),
    (r"\b(CUDA|NCCL) error\b", "transient"),
    (r"\bgloo/transport\b", "transient"),
    (r"\bConnection (reset|closed) by peer\b", "transient"),
    (r"\bConnection refused\b", "transient"),
)
"""Regular expressions of what torch, CUDA (``cudaGetErrorString``) and libc say, in the order in which they count."""
