"""The keeper, its client, the progress page and the death watch, with real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from seamark.progress import Canaries, ProgressPage, create, incarnation_hash
from seamarkd.agent import watch
from seamarkd.agent.keeper_answers import Held, KeeperError, Process
from seamarkd.agent.keeper_client import KeeperClient
from seamarkd.agent.watch import DeathWatch

pytestmark = pytest.mark.integration

DEADLINE = 20.0
CLIENT = Path(__file__).parents[2] / "client"
# Read when a program starts, so a worker that asks for it is exec'ed; without an effect on the scripts here.
FORCE_EXEC = {"PYTHONNOUSERSITE": "1"}


def environment(**more: str) -> dict[str, str]:
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("SEAMARK_", "OMP_", "PYTHON"))
    } | {"PYTHONPATH": str(CLIENT), **more}


class Session:
    """One agent's connection, and what it hears."""

    client: KeeperClient

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.exits: asyncio.Queue[Process] = asyncio.Queue()
        self.closed: asyncio.Queue[str] = asyncio.Queue()
        self._held: list[Held] = []

    async def spawn(self, **options: Any) -> None:
        options = {"job": "job", "epoch": 1, "preload": (), "env": environment(), **options}
        self.client = await KeeperClient.spawn(
            sys.executable,
            str(self.directory / "keeper"),
            cwd=str(self.directory),
            log=str(self.directory / "keeper.log"),
            on_exited=self.exits.put_nowait,
            on_closed=self.closed.put_nowait,
            **options,
        )

    async def connect(self, epoch: int, **options: Any) -> None:
        self.client = await KeeperClient.connect(
            str(self.directory / "keeper"),
            epoch=epoch,
            on_exited=self.exits.put_nowait,
            on_closed=self.closed.put_nowait,
            **options,
        )

    def script(self, source: str, name: str = "script.py") -> str:
        path = self.directory / name
        path.write_text(textwrap.dedent(source))
        return str(path)

    def log(self, slot: str) -> Path:
        return self.directory / f"{slot}.log"

    async def start(
        self, slot: str, *argv: str, incarnation: str = "first", env: dict[str, str] | None = None, **options: Any
    ) -> Held:
        options = {"num_threads": 1, "cwd": str(self.directory), **options}
        log = str(self.log(slot))
        env = environment() | (env or {})
        held = await self.client.start_worker(slot, incarnation, argv, env=env, log=log, **options)
        self._held.append(held)
        return held

    async def start_store(self, slot: str, incarnation: str, host: str = "127.0.0.1", port: int = 0) -> Held:
        held = await self.client.start_store(
            slot, incarnation, host=host, port=port, env=environment(), log=str(self.log(slot))
        )
        self._held.append(held)
        return held

    async def next_exit(self) -> Process:
        async with asyncio.timeout(DEADLINE):
            return await self.exits.get()

    async def run(self, slot: str, *argv: str, **options: Any) -> tuple[Process, str]:
        """Start a worker, wait for its end, and have the keeper forget it: its exit and what it printed."""
        await self.start(slot, *argv, **options)
        exited = await self.next_exit()
        await self.client.acknowledge(exited.slot, exited.incarnation)
        return exited, self.log(slot).read_text()

    async def printed(self, slot: str, lines: int = 1) -> list[str]:
        """What a worker has printed, as soon as that is so many lines."""

        def complete() -> bool:
            return self.log(slot).exists() and self.log(slot).read_text().count("\n") >= lines

        await until(complete, f"{slot} to print {lines} lines")
        return self.log(slot).read_text().splitlines()

    async def family(self, slot: str) -> list[int]:
        """The process ids that FAMILY printed, parent first; its members print in any order."""
        return [int(line.split()[1]) for line in sorted(await self.printed(slot, 3))]

    def release(self) -> None:
        for held in self._held:
            held.close()
        self._held.clear()


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        await asyncio.sleep(0.005)


@contextlib.contextmanager
def full_table(pid: int = 0) -> Iterator[None]:
    """The process, this one by default, gets no further descriptor."""
    usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(fd) for fd in os.listdir(f"/proc/{pid or os.getpid()}/fd")}
    if not pid:
        # That of the look itself is closed by now.
        used = {fd for fd in used if Path(f"/proc/self/fd/{fd}").exists()}
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(set(range(len(used) + 1)) - used), usual[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextlib.asynccontextmanager
async def keeper(directory: Path, **options: Any) -> AsyncIterator[Session]:
    session = Session(directory)
    await session.spawn(**options)
    try:
        yield session
    finally:
        session.release()
        if running(session.client.ready.pid):
            session.client.close()
            last = Session(directory)
            await last.connect(epoch=1 << 40)
            await last.client.stop(0)
        session.client.close()
    assert not running(session.client.ready.pid)
    assert not (directory / "keeper").exists()


@contextlib.asynccontextmanager
async def connection(directory: Path, epoch: int) -> AsyncIterator[Session]:
    session = Session(directory)
    await session.connect(epoch)
    try:
        yield session
    finally:
        session.release()
        session.client.close()


def play(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 2 * DEADLINE))


@pytest.fixture
def directory() -> Iterator[Path]:
    # Not tmp_path: the path of a unix socket ends at 107 bytes.
    path = Path(tempfile.mkdtemp(prefix="keeper-"))
    yield path
    shutil.rmtree(path)


