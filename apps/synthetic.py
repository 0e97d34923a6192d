"""Random SpikingBrain checkpoints of a given shape: the input of size, speed and memory measurements.

Values are drawn once and read from a random place for each tensor, so that the disk sets the pace and memory
stays at a few hundred MB at any size. Activations stay of order one, so quantization errors and spike rates
are those of a plausible network, and every layer matters; what it says is noise.
"""
from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from sbedge.apps.files import new_folder, safetensors_header
from sbedge.checkpoint import expected_tensors
from sbedge.config import WEIGHT_GROUP, ModelConfig
from sbedge.errors import InputError

SHARD_BYTES = 1 << 30
POOL = (1 << 24) + 43  # values drawn; odd, so that rows of even length never repeat at the same place
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "generation_config.json")
# W8ASpike's scale is a little tight: 1 % of a normal distribution lies beyond 127 steps.
SCALE_SIGMAS = 2.576 / 127


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    window: int
    tied: bool
    bos: int
    eos: int


# 7b is the published SpikingBrain-7B (15 GB in bfloat16), 1b the size of a Llama-3.2-1B, 135m that of a SmolLM2.
SHAPES = {
    "tiny": Shape(128, 4, 4, 2, 256, 320, 16, False, 1, 2),
    "135m": Shape(576, 30, 9, 3, 1536, 49152, 2048, True, 1, 2),
    "1b": Shape(2048, 16, 32, 8, 8192, 128256, 4096, True, 128000, 128001),
    "7b": Shape(3584, 28, 28, 4, 18944, 152064, 4096, False, 151643, 151643),
}


def config_json(shape: Shape, *, layers: int | None = None, dtype: str = "bf16") -> dict[str, Any]:
    """The keys of a published config.json; layers alternate between GLA (even) and sliding window (odd)."""
    layers = layers or shape.layers
    return {
        "architectures": ["GLAswaForCausalLM"],
        "model_type": "gla_swa",
        "attn_layers": list(range(1, layers, 2)),
        "bos_token_id": shape.bos,
        "eos_token_id": shape.eos,
        "hidden_act": "swish",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "norm_eps": 1e-6,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": shape.kv_heads,
        "rope_theta": 1e6,
        "sliding_window": shape.window,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": {"bf16": "bfloat16", "f32": "float32"}[dtype],
        "use_short_conv": False,
        "vocab_size": shape.vocab,
    }


class RandomTensors:
    """Streams the values of any checkpoint tensor of `config` in pieces of at most 64 MB."""

    def __init__(self, config: ModelConfig, dtype: str, seed: int):
        self.config = config
        self.dtype = np.dtype({"bf16": ml_dtypes.bfloat16, "f32": np.float32}[dtype])
        self.rng = np.random.default_rng(seed)
        self.normal = self.rng.standard_normal(POOL, np.float32)
        self._scaled: dict[float, np.ndarray] = {}  # standard deviation -> the pool times it, in dtype

    def pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Flat arrays that together hold tensor `name`."""
        size = math.prod(shape)
        if name.endswith("norm.weight"):
            yield np.ones(size, self.dtype)
        elif ".gk_proj." in name and name.endswith(".bias"):
            # logsigmoid(0..6) / 16: channels that forget half within 16 to 4500 tokens
            yield self.rng.uniform(0, 6, size).astype(self.dtype)
        elif name.endswith(".scales"):
            linear_inputs = shape[1] * WEIGHT_GROUP
            jitter = self.rng.uniform(0.98, 1.02, size)
            yield (jitter * SCALE_SIGMAS * self._deviation(name, linear_inputs)).astype(self.dtype)
        else:
            yield from self._window(self._deviation(name, shape[-1]), size)

    def _deviation(self, name: str, fan_in: int) -> float:
        if name.endswith(".bias"):
            return 0.02
        residual = ".o_proj." in name or ".down_proj." in name
        return fan_in ** -0.5 / (math.sqrt(2 * self.config.num_hidden_layers) if residual else 1)

    def _window(self, deviation: float, size: int) -> Iterator[np.ndarray]:
        if deviation not in self._scaled:
            self._scaled[deviation] = (self.normal * np.float32(deviation)).astype(self.dtype)
        pool, start = self._scaled[deviation], int(self.rng.integers(POOL))
        while size:
            piece = pool[start:start + size]
            yield piece
            size, start = size - len(piece), 0


def plan_shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> list[list[str]]:
    """Tensor names per shard: as many as fit in 1 GiB, a larger tensor alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_checkpoint(out: Path, raw_config: Mapping[str, Any], *, dtype: str = "bf16", seed: int = 0,
                     spiking: bool = False, tokenizer: Path | None = None,
                     progress: Callable[[int, int], None] | None = None) -> None:
    """Write the checkpoint folder `out`, which appears once whole; progress(bytes done, bytes in total).

    `spiking` gives the W8ASpike form: full-rank gates and quantizer scales. Raises InputError for sizes
    W8ASpike cannot have or a tokenizer folder without files, ExportError for an existing `out` or full disk.
    """
    config = ModelConfig.from_dict({**raw_config, **({"gate_rank": 0} if spiking else {})})
    if spiking and (config.hidden_size % WEIGHT_GROUP or config.intermediate_size % WEIGHT_GROUP):
        raise InputError(f"W8ASpike needs sizes that are multiples of {WEIGHT_GROUP}, found hidden "
                         f"{config.hidden_size}, FFN {config.intermediate_size}; choose another --shape")
    shapes = expected_tensors(config, quantizer_scales=spiking)
    values = RandomTensors(config, dtype, seed)
    shards = plan_shards(shapes, values.dtype.itemsize)
    total, done = sum(math.prod(shape) for shape in shapes.values()) * values.dtype.itemsize, 0
    weight_map: dict[str, str] = {}

    def write_tensor(file: BinaryIO, name: str) -> None:
        nonlocal done
        for piece in values.pieces(name, shapes[name]):
            file.write(piece.view(np.uint8).data)
            done += piece.nbytes
            if progress:
                progress(done, total)

    with new_folder(out) as folder:
        for number, names in enumerate(shards, 1):
            file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            with (folder / file_name).open("wb") as file:
                file.write(safetensors_header([(name, dtype.upper(), shapes[name]) for name in names]))
                for name in names:
                    write_tensor(file, name)
                    weight_map[name] = file_name
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n", encoding="utf-8")
        if tokenizer:
            copy_tokenizer(tokenizer, folder)


def copy_tokenizer(source: Path, target: Path) -> None:
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not files:
        raise InputError(f"{source}: no tokenizer files; expected tokenizer.json or vocab.json and merges.txt")
    for file in files:
        shutil.copyfile(file, target / file.name)
