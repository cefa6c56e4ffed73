"""A job as the coordinator has it in memory, what of it is durable, and what people are told of it."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct, field

from seamark.protocol.messages import (
    DatasetStatus,
    Incident,
    JobSpec,
    JobStatus,
    MemberStatus,
    Slot,
    StoreAddress,
    StoreLost,
    StoreReady,
    WorkerExited,
    WorkerStarted,
)
from seamarkd.coordinator.budget import RestartBudget
from seamarkd.coordinator.incidents import IncidentLog
from seamarkd.coordinator.policy import Standing
from seamarkd.coordinator.shards import JobShards

State = Literal[
    "PENDING", "STARTING", "RUNNING", "RESTARTING", "STOPPING", "SUCCEEDED", "FAILED", "ABORTED", "CANCELLED"
]
ENDED: frozenset[str] = frozenset({"SUCCEEDED", "FAILED", "ABORTED", "CANCELLED"})
FRUITLESS_RESTARTS = 1_000
"""In an hour without a single ``ping()``: a function that fails at once takes half a minute for so many."""
SETS = ("finished", "discarded", "failed", "left")
"""Fields of a job that are lists in its record."""


class JobRecord(Struct, frozen=True):
    """What is durable of a job. Times are of the monotonic clock: they outlive this daemon, not the host's boot."""

    spec: JobSpec
    state: State
    generation: int
    iteration: int
    restarts: int
    process_restarts: int
    result: str
    slots: list[Slot]
    store: StoreAddress
    master_addr: str
    master_port: int
    log_tail: list[str]
    submission: str = ""
    outcome: State = "FAILED"
    submitted_at: float = 0.0
    ended_at: float = -1.0
    checkpoint: int = 0
    notice: str = ""
    wrapped: bool = False
    spent: list[float] = []
    finished: list[str] = []
    discarded: list[str] = []
    exited: dict[str, str] = {}
    state_version: int = 0
    state_text: str = ""
    store_node: str = ""
    placement: int = 0
    width: int = 0
    failed: list[str] = []
    left: list[str] = []
    heard: tuple[int, int] = (0, 0)
    datasets: list[DatasetStatus] = []


class Process(Struct):
    """A worker process, as reported."""

    incarnation: str
    pid: int
    alive: bool
    node: str = ""
    forked_at: float = 0.0
    """By the clock of its host."""


class Job(Struct):
    """A job in memory."""

    spec: JobSpec
    budget: RestartBudget
    submitted_at: float
    submission: str = ""
    state: State = "PENDING"
    outcome: State = "FAILED"
    generation: int = -1
    iteration: int = -1
    restarts: int = 0
    process_restarts: int = 0
    result: str = ""
    sentence: str = "waits for nodes"
    notice: str = ""
    slots: list[Slot] = field(default_factory=list)
    store: StoreAddress = field(default_factory=StoreAddress)
    master_addr: str = ""
    master_port: int = 0
    request: int = 0
    roster_request: int = 0
    roster_due: float = 0.0
    exited: dict[str, str] = field(default_factory=dict)
    """By incarnation: the members whose exits were taken into account."""
    stop_until: float = 0.0
    fruitless: RestartBudget = field(default_factory=lambda: RestartBudget(FRUITLESS_RESTARTS))
    """Restarts of either kind that may follow each other without a step between them."""
    processes: dict[str, Process] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    discarded: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    """Members that were lost and that the policy does not replace."""
    placement: int = 0
    width: int = 0
    """Most ranks that it had in this generation."""
    heard: tuple[int, int] = (0, 0)
    """Epoch and number of the lighthouse's last event that was taken into account: a snapshot repeats them."""
    completed: bool = False
    """Its function has returned on all ranks: what is lost from now on has finished."""
    left: set[str] = field(default_factory=set)
    """Nodes that it was on and was taken from: what may live there is ended when they are heard again."""
    stopping: set[str] = field(default_factory=set)
    step: dict[str, int] = field(default_factory=dict)
    checkpoint: int = 0
    wrapped: bool = False
    state_version: int = 0
    """Of what its workers share (``call.state_dict``)."""
    state_text: str = ""
    store_node: str = ""
    moving: str = ""
    """The node that is to have the job's TCPStore, until it has it."""
    refused_store: dict[str, str] = field(default_factory=dict)
    """By node: why it could not start it."""
    move_due: float = 0.0
    store_lost: StoreLost | None = None
    """What the lighthouse has to know, until it has acknowledged it."""
    log_tail: list[str] = field(default_factory=list)
    incidents: IncidentLog = field(default_factory=IncidentLog)
    followers: dict[bytes, float] = field(default_factory=dict)
    ended_at: float = -1.0
    shards: JobShards | None = None
    datasets: list[DatasetStatus] = field(default_factory=list)
    """How far each data set was when the job ended."""


def record(job: Job) -> JobRecord:
    """What is durable of a job, as of now."""
    kept = {name: _copy(getattr(job, name)) for name in JobRecord.__struct_fields__ if name != "spent"}
    return JobRecord(**kept, spent=job.budget.spent)


