"""How often something was not taken, and when last."""

from __future__ import annotations

import pytest

from seamarkd import tally
from seamarkd.tally import Tally, ages, counts


def test_each_count_knows_when_it_rose_last(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 10.0
    monkeypatch.setattr(tally.time, "monotonic", lambda: clock)
    first, second = Tally(), Tally()
    first["header"] += 1
    clock = 12.0
    first["size"] += 1
    second["header"] += 2
    assert counts([first, second]) == {"header": 3, "size": 1}
    assert ages(15.0, [first, second]) == {"header": 3.0, "size": 3.0}
    assert ages(15.0, [first]) == {"header": 5.0, "size": 3.0}
