"""The restart wrapper: a training function that is entered again after every fault of any rank.

It puts the parts together: the quorum says who takes part (``session``), a fault ends the function wherever it is
(``interrupt``, ``abort``), what it left behind is cleaned up (``cleanup``), and the function runs again under the
next iteration's store prefix. No rule of membership is here, and no iteration is computed.
"""

from __future__ import annotations

import difflib
import functools
import gc
import inspect
import logging
import os
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple, ParamSpec, TypeVar

from seamark import preemption
from seamark.environment import WorkerEnvironment
from seamark.inprocess.abort import ProcessGroups
from seamark.inprocess.cleanup import describe, is_communication_error, let_go
from seamark.inprocess.components import ABORT_TIMEOUT, Component, Components
from seamark.inprocess.exceptions import RankDiscarded, RestartAbort, RestartError, RestartInterrupt
from seamark.inprocess.initialize import check_minimum
from seamark.inprocess.interrupt import DEFAULT_SIGNAL, REPEAT_INTERVAL, Interrupter
from seamark.inprocess.rank_assignment import Assignment, keys_of
from seamark.inprocess.rendezvous import EnvRendezvous
from seamark.inprocess.session import Session
from seamark.inprocess.signs import Signs, interval
from seamark.inprocess.spare import SpareStore
from seamark.inprocess.state import NODE_KEY, Mode, State, export, place
from seamark.inprocess.stuck import Stillness
from seamark.inprocess.timeouts import timeouts
from seamark.progress import Phase, ProgressPage, worker_page
from seamark.protocol.messages import QuorumAnswer, Stamps
from seamark.sections import forget_open_sections
from seamark.store import counters
from seamark.store.state_dict import ENVIRONMENT as SHARED_STATE
from seamark.store.state_dict import StateDict

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

STUCK_AFTER = 1.0
"""Seconds without a sign of life after which a main thread that should leave the function is given up."""
STORE_TIMEOUT = 10.0
"""Seconds to connect to the job's TCPStore."""


class CallWrapper:
    """What the wrapped function receives: its iteration, its place, its store.

    Attributes:
        iteration: the restart iteration; it rises at every restart and is never used twice in a job.
        state: rank, world size and the like in this iteration.
        state_dict: a mapping of strings to plain data (64 kB of JSON) that all ranks share, and that restarts of either
            kind leave alone: ``call.state_dict["seen"] = n`` on any rank, ``call.state_dict["seen"]`` on all.
        store: a ``torch.distributed.Store`` that is this iteration's alone: pass it to ``init_process_group``, or
            call that plainly, which finds the same store.
    """

    iteration: int
    state: State
    state_dict: StateDict
    store: Any
    ping: Callable[[], None]
    """Call it once per step: it counts progress (a memory write, under a microsecond)."""

    def __init__(self, interrupter: Interrupter, page: ProgressPage) -> None:
        self._interrupter = interrupter
        self._page = page

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """Within this block a restart does not interrupt the function; a pending one happens at its end."""
        with self._interrupter.atomic():
            yield

    @contextmanager
    def disable_hang_protection(self) -> Iterator[None]:
        """Within this block no timeout runs, for instance while a model compiles or a large checkpoint is written."""
        phase = self._page.phase
        self._page.enter(Phase.OUTSIDE)
        try:
            yield
        finally:
            self._page.enter(phase)


