"""What training changed, apart from the source's weights: a small file that makes a hybrid of its source.

Tensors of a delta, by name (float32 in memory, in a file 8-bit codes with a scale a row where they are matrices):
  model.layers.4.attn.q_proj.weight …    tensors of converted layers, whole
  model.layers.5.mlp.down.A, .B          low-rank corrections [rank, in], [rank, out]: W + B^T A, of PARTS

Of a model that was trained to spike it also holds how (`spikes`), and the checkpoint made of it is folded
(quant/folding.py): its channels are as loud as they were when their counts were taken.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sbedge.apps.files import new_file
from sbedge.checkpoint import SPIKES_FILE, Checkpoint, expected_tensors
from sbedge.config import ModelConfig
from sbedge.errors import CheckpointError
from sbedge.quant.folding import folded
from sbedge.runtime.tokenizer import Tokenizer

from .source import Progress, write_checkpoint

FORMAT = "sbedge-delta-1"
# correction -> the linears whose rows it covers, one after the other
PARTS = {"attn.qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "attn.o": ("attn.o_proj",),
         "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"), "mlp.down": ("mlp.down_proj",)}
MAX_RANK = 4096
Value = Callable[[str], np.ndarray]     # tensor name -> float32


@dataclass(frozen=True)
class Delta:
    """source: fingerprint of the checkpoint it belongs to; attn_layers: what stays sliding-window; spikes: how it was
    trained to spike, if it was."""

    source: str
    attn_layers: tuple[int, ...]
    tensors: Mapping[str, np.ndarray]
    spikes: Mapping[str, Any] | None = None     # the object of a SPIKES_FILE

    @property
    def rank(self) -> int:
        """Of the corrections; 0 without any."""
        return max((len(values) for name, values in self.tensors.items() if name.endswith(".A")), default=0)

    def converted(self, config: ModelConfig) -> list[int]:
        """The GLA layers."""
        return [i for i in range(config.num_hidden_layers) if i not in self.attn_layers]

    @property
    def lowest(self) -> int:
        """The lowest layer that differs from the source's."""
        return min(int(name.split(".")[2]) for name in self.tensors)


def save_delta(delta: Delta, path: Path, *, force: bool = False) -> None:
    """Write `path`, whole or not at all; matrices lose what 8 bits cannot hold."""
    stored: dict[str, np.ndarray] = {}
    for name, values in delta.tensors.items():
        if values.ndim == 2:
            scale = np.maximum(np.abs(values).max(1) / np.float32(127), np.float32(1e-12)).astype(np.float32)
            stored[name] = np.round(values / scale[:, None]).astype(np.int8)
            stored[f"{name}.scale"] = scale
        else:
            stored[name] = np.asarray(values, np.float32)
    about = {"format": FORMAT, "source": delta.source, "attn_layers": json.dumps(list(delta.attn_layers))}
    if delta.spikes:
        about["spikes"] = json.dumps(delta.spikes)
    with new_file(path, force=force) as temporary:
        save_file(dict(sorted(stored.items())), temporary, metadata=about)


def load_delta(path: Path) -> Delta:
    """Raises CheckpointError if the file is missing, damaged or of another kind."""
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        if about.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {about.get('format')!r}, expected {FORMAT!r}")
        layers = tuple(int(i) for i in json.loads(about["attn_layers"]))
        tensors = {name: _values(name, stored) for name in stored if not name.endswith(".scale")}
        spikes = dict(json.loads(about["spikes"])) if "spikes" in about else None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable delta ({error}); expected a file of `sbedge convert --delta`") \
            from None
    return Delta(about.get("source", ""), layers, tensors, spikes)


def _values(name: str, stored: Mapping[str, np.ndarray]) -> np.ndarray:
    if stored[name].dtype != np.int8:
        return stored[name].astype(np.float32)
    return stored[name].astype(np.float32) * stored[f"{name}.scale"].astype(np.float32)[:, None]


