"""The native mixers against their NumPy twins, on every instruction set this machine has.

The twins are sbedge.reference's GLA and sliding-window layers without their projections, over plain arrays.
"""
from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbedge.config import GATE_DIVISOR
from sbedge.reference import int8_encode, log_sigmoid, relu, rms_norm, rope_angles, rotate, softmax, spike_encode
from sbedge.runtime.native.library import F16, F32, INT8, GlaInput, NativeLibrary, Ring, WindowInput, load_native

EPS = 1e-6
Array = np.ndarray
GlaCase = tuple[Array, Array, Array, Array, Array, Array]      # q, k, v, gate, S, norm_weight
WindowCase = tuple[Array, Array, Array, Array, Array]        # q, k, v, cos, sin
KINDS = {"f32": (F32, np.float32), "f16": (F16, np.float16), "int8": (INT8, np.int8)}     # of rings
LIBRARY = load_native()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="libsbedge is not built (cmake -B build, cmake --build build)")


@contextmanager
def instruction_set(name: str) -> Iterator[bool]:
    """Whether this machine has it; if so it is in use meanwhile."""
    assert LIBRARY is not None
    before = LIBRARY.isa()
    yield LIBRARY.set_isa(name.encode()) == 0
    LIBRARY.set_isa(before)


def available(name: str) -> bool:
    with instruction_set(name) as accepted:
        return accepted


ISAS = [name for name in ("scalar", "avx2", "avx512vnni", "neon") if LIBRARY and available(name)]


@pytest.fixture(params=ISAS)
def native(request: pytest.FixtureRequest) -> Iterator[NativeLibrary]:
    assert LIBRARY is not None
    with instruction_set(request.param):
        yield LIBRARY


