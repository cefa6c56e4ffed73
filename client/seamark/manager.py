"""Replica groups that train on when one of them dies: quorum, allreduce across them, commit, healing.

The surface is that of torchft's Manager, so that a training loop ports by changing an import::

    manager = seamark.Manager(state_dict=state, load_state_dict=load, min_replica_size=2, use_async_quorum=False)
    while manager.current_step() < steps:
        manager.start_quorum()
        loss(batch()).backward()
        for parameter in model.parameters():
            manager.allreduce(parameter.grad).wait()
        if manager.should_commit():
            optimizer.step()

A replica group that missed a step which another committed heals from it before it takes part: two replica groups at the
same step have equal parameters. That all commit a step at the same moment is not promised (DECISIONS D14).
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, get_args

import torch
import torch.distributed as dist
import zmq
from msgspec import Struct

from seamark.environment import ADDRESS, INCARNATION, LIGHTHOUSE_ADDRESS, STORE_OFFSET
from seamark.inprocess.resolver import no_name_server
from seamark.protocol.keys import client_key
from seamark.protocol.messages import (
    CommitDecision,
    CommitVote,
    FailureEvent,
    RankJoin,
    RankQuorum,
    Replica,
    StateAddress,
    StateAddressRequest,
)
from seamark.protocol.sockets import encrypted
from seamark.replicas.control import LOCAL, Control
from seamark.replicas.core import Settings
from seamark.replicas.groups import ReconfigurableGroup
from seamark.replicas.healing import HealingError, StateServer, fetch_state
from seamark.replicas.plan import Mode, Plan, compute_plan, participation
from seamark.replicas.rank import ManagerError, QuorumTimeout, RankSession
from seamark.replicas.worker import introduce

log = logging.getLogger(__name__)

HEARTBEAT_RANGE = (0.01, 1.0)
"""Seconds. A lighthouse gives a member up after 5 s by default: a slower beat would leave it no second chance."""
JOIN_TIMEOUT = 60.0
"""Seconds; torchft's default."""
LONGEST = 86_400.0
"""Seconds; a longer timeout is a mistake."""
LONGEST_NAME = 200
"""Characters of a name, as the protocol has it."""
WITHDRAW_TIMEOUT = 10.0
"""Seconds a commit waits for a replica group that still fetches the state of the step before."""


class Quorum(Struct, frozen=True):
    """An answered quorum: its id and its replica groups, sorted by replica_id."""

    quorum_id: int
    participants: list[Replica]


class CommitFailures(RuntimeError):
    """More steps in a row could not be committed than ``max_retries`` allows."""


class ManagedWork:
    """The work of one ``Manager.allreduce``: errors are the manager's to report, so that it never raises."""

    def __init__(self, future: torch.futures.Future[Any]) -> None:
        self._future = future

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Waits for it. True; whether the step may be committed is ``should_commit``'s to say."""
        self._future.wait()
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """The future of the reduced tensor, for a DDP communication hook."""
        return self._future


