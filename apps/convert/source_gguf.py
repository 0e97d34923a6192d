"""A Llama or Qwen2 in a GGUF file, as llama.cpp writes it, as the source of a conversion."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

from sbedge.checkpoint import expected_tensors
from sbedge.config import ModelConfig
from sbedge.errors import ModelFileError
from sbedge.runtime.tokenizer import Tokenizer

from .source import KINDS, Source, window_config

WHOLE_MODEL = {"model.embeddings.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
               "lm_head.weight": "output.weight"}
LAYER = {"attn_norm": "attn_norm", "attn.q_proj": "attn_q", "attn.k_proj": "attn_k", "attn.v_proj": "attn_v",
         "attn.o_proj": "attn_output", "mlp_norm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}


class _Reader(gguf.GGUFReader):
    """A reader that stops at the end of the file, where the original would loop over absurd counts."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("the file is truncated")
        return super()._get(offset, dtype, count, override_order)


def open_gguf(path: Path, window: int) -> Source:
    """Raises ModelFileError if the file is damaged or no such model (CheckpointError if only its sizes do not fit)."""
    metadata, tensors = _read(path)
    raw = _config(path, metadata, tensors, window)
    config = ModelConfig.from_dict(raw, source=str(path))
    kind = metadata["general.architecture"]
    rotated = metadata.get(f"{kind}.rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise ModelFileError(f"{path}: {rotated} rotated channels, expected the whole head of {config.head_dim}")
    shapes = expected_tensors(config)
    _check(path, shapes, tensors)

    def value(name: str) -> np.ndarray:
        source = gguf_name(name)
        if source not in tensors:
            return np.zeros(shapes[name], np.float32)
        return _values(path, name, config, tensors[source], permuted=kind == "llama")

    return Source(raw, value, Tokenizer.from_gguf(metadata))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file; expected a GGUF file, or a folder with config.json and "
                             "safetensors")
    try:
        reader = _Reader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        return metadata, {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, RecursionError) as error:
        raise ModelFileError(f"{path}: not a readable GGUF ({error}); download it again") from error


def _config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any], window: int) -> dict[str, Any]:
    kind = metadata.get("general.architecture")
    if kind not in KINDS:
        raise ModelFileError(f"{path}: architecture {kind!r}, expected {' or '.join(map(repr, KINDS))}")

    def find(key: str, default: Any = None) -> Any:
        return metadata.get(f"{kind}.{key}", default)

    if (scaling := find("rope.scaling.type", "none")) != "none":
        raise ModelFileError(f"{path}: rope scaling {scaling!r}, expected none; sbedge has plain rotary embedding")
    layers = find("block_count")
    if type(layers) is not int or not 0 < layers < len(tensors):
        raise ModelFileError(f"{path}: {kind}.block_count is {layers!r}, expected the number of layers that "
                             f"{len(tensors)} tensors make up; download it again")
    tokens = metadata.get("tokenizer.ggml.tokens")
    return window_config(
        window, num_hidden_layers=layers,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        hidden_size=find("embedding_length"), intermediate_size=find("feed_forward_length"),
        norm_eps=_shortest(find("attention.layer_norm_rms_epsilon", 1e-5)),
        num_attention_heads=find("attention.head_count"),
        num_key_value_heads=find("attention.head_count_kv", find("attention.head_count")),
        rope_theta=_shortest(find("rope.freq_base", 10000.0)), tie_word_embeddings="output.weight" not in tensors,
        vocab_size=len(tokens) if isinstance(tokens, list) else None)


def _shortest(value: Any) -> Any:
    # 1e-05, where the float32 of the file widens to 9.999999747378752e-06; ModelConfig checks the rest
    return float(str(np.float32(value))) if isinstance(value, float) else value


def gguf_name(name: str) -> str:
    """GGUF name of a checkpoint tensor."""
    if name in WHOLE_MODEL:
        return WHOLE_MODEL[name]
    _, _, layer, part = name.split(".", 3)
    part, _, kind = part.rpartition(".")
    return f"blk.{layer}.{LAYER[part]}.{kind}"


def unpermute_rope(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of a q or k projection [n_heads*d, D] from llama.cpp's order back to rotate-half order.

    For a Llama, llama.cpp rotates neighbours (2c, 2c+1) and so stores channels c and c + d/2 side by side:
    reshape(n_heads, 2, d/2, D).swapaxes(1, 2) at conversion. This is the inverse.
    """
    pairs = weight.reshape(n_heads, weight.shape[0] // n_heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _check(path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, gguf.ReaderTensor]) -> None:
    wanted = {gguf_name(name): shape for name, shape in shapes.items()}
    for name, shape in wanted.items():
        if name not in tensors:
            if name.endswith("bias"):       # a Llama has none
                continue
            raise ModelFileError(f"{path}: tensor {name} is missing, expected shape {list(shape)}; "
                                 "download it again")
        found = [int(n) for n in reversed(tensors[name].shape)]
        if found != list(shape):
            raise ModelFileError(f"{path}: tensor {name} has shape {found}, expected {list(shape)}; "
                                 "download it again")
    for name in sorted(tensors.keys() - wanted.keys()):
        raise ModelFileError(f"{path}: unexpected tensor {name}; only plain Llama and Qwen2 models can be converted")


def _values(path: Path, name: str, config: ModelConfig, tensor: gguf.ReaderTensor, *, permuted: bool) -> np.ndarray:
    """The float32 values of checkpoint tensor `name`, from the GGUF's `tensor`."""
    try:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except (NotImplementedError, ValueError) as error:      # what gguf raises for a type it does not know
        raise ModelFileError(f"{path}: tensor {tensor.name} has type {tensor.tensor_type.name}, which cannot "
                             "be dequantized; expected Q4_1, Q8_0 or F32") from error
    if permuted and ".q_proj." in name:
        return unpermute_rope(values, config.num_attention_heads)
    if permuted and ".k_proj." in name:
        return unpermute_rope(values, config.num_key_value_heads)
    return values
