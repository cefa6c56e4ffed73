"""The exit codes of ``seamark`` (D17; docs/operations.md says the same to people)."""

from __future__ import annotations

SUCCEEDED = 0
FAILED = 1
UNREACHABLE = 2
ABORTED = 3
USAGE = 64
CONFIGURATION = 78
INTERRUPTED = 130
TERMINATED = 143
