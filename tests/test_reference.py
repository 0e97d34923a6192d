"""The reference computes what the published PyTorch implementation computes, however it is streamed."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden import FOLDERS, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from sbedge.errors import InputError, StateError
from sbedge.reference import Reference, int8_encode, rope_angles, spike_encode
from sbedge.state import State

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def golden(request: pytest.FixtureRequest) -> tuple[Reference, dict[str, np.ndarray]]:
    folder: Path = request.param
    with np.load(folder / "expected.npz") as file:
        return Reference(folder), dict(file)


@pytest.fixture(scope="module")
def tiny() -> tuple[Reference, np.ndarray]:
    with np.load(TINY / "expected.npz") as file:
        return Reference(TINY), file["input_ids"]


def stream(model: Reference, ids: np.ndarray, sizes: list[int]) -> tuple[np.ndarray, State]:
    """Logits [n, V] and final state when `ids` are fed in chunks of `sizes`, then one by one."""
    state, out, start = model.new_state(), [], 0
    for size in [*sizes, *[1] * len(ids)]:
        if chunk := ids[start:start + size].tolist():
            rows = model.forward(chunk, state, logits="all")
            assert rows is not None
            out.append(rows)
        start += size
    return np.concatenate(out), state


def test_every_logit_matches_the_published_model_in_one_pass(golden) -> None:
    model, expected = golden
    logits = model.forward(expected["input_ids"], model.new_state(), logits="all")
    np.testing.assert_allclose(logits, expected["logits_full"], rtol=0, atol=TOLERANCE)


def test_every_logit_matches_the_published_model_token_by_token(golden) -> None:
    model, expected = golden
    logits, _ = stream(model, expected["input_ids"], [])
    np.testing.assert_allclose(logits, expected["logits_stream"], rtol=0, atol=TOLERANCE)


def test_prefill_then_decode_matches_the_published_model(golden) -> None:
    model, expected = golden
    logits, _ = stream(model, expected["input_ids"], [int(expected["prefill_len"])])
    np.testing.assert_allclose(logits, expected["logits_stream"], rtol=0, atol=TOLERANCE)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), max_size=12))
def test_any_chunking_gives_the_same_logits_and_state(tiny, sizes: list[int]) -> None:
    model, ids = tiny
    whole, whole_state = stream(model, ids, [len(ids)])
    pieces, state = stream(model, ids, sizes)
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-5)
    assert state.position == whole_state.position == len(ids)
    for name, array in state.arrays.items():
        np.testing.assert_allclose(array, whole_state.arrays[name], rtol=0, atol=1e-4, err_msg=name)


def test_greedy_continuation_is_the_published_one(golden) -> None:
    model, expected = golden
    state = model.new_state()
    logits = model.forward(expected["input_ids"], state)
    found = []
    for _ in expected["greedy_ids"]:
        assert logits is not None
        found.append(int(logits[0].argmax()))
        logits = model.forward(found[-1:], state)
    assert found == expected["greedy_ids"].tolist()


def test_recurrent_states_are_the_published_ones_without_their_repeats(golden) -> None:
    model, expected = golden
    state, c = model.new_state(), model.config
    model.forward([*expected["input_ids"], *expected["greedy_ids"]], state, logits="none")    # taken at the end
    gla_layers = [i for i in range(c.num_hidden_layers) if not c.is_window_layer(i)]
    for which, layer in (("first", gla_layers[0]), ("last", gla_layers[-1])):
        ours = np.repeat(state.arrays[f"{layer}.recurrent_state"], c.group_size, axis=0)     # [H, d, d]
        np.testing.assert_allclose(ours, expected[f"{which}_gla_state"], rtol=1e-4, atol=1e-4)


def test_logits_can_be_asked_for_the_last_token_all_or_none(tiny) -> None:
    model, ids = tiny
    state, twin = model.new_state(), model.new_state()
    every = model.forward(ids, state, logits="all")
    last = model.forward(ids, twin)
    assert every is not None and last is not None
    assert every.shape == (len(ids), model.config.vocab_size) and last.shape == (1, model.config.vocab_size)
    assert every.dtype == last.dtype == np.float32
    np.testing.assert_allclose(last[0], every[-1], rtol=0, atol=1e-5)
    assert state.last_logits is not None
    np.testing.assert_array_equal(state.last_logits, every[-1])
    assert model.forward([1], state, logits="none") is None
    assert state.last_logits is None and state.position == len(ids) + 1


@pytest.mark.parametrize("ids", [[], [320], [-1], [3, 1 << 40]])
def test_ids_outside_the_vocabulary_are_refused_and_leave_the_state_untouched(tiny, ids: list[int]) -> None:
    model, prompt = tiny
    state = model.new_state()
    model.forward(prompt, state)
    before = state.copy()
    with pytest.raises(InputError, match="token ids from 0 to 319"):
        model.forward(ids, state)
    assert state == before


def test_a_state_of_another_model_is_refused(tiny) -> None:
    model, _ = tiny
    with pytest.raises(StateError, match="other sizes"):
        model.forward([1], Reference(FOLDERS[1]).new_state())


# --- the small functions, against their definitions ------------------------------------------------
def test_spike_counts_times_threshold_stay_within_half_a_threshold() -> None:
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    count, threshold = spike_encode(x, 3.0)
    np.testing.assert_allclose(threshold[:, 0], np.abs(x).mean(-1) / 3, rtol=1e-6)
    assert (count == np.round(count)).all() and (np.abs(count * threshold - x) <= threshold * 0.5001).all()


def test_the_firing_threshold_is_clamped_and_halves_round_to_even() -> None:
    assert spike_encode(np.zeros(4, np.float32), 3.0)[1] == np.float32(1e-5)
    assert spike_encode(np.full(4, 1e9, np.float32), 3.0)[1] == np.float32(1e4)
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -5.5], np.float32)         # mean |x| = 2: threshold 1 at k = 2
    np.testing.assert_array_equal(spike_encode(x, 2.0)[0], [0, 2, 2, 0, -2, -6])


def test_int8_codes_of_keys_span_the_range_and_are_exact_at_the_extreme() -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 16)).astype(np.float32)
    codes, scale = int8_encode(x)
    assert codes.dtype == np.int8 and (np.abs(codes.astype(int)).max(-1) == 127).all()
    assert (np.abs(codes * scale[..., None] - x) <= scale[..., None] * 0.5001).all()


@pytest.mark.parametrize("position", [0, 1, 4095, 10_000_000, 1 << 40])
def test_rope_angles_are_exact_at_any_position(position: int) -> None:
    from fractions import Fraction
    from math import cos, pi, sin
    d, theta = 16, 1e6
    got_cos, got_sin = rope_angles(np.array([position]), d, theta)
    for c in range(d // 2):
        turns = Fraction(theta ** (-2 * c / d)) * position / Fraction(2 * pi)
        angle = float(turns - turns.__floor__()) * 2 * pi
        slack = 1e-6 + position * 1e-15
        assert abs(got_cos[0, c] - cos(angle)) < slack and abs(got_sin[0, c] - sin(angle)) < slack
