"""Int8 weights with one scale for each group of 128 inputs, rounded to the nearest."""
from __future__ import annotations

import numpy as np

from sbedge.config import WEIGHT_GROUP

SMALLEST_SCALE = np.float32(1e-12)      # of a group whose weights are all zero


def group_starts(width: int) -> np.ndarray:
    """First input of each group; the last group may be shorter than the others."""
    return np.arange(0, width, WEIGHT_GROUP)


def quantize_int8_groups(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[out, in] float32 -> codes [out, in] int32 in -127..127 and scales [out, ceil(in/128)] float32."""
    starts = group_starts(weight.shape[1])
    largest = np.maximum.reduceat(np.abs(weight), starts, axis=1)
    scales = np.maximum(largest / np.float32(127), SMALLEST_SCALE).astype(np.float32)
    return np.round(weight / expand_scales(scales, weight.shape[1])).astype(np.int32), scales


def dequantize_int8_groups(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 weight [out, in] that codes and scales stand for."""
    return codes.astype(np.float32) * expand_scales(scales, codes.shape[1])


def expand_scales(scales: np.ndarray, width: int) -> np.ndarray:
    """[out, groups] -> [out, width]: every input its group's scale."""
    return np.repeat(scales, WEIGHT_GROUP, axis=1)[:, :width]
