"""The manager of a replica group as a state machine.

It gathers what the group's ranks ask for, asks the lighthouse once for all of them, and counts their votes on a step.
A wait that the lighthouse cuts short (somebody was lost) is asked for again inside the same call; a caller that gives
up is withdrawn. Pure: (message, now) in, what to send out; sockets and clocks are ``control.py``'s.
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from seamark.protocol.messages import (
    Acknowledged,
    BeatAnswer,
    CommitDecision,
    CommitVote,
    FailureEvent,
    Message,
    QuorumReset,
    RankJoin,
    RankQuorum,
    Refused,
    Replica,
    ReplicaBeat,
    ReplicaJoin,
    ReplicaLeave,
    ReplicaQuorum,
    ReplicaWithdraw,
    StateAddress,
    StateAddressRequest,
)

RESEND_INTERVAL = 0.5
"""Seconds after which a request that nobody answered is sent again, under the same number."""
RECONNECT_AFTER = 2.0
"""Seconds of silence after which the connection is made anew: a half-open one never says that it is."""
WITHDRAW_PATIENCE = 1.0
"""Seconds that a quorum whose time is over may still be answered; less than a rank waits beyond its own time."""
LIGHTHOUSE_PATIENCE = 10.0
"""Seconds a caller waits for a lighthouse that answers nothing; it may be restarted meanwhile."""


class ToRank(Struct, frozen=True):
    """Send to the rank with this routing id."""

    route: bytes
    message: Message


class ToLighthouse(Struct, frozen=True):
    """Send to the lighthouse."""

    message: Message


class Reconnect(Struct, frozen=True):
    """Make a new connection to the lighthouse."""


Effect: TypeAlias = ToRank | ToLighthouse | Reconnect


class Ballot(Struct):
    """The votes on one step of one quorum, by group rank."""

    quorum_id: int
    step: int
    votes: dict[int, CommitVote]
    routes: dict[int, bytes]
    closed: bool = False
    """Somebody's time ran out: it is decided that nothing is committed, and nobody may learn otherwise."""


class Settings(Struct, frozen=True):
    """Who this manager is; durations in seconds."""

    job: str
    replica_id: str
    incarnation: str
    world_size: int
    address: str
    store_address: str
    lighthouse: str
    heartbeat_interval: float = 0.1