def _copy(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    return value.copy() if isinstance(value, list | dict) else value


def restored(now: float, record: JobRecord, incidents: list[Incident]) -> Job:
    """A job of an earlier start of the coordinator."""
    kept = {name: _copy(getattr(record, name)) for name in JobRecord.__struct_fields__ if name != "spent"}
    kept |= {name: set(kept[name]) for name in SETS}
    # The clock of a host that was started anew begins anew, too.
    kept["submitted_at"] = min(record.submitted_at, now)
    budget = RestartBudget(record.spec.max_restarts, (min(at, now) for at in record.spent))
    return Job(**kept, budget=budget, sentence=record.result, incidents=IncidentLog(incidents))


def status(job: Job, now: float, request: int = 0) -> JobStatus:
    """Where a job stands, for people."""
    alive = [process for process in job.processes.values() if process.alive]
    until = job.ended_at if job.ended_at >= 0 else now
    return JobStatus(
        request=request,
        job=job.spec.name,
        state=job.state,
        generation=max(job.generation, 0),
        iteration=job.iteration,
        alive=len(alive),
        world_size=len(job.slots),
        restarts=job.restarts,
        process_restarts=job.process_restarts,
        step=max(job.step.values(), default=0),
        pids={member: process.pid for member, process in job.processes.items() if process.alive},
        sentence=job.sentence,
        notice=job.notice,
        result=job.result if job.state in ENDED else "",
        log_tail=job.log_tail if job.state in ENDED else [],
        incidents=job.incidents.count,
        running_for=max(0.0, until - job.submitted_at),
        datasets=job.datasets if job.state in ENDED else reached(job),
    )


def reached(job: Job) -> list[DatasetStatus]:
    """How far each of its data sets is."""
    return job.shards.status() if job.shards is not None else []


def members(job: Job) -> list[MemberStatus]:
    """Its ranks as they are now."""
    members = []
    for slot in job.slots:
        process = job.processes.get(slot.member)
        members.append(
            MemberStatus(
                member=slot.member,
                rank=slot.rank,
                node=slot.node,
                pid=process.pid if process else 0,
                alive=process is not None and process.alive,
                step=job.step.get(slot.member, -1),
            )
        )
    return members


def standing(job: Job) -> Standing:
    """A job as the policies look at it: in nodes under ``min-healthy`` that counts nodes, else in ranks."""
    by_node = job.spec.policy == "min-healthy" and job.spec.worker_group == "node"
    groups: dict[int, list[str]] = {}
    for slot in job.slots:
        groups.setdefault(slot.group_rank if by_node else slot.rank, []).append(slot.member)
    lost = job.failed | job.discarded
    return Standing(
        policy=job.spec.policy,
        wrapped=job.wrapped or job.spec.independent,
        least=job.spec.min_nodes if by_node else job.spec.min_ranks,
        well=sum(lost.isdisjoint(members) for members in groups.values()),
        finished=sum(job.finished.issuperset(members) for members in groups.values()),
        running=sum(slot.member not in lost and slot.member not in job.finished for slot in job.slots),
        missing=job.spec.max_ranks - len(job.slots),
    )


def success(job: Job) -> str:
    """How it ended well, for people: who completed, and who had to be done without."""
    finished, width = len(job.finished - job.discarded), max(job.width, len(job.slots))
    text = f"{'all' if finished == width else f'{finished} of'} {width} ranks completed"
    text += f", {len(job.discarded)} were discarded by its rank assignment" if job.discarded else ""
    lost = width - finished - len(job.discarded)
    text += f", {lost} were lost and had no replacement" if lost else ""
    report = job.shards.report() if job.shards is not None else ""
    return f"{text}; {report}" if report else text


def unwrapped(job: Job) -> str:
    """Why a failure restarted everybody under a policy that promises better, and what to do about it."""
    if job.wrapped or job.spec.policy != "replace":
        return ""
    return (
        "no rank was heard from in seamark.Wrapper before it failed, and only a wrapped function can be restarted in "
        "process: such a failure restarts all ranks; wrap the training function, or ask for just that with "
        "--restart-policy any-failed"
    )


def forgotten(earlier: Job | None) -> str:
    """What a job takes from the run that had its name before it, for people."""
    if earlier is None:
        return ""
    return (
        f"the run that had this name before ({earlier.state.lower()}) is forgotten, with its incidents and the books "
        "of its shards: this one begins with nothing done; another --name keeps them"
    )


def has_place(job: Job, report: WorkerStarted | WorkerExited) -> bool:
    """Whether the worker's place is on the node that reports it; one that was lost may not know better."""
    node = next((slot.node for slot in job.slots if slot.member == report.member), None)
    return node is not None and report.node in ("", node)


def take_store(job: Job, report: StoreReady, node: str) -> None:
    """The job has this store now, on this node."""
    job.store, job.store_node = report.store, node
    job.master_addr, job.master_port = report.master_addr, report.master_port


def first_line(text: str) -> str:
    """The first line of a text, for a sentence."""
    return text.strip().split("\n", 1)[0]
