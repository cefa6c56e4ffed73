"""A Slurm cluster of two nodes on this host: its own daemons as a test's own processes, all on loopback."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil
from standalone import wait_for
from suite import free_ports

PROGRAMS = ["munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "unshare"]
NODES = ("n1", "n2")
SBIN = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
CPUS = 4
AS_HOST = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
"""A slurmd that is not built for several on one host goes by the host's name, and so does what it starts."""

CONF = """
ClusterName=seamark
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
SlurmdTimeout=10
StateSaveLocation={home}/controller
SlurmctldPidFile={home}/controller.pid
SlurmctldLogFile={home}/controller.log
SlurmdSpoolDir={home}/spool-%n
SlurmdPidFile={home}/%n.pid
SlurmdLogFile={home}/%n.log
MailProg={true}
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


def why_not() -> str:
    """Why a cluster can't be had here; empty if it can."""
    if not os.environ.get("SEAMARK_SLURM"):
        return "they take six minutes, and run where SEAMARK_SLURM=1 asks for them"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=SBIN) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed"
    tried = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, text=True, check=False)
    return tried.stderr.strip()


class Cluster:
    """The daemons, and what people type.

    Args:
        home: everything of it is in here; short, for the path of a Unix socket has 107 bytes at most.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        for name in ("run", "state", "controller", *(f"spool-{node}" for node in NODES)):
            (home / name).mkdir(mode=0o700)
        controller, *ports = free_ports(1 + len(NODES))
        self.conf = home / "slurm.conf"
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS}"
            for node, port in zip(NODES, ports, strict=True)
        )
        fields = {"home": home, "user": getpass.getuser(), "true": shutil.which("true"), "nodes": nodes, "host": host}
        self.conf.write_text(CONF.format(controller=controller, **fields))
        self.hosts = home / "hosts"
        self.hosts.write_text(f"127.0.0.1 localhost {' '.join(NODES)}\n")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SEAMARK_"))}
        self.env = kept | {
            "PATH": SBIN,
            "SLURM_CONF": str(self.conf),
            "XDG_RUNTIME_DIR": str(home / "run"),
            "XDG_STATE_HOME": str(home / "state"),
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._outputs: list[IO[bytes]] = []

    def up(self) -> None:
        key = self.home / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        # Forced: it would have everybody reach its socket, which is in a private directory.
        self._start(
            "munged", "--foreground", "--force", *(f"--{name}={self.home}/munge.{file}" for name, file in files.items())
        )
        wait_for("munged", (self.home / "munge.socket").exists)
        self._start("slurmctld", "-D", "-f", str(self.conf))
        for node in NODES:
            self.start_node(node)
        wait_for("idle nodes", self.all_idle)

    def start_node(self, node: str) -> None:
        """A slurmd, in namespaces where its host has that name, and knows the others'."""
        slurmd = str(shutil.which("slurmd", path=SBIN))
        as_host = ("--uts", "--mount", "sh", "-ec", AS_HOST, "sh", node, str(self.hosts))
        self._start("unshare", *as_host, slurmd, "-D", "-f", str(self.conf), called=node)

    def lose_node(self, node: str) -> None:
        """Kills all that is in the node's namespace, at once: nobody there has time to say or end anything."""
        daemon = self._daemons.pop(node)
        place = os.readlink(f"/proc/{daemon.pid}/ns/uts")
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError, PermissionError):
                if os.readlink(f"/proc/{process.pid}/ns/uts") == place:
                    os.kill(process.pid, signal.SIGKILL)
        daemon.wait()

    def _start(self, program: str, *arguments: str, called: str = "") -> None:
        output = (self.home / f"{called or program}.out").open("wb")
        self._outputs.append(output)
        command = [str(shutil.which(program, path=SBIN)), *arguments]
        self._daemons[called or program] = subprocess.Popen(command, env=self.env, stdout=output, stderr=output)

    def command(self, *words: str, check: bool = True) -> str:
        """What a command of Slurm's prints."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def all_idle(self) -> bool:
        """Whether all nodes have nothing to do, and answer."""
        states = self.command("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()
        return states == ["idle"] * len(NODES)

    def running(self) -> str:
        """The number of the one job that runs; empty if none does."""
        return self.command("squeue", "--noheader", "--states=RUNNING", "--format=%i").strip()

    def job(self, number: int) -> dict[str, str]:
        """What the controller says of a job."""
        words = self.command("scontrol", "show", "job", "--oneliner", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start(self, *words: str, output: Path, **more: str) -> subprocess.Popen[bytes]:
        """srun or salloc in the background."""
        with output.open("wb") as file:
            return subprocess.Popen(words, env=self.env | more, stdout=file, stderr=subprocess.STDOUT)

    def submit(self, *words: str, **more: str) -> int:
        """sbatch; returns the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *words],
            env=self.env | more,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def left(self, word: str = "") -> list[str]:
        """What is there of it, and has this word in its command line.

        Everything that any of its processes started has its directory in the environment.
        """
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.environ().get("XDG_RUNTIME_DIR", "").startswith(str(self.home))
                line = " ".join(process.cmdline())
                if mine and word in line and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid}: {line}")
        return found

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.home.glob("*.log")))

    def down(self) -> None:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.command("scancel", "--user", getpass.getuser(), check=False)
            wait_for("jobs to end", lambda: not self.command("squeue", "--noheader"), 30.0)
        for name in (*NODES, "slurmctld", "munged"):
            daemon = self._daemons.get(name)
            if daemon is not None:
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(20.0)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        for output in self._outputs:
            output.close()


@contextlib.contextmanager
def cluster(home: Path) -> Iterator[Cluster]:
    """One that leaves nothing behind."""
    made = Cluster(home)
    try:
        made.up()
        yield made
    finally:
        made.down()
    wait_for("what the cluster started to end", lambda: not made.left(), 30.0)
