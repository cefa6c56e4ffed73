"""What an agent tells a worker in its environment: names of variables, and their reading."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from seamark.inprocess.exceptions import MissingEnvironmentError

ADDRESS = "SEAMARK_ADDRESS"
JOB = "SEAMARK_JOB"
MEMBER = "SEAMARK_MEMBER"
INCARNATION = "SEAMARK_INCARNATION"
GENERATION = "SEAMARK_GENERATION"
NODE = "SEAMARK_NODE"
ALONE = "SEAMARK_ALONE"
"""Set where a worker has an agent of its own (``seamark.autorestart``): its node's name is in its joins."""
MIN_WORLD_SIZE = "SEAMARK_MIN_WORLD_SIZE"
"""Fewer ranks than these no quorum is answered for."""
CHECKPOINT_DIR = "SEAMARK_CHECKPOINT_DIR"
LIGHTHOUSE_ADDRESS = "SEAMARK_LIGHTHOUSE_ADDRESS"
LIGHTHOUSE_EVENTS = "SEAMARK_LIGHTHOUSE_EVENTS"
SECURITY_KEYS = "SEAMARK_SECURITY_KEYS"
"""The directory of this host's keys; the daemons' setting ``security.keys``."""
STORE_OFFSET = 2
"""The job's TCPStore listens on MASTER_PORT+2: MASTER_PORT stays free for scripts without a wrapper (D8)."""


@dataclass(frozen=True, slots=True)
class WorkerEnvironment:
    """Who this worker is, and where its agent listens."""

    address: str
    job: str
    member: str
    incarnation: str
    generation: int
    node: str
    rank: int
    world_size: int
    alone: bool = False
    min_world_size: int = 1

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> WorkerEnvironment:
        """Reads it.

        Raises:
            MissingEnvironmentError: a variable is missing or no number; the sentence says how to start the script.
        """
        try:
            return cls(
                address=environ[ADDRESS],
                job=environ[JOB],
                member=environ[MEMBER],
                incarnation=environ[INCARNATION],
                generation=int(environ[GENERATION]),
                node=environ.get(NODE, ""),
                rank=int(environ["RANK"]),
                world_size=int(environ["WORLD_SIZE"]),
                alone=environ.get(ALONE) == "1",
                min_world_size=int(environ.get(MIN_WORLD_SIZE, "1")),
            )
        except KeyError as error:
            raise MissingEnvironmentError(
                f"{error.args[0]} is not set: start this script with `seamark run --standalone SCRIPT`, "
                "or make fork_and_monitor() of seamark.autorestart its first statement, "
                "or use Wrapper(enabled=False) to run it as it is"
            ) from None
        except ValueError as error:
            raise MissingEnvironmentError(f"{GENERATION}, RANK and WORLD_SIZE must be whole numbers: {error}") from None
