"""Tiny random checkpoints in the published layout, for tests that must not depend on downloaded files."""
from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from sbedge.checkpoint import SPIKING_PROJECTIONS, expected_tensors
from sbedge.config import WEIGHT_GROUP, ModelConfig

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96, "vocab_size": 128, "sliding_window": 16}
SPIKING_SIZES = {"hidden_size": 128, "intermediate_size": 256}     # weight scales cover 128 inputs each


def write_tiny_checkpoint(folder: str | Path, *, w8aspike: bool = False, seed: int = 0, dtype: str = "F32",
                          **config_overrides) -> Path:
    """Write config.json and model.safetensors into `folder` (made if missing) and return it.

    `config_overrides` are config.json keys (hidden_size, attn_layers, tie_word_embeddings, ...). With
    `w8aspike` every quantized weight has scales that leave about 1 % of its codes beyond int8.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw = {"model_type": "gla_swa", "bos_token_id": 1, "eos_token_id": 2, **SIZES,
           **(SPIKING_SIZES if w8aspike else {}), **config_overrides}
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    config = ModelConfig.from_dict({**raw, "gate_rank": 0} if w8aspike else raw)
    rng = np.random.default_rng(seed)
    tensors = {name: random_tensor(rng, name, shape) for name, shape in expected_tensors(config).items()}
    if w8aspike:
        tensors |= {name.removesuffix("weight") + "weight_quantizer.scales": quantizer_scales(tensors[name])
                    for name in list(tensors) if name.rsplit(".", 2)[-2] in (*SPIKING_PROJECTIONS, "down_proj")
                    and name.endswith(".weight")}
    save_file({name: np.ascontiguousarray(t.astype(DTYPES[dtype])) for name, t in tensors.items()},
              folder / "model.safetensors")
    return folder


def random_tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights that keep activations near 1, norms near 1, gates that forget at useful speeds."""
    noise = rng.standard_normal(shape).astype(np.float32)
    if "norm" in name:
        return 1 + 0.1 * noise
    if "gk_proj" in name and name.endswith("bias"):
        return 2 * noise
    if name.endswith("bias"):
        return 0.1 * noise
    return noise if "embeddings" in name else noise * np.float32(shape[-1] ** -0.5)


def quantizer_scales(weight: np.ndarray) -> np.ndarray:
    """[out, in/128, 1]: the 99th percentile of each group becomes code 127."""
    grouped = np.abs(weight).reshape(weight.shape[0], -1, WEIGHT_GROUP)
    return (np.quantile(grouped, 0.99, axis=-1, keepdims=True) / 127).astype(np.float32)
