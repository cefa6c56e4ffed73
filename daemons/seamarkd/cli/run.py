"""``seamark run``: submits a job, follows it, and exits with its result."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import TypeVar, get_args

import click
import msgspec
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from seamark.protocol.messages import (
    CpuBinding,
    FailurePattern,
    FollowJob,
    GpuBinding,
    JobSpec,
    JobStatus,
    Message,
    Refused,
    StopJob,
    SubmitJob,
)
from seamark.runtime_config import RuntimeConfig
from seamarkd.agent.keeper.preload import PRELOAD
from seamarkd.cli.exit_codes import ABORTED, CONFIGURATION, FAILED, INTERRUPTED, SUCCEEDED, TERMINATED
from seamarkd.cli.operator import Operator, RefusedError, UnreachableError
from seamarkd.cli.status import connectable
from seamarkd.coordinator.classification import job_patterns
from seamarkd.coordinator.job import ENDED
from seamarkd.paths import MAX_JOB_NAME, job_directory
from seamarkd.settings import SettingsError, load
from seamarkd.standalone import Standalone

T = TypeVar("T")
FOLLOW_INTERVAL = 3.0
POLL = 0.25
SAY_INTERVAL = 10.0
"""Seconds between two lines where there is no terminal and nothing new to say."""
SECOND_CTRL_C_WITHIN = 5.0
ANSWER_TIMEOUT = 10.0
RESULT_CODES = {"SUCCEEDED": SUCCEEDED, "FAILED": FAILED, "ABORTED": ABORTED, "CANCELLED": INTERRUPTED}


class NodeRange(click.ParamType[tuple[int, int]]):
    """``MIN:MAX`` or one number, as torchrun writes it."""

    name = "MIN:MAX"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Both numbers.

        Raises:
            click.BadParameter: it is neither.
        """
        if isinstance(value, tuple):
            return value
        low, _, high = str(value).partition(":")
        try:
            pair = int(low), int(high or low)
        except ValueError:
            self.fail(f"{value!r} is not a number of nodes: write 2, or 2:4 for two to four", param, ctx)
        if not 1 <= pair[0] <= pair[1]:
            self.fail(f"{value!r}: write MIN:MAX with 1 <= MIN <= MAX", param, ctx)
        return pair


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--standalone", is_flag=True, help="Run the three daemons inside this command, for this job on this host."
)
@click.option("--nnodes", type=NodeRange(), default="1", show_default=True, help="Nodes the job needs, or MIN:MAX.")
@click.option("--nproc-per-node", type=click.IntRange(1, 1_000), default=1, show_default=True, help="Workers per node.")
@click.option(
    "--restart-policy",
    "policy",
    type=click.Choice(["replace", "any-failed", "min-healthy"]),
    default="replace",
    show_default=True,
    help="replace: only the failed worker is started anew, the others restart in process (needs seamark.Wrapper). "
    "any-failed: any failure restarts all workers, as torchrun does, and so does a new node below MAX. "
    "min-healthy: who failed leaves, the others go on, and only below MIN healthy worker groups are all restarted.",
)
@click.option(
    "--worker-group",
    type=click.Choice(["node", "rank"]),
    default="node",
    show_default=True,
    help="What min-healthy counts: nodes all of whose workers are well, or ranks (MIN times --nproc-per-node of them).",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(0, 1_000_000),
    default=10,
    show_default=True,
    help="Restarts of processes per rolling hour without a new checkpoint.",
)
@click.option("--name", help="The job's name; by default the script's with four random digits.")
@click.option(
    "--checkpoint-dir", type=click.Path(path_type=Path), help="Given to the script as SEAMARK_CHECKPOINT_DIR."
)
@click.option("--log-dir", type=click.Path(path_type=Path), help="Where each rank's log file goes.")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="A variable for the workers; may be given again.")
@click.option(
    "--master-port", type=click.IntRange(1_024, 65_533), help="MASTER_PORT; the job's store listens 2 above it."
)
@click.option(
    "--join-timeout",
    type=click.FloatRange(min=0.1),
    default=30.0,
    show_default=True,
    help="Seconds the survivors wait for a replacement.",
)
@click.option(
    "--preload",
    default=",".join(PRELOAD),
    metavar="MODULE,...",
    show_default=True,
    help="What each node imports once, before it forks workers: they start in milliseconds instead of seconds. "
    "Add your script's slow modules; none for nothing.",
)
@click.option(
    "--cpu-binding",
    type=click.Choice(get_args(CpuBinding)),
    default="none",
    show_default=True,
    help="Which processors each rank is bound to, as with torchrun --numa-binding: all of its GPU's NUMA node (node), "
    "all of that node's socket, its own share of the node's cores (exclusive), or the cores of one last-level cache "
    "(core-complex). Ranks without a GPU are spread over the nodes.",
)
@click.option(
    "--gpu-binding",
    type=click.Choice(get_args(GpuBinding)),
    default="none",
    show_default=True,
    help="single: each rank sees only the GPU of its local rank (CUDA_VISIBLE_DEVICES), which is its cuda:0. "
    "none: all see all, as under torchrun.",
)
@click.option(
    "--independent",
    is_flag=True,
    help="The ranks don't communicate, they share shards of data (docs/shards.md): who fails is started anew alone.",
)
@click.option(
    "--runtime-config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="How shards are retried: a TOML or JSON file with the fields of seamark.RuntimeConfig.",
)
@click.option(
    "--python", default=sys.executable, help="The workers' interpreter; by default the one that runs seamark."
)
@click.option("-m", "--module", is_flag=True, help="SCRIPT is a module, as in python -m.")
@click.option("--attach", metavar="JOB", help="Follow this job of the suite instead of starting one.")
@click.option("--config", type=click.Path(path_type=Path), help="The suite's settings; by default $SEAMARK_CONFIG.")
@click.argument("script", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(
    standalone: bool,
    nnodes: tuple[int, int],
    nproc_per_node: int,
    policy: str,
    worker_group: str,
    max_restarts: int,
    name: str | None,
    checkpoint_dir: Path | None,
    log_dir: Path | None,
    env: tuple[str, ...],
    master_port: int | None,
    join_timeout: float,
    preload: str,
    cpu_binding: CpuBinding,
    gpu_binding: GpuBinding,
    independent: bool,
    runtime_config: Path | None,
    python: str,
    module: bool,
    attach: str | None,
    config: Path | None,
    script: str | None,
    arguments: tuple[str, ...],
) -> int:
    """Runs SCRIPT on several ranks and keeps it running.

    \b
    Examples:
      seamark run --standalone --nproc-per-node 4 train.py --steps 1000
      seamark run --nnodes 2 --nproc-per-node 8 train.py       on the suite (seamark up)
      seamark run --restart-policy any-failed --nproc-per-node 4 plain_ddp.py
      seamark run --nnodes 7:8 --nproc-per-node 8 --restart-policy min-healthy train.py
      seamark run --nnodes 2 --nproc-per-node 4 --independent infer_shards.py --out /data/out
      seamark run --checkpoint-dir /data/run7 -m mypackage.train
      seamark run --attach train-3f2a

    The options of seamark run stand before SCRIPT, those of the script after it. Each rank writes a log file of its
    own; the command follows the job on one line and exits with its result (seamark --help lists the codes). A closed
    terminal leaves a job of the suite running: --attach follows it again.
    """
    if attach is not None:
        if script is not None or standalone:
            raise click.UsageError(
                "--attach JOB follows a job of the suite that runs: leave SCRIPT and --standalone out"
            )
        suite = load(config, os.environ, {})
        with Operator(connectable(suite.coordinator.address), suite.key("operator")) as operator:
            return Follower(operator, attach).attach()
    if independent and policy != "replace":
        raise click.UsageError("--independent replaces each rank alone, which is --restart-policy replace: use that")
    if script is None:
        raise click.UsageError("which SCRIPT? seamark run --help has examples")
    if standalone and nnodes[0] > 1:
        raise click.UsageError(f"--standalone has one node, and --nnodes asks for at least {nnodes[0]}")
    if not module and not Path(script).is_file():
        raise click.UsageError(f"{script}: no such script (current directory: {Path.cwd()}); use -m for a module")
    job = name or f"{Path(script).stem if not module else script.rpartition('.')[2]}-{secrets.token_hex(2)}"
    if "/" in job or job.startswith("."):
        raise click.UsageError(f"--name {job}: a name has no slash and does not begin with a dot")
    if len(os.fsencode(job)) > MAX_JOB_NAME:
        raise click.UsageError(f"--name {job[:40]}...: a name has {MAX_JOB_NAME} bytes at most")
    chosen = None if standalone else load(config, os.environ, {})
    runtime, patterns = _runtime(runtime_config) if runtime_config else ("", [])
    home = job_directory(job) if chosen is None else chosen.state_directory / "jobs" / job
    spec = JobSpec(
        name=job,
        argv=[script if module else str(Path(script).resolve()), *arguments],
        module=module,
        python=python,
        cwd=str(Path.cwd()),
        env=_environment(env),
        min_nodes=nnodes[0],
        max_nodes=nnodes[1],
        nproc_per_node=nproc_per_node,
        policy=policy,  # type: ignore[arg-type]
        max_restarts=max_restarts,
        checkpoint_dir=str(checkpoint_dir.resolve()) if checkpoint_dir else "",
        log_dir=str(log_dir.resolve() if log_dir else home / "logs"),
        master_port=master_port or 0,
        join_timeout=join_timeout,
        preload=_modules(preload),
        worker_group=worker_group,  # type: ignore[arg-type]
        cpu_binding=cpu_binding,
        gpu_binding=gpu_binding,
        runtime=runtime,
        failure_patterns=patterns,
        independent=independent,
    )
    if chosen is not None:
        with Operator(connectable(chosen.coordinator.address), chosen.key("operator")) as operator:
            return Follower(operator, job).run(spec)
    with Standalone(home, nproc_per_node) as embedded, Operator(embedded.coordinator) as operator:
        # The job ends with this process: a closed terminal is no reason to end it.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return Follower(operator, job).run(spec)


def _modules(names: str) -> list[str]:
    modules = [] if names == "none" else names.split(",")
    for name in modules:
        if not all(part.isidentifier() for part in name.split(".")):
            raise click.UsageError(f"--preload {names}: {name!r} is no module's name; write MODULE,MODULE or none")
    return modules


def _runtime(file: Path) -> tuple[str, list[FailurePattern]]:
    """The operational parameters and the failure patterns that a file gives.

    Raises:
        SettingsError: with every mistake, by file, key and number of the pattern.
    """
    problems: list[str] = []
    try:
        text = file.read_bytes()
        values = json.loads(text) if file.suffix == ".json" else tomllib.loads(text.decode())
        # What is no mapping has no patterns either, and is named as what it is.
        patterns = _patterns(values.pop("failure_patterns", []) if isinstance(values, dict) else [], problems)
        config = _collected(problems, lambda: json.dumps(RuntimeConfig.from_dict(values).to_dict()))
    except OSError as error:
        problems = [str(error.strerror)]
    except ValueError as error:
        problems = str(error).splitlines()
    if problems:
        raise SettingsError([f"--runtime-config {file}: {problem}" for problem in problems])
    return config or "", patterns


def _patterns(given: object, problems: list[str]) -> list[FailurePattern]:
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        problems.append("failure_patterns: must be a list of tables with regex and kind")
        return []
    found: dict[int, FailurePattern] = {}
    for number, one in enumerate(given):
        try:
            found[number] = msgspec.convert(one, FailurePattern)
        except msgspec.ValidationError as error:
            problems.append(f"failure_patterns[{number}]: {error}")
    # In the place of one that is none stands a good one: those behind it are named by their own numbers.
    known = [found.get(number, FailurePattern("x", "oom")) for number in range(len(given))]
    _collected(problems, lambda: job_patterns((one.regex, one.kind) for one in known))
    return list(found.values())


def _collected(problems: list[str], make: Callable[[], T]) -> T | None:
    """What it makes; None where it raised a ValueError, whose lines are problems."""
    try:
        return make()
    except ValueError as error:
        problems += str(error).splitlines()
        return None


def _environment(assignments: tuple[str, ...]) -> dict[str, str]:
    env = dict(os.environ)
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--env {assignment}: write NAME=VALUE")
        env[name] = value
    return env


class Follower:
    """Follows one job to its end: a live line on a terminal, a line per change elsewhere."""

    def __init__(self, operator: Operator, job: str) -> None:
        self._operator = operator
        self._job = job
        self._submission = secrets.token_hex(8)
        self._console = Console(stderr=True)
        self._interrupts: list[float] = []
        self._terminated = False
        self._stop_at = 0.0
        self._named = False
        self._noticed = ""
        self._said = ""
        self._said_at = 0.0

    def run(self, spec: JobSpec) -> int:
        """Submits the job and returns the command's exit code."""
        return self._to_the_end(lambda n: SubmitJob(n, spec, self._submission), f", logs in {spec.log_dir}")

    def attach(self) -> int:
        """Follows the job that was submitted before; returns the command's exit code."""
        return self._to_the_end(lambda n: FollowJob(n, self._job), "")

    def _to_the_end(self, question: Callable[[int], Message], note: str) -> int:
        previous = {
            signal.SIGINT: signal.signal(signal.SIGINT, self._on_interrupt),
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._on_terminate),
        }
        try:
            status = self._operator.ask(question, JobStatus, ANSWER_TIMEOUT)
            self._print(f"job {self._job}{note}")
            status = self._follow(status)
        except RefusedError as error:
            self._print(f"seamark: {error}")
            return CONFIGURATION
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        return self._conclude(status)

    def _follow(self, status: JobStatus) -> JobStatus:
        terminal = self._console.is_terminal
        live = Live(console=self._console, auto_refresh=False, transient=True) if terminal else None
        with live or nullcontext():
            heard_at = time.monotonic()
            ask_at = heard_at + FOLLOW_INTERVAL
            while status.state not in ENDED:
                self._show(status, live)
                message = self._operator.receive(POLL)
                if message is not None:
                    heard_at = time.monotonic()
                elif self._stop_at and time.monotonic() - heard_at > ANSWER_TIMEOUT:
                    raise UnreachableError(
                        f"the coordinator was asked to stop {self._job} and has not answered for {ANSWER_TIMEOUT:g} s"
                    )
                if isinstance(message, JobStatus) and message.job == self._job:
                    status = message
                if isinstance(message, Refused):
                    raise RefusedError(message.reason)
                if time.monotonic() >= ask_at:
                    ask_at = time.monotonic() + FOLLOW_INTERVAL
                    self._operator.tell(lambda n: FollowJob(n, self._job))
                self._stop_if_asked(terminal)
        return status

    def _show(self, status: JobStatus, live: Live | None) -> None:
        if status.state == "RUNNING" and not self._named and len(status.pids) == status.world_size:
            self._named = True
            ranks = sorted((int(member.rpartition("/")[2]), pid) for member, pid in status.pids.items())
            self._print(", ".join(f"rank {rank} pid {pid}" for rank, pid in ranks))
        if status.notice != self._noticed:
            self._noticed = status.notice
            self._print(f"note: {status.notice}")
        now = time.monotonic()
        if live is not None:
            live.update(line(status), refresh=True)
        elif status.sentence != self._said or now - self._said_at >= SAY_INTERVAL:
            self._said, self._said_at = status.sentence, now
            self._print(line(status))

    def _print(self, text: str | Text, *, markup: bool = False) -> None:
        self._console.print(text, markup=markup, highlight=False, soft_wrap=True)

    def _stop_if_asked(self, terminal: bool) -> None:
        if time.monotonic() < self._stop_at:
            return
        if self._terminated:
            reason = "seamark run was told to end (SIGTERM)"
        elif len(self._interrupts) >= (2 if terminal else 1):
            reason = "Ctrl-C"
        else:
            return
        # Again until it is so: a coordinator that is away just now has not heard it.
        self._stop_at = time.monotonic() + FOLLOW_INTERVAL
        self._operator.tell(lambda n: StopJob(n, self._job, reason))

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._interrupts = [at for at in self._interrupts if now - at < SECOND_CTRL_C_WITHIN] + [now]
        if self._console.is_terminal and len(self._interrupts) == 1:
            self._print(f"Ctrl-C again within {SECOND_CTRL_C_WITHIN:g} s stops the job")

    def _on_terminate(self, signum: int, frame: FrameType | None) -> None:
        self._terminated = True

    def _conclude(self, status: JobStatus) -> int:
        good = status.state == "SUCCEEDED"
        colour = "green" if good else "red"
        counts = (
            f"{status.running_for:.1f} s, {status.restarts} restarts, {status.process_restarts} processes started anew"
        )
        self._print(
            f"job {status.job} [{colour}]{status.state.lower()}[/]: {escape(status.result)} ({counts})", markup=True
        )
        if status.log_tail and not good:
            self._print("last lines of that rank's log:")
            for text in status.log_tail:
                self._print(f"  {text}")
        if status.incidents:
            self._print(f"what each restart cost: seamark why {status.job}")
        return TERMINATED if self._terminated else RESULT_CODES[status.state]


def line(status: JobStatus) -> Text:
    """A job's state on one line."""
    parts = [
        f"{status.alive}/{status.world_size} ranks",
        f"iteration {max(status.iteration, 0)}",
        f"{status.restarts} restarts",
        f"step {status.step}",
        f"{status.running_for:.0f} s",
        status.sentence,
    ]
    return Text.assemble((f"{status.job}  ", "bold"), " · ".join(parts))