class Wrapper:
    """Decorates a training function so that it is restarted in process after every fault.

    The function is called again, from its beginning, when any rank of the job raised or died; it returns once all
    ranks have returned. A parameter annotated ``CallWrapper`` receives the call's handle.

    Components are functions of a ``State``, or a ``Compose`` of several.

    Args:
        initialize: called before the function in every iteration; an exception is a fault, ``RestartAbort`` ends all.
        abort: called after a fault once the process groups are freed, on a thread; its exceptions are logged.
        finalize: called when the function has ended by a fault; an exception makes this rank leave the job.
        health_check: called after ``finalize``; the same.
        rank_assignment: who takes part, under which rank; a function of ``rank_assignment.Ranks``, which by default
            closes gaps (``ShiftRanks``).
        completion: called once the function has returned on all ranks.
        terminate: called when this rank ends by an exception; its own exceptions are logged.
        soft_timeout: seconds, or a ``timedelta``, for which a rank may run no Python, or not call ``ping()`` once it
            has called it; then all ranks are interrupted and restart in process. None: for ever, and no hard timeout.
        hard_timeout: after so long without either the rank's process is ended, and replaced as the policy says.
        initial_timeout: for the first ``ping()`` of an iteration; None for ever.
        out_of_section_timeout: between two ``seamark.section``s; None for ever.
        timeout_safety_factor: None, or how many times as long as observed a ``ping()`` or a section may take until it
            counts as past the soft timeout, if that is sooner (NVRx's launcher takes 5.0).
        termination_grace_time: between SIGTERM and SIGKILL.
        enabled: False returns the function untouched.
        interrupt_signal: the signal that interrupts the main thread; it must have no handler yet.
        reference_only: arguments of NVRx's wrapper that have nothing to act on here, because nothing polls and the
            job's TCPStore is no rank's: ``store_factory``, ``store_kwargs``, ``heartbeat_interval``,
            ``barrier_timeout``, ``last_call_wait`` and the like. Taken, so that a script goes on, and logged.

    Raises:
        TypeError: a component can't be called, or an argument is none of either wrapper.
        ValueError: a timeout is not above 0, or ``hard_timeout`` not above ``soft_timeout``.

    Example:
        >>> @seamark.Wrapper()
        ... def train(call: seamark.CallWrapper) -> None:
        ...     torch.distributed.init_process_group("gloo")
    """

    def __init__(
        self,
        *,
        initialize: Component | None = None,
        abort: Component | None = None,
        finalize: Component | None = None,
        health_check: Component | None = None,
        rank_assignment: Assignment | None = None,
        completion: Component | None = None,
        terminate: Component | None = None,
        soft_timeout: float | timedelta | None = 60.0,
        hard_timeout: float | timedelta | None = 90.0,
        initial_timeout: float | timedelta | None = None,
        out_of_section_timeout: float | timedelta | None = None,
        timeout_safety_factor: float | None = None,
        termination_grace_time: float | timedelta = 5.0,
        enabled: bool = True,
        interrupt_signal: int = DEFAULT_SIGNAL,
        **reference_only: object,
    ) -> None:
        _check_reference_only(reference_only)
        self.components = Components(initialize, abort, finalize, health_check, completion, terminate, rank_assignment)
        self.timeouts = timeouts(
            soft=soft_timeout,
            hard=hard_timeout,
            grace=termination_grace_time,
            initial=initial_timeout,
            outside=out_of_section_timeout,
            safety=timeout_safety_factor,
        )
        self.enabled = enabled
        self.interrupt_signal = interrupt_signal

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        """The wrapped function.

        Raises (when the wrapped function is called):
            RestartError: not under Seamark, not in the main thread, with a process group already, or this process was
                replaced.
            RankDiscarded: the rank assignment has dropped this rank.
            RestartAbort: the function, ``initialize`` or the rank assignment asked for the end of the job.
            TypeError: the arguments are not those of the function, whose ``CallWrapper`` is given to the parameter that
                is annotated with it.
        """
        if not self.enabled:
            return function
        parameter = _call_parameter(function)

        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            _check_no_group()
            _check_arguments(function, *_placed(parameter, None, args, kwargs))
            environment = WorkerEnvironment.read()
            if not environment.alone:
                check_minimum(self.components.initialize, environment.min_world_size)
            with _Restarter(environment, self) as restarter:
                given, named = _placed(parameter, restarter.call, args, kwargs)
                return restarter.run(lambda: typing.cast(Callable[..., T], function)(*given, **named))

        return wrapped


