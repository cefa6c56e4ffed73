"""What a person may get wrong: each ends with a sentence that says what to do, and a documented exit code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from standalone import Standalone, standalone, wait_for

pytestmark = pytest.mark.integration

TORCH = ("--preload", "numpy,torch,torch.distributed")
"""What a script without an optimizer needs: torch._dynamo is the slower half of the import."""


def seamark(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "run"), "XDG_STATE_HOME": str(tmp_path / "state")}
    return subprocess.run(
        [sys.executable, "-m", "seamarkd.cli", *arguments],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["run", "--standalone", "nowhere.py"], 64, "nowhere.py: no such script"),
        (["run", "--standalone", "--nproc-per-node", "0", "x.py"], 64, "--nproc-per-node"),
        (["run", "--standalone", "--nnodes", "3:2", "x.py"], 64, "1 <= MIN <= MAX"),
        (["run", "--standalone", "--nnodes", "two", "x.py"], 64, "number of nodes"),
        (["run", "--standalone", "--restart-policy", "never", "x.py"], 64, "any-failed"),
        (["run", "--standalone", "--typo", "x.py"], 64, "--typo"),
        (["run", "--standalone", "--name", "a/b", __file__], 64, "slash"),
        (["run", "--standalone", "--env", "NOVALUE", __file__], 64, "NAME=VALUE"),
        (["run", "--standalone", "--restart-policy", "min-happy", __file__], 64, "min-healthy"),
        (["run", "--standalone", "--preload", "torch,my module", __file__], 64, "'my module' is no module's name"),
        (["run", "nowhere.py"], 64, "nowhere.py: no such script"),
        (["run"], 64, "which SCRIPT?"),
        (["run", "--attach", "job", __file__], 64, "leave SCRIPT"),
        (["why", "nothing"], 64, "there is no job nothing"),
        (["frobnicate"], 64, "frobnicate"),
    ],
)
def test_the_command_line(tmp_path: Path, arguments: list[str], code: int, sentence: str) -> None:
    done = seamark(tmp_path, *arguments)
    assert done.returncode == code, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_directory_with_too_long_a_name(tmp_path: Path) -> None:
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / ("x" * 100)), "XDG_STATE_HOME": str(tmp_path / "state")}
    command = [sys.executable, "-m", "seamarkd.cli", "run", "--standalone", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78
    assert "set XDG_RUNTIME_DIR" in done.stderr
    assert "Traceback" not in done.stderr


def script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text(text)
    return path


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = (*TORCH, "--master-port", str(port - 2))
        with standalone(tmp_path, *options, script=script(tmp_path, "print('never')")) as run:
            assert run.finish() == 1
            assert f"port {port - 2} or {port} on 127.0.0.1 is in use" in run.text()
            assert "--master-port" in run.text()


@pytest.mark.parametrize("policy", ["replace", "any-failed"])
def test_a_worker_that_exits_at_once_for_ever(tmp_path: Path, policy: str) -> None:
    starts = tmp_path / "starts"
    text = f"open({str(starts)!r}, 'a').write('x')\nprint('the disk is upside down')\nraise SystemExit(1)\n"
    options = ("--max-restarts", "3", "--restart-policy", policy, "--preload", "none")
    with standalone(tmp_path, *options, script=script(tmp_path, text)) as run:
        assert run.finish() == 1
        assert "rank 0 exited with code 1, and the 3 restarts of --max-restarts are used up" in run.text()
        assert "the disk is upside down" in run.text()
    assert starts.read_text() == "x" * 4


def test_a_wrapped_function_that_fails_for_ever_in_a_new_process_each_time(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    text = f"""
import os, seamark
open({str(starts)!r}, "a").write("x")
@seamark.Wrapper()
def train():
    os.kill(os.getpid(), 9)
train()
"""
    with standalone(tmp_path, *TORCH, "--max-restarts", "3", script=script(tmp_path, text)) as run:
        assert run.finish() == 1
        assert "rank 0 killed by SIGKILL, and the 3 restarts of --max-restarts are used up" in run.text()
    assert starts.read_text() == "x" * 4


PLAIN = """
import os, sys, time
import torch.distributed as dist
dist.init_process_group("gloo")
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
dist.barrier()
if first and dist.get_rank() == 1:
    os.kill(os.getpid(), 9)