class TorchKeeper:
    """A keeper with torch preloaded, which several tests share, each as a newer agent."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._epoch = 1
        self._session = Session(directory)

    async def spawn(self) -> None:
        began = time.monotonic()
        await self._session.spawn(preload=None)
        ready = self._session.client.ready
        imports = ", ".join(f"{name} {seconds:.2f}" for name, seconds in ready.modules)
        print(f"spawn to ready: {time.monotonic() - began:.2f} s (imports: {imports})")
        assert ready.forks, ready.reason
        self._session.client.close()

    def agent(self) -> contextlib.AbstractAsyncContextManager[Session]:
        self._epoch += 1
        return connection(self.directory, self._epoch)

    async def stop(self) -> None:
        async with self.agent() as session:
            assert await session.client.stop(0) == []


@pytest.fixture(scope="module")
def torch_keeper() -> Iterator[TorchKeeper]:
    shared = TorchKeeper(Path(tempfile.mkdtemp(prefix="keeper-")))
    play(shared.spawn())
    yield shared
    play(shared.stop())
    shutil.rmtree(shared.directory)


# -- before the script ---------------------------------------------------------------------------------------


def test_a_long_look_at_checkpoints_holds_up_nobody_else(directory: Path) -> None:
    """Of a file that takes as long to read as the test wants."""
    checkpoints = directory / "checkpoints"
    checkpoints.mkdir()
    content = checkpoints / "step_00000001.pt"
    os.mkfifo(content)
    (checkpoints / "step_00000001.done").write_text(json.dumps({"format": 1, "size": 9, "sha256": "0" * 64}))
    watched = {"SEAMARK_CHECKPOINT_DIR": str(checkpoints), "SEAMARK_CHECKPOINT_SECONDS": "600"}

    async def scenario() -> None:
        async with keeper(directory) as session:
            script = session.script("print('begins', flush=True)")
            await session.start("slow", script, env=watched)
            exited, printed = await session.run("quick", script)
            assert (exited.slot, exited.status, printed) == ("quick", 0, "begins\n")
            assert session.log("slow").read_text() == "", "the script waits until its directory is in order"
            os.close(os.open(content, os.O_WRONLY))
            slow = await session.next_exit()
            assert (slow.slot, slow.status) == ("slow", 0)
            *said, begins = session.log("slow").read_text().splitlines()
            assert begins == "begins"
            assert [line.split(":")[:2] for line in said] == [
                ["seamark", " Renamed step_00000001.pt to step_00000001.pt.quarantined"],
                ["seamark", f" {checkpoints} holds no valid checkpoint."],
            ]

    play(scenario())


@pytest.mark.parametrize(
    "more", [{"SEAMARK_CHECKPOINT_DIR": "/dev/null"}, {"PYTHONPATH": ""}, {"SEAMARK_CHECKPOINT_SECONDS": "soon"}]
)
def test_no_disorder_of_checkpoints_keeps_a_script_from_its_start(directory: Path, more: dict[str, str]) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            env = {"SEAMARK_CHECKPOINT_DIR": str(directory), "SEAMARK_CHECKPOINT_SECONDS": "5", **more}
            exited, printed = await session.run("worker", session.script("print('begins')"), env=env)
            assert exited.status == 0
            assert printed.endswith("begins\n")

    play(scenario())


@pytest.mark.parametrize("more", [{}, FORCE_EXEC])
def test_a_worker_is_bound_before_its_script_and_others_are_not(directory: Path, more: dict[str, str]) -> None:
    script = "import os; print(sorted(os.sched_getaffinity(0)))"
    all_of_them = sorted(os.sched_getaffinity(0))

    async def scenario() -> None:
        async with keeper(directory) as session:
            for slot, cpus, expected in (
                ("one", all_of_them[-1:], all_of_them[-1:]),
                ("all", (), all_of_them),
                # Such a one is taken away by nobody but an operator, and then a rank runs slower and does run.
                ("gone", (65_535,), all_of_them),
            ):
                exited, printed = await session.run(slot, session.script(script), env=more, cpus=cpus)
                assert (exited.status, exited.forked) == (0, not more)
                assert printed.splitlines()[-1] == str(expected)
            assert "seamark: can't be bound to processors [65535]: Invalid argument" in printed

    play(scenario())


# -- exits ---------------------------------------------------------------------------------------------------

ENDINGS = {
    "pass": 0,
    "import sys; sys.exit(3)": 3,
    "import sys; sys.exit('x')": 1,
    "raise ValueError": 1,
    "def broken(:": 1,
    "import atexit, os; atexit.register(os._exit, 9)": 9,
    "raise KeyboardInterrupt": -signal.SIGINT,
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": -signal.SIGKILL,
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)": -signal.SIGTERM,
    "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": -signal.SIGSEGV,
    "import os; os.abort()": -signal.SIGABRT,
}


@pytest.mark.parametrize("env", [{}, FORCE_EXEC], ids=["forked", "execed"])
def test_exit_statuses_are_those_of_plain_python(directory: Path, env: dict[str, str]) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            # Starting an interpreter takes its time, so not every case is tried that way.
            endings = dict(list(ENDINGS.items())[:: 2 if env else 1])
            for number, source in enumerate(endings):
                path = session.script(source, f"ending{number}.py")
                held = await session.start(f"slot{number}", path, env=env)
                assert held.process.forked is (not env)
            await session.start("missing", "missing.py", env=env)
            seen = {}
            while len(seen) <= len(endings):
                exited = await session.next_exit()
                seen[exited.slot] = exited.status
            wanted = {f"slot{number}": status for number, status in enumerate(endings.values())}
            assert seen == wanted | {"missing": 2}
            assert "can't open file" in session.log("missing").read_text()

    play(scenario())


@pytest.mark.parametrize("env", [{}, FORCE_EXEC], ids=["forked", "execed"])
def test_a_held_worker_runs_once_it_is_released(directory: Path, env: dict[str, str]) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            script = session.script("print('runs', flush=True)")
            await session.start("held", script, env=env, held=True)
            await session.run("other", script, env=env)
            assert session.log("held").read_text() == ""
            await session.client.release("held", "first")
            await session.client.release("held", "first")
            assert (await session.next_exit()).status == 0
            assert session.log("held").read_text() == "runs\n"

    play(scenario())


@pytest.mark.parametrize("env", [{}, FORCE_EXEC], ids=["forked", "execed"])
def test_a_held_worker_ends_with_its_keeper_and_a_released_one_does_not(directory: Path, env: dict[str, str]) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            script = session.script("import time; print('runs', flush=True); time.sleep(60)")
            held = await session.start("held", script, env=env, held=True)
            released = await session.start("released", script, env=env, held=True)
            await session.client.release("released", "first")
            await session.printed("released")
            os.kill(session.client.ready.pid, signal.SIGKILL)
            await until(lambda: not running(held.process.pid), "the end of the one that nobody wrote down")
            assert "runs" not in session.log("held").read_text()
            assert running(released.process.pid)
            os.kill(released.process.pid, signal.SIGKILL)
            (directory / "keeper").unlink()
            # It closes its end of the gate before it is gone.
            await until(lambda: not running(session.client.ready.pid), "the keeper to end")

    play(scenario())


def test_an_agent_that_comes_back_hears_of_exits_until_it_acknowledges_them(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as first:
            path = first.script("import sys; sys.stdin.read(); sys.exit(int(sys.argv[1]))")
            waiting = first.script("import signal; signal.pause()", "waiting.py")
            await first.start("short", path, "7")
            alive = await first.start("long", waiting)
            early = await first.next_exit()
            first.client.close()
            async with connection(directory, 2) as second:
                again = await second.next_exit()
                assert again == early
                assert (again.slot, again.status, again.core) == ("short", 7, False)
                await second.client.acknowledge("short", "first")
                os.kill(alive.process.pid, signal.SIGKILL)
                assert (await second.next_exit()).status == -signal.SIGKILL
            async with connection(directory, 3) as third:
                assert (await third.next_exit()).slot == "long"
                await third.client.acknowledge("long", "first")
                assert await third.client.list_processes() == []
                with pytest.raises(KeeperError, match="is known here") as refusal:
                    await third.client.acknowledge("long", "first")
                assert refusal.value.code == "unknown_process"
            async with connection(directory, 4) as fourth:
                assert await fourth.client.list_processes() == []
                assert fourth.exits.empty()

    play(scenario())


def test_a_worker_that_ends_while_no_agent_lives_is_reported_with_its_status(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as first:
            path = first.script("import os, sys\nwhile not os.path.exists('go'): pass\nsys.exit(5)")
            held = await first.start("worker", path)
            first.client.close()
            (directory / "go").touch()
            await until(lambda: not running(held.process.pid), "the worker to end")
            async with connection(directory, 2) as second:
                exited = await second.next_exit()
                assert (exited.pid, exited.start_time) == (held.process.pid, held.process.start_time)
                assert (exited.status, exited.discarded) == (5, False)

    play(scenario())


def test_a_worker_that_was_dropped_is_told_from_others_also_when_its_page_is_gone(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as first:
            text = "import sys\nfrom seamark.progress import worker_page\nworker_page('').discarded = True\nsys.exit(1)"
            held = await first.start("worker", first.script(text))
            exited = await first.next_exit()
            assert (exited.pid, exited.discarded) == (held.process.pid, True)
            async with connection(directory, 2) as second:
                (known,) = await second.client.list_processes()
                assert (known.process.status, known.process.discarded, known.page) == (1, True, -1)

    play(scenario())


# -- starting ------------------------------------------------------------------------------------------------


def test_start_is_idempotent(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            path = session.script("print('started', flush=True); import signal; signal.pause()")
            one = await session.start("worker", path)
            two = await session.start("worker", path)
            assert one.process == two.process
            assert os.fstat(one.page).st_ino == os.fstat(two.page).st_ino
            other = await session.start("worker", path, incarnation="second")
            assert other.process.pid != one.process.pid
            await session.printed("worker", 2)
            listed = await session.client.list_processes()
            assert [held.process for held in listed] == [one.process, other.process]
            for held in listed:
                signal.pidfd_send_signal(held.pidfd, signal.SIGKILL)
                held.close()
            assert {(await session.next_exit()).incarnation for _ in range(2)} == {"first", "second"}
            assert session.log("worker").read_text() == "started\n" * 2
            assert session.log("worker").stat().st_mode & 0o777 == 0o600

    play(scenario())


def test_a_start_that_was_answered_too_late_is_undone(directory: Path) -> None:
    """The keeper was stopped, or its host was busy, and nobody would have released the worker."""

    async def scenario() -> None:
        async with keeper(directory) as session:
            script = session.script("import signal; signal.pause()")
            os.kill(session.client.ready.pid, signal.SIGSTOP)
            try:
                with pytest.raises(KeeperError, match="did not answer 'start'") as refusal:
                    await session.start("late", script, held=True, timeout=0.1)
            finally:
                os.kill(session.client.ready.pid, signal.SIGCONT)
            assert refusal.value.code == "timeout"
            exited = await session.next_exit()
            assert (exited.slot, exited.status) == ("late", -signal.SIGKILL)

    play(scenario())


def test_what_cannot_be_started_is_refused_in_a_sentence(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            cases: list[tuple[str, dict[str, Any]]] = [
                ("bad_cwd", {"cwd": str(directory / "nowhere")}),
                ("malformed", {"num_threads": 0}),
                ("malformed", {"env": {"A=B": "c"}}),
            ]
            for code, options in cases:
                with pytest.raises(KeeperError) as refusal:
                    await session.start("worker", "script.py", **options)
                assert refusal.value.code == code
            (directory / "worker.log").mkdir()
            with pytest.raises(KeeperError, match="Is a directory"):
                await session.start("worker", "script.py")
            assert await session.client.list_processes() == []

    play(scenario())


def test_a_worker_with_an_environment_that_a_fork_cannot_have_is_execed(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            path = session.script("import os, sys; print(os.environ['PYTHONHASHSEED'], hash('a'))")
            held = await session.start("worker", path, env={"PYTHONHASHSEED": "1"})
            assert not held.process.forked
            assert "PYTHONHASHSEED" in str(held.process.why_exec)
            assert (await session.next_exit()).status == 0
            plain = subprocess.run(
                [sys.executable, path], env=environment(PYTHONHASHSEED="1"), capture_output=True, check=True
            )
            assert session.log("worker").read_bytes() == plain.stdout

    play(scenario())


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()", "2 threads"),
        ("raise RuntimeError('out of order')", "out of order"),
    ],
    ids=["thread", "error"],
)
def test_a_module_that_makes_forking_unsafe_is_named_and_workers_are_execed(
    directory: Path, source: str, reason: str
) -> None:
    async def scenario() -> None:
        (directory / "modules").mkdir()
        (directory / "modules" / "culprit.py").write_text(source)
        env = environment(PYTHONPATH=str(directory / "modules"))
        async with keeper(directory, preload=("json", "culprit", "csv"), env=env) as session:
            ready = session.client.ready
            assert (ready.forks, ready.culprit) == (False, "culprit")
            assert "importing culprit" in str(ready.reason)
            assert reason in str(ready.reason)
            path = session.script("import sys; print(sys.argv[1:])")
            exited, output = await session.run("worker", path, "--", "-x", env=env)
            assert (exited.status, exited.forked, exited.why_exec) == (0, False, ready.reason)
            assert output == "['--', '-x']\n"

    play(scenario())


# -- a worker is like plain python ---------------------------------------------------------------------------

PROBE = """
    '''The probe's docstring.'''
    import __main__, json, os, signal, sys, threading
    import multiprocessing
    # The signals 32 and 33 are the C library's own, and differ with the way a program is started.
    LIBC = 1 << 31 | 1 << 32
    main = vars(__main__)
    file = {} if __spec__ is None else {"spec": [__spec__.name, __spec__.origin]}
    number: int = 1
    print(json.dumps({
        **file,
        "names": sorted(main),
        "values": {name: main[name] for name in ("__name__", "__doc__", "__file__", "__package__", "__cached__")},
        "loader": [type(__loader__).__name__, __loader__.name, __loader__.path],
        "builtins": type(__builtins__).__name__,
        "annotations": str(__annotations__),
        "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "executable": sys.executable,
        "flags": str(sys.flags), "env": dict(os.environ), "cwd": os.getcwd(),
        "leads_group": os.getpgid(0) == os.getpid(),
        "handlers": {str(n): str(signal.getsignal(n)) for n in signal.valid_signals() if signal.getsignal(n)},
        "mask": [int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        "wakeup": signal.set_wakeup_fd(-1),
        "ignored": [int(line.split()[1], 16) & ~LIBC for line in open("/proc/self/status") if line[:6] == "SigIgn"],
        "stdin": os.readlink("/proc/self/fd/0"), "stdio": [sys.stdout.encoding, sys.stdout.errors],
        "umask": os.umask(0), "meta_path": len([f for f in sys.meta_path if "Torch" not in str(type(f))]),
        "threads": [t.name for t in threading.enumerate()],
        "command": open("/proc/self/cmdline").read().rstrip("\\0").split("\\0"),
        "parent": str(multiprocessing.parent_process()),
        "fds": len(os.listdir("/proc/self/fd")),
    }))
"""


@pytest.mark.parametrize(
    ("form", "env"),
    [("script", {}), ("link", {}), ("module", {}), ("script", FORCE_EXEC), ("module", FORCE_EXEC)],
    ids=["script forked", "link forked", "module forked", "script execed", "module execed"],
)
def test_a_worker_sees_what_it_sees_under_plain_python(directory: Path, env: dict[str, str], form: str) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            # What the keeper holds for another worker is none of this one's.
            await session.start("other", session.script("import signal; signal.pause()"))
            (directory / "work" / "package").mkdir(parents=True)
            session.script(PROBE, "work/package/probe.py")
            (directory / "work" / "probe.py").symlink_to("package/probe.py")
            target = {"script": "package/probe.py", "link": "probe.py", "module": "package.probe"}[form]
            module = form == "module"
            argv = [target, "--flag", "two words", "--"]
            cwd = str(directory / "work")
            exited, output = await session.run("probe", *argv, cwd=cwd, env=env | {"A": "ä"}, module=module)
            assert exited.status == 0, output
            assert exited.forked is (not env)
            seen = json.loads(output)
            # The page is one descriptor and one variable more.
            page = int(seen["env"].pop("SEAMARK_PROGRESS_FD"))
            assert page > 2
            seen["fds"] -= 1
            plain = subprocess.run(
                ["env", "--default-signal", sys.executable, *(["-m"] if module else []), *argv],
                cwd=cwd,
                env=environment(OMP_NUM_THREADS="1", A="ä", **env),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                process_group=0,
                check=True,
            )
            assert seen == json.loads(plain.stdout)

    play(scenario())


RAISING = {
    "error": "def f():\n    1 / 0\ntry:\n    f()\nexcept ArithmeticError as e:\n    raise KeyError(1) from e\n",
    "syntax": "print(1)\ndef broken(:\n",
    "interrupt": "raise KeyboardInterrupt\n",
    "exit": "import sys\nsys.exit('a sentence')\n",
    "hook": "import sys\nsys.excepthook = lambda *a: print(a[0].__name__, a[2].tb_lineno, a[2].tb_next)\n1 / 0\n",
    "atexit": "import atexit\natexit.register(print, 'at exit')\n1 / 0\n",
}


@pytest.mark.parametrize("env", [{}, FORCE_EXEC], ids=["forked", "execed"])
def test_error_reports_show_no_keeper_frames(directory: Path, env: dict[str, str]) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            for name, source in RAISING.items():
                session.script(source, f"{name}.py")
            scripts = [((f"{name}.py",), False) for name in RAISING]
            for argv, module in [*(scripts[:2] if env else scripts), (("error",), True)]:
                slot = f"{argv[0]}-{module}"
                await session.run(slot, *argv, module=module, env=env)
                with (directory / "plain").open("wb+") as output:
                    command = [sys.executable, *(["-m"] if module else []), *argv]
                    subprocess.run(
                        command, cwd=directory, env=environment(**env), stdout=output, stderr=subprocess.STDOUT
                    )
                    output.seek(0)
                    assert session.log(slot).read_bytes() == output.read()

    play(scenario())


@pytest.mark.parametrize("env", [{}, FORCE_EXEC], ids=["forked", "execed"])
def test_nothing_that_was_written_is_lost_at_the_end(directory: Path, env: dict[str, str]) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            path = session.script(
                """
                import atexit, ctypes, sys, threading, time
                left = open("left", "w")
                left.write("in a file")
                atexit.register(lambda: left.write(", at exit"))
                threading.Thread(target=lambda: (time.sleep(0.2), left.write(", by a thread"))).start()
                ctypes.CDLL(None).printf(b"from C, ")
                sys.exit(4)
                """
            )
            exited, output = await session.run("worker", path, env=env)
            assert (exited.status, output) == (4, "from C, ")
            assert (directory / "left").read_text() == "in a file, by a thread, at exit"

    play(scenario())


def test_output_arrives_line_by_line_and_standard_input_is_empty(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            path = session.script("import sys, signal; print(repr(sys.stdin.read())); signal.pause()")
            await session.start("worker", path)
            assert await session.printed("worker") == ["''"]

    play(scenario())


# -- signals and the end -------------------------------------------------------------------------------------

# Prints its own pid and those of a child in its process group and of a grandchild that left it by a session of its
# own; with "stubborn" all of them ignore SIGTERM.
FAMILY = """
    import os, signal, sys, time
    if "stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(0, os.getpid())
    if os.fork() == 0:
        print(1, os.getpid())
        signal.pause()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            print(2, os.getpid())
            signal.pause()
        os._exit(0)
    if "leave" in sys.argv:
        os._exit(0)
    while True:
        signal.pause()
"""


def test_a_signal_reaches_one_process_or_its_group_and_nobody_unknown(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            path = session.script(FAMILY)
            await session.start("worker", path)
            parent, child, grandchild = await session.family("worker")
            with pytest.raises(KeeperError) as refusal:
                await session.client.signal("worker", "another", signal.SIGKILL)
            assert refusal.value.code == "unknown_process"
            with pytest.raises(KeeperError):
                await session.client.signal("worker", "first", 4711)
            assert await session.client.signal("worker", "first", signal.SIGKILL, group=False)
            assert (await session.next_exit()).status == -signal.SIGKILL
            assert running(child)
            # Its group can still be reached, but the process itself is no more.
            assert not await session.client.signal("worker", "first", signal.SIGKILL, group=False)
            assert await session.client.signal("worker", "first", signal.SIGKILL)
            await until(lambda: not running(child), "the child to end")
            assert not await session.client.signal("worker", "first", signal.SIGKILL)
            assert running(grandchild)
            assert not running(parent)

    play(scenario())


@pytest.mark.parametrize("manner", ["obedient", "stubborn"])
def test_a_stop_leaves_nothing_behind(directory: Path, manner: str) -> None:
    async def scenario() -> None:
        # Who obeys is not waited for: his time may be long.
        grace = DEADLINE if manner == "obedient" else 0.5
        async with keeper(directory) as session:
            path = session.script(FAMILY)
            await session.start("stays", path, manner)
            await session.start("leaves", path, manner, "leave")
            pids = [pid for slot in ("stays", "leaves") for pid in await session.family(slot)]
            os.kill(pids[0], signal.SIGSTOP)
            began = time.monotonic()
            assert await session.client.stop(grace) == []
            took = time.monotonic() - began
            assert not any(map(running, pids))
            assert took < grace if manner == "obedient" else grace <= took < grace + 2
            statuses = {}
            while not session.exits.empty():
                exited = session.exits.get_nowait()
                statuses[exited.slot] = exited.status
            ended_by = signal.SIGTERM if manner == "obedient" else signal.SIGKILL
            assert statuses == {"stays": -ended_by, "leaves": 0}
            assert session.closed.empty()

    play(scenario())


def test_two_that_stop_a_keeper_at_once_get_an_answer_or_an_error_each(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            both = await asyncio.gather(session.client.stop(0), session.client.stop(0), return_exceptions=True)
            assert all(one == [] or isinstance(one, KeeperError) for one in both), both
            with pytest.raises(KeeperError) as error:
                await session.client.stop(0)
            assert error.value.code == "closed"

    play(scenario())


def test_a_stop_that_is_not_final_ends_the_workers_and_what_they_left(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            path = session.script(FAMILY)
            await session.start("worker", path, "stubborn")
            pids = await session.family("worker")
            # It finds both when it goes on, however late this test is with the second.
            os.kill(session.client.ready.pid, signal.SIGSTOP)
            stopping = asyncio.create_task(session.client.stop(0.2, final=False))
            starting = asyncio.create_task(session.start("worker", path, incarnation="second"))
            await asyncio.sleep(0)
            os.kill(session.client.ready.pid, signal.SIGCONT)
            with pytest.raises(KeeperError) as refusal:
                await starting
            assert refusal.value.code == "stopping"
            assert await stopping == []
            assert not any(map(running, pids))
            exited, _ = await session.run("worker", session.script("pass"), incarnation="third")
            assert exited.status == -signal.SIGKILL
            assert (await session.next_exit()).status == 0

    play(scenario())


def test_without_linger_time_a_lost_agent_ends_everything(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory, linger=0.0) as session:
            held = await session.start("worker", session.script("import signal; signal.pause()"))
            session.client.close()
            await until(lambda: not running(session.client.ready.pid), "the keeper to end")
            assert not running(held.process.pid)

    play(scenario())


def test_a_terminated_keeper_ends_its_workers_and_a_killed_one_does_not(directory: Path) -> None:
    async def scenario() -> None:
        script = "import signal; print(1); signal.pause()"
        async with keeper(directory) as session:
            held = await session.start("worker", session.script(script))
            os.kill(session.client.ready.pid, signal.SIGTERM)
            assert (await session.next_exit()).status == -signal.SIGTERM
            async with asyncio.timeout(DEADLINE):
                assert await session.closed.get() == "the keeper closed the connection"
            assert not running(held.process.pid)
            await until(lambda: not running(session.client.ready.pid), "the keeper to end")
        killed = Session(directory)
        await killed.spawn()
        held = await killed.start("other", killed.script(script))
        os.kill(killed.client.ready.pid, signal.SIGKILL)
        async with asyncio.timeout(DEADLINE):
            await killed.closed.get()
        assert await killed.printed("other") == ["1"]
        assert running(held.process.pid)
        with pytest.raises(KeeperError) as refusal:
            await killed.client.list_processes()
        assert refusal.value.code == "closed"
        # The next keeper takes the dead one's socket path; the orphan is its agent's to end, by its pidfd.
        async with keeper(directory):
            signal.pidfd_send_signal(held.pidfd, signal.SIGKILL)
            await until(lambda: not running(held.process.pid), "the orphan to end")
        killed.release()

    play(scenario())


def test_an_agent_without_descriptors_ends_a_keeper_and_its_workers(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            held = await session.start("worker", session.script("import signal; signal.pause()"))
            with full_table():
                assert await session.client.stop(DEADLINE) == []
            await until(lambda: not running(session.client.ready.pid), "the keeper to end")
            assert not running(held.process.pid)

    play(scenario())


def test_a_keeper_without_descriptors_ends_its_workers_and_what_they_left(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            await session.start("worker", session.script(FAMILY), "stubborn", "leave")
            pids = await session.family("worker")
            with full_table(session.client.ready.pid):
                assert await session.client.stop(0.2) == []
            assert not any(map(running, pids))

    play(scenario())


def test_a_keeper_that_can_look_for_nobody_ends_its_workers(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1); signal.pause()"
            held = await session.start("worker", session.script(script))
            await session.printed("worker")
            pid = session.client.ready.pid
            # Not even for what it has kept back.
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (4, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]))
            assert await session.client.stop(0.5) == []
            assert not running(held.process.pid)
            assert (directory / "keeper.log").read_text().count("can't look for processes") == 1

    play(scenario())


def test_a_full_disk_keeps_no_keeper_from_ending_its_workers(directory: Path) -> None:
    """It says in its log that it was terminated, or would."""

    async def scenario() -> None:
        (directory / "keeper.log").symlink_to("/dev/full")
        async with keeper(directory) as session:
            held = await session.start("worker", session.script("import signal; signal.pause()"))
            os.kill(session.client.ready.pid, signal.SIGTERM)
            assert (await session.next_exit()).status == -signal.SIGTERM
            await until(lambda: not running(session.client.ready.pid), "the keeper to end")
            assert not running(held.process.pid)
            assert not (directory / "keeper").exists(), "it ended in good order"

    play(scenario())


@pytest.mark.parametrize("full", [False, True])
def test_a_keeper_that_does_not_answer_to_its_end_is_killed(directory: Path, full: bool) -> None:
    """It was stopped, say; its workers are its agent's to end."""

    async def scenario() -> None:
        session = Session(directory)
        await session.spawn()
        held = await session.start("worker", session.script("import signal; signal.pause()"))
        os.kill(session.client.ready.pid, signal.SIGSTOP)
        table = full_table() if full else contextlib.nullcontext()
        with table, pytest.raises(KeeperError, match="did not answer 'stop'") as refusal:
            await session.client.stop(0, timeout=0.2)
        assert refusal.value.code == "timeout"
        await until(lambda: not running(session.client.ready.pid), "the keeper to end")
        assert running(held.process.pid)
        signal.pidfd_send_signal(held.pidfd, signal.SIGKILL)
        await until(lambda: not running(held.process.pid), "the worker to end")
        session.client.close()
        session.release()

    play(scenario())


def test_a_keeper_that_was_killed_a_moment_ago_cannot_be_asked_to_stop(directory: Path) -> None:
    """Before this end has heard of it."""

    async def scenario() -> None:
        session = Session(directory)
        await session.spawn()
        os.kill(session.client.ready.pid, signal.SIGKILL)
        os.waitpid(session.client.ready.pid, 0)
        with pytest.raises(KeeperError) as refusal:
            await session.client.stop(0)
        assert refusal.value.code == "closed"
        session.client.close()

    play(scenario())


# -- agents --------------------------------------------------------------------------------------------------


def test_the_newest_epoch_has_the_keeper(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory, epoch=5) as fifth:
            async with connection(directory, 6) as sixth:
                async with asyncio.timeout(DEADLINE):
                    assert "epoch 6 has taken the keeper over" in await fifth.closed.get()
                with pytest.raises(KeeperError) as refusal:
                    await fifth.client.list_processes()
                assert refusal.value.code == "closed"
                with pytest.raises(KeeperError, match="epoch 5 is refused") as refusal:
                    await fifth.connect(5)
                assert refusal.value.code == "old_epoch"
                assert await sixth.client.list_processes() == []
            with pytest.raises(KeeperError, match="epoch 5 is refused"):
                await fifth.connect(5)

    play(scenario())


def test_a_keeper_that_is_not_ready_in_time_holds_up_nobody_even_if_it_cannot_be_killed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It imports torch from a file system that hangs, and SIGKILL has no effect until that is back."""
    there: list[int] = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: there.append(process.pid))

    async def scenario() -> None:
        (directory / "hangs.py").write_text("import signal; signal.pause()")
        session = Session(directory)
        with pytest.raises(KeeperError, match="was not ready after 0.5 s"):
            await session.spawn(preload=("hangs",), env=environment(PYTHONPATH=str(directory)), timeout=0.5)
        (pid,) = there
        assert running(pid)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not Path(f"/proc/{pid}").exists(), "it to be reaped")

    play(scenario())


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_keeper_that_is_killed_while_it_imports_says_so_in_a_sentence(
    directory: Path, signum: signal.Signals
) -> None:
    (directory / "waits.py").write_text(
        "import os, pathlib, signal\n"
        "pathlib.Path('new').write_text(str(os.getpid()))\n"
        "os.rename('new', 'pid')\n"
        "signal.pause()\n"
    )

    async def scenario() -> None:
        env = environment(PYTHONPATH=str(directory))
        spawning = asyncio.create_task(Session(directory).spawn(preload=("waits",), env=env))
        await until((directory / "pid").exists, "it to import")
        os.kill(int((directory / "pid").read_text()), signum)
        with pytest.raises(KeeperError) as error:
            await spawning
        assert error.value.code == "killed"
        said = f"the keeper was killed by {signum.name} while it started; {directory}/keeper.log is empty"
        assert str(error.value) == said

    play(scenario())


def test_a_keeper_that_answers_no_hello_is_killed(directory: Path) -> None:
    async def scenario() -> None:
        session = Session(directory)
        await session.spawn()
        session.client.close()
        os.kill(session.client.ready.pid, signal.SIGSTOP)
        with pytest.raises(KeeperError, match="did not answer 'hello'") as error:
            await session.connect(2, timeout=0.2)
        assert error.value.code == "timeout"
        await until(lambda: not running(session.client.ready.pid), "the keeper to end")

    play(scenario())


def test_two_keepers_do_not_share_a_socket(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            with pytest.raises(KeeperError, match="another keeper answers"):
                await Session(directory).spawn()
            assert await session.client.list_processes() == []
            assert (directory / "keeper").stat().st_mode & 0o777 == 0o600

    play(scenario())


def test_a_keeper_without_descriptors_serves_its_agent_and_hears_others_later(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            pid = session.client.ready.pid
            usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            used = {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")}
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(set(range(len(used) + 1)) - used), usual[1]))
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
                raw.settimeout(DEADLINE)
                raw.connect(str(directory / "keeper"))
                raw.send(b'{"type": "hello", "id": 1, "epoch": 0}')
                log = directory / "keeper.log"
                await until(lambda: "raise the limit of open files" in log.read_text(), "the keeper to say so")
                assert await session.client.list_processes() == []
                resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
                assert json.loads(raw.recv(1 << 20))["code"] == "old_epoch"

    play(scenario())


def test_an_agent_that_asks_and_does_not_read_is_held_up_alone(directory: Path) -> None:
    """It is stopped, say; what it asks for meanwhile must not pile up here."""

    async def scenario() -> None:
        async with keeper(directory) as session:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
                raw.connect(str(directory / "keeper"))
                raw.setblocking(False)
                asked = 0
                while select.select([], [raw], [], 1.0)[1]:
                    asked += 1
                    assert asked < 100_000, "the kernel holds some thousands of so small packets"
                    raw.send(json.dumps({"type": "list", "id": asked}).encode())
                assert await session.client.list_processes() == []
                raw.settimeout(DEADLINE)
                assert [json.loads(raw.recv(1 << 20))["id"] for _ in range(asked)] == list(range(1, asked + 1))

    play(scenario())


def test_garbage_is_answered_and_does_no_harm(directory: Path) -> None:
    hello = {"type": "hello", "id": 1, "epoch": 9}
    start = {
        "type": "start",
        "slot": "s",
        "incarnation": "i",
        "kind": "worker",
        "argv": ["x.py"],
        "env": {},
        "cwd": "/",
        "log": "/dev/null",
        "num_threads": 1,
    }
    packets = [
        b"\xff\x00",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        b"9" * 10_000,
        b'{"type":"list"}',
        b'{"type":"hello"}',
        json.dumps({**hello, "epoch": -1}).encode(),
        json.dumps({**hello, "epoch": True}).encode(),
        json.dumps({**hello, "epoch": 1 << 80}).encode(),
        json.dumps(hello).encode(),
        b'{"type":7}',
        b'{"type":"unheard of"}',
        *(
            json.dumps({**start, name: value}).encode()
            for name in start
            for value in (None, 0, True, "", "\0", "\ud800", [], [1], {"a": 1}, {"": "a"}, {"a": "\0"}, 1.5)
            if not (name == "env" and value == {}) and not (name in ("slot", "incarnation") and value == "s")
        ),
        json.dumps({**start, "kind": "store", "host": "localhost", "port": 0}).encode(),
        json.dumps({**start, "kind": "store", "host": "127.0.0.1", "port": 70_000}).encode(),
        b'{"type":"stop","grace":NaN}',
        b'{"type":"stop","grace":-1}',
        b'{"type":"stop","grace":"soon"}',
    ]
    noise = random.Random(3)
    packets += [noise.randbytes(noise.randint(1, 500)) for _ in range(200)]

    async def scenario() -> None:
        async with keeper(directory) as session:
            for packet in packets:
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
                    raw.settimeout(DEADLINE)
                    raw.connect(str(directory / "keeper"))
                    # As the agent, so that a request gets as far as its contents.
                    for sent, answer in ((json.dumps(hello).encode(), "ready"), (packet, None)):
                        raw.send(sent)
                        reply = json.loads(raw.recv(1 << 20))
                        if answer is None and packet != sent and json.dumps(hello).encode() != packet:
                            assert reply["type"] == "error", (packet, reply)
                            assert reply["error"]
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
                raw.connect(str(directory / "keeper"))
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
                with contextlib.suppress(OSError):  # where the kernel allows no packet of that size
                    raw.send(b" " * ((1 << 20) + 1))
                    assert json.loads(raw.recv(1 << 20))["code"] == "too_large"
                raw.send(b'{"type":"list"}')
                assert json.loads(raw.recv(1 << 20))["code"] == "hello_first"
            async with connection(directory, 10) as newer:
                assert await newer.client.list_processes() == []
            assert session.client.ready.pid == newer.client.ready.pid

    play(scenario())


# -- with torch ----------------------------------------------------------------------------------------------


def test_a_preloaded_worker_prints_its_first_line_soon(torch_keeper: TorchKeeper) -> None:
    async def scenario() -> None:
        async with torch_keeper.agent() as session:
            path = session.script(
                """
                import time
                now = time.monotonic()
                import os, torch, torch.distributed, torch._dynamo
                print(now, time.monotonic(), flush=True)
                os._exit(0)
                """
            )
            firsts, forks = [], []
            for number in range(10):
                exited, output = await session.run(f"quick{number}", path)
                assert exited.forked
                firsts.append(float(output.split()[1]) - exited.forked_at)
                forks.append(exited.fork_seconds)
            for what, times in (("fork", forks), ("fork to first line with torch imported", firsts)):
                print(f"{what}: median {sorted(times)[5] * 1e3:.1f} ms, max {max(times) * 1e3:.1f} ms")
            assert sorted(firsts)[5] < 1.0

    play(scenario())


def test_forked_and_execed_workers_compute_the_same_bits_and_draw_other_numbers(torch_keeper: TorchKeeper) -> None:
    async def scenario() -> None:
        async with torch_keeper.agent() as session:
            path = session.script(
                """
                import hashlib, os, random, sys
                import numpy
                import torch
                generator = torch.Generator().manual_seed(1)
                a = torch.randn(701, 701, generator=generator)
                x = torch.softmax(a @ a.T / 30, -1) @ a
                b = numpy.random.RandomState(0).rand(1500, 1500)
                digest = hashlib.sha256(x.numpy().tobytes() + x.sum().numpy().tobytes() + (b @ b).tobytes())
                print(torch.get_num_threads(), digest.hexdigest())
                print(random.random(), numpy.random.rand(), torch.rand(1).item(), torch.initial_seed(), flush=True)
                os._exit(0)
                """
            )
            (forked, one), (again, two), (execed, three) = [
                await session.run(f"bits{number}", path, num_threads=2, env=env)
                for number, env in enumerate(({}, {}, FORCE_EXEC))
            ]
            assert (forked.forked, again.forked, execed.forked) == (True, True, False)
            same = {output.splitlines()[0] for output in (one, two, three)}
            assert len(same) == 1, same
            assert same.pop().startswith("2 ")
            drawn = [output.splitlines()[1].split() for output in (one, two, three)]
            for column in zip(*drawn, strict=True):
                assert len(set(column)) == 3, column

    play(scenario())


def test_a_preloaded_worker_ends_normally_without_complaints(torch_keeper: TorchKeeper) -> None:
    async def scenario() -> None:
        async with torch_keeper.agent() as session:
            began = time.monotonic()
            exited, output = await session.run("normal", session.script("import torch; print(torch.ones(2).sum())"))
            print(f"start to exit status: {(time.monotonic() - began) * 1e3:.0f} ms")
            assert (exited.status, output) == (0, "tensor(2.)\n")
            interrupted, output = await session.run("interrupted", session.script("raise KeyboardInterrupt"))
            assert interrupted.status == -signal.SIGINT
            assert output.splitlines()[-1] == "KeyboardInterrupt"

    play(scenario())


def test_a_killed_store_comes_back_on_its_port_and_clients_wait_in_line(torch_keeper: TorchKeeper) -> None:
    async def scenario() -> None:
        async with torch_keeper.agent() as session:
            client = session.script(
                """
                import datetime, os, sys
                import torch.distributed as dist
                print("connecting", flush=True)
                store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), timeout=datetime.timedelta(seconds=15))
                print(store.add("count", 1), flush=True)
                os._exit(0)
                """
            )
            first = await session.start_store("store", "first")
            port = first.process.port
            assert port
            _, output = await session.run("client1", client, str(port))
            assert output.splitlines() == ["connecting", "1"]
            with pytest.raises(KeeperError, match=f"port {port} is served") as refusal:
                await session.start_store("store", "second", port=port)
            assert refusal.value.code == "port_in_use"

            os.kill(first.process.pid, signal.SIGKILL)
            exited = await session.next_exit()
            assert (exited.slot, exited.status) == ("store", -signal.SIGKILL)
            await session.client.acknowledge("store", "first")
            # Nobody serves, and yet nobody is refused.
            socket.create_connection(("127.0.0.1", port), timeout=DEADLINE).close()
            await session.start("client2", client, str(port))
            await session.printed("client2")
            second = await session.start_store("store", "second", port=port)
            assert second.process.port == port
            assert second.process.forked
            assert (await session.next_exit()).slot == "client2"
            # The first store's memory is gone, its port is not.
            assert session.log("client2").read_text().splitlines() == ["connecting", "1"]

            await session.start("worker", session.script("import signal; print(1); signal.pause()"))
            await session.printed("worker")
            assert await session.client.stop(DEADLINE, final=False) == []
            assert running(second.process.pid)
            # Slurm sends it to every process of a job: the ranks save then, and need their store.
            await session.client.signal("store", "second", signal.SIGTERM)
            await session.client.signal("store", "second", signal.SIGKILL)
            while (exited := await session.next_exit()).slot != "store":
                pass
            assert exited.status == -signal.SIGKILL

    play(scenario())


def test_a_port_in_use_is_said(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            with socket.create_server(("127.0.0.1", 0)) as taken:
                port = taken.getsockname()[1]
                with pytest.raises(KeeperError, match=f"port {port} of 127.0.0.1 is in use") as refusal:
                    await session.start_store("store", "first", port=port)
                assert refusal.value.code == "port_in_use"
            with pytest.raises(KeeperError) as refusal:
                await session.start_store("store", "first", host="192.0.2.1")
            assert refusal.value.code == "bad_host"

    play(scenario())


# -- the progress page and the death watch -------------------------------------------------------------------

WATCHED = """
    import os, signal, sys
    from seamark.progress import Canaries, ProgressPage
    page = ProgressPage.from_env("incarnation")
    canaries = Canaries(page)
    ballast = bytearray(int(sys.argv[1]))
    for start in range(0, len(ballast), 4096):
        ballast[start] = 1
    print("ready", flush=True)
    for line in open("orders"):
        exec(line)
