"""A monitor's patience, what it reads of launchers, and when it refuses (``seamark.autorestart``)."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Mapping

import pytest

from seamark.autorestart import MAX_SHORT_LIVES, SHORT_LIFE, Lives, fork_and_monitor
from seamark.launched import MonitorError, Place
from seamark.slurm import SPAN, first_host, master_port

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "run-7",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "3",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("lived", "delays"),
    [
        ([1.0] * 5, [5.0, 10.0, 20.0, 40.0, 60.0]),
        ([1.0, 1.0, SHORT_LIFE, 1.0], [5.0, 10.0, 5.0, 5.0]),
        ([SHORT_LIFE] * 3, [5.0, 5.0, 5.0]),
    ],
)
def test_delays_double_while_lives_are_short(lived: list[float], delays: list[float]) -> None:
    lives, found = Lives(), []
    for seconds in lived:
        lives = lives.after(seconds)
        found.append(lives.delay(5.0))
    assert found == delays


def test_a_first_delay_above_the_longest_stays() -> None:
    assert Lives(3).delay(90.0) == 90.0


def test_ten_short_lives_in_a_row_are_too_many() -> None:
    lives = Lives()
    for _ in range(MAX_SHORT_LIVES - 1):
        lives = lives.after(0.1)
    assert not lives.too_many
    assert lives.after(0.1).too_many
    assert not lives.after(SHORT_LIFE).too_many


@pytest.mark.parametrize(
    ("change", "local_world_size"),
    [
        ({"SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1"}, 4),
        ({"SLURM_TASKS_PER_NODE": "2,6", "SLURM_NODEID": "1"}, 6),
        ({"SLURM_TASKS_PER_NODE": "4(x2),3,7", "SLURM_NODEID": "2"}, 3),
        ({"SLURM_TASKS_PER_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_NODEID": "3"}, 2),
    ],
)
def test_slurm_tells_how_many_tasks_each_host_has(change: dict[str, str], local_world_size: int) -> None:
    assert Place.read(SRUN | change).local_world_size == local_world_size


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"SLURM_TASKS_PER_NODE": "4(x"}, "SLURM_TASKS_PER_NODE='4\\(x'.*not as Slurm writes"),
        ({"SLURM_NODEID": "one"}, "SLURM_NODEID='one'"),
        ({"SLURM_NODEID": "2"}, "says nothing of node 2"),
        ({"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x' must be a whole number"),
        ({"SLURM_STEP_ID": None}, "SLURM_PROCID is not set: start this script with torchrun, srun"),
    ],
)
def test_what_slurm_does_not_write_is_named(change: dict[str, str | None], sentence: str) -> None:
    environ = {name: value for name, value in (SRUN | change).items() if value is not None}
    with pytest.raises(MonitorError, match=sentence):
        Place.read(environ)


def test_a_step_of_fewer_tasks_than_its_job_is_a_world_of_its_own() -> None:
    """With ``srun --preserve-env`` SLURM_NTASKS is the job's."""
    assert Place.read(SRUN | {"SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "8"}).world_size == 8


def test_slurm_names_the_first_host_and_a_port_where_the_environment_does_not() -> None:
    environ = {name: value for name, value in SRUN.items() if not name.startswith("MASTER_")}
    nodes = {"SLURM_STEP_NODELIST": "localhost,n[1-2]", "SLURM_JOB_NODELIST": "elsewhere"}
    place = Place.read(environ | nodes)
    assert (place.master_addr, place.master_port) == ("127.0.0.1", master_port(77, 3))
    assert Place.read(environ | nodes | {"MASTER_PORT": "29500"}).master_port == 29_500
    assert Place.read(environ | {"SLURM_JOB_NODELIST": "localhost"}).master_addr == "127.0.0.1"
    with pytest.raises(MonitorError, match="MASTER_ADDR is not set"):
        Place.read(environ)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("a,b", "a"),
        ("gpu-[07-10,12],head", "gpu-07"),
        ("n[5,7]", "n5"),
        ("rack[1-2]node[03-04]", "rack1node03"),
        ("a[1-2]x,b", "a1x"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_steps_side_by_side_have_ports_of_their_own_below_those_that_linux_gives_out() -> None:
    ports = sorted(master_port(job, step) for job in range(4_000_000, 4_000_040) for step in range(20))
    assert all(after - before >= SPAN for before, after in itertools.pairwise(ports))
    assert ports[0] > 1_024
    assert ports[-1] + SPAN <= 32_768


@pytest.mark.parametrize(("environ", "job", "generation"), [(TORCHRUN, "run-7", 2), (SRUN, "slurm-77.3", 0)])
def test_a_place_is_read_from_either_launcher(environ: Mapping[str, str], job: str, generation: int) -> None:
    place = Place.read(environ)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 8, 1, 4)
    assert (place.job, place.generation, place.member) == (job, generation, f"{job}/5")
    assert (place.master_addr, place.host, place.serves) == ("127.0.0.1", "127.0.0.1", False)
    assert (place.lighthouse, place.events) == ("tcp://127.0.0.1:29503", "tcp://127.0.0.1:29504")


def test_rank_0_serves_the_lighthouse_unless_one_is_named() -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert Place.read(alone).serves
    assert Place.read(alone).job == "127.0.0.1:29500"
    named = {
        "SEAMARK_LIGHTHOUSE_ADDRESS": "tcp://127.0.0.1:1",
        "SEAMARK_LIGHTHOUSE_EVENTS": "tcp://127.0.0.1:2",
        "SEAMARK_JOB": "j",
    }
    place = Place.read(alone | named)
    assert (place.serves, place.lighthouse, place.events, place.job) == (
        False,
        "tcp://127.0.0.1:1",
        "tcp://127.0.0.1:2",
        "j",
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"RANK": None}, "RANK or SLURM_PROCID is not set: start this script with torchrun"),
        ({"RANK": "five"}, "RANK='five' must be a whole number"),
        ({"RANK": "8"}, "rank 8 of 8 .* is no place in a job"),
        ({"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "10.1.2.3"}, "SEAMARK_INSECURE=1"),
        (
            {"SEAMARK_LIGHTHOUSE_ADDRESS": "tcp://10.1.2.3:1", "SEAMARK_LIGHTHOUSE_EVENTS": "tcp://10.1.2.3:2"},
            "INSECURE",
        ),
        ({"MASTER_PORT": "65534"}, "choose one from 1 to 65531"),
        ({"SEAMARK_LIGHTHOUSE_ADDRESS": "tcp://127.0.0.1:1"}, "set both SEAMARK_LIGHTHOUSE_ADDRESS"),
    ],
)
def test_what_says_too_little_or_contradicts_itself_is_refused(change: dict[str, str | None], sentence: str) -> None:
    environ = {name: value for name, value in (TORCHRUN | change).items() if value is not None}
    with pytest.raises(MonitorError, match=sentence):
        Place.read(environ)


def test_a_lighthouse_elsewhere_wants_a_name_for_the_job() -> None:
    environ = TORCHRUN | {
        "SEAMARK_LIGHTHOUSE_ADDRESS": "tcp://127.0.0.1:1",
        "SEAMARK_LIGHTHOUSE_EVENTS": "tcp://127.0.0.1:2",
    }
    del environ["TORCHELASTIC_RUN_ID"]
    with pytest.raises(MonitorError, match="set SEAMARK_JOB to a name"):
        Place.read(environ)


def test_a_negative_delay_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEAMARK_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="0 or more seconds"):
        fork_and_monitor(restart_delay=-1.0)


def test_a_negative_number_of_restarts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEAMARK_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="max_restarts must be 0 or more"):
        fork_and_monitor(max_restarts=-1)


def test_under_an_agent_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAMARK_ADDRESS", "ipc:///nowhere")
    fork_and_monitor()


@pytest.mark.parametrize(
    ("before", "sentence"),
    [
        ("import sys; sys.modules['torch'] = sys", "torch is imported already"),
        ("import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()", "2 threads run"),
    ],
)
def test_a_process_that_must_not_fork_is_refused(before: str, sentence: str) -> None:
    call = f"{before}\nfrom seamark.autorestart import fork_and_monitor\nfork_and_monitor()"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False, env=TORCHRUN)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "the first statement" in done.stderr.replace("\n", " ")


def test_the_module_needs_the_standard_library_alone() -> None:
    call = "import seamark.autorestart, sys; print(sorted({'torch', 'zmq', 'msgspec', 'numpy'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", call], text=True).strip() == "[]"