# --- twins ---------------------------------------------------------------------------------------
def gla_twin(q, k, v, gate, S, norm_weight):
    """q [n, H, d], k v gate [n, G, d], S [G, d, d] (updated) -> [n, H * d], in the arrays' own precision."""
    n, H, d = q.shape
    G = k.shape[1]
    q = relu(q).reshape(n, G, H // G, d) * d ** -0.5
    k, decay = relu(k), np.exp(log_sigmoid(gate) / GATE_DIVISOR)
    o = np.empty(q.shape, q.dtype)
    for t in range(n):
        S[...] = decay[t][:, :, None] * S + k[t][:, :, None] * v[t][:, None, :]
        o[t] = q[t] @ S
    return rms_norm(o, norm_weight, EPS).reshape(n, H * d)


class RingTwin:
    """A window layer's state and its attention; its numbers are of one of KINDS."""

    def __init__(self, window: int, groups: int, d: int, kind: str):
        self.kind, self.int8 = kind, kind == "int8"
        self.codes = np.zeros((2, window, groups, d), KINDS[kind][1])       # keys, values
        self.scales = np.zeros((2, window, groups), np.float32)

    def copy(self) -> RingTwin:
        twin = RingTwin(*self.codes.shape[1:], self.kind)
        twin.codes[...], twin.scales[...] = self.codes, self.scales
        return twin

    def attend(self, q, k, v, cos, sin, position, query_k):
        """q [n, H, d], k v [n, G, d], cos sin [n, d / 2] -> [n, H * d]."""
        (n, H, d), G, W = q.shape, k.shape[1], self.codes.shape[1]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if query_k:
            count, threshold = spike_encode(q, query_k)
            q = count * threshold
        o = np.empty((n, G, H // G, d), np.float32)
        for t in range(n):
            slot = (position + t) % W
            for which, row in enumerate((k[t], v[t])):
                if self.int8:
                    self.codes[which, slot], self.scales[which, slot] = int8_encode(row)
                else:
                    self.codes[which, slot] = row
            length = min(position + t + 1, W)
            keys, values = (self.codes[:, :length].astype(np.float32)
                            * (self.scales[:, :length, :, None] if self.int8 else np.float32(1)))
            scores = np.einsum("ghd,wgd->ghw", q[t].reshape(G, H // G, d), keys) * np.float32(d ** -0.5)
            o[t] = np.einsum("ghw,wgd->ghd", softmax(scores), values)
        return o.reshape(n, H * d)


# --- calls ---------------------------------------------------------------------------------------
def padded(x: np.ndarray, extra: int) -> tuple[np.ndarray, int]:
    """[n, heads, d] as rows that are `extra` floats longer (NaN there), and the row stride."""
    flat = x.reshape(len(x), -1)
    room = np.full((len(x), flat.shape[1] + extra), np.nan, np.float32)
    room[:, :flat.shape[1]] = flat
    return room, room.shape[1]


def guarded(count: int) -> np.ndarray:
    """`count` floats and a guard behind them."""
    room = np.full(count + 8, np.nan, np.float32)
    room[count:] = 12345.0
    return room


def native_gla(native, q, k, v, gate, S, norm_weight, nth=1, extra=0) -> np.ndarray:
    (n, H, d), G = q.shape, k.shape[1]
    rows = [padded(x, extra) for x in (q, k, v, gate)]
    norm_weight = np.ascontiguousarray(norm_weight, np.float32)
    given = GlaInput(H, G, d, *(room.ctypes.data for room, _ in rows), *(stride for _, stride in rows),
                     norm_weight.ctypes.data, EPS)
    out, scratch = guarded(n * H * d), guarded(nth * native.gla_scratch(H, G, d, n))
    for ith in range(nth):
        native.gla(ctypes.byref(given), n, S.ctypes.data, out.ctypes.data, scratch.ctypes.data, ith, nth)
    assert (out[-8:] == 12345).all() and (scratch[-8:] == 12345).all()
    return out[:-8].reshape(n, H * d)


def native_window(native, twin, q, k, v, cos, sin, position, query_k=0.0, nth=1, extra=0) -> np.ndarray:
    (n, H, d), G, W = q.shape, k.shape[1], twin.codes.shape[1]
    rows = [padded(x, extra) for x in (q, k, v)]
    scales = [s.ctypes.data if twin.int8 else None for s in twin.scales]
    ring = Ring(W, G, d, twin.codes[0].ctypes.data, twin.codes[1].ctypes.data, *scales, KINDS[twin.kind][0])
    given = WindowInput(H, *(room.ctypes.data for room, _ in rows), cos.ctypes.data, sin.ctypes.data,
                        *(stride for _, stride in rows), query_k)
    out, scratch = guarded(n * H * d), guarded(nth * native.window_scratch(H, G, d, W, n))
    for ith in range(nth):
        native.window(ctypes.byref(given), position, n, ctypes.byref(ring), out.ctypes.data, scratch.ctypes.data,
                      ith, nth)
    assert (out[-8:] == 12345).all() and (scratch[-8:] == 12345).all()
    return out[:-8].reshape(n, H * d)


def gla_case(seed, n, H, G, d, gate_mean=0.0, gate_spread=2.0) -> GlaCase:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, heads, d), np.float32) for heads in (H, G, G))
    gate = (gate_mean + gate_spread * rng.standard_normal((n, G, d))).astype(np.float32)
    S = rng.standard_normal((G, d, d), np.float32)
    return q, k, v, gate, S, rng.standard_normal(d, np.float32)


def check_gla(native, case, **how):
    """Output and state within 1e-5 of their scale, against float64."""
    q, k, v, gate, S, weight = case
    exact = S.astype(np.float64)
    inputs = [x.astype(np.float64) for x in (q, k, v, gate)]
    expected = gla_twin(inputs[0], inputs[1], inputs[2], inputs[3], exact, weight.astype(np.float64))
    S = S.copy()
    out = native_gla(native, q, k, v, gate, S, weight, **how)
    assert np.abs(out - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
    assert np.abs(S - exact).max() <= 1e-5 * max(1, np.abs(exact).max())


def window_case(seed, n, H, G, d, position) -> WindowCase:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, heads, d), np.float32) for heads in (H, G, G))
    cos, sin = rope_angles(position + np.arange(n), d, 1e6)
    return q, k, v, cos, sin


def filled_ring(seed, window, groups, d, kind, position) -> RingTwin:
    rng = np.random.default_rng(seed)
    ring = RingTwin(window, groups, d, kind)
    length = min(window, position)
    rows = rng.standard_normal((2, length, groups, d), np.float32)
    if ring.int8:
        ring.codes[:, :length], ring.scales[:, :length] = int8_encode(rows)
    else:
        ring.codes[:, :length] = rows
    return ring


