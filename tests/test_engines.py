"""pytest tests/test_engines.py: what both engines promise alike."""
from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close, run
from tiny import write_tiny_checkpoint

from sbedge.export import export_model
from sbedge.quant.ggml_library import ggml_available
from sbedge.reference import Reference
from sbedge.runtime.load import open_engine

F32 = 1e-4      # how closely float32 exports follow the reference
NO_GGML = pytest.mark.skipif(not ggml_available(), reason="neither llama-cpp-python nor libggml-python is installed")


@pytest.mark.parametrize("format", [pytest.param("gguf", marks=NO_GGML), "onnx"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 1), (7, 1), (14, 2), (8, 1)])
def test_every_group_size_follows_the_reference(heads, groups, format, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "c", num_attention_heads=heads, num_key_value_heads=groups,
                                   hidden_size=heads * 6, intermediate_size=37, vocab_size=101, sliding_window=11)
    out = tmp_path / ("m.gguf" if format == "gguf" else "m")
    export_model(folder, out, format=format, quant="f32")
    engine, reference = open_engine(out), Reference(folder)
    ids = np.random.default_rng(0).integers(0, engine.config.vocab_size, 40)
    expected, _ = run(reference, ids)
    assert_close(expected, run(engine, ids)[0], F32)
    assert_close(expected, run(engine, ids, [1] * 40)[0], F32)
