"""pytest tests/test_gptq.py: rounding for outputs: on the grid, never worse than plain rounding, whatever was seen."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbedge.quant.blocks import blocks_of, dequantize_blocks
from sbedge.quant.event_layout import dequantize_w4, quantize_w4
from sbedge.quant.ggml_blocks import GGML_GRIDS, block_rows
from sbedge.quant.gptq import CLIPS, GRIDS, calibrate, output_error, rounded
from sbedge.quant.sparsity import SHARES, silence


def example(seed, inputs, outputs, dead=0, samples=200):
    """A weight [in, out] and the moments of inputs that are correlated and of very different sizes."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.standard_normal(inputs)).astype(np.float32)
    x = (rng.standard_normal((samples, inputs)) @ rng.standard_normal((inputs, inputs)) * sizes).astype(np.float32)
    x[:, rng.permutation(inputs)[:dead]] = 0
    return rng.standard_normal((inputs, outputs)).astype(np.float32), x.T @ x / np.float32(samples)


@given(seed=st.integers(0, 10_000), name=st.sampled_from(sorted(GRIDS)), inputs=st.integers(1, 150),
       outputs=st.integers(1, 20), dead=st.integers(0, 150), samples=st.sampled_from([1, 10, 400]))
@settings(max_examples=60, deadline=None)
def test_no_output_is_worse_than_by_rounding_and_all_is_on_the_grid(seed, name, inputs, outputs, dead, samples):
    """Odd sizes, channels that were never seen, and fewer samples than channels included."""
    weight, moments = example(seed, inputs, outputs, min(dead, inputs), samples)
    grid = GRIDS[name]
    plain = rounded(weight, np.ones(inputs, np.float32), grid, CLIPS[:1])
    found = calibrate(weight, moments, grid)
    # Sums in float32: as exact as the largest terms allow.
    slack = 1e-5 * float(np.abs(moments).sum()) * np.abs(found.weight() - weight).max(axis=0) ** 2
    assert (output_error(found, weight, moments) <= output_error(plain, weight, moments) * 1.001 + slack).all()
    assert found.levels.min() >= grid.least and found.levels.max() <= grid.most
    assert found.scales.shape == found.zeros.shape == (-(-inputs // grid.group), outputs)
    assert np.isfinite(found.weight()).all()
    if grid.middle is not None:
        assert (found.zeros == grid.middle).all()
    if grid.half:
        assert (found.scales == found.scales.astype(np.float16)).all()


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_correlated_inputs_gain_much(name):
    weight, moments = example(3, 256, 64, samples=1000)
    plain = rounded(weight, np.ones(256, np.float32), GRIDS[name], CLIPS[:1])
    gain = output_error(calibrate(weight, moments, GRIDS[name]), weight, moments).sum()
    assert gain < 0.6 * output_error(plain, weight, moments).sum()


def test_four_bits_beat_the_rounding_of_an_export():
    weight, moments = example(4, 256, 64, samples=1000)
    exported = dequantize_w4(quantize_w4(np.ascontiguousarray(weight.T), 64)).T - weight
    before = np.einsum("io,ij,jo->", exported, moments, exported)
    assert output_error(calibrate(weight, moments, GRIDS["w4-spike"]), weight, moments).sum() < 0.6 * before


def test_a_weight_on_the_grid_stays_as_it_is():
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (256, 8))
    codes[[0, 128]] = 127
    weight = (codes * np.float32(2 ** -7)).astype(np.float32)
    found = calibrate(weight, example(0, 256, 1)[1], GRIDS["w8-spike"])
    np.testing.assert_allclose(found.weight(), weight, atol=1e-6)


def test_a_second_time_gives_the_same():
    weight, moments = example(6, 130, 20)
    first, second = (calibrate(weight, moments, GRIDS["w4-spike"]) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_moments_that_are_no_numbers_are_refused():
    weight, moments = example(6, 16, 4)
    moments[3, 3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        calibrate(weight, moments, GRIDS["w4-spike"])


# --- the bytes -----------------------------------------------------------------------------------
@pytest.mark.parametrize("type_name", sorted(GGML_GRIDS))
def test_ggml_reads_the_levels_back(type_name):
    import gguf
    from gguf.quants import dequantize
    weight, moments = example(7, 96, 10)
    found = calibrate(weight, moments, GRIDS[GGML_GRIDS[type_name]])
    rows = block_rows(found, type_name)
    np.testing.assert_array_equal(dequantize(rows, gguf.GGMLQuantizationType[type_name]), found.weight().T)


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("inputs", [96, 70])
def test_blocks_read_the_levels_back(name, bits, inputs):
    weight, moments = example(8, inputs, 10)
    found = calibrate(weight, moments, GRIDS[name])
    np.testing.assert_array_equal(dequantize_blocks(blocks_of(found, bits), bits, inputs), found.weight().T)


# --- silence -------------------------------------------------------------------------------------
def test_a_dead_zone_silences_the_share_it_stands_for():
    x = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    found = silence(x, np.ones(64))
    mean = np.abs(x).mean(axis=1, keepdims=True)
    for share, zone in zip(SHARES, found.zones, strict=True):
        assert abs((np.abs(x) < zone * mean).mean() - share) < 0.01
    assert found.losses[0] == 0 and (np.diff(found.losses) >= 0).all()
