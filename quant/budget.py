"""Choosing for many inputs at once: the least sum of losses whose sizes, summed, stay within limits.

Every size has one price, the same for all inputs; at these prices each input chooses on its own. No other choice that
is as small costs less (Lagrange), and what room is left over is filled with what helps most.
"""
from __future__ import annotations

import numpy as np

HALVINGS, DOUBLINGS = 40, 100       # of a price, until it is found
ROUNDING = 1e-9             # of a limit: sums of floats are no closer


def cheapest(losses: np.ndarray, sizes: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """The choice of each input, [inputs].

    losses [inputs, choices], sizes [limits, inputs, choices], limits [limits]. Each input has a choice that is its
    smallest in every size. Raises ValueError if even those are too large.
    """
    limits = limits * (1 + ROUNDING)
    smallest = (sizes / np.maximum(sizes.max(axis=(1, 2), keepdims=True), 1e-300)).sum(axis=0).argmin(axis=1)
    if (sum_of(sizes, smallest) > limits).any():
        raise ValueError("expected limits that the smallest choices meet")
    choice = at_prices(losses, sizes, limits)
    return filled(smallest if choice is None else choice, losses, sizes, limits)


def sum_of(sizes: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """Sizes [..., inputs, choices] of what is chosen, over all inputs: [...]"""
    return sizes[..., np.arange(len(choice)), choice].sum(axis=-1)


def at_prices(losses: np.ndarray, sizes: np.ndarray, limits: np.ndarray) -> np.ndarray | None:
    """What each input chooses at the lowest prices at which all limits hold; None if no price brings that about."""
    if not len(limits):
        return losses.argmin(axis=1)
    size, limit = sizes[-1], limits[-1]

    def chosen(price: float) -> np.ndarray | None:
        """At this price of the last size, and the lowest prices of the others."""
        found = at_prices(losses + price * size, sizes[:-1], limits[:-1])
        return found if found is not None and sum_of(size, found) <= limit else None

    best = chosen(0.0)
    if best is not None:
        return best
    low, high = 0.0, 1e-6 * max(float(np.ptp(losses)), 1e-12) / max(float(size.max()), 1e-12)
    for _ in range(DOUBLINGS):
        best = chosen(high)
        if best is not None:
            break
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = chosen(middle)
        best, low, high = (best, middle, high) if found is None else (found, low, middle)
    return best


def filled(choice: np.ndarray, losses: np.ndarray, sizes: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """`choice`, with whatever still fits and helps most moved to, one input after the other."""
    every = np.arange(len(choice))
    while True:
        room = limits - sum_of(sizes, choice)
        fits = (sizes - sizes[:, every, choice][..., None] <= room[:, None, None]).all(axis=0)
        gain = np.where(fits, losses[every, choice][:, None] - losses, 0)
        at, better = np.unravel_index(gain.argmax(), gain.shape)
        if gain[at, better] <= 0:
            return choice
        choice = np.where(every == at, better, choice)
