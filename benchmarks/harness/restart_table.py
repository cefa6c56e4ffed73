"""The rows of the restart benchmark, for people as a table and for the result file as data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from harness.restarts import Row
from harness.summary import Summary, duration
from harness.systems import RANKS

NOTES = f"""\
{RANKS} ranks over Gloo on one machine; from the fault to the last rank past its first collective.
torchrun and nvrx run at their default settings.
new store: with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1. Without it restarted ranks of torchrun can read the
    addresses of their predecessors from the store that outlived them, and fail again or wait.
nvrx in-process: process-group timeout of 10 s, as in its own example for CPU. Its wrapper brings no dead rank
    back, so after a kill 3 ranks go on (shrink); rank 0, which hosts its store, is never the one killed.
restarts: the most that one fault took. missed: faults not recovered from before the deadline."""


def summary_of(row: Row) -> Summary | None:
    """The figures of a row, in seconds; None without a sample."""
    return Summary.of([sample.seconds for sample in row.samples]) if row.samples else None


def shown(seconds: float, deadline: float) -> str:
    """A duration for people; an infinite one is only known to be longer than the deadline."""
    return f"> {deadline:.0f} s" if math.isinf(seconds) else duration(seconds)


def table_of(rows: Sequence[Row], deadline: float) -> Group:
    """All rows, what went wrong in any of them, and the notes without which no row should be read."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("fault", "system", "version"):
        table.add_column(heading, overflow="fold")
    for heading in ("n", "p50", "p99 or max", "min", "restarts", "missed"):
        table.add_column(heading, justify="right", no_wrap=True)
    problems = Text(style="red")
    previous: str | None = None
    for row in rows:
        scenario = row.scenario
        fault = scenario.fault if scenario.fault == "exception" else f"kill, {scenario.outcome}"
        if previous not in (None, fault):
            table.add_section()
        previous = fault
        names = (Text(fault), Text(scenario.system.name), Text(scenario.system.version))
        table.add_row(*names, *_figures(row, deadline))
        if row.error:
            problems.append(f"{scenario.system.name}, {fault}: {row.error}\n")
    return Group(table, problems, Text(NOTES, style="dim"))


def _figures(row: Row, deadline: float) -> list[str]:
    summary = summary_of(row)
    if summary is None:
        return ["0", "-", "-", "-", "-", "-"]
    worst, name = (summary.maximum, "max") if summary.p99 is None else (summary.p99, "p99")
    return [
        str(summary.n),
        shown(summary.p50, deadline),
        f"{shown(worst, deadline)} {name}",
        shown(summary.minimum, deadline),
        "-" if row.most_restarts is None else str(row.most_restarts),
        str(row.missed),
    ]


def record_of(row: Row) -> dict[str, object]:
    """A row of the result file: the figures and every sample, in seconds."""
    scenario, summary = row.scenario, summary_of(row)
    return {
        "fault": scenario.fault,
        "outcome": scenario.outcome,
        "system": scenario.system.name,
        "version": scenario.system.version,
        "world_after": scenario.world_after,
        "faults_planned": scenario.faults,
        **(dataclasses.asdict(summary) if summary else {"n": 0}),
        "most_restarts": row.most_restarts,
        "missed": row.missed,
        "unprovoked_restarts": row.unprovoked,
        "error": row.error,
        "samples": [dataclasses.asdict(sample) for sample in row.samples],
    }
