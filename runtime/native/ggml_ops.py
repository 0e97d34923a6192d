"""The structures of ggml_ops.h: what our nodes in a ggml graph are told."""
from __future__ import annotations

import ctypes as c

from .library import GlaInput, WindowInput

MAX_LINEARS = 4
KIND_W8, KIND_W4, KIND_DENSE = range(3)
_P, _I64, _F32 = c.c_void_p, c.c_int64, c.c_float


class EncodeOp(c.Structure):
    _fields_ = (("pool", _P), ("x", _P), ("k", _F32), ("dead_zone", _F32),
                ("n", _I64), ("width", _I64), ("counts", _P), ("thresholds", _P))


class BlockEncodeOp(c.Structure):
    _fields_ = (("pool", _P), ("x", _P), ("n", _I64), ("width", _I64), ("codes", _P), ("scales", _P), ("sums", _P))


class LinearsOp(c.Structure):
    _fields_ = (("pool", _P), ("counts", _P), ("thresholds", _P), ("codes", _P), ("scales", _P), ("sums", _P),
                ("n", _I64), ("count", _I64), ("weights", _P * MAX_LINEARS), ("kinds", _I64 * MAX_LINEARS),
                ("columns", _I64 * MAX_LINEARS), ("y", _P), ("y_stride", _I64),
                ("gated", _I64), ("out", _P), ("bytes", _I64), ("traffic", _P))


class GlaOp(c.Structure):
    _fields_ = (("pool", _P), ("input", GlaInput), ("n", _I64), ("sequences", _I64), ("states", _P), ("out", _P),
                ("scratch", _P))


class WindowOp(c.Structure):
    _fields_ = (("pool", _P), ("input", WindowInput), ("positions", _P), ("n", _I64), ("sequences", _I64),
                ("rings", _P), ("out", _P), ("scratch", _P))
