"""The float32 weights that a model computes with, whatever it is stored as: for looking into models, not for speed."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize

from sbedge.checkpoint import Checkpoint, expected_tensors
from sbedge.config import ModelConfig
from sbedge.gguf_format import config_from_metadata, gguf_name
from sbedge.gguf_reader import read_gguf

from .load import model_kind

KEEP_BYTES = 2 << 30        # weights of a smaller model are decoded once and kept


class ModelWeights(Mapping[str, np.ndarray]):
    """Checkpoint name -> float32 array, decoded when asked for; those of a large model are not kept."""

    def __init__(self, config: ModelConfig, read: Callable[[str], np.ndarray]):
        self.config = config
        self.shapes = expected_tensors(config)
        self._read = read
        self._kept: dict[str, np.ndarray] | None = {}
        if 4 * sum(prod(shape) for shape in self.shapes.values()) > KEEP_BYTES:
            self._kept = None

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        if self._kept is None:
            return self._read(name)
        if name not in self._kept:
            self._kept[name] = self._read(name)
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def open_weights(path: str | Path, engine: str = "auto") -> ModelWeights:
    """The weights of a GGUF file, an ONNX folder or a checkpoint folder; arguments and errors as `load`."""
    path = Path(path)
    return {"gguf": _gguf_weights, "onnx": _onnx_weights, "checkpoint": _checkpoint_weights}[
        model_kind(path, engine)](path)


def _checkpoint_weights(path: Path) -> ModelWeights:
    checkpoint = Checkpoint(path)
    return ModelWeights(checkpoint.config, checkpoint.weight)


def _gguf_weights(path: Path) -> ModelWeights:
    from .ggml_linears import decode_event_layout
    from .ggml_weights import check_tensors

    file = read_gguf(path)
    config = config_from_metadata(file.metadata, str(path))
    check_tensors(file, config)

    def read(name: str) -> np.ndarray:
        stored = gguf_name(name)
        info = file.tensors.get(stored)
        if info is None:
            return decode_event_layout(file, stored)
        rows = file.raw(stored).reshape(*info.shape[:-1], -1)
        return dequantize(rows, gguf.GGMLQuantizationType[info.type]).reshape(info.shape)

    return ModelWeights(config, read)


def _onnx_weights(path: Path) -> ModelWeights:
    from .onnx_weights import OnnxTensors

    tensors = OnnxTensors(path)
    return ModelWeights(tensors.config, tensors.weight)
