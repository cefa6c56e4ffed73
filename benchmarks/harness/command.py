"""What all benchmarks' commands have in common: options, and one run from its first line to its exit code."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harness import peers, results
from harness.processes import become_subreaper, end_descendants, interrupt_once
from harness.run_directory import remove_run_directories

INTERRUPTED = 130
F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write a result file."
)
work_dir_option = click.option(
    "--work-dir", type=click.Path(file_okay=False, path_type=Path), help="Keep logs and reports below here."
)
deadline_option = click.option(
    "--deadline",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds after which a fault counts as missed.",
)


def peer_env_option(package: str) -> Callable[[F], F]:
    """Where the environment of this peer is."""
    return click.option(
        "--peer-env",
        type=click.Path(file_okay=False, path_type=Path),
        default=lambda: peers.default_directory(package),
        show_default="in the user's cache directory",
        callback=lambda _context, _parameter, path: path.absolute(),
        help=f"Virtual environment of {package}, made when missing.",
    )


def names_option(name: str, parameter: str, known: tuple[str, ...], meaning: str) -> Callable[[F], F]:
    """A choice of some of these names, by commas; all of them by default."""

    def parse(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, ...]:
        chosen = tuple(one.strip() for one in value.split(","))
        if unknown := set(chosen) - set(known):
            raise click.BadParameter(f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}")
        return chosen

    return click.option(
        name, parameter, default=",".join(known), show_default=True, callback=parse, help=f"{meaning}, by commas."
    )


class BenchmarkRun:
    """One run of a benchmark. Whatever ends it, no process is left, and what was measured until then is shown.

    Args:
        benchmark: its name, for the result file.
        seed: what its random choices follow from.
        json_path: the result file; None for none.
        width: columns of the output that goes to no terminal.
    """

    def __init__(self, benchmark: str, seed: int, json_path: Path | None, width: int = 110) -> None:
        self.console = Console() if sys.stdout.isatty() else Console(width=width)
        self._json_path = json_path
        self._complete = False
        become_subreaper()
        interrupt_once()
        self.facts = results.opening(benchmark, seed)

    @property
    def version(self) -> str:
        """What is measured: the commit of this checkout."""
        return f"{str(self.facts['commit'])[:9]}{' and changes' if self.facts['dirty'] else ''}"

    def preparing(self) -> AbstractContextManager[object]:
        """Says what takes its time before the first figure."""
        return self.console.status("looking at the machine, preparing the environments")

    def progress(self, *, auto_refresh: bool = True) -> Progress:
        """How far it is: a task's description, count and time, and its field ``last``.

        Args:
            auto_refresh: shown anew twice a second; not where that would disturb what is measured.
        """
        bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        last = TextColumn("{task.fields[last]}")
        return Progress(*bars, last, console=self.console, refresh_per_second=2, auto_refresh=auto_refresh)

    def note(self, line: str) -> None:
        """A line of progress where no terminal shows bars."""
        if not self.console.is_terminal:
            self.console.print(line, markup=False)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """All that takes its time happens in here; Ctrl-C ends it and nothing else."""
        try:
            yield
            self._complete = True
        except KeyboardInterrupt as interrupt:
            self.console.print(f"Interrupted by {interrupt}: shown is what was measured until then.")
        finally:
            end_descendants()

    def finish(self, table: RenderableType, records: Mapping[str, object], *, failed: bool = False) -> NoReturn:
        """Shows the table, writes the result file, and exits: 130 after an interrupt, 1 if something failed."""
        self.console.print(table)
        if self._json_path is not None:
            results.write(self._json_path, {**self.facts, **results.closing(self._complete), **records})
            self.console.print(f"Result file: {self._json_path}", markup=False)
        if not self._complete:
            sys.exit(INTERRUPTED)
        sys.exit(int(failed))


def find_peer(directory: Path, package: str, module: str) -> tuple[peers.Peer, str]:
    """The peer and why it can't be run, which is empty if it can."""
    try:
        return peers.ensure(directory, package, module), ""
    except peers.PeerUnavailable as reason:
        return peers.Peer(directory / "bin" / "python", "not installed"), str(reason)


@contextmanager
def work_directory(kept: Path | None = None) -> Iterator[Path]:
    """A new directory below `kept`, or a temporary one that is removed when no process is left."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix="run-", dir=kept.resolve()))
    else:
        # Short, for the sockets below it: the path of a unix socket ends at 107 bytes.
        directory = Path(tempfile.mkdtemp(prefix="b-"))
    try:
        yield directory
    finally:
        end_descendants()
        remove_run_directories(directory)
        if kept is None:
            shutil.rmtree(directory)