class Manager:
    """One rank of one replica group. Durations are seconds or ``datetime.timedelta``.

    Args:
        pg: the process group across replica groups; Gloo by default.
        load_state_dict: called with what another replica group's ``state_dict`` returned, to heal.
        state_dict: returns tensors and plain data; called while no optimizer step runs.
        min_replica_size: fewer replica groups form no quorum.
        replica_id: this replica group's name, the same on all its ranks and after a restart; a random one if None.
        rank, world_size: within the replica group; RANK and WORLD_SIZE if None.
        world_size_mode: ``"FIXED_WITH_SPARES"``: groups beyond ``min_replica_size`` contribute zeros.
        use_async_quorum: the quorum is asked for beside the forward pass; a group that heals misses that step.
        store_addr, store_port: the TCPStore of this replica group; MASTER_ADDR and MASTER_PORT if None; a replica group
            of one rank starts its own if there is none.
        lighthouse_addr: ``tcp://HOST:PORT``; SEAMARK_LIGHTHOUSE_ADDRESS if None.
        lighthouse_heartbeat_interval_seconds: between two heartbeats.
        lighthouse_join_timeout_seconds: how long a quorum waits for a replica group that beats and does not join.
        timeout: of collectives. quorum_timeout: of ``start_quorum``. connect_timeout: to reach stores and managers.
        init_sync: at step 0 all others take the state of one.
        max_retries: steps in a row that may fail to commit; None: any number.
        job: the name under which the lighthouse knows this training, the same for all its replica groups.
        hostname: the address under which other hosts reach this one; that of the route to the lighthouse if None.

    Raises:
        ValueError: arguments that contradict each other, or are missing, or the suite's keys (SEAMARK_SECURITY_KEYS)
            can't be used; the sentence says which.
    """

    def __init__(
        self,
        pg: ReconfigurableGroup | None = None,
        load_state_dict: Callable[[Any], None] | None = None,
        state_dict: Callable[[], Any] | None = None,
        min_replica_size: int = 1,
        *,
        replica_id: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        world_size_mode: Mode = "DYNAMIC",
        use_async_quorum: bool = True,
        store_addr: str | None = None,
        store_port: int | None = None,
        lighthouse_addr: str | None = None,
        lighthouse_heartbeat_interval_seconds: float = 0.1,
        lighthouse_join_timeout_seconds: float | None = None,
        timeout: float | timedelta = 60.0,
        quorum_timeout: float | timedelta = 60.0,
        connect_timeout: float | timedelta = 60.0,
        init_sync: bool = True,
        max_retries: int | None = None,
        job: str = "default",
        hostname: str | None = None,
    ) -> None:
        self._rank = _whole(rank, "RANK", 0)
        self._world_size = _whole(world_size, "WORLD_SIZE", 1)
        if not 0 <= self._rank < self._world_size:
            raise ValueError(f"rank {self._rank} is not in a replica group of world_size {self._world_size}")
        if min_replica_size < 1:
            raise ValueError(f"min_replica_size is {min_replica_size}: at least one replica group has to train")
        if (state_dict is None) != (load_state_dict is None):
            raise ValueError("state_dict and load_state_dict come together: one gives the state that the other takes")
        least, most = HEARTBEAT_RANGE
        if not least <= lighthouse_heartbeat_interval_seconds <= most:
            raise ValueError(
                f"lighthouse_heartbeat_interval_seconds is {lighthouse_heartbeat_interval_seconds:g}: it has to be "
                f"between {least:g} and {most:g}"
            )
        if world_size_mode not in get_args(Mode):
            raise ValueError(f"world_size_mode is {world_size_mode!r}: it has to be one of {', '.join(get_args(Mode))}")
        if max_retries is not None and max_retries < 0:
            raise ValueError(f"max_retries is {max_retries}: it has to be 0 or more, or None")
        for name, text in (("job", job), ("replica_id", replica_id)):
            if text is not None and not 1 <= len(text) <= LONGEST_NAME:
                raise ValueError(f"{name} has {len(text)} characters: it has to have 1 to {LONGEST_NAME}")
        self._timeout = positive("timeout", timeout)
        self._quorum_timeout = positive("quorum_timeout", quorum_timeout)
        self._connect_timeout = positive("connect_timeout", connect_timeout)
        if lighthouse_join_timeout_seconds is None:
            lighthouse_join_timeout_seconds = min(JOIN_TIMEOUT, self._quorum_timeout)
        if not lighthouse_join_timeout_seconds >= 0.0:
            raise ValueError(
                f"lighthouse_join_timeout_seconds is {lighthouse_join_timeout_seconds:g}: it has to be 0 or more"
            )
        if lighthouse_join_timeout_seconds > self._quorum_timeout:
            raise ValueError(
                f"lighthouse_join_timeout_seconds={lighthouse_join_timeout_seconds:g} is longer than "
                f"quorum_timeout={self._quorum_timeout:g}: every wait for a straggler would end in a timeout"
            )
        self._join_timeout = lighthouse_join_timeout_seconds
        self._min_replica_size = min_replica_size
        self._mode: Mode = world_size_mode
        self._use_async_quorum = use_async_quorum
        self._init_sync = init_sync
        self._max_retries = max_retries
        self._state_dict = state_dict
        self._load_state_dict = load_state_dict
        self._pid = os.getpid()
        lighthouse = lighthouse_address(lighthouse_addr)
        key = client_key() if encrypted(lighthouse) else None
        host = hostname or route_to(lighthouse)
        self._store, self._store_address = self._open_store(store_addr, store_port, host)

        self._step = 0
        self._batches_committed = 0
        self._commit_failures = 0
        self._quorum: Quorum | None = None
        self._source: RankSession | None = None
        self._plan: Plan | None = None
        self._participation: tuple[int | None, int] = (None, 0)
        self._least = min_replica_size
        self._healing = False
        self._pending_state: Any = None
        self._error: Exception | None = None
        self._works: list[torch.futures.Future[Any]] = []
        self._future: concurrent.futures.Future[Quorum] | None = None
        self._closed = threading.Lock()
        self._is_closed = False

        self._group = pg if pg is not None else ReconfigurableGroup("gloo", self._timeout)
        self._states = StateServer(host)
        self._context: zmq.Context[Any] = zmq.Context()
        self._control: Control | None = None
        if self._rank == 0:
            self.replica_id = replica_id or secrets.token_hex(8)
            # Under an agent its own: the agent sees this process die, and says so by that name.
            incarnation = os.environ.get(INCARNATION) or secrets.token_hex(8)
            settings = Settings(
                job=job,
                replica_id=self.replica_id,
                incarnation=incarnation,
                world_size=self._world_size,
                address="",
                store_address=self._store_address,
                lighthouse=lighthouse,
                heartbeat_interval=lighthouse_heartbeat_interval_seconds,
            )
            self._control = Control(self._context, settings, host, key)
            self._store.set("seamark/manager", f"{self._control.address} {self.replica_id}")
            address = LOCAL
        else:
            address, self.replica_id = self._store.get("seamark/manager").decode().split(" ", 1)
        self._key = key
        self._session = RankSession(self._context, address, self._on_failure, key)
        self._page = introduce(self._context) if ADDRESS in os.environ else None
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="seamark-quorum")

    def _open_store(self, addr: str | None, port: int | None, host: str) -> tuple[Any, str]:
        addr = addr or os.environ.get("MASTER_ADDR")
        if port is None:
            port = int(os.environ.get("MASTER_PORT") or 0)
            # An agent's store listens beside MASTER_PORT, which stays free for scripts (D8).
            port += STORE_OFFSET if port and ADDRESS in os.environ else 0
        limit = timedelta(seconds=self._connect_timeout)
        if addr and port:
            with no_name_server():
                store = dist.TCPStore(addr, port, is_master=False, timeout=limit, wait_for_workers=False)
            return store, f"{addr}:{port}"
        if self._world_size > 1:
            raise ValueError(
                "a replica group of several ranks needs their TCPStore: give store_addr and store_port, or set "
                "MASTER_ADDR and MASTER_PORT"
            )
        with no_name_server():
            store = dist.TCPStore(host, 0, is_master=True, timeout=limit, wait_for_workers=False)
        return store, f"{host}:{store.port}"

    # --- quorum --------------------------------------------------------------------------------------------

    def start_quorum(
        self,
        *,
        allow_heal: bool = True,
        shrink_only: bool = False,
        timeout: float | timedelta | None = None,
        current_step: int | None = None,
        target_world_size: int = 0,
        target_min_world_size: int | None = None,
    ) -> Quorum | None:
        """Begins a step: asks who takes part.

        Args:
            allow_heal: a group that is behind fetches the state of one that isn't.
            shrink_only: nobody who was not in the last quorum may come in.
            timeout: for this call; ``quorum_timeout`` if None.
            current_step: the caller's own count, where that is what counts.
            target_world_size: wait for so many replica groups, up to the join timeout, and then for nobody else; 0: no
                such number.
            target_min_world_size: instead of ``min_replica_size``, in this call.

        Returns:
            The quorum; None with ``use_async_quorum``, where ``wait_quorum`` gives it.

        Raises:
            QuorumTimeout: no quorum in time (synchronous quorum only; else ``wait_quorum`` raises it).
            ManagerError: the lighthouse refused; the sentence says why.
            ValueError: a negative step or size.
        """
        self._check_process()
        if current_step is not None and current_step < 0:
            raise ValueError(f"current_step is {current_step}: a step is 0 or more")
        least = self._min_replica_size if target_min_world_size is None else target_min_world_size
        if least < 1 or target_world_size < 0 or 0 < target_world_size < least:
            raise ValueError(
                f"target_world_size={target_world_size} and target_min_world_size={least} contradict each other: "
                "1 <= target_min_world_size <= target_world_size (0: no target)"
            )
        if self._future is not None:
            concurrent.futures.wait([self._future])
            self._states.withdraw(WITHDRAW_TIMEOUT)  # of a step that was given up without a vote
        if current_step is not None:
            self._step = current_step
        if self._works:
            # A step that was given up without a vote: its collectives may be under way, and none may end in the next.
            self._group.cut()
        self._least = least
        self._error = None
        self._healing = False
        self._pending_state = None
        self._works = []
        limit = self._quorum_timeout if timeout is None else positive("timeout", timeout)
        failures = self._commit_failures
        if self._plan is not None and self._group.size == 0:
            failures = max(failures, 1)  # the group was cut: the others have to make theirs anew, too

        def ask() -> Quorum:
            return self._run_quorum(allow_heal, shrink_only, limit, failures, target_world_size, least)

        self._future = self._executor.submit(ask)
        if self._use_async_quorum:
            return None
        quorum = self.wait_quorum()
        self._apply_pending_state()
        return quorum

    def wait_quorum(self) -> Quorum:
        """Waits for the quorum that ``start_quorum`` asked for.

        Raises:
            QuorumTimeout, ManagerError: as ``start_quorum`` of a synchronous quorum.
            RuntimeError: none was asked for.
        """
        if self._future is None:
            raise RuntimeError("call start_quorum() first")
        return self._future.result()

    def _run_quorum(
        self, allow_heal: bool, shrink_only: bool, limit: float, failures: int, target: int, least: int
    ) -> Quorum:
        answer = self._session.ask(
            lambda request: RankJoin(
                request=request,
                group_rank=self._rank,
                step=self._step,
                state_address=self._states.address,
                shrink_only=shrink_only,
                commit_failures=failures,
                min_members=least,
                target_members=target,
                join_timeout=self._join_timeout,
                timeout=limit,
            ),
            limit,
        )
        assert isinstance(answer, RankQuorum)
        before = self._quorum
        quorum = self._quorum = Quorum(answer.quorum_id, answer.participants)
        plan = self._plan = compute_plan(
            quorum.quorum_id,
            quorum.participants,
            replica_id=self.replica_id,
            group_rank=self._rank,
            init_sync=self._init_sync,
        )
        asynchronous = self._use_async_quorum or not allow_heal
        self._participation = participation(
            plan, use_async_quorum=asynchronous, mode=self._mode, min_replica_size=least
        )
        try:
            if before is None or before.quorum_id != quorum.quorum_id or self._group.size == 0:
                prefix = f"seamark/replicas/{plan.quorum_id}/{self._rank}"
                incarnations = {replica.incarnation for replica in quorum.participants}
                self._group.configure(
                    plan.store_address,
                    prefix,
                    plan.replica_rank,
                    plan.replica_world_size,
                    self._connect_timeout,
                    gone=lambda: bool(incarnations & self._session.lost),
                )
            if allow_heal:
                self._heal(plan)
        except (RuntimeError, OSError) as error:
            # The next quorum is another try; what died meanwhile is not in it.
            self.report_error(error)
        return quorum

    def _heal(self, plan: Plan) -> None:
        if plan.recover_dst_replica_ranks:
            self._states.offer(plan.quorum_id, plan.max_step, self._full_state)
        if not plan.heal:
            return
        self._healing = True
        began = time.monotonic()
        source = self._source = RankSession(self._context, plan.recover_src_manager_address, lambda _: None, self._key)
        try:
            where = source.ask(lambda request: StateAddressRequest(request, self._rank), self._connect_timeout)
        finally:
            self._source = None
            source.close()
        assert isinstance(where, StateAddress)
        self._pending_state = fetch_state(
            where.address, quorum_id=plan.quorum_id, step=plan.max_step, timeout=self._timeout
        )
        log.info(
            "replica %s rank %d: took the state of step %d from replica rank %s in %.0f ms",
            self.replica_id,
            self._rank,
            plan.max_step,
            plan.recover_src_replica_rank,
            (time.monotonic() - began) * 1e3,
        )

    def _full_state(self) -> dict[str, Any]:
        return {
            "step": self._plan.max_step if self._plan else self._step,
            "batches_committed": self._batches_committed,
            "user": self._state_dict() if self._state_dict is not None else None,
        }

    def _apply_pending_state(self) -> None:
        state, self._pending_state = self._pending_state, None
        if state is None:
            return
        if self._load_state_dict is not None:
            self._load_state_dict(state["user"])
        self._step = state["step"]
        self._batches_committed = state["batches_committed"]
        self._healing = False

    # --- collectives ---------------------------------------------------------------------------------------

    def allreduce(self, tensor: torch.Tensor, reduce_op: Any = None) -> ManagedWork:
        """Averages a tensor over the replica groups that take part, in place.

        After an error of this step nothing is sent any more, and the step will not be committed.

        Args:
            tensor: any shape; zeroed first on a replica group that does not take part.
            reduce_op: a ``torch.distributed.ReduceOp``; the average if None.
        """
        done: torch.futures.Future[Any] = torch.futures.Future()
        if self._error is not None:
            done.set_result(tensor)
            return ManagedWork(done)
        try:
            self.wait_quorum()
            _, count = self._participation
            if not self.is_participating():
                tensor.zero_()
            work = self._group.allreduce(tensor, reduce_op)
        except (RuntimeError, OSError) as error:
            self.report_error(error)
            done.set_result(tensor)
            return ManagedWork(done)

        works = self._works

        def finish(reduced: torch.futures.Future[Any]) -> torch.Tensor:
            try:
                reduced.value()
                if reduce_op is None:
                    tensor.div_(count)
            except RuntimeError as error:
                if works is self._works:  # else of a step that was given up
                    self.report_error(error)
            return tensor

        managed: torch.futures.Future[Any] = work.get_future().then(finish)
        self._works.append(managed)
        return ManagedWork(managed)

    def report_error(self, error: Exception) -> None:
        """This step can't be committed; the next quorum finds out who is still there."""
        if self._error is None:
            self._error = error
            log.warning("replica %s rank %d, step %d: %s", self.replica_id, self._rank, self._step, error)

    def errored(self) -> Exception | None:
        """The first error of this step."""
        return self._error

    def _on_failure(self, event: FailureEvent) -> None:
        """On the session's thread: a member of the group is gone, and this rank may hang in a collective with it."""
        quorum = self._quorum
        lost = event.failure
        if quorum is not None and any(
            replica.replica_id == lost.member and replica.incarnation == lost.incarnation
            for replica in quorum.participants
        ):
            self._group.cut()
            source = self._source
            if source is not None:
                source.close()  # it may have been asked for its state; the next quorum names another

    # --- commit --------------------------------------------------------------------------------------------

    def should_commit(self, timeout: float | timedelta | None = None) -> bool:
        """Ends a step: True if all ranks of this replica group may apply their optimizer's step.

        Raises:
            QuorumTimeout: the other ranks of this replica group did not vote in time, or there was no quorum.
            CommitFailures: ``max_retries`` is used up.
        """
        self._check_process()
        quorum = self.wait_quorum()
        for work in self._works:
            work.wait()
        try:
            if self._healing and self._error is None:
                self._apply_pending_state()
        except (RuntimeError, OSError) as error:
            self.report_error(error)
        plan = self._plan
        assert plan is not None
        limit = self._timeout if timeout is None else positive("timeout", timeout)
        mine = self._error is None and self.num_participants() >= self._least
        # The step that the whole replica group joined with: one of its ranks may have healed, and another not.
        voted = next(one.step for one in quorum.participants if one.replica_id == self.replica_id)
        answer = self._session.ask(
            lambda request: CommitVote(request, self._rank, plan.quorum_id, voted, mine, limit), limit
        )
        assert isinstance(answer, CommitDecision)
        self._works = []
        if self._states.withdraw(WITHDRAW_TIMEOUT):
            log.warning(
                "replica %s rank %d: cut a transfer of its state that took too long", self.replica_id, self._rank
            )
        if answer.commit:
            self._step += 1
            if self._page is not None:
                self._page.step = self._step
                self._page.ping()
            self._batches_committed += self.num_participants()
            self._commit_failures = 0
            return True
        self._commit_failures += 1
        if self._max_retries is not None and self._commit_failures > self._max_retries:
            raise CommitFailures(
                f"replica {self.replica_id}: {self._commit_failures} steps in a row could not be committed, "
                f"max_retries={self._max_retries}; the last error: {self._error}"
            )
        return False

    # --- what a training loop asks -------------------------------------------------------------------------

    def current_step(self) -> int:
        """Steps committed."""
        return self._step

    def batches_committed(self) -> int:
        """Batches of all replica groups in the steps committed."""
        return self._batches_committed

    def num_participants(self) -> int:
        """How many replica groups take part in this step."""
        return self._participation[1]

    def participating_rank(self) -> int | None:
        """This replica group's place among them; None for a spare, or one that heals."""
        return self._participation[0]

    def is_participating(self) -> bool:
        """Whether this replica group's tensors count in this step."""
        return self._participation[0] is not None and not (self._healing and self._use_async_quorum)

    def shutdown(self) -> None:
        """Leaves in good order: the others wait for nobody. Idempotent; no thread or socket is left."""
        if os.getpid() != self._pid:
            return  # after a fork the sockets are the parent's
        with self._closed:
            if self._is_closed:
                return
            self._is_closed = True
        source = self._source
        for session in (source, self._session):
            if session is not None:
                session.close()
        self._group.close()
        self._states.close()
        if self._control is not None:
            self._control.close()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._context.term()

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("a Manager belongs to the process that made it: make another after a fork")
        if self._is_closed:
            raise RuntimeError("this Manager was shut down: make another")


