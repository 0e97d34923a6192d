"""Rounding weights so that a layer's *outputs* stay close, for inputs that were seen (GPTQ, Frantar et al. 2022).

A linear y = W x is to be stored on a grid. Rounding each weight to the nearest keeps W close; what counts is the error
of y over real inputs, which for W' is

    error(W') = tr((W' - W) H (W' - W)^T)       H = sum of x x^T, the second moments of the inputs

`calibrate` lowers that: channel by channel it rounds and lets the channels still to come make up for the error (GPTQ,
the loudest channels first), then fits the scales by least squares and goes through the codes again, moving each to
where the others want it. No output ends up worse than by plain rounding.

Arrays are input-channel-major here: weights [in, out], scales and zero points [groups, out].
"""
from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

import numpy as np

BLOCK = 128                                     # channels whose corrections to the others are applied at once
CLIPS = np.linspace(1.0, 0.6, 11)               # shares of a group's range that the first scales are tried at
ROUNDS = 1                                      # of fitting scales and descending
TINY = np.float32(1e-12)


class Grid(NamedTuple):
    """weight = (level - zero) * scale; groups of `group` inputs share scale and zero."""

    least: int              # levels are whole numbers from here ...
    most: int               # ... to here
    group: int
    middle: int | None      # the zero point of all groups; None: each has its own, from `least` to `most`
    half: bool              # scales are float16

    @property
    def bits(self) -> int:
        return self.most.bit_length()


class Levels(NamedTuple):
    """A weight on a grid."""

    levels: np.ndarray      # [in, out] uint8
    scales: np.ndarray      # [groups, out] float32
    zeros: np.ndarray       # [groups, out] uint8
    group: int

    def weight(self) -> np.ndarray:
        """The float32 [in, out] it stands for."""
        return (self.levels - self._spread(self.zeros.astype(np.float32))) * self._spread(self.scales)

    def outputs(self, start: int, stop: int) -> Levels:
        return Levels(self.levels[:, start:stop], self.scales[:, start:stop], self.zeros[:, start:stop], self.group)

    def _spread(self, per_group: np.ndarray) -> np.ndarray:
        return np.repeat(per_group, self.group, axis=0)[:len(self.levels)]


INT8_ZERO = 128                                 # the level of code 0 where codes are int8
GRIDS = {"w8-spike": Grid(1, 255, 128, INT8_ZERO, False), "w4-spike": Grid(0, 15, 64, None, True),
         "q8_0": Grid(1, 255, 32, INT8_ZERO, True), "q4_0": Grid(0, 15, 32, 8, True),
         "int8": Grid(0, 255, 32, None, False), "int4": Grid(0, 15, 32, None, False)}
FINER = {"w4-spike": "w8-spike", "q4_0": "q8_0", "int4": "int8"}        # 4 bits -> the 8 that files mix with them


def calibrate(weight: np.ndarray, moments: np.ndarray, grid: Grid) -> Levels:
    """`weight` [in, out] on `grid`, for inputs with second `moments` [in, in] (symmetric, positive semidefinite).

    The error of no output is above that of plain rounding. Raises ValueError for what is not finite.
    """
    target, H = weight.astype(np.float32), moments.astype(np.float32)
    if not (np.isfinite(H).all() and np.isfinite(target).all()):
        raise ValueError("expected finite weights and moments")
    diagonal = np.diag(H).copy()
    silent = diagonal <= 0                      # channels never seen: rounded to the nearest, and hardly counted
    H[silent, silent] = np.float32(1e-6) * diagonal.mean() or 1
    best = rounded(target, np.ones(len(target), np.float32), grid, CLIPS[:1])
    clipped = rounded(target, np.diag(H), grid, CLIPS)
    for candidate in (clipped, fed_back(target, H, grid, clipped)):
        best = better(best, candidate, target, H)
    for _ in range(ROUNDS):
        best = better(best, fitted(best, target, H, grid), target, H)
        best = better(best, descended(best, target, H, grid), target, H)
    return best


