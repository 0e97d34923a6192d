"""pytest tests/test_spike_stats.py: the figures of spike counts are what one counts by hand."""
from __future__ import annotations

import numpy as np
import pytest

from sbedge.quant.spike_stats import CountHistogram, energy


def histogram(*counts: float) -> CountHistogram:
    result = CountHistogram()
    result.add(np.array(counts))
    return result


def test_the_figures_equal_those_counted_by_hand() -> None:
    h = histogram(0, 0, 1, -3, 7, -8, 0, 2)         # bits set: 0 0 1 2 3 1 0 1; 8 takes two windows of 3 steps
    assert (h.total, h.largest, h.silent, h.small) == (8, 8, 3 / 8, 7 / 8)
    assert h.spikes == 8 / 8 and h.slots == 27 / 8
    assert h.slot_sparsity == pytest.approx(1 - 8 / 27)


def test_histograms_add_up_whatever_the_parts() -> None:
    assert histogram(0, 1).merged(histogram(-1, 1)).times == histogram(0, 1, -1, 1).times


def test_what_is_no_finite_number_is_no_count() -> None:
    with pytest.raises(ValueError, match="finite"):
        histogram(1, np.nan)


def test_energy_follows_the_reports_model() -> None:
    estimate = energy(100, 113)
    assert estimate == pytest.approx((150, 23, 3.39))
    assert estimate.saved_from_int8 == pytest.approx(1 - 3.39 / 23)
    assert estimate.saved_from_fp16 == pytest.approx(1 - 3.39 / 150)
