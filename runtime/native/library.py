"""libsbedge through ctypes: found, checked, and its functions declared (see sbedge.h for what they do).

Searched beside this file (where an installed package has it), then in a checkout's build folder. `SBEDGE_NATIVE` names
another file, or `0` to do without. Without it everything runs on composed operations, only slower.
"""
from __future__ import annotations

import ctypes as c
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from .self_check import failing_kernel

ABI = 3
NAMES = ("libsbedge.so", "libsbedge.dylib", "sbedge.dll")
HERE = Path(__file__).parent
FOLDERS = (HERE, HERE.parents[1] / "build")

_P, _INT, _I32, _I64, _F32 = c.c_void_p, c.c_int, c.c_int32, c.c_int64, c.c_float
F32, F16, INT8 = 0, 1, 2        # Ring.type


class W8(c.Structure):
    """sbedge_w8: a linear layer in int8 codes, input-channel-major."""

    _fields_ = (("in", _I64), ("out", _I64), ("stripe", _I64), ("codes", _P), ("scales", _P), ("bias", _P),
                ("residual_start", _P), ("residual_output", _P), ("residual_value", _P), ("unsigned_codes", _I64))


class W4(c.Structure):
    """sbedge_w4: a linear layer in 4 bits, input-channel-major."""

    _fields_ = (("in", _I64), ("out", _I64), ("stripe", _I64), ("group", _I64), ("nibbles", _P), ("scales", _P),
                ("zeros", _P), ("bias", _P))


class Dense(c.Structure):
    """sbedge_dense: a linear layer in ggml's Q8_0 or Q4_0."""

    _fields_ = (("in", _I64), ("out", _I64), ("bits", _I64), ("blocks", _P), ("bias", _P))


class GlaInput(c.Structure):
    _fields_ = (("heads", _I64), ("groups", _I64), ("d", _I64), ("q", _P), ("k", _P), ("v", _P), ("gate", _P),
                ("q_stride", _I64), ("k_stride", _I64), ("v_stride", _I64), ("gate_stride", _I64),
                ("norm_weight", _P), ("eps", _F32), ("arrived", _I32))


class Ring(c.Structure):
    _fields_ = (("window", _I64), ("groups", _I64), ("d", _I64), ("keys", _P), ("values", _P),
                ("key_scales", _P), ("value_scales", _P), ("type", _I32))


class WindowInput(c.Structure):
    _fields_ = (("heads", _I64), ("q", _P), ("k", _P), ("v", _P), ("cos", _P), ("sin", _P),
                ("q_stride", _I64), ("k_stride", _I64), ("v_stride", _I64), ("query_k", _F32),
                ("arrived", _I32))


_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "abi": (_INT,), "isa": (c.c_char_p,), "set_isa": (_INT, c.c_char_p),
    "pool_new": (_P, _INT), "pool_free": (None, _P), "pool_threads": (_INT, _P),
    "pool_run": (None, _P, _P, _P, _INT),
    "spike_encode": (None, _P, _I64, _I64, _F32, _F32, _P, _P, _INT, _INT),
    "spike_matmul_w8": (_I64, _P, _P, _P, _I64, _P, _I64, _INT, _INT),
    "spike_matmul_w4": (_I64, _P, _P, _P, _I64, _P, _I64, _INT, _INT),
    "block_encode": (None, _P, _I64, _I64, _P, _P, _P, _INT, _INT),
    "dense_matmul": (None, _P, _P, _P, _P, _I64, _P, _I64, _INT, _INT),
    "gla_scratch": (_I64, _I64, _I64, _I64, _I64),
    "gla": (None, _P, _I64, _P, _P, _P, _INT, _INT),
    "window_scratch": (_I64, _I64, _I64, _I64, _I64, _I64),
    "window": (None, _P, _I64, _I64, _P, _P, _P, _INT, _INT),
    "silu_gate": (None, _P, _P, _P, _I64),
    "ort_traffic": (_INT, _I64, _P, _P),
}


class NativeLibrary:
    """Every function of sbedge.h as an attribute, without its `sbedge_` prefix; calls release the interpreter."""

    def __init__(self, path: Path):
        self.path = path
        handle = c.CDLL(str(path))
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(handle, "sbedge_" + name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.handle = handle

    def __getattr__(self, name: str) -> Any:    # only reached for names that __init__ did not set
        raise AttributeError(f"libsbedge has no {name}")


@cache
def load_native() -> NativeLibrary | None:
    """The library, or None where it is not built or not wanted."""
    wish = os.environ.get("SBEDGE_NATIVE", "")
    if wish == "0":
        return None
    candidates = [Path(wish)] if wish else [folder / name for folder in FOLDERS for name in NAMES]
    for path in candidates:
        if not path.is_file():
            continue
        try:
            library = NativeLibrary(path)
        except (OSError, AttributeError) as error:
            warnings.warn(f"{path}: cannot be used ({error}); running on composed operations", stacklevel=2)
            return None
        if library.abi() != ABI:
            warnings.warn(f"{path}: has ABI {library.abi()}, expected {ABI}; install sbedge again", stacklevel=2)
            return None
        if broken := failing_kernel(library):
            warnings.warn(f"{path}: {broken} is wrong on this machine with {library.isa().decode()}; "
                          "using the plain kernels, which are slower", stacklevel=2)
            library.set_isa(b"scalar")
        return library
    return None
