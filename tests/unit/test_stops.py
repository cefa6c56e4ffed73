"""An agent's stops where something fails: what can't be done is told, and the job is over here all the same."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import time
from pathlib import Path

import pytest

from seamark.protocol.messages import JobSpec, PrepareJob, StopWorkers, WorkersStopped
from seamarkd.agent.core import Agent
from seamarkd.agent.effects import Effect, StopJobHere, ToCoordinator
from seamarkd.agent.endings import Endings
from seamarkd.agent.ground import Ground
from seamarkd.agent.keeper_client import KeeperClient
from seamarkd.agent.kept import Kept, KeptJobs
from seamarkd.agent.logfiles import LogWatch
from seamarkd.agent.memory import Memory
from seamarkd.agent.oom import OomKills
from seamarkd.agent.orphans import take_up
from seamarkd.agent.stops import Stops
from seamarkd.agent.tasks import Tasks

SPEC = JobSpec(
    name="job",
    argv=["t.py"],
    module=False,
    python="python",
    cwd="/",
    env={},
    min_nodes=1,
    max_nodes=1,
    nproc_per_node=1,
    policy="replace",
    max_restarts=0,
    checkpoint_dir="",
    log_dir="/tmp",
)


def refuse(_pid: int, _number: int) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_a_stop_that_fails_is_told_and_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its keeper could not be reached for want of descriptors, and its worker has become another user's."""

    async def scenario() -> list[Effect]:
        core = Agent("here", lambda: "i0")
        core.from_coordinator(0.0, PrepareJob(3, SPEC, store=False))
        *_, order = core.from_coordinator(0.0, StopWorkers(7, "job", 0, 0.0, final=True))
        assert isinstance(order, StopJobHere)
        jobs = KeptJobs(core.node, Memory(tmp_path), LogWatch(1 << 20))
        performed: list[Effect] = []
        ground = Ground(core, jobs, Tasks(), performed.extend)
        endings = Endings(ground, OomKills(None))
        unreachable: asyncio.Future[KeeperClient] = asyncio.get_running_loop().create_future()
        unreachable.set_exception(OSError(errno.EMFILE, "Too many open files"))
        kept = jobs.add("job", Kept(unreachable, str(tmp_path / "keeper")))
        began = time.monotonic()
        process = subprocess.Popen(["sleep", "60"], start_new_session=True)
        held = take_up("job/0", "i0", process.pid, began)
        assert held is not None
        try:
            endings.keep_orphan("job", kept, held)
            with monkeypatch.context() as denied:
                denied.setattr(os, "killpg", refuse)
                await Stops(ground, endings).stop(order)
        finally:
            process.kill()
            process.wait()
            held.close()
        assert jobs.get("job") is None
        return performed

    performed = asyncio.run(scenario())
    told = [one.message for one in performed if isinstance(one, ToCoordinator)]
    assert told == [WorkersStopped(7, "job", 0)]
    assert "can't stop the workers: [Errno 24] Too many open files" in caplog.text
    assert "Operation not permitted" in caplog.text
