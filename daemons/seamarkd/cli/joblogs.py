"""``seamark logs JOB``: what the ranks of a job wrote on this host, each line with its rank.

It reads files, so it also works for a job that has ended and a suite that is down; only which ranks failed it asks the
coordinator, or reads in what that left. Of a file whose oldest part was given up (``seamarkd.agent.logfiles``) it shows
what is there.
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import click

from seamark.protocol.messages import Incident
from seamarkd.agent.logfiles import FILE_NAME
from seamarkd.cli.exit_codes import CONFIGURATION
from seamarkd.cli.operator import RefusedError
from seamarkd.cli.why import incidents_of
from seamarkd.paths import job_directory
from seamarkd.settings import SettingsError, load

POLL = 0.1
"""Seconds between two looks at the files."""
BLOCK = 1 << 16
NO_FAULT = ("joined", "store", "left")
LONGEST_LINE = 1 << 20
"""Bytes after which a line without an end (a progress bar) is shown as it is."""
FAILED_INTERVAL = 2.0
"""Seconds between two questions who has failed by now."""


@click.command(name="logs")
@click.argument("job")
@click.option("--rank", type=click.IntRange(min=0), help="Only this rank's.")
@click.option("--failed", is_flag=True, help="Only of ranks that failed; those that others' failures stopped are none.")
@click.option(
    "--generation", type=click.IntRange(min=0), help="Only after so many restarts of all ranks (0: none yet)."
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on, until Ctrl-C.")
@click.option("-n", "lines", type=click.IntRange(min=0), metavar="LINES", help="Only the last lines of each rank.")
@click.option("--config", type=click.Path(path_type=Path), help="The configuration file.")
def logs(
    job: str,
    rank: int | None,
    failed: bool,
    generation: int | None,
    follow: bool,
    lines: int | None,
    config: Path | None,
) -> int:
    """Prints what the ranks of JOB wrote on this host, one rank after the other.

    \b
    Examples:
      seamark logs train-3f2a
      seamark logs train-3f2a --rank 3 -n 50
      seamark logs train-3f2a --failed -n 30      what the ranks that failed said last
      seamark logs train-3f2a -f

    A rank is named by the number that it began with, as its file is. With -n the last of its files is looked at.
    """
    try:
        suite = load(config, os.environ, {}).state_directory / "jobs"
    except SettingsError as error:
        click.echo(f"seamark: {error}", err=True)
        return CONFIGURATION
    directory = find(job, [suite, job_directory(job).parent])
    wanted = Wanted(rank, generation)
    there = log_files(directory)
    if not any(map(wanted.takes, there)) and not (follow and not there):
        raise click.UsageError(nothing(job, wanted, there))
    if failed:
        wanted.only = failed_ranks(job, config)
        if not any(map(wanted.takes, there)) and not follow:
            click.echo(f"seamark: no rank of job {job} that wrote here has failed", err=True)
    tails: dict[LogFile, Tail] = {}
    for number, group in by_rank(filter(wanted.takes, there)).items():
        for file in group[-1:] if lines is not None else group:
            tails[file] = Tail(file.path)
            show(number, tails[file].begin(lines))
            if not follow:
                show(number, tails[file].rest())
        for file in group[:-1]:
            # With -n: older ones, which nobody writes any more.
            tails.setdefault(file, Tail(file.path, passed_over=True))
    ask_at = time.monotonic() + FAILED_INTERVAL
    while follow:
        time.sleep(POLL)
        if failed and time.monotonic() >= ask_at:
            # While the coordinator is away, those that it named before.
            with suppress(click.UsageError):
                wanted.only = failed_ranks(job, config)
            ask_at = time.monotonic() + FAILED_INTERVAL
        for file in filter(wanted.takes, log_files(directory)):
            show(file.rank, tails.setdefault(file, Tail(file.path)).read())
    return 0


@dataclass(frozen=True, slots=True, order=True)
class LogFile:
    """One file: of which rank, after how many restarts of all."""

    rank: int
    generation: int
    path: Path


@dataclass(slots=True)
class Wanted:
    """Which files to show; ``only`` are the ranks that failed, None for all."""

    rank: int | None = None
    generation: int | None = None
    only: frozenset[int] | None = None

    def takes(self, file: LogFile) -> bool:
        """Whether this one is to be shown."""
        return (
            self.rank in (None, file.rank)
            and self.generation in (None, file.generation)
            and (self.only is None or file.rank in self.only)
        )


def nothing(job: str, wanted: Wanted, there: list[LogFile]) -> str:
    """Why none is shown, and what there is."""
    ranks = ", ".join(map(str, by_rank(there))) or "none"
    if wanted.generation is None or not any(wanted.rank in (None, file.rank) for file in there):
        which = f"rank {wanted.rank}" if wanted.rank is not None else "log file"
        return f"job {job} has no {which} on this host; ranks here: {ranks}"
    found = ", ".join(map(str, sorted({file.generation for file in there if wanted.rank in (None, file.rank)})))
    return f"job {job} has no logs of generation {wanted.generation} on this host; generations here: {found}"


def failed_ranks(job: str, config: Path | None) -> frozenset[int]:
    """The ranks that failed, by the numbers in their files' names.

    Raises:
        click.UsageError: nobody knows of this job's failures.
    """
    try:
        return culprits(incidents_of(job, config))
    except RefusedError as error:
        raise click.UsageError(f"{error}: --failed needs the coordinator, or what it wrote down") from None


def culprits(incidents: list[Incident]) -> frozenset[int]:
    """Who failed in these incidents by itself: neither the store nor who came new, nor who was stopped by a failure."""
    members = {one.member for incident in incidents for one in incident.failures if one.cause.kind not in NO_FAULT}
    numbers = {member.rpartition("/")[2] for member in members}
    return frozenset(int(number) for number in numbers if number.isdecimal())


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


def log_files(directory: Path) -> list[LogFile]:
    """The log files by rank, each rank's in the order of their beginning."""
    found = ((path, FILE_NAME.fullmatch(path.name)) for path in directory.glob("rank_*"))
    return sorted(LogFile(int(match[1]), int(match[2] or 0), path) for path, match in found if match)


