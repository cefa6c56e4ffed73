"""A power cut at any moment costs the manifest nothing that was acknowledged, and leaves no half of a batch.

The order of writes and syncs is recorded from real commits, checkpoints, copies and starts (``recorder.py``); images of
what a disk may hold after a cut are built from it (``power_cut.py``), and each is opened as the coordinator does it.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from power_cut import Create, Event, Note, Rename, Sync, SyncDirectory, Write, image
from recorder import Recorder, library, recording

from seamark.protocol.messages import Dataset, Incident, JobSpec, ShardAnswer, ShardDecision, StoreAddress
from seamarkd.coordinator import backups
from seamarkd.coordinator.effects import Persist
from seamarkd.coordinator.job import JobRecord
from seamarkd.coordinator.ledger import Row, State
from seamarkd.coordinator.manifest import Manifest
from seamarkd.coordinator.shards import Record, Reply
from seamarkd.errors import StateError

pytestmark = pytest.mark.skipif(library() is None, reason="the functions of this Python's SQLite can't be reached")

IMAGES = int(os.environ.get("SEAMARK_CRASH_IMAGES", "300"))
"""Of each of the two recordings; ``SEAMARK_CRASH_IMAGES=5000 scripts/test.sh --timeout 3600 -k crash_images``."""
SEED = int(os.environ.get("SEAMARK_SEED", "0"))
PLANTED_IMAGES = 150
"""So many at most until a planted defect has to be found."""
NAME = "m.db"
DATASET = 7
SHARDS = 400
BATCHES = 170
COPY_EVERY = 40
SMALL_LOG = 60
"""Commits after which the second recording begins, as after a cut: with a log that has not been copied back."""
SPEC = JobSpec(
    name="job",
    argv=["t.py"],
    module=False,
    python="python",
    cwd="/",
    env={},
    min_nodes=1,
    max_nodes=1,
    nproc_per_node=2,
    policy="replace",
    max_restarts=2,
    checkpoint_dir="",
    log_dir="/tmp",
)


class Recording(NamedTuple):
    """What was done in a directory, and what was to be read in the manifest after each batch."""

    events: list[Event]
    states: list[object]


def batch(number: int) -> tuple[list[Persist], list[Record]]:
    """A change of every table: what was leased in the batch before is done, other shards are leased."""
    record = JobRecord(SPEC, "RUNNING", 0, number, 0, 0, "", [], StoreAddress("h", 1, "i"), "h", 2, [])
    incident = Incident(number, "ranks", 0, [], [], 1, 1.0, [], {}, {}, [])
    rows = {}
    for at, state in ((number - 1, State.DONE), (number, State.LEASED)):
        for shard in range(2 * at, 2 * at + 2):
            # Some larger than a page.
            account = b'{"progress":%d%s}' % (at, b" " * (5_000 if shard % 31 == 0 else 200))
            rows[DATASET, shard] = Row(shard, state, at + 1, f"i{at}#d/0", "job/0", "n", f"digest {at}", account)
    consumer = f"i{number % 5}#d/0"
    reply = Reply(consumer, number, ShardAnswer(number, "job", consumer, "recorded", reason="r" * 300))
    decision = ShardDecision(number, "d", number, number, "job/0", "n", -1, 1.0, "oom", "e", 1.0, "Retry", "because")
    dataset = {DATASET: Dataset("d", SHARDS, 1)}
    return [Persist(record, (incident,))], [Record("job", dataset, rows, {consumer: reply}, {number: decision})]


def content(manifest: Manifest) -> object:
    """All that can be read in it."""
    pages = [manifest.page(number, 0, SHARDS) for number, _ in manifest.datasets("job")]
    return manifest.jobs(), manifest.incidents("job"), manifest.shards("job"), pages


def work(recorder: Recorder, path: Path, numbers: range, states: list[object], pragma: str = "") -> None:
    """Opens the manifest and commits batches, each acknowledged when its commit returns; a copy now and then."""
    with Manifest(path) as manifest:
        if pragma:
            manifest._connection.execute(pragma)
        recorder.note("epoch", manifest.epoch)
        states[numbers.start - 1 :] = [content(manifest)]
        for number in numbers:
            manifest.commit(*batch(number))
            recorder.note("batch", number)
            states.append(content(manifest))
            if number % COPY_EVERY == 0:
                manifest.back_up()
                recorder.note("copy", number)


def record(directory: Path, pragma: str = "") -> list[Recording]:
    """From an empty directory to a clean end; and from what a cut in the midst of it left, over another start."""
    first, second = directory / "first", directory / "second"
    first.mkdir()
    states: list[object] = []
    with recording(first) as recorder:
        work(recorder, first / NAME, range(1, 1), states, pragma)
        work(recorder, first / NAME, range(1, BATCHES), states, pragma)
    begun = recorder.events[: recorder.events.index(Note("batch", SMALL_LOG))]
    files = {event.file for event in begun if isinstance(event, Write)}
    write(second, image([*begun, *map(Sync, files), SyncDirectory()], random.Random(0)))
    later = states[: SMALL_LOG + 1]
    with recording(second) as again:
        again.note("batch", SMALL_LOG)
        again.note("copy", SMALL_LOG // COPY_EVERY * COPY_EVERY)
        work(again, second / NAME, range(SMALL_LOG + 1, SMALL_LOG + 20), later, pragma)
        work(again, second / NAME, range(SMALL_LOG + 20, SMALL_LOG + 30), later, pragma)
    return [Recording(recorder.events, states), Recording(again.events, later)]


def write(directory: Path, files: dict[str, bytes]) -> None:
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)


@contextmanager
def memory() -> Iterator[Path]:
    """A directory in memory, where there is such a place: the images' own syncs are of no interest."""
    place = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="seamark-", dir=place if os.access(place, os.W_OK) else None))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def acknowledged(events: list[Event], what: str) -> int:
    """The last number of this kind that was told to be durable."""
    return next((one.number for one in reversed(events) if isinstance(one, Note) and one.what == what), 0)


