"""The keeper: the parent of every worker of one job on one node.

    <the job's python> keeper.py --socket PATH --job NAME [--linger SECONDS] [--preload MODULE,...]

It has the job's modules loaded and no thread running, so that a worker is a fork away; it outlives its agent,
and so do exit codes. An agent asks it over a unix socket to start a process, to signal one, to list what
there is and to stop; every exit is pushed until it is acknowledged. Each packet is one JSON object, with file
descriptors beside it where noted:

    request                                         answer, with the request's id
    hello {epoch}                                   ready {pid, modules, forks, culprit, reason, ...}
    start {slot, incarnation, kind, env, log, ...}  started {pid, start_time, ...} + pidfd, progress page
      kind worker: {argv, module, cwd, num_threads, cpus, held}
      kind store: {host, port}
    release {slot, incarnation}                     released; a worker started as held waits for it
    signal {slot, incarnation, signum, group}       signalled {reached}
    list                                            known {...} + pidfd, progress page; ...; listed {count}
    acknowledge {slot, incarnation}                 acknowledged
    stop {grace, final}                             stopped {left}; after a final one the keeper ends
    any                                             error {code, error}
    (pushed)                                        exited {slot, incarnation, status, core, at, ...}
    (pushed)                                        superseded {epoch}

It runs by path in the job's interpreter, where Seamark needn't be installed: one file, the standard library
alone. It knows nothing of ranks, restarts and policies, makes no network connection, and never touches a GPU.
"""

from __future__ import annotations

import argparse
import atexit
import builtins
import contextlib
import ctypes
import errno
import fcntl
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import ipaddress
import json
import os
import runpy
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType, ModuleType, TracebackType
from typing import Any, NoReturn

Message = dict[str, Any]

MAX_PACKET_BYTES = 1 << 20

# The progress page, as seamark.progress lays it out; the keeper only makes it.
PROGRESS_FD = "SEAMARK_PROGRESS_FD"
PROGRESS_DISCARDED = 8 * 13  # bytes from its beginning
PROGRESS_NAME = "seamark-progress"
PROGRESS_BYTES = 4096
# As seamark.environment names them.
CHECKPOINT_DIR = "SEAMARK_CHECKPOINT_DIR"
CHECKPOINT_SECONDS = "SEAMARK_CHECKPOINT_SECONDS"

# torch._dynamo is what the first DistributedDataParallel imports anyway, at a cost of seconds.
PRELOAD = ("numpy", "torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo", "seamark.inprocess.wrapper")
# Whose absence is no fault: the job's interpreter needn't have them.
OPTIONAL = ("seamark.inprocess.wrapper",)
# One of these is open once a GPU runtime is initialised (CUDA, ROCm), which then doesn't work in a fork.
GPU_RUNTIME = ("/dev/nvidia-uvm", "/dev/kfd")

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# What the loader, Python, the threading runtimes and torch read once, when they start: a forked worker has
# its keeper's values, so one that asks for others is exec'ed.
READ_AT_START = (
    "LANG", "LC_", "TZ", "LD_", "GLIBC_", "MALLOC_", "PYTHON", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_",
    "TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "PYTORCH_",
)  # fmt: skip
READ_LATER = ("TORCH_NCCL_", "TORCHINDUCTOR_CACHE_DIR")

# With --linger, how long a fresh keeper waits for its first agent.
FIRST_AGENT_SECONDS = 60.0
LINGER_GRACE_SECONDS = 5.0
SIGTERM_GRACE_SECONDS = 10.0
# During a stop: how often to look for strays, how often to kill after the grace, and how much longer to try
# before giving up on what can't be killed (uninterruptible sleep).
STRAY_SECONDS = 0.2
KILL_SECONDS = 0.02
KILL_PATIENCE_SECONDS = 10.0

PR_SET_CHILD_SUBREAPER = 36
# madvise(2), since Linux 6.1, whatever the system's setting of transparent huge pages is.
MADV_COLLAPSE = 25
HUGE_PAGE_BYTES = 2 << 20


class Refused(Exception):
    """A request that isn't carried out; code and sentence go back to the agent."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def say(sentence: str) -> None:
    print(f"keeper[{os.getpid()}]: {sentence}", file=sys.stderr, flush=True)


# -- preloading ----------------------------------------------------------------------------------------------


@dataclass
class Preloaded:
    """What was imported ahead of the workers (name, seconds), and why they can't be forked from it, if so."""

    modules: list[tuple[str, float]] = field(default_factory=list)
    culprit: str | None = None
    reason: str | None = None


def preload(names: Iterable[str]) -> Preloaded:
    """Import the modules one by one, up to the first that makes a fork unsafe."""
    done = Preloaded()
    # The imports leave little garbage; looking for it takes a seventh of their time.
    gc.disable()
    for name in names:
        began = time.monotonic()
        try:
            importlib.import_module(name)
        except Exception as error:
            if name in OPTIONAL and isinstance(error, ModuleNotFoundError):
                continue
            done.reason = f"importing {name} failed: {type(error).__name__}: {error}"
        else:
            done.modules.append((name, time.monotonic() - began))
            done.reason = why_unsafe_to_fork(f"importing {name}")
        if done.reason:
            done.culprit = name
            break
    # Frozen, what is here stays unwritten by the garbage collector of a child, and so isn't copied.
    gc.collect()
    gc.freeze()
    gc.enable()
    use_huge_pages()
    return done


