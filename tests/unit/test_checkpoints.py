"""What a reader of checkpoints may rely on, whatever happens to the writer, its disk or its power."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import itertools
import json
import logging
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seamark import checkpoints
from seamark.checkpoints import Checkpoint, CheckpointError

Call = tuple[str, ...]


def payload_of(step: int, elements: int = 1000) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((elements,), float(step))}


def saved(directory: Path, *steps: int, keep: int = 100) -> list[Path]:
    return [checkpoints.save(directory, step, payload_of(step), keep=keep) for step in steps]


def names(directory: Path) -> set[str]:
    return set(os.listdir(directory))


def files_of(*steps: int) -> set[str]:
    return {f"step_{step:08d}{suffix}" for step in steps for suffix in (".pt", ".done")}


def latest_step(directory: Path) -> int | None:
    found = checkpoints.latest(directory)
    return found.step if found else None


# --- saving, finding, loading


def test_a_saved_payload_comes_back(tmp_path: Path) -> None:
    payload: dict[str, Any] = {
        "model": {"w": torch.arange(6.0).reshape(2, 3)},
        "lr": 0.1,
        "names": ["a", "b"],
        "done": False,
    }
    path = checkpoints.save(tmp_path / "new" / "folder", 42, payload)
    found = checkpoints.latest(tmp_path / "new" / "folder")
    assert found is not None
    assert found.path == path == tmp_path / "new" / "folder" / "step_00000042.pt"
    assert found.step == 42
    assert found.size == path.stat().st_size
    loaded = checkpoints.load(found)
    assert torch.equal(loaded["model"].pop("w"), payload["model"].pop("w"))
    assert loaded == payload


def test_the_marker_says_what_the_file_is(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 7)
    found = checkpoints.latest(tmp_path)
    assert found is not None
    marker = json.loads(path.with_suffix(".done").read_text())
    assert marker == {"format": 1, "size": found.size, "sha256": found.sha256}
    digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert digest == found.sha256


@pytest.mark.parametrize("create", [False, True])
def test_without_checkpoints_there_is_no_latest(tmp_path: Path, create: bool) -> None:
    directory = tmp_path / "checkpoints"
    if create:
        directory.mkdir()
        (directory / "notes.txt").write_text("step_00000001.pt")
    assert checkpoints.latest(directory) is None
    assert checkpoints.list_valid(directory) == []
    assert checkpoints.clean(directory) == []


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    saved(tmp_path, 0, 99_999_999, 100_000_000)
    assert [found.step for found in checkpoints.list_valid(tmp_path)] == [100_000_000, 99_999_999, 0]


@pytest.mark.parametrize(
    ("before", "step", "keep", "after"),
    [
        ([1, 2, 3], 4, 2, [3, 4]),
        ([1, 2, 3], 4, 1, [4]),
        ([1, 2, 3], 4, 4, [1, 2, 3, 4]),
        ([1, 2, 9], 4, 1, [4, 9]),  # a later one is not for this save to judge
        ([9], 4, 2, [4, 9]),
    ],
)
def test_only_the_newest_are_kept(tmp_path: Path, before: list[int], step: int, keep: int, after: list[int]) -> None:
    saved(tmp_path, *before)
    saved(tmp_path, step, keep=keep)
    assert names(tmp_path) == files_of(*after)


def test_a_truncated_checkpoint_is_not_counted_among_those_to_keep(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    os.truncate(tmp_path / "step_00000002.pt", 10)
    saved(tmp_path, 3, keep=2)
    assert names(tmp_path) == files_of(1, 2, 3)
    saved(tmp_path, 4, keep=2)
    assert names(tmp_path) == files_of(3, 4)


@pytest.mark.parametrize(("step", "keep"), [(-1, 2), (1, 0), (1, -3)])
def test_numbers_that_make_no_sense_are_refused(tmp_path: Path, step: int, keep: int) -> None:
    with pytest.raises(ValueError, match=f"step={step} and keep={keep}"):
        checkpoints.save(tmp_path, step, {}, keep=keep)


def test_a_payload_that_load_would_refuse_is_refused_by_save(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match="Path.* which `load` refuses"):
        checkpoints.save(tmp_path, 2, {"where": tmp_path})
    assert names(tmp_path) == files_of(1)


def test_a_valid_checkpoint_is_replaced_by_the_same_bytes_only(tmp_path: Path) -> None:
    saved(tmp_path, 5, 5)
    with pytest.raises(CheckpointError, match="valid checkpoint of this step with other content"):
        checkpoints.save(tmp_path, 5, payload_of(6))
    assert checkpoints.load(checkpoints.list_valid(tmp_path)[0])["step"] == 5
    assert names(tmp_path) == files_of(5)


def test_a_corrupt_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    os.truncate(tmp_path / "step_00000005.pt", 3)
    saved(tmp_path, 5)
    assert latest_step(tmp_path) == 5


def test_importing_the_module_imports_no_torch() -> None:
    code = "import sys, seamark.checkpoints; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- damage


def flip(position: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)

    return damage


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put(content: str | bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def marker(**changes: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


DAMAGES = {
    "truncated": (".pt", halve, "bytes and was saved with"),
    "empty": (".pt", put(""), "is 0 bytes"),
    "longer": (".pt", lengthen, "bytes and was saved with"),
    "first bit flipped": (".pt", flip(0), "SHA-256 differs"),
    "middle bit flipped": (".pt", flip(2000), "SHA-256 differs"),
    "last bit flipped": (".pt", flip(-1), "SHA-256 differs"),
    "missing": (".pt", Path.unlink, "No such file"),
    "a directory": (".pt", replace_by_directory, "Is a directory"),
    "marker empty": (".done", put(""), "it is empty"),
    "marker cut": (".done", halve, "is no valid marker"),
    "marker garbage": (".done", put("{size: 1}"), "is no valid marker"),
    "marker not text": (".done", put(b"\xff\xfe\x00garbage"), "is no valid marker"),
    "marker a list": (".done", put("[1, 2]"), "holds no JSON object"),
    "marker deep": (".done", put("[" * 400), "is no valid marker"),
    "marker long": (".done", put(" " * 100_000), "longer than 512 bytes"),
    "marker a directory": (".done", replace_by_directory, "Is a directory"),
    "size missing": (".done", put('{"format": 1}'), "its size is None"),
    "size a string": (".done", marker(size="100"), "its size is '100'"),
    "size a float": (".done", marker(size=1.5), "its size is 1.5"),
    "size a bool": (".done", marker(size=True), "its size is True"),
    "size negative": (".done", marker(size=-1), "its size is -1"),
    "size wrong": (".done", marker(size=1), "bytes and was saved with 1"),
    "digest a number": (".done", marker(sha256=5), "its sha256 is 5"),
    "digest short": (".done", marker(sha256="ab"), "its sha256 is 'ab'"),
    "digest wrong": (".done", marker(sha256="0" * 64), "SHA-256 differs"),
    "format newer": (
        ".done",
        marker(format=2),
        "its format is 2, and this version of Seamark reads format 1",
    ),
    "format a bool": (".done", marker(format=True), "its format is True"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_named(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    suffix, inflict, reason = DAMAGES[damage]
    good, bad = saved(tmp_path, 10, 20)
    inflict(bad.with_suffix(suffix))
    with pytest.raises(CheckpointError) as error:
        checkpoints.verify(bad)
    assert "step_00000020" in str(error.value)
    assert reason in str(error.value)
    checkpoints.verify(good)
    with caplog.at_level(logging.WARNING):
        assert latest_step(tmp_path) == 10
    (record,) = caplog.records
    assert "step_00000020" in record.getMessage()
    assert reason in record.getMessage()
    assert "Using step_00000010.pt instead." in record.getMessage()
    assert [found.step for found in checkpoints.list_valid(tmp_path)] == [10]


def test_when_nothing_valid_is_left_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in saved(tmp_path, 1, 2):
        halve(path)
    assert checkpoints.latest(tmp_path) is None
    assert [f"{tmp_path} holds no valid checkpoint." in record.getMessage() for record in caplog.records] == [True] * 2


def test_a_checkpoint_without_marker_is_passed_over_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step_00000002.done").unlink()
    assert latest_step(tmp_path) == 1
    assert caplog.records == []
    with pytest.raises(CheckpointError, match="step_00000002.pt has no marker step_00000002.done"):
        checkpoints.verify(tmp_path / "step_00000002.pt")


def test_a_file_of_another_name_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model.pt is no checkpoint of Seamark"):
        checkpoints.verify(tmp_path / "model.pt")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=10,
)
marker_like = st.fixed_dictionaries(
    {}, optional={"format": json_values | st.just(1), "size": json_values, "sha256": json_values}
)


@given(
    content=st.binary(max_size=600) | st.one_of(json_values, marker_like).map(lambda value: json.dumps(value).encode())
)
def test_no_marker_that_save_did_not_write_is_believed(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.getbasetemp() / "any_marker"
    if not directory.exists():
        saved(directory, 1)
    (directory / "step_00000001.done").write_bytes(content)
    with pytest.raises(CheckpointError, match="step_00000001"):
        checkpoints.verify(directory / "step_00000001.pt")
    assert checkpoints.latest(directory) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(Path.unlink, "No such file"), (halve, "bytes, not"), (flip(2), "nothing that torch loads")],
)
def test_loading_what_changed_since_it_was_found(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    (path,) = saved(tmp_path, 1)
    found = checkpoints.latest(tmp_path)
    assert found is not None
    damage(path)
    with pytest.raises(CheckpointError, match=f"step_00000001.pt .*{reason}.*Resume from what `latest` returns now"):
        checkpoints.load(found)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    class Mischief:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "was here"),)

    path = tmp_path / "step_00000001.pt"
    torch.save(Mischief(), path)
    with pytest.raises(CheckpointError, match="nothing that torch loads without running it"):
        checkpoints.load(Checkpoint(path, 1, path.stat().st_size, "0" * 64))
    assert not (tmp_path / "was here").exists()


# --- a content is hashed once


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    files: list[str] = []
    real = hashlib.file_digest

    def file_digest(file: Any, algorithm: str) -> Any:
        files.append(Path(file.name).name)
        return real(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    monkeypatch.setattr(checkpoints, "_digests", {})
    return files


def test_what_this_process_wrote_or_read_is_not_hashed_again(tmp_path: Path, hashed: list[str]) -> None:
    (path,) = saved(tmp_path, 1)
    assert latest_step(tmp_path) == 1
    assert hashed == []
    checkpoints._digests.clear()  # as in a new process
    assert latest_step(tmp_path) == latest_step(tmp_path) == 1
    assert hashed == ["step_00000001.pt"]
    flip(2000)(path)
    os.utime(path, ns=(0, 0))
    assert latest_step(tmp_path) is None
    assert hashed == ["step_00000001.pt"] * 2


def test_verify_always_reads(tmp_path: Path, hashed: list[str]) -> None:
    (path,) = saved(tmp_path, 1)
    checkpoints.verify(path)
    checkpoints.verify(path)
    assert hashed == ["step_00000001.pt"] * 2


def test_few_digests_are_remembered(tmp_path: Path, hashed: list[str]) -> None:
    saved(tmp_path, *range(checkpoints.DIGESTS_REMEMBERED + 5), keep=1)
    assert len(checkpoints._digests) == checkpoints.DIGESTS_REMEMBERED


# --- the order of calls, and what a power cut makes of it

SAVE_REPLACING_STEP_1 = [
    ("create", "run/step_00000002.pt.tmp"),
    ("write", "run/step_00000002.pt.tmp"),
    ("fsync", "run/step_00000002.pt.tmp"),
    ("rename", "run/step_00000002.pt.tmp", "run/step_00000002.pt"),
    ("fsync", "run"),
    ("create", "run/step_00000002.done.tmp"),
    ("write", "run/step_00000002.done.tmp"),
    ("fsync", "run/step_00000002.done.tmp"),
    ("rename", "run/step_00000002.done.tmp", "run/step_00000002.done"),
    ("fsync", "run"),
    ("unlink", "run/step_00000001.done"),
    ("fsync", "run"),
    ("unlink", "run/step_00000001.pt"),
]
FIRST_SAVE = [
    ("mkdir", "run"),
    ("fsync", "."),
    *SAVE_REPLACING_STEP_1[:10],
]


def fsyncs(calls: list[Call]) -> range:
    return range(sum(call[0] == "fsync" for call in calls))


class RecordingFile(io.FileIO):
    """Sees each write that reaches the kernel: bytes still in a buffer at an fsync are not taken as safe."""

    record: Callable[[str, Any], None]

    def write(self, data: Any) -> int:
        self.record("write", self.name)
        return super().write(data)


@contextmanager
def recorded_calls(
    root: Path, *, without_fsync: int | None = None, killed_after: int | None = None
) -> Iterator[list[Call]]:
    """The calls that change the disk below `root`; leaves one fsync out, or ends the process after a call."""
    calls: list[Call] = []
    numbers = itertools.count()

    def record(operation: str, *paths: Any) -> None:
        call = (operation, *(os.path.relpath(path, root) for path in paths))
        if not (operation == "write" and calls and calls[-1] == call):
            calls.append(call)
        if len(calls) == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def recording_open(path: Any, mode: str) -> Any:
        if mode != "ab":
            return open(path, mode)
        record("create", path)
        file = RecordingFile(path, "a")
        file.record = record
        return io.BufferedWriter(file)

    def fsync(descriptor: int) -> None:
        if next(numbers) != without_fsync:
            record("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            real["fsync"](descriptor)

    real: dict[str, Any] = {name: getattr(os, name) for name in ("fsync", "replace", "unlink", "mkdir")}

    def watching(name: str, operation: str) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            real[name](*arguments, **options)
            record(operation, *(argument for argument in arguments if not isinstance(argument, int)))

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "open", recording_open, raising=False)
        patch.setattr(os, "fsync", fsync)
        for name, operation in (("replace", "rename"), ("unlink", "unlink"), ("mkdir", "mkdir")):
            patch.setattr(os, name, watching(name, operation))
        yield calls


class PoweredDisk:
    """What a disk may hold after a power cut: the pessimistic reading of POSIX.

    A name shows any of the values it had since the last fsync of its directory, each name by itself; bytes
    written since the last fsync of their file are there or not.
    """

    def __init__(self) -> None:
        self.values: dict[str, list[int | None]] = {}  # name -> its file since the last fsync of its directory
        self.safe: set[int] = set()  # files whose bytes are on the disk
        self.numbers = itertools.count()

    def apply(self, call: Call) -> None:
        match call:
            case ("create" | "mkdir" as operation, name):
                number = next(self.numbers)
                self.values.setdefault(name, [None]).append(number)
                if operation == "mkdir":
                    self.safe.add(number)
            case ("write", name):
                self.safe.discard(self.now(name))
            case ("rename", old, new):
                self.values.setdefault(new, [None]).append(self.now(old))
                self.values[old].append(None)
            case ("unlink", name):
                self.values.setdefault(name, [None]).append(None)
            case ("fsync", name):
                if name in self.values:
                    self.safe.add(self.now(name))
                for other, values in self.values.items():
                    if other != name and (os.path.dirname(other) or ".") == name:
                        del values[:-1]

    def now(self, name: str) -> int:
        number = self.values[name][-1]
        assert number is not None
        return number

    def images(self) -> Iterator[dict[str, bool]]:
        """Each possible content: the names that are there, and whether their bytes are."""
        for choice in itertools.product(*self.values.values()):
            present = {name: number for name, number in zip(self.values, choice, strict=True) if number is not None}
            doubtful = sorted({number for number in present.values() if number not in self.safe})
            for whole in itertools.product((False, True), repeat=len(doubtful)):
                known = dict(zip(doubtful, whole, strict=True))
                image = {name: known.get(number, True) for name, number in present.items()}
                yield {name: ok for name, ok in image.items() if os.path.dirname(name) in ("", *image)}


def broken_promises(calls: list[Call], *, acknowledged_before: int | None, acknowledged_after: int) -> set[str]:
    """What a power cut before, between or after these calls of one save could break."""
    disk = PoweredDisk()
    if acknowledged_before is not None:
        name = f"run/step_{acknowledged_before:08d}"
        for call in (("mkdir", "run"), ("create", f"{name}.pt"), ("create", f"{name}.done")):
            disk.apply(call)
        for call in (("fsync", f"{name}.pt"), ("fsync", f"{name}.done"), ("fsync", "run"), ("fsync", ".")):
            disk.apply(call)
    broken: set[str] = set()
    for done in range(len(calls) + 1):
        if done:
            disk.apply(calls[done - 1])
        acknowledged = acknowledged_after if done == len(calls) else acknowledged_before
        for image in disk.images():
            marked = [name.removesuffix(".done") for name, whole in image.items() if name.endswith(".done") and whole]
            valid = [int(name[-8:]) for name in marked if image.get(f"{name}.pt")]
            if len(valid) < len(marked):
                broken.add("a marker vouches for a file that is missing or torn")
            if acknowledged is not None and max(valid, default=-1) < acknowledged:
                broken.add(f"step {acknowledged} was acknowledged and is lost")
    return broken


def save_first(root: Path, without_fsync: int | None = None) -> list[Call]:
    with recorded_calls(root, without_fsync=without_fsync) as calls:
        checkpoints.save(root / "run", 2, payload_of(2), keep=1)
    return calls


def save_replacing(root: Path, without_fsync: int | None = None) -> list[Call]:
    saved(root / "run", 1)
    with recorded_calls(root, without_fsync=without_fsync) as calls:
        checkpoints.save(root / "run", 2, payload_of(2), keep=1)
    return calls


def test_the_order_of_calls(tmp_path: Path) -> None:
    assert save_replacing(tmp_path) == SAVE_REPLACING_STEP_1


def test_the_order_of_calls_of_the_first_save(tmp_path: Path) -> None:
    assert save_first(tmp_path) == FIRST_SAVE


def test_no_power_cut_breaks_a_promise() -> None:
    assert broken_promises(FIRST_SAVE, acknowledged_before=None, acknowledged_after=2) == set()
    assert broken_promises(SAVE_REPLACING_STEP_1, acknowledged_before=1, acknowledged_after=2) == set()


@pytest.mark.parametrize("number", fsyncs(SAVE_REPLACING_STEP_1))
def test_each_fsync_is_needed(tmp_path: Path, number: int) -> None:
    calls = save_replacing(tmp_path, without_fsync=number)
    assert calls != SAVE_REPLACING_STEP_1
    assert broken_promises(calls, acknowledged_before=1, acknowledged_after=2)


@pytest.mark.parametrize("number", fsyncs(FIRST_SAVE))
def test_each_fsync_of_the_first_save_is_needed(tmp_path: Path, number: int) -> None:
    calls = save_first(tmp_path, without_fsync=number)
    assert calls != FIRST_SAVE
    assert broken_promises(calls, acknowledged_before=None, acknowledged_after=2)


# --- killed, interrupted, out of space


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a child that ends without running anything of this process; its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)  # those of OpenMP did not come along, and would be waited for
        work()
        status = 0
    finally:
        os._exit(status)


def assert_intact(directory: Path, at_least: int) -> int:
    """The newest checkpoint is valid, holds its own step, and is no older than what was acknowledged."""
    found = checkpoints.latest(directory)
    assert found is not None
    assert found.step >= at_least
    checkpoints.verify(found.path)
    payload = checkpoints.load(found)
    assert payload["step"] == found.step
    assert bool((payload["weights"] == found.step).all())
    return found.step


def test_twenty_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    chance = random.Random(20)
    step = 0
    checkpoints.save(tmp_path, step, payload_of(step, 50_000))
    for attempt in range(20):
        reader, writer = os.pipe()

        def save_for_ever(first: int = step + 1, acknowledgements: int = writer) -> None:
            for next_step in itertools.count(first):
                checkpoints.save(tmp_path, next_step, payload_of(next_step, 50_000))
                os.write(acknowledgements, next_step.to_bytes(8, "big"))

        pid = forked(save_for_ever)
        os.close(writer)
        under_way = bool(select.select([reader], [], [], 60)[0])
        time.sleep(chance.uniform(0, 0.05))  # the moment of the kill is what is tried here
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert under_way
        with open(reader, "rb") as acknowledgements:
            acknowledged = int.from_bytes(acknowledgements.read()[-8:], "big")
        assert acknowledged > step
        step = assert_intact(tmp_path, acknowledged)
        if attempt % 2:
            checkpoints.clean(tmp_path)
            assert assert_intact(tmp_path, acknowledged) == step


@pytest.mark.parametrize("calls", range(1, len(SAVE_REPLACING_STEP_1) + 1))
def test_killed_after_each_call(tmp_path: Path, calls: int) -> None:
    saved(tmp_path, 1)

    def save_and_die() -> None:
        with recorded_calls(tmp_path, killed_after=calls):
            checkpoints.save(tmp_path, 2, payload_of(2), keep=1)

    pid = forked(save_and_die)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    step = assert_intact(tmp_path, 1)
    checkpoints.clean(tmp_path)
    assert assert_intact(tmp_path, 1) == step
    saved(tmp_path, 2, 3, keep=1)
    assert (
        files_of(3) <= names(tmp_path) <= files_of(3) | {"step_00000002.pt.quarantined", "step_00000001.pt.quarantined"}
    )


def test_a_reader_slower_than_the_writer_always_finds_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, 0)
    pid = forked(lambda: saved(tmp_path, *range(1, 10_000), keep=1))
    try:
        step = 0
        deadline = time.monotonic() + 20
        while step < 100 and time.monotonic() < deadline:
            found = checkpoints.latest(tmp_path)
            assert found is not None
            assert found.step >= step
            step = found.step
        assert step >= 100
        assert caplog.records == []
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 50, 1000, 100_000, 1 << 20])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, limit: int) -> None:
    saved(tmp_path, 1)
    with (
        file_size_limit(limit),
        pytest.raises(CheckpointError, match="step_00000002.pt could not.*free space") as error,
    ):
        checkpoints.save(tmp_path, 2, payload_of(2, 1_000_000), keep=1)
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.EFBIG
    assert names(tmp_path) == files_of(1)
    assert_intact(tmp_path, 1)


def test_a_disk_too_full_for_the_marker_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: refuse() if str(new).endswith(".done") else rename(old, new))
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.save(tmp_path, 2, payload_of(2), keep=1)
    assert names(tmp_path) == files_of(1) | {"step_00000002.pt"}
    assert_intact(tmp_path, 1)


def test_a_file_in_the_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="could not be written.*permissions of the directory"):
        checkpoints.save(tmp_path / "checkpoints", 1, {})


def test_an_old_checkpoint_that_cannot_be_removed_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 1)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "unlink", refuse)
    saved(tmp_path, 2, keep=1)
    assert names(tmp_path) == files_of(1, 2)
    assert "That of step 2 is saved." in caplog.text


class Interrupt(BaseException):
    """Stands for the exception that a signal handler raises in the middle of anything."""


@pytest.mark.parametrize("while_handling", [False, True])
@pytest.mark.parametrize("after", [0, 1, 5, 12])
def test_an_interrupted_save_raises_the_interrupt_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, while_handling: bool
) -> None:
    saved(tmp_path, 1)
    writes = itertools.count()
    real = checkpoints._Content.write

    def write(content: Any, data: Any) -> int:
        if next(writes) == after:
            raise Interrupt
        return real(content, data)

    monkeypatch.setattr(checkpoints._Content, "write", write)
    with pytest.raises(Interrupt):
        if while_handling:
            try:
                raise KeyError("the fault that this save is made in the face of")
            except KeyError:
                checkpoints.save(tmp_path, 2, payload_of(2), keep=1)
        else:
            checkpoints.save(tmp_path, 2, payload_of(2), keep=1)
    assert names(tmp_path) == files_of(1)


# --- cleaning


def test_clean_says_what_it_did(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4)
    (tmp_path / "step_00000002.pt").unlink()
    (tmp_path / "step_00000003.done").unlink()
    for name in (
        "step_00000005.pt.tmp",
        "step_00000006.done.tmp",
        "other.tmp",
        "step_7.pt",
        "step_000000008.pt",
    ):
        (tmp_path / name).write_text("x")
    assert checkpoints.clean(tmp_path) == [
        "Removed step_00000005.pt.tmp: the save that wrote it did not finish.",
        "Removed step_00000006.done.tmp: the save that wrote it did not finish.",
        "Removed step_00000002.done: the checkpoint that it vouches for is missing.",
        "Renamed step_00000003.pt to step_00000003.pt.quarantined: it has no marker, so its save did not finish.",
    ]
    others = {"other.tmp", "step_7.pt", "step_000000008.pt", "step_00000003.pt.quarantined"}
    assert names(tmp_path) == files_of(1, 4) | others
    assert checkpoints.clean(tmp_path) == []
    assert [found.step for found in checkpoints.list_valid(tmp_path)] == [4, 1]


def test_what_clean_did_is_durable(tmp_path: Path) -> None:
    (tmp_path / "step_00000005.pt").write_text("x")
    with recorded_calls(tmp_path) as calls:
        checkpoints.clean(tmp_path)
    assert calls == [("rename", "step_00000005.pt", "step_00000005.pt.quarantined"), ("fsync", ".")]


# --- others at work


@contextmanager
def half_way(directory: Path, stop_at: str, *steps: int) -> Iterator[int]:
    """A process that is saving the last of these steps, up to this call."""
    reader, writer = os.pipe()

    def work() -> None:
        def wait_here() -> None:
            os.write(writer, b"x")
            signal.pause()

        saved(directory, *steps[:-1])
        real = {"write": checkpoints._Content.write, "replace": os.replace, "unlink": os.unlink}

        def watching(name: str, suffix: str) -> Callable[..., Any]:
            def call(subject: Any, *arguments: Any, **options: Any) -> Any:
                path = subject.path if name == "write" else subject
                if str(path).endswith(suffix):
                    wait_here()
                return real[name](subject, *arguments, **options)

            return call

        name, _, suffix = stop_at.partition(" ")
        if name == "write":
            checkpoints._Content.write = watching(name, suffix)  # type: ignore[method-assign]
        else:
            setattr(os, name, watching(name, suffix))
        saved(directory, steps[-1], keep=1)

    pid = forked(work)
    os.close(writer)
    try:
        assert select.select([reader], [], [], 60)[0]
        assert os.read(reader, 1) == b"x"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)


HALF_WAY = {
    "write .pt.tmp": {"step_00000002.pt.tmp"},
    "replace .pt.tmp": {"step_00000002.pt.tmp"},
    "write .done.tmp": {"step_00000002.pt", "step_00000002.done.tmp"},
    "replace .done.tmp": {"step_00000002.pt", "step_00000002.done.tmp"},
}


@pytest.mark.parametrize("moment", HALF_WAY)
def test_what_a_living_writer_writes_is_left_alone_and_what_a_dead_one_wrote_is_not(
    tmp_path: Path, moment: str
) -> None:
    with half_way(tmp_path, moment, 1, 2):
        assert names(tmp_path) == files_of(1) | HALF_WAY[moment]
        assert checkpoints.prepare(tmp_path) == []
        assert names(tmp_path) == files_of(1) | HALF_WAY[moment]
    report = checkpoints.prepare(tmp_path)
    assert {sentence.split()[1].rstrip(":") for sentence in report} == HALF_WAY[moment]
    assert names(tmp_path) <= files_of(1) | {"step_00000002.pt.quarantined"}
    assert latest_step(tmp_path) == 1


def test_a_checkpoint_that_is_just_being_removed_is_not_set_aside(tmp_path: Path) -> None:
    with half_way(tmp_path, "unlink .pt", 1, 2):
        assert names(tmp_path) == files_of(2) | {"step_00000001.pt"}
        assert checkpoints.clean(tmp_path) == []
        assert names(tmp_path) == files_of(2) | {"step_00000001.pt"}


def test_a_second_writer_of_a_step_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "WRITER_PATIENCE", 0.0)
    with (
        half_way(tmp_path, "replace .pt.tmp", 1, 2),
        pytest.raises(CheckpointError, match="is being written by another process"),
    ):
        saved(tmp_path, 2)
    saved(tmp_path, 2)
    assert latest_step(tmp_path) == 2


def test_without_locks_nothing_is_removed_and_saving_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "step_00000001.pt.tmp").write_text("x")
    saved(tmp_path, 2)
    assert checkpoints.clean(tmp_path) == []
    assert names(tmp_path) == files_of(2) | {"step_00000001.pt.tmp"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write every file")
def test_what_was_made_read_only_is_left_by_cleaning_and_removed_when_it_is_too_old(tmp_path: Path) -> None:
    for path in saved(tmp_path, 1):
        path.chmod(0o400)
    saved(tmp_path, 2, keep=1)
    assert names(tmp_path) == files_of(2)
    (tmp_path / "step_00000003.pt").touch(0o400)
    assert checkpoints.clean(tmp_path) == []


def test_few_of_the_quarantined_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"step_{step:08d}.pt").write_text("x")
    assert "Removed step_00000001.pt.quarantined: 2 newer ones are there." in checkpoints.clean(tmp_path)
    assert names(tmp_path) == {"step_00000002.pt.quarantined", "step_00000003.pt.quarantined"}


# --- before somebody resumes


def test_a_corrupt_newest_checkpoint_is_set_aside_and_the_next_older_one_is_named(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30)
    flip(2000)(tmp_path / "step_00000030.pt")
    halve(tmp_path / "step_00000020.pt")
    report = checkpoints.prepare(tmp_path)
    assert [sentence.split(":")[0] for sentence in report] == [
        "Renamed step_00000030.pt to step_00000030.pt.quarantined",
        "Renamed step_00000020.pt to step_00000020.pt.quarantined",
        "The newest valid checkpoint is step_00000010.pt.",
    ]
    assert "SHA-256 differs" in report[0]
    assert "bytes and was saved with" in report[1]
    assert names(tmp_path) == files_of(10) | {"step_00000020.pt.quarantined", "step_00000030.pt.quarantined"}
    assert checkpoints.prepare(tmp_path) == []


def test_only_corrupt_ones_leave_none(tmp_path: Path) -> None:
    flip(2000)(*saved(tmp_path, 1))
    assert checkpoints.prepare(tmp_path)[-1] == f"{tmp_path} holds no valid checkpoint."
    assert checkpoints.prepare(tmp_path / "missing") == []


@pytest.mark.parametrize("damage", ["marker garbage", "format newer", "marker a directory"])
def test_what_can_t_be_judged_is_named_and_left(tmp_path: Path, damage: str) -> None:
    suffix, inflict, reason = DAMAGES[damage]
    _, bad = saved(tmp_path, 10, 20)
    inflict(bad.with_suffix(suffix))
    before = names(tmp_path)
    said, found = checkpoints.prepare(tmp_path)
    assert reason in said
    assert found == "The newest valid checkpoint is step_00000010.pt."
    assert names(tmp_path) == before


def test_a_limit_ends_the_reading_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(2000)(*saved(tmp_path, 1))
    monkeypatch.setattr(checkpoints, "_digests", {})
    (said,) = checkpoints.prepare(tmp_path, seconds=-1.0)
    assert said.startswith(f"Left {tmp_path} unread after -1 s")
    assert names(tmp_path) == files_of(1)


@pytest.fixture
def shared_digests(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("shared") / "digests"
    monkeypatch.setenv("SEAMARK_CHECKPOINT_DIGESTS", str(path))
    return path


def test_one_process_of_a_host_reads_for_all(tmp_path: Path, shared_digests: Path, hashed: list[str]) -> None:
    pid = forked(lambda: saved(tmp_path, 1, 2))
    assert os.waitpid(pid, 0)[1] == 0
    assert checkpoints.prepare(tmp_path) == []
    assert latest_step(tmp_path) == 2
    assert hashed == [], "its writer has hashed it"
    flip(2000)(tmp_path / "step_00000002.pt")
    pid = forked(lambda: checkpoints.prepare(tmp_path))
    assert os.waitpid(pid, 0)[1] == 0
    assert latest_step(tmp_path) == 1
    assert hashed == []


def test_the_shared_file_stays_small_and_what_it_should_not_hold_is_passed_over(
    tmp_path: Path, shared_digests: Path, hashed: list[str]
) -> None:
    shared_digests.write_bytes(b"\xff[\n{}\n[]\n[1, 2]\n5\n" * 10_000)
    saved(tmp_path, 1)
    checkpoints._digests.clear()
    assert checkpoints.prepare(tmp_path) == []
    assert shared_digests.stat().st_size < checkpoints.DIGESTS_FILE_BYTES
    checkpoints._digests.clear()
    assert latest_step(tmp_path) == 1
    assert hashed == []


def test_a_process_that_waits_for_another_one_s_reading_gives_up_in_time(tmp_path: Path, shared_digests: Path) -> None:
    saved(tmp_path, 1)
    with shared_digests.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (said,) = checkpoints.prepare(tmp_path, seconds=0.05)
    assert "unread after 0.05 s" in said


def test_several_hosts_may_do_it_at_once(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    for _ in range(20):
        saved(directory, 1, 2, 3)
        flip(2000)(directory / "step_00000003.pt")
        (directory / "step_00000002.pt").unlink()
        for step in range(4, 12):
            (directory / f"step_{step:08d}.pt").write_text("x")
            (directory / f"step_{step:08d}.pt.tmp").write_text("x")
        pids = [
            # A digest file of its own, as on a host of its own.
            forked(
                lambda number=number: (
                    os.environ.update(SEAMARK_CHECKPOINT_DIGESTS=str(tmp_path / f"digests-{number}")),
                    checkpoints._digests.clear(),
                    checkpoints.prepare(directory),
                )
            )
            for number in range(4)
        ]
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
        assert checkpoints.prepare(directory) == []
        quarantined = {name for name in names(directory) if name.endswith(".quarantined")}
        assert names(directory) == files_of(1) | quarantined
        assert len(quarantined) == checkpoints.QUARANTINED_KEPT
        shutil.rmtree(directory)
