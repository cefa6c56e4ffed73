"""How each system under test is started: its command line, and nothing else that differs between them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.peers import Peer
from harness.processes import Command
from harness.provenance import REPOSITORY

RANKS = 4
MAX_RESTARTS = 1000  # of launchers that count: never the reason why a row ends
TRAINING = Path(__file__).resolve().parents[1] / "training"
FIRST_PORT, LAST_PORT = 20000, 32000  # below the ephemeral ports


@dataclass(frozen=True)
class System:
    """A system under test. `grace`: seconds it is given to end by itself when it is stopped."""

    name: str
    version: str
    commands: Callable[[], Sequence[Command]]
    grace: float = 15.0


def seamark(version: str) -> System:
    """`seamark run`, from the sources of this checkout."""

    def commands() -> Sequence[Command]:
        arguments = [sys.executable, "-m", "seamarkd.cli", "run", "--standalone"]
        arguments += ["--nproc-per-node", str(RANKS), "--restart-policy", "replace"]
        arguments += ["--max-restarts", str(MAX_RESTARTS), str(TRAINING / "train_seamark.py")]
        return [Command(arguments, {"PYTHONPATH": _sources()})]

    return System("seamark", version, commands)


def seamark_alone(version: str) -> System:
    """`fork_and_monitor` without a launcher or an agent; who dies is not started again."""

    def commands() -> Sequence[Command]:
        arguments = [sys.executable, str(TRAINING / "train_seamark_alone.py")]
        return _by_hand(arguments, free_ports(5), {"PYTHONPATH": _sources()})

    return System("seamark, no agent", version, commands)


def _sources() -> str:
    sources = [str(REPOSITORY / "client"), str(REPOSITORY / "daemons")]
    return os.pathsep.join(sources + [p for p in [os.environ.get("PYTHONPATH")] if p])


def _by_hand(arguments: list[str], port: int, environment: dict[str, str]) -> list[Command]:
    """Each rank as a launcher would have started it."""
    job = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    job["LOCAL_WORLD_SIZE"] = str(RANKS)
    return [Command(arguments, {"RANK": str(rank), "LOCAL_RANK": str(rank), **job}) for rank in range(RANKS)]


def torchrun(version: str) -> System:
    """torchrun at its defaults."""
    return System("torchrun", version, lambda: [_torchrun({})])


def torchrun_new_store(version: str) -> System:
    """torchrun with a new TCPStore at every restart, for the sake of a fair figure.

    By default one store serves all restarts, and workers may read the addresses of their predecessors.
    """
    setting = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return System("torchrun, new store", version, lambda: [_torchrun(setting)])


def _torchrun(environment: dict[str, str]) -> Command:
    arguments = [sys.executable, "-m", "torch.distributed.run", *_launcher_options()]
    return Command([*arguments, str(TRAINING / "train_torchrun.py")], environment)


def _launcher_options() -> list[str]:
    return ["--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", str(MAX_RESTARTS)]


def nvrx_launcher(peer: Peer) -> System:
    """The launcher of nvidia-resiliency-ext at its defaults."""
    arguments = [peer.script("ft_launcher"), *_launcher_options(), "--ignore-missing-fault-tol-cfg"]
    arguments.append(str(TRAINING / "train_torchrun.py"))
    return System("nvrx ft_launcher", peer.version, lambda: [Command(arguments)])


def nvrx_inprocess(peer: Peer, *, tuned: bool = False) -> System:
    """The in-process wrapper of nvidia-resiliency-ext, its ranks started without a launcher.

    Launchers end all ranks when one dies, which would end the wrapper with them. For the same reason there is
    nobody to be asked to end in order. ``tuned``: its intervals at 50 ms, and so the wait for concurrent faults.
    """

    def commands() -> Sequence[Command]:
        arguments = [str(peer.python), str(TRAINING / "train_nvrx.py")]
        return _by_hand(arguments, free_ports(3), {"TUNED": "1"} if tuned else {})

    return System("nvrx in-process, tuned" if tuned else "nvrx in-process", peer.version, commands, grace=0.0)


def free_ports(count: int) -> int:
    """The first of `count` consecutive free TCP ports."""
    for first in range(FIRST_PORT + os.getpid() % 5000, LAST_PORT, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, bound in enumerate(sockets):
                bound.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for bound in sockets:
                bound.close()
    raise OSError(f"no {count} consecutive free ports between {FIRST_PORT} and {LAST_PORT}")
