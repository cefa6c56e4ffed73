"""``seamark logs``: which files, which lines, and what is said when there are none."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamark.protocol.messages import Cause, Failure, Incident
from seamarkd.agent import logfiles
from seamarkd.cli import joblogs
from seamarkd.cli.joblogs import (
    LogFile,
    Tail,
    Wanted,
    by_rank,
    culprits,
    find,
    log_files,
    nothing,
    show,
    start_of_last,
)


def file_of(text: bytes) -> Any:
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by who asked
    file.write(text)
    return file


def test_the_suites_logs_go_before_those_of_a_standalone_job(tmp_path: Path) -> None:
    suite, standalone = tmp_path / "jobs", tmp_path / "standalone"
    for directory in (suite / "both/logs", standalone / "both/logs", standalone / "alone/logs", suite / "nologs"):
        directory.mkdir(parents=True)
    homes = [suite, standalone]
    assert find("both", homes) == suite / "both/logs"
    assert find("alone", homes) == standalone / "alone/logs"
    for unknown in ("nologs", "other", "../standalone/alone", ""):
        with pytest.raises(click.UsageError, match="jobs here: alone, both"):
            find(unknown, homes)
    with pytest.raises(click.UsageError, match="jobs here: none"):
        find("both", [tmp_path / "nowhere"])


def test_ranks_and_generations_are_ordered_as_numbers_and_other_files_are_none(tmp_path: Path) -> None:
    ranks = ("rank_10.log", "rank_2.log", "rank_2.generation_10.log", "rank_2.generation_9.log", "rank_0.log")
    others = ("keeper.log", "rank_x.log", "rank_1.log.gz", "rank_1.log.1", "rank_1.generation_x.log", "rank_².log")
    for name in (*ranks, *others):
        (tmp_path / name).touch()
    files = log_files(tmp_path)
    assert [(file.rank, file.generation) for file in files] == [(0, 0), (2, 0), (2, 9), (2, 10), (10, 0)]
    assert {rank: [one.generation for one in group] for rank, group in by_rank(files).items()} == {
        0: [0],
        2: [0, 9, 10],
        10: [0],
    }


def files_of(*numbers: tuple[int, int]) -> list[LogFile]:
    return [LogFile(rank, generation, Path()) for rank, generation in numbers]


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        (Wanted(), [(0, 0), (0, 1), (2, 0), (2, 1)]),
        (Wanted(rank=2), [(2, 0), (2, 1)]),
        (Wanted(generation=1), [(0, 1), (2, 1)]),
        (Wanted(rank=2, generation=0), [(2, 0)]),
        (Wanted(only=frozenset({0})), [(0, 0), (0, 1)]),
        (Wanted(rank=2, only=frozenset({0})), []),
        (Wanted(only=frozenset()), []),
    ],
)
def test_which_files_are_wanted(wanted: Wanted, taken: list[tuple[int, int]]) -> None:
    there = files_of((0, 0), (0, 1), (2, 0), (2, 1))
    assert list(filter(wanted.takes, there)) == files_of(*taken)


@pytest.mark.parametrize(
    ("wanted", "there", "said"),
    [
        (Wanted(rank=1), [(0, 0), (2, 0)], "job j has no rank 1 on this host; ranks here: 0, 2"),
        (Wanted(rank=1, generation=3), [(0, 0)], "job j has no rank 1 on this host; ranks here: 0"),
        (Wanted(), [], "job j has no log file on this host; ranks here: none"),
        (
            Wanted(rank=0, generation=3),
            [(0, 0), (0, 1), (1, 3)],
            "job j has no logs of generation 3 on this host; generations here: 0, 1",
        ),
    ],
)
def test_what_is_said_when_there_is_nothing_to_show(wanted: Wanted, there: list[tuple[int, int]], said: str) -> None:
    assert nothing("j", wanted, files_of(*there)) == said


def incident(failures: list[tuple[str, str]], consequences: list[tuple[str, str]]) -> Incident:
    def records(pairs: list[tuple[str, str]]) -> list[Failure]:
        return [Failure("lost", member, "i", 0, "n", 0, Cause(kind), 0.0, 0.0, 0.0, "d") for member, kind in pairs]  # type: ignore[arg-type]

    return Incident(1, "ranks", 0, records(failures), records(consequences), 1, 0.0, [], {}, {}, [])


@pytest.mark.parametrize(
    ("failures", "consequences", "expected"),
    [
        ([("job/2", "signal"), ("job/3", "exit")], [("job/1", "exception")], {2, 3}),
        ([("job/2", "joined")], [], set()),
        ([("job/store", "store")], [], set()),
        ([("job/1", "left")], [], set()),
        ([("a/b/7", "hang")], [], {7}),
        ([("replica-a", "heartbeat")], [], set()),
    ],
)
def test_who_failed_by_itself(
    failures: list[tuple[str, str]], consequences: list[tuple[str, str]], expected: set[int]
) -> None:
    assert culprits([incident(failures, consequences)]) == expected


@pytest.mark.parametrize(
    ("text", "lines", "expected"),
    [
        (b"", 3, b""),
        (b"a\nb\nc\n", 0, b""),
        (b"a\nb\nc\n", 2, b"b\nc\n"),
        (b"a\nb\nc", 2, b"b\nc"),
        (b"a\nb\nc\n", 9, b"a\nb\nc\n"),
        (b"a\n\n\n", 2, b"\n\n"),
    ],
)
def test_the_last_lines(text: bytes, lines: int, expected: bytes) -> None:
    with file_of(text) as file:
        assert text[start_of_last(file, lines, len(text)) :] == expected


@given(st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"")), max_size=30), st.integers(1, 12))
def test_the_last_lines_are_those_of_a_simple_reading_whatever_the_block(lines: list[bytes], wanted: int) -> None:
    text = b"".join(line + b"\n" for line in lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joblogs, "BLOCK", 4)
        with file_of(text) as file:
            start = start_of_last(file, wanted, file.seek(0, os.SEEK_END))
    assert text[start:] == b"".join(line + b"\n" for line in lines[-wanted:])


def test_a_followed_file_gives_whole_lines_once_and_starts_again_when_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "rank_3.log"
    path.write_bytes(b"one\ntw")
    tail = Tail(path)
    assert list(tail.begin(None)) == [b"one"]
    assert list(tail.read()) == []
    with path.open("ab") as file:
        file.write(b"o\nthree\n")
    assert list(tail.read()) == [b"two", b"three"]
    path.write_bytes(b"new\n")
    assert list(tail.read()) == [b"new"]


def numbered(numbers: range) -> bytes:
    return b"".join(b"line %07d\n" % number for number in numbers)


@pytest.mark.parametrize("lines", [None, 3, 10**6])
def test_of_a_file_whose_beginning_is_gone_the_rest_is_shown(tmp_path: Path, lines: int | None) -> None:
    path = tmp_path / "rank_0.log"
    path.write_bytes(numbered(range(10_000)))
    logfiles.bound(path, 65_536)
    shown = list(Tail(path).begin(lines))
    first = 10_000 - len(shown)
    assert shown == numbered(range(first, 10_000)).splitlines()
    assert len(shown) == lines if lines == 3 else 32_768 // 13 <= len(shown) <= (32_768 + 4_096) // 13


def test_the_last_lines_are_those_of_the_beginning_and_who_follows_gets_the_others_next(tmp_path: Path) -> None:
    path = tmp_path / "rank_0.log"
    path.write_bytes(numbered(range(10)))
    tail = Tail(path)
    last = tail.begin(3)
    with path.open("ab") as file:
        file.write(numbered(range(10, 15)))
    assert list(last) == numbered(range(7, 10)).splitlines()
    assert list(tail.read()) == numbered(range(10, 15)).splitlines()


def test_who_follows_a_file_whose_beginning_goes_sees_no_line_twice_and_no_half_one(tmp_path: Path) -> None:
    path = tmp_path / "rank_0.log"
    tail = Tail(path)
    shown: list[bytes] = []
    for turn in range(20):
        with path.open("ab") as file:
            file.write(numbered(range(turn * 1_000, turn * 1_000 + 1_000)))
        if turn % 3 == 0:
            logfiles.bound(path, 8_192)
        shown += tail.read()
    expected = numbered(range(20_000)).splitlines()
    assert shown == sorted(set(shown))
    assert set(shown) <= set(expected)
    assert shown[-1_000:] == expected[-1_000:]
    assert len(shown) < len(expected)


def test_what_goes_while_it_is_read_is_not_taken_for_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rank_0.log"
    path.write_bytes(numbered(range(100_000)))
    monkeypatch.setattr(joblogs, "BLOCK", 5_000)
    reading = Tail(path).begin(None)
    shown = [next(reading)]
    logfiles.bound(path, 65_536)
    shown += reading
    assert set(shown) <= set(numbered(range(100_000)).splitlines())
    assert shown[-2_000:] == numbered(range(98_000, 100_000)).splitlines()


def test_a_file_that_goes_or_is_cut_while_it_is_read_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "rank_0.log"
    path.write_bytes(numbered(range(100_000)))
    tail = Tail(path)
    reading = tail.read()
    shown = [next(reading)]
    os.truncate(path, 0)
    shown += reading
    assert len(shown) < 100_000
    path.unlink()
    assert list(tail.read()) == list(tail.begin(3)) == []


def test_a_line_without_an_end_is_shown_when_it_is_too_long_or_nothing_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joblogs, "LONGEST_LINE", 10)
    path = tmp_path / "rank_0.log"
    path.write_bytes(b"short")
    tail = Tail(path)
    assert list(tail.begin(None)) == []
    assert list(tail.rest()) == [b"short"]
    path.write_bytes(b"short" + b"bar" * 9)
    assert list(tail.read()) == [b"bar" * 9]


def test_each_line_says_its_rank(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    show(3, iter([b"loss 0.5", b"\xff"]))
    assert capsysbinary.readouterr().out == b"[rank 3] loss 0.5\n[rank 3] \xff\n"
