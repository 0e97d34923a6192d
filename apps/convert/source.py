"""The source of a conversion: a Llama or Qwen2, read as a SpikingBrain checkpoint of sliding-window layers only.

Such a model is softmax attention throughout, so it fits the SpikingBrain layout with all layers listed as
sliding-window ones; q, k and v biases are zero if it has none. Up to `window` tokens it computes what the source does.
"""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from sbedge.apps.files import new_folder, safetensors_header
from sbedge.checkpoint import Checkpoint, expected_tensors, to_float32
from sbedge.config import ModelConfig, read_json
from sbedge.errors import CheckpointError
from sbedge.runtime.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, bytes done, bytes in total)."""

SLIDING_WINDOW = 2048
KINDS = ("llama", "qwen2")
EXPECTED = "a folder with config.json and safetensors, or a .gguf file"
WHOLE_MODEL = {"model.embeddings.weight": "model.embed_tokens.weight", "model.norm.weight": "model.norm.weight",
               "lm_head.weight": "lm_head.weight"}
LAYER = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attn": "self_attn", "mlp": "mlp"}


@dataclass
class Source:
    """raw: the config.json to write; value: checkpoint tensor name -> float32 array."""

    raw: dict[str, Any]
    value: Callable[[str], np.ndarray]
    tokenizer: Tokenizer


def open_source(path: Path, window: int | None = None) -> Source:
    """A GGUF file, a Hugging Face folder or a SpikingBrain folder without GLA layers; weights are read when asked for.

    Raises ModelFileError or CheckpointError for anything else, naming what was found and expected.
    """
    if path.is_dir():
        raw = read_json(path / "config.json", EXPECTED)
        return (_spikingbrain if raw.get("model_type") == "gla_swa" else _hugging_face)(path, raw, window)
    from .source_gguf import open_gguf
    return open_gguf(path, window or SLIDING_WINDOW)


def write_window_checkpoint(path: Path, out: Path, *, window: int | None = None,
                            progress: Progress | None = None) -> None:
    """Write the source at `path` as a SpikingBrain checkpoint folder (float32) at `out`.

    The weights stay float32: blocks of 4 bits times a float16 scale plus a float16 minimum have no exact
    float16 form. One tensor is held at a time. Raises what `open_source` does, ExportError if `out` exists or cannot
    be written.
    """
    source = open_source(path, window)
    write_checkpoint(out, source.raw, source.value, source.tokenizer, progress)


def write_checkpoint(out: Path, raw: Mapping[str, Any], value: Callable[[str], np.ndarray], tokenizer: Tokenizer,
                     progress: Progress | None = None, extra: Mapping[str, bytes] | None = None) -> None:
    """Write a float32 checkpoint folder tensor by tensor; `extra` files (name -> content) go into it."""
    shapes = expected_tensors(ModelConfig.from_dict(raw, source=str(out)))
    total, done = 4 * sum(math.prod(shape) for shape in shapes.values()), 0
    with new_folder(out) as folder:
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        for name, content in (extra or {}).items():
            (folder / name).write_bytes(content)
        tokenizer.save_to_folder(folder)
        with (folder / "model.safetensors").open("wb") as file:
            file.write(safetensors_header([(name, "F32", shape) for name, shape in shapes.items()]))
            for name in shapes:
                values = value(name)
                file.write(np.ascontiguousarray(values, "<f4").data)
                done += values.nbytes
                if progress:
                    progress("converting", done, total)


def window_config(window: int, **sizes: Any) -> dict[str, Any]:
    """config.json of a checkpoint of sliding-window layers."""
    layers = sizes["num_hidden_layers"]
    return {"architectures": ["GLAswaForCausalLM"], "model_type": "gla_swa", "attn_layers": list(range(layers)),
            "hidden_act": "swish", "sliding_window": window, "torch_dtype": "float32", "use_short_conv": False, **sizes}


# ---- folders --------------------------------------------------------------------------------------------

def _spikingbrain(path: Path, raw: dict[str, Any], window: int | None) -> Source:
    checkpoint = Checkpoint(path)
    config = checkpoint.config
    gla = [i for i in range(config.num_hidden_layers) if not config.is_window_layer(i)]
    if checkpoint.is_w8aspike:
        raise CheckpointError(f"{path}: a W8ASpike checkpoint, expected one with float weights")
    if gla:
        raise CheckpointError(f"{path}: layers {gla} are GLA layers already, expected a model of softmax attention "
                              "only; convert the source it was made of")
    return Source({**raw, "sliding_window": window or config.sliding_window}, checkpoint.tensor,
                  Tokenizer.from_folder(path))


def _hugging_face(path: Path, raw: dict[str, Any], window: int | None) -> Source:
    where = path / "config.json"
    if (kind := raw.get("model_type")) not in KINDS:
        raise CheckpointError(f"{where}: model_type is {kind!r}, expected one of {', '.join(KINDS)}, or a "
                              "SpikingBrain checkpoint (gla_swa) without GLA layers")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CheckpointError(f"{where}: rotary scaling {rope!r} is set, expected none")
    layers = raw.get("num_hidden_layers")
    if type(layers) is not int or not 0 < layers <= 4096:
        raise CheckpointError(f"{where}: num_hidden_layers is {layers!r}, expected a whole number from 1 to 4096")
    config = window_config(
        window or SLIDING_WINDOW, num_hidden_layers=layers,
        rope_theta=raw.get("rope_theta", rope.get("rope_theta", 10000.0)), norm_eps=raw.get("rms_norm_eps", 1e-6),
        num_key_value_heads=raw.get("num_key_value_heads", raw.get("num_attention_heads")),
        tie_word_embeddings=raw.get("tie_word_embeddings", False), hidden_act=raw.get("hidden_act", "silu"),
        **{key: raw.get(key) for key in ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size",
                                         "bos_token_id", "eos_token_id", "pad_token_id")})
    model = ModelConfig.from_dict(config, source=str(where))
    if raw.get("head_dim", model.head_dim) != model.head_dim:
        raise CheckpointError(f"{where}: head_dim is {raw['head_dim']}, expected {model.head_dim} "
                              "(hidden_size / num_attention_heads)")
    return Source(config, _Folder(path, model).value, Tokenizer.from_folder(path))


class _Folder:
    """The tensors of a Hugging Face folder, checked against `config`, by their names in a SpikingBrain checkpoint."""

    def __init__(self, path: Path, config: ModelConfig):
        index = path / "model.safetensors.index.json"
        shards = {"model.safetensors"}
        if index.is_file():
            places = read_json(index, EXPECTED).get("weight_map")
            if not isinstance(places, dict):
                raise CheckpointError(f"{index}: has no weight_map of tensors and files; download it again")
            shards = set(map(str, places.values()))
        self.found: dict[str, Any] = {}
        for shard in sorted(shards):
            if not isinstance(shard, str) or Path(shard).name != shard or not (path / shard).is_file():
                raise CheckpointError(f"{path / str(shard)}: no such file; expected the weights as safetensors")
            try:
                handle = safe_open(path / shard, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path / shard}: damaged safetensors file ({error}); "
                                      "download it again") from None
            self.found |= dict.fromkeys(handle.keys(), handle)
        self.shapes = expected_tensors(config)
        used = set()
        for name, shape in self.shapes.items():
            theirs = hugging_face_name(name)
            if theirs not in self.found:
                if name.endswith("bias"):
                    continue
                raise CheckpointError(f"{path}: tensor {theirs} is missing, expected shape {list(shape)}")
            used.add(theirs)
            stored = self.found[theirs].get_slice(theirs)
            if tuple(stored.get_shape()) != shape or stored.get_dtype() not in ("F32", "F16", "BF16"):
                raise CheckpointError(f"{path}: tensor {theirs} has shape {stored.get_shape()} and type "
                                      f"{stored.get_dtype()}, expected {list(shape)} and F32, F16 or BF16")
        rest = {n for n in self.found.keys() - used if not n.endswith("rotary_emb.inv_freq")}
        if config.tie_word_embeddings:
            rest.discard("lm_head.weight")
        if rest:
            raise CheckpointError(f"{path}: unexpected tensor {min(rest)}; only plain Llama and Qwen2 models "
                                  "can be converted")

    def value(self, name: str) -> np.ndarray:
        theirs = hugging_face_name(name)
        if theirs not in self.found:
            return np.zeros(self.shapes[name], np.float32)
        return to_float32(self.found[theirs].get_tensor(theirs))


def hugging_face_name(name: str) -> str:
    if name in WHOLE_MODEL:
        return WHOLE_MODEL[name]
    _, _, layer, part, rest = name.split(".", 4)
    return f"model.layers.{layer}.{LAYER[part]}.{rest}"
