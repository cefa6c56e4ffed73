"""Shards through a DataLoader: what the trainers have acknowledged is each sample once, whatever dies."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from standalone import Standalone, standalone, wait_for

pytestmark = [pytest.mark.integration]

SCRIPT = Path(__file__).parent / "train_shards.py"
TWO = ("--nproc-per-node", "2")


def run_of(home: Path, *arguments: str, options: tuple[str, ...] = ("--independent",)) -> Any:
    out = ("--out", str(home / "out"))
    return standalone(home, *TWO, *options, script=SCRIPT, arguments=(*out, *arguments))


def said(run: Standalone, event: str) -> list[dict[str, Any]]:
    return [report for rank in range(2) for report in run.reports(rank) if report["event"] == event]


def trained(run: Standalone) -> Counter[int]:
    """How often each sample was acknowledged."""
    return Counter(sample for report in said(run, "done") for sample in report["indices"])


def holds(run: Standalone) -> dict[str, Any]:
    def found() -> dict[str, Any] | None:
        run.check_alive()
        return run.latest(1, "holds")

    return wait_for("rank 1 to hold a batch", found)


def test_a_rank_is_killed_with_a_batch_that_it_has_not_acknowledged(tmp_path: Path) -> None:
    with run_of(tmp_path, "--hold-at", "6") as run:
        held = holds(run)
        psutil.Process(held["pid"]).kill()
        assert run.finish() == 0, run.text() + run.logs()
        assert trained(run) == Counter(range(120))
        after = [report for report in said(run, "done") if report["indices"] == held["indices"]]
        assert [report["pid"] == held["pid"] for report in after] == [False], "it was read anew, and trained on once"
        assert {report["passes"] for report in said(run, "end")} == {1}
        assert [report["left"] for report in said(run, "end")] == [0, 0], "another pass has nothing"
        (incident,) = run.incidents()
        assert (incident["closed"], list(incident["started"])) == (True, ["job/1"]), "its own, with what it cost"


def test_a_worker_of_the_dataloader_is_killed(tmp_path: Path) -> None:
    with run_of(tmp_path, "--hold-at", "6") as run:
        held = holds(run)
        rank = psutil.Process(held["pid"])
        children = rank.children()
        assert len(children) >= 2
        children[0].kill()
        # DataLoader tells the trainer by an exception in its signal handler.
        assert run.finish() == 0, run.text() + run.logs()
        assert trained(run) == Counter(range(120))
        assert "DataLoader worker" in run.logs()


def test_passes_that_are_broken_off_with_workers_that_stay(tmp_path: Path) -> None:
    with run_of(tmp_path, "--break-every", "5", "--epochs", "2") as run:
        assert run.finish() == 0, run.text() + run.logs()
        assert trained(run) == Counter(dict.fromkeys(range(120), 2))
        assert max(report["passes"] for report in said(run, "end")) > 1


def test_an_exception_restarts_all_in_process_and_is_known_by_type_and_batch(tmp_path: Path) -> None:
    with run_of(tmp_path, "--wrapped", "--raise-at", "6", options=()) as run:
        assert run.finish() == 0, run.text() + run.logs()
        assert trained(run) == Counter(range(120))
        (raised,) = said(run, "raises")
        assert len({report["pid"] for report in said(run, "done")}) == 2, "no process was replaced"
        (decision,) = run.why()["decisions"]
        assert (decision["shard"], decision["batch"]) == (raised["shard"], raised["batch"])
        assert (decision["kind"], decision["action"]) == ("poison_input", "Retry")


def test_who_is_told_that_its_host_goes_away_ends_and_does_not_restart_in_process(tmp_path: Path) -> None:
    with run_of(tmp_path, "--wrapped", "--leave-at", "6", options=()) as run:
        assert run.finish() == 0, run.text() + run.logs()
        assert trained(run) == Counter(range(120))
        assert len({report["pid"] for report in run.reports(1)}) == 2
        (failure,) = run.why()["incidents"][0]["failures"]
        assert (failure["kind"], failure["cause"]["kind"], failure["cause"]["status"]) == ("lost", "exit", 143)


def test_a_sample_that_can_t_be_read_is_left_out_with_its_batch(tmp_path: Path) -> None:
    with run_of(tmp_path, "--poison", "57") as run:
        run.finish()
        missing = set(range(120)) - set(trained(run))
        assert 57 in missing
        assert len(missing) <= 4
        assert set(trained(run).values()) == {1}
        assert [(one["kind"], one["action"]) for one in run.why()["decisions"]] == [
            ("poison_input", "Retry"),
            ("poison_input", "Quarantine"),
        ]
