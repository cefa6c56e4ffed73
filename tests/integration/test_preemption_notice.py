"""A notice that the host goes away is what SIGTERM to the agent is: checkpoints, ranks that leave, exit code 143."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from standalone import wait_for
from suite import Suite, suite

pytestmark = pytest.mark.suite

SCRIPT = """
import os, pathlib, signal, sys, time
HERE = pathlib.Path(__file__).parent

def asked(*_):
    (HERE / "asked").write_text("a checkpoint")
    sys.exit(143)

signal.signal(signal.SIGTERM, asked)
with open(HERE / "began", "a") as file:
    print(os.getpid(), file=file)
while not (HERE / "finish").exists():
    time.sleep(0.01)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Suite]]:
    with ExitStack() as stack:

        def make(notice: str) -> Suite:
            settings = {"SEAMARK_AGENT_PREEMPTION_NOTICE": notice}
            return stack.enter_context(suite(tmp_path / "s", agents=1, slots=2, env=settings))

        yield make


@contextmanager
def metadata(notice: Path) -> Iterator[str]:
    """A metadata service, which says what is in this file: its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = notice.read_bytes() if notice.exists() else b"Not Found"
            self.send_response(200 if notice.exists() else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/latest/meta-data/spot/instance-action"
        server.shutdown()
        thread.join()


def test_a_page_that_says_so_is_one_too(start: Callable[[str], Suite], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    with metadata(tmp_path / "notice") as url:
        one = start(url)
        run = one.run(tmp_path / "job", "--preload", "none", script=tmp_path / "script.py")
        try:
            wait_for("its worker", (tmp_path / "began").exists)
            (tmp_path / "notice").write_text('{"action": "terminate"}')
            wait_for("its checkpoint", (tmp_path / "asked").exists)
            log = one.state / "log" / "supervisord.log"
            wait_for("its exit", lambda: "exited: agent-0 (exit status 143; expected)" in log.read_text())
        finally:
            run.close()
        assert f'preemption notice {url}: {{"action": "terminate"}}' in (one.state / "log/agent-0.log").read_text()


def test_a_file_drains_the_node_and_ends_its_agent(start: Callable[[str], Suite], tmp_path: Path) -> None:
    one = start(str(tmp_path / "notice"))
    (tmp_path / "script.py").write_text(SCRIPT)
    run = one.run(tmp_path / "job", "--preload", "none", "--max-restarts", "0", script=tmp_path / "script.py")
    supervisord = one.state / "log" / "supervisord.log"
    try:
        wait_for("its worker", (tmp_path / "began").exists)
        (tmp_path / "notice").write_text("reclaimed at noon")
        wait_for("its checkpoint", (tmp_path / "asked").exists)
        wait_for("its exit", lambda: "exited: agent-0 (exit status 143; expected)" in supervisord.read_text())
        log = (one.state / "log" / "agent-0.log").read_text()
        assert f"preemption notice {tmp_path}/notice: reclaimed at noon: this node is left" in log
        wait_for("the job to wait", lambda: "waits for 1 nodes" in run.text())
        assert one.programs()["agent-0"].pid == 0, "143 is an end that is meant"
        (tmp_path / "notice").unlink()
        one.command("up")
        wait_for("another worker", lambda: len((tmp_path / "began").read_text().splitlines()) == 2)
        (tmp_path / "finish").touch()
        assert run.finish() == 0, run.text() + run.logs()
    finally:
        run.close()
