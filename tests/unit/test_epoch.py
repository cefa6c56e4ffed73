"""The epoch rises with every start, and is on disk before it is used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from seamarkd.epoch import EpochError, next_epoch


def test_it_rises_with_every_start(tmp_path: Path) -> None:
    assert [next_epoch(tmp_path / "epoch") for _ in range(3)] == [1, 2, 3]
    assert os.listdir(tmp_path) == ["epoch"]


def test_what_was_written_is_on_disk_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def recorded(name: str) -> None:
        original = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            target = args[0]
            kind = "directory" if isinstance(target, int) and os.path.isdir(f"/proc/self/fd/{target}") else "file"
            calls.append(name if name == "rename" else f"{name} {kind}")
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in ("write", "fsync", "rename"):
        recorded(name)
    next_epoch(tmp_path / "epoch")
    assert calls == ["write file", "fsync file", "rename", "fsync directory"]


@pytest.mark.parametrize("content", [b"", b"seven", b"\xff\xfe"])
def test_a_file_without_a_number_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "epoch"
    path.write_bytes(content)
    with pytest.raises(EpochError, match=str(path)):
        next_epoch(path)
    assert path.read_bytes() == content
