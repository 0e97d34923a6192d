"""pytest tests/test_event_layout.py: weight codes survive the event layout exactly, those beyond int8 too."""
from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sbedge.quant.event_layout import join_codes, split_codes

CODES = arrays(np.int32, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(-5000, 5000))


@given(CODES)
def test_codes_come_back_exactly(codes):
    np.testing.assert_array_equal(join_codes(*split_codes(codes)), codes)


@given(CODES)
def test_the_residual_holds_only_what_int8_cannot(codes):
    int8, index, value = split_codes(codes)
    assert int8.shape == codes.T.shape
    assert int8.dtype == np.int8
    assert len(index) == len(value) == np.count_nonzero((codes < -128) | (codes > 127))