dist.barrier()
print("finished", dist.get_world_size())
"""


@pytest.mark.parametrize("policy", ["replace", "any-failed"])
def test_a_script_that_never_calls_the_wrapper_is_restarted_whole(tmp_path: Path, policy: str) -> None:
    options = (*TORCH, "--nproc-per-node", "2", "--restart-policy", policy)
    with standalone(tmp_path, *options, script=script(tmp_path, PLAIN)) as run:
        assert run.finish() == 0, run.text() + run.logs()
        assert ("no rank was heard from in seamark.Wrapper" in run.text()) is (policy == "replace")
        assert "finished 2" in run.logs()


def test_any_failed_with_the_wrapper_is_refused(tmp_path: Path) -> None:
    text = "import seamark, time\n@seamark.Wrapper()\ndef train():\n    time.sleep(3600)\ntrain()\n"
    with standalone(tmp_path, *TORCH, "--restart-policy", "any-failed", script=script(tmp_path, text)) as run:
        assert run.finish() == 1
        assert "--restart-policy replace" in run.text()


ABORTING = """
import os, seamark
import torch.distributed as dist
@seamark.Wrapper()
def train(call: seamark.CallWrapper):
    dist.init_process_group("gloo")
    if call.state.rank == 1:
        raise seamark.RestartAbort("the data is poisoned")
    dist.barrier()
train()
"""


def test_restart_abort_ends_the_job(tmp_path: Path) -> None:
    with standalone(tmp_path, *TORCH, "--nproc-per-node", "2", script=script(tmp_path, ABORTING)) as run:
        assert run.finish() == 3, run.text() + run.logs()
        assert "the data is poisoned" in run.text()


ENDLESS = """
import os, pathlib, seamark
import torch, torch.distributed as dist
@seamark.Wrapper()
def train(call: seamark.CallWrapper):
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    pathlib.Path(__file__).with_name(f"pid-{call.state.rank}").write_text(str(os.getpid()))
    while True:
        dist.all_reduce(torch.ones(1))
train()
"""


def wait_for_collectives(tmp_path: Path) -> list[int]:
    """Waits until both ranks of ``ENDLESS`` have done one; their process ids."""
    paths = [tmp_path / f"pid-{rank}" for rank in range(2)]
    wait_for("both ranks", lambda: all(path.is_file() and path.read_text() for path in paths))
    return [int(path.read_text()) for path in paths]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_leaves_nothing_behind(tmp_path: Path, signum: int, code: int) -> None:
    with standalone(tmp_path, *TORCH, "--nproc-per-node", "2", script=script(tmp_path, ENDLESS)) as run:
        wait_for_collectives(tmp_path)
        run.process.send_signal(signum)
        assert run.finish() == code, run.text()


def test_stopping_while_the_keeper_still_imports_leaves_nothing_behind(tmp_path: Path) -> None:
    with standalone(tmp_path, script=script(tmp_path, "print('never')")) as run:
        wait_for("the keeper", lambda: "starts the keepers" in run.text())
        run.process.send_signal(signal.SIGINT)
        assert run.finish() == 130, run.text()
        assert "starts the workers" not in run.text(), "it waited for the import"
        assert "lost the keeper" not in run.text()


def test_a_killed_run_takes_its_workers_with_it(tmp_path: Path) -> None:
    run = Standalone(tmp_path, *TORCH, "--nproc-per-node", "2", script=script(tmp_path, ENDLESS))
    try:
        pids = wait_for_collectives(tmp_path)
        run.process.kill()
        wait_for("its workers to end", lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    finally:
        run.close()


def test_outside_seamark_the_wrapper_says_how_to_start(tmp_path: Path) -> None:
    path = script(tmp_path, "import seamark\n@seamark.Wrapper()\ndef train():\n    pass\ntrain()\n")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "seamark run --standalone" in done.stderr


def test_a_disabled_wrapper_returns_the_function_untouched(tmp_path: Path) -> None:
    text = "import seamark\ndef train():\n    return 7\nassert seamark.Wrapper(enabled=False)(train) is train\n"
    subprocess.run([sys.executable, str(script(tmp_path, text))], timeout=60, check=True)
