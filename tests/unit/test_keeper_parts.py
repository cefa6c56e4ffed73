"""The keeper's rules, without a keeper: what it refuses, how it starts a worker, whom it ends and when."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import pytest

import seamark.environment
import seamark.progress
from seamarkd.agent.keeper import page, worker
from seamarkd.agent.keeper.forkable import why_other_at_start
from seamarkd.agent.keeper.loop import send_signals
from seamarkd.agent.keeper.records import Record
from seamarkd.agent.keeper.requests import (
    MAX_PACKET_BYTES,
    Refused,
    environment,
    flag,
    integer,
    parse,
    request_id,
    seconds,
    text,
    worker_task,
)
from seamarkd.agent.keeper.spawning import PROGRAM, add_options, arguments, task_of
from seamarkd.agent.keeper.stop import KILL_PATIENCE_SECONDS, KILL_SECONDS, STRAY_SECONDS, Left, Signal, Stop
from seamarkd.agent.keeper.store import Store
from seamarkd.agent.keeper.worker import Worker
from seamarkd.agent.keeper_answers import Process
from seamarkd.agent.keeper_client import KEEPER

TERM, KILL, CONT = signal.SIGTERM, signal.SIGKILL, signal.SIGCONT


# --- in the job's interpreter -------------------------------------------------------------------------------


def test_its_parts_need_the_standard_library_alone_and_start_no_thread() -> None:
    code = f"""
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("entry", {str(KEEPER)!r})
entry = importlib.util.module_from_spec(spec)
spec.loader.exec_module(entry)
entry.package({str(KEEPER.parent)!r})
importlib.import_module("seamark_keeper.program")
foreign = {{name.partition(".")[0] for name in sys.modules}} - sys.stdlib_module_names
print(sorted(foreign - {{"__main__", "entry"}}), len(os.listdir("/proc/self/task")), "threading" in sys.modules)
"""
    # Without site-packages, and so without Seamark.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "['seamark_keeper'] 1 False"


def test_it_puts_nothing_in_the_path_that_a_job_imports_from() -> None:
    code = "import runpy, sys; sys.argv = ['x', '--help']; before = list(sys.path); "
    run = f"sys.path.insert(0, {str(KEEPER.parent)!r}); runpy.run_path({str(KEEPER)!r}, run_name='__main__')"
    check = f"{code}\ntry:\n  {run}\nexcept SystemExit:\n  print(sys.path == before)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"


def test_it_names_things_as_the_client_does() -> None:
    assert page.PROGRESS_FD == seamark.progress.PROGRESS_FD
    assert page.PROGRESS_BYTES == seamark.progress.PAGE_SIZE
    assert page.PROGRESS_NAME == seamark.progress.MEMFD_NAME
    assert worker.CHECKPOINT_DIR == seamark.environment.CHECKPOINT_DIR
    assert worker.CHECKPOINT_SECONDS == seamark.environment.CHECKPOINT_SECONDS
    fd = page.blank_page()
    read = seamark.progress.ProgressPage(fd)
    assert not read.discarded
    assert not page.says_discarded(fd)
    os.pwrite(fd, b"\1", page.PROGRESS_DISCARDED)
    assert read.discarded
    assert page.says_discarded(fd)
    read.close()
    os.close(fd)


def test_what_it_tells_of_a_process_is_what_its_agent_reads() -> None:
    told = {one.name for one in dataclasses.fields(Record)} - {"pidfd", "page", "gate"}
    assert told == set(Process.__struct_fields__)


# --- requests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packet", "code", "named"),
    [
        (b"", "malformed", "not one JSON object"),
        (b"[]", "malformed", "not one JSON object"),
        (b"{", "malformed", "not one JSON object"),
        (b"\xff", "malformed", "not one JSON object"),
        (b"[" * 100_000, "malformed", "not one JSON object"),
        (b" " * (MAX_PACKET_BYTES + 1), "too_large", str(MAX_PACKET_BYTES)),
    ],
)
def test_a_packet_that_is_no_request_is_refused_with_a_reason(packet: bytes, code: str, named: str) -> None:
    with pytest.raises(Refused, match=named) as refused:
        parse(packet)
    assert refused.value.code == code


@pytest.mark.parametrize("value", [None, 1, "", "a\0b", "\ud800", [], True])
def test_text_is_a_string_that_a_system_call_takes(value: object) -> None:
    with pytest.raises(Refused, match="slot must be a string"):
        text({"slot": value}, "slot")


@pytest.mark.parametrize("value", [None, "1", 1.5, True, -1, 11])
def test_an_integer_is_one_within_its_bounds(value: object) -> None:
    with pytest.raises(Refused, match="port must be an integer from 0 to 10"):
        integer({"port": value}, "port", 0, 10)
    assert integer({"port": 10}, "port", 0, 10) == 10


@pytest.mark.parametrize("value", ["1", True, -1, float("nan"), float("inf"), 2e9, None])
def test_seconds_are_a_finite_number_of_them(value: object) -> None:
    with pytest.raises(Refused, match="grace must be a number of seconds"):
        seconds({"grace": value}, "grace")
    assert seconds({}, "grace") == 0


def test_flags_and_ids() -> None:
    assert flag({}, "final", True)
    with pytest.raises(Refused, match="true or false"):
        flag({"final": 1}, "final")
    assert [request_id(one) for one in ({}, {"id": 3}, {"id": "3"})] == [None, 3, None]


@pytest.mark.parametrize("env", [None, [], {"A": 1}, {"": "x"}, {"A=B": "x"}, {"A": "a\0"}, {"A\0": ""}])
def test_an_environment_is_one_that_exec_takes(env: object) -> None:
    with pytest.raises(Refused, match="env must map names to strings"):
        environment({"env": env})
    assert environment({"env": {"A": ""}}) == {"A": ""}


WORKER = {"argv": ["t.py", ""], "cwd": "/", "num_threads": 2}


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"argv": []}, "malformed"),
        ({"argv": [""]}, "malformed"),
        ({"argv": "t.py"}, "malformed"),
        ({"argv": ["t.py", 1]}, "malformed"),
        ({"cwd": "/nowhere"}, "bad_cwd"),
        ({"cpus": [True]}, "malformed"),
        ({"cpus": [-1]}, "malformed"),
        ({"cpus": 3}, "malformed"),
        ({"num_threads": 0}, "malformed"),
        ({"module": "yes"}, "malformed"),
    ],
)
def test_a_worker_that_cannot_be_run_is_refused_before_anything_is_started(more: dict[str, Any], code: str) -> None:
    assert worker_task(dict(WORKER)) == Worker(["t.py", ""], False, "/", 2, [])
    with pytest.raises(Refused) as refused:
        worker_task(WORKER | more)
    assert refused.value.code == code


# --- fork or exec -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({}, None),
        ({"RANK": "1", "NCCL_DEBUG": "INFO"}, None),
        ({"OMP_NUM_THREADS": "7"}, None),
        ({"OMP_PROC_BIND": "close"}, "OMP_PROC_BIND"),
        ({"PYTHONPATH": "/there"}, "PYTHONPATH"),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}, None),
        ({"TORCH_LOGS": "+dynamo"}, "TORCH_LOGS"),
        ({"LD_PRELOAD": "x.so", "LANG": "C"}, "LANG"),
    ],
)
def test_what_is_read_when_a_program_starts_cannot_differ_in_a_fork(env: dict[str, str], named: str | None) -> None:
    for asked, had in ((env, {}), ({}, env)):
        why = why_other_at_start(asked, had)
        assert (why.split()[0] if why else None) == named
    assert why_other_at_start(env, env) is None


@pytest.mark.parametrize(
    "task",
    [
        Worker(["t.py"], False, "/", 1, []),
        Worker(["pkg.t", "--run", "5", "--", "-x", ""], True, "/a b", 3, [0, 7]),
        Store("::1", 29502, 4),
    ],
)
@pytest.mark.parametrize("held", [False, True])
def test_a_command_line_says_which_task_it_is(task: Worker | Store, held: bool) -> None:
    line = arguments(task, held=held)
    ours, theirs = (line[: line.index("--")], line[line.index("--") + 1 :]) if "--" in line else (line, [])
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser)
    options = parser.parse_args(ours)
    assert task_of(options, theirs) == task
    assert options.gate == (4 if held and isinstance(task, Worker) else None)
    assert Path(PROGRAM) == KEEPER


# --- the end ------------------------------------------------------------------------------------------------


def left(
    everybody: Mapping[int, int] | None, *, workers: Set[int] = frozenset(), stores: Set[int] = frozenset()
) -> Left:
    return Left(workers, stores, everybody)


def test_groups_are_asked_once_and_woken_for_it() -> None:
    stop = Stop(10.0, True)
    assert stop.ask([7]) == [Signal(7, TERM, True), Signal(7, CONT, True)]
    family = {7: 7, 8: 7, 20: 20, 21: 20}
    assert stop.signals(1.0, left(family, workers={7})) == [Signal(20, TERM), Signal(21, TERM)], "strays, one by one"
    assert stop.signals(2.0, left(family, workers={7})) == []


def test_a_store_goes_last_and_only_for_good() -> None:
    stop = Stop(10.0, True)
    stop.ask([7])
    everybody = {7: 7, 5: 5}
    assert stop.signals(1.0, left(everybody, workers={7}, stores={5})) == [], "its last checkpoint may need the store"
    assert stop.signals(2.0, left({5: 5}, stores={5})) == [Signal(5, KILL, True)], "it heeds nothing less"
    assert not stop.over(3.0, left({5: 5}, stores={5}))
    assert stop.over(3.0, left(None))
    passing = Stop(10.0, False)
    assert passing.signals(1.0, left({5: 5}, stores={5})) == []
    assert passing.over(1.0, left({5: 5}, stores={5}))


@pytest.mark.parametrize(("final", "killed"), [(True, [5, 7, 8]), (False, [7, 8])])
def test_after_its_time_whoever_is_left_is_killed_until_patience_ends(final: bool, killed: list[int]) -> None:
    stop = Stop(10.0, final)
    there = left({8: 7, 7: 7, 5: 5}, workers={7}, stores={5})
    assert stop.signals(10.0, there) == [Signal(pid, KILL) for pid in killed]
    assert not stop.over(10.0 + KILL_PATIENCE_SECONDS - 0.001, there)
    assert stop.over(10.0 + KILL_PATIENCE_SECONDS, there)
    assert there.pids(stores=final) == killed, "who is named as unkillable"


def test_the_earlier_deadline_holds_and_what_is_to_end_for_good_does() -> None:
    stop = Stop(10.0, False)
    stop.hasten(20.0, True)
    stop.hasten(15.0, False)
    assert (stop.deadline, stop.final) == (10.0, True)
    stop.hasten(5.0, False)
    assert (stop.deadline, stop.final) == (5.0, True)
    assert [stop.pause(now) for now in (0.0, 4.9, 5.0, 6.0)] == [
        STRAY_SECONDS,
        pytest.approx(0.1),
        KILL_SECONDS,
        KILL_SECONDS,
    ]


def test_a_worker_that_is_not_reaped_yet_is_not_gone() -> None:
    assert not Stop(10.0, False).over(1.0, left({}, workers={7}))
    assert Stop(10.0, False).over(1.0, left({}))
    assert not Stop(10.0, True).over(1.0, left({})), "a zombie is left to be reaped"


def test_who_cannot_be_signalled_keeps_no_signal_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It became another user's, say."""
    signalled: list[int] = []

    def deliver(pid: int, _number: int) -> None:
        if pid == 7:
            raise PermissionError("Operation not permitted")
        signalled.append(pid)

    monkeypatch.setattr(os, "kill", deliver)
    monkeypatch.setattr(os, "killpg", deliver)
    send_signals([Signal(7, TERM), Signal(8, TERM), Signal(7, TERM, group=True), Signal(9, TERM, group=True)])
    assert signalled == [8, 9]