def apply_delta(source: Path, delta: Delta | Path, out: Path, *, progress: Progress | None = None,
                extra: Mapping[str, bytes] | None = None) -> None:
    """Write the checkpoint that `delta` makes of the sliding-window checkpoint `source` to the folder `out`.

    Raises CheckpointError if it belongs to another source or does not fit, ExportError if `out` cannot be written.
    """
    where = str(delta) if isinstance(delta, Path) else "delta"
    if isinstance(delta, Path):
        delta = load_delta(delta)
    checkpoint = Checkpoint(source)
    check_source(delta, checkpoint, where)
    raw = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    raw["attn_layers"] = list(delta.attn_layers)
    config = ModelConfig.from_dict(raw, source=where)
    values: Value = _Applied(checkpoint, delta, config, where)
    extra = dict(extra or {})
    if delta.spikes:
        config.as_trained(delta.spikes, where)
        values = _Folded(values, config)
        extra[SPIKES_FILE] = json.dumps(delta.spikes).encode()
    write_checkpoint(out, raw, values, Tokenizer.from_folder(source), progress, extra)


def check_source(delta: Delta, checkpoint: Checkpoint, where: str) -> None:
    """CheckpointError if `delta` belongs to another source."""
    if delta.source != checkpoint.fingerprint:
        raise CheckpointError(f"{where}: made for the checkpoint with fingerprint {delta.source[:12]}, found "
                              f"{checkpoint.fingerprint[:12]} in {checkpoint.folder}; use the source it was trained on")


class _Folded:
    """name -> tensor of `value` folded; a layer is in memory at a time, so ask for its tensors together."""

    def __init__(self, value: Value, config: ModelConfig):
        self.value, self.names = value, list(expected_tensors(config))
        self.prefix, self.layer = "", dict[str, np.ndarray]()

    def __call__(self, name: str) -> np.ndarray:
        if ".layers." not in name:
            return self.value(name)
        prefix = ".".join(name.split(".")[:3]) + "."
        if prefix != self.prefix:
            self.prefix, self.layer = prefix, folded({other.removeprefix(prefix): self.value(other)
                                                      for other in self.names if other.startswith(prefix)})
        return self.layer[name.removeprefix(prefix)]


class _Applied:
    """name -> float32 tensor of the hybrid; checks at once that every tensor of the delta has its place."""

    def __init__(self, checkpoint: Checkpoint, delta: Delta, config: ModelConfig, where: str):
        self.checkpoint, self.tensors = checkpoint, delta.tensors
        self.corrections: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        shapes = expected_tensors(config)
        for name, values in delta.tensors.items():
            if name.endswith((".A", ".B")):
                self._add(name, shapes, where)
            elif values.shape != shapes.get(name):
                raise CheckpointError(f"{where}: tensor {name} has shape {list(values.shape)}, expected "
                                      f"{list(shapes.get(name, ())) or 'none of that name'}")
        for name in shapes:
            if name not in delta.tensors and name not in checkpoint.shapes:
                raise CheckpointError(f"{where}: tensor {name} is missing, expected shape {list(shapes[name])}")

    def _add(self, name: str, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        whole, matrix = name.rsplit(".", 1)
        prefix, part = ".".join(whole.split(".")[:3]) + ".", ".".join(whole.split(".")[3:])
        linears = [f"{prefix}{linear}.weight" for linear in PARTS.get(part, ())]
        A, B = (self.tensors.get(f"{whole}.{m}") for m in "AB")
        out = sum(shapes[linear][0] for linear in linears if linear in shapes)
        if (not out or A is None or B is None or len(A) > MAX_RANK
                or A.shape != (len(B), shapes[linears[0]][1]) or B.shape != (len(A), out)):
            raise CheckpointError(f"{where}: correction {name} does not fit the model")
        if matrix == "A":
            start = 0
            for linear in linears:
                rows = shapes[linear][0]
                self.corrections[linear] = (A, B[:, start:start + rows])
                start += rows

    def __call__(self, name: str) -> np.ndarray:
        if name in self.tensors:
            return self.tensors[name]
        values = self.checkpoint.tensor(name)
        if name in self.corrections:
            A, B = self.corrections[name]
            values = values + B.T @ A
        return values