def use_huge_pages() -> None:
    """Move the memory filled so far into huge pages, of which a fork copies one entry each instead of 512.

    With torch loaded that is a fork of 4 ms instead of 15. A kernel that can't (Linux < 6.1) refuses, and nothing
    is lost.
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with open("/proc/self/maps") as maps:
        mappings = [line.split() for line in maps]
    for addresses, permissions, _, _, _, *name in mappings:
        if permissions == "rw-p" and name in ([], ["[heap]"]):
            begin, end = (int(address, 16) for address in addresses.split("-"))
            begin += -begin % HUGE_PAGE_BYTES
            end -= end % HUGE_PAGE_BYTES
            if begin < end:
                madvise(begin, end - begin, MADV_COLLAPSE)


def why_unsafe_to_fork(cause: str) -> str | None:
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"{cause} left {threads} threads running, and a fork keeps only one"
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith(GPU_RUNTIME):
                return f"{cause} initialised the GPU, and a fork can't use it"
    return None


# -- processes -----------------------------------------------------------------------------------------------


def stat_fields(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third on: index 0 is field 3 of proc_pid_stat(5)."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


def start_time(pid: int) -> int:
    """In clock ticks since boot; with the pid it names a process for ever."""
    return int(stat_fields(pid)[19])


def descendants(root: int) -> dict[int, int]:
    """Every live process below `root`: pid → process group."""
    parents: dict[int, tuple[int, int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                state, parent, group = stat_fields(int(name))[:3]
                if state not in (b"Z", b"X"):
                    parents[int(name)] = int(parent), int(group)
    found: dict[int, int] = {}
    generation = {root}
    while generation:
        children = {pid: group for pid, (parent, group) in parents.items() if parent in generation}
        found |= children
        generation = set(children)
    return found


def kill(pid: int, number: int) -> bool:
    """Whether the process was there to be signalled."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def kill_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


# -- what a new process is to become -------------------------------------------------------------------------


@dataclass
class Worker:
    """A script or module to run as `__main__`, as the interpreter itself would."""

    argv: list[str]
    module: bool
    cwd: str
    num_threads: int
    cpus: list[int]
    """The processors it is bound to; none for all that the keeper has."""

    def command_line(self) -> list[str]:
        return [sys.executable, *(["-m"] if self.module else []), *self.argv]

    def run(self) -> None:
        try:
            os.chdir(self.cwd)
        except OSError as error:
            sys.exit(f"can't enter the working directory {self.cwd}: {error.strerror}")
        bind_to(self.cpus)
        prepare_checkpoints()
        use_threads(self.num_threads)
        sys.argv = list(self.argv)
        sys.orig_argv = self.command_line()
        main = ModuleType("__main__")
        sys.modules["__main__"] = main
        try:
            if self.module:
                self._run_module(main)
            else:
                self._run_script(main)
        except BaseException:
            hide_keeper_frames()
            raise

    def _run_module(self, main: ModuleType) -> None:
        name, sys.argv[0] = self.argv[0], "-m"
        if not sys.flags.safe_path:
            sys.path.insert(0, os.getcwd())
        prepare_main(main, {})
        # What `python -m` calls; runpy.run_module would not make it the one __main__ of the process.
        runpy._run_module_as_main(name)  # type: ignore[attr-defined]

    def _run_script(self, main: ModuleType) -> None:
        path = os.path.join(os.getcwd(), self.argv[0])
        try:
            with open(path, "rb") as file:
                source = file.read()
        except OSError as error:
            complaint = f"can't open file {path!r}: [Errno {error.errno}] {error.strerror}"
            print(f"{sys.executable}: {complaint}", file=sys.stderr)
            sys.exit(2)
        if not sys.flags.safe_path:
            sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
        loader = importlib.machinery.SourceFileLoader("__main__", path)
        prepare_main(main, {"__file__": path, "__cached__": None, "__loader__": loader})
        exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)


@dataclass
class Store:
    """The server of a job's TCPStore, on a listening socket that the keeper holds, too."""

    host: str
    port: int
    listener: int

    def command_line(self) -> list[str]:
        return [sys.executable, "-m", "torch.distributed.TCPStore", self.host, str(self.port)]

    def run(self, serving: Callable[[], None] = lambda: None) -> None:
        # Slurm sends it to every process of a job: ranks that save then, and who waits for them, need their store.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        look_up_hosts_in_files()
        distributed = importlib.import_module("torch.distributed")
        # The server brings a client of its own, which must have an address to go to.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        store = distributed.TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=self.listener
        )
        serving()
        while store is not None:
            signal.pause()


Task = Worker | Store