"""


class Watched:
    """A worker with canaries that a death watch looks at, and that does what is written to it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.deaths: list[tuple[str, float]] = []
        self.told_at = 0.0

    async def start(self, megabytes: int = 0, script: str = WATCHED) -> None:
        fifo = self.session.directory / "orders"
        fifo.unlink(missing_ok=True)
        os.mkfifo(fifo)
        path = self.session.script(script, "watched.py")
        self.session.log("watched").unlink(missing_ok=True)
        incarnation = f"incarnation{random.getrandbits(32)}"
        self.held = await self.session.start("watched", path, str(megabytes << 20), incarnation=incarnation)
        await self.session.printed("watched")
        self.page = ProgressPage(self.held.page)
        self.watch = DeathWatch(self.held.process.pid, self.held.pidfd, self.page, self._on_death)
        assert self.watch.arm()

    def _on_death(self, how: str, at: float) -> None:
        self.deaths.append((how, at))
        self.told_at = time.monotonic()

    def order(self, statement: str) -> None:
        (self.session.directory / "orders").write_text(statement + "\n")

    async def death(self) -> tuple[str, float]:
        await until(lambda: bool(self.deaths), "the watch to see the death")
        return self.deaths[0]

    async def end(self) -> Process:
        exited = await self.session.next_exit()
        # A second call would come by now.
        await asyncio.sleep(0.1)
        assert len(self.deaths) == 1
        self.watch.close()
        self.page.close()
        return exited


