"""Compares the chosen instruction set with plain C++ on small cases when the library is loaded."""
from __future__ import annotations

import ctypes as c
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .library import NativeLibrary

TOLERANCE = 1e-4


def failing_kernel(library: NativeLibrary) -> str | None:
    """The first kernel that differs from its scalar form, or None. Leaves the instruction set as it was."""
    chosen = library.isa()
    found = _results(library)
    library.set_isa(b"scalar")
    expected = _results(library)
    library.set_isa(chosen)
    for name, exact in expected.items():
        if not np.allclose(found[name], exact, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=False):
            return name
    return None


def _results(library: NativeLibrary) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"spike_encode": _encode(library, rng), "spike_matmul_w8": _matmul(library, rng, 8),
            "spike_matmul_w4": _matmul(library, rng, 4), "dense_matmul": _dense(library, rng),
            "gla": _gla(library, rng), "window": _window(library, rng)}


def _floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _encode(library: NativeLibrary, rng: np.random.Generator) -> np.ndarray:
    x, counts, thresholds = _floats(rng, 2, 200), np.empty((2, 200), np.int32), np.empty(2, np.float32)
    library.spike_encode(x.ctypes.data, 2, 200, 3.0, 0.1, counts.ctypes.data, thresholds.ctypes.data, 0, 1)
    return np.append(counts, thresholds)


def _matmul(library: NativeLibrary, rng: np.random.Generator, bits: int) -> np.ndarray:
    from .library import W4, W8
    width, out, n = 256, 192, 5
    codes = rng.integers(-128, 128, (width, out if bits == 8 else out // 2), np.int8)
    scales, thresholds = np.abs(_floats(rng, width // 128, out)), np.abs(_floats(rng, n))
    scales = scales.astype(np.float32 if bits == 8 else np.float16)
    counts = (rng.integers(-3, 4, (n, width)) * (rng.random((n, width)) < 0.5)).astype(np.int32)
    counts[0, 7] = 3573     # real counts reach this
    weight: c.Structure = (W8(width, out, 64, codes.ctypes.data, scales.ctypes.data) if bits == 8 else
                           W4(width, out, 64, 128, codes.ctypes.data, scales.ctypes.data))
    matmul = library.spike_matmul_w8 if bits == 8 else library.spike_matmul_w4
    y = np.empty((n + 1, out), np.float32)
    matmul(c.addressof(weight), counts.ctypes.data, thresholds.ctypes.data, n, y.ctypes.data, out, 0, 1)
    matmul(c.addressof(weight), counts.ctypes.data, thresholds.ctypes.data, 1, y[n:].ctypes.data, out, 0, 1)
    return y / np.abs(y).max()


def _dense(library: NativeLibrary, rng: np.random.Generator) -> np.ndarray:
    from .library import Dense
    width, out, n, rows = 96, 70, 5, []
    x, codes = _floats(rng, n, width), np.empty((n, width), np.int8)
    scales, sums = np.empty((n, width // 32), np.float32), np.empty((n, width // 32), np.int32)
    library.block_encode(x.ctypes.data, n, width, codes.ctypes.data, scales.ctypes.data, sums.ctypes.data, 0, 1)
    for bits, nbytes in ((8, 34), (4, 18)):
        blocks = rng.integers(0, 256, (out, width // 32, nbytes), np.uint8)
        blocks[..., :2] = np.abs(_floats(rng, out, width // 32, 1)).astype(np.float16).view(np.uint8)
        weight, y = Dense(width, out, bits, blocks.ctypes.data), np.empty((n + 1, out), np.float32)
        for count, target in ((n, y), (1, y[n:])):
            library.dense_matmul(c.addressof(weight), codes.ctypes.data, scales.ctypes.data, sums.ctypes.data, count,
                                 target.ctypes.data, out, 0, 1)
        rows.append(y / np.abs(y).max())
    return np.concatenate(rows)


def _gla(library: NativeLibrary, rng: np.random.Generator) -> np.ndarray:
    from .library import GlaInput
    H, G, d, n = 4, 2, 24, 37
    q, k, v, gate, norm = (_floats(rng, n, heads * d) for heads in (H, G, G, G, 1))
    given = GlaInput(H, G, d, q.ctypes.data, k.ctypes.data, v.ctypes.data, gate.ctypes.data, H * d, G * d, G * d,
                     G * d, norm.ctypes.data, 1e-6)
    state, out = np.zeros((G, d, d), np.float32), np.empty((n + 1, H * d), np.float32)
    scratch = np.empty(library.gla_scratch(H, G, d, n), np.float32)
    for count, rows in ((n, out), (1, out[n:])):
        library.gla(c.addressof(given), count, state.ctypes.data, rows.ctypes.data, scratch.ctypes.data, 0, 1)
    return np.concatenate([out.ravel(), state.ravel()])


def _window(library: NativeLibrary, rng: np.random.Generator) -> np.ndarray:
    from .library import Ring, WindowInput
    H, G, d, W, n = 4, 2, 24, 10, 13
    q, k, v = (_floats(rng, n, heads * d) for heads in (H, G, G))
    cos, sin = np.cos(_floats(rng, n, d // 2)), np.sin(_floats(rng, n, d // 2))
    given = WindowInput(H, q.ctypes.data, k.ctypes.data, v.ctypes.data, cos.ctypes.data, sin.ctypes.data, H * d,
                        G * d, G * d, 0.0)
    keys, values = np.zeros((2, W, G, d), np.float32)
    ring = Ring(W, G, d, keys.ctypes.data, values.ctypes.data)
    out = np.empty((n + 1, H * d), np.float32)
    scratch = np.empty(library.window_scratch(H, G, d, W, n), np.float32)
    for position, count, rows in ((0, n, out), (n, 1, out[n:])):
        library.window(c.addressof(given), position, count, c.addressof(ring), rows.ctypes.data, scratch.ctypes.data,
                       0, 1)
    return np.concatenate([out.ravel(), keys.ravel(), values.ravel()])