def bind_to(cpus: Sequence[int]) -> None:
    """Before any thread is started, so that all of them have it."""
    if cpus:
        try:
            os.sched_setaffinity(0, cpus)
        except OSError as error:
            print(f"seamark: can't be bound to processors {cpus}: {error.strerror}", file=sys.stderr, flush=True)


def prepare_checkpoints() -> None:
    """Have the directory of checkpoints put in order, here, where it holds up no other process.

    Whatever comes of it the script starts: a directory in disorder is nobody's failed attempt.
    """
    directory, seconds = os.environ.get(CHECKPOINT_DIR), os.environ.get(CHECKPOINT_SECONDS)
    if not directory or not seconds:
        return
    try:
        report = importlib.import_module("seamark.checkpoints").prepare(directory, seconds=float(seconds))
    except (ModuleNotFoundError, AttributeError):
        return  # the job's interpreter needn't have Seamark, or this version of it
    except (OSError, ValueError) as error:
        report = [f"{directory} can't be put in order: {error}"]
    for sentence in report:
        print(f"seamark: {sentence}", file=sys.stderr, flush=True)


def prepare_main(main: ModuleType, names: dict[str, Any]) -> None:
    """Give the module what the interpreter gives a fresh `__main__`."""
    main.__dict__.update(__builtins__=builtins, **names)
    if sys.version_info < (3, 14):
        main.__annotations__ = {}


def hide_keeper_frames() -> None:
    """Let the report of the exception in flight begin at the script's first frame."""
    own_file = hide_keeper_frames.__code__.co_filename
    report = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
        while frames is not None and frames.tb_frame.f_code.co_filename == own_file:
            frames = frames.tb_next
        report(kind, error.with_traceback(frames), frames)

    sys.excepthook = excepthook


def use_threads(count: int) -> None:
    """Make the libraries compute with `count` threads, in a forked worker as in an exec'ed one.

    They read the number when they are loaded, which for a forked worker was in the keeper, with 1. It decides
    in which order sums are made, and so their last bits.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
    else:
        sys.meta_path.insert(0, ThreadsOfTorch(count))
    blas = os.environ.get("OPENBLAS_NUM_THREADS", "")
    blas_count = int(blas) if blas.isdecimal() else count
    if "numpy" in sys.modules and blas_count > 1:
        set_openblas_threads(blas_count)


class ThreadsOfTorch(importlib.abc.MetaPathFinder):
    """Sets the number of threads right after the script imported torch, and is gone."""

    def __init__(self, count: int) -> None:
        self._count = count

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            module.set_num_threads(self._count)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def look_up_hosts_in_files() -> None:
    """Ask no name server in this process.

    The store looks the name of every client up when it accepts it, on the thread that serves all of them: with a slow
    resolver the whole job waits for seconds, for a name that only a log would show.
    """
    configure = getattr(ctypes.CDLL(None), "__nss_configure_lookup", None)
    if configure is not None:
        configure(b"hosts", b"files")


def set_openblas_threads(count: int) -> None:
    """Do now what OpenBLAS does with its variables when it is loaded."""
    count = min(count, len(os.sched_getaffinity(0)))
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "openblas" in line}
    for library in map(ctypes.CDLL, paths):
        for name in ("openblas_set_num_threads", "openblas_set_num_threads64_"):
            for symbol in (name, f"scipy_{name}"):
                if hasattr(library, symbol):
                    getattr(library, symbol)(count)


def reseed() -> None:
    """Draw anew what a fresh interpreter draws at random and a fork shares; `random` does so by itself."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        # Not torch.seed(), which seeds GPUs as well: theirs is a constant until the script sets it.
        sys.modules["torch"].default_generator.seed()
    if "multiprocessing" in sys.modules:
        sys.modules["multiprocessing"].current_process().authkey = os.urandom(32)


def show_command_line(argv: Sequence[str]) -> None:
    """Let ps, top and nvidia-smi show the worker's command, as far as there is room for it."""
    begin, end = map(int, stat_fields(os.getpid())[45:47])
    if 0 < begin < end:
        line = b"\0".join(map(os.fsencode, argv))
        ctypes.memmove(begin, line[: end - begin - 1].ljust(end - begin, b"\0"), end - begin)


@dataclass
class Forked:
    """The new process right after its fork: signals are blocked and the keeper is still all around it."""

    task: Task
    env: dict[str, str]
    log: int
    page: int
    gate: int | None
    close_keeper: Callable[[], None]

    def become(self) -> Task:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.close_keeper()
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(self.log, 1)
        os.dup2(self.log, 2)
        os.close(null)
        os.close(self.log)
        # A script that executes itself again keeps its page.
        os.set_inheritable(self.page, True)
        os.environ.clear()
        os.environ.update(self.env)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if self.gate is not None:
            wait_for_release(self.gate)
        reseed()
        return self.task


def wait_for_release(gate: int) -> None:
    """Let nothing of the worker happen before its agent has written down that it is there.

    A keeper that was killed can't let it go: whoever starts another worker in this place starts the only one.
    """
    released = os.read(gate, 1)
    os.close(gate)
    if not released:
        print("its keeper was killed before anybody knew of this process", file=sys.stderr, flush=True)
        os._exit(os.EX_OSERR)