# --- gated linear attention ----------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 50])
@pytest.mark.parametrize("d", [1, 2, 5, 6, 16, 33, 64, 80, 128])
@pytest.mark.parametrize("group_size", [1, 4, 7, 8, 11])
def test_gla_equals_its_twin(native, group_size, d, n):
    check_gla(native, gla_case(d, n, 2 * group_size, 2, d))


@pytest.mark.parametrize("mean, spread", [(1e4, 0), (30, 5), (0, 0), (-8, 3), (-40, 30), (-300, 100), (-1e4, 10),
                                          (0, 1000)])
@pytest.mark.parametrize("n", [1, 100])
def test_gla_is_right_at_any_decay_from_none_to_total(native, n, mean, spread):
    check_gla(native, gla_case(3, n, 4, 2, 24, mean, spread))


def test_gla_keeps_a_channel_that_never_decays_beside_one_that_forgets_at_once(native):
    q, k, v, gate, S, weight = gla_case(4, 90, 4, 2, 16)
    gate[...] = 50
    gate[:, :, ::3] = -5000
    gate[40, 1] = -20000
    check_gla(native, (q, k, v, gate, S, weight))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_gla_in_any_chunks_is_gla_in_one(data):
    n = data.draw(st.integers(1, 120))
    cuts = sorted(data.draw(st.sets(st.integers(1, n), max_size=6)) | {n})
    q, k, v, gate, S, weight = gla_case(data.draw(st.integers(0, 99)), n, 6, 2, 20,
                                        data.draw(st.sampled_from([20.0, 0.0, -30.0])))
    for isa in ISAS:
        with instruction_set(isa):
            whole, parts = S.copy(), S.copy()
            expected = native_gla(LIBRARY, q, k, v, gate, whole, weight)
            begin = 0
            for end in cuts:
                some = slice(begin, end)
                out = native_gla(LIBRARY, q[some], k[some], v[some], gate[some], parts, weight)
                assert np.abs(out - expected[some]).max() <= 1e-5 * max(1, np.abs(expected).max())
                begin = end
            assert np.abs(parts - whole).max() <= 1e-5 * max(1, np.abs(whole).max())


@pytest.mark.parametrize("n", [1, 40])
def test_gla_reads_strided_rows_and_is_bit_equal_on_any_number_of_threads(native, n):
    q, k, v, gate, S, weight = gla_case(5, n, 12, 3, 20)
    alone = S.copy()
    expected = native_gla(native, q, k, v, gate, alone, weight)
    for nth in (2, 3, 5):
        shared = S.copy()
        out = native_gla(native, q, k, v, gate, shared, weight, nth=nth, extra=5)
        assert np.array_equal(out, expected) and np.array_equal(shared, alone)


