"""Every row of the table of evidence, with our own signal or another's, with the worker's report or without."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamark.failure_kinds import KINDS
from seamarkd.coordinator.classification import (
    DEFAULT_PATTERNS,
    LINE_EXAMINED,
    MAX_PATTERNS,
    MAX_REGEX,
    SHOWN,
    TEXT_EXAMINED,
    Evidence,
    classify,
    job_patterns,
)

OOM_TEXT = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."
SPOT, OOM, TRANSIENT, TIMEOUT, HARDWARE, UNKNOWN = (
    "spot_preemption",
    "oom",
    "transient",
    "timeout",
    "hardware",
    "unknown",
)

# What is known: the kind if we did not send the signal that ended it, the kind if we did, a word of the sentence.
ROWS: list[tuple[dict[str, Any], str, str, str]] = [
    *(
        row
        for status in (-15, 143)
        for row in (
            ({"status": status, "notice": "spot instance interruption"}, SPOT, UNKNOWN, ""),
            ({"status": status, "node_lost": True}, SPOT, UNKNOWN, ""),
            ({"status": status}, TRANSIENT, UNKNOWN, ""),
            ({"status": status, "text": OOM_TEXT}, TRANSIENT, UNKNOWN, ""),
            ({"status": status, "timed_out": True}, TIMEOUT, TIMEOUT, "past its time"),
        )
    ),
    *(
        row
        for status in (-9, 137)
        for row in (
            ({"status": status, "oom_kill": True}, OOM, OOM, "out-of-memory killer"),
            ({"status": status, "oom_kill": True, "timed_out": True}, OOM, OOM, "out-of-memory killer"),
            ({"status": status, "timed_out": True}, TIMEOUT, TIMEOUT, "past its time"),
            ({"status": status}, TRANSIENT, UNKNOWN, ""),
            ({"status": status, "text": OOM_TEXT}, TRANSIENT, UNKNOWN, ""),
            ({"status": status, "notice": "maintenance"}, SPOT, UNKNOWN, ""),
            ({"status": status, "node_lost": True}, HARDWARE, UNKNOWN, ""),
        )
    ),
    ({"status": 0}, UNKNOWN, UNKNOWN, "without reporting completion"),
    ({"status": 0, "text": OOM_TEXT}, UNKNOWN, UNKNOWN, "without reporting completion"),
    ({"status": 0, "completed": True}, UNKNOWN, UNKNOWN, "after it had reported completion"),
    ({"status": 0, "notice": "maintenance"}, SPOT, UNKNOWN, ""),
    ({"status": 1}, TRANSIENT, TRANSIENT, "exited with code 1"),
    ({"status": 1, "text": "ValueError: no such thing"}, TRANSIENT, TRANSIENT, "exited with code 1"),
    ({"status": 1, "text": OOM_TEXT}, OOM, OOM, "Tried to allocate"),
    ({"status": 1, "oom_kill": True}, OOM, OOM, "out-of-memory killer"),
    *(
        row
        for status in (-11, -6, -7, 139, 134, 135)
        for row in (
            ({"status": status}, TRANSIENT, TRANSIENT, "for the first time"),
            ({"status": status, "repeats": 1}, HARDWARE, HARDWARE, "before (times: 1)"),
            ({"status": status, "repeats": 3, "text": OOM_TEXT}, HARDWARE, HARDWARE, "before (times: 3)"),
        )
    ),
    ({"node_lost": True}, HARDWARE, HARDWARE, "its node was lost"),
    ({"node_lost": True, "notice": "spot instance interruption"}, SPOT, SPOT, "spot instance interruption"),
    ({"timed_out": True}, TIMEOUT, TIMEOUT, "past its time"),
    ({"text": OOM_TEXT}, OOM, OOM, "Tried to allocate"),
    ({}, UNKNOWN, UNKNOWN, "was not seen to end"),
    ({"status": 2}, UNKNOWN, UNKNOWN, "exited with code 2"),
    ({"status": 2, "text": OOM_TEXT}, OOM, OOM, "exited with code 2"),
    ({"status": -4, "repeats": 2}, UNKNOWN, UNKNOWN, "SIGILL"),
    ({"status": -200}, UNKNOWN, UNKNOWN, "signal 200"),
]


@pytest.mark.parametrize(("known", "kind", "kind_if_ours", "word"), ROWS, ids=[str(row[0])[1:70] for row in ROWS])
@pytest.mark.parametrize("reported", ["", *KINDS])
@pytest.mark.parametrize("ours", [False, True])
def test_every_row(known: dict[str, Any], kind: str, kind_if_ours: str, word: str, reported: str, ours: bool) -> None:
    verdict = classify(Evidence(**known, reported=reported, ours=ours))
    if reported:
        # The worker's own report is stronger than anything else.
        assert (verdict.kind, verdict.confidence) == (reported, 0.95)
        assert reported in verdict.evidence
    else:
        assert verdict.kind == (kind_if_ours if ours else kind)
        assert word in verdict.evidence


def test_no_default_of_the_table_is_missing() -> None:
    assert {kind for row in ROWS for kind in row[1:3]} == set(KINDS) - {"poison_input"}


def test_a_report_of_no_kind_counts_as_none() -> None:
    assert classify(Evidence(reported="OOM", status=-9)).kind == "transient"


@pytest.mark.parametrize(
    ("evidence", "sentence"),
    [
        (
            Evidence(
                reported="poison_input", batch=17, reported_text="ValueError: NaN in sample\n  File ...", status=1
            ),
            "the worker reported poison_input at batch 17: ValueError: NaN in sample",
        ),
        (
            Evidence(status=-9),
            "it was killed by SIGKILL: we did not send it, and the out-of-memory killer was not at work",
        ),
        (Evidence(status=143), "it exited with code 143: we did not send it, and no notice came"),
        (
            Evidence(status=-15, ours=True),
            "it was killed by SIGTERM, which we sent for a reason of our own",
        ),
        (
            Evidence(status=-15, notice="maintenance of rack 3"),
            "its node is taken away (maintenance of rack 3); it was killed by SIGTERM",
        ),
        (Evidence(status=-11, repeats=2), "it was killed by SIGSEGV, as happened on this node before (times: 2)"),
        (Evidence(status=1, text=f"a\n{OOM_TEXT}\nb"), f"it said {OOM_TEXT!r}; it exited with code 1"),
        (
            Evidence(status=1, reported_text="KeyError: 'x'"),
            "it exited with code 1, and nothing it said tells more: KeyError: 'x'",
        ),
        (
            Evidence(reported="oom", reported_text="Traceback (most recent call last):\n  File x\nMemoryError: 8 GB\n"),
            "the worker reported oom: MemoryError: 8 GB",
        ),
        (Evidence(status=7), "it exited with code 7, and nothing tells why"),
    ],
)
def test_the_sentence_says_what_was_believed_and_why(evidence: Evidence, sentence: str) -> None:
    assert classify(evidence).evidence == sentence


def test_stronger_evidence_is_trusted_more() -> None:
    steps = [
        Evidence(status=1),
        Evidence(status=1, text=OOM_TEXT),
        Evidence(status=-11),
        Evidence(status=1, oom_kill=True),
        Evidence(status=1, reported="transient"),
    ]
    trust = [classify(evidence).confidence for evidence in steps]
    assert trust == sorted(set(trust))


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("CUDA out of memory", OOM),
        ("[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB", OOM),
        ("torch.cuda.OutOfMemoryError: HIP out of memory.", OOM),
        ("RuntimeError: CUDA error: out of memory", OOM),
        ("MemoryError", OOM),
        ("[rank3]: MemoryError: cannot grow", OOM),
        ("numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.28 TiB", OOM),
        ("OSError: [Errno 12] Cannot allocate memory", OOM),
        ("torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", HARDWARE),
        ("[ 12.3] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.", HARDWARE),
        ("RuntimeError: No CUDA GPUs are available: no CUDA-capable device is detected", HARDWARE),
        ("slurmstepd: error: *** STEP 8.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO PREEMPTION ***", SPOT),
        ("slurmstepd: error: *** JOB 8 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***", TIMEOUT),
        ("torch.distributed.DistBackendError: NCCL error in: x.cpp:1, remote process exited", TRANSIENT),
        ("torch.distributed.DistNetworkError: failed to recv", TRANSIENT),
        ("RuntimeError: [pair.cc:534] Connection closed by peer [127.0.0.1]:1", TRANSIENT),
        ("zoom", UNKNOWN),
        ("boom: the room has no broom", UNKNOWN),
        ("NotCUDA out of memoryless", UNKNOWN),
        ("mytorch.OutOfMemoryError", UNKNOWN),
        ("class MyMemoryError(Exception)", UNKNOWN),
        ("x.slurmstepd: error: DUE TO PREEMPTIONS", UNKNOWN),
        ("Xid", UNKNOWN),
        ("", UNKNOWN),
    ],
)
@pytest.mark.parametrize("field", ["text", "reported_text"])
def test_text_is_matched_at_whole_words(field: str, line: str, kind: str) -> None:
    assert classify(Evidence(status=3, **{field: line})).kind == kind
    assert classify(Evidence(status=3, **{field: f"first\n{line}\nlast"})).kind == kind


def test_a_job_s_own_patterns_go_first_in_their_order() -> None:
    patterns = job_patterns([(r"^OUR-(7|8):", "hardware"), (r"OUR-8", "poison_input"), (r"out of memory", "transient")])
    assert patterns[3:] == DEFAULT_PATTERNS
    said = {"OUR-7: fan": HARDWARE, "OUR-8: fan": HARDWARE, "an OUR-8": "poison_input", OOM_TEXT: TRANSIENT}
    said["MemoryError"] = OOM
    for line, kind in said.items():
        assert classify(Evidence(status=1, text=line), patterns).kind == kind
        assert classify(Evidence(status=1, text=line), ()).kind == TRANSIENT


def test_the_first_pattern_decides_wherever_it_is_found_and_the_last_line_of_it_is_quoted() -> None:
    patterns = job_patterns([("fan", "hardware"), ("heat", "transient")])
    verdict = classify(Evidence(status=1, text="fan 1\nfan 2\nheat", reported_text="fan 0\nheat"), patterns)
    assert (verdict.kind, verdict.evidence) == (HARDWARE, "it said 'fan 2'; it exited with code 1")


@pytest.mark.parametrize(
    ("regex", "kind", "why"),
    [
        ("boom", "OOM", "'OOM' is no kind of failure; there are spot_preemption, poison_input, oom, "),
        ("(boom", "oom", "'(boom' is no regular expression: missing ), unterminated subpattern at position 0"),
        ("a{99999999999}", "oom", "is no regular expression: "),
        ("x" * (MAX_REGEX + 1), "oom", f"has {MAX_REGEX + 1} characters; {MAX_REGEX} are allowed"),
        ("x" * 1_000_000, "oom", f"has 1000000 characters; {MAX_REGEX} are allowed"),
        ("", "oom", "is found in an empty line"),
        ("x*", "oom", "is found in an empty line"),
        ("(a+)+b", "oom", "a search could take for ever"),
        ("(a|ab)*b", "oom", "a search could take for ever"),
        ("(?:x+x+)+y", "oom", "a search could take for ever"),
        ("(?=(a+)+)x", "oom", "a search could take for ever"),
        ("(a)(?(1)(b+)+|c)x", "oom", "a search could take for ever"),
        ("(?:c|(?:a+)+)x", "oom", "a search could take for ever"),
        ("=+.*=+.*failed", "oom", "a search could take for ever"),
        ("a?" * 30 + "a" * 30, "oom", "a search could take for ever"),
    ],
    ids=lambda value: value[:20],
)
def test_a_pattern_that_can_t_be_used_is_refused_in_one_sentence(regex: str, kind: str, why: str) -> None:
    with pytest.raises(ValueError, match=r"^failure_patterns\[1\]\.(regex|kind): ") as raised:
        job_patterns([("fine", "oom"), (regex, kind)])
    assert why in str(raised.value)
    assert len(str(raised.value)) < 500
    assert "\n" not in str(raised.value)


def test_of_several_mistakes_each_is_named_with_the_number_of_its_pattern() -> None:
    with pytest.raises(ValueError, match="failure_patterns") as raised:
        job_patterns([("(boom", "OOM"), ("fine", "oom"), ("x*", "oom")])
    assert [line.split(": ")[0] for line in str(raised.value).splitlines()] == [
        "failure_patterns[0].kind",
        "failure_patterns[0].regex",
        "failure_patterns[2].regex",
    ]


@pytest.mark.parametrize(
    "regex",
    [
        r"node .* failed with .* code \d{1,3}",
        "(foo|bar): [0-9]+",
        r"(\d{1,3}\.){3}\d{1,3}",
        r"(?i)^\[ours\] .+",
        r"^OURLIB: disk \d{1,3} is full$",
        r"\bcorrupt record\b",
    ],
)
def test_an_ordinary_pattern_is_taken(regex: str) -> None:
    assert job_patterns([(regex, "hardware")])[0].regex.pattern == regex


def test_the_number_of_patterns_is_limited() -> None:
    assert len(job_patterns([("x", "oom")] * MAX_PATTERNS)) == MAX_PATTERNS + len(DEFAULT_PATTERNS)
    with pytest.raises(ValueError, match=f"may have {MAX_PATTERNS} failure patterns, not {MAX_PATTERNS + 1}"):
        job_patterns([("x", "oom")] * (MAX_PATTERNS + 1))


def test_only_both_ends_of_a_text_and_the_beginnings_of_lines_are_examined() -> None:
    filler = "x\n" * TEXT_EXAMINED
    for text, kind in {
        OOM_TEXT + "\n" + filler: OOM,
        filler + OOM_TEXT: OOM,
        filler + OOM_TEXT + "\n" + filler: UNKNOWN,
        "x" * (LINE_EXAMINED - 19) + " CUDA out of memory": OOM,
        "x" * (LINE_EXAMINED - 18) + " CUDA out of memory": UNKNOWN,
    }.items():
        assert classify(Evidence(status=3, text=text)).kind == kind


# Each takes its time on one of these texts; none may take for ever.
@pytest.mark.timeout(60)
@pytest.mark.parametrize("regex", ["a.*a.*x", "[a=]*.*?x", "a?" * 12 + "b", "(a{1,3}){3}a{1,99}a{1,20}b"])
def test_the_slowest_patterns_that_are_taken_come_to_an_end(regex: str) -> None:
    (own, *_) = job_patterns([(regex, "oom")])
    for line in ("a" * LINE_EXAMINED, "=" * LINE_EXAMINED, "a" * 1_000_000):
        assert classify(Evidence(status=3, text=f"{line}\n" * 50, reported_text=line * 9), [own]).kind == UNKNOWN


evidences = st.builds(
    Evidence,
    reported=st.sampled_from(["", *KINDS]) | st.text(max_size=5),
    reported_text=st.text(max_size=20),
    batch=st.none() | st.integers(0, 9),
    oom_kill=st.booleans(),
    notice=st.just("") | st.text(max_size=20),
    node_lost=st.booleans(),
    ours=st.booleans(),
    status=st.none() | st.integers(-70, 260) | st.sampled_from([-15, 143, -9, 137, -11, -6, -7, 0, 1]),
    completed=st.booleans(),
    text=st.text(max_size=20) | st.just(OOM_TEXT),
    repeats=st.integers(0, 2),
    timed_out=st.booleans(),
)


@given(evidences)
def test_there_is_always_a_verdict_with_a_sentence(evidence: Evidence) -> None:
    verdict = classify(evidence)
    assert verdict.kind in KINDS
    assert 0.0 <= verdict.confidence <= 1.0
    assert verdict.evidence.isprintable()
    assert len(verdict.evidence) < 3 * SHOWN


@given(evidences)
def test_poison_is_believed_of_the_worker_alone(evidence: Evidence) -> None:
    assert (classify(evidence).kind == "poison_input") == (evidence.reported == "poison_input")


@given(evidences)
def test_a_signal_of_ours_is_never_a_preemption(evidence: Evidence) -> None:
    verdict = classify(evidence)
    if evidence.ours and evidence.status is not None and evidence.reported not in KINDS:
        assert verdict.kind != "spot_preemption"
