"""pytest tests/test_budget.py: what is chosen for many inputs keeps every limit and costs hardly more than the best."""
from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbedge.quant.budget import cheapest, sum_of


def example(seed: int, inputs: int, choices: int, limits: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses [inputs, choices] and sizes [limits, inputs, choices]; choice 0 is the smallest, but may be no good."""
    rng = np.random.default_rng(seed)
    sizes = np.sort(rng.integers(1, 100, (limits, inputs, choices)).astype(float), axis=-1)
    losses = rng.exponential(1, (inputs, choices)) * 10.0 ** rng.integers(-6, 2, (inputs, 1))
    return (np.sort(losses, axis=-1)[:, ::-1] if seed % 2 else losses), sizes


def limits_of(sizes: np.ndarray, shares: list[float]) -> np.ndarray:
    """Some way from the least possible to the most."""
    least, most = sizes.min(axis=-1).sum(axis=-1), sizes.max(axis=-1).sum(axis=-1)
    return least + np.array(shares[:len(least)]) * (most - least)


@given(seed=st.integers(0, 10_000), limits=st.integers(1, 2), shares=st.lists(st.floats(0, 1), min_size=2, max_size=2))
@settings(max_examples=60, deadline=None)
def test_it_keeps_the_limits_and_is_nearly_the_best(seed, limits, shares):
    losses, sizes = example(seed, 4, 4, limits)
    bounds = limits_of(sizes, shares)
    found = cheapest(losses, sizes, bounds)
    assert (sum_of(sizes, found) <= bounds * (1 + 1e-8)).all()
    every = [np.array(c) for c in product(range(4), repeat=4)]
    best = min(sum_of(losses, c) for c in every if (sum_of(sizes, c) <= bounds).all())
    # Prices alone leave, of each limit, one input that would take more if only it could be divided.
    assert sum_of(losses, found) <= best + limits * np.ptp(losses, axis=1).max() + 1e-9


@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_with_many_inputs_the_gap_is_small_and_nothing_more_fits(seed, share):
    losses, sizes = example(2 * seed + 1, 60, 2, 1)      # two formats: what a byte budget is about
    bounds = limits_of(sizes, [share])
    found = cheapest(losses, sizes, bounds)
    left = bounds[0] - sum_of(sizes, found)[0]
    better = (losses[:, 1] < losses[:, 0]) & (found == 0)
    assert (sizes[0, better, 1] - sizes[0, better, 0] > left - 1e-6).all()
    worth = (losses[:, 0] - losses[:, 1]) / np.maximum(sizes[0, :, 1] - sizes[0, :, 0], 1e-9)
    greedy, room = np.zeros(60, int), bounds[0] - sizes[0, :, 0].sum()
    for i in np.argsort(-worth):
        if sizes[0, i, 1] - sizes[0, i, 0] <= room:
            greedy[i], room = 1, room - (sizes[0, i, 1] - sizes[0, i, 0])
    assert sum_of(losses, found) <= sum_of(losses, greedy) * 1.05 + 1e-9


def test_room_for_everything_takes_the_best_of_everything():
    losses, sizes = example(0, 8, 5, 2)
    found = cheapest(losses, sizes, sizes.max(axis=-1).sum(axis=-1))
    np.testing.assert_array_equal(losses[np.arange(8), found], losses.min(axis=1))


def test_no_limit_takes_the_best_and_limits_too_low_are_refused():
    losses, sizes = example(1, 8, 5, 1)
    np.testing.assert_array_equal(cheapest(losses, sizes[:0], np.zeros(0)), losses.argmin(axis=1))
    least = sizes.min(axis=-1).sum(axis=-1)
    np.testing.assert_array_equal(sizes[0, np.arange(8), cheapest(losses, sizes, least)], sizes[0].min(axis=-1))
    with pytest.raises(ValueError, match="the smallest choices meet"):
        cheapest(losses, sizes, least - 1)
