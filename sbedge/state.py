"""State: everything a model remembers, as one plain block of memory whose size never changes.

Canonical layout, shared by all engines (they read and write these very buffers). For each layer, in order:

    GLA layer i             "{i}.recurrent_state"  [G, d_k, d_v] float32
    sliding-window layer i  "{i}.keys"             [W, G, d]     float32 | float16 | int8   rotated; slot = position % W
                            "{i}.values"           [W, G, d]     float32 | float16 | int8
      (int8 only)           "{i}.key_scales"       [W, G]        float32          key = code * scale
                            "{i}.value_scales"     [W, G]        float32

Every array starts on a 64-byte boundary of the block. Slots not written yet are zero. Files: docs/state.md.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .config import ModelConfig
from .errors import StateError
from .state_file import StateFile, write_state_file

ALIGNMENT = 64
FLOAT_WINDOWS = {np.dtype(np.float32), np.dtype(np.float16)}       # types of a window that files turn into each other
HALF_MAX = 65504.0


def state_layout(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, dtype) of every array of a state of `config`."""
    G, d, W = config.num_key_value_heads, config.head_dim, config.sliding_window
    cache = np.dtype(np.int8 if config.int8_window else np.float16 if config.half_window else np.float32)
    layout: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for i in range(config.num_hidden_layers):
        if not config.is_window_layer(i):
            layout[f"{i}.recurrent_state"] = (G, d, d), np.dtype(np.float32)
            continue
        layout[f"{i}.keys"] = layout[f"{i}.values"] = (W, G, d), cache
        if config.int8_window:
            layout[f"{i}.key_scales"] = layout[f"{i}.value_scales"] = (W, G), np.dtype(np.float32)
    return layout


def is_ring(name: str) -> bool:
    """Whether this array of a state is a window layer's: its first axis has a slot for each token."""
    return not name.endswith(".recurrent_state")


