"""The TCPStore service of a job that has no keeper: a process of its own that outlives the workers (D8, D13).

python -m seamarkd.agent.store_service HOST PORT PARENT

It writes one line when it serves, and ends with its parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from seamark.launched import ANOTHER_PORT
from seamarkd.agent.keeper.requests import Refused
from seamarkd.agent.keeper.store import Store, listen
from seamarkd.cli.exit_codes import CONFIGURATION

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Entry point."""
    host, port, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(0)
    for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    try:
        listener = listen(host, port)
    except Refused as error:
        sys.stderr.write(f"seamark: the TCPStore: {error}: {ANOTHER_PORT}\n")
        sys.exit(CONFIGURATION)
    Store(host, port, listener.fileno()).run(lambda: print("serves", flush=True))


if __name__ == "__main__":
    main()