def by_rank(files: Iterable[LogFile]) -> dict[int, list[LogFile]]:
    """The same, rank by rank."""
    return {rank: list(group) for rank, group in itertools.groupby(files, lambda file: file.rank)}


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
    passed_over: bool = False
    """It is not read at all."""
    _partial: bytes = field(default=b"", init=False)

    def begin(self, lines: int | None) -> Iterator[bytes]:
        """The last ``lines`` lines of what is there, or all of them; what is written meanwhile is none of the last."""
        end = None
        if lines is not None:
            with suppress(FileNotFoundError), self.path.open("rb", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                self.offset = start_of_last(file, lines, end)
        return self.read(end)

    def read(self, end: int | None = None) -> Iterator[bytes]:
        """The whole lines that were added since, or up to an offset; from the beginning again if the file was cut."""
        try:
            file = self.path.open("rb", buffering=0)
        except FileNotFoundError:
            return
        with file:
            size = os.fstat(file.fileno()).st_size
            if size < self.offset:
                self.offset, self._partial = 0, b""
            elif end is not None:
                size = min(size, end)
            while self.offset < size and not self.passed_over and (block := self._block(file, size)):
                self.offset += len(block)
                *whole, self._partial = (self._partial + block).split(b"\n")
                yield from whole
                if len(self._partial) > LONGEST_LINE:
                    yield from self.rest()

    def _block(self, file: FileIO, size: int) -> bytes:
        """What comes next; what is gone, also while it was being read, is passed over up to the next whole line."""
        while True:
            file.seek(self.offset)
            block = file.read(min(BLOCK, size - self.offset))
            there = first_byte(file, self.offset)
            if there <= self.offset:
                return block
            self.offset, self._partial = next_line(file, there), b""
            if self.offset >= size:
                return b""

    def rest(self) -> Iterator[bytes]:
        """The line that has no end yet, if there is one."""
        if self._partial:
            line, self._partial = self._partial, b""
            yield line


def first_byte(file: FileIO, offset: int = 0) -> int:
    """Where, from this offset on, the file has anything; its end if nothing is left. It moves an unbuffered file."""
    try:
        return os.lseek(file.fileno(), offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return os.fstat(file.fileno()).st_size


def next_line(file: FileIO, offset: int) -> int:
    """Where the first line begins whose beginning is there: at 0, or after the first end of a line."""
    if offset == 0:
        return 0
    file.seek(offset)
    while block := file.read(BLOCK):
        if (at := block.find(b"\n")) >= 0:
            return offset + at + 1
        offset += len(block)
    return offset


def start_of_last(file: FileIO, lines: int, size: int) -> int:
    """The offset at which the last ``lines`` lines before ``size`` begin; read from the end, because logs get long."""
    if lines == 0:
        return size
    beginning = first_byte(file)
    position = size
    # The end of the last line begins no other one.
    left = lines
    while position > beginning:
        step = min(BLOCK, position - beginning)
        position -= step
        file.seek(position)
        block = file.read(step)
        end = len(block) - (1 if position + step == size and block.endswith(b"\n") else 0)
        while (at := block.rfind(b"\n", 0, end)) >= 0:
            left -= 1
            if left == 0:
                return position + at + 1
            end = at
    return next_line(file, beginning)
