"""Our kernels inside onnxruntime: libsbedge registered with a session, and what its spiking linears have read."""
from __future__ import annotations

import ctypes
import itertools
import warnings

import onnxruntime as ort

from .native.library import NativeLibrary

_ids = itertools.count(1)


class OnnxTraffic:
    """Weight bytes of the spiking linears since the engine was loaded; see ggml_engine.Traffic."""

    def __init__(self, library: NativeLibrary, id: int):
        self._library, self._id = library, id

    def _bytes(self) -> tuple[int, int]:
        fetched, dense = ctypes.c_int64(), ctypes.c_int64()
        self._library.ort_traffic(self._id, ctypes.addressof(fetched), ctypes.addressof(dense))
        return fetched.value, dense.value

    @property
    def fetched(self) -> int:
        return self._bytes()[0]

    @property
    def dense(self) -> int:
        return self._bytes()[1]


def register_kernels(options: ort.SessionOptions, library: NativeLibrary, threads: int) -> OnnxTraffic | None:
    """Let sessions of `options` run our ops on our kernels, on `threads` threads of their own pool.

    Without them a session runs the bodies that the model carries; None, and a warning, if onnxruntime cannot take
    the library.
    """
    id = next(_ids)
    options.add_session_config_entry("ai.sbedge.threads", str(threads))
    options.add_session_config_entry("ai.sbedge.id", str(id))
    try:
        options.register_custom_ops_library(str(library.path.resolve()))
    except Exception as error:      # onnxruntime raises many kinds, with no common base
        reason = " ".join(str(error).split())[:300]
        warnings.warn(f"{library.path}: onnxruntime {ort.__version__} cannot use it ({reason}); "
                      "running on composed operations, which are slower", stacklevel=2)
        return None
    return OnnxTraffic(library, id)
