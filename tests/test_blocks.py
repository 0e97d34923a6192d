"""pytest tests/test_blocks.py: block quantization keeps every weight within its step, whatever the shape."""
from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbedge.quant.blocks import BLOCK, dequantize_blocks, quantize_blocks


def weights(rows, inputs, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, inputs)).astype(np.float32)


@given(st.integers(1, 9), st.integers(1, 130), st.integers(0, 99), st.floats(-30, 30),
       st.sampled_from([1e-6, 1.0, 1e6]))
@settings(max_examples=60, deadline=None)
def test_int8_moves_no_weight_by_more_than_a_step(rows, inputs, seed, shift, size):
    weight = (weights(rows, inputs, seed) + np.float32(shift)) * np.float32(size)
    quantized = quantize_blocks(weight, 8)
    step = np.repeat(quantized.scales, BLOCK, axis=1)[:, :inputs]
    assert (np.abs(dequantize_blocks(quantized, 8, inputs) - weight) <= 1.001 * step).all()


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.006), (4, 0.085)])
def test_the_error_stays_in_proportion_to_the_bits(bits, bound):
    weight = weights(64, 256)
    found = dequantize_blocks(quantize_blocks(weight, bits), bits, 256)
    assert np.sqrt(np.mean((found - weight) ** 2)) < bound


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [1, 31, 32, 33, 95, 160])
def test_shapes_and_bytes_are_those_of_matmulnbits(bits, inputs):
    quantized = quantize_blocks(weights(3, inputs), bits)
    blocks = -(-inputs // BLOCK)
    assert quantized.codes.shape == (3, blocks, BLOCK * bits // 8)
    assert quantized.scales.shape == (3, blocks)
    assert quantized.zero_points.shape == (3, -(-blocks * bits // 8))
    assert quantized.codes.dtype == quantized.zero_points.dtype == np.uint8


def test_the_earlier_of_two_4_bit_weights_lies_in_the_low_half():
    quantized = quantize_blocks(np.arange(16, dtype=np.float32).repeat(2)[None], 4)
    assert quantized.codes[0, 0, :4].tolist() == [0x00, 0x11, 0x22, 0x33]
    quantized = quantize_blocks(np.tile(np.arange(16, dtype=np.float32), 2)[None], 4)
    assert quantized.codes[0, 0, :2].tolist() == [0x10, 0x32]


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_zeros_and_whole_levels_are_exact(bits):
    weight = np.zeros((2, 64), np.float32)
    weight[0, :32] = np.arange(32) % 2 ** bits % 16 - 5
    weight[0, 0] = 2 ** bits - 1 - 5
    weight[1, 32] = 7.5     # alone in its block
    np.testing.assert_allclose(dequantize_blocks(quantize_blocks(weight, bits), bits, 64), weight, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_bfloat16_rows_quantize_as_their_float32_values(bits):
    weight = weights(4, 70).astype(ml_dtypes.bfloat16)
    for a, b in zip(quantize_blocks(weight, bits), quantize_blocks(weight.astype(np.float32), bits), strict=True):
        assert np.array_equal(a, b)