def positive(name: str, duration: float | timedelta) -> float:
    """A duration in seconds.

    Raises:
        ValueError: it is none, or longer than a day.
    """
    seconds = duration.total_seconds() if isinstance(duration, timedelta) else float(duration)
    if not 0.0 < seconds <= LONGEST:
        raise ValueError(f"{name} is {seconds:g}: it has to be more than 0 and at most {LONGEST:g} seconds")
    return seconds


def lighthouse_address(given: str | None) -> str:
    """The lighthouse's address as ZeroMQ takes it; ``HOST:PORT`` and ``http://HOST:PORT`` mean the same host and port.

    Raises:
        ValueError: there is none.
    """
    address = given or os.environ.get(LIGHTHOUSE_ADDRESS, "")
    if not address:
        raise ValueError(f"no lighthouse: give lighthouse_addr, or set {LIGHTHOUSE_ADDRESS}=tcp://HOST:PORT")
    if address.startswith(("tcp://", "ipc://")):
        return address
    return "tcp://" + address.removeprefix("http://").rstrip("/")


def route_to(lighthouse: str) -> str:
    """This host's address on the route to the lighthouse; no packet is sent."""
    if lighthouse.startswith("ipc://"):
        return "127.0.0.1"
    host, _, port = lighthouse.removeprefix("tcp://").rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])


def _whole(given: int | None, name: str, default: int) -> int:
    return given if given is not None else int(os.environ.get(name) or default)


__all__ = ["CommitFailures", "HealingError", "ManagedWork", "Manager", "ManagerError", "Quorum", "QuorumTimeout"]
