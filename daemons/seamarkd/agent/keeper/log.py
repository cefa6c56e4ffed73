"""What a keeper says of itself, in `keeper.log`."""

from __future__ import annotations

import os
import sys


def say(sentence: str) -> None:
    print(f"keeper[{os.getpid()}]: {sentence}", file=sys.stderr, flush=True)