def test_a_death_is_seen_before_the_memory_is_freed(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            canary, process = [], []
            for manner in ("killed", "killed", "exits"):
                watched = Watched(session)
                await watched.start(megabytes=1024)
                killed = time.monotonic()
                if manner == "killed":
                    signal.pidfd_send_signal(watched.held.pidfd, signal.SIGKILL)
                else:
                    watched.order("os._exit(7)")
                how, at = await watched.death()
                exited = await watched.end()
                assert exited.at is not None
                assert how == "canary"
                # Freeing a gigabyte takes several times as long as this margin.
                assert killed < at < watched.told_at < exited.at - 0.01
                canary.append(watched.told_at - killed)
                process.append(exited.at - killed)
            for what, times in (("canary", canary), ("exit status", process)):
                shown = ", ".join(f"{seconds * 1e3:.1f}" for seconds in sorted(times))
                print(f"death of a worker with 1 GiB seen by {what} after {shown} ms")

    play(scenario())


@pytest.mark.parametrize(
    ("order", "status"),
    [("sys.exit(3)", 3), ("1 / 0", 1), ("raise SystemExit", 0)],
)
def test_a_clean_end_is_no_death_by_canary(directory: Path, order: str, status: int) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            watched = Watched(session)
            await watched.start(megabytes=64)
            watched.order(order)
            how, _ = await watched.death()
            exited = await watched.end()
            assert (how, exited.status) == ("pidfd", status)

    play(scenario())


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), signal.SIGSEGV)", "os.abort()"])
def test_every_other_end_is_seen_once(directory: Path, ending: str) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            watched = Watched(session)
            await watched.start()
            watched.order(ending)
            await watched.death()
            assert (await watched.end()).status != 0

    play(scenario())