def fork() -> int:
    """Fork with all signals blocked, in the child until its own handling of them is in place."""
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        pid = os.fork()
    except OSError:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        raise
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # The child does the same: whoever comes first, a signal to the group reaches it from now on.
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)
    return pid


def spawn(task: Task, env: dict[str, str], log: int, page: int, gate: int | None) -> int:
    """The same process by exec, safe to do with threads around."""
    if isinstance(task, Worker):
        options = ["--run", str(task.num_threads), "--cwd", task.cwd, *(["--module"] if task.module else [])]
        options += ["--cpus", ",".join(map(str, task.cpus))] if task.cpus else []
        options += ["--gate", "4"] if gate is not None else []
        arguments = [*options, "--", *task.argv]
    else:
        arguments = ["--serve-store", "4", "--host", task.host, "--port", str(task.port)]
    # Of 3 and 4 the keeper's own sockets were made long ago: nothing here is overwritten before its turn.
    actions: list[tuple[Any, ...]] = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, log, 1),
        (os.POSIX_SPAWN_DUP2, log, 2),
        (os.POSIX_SPAWN_DUP2, page, 3),
    ]
    if isinstance(task, Store):
        actions.append((os.POSIX_SPAWN_DUP2, task.listener, 4))
    if gate is not None:
        actions.append((os.POSIX_SPAWN_DUP2, gate, 4))
    return os.posix_spawn(
        sys.executable,
        [sys.executable, os.path.abspath(__file__), *arguments],
        env | {PROGRESS_FD: "3"},
        file_actions=actions,
        setpgroup=0,
        setsigmask=(),
        setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
    )


# -- the contents of requests --------------------------------------------------------------------------------


def parse(packet: bytes) -> Message:
    if len(packet) > MAX_PACKET_BYTES:
        raise Refused("too_large", f"a request may have {MAX_PACKET_BYTES} bytes")
    try:
        request = json.loads(packet)
    except (ValueError, RecursionError) as error:
        raise Refused("malformed", f"the packet is not one JSON object: {error}") from error
    if not isinstance(request, dict):
        raise Refused("malformed", "the packet is not one JSON object")
    return request


def integer(request: Message, name: str, least: int, most: int) -> int:
    value = request.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Refused("malformed", f"{name} must be an integer from {least} to {most}")
    return value


def is_text(value: object) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def text(request: Message, name: str) -> str:
    value = request.get(name)
    if not is_text(value) or not value:
        raise Refused("malformed", f"{name} must be a string, not empty and without NUL characters")
    return str(value)


def process_key(request: Message) -> tuple[str, str]:
    return text(request, "slot"), text(request, "incarnation")


def flag(request: Message, name: str, default: bool = False) -> bool:
    value = request.get(name, default)
    if not isinstance(value, bool):
        raise Refused("malformed", f"{name} must be true or false")
    return value


def environment(request: Message) -> dict[str, str]:
    env = request.get("env")
    if not isinstance(env, dict) or not all(
        is_text(name) and name and "=" not in name and is_text(value) for name, value in env.items()
    ):
        raise Refused("malformed", "env must map names to strings, without NUL characters")
    return dict(env)


def worker_task(request: Message) -> Worker:
    argv = request.get("argv")
    if not isinstance(argv, list) or not argv or not argv[0] or not all(map(is_text, argv)):
        raise Refused("malformed", "argv must be a list of strings: the script or module, then its arguments")
    cwd = text(request, "cwd")
    if not os.path.isdir(cwd):
        raise Refused("bad_cwd", f"the working directory {cwd} doesn't exist on this node")
    cpus = request.get("cpus", [])
    if not isinstance(cpus, list) or not all(type(cpu) is int and 0 <= cpu < 1 << 16 for cpu in cpus):
        raise Refused("malformed", "cpus must be a list of numbers of processors")
    return Worker(argv, flag(request, "module"), cwd, integer(request, "num_threads", 1, 1 << 16), cpus)


def open_log(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Refused("bad_log", f"can't open the log file {path}: {error.strerror}") from error


def blank_page() -> int:
    fd = os.memfd_create(PROGRESS_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PROGRESS_BYTES)
    # A worker that truncated it would kill the agent, which has it mapped, by SIGBUS.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def listen(host: str, port: int) -> socket.socket:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError as error:
        # A name look-up can take seconds, and all of the keeper with it.
        sentence = f"host must be a numeric address of this node, not {host[:80]!r}"
        raise Refused("bad_host", sentence) from error
    sock = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if version == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((host, port))
        sock.listen(socket.SOMAXCONN)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise Refused("port_in_use", f"port {port} of {host} is in use by another process") from error
        raise Refused("bad_host", f"can't listen on port {port} of {host}: {error.strerror}") from error
    return sock


# -- the keeper ----------------------------------------------------------------------------------------------


@dataclass
class Record:
    """One process that was started, until its exit is acknowledged."""

    slot: str
    incarnation: str
    kind: str
    pid: int
    start_time: int
    forked: bool
    forked_at: float
    fork_seconds: float
    why_exec: str | None
    port: int | None
    pidfd: int
    page: int
    gate: int | None = None
    status: int | None = None
    core: bool = False
    at: float | None = None
    discarded: bool = False

    def describe(self) -> Message:
        return {name: value for name, value in vars(self).items() if name not in ("pidfd", "page", "gate")}

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.page)
        if self.gate is not None:
            os.close(self.gate)
            self.gate = None


