"""``seamark doctor``: which findings are warnings, which are problems, and that each says what to do."""

from __future__ import annotations

import errno
import resource
import socket
from pathlib import Path

import pytest
from keyring import keyring

from seamark.protocol.messages import CoordinatorStatus, LighthouseStatus
from seamarkd.cli.doctor import (
    Check,
    address_check,
    bind_error,
    clock_check,
    directory_check,
    events_check,
    file_system,
    files_limit,
    gpus,
    kernel,
    keys,
    numbers,
    package_check,
    processes_limit,
)
from seamarkd.settings import load

INFINITY = resource.RLIM_INFINITY
COORDINATOR = CoordinatorStatus(1, 1, "s", 42, 60.0, "", [], [], {})
LIGHTHOUSE = LighthouseStatus(1, 1, "s", 42, 60.0, "", [], {}, [], {}, 0.1, 0.0, 1e9)
HERE = "tcp://127.0.0.1:29712"


@pytest.mark.parametrize(
    ("check", "level", "said"),
    [
        (files_limit(1_024, 524_288), "warning", "ulimit -n 4096"),
        (files_limit(1_024, 1_024), "problem", "limits.conf"),
        (files_limit(1_024, INFINITY), "warning", "ulimit"),
        (files_limit(4_096, 4_096), "ok", "4096"),
        (files_limit(INFINITY, INFINITY), "ok", "unlimited"),
        (processes_limit(INFINITY), "ok", "unlimited"),
        (processes_limit(100), "warning", "ulimit -u"),
        (kernel("5.15.0-91-generic"), "warning", "6.1"),
        (kernel("6.1.0"), "ok", "6.15"),
        (kernel("6.15.3-arch1"), "ok", "kernel 6.15.3-arch1"),
        (package_check("torch", None, (2, 6)), "problem", "torch>=2.6"),
        (package_check("torch", "2.5.1+cu124", (2, 6)), "problem", "too old"),
        (package_check("torch", "2.10.0+cu128", (2, 6)), "ok", "torch 2.10.0"),
        (address_check("coordinator", HERE, COORDINATOR, errno.EADDRINUSE), "ok", "pid 42"),
        (address_check("coordinator", HERE, "no answer", 0), "ok", "free"),
        (address_check("coordinator", HERE, "no answer", errno.EADDRINUSE), "problem", "ss -ltnp 'sport = :29712'"),
        (address_check("coordinator", HERE, "no answer", errno.EADDRNOTAVAIL), "problem", "address of this host"),
        (address_check("coordinator", "tcp://head:29712", "no answer", None), "problem", "another host: no answer"),
        (address_check("coordinator", "ipc:///run/c", "no answer", None), "ok", "does not run"),
        (events_check(HERE, LIGHTHOUSE, errno.EADDRINUSE), "ok", "the lighthouse's"),
        (events_check(HERE, LIGHTHOUSE, 0), "problem", "lighthouse.events"),
        (events_check(HERE, "no answer", 0), "ok", "free"),
        (events_check(HERE, "no answer", errno.EADDRINUSE), "problem", "ss -ltnp"),
        (clock_check(1e9, 1e9 - 0.1, 1e9 + 0.1), "ok", "0.100 s"),
        (clock_check(1e9, 1e9 - 9.0, 1e9 + 9.0), "ok", "9.000 s"),
        (clock_check(1e9, 1e9 + 3.0, 1e9 + 3.2), "warning", "3.0 s ahead of"),
        (clock_check(1e9, 1e9 - 3.2, 1e9 - 3.0), "warning", "3.0 s behind"),
        (directory_check("state", Path("/s"), 0o40700, True, "ext4"), "ok", "ext4"),
        (directory_check("state", Path("/s"), 0o40700, True, "nfs4"), "problem", "paths.state"),
        (directory_check("state", Path("/s"), 0o40700, True, "lustre"), "problem", "lustre"),
        (directory_check("state", Path("/s"), 0o40700, True, "tmpfs"), "warning", "paths.state"),
        (directory_check("run", Path("/r"), 0o40700, True, "tmpfs"), "ok", "tmpfs"),
        (directory_check("run", Path("/r"), 0o40755, True, "ext4"), "problem", "chmod 700 /r"),
        (directory_check("log", Path("/l"), 0o40500, False, "ext4"), "problem", "not writable"),
    ],
)
def test_a_finding_has_its_level_and_says_what_to_do(check: Check, level: str, said: str) -> None:
    assert check.level == level
    assert said in check.text + check.advice
    assert bool(check.advice) == (level != "ok")


def test_the_deepest_mount_decides_and_the_last_one_there() -> None:
    mounts = [("/", "ext4"), ("/home", "nfs4"), ("/home", "ext4"), ("/home/a", "tmpfs")]
    expected = {"/": "ext4", "/homestead": "ext4", "/home/b": "ext4", "/home/a/state": "tmpfs"}
    assert {path: file_system(Path(path), mounts) for path in expected} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2.6.0+cu124", (2, 6, 0)), ("6.1.0-13-amd64", (6, 1, 0)), ("27.0rc1", (27, 0)), ("", ()), ("x", ())],
)
def test_the_numbers_of_a_version(text: str, expected: tuple[int, ...]) -> None:
    assert numbers(text) == expected


def test_a_port_that_is_listened_at_is_not_free() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        assert bind_error(address) == errno.EADDRINUSE
    assert bind_error(address) == 0
    assert bind_error("ipc:///run/c") is None
    assert bind_error("tcp://192.0.2.1:1") is None


def test_gpus_are_counted_by_their_own_device_files(tmp_path: Path) -> None:
    assert gpus(tmp_path) == Check("ok", "GPUs: none, workers use Gloo on the CPU")
    for name in ("nvidia0", "nvidia1", "nvidia-uvm", "nvidiactl"):
        (tmp_path / name).touch()
    assert gpus(tmp_path) == Check("ok", "GPUs: 2")


def test_keys_are_there_and_safe_or_not_needed(tmp_path: Path) -> None:
    assert keys(load(None, {}, {})).level == "ok"
    open_to_all = load(None, {}, {"security.insecure": True})
    assert (keys(open_to_all).level, "--insecure" in keys(open_to_all).text) == ("warning", True)
    chosen = load(None, {}, {"security.keys": str(tmp_path / "keys")})
    assert "seamark keys init" in keys(chosen).text
    keyring(tmp_path / "keys", alice="operator")
    assert keys(chosen) == Check("ok", f"keys: {tmp_path / 'keys'}, yours is alice")
    (tmp_path / "keys/alice.key").chmod(0o644)
    assert keys(chosen).level == "problem"
