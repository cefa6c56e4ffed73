"""What the launcher of a process says of its place in the job: torchrun's variables, Slurm's, or those set by hand.

Standard library only, for a process that is to be forked.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

from seamark import environment as names
from seamark import slurm

LIGHTHOUSE_OFFSET, EVENTS_OFFSET = 3, 4
"""Beside MASTER_PORT+2, where the TCPStore's service listens."""
ANOTHER_PORT = (
    "choose another MASTER_PORT, below 32768, where Linux begins to give out ports itself "
    "(torchrun --master-port PORT; its --standalone takes any)"
)
_OF_A_TASK = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID")


class MonitorError(RuntimeError):
    """The process can't be monitored; the sentence says what to do."""


class Place(NamedTuple):
    """A rank's place in the job, and where the job's services are.

    ``hosted``: rank 0's host has the lighthouse. ``host``: this host's address, as the lighthouse's host reaches it.
    """

    job: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    generation: int
    master_addr: str
    master_port: int
    lighthouse: str
    events: str
    hosted: bool
    host: str

    @property
    def serves(self) -> bool:
        """Whether the lighthouse is this rank's to start."""
        return self.hosted and self.rank == 0

    @classmethod
    def read(cls, environ: Mapping[str, str], *, insecure: bool = False) -> Place:
        """Reads it, as torchrun or srun set it.

        Under srun MASTER_ADDR is by default the step's first host, where rank 0 is unless ``--distribution=arbitrary``
        says otherwise, and MASTER_PORT follows from the numbers of job and step.

        Raises:
            MonitorError: something is missing, is no number, or contradicts something else.
        """
        environ = _with_slurm(environ)
        rank = _number(environ, "RANK", "SLURM_PROCID")
        world_size = _number(environ, "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
        local_rank = _number(environ, "LOCAL_RANK", "SLURM_LOCALID", default=0)
        local_world_size = _number(environ, "LOCAL_WORLD_SIZE", default=0)
        if not local_world_size:
            local_world_size = max(local_rank + 1, _tasks_here(environ))
        generation = _number(environ, "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", default=0)
        port = _number(environ, "MASTER_PORT")
        if not (0 <= rank < world_size and 0 <= local_rank < local_world_size):
            raise MonitorError(
                f"rank {rank} of {world_size} (local rank {local_rank} of {local_world_size}) is no place in a job: "
                "check RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"
            )
        if not 0 < port <= 65_535 - EVENTS_OFFSET:
            raise MonitorError(f"MASTER_PORT={port}: choose one from 1 to {65_535 - EVENTS_OFFSET}")
        master = _numeric(environ.get("MASTER_ADDR", ""))
        lighthouse, events = environ.get(names.LIGHTHOUSE_ADDRESS, ""), environ.get(names.LIGHTHOUSE_EVENTS, "")
        if bool(lighthouse) != bool(events):
            raise MonitorError(f"set both {names.LIGHTHOUSE_ADDRESS} and {names.LIGHTHOUSE_EVENTS}, or neither")
        job = _job(environ)
        if lighthouse and not job:
            raise MonitorError(
                f"set {names.JOB} to a name that no other job of the lighthouse at {lighthouse} has or had"
            )
        there = _host_of(lighthouse) if lighthouse else master
        private = insecure or bool(environ.get(names.SECURITY_KEYS))
        for host in () if private else (master, there, _host_of(events) if events else master):
            if not host.startswith("127.") and host not in ("::1", ""):
                raise MonitorError(
                    f"{host} is off loopback, where ranks and services talk in the clear without keys: name their "
                    f"directory in {names.SECURITY_KEYS} (seamark keys --help), or accept that on a network that you "
                    "trust with SEAMARK_INSECURE=1 or fork_and_monitor(insecure=True)"
                )
        bracketed = f"[{master}]" if ":" in master else master
        return cls(
            job or f"{bracketed}:{port}",
            rank,
            world_size,
            local_rank,
            local_world_size,
            generation,
            master,
            port,
            lighthouse or f"tcp://{bracketed}:{port + LIGHTHOUSE_OFFSET}",
            events or f"tcp://{bracketed}:{port + EVENTS_OFFSET}",
            hosted=not lighthouse,
            host=_own_address(there),
        )

    @property
    def member(self) -> str:
        """The rank's name in the job's roster."""
        return f"{self.job}/{self.rank}"

    def export(self) -> None:
        """Sets torchrun's variables where another launcher has not."""
        for name, value in (
            ("MASTER_ADDR", self.master_addr),
            ("MASTER_PORT", self.master_port),
            ("RANK", self.rank),
            ("WORLD_SIZE", self.world_size),
            ("LOCAL_RANK", self.local_rank),
            ("LOCAL_WORLD_SIZE", self.local_world_size),
        ):
            os.environ.setdefault(name, str(value))


def _with_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what Slurm tells a batch script, of which it is true for no rank; with its defaults in a task of srun."""
    if not slurm.is_task(environ):
        return {name: value for name, value in environ.items() if name not in _OF_A_TASK}
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
    found = {"MASTER_ADDR": slurm.first_host(nodes), "MASTER_PORT": str(slurm.master_port(job, step))}
    return {name: value for name, value in found.items() if value} | dict(environ)


def _tasks_here(environ: Mapping[str, str]) -> int:
    try:
        return slurm.tasks_here(environ)
    except ValueError as error:
        raise MonitorError(str(error)) from None


def _number(environ: Mapping[str, str], *variables: str, default: int | None = None) -> int:
    for name in variables:
        if name in environ:
            try:
                return int(environ[name])
            except ValueError:
                raise MonitorError(f"{name}={environ[name]!r} must be a whole number") from None
    if default is None:
        raise MonitorError(
            f"{' or '.join(variables)} is not set: start this script with torchrun, srun or `seamark run`, "
            "or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    return default


def _job(environ: Mapping[str, str]) -> str:
    if environ.get(names.JOB):
        return environ[names.JOB]
    if environ.get("TORCHELASTIC_RUN_ID", "none") != "none":
        return environ["TORCHELASTIC_RUN_ID"]
    if "SLURM_JOB_ID" in environ:
        return f"slurm-{environ['SLURM_JOB_ID']}.{environ.get('SLURM_STEP_ID', '0')}"
    return ""


def _host_of(address: str) -> str:
    """The numeric host of ``tcp://HOST:PORT``; empty for an address on this host alone."""
    if not address.startswith("tcp://"):
        return ""
    return _numeric(address.removeprefix("tcp://").rpartition(":")[0].strip("[]"))


def _numeric(host: str) -> str:
    if not host:
        raise MonitorError("MASTER_ADDR is not set: name the host of rank 0")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise MonitorError(f"{host} can't be looked up: {error}") from None
    # IPv4 first: what a name means must not depend on the order of its addresses on each host.
    return str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])


def _own_address(master: str) -> str:
    """The address that this host has towards that one; nothing is sent."""
    if not master:
        return "127.0.0.1"
    family = socket.AF_INET6 if ":" in master else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master, 9))
        except OSError as error:
            raise MonitorError(f"there is no way from this host to {master}: {error.strerror}") from None
        return str(probe.getsockname()[0])