class State:
    """What a model remembers after `position` tokens.

    arrays       name -> view into `block` (see the module's docstring)
    block        the memory itself, uint8, 64-byte aligned
    last_logits  [V] float32 for the token after the last one, or None when not computed
    fingerprint  of the checkpoint whose model made it (`Checkpoint.fingerprint`), None if unknown. Only a model that
                 comes from the same checkpoint, in whatever format and quantization, can go on with it.
    """

    def __init__(self, config: ModelConfig, fingerprint: str | None = None):
        self.layout = state_layout(config)
        self.fingerprint = fingerprint
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

    def written(self) -> dict[str, np.ndarray]:
        """Views of what the tokens so far have written: of a window's ring the first min(position, W) slots."""
        return {name: array[:min(self.position, len(array))] if is_ring(name) else array
                for name, array in self.arrays.items()}

    def copy(self) -> State:
        """An independent state with the same future."""
        twin = object.__new__(State)
        twin.layout, twin.fingerprint, twin.position = self.layout, self.fingerprint, self.position
        twin.last_logits = None if self.last_logits is None else self.last_logits.copy()
        twin._bind(_aligned_zeros(self.block.nbytes))
        for name, array in self.written().items():      # memory that is never touched is never taken
            twin.arrays[name][:len(array)] = array
        return twin

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State):
            return NotImplemented
        if self is other:       # engines look states up in dictionaries: no comparing of megabytes then
            return True
        mine, theirs = self.last_logits, other.last_logits
        same_logits = mine is theirs or (mine is not None and theirs is not None and np.array_equal(mine, theirs))
        return (same_logits and self.layout == other.layout and self.position == other.position
                and self.fingerprint == other.fingerprint and np.array_equal(self.block, other.block))

    __hash__ = object.__hash__     # identity: engines keep caches by state

    # --- files -----------------------------------------------------------------------------------------
    def save(self, path: str | Path, extra: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file, of windows only the slots in use; docs/state.md tells what it holds.

        `extra` are texts of the caller's, read back with `load_extra`. The file appears whole or not at all.
        StateError if it cannot be written.
        """
        arrays = self.written()
        if self.last_logits is not None:
            arrays["last_logits"] = self.last_logits
        metadata = {"position": str(self.position)}
        if windows := {shape[0] for name, (shape, _) in self.layout.items() if is_ring(name)}:
            metadata["sliding_window"] = str(windows.pop())
        if self.fingerprint is not None:
            metadata["fingerprint"] = self.fingerprint
        write_state_file(Path(path), arrays, extra or {}, metadata)

    @classmethod
    def load(cls, path: str | Path, config: ModelConfig, fingerprint: str | None = None) -> State:
        """Read a saved state for a model of `config` whose source has `fingerprint` (an engine knows both).

        StateError if the file is damaged or belongs to another model. None as `fingerprint` compares sizes only.
        """
        return load_state(path, config, fingerprint)[0]

    @staticmethod
    def load_extra(path: str | Path) -> dict[str, str]:
        """The `extra` texts a state was saved with; StateError as `load`."""
        with StateFile(path) as file:
            return file.read({})


def load_state(path: str | Path, config: ModelConfig, fingerprint: str | None = None) -> tuple[State, dict[str, str]]:
    """A saved state and its extra texts, in one reading; see `State.load`."""
    with StateFile(path) as file:
        found = file.metadata.get("fingerprint")
        check_source(found, fingerprint, str(path))
        position, window = (whole_number(file, key) for key in ("position", "sliding_window"))
        if config.attn_layers and not file.is_old and window != config.sliding_window:
            raise file.error(f"belongs to another model: its sliding window is {window}, expected "
                             f"{config.sliding_window}; use it with the model that made it")
        _check_arrays(file, config, position)
        state = State(config, found or fingerprint)
        state.position = position
        wanted = dict(state.arrays) if file.is_old else state.written()
        if "last_logits" in file.entries:
            wanted["last_logits"] = state.last_logits = np.empty(config.vocab_size, np.float32)
        others = {name: np.empty(array.shape, file.entries[name].dtype) for name, array in wanted.items()
                  if file.entries[name].dtype != array.dtype}
        texts = file.read({**wanted, **others})
        for name, values in others.items():
            wanted[name][...] = as_window(values, wanted[name].dtype)
        return state, texts


def as_window(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A window's keys or values in another float type; float16 takes what is beyond its largest number as that."""
    if dtype == np.float16:
        values = np.clip(values, -HALF_MAX, HALF_MAX)
    return values.astype(dtype)


def check_source(found: str | None, expected: str | None, what: str) -> None:
    """StateError unless a state of checkpoint `found` fits a model of checkpoint `expected`; None fits any."""
    if found is not None and expected is not None and found != expected:
        raise StateError(f"{what}: belongs to another model: the fingerprint of its checkpoint is {found[:12]!r}, "
                         f"expected {expected[:12]!r}; use it with a model exported from the same checkpoint")


def whole_number(file: StateFile, key: str) -> int:
    """A number of the metadata, 0 where there is none; StateError if it is no number."""
    text = file.metadata.get(key, "0" if key != "position" else "")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise file.error(f"{key} is {text[:40]!r}, expected a whole number; the file is damaged")
    return int(text)


def _check_arrays(file: StateFile, config: ModelConfig, position: int) -> None:
    """All arrays of a state are there, in the shapes that its position asks for, and no others."""
    wanted: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for name, (shape, dtype) in state_layout(config).items():
        slots = min(position, shape[0]) if is_ring(name) and not file.is_old else shape[0]
        wanted[name] = (slots, *shape[1:]), dtype
    known = {**wanted, "last_logits": ((config.vocab_size,), np.dtype(np.float32))}
    if extra := file.entries.keys() - known.keys() - set(file.extras):
        raise file.error(f"holds {min(extra)!r:.40}, which a state of this model does not have")
    for name, (shape, dtype) in known.items():
        entry = file.entries.get(name)
        if entry is None and name in wanted:
            raise file.error(f"{name} is missing; the state belongs to another model")
        if entry is not None and is_ring(name) and {entry.dtype, dtype} == FLOAT_WINDOWS:
            dtype = entry.dtype
        if entry is not None and (entry.shape, entry.dtype) != (shape, dtype):
            raise file.error(f"{name} is {entry}, expected {dtype.name} {list(shape)}; the state belongs to another "
                             "model")


def _padded(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return -(-int(np.prod(shape)) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _aligned_zeros(nbytes: int) -> np.ndarray:
    # np.zeros maps fresh pages lazily: a window that is never filled costs no memory.
    raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start:start + nbytes]
