"""A notice that the host goes away: what counts as one, and that it is seen once, whoever gives it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from seamarkd.agent import notice
from seamarkd.agent.notice import NoticeWatch, fetch, is_notice, read, sentence


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, '{"action": "terminate", "time": "2026-11-22T08:22:00Z"}', True),
        (200, "TRUE", True),
        (200, "FALSE", False),
        (200, "false\n", False),
        (200, "", False),
        (200, " \n", False),
        (404, "Not Found", False),
        (204, "x", False),
        (500, "x", False),
    ],
)
def test_what_a_metadata_service_has_to_say(status: int, body: str, expected: bool) -> None:
    assert is_notice(status, body) is expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "preemption notice /n"),
        ("\n  \n reclaimed at noon \nmore", "preemption notice /n: reclaimed at noon"),
        ("\x1b[31m" + "x" * 200, "preemption notice /n: ?[31m" + "x" * 95),
    ],
)
def test_a_notice_is_told_in_a_sentence(text: str, said: str) -> None:
    assert sentence("/n", text) == said


def test_a_file_is_a_notice_also_an_empty_one_and_a_directory(tmp_path: Path) -> None:
    assert read(tmp_path / "gone") is None
    assert read(tmp_path / "gone" / "deeper") is None
    (tmp_path / "empty").touch()
    assert read(tmp_path / "empty/below") is None
    assert read(tmp_path / "empty") == ""
    assert read(tmp_path) == ""
    (tmp_path / "long").write_bytes(b"\xff" * 100_000)
    assert len(read(tmp_path / "long") or "") == notice.LONGEST_BODY


def test_a_file_that_appears_is_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    watch = NoticeWatch(str(tmp_path / "notice"), told.append)
    assert told == []
    (tmp_path / "soon").write_text("in two minutes")
    (tmp_path / "soon").rename(tmp_path / "notice")
    wait_for(lambda: told)
    (tmp_path / "notice").write_text("changed")
    watch.close()
    wait_for(lambda: not any(thread.name == "seamark-notice" for thread in threading.enumerate()))
    assert told == [f"preemption notice {tmp_path}/notice: in two minutes"]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[tuple[int, bytes]], list[str]]]:
    """A metadata service: its address, what it will answer (the last for ever), and the headers that it got."""
    monkeypatch.setattr(notice, "URL_INTERVAL", 0.01)
    monkeypatch.setattr(notice, "URL_TIMEOUT", 0.5)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    will: list[tuple[int, bytes]] = []
    got: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            got.append(self.headers.get("Metadata-Flavor", ""))
            status, body = will.pop(0) if len(will) > 1 else will[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/latest", will, got
        server.shutdown()
        thread.join()


def test_a_page_is_asked_until_it_says_something(answers: tuple[str, list[tuple[int, bytes]], list[str]]) -> None:
    url, will, got = answers
    will += [(404, b"Not Found"), (500, b"x"), (200, b""), (200, b"FALSE"), (200, b"TRUE")]
    told: list[str] = []
    watch = NoticeWatch(url, told.append)
    wait_for(lambda: told)
    watch.close()
    assert told == [f"preemption notice {url}: TRUE"]
    assert got == ["Google"] * 5


def test_a_service_that_is_away_or_speaks_no_http_is_named_once_and_asked_on(
    answers: tuple[str, list[tuple[int, bytes]], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    url, will, _ = answers
    will.append((200, b"TRUE"))
    asked = 0

    def with_faults(address: str) -> tuple[int, str]:
        nonlocal asked
        asked += 1
        return fetch(address if asked > 5 else "http://127.0.0.1:1/")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notice, "fetch", with_faults)
        told: list[str] = []
        watch = NoticeWatch(url, told.append)
        wait_for(lambda: told)
        watch.close()
    assert [f"{url} can't be asked" in record.getMessage() for record in caplog.records] == [True]
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(OSError, match="timed out"):
            fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/")