def test_canaries_that_end_alone_are_not_taken_for_a_death(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            watched = Watched(session)
            await watched.start()
            old = watched.page.canaries
            # Executing a program ends all threads but one; the page goes on, with new canaries.
            watched.order("os.execv(sys.executable, [sys.executable, 'watched.py', '0'])")
            await session.printed("watched", 2)
            await until(lambda: "the process lives on" in caplog.text, "the watch to give the canaries up")
            assert watched.deaths == []
            assert set(watched.page.canaries).isdisjoint(old)
            assert watched.page.owner == watched.held.process.pid
            assert watched.watch.arm()
            os.kill(watched.held.process.pid, signal.SIGKILL)
            assert (await watched.death())[0] == "canary"
            await watched.end()

    play(scenario())


def test_a_thread_id_of_another_process_is_no_canary(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            script = WATCHED.replace("canaries = Canaries(page)", "page.set_canaries([os.getppid()])")
            watched = Watched(session)
            with pytest.raises(AssertionError):
                await watched.start(script=script)
            assert watched.page.canaries == (session.client.ready.pid,)
            assert not watched.watch.arm()
            os.kill(watched.held.process.pid, signal.SIGKILL)
            assert (await watched.death())[0] == "pidfd"
            await watched.end()

    play(scenario())


def test_a_kernel_without_thread_pidfds_is_said_once_and_the_process_is_watched(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A flag that no kernel knows is refused as an old kernel refuses this one.
    monkeypatch.setattr(watch, "_PIDFD_THREAD", 1 << 30)
    monkeypatch.setattr(watch, "_thread_pidfds_missing", False)

    async def scenario() -> None:
        async with keeper(directory) as session:
            watched = Watched(session)
            with pytest.raises(AssertionError):
                await watched.start()
            assert not watched.watch.arm()
            assert caplog.text.count("no pidfd for a thread") == 1
            os.kill(watched.held.process.pid, signal.SIGKILL)
            assert (await watched.death())[0] == "pidfd"
            await watched.end()

    play(scenario())


def test_a_page_carries_what_its_worker_writes_and_outlives_it(directory: Path) -> None:
    async def scenario() -> None:
        async with keeper(directory) as session:
            path = session.script(
                """
                import os, sys
                from seamark.progress import ProgressPage
                page = ProgressPage.from_env("incarnation")
                for _ in range(41):
                    page.ping()
                page.iteration, page.step, page.checkpoint, page.wrapped = 3, 200, 150, True
                if os.fork() == 0:
                    # A child's pings would count for nobody; its normal end is its own affair.
                    for _ in range(2):
                        try:
                            page.ping()
                        except RuntimeError as error:
                            assert "a child of the worker" in str(error)
                        else:
                            sys.exit("it pinged")
                    assert not page.shared
                    assert not ProgressPage.from_env("child").shared
                    sys.exit(0)
                assert os.wait()[1] == 0
                assert not page.goodbye
                page.ping()
                """
            )
            held = await session.start("worker", path)
            assert (await session.next_exit()).status == 0, session.log("worker").read_text()
            page = ProgressPage(held.page)
            assert page.attached
            assert page.goodbye
            assert (page.pings, page.iteration, page.step, page.checkpoint) == (42, 3, 200, 150)
            assert page.wrapped
            assert page.owner == held.process.pid
            assert page.incarnation == incarnation_hash("incarnation") != incarnation_hash("child")
            with pytest.raises(TypeError):
                page.ping()
            with pytest.raises(OSError, match="Operation not permitted"):
                os.ftruncate(held.page, 0)
            page.close()

    play(scenario())


def test_a_page_of_another_version_is_refused_with_both_versions_named() -> None:
    fd = create()
    page = ProgressPage(fd)
    assert not page.attached
    assert page.pings == page.owner == 0
    os.pwrite(fd, ((0x5345414D41524B << 8) | 9).to_bytes(8, sys.byteorder), 0)
    with pytest.raises(ValueError, match=r"0x5345414d41524b and version 9, expected are 0x5345414d41524b and 1"):
        ProgressPage(fd)
    with pytest.raises(ValueError, match="version 9"):
        _ = page.attached
    page.close()
    os.close(fd)
    with tempfile.TemporaryFile() as short, pytest.raises(ValueError, match="4096 bytes"):
        ProgressPage(short.fileno())


def test_without_a_page_of_ones_own_nobody_is_written_to(directory: Path) -> None:
    victim = directory / "victim"
    victim.write_bytes(bytes(4096))
    with victim.open("rb+") as file:
        for number in ("", "x", "999999", str(file.fileno())):
            page = ProgressPage.from_env("incarnation", {"SEAMARK_PROGRESS_FD": number})
            page.ping()
            assert not page.shared
            assert page.pings == 1
    assert victim.read_bytes() == bytes(4096)


def test_more_canaries_than_the_page_has_room_for_are_refused() -> None:
    page = ProgressPage.from_env("incarnation", {})
    with pytest.raises(ValueError, match="4 canaries, not 5"):
        page.set_canaries([1, 2, 3, 4, 5])
    Canaries(page, count=4)
    assert len(set(page.canaries)) == 4


def test_a_ping_takes_less_than_a_microsecond() -> None:
    fd = create()
    page = ProgressPage.from_env("incarnation", {"SEAMARK_PROGRESS_FD": str(fd)})
    assert page.shared
    rounds = []
    for _ in range(20):
        began = time.perf_counter_ns()
        for _ in range(10_000):
            page.ping()
        rounds.append((time.perf_counter_ns() - began) / 10_000)
    print(f"ping: {min(rounds):.0f} ns")
    assert min(rounds) < 1000
    os.close(fd)