class ManagerCore:
    """The state of one replica group's manager.

    Args:
        settings: who it is.
        now: the present, seconds of the monotonic clock.
    """

    def __init__(self, settings: Settings, now: float) -> None:
        self._is = settings
        self._ranks: dict[int, bytes] = {}
        self._state_addresses: dict[int, str] = {}
        self._asking: dict[int, tuple[bytes, RankJoin]] = {}
        self._deadline = 0.0
        self._pending: ReplicaJoin | None = None
        self._resend_at = 0.0
        self._last: ReplicaQuorum | None = None
        self._last_asked: dict[int, int] = {}
        self._request = 0
        self._step = 0
        self._ballot: Ballot | None = None
        self._decided: dict[int, CommitDecision] = {}
        self._beats = 0
        self._beat_at = now
        self._heard_at = now
        self._reconnect_at = now + RECONNECT_AFTER
        self._leaving: ReplicaLeave | None = None
        self._withdrawn_by: float | None = None
        """The pending request's time is over; up to then the lighthouse may still answer it."""
        self._epoch = 0
        self._seen = 0
        """The last failure that the lighthouse of this epoch pushed."""
        self._refused: dict[int, Refused] = {}
        """By group rank: the last refusal, for a request that comes again."""
        self._vote_deadline = 0.0
        self.left = False
        """True once the lighthouse acknowledged the end of this replica group."""

    # --- from ranks ----------------------------------------------------------------------------------------

    def from_rank(self, now: float, route: bytes, message: Message) -> list[Effect]:
        """What follows from a message of a rank, of this replica group or of one that heals."""
        match message:
            case RankJoin():
                return self._join(now, route, message)
            case CommitVote():
                return self._vote(now, route, message)
            case StateAddressRequest():
                address = self._state_addresses.get(message.group_rank)
                if address is None:
                    sentence = f"rank {message.group_rank} of {self._is.replica_id} has offered no state yet"
                    return [ToRank(route, Refused(message.request, "UNKNOWN_MEMBER", sentence))]
                return [ToRank(route, StateAddress(message.request, address))]
            case _:
                sentence = f"{type(message).__name__} is not for a manager"
                return [ToRank(route, Refused(getattr(message, "request", 0), "BAD_REQUEST", sentence))]

    def _join(self, now: float, route: bytes, request: RankJoin) -> list[Effect]:
        refusal = self._refusal(request)
        closed = self._refused.get(request.group_rank)
        if closed is not None and closed.request == request.request:
            return [ToRank(route, closed)]
        if self._leaving is not None:
            sentence = f"replica group {self._is.replica_id} is being shut down"
            return [ToRank(route, Refused(request.request, "UNREACHABLE", sentence))]
        if refusal:
            return [ToRank(route, Refused(request.request, "BAD_REQUEST", refusal))]
        self._ranks[request.group_rank] = route
        if self._last is not None and self._last_asked.get(request.group_rank) == request.request:
            return [ToRank(route, self._answer_for(request, self._last))]
        self._state_addresses[request.group_rank] = request.state_address
        effects: list[Effect] = []
        if self._ballot is not None and self._ballot.votes and request.group_rank not in self._ballot.votes:
            effects = self._close_ballot()  # it will not vote on that step any more
        self._deadline = min(self._deadline, now + request.timeout) if self._asking else now + request.timeout
        self._asking[request.group_rank] = (route, request)
        self._step = request.step
        if self._pending is not None or len(self._asking) < self._is.world_size:
            return effects
        return [*effects, *self._ask(now)]

    def _refusal(self, request: RankJoin) -> str:
        who = f"rank {request.group_rank} of replica group {self._is.replica_id}"
        if request.group_rank >= self._is.world_size:
            return f"{who}: its world size is {self._is.world_size}"
        for rank, (_, other) in self._asking.items():
            for name in ("shrink_only", "min_members", "target_members", "join_timeout"):
                mine, theirs = getattr(request, name), getattr(other, name)
                if rank != request.group_rank and mine != theirs:
                    return f"{who} asks for a quorum with {name}={mine}, rank {rank} with {name}={theirs}"
        return ""

    def _ask(self, now: float) -> list[Effect]:
        requests = [request for _, request in self._asking.values()]
        first = requests[0]
        self._request += 1
        last = self._last
        ballot = self._ballot
        # Whose vote was given up may not know that its step failed; under the old quorum id it could vote never more.
        given_up = last is not None and ballot is not None and ballot.closed and ballot.quorum_id == last.quorum_id
        self._pending = ReplicaJoin(
            job=self._is.job,
            request=self._request,
            replica=Replica(
                replica_id=self._is.replica_id,
                incarnation=self._is.incarnation,
                address=self._is.address,
                store_address=self._is.store_address,
                # One of them healed and another could not: both heal again.
                step=min(request.step for request in requests),
                world_size=self._is.world_size,
                shrink_only=first.shrink_only,
                commit_failures=max(int(given_up), *(request.commit_failures for request in requests)),
                data=first.data,
            ),
            quorum_id=last.quorum_id if last else 0,
            quorum_members=[replica.replica_id for replica in last.participants] if last else [],
            min_members=first.min_members,
            target_members=first.target_members,
            join_timeout=first.join_timeout,
        )
        return self._send_pending(now)

    def _send_pending(self, now: float) -> list[Effect]:
        assert self._pending is not None
        self._resend_at = now + RESEND_INTERVAL
        return [ToLighthouse(self._pending)]

    def _vote(self, now: float, route: bytes, vote: CommitVote) -> list[Effect]:
        ballot = self._ballot
        key = (vote.quorum_id, vote.step)
        decided = self._decided.get(vote.group_rank)
        if decided is not None and decided.request == vote.request:
            return [ToRank(route, decided)]
        if ballot is None or key > (ballot.quorum_id, ballot.step):
            ballot = self._ballot = Ballot(vote.quorum_id, vote.step, {}, {})
        elif key < (ballot.quorum_id, ballot.step):
            sentence = (
                f"the vote of rank {vote.group_rank} of {self._is.replica_id} on step {vote.step} of quorum "
                f"{vote.quorum_id} came too late: step {ballot.step} of quorum {ballot.quorum_id} is being voted on"
            )
            return [ToRank(route, Refused(vote.request, "TIMEOUT", sentence))]
        if ballot.closed:
            sentence = (
                f"the vote of rank {vote.group_rank} of {self._is.replica_id} on step {vote.step} of quorum "
                f"{vote.quorum_id} came too late: another rank's time to wait for it is over"
            )
            return [ToRank(route, Refused(vote.request, "TIMEOUT", sentence))]
        deadline = now + vote.timeout
        self._vote_deadline = min(self._vote_deadline, deadline) if ballot.votes else deadline
        ballot.votes[vote.group_rank] = vote
        ballot.routes[vote.group_rank] = route
        if len(ballot.votes) < self._is.world_size:
            return []
        commit = all(one.commit for one in ballot.votes.values())
        self._decided = {rank: CommitDecision(one.request, commit) for rank, one in ballot.votes.items()}
        ballot.votes = {}
        return [ToRank(ballot.routes[rank], decision) for rank, decision in self._decided.items()]

    def _close_ballot(self) -> list[Effect]:
        ballot = self._ballot
        assert ballot is not None
        ballot.closed = True
        absent = sorted(set(range(self._is.world_size)) - ballot.votes.keys())
        sentence = f"ranks {absent} of replica group {self._is.replica_id} did not vote on step {ballot.step} in time"
        votes, ballot.votes = ballot.votes, {}
        return [ToRank(ballot.routes[rank], Refused(vote.request, "TIMEOUT", sentence)) for rank, vote in votes.items()]

    # --- from the lighthouse -------------------------------------------------------------------------------

    def from_lighthouse(self, now: float, message: Message) -> list[Effect]:
        """What follows from a message of the lighthouse; any of them says that it lives."""
        self._heard_at = now
        self._reconnect_at = now + RECONNECT_AFTER
        match message:
            case ReplicaQuorum() if self._is_for_me(message):
                return self._quorum(message)
            case QuorumReset() if self._is_for_me(message):
                if self._withdrawn_by is not None:
                    return self._refuse_all("TIMEOUT", self._why_no_quorum(now))
                return self._ask(now)
            case BeatAnswer() if message.epoch != self._epoch:
                self._epoch, self._seen = message.epoch, 0
            case FailureEvent():
                if message.epoch == self._epoch and message.failure.kind == "lost":
                    self._seen = max(self._seen, message.sequence)
                return [ToRank(route, message) for route in self._ranks.values()]
            case Refused() if self._pending is not None and message.request in (0, self._pending.request):
                return self._refuse_all(message.code, message.reason)
            case Acknowledged() if self._withdrawn_by is not None and self._acknowledges(message):
                return self._refuse_all("TIMEOUT", self._why_no_quorum(now))
            case Acknowledged() if self._leaving is not None and message.request == self._leaving.request:
                self.left = True
        return []

    def _acknowledges(self, message: Acknowledged) -> bool:
        return self._pending is not None and message.request == self._pending.request

    def _is_for_me(self, answer: ReplicaQuorum | QuorumReset) -> bool:
        pending = self._pending
        return pending is not None and any(
            one.incarnation == self._is.incarnation and one.request == pending.request for one in answer.recipients
        )

    def _quorum(self, answer: ReplicaQuorum) -> list[Effect]:
        self._pending = self._withdrawn_by = None
        self._last = answer
        asking, self._asking = self._asking, {}
        self._last_asked = {rank: request.request for rank, (_, request) in asking.items()}
        return [ToRank(route, self._answer_for(request, answer)) for route, request in asking.values()]

    @staticmethod
    def _answer_for(request: RankJoin, answer: ReplicaQuorum) -> RankQuorum:
        return RankQuorum(request.request, answer.quorum_id, answer.participants)

    def _refuse_all(self, code: str, reason: str) -> list[Effect]:
        asking, self._asking = self._asking, {}
        self._pending = self._withdrawn_by = None
        refused = Refused(0, code, reason, self._is.job, self._is.replica_id)  # type: ignore[arg-type]
        self._refused |= {rank: replace(refused, request=request.request) for rank, (_, request) in asking.items()}
        return [ToRank(route, self._refused[rank]) for rank, (route, _) in asking.items()]

    # --- time ----------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Effect]:
        """Heartbeats, repeated requests, and waits that end."""
        effects: list[Effect] = []
        if now >= self._reconnect_at:
            self._reconnect_at = now + RECONNECT_AFTER
            effects.append(Reconnect())
        if now >= self._beat_at and self._leaving is None:
            self._beat_at = max(self._beat_at + self._is.heartbeat_interval, now)
            self._beats += 1
            me = self._is
            waiting = self._pending.request if self._pending else 0
            beat = ReplicaBeat(
                me.job, me.replica_id, me.incarnation, me.address, self._beats, self._step, waiting, self._seen
            )
            effects.append(ToLighthouse(beat))
        if self._leaving is not None and now >= self._resend_at:
            self._resend_at = now + RESEND_INTERVAL
            effects.append(ToLighthouse(self._leaving))
        if self._ballot is not None and self._ballot.votes and now >= self._vote_deadline:
            effects += self._close_ballot()
        if self._asking and now >= self._deadline and self._withdrawn_by is None:
            if self._pending is None:
                return [*effects, *self._refuse_all("TIMEOUT", self._why_no_quorum(now))]
            # An answer may be on its way: then the others count on this replica group.
            self._withdrawn_by = now + WITHDRAW_PATIENCE
            return [*effects, self._withdrawal(self._pending)]
        if self._withdrawn_by is not None:
            if now >= self._withdrawn_by:
                effects += self._refuse_all("TIMEOUT", self._why_no_quorum(now))
        elif self._pending is not None:
            silent = now - self._heard_at
            if silent > LIGHTHOUSE_PATIENCE:
                sentence = f"the lighthouse at {self._is.lighthouse} has not answered for {silent:.0f} s"
                return [*effects, *self._give_up("UNREACHABLE", sentence)]
            if now >= self._resend_at:
                effects += self._send_pending(now)
        return effects

    def _why_no_quorum(self, now: float) -> str:
        if self._pending is None:
            absent = sorted(set(range(self._is.world_size)) - self._asking.keys())
            return f"ranks {absent} of replica group {self._is.replica_id} did not ask for a quorum in time"
        if now - self._heard_at > RECONNECT_AFTER:
            return f"the lighthouse at {self._is.lighthouse} has not answered for {now - self._heard_at:.1f} s"
        return "no quorum was reached in time (`seamark status` says what it waits for)"

    def _give_up(self, code: str, reason: str) -> list[Effect]:
        pending = self._pending
        effects = self._refuse_all(code, reason)
        return effects if pending is None else [*effects, self._withdrawal(pending)]

    def _withdrawal(self, pending: ReplicaJoin) -> ToLighthouse:
        me = self._is
        return ToLighthouse(ReplicaWithdraw(me.job, me.replica_id, me.incarnation, pending.request))

    def wake_at(self) -> float:
        """When ``tick`` has something to do, if nothing else happens before; seconds."""
        times = [self._reconnect_at]
        if self._leaving is None:
            times.append(self._beat_at)
        if self._pending is not None or self._leaving is not None:
            times.append(self._resend_at)
        if self._asking:
            times.append(self._deadline if self._withdrawn_by is None else self._withdrawn_by)
        if self._ballot is not None and self._ballot.votes:
            times.append(self._vote_deadline)
        return min(times)

    def leave(self, now: float, reason: str) -> list[Effect]:
        """This replica group ends in good order."""
        refusals = self._refuse_all("UNREACHABLE", f"replica group {self._is.replica_id} is being shut down")
        self._request += 1
        self._resend_at = now + RESEND_INTERVAL
        me = self._is
        self._leaving = ReplicaLeave(me.job, self._request, me.replica_id, me.incarnation, reason)
        return [*refusals, ToLighthouse(self._leaving)]
