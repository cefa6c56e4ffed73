"""What an agent has to know of its jobs after it was killed, on the node's own disk.

One file per job in the run directory, replaced whole. Not synced: what is remembered are processes of this boot, and
a power cut ends them too. Knows no rule: it writes down what the core says.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from urllib.parse import quote

import msgspec
from msgspec import Struct

from seamarkd.agent.job import Job
from seamarkd.paths import private

log = logging.getLogger(__name__)


class Remembered(Struct):
    """A job of this node, where its keeper listens, and its TCPStore's process: id and time of the fork."""

    job: Job
    keeper: str
    store: tuple[int, float] = (0, 0.0)


class Memory:
    """The files of one agent.

    Args:
        directory: made with mode 0700 if missing; the workers' environment may hold secrets.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = private(directory)

    def write(self, remembered: Remembered) -> None:
        """Replaces what is remembered of this job; where that fails the log says so, and what is to follow follows."""
        path = self._path(remembered.job.name)
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_bytes(msgspec.json.encode(remembered))
            os.rename(temporary, path)
        except OSError as error:
            log.error("job %s: can't write down what this node has to do for it: %s", remembered.job.name, error)

    def forget(self, job: str) -> None:
        """Nothing of this job is left on this node."""
        self._path(job).unlink(missing_ok=True)
        self.digests(job).unlink(missing_ok=True)

    def read(self) -> list[Remembered]:
        """All jobs; a file that can't be read is named in the log and left alone."""
        found = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=Remembered))
            except (OSError, msgspec.DecodeError) as error:
                log.error("can't read %s, its job is not taken up: %s", path, error)
        return found

    def digests(self, job: str) -> Path:
        """Where the job's workers write down which checkpoints of it they have hashed."""
        return self._path(job).with_suffix(".digests")

    def _path(self, job: str) -> Path:
        return self._directory / f"{quote(job, safe='')}.json"
