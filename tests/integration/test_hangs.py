"""Ranks that hang in every way there is, one after the other, in one job that survives them all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from standalone import standalone

pytestmark = pytest.mark.inprocess

SCRIPT = """
import json, os, pathlib, re, signal, time
import seamark, seamark.inprocess as inprocess
import torch, torch.distributed as dist

def sleeps(call):
    time.sleep(3600)

def livelocks(call):
    call.ping()
    while True:
        pass

def never_pings(call):
    while True:
        pass

def stays_in_its_section(call):
    with seamark.section("forward", timeout=0.5):
        while True:
            call.ping()

def holds_the_interpreters_lock(call):
    re.match(r"(a+)+$", "a" * 64 + "b")

def stops(call):
    os.kill(os.getpid(), signal.SIGSTOP)

def swallows_the_interrupt(call):
    while True:
        try:
            time.sleep(3600)
        except BaseException:
            pass

def is_stuck_in_finalize(call):
    raise ValueError("finalize me")

def is_slow_and_says_so(call):
    with call.disable_hang_protection():
        time.sleep(2.5)
    with seamark.section("compile", timeout=30.0):
        time.sleep(2.5)

HANGS = [sleeps, livelocks, never_pings, stays_in_its_section, holds_the_interpreters_lock, stops,
         swallows_the_interrupt, is_stuck_in_finalize]

def finalize(state):
    if state.fn_exception is not None and "finalize me" in str(state.fn_exception):
        time.sleep(3600)

@inprocess.Wrapper(
    soft_timeout=1.0, hard_timeout=2.0, initial_timeout=1.5, termination_grace_time=0.5, finalize=finalize
)
def train(call: inprocess.CallWrapper):
    with open(pathlib.Path(__file__).with_name(f"said-{call.state.rank}"), "a") as file:
        file.write(json.dumps({"pid": os.getpid(), "restarts": call.state.restarts}) + "\\n")
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    number = call.state.restarts
    if number < len(HANGS):
        if call.state.rank == number % call.state.world_size:
            HANGS[number](call)
    elif call.state.rank == 1:
        is_slow_and_says_so(call)
    elif number == len(HANGS):
        # Who waits for a slow rank has to be told that it is slow, too.
        with call.disable_hang_protection():
            dist.barrier()
        return
    dist.barrier()

train()
"""


def said(directory: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / f"said-{rank}").read_text().splitlines()]


def test_hangs_of_every_kind_cost_an_iteration_each(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    options = ("--nproc-per-node", "4", "--preload", "numpy,torch,torch.distributed", "--max-restarts", "20")
    with standalone(tmp_path, *options, script=path) as run:
        assert run.finish() == 0, run.text() + run.logs()
        incidents = run.incidents()
    assert len(incidents) == 8, json.dumps(incidents, indent=1)
    pids = {rank: [one["pid"] for one in said(tmp_path, rank)] for rank in range(4)}
    assert all(len(each) == 9 for each in pids.values()), pids
    replaced = {number: {r for r in range(4) if pids[r][number] != pids[r][number + 1]} for number in range(8)}
    assert replaced == {0: set(), 1: set(), 2: set(), 3: set(), 4: {0}, 5: {1}, 6: {2}, 7: {3}}
    causes = [json.dumps(one) for one in incidents]
    assert "has been in section 'forward'" in causes[3]
    assert "stopped by a signal" in causes[5], causes[5]
    assert all('"hang"' in cause for number, cause in enumerate(causes) if number != 7), causes