def cuts(events: list[Event], chance: random.Random) -> Iterator[int]:
    """Moments, without end: half of them around what happens seldom, which is everything but commits."""
    began = beginning(events)
    log = [event.file for event in events if isinstance(event, Write)]
    usual = max(set(log), key=log.count)
    seldom = [at for at in range(began, len(events)) if getattr(events[at], "file", 0) != usual]
    while True:
        if chance.random() < 0.5:
            yield chance.randrange(began, len(events) + 1)
        else:
            yield min(len(events), chance.choice(seldom) + chance.randrange(4))


def beginning(events: list[Event]) -> int:
    """Where the recording begins: before it stands what was on disk already, and what was acknowledged of it."""
    at = events.index(SyncDirectory()) + 1
    while isinstance(events[at], Note):
        at += 1
    return at


def check(recorded: Recording, images: int) -> None:
    """Opens this many images of each kind; the error names the moment."""
    chance = random.Random(SEED)
    with memory() as place:
        for number, cut in zip(range(images), cuts(recorded.events, chance), strict=False):
            before = recorded.events[:cut]
            files = image(before, chance)
            try:
                check_image(place / f"{number}", files, before, recorded.states)
                if acknowledged(before, "copy"):
                    check_copy(place / f"{number}-copy", files, before, recorded.states)
            except AssertionError as error:
                raise AssertionError(f"image {number}, cut after {cut} of {len(recorded.events)}: {error}") from error


def check_image(directory: Path, files: dict[str, bytes], before: list[Event], states: list[object]) -> None:
    """It is opened without falling back, and holds the acknowledged batches, or the one that was under way as well."""
    write(directory, files)
    batches, epoch = acknowledged(before, "batch"), acknowledged(before, "epoch")
    found, opened = read(directory)
    assert not list(directory.glob("*.damaged-*")), "a copy had to take the place of the database"
    assert opened > epoch, f"epoch {opened} after {epoch} was acknowledged"
    at = states.index(found) if found in states else None
    assert at in (batches, batches + 1), f"it holds {at} batches whole, and {batches} were acknowledged"
    shutil.rmtree(directory)


