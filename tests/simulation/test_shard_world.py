"""Every shard is done exactly once, whatever dies: schedules of workers, zombies, a network and a coordinator."""

from __future__ import annotations

import os

import pytest
from shard_world import World

SEEDS = int(os.environ.get("SEAMARK_SEEDS", "300"))
FIRST = int(os.environ.get("SEAMARK_SEED", "0"))


@pytest.mark.parametrize("block", range(10))
def test_every_shard_is_terminal_exactly_once(block: int) -> None:
    """One seed: ``SEAMARK_SEED=17 SEAMARK_SEEDS=1``; ten thousand: ``SEAMARK_SEEDS=10000``."""
    for seed in range(FIRST + block, FIRST + SEEDS, 10):
        try:
            World(seed).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_zombies_were_there_and_were_refused() -> None:
    worlds = [World(seed) for seed in range(60)]
    for world in worlds:
        world.run()
    assert sum(world.zombies_refused for world in worlds) > 0
    assert sum(world.epoch for world in worlds) > len(worlds)
    assert max(world.deepest for world in worlds) == 3