# --- sliding window ------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 70])
@pytest.mark.parametrize("d", [2, 6, 16, 64, 80, 128])
@pytest.mark.parametrize("group_size", [1, 4, 7, 8])
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_window_equals_its_twin(native, kind, group_size, d, n):
    position, W = 57, 40
    twin = filled_ring(d, W, 2, d, kind, position)
    ring, case = twin.copy(), window_case(d, n, 2 * group_size, 2, d, position)
    out, expected = native_window(native, ring, *case, position), twin.attend(*case, position, 0)
    assert np.abs(out - expected).max() <= 1e-5
    assert np.array_equal(ring.codes, twin.codes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("W", [1, 5, 16, 300])
@pytest.mark.parametrize("position, n", [(0, 1), (0, 17), (3, 1), (3, 300), (299, 1), (299, 40), (320, 1), (10**12, 1),
                                         (10**12, 33), (2**62, 6)])
def test_window_sees_exactly_its_keys_and_keeps_the_last_of_them(native, position, n, W, kind):
    twin = filled_ring(W, W, 2, 8, kind, position)
    ring, case = twin.copy(), window_case(W + n, n, 6, 2, 8, position)
    query_k = 3.0 if twin.int8 else 0.0
    out, expected = native_window(native, ring, *case, position, query_k), twin.attend(*case, position, query_k)
    assert np.abs(out - expected).max() <= 1e-5
    assert np.array_equal(ring.codes, twin.codes) and np.array_equal(ring.scales, twin.scales)


@pytest.mark.parametrize("d", [2, 6, 64, 80, 128])
def test_int8_rings_hold_the_references_codes_and_scales_bit_for_bit(native, d):
    n, position = 60, 9
    twin = filled_ring(d, 32, 2, d, "int8", position)
    q, k, v, cos, sin = window_case(d, n, 14, 2, d, position)
    k[3], v[4], v[5] = 0, 1e-7, 3e7     # scales at their bounds
    v[5] *= 1 + np.arange(d, dtype=np.float32) / d
    v[6:] *= np.float32(0.01)
    ring = twin.copy()
    out = native_window(native, ring, q, k, v, cos, sin, position, 3.0)
    expected = twin.attend(q, k, v, cos, sin, position, 3.0)
    assert np.array_equal(ring.codes, twin.codes) and np.array_equal(ring.scales, twin.scales)
    assert np.abs(out - expected).max() <= 1e-5 * np.abs(expected).max()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_window_in_any_chunks_is_window_in_one(data):
    n, W, kind = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 90)), data.draw(st.sampled_from([*KINDS]))
    cuts = sorted(data.draw(st.sets(st.integers(1, n), max_size=6)) | {n})
    position = data.draw(st.sampled_from([0, 7, 10**12 + 5]))
    query_k = 3.0 if kind == "int8" else 0.0
    q, k, v, cos, sin = window_case(data.draw(st.integers(0, 99)), n, 6, 2, 10, position)
    for isa in ISAS:
        with instruction_set(isa):
            whole = filled_ring(1, W, 2, 10, kind, position)
            parts = whole.copy()
            expected = native_window(LIBRARY, whole, q, k, v, cos, sin, position, query_k)
            begin = 0
            for end in cuts:
                some = slice(begin, end)
                out = native_window(LIBRARY, parts, q[some], k[some], v[some], cos[some], sin[some], position + begin,
                                    query_k)
                assert np.abs(out - expected[some]).max() <= 1e-5
                begin = end
            assert np.array_equal(parts.codes, whole.codes) and np.array_equal(parts.scales, whole.scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 50])
def test_window_reads_strided_rows_and_is_bit_equal_on_any_number_of_threads(native, n, kind):
    position = 100
    case = window_case(6, n, 12, 3, 20, position)
    alone = filled_ring(2, 30, 3, 20, kind, position)
    expected = native_window(native, alone, *case, position, 3.0)
    for nth in (2, 3, 5):
        shared = filled_ring(2, 30, 3, 20, kind, position)
        out = native_window(native, shared, *case, position, 3.0, nth=nth, extra=7)
        assert np.array_equal(out, expected) and np.array_equal(shared.codes, alone.codes)


def test_window_attends_sharply_where_scores_are_large(native):
    position, W = 200, 150
    twin = filled_ring(3, W, 2, 32, "f32", position)
    twin.codes[0] *= 40
    ring, case = twin.copy(), window_case(8, 3, 8, 2, 32, position)
    out, expected = native_window(native, ring, *case, position), twin.attend(*case, position, 0)
    assert np.abs(out - expected).max() <= 5e-5     # scores near 200 are themselves rounded at 1e-5


# --- FFN -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 3, 16, 65, 200])
def test_silu_gate_equals_its_twin_at_any_size_of_input(native, n):
    rng = np.random.default_rng(n)
    gate, up = rng.standard_normal((2, n), np.float32)
    gate *= 10.0 ** rng.integers(-6, 5, n).astype(np.float32)
    out = guarded(n)
    native.silu_gate(gate.ctypes.data, up.ctypes.data, out.ctypes.data, n)
    exact = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        expected = exact / (1 + np.exp(-exact)) * up
    np.testing.assert_allclose(out[:-8], expected, rtol=2e-6, atol=1e-30)
    assert (out[-8:] == 12345).all()


def test_silu_gate_passes_on_what_is_no_number(native):
    gate, up = np.array([np.nan, 1, np.inf], np.float32), np.array([1, np.nan, 2], np.float32)
    out = np.zeros(3, np.float32)
    native.silu_gate(gate.ctypes.data, up.ctypes.data, out.ctypes.data, 3)
    assert np.isnan(out[:2]).all() and out[2] == np.inf
