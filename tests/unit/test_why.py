"""What ``seamark why`` may be asked about, and what it says of shards."""

from __future__ import annotations

import io

import click
import pytest
from rich.console import Console

from seamark.protocol.messages import ShardDecision
from seamarkd.cli.why import Target, TargetParam, show_decisions


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("infer", Target("infer")),
        ("infer/3", Target("infer", rank=3)),
        ("infer/inputs", Target("infer", dataset="inputs")),
        ("infer/inputs/12", Target("infer", dataset="inputs", shard=12)),
    ],
)
def test_what_may_be_asked_about(text: str, target: Target) -> None:
    assert TargetParam().convert(text, None, None) == target


@pytest.mark.parametrize("text", ["infer/inputs/twelve", "a/b/1/2"])
def test_anything_else_says_what_to_write(text: str) -> None:
    with pytest.raises(click.BadParameter, match="JOB/DATASET/SHARD"):
        TargetParam().convert(text, None, None)


def decision(number: int, shard: int = 1) -> ShardDecision:
    return ShardDecision(
        number, "inputs", shard, 7, "infer/2", "n1", 3, 90.0, "oom", "e", 0.9, "Retry", f"oom {number} of 3\x1b[2J"
    )


def printed(target: Target, decisions: list[ShardDecision]) -> str:
    out = io.StringIO()
    show_decisions(Console(file=out, width=150), target, decisions, 100.0)
    return out.getvalue()


def test_a_decision_names_shard_batch_rank_and_reason() -> None:
    text = printed(Target("infer"), [decision(1)])
    for part in ("10.0 s", "inputs/1 batch 3", "rank 2 on n1", "oom 1 of 3"):
        assert part in text
    assert "\x1b[2J" not in text, "what a script wrote steers no terminal"


def test_of_many_the_latest_are_shown_and_of_one_shard_all() -> None:
    many = [decision(number) for number in range(1, 31)]
    text = printed(Target("infer"), many)
    assert "oom 30 of 3" in text
    assert "oom 10 of 3" not in text
    assert "the last 20 of 30" in text
    assert "oom 1 of 3" in printed(Target("infer", dataset="inputs", shard=1), many)


def test_a_shard_that_never_failed_is_said_to_be_so() -> None:
    assert "never failed" in printed(Target("infer", dataset="inputs", shard=4), [])
    assert printed(Target("infer"), []) == ""
