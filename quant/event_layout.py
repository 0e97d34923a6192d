"""The event layouts: weight codes input-channel-major, so that a silent channel is a row never fetched.

`w8`: int8 codes [in, out], a scale per 128 inputs and output, and a sparse residual for codes beyond int8.
`w4`: unsigned nibbles, two to a byte, a float16 scale and (optionally) a zero point per 32, 64 or 128 inputs and
output.
runtime/native/sbedge.h describes the bytes.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .blocks import quantize_blocks

STRIPE = 1024           # outputs whose rows lie together in a file: what one thread reads is then one piece of memory
NIBBLE_STRIPE = STRIPE // 2     # the same in bytes of 4-bit rows
W4_BLOCK = 64           # outputs whose nibbles share 32 bytes
W4_MIDDLE = 8           # the zero point of a layout that stores none


# --- stripes -------------------------------------------------------------------------------------
def to_stripes(rows: np.ndarray, stripe: int = STRIPE) -> np.ndarray:
    """[in, width] -> the same bytes, flat, as stripes of `stripe` columns: each an [in, stripe] array of its own, the
    last one narrower, one after the other."""
    return np.concatenate([rows[:, start:start + stripe].ravel() for start in range(0, rows.shape[1], stripe)])


def from_stripes(flat: np.ndarray, shape: tuple[int, int], stripe: int = STRIPE) -> np.ndarray:
    """The inverse of `to_stripes`: [in, width] = `shape`."""
    inputs, width = shape
    starts = range(0, width, stripe)
    parts = np.split(flat, [start * inputs for start in starts[1:]])
    return np.concatenate([part.reshape(inputs, -1) for part in parts], axis=1)


# --- w8 ------------------------------------------------------------------------------------------
def split_codes(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integer codes [out, in] -> int8 codes [in, out] and what they lack, as a sparse residual.

    Returns (int8 [in, out], index [m] int32 into the flattened [in, out], value [m] int32) with
    code = int8 + residual exactly. W8ASpike has about 1 % of codes beyond int8.
    """
    transposed = np.ascontiguousarray(codes.T)
    int8 = np.clip(transposed, -128, 127).astype(np.int8)
    residual = (transposed - int8).ravel()
    index = np.flatnonzero(residual).astype(np.int32)
    return int8, index, residual[index].astype(np.int32)


def join_codes(int8: np.ndarray, index: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The inverse of `split_codes`: integer codes [out, in] int32."""
    codes = int8.astype(np.int32)
    codes.reshape(-1)[index] += value
    return np.ascontiguousarray(codes.T)


def residual_rows(index: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A residual's flat `index` [m], ascending, into [in, out] = `shape`, as the kernels want it.

    Returns (start [in + 1] int32: the first entry of each input channel, output [m] int32).
    """
    inputs, outputs = shape
    start = np.searchsorted(index, np.arange(inputs + 1, dtype=np.int64) * outputs)
    return start.astype(np.int32), (index % outputs).astype(np.int32)


# --- w4 ------------------------------------------------------------------------------------------
class W4(NamedTuple):
    """weight[o, i] = (nibble[i, o] - zero[i // group, o]) * scale[i // group, o]; zeros None: 8 everywhere."""

    nibbles: np.ndarray             # [in, out / 2] uint8, packed
    scales: np.ndarray              # [in / group, out] float16
    zeros: np.ndarray | None        # [in / group, out] uint8


def pack_nibbles(nibbles: np.ndarray) -> np.ndarray:
    """Values 0..15 [in, out] -> bytes [in, out / 2]: of each 64 outputs, b in the low and b + 32 in the high half."""
    rows, outputs = nibbles.shape
    if outputs % W4_BLOCK:
        raise ValueError(f"expected a multiple of {W4_BLOCK} outputs, found {outputs}")
    low, high = np.moveaxis(nibbles.astype(np.uint8, copy=False).reshape(rows, -1, 2, W4_BLOCK // 2), 2, 0)
    return (low | high << 4).reshape(rows, outputs // 2)


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_nibbles`: uint8 [in, out]."""
    blocks = packed.reshape(len(packed), -1, W4_BLOCK // 2)
    return np.stack([blocks & 15, blocks >> 4], axis=2).reshape(len(packed), -1)


def quantize_w4(weight: np.ndarray, group: int = 32, zeros: bool = True) -> W4:
    """Round a weight [out, in] to 4 bits in groups of `group` inputs, which divides `in`; `out` a multiple of 64.

    With zero points each group covers its own range (as ggml's Q4_1), without them a symmetric one (as Q4_0).
    """
    outputs, inputs = weight.shape
    if inputs % group:
        raise ValueError(f"expected a multiple of {group} inputs, found {inputs}")
    if zeros:
        blocks = quantize_blocks(weight, 4, group)
        codes, zero = _halves(blocks.codes), _halves(blocks.zero_points)[:, :inputs // group]
        scales = _transposed(blocks.scales).astype(np.float16)
        return W4(pack_nibbles(codes.reshape(outputs, inputs).T), scales, _transposed(zero))
    grouped = weight.reshape(outputs, -1, group).astype(np.float32, copy=False)
    extreme = np.take_along_axis(grouped, np.abs(grouped).argmax(-1, keepdims=True), -1)
    scales = np.where(extreme == 0, np.float32(1), extreme / np.float32(-W4_MIDDLE))        # [out, in / group, 1]
    codes = np.clip(np.rint(grouped / scales), -W4_MIDDLE, W4_MIDDLE - 1)
    energy = np.einsum("ngi,ngi->ng", codes, codes)
    fitted = np.einsum("ngi,ngi->ng", grouped, codes)
    scales = np.divide(fitted, energy, out=scales[..., 0], where=energy > 0)                # least squares
    nibbles = (codes + W4_MIDDLE).astype(np.uint8).reshape(outputs, inputs).T
    return W4(pack_nibbles(nibbles), _transposed(scales).astype(np.float16), None)


def dequantize_w4(w4: W4) -> np.ndarray:
    """The float32 weight [out, in] that a layout stands for."""
    nibbles = unpack_nibbles(w4.nibbles).astype(np.float32)                                 # [in, out]
    group = len(nibbles) // len(w4.scales)
    zeros = np.float32(W4_MIDDLE) if w4.zeros is None else np.repeat(w4.zeros, group, axis=0).astype(np.float32)
    return np.ascontiguousarray(((nibbles - zeros) * np.repeat(w4.scales.astype(np.float32), group, axis=0)).T)


def _halves(packed: np.ndarray) -> np.ndarray:
    """Bytes [..., m] -> nibbles [..., 2 * m], the low one first."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _transposed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T)
