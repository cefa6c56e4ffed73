"""Starting the TCPStore service of a job on its node."""

from __future__ import annotations

import time

from seamark.environment import STORE_OFFSET
from seamark.protocol.messages import StoreAddress
from seamarkd.agent.effects import StartStore
from seamarkd.agent.endings import STORE_SLOT, Endings
from seamarkd.agent.ground import Ground
from seamarkd.agent.keeper_answers import Held, KeeperError, Process, was_killed
from seamarkd.agent.keeper_client import KeeperClient
from seamarkd.agent.keepers import Keepers
from seamarkd.agent.kept import other_logs
from seamarkd.agent.ports import PortsTaken, candidates


class StoreStarts:
    """Those of one node.

    Args:
        ground: what it stands on.
        keepers: whom to ask.
        endings: what hears of exits.
        host: the address under which other nodes reach this one.
    """

    def __init__(self, ground: Ground, keepers: Keepers, endings: Endings, host: str) -> None:
        self._core, _, self._tasks, self._perform = ground
        self._keepers = keepers
        self._endings = endings
        self._host = host

    async def start(self, order: StartStore) -> None:
        """Has the keeper start it, on a pair of ports that is free."""
        again = self._core.node.jobs[order.job].master_port != 0
        detected_at = time.monotonic()
        kept = connecting = None
        try:
            kept = self._keepers.of(order.job)
            connecting = kept.keeper
            held = await self._listen(await connecting, order)
        except (KeeperError, PortsTaken, OSError) as error:
            if kept is not None and kept.keeper is not connecting and not kept.ending:
                # Its keeper was killed; the next one knows of no store.
                self._tasks.spawn(self.start(order))
                return
            self._perform(self._core.stores.failed(order.job, str(error), killed=was_killed(error)))
            return
        kept.store = order.incarnation
        kept.keep_store(held)
        if kept.keeper is not connecting:
            self._endings.keep_orphan(order.job, kept, held)
        if again:
            self._perform(self._core.stores.restarted(time.monotonic(), order.job, detected_at))
        else:
            self.listens(order.job, held.process)

    def listens(self, job: str, process: Process) -> None:
        """It does, for the first time."""
        assert process.port is not None
        address = StoreAddress(self._host, process.port, process.incarnation)
        self._perform(self._core.stores.started(job, address, process.port - STORE_OFFSET))

    async def _listen(self, keeper: KeeperClient, order: StartStore) -> Held:
        """Starts the store on the first free pair of ports."""
        spec = self._core.node.spec(order.job)
        _, store_log = other_logs(spec)
        again = self._core.node.jobs[order.job].master_port
        for port in [again] if again else candidates(self._host, order.fixed):
            try:
                held = await keeper.start_store(
                    STORE_SLOT,
                    order.incarnation,
                    host=self._host,
                    port=port + STORE_OFFSET,
                    env=spec.env,
                    log=str(store_log),
                )
            except KeeperError as error:
                if error.code != "port_in_use":
                    raise
                continue
            return held
        raise PortsTaken(order.fixed, self._host)
