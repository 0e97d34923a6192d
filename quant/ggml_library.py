"""The ggml libraries of an installed package, through ctypes: found, loaded once, functions declared.

llama-cpp-python's copy is taken if it is installed, else libggml-python's (`SBEDGE_GGML` = llama_cpp or
libggml forces one). Only functions that both export are used, and no struct layout is assumed beyond
`ggml_init_params`, so any ggml from 0.20 on will do.
"""
from __future__ import annotations

import ctypes as c
import importlib.util
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sbedge.errors import EngineUnavailable
from sbedge.gguf_format import TYPES, row_bytes

PACKAGES = {"llama_cpp": "lib", "libggml": "lib64"}     # import name -> folder of its libraries
INSTALL_HINT = "install one with: pip install 'sbedge[ggml]'"
SUFFIXES = (".so", ".dylib", ".dll")

SPIN_COUNT = "300"      # about a microsecond: the wait of two threads that are both running
LOG_LEVELS = (3, 4)     # warnings and errors; the others are chatter
LOG_CALLBACK = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)

_P, _INT, _I64, _SIZE, _F32, _BOOL = c.c_void_p, c.c_int, c.c_int64, c.c_size_t, c.c_float, c.c_bool


class InitParams(c.Structure):
    _fields_ = (("mem_size", c.c_size_t), ("mem_buffer", c.c_void_p), ("no_alloc", c.c_bool))


# Called thousands of times to build a graph, each for a microsecond: through PyDLL, which keeps the GIL.
_BUILD: dict[str, tuple[Any, ...]] = {
    "ggml_cpu_has_avx2": (_INT,), "ggml_cpu_has_dotprod": (_INT,),
    "ggml_log_set": (None, LOG_CALLBACK, _P), "ggml_init": (_P, InitParams), "ggml_free": (None, _P),
    "ggml_tensor_overhead": (_SIZE,), "ggml_graph_overhead_custom": (_SIZE, _SIZE, _BOOL),
    "ggml_new_tensor": (_P, _P, _INT, _INT, _P), "ggml_set_input": (None, _P), "ggml_set_output": (None, _P),
    "ggml_get_data": (_P, _P), "ggml_nbytes": (_SIZE, _P),
    "ggml_new_graph_custom": (_P, _P, _SIZE, _BOOL), "ggml_build_forward_expand": (None, _P, _P),
    "ggml_graph_n_nodes": (_INT, _P),
    "ggml_get_rows": (_P, _P, _P, _P), "ggml_set_rows": (_P, _P, _P, _P, _P), "ggml_mul_mat": (_P, _P, _P, _P),
    "ggml_out_prod": (_P, _P, _P, _P), "ggml_add": (_P, _P, _P, _P), "ggml_sub": (_P, _P, _P, _P),
    "ggml_mul": (_P, _P, _P, _P), "ggml_div": (_P, _P, _P, _P), "ggml_cpy": (_P, _P, _P, _P),
    "ggml_rms_norm": (_P, _P, _P, _F32), "ggml_abs": (_P, _P, _P), "ggml_mean": (_P, _P, _P),
    "ggml_neg": (_P, _P, _P), "ggml_exp": (_P, _P, _P), "ggml_relu": (_P, _P, _P), "ggml_softplus": (_P, _P, _P),
    "ggml_cont": (_P, _P, _P), "ggml_scale": (_P, _P, _P, _F32), "ggml_scale_bias": (_P, _P, _P, _F32, _F32),
    "ggml_clamp": (_P, _P, _P, _F32, _F32), "ggml_swiglu": (_P, _P, _P),
    "ggml_soft_max_ext": (_P, _P, _P, _P, _F32, _F32), "ggml_concat": (_P, _P, _P, _P, _INT),
    "ggml_roll": (_P, _P, _P, _INT, _INT, _INT, _INT), "ggml_pool_1d": (_P, _P, _P, _INT, _INT, _INT, _INT),
    "ggml_step": (_P, _P, _P), "ggml_repeat_4d": (_P, _P, _P, _I64, _I64, _I64, _I64),
    "ggml_permute": (_P, _P, _P, _INT, _INT, _INT, _INT), "ggml_transpose": (_P, _P, _P),
    "ggml_reshape_2d": (_P, _P, _P, _I64, _I64), "ggml_reshape_3d": (_P, _P, _P, _I64, _I64, _I64),
    "ggml_reshape_4d": (_P, _P, _P, _I64, _I64, _I64, _I64),
    "ggml_view_1d": (_P, _P, _P, _I64, _SIZE), "ggml_view_2d": (_P, _P, _P, _I64, _I64, _SIZE, _SIZE),
    "ggml_view_3d": (_P, _P, _P, _I64, _I64, _I64, _SIZE, _SIZE, _SIZE),
    "ggml_custom_4d": (_P, _P, _INT, _I64, _I64, _I64, _I64, _P, _INT, _P, _INT, _P),
    "ggml_gated_linear_attn": (_P, _P, _P, _P, _P, _P, _P, _F32),
    "ggml_backend_tensor_alloc": (_INT, _P, _P, _P),
    "ggml_backend_cpu_buffer_from_ptr": (_P, _P, _SIZE), "ggml_backend_buffer_free": (None, _P),
    "ggml_backend_buffer_get_base": (_P, _P), "ggml_backend_buft_get_alignment": (_SIZE, _P),
    "ggml_backend_buft_get_alloc_size": (_SIZE, _P, _P), "ggml_backend_buft_name": (c.c_char_p, _P),
    "ggml_backend_cpu_buffer_type": (_P,), "ggml_backend_reg_get_proc_address": (_P, _P, c.c_char_p),
    "ggml_backend_cpu_reg": (_P,), "ggml_backend_reg_dev_get": (_P, _P, _SIZE),
    "ggml_gallocr_new": (_P, _P), "ggml_gallocr_free": (None, _P), "ggml_gallocr_get_buffer_size": (_SIZE, _P, _INT),
    "ggml_backend_cpu_init": (_P,), "ggml_backend_free": (None, _P),
    "ggml_backend_cpu_set_n_threads": (None, _P, _INT), "ggml_backend_cpu_set_threadpool": (None, _P, _P),
    "ggml_threadpool_params_init": (None, _P, _INT), "ggml_threadpool_free": (None, _P),
    "ggml_threadpool_new": (_P, _P),
}
# Called to do work: through CDLL, which releases the GIL.
_WORK: dict[str, tuple[Any, ...]] = {
    "ggml_backend_graph_compute": (_INT, _P, _P), "ggml_gallocr_alloc_graph": (_BOOL, _P, _P),
    "ggml_quantize_chunk": (_SIZE, _INT, _P, _P, _I64, _I64, _I64, _P),
    "ggml_backend_tensor_set": (None, _P, _P, _SIZE, _SIZE),
    "ggml_backend_buft_alloc_buffer": (_P, _P, _SIZE),
}


