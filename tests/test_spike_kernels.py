"""pytest tests/test_spike_kernels.py: spike kernels equal their NumPy twins to the bit on every instruction set."""
from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isas import BEST, ISAS, lib

from sbedge.quant.event_layout import pack_nibbles, residual_rows, split_codes, to_stripes
from sbedge.runtime.native.library import W4, W8


@pytest.fixture(params=ISAS)
def isa(request):
    lib.set_isa(request.param.encode())
    yield request.param
    lib.set_isa(BEST)


def pointer(array):
    return None if array is None else array.ctypes.data


# --- spike coding ----------------------------------------------------------------------------------------------------
def encode_twin(x, k, dead_zone):
    """x [n, width] -> counts, thresholds; the mean is summed in float64 and rounded once."""
    mean = np.mean(np.abs(x).astype(np.float64), axis=-1, keepdims=True).astype(np.float32)
    threshold = np.clip(mean / np.float32(k), np.float32(1e-5), np.float32(1e4))
    counts = np.where(np.abs(x) < np.float32(dead_zone) * mean, np.float32(0), np.round(x / threshold))
    return counts.astype(np.int32), threshold[:, 0]


def encode(x, k, dead_zone=0.0, nth=1):
    counts, thresholds = np.full(x.shape, 77, np.int32), np.full(len(x), 77, np.float32)
    for ith in range(nth):
        lib.spike_encode(pointer(x), len(x), x.shape[1], k, dead_zone, pointer(counts), pointer(thresholds), ith, nth)
    return counts, thresholds


@given(seed=st.integers(0, 999), n=st.integers(1, 4), width=st.integers(1, 300), k=st.sampled_from([1.0, 3.0, 4.5]),
       size=st.sampled_from([1e-30, 1e-4, 1.0, 37.0, 1e8]), dead_zone=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=60, deadline=None)
def test_spike_counts_equal_the_twin_to_the_bit(seed, n, width, k, size, dead_zone):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((n, width)) ** 3 * size).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = 0
    wanted = encode_twin(x, k, dead_zone)
    for name in ISAS:
        lib.set_isa(name.encode())
        found = encode(x, k, dead_zone, nth=2)
        lib.set_isa(BEST)
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], wanted[1])


