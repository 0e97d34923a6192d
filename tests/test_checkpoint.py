"""A checkpoint is read lazily and refused, by tensor name, when it is not exactly what the config asks for."""
from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from golden import TINY, W8ASPIKE, copy_checkpoint, edit_config, edit_tensors, truncate
from safetensors.numpy import load_file, save_file

from sbedge.checkpoint import Checkpoint
from sbedge.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_checkpoint(TINY, tmp_path / "model")


def shard(folder: Path, parts: int = 3) -> None:
    """Split model.safetensors as published checkpoints are split."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % parts + 1:05}-of-{parts:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# --- reading ---------------------------------------------------------------------------------------
def test_shards_hold_the_same_tensors_as_one_file(folder: Path, tmp_path: Path) -> None:
    single, sharded = Checkpoint(folder), copy_checkpoint(TINY, tmp_path / "sharded")
    shard(sharded)
    assert Checkpoint(sharded).names() == single.names()
    for name in single.names():
        np.testing.assert_array_equal(Checkpoint(sharded).tensor(name), single.tensor(name), err_msg=name)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_exactly(folder: Path, dtype: type) -> None:
    stored = load_file(folder / "model.safetensors")
    halves: dict[str, np.ndarray] = {name: tensor.astype(dtype) for name, tensor in stored.items()}
    save_file(halves, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    for name, half in halves.items():
        assert checkpoint.raw(name).dtype == dtype
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, half.astype(np.float32), err_msg=name)


def test_rows_are_a_slice_of_the_tensor(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    np.testing.assert_array_equal(checkpoint.rows("lm_head.weight", 7, 19), checkpoint.raw("lm_head.weight")[7:19])


def test_tied_embeddings_need_no_lm_head(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, remove="lm_head.weight")
    assert "lm_head.weight" not in Checkpoint(folder).names()


def test_a_fingerprint_is_what_earlier_versions_wrote_into_exports_and_states() -> None:
    assert Checkpoint(TINY).fingerprint == "41369b16acf2931d5f7d104f65db2dd7e0cce6c4d063747a5ad831fdfae43ca6"


def test_the_fingerprint_tells_checkpoints_apart(folder: Path, tmp_path: Path) -> None:
    before = Checkpoint(folder).fingerprint
    assert before == Checkpoint(copy_checkpoint(TINY, tmp_path / "twin")).fingerprint
    edit_tensors(folder, add={"model.norm.weight": np.full(64, 2, np.float32)})
    assert Checkpoint(folder).fingerprint != before


# --- W8ASpike --------------------------------------------------------------------------------------
def test_w8aspike_is_recognized_by_its_scales() -> None:
    checkpoint = Checkpoint(W8ASPIKE)
    assert checkpoint.is_w8aspike and not Checkpoint(TINY).is_w8aspike
    assert (checkpoint.config.spike_k, checkpoint.config.int8_window, checkpoint.config.gate_rank) == (3.0, True, 0)


def test_w8aspike_weights_are_codes_times_scales() -> None:
    checkpoint = Checkpoint(W8ASPIKE)
    for name in filter(checkpoint.is_quantized, checkpoint.names()):
        codes, scales = checkpoint.weight_codes(name)
        assert scales.shape == (codes.shape[0], codes.shape[1] // 128)
        wanted = codes.astype(np.float32) * np.repeat(scales, 128, axis=1)
        np.testing.assert_array_equal(checkpoint.weight(name), wanted, err_msg=name)
        assert np.abs(checkpoint.weight(name) - checkpoint.tensor(name)).max() <= scales.max() * 0.51


def test_w8aspike_codes_beyond_int8_survive(tmp_path: Path) -> None:
    folder = copy_checkpoint(W8ASPIKE, tmp_path / "model")
    name = "model.layers.0.attn.q_proj.weight"
    weight, scales = Checkpoint(folder).tensor(name), Checkpoint(folder).weight_codes(name)[1]
    weight[3, 5], weight[7, 9] = 300 * scales[3, 0], -129 * scales[7, 0]
    edit_tensors(folder, add={name: weight})
    codes, _ = Checkpoint(folder).weight_codes(name)
    assert (codes[3, 5], codes[7, 9]) == (300, -129)
    assert Checkpoint(folder).weight(name)[3, 5] == np.float32(300) * scales[3, 0]


def test_w8aspike_down_proj_and_lm_head_stay_as_stored() -> None:
    checkpoint = Checkpoint(W8ASPIKE)
    for name in ("model.layers.0.mlp.down_proj.weight", "lm_head.weight", "model.embeddings.weight"):
        assert not checkpoint.is_quantized(name)
        np.testing.assert_array_equal(checkpoint.weight(name), checkpoint.tensor(name))


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, 1e-30])
def test_scales_that_cannot_belong_to_the_weights_are_refused(tmp_path: Path, value: float) -> None:
    folder = copy_checkpoint(W8ASPIKE, tmp_path / "model")
    name = "model.layers.0.attn.q_proj.weight"
    edit_tensors(folder, add={f"{name}_quantizer.scales": np.full((128, 1, 1), value, np.float32)})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight"):
        Checkpoint(folder).weight(name)


# --- refusals --------------------------------------------------------------------------------------
def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def test_a_missing_tensor_is_named_with_its_shape(folder: Path) -> None:
    edit_tensors(folder, remove="model.layers.2.attn.gk_proj.1.bias")
    assert "model.layers.2.attn.gk_proj.1.bias is missing, expected shape [32]" in refusal(folder)


def test_an_extra_tensor_is_named(folder: Path) -> None:
    edit_tensors(folder, add={"model.layers.0.attn.conv.weight": np.zeros((3, 4), np.float32)})
    assert "model.layers.0.attn.conv.weight with shape [3, 4]" in refusal(folder)


def test_a_misshaped_tensor_is_named_with_both_shapes(folder: Path) -> None:
    edit_tensors(folder, add={"model.layers.1.mlp.up_proj.weight": np.zeros((64, 160), np.float32)})
    assert "up_proj.weight has shape [64, 160], expected [160, 64]" in refusal(folder)


def test_an_integer_tensor_is_refused(folder: Path) -> None:
    edit_tensors(folder, add={"model.norm.weight": np.ones(64, np.int32)})
    assert "model.norm.weight has type I32" in refusal(folder)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.05, 0.5, 0.9999])
def test_a_truncated_file_is_refused(folder: Path, share: float) -> None:
    truncate(folder / "model.safetensors", share)
    assert "damaged or truncated" in refusal(folder)


def test_an_absurd_header_length_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])
    assert "damaged or truncated" in refusal(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors: shard named by the index is missing" in refusal(folder)


@pytest.mark.parametrize("index", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {}}',
                                   '{"weight_map": {"a": "../../secret"}}', '{"weight_map": {"a": 7}}'])
def test_a_wrong_index_is_refused(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    shard(folder)
    twice = next(iter(load_file(folder / "model-00001-of-00003.safetensors").items()))
    second = folder / "model-00002-of-00003.safetensors"
    save_file(dict([twice]) | load_file(second), second)
    assert f"tensor {twice[0]} is also in" in refusal(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refusal(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_an_absurd_number_of_layers_is_refused_at_once(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=10_000_000, attn_layers=[])
    assert "num_hidden_layers is 10000000" in refusal(folder)
