"""pytest tests/test_demo_hybrid.py: what the package ships of the demo's hybrid is whole, small, and rebuilds it."""
from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest

from sbedge.apps.convert.delta import PARTS, load_delta
from sbedge.apps.demo_model import HYBRID_DELTA, HYBRID_VERSION, find_weights, write_hybrid_checkpoint
from sbedge.checkpoint import Checkpoint
from sbedge.export import export_model
from sbedge.quant.ggml_library import ggml_available
from sbedge.runtime.load import load

# by version: a new delta needs a new one
SHA256 = {2: "b7c922d1b84b3b5227aa9300b409ba6f7ac760551bb4d49aee5aa01da2ddd8b3",
          3: "e7d5bfe4fefcd7d36aecf2eea8af2b7906dc5f0799fae1b5737548fd5ac11b00",
          4: "e6872d1592960579bf7e9c1f6a0c28efeca8f36aca2ed82210cd709b698c8713"}
LAYERS, GLA_LAYERS, HIDDEN, KV, FFN, RANK = 30, 8, 576, 192, 1536, 18
ROWS = {"attn.qkv": HIDDEN + 2 * KV, "attn.o": HIDDEN, "mlp.gate_up": 2 * FFN, "mlp.down": HIDDEN}
MIXER = {"q_proj.weight": (HIDDEN, HIDDEN), "k_proj.weight": (KV, HIDDEN), "v_proj.weight": (KV, HIDDEN),
         "o_proj.weight": (HIDDEN, HIDDEN), "q_proj.bias": (HIDDEN,), "k_proj.bias": (KV,), "v_proj.bias": (KV,),
         "gk_proj.0.weight": (16, HIDDEN), "gk_proj.1.weight": (KV, 16), "gk_proj.1.bias": (KV,),
         "g_norm.weight": (64,)}


def test_the_delta_is_small_and_the_one_that_was_measured() -> None:
    data = HYBRID_DELTA.read_bytes()
    assert len(data) <= 12_000_000
    assert hashlib.sha256(data).hexdigest() == SHA256[HYBRID_VERSION]


def test_the_delta_holds_what_a_hybrid_of_the_demo_model_needs() -> None:
    delta = load_delta(HYBRID_DELTA)
    gla = sorted(set(range(LAYERS)) - set(delta.attn_layers))
    assert len(gla) == GLA_LAYERS
    wanted = {f"model.layers.{i}.attn.{name}": shape for i in gla for name, shape in MIXER.items()}
    for i in range(LAYERS):
        for part in PARTS:
            if i not in gla or part.startswith("mlp"):
                wanted[f"model.layers.{i}.{part}.A"] = (RANK, FFN if part == "mlp.down" else HIDDEN)
                wanted[f"model.layers.{i}.{part}.B"] = (RANK, ROWS[part])
    assert {name: values.shape for name, values in delta.tensors.items()} == wanted
    assert all(np.isfinite(values).all() for values in delta.tensors.values())
    assert delta.spikes is not None and len(delta.spikes["input_dead_zone"]) == 4 * LAYERS


def test_model_card_and_training_log_come_along() -> None:
    card = (HYBRID_DELTA.parent / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert all(word in card for word in ("Licence", "Perplexity", "What is lost")) and "@" not in card
    with (HYBRID_DELTA.parent / "training-log.csv").open(newline="", encoding="utf-8") as file:
        stages = [row["stage"] for row in csv.DictReader(file)]
    assert list(dict.fromkeys(stages)) == ["trial", "transfer", "tune", "spike", "spike-2", "spike-3", "spike-4"]


@pytest.mark.skipif(find_weights() is None, reason="the SmolLM2 weights are not here; `sbedge demo` fetches them")
def test_the_hybrid_is_rebuilt_and_knows_the_capital_of_france(tmp_path: Path) -> None:
    weights = find_weights()
    assert weights is not None
    write_hybrid_checkpoint(weights, tmp_path / "hybrid")
    assert [p.name for p in tmp_path.iterdir()] == ["hybrid"]
    checkpoint = Checkpoint(tmp_path / "hybrid")
    assert checkpoint.config.num_hidden_layers - len(checkpoint.config.attn_layers) == GLA_LAYERS
    assert checkpoint.trained_spikes is not None
    if not ggml_available():
        pytest.skip("the ggml libraries are not installed, and the others are slow")
    export_model(tmp_path / "hybrid", tmp_path / "hybrid.gguf", quant="q8_0")
    session = load(tmp_path / "hybrid.gguf")
    reply = "".join(piece.text for piece in session.generate("The capital of France is", max_tokens=8))
    assert "Paris" in reply