def check_copy(directory: Path, files: dict[str, bytes], before: list[Event], states: list[object]) -> None:
    """With a damaged database the last copy that was acknowledged takes its place, or the one that was being made."""
    write(directory, files | {NAME: b"damaged" * 1_000, f"{NAME}-wal": b""})
    batches, epoch, copied = (acknowledged(before, what) for what in ("batch", "epoch", "copy"))
    found, opened = read(directory)
    assert opened > epoch, f"the copy begins with epoch {opened} after {epoch} was acknowledged"
    at = states.index(found) if found in states else None
    assert at in (copied, batches), f"the copy holds {at} batches whole, and one of {copied} was acknowledged"
    shutil.rmtree(directory)


def read(directory: Path) -> tuple[object, int]:
    try:
        with Manifest(directory / NAME) as manifest:
            return content(manifest), manifest.epoch
    except StateError as error:
        raise AssertionError(f"it can't be opened: {error}") from error


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "seamarkd.coordinator.manifest")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[Recording]:
    return record(tmp_path_factory.mktemp("recorded"))


@pytest.mark.parametrize("which", [0, 1], ids=["from nothing", "after a cut"])
def test_crash_images_hold_what_was_acknowledged(recordings: list[Recording], which: int) -> None:
    check(recordings[which], IMAGES)


def test_what_is_recorded_is_the_whole_of_it(recordings: list[Recording]) -> None:
    """Commits, checkpoints into the database, copies, starts: the images would prove little without one of them."""
    events = recordings[0].events
    names = {event.file: event.name for event in events if isinstance(event, Create)}
    synced = [names[event.file] for event in events if isinstance(event, Sync)]
    assert synced.count(f"{NAME}-wal") >= BATCHES
    assert synced.count(NAME) >= 3, "no checkpoint while it served"
    assert [event.new for event in events if isinstance(event, Rename)].count(backups.copies(Path(NAME))[0].name) == 4
    assert synced.count("m.epoch.tmp") == 2


# --- planted defects ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["OFF", "NORMAL"])
def test_a_manifest_that_syncs_less_is_found(tmp_path: Path, level: str) -> None:
    recorded, _ = record(tmp_path, f"PRAGMA synchronous = {level}")
    with pytest.raises(AssertionError, match="were acknowledged|had to take the place"):
        check(recorded, PLANTED_IMAGES)


def of(name: str) -> Callable[[Event, dict[int, str]], bool]:
    """Whether an event is a sync of a file that had this name when it was made."""
    return lambda event, names: isinstance(event, Sync) and names[event.file] == name


@pytest.mark.parametrize(
    ("missing", "which", "says"),
    [
        pytest.param(of(f"{NAME}-wal"), 0, "were acknowledged", id="the log's"),
        pytest.param(of(NAME), 0, "had to take the place", id="the database's, before its log is begun anew"),
        pytest.param(of("m.epoch.tmp"), 1, "m.epoch holds ''", id="the epoch's"),
        pytest.param(of(f"{NAME}.backup-new"), 0, "the copy holds", id="a copy's"),
        pytest.param(lambda event, names: isinstance(event, SyncDirectory), 1, "acknowledged", id="the directory's"),
    ],
)
def test_a_missing_sync_is_found(
    recordings: list[Recording], missing: Callable[[Event, dict[int, str]], bool], which: int, says: str
) -> None:
    """Of the database's, the epoch's, a copy's or the directory's files; the images show what it costs."""
    events, states = recordings[which]
    names = {event.file: event.name for event in events if isinstance(event, Create)}
    began = beginning(events)
    kept = [event for at, event in enumerate(events) if at < began or not missing(event, names)]
    assert len(kept) < len(events)
    with pytest.raises(AssertionError, match=says):
        check(Recording(kept, states), PLANTED_IMAGES)
