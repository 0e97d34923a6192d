"""Loops: text that comes to say one piece over and over, as small models do where they keep to what is likeliest."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LONGEST = 40            # tokens of a piece
TIMES = 3               # said so often it is a loop
LEAST = 4               # tokens of a piece; a shorter one must go on as long as one of these: "ha ha ha" is no loop


def sayings(size: int, times: int = TIMES) -> int:
    """How often a piece of `size` tokens is said in a loop."""
    return times if size >= LEAST else LEAST * times // size


def loop(ids: Sequence[int], times: int = TIMES) -> int:
    """How many tokens the piece has that `ids` end with over and over; 0: they end in no loop."""
    for size in range(1, LONGEST + 1):
        end = size * sayings(size, times)
        if len(ids) >= end and ids[-1] == ids[-1 - size] and list(ids[-end:-size]) == list(ids[size - end:]):
            return size
    return 0


def going_on(ids: np.ndarray) -> np.ndarray:
    """For each position of ids [T] the next token if it would begin or go on with a third saying of a piece, or -1."""
    place, out = np.arange(len(ids)), np.full(len(ids), -1, np.int64)
    for size in range(min(LONGEST, len(ids) - 1), 0, -1):
        same = np.zeros(len(ids), bool)
        same[size:] = ids[size:] == ids[:-size]
        run = place - np.maximum.accumulate(np.where(same, -1, place))      # tokens as one piece before, up to here
        hit = np.flatnonzero(run >= (sayings(size) - 2) * size)
        out[hit] = ids[hit + 1 - size]
    return out
