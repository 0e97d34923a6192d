"""pytest tests/test_spike_trains.py: a spike train adds up to the count it came from, exactly, in every code."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from sbedge.quant.spike_trains import (
    CODES,
    SpikeTrain,
    bidirectional_train,
    binary_train,
    spike_counts,
    spike_matmul,
    ternary_train,
    twos_complement_train,
    unsigned_train,
)
from sbedge.reference import spike_encode

SIGNED = ("ternary", "bidirectional", "twos_complement")
BITWISE = ("unsigned", "bidirectional", "twos_complement")
SHAPES = array_shapes(max_dims=3, max_side=6, min_side=0)
SMALL = st.integers(-300, 300)
ANY_INT32 = st.one_of(st.integers(-2**31, 2**31 - 1), st.sampled_from([-2**31, 2**31 - 1, 0, 1, -1]),
                      st.integers(0, 31).flatmap(lambda bit: st.sampled_from([2**bit - 1, -2**bit, 1 - 2**bit])))


def counts_of(elements):
    return arrays(np.int64, SHAPES, elements=elements)


def legal(code, counts):
    return counts if code in SIGNED else np.abs(counts)


@given(counts_of(SMALL), st.sampled_from(sorted(CODES)))
def test_counts_come_back_from_every_code(counts, code):
    counts = legal(code, counts)
    train = CODES[code](counts)
    assert train.spikes.dtype == np.int8 and train.spikes.shape == (len(train.weights), *counts.shape)
    assert np.isin(train.spikes, [-1, 0, 1] if code in ("ternary", "bidirectional") else [0, 1]).all()
    np.testing.assert_array_equal(np.tensordot(train.weights, train.spikes.astype(np.int64), 1), counts)
    np.testing.assert_array_equal(spike_counts(train), counts)


@given(counts_of(ANY_INT32), st.sampled_from(BITWISE))
def test_any_int32_count_comes_back_from_the_bitwise_codes(counts, code):
    counts = legal(code, counts)
    train = CODES[code](counts)
    np.testing.assert_array_equal(spike_counts(train), counts)
    bits = int(np.abs(counts).max()).bit_length() if counts.size else 0
    assert len(train.weights) == bits + (code == "twos_complement")


def test_the_trains_of_five_are_those_of_the_specification():
    assert binary_train(np.array([5, 2])).spikes.T.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert ternary_train(np.array([-3, 2])).spikes.T.tolist() == [[-1, -1, -1], [1, 1, 0]]
    assert unsigned_train(np.array([5, 2])).spikes.T.tolist() == [[1, 0, 1], [0, 1, 0]]
    assert bidirectional_train(np.array([-5, 2])).spikes.T.tolist() == [[-1, 0, -1], [0, 1, 0]]
    train = twos_complement_train(np.array([-5, 2]))
    assert train.spikes.T.tolist() == [[1, 0, 1, 1], [0, 0, 1, 0]] and train.weights.tolist() == [-8, 4, 2, 1]
    assert unsigned_train(np.array([5])).weights.tolist() == [4, 2, 1]
    assert binary_train(np.array([5])).weights.tolist() == [1] * 5


@pytest.mark.parametrize("code", sorted(CODES))
@pytest.mark.parametrize("shape", [(0,), (3, 0), (4,), (2, 3), ()])
def test_silence_and_nothing_have_trains_too(code, shape):
    train = CODES[code](np.zeros(shape, np.int32))
    assert train.events == 0 and train.spikes.shape[1:] == shape
    assert len(train.weights) == (1 if code == "twos_complement" else 0)
    np.testing.assert_array_equal(spike_counts(train), np.zeros(shape))


@given(st.integers(1, 5).flatmap(lambda n: arrays(np.float32, (n, 40), elements=st.floats(-100, 100, width=32))))
def test_what_a_model_spikes_comes_back_as_the_float_it_was(x):
    counts, _ = spike_encode(x, 3.0)
    for code in SIGNED:
        np.testing.assert_array_equal(spike_counts(CODES[code](counts)), counts)


@given(counts_of(SMALL))
def test_events_are_the_rows_an_event_driven_machine_adds(counts):
    assert ternary_train(counts).events == np.abs(counts).sum()
    assert bidirectional_train(counts).events == sum(int(c).bit_count() for c in np.abs(counts).ravel())


@given(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 7)), st.integers(0, 2**32 - 1),
       st.sampled_from(sorted(CODES)), st.booleans())
def test_matmul_over_spikes_equals_the_matmul_of_counts(sizes, seed, code, large):
    tokens, inputs, outputs = sizes
    rng = np.random.default_rng(seed)
    most = 2**31 - 1 if large and code in BITWISE else 40
    counts = legal(code, rng.integers(-most, most + 1, (tokens, inputs)))
    weights = rng.integers(-400, 401, (inputs, outputs)).astype(np.int32)       # beyond int8, as W8ASpike's residual
    np.testing.assert_array_equal(spike_matmul(CODES[code](counts), weights), counts @ weights)


def test_matmul_over_spikes_does_not_overflow_int8_codes():
    codes = np.full((300, 2), 127, np.int8)
    counts = np.full((1, 300), 3573)
    np.testing.assert_array_equal(spike_matmul(bidirectional_train(counts), codes), [[300 * 3573 * 127] * 2])


def test_a_silent_channel_is_never_read():
    class Watched(np.ndarray):
        def __getitem__(self, key):
            assert not (isinstance(key, np.ndarray) and key.dtype == bool and key[1])
            return super().__getitem__(key)

    codes = np.arange(6).reshape(3, 2).view(Watched)
    assert spike_matmul(bidirectional_train(np.array([[2, 0, -1]])), codes).tolist() == [[-4, -3]]


@pytest.mark.parametrize("code", ["binary", "unsigned"])
def test_codes_without_signs_refuse_negative_counts(code):
    with pytest.raises(ValueError, match="found -1; use one with signs"):
        CODES[code](np.array([3, -1]))


@pytest.mark.parametrize("code", sorted(CODES))
@pytest.mark.parametrize("counts", [[0.5], [np.nan], [np.inf], [2.0**60], [-2**62]])
def test_what_is_no_count_is_refused(code, counts):
    with pytest.raises(ValueError, match=r"expected|found -"):
        CODES[code](np.array(counts))


@pytest.mark.parametrize("code", ["binary", "ternary"])
def test_a_count_that_would_need_gigabytes_of_steps_is_refused(code):
    with pytest.raises(ValueError, match="use a bitwise code"):
        CODES[code](np.array([2**31 - 1, 1]))


def test_weights_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="3 channels, found 4"):
        spike_matmul(SpikeTrain(np.zeros((1, 2, 3), np.int8), np.ones(1, np.int64)), np.zeros((4, 2)))