def output_error(levels: Levels, target: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """The error of each output, [out]."""
    difference = levels.weight() - target
    return (difference * (moments @ difference)).sum(axis=0, dtype=np.float64)


def better(a: Levels, b: Levels, target: np.ndarray, H: np.ndarray) -> Levels:
    """Of each output the one with the smaller error."""
    take = output_error(b, target, H) < output_error(a, target, H)
    return Levels(np.where(take, b.levels, a.levels), np.where(take, b.scales, a.scales),
                  np.where(take, b.zeros, a.zeros), a.group)


# --- the steps -----------------------------------------------------------------------------------
def rounded(weight: np.ndarray, importance: np.ndarray, grid: Grid, clips: np.ndarray) -> Levels:
    """To the nearest level, with the scales among `clips` of each group's range that cost least, each channel's squared
    error counting `importance` [in] times."""
    inputs, outputs = weight.shape
    padded = np.pad(weight, ((0, -inputs % grid.group), (0, 0))).reshape(-1, grid.group, outputs)
    weighed = np.pad(importance, (0, -inputs % grid.group)).astype(np.float32).reshape(-1, grid.group, 1)
    least_error = np.full((len(padded), outputs), np.inf, np.float32)
    scales, zeros = np.ones_like(least_error), np.zeros_like(least_error)
    levels = np.zeros_like(padded)
    for clip in clips:
        for scale, zero in scales_of(padded, grid, np.float32(clip)):
            tried = to_levels(padded, scale[:, None], zero[:, None], grid)
            error = (np.square((tried - zero[:, None]) * scale[:, None] - padded) * weighed).sum(axis=1)
            take = error < least_error
            least_error = np.where(take, error, least_error)
            scales, zeros = np.where(take, scale, scales), np.where(take, zero, zeros)
            levels = np.where(take[:, None], tried, levels)
    return Levels(levels.reshape(-1, outputs)[:inputs].astype(np.uint8), scales, zeros.astype(np.uint8), grid.group)


def scales_of(groups: np.ndarray, grid: Grid, clip: np.float32) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scales and zero points [groups, out] that cover `clip` of the range of each of `groups` [groups, group, out]."""
    high, low = groups.max(axis=1), groups.min(axis=1)
    if grid.middle is None:
        high, low = np.maximum(high, 0) * clip, np.minimum(low, 0) * clip
        scale = stored(np.maximum((high - low) / np.float32(grid.most - grid.least), TINY), grid)
        return [(scale, np.clip(np.rint(-low / scale), grid.least, grid.most))]
    zero = np.full_like(high, grid.middle)
    below, above = grid.middle - grid.least, grid.most - grid.middle
    largest = np.maximum(high, -low) * clip
    scales = [np.maximum(largest / np.float32(above), TINY)]
    if below > above:       # one side has a level more: the side of the larger weight may take it, by the scale's sign
        scales.append(np.maximum(largest / np.float32(below), TINY) * np.where(high > -low, np.float32(-1), 1))
    return [(stored(scale, grid), zero) for scale in scales]


def stored(scales: np.ndarray, grid: Grid) -> np.ndarray:
    """Scales as the file will hold them; none becomes zero or infinite."""
    if not grid.half:
        return scales.astype(np.float32)
    limits = np.finfo(np.float16)
    size = np.clip(np.abs(scales), limits.smallest_subnormal, limits.max)
    return np.copysign(size, scales).astype(np.float16).astype(np.float32)


def to_levels(weight: np.ndarray, scale: np.ndarray, zero: np.ndarray, grid: Grid) -> np.ndarray:
    return np.clip(np.rint(weight / scale) + zero, grid.least, grid.most)


def fed_back(target: np.ndarray, H: np.ndarray, grid: Grid, first: Levels) -> Levels:
    """GPTQ with the scales of `first`: channels in the order of their energy, each one's error fed into the later."""
    order = np.argsort(-np.diag(H), kind="stable")
    feed = feedback(H[np.ix_(order, order)])
    work = target[order].astype(np.float32)
    scales, zeros = first.scales, first.zeros.astype(np.float32)
    levels = np.empty(work.shape, np.float32)
    for start in range(0, len(work), BLOCK):
        stop = min(start + BLOCK, len(work))
        errors = np.empty((stop - start, work.shape[1]), np.float32)
        for j in range(start, stop):
            group = order[j] // grid.group
            levels[j] = to_levels(work[j], scales[group], zeros[group], grid)
            errors[j - start] = (work[j] - (levels[j] - zeros[group]) * scales[group]) / feed[j, j]
            work[j + 1:stop] -= np.outer(feed[j, j + 1:stop], errors[j - start])
        work[stop:] -= feed[start:stop, stop:].T @ errors
    unordered = np.empty(levels.shape, np.uint8)
    unordered[order] = levels.astype(np.uint8)
    return first._replace(levels=unordered)


def feedback(H: np.ndarray) -> np.ndarray:
    """Upper Cholesky factor of the inverse of H, float32: how the error of a channel is spread over the later ones."""
    H = H.astype(np.float64)
    mean = float(np.trace(H)) / len(H)
    for damping in mean * np.logspace(-6, 6, 13):   # fewer inputs than channels, or rounding: lean on the diagonal more
        with suppress(np.linalg.LinAlgError):
            inverse = np.linalg.inv(np.linalg.cholesky(H + damping * np.eye(len(H))))
            return np.linalg.cholesky(inverse.T @ inverse).T.astype(np.float32)
    raise ValueError("expected second moments that are positive semidefinite")


def fitted(found: Levels, target: np.ndarray, H: np.ndarray, grid: Grid) -> Levels:
    """The same levels with the scales that fit best, all groups of an output together: least squares."""
    signed = found.levels - np.repeat(found.zeros.astype(np.float32), grid.group, axis=0)[:len(target)]   # [in, out]
    starts = np.arange(0, len(target), grid.group)
    aims = np.add.reduceat(signed * (H @ target), starts, axis=0)             # [groups, out]
    products = np.empty((len(starts), *aims.shape), np.float32)
    for g, start in enumerate(starts):
        rows = slice(start, start + grid.group)
        products[g] = np.add.reduceat(signed * (H[:, rows] @ signed[rows]), starts, axis=0)
    matrix = products.transpose(2, 1, 0).astype(np.float64)                                     # [out, groups, groups]
    ridge = 1e-6 * np.einsum("ogg->og", matrix).max(axis=1, keepdims=True) + 1e-30
    matrix += ridge[..., None] * np.eye(len(starts))
    aim = aims.T + ridge * found.scales.T           # a group of zeros alone keeps its scale
    return found._replace(scales=stored(np.linalg.solve(matrix, aim[..., None])[..., 0].T, grid))


def descended(found: Levels, target: np.ndarray, H: np.ndarray, grid: Grid) -> Levels:
    """The same scales with each code moved, one channel after the other, to the level that is best given all others."""
    levels, zeros = found.levels.astype(np.float32), found.zeros.astype(np.float32)
    pull = H @ (found.weight() - target)            # half the slope of the error, [in, out]
    curve = np.diag(H)
    for start in range(0, len(target), BLOCK):
        stop = min(start + BLOCK, len(target))
        moved = np.empty((stop - start, target.shape[1]), np.float32)
        for j in range(start, stop):
            scale, zero = found.scales[j // grid.group], zeros[j // grid.group]
            level = to_levels((levels[j] - zero) * scale - pull[j] / curve[j], scale, zero, grid)
            moved[j - start] = (level - levels[j]) * scale
            levels[j] = level
            pull[start:stop] += np.outer(H[start:stop, j], moved[j - start])
        pull[:start] += H[:start, start:stop] @ moved
        pull[stop:] += H[stop:, start:stop] @ moved
    return found._replace(levels=levels.astype(np.uint8))
