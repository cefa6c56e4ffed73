"""The counter of what the kernel ended for want of memory: found for both versions of cgroups, and compared."""

from __future__ import annotations

from pathlib import Path

from seamarkd.agent.oom import OomKills, own_counter


def test_version_2_has_one_hierarchy(tmp_path: Path) -> None:
    file = tmp_path / "system.slice/seamark.service/memory.events"
    file.parent.mkdir(parents=True)
    file.write_text("low 0\noom 1\noom_kill 1\noom_group_kill 0\n")
    found = own_counter("0::/system.slice/seamark.service\n", tmp_path)
    assert found == file
    counter = OomKills(found)
    assert not counter.rose(), "what was before is nobody's of now"
    file.write_text("oom_kill 2\n")
    assert counter.rose()
    assert not counter.rose(), "once each"


def test_version_1_has_one_for_memory(tmp_path: Path) -> None:
    file = tmp_path / "memory/job_7/memory.oom_control"
    file.parent.mkdir(parents=True)
    file.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 4\n")
    cgroup = "5:cpu,cpuacct:/job_7\n4:memory:/job_7\n1:name=systemd:/x\n"
    assert own_counter(cgroup, tmp_path) == file


def test_without_a_counter_nothing_rises(tmp_path: Path) -> None:
    assert own_counter("0::/\n", tmp_path) is None
    assert not OomKills(None).rose()
    assert not OomKills(tmp_path / "gone").rose()
