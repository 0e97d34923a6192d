"""Block quantization of weight rows: every 32 inputs share a scale and a zero point. Pure NumPy.

weight = (code - zero_point) * scale; codes and zero points are unsigned. The bytes are those of ONNX
Runtime's MatMulNBits: 4-bit values two to a byte, the earlier one in the low half.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .gptq import Levels

BLOCK = 32
REFITS = 2


class Blocks(NamedTuple):
    """N rows of K inputs in B = ceil(K / block) blocks each; the last block is padded with zero weights."""

    codes: np.ndarray           # [N, B, block * bits / 8] uint8
    scales: np.ndarray          # [N, B] float32
    zero_points: np.ndarray     # [N, ceil(B * bits / 8)] uint8


def quantize_blocks(weight: np.ndarray, bits: int, block: int = BLOCK) -> Blocks:
    """Round `weight` [N, K] to `bits` (4 or 8) over each block's range, stretched to include zero.

    At 4 bits the scale is then refitted to the codes by least squares, twice: 3 % less error.
    """
    rows, inputs = weight.shape
    count = -(-inputs // block)
    if count * block != inputs:
        weight = np.pad(weight, ((0, 0), (0, count * block - inputs)))
    blocks = weight.reshape(rows, count, block).astype(np.float32, copy=False)
    levels = np.float32(2 ** bits - 1)
    low = np.minimum(blocks.min(-1), 0)
    scales = (np.maximum(blocks.max(-1), 0) - low) / levels
    scales[scales < np.finfo(np.float32).tiny] = 1          # an all-zero block
    zero_points = np.rint(-low / scales)                    # within 0..levels by construction
    codes = _round(blocks, scales, zero_points, levels)
    for refit in range(REFITS if bits == 4 else 0):
        if refit:
            codes = _round(blocks, scales, zero_points, levels)
        energy = np.einsum("nbk,nbk->nb", codes, codes)
        np.divide(np.einsum("nbk,nbk->nb", blocks, codes), energy, out=scales, where=energy > 0)
    codes += zero_points[..., None]
    return Blocks(_pack(codes.astype(np.uint8), bits), scales, _pack(zero_points.astype(np.uint8), bits))


def blocks_of(levels: Levels, bits: int) -> Blocks:
    """A weight that calibration has put on the grid of these blocks."""
    inputs, rows = levels.levels.shape
    zeros, count = levels.zeros.T, len(levels.scales)
    filled = np.repeat(zeros, levels.group, axis=1)     # the last block is filled up with zero weights
    filled[:, :inputs] = levels.levels.T
    return Blocks(_pack(filled.reshape(rows, count, levels.group), bits), np.ascontiguousarray(levels.scales.T),
                  _pack(zeros, bits))


def _round(blocks: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, levels: np.float32) -> np.ndarray:
    """Signed codes [N, B, block]: whole numbers from -zero_point to levels - zero_point."""
    codes = blocks / scales[..., None]
    np.rint(codes, out=codes)
    return np.clip(codes, -zero_points[..., None], levels - zero_points[..., None], out=codes)


def dequantize_blocks(quantized: Blocks, bits: int, inputs: int) -> np.ndarray:
    """The float32 weight [N, inputs] that `quantized` stands for."""
    rows, count = quantized.scales.shape
    codes = _unpack(quantized.codes, bits).astype(np.float32)
    zero_points = _unpack(quantized.zero_points, bits)[:, :count].astype(np.float32)
    weight = (codes - zero_points[..., None]) * quantized.scales[..., None]
    return weight.reshape(rows, -1)[:, :inputs]


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Along the last axis; an odd count of 4-bit values gets a zero to fill its byte."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return values[..., 0::2] | values[..., 1::2] << 4


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
