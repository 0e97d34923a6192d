"""State: everything a model remembers, as one plain block of memory whose size never changes.

Canonical layout, shared by all engines (they read and write these very buffers). For each layer, in order:

    GLA layer i             "{i}.recurrent_state"  [G, d_k, d_v] float32
    sliding-window layer i  "{i}.keys"             [W, G, d]     float32 | int8   rotated; slot = position % W
                            "{i}.values"           [W, G, d]     float32 | int8
      (int8 only)           "{i}.key_scales"       [W, G]        float32          key = code * scale
                            "{i}.value_scales"     [W, G]        float32

Every array starts on a 64-byte boundary of the block. Slots not written yet are zero.
"""
from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .config import ModelConfig
from .errors import StateError

ALIGNMENT = 64
FORMAT = "sbedge-state-1"
RESERVED = ("format", "position")   # metadata keys of ours, not the caller's


def state_layout(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, dtype) of every array of a state of `config`."""
    G, d, W = config.num_key_value_heads, config.head_dim, config.sliding_window
    cache = np.dtype(np.int8 if config.int8_window else np.float32)
    layout: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for i in range(config.num_hidden_layers):
        if not config.is_window_layer(i):
            layout[f"{i}.recurrent_state"] = (G, d, d), np.dtype(np.float32)
            continue
        layout[f"{i}.keys"] = layout[f"{i}.values"] = (W, G, d), cache
        if config.int8_window:
            layout[f"{i}.key_scales"] = layout[f"{i}.value_scales"] = (W, G), np.dtype(np.float32)
    return layout


class State:
    """What a model remembers after `position` tokens.

    arrays       name -> view into `block` (see the module's docstring)
    block        the memory itself, uint8, 64-byte aligned
    last_logits  [V] float32 for the token after the last one, or None when not computed
    """

    def __init__(self, config: ModelConfig):
        self.layout = state_layout(config)
        self.position = 0
        self.last_logits: np.ndarray | None = None
        self._bind(_aligned_zeros(sum(_padded(shape, dtype) for shape, dtype in self.layout.values())))

    def _bind(self, block: np.ndarray) -> None:
        self.block = block
        self.arrays: dict[str, np.ndarray] = {}
        offset = 0
        for name, (shape, dtype) in self.layout.items():
            size = int(np.prod(shape)) * dtype.itemsize
            self.arrays[name] = block[offset:offset + size].view(dtype).reshape(shape)
            offset += _padded(shape, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of memory the state takes, whatever its position."""
        return self.block.nbytes

    def copy(self) -> State:
        """An independent state with the same future."""
        twin = object.__new__(State)
        twin.layout = self.layout
        twin.position = self.position
        twin.last_logits = None if self.last_logits is None else self.last_logits.copy()
        twin._bind(_aligned_zeros(self.block.nbytes))
        twin.block[:] = self.block
        return twin

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State):
            return NotImplemented
        if self is other:       # engines look states up in dictionaries: no comparing of megabytes then
            return True
        mine, theirs = self.last_logits, other.last_logits
        same_logits = mine is theirs or (mine is not None and theirs is not None and np.array_equal(mine, theirs))
        return (same_logits and self.layout == other.layout and self.position == other.position
                and np.array_equal(self.block, other.block))

    __hash__ = object.__hash__     # identity: engines keep caches by state

    def save(self, path: str | Path, extra: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file (arrays under their names, `last_logits`, string metadata).

        `extra` is metadata of the caller's, read back with `load_extra`. The file appears whole or not at all.
        """
        path = Path(path)
        metadata = {**(extra or {}), "format": FORMAT, "position": str(self.position)}
        tensors = dict(self.arrays)
        if self.last_logits is not None:
            tensors["last_logits"] = self.last_logits
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
                temporary = file.name
            save_file(tensors, temporary, metadata)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise StateError(f"{path}: state cannot be written ({error})") from None
        finally:
            if temporary and os.path.exists(temporary):
                os.unlink(temporary)

    @classmethod
    def load(cls, path: str | Path, config: ModelConfig) -> State:
        """Read a saved state; StateError if it is damaged or belongs to a model of other sizes."""
        with _open(path) as file:
            metadata = _metadata(file, path)
            position = metadata["position"]
            if not (position.isascii() and position.isdigit() and len(position) < 19):
                raise StateError(f"{path}: position is {position[:40]!r}, expected a whole number")
            state = cls(config)
            state.position = int(position)
            wanted = dict(state.layout)
            if "last_logits" in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                wanted["last_logits"] = (config.vocab_size,), np.dtype(np.float32)
            _check_tensors(file, wanted, path)
            for name, array in state.arrays.items():
                array[...] = file.get_tensor(name)
            if "last_logits" in wanted:
                state.last_logits = file.get_tensor("last_logits")
        return state

    @staticmethod
    def load_extra(path: str | Path) -> dict[str, str]:
        """The `extra` metadata a state was saved with."""
        with _open(path) as file:
            return {k: v for k, v in _metadata(file, path).items() if k not in RESERVED}


SAFETENSORS_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.int8): "I8"}


def _check_tensors(file, wanted: dict[str, tuple[tuple[int, ...], np.dtype]], path: str | Path) -> None:
    if extra := set(file.keys()) - wanted.keys():
        raise StateError(f"{path}: holds {min(extra)}, which a state of this model does not have")
    for name, (shape, dtype) in wanted.items():
        if name not in file.keys():  # noqa: SIM118
            raise StateError(f"{path}: {name} is missing; the state belongs to another model")
        found = file.get_slice(name)
        if tuple(found.get_shape()) != shape or found.get_dtype() != SAFETENSORS_NAMES[dtype]:
            raise StateError(f"{path}: {name} is {found.get_dtype()} {found.get_shape()}, expected "
                             f"{SAFETENSORS_NAMES[dtype]} {list(shape)}; the state belongs to another model")


def _open(path: str | Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path}: not a saved state, or damaged ({error})") from None


def _metadata(file, path: str | Path) -> dict[str, str]:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT or "position" not in metadata:
        raise StateError(f"{path}: not a state saved by sbedge (format {metadata.get('format')!r}, "
                         f"expected {FORMAT!r})")
    return metadata


def _padded(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return -(-int(np.prod(shape)) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _aligned_zeros(nbytes: int) -> np.ndarray:
    # np.zeros maps fresh pages lazily: a window that is never filled costs no memory.
    raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start:start + nbytes]
