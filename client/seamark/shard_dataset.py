"""Shards of a data set through a DataLoader: read ahead in its workers, counted where they are trained on.

    dataset = seamark.ShardDataset("corpus", size=1_000_000, shard_size=1_000, batch_size=32, load=read)
    for batch in DataLoader(dataset, batch_size=None, num_workers=4):
        if batch:
            train_on(batch.data)
            batch.done()

Each worker of the DataLoader leases shards for itself, and as many ahead as the DataLoader prefetches. What it has
read counts for nothing until the trainer, in the main process, says ``done()``: then the batch is checkpointed, and
with the last one the shard is complete. A lease belongs to the rank's process, so its workers may take it and the
trainer end it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch.utils.data import IterableDataset, get_worker_info

from seamark import sharding
from seamark.protocol.messages import CheckpointShard, CompleteShard, Dataset, ShardLease
from seamark.sharding import Shard, ShardError, Shards

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger("seamark")

PATIENCE = 0.1
"""Seconds for which a worker waits for a shard before it gives an empty batch: a DataLoader takes its workers in turn,
and one that waited on would keep back the batches of another, with which alone what it waits for can end."""

_trainers: dict[str, Shards] = {}
"""By data set: on whose line the main process says what is done."""


@dataclass(eq=False)
class ShardBatch:
    """A whole batch of one shard; or an empty one, which is false, where none is ready.

    Attributes:
        dataset: what it is of.
        data: what ``load`` made of the samples, or their numbers where there is no ``load``; None in an empty batch.
        indices: the numbers of the samples.
        index: its number in its shard. Where the batch size was halved, several parts have the same.
        lease: under which it was read.
        ends_batch: it is the last part with this ``index``.
        ends_shard: it is the last of the shard.
    """

    dataset: Dataset
    data: Any = None
    indices: NDArray[np.int64] | None = None
    index: int = -1
    lease: ShardLease | None = None
    ends_batch: bool = False
    ends_shard: bool = False
    settled: bool = False
    """``done`` or ``fail`` was said."""

    def __bool__(self) -> bool:
        return self.lease is not None

    def __len__(self) -> int:
        return 0 if self.indices is None else len(self.indices)

    def done(self, result_digest: str = "") -> bool:
        """The trainer has taken its step: this batch counts, and those of its shard that came before it.

        Durable when this returns. To be called in the process that made the ``ShardDataset``.

        Args:
            result_digest: with the last batch of a shard: of its result, 200 characters at most.

        Returns:
            False if the lease has ended: the batch will be trained on again.

        Raises:
            ShardError: no ``ShardDataset`` of this name is open here.
        """
        if self.lease is None:
            return True
        trainer, shard = self._here(self.lease)
        trainer.current, self.settled = None, True
        if self.ends_shard:
            return trainer.report(shard, CompleteShard, digest=result_digest)
        return not self.ends_batch or trainer.report(shard, CheckpointShard, progress=self.index + 1)

    def fail(self, error: BaseException | str, kind: str = "") -> bool:
        """The batch could not be trained on; as ``Shard.fail``. What else was read of the shard counts no longer.

        Returns:
            False if the lease has ended.
        """
        if self.lease is None:
            return True
        trainer, shard = self._here(self.lease)
        trainer.current, self.settled = None, True
        return shard.fail(error, self.index, kind)

    def __enter__(self) -> Self:
        """An exception that leaves this block is taken for this batch's; the end of the block is its ``done``."""
        if self.lease is not None:
            trainer, shard = self._here(self.lease)
            shard.current = self.index
            trainer.current = shard
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and not self.settled:
            self.done()

    def _here(self, lease: ShardLease) -> tuple[Shards, Shard]:
        trainer = _trainers.get(self.dataset.name)
        if trainer is None:
            raise ShardError(
                f"no ShardDataset {self.dataset.name} is open in this process: say done() where it was made, and "
                "before it is closed"
            )
        return trainer, Shard(trainer, self.dataset, lease)


class ShardDataset(IterableDataset[ShardBatch]):  # type: ignore[misc]
    """The shards of a data set, batch by batch, for ``DataLoader(dataset, batch_size=None, num_workers=N)``.

    Make it on every rank, in the main process; made again, as after a restart in process, it gives back what was read
    and not trained on. One pass goes through all epochs, and ends when every shard is terminal; until then a worker
    that has none gets empty batches, which are false. At most 64 shards of one worker are read and not done.

    An exception of ``load`` is the shard's failure, of this batch: the coordinator decides (docs/retries.md), and the
    worker goes on with another shard. Where the host goes away the DataLoader raises ``HostLeaves``, a ``SystemExit``
    with 143.

    Args:
        name, size, shard_size, shuffle_seed, epochs: as for ``seamark.shards``.
        batch_size: samples of a batch; the same in every run of the job.
        load: makes the data of a batch from the numbers of its samples, in a worker of the DataLoader.

    Raises:
        ShardError: the coordinator refuses, or there is none.
        MissingEnvironmentError: the script was not started by ``seamark run``.
        ValueError: a number that can't be.
    """

    def __init__(
        self,
        name: str,
        *,
        size: int,
        shard_size: int,
        batch_size: int,
        load: Callable[[NDArray[np.int64]], Any] | None = None,
        shuffle_seed: int | None = None,
        epochs: int = 1,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of 1 or more, not {batch_size!r}")
        self.spec = sharding.described(name, size=size, shard_size=shard_size, shuffle_seed=shuffle_seed, epochs=epochs)
        self.batch_size = batch_size
        self.load = load
        again = sharding.abandon(name) or name in _trainers
        sharding.watch_exceptions()
        _trainers[name] = Shards(self.spec, "trainer", "process" if again else "")

    def __iter__(self) -> Iterator[ShardBatch]:
        worker = get_worker_info()
        reader = Shards(self.spec, f"worker-{worker.id if worker else 0}", "consumer")
        try:
            while not reader.finished:
                shard = reader.ahead(PATIENCE)
                if shard is not None:
                    yield from self._read(reader, shard)
                elif not reader.finished:
                    yield ShardBatch(self.spec)
        finally:
            reader.abandon()

    def _read(self, reader: Shards, shard: Shard) -> Iterator[ShardBatch]:
        batches = list(shard.batches(self.batch_size))
        if not batches:
            # Its last batches are quarantined: nothing of it is left to be trained on.
            reader.report(shard, CompleteShard)
        for batch in batches:
            indices = batch.indices
            try:
                data = indices if self.load is None else self.load(indices)
            except Exception as error:
                log.warning("%r, batch %d: %s: %s", shard, batch.index, type(error).__name__, error)
                shard.fail(error, batch.index)
                return
            yield ShardBatch(self.spec, data, indices, batch.index, shard.lease, batch.last, batch is batches[-1])

    def close(self) -> None:
        """Gives back what was read and not trained on, and ends the connection; may be called twice."""
        trainer = _trainers.pop(self.spec.name, None)
        if trainer is not None:
            trainer.give_all_back()
            trainer.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
