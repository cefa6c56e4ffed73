"""``seamark manifest JOB``: the books of a job's shards, as JSON."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import click
import msgspec
from msgspec import Struct

from seamark.protocol.keys import Key
from seamark.protocol.messages import Dataset, Datasets, DatasetsRequest, ShardEntry, ShardsPage, ShardsRequest
from seamarkd.cli.operator import Operator, RefusedError, UnreachableError
from seamarkd.cli.status import connectable
from seamarkd.coordinator.books import reading
from seamarkd.coordinator.job import ENDED
from seamarkd.paths import job_directory
from seamarkd.settings import load
from seamarkd.standalone import over, serving

ASK_TIMEOUT = 5.0
PAGE = 5_000


class Source(Struct):
    """Where the books are: of a coordinator that serves, or in a file that it left."""

    address: str
    file: Path
    key: Key | None = None
    alone: bool = False
    """Of a standalone job: nobody goes on with it where nobody serves it."""


@click.command()
@click.argument("job")
@click.option("--dataset", help="Only this data set.")
@click.option("--config", type=click.Path(path_type=Path), help="The suite's settings; by default $SEAMARK_CONFIG.")
def manifest(job: str, dataset: str | None, config: Path | None) -> int:
    """Prints what became of every shard of JOB that was ever leased, as JSON.

    JOB is a standalone job or one of the suite, and may still be running. A shard that is DONE names the lease under
    which it was done and the digest of its result; what was made under another lease must not be read.

    \b
    Examples:
      seamark manifest infer-41c7 > manifest.json
      seamark manifest infer-41c7 --dataset inputs | jq '.datasets[0].shards[] | select(.state != "DONE")'
    """
    home = job_directory(job)
    try:
        if (home / "manifest.db").exists():
            source = Source(serving(home), home / "manifest.db", alone=True)
        else:
            settings = load(config, os.environ, {})
            where = connectable(settings.coordinator.address)
            source = Source(where, settings.state_directory / "coordinator.db", settings.key("operator"))
        if not (source.address and _from_coordinator(source, job, dataset)):
            _from_file(source, job, dataset)
    except RefusedError as error:
        raise click.UsageError(str(error)) from None
    return 0


def _from_coordinator(source: Source, job: str, only: str | None) -> bool:
    """Prints what a coordinator says; False if none answers."""
    with Operator(source.address, source.key) as operator:
        try:
            found = operator.ask(lambda n: DatasetsRequest(n, job), Datasets, ASK_TIMEOUT)
        except UnreachableError:
            return False
        names = [only] if only else [one.name for one in found.datasets]

        def pages(name: str) -> Iterator[ShardsPage]:
            first = 0
            while first >= 0:
                ask = partial(ShardsRequest, job=job, dataset=name, first=first, limit=PAGE)
                page = operator.ask(ask, ShardsPage, ASK_TIMEOUT)
                yield page
                first = page.following

        _print(job, ((page.spec, page.entries) for name in names for page in pages(name)))
    return True


def _from_file(source: Source, job: str, only: str | None) -> None:
    file = source.file
    if not file.exists():
        raise RefusedError(f"there is no job {job}: no coordinator answers, and {file} does not exist")
    with ExitStack() as stack:
        books = stack.enter_context(reading(file))
        record = books.job(job)
        if record is None:
            raise RefusedError(f"there is no job {job} in {file}")
        living = (over(record, time.monotonic()) if source.alone else record).state not in ENDED
        found = [(number, spec) for number, spec in books.datasets(job) if only in (None, spec.name)]
        if only and not found:
            raise RefusedError(f"job {job} has no data set {only}")

        def pages() -> Iterator[tuple[Dataset, list[ShardEntry]]]:
            for number, spec in found:
                first = 0
                while first >= 0:
                    entries = books.page(number, first, PAGE, living=living)
                    yield spec, entries
                    first = entries[-1].shard + 1 if len(entries) == PAGE else -1

        _print(job, pages())


def _print(job: str, pages: Iterator[tuple[Dataset, list[ShardEntry]]]) -> None:
    """One document, written as it comes: a data set may have millions of shards."""
    out = sys.stdout
    out.write('{"job": ' + msgspec.json.encode(job).decode() + ', "datasets": [')
    current = ""
    for spec, entries in pages:
        if spec.name != current:
            out.write(("]}, " if current else "") + "\n" + msgspec.json.encode(spec).decode()[:-1] + ', "shards": [')
            current, separator = spec.name, "\n"
        for entry in entries:
            out.write(separator + "  " + msgspec.json.encode(entry).decode())
            separator = ",\n"
    out.write(("]}" if current else "") + "]}\n")
