"""``seamark logs``: which files, which lines, and what is said when there are none."""

from __future__ import annotations

import io
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamarkd.cli import joblogs
from seamarkd.cli.joblogs import Tail, find, rank_files, show, start_of_last


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


def test_ranks_are_ordered_as_numbers_and_other_files_are_not_ranks(tmp_path: Path) -> None:
    for name in ("rank_10.log", "rank_2.log", "rank_0.log", "keeper.log", "rank_x.log", "rank_1.log.gz"):
        (tmp_path / name).touch()
    assert list(rank_files(tmp_path)) == [0, 2, 10]


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
    assert text[start_of_last(io.BytesIO(text), lines) :] == expected


@given(st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"")), max_size=30), st.integers(1, 12))
def test_the_last_lines_are_those_of_a_simple_reading_whatever_the_block(lines: list[bytes], wanted: int) -> None:
    text = b"".join(line + b"\n" for line in lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joblogs, "BLOCK", 4)
        start = start_of_last(io.BytesIO(text), wanted)
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
