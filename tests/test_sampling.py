"""Sampling: the filters, what is reported, repeatability, and refusals that name the option."""
from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sbedge.errors import InputError
from sbedge.runtime.sampling import Sampler, Sampling

LOGITS = np.log(np.array([0.05, 0.4, 0.3, 0.15, 0.1], np.float32))  # probabilities, by id


def drawn(sampling: Sampling, logits=LOGITS, times=400, history=()) -> Counter:
    sampler = Sampler(sampling)
    return Counter(sampler.sample(logits, history).id for _ in range(times))


def test_greedy_takes_the_most_likely_and_the_lowest_id_among_equals():
    assert Sampler(Sampling()).sample(LOGITS).id == 1
    assert Sampler(Sampling()).sample(np.array([1, 3, 3, 2], np.float32)).id == 1


def test_draws_follow_the_probabilities():
    found = drawn(Sampling(temperature=1, seed=0), times=4000)
    assert np.allclose([found[id] / 4000 for id in range(5)], np.exp(LOGITS), atol=0.03)


def test_temperature_sharpens_and_flattens():
    cold, hot = (drawn(Sampling(temperature=t, seed=0), times=2000)[1] for t in (0.3, 5.0))
    assert hot < 700 < 1100 < cold


@pytest.mark.parametrize("sampling, allowed", [
    (Sampling(temperature=1, seed=0, top_k=2), {1, 2}),
    (Sampling(temperature=1, seed=0, top_k=1), {1}),
    (Sampling(temperature=1, seed=0, top_k=99), {0, 1, 2, 3, 4}),
    (Sampling(temperature=1, seed=0, top_p=0.65), {1, 2}),
    (Sampling(temperature=1, seed=0, top_p=0.72), {1, 2, 3}),
    (Sampling(temperature=1, seed=0, top_p=1e-9), {1}),
    (Sampling(temperature=1, seed=0, min_p=0.3), {1, 2, 3}),
    (Sampling(temperature=1, seed=0, min_p=1.0), {1}),
    (Sampling(temperature=1, seed=0, top_k=3, top_p=0.8), {1, 2}),  # top_p of what top_k left: 0.7 / 0.85
    (Sampling(temperature=1, seed=0, top_k=4, min_p=0.5), {1, 2}),
    (Sampling(temperature=50, seed=0, min_p=0.3), {1, 2, 3}),       # min_p acts before temperature
    (Sampling(temperature=1, seed=0, logit_bias={1: -float("inf"), 0: 20}), {0}),
])
def test_filters_leave_exactly_the_tokens_they_should(sampling, allowed):
    assert set(drawn(sampling, times=3000)) == allowed


def test_penalties_act_on_recent_tokens_only():
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    assert Sampler(Sampling(repetition_penalty=1.2)).sample(logits, [0, 2]).id == 1
    assert Sampler(Sampling(presence_penalty=0.5)).sample(logits, [0, 0, 0]).id == 1
    assert Sampler(Sampling(presence_penalty=0.5, penalty_window=2)).sample(logits, [0, 2, 2]).id == 0
    assert Sampler(Sampling(presence_penalty=0.5, penalty_window=-1)).sample(logits, [0, *[2] * 99]).id == 1
    assert Sampler(Sampling(presence_penalty=0.5, penalty_window=0)).sample(logits, [0]).id == 0
    negative = np.array([-1.0, -1.1], np.float32)
    assert Sampler(Sampling(repetition_penalty=1.5)).sample(negative, [0]).id == 1


def test_logprobs_are_those_of_the_unmodified_model():
    sample = Sampler(Sampling(logit_bias={0: 50.0}, logprobs=3)).sample(LOGITS)
    assert sample.id == 0 and sample.logprob == pytest.approx(np.log(0.05), abs=1e-5)
    assert [id for id, _ in sample.top] == [1, 2, 3]
    assert [p for _, p in sample.top] == pytest.approx(np.log([0.4, 0.3, 0.15]), abs=1e-5)


def test_same_seed_same_tokens_and_a_kept_state_continues():
    sampling = Sampling(temperature=1, seed=7)
    first, second = Sampler(sampling), Sampler(sampling)
    assert [first.sample(LOGITS).id for _ in range(50)] == [second.sample(LOGITS).id for _ in range(50)]
    third = Sampler(Sampling(temperature=1))
    third.set_state(json.loads(json.dumps(first.get_state())))
    assert [first.sample(LOGITS).id for _ in range(50)] == [third.sample(LOGITS).id for _ in range(50)]


@given(hnp.arrays(np.float32, st.integers(1, 400), elements=st.floats(-30, 30, width=32)),
       st.floats(0.05, 3), st.integers(0, 500), st.floats(0.01, 1), st.floats(0, 1))
def test_every_combination_draws_a_token_that_all_filters_allow(logits, temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=0)
    id = Sampler(sampling).sample(logits).id
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if 0 < top_k < len(logits):
        order = order[:top_k]
    probabilities = np.exp(logits[order].astype(np.float64) - logits[order].max())
    probabilities /= probabilities.sum()
    before = np.concatenate([[0], probabilities.cumsum()[:-1]])
    allowed = {i for i, p, b in zip(order, probabilities, before, strict=True)
               if b < top_p + 1e-9 and p >= min_p * probabilities[0] * (1 - 1e-5)}
    assert id in allowed


@pytest.mark.parametrize("options, words", [
    ({"temperature": -0.1}, "temperature is -0.1"), ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": "hot"}, "temperature is 'hot'"), ({"top_k": -1}, "top_k is -1"), ({"top_k": 1.5}, "top_k is 1.5"),
    ({"top_p": 0}, "top_p is 0"), ({"top_p": 1.1}, "top_p is 1.1"), ({"min_p": 2}, "min_p is 2"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"), ({"presence_penalty": 1e9}, "presence_penalty"),
    ({"penalty_window": -2}, "penalty_window is -2"), ({"seed": -1}, "seed is -1"), ({"seed": 2**64}, "seed is"),
    ({"logprobs": -1}, "logprobs is -1"), ({"logit_bias": {-1: 0.0}}, "logit_bias token id is -1"),
    ({"logit_bias": {1: float("nan")}}, r"logit_bias\[1\] is nan"),
])
def test_bad_options_are_refused_by_name_value_and_range(options, words):
    with pytest.raises(InputError, match=f"{words}.*expected"):
        Sampling(**options)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error_and_no_token(bad, temperature):
    logits = LOGITS.copy()
    logits[2] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        Sampler(Sampling(temperature=temperature)).sample(logits)


def test_impossible_biases_are_refused():
    with pytest.raises(InputError, match="token id 5"):
        Sampler(Sampling(logit_bias={5: 1.0})).sample(LOGITS)
    with pytest.raises(InputError, match="bans every token"):
        Sampler(Sampling(logit_bias={id: -float("inf") for id in range(5)})).sample(LOGITS)


@pytest.mark.parametrize("state", [{}, {"bit_generator": "MT19937"}, {"bit_generator": "PCG64", "state": 1}])
def test_a_damaged_generator_state_is_refused(state):
    with pytest.raises(InputError):
        Sampler(Sampling()).set_state(state)
