"""pytest tests/test_model_weights.py: the weights of any model file, as float32, are those it computes with."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from compare import kl_divergence, run
from tiny import write_tiny_checkpoint

from sbedge.checkpoint import Checkpoint
from sbedge.errors import ModelFileError
from sbedge.export import export_model
from sbedge.export.spikes import event_weight
from sbedge.quant.ggml_library import ggml_available
from sbedge.reference import Reference
from sbedge.runtime.load import open_engine
from sbedge.runtime.model_weights import KEEP_BYTES, ModelWeights, open_weights
from sbedge.runtime.onnx_weights import OnnxTensors
from sbedge.runtime.spike_observer import SpikeObserver

needs_ggml = pytest.mark.skipif(not ggml_available(), reason="the ggml libraries are not installed")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


def out_of(format: str, folder: Path) -> Path:
    return folder / ("m.gguf" if format == "gguf" else "m")


@pytest.mark.parametrize("format", [pytest.param("gguf", marks=needs_ggml), "onnx"])
def test_a_w8aspike_export_holds_the_published_weights_bit_for_bit_codes_beyond_int8_included(
        format: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "c", w8aspike=True, num_hidden_layers=2))
    export_model(checkpoint, out_of(format, tmp_path))
    weights, beyond = open_weights(out_of(format, tmp_path)), 0
    for name in weights:
        if checkpoint.is_quantized(name):
            beyond += int((np.abs(checkpoint.weight_codes(name)[0]) > 128).sum())
        np.testing.assert_array_equal(weights[name], checkpoint.weight(name), err_msg=name)
    assert beyond > 100


@pytest.mark.parametrize("format", [pytest.param("gguf", marks=needs_ggml), "onnx"])
@pytest.mark.parametrize("quant", ["w8-spike", "w4-spike"])
@pytest.mark.parametrize("sizes", [SIZES, {"intermediate_size": 2112, "num_hidden_layers": 1},
                                   {"hidden_size": 144, "num_attention_heads": 6, "num_key_value_heads": 3,
                                    "intermediate_size": 300, "num_hidden_layers": 1}])
def test_event_layouts_are_decoded_to_the_weights_they_were_made_of(
        format: str, quant: str, sizes: dict[str, int], tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "c", **sizes))
    export_model(checkpoint, out_of(format, tmp_path), quant=quant, embedding_quant="f32")
    weights = open_weights(out_of(format, tmp_path))
    for name in weights:
        np.testing.assert_array_equal(weights[name], event_weight(checkpoint, name, quant), err_msg=name)


@pytest.mark.parametrize(("format", "quant", "tied"), [
    pytest.param("gguf", "q8_0", False, marks=needs_ggml), pytest.param("gguf", "q4_0", True, marks=needs_ggml),
    pytest.param("gguf", "f16", False, marks=needs_ggml), ("onnx", "int8", True), ("onnx", "int4", False)])
def test_dense_forms_are_decoded_to_what_the_engine_computes_with(
        format: str, quant: str, tied: bool, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "c", tie_word_embeddings=tied, **SIZES)
    export_model(folder, out_of(format, tmp_path), quant=quant)
    weights = open_weights(out_of(format, tmp_path))
    ids = np.random.default_rng(0).integers(0, weights.config.vocab_size, 40)
    engine = open_engine(out_of(format, tmp_path))
    decoded = run(SpikeObserver(weights.config, weights, lambda *_: None), ids)[0]
    # Activations are rounded to 8 bits beside such weights; that is far less than what the weights themselves lost.
    lost = kl_divergence(run(Reference(folder), ids)[0], decoded)
    assert kl_divergence(decoded, run(engine, ids)[0]) < max(0.2 * lost, 2e-2 if tied else 1e-3)


def test_a_checkpoint_gives_its_own_weights_and_large_models_are_not_kept(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "c"))
    weights = open_weights(checkpoint.folder)
    assert weights["model.norm.weight"] is weights["model.norm.weight"]     # decoded once
    assert weights.get("lm_head.bias") is None and len(list(weights)) == len(weights) == len(checkpoint.names())
    from dataclasses import replace
    large = replace(checkpoint.config, vocab_size=KEEP_BYTES // 64)
    reads: list[str] = []

    def read(name: str) -> np.ndarray:
        reads.append(name)
        return np.zeros(1)

    unkept = ModelWeights(large, read)
    assert [unkept["model.norm.weight"].size for _ in range(2)] == [1, 1] and len(reads) == 2


def test_parts_that_do_not_belong_together_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_model(write_tiny_checkpoint(tmp_path / "c", **SIZES), tmp_path / "m", quant="int8")
    tensors = OnnxTensors(tmp_path / "m")
    name = "model.layers.0.attn.q_proj.weight"
    del tensors._stored[f"{name}.codes"]
    with pytest.raises(ModelFileError, match=r"parts of model\.layers\.0\.attn\.q_proj\.weight do not belong together"):
        tensors.weight(name)
    del tensors._stored[f"{name}.zero_points"]
    with pytest.raises(ModelFileError, match=r"q_proj\.weight is missing, expected \[128, 128\]"):
        tensors.weight(name)