class _Restarter:
    """One call of a wrapped function, through all its iterations."""

    def __init__(self, environment: WorkerEnvironment, wrapper: Wrapper) -> None:
        self._who = environment
        self._components = wrapper.components
        self._keys = keys_of(self._components.assignment, environment.rank, environment.world_size)
        if environment.alone:
            self._keys[NODE_KEY] = environment.node
        self._state = State.from_env()
        self._local_rank = self._state.local_rank
        self._fn_exception: Exception | None = None
        self._aborting: tuple[int, threading.Thread | None] = (-1, None)
        self._interrupter = Interrupter(wrapper.interrupt_signal)
        self._groups = ProcessGroups(self._interrupter.atomic)
        self._rendezvous = EnvRendezvous()
        self._spare = SpareStore(STORE_TIMEOUT)
        self._page = worker_page(environment.incarnation)
        self._inside = -1
        self._cutting = threading.Lock()
        self._stillness = Stillness(threading.get_native_id())
        self._ask_for_replacement_at = 0.0
        self._stamps: dict[str, float] = {}
        self._reported = False
        self._pinged = -1
        self._ended_iteration = -1
        self._last: QuorumAnswer | None = None
        self.call = CallWrapper(self._interrupter, self._page)
        # What was imported and made before is no restart's garbage: to look through it took 200 ms of each.
        gc.freeze()
        self._groups.install()
        self._rendezvous.install()
        self._page.timeouts = wrapper.timeouts
        self._page.wrapped = True
        preemption.attach(self._call_at_ping, self._interrupter.atomic)
        self._session = Session(environment, self._give_up, Signs(self._page).ask, interval(wrapper.timeouts.soft))
        self.call.state_dict = StateDict(os.environ.get(SHARED_STATE, ""), self._session.share)

    def __enter__(self) -> _Restarter:
        return self

    def _call_at_ping(self, action: Callable[[], None]) -> None:
        self._page.at_ping = action

    def __exit__(self, *exception: object) -> None:
        preemption.attach(None, nullcontext)
        self._page.enter(Phase.OUTSIDE)
        self._session.close()
        self._spare.close()
        self._rendezvous.uninstall()
        self._groups.uninstall()
        self._interrupter.close()
        # Also what a keeper had frozen: to ask how much that is would look at each of torch's objects, at every start.
        gc.unfreeze()

    # --- main thread ---------------------------------------------------------------------------------------

    def run(self, function: Callable[[], T]) -> T:
        """Enters the function until an iteration completes on all ranks."""
        try:
            return typing.cast(T, self._iterate(function))
        except BaseException as error:
            if isinstance(error, RestartAbort) and self._session.aborted is None:
                self._session.abort_job(error.reason)
            self._components.terminated(self._state)
            raise

    def _iterate(self, function: Callable[[], object]) -> object:
        after_fault = False
        result: object = None
        while True:
            self._stamps["joined"] = time.monotonic()
            self._page.enter(Phase.WAITING)
            quorum = self._session.join(self._keys, after_fault=after_fault)
            if quorum is None:
                break
            self._last = quorum
            self._stamps["answered"] = time.monotonic()
            self._page.enter(Phase.WORKING)
            self._take_place(quorum)
            try:
                if self._state.mode is Mode.ACTIVE:
                    self._enter(quorum)
                    result = self._interrupter.run(quorum.iteration, lambda: self._call(function))
                    self._report_timeline()
                self._page.enter(Phase.WAITING)
                if self._session.complete(quorum.iteration):
                    self._leave()
                    self._groups.hang_up()
                    break
            except RestartInterrupt as interrupt:
                self._after_fault(quorum.iteration, interrupt)
            except SystemExit:
                # One of them is an Exception as well (seamark.sharding.HostLeaves), and no fault.
                raise
            except Exception as error:
                if not self._interrupter.aborted(quorum.iteration):
                    at = time.monotonic()
                    if not is_communication_error(error):
                        # Of the one that began it; those of its peers follow from it.
                        log.error("rank %d failed, and all restart in process", self._state.rank, exc_info=error)
                    _report_shards_failure(error)
                    self._session.faulted(quorum.iteration, describe(error), at)
                    self._fn_exception = error
                self._after_fault(quorum.iteration, error)
            else:
                self._after_fault(quorum.iteration, None)
            after_fault = True
        if self._components.completion is not None:
            self._components.completion(self._state)
        return result

    def _call(self, function: Callable[[], object]) -> object:
        if self._components.initialize is not None:
            self._components.initialize(self._state)
        return function()

    def _take_place(self, quorum: QuorumAnswer) -> None:
        self._state, dropped = place(
            self._components.assignment,
            quorum.members,
            self._who.member,
            iteration=quorum.iteration,
            restarts=quorum.restarts,
            initial_world_size=self._who.world_size,
            fn_exception=self._fn_exception,
        )
        if self._who.alone:
            # The roster of a job without a coordinator knows no host's.
            self._state = replace(self._state, local_rank=self._local_rank)
        self._fn_exception = None
        self._page.iteration = self.call.iteration = quorum.iteration
        self.call.state = self._state
        if dropped:
            self._page.discarded = True
            raise RankDiscarded(f"rank {self._state.initial_rank} leaves the job: {dropped}")

    def _enter(self, quorum: QuorumAnswer) -> None:
        from torch.distributed import PrefixStore

        self._inside = quorum.iteration
        self._groups.hang_up()
        if self._interrupter.aborted(quorum.iteration):
            raise RestartInterrupt
        state = self._state
        unwanted = functools.partial(self._interrupter.aborted, quorum.iteration)
        client = self._groups.adopt(*self._spare.take(quorum.store, unwanted))
        if state.active_rank == 0:
            ranks = state.active_world_size
            counters.announce(client, iteration=quorum.iteration, restarts=quorum.restarts, ranks=ranks)
        self.call.state_dict.bind(client, quorum.store.incarnation)
        store = PrefixStore(counters.process_group_prefix(quorum.iteration), client)
        export(state)
        self._rendezvous.offer(store, state)
        self.call.store = store
        self.call.ping = self._first_ping

    def _first_ping(self) -> None:
        """The first ping of an iteration ends the incident's timeline; the others are a memory write."""
        self._page.ping()
        if self._pinged == self.call.iteration:
            # Of a function that has kept the method it began with.
            return
        self._pinged = self.call.iteration
        self._stamps["first_step"] = time.monotonic()
        # Starting a thread takes locks of Python's own, which an interrupt must not leave locked.
        with self._interrupter.atomic():
            self.call.ping = self._page.ping
            self._report_timeline()
            if self._last is not None:
                self._spare.prepare(self._last.store, self._clear_up)

    def _clear_up(self, client: Any) -> None:
        """On the spare client's thread: what earlier iterations left in the store."""
        if self._state.active_rank == 0:
            counters.forget_before(client, self._state.iteration)

    def _after_fault(self, iteration: int, error: BaseException | None) -> None:
        forget_open_sections()
        self._page.enter(Phase.WORKING)
        self._report_timeline()
        self._ended_iteration = iteration
        if error is not None:
            let_go(error)
        self._begin_abort(iteration)
        self._leave()
        self._stamps["left"] = time.monotonic()
        self._reported = False
        _, aborting = self._aborting
        if aborting is not None:
            aborting.join(ABORT_TIMEOUT)
        self._session.check_aborted()
        self._components.clean_up(replace(self._state, fn_exception=self._fn_exception))

    def _begin_abort(self, iteration: int) -> None:
        """The user's part of an abort, once in an iteration, by whoever comes first."""
        with self._cutting:
            if self._aborting[0] < iteration:
                state = replace(self._state, fn_exception=self._fn_exception)
                self._aborting = (iteration, self._components.begin_abort(state))

    def _leave(self) -> None:
        """Cuts and destroys what the iteration left behind."""
        self._rendezvous.offer(None, None)
        self.call.store = None
        self.call.state_dict.unbind()
        with self._cutting:
            self._groups.cut()
            self._groups.release()
            self._inside = -1
        gc.collect()

    # --- timeline ------------------------------------------------------------------------------------------

    def _report_timeline(self) -> None:
        """Once per iteration, as soon as its first step is done or it ends without one."""
        if self._reported or self._last is None:
            return
        self._reported = True
        stamps, self._stamps = self._stamps, {}
        ready = self._groups.ready_at
        if ready is not None and ready >= stamps["answered"]:
            stamps["group_ready"] = ready
        self._session.timeline(self._ended_iteration, self._last.iteration, Stamps(**stamps))

    # --- monitor thread ------------------------------------------------------------------------------------

    def _give_up(self, iteration: int) -> bool:
        """A failure ends this iteration: frees the main thread wherever it is. True once it is outside."""
        quorum = self._last
        first = not self._interrupter.aborted(iteration)
        self._interrupter.abort(iteration)
        if quorum is None or quorum.iteration > iteration:
            return True
        if first:
            self._stamps["told"] = time.monotonic()
        with self._cutting:
            # Once the main thread has left this iteration, what there is to cut belongs to the next one.
            if 0 <= self._inside <= iteration:
                self._spare.free()
                self._groups.cut()
        if first:
            self._stamps["aborted"] = time.monotonic()
            self._stillness.restart()
            self._begin_abort(iteration)
        if self._interrupter.interrupt(REPEAT_INTERVAL):
            return True
        if self._stillness.lasted(self._interrupter.handled) >= STUCK_AFTER and not self._interrupter.in_atomic:
            self._ask_for_replacement()
        return False

    def _ask_for_replacement(self) -> None:
        # Again while nothing comes of it: an agent that is away just now has not heard it.
        now = time.monotonic()
        if now >= self._ask_for_replacement_at:
            self._ask_for_replacement_at = now + STUCK_AFTER
            log.warning("blocked in a collective that can't be cut free: this process is to be replaced")
            self._session.stuck()


