"""A notice that this host will be taken away: a file that appears, or a page of a cloud's metadata service.

Looked for on a thread of its own, because neither a network file system nor a metadata service has to answer. What
follows from a notice is not known here.
"""

from __future__ import annotations

import http.client
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from seamarkd.settings import is_url

log = logging.getLogger(__name__)

FILE_INTERVAL = 0.1
URL_INTERVAL = 5.0
"""Seconds between two questions; clouds advise five, of the 30 to 120 that a notice comes ahead."""
URL_TIMEOUT = 2.0
LONGEST_BODY = 4_096
LONGEST_REASON = 100
HEADERS = {"Metadata-Flavor": "Google"}
"""Without it Google's metadata service refuses; others don't mind."""


class NoticeWatch:
    """Waits for a notice, once.

    Args:
        source: the path of a file, or an http or https address.
        on_notice: called in the thread, with a sentence for people.
    """

    def __init__(self, source: str, on_notice: Callable[[str], None]) -> None:
        self._source = source
        self._on_notice = on_notice
        self._closed = threading.Event()
        self._silent = False
        self._look, self._interval = (
            (self._ask, URL_INTERVAL) if is_url(source) else (lambda: read(Path(source)), FILE_INTERVAL)
        )
        threading.Thread(target=self._run, name="seamark-notice", daemon=True).start()

    def close(self) -> None:
        """It is looked for no more."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            text = self._look()
            if text is not None and not self._closed.is_set():
                self._on_notice(sentence(self._source, text))
                return
            self._closed.wait(self._interval)

    def _ask(self) -> str | None:
        try:
            status, body = fetch(self._source)
        except (OSError, http.client.HTTPException) as error:
            if not self._silent:
                log.warning("%s can't be asked for a preemption notice: %s", self._source, error)
            self._silent = True
            return None
        self._silent = False
        return body if is_notice(status, body) else None


def is_notice(status: int, body: str) -> bool:
    """Whether a metadata service says that the host goes away: anything but nothing, or Google's FALSE."""
    return status == 200 and body.strip().upper() not in ("", "FALSE")


def sentence(source: str, text: str) -> str:
    """A notice for people: where it came from, and its first line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = "".join(letter if letter.isprintable() else "?" for letter in lines[0])[:LONGEST_REASON] if lines else ""
    return f"preemption notice {source}" + (f": {first}" if first else "")


def read(path: Path) -> str | None:
    """The beginning of the file, None as long as there is none; one that can't be read is one."""
    try:
        with path.open("rb") as file:
            return file.read(LONGEST_BODY).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return "" if path.exists() else None


def fetch(url: str) -> tuple[int, str]:
    """Status and the beginning of the body.

    Raises:
        OSError: nobody answers.
        http.client.HTTPException: what answers speaks no HTTP.
    """
    # A proxy answers for another host than this one.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=HEADERS)
    try:
        with opener.open(request, timeout=URL_TIMEOUT) as response:
            # One reading: who sends drop by drop has said it with the first one.
            return response.status, response.read1(LONGEST_BODY).decode(errors="replace")
    except urllib.error.HTTPError as error:
        error.close()
        return error.code, ""