class Connection:
    """An agent, or somebody who has yet to say hello."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 2 * MAX_PACKET_BYTES)

    @property
    def events(self) -> int:
        return select.POLLIN | (select.POLLOUT if self._unsent else 0)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        # Duplicates: a record may be forgotten, and its descriptors closed, while its packet waits.
        self._unsent.append((json.dumps(message).encode(), [os.dup(fd) for fd in fds]))
        self.flush()

    def flush(self) -> None:
        while self._unsent:
            payload, fds = self._unsent[0]
            try:
                socket.send_fds(self.sock, [payload], fds)
            except BlockingIOError:
                return
            except OSError as error:
                # The peer is gone, as reading will find, too.
                if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF):
                    say(f"dropped a message to the agent: {error.strerror}")
            self._unsent.popleft()
            close_all(fds)

    def close(self) -> None:
        for _, fds in self._unsent:
            close_all(fds)
        self._unsent.clear()
        self.sock.close()


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


@dataclass
class Stop:
    """An orderly end under way, and who has been asked to end so far.

    Unless it is final, stores live on and the keeper stays.
    """

    deadline: float
    final: bool
    waiting: list[tuple[Connection, int | None]] = field(default_factory=list)
    asked: set[int] = field(default_factory=set)
    asked_groups: set[int] = field(default_factory=set)


class Keeper:
    """The event loop: requests of one agent, exits of the children, the deadlines of linger and stop."""

    def __init__(
        self,
        job: str,
        listener: socket.socket,
        environ: Mapping[str, str],
        preloaded: Preloaded,
        linger: float | None,
    ) -> None:
        self._job = job
        self._listener = listener
        self._environ = environ
        self._preloaded = preloaded
        self._linger = linger
        self._alone_until = None if linger is None else time.monotonic() + max(linger, FIRST_AGENT_SECONDS)
        self._connections: dict[int, Connection] = {}
        self._agent: Connection | None = None
        self._epoch = 0
        self._records: dict[tuple[str, str], Record] = {}
        self._living: dict[int, Record] = {}
        self._store_sockets: dict[tuple[str, int], socket.socket] = {}
        self._stop: Stop | None = None
        self._terminated = False
        self._childless = True
        self._wakeup, self._waker = socket.socketpair()
        self._wakeup.setblocking(False)
        self._waker.setblocking(False)
        self._requests: dict[str, Callable[[Connection, Message], Forked | None]] = {
            "start": self._on_start,
            "release": self._on_release,
            "signal": self._on_signal,
            "list": self._on_list,
            "acknowledge": self._on_acknowledge,
            "stop": self._on_stop,
        }

    def serve(self) -> Forked | None:
        """Run until all is stopped (None), or until this is a new process that has its own way to go."""
        self._take_signals()
        while True:
            for fd in self._wait():
                if fd == self._listener.fileno():
                    self._accept()
                elif fd == self._wakeup.fileno():
                    self._wakeup.recv(4096)
                elif fd in self._connections:
                    forked = self._receive(self._connections[fd])
                    if forked is not None:
                        return forked
            self._reap()
            now = time.monotonic()
            if self._terminated:
                self._terminated = False
                say("terminated, stopping")
                self._begin_stop(now + SIGTERM_GRACE_SECONDS, final=True)
            if self._alone_until is not None and now >= self._alone_until:
                self._alone_until = None
                say("no agent came back, stopping")
                self._begin_stop(now + LINGER_GRACE_SECONDS, final=True)
            if self._stop is not None and self._advance_stop(self._stop, now):
                self._flush()
                return None

    def close(self) -> None:
        """Let go of every descriptor; nothing is shut down, for in a new process they are still another's."""
        self._listener.close()
        self._wakeup.close()
        self._waker.close()
        for connection in self._connections.values():
            connection.close()
        for record in self._records.values():
            record.close()
        for sock in self._store_sockets.values():
            sock.close()

    # -- the loop ----------------------------------------------------------------------------------------

    def _take_signals(self) -> None:
        # A signal ignored at the keeper's start would be ignored in every worker. The two are Python's own.
        for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        self._terminated = True

    def _wait(self) -> list[int]:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        for fd, connection in self._connections.items():
            poll.register(fd, connection.events)
        now = time.monotonic()
        pauses = [] if self._alone_until is None else [self._alone_until - now]
        if self._stop is not None:
            left = self._stop.deadline - now
            pauses.append(min(left, STRAY_SECONDS) if left > 0 else KILL_SECONDS)
        return [fd for fd, _ in poll.poll(max(0.0, min(pauses)) * 1000 if pauses else None)]

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.getuid()):
            say(f"refused a connection by user {uid}")
            sock.close()
            return
        self._connections[sock.fileno()] = Connection(sock)

    def _receive(self, connection: Connection) -> Forked | None:
        connection.flush()
        try:
            packet = connection.sock.recv(MAX_PACKET_BYTES + 1)
        except BlockingIOError:
            return None
        except ConnectionError:
            packet = b""
        if not packet:
            self._drop(connection)
            return None
        request: Message = {}
        try:
            request = parse(packet)
            return self._handle(connection, request)
        except Refused as refusal:
            code, sentence = refusal.code, str(refusal)
        except OSError as error:
            code, sentence = "system", f"the system refused: {error}"
        connection.send({"type": "error", "id": request_id(request), "code": code, "error": sentence})
        return None

    def _handle(self, connection: Connection, request: Message) -> Forked | None:
        kind = text(request, "type")
        if kind == "hello":
            self._on_hello(connection, request)
            return None
        if kind not in self._requests:
            raise Refused("unknown", f"a keeper knows no request {kind[:80]!r}")
        if connection is not self._agent:
            raise Refused("hello_first", "say hello with your epoch before anything else")
        return self._requests[kind](connection, request)

    def _flush(self) -> None:
        for connection in self._connections.values():
            connection.sock.settimeout(1.0)
            connection.flush()

    def _drop(self, connection: Connection) -> None:
        del self._connections[connection.sock.fileno()]
        connection.close()
        if connection is self._agent:
            self._agent = None
            if self._linger is not None:
                self._alone_until = time.monotonic() + self._linger

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self._childless = True
                return
            self._childless = False
            if pid == 0:
                return
            record = self._living.pop(pid, None)
            if record is None:
                continue  # an orphan that a worker left behind
            record.status = os.waitstatus_to_exitcode(status)
            record.core = os.WIFSIGNALED(status) and os.WCOREDUMP(status)
            record.at = time.monotonic()
            # The page goes with the process: whoever asks later hears it from here.
            record.discarded = any(os.pread(record.page, 8, PROGRESS_DISCARDED))
            self._push_exit(record)

    def _push_exit(self, record: Record) -> None:
        if self._agent is not None:
            self._agent.send({"type": "exited", **record.describe()})

    # -- requests ----------------------------------------------------------------------------------------

    def _on_hello(self, connection: Connection, request: Message) -> None:
        epoch = integer(request, "epoch", 0, 1 << 63)
        if epoch < self._epoch:
            sentence = f"an agent of epoch {self._epoch} has come since; epoch {epoch} is refused"
            raise Refused("old_epoch", sentence)
        if self._agent is not None and self._agent is not connection:
            self._agent.send({"type": "superseded", "epoch": epoch})
            self._drop(self._agent)
        self._agent, self._epoch, self._alone_until = connection, epoch, None
        ready = {
            "job": self._job,
            "pid": os.getpid(),
            "start_time": start_time(os.getpid()),
            "python": sys.version.split()[0],
            "modules": self._preloaded.modules,
            "forks": self._preloaded.reason is None,
            "culprit": self._preloaded.culprit,
            "reason": self._preloaded.reason,
        }
        connection.send({"type": "ready", "id": request_id(request), **ready})
        for record in self._records.values():
            if record.status is not None:
                self._push_exit(record)

    def _on_start(self, connection: Connection, request: Message) -> Forked | None:
        key = process_key(request)
        if key not in self._records:
            if self._stop is not None:
                raise Refused("stopping", "the keeper is stopping and starts nothing more")
            kind = text(request, "kind")
            if kind == "worker":
                forked = self._launch(key, request, worker_task(request))
            elif kind == "store":
                forked = self._launch(key, request, self._store_task(request))
            else:
                raise Refused("malformed", f"kind must be 'worker' or 'store', not {kind[:80]!r}")
            if forked is not None:
                return forked
        record = self._records[key]
        answer = {**record.describe(), "type": "started", "id": request_id(request)}
        connection.send(answer, [record.pidfd, record.page])
        return None

    def _launch(self, key: tuple[str, str], request: Message, task: Task) -> Forked | None:
        with contextlib.ExitStack() as child_owned, contextlib.ExitStack() as undo:
            if isinstance(task, Store):
                child_owned.callback(os.close, task.listener)
            env = environment(request)
            if isinstance(task, Worker):
                env["OMP_NUM_THREADS"] = str(task.num_threads)
            log = open_log(text(request, "log"))
            child_owned.callback(os.close, log)
            page = blank_page()
            undo.callback(os.close, page)
            gate = gate_here = None
            if isinstance(task, Worker) and flag(request, "held"):
                gate, gate_here = os.pipe()
                child_owned.callback(os.close, gate)
                undo.callback(os.close, gate_here)
            why_exec = self._why_exec(env)
            forked_at = time.monotonic()
            pid = fork() if why_exec is None else spawn(task, env, log, page, gate)
            if pid == 0:
                child_owned.pop_all()
                undo.pop_all()
                if gate_here is not None:
                    os.close(gate_here)
                return Forked(task, env | {PROGRESS_FD: str(page)}, log, page, gate, self.close)
            fork_seconds = time.monotonic() - forked_at
            undo.callback(os.kill, pid, signal.SIGKILL)
            record = Record(
                slot=key[0],
                incarnation=key[1],
                kind="store" if isinstance(task, Store) else "worker",
                pid=pid,
                start_time=start_time(pid),
                forked=why_exec is None,
                forked_at=forked_at,
                fork_seconds=fork_seconds,
                why_exec=why_exec,
                port=task.port if isinstance(task, Store) else None,
                pidfd=os.pidfd_open(pid),
                page=page,
                gate=gate_here,
            )
            undo.pop_all()
        self._records[key] = self._living[pid] = record
        return None

    def _why_exec(self, env: Mapping[str, str]) -> str | None:
        if self._preloaded.reason is not None:
            return self._preloaded.reason
        for name in sorted(env.keys() | self._environ.keys()):
            early = name.startswith(READ_AT_START) and not name.startswith(READ_LATER)
            if early and name not in THREAD_VARIABLES and env.get(name) != self._environ.get(name):
                return f"{name} is read when a program starts, and the keeper was started with another value"
        return why_unsafe_to_fork("what was preloaded")

    def _store_task(self, request: Message) -> Store:
        host, port = text(request, "host"), integer(request, "port", 0, 65535)
        if any(record.port == port for record in self._living.values()):
            raise Refused("port_in_use", f"port {port} is served by the store that is running here")
        sock = self._store_sockets.get((host, port))
        if sock is None:
            sock = listen(host, port)
            port = sock.getsockname()[1]
            # Held as long as the keeper lives: while no store runs, clients wait in line instead of failing.
            self._store_sockets[host, port] = sock
        return Store(host, port, os.dup(sock.fileno()))

    def _on_release(self, connection: Connection, request: Message) -> None:
        record = self._known(request)
        if record.gate is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(record.gate, b"1")
            os.close(record.gate)
            record.gate = None
        connection.send({"type": "released", "id": request_id(request)})

    def _on_signal(self, connection: Connection, request: Message) -> None:
        record = self._known(request)
        number = integer(request, "signum", 1, signal.NSIG - 1)
        whole_group = flag(request, "group")
        if record.status is None:
            reached = int(kill_group(record.pid, number) if whole_group else kill(record.pid, number))
        elif whole_group:
            # By now the number may be another group's elsewhere, so only our own descendants are meant.
            members = [pid for pid, group in descendants(os.getpid()).items() if group == record.pid]
            reached = sum(kill(pid, number) for pid in members)
        else:
            reached = 0
        connection.send({"type": "signalled", "id": request_id(request), "reached": reached})

    def _on_list(self, connection: Connection, request: Message) -> None:
        for record in self._records.values():
            fds = [record.pidfd, record.page] if record.status is None else []
            connection.send({**record.describe(), "type": "known", "id": request_id(request)}, fds)
        connection.send({"type": "listed", "id": request_id(request), "count": len(self._records)})

    def _on_acknowledge(self, connection: Connection, request: Message) -> None:
        record = self._known(request)
        if record.status is None:
            sentence = f"{record.slot} (pid {record.pid}) is alive: there is nothing to acknowledge"
            raise Refused("alive", sentence)
        del self._records[record.slot, record.incarnation]
        record.close()
        connection.send({"type": "acknowledged", "id": request_id(request)})

    def _known(self, request: Message) -> Record:
        slot, incarnation = process_key(request)
        record = self._records.get((slot, incarnation))
        if record is None:
            sentence = f"no process of slot {slot[:80]} and incarnation {incarnation[:80]} is known here"
            raise Refused("unknown_process", sentence)
        return record

    # -- the end -----------------------------------------------------------------------------------------

    def _on_stop(self, connection: Connection, request: Message) -> None:
        grace = request.get("grace", 0)
        if isinstance(grace, bool) or not isinstance(grace, int | float) or not 0 <= grace <= 1e9:
            raise Refused("malformed", "grace must be a number of seconds, 0 or more")
        stop = self._begin_stop(time.monotonic() + grace, flag(request, "final", True))
        stop.waiting.append((connection, request_id(request)))

    def _begin_stop(self, deadline: float, final: bool) -> Stop:
        if self._stop is None:
            self._stop = Stop(deadline, final)
            for record in self._living.values():
                if record.kind == "worker":
                    ask_to_end(record.pid, self._stop)
        self._stop.deadline = min(self._stop.deadline, deadline)
        self._stop.final = self._stop.final or final
        return self._stop

    def _advance_stop(self, stop: Stop, now: float) -> bool:
        """Whether all is over, the keeper's own life included."""
        stores = {record.pid for record in self._living.values() if record.kind == "store"}
        workers = self._living.keys() - stores
        left = {} if self._childless else descendants(os.getpid())
        others = left.keys() - stores
        ended = self._childless or not (stop.final or others or workers)
        if not ended and now < stop.deadline + KILL_PATIENCE_SECONDS:
            if now >= stop.deadline:
                for pid in left if stop.final else others:
                    kill(pid, signal.SIGKILL)
            else:
                self._ask_the_rest(stop, left, stores)
            return False
        unkillable = sorted(left if stop.final else others)
        if unkillable:
            say(f"gave up on processes that can't be killed: {unkillable}")
        for connection, asked_as in stop.waiting:
            connection.send({"type": "stopped", "id": asked_as, "left": unkillable})
        self._stop = None
        return stop.final

    def _ask_the_rest(self, stop: Stop, left: Mapping[int, int], stores: set[int]) -> None:
        for pid, group in left.items():
            if pid not in stores | stop.asked and group not in stop.asked_groups:
                stop.asked.add(pid)
                kill(pid, signal.SIGTERM)
        # The last checkpoints may need the store: it goes when nobody else is left.
        if stop.final and left.keys() <= stores:
            for pid in stores:
                kill_group(pid, signal.SIGKILL)