def test_ties_round_to_even(isa):
    x = np.array([[0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 3.5]], np.float32)     # mean |x| is 2
    counts, thresholds = encode(x, 2.0)
    assert thresholds.tolist() == [1.0]
    assert counts.tolist() == [[0, 2, 2, 4, 0, -2, -2, 4]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_thresholds_are_clamped_and_nothing_overflows(isa):
    x = np.zeros((5, 20), np.float32)
    x[1, 3], x[2, 3], x[3, 3], x[4, 3] = 3e38, -3e38, np.inf, np.nan
    counts, thresholds = encode(x, 3.0)
    assert thresholds[:4].tolist() == [np.float32(1e-5), 1e4, 1e4, 1e4]
    assert np.isnan(thresholds[4])
    assert counts[1, 3] == counts[3, 3] == 2147483520
    assert counts[2, 3] == -2147483520
    counts[1:4, 3] = 0
    assert not counts.any()


# --- matmul ----------------------------------------------------------------------------------------------------------
@dataclass
class Layer:
    """One linear with its native struct, and the integers it stands for."""

    codes: np.ndarray               # [in, out] int64: true codes, or nibbles less their zero points
    scales: np.ndarray              # [in / group, out] float32, or float16 in 4 bits
    bias: np.ndarray | None
    struct: W8 | W4
    held: list = field(default_factory=list)    # arrays that the struct points into

    def __call__(self, counts, thresholds, nth=1):
        n, out = len(counts), self.codes.shape[1]
        y = np.full((n, out + 3), 77, np.float32)
        kernel = lib.spike_matmul_w8 if isinstance(self.struct, W8) else lib.spike_matmul_w4
        fetched = sum(kernel(ctypes.addressof(self.struct), pointer(counts), pointer(thresholds), n, pointer(y),
                             out + 3, ith, nth) for ith in range(nth))
        assert (y[:, out:] == 77).all()
        return y[:, :out].copy(), fetched

    def twin(self, counts, thresholds):
        """Exact integer sums of each group, then float32 in the kernels' order."""
        group = 128 if isinstance(self.struct, W8) else self.struct.group
        y = np.zeros((len(counts), self.codes.shape[1]), np.float32)
        for g, scales in enumerate(self.scales):
            part = slice(g * group, (g + 1) * group)
            y += (counts[:, part].astype(np.int64) @ self.codes[part]).astype(np.float32) * scales.astype(np.float32)
        y *= thresholds[:, None]
        return y if self.bias is None else y + self.bias


def w8_layer(rng, inputs, out, residual=False, bias=False, stripe=0, unsigned=False):
    codes = rng.integers(-128, 128, (out, inputs), dtype=np.int32)
    if residual:
        beyond = rng.random(codes.shape) < 0.03
        codes[beyond] = rng.integers(-400, 400, np.count_nonzero(beyond))
    int8, index, value = split_codes(codes)
    stored = (int8.view(np.uint8) ^ 0x80) if unsigned else int8
    start, output = residual_rows(index, int8.shape)
    scales = rng.random((-(-inputs // 128), out), np.float32) * np.float32(0.01)
    shift = rng.standard_normal(out).astype(np.float32) if bias else None
    stored = to_stripes(stored, stripe or out)
    struct = W8(inputs, out, stripe, pointer(stored), pointer(scales), pointer(shift),
                pointer(start if residual else None), pointer(output), pointer(value), unsigned)
    return Layer(codes.T.astype(np.int64), scales, shift, struct, [stored, start, output, value])


def w4_layer(rng, inputs, out, group=32, zeros=True, bias=False, stripe=0):
    nibbles = rng.integers(0, 16, (inputs, out), dtype=np.uint8)
    packed = to_stripes(pack_nibbles(nibbles), (stripe or out) // 2)
    zero = rng.integers(0, 16, (inputs // group, out), dtype=np.uint8) if zeros else None
    scales = (rng.random((inputs // group, out), np.float32) * np.float32(0.01)).astype(np.float16)
    shift = rng.standard_normal(out).astype(np.float32) if bias else None
    struct = W4(inputs, out, stripe, group, pointer(packed), pointer(scales), pointer(zero), pointer(shift))
    codes = nibbles.astype(np.int64) - (np.repeat(zero.astype(np.int64), group, axis=0) if zero is not None else 8)
    return Layer(codes, scales, shift, struct, [packed, zero])


def spikes(rng, n, inputs, silent, largest=7):
    counts = rng.integers(-7, 8, (n, inputs), dtype=np.int32)
    counts[rng.random(counts.shape) < silent] = 0
    if largest > 7:     # a few outliers of every size up to the largest
        rare = rng.random(counts.shape) < 0.05
        sizes = np.exp(rng.uniform(0, np.log(largest), np.count_nonzero(rare))).astype(np.int32)
        counts[rare] = sizes * rng.choice([-1, 1], len(sizes))
        counts[:, inputs // 2] = -largest
    return counts, rng.random(n, np.float32) + np.float32(0.5)


def make_layer(kind, rng, inputs, out, bias=False):
    stripe = int(rng.choice([0, 64, 128]))
    if kind.startswith("w8"):
        return w8_layer(rng, inputs, out, "residual" in kind, bias, stripe, "unsigned" in kind)
    return w4_layer(rng, inputs, -(-out // 64) * 64, int(kind.split("-")[1]), "zeros" in kind, bias, stripe)


KINDS = ["w8", "w8-residual", "w8-unsigned", "w8-unsigned-residual",
         "w4-32", "w4-32-zeros", "w4-64-zeros", "w4-128", "w4-128-zeros"]
LARGEST = [7, 64, 65, 127, 128, 60_000]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out", [1, 63, 65, 200])
@pytest.mark.parametrize("inputs", [128, 384, 512])
def test_matmuls_equal_the_integer_twin_to_the_bit(isa, kind, out, inputs):
    rng = np.random.default_rng(out + inputs)
    layer = make_layer(kind, rng, inputs, out, bias=out % 2 == 0)
    for case, largest in enumerate(LARGEST):
        for n in (1, 5):
            counts, thresholds = spikes(rng, n, inputs, silent=case / 5, largest=largest)
            np.testing.assert_array_equal(layer(counts, thresholds)[0], layer.twin(counts, thresholds))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_batching_change_no_bit(isa, kind):
    rng = np.random.default_rng(3)
    layer = make_layer(kind, rng, 256, 200, bias=True)
    for n in (2, 3, 63, 64, 67, 130):
        counts, thresholds = spikes(rng, n, 256, silent=0.3, largest=60_000)
        counts[:, 5] = counts[n // 2] = 0       # a channel silent in all tokens, a token all silent
        wanted, _ = layer(counts, thresholds)
        np.testing.assert_array_equal(wanted, layer.twin(counts, thresholds))
        for nth in (2, 3, 9):
            np.testing.assert_array_equal(layer(counts, thresholds, nth)[0], wanted)
        for t in range(min(n, 4)):
            alone, _ = layer(counts[t:t + 1].copy(), thresholds[t:t + 1].copy(), 1 + t % 3)
            np.testing.assert_array_equal(alone[0], wanted[t])


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS), n=st.integers(1, 9), out=st.integers(1, 300),
       groups=st.integers(1, 4), silent=st.floats(0, 1), largest=st.sampled_from(LARGEST))
@settings(max_examples=80, deadline=None)
def test_any_shape_gives_the_twins_bits_on_every_instruction_set(seed, kind, n, out, groups, silent, largest):
    rng = np.random.default_rng(seed)
    layer = make_layer(kind, rng, groups * 128, out)
    counts, thresholds = spikes(rng, n, groups * 128, silent, largest)
    wanted = layer.twin(counts, thresholds)
    for name in ISAS:
        lib.set_isa(name.encode())
        found = layer(counts, thresholds, nth=1 + seed % 3)[0]
        lib.set_isa(BEST)
        np.testing.assert_array_equal(found, wanted)


def test_extreme_codes_and_counts_do_not_saturate(isa):
    rng = np.random.default_rng(4)
    layer = w8_layer(rng, 256, 100)
    for code in (-128, 127):
        layer.held[0][...] = layer.codes[...] = code
        for count in (-127, 64, 65, 127, 128, -60_000):
            counts = np.full((2, 256), count, np.int32)
            thresholds = np.ones(2, np.float32)
            np.testing.assert_array_equal(layer(counts, thresholds)[0], layer.twin(counts, thresholds))


@pytest.mark.parametrize("inputs", [1, 127, 130, 300])
def test_the_last_group_of_int8_inputs_may_be_short(isa, inputs):
    rng = np.random.default_rng(inputs)
    layer = w8_layer(rng, inputs, 70, residual=True)
    for n in (1, 4):
        counts, thresholds = spikes(rng, n, inputs, silent=0.2, largest=300)
        np.testing.assert_array_equal(layer(counts, thresholds)[0], layer.twin(counts, thresholds))


@pytest.mark.parametrize("kind", ["w8", "w8-residual", "w4-32"])
def test_returned_bytes_are_those_of_the_live_rows(isa, kind):
    rng = np.random.default_rng(5)
    layer = make_layer(kind, rng, 256, 192)
    counts, thresholds = spikes(rng, 3, 256, silent=0.7, largest=300)
    row = 192 if kind.startswith("w8") else 96
    assert layer(counts[:1], thresholds, nth=2)[1] == np.count_nonzero(counts[0]) * row
    assert layer(counts, thresholds, nth=3)[1] == np.count_nonzero(counts.any(axis=0)) * row


def test_silence_gives_the_bias(isa):
    layer = w8_layer(np.random.default_rng(6), 128, 70, bias=True)
    for n in (1, 3):
        y, fetched = layer(np.zeros((n, 128), np.int32), np.ones(n, np.float32))
        assert fetched == 0
        np.testing.assert_array_equal(y, np.tile(layer.bias, (n, 1)))


PAGE = mmap.PAGESIZE


@pytest.mark.skipif(os.name != "posix", reason="needs mprotect")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n", [1, 3])
def test_silent_rows_are_never_read(isa, bits, n):
    rng = np.random.default_rng(7)
    inputs, out = 128, PAGE * 8 // bits     # a row is a page
    layer = w8_layer(rng, inputs, out) if bits == 8 else w4_layer(rng, inputs, out)
    memory = mmap.mmap(-1, (inputs + 1) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memmove(address, pointer(layer.held[0]), inputs * PAGE)
    setattr(layer.struct, "codes" if bits == 8 else "nibbles", address)
    counts, thresholds = spikes(rng, 1, inputs, silent=0.6, largest=300)
    counts, thresholds = np.repeat(counts, n, axis=0), np.repeat(thresholds, n)
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for i in [*np.flatnonzero(counts[0] == 0), inputs]:     # and the page after the last row
        assert protect(address + int(i) * PAGE, PAGE, 0) == 0
    try:
        y, _ = layer(counts, thresholds, nth=2)
    finally:
        protect(address, (inputs + 1) * PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
    np.testing.assert_array_equal(y, layer.twin(counts, thresholds))
