"""What a lighthouse's users notice while somebody else misuses it: the same figures with and without, in turns.

Some nodes beat, and a witness counts how long losses take. In every second window a peer sends all that is no message
or not allowed, and subscribers that never read are connected.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from harness.command import BenchmarkRun, json_option, work_directory
from harness.processes import SystemFailed
from harness.summary import Summary, duration
from lighthouses import servers
from lighthouses.children import Child
from seamark.protocol.messages import LighthouseStatus
from seamarkd.cli.status import ask_one

JOB, NODES, RANKS, WITNESSES = "bench", 125, 8, 40
SUBSCRIBERS = 4
INTERVAL = 0.1
CONNECTING, MISSING = 60.0, 60.0

NOTES = f"""\
{NODES} nodes of {RANKS} ranks beat every 100 ms; answer: from a beat to its answer. told: from a MemberLost to the
    failure at a subscriber; silent: from a node's last beat to that. In the misused windows one peer sends what is
    listed above and never reads an answer, and {SUBSCRIBERS} subscribers never read."""

EXAMPLES = """\b
Examples:
  python benchmarks/misuse.py --windows 1 --seconds 3       does it run here?
  python benchmarks/misuse.py --json misuse.json            all of it, with a result file
  python benchmarks/misuse.py --rate 5000                   more of it
"""


def measure(
    found: dict[str, Any], windows: int, seconds: float, rate: float, work: Path, tick: Callable[[str], None]
) -> None:
    """All windows, against one daemon."""
    with ExitStack() as running:
        server = running.enter_context(servers.seamark(work))
        names = [f"n{number}" for number in range(NODES)]

        def child(program: str, **order: Any) -> Child:
            made = running.enter_context(Child.of_seamark(program, program, work))
            made.tell(address=server.address, events=server.events, **order)
            return made

        common = {"kind": "node", "job": JOB, "generation": 1, "ranks": RANKS}
        witness = child("witness", load=names, own=WITNESSES, **common)
        witness.hear(CONNECTING)
        beats = child("seamark_beats", names=names, first=0, interval=INTERVAL, **common)
        beats.hear(CONNECTING)
        for window in range(windows):
            for how in ("quiet", "misused"):
                tick(f"window {window + 1} of {windows}, {how}")
                # Its subscribers are there in its windows only.
                with ExitStack() as misusing:
                    abuser = None
                    if how == "misused":
                        abuser = misusing.enter_context(Child.of_seamark("abuser", "abuser", work))
                        abuser.tell(address=server.address, events=server.events, rate=rate, subscribers=SUBSCRIBERS)
                        abuser.hear(CONNECTING)
                        abuser.tell(measure=seconds)
                    used, began = server.cpu_seconds(), time.monotonic()
                    for one in (beats, witness):
                        one.tell(measure=seconds)
                    report, seen = beats.hear(seconds + MISSING), witness.hear(seconds + MISSING)
                    share = (server.cpu_seconds() - used) / (time.monotonic() - began)
                    sent = abuser.hear(MISSING) if abuser else {}
                found[how].append({"load": report, "witness": seen, "abuser": sent, "lighthouse_core_share": share})
        status = ask_one(server.address, LighthouseStatus)
        if isinstance(status, str):
            raise SystemFailed(f"after it all the lighthouse says: {status}")
        found["dropped"] = status.dropped
        found["memory"] = server.memory()[0]


def table_of(found: dict[str, Any]) -> Lines:
    """Quiet beside misused, and what was sent and counted."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("windows", "answer p50", "p99", "told p50", "p99", "silent p50", "max", "never", "false", "core"):
        table.add_column(heading, justify="left" if heading == "windows" else "right", no_wrap=True)
    for how in ("quiet", "misused"):
        rounds = found[how]
        if not rounds:
            continue
        told = Summary.of([one for round_ in rounds for one in round_["witness"]["told"]])
        silent = Summary.of([one for round_ in rounds for one in round_["witness"]["silence"]])
        table.add_row(
            how,
            duration(max(one["load"]["answer"]["p50"] for one in rounds)),
            duration(max(one["load"]["answer"]["p99"] for one in rounds)),
            duration(told.p50),
            duration(told.maximum if told.p99 is None else told.p99),
            duration(silent.p50),
            duration(silent.maximum),
            str(sum(one["witness"]["never_missed"] + one["witness"]["never_told"] for one in rounds)),
            str(sum(one["witness"]["false_losses"] for one in rounds)),
            f"{max(one['lighthouse_core_share'] for one in rounds):.0%}",
        )
    sent: dict[str, int] = {}
    for one in found["misused"]:
        for kind, count in one["abuser"]["sent"].items():
            sent[kind] = sent.get(kind, 0) + count
    lists = Text()
    for title, counts in (("sent", sent), ("counted as dropped", found["dropped"])):
        lists.append(f"{title}: " + ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items())) + "\n")
    return Lines(table, lists, Text(NOTES, style="dim"))


@click.command(epilog=EXAMPLES)
@click.option("--windows", default=3, show_default=True, type=click.IntRange(1), help="Windows of each kind.")
@click.option("--seconds", default=15.0, show_default=True, type=click.FloatRange(min=1.0), help="Of each window.")
@click.option("--rate", default=500.0, show_default=True, type=click.FloatRange(min=1.0), help="Bad messages a second.")
@json_option
def main(windows: int, seconds: float, rate: float, json_path: Path | None) -> None:
    """What others notice while somebody misuses a lighthouse.

    A full run takes about two minutes. Nothing is left running, after Ctrl-C neither.
    """
    run = BenchmarkRun("misuse", 0, json_path)
    found: dict[str, Any] = {"quiet": [], "misused": [], "dropped": {}}
    why = ""
    with run.measuring(), work_directory() as work, run.progress() as progress:
        task = progress.add_task("starting", total=2 * windows, last="")

        def tick(what: str) -> None:
            progress.update(task, description=what, completed=len(found["quiet"]) + len(found["misused"]))
            run.note(what)

        try:
            measure(found, windows, seconds, rate, work, tick)
        except SystemFailed as error:
            why = str(error)
            run.console.print(why, markup=False)
    method = {"windows": windows, "seconds": seconds, "rate": rate}
    run.finish(table_of(found), {**method, **found}, failed=bool(why))


if __name__ == "__main__":
    main()