def ask_to_end(group: int, stop: Stop) -> None:
    stop.asked_groups.add(group)
    kill_group(group, signal.SIGTERM)
    # A process that was stopped would hear of it only at the end of the grace.
    kill_group(group, signal.SIGCONT)


def request_id(request: Message) -> int | None:
    value = request.get("id")
    return value if isinstance(value, int) else None


# -- the program ---------------------------------------------------------------------------------------------


def bind(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    usual_umask = os.umask(0o177)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
                if other.connect_ex(path) == 0:
                    sys.exit(f"another keeper answers on {path}: connect to it instead of starting one")
            os.unlink(path)
        sock.bind(path)
    except OSError as error:
        sys.exit(f"can't listen on {path}: {error.strerror or error}")
    finally:
        os.umask(usual_umask)
    sock.listen()
    return sock


def keep(options: argparse.Namespace) -> Task:
    """Be the keeper; returns in every new process, and only there."""
    # Where a shell started it as the leader of a group, that is session enough.
    with contextlib.suppress(PermissionError):
        os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    listener = bind(options.socket)
    environ = dict(os.environ)
    # For the libraries loaded now, which start threads otherwise; each worker gets an environment of its own.
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    preloaded = preload(filter(None, options.preload.split(",")))
    if preloaded.reason:
        say(f"workers are exec'ed instead of forked: {preloaded.reason}")
    forked = Keeper(options.job, listener, environ, preloaded, options.linger).serve()
    if forked is not None:
        return forked.become()
    os.unlink(options.socket)
    # Nothing here needs the seconds that torch takes to tidy up.
    os._exit(0)


def run_and_exit(task: Task) -> NoReturn:
    """End as the interpreter ends a script, but without freeing every module.

    With torch that takes 2 s, in which nobody hears of the end.
    """
    status = 0
    try:
        task.run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        # Only the interpreter itself ends a process by the signal. Whatever was frozen has to be freed with the
        # rest: extension modules report leaks otherwise.
        gc.unfreeze()
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    flush_files()
    os._exit(status & 0xFF)


def flush_files() -> None:
    """Write out what the open files still hold, which freeing them would do: Python's own and the C library's."""
    files = [thing for thing in gc.get_objects() if issubclass(type(thing), io.IOBase)]
    for file in (*files, sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            file.flush()
    ctypes.CDLL(None).fflush(None)


def main(argv: list[str]) -> Task:
    parser = argparse.ArgumentParser(prog="keeper.py", allow_abbrev=False)
    parser.add_argument("--socket", help="the unix socket to answer on")
    parser.add_argument("--job", help="the job's name, for people who look at processes")
    parser.add_argument("--linger", type=float, help="seconds to wait for another agent (default: for ever)")
    parser.add_argument("--preload", default=",".join(PRELOAD), help="modules to import, separated by commas")
    own = parser.add_argument_group("used by the keeper itself, where it can't fork")
    own.add_argument("--run", type=int, metavar="NUM_THREADS")
    own.add_argument("--cwd")
    own.add_argument("--cpus", default="")
    own.add_argument("--gate", type=int, metavar="FD")
    own.add_argument("--module", action="store_true")
    own.add_argument("--serve-store", type=int, metavar="FD")
    own.add_argument("--host")
    own.add_argument("--port", type=int)
    ours, theirs = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    options = parser.parse_args(ours)
    if options.run is not None:
        if options.gate is not None:
            wait_for_release(options.gate)
        cpus = [int(cpu) for cpu in options.cpus.split(",") if cpu]
        return Worker(theirs, options.module, options.cwd, options.run, cpus)
    if options.serve_store is not None:
        return Store(options.host, options.port, options.serve_store)
    if options.socket is None or options.job is None:
        parser.error("--socket and --job are needed")
    return keep(options)


if __name__ == "__main__":
    # The directory of this file is no place for a job to import from.
    if not sys.flags.safe_path:
        del sys.path[0]
    task = main(sys.argv[1:])
    show_command_line(task.command_line())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    run_and_exit(task)
