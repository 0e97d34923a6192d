"""Where silence costs least: how the share of weights that shall not be read is shared out over all inputs."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

SHARES = np.arange(0, 96) / 100         # of an input's channels, that are considered


class Silence(NamedTuple):
    """What making a share of an input silent takes and costs, for each of SHARES."""

    zones: np.ndarray       # dead zones, times mean|x|
    losses: np.ndarray      # what they take from the outputs: any unit, 0 at share 0


def silence(x: np.ndarray, column_norms: np.ndarray) -> Silence:
    """Of inputs x [n, width] whose channels are read by weights of these norms [width]."""
    size = np.abs(x)
    ratio = size / np.maximum(size.mean(axis=1, keepdims=True), 1e-30)      # so that loud tokens count like any other
    lost, ratio = np.square(ratio * column_norms, dtype=np.float64).ravel(), ratio.ravel()
    order = np.argsort(ratio)
    at = (SHARES * len(order)).astype(int)
    zones = np.where(at > 0, ratio[order[at]], 0.0)
    return Silence(zones, np.concatenate([[0.0], np.cumsum(lost[order])])[at])


def shared_out(losses: np.ndarray, weights: np.ndarray, share: float) -> np.ndarray:
    """For each input an index into SHARES, so that `share` of all weights is silent at the least sum of losses.

    losses [inputs, len(SHARES)], rising; weights [inputs]: how many weights read each. One price for a weight is found
    at which every input, on its own, chooses: no other choice with as much silence costs less.
    """
    gain = weights[:, None] * SHARES
    low, high = 0.0, 1.0
    def chosen(price: float) -> np.ndarray:
        return (losses - price * gain).argmin(axis=1)
    def silent(choice: np.ndarray) -> float:
        return float(gain[np.arange(len(choice)), choice].sum() / weights.sum())
    while silent(chosen(high)) < share and high < 1e30:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if silent(chosen(middle)) >= share else (middle, high)
    return chosen(high)
