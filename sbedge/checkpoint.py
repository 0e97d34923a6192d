"""A checkpoint folder, read lazily: one tensor is in memory at a time.

Layout: config.json and model.safetensors, or shards named by model.safetensors.index.json
(float32, float16 or bfloat16). Tensor names and shapes are those of BICLab's published models.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import ml_dtypes  # also registers bfloat16 with NumPy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open

from .config import WEIGHT_GROUP, ModelConfig, read_json
from .errors import CheckpointError

DTYPES = ("F32", "F16", "BF16")
MAX_LAYERS = 4096
EMBEDDINGS = ("model.embeddings.weight", "lm_head.weight")
SPIKES_FILE = "spikes.json"     # in the folder of a checkpoint that was trained to spike, but for W8ASpike ones
MAX_CODE = 1 << 24      # larger ones are not exact in float32
# W8ASpike quantizes these; the published forward of down_proj uses its stored float weights.
SPIKING_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gk_proj", "gate_proj", "up_proj")


def expected_tensors(config: ModelConfig, *, quantizer_scales: bool = False) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor a checkpoint of `config` must hold."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    kv, d = config.kv_dim, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embeddings.weight": (V, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        linears = {"attn.q_proj": (D, D), "attn.k_proj": (kv, D), "attn.v_proj": (kv, D),
                   "attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
                   "mlp.down_proj": (D, F)}
        if not config.is_window_layer(i):
            shapes[layer + "attn.g_norm.weight"] = (d,)
            if config.gate_rank:
                shapes[layer + "attn.gk_proj.0.weight"] = (config.gate_rank, D)
                linears["attn.gk_proj.1"] = (kv, config.gate_rank)
            else:
                linears["attn.gk_proj"] = (kv, D)
        for name, shape in linears.items():
            shapes[f"{layer}{name}.weight"] = shape
            if quantizer_scales:
                shapes[f"{layer}{name}.weight_quantizer.scales"] = (shape[0], shape[1] // WEIGHT_GROUP, 1)
        for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj"):
            shapes[f"{layer}{name}.bias"] = linears[name][:1]
        if not config.is_window_layer(i):
            shapes[f"{layer}attn.gk_proj.{'1.' if config.gate_rank else ''}bias"] = (kv,)
        shapes[layer + "attn_norm.weight"] = shapes[layer + "mlp_norm.weight"] = (D,)
    return shapes


class Checkpoint:
    """A validated checkpoint folder.

    `config` is complete: W8ASpike is recognized by its quantizer scales. Opening reads headers only and
    raises CheckpointError for anything missing, extra, misshaped or truncated, naming the tensor.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder; expected a checkpoint folder "
                                  "with config.json and safetensors")
        config = ModelConfig.from_json(self.folder / "config.json")
        if config.num_hidden_layers > MAX_LAYERS:
            raise CheckpointError(f"{self.folder / 'config.json'}: num_hidden_layers is "
                                  f"{config.num_hidden_layers}, expected at most {MAX_LAYERS}")
        self._files = self._find_files()
        self.is_w8aspike = any(name.endswith(".weight_quantizer.scales") for name in self._files)
        if self.is_w8aspike:
            if config.hidden_size % WEIGHT_GROUP or config.intermediate_size % WEIGHT_GROUP:
                raise CheckpointError(f"{self.folder}: W8ASpike needs sizes that are multiples of {WEIGHT_GROUP}, "
                                      f"found hidden {config.hidden_size}, FFN {config.intermediate_size}")
            config = replace(config, gate_rank=0, spike_k=3.0, int8_window=True)
        self.config = config
        self.shapes = expected_tensors(config, quantizer_scales=self.is_w8aspike)
        self._validate()

    @cached_property
    def trained_spikes(self) -> ModelConfig | None:
        """The config of this model spiking as a SPIKES_FILE in its folder says it was trained to; None without one."""
        path = self.folder / SPIKES_FILE
        if not path.is_file():
            return None
        return self.config.as_trained(read_json(path, "how the model was trained to spike"), str(path))

    # --- tensors -------------------------------------------------------------------------------
    def names(self) -> list[str]:
        return list(self.shapes)

    def raw(self, name: str) -> np.ndarray:
        """The stored tensor in its stored type (float32, float16 or bfloat16)."""
        return self._handle(self._files[name]).get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a stored tensor, without reading the others."""
        return self._handle(self._files[name]).get_slice(name)[start:stop]

    def tensor(self, name: str) -> np.ndarray:
        """The stored tensor as float32."""
        return to_float32(self.raw(name))

    def weight(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of the float32 weight the model computes with.

        That is the fake-quantized one, round(W / scale) * scale, where W8ASpike quantizes.
        """
        if not self.is_quantized(name):
            return to_float32(self.rows(name, start, self.shapes[name][0] if stop is None else stop))
        codes, scales = self.weight_codes(name, start, stop)
        grouped = codes.reshape(*scales.shape, WEIGHT_GROUP).astype(np.float32)
        return (grouped * scales[..., None]).reshape(codes.shape)

    def release(self) -> None:
        """Unmap the files: what was read from them counts as resident memory until then. Reading maps them again."""
        self._handles.clear()

    def is_quantized(self, name: str) -> bool:
        """Whether W8ASpike quantizes this tensor (and spikes its input)."""
        projection = name.removesuffix(".weight").rsplit(".", 1)[-1]
        return self.is_w8aspike and name.endswith("_proj.weight") and projection in SPIKING_PROJECTIONS

    def weight_codes(self, name: str, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows [start, stop) as integer codes [n, in] int32 (about 1 % beyond int8) and scales [n, in/128] float32."""
        stop = self.shapes[name][0] if stop is None else stop
        stored = to_float32(self.rows(name, start, stop))
        scales_name = name.removesuffix("weight") + "weight_quantizer.scales"
        scales = to_float32(self.rows(scales_name, start, stop))[..., 0]
        if not (np.isfinite(scales).all() and (scales > 0).all()):
            raise CheckpointError(f"{self.folder}: tensor {scales_name}: scales must be positive and finite")
        codes = np.round(stored.reshape(*scales.shape, WEIGHT_GROUP) / scales[..., None])
        if not (np.abs(codes) < MAX_CODE).all():
            raise CheckpointError(f"{self.folder}: tensor {name}: weight codes reach {np.abs(codes).max():g}, expected "
                                  f"less than {MAX_CODE}; its quantizer scales do not belong to these weights")
        return codes.astype(np.int32).reshape(stored.shape), scales

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and a sample of every tensor: identifies the source of an export.

        A sample (first, middle and last rows) keeps this fast for 15 GB; it tells checkpoints apart, and
        is no proof against deliberate forgery.
        """
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for name, shape in sorted(self.shapes.items()):
            digest.update(f"{name}{shape}".encode())
            for row in sorted({0, shape[0] // 2, shape[0] - 1}):
                digest.update(np.ascontiguousarray(self.rows(name, row, row + 1)).tobytes())
        return digest.hexdigest()

    # --- opening -------------------------------------------------------------------------------
    def _find_files(self) -> dict[str, Path]:
        """Tensor name -> file that holds it."""
        single, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        if index.is_file():
            files = {self.folder / shard for shard in self._read_index(index).values()}
        elif single.is_file():
            files = {single}
        else:
            raise CheckpointError(f"{self.folder}: neither model.safetensors nor "
                                  "model.safetensors.index.json found")
        found: dict[str, Path] = {}
        for file in sorted(files):
            for name in self._handle(file).keys():  # noqa: SIM118  (safe_open is no mapping)
                if name in found:
                    raise CheckpointError(f"{file}: tensor {name} is also in {found[name].name}")
                found[name] = file
        return found

    def _read_index(self, index: Path) -> dict[str, str]:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{index}: not a safetensors index ({error!r})") from None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map must map tensor names to shard files")
        for shard in weight_map.values():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(f"{index}: shard name {shard!r} is not a plain file name")
            if not (self.folder / shard).is_file():
                raise CheckpointError(f"{self.folder / shard}: shard named by the index is missing")
        return weight_map

    @cached_property
    def _handles(self) -> dict[Path, object]:
        return {}

    def _handle(self, file: Path):
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: damaged or truncated safetensors file ({error}); "
                                      "download it again") from None
        return self._handles[file]

    def _validate(self) -> None:
        for name in self._problems():
            raise CheckpointError(f"{self.folder}: {name}")

    def _problems(self) -> Iterator[str]:
        for name, shape in self.shapes.items():
            if name not in self._files:
                yield f"tensor {name} is missing, expected shape {list(shape)}"
                continue
            stored = self._handle(self._files[name]).get_slice(name)
            if tuple(stored.get_shape()) != shape:
                yield f"tensor {name} has shape {stored.get_shape()}, expected {list(shape)}"
            if stored.get_dtype() not in DTYPES:
                yield f"tensor {name} has type {stored.get_dtype()}, expected one of {', '.join(DTYPES)}"
        for name in self._files.keys() - self.shapes.keys():
            stored = self._handle(self._files[name]).get_slice(name)
            yield f"tensor {name} with shape {stored.get_shape()} is not part of this architecture"


def to_float32(array: np.ndarray) -> np.ndarray:
    """float32, float16 or bfloat16 -> float32, exactly."""
    if array.dtype == ml_dtypes.bfloat16:   # its upper half; several times faster than astype
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)