@dataclass(frozen=True)
class GgmlLibrary:
    """Loaded libraries: every declared function is an attribute of `f`, without its `ggml_` prefix."""

    package: str
    f: Any


@cache
def load_ggml() -> GgmlLibrary:
    """Load the libraries once per process; EngineUnavailable says which command installs them."""
    forced = os.environ.get("SBEDGE_GGML")
    if forced and forced not in PACKAGES:
        raise EngineUnavailable(f"SBEDGE_GGML is {forced!r}, expected one of {', '.join(PACKAGES)}")
    for package in [forced] if forced else PACKAGES:
        folder = _library_folder(package)
        if folder:
            return GgmlLibrary(package, _declare(folder))
    wanted = forced or "llama-cpp-python or libggml-python"
    raise EngineUnavailable(f"the GGUF engine needs the ggml libraries ({wanted} not installed); {INSTALL_HINT}")


def ggml_available() -> bool:
    try:
        load_ggml()
    except EngineUnavailable:
        return False
    return True


def _library_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    folders = (root / PACKAGES[package], root / "lib")
    return next((f for f in folders if f.is_dir() and _library(f, "ggml-base")), None)


def _library(folder: Path, stem: str) -> Path | None:
    names = [f"{prefix}{stem}{suffix}" for suffix in SUFFIXES for prefix in ("lib", "")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _declare(folder: Path) -> Any:
    # In the order of their dependence on each other; by full path, so that each is loaded once.
    paths = [path for stem in ("ggml-base", "ggml-cpu", "ggml") if (path := _library(folder, stem))]
    # llama-cpp-python's ggml waits in OpenMP barriers, several hundred a token, spinning for milliseconds each: with
    # another process on the cores a token takes seconds. Read once, when the library is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        handles = {kind: [kind(str(path)) for path in paths] for kind in (c.CDLL, c.PyDLL)}
    except OSError as error:
        raise EngineUnavailable(f"{folder}: ggml cannot be loaded ({error}); {INSTALL_HINT}") from None
    functions = {}
    for kind, table in ((c.PyDLL, _BUILD), (c.CDLL, _WORK)):
        for name, (result, *arguments) in table.items():
            function = next((getattr(h, name) for h in handles[kind] if hasattr(h, name)), None)
            if function is None:
                raise EngineUnavailable(f"{folder}: this ggml has no {name}; it is too old, {INSTALL_HINT}")
            function.restype, function.argtypes = result, arguments
            functions[name.removeprefix("ggml_")] = function
    functions["log_set"](_log, None)
    return type("Functions", (), {k: staticmethod(v) for k, v in functions.items()})


@LOG_CALLBACK
def _log(level: int, text: bytes, _: object) -> None:
    if level in LOG_LEVELS:
        sys.stderr.write(text.decode("utf-8", "replace"))


def quantize_rows(rows: np.ndarray, type_name: str) -> np.ndarray:
    """[n, width] float32 -> [n, row_bytes] uint8 in one of ggml's types.

    By ggml's own quantizer; without ggml the simple types go through the gguf package (slower, same format).
    """
    if type_name == "F32":
        return np.ascontiguousarray(rows, np.float32).view(np.uint8)
    if type_name == "F16":
        return rows.astype(np.float16).view(np.uint8)
    rows = np.ascontiguousarray(rows, np.float32)
    n, width = rows.shape
    if not ggml_available() and not type_name.endswith("_K"):
        return gguf.quants.quantize(rows, gguf.GGMLQuantizationType[type_name])
    out = np.empty((n, row_bytes(type_name, width)), np.uint8)
    load_ggml().f.quantize_chunk(TYPES[type_name].number, rows.ctypes.data, out.ctypes.data, 0, n, width, None)
    return out
