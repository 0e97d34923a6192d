"""pytest tests/test_batch.py: sequences that advance together give what each gives alone."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny_checkpoint

from sbedge.errors import InputError, StateError
from sbedge.export import export_model
from sbedge.quant.ggml_library import ggml_available
from sbedge.runtime.engine import forward_batch
from sbedge.runtime.load import open_engine
from sbedge.state import State

NO_GGML = pytest.mark.skipif(not ggml_available(), reason="neither llama-cpp-python nor libggml-python is installed")
MODELS = [*(pytest.param(f"gguf {quant}", marks=NO_GGML) for quant in ("f32", "q8_0", "q4_k", "w8-spike", "w8aspike")),
          "onnx f32"]


@pytest.fixture(scope="module", params=MODELS)
def engine(request, tmp_path_factory):
    format, quant = request.param.split()
    folder = tmp_path_factory.mktemp("batch")
    w8aspike = quant == "w8aspike"
    write_tiny_checkpoint(folder / "c", w8aspike=w8aspike, sliding_window=7)
    out = folder / ("m.gguf" if format == "gguf" else "m")
    export_model(folder / "c", out, format=format, quant="w8-spike" if w8aspike else quant)
    return open_engine(out)


@given(seed=st.integers(0, 999), lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), steps=st.integers(1, 4))
@settings(max_examples=12, deadline=None)
def test_together_is_as_alone_at_any_positions(engine, seed, lengths, steps):
    rng = np.random.default_rng(seed)
    states = []
    for length in lengths:
        states.append(engine.new_state())
        engine.forward(rng.integers(0, engine.config.vocab_size, length), states[-1], logits="none")
    alone = [state.copy() for state in states]
    for _ in range(steps):
        ids = rng.integers(0, engine.config.vocab_size, len(states))
        together = forward_batch(engine, ids, states)
        for i, state in enumerate(alone):
            row = engine.forward(ids[i:i + 1], state)[0]
            np.testing.assert_allclose(together[i], row, atol=1e-4)
            np.testing.assert_array_equal(states[i].last_logits, together[i])
    for state, twin in zip(states, alone, strict=True):
        assert state.position == twin.position
        for name, array in state.arrays.items():
            np.testing.assert_allclose(array.astype(np.float32), twin.arrays[name].astype(np.float32), atol=1e-4)


def test_sequences_may_join_and_leave_between_steps(engine):
    states = [engine.new_state() for _ in range(3)]
    alone = [state.copy() for state in states]
    for step, chosen in enumerate(([0, 1, 2], [2, 0], [1], [0, 1, 2], [2, 1, 0])):
        ids = [(7 * step + i) % engine.config.vocab_size for i in chosen]
        together = forward_batch(engine, ids, [states[i] for i in chosen])
        for row, token, i in zip(together, ids, chosen, strict=True):
            np.testing.assert_allclose(row, engine.forward([token], alone[i])[0], atol=1e-4)


def test_a_batch_that_cannot_be_moves_no_state(engine, tmp_path):
    a, b = engine.new_state(), engine.new_state()
    for ids, states, error, words in (([1], [a, b], InputError, "1 tokens for 2 states"),
                                      ([1, 2], [a, a], InputError, "appears twice"),
                                      ([1, engine.config.vocab_size], [a, b], InputError, "vocabulary")):
        with pytest.raises(error, match=words):
            forward_batch(engine, ids, states)
    other = open_engine(write_tiny_checkpoint(tmp_path / "other", num_hidden_layers=2))
    if hasattr(engine, "forward_batch"):
        with pytest.raises(StateError, match="other sizes"):
            forward_batch(engine, [1, 2], [a, State(other.config)])
    assert a.position == b.position == 0
    assert not a.block.any()
