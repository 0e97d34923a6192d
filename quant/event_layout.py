"""The event layout: weight codes input-channel-major, so that a silent channel is a row never fetched."""
from __future__ import annotations

import numpy as np


def split_codes(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integer codes [out, in] -> int8 codes [in, out] and what they lack, as a sparse residual.

    Returns (int8 [in, out], index [m] int32 into the flattened [in, out], value [m] int32) with
    code = int8 + residual exactly. W8ASpike has about 1 % of codes beyond int8.
    """
    transposed = np.ascontiguousarray(codes.T)
    int8 = np.clip(transposed, -128, 127).astype(np.int8)
    residual = (transposed - int8).ravel()
    index = np.flatnonzero(residual).astype(np.int32)
    return int8, index, residual[index].astype(np.int32)


def join_codes(int8: np.ndarray, index: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The inverse of `split_codes`: integer codes [out, in] int32."""
    codes = int8.astype(np.int32)
    codes.reshape(-1)[index] += value
    return np.ascontiguousarray(codes.T)
