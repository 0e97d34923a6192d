"""What spike counts amount to: the figures of the report's section 3.3, and its estimate of energy."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

SMALL = 7           # the largest |s| of WINDOW bits
WINDOW = 3          # time steps that a count is given at a time

# pJ an operation, 45 nm (report, table of section 3.3)
FP16_MAC, INT8_MAC, INT8_ADD = 1.5, 0.23, 0.03


class CountHistogram:
    """How often each spike count came: all the figures need, however long the text.

    The bidirectional bitwise code is meant where spikes and slots are counted. A count takes as many windows of
    WINDOW steps as its bits need, at least one; a slot is one step of one channel.
    """

    def __init__(self, times: Iterable[tuple[int, int]] = ()):
        self.times: Counter[int] = Counter(dict(times))     # count -> how often

    def add(self, counts: np.ndarray) -> None:
        """Take in whole numbers of any shape. Raises ValueError for what is none."""
        values, times = np.unique(counts, return_counts=True)
        if not np.isfinite(values).all():
            raise ValueError("expected spike counts, found what is no finite number")
        for value, n in zip(values.tolist(), times.tolist(), strict=True):
            self.times[int(value)] += n

    def merged(self, *others: CountHistogram) -> CountHistogram:
        return CountHistogram(sum((other.times for other in others), self.times.copy()).items())

    @property
    def total(self) -> int:
        return self.times.total()

    @property
    def largest(self) -> int:
        """The largest |s|."""
        return max(map(abs, self.times), default=0)

    @property
    def silent(self) -> float:
        """Share of counts that are zero: channels whose weights need not be fetched."""
        return self.times[0] / self.total

    @property
    def small(self) -> float:
        """Share of |s| <= SMALL."""
        return self._mean(lambda size: size <= SMALL)

    @property
    def spikes(self) -> float:
        """Mean spikes a channel."""
        return self._mean(int.bit_count)

    @property
    def slots(self) -> float:
        """Mean time steps a channel."""
        return self._mean(lambda size: WINDOW * max(1, -(-size.bit_length() // WINDOW)))

    @property
    def slot_sparsity(self) -> float:
        """Share of slots without a spike."""
        return 1 - self.spikes / self.slots

    def _mean(self, of_size: Callable[[int], float]) -> float:
        return sum(of_size(abs(count)) * n for count, n in self.times.items()) / self.total


class Energy(NamedTuple):
    """Arithmetic of the linears in question, pJ."""

    fp16: float
    int8: float
    spikes: float

    @property
    def saved_from_fp16(self) -> float:
        return 1 - self.spikes / self.fp16

    @property
    def saved_from_int8(self) -> float:
        return 1 - self.spikes / self.int8


def energy(macs: float, additions: float) -> Energy:
    """Of `macs` multiply-accumulates, or of the `additions` that take their place when activations are spike trains."""
    return Energy(macs * FP16_MAC, macs * INT8_MAC, additions * INT8_ADD)
