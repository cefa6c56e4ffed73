"""Logs: a record is one line whatever it holds, in both forms."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import pytest

from seamarkd.logs import configure

log = logging.getLogger("seamarkd.test")


@pytest.fixture(autouse=True)
def _root_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    configure("lighthouse", "debug", "text")
    configure("lighthouse", "info", "text")
    log.debug("dropped")
    log.info("joined %s", "it", extra={"job": "train-1", "rank": 3, "why": "two words"})
    error = capsys.readouterr().err
    assert re.fullmatch(
        r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO lighthouse joined it job=train-1 rank=3 why="two words"\n', error
    )


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_record_is_always_one_line_without_control_characters(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure("agent", "info", form)
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        log.exception("a\nb\r\x1b[31m\x85\u2028c", extra={"job": "x\ny"})
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "\x1b" not in error
    assert "ValueError: first\\nsecond" in error


def test_json_keeps_types_and_its_own_keys(capsys: pytest.CaptureFixture[str]) -> None:
    configure("agent", "warning", "json")
    log.warning("late", extra={"rank": 3, "role": "forged", "path": object})
    found = json.loads(capsys.readouterr().err)
    assert (found["message"], found["rank"], found["role"], found["level"]) == ("late", 3, "agent", "WARNING")
