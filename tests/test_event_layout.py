"""pytest tests/test_event_layout.py: weight codes survive the event layouts exactly, those beyond int8 too."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sbedge.quant.event_layout import (
    dequantize_w4,
    from_stripes,
    join_codes,
    pack_nibbles,
    quantize_w4,
    residual_rows,
    split_codes,
    to_stripes,
    unpack_nibbles,
)

CODES = arrays(np.int32, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(-5000, 5000))


@given(CODES)
def test_codes_come_back_exactly(codes):
    np.testing.assert_array_equal(join_codes(*split_codes(codes)), codes)


@given(CODES)
def test_the_residual_holds_only_what_int8_cannot(codes):
    int8, index, value = split_codes(codes)
    assert int8.shape == codes.T.shape
    assert int8.dtype == np.int8
    assert len(index) == len(value) == np.count_nonzero((codes < -128) | (codes > 127))


@given(CODES)
def test_residual_rows_name_the_same_entries(codes):
    int8, index, value = split_codes(codes)
    start, output = residual_rows(index, int8.shape)
    assert start.dtype == output.dtype == np.int32
    assert start[0] == 0
    assert start[-1] == len(value)
    joined = int8.astype(np.int32)
    for i in range(len(int8)):
        entries = slice(start[i], start[i + 1])
        assert (np.diff(output[entries]) > 0).all()
        joined[i, output[entries]] += value[entries]
    np.testing.assert_array_equal(joined.T, codes)


@given(CODES, st.integers(1, 50))
def test_stripes_come_back_and_each_is_one_piece(codes, stripe):
    flat = to_stripes(codes, stripe)
    np.testing.assert_array_equal(from_stripes(flat, codes.shape, stripe), codes)
    np.testing.assert_array_equal(flat[:codes[:, :stripe].size], codes[:, :stripe].ravel())


def test_nibbles_come_back_and_lie_where_the_kernels_look():
    nibbles = np.random.default_rng(0).integers(0, 16, (3, 192), dtype=np.uint8)
    packed = pack_nibbles(nibbles)
    np.testing.assert_array_equal(unpack_nibbles(packed), nibbles)
    for block, b in ((0, 0), (1, 5), (2, 31)):
        assert packed[2, block * 32 + b] == nibbles[2, block * 64 + b] | nibbles[2, block * 64 + b + 32] << 4


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("zeros", "step"), [(True, 15), (False, 8)])
def test_four_bits_move_no_weight_by_more_than_a_step(group, zeros, step):
    weight = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    weight[3] = 0
    w4 = quantize_w4(weight, group, zeros=zeros)
    assert w4.nibbles.shape == (256, 32)
    assert w4.scales.shape == (256 // group, 64)
    assert (w4.zeros is None) is not zeros
    error = np.abs(dequantize_w4(w4) - weight).reshape(64, -1, group)
    span = np.ptp(weight.reshape(64, -1, group), axis=-1) if zeros else np.abs(weight.reshape(64, -1, group)).max(-1)
    assert (error <= 1.2 * span[..., None] / step).all()


@pytest.mark.parametrize("zeros", [True, False])
def test_weights_of_whole_levels_are_exact_in_four_bits(zeros):
    low = -5 if zeros else -8       # every group holds all 16 levels, so that its step is one level
    levels = np.random.default_rng(2).permuted(np.tile(np.arange(16) + low, (64, 4, 2)), axis=-1).reshape(64, 128)
    weight = (levels * 0.5).astype(np.float32)
    np.testing.assert_allclose(dequantize_w4(quantize_w4(weight, 32, zeros=zeros)), weight, atol=1e-6)


def test_shapes_the_layout_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="64 outputs"):
        quantize_w4(np.zeros((65, 128), np.float32))
    with pytest.raises(ValueError, match="multiple of 32 inputs"):
        quantize_w4(np.zeros((64, 100), np.float32))
