"""The shuffle: each sample once, the same whoever computes which part, and mixed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamark.shuffle import shuffled

SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 999_999)


@given(size=st.integers(0, 3_000), seed=SEEDS, epoch=EPOCHS)
def test_each_sample_is_there_once(size: int, seed: int, epoch: int) -> None:
    found = shuffled(0, size, size, seed, epoch)
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == list(range(size))


@given(size=st.integers(1, 3_000), seed=SEEDS, epoch=EPOCHS, data=st.data())
def test_a_part_is_a_part_of_the_whole(size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    part = shuffled(start, stop, size, seed, epoch)
    assert part.tolist() == shuffled(0, size, size, seed, epoch)[start:stop].tolist()


@given(start=st.integers(0, 2**60 - 100), seed=SEEDS)
def test_parts_of_the_largest_data_set_are_within_it_and_differ(start: int, seed: int) -> None:
    found = shuffled(start, start + 100, 2**60, seed, 0)
    assert len(set(found.tolist())) == 100
    assert int(found.min()) >= 0
    assert int(found.max()) < 2**60


@given(seed=SEEDS, other=SEEDS, epoch=EPOCHS, later=EPOCHS)
def test_another_seed_or_epoch_gives_another_order(seed: int, other: int, epoch: int, later: int) -> None:
    order = shuffled(0, 500, 500, seed, epoch).tolist()
    if seed != other:
        assert shuffled(0, 500, 500, other, epoch).tolist() != order
    if epoch != later:
        assert shuffled(0, 500, 500, seed, later).tolist() != order
    assert shuffled(0, 500, 500, seed, epoch).tolist() == order


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("size", [1_000, 4_096, 100_000])
def test_it_looks_mixed(size: int, seed: int) -> None:
    """Bounds of five standard deviations of what a random permutation has."""
    found = shuffled(0, size, size, seed, 0)
    places = np.arange(size)
    assert abs(np.corrcoef(places, found)[0, 1]) < 5 / np.sqrt(size), "no trend"
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 5 / np.sqrt(size), "neighbours say nothing of each other"
    assert np.count_nonzero(found == places) < 8, "one stays where it is on average"
    assert np.count_nonzero(np.abs(np.diff(found)) == 1) < 12, "two neighbours stay together on average"
    tenths = np.histogram2d(places, found, bins=10)[0]
    expected = size / 100
    assert ((tenths - expected) ** 2 / expected).sum() < 81 + 5 * np.sqrt(2 * 81), "each tenth goes everywhere"


def test_epochs_of_a_seed_are_not_shifts_of_each_other() -> None:
    orders = np.stack([shuffled(0, 4_096, 4_096, 1, epoch) for epoch in range(12)])
    correlations = np.corrcoef(orders)[np.triu_indices(12, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(4_096)
