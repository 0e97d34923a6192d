"""Spike counts to spike trains and back (report section 3.3): what an event-driven machine sees of an activation.

A count s becomes T time steps whose spikes, weighed by their step, add up to it again: s = sum_t weight_t * spike_t.

    code                        spikes      T                               weight_t
    binary      (s >= 0)        0, 1        the largest s                   1
    ternary                     -1, 0, 1    the largest |s|                 1
    unsigned    (s >= 0)        0, 1        bits of the largest s           2^(T-1-t)
    bidirectional               -1, 0, 1    bits of the largest |s|         2^(T-1-t)
    twos_complement             0, 1        bits of the largest |s|, and 1  2^(T-1-t), that of the sign step -2^(T-1)

The last three are the bitwise codes, most significant step first. T is shared by all counts of an array.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MAX_COUNT = 1 << 53             # beyond it a float is no exact whole number
MAX_TRAIN_BYTES = 1 << 30       # binary and ternary codes take a step for each spike of the largest count


class SpikeTrain(NamedTuple):
    """T time steps of any number of neurons."""

    spikes: np.ndarray      # [T, ...] int8: -1, 0 or 1
    weights: np.ndarray     # [T] int64: what a spike of each step stands for

    @property
    def events(self) -> int:
        """Spikes in all; each is one row of weights added."""
        return int(np.count_nonzero(self.spikes))


# --- the codes -----------------------------------------------------------------------------------
def binary_train(counts: np.ndarray) -> SpikeTrain:
    """The first s steps fire. Raises ValueError for a negative count."""
    return ternary_train(_non_negative(counts, "binary"))


def ternary_train(counts: np.ndarray) -> SpikeTrain:
    """The first |s| steps fire sign(s)."""
    counts = _whole(counts)
    steps = _largest(counts)
    _check_size(steps, counts)
    fires = np.arange(steps).reshape(-1, *[1] * counts.ndim) < np.abs(counts)
    return SpikeTrain(fires * np.sign(counts).astype(np.int8), np.ones(steps, np.int64))


def unsigned_train(counts: np.ndarray) -> SpikeTrain:
    """The bits of s. Raises ValueError for a negative count."""
    return bidirectional_train(_non_negative(counts, "unsigned bitwise"))


def bidirectional_train(counts: np.ndarray) -> SpikeTrain:
    """The bits of |s|, each with the sign of s."""
    counts = _whole(counts)
    steps = _largest(counts).bit_length()
    return SpikeTrain(_bits(np.abs(counts), steps) * np.sign(counts).astype(np.int8), _powers(steps))


def twos_complement_train(counts: np.ndarray) -> SpikeTrain:
    """The bits of s in two's complement; the first step is the sign's."""
    counts = _whole(counts)
    steps = _largest(counts).bit_length() + 1
    weights = _powers(steps)
    weights[0] = -weights[0]
    return SpikeTrain(_bits(counts, steps), weights)


CODES: dict[str, Callable[[np.ndarray], SpikeTrain]] = {
    "binary": binary_train, "ternary": ternary_train, "unsigned": unsigned_train,
    "bidirectional": bidirectional_train, "twos_complement": twos_complement_train}


def spike_counts(train: SpikeTrain) -> np.ndarray:
    """The counts [...] int64 that a train stands for, whatever its code."""
    counts = np.zeros(train.spikes.shape[1:], np.int64)
    for spikes, weight in zip(train.spikes, train.weights, strict=True):
        counts += weight * spikes
    return counts


# --- what they are for ---------------------------------------------------------------------------
def spike_matmul(train: SpikeTrain, codes: np.ndarray) -> np.ndarray:
    """counts [n, in] @ codes [in, out] -> int64 [n, out], from spikes [T, n, in] and additions alone.

    At each step a token adds the rows of the channels that fire 1 and takes away those that fire -1; a channel that
    is silent at a step has its row left alone. Weighing a step is a shift. The readable twin of the event kernels.
    """
    steps, tokens, channels = train.spikes.shape
    if channels != len(codes):
        raise ValueError(f"expected weights for {channels} channels, found {len(codes)}")
    sums = np.zeros((tokens, codes.shape[1]), np.int64)
    for step in range(steps):
        for token in range(tokens):
            fired = train.spikes[step, token]
            charge = codes[fired > 0].sum(axis=0, dtype=np.int64) - codes[fired < 0].sum(axis=0, dtype=np.int64)
            sums[token] += train.weights[step] * charge
    return sums


# --- pieces --------------------------------------------------------------------------------------
def _whole(counts: np.ndarray) -> np.ndarray:
    """As int64; ValueError for what is no whole number, or too large to be an exact one."""
    counts = np.asarray(counts)
    if not (np.isfinite(counts).all() and (counts == np.round(counts)).all()):
        raise ValueError("expected whole numbers as spike counts")
    if counts.size and max(int(counts.max()), -int(counts.min())) > MAX_COUNT:
        raise ValueError(f"expected spike counts up to {MAX_COUNT}, found {counts.min()} to {counts.max()}")
    return counts.astype(np.int64)


def _non_negative(counts: np.ndarray, code: str) -> np.ndarray:
    counts = _whole(counts)
    if counts.size and counts.min() < 0:
        raise ValueError(f"the {code} code is for counts from 0 on, found {counts.min()}; use one with signs")
    return counts


def _largest(counts: np.ndarray) -> int:
    return int(np.abs(counts).max()) if counts.size else 0


def _check_size(steps: int, counts: np.ndarray) -> None:
    if steps * counts.size > MAX_TRAIN_BYTES:
        raise ValueError(f"{counts.size} counts up to {steps} need {steps} steps each; use a bitwise code")


def _bits(values: np.ndarray, steps: int) -> np.ndarray:
    """The lowest `steps` bits of each value, most significant first: [steps, ...] int8."""
    spikes = np.empty((steps, *values.shape), np.int8)
    for step in range(steps):
        spikes[step] = values >> (steps - 1 - step) & 1
    return spikes


def _powers(steps: int) -> np.ndarray:
    return np.int64(1) << np.arange(steps - 1, -1, -1, dtype=np.int64)
