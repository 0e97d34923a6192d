"""What the silence of an input costs its outputs."""
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

