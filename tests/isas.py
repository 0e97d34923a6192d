"""The kernel library and the instruction sets it has here; test modules that import this are skipped without it."""
from __future__ import annotations

import pytest

from sbedge.runtime.native.library import load_native

lib = load_native()
if lib is None:
    pytest.skip("libsbedge is not built here", allow_module_level=True)

BEST = lib.isa()
ISAS = [name for name in ("scalar", "avx2", "avxvnni", "avx512vnni", "neon") if lib.set_isa(name.encode()) == 0]
lib.set_isa(BEST)
