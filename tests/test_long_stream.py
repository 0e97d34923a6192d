"""pytest tests/test_long_stream.py: 200,000 tokens leave memory as it was and the model right."""
from __future__ import annotations

import os

import numpy as np
import pytest
from compare import assert_close, run
from tiny import write_tiny_checkpoint

from sbedge.apps.measure import resident_bytes
from sbedge.checkpoint import Checkpoint
from sbedge.export import export_model
from sbedge.quant.ggml_library import ggml_available
from sbedge.reference import Reference
from sbedge.runtime.load import open_engine

TOKENS, SETTLED, CHUNK, SINGLE = 200_000, 10_000, 400, 2_000
GROWTH = 5 << 20

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads resident memory from /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("long") / "checkpoint", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids(folder):
    return np.random.default_rng(7).integers(0, Checkpoint(folder).config.vocab_size, TOKENS)


@pytest.fixture(scope="module")
def expected(folder, ids):
    """The reference's logits over the last window, after all that came before."""
    reference = Reference(folder)
    window = reference.config.sliding_window
    state = reference.new_state()
    for start in range(0, TOKENS - window, CHUNK):
        reference.forward(ids[start:min(start + CHUNK, TOKENS - window)], state, logits="none")
    return run(reference, ids[-window:], state=state)[0]


@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_200000_tokens_cost_no_memory_and_lose_no_exactness(format, folder, ids, expected, tmp_path):
    if format == "gguf" and not ggml_available():
        pytest.skip("neither llama-cpp-python nor libggml-python is installed")
    out = tmp_path / ("m.gguf" if format == "gguf" else "m")
    export_model(folder, out, format=format, quant="f32")
    engine = open_engine(out)
    window, state = engine.config.sliding_window, engine.new_state()
    size, settled = state.nbytes, 0
    singles = TOKENS - window - SINGLE        # from here on one token at a time, as in a chat
    for start in range(0, singles, CHUNK):
        if settled == 0 and start >= SETTLED:
            settled = resident_bytes()
        engine.forward(ids[start:min(start + CHUNK, singles)], state, logits="none")
    for token in ids[singles:-window]:
        engine.forward([token], state)
    assert resident_bytes() - settled < GROWTH
    logits, _ = run(engine, ids[-window:], [1] * (window // 2), state)
    assert state.position == TOKENS
    assert state.nbytes == size
    assert_close(expected, logits, 1e-3)