_REFERENCE_ONLY = frozenset(
    {
        "barrier_timeout",
        "completion_timeout",
        "heartbeat_interval",
        "heartbeat_timeout",
        "last_call_wait",
        "monitor_process_interval",
        "monitor_process_logfile",
        "monitor_thread_interval",
        "progress_watchdog_interval",
        "store_factory",
        "store_kwargs",
    }
)


def _check_reference_only(given: Mapping[str, object]) -> None:
    for name in given:
        if name not in _REFERENCE_ONLY:
            known = [*inspect.signature(Wrapper.__init__).parameters, *_REFERENCE_ONLY]
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {nearest[0]}?" if nearest else ""
            raise TypeError(f"Wrapper has no argument {name!r}{hint}")
    if given:
        log.info("Wrapper has no use for %s", ", ".join(sorted(given)))


def _check_no_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        raise RestartError(
            "a process group is initialised already, and a restart could not make it anew: "
            "call init_process_group() inside the wrapped function"
        )


def _report_shards_failure(error: Exception) -> None:
    """Tells the coordinator what ended this iteration, if shards are open: it decides about them by it."""
    sharding = sys.modules.get("seamark.sharding")
    if sharding is not None:
        with suppress(Exception):
            sharding.report_exception(error)


class _Parameter(NamedTuple):
    """The wrapped function's own parameter for the call's handle, which its callers don't see."""

    name: str
    position: int
    """Among those that can be given without their name; beyond all of them where it can't."""


