"""The workers' log files: their names, what is given up of them, and that nothing newer is lost."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from test_agent_core import spec

from seamark.protocol.messages import Slot
from seamarkd.agent import logfiles
from seamarkd.agent.logfiles import BLOCK, LogWatch, bound, log_path, log_tail, outdated, remove_outdated, to_free

KIB = 1 << 10


def disk(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize(("generation", "name"), [(0, "rank_3.log"), (1, "rank_3.generation_1.log")])
def test_a_file_per_rank_and_generation(generation: int, name: str) -> None:
    job = msgspec.structs.replace(spec(), log_dir="/logs")
    assert log_path(job, Slot("job/3", 3, 1, "n", 1), generation) == Path("/logs") / name


NAMES = [
    "rank_1.log",
    "rank_1.generation_1.log",
    "rank_1.generation_2.log",
    "rank_11.log",
    "rank_1.log.1",
    "keeper.log",
]


@pytest.mark.parametrize(
    ("current", "generations", "gone"),
    [
        ("rank_1.log", 1, []),
        ("rank_1.generation_2.log", 3, []),
        ("rank_1.generation_3.log", 3, ["rank_1.log"]),
        ("rank_1.generation_3.log", 1, ["rank_1.log", "rank_1.generation_1.log", "rank_1.generation_2.log"]),
        ("rank_11.generation_9.log", 2, ["rank_11.log"]),
    ],
)
def test_which_files_are_outdated(current: str, generations: int, gone: list[str], tmp_path: Path) -> None:
    assert outdated(NAMES, current, generations) == gone
    for name in NAMES:
        (tmp_path / name).touch()
    remove_outdated(tmp_path / current, generations)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(set(NAMES) - set(gone))


@pytest.mark.parametrize(
    ("size", "allocated", "limit", "freed"),
    [
        (0, 0, 1_000 * KIB, 0),
        (1_000 * KIB, 1_000 * KIB, 1_000 * KIB, 0),
        (1_004 * KIB, 1_004 * KIB, 1_000 * KIB, 504 * KIB),
        (1_004 * KIB + 5, 1_008 * KIB, 1_000 * KIB, 504 * KIB),
        # A hole is there already.
        (9_000 * KIB, 600 * KIB, 1_000 * KIB, 0),
        (9_000 * KIB, 1_001 * KIB, 1_000 * KIB, 8_500 * KIB),
        # Allocated ahead of what is written, as XFS does.
        (400 * KIB, 2_000 * KIB, 1_000 * KIB, 0),
    ],
)
def test_how_much_is_freed(size: int, allocated: int, limit: int, freed: int) -> None:
    assert to_free(size, allocated, limit) == freed
    assert freed % BLOCK == 0


def test_the_newest_stays_and_the_size_too(tmp_path: Path) -> None:
    path = tmp_path / "log"
    content = b"".join(b"%07d\n" % number for number in range(64 * KIB))
    path.write_bytes(content)
    bound(path, 128 * KIB)
    assert path.stat().st_size == len(content)
    assert disk(path) <= 64 * KIB + BLOCK
    assert path.read_bytes()[-64 * KIB :] == content[-64 * KIB :]
    assert log_tail(path)[-1] == f"{64 * KIB - 1:07d}"
    bound(tmp_path / "absent", 1)


def test_where_no_hole_can_be_made_the_file_is_copied_and_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(logfiles, "punch", refuse)
    path = tmp_path / "log"
    with path.open("ab") as writer:
        writer.write(b"x" * 64 * KIB)
        writer.flush()
        bound(path, 32 * KIB)
        assert (path.stat().st_size, (tmp_path / "log.1").stat().st_size) == (0, 64 * KIB)
        writer.write(b"more")
    assert path.read_bytes() == b"more"


FLOOD = """
import os, sys
descriptor = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
number = 0
while not os.path.exists(sys.argv[1] + ".stop"):
    # One write is one line, as print() of a line-buffered file does it.
    for number in range(number, number + 1000):
        os.write(descriptor, b"line %012d %s\\n" % (number, b"." * 80))
    number += 1
"""


def test_a_flood_stays_below_the_limit_and_loses_nothing_new(tmp_path: Path) -> None:
    """As fast as a process can write: several hundred thousand lines in a second."""
    limit = 4 << 20
    path = tmp_path / "log"
    watch = LogWatch(limit)
    flood = subprocess.Popen([sys.executable, "-c", FLOOD, path])
    try:
        watch.watch("job", [path])
        deadline = time.monotonic() + 60.0
        while not (path.exists() and path.stat().st_size > 8 * limit and disk(path) < path.stat().st_size // 2):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (tmp_path / "log.stop").touch()
        assert flood.wait(30.0) == 0
        watch.watch("job", [])
        while disk(path) > limit:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        flood.kill()
        flood.wait()
        watch.close()
    with path.open("rb") as file:
        file.seek(-limit // 2, os.SEEK_END)
        lines = file.read().splitlines()[1:]
    numbers = [int(line.split()[1]) for line in lines]
    assert len(numbers) > 10_000
    assert all(later == earlier + 1 for earlier, later in itertools.pairwise(numbers)), "no line is lost or torn"


def test_a_directory_that_can_t_be_written_is_named_once_and_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = tmp_path / "good"
    good.write_bytes(b"x" * 64 * KIB)
    watch = LogWatch(32 * KIB)
    watch.watch("job", [tmp_path, good])
    deadline = time.monotonic() + 20.0
    while disk(good) > 32 * KIB:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    good.write_bytes(b"x" * 64 * KIB)
    watch.watch("other", [good])
    while disk(good) > 32 * KIB:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    watch.close()
    assert [f"{tmp_path} can't be kept below" in record.getMessage() for record in caplog.records] == [True]
