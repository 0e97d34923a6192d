"""python -m pytest tests/test_synthetic.py: the synthetic checkpoints of benchmarks/ are real checkpoints."""
from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

from sbedge.apps import synthetic
from sbedge.checkpoint import Checkpoint
from sbedge.reference import Reference

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "make_synthetic.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("make_synthetic", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_synthetic", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(synthetic, "POOL", 10_007)  # smaller than a weight, so that the pool wraps around
    return module


def test_a_checkpoint_has_every_tensor_in_bfloat16_and_finite(script: ModuleType, tmp_path: Path) -> None:
    assert script.main([str(tmp_path / "out"), "--shape", "tiny", "--layers", "2"]) == 0
    checkpoint = Checkpoint(tmp_path / "out")  # refuses missing, extra and misshaped tensors
    assert checkpoint.config.num_hidden_layers == 2
    assert checkpoint.config.attn_layers == (1,)
    assert checkpoint.raw("lm_head.weight").shape == (320, 128)
    for name in checkpoint.names():
        assert checkpoint.raw(name).dtype == ml_dtypes.bfloat16
        assert np.isfinite(checkpoint.tensor(name)).all(), name
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("spiking", [[], ["--spiking"]])
def test_logits_of_a_synthetic_model_are_of_order_one(script: ModuleType, tmp_path: Path, spiking: list[str]) -> None:
    script.main([str(tmp_path / "out"), "--shape", "tiny", *spiking])
    model = Reference(tmp_path / "out")
    logits = model.forward(np.arange(40), model.new_state(), logits="all")
    assert logits is not None
    assert 0.3 < logits.std() < 3
    assert len(set(logits.argmax(axis=-1).tolist())) > 5  # tokens differ: nothing is saturated or dead


def test_spiking_weights_have_a_few_codes_beyond_int8_as_published_ones_do(script: ModuleType, tmp_path: Path) -> None:
    script.main([str(tmp_path / "out"), "--shape", "tiny", "--spiking"])
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.is_w8aspike
    for name in ("attn.q_proj", "attn.o_proj", "attn.gk_proj", "mlp.up_proj"):
        codes, _ = checkpoint.weight_codes(f"model.layers.0.{name}.weight")
        assert 0.003 < (np.abs(codes) > 127).mean() < 0.03, name


def test_large_checkpoints_are_sharded(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SHARD_BYTES", 100_000)
    script.main([str(tmp_path / "out"), "--shape", "tiny"])
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    assert len(shards) > 3
    assert all(shard.stat().st_size < 110_000 for shard in shards)
    assert set(Checkpoint(tmp_path / "out").names()) == set(index["weight_map"])


def test_the_seed_decides_the_values(script: ModuleType, tmp_path: Path) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        script.main([str(tmp_path / name), "--shape", "tiny", "--layers", "1", "--seed", seed])
    a, b, c = ((tmp_path / name / "model-00001-of-00001.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert len(a) == len(c)


def test_tokenizer_files_are_copied(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/vocab.json").write_text("{}")
    (tmp_path / "tokenizer/notes.txt").write_text("")
    script.main([str(tmp_path / "out"), "--shape", "tiny", "--tokenizer", str(tmp_path / "tokenizer")])
    assert (tmp_path / "out/vocab.json").read_text() == "{}"
    assert not (tmp_path / "out/notes.txt").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--shape", "tiny"], "exists already"),
    (["--shape", "135m", "--spiking", "--layers", "1"], "multiples of 128, found hidden 576"),
])
def test_a_refusal_is_one_line_and_code_2(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                          arguments: list[str], message: str) -> None:
    (tmp_path / "out").mkdir()
    assert script.main([str(tmp_path / "out"), *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert message in lines[-1]
    assert list((tmp_path / "out").iterdir()) == []
