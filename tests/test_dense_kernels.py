"""pytest tests/test_dense_kernels.py: linears in Q8_0 and Q4_0 equal their NumPy twin on every instruction set."""
from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isas import BEST, ISAS, lib

from sbedge.runtime.native.library import Dense

TYPES = {8: gguf.GGMLQuantizationType.Q8_0, 4: gguf.GGMLQuantizationType.Q4_0}


def encode(x, nth=1):
    """Codes, scales and sums of rows x [n, width]."""
    n, width = x.shape
    codes, scales = np.full((n, width), 77, np.int8), np.full((n, width // 32), 77, np.float32)
    sums = np.full((n, width // 32), 77, np.int32)
    for ith in range(nth):
        lib.block_encode(x.ctypes.data, n, width, codes.ctypes.data, scales.ctypes.data, sums.ctypes.data, ith, nth)
    return codes, scales, sums


def matmul(blocks, bits, x, bias=None, nth=1):
    """x [n, in] times the stored rows of `blocks` [out, bytes] -> [n, out], over a wider y that must stay as it is."""
    (n, width), out = x.shape, len(blocks)
    encoded = encode(x)
    weight = Dense(width, out, bits, blocks.ctypes.data, None if bias is None else bias.ctypes.data)
    y = np.full((n, out + 3), 77, np.float32)
    addresses = [a.ctypes.data for a in encoded]
    for ith in range(nth):
        lib.dense_matmul(ctypes.addressof(weight), *addresses, n, y.ctypes.data, out + 3, ith, nth)
    assert (y[:, out:] == 77).all()
    return y[:, :out]


def twin(blocks, bits, x, bias=None):
    """In float64, of the same rounded activations and weights; and what the largest error may be."""
    codes, scales, _ = encode(x)
    activations = codes.reshape(*scales.shape, 32) * scales[..., None].astype(np.float64)
    weight = gguf.quants.dequantize(blocks, TYPES[bits]).astype(np.float64)
    activations = activations.reshape(x.shape)
    y = activations @ weight.T
    return y if bias is None else y + bias, 2e-6 * (np.abs(activations) @ np.abs(weight).T + 1e-30)


def random_blocks(rng, out, width, bits):
    blocks = rng.integers(0, 256, (out, width // 32, 34 if bits == 8 else 18), np.uint8)
    scales = rng.standard_normal((out, width // 32, 1)).astype(np.float16)
    blocks[..., :2] = scales.view(np.uint8)
    return np.ascontiguousarray(blocks.reshape(out, -1))


@given(seed=st.integers(0, 10_000), bits=st.sampled_from([8, 4]), n=st.sampled_from([1, 2, 3, 8, 16, 17, 63, 64, 130]),
       out=st.integers(1, 200), blocks=st.integers(1, 20), nth=st.integers(1, 4), with_bias=st.booleans())
@settings(max_examples=120, deadline=None)
def test_any_shape_gives_what_its_twin_gives_on_every_instruction_set(seed, bits, n, out, blocks, nth, with_bias):
    rng = np.random.default_rng(seed)
    stored = random_blocks(rng, out, blocks * 32, bits)
    x = rng.standard_normal((n, blocks * 32)).astype(np.float32)
    bias = rng.standard_normal(out).astype(np.float32) if with_bias else None
    wanted, allowed = twin(stored, bits, x, bias)
    for name in ISAS:
        lib.set_isa(name.encode())
        found = matmul(stored, bits, x, bias, nth)
        lib.set_isa(BEST)
        assert (np.abs(found - wanted) <= allowed + 1e-6).all(), name


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_token_gets_the_same_bits_alone_and_among_a_few_others(name, bits):
    rng = np.random.default_rng(1)
    stored = random_blocks(rng, 70, 352, bits)
    x = rng.standard_normal((16, 352)).astype(np.float32)
    lib.set_isa(name.encode())
    together = [matmul(stored, bits, x[:n], nth=n % 3 + 1) for n in range(1, 17)]
    lib.set_isa(BEST)
    for n, y in enumerate(together, 1):
        np.testing.assert_array_equal(y, together[-1][:n])


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
def test_extreme_codes_do_not_saturate(name, bits):
    x = np.ones((20, 64), np.float32)
    x[:, ::3] = -1                                  # codes of +-127
    stored = np.empty((3, 2, 34 if bits == 8 else 18), np.uint8)
    stored[..., :2] = np.array([1], np.float16).view(np.uint8)
    stored[0, :, 2:], stored[1, :, 2:], stored[2, :, 2:] = 0x80, 0x7f, 0xff
    stored = stored.reshape(3, -1)
    wanted, allowed = twin(stored, bits, x)
    lib.set_isa(name.encode())
    many, one = matmul(stored, bits, x), matmul(stored, bits, x[:1])
    lib.set_isa(BEST)
    assert (np.abs(many - wanted) <= allowed).all()
    assert (np.abs(one - wanted[:1]) <= allowed[:1]).all()


@given(seed=st.integers(0, 999), n=st.integers(1, 4), blocks=st.integers(1, 9), size=st.sampled_from([1e-30, 1.0, 1e8]))
@settings(max_examples=40, deadline=None)
def test_activations_are_rounded_to_a_127th_of_their_block(seed, n, blocks, size):
    x = (np.random.default_rng(seed).standard_normal((n, blocks * 32)) * size).astype(np.float32)
    x[:, :32] = 0
    for name in ISAS:
        lib.set_isa(name.encode())
        codes, scales, sums = encode(x, nth=1 + seed % 3)
        lib.set_isa(BEST)
        grouped = x.reshape(n, blocks, 32)
        np.testing.assert_allclose(scales, np.abs(grouped).max(-1) / np.float32(127), rtol=1e-6)
        error = np.abs(codes.reshape(grouped.shape) * scales[..., None].astype(np.float64) - grouped)
        assert (error <= 0.51 * scales[..., None]).all()
        np.testing.assert_array_equal(sums, codes.reshape(grouped.shape).sum(-1, dtype=np.int32))


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_carried_on_to_every_output(name, value):
    x = np.ones((1, 64), np.float32)
    x[0, 40] = value
    lib.set_isa(name.encode())
    y = matmul(random_blocks(np.random.default_rng(0), 70, 64, 8), 8, x)
    lib.set_isa(BEST)
    assert np.isnan(y).all()