def _call_parameter(function: Callable[..., Any]) -> _Parameter | None:
    """The parameter annotated ``CallWrapper`` (or ``CallWrapper | None``)."""
    try:
        hints: dict[str, Any] = typing.get_type_hints(function)
    except NameError:
        # An annotation that only a type checker can resolve: go by the names as written.
        hints = inspect.get_annotations(function)
    for position, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        hint = hints.get(name)
        if hint is CallWrapper or CallWrapper in typing.get_args(hint) or "CallWrapper" in str(hint).split("."):
            named_only = parameter.kind is inspect.Parameter.KEYWORD_ONLY
            return _Parameter(name, sys.maxsize if named_only else position)
    return None


def _placed(
    parameter: _Parameter | None, call: CallWrapper | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the call among them."""
    if parameter is None:
        return args, dict(kwargs)
    if parameter.position < len(args):
        return (*args[: parameter.position], call, *args[parameter.position :]), dict(kwargs)
    return args, {**kwargs, parameter.name: call}


def _check_arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """A call that can't be made would fail, and be restarted, again and again."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        hint = "the CallWrapper goes to the parameter that is annotated with it, as in train(call: seamark.CallWrapper)"
        raise TypeError(f"{getattr(function, '__qualname__', function)}: {error}: {hint}") from None
