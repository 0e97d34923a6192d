"""What our GGUF files hold: metadata keys and tensor names, after llama.cpp's where it has one.

Linears are stored [out, in] in ggml's types. An event layout replaces NAME.weight, input-channel-major so that a
silent channel is a row never fetched. Its rows are cut into stripes of 1024 outputs, each an [in, 1024] array of its
own, the last one narrower, so that what a thread reads is one piece of memory. With quant `w8-spike`
    NAME.codes           [in * out]     I8    (in earlier files [in, out], in one stripe)
    NAME.scales          [in/128, out]  F32   weight = code * scale of its group of 128 inputs (the last may be shorter)
    NAME.residual_index  [m] I32, NAME.residual_value [m] I32   (absent if m = 0)
                         what codes beyond int8 lack: at index = input * out + output, code + value is the exact code
and with `w4-spike`
    NAME.nibbles         [in * out/2]   I8    of each 64 outputs b in the low and b + 32 in the high half of byte b
    NAME.scales          [in/64, out]   F16   weight = (nibble - zero) * scale of its group of 64 inputs (or 32, or 128)
    NAME.zeros           [in/64, out]   I8
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .checkpoint import MAX_LAYERS, SPIKING_PROJECTIONS, expected_tensors
from .config import GATE_RANK, ModelConfig
from .errors import CheckpointError, ModelFileError

ARCHITECTURE = "spikingbrain"


class TensorType(NamedTuple):
    number: int     # ggml's
    block: int      # elements a block
    nbytes: int     # bytes a block


TYPES = {"F32": TensorType(0, 1, 4), "F16": TensorType(1, 1, 2), "BF16": TensorType(30, 1, 2),
         "I8": TensorType(24, 1, 1), "I32": TensorType(26, 1, 4), "I64": TensorType(27, 1, 8),
         "Q4_0": TensorType(2, 32, 18), "Q4_1": TensorType(3, 32, 20), "Q5_0": TensorType(6, 32, 22),
         "Q5_1": TensorType(7, 32, 24), "Q8_0": TensorType(8, 32, 34),
         "Q4_K": TensorType(12, 256, 144), "Q5_K": TensorType(13, 256, 176), "Q6_K": TensorType(14, 256, 210)}


def row_bytes(type_name: str, width: int) -> int:
    """Bytes of a row of `width` elements; `width` must be a multiple of the type's block."""
    return width // TYPES[type_name].block * TYPES[type_name].nbytes


_GLOBAL = {"model.embeddings.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
           "lm_head.weight": "output.weight"}
_LAYER = {"attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "attn.q_proj": "attn_q", "attn.k_proj": "attn_k",
          "attn.v_proj": "attn_v", "attn.o_proj": "attn_output", "attn.g_norm": "attn_g_norm",
          "attn.gk_proj": "attn_gk", "attn.gk_proj.0": "attn_gk_a", "attn.gk_proj.1": "attn_gk_b",
          "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
SPIKING_LINEARS = tuple(name for stem, name in _LAYER.items() if stem.rpartition(".")[2] in SPIKING_PROJECTIONS)

# ModelConfig field -> metadata key (under "spikingbrain.")
KEYS = {"num_hidden_layers": "block_count", "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length", "vocab_size": "vocab_size",
        "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
        "norm_eps": "attention.layer_norm_rms_epsilon", "sliding_window": "attention.sliding_window",
        "int8_window": "attention.int8_window", "rope_theta": "rope.freq_base", "gate_rank": "gate.rank",
        "spike_k": "spike.k", "spike_down": "spike.down", "dead_zone": "spike.dead_zone",
        "input_spike_k": "spike.input_k", "input_dead_zone": "spike.input_dead_zone",
        "trained_to_spike": "spike.trained",
        "tie_word_embeddings": "tie_word_embeddings",
        "bos_token_id": "bos_token_id", "pad_token_id": "pad_token_id", "eos_token_id": "eos_token_ids"}
WINDOW_PATTERN = "attention.sliding_window_pattern"     # one boolean a layer, as llama.cpp writes it
SOURCE_KEYS = ("fingerprint", "recipe", "exporter")     # under "spikingbrain.source."


def gguf_name(checkpoint_name: str) -> str:
    """'model.layers.3.attn.q_proj.weight' -> 'blk.3.attn_q.weight'."""
    if checkpoint_name in _GLOBAL:
        return _GLOBAL[checkpoint_name]
    _, _, layer, rest = checkpoint_name.split(".", 3)
    stem, suffix = rest.rsplit(".", 1)
    return f"blk.{layer}.{_LAYER[stem]}.{suffix}"


def expected_gguf_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape [out, in] or [width] of every tensor a file of `config` holds, event layouts aside."""
    return {gguf_name(name): shape for name, shape in expected_tensors(config).items()}


def config_metadata(config: ModelConfig) -> dict[str, Any]:
    """Every key of the file that describes the model (not the tokenizer)."""
    values = {f"{ARCHITECTURE}.{key}": value for field, key in KEYS.items()
              if (value := getattr(config, field)) not in (None, ())}
    values[f"{ARCHITECTURE}.rope.dimension_count"] = config.head_dim
    values[f"{ARCHITECTURE}.{WINDOW_PATTERN}"] = [config.is_window_layer(i) for i in range(config.num_hidden_layers)]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def source_fingerprint(metadata: Mapping[str, Any]) -> str | None:
    """The fingerprint of the checkpoint a GGUF file was made from."""
    fingerprint = metadata.get(f"{ARCHITECTURE}.source.fingerprint")
    return fingerprint if isinstance(fingerprint, str) and fingerprint else None


def config_from_metadata(metadata: Mapping[str, Any], source: str) -> ModelConfig:
    """The ModelConfig a GGUF file describes; ModelFileError if it is another model or inconsistent."""
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ModelFileError(f"{source}: this GGUF holds architecture {architecture!r}, expected {ARCHITECTURE!r}; "
                             "make one with `sbedge export`")
    raw: dict[str, Any] = {"gate_rank": GATE_RANK}
    for field, key in KEYS.items():
        if f"{ARCHITECTURE}.{key}" in metadata:
            raw[field] = metadata[f"{ARCHITECTURE}.{key}"]
    pattern = metadata.get(f"{ARCHITECTURE}.{WINDOW_PATTERN}")
    if not isinstance(pattern, list) or len(pattern) != raw.get("num_hidden_layers"):
        raise ModelFileError(f"{source}: {WINDOW_PATTERN} must hold one boolean a layer")
    if len(pattern) > MAX_LAYERS:
        raise ModelFileError(f"{source}: has {len(pattern)} layers, expected at most {MAX_LAYERS}")
    raw["attn_layers"] = [i for i, is_window in enumerate(pattern) if is_window]
    try:
        return ModelConfig.from_dict(raw, source=source)
    except CheckpointError as error:
        raise ModelFileError(str(error)) from None
