"""Levels found by calibration as the bytes of ggml's block formats; see quant/gptq.py."""
from __future__ import annotations

import numpy as np

from .gptq import GRIDS, Levels

BLOCK = 32
GGML_GRIDS = {"Q8_0": "q8_0", "Q4_0": "q4_0"}


def block_rows(levels: Levels, type_name: str) -> np.ndarray:
    """A weight on the grid of `type_name` (a key of GGML_GRIDS) -> [out, row bytes] uint8."""
    middle = GRIDS[GGML_GRIDS[type_name]].middle
    assert levels.group == BLOCK and middle is not None
    codes = levels.levels.T.reshape(levels.levels.shape[1], -1, BLOCK)              # [out, blocks, 32]
    scales = np.ascontiguousarray(levels.scales.T.astype(np.float16)).view(np.uint8).reshape(*codes.shape[:2], 2)
    if type_name == "Q8_0":
        body = (codes.astype(np.int16) - middle).astype(np.int8).view(np.uint8)
    else:
        body = codes[..., :BLOCK // 2] | codes[..., BLOCK // 2:] << 4
    return np.concatenate([scales, body], axis=-1).reshape(len(codes), -1)
