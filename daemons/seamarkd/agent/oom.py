"""Whether the kernel has ended a process of this node's suite for want of memory: the counter of its cgroup."""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


class OomKills:
    """The counter ``oom_kill`` of the cgroup that this process, its keepers and their workers are in.

    Args:
        file: ``memory.events`` (cgroup v2) or ``memory.oom_control`` (v1); None where there is neither.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._last = self._read()

    def rose(self) -> bool:
        """Whether it rose since this was asked last."""
        before, self._last = self._last, self._read()
        return self._last > before

    def _read(self) -> int:
        if self._file is None:
            return 0
        try:
            lines = self._file.read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def own_counter(cgroup: str, root: Path = CGROUPS) -> Path | None:
    """The file with the counter of a process's cgroup.

    Args:
        cgroup: its ``/proc/<pid>/cgroup``.
        root: where cgroups are mounted.
    """
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        relative = path.lstrip("/")
        candidates = [root / relative / "memory.events"] if not controllers else []
        if "memory" in controllers.split(","):
            candidates = [root / "memory" / relative / "memory.oom_control", root / "memory" / "memory.oom_control"]
        for file in candidates:
            if file.exists():
                return file
    return None
