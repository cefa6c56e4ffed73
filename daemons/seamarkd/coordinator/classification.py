"""What kind of failure this was, from what is known of it: strongest evidence first (docs/retries.md).

Pure. What is done about each kind is in ``retry.py``. In this order, and the first that says something decides:

=====================  ======================================================================================
the worker's report    its kind
the agent's facts      the out-of-memory killer; the attempt's time; a preemption notice; a node that is lost
how the process ended  15 and 143, 9 and 137, 0, 6, 7 and 11: each as ``_by_exit`` says
text                   the patterns, the job's own before the default ones
what is left           exit code 1: transient; anything else: unknown
=====================  ======================================================================================
"""

from __future__ import annotations

import importlib
import math
import re
import signal
from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Struct

from seamark.failure_kinds import KINDS, MESSAGES, Kind, is_kind

TEXT_EXAMINED = 4_096
"""Characters of a text that patterns are tried on: half from its beginning, half from its end."""
LINE_EXAMINED = 200
"""Characters of each line that patterns are tried on, from its beginning."""
MAX_PATTERNS = 16
"""Patterns that a job may bring along."""
MAX_REGEX = 200
"""Characters of such a pattern."""
MAX_WAYS = 17.0
"""Logarithm of the ways through a line: two repeats without a limit. Python's search knows no time limit."""
SHOWN = 200
"""Characters of a text that a sentence quotes."""

REPORTED, FACT, EXIT, TEXT, DEFAULT = 0.95, 0.9, 0.7, 0.6, 0.3
"""Confidence in each sort of evidence: an order, not a frequency."""

SIGNALS = frozenset({signal.SIGTERM, signal.SIGKILL, signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV})
"""Also read out of 128 plus their number, as a shell between worker and agent passes them on."""
CRASHES = frozenset({signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV})


class Evidence(Struct, frozen=True, kw_only=True):
    """What is known of one failure; every default means that nothing was seen."""

    reported: str = ""
    """The kind that the worker itself reported; what is no kind counts as no report."""
    reported_text: str = ""
    batch: int | None = None
    """The batch that the worker was at."""
    oom_kill: bool = False
    """The counter ``oom_kill`` in the worker's cgroup's ``memory.events`` rose."""
    notice: str = ""
    """The preemption notice, or why the node drains."""
    node_lost: bool = False
    ours: bool = False
    """We sent the signal that ended it, for a reason of our own: its time, a stop. An agent that passes a notice on to
    its workers (D12) has no reason of its own, and the system that takes the host away would have sent the same."""
    status: int | None = None
    """The exit code, or minus the signal's number; None where the process lives or nobody saw its end."""
    completed: bool = False
    """A completion report came before its end."""
    text: str = ""
    """A traceback, or the end of the log."""
    repeats: int = 0
    """How often a process ended by such a signal on this node before."""
    timed_out: bool = False
    """The attempt ran past its time, or was ended because it hung."""


class Verdict(Struct, frozen=True):
    """What is believed. ``evidence`` is a sentence for people: what was believed, and why."""

    kind: Kind
    evidence: str
    confidence: float


class Pattern(Struct, frozen=True):
    """Text in which a line that ``regex`` finds something in means ``kind``."""

    regex: re.Pattern[str]
    kind: Kind


_DEFAULTS: tuple[tuple[str, Kind], ...] = (
    (r"\bNVRM: Xid\b", "hardware"),
    (r"\bGPU has fallen off the bus\b", "hardware"),
    *MESSAGES,
    (r"\btorch\.(cuda\.)?OutOfMemoryError\b", "oom"),
    (r"(^|: )MemoryError\b", "oom"),
    (r"\b_ArrayMemoryError\b", "oom"),
    (r"^slurmstepd: error: .* DUE TO PREEMPTION\b", "spot_preemption"),
    (r"^slurmstepd: error: .* DUE TO TIME LIMIT\b", "timeout"),
    (r"\btorch\.distributed\.Dist\w{1,30}Error\b", "transient"),
)
DEFAULT_PATTERNS: tuple[Pattern, ...] = tuple(Pattern(re.compile(regex), kind) for regex, kind in _DEFAULTS)


def classify(evidence: Evidence, patterns: Sequence[Pattern] = DEFAULT_PATTERNS) -> Verdict:
    """The kind of a failure.

    Args:
        evidence: what is known of it.
        patterns: tried in this order on what it said (``job_patterns`` makes those of a job).

    Returns:
        The kind, why, and how far to trust it from 0 to 1.
    """
    return (
        _by_report(evidence)
        or _by_facts(evidence)
        or _by_exit(evidence)
        or _by_text(evidence, patterns)
        or _by_default(evidence)
    )


