"""Spiking linears in the data file: weights input-channel-major, made and written a stripe of outputs at a time."""
from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from onnx import TensorProto

from sbedge.checkpoint import Checkpoint
from sbedge.config import WEIGHT_GROUP
from sbedge.export.spikes import W4_GROUP, weight_codes, weight_nibbles
from sbedge.quant.event_layout import NIBBLE_STRIPE, STRIPE

from .weights import DataFile

NARROWEST = 256         # outputs of a stripe; narrower ones would be many and short

Advance = Callable[[str, int], None]        # (tensor name, weights read)


def stripe_width(outputs: int, widest: int) -> int:
    """The widest stripe that divides `outputs`, in multiples of 64; all of them where there is none."""
    return max((width for width in range(NARROWEST, widest + 1, 64) if outputs % width == 0), default=outputs)


def write_w8(checkpoint: Checkpoint, weight: str, data: DataFile, advance: Advance) -> list[TensorProto]:
    """What SpikeLinear takes after counts and thresholds: no code of W8ASpike is rounded."""
    N, K = checkpoint.shapes[weight]
    groups, stripe = -(-K // WEIGHT_GROUP), stripe_width(N, STRIPE)
    scales = np.empty((groups, N), np.float32)
    nothing = np.zeros(0, np.int64)
    residual: list[tuple[np.ndarray, ...]] = [(nothing, nothing, np.zeros(0, np.float32))]

    def stripes() -> Iterator[np.ndarray]:
        for start in range(0, N, stripe):
            codes, scales_of_rows = weight_codes(checkpoint, weight, start, start + stripe)
            codes = np.pad(codes, ((0, 0), (0, -K % WEIGHT_GROUP)))
            by_input, by_group, inputs, outputs, values = spike_weights(codes, scales_of_rows)
            scales[:, start:start + stripe] = by_group
            residual.append((inputs, outputs + start, values))
            yield by_input
            advance(weight, stripe * K)

    tensors = [data.append(f"{weight}.codes", np.uint8, (N // stripe, groups, WEIGHT_GROUP, stripe), stripes())]
    parts = (np.concatenate(part) for part in zip(*residual, strict=True))
    names = ("residual_inputs", "residual_outputs", "residual_values")
    return [*tensors, data.array(f"{weight}.scales", scales),
            *(data.array(f"{weight}.{name}", part) for name, part in zip(names, parts, strict=True))]


def spike_weights(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes [N, K] and scales [N, K/128] as SpikeLinear takes them: codes + 128 as uint8 [K/128, 128, N], scales
    [K/128, N], and the codes beyond int8 as inputs, outputs and float32 values of what int8 leaves over."""
    N, K = codes.shape
    outputs, inputs = np.nonzero((codes < -128) | (codes > 127))
    stored = np.clip(codes, -128, 127)
    excess = (codes - stored)[outputs, inputs] * scales[outputs, inputs // WEIGHT_GROUP]
    by_input = (stored + 128).astype(np.uint8).T.reshape(K // WEIGHT_GROUP, WEIGHT_GROUP, N)
    return by_input, scales.T, inputs, outputs, excess.astype(np.float32)


def write_w4(checkpoint: Checkpoint, weight: str, data: DataFile, advance: Advance) -> list[TensorProto]:
    """What SpikeLinear4 takes after counts and thresholds."""
    N, K = checkpoint.shapes[weight]
    groups, stripe = K // W4_GROUP, stripe_width(N, 2 * NIBBLE_STRIPE)
    scales, zeros = np.empty((groups, N), np.float16), np.empty((groups, N), np.uint8)

    def stripes() -> Iterator[np.ndarray]:
        for start in range(0, N, stripe):
            w4 = weight_nibbles(checkpoint, weight, start, start + stripe)
            assert w4.zeros is not None
            scales[:, start:start + stripe], zeros[:, start:start + stripe] = w4.scales, w4.zeros
            yield w4.nibbles
            advance(weight, stripe * K)

    return [data.append(f"{weight}.nibbles", np.uint8, (N // stripe, K, stripe // 2), stripes()),
            data.array(f"{weight}.scales", scales), data.array(f"{weight}.zeros", zeros)]
