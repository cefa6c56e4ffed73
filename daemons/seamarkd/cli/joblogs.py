"""``seamark logs JOB``: what the ranks of a job wrote on this host, each line with its rank.

It reads files and asks no daemon, so it also works for a job that has ended and a suite that is down.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import click

from seamarkd.cli.exit_codes import CONFIGURATION
from seamarkd.paths import job_directory
from seamarkd.settings import SettingsError, load

POLL = 0.1
"""Seconds between two looks at the files."""
BLOCK = 1 << 16
LONGEST_LINE = 1 << 20
"""Bytes after which a line without an end (a progress bar) is shown as it is."""
FILE_NAME = re.compile(r"rank_(\d+)\.log")


@click.command(name="logs")
@click.argument("job")
@click.option("--rank", type=click.IntRange(min=0), help="Only this rank's.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on, until Ctrl-C.")
@click.option("-n", "lines", type=click.IntRange(min=0), metavar="LINES", help="Only the last lines of each rank.")
@click.option("--config", type=click.Path(path_type=Path), help="The configuration file.")
def logs(job: str, rank: int | None, follow: bool, lines: int | None, config: Path | None) -> int:
    """Prints what the ranks of JOB wrote on this host, one rank after the other.

    \b
    Examples:
      seamark logs train-3f2a
      seamark logs train-3f2a --rank 3 -n 50
      seamark logs train-3f2a -f
    """
    try:
        suite = load(config, os.environ, {}).state_directory / "jobs"
    except SettingsError as error:
        click.echo(f"seamark: {error}", err=True)
        return CONFIGURATION
    directory = find(job, [suite, job_directory(job).parent])
    files = rank_files(directory)
    if rank is not None and rank not in files and not (follow and not files):
        there = ", ".join(map(str, files)) or "none"
        raise click.UsageError(f"job {job} has no rank {rank} on this host; ranks here: {there}")
    tails: dict[int, Tail] = {}
    for number, path in files.items():
        if rank in (None, number):
            tails[number] = Tail(path)
            show(number, tails[number].begin(lines))
            if not follow:
                show(number, tails[number].rest())
    while follow:
        time.sleep(POLL)
        for number, path in rank_files(directory).items():
            if rank in (None, number):
                show(number, tails.setdefault(number, Tail(path)).read())
    return 0


def find(job: str, homes: list[Path]) -> Path:
    """The directory of a job's log files, in the first of these homes that has one.

    Raises:
        click.UsageError: none has; the sentence names the jobs there are.
    """
    jobs: dict[str, Path] = {}
    for home in homes:
        for path in home.glob("*/logs"):
            jobs.setdefault(path.parent.name, path)
    if job not in jobs:
        known = ", ".join(sorted(jobs)) or "none"
        raise click.UsageError(f"there are no logs of a job {job} on this host; jobs here: {known}")
    return jobs[job]


def rank_files(directory: Path) -> dict[int, Path]:
    """The log files by rank, in their order."""
    found = {int(match[1]): path for path in directory.glob("rank_*") if (match := FILE_NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def show(rank: int, lines: Iterator[bytes]) -> None:
    """Prints lines as the rank wrote them."""
    prefix = f"[rank {rank}] ".encode()
    for line in lines:
        click.echo(prefix + line)


@dataclass(slots=True)
class Tail:
    """How far a file has been read. Only whole lines come out, until ``rest`` is asked for."""

    path: Path
    offset: int = 0
    _partial: bytes = field(default=b"", init=False)

    def begin(self, lines: int | None) -> Iterator[bytes]:
        """The last ``lines`` lines of what is there, or all of them."""
        if lines is not None:
            with self.path.open("rb") as file:
                self.offset = start_of_last(file, lines)
        return self.read()

    def read(self) -> Iterator[bytes]:
        """The whole lines that were added since; from the beginning again if the file was cut."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            return
        if size < self.offset:
            self.offset, self._partial = 0, b""
        if size == self.offset:
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while block := file.read(min(BLOCK, size - self.offset)):
                self.offset += len(block)
                *whole, self._partial = (self._partial + block).split(b"\n")
                yield from whole
                if len(self._partial) > LONGEST_LINE:
                    yield from self.rest()

    def rest(self) -> Iterator[bytes]:
        """The line that has no end yet, if there is one."""
        if self._partial:
            line, self._partial = self._partial, b""
            yield line


def start_of_last(file: BinaryIO, lines: int) -> int:
    """The offset at which the last ``lines`` lines begin; read from the end, because logs get long."""
    size = file.seek(0, os.SEEK_END)
    if lines == 0:
        return size
    position = size
    # The end of the last line begins no other one.
    left = lines
    while position > 0:
        step = min(BLOCK, position)
        position -= step
        file.seek(position)
        block = file.read(step)
        end = len(block) - (1 if position + step == size and block.endswith(b"\n") else 0)
        while (at := block.rfind(b"\n", 0, end)) >= 0:
            left -= 1
            if left == 0:
                return position + at + 1
            end = at
    return 0