def job_patterns(registered: Iterable[tuple[str, str]]) -> tuple[Pattern, ...]:
    """The patterns of a job: its own, then the default ones.

    A regular expression is searched for in each line apart, so that ``^`` and ``$`` are a line's ends.

    Args:
        registered: (regular expression, kind).

    Raises:
        ValueError: a line for each mistake, with the number of its pattern (from 0), that says what to write.
    """
    registered = list(registered)
    if len(registered) > MAX_PATTERNS:
        raise ValueError(f"a job may have {MAX_PATTERNS} failure patterns, not {len(registered)}: join some with |")
    patterns: list[Pattern] = []
    problems: list[str] = []
    for number, (regex, kind) in enumerate(registered):
        at = f"failure_patterns[{number}]"
        if not is_kind(kind):
            problems.append(f"{at}.kind: {kind[:SHOWN]!r} is no kind of failure; there are {', '.join(KINDS)}")
        try:
            patterns.append(Pattern(_compiled(regex), kind))  # type: ignore[arg-type]
        except ValueError as error:
            problems.append(f"{at}.regex: {regex[:SHOWN]!r} {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return (*patterns, *DEFAULT_PATTERNS)


def _compiled(regex: str) -> re.Pattern[str]:
    if len(regex) > MAX_REGEX:
        raise ValueError(f"... has {len(regex)} characters; {MAX_REGEX} are allowed")
    try:
        compiled = re.compile(regex)
        tree = _parser.parse(regex)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is no regular expression: {error}") from error
    if compiled.search(""):
        raise ValueError("is found in an empty line, and so in every text; write what has to be there")
    if _ways(tree) > MAX_WAYS:
        raise ValueError(
            "has so many ways through its repeats and alternatives that a search could take for ever; "
            "write fewer of them, with limits such as [0-9]{1,9}, and none within a repeat"
        )
    return compiled


_parser: Any = importlib.import_module("re._parser")


def _ways(tree: Any) -> float:
    """The logarithm of the number of ways in which a backtracking search can go through a line at most."""
    total = 0.0
    for operator, argument in tree:
        name = str(operator)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, body = argument
            most = min(int(most), LINE_EXAMINED)
            total += math.log2(max(1, most - least + 1)) + most * _ways(body)
        elif name == "BRANCH":
            branches = argument[1]
            total += math.log2(len(branches)) + max(map(_ways, branches))
        else:
            parts = argument if isinstance(argument, tuple) else (argument,)
            total += sum(_ways(part) for part in parts if isinstance(part, _parser.SubPattern))
    return total


def _by_report(evidence: Evidence) -> Verdict | None:
    if not is_kind(evidence.reported):
        return None
    at = "" if evidence.batch is None else f" at batch {evidence.batch}"
    return Verdict(evidence.reported, f"the worker reported {evidence.reported}{at}{_quoted(evidence)}", REPORTED)


def _by_facts(evidence: Evidence) -> Verdict | None:
    end = _end(evidence.status)
    if evidence.oom_kill:
        return Verdict("oom", f"the out-of-memory killer was at work in its cgroup; it {end}", FACT)
    if evidence.timed_out:
        return Verdict("timeout", f"it ran past its time; it {end}", FACT)
    if evidence.ours and evidence.status is not None:
        return None
    if evidence.notice:
        return Verdict("spot_preemption", f"its node is taken away ({_line(evidence.notice)}); it {end}", FACT)
    if evidence.node_lost and _signal(evidence.status) == signal.SIGTERM:
        return Verdict("spot_preemption", f"it {end} and its whole node went", FACT)
    if evidence.node_lost:
        return Verdict("hardware", f"its node was lost; it {end}", FACT)
    return None


def _by_exit(evidence: Evidence) -> Verdict | None:
    signum, end = _signal(evidence.status), _end(evidence.status)
    if signum in (signal.SIGTERM, signal.SIGKILL):
        if evidence.ours:
            return Verdict("unknown", f"it {end}, which we sent for a reason of our own", EXIT)
        unexplained = "we did not send it, and no notice came" if signum == signal.SIGTERM else "we did not send it"
        if signum == signal.SIGKILL:
            unexplained += ", and the out-of-memory killer was not at work"
        return Verdict("transient", f"it {end}: {unexplained}", EXIT)
    if evidence.status == 0:
        reported = "after it had reported completion" if evidence.completed else "without reporting completion"
        return Verdict("unknown", f"it {end} {reported}", EXIT)
    if signum in CRASHES:
        if evidence.repeats > 0:
            return Verdict("hardware", f"it {end}, as happened on this node before (times: {evidence.repeats})", EXIT)
        return Verdict("transient", f"it {end}, for the first time on this node", EXIT)
    return None


def _by_text(evidence: Evidence, patterns: Sequence[Pattern]) -> Verdict | None:
    texts = [examined for text in (evidence.reported_text, evidence.text) for examined in _examined(text)]
    lines = [line[:LINE_EXAMINED] for text in texts for line in text.splitlines()]
    for pattern in patterns:
        for line in reversed(lines):
            if pattern.regex.search(line):
                return Verdict(pattern.kind, f"it said {_line(line)!r}; it {_end(evidence.status)}", TEXT)
    return None


def _by_default(evidence: Evidence) -> Verdict:
    end = _end(evidence.status)
    if evidence.status == 1:
        return Verdict("transient", f"it {end}, and nothing it said tells more{_quoted(evidence)}", DEFAULT)
    return Verdict("unknown", f"it {end}, and nothing tells why{_quoted(evidence)}", DEFAULT)


def _signal(status: int | None) -> int:
    """The signal that ended it, also where a shell made 128 plus its number of it; 0 if none."""
    if status is None:
        return 0
    if status < 0:
        return -status
    return status - 128 if status - 128 in SIGNALS else 0


def _end(status: int | None) -> str:
    if status is None:
        return "was not seen to end"
    if status >= 0:
        return f"exited with code {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def _quoted(evidence: Evidence) -> str:
    text = evidence.reported_text.strip()
    # Of a traceback the last line says what was raised.
    said = _line(text.rpartition("\n")[2] if text.startswith("Traceback (") else text)
    return f": {said}" if said else ""


def _line(text: str) -> str:
    """The first line of a text that came from elsewhere, fit to be shown."""
    first = text[:TEXT_EXAMINED].strip().partition("\n")[0]
    return "".join(character if character.isprintable() else " " for character in first[:SHOWN])


def _examined(text: str) -> tuple[str, ...]:
    half = TEXT_EXAMINED // 2
    return (text,) if len(text) <= TEXT_EXAMINED else (text[:half], text[-half:])
