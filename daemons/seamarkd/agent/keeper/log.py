"""What a keeper says of itself, in `keeper.log`."""

from __future__ import annotations

import contextlib
import os
import sys


def say(sentence: str) -> None:
    """A full disk costs the sentence; unbuffered, for a worker forked later would print what could not be written."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"keeper[{os.getpid()}]: {sentence}\n".encode(errors="backslashreplace"))
