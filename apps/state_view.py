"""A state file looked into without its model: what `sbedge state info` and `sbedge state diff` tell."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from sbedge.errors import StateError
from sbedge.runtime.session_record import summary
from sbedge.state import is_ring, whole_number
from sbedge.state_file import StateFile

NAME = re.compile(r"([0-9]{1,9})\.(recurrent_state|keys|values|key_scales|value_scales)")
GLA, WINDOW, INT8_WINDOW = (frozenset(parts.split()) for parts in (
    "recurrent_state", "keys values", "keys values key_scales value_scales"))


class StateView:
    """All that a sound file holds. Reading it takes memory of the file's size, and checks it to its last byte.

    arrays   name -> array, as docs/state.md tells, without the logits
    layers   for each layer the names that its arrays have after its number
    heads    key/value heads and their width
    window   slots of a ring; 0 without window layers
    """

    def __init__(self, path: str | Path):
        """Raises StateError if the file is no state, or damaged."""
        self.path = Path(path)
        with StateFile(path) as file:
            self.format, self.fingerprint = file.metadata["format"], file.metadata.get("fingerprint")
            self.position, window = whole_number(file, "position"), whole_number(file, "sliding_window")
            self.arrays = {name: np.empty(entry.shape, entry.dtype) for name, entry in file.entries.items()
                           if name not in file.extras}
            self.texts = file.read(self.arrays)
            self.logits = self.arrays.pop("last_logits", None)
            self.layers, self.heads = self._layers(file), self._heads(file)
            slots = {len(array) for name, array in self.arrays.items() if is_ring(name)}
            self.window = max(slots, default=0) if file.is_old else window if slots else 0
            if slots - {self.window if file.is_old else min(self.position, self.window)}:
                raise file.damaged(f"a window has {max(slots)} slots at position {self.position}")

    def _layers(self, file: StateFile) -> list[frozenset[str]]:
        layers: dict[int, set[str]] = {}
        for name in self.arrays:
            match = NAME.fullmatch(name)
            if match is None:
                raise file.error(f"holds {name!r:.40}, which no state has")
            layers.setdefault(int(match[1]), set()).add(match[2])
        kinds = [frozenset(layers[index]) for index in sorted(layers)]
        if not set(kinds) <= {GLA, WINDOW, INT8_WINDOW} or sorted(layers) != list(range(len(kinds))):
            raise file.error("a layer lacks some of its arrays; the file is damaged")
        return kinds

    def _heads(self, file: StateFile) -> tuple[int, int]:
        """Key/value heads and their width, the same in all arrays."""
        cubes = [(name, a.shape) for name, a in self.arrays.items() if a.ndim == 3]
        G, d = (cubes[0][1][1:] if is_ring(cubes[0][0]) else cubes[0][1][::2]) if cubes else (0, 0)
        for name, array in self.arrays.items():
            expected = (G, d, d) if not is_ring(name) else (G,) if name.endswith("_scales") else (G, d)
            if (array.shape[1:] if is_ring(name) else array.shape) != expected or not array.ndim:
                raise file.error("its layers are of different sizes; the file is damaged")
        return G, d

    def sizes(self) -> dict[str, Any]:
        """What must be alike in two states for them to be compared, but for windows of different float types."""
        return {"layers": "".join("G" if parts == GLA else "W" for parts in self.layers),
                "kv_heads": self.heads[0], "head_size": self.heads[1], "sliding_window": self.window,
                "window_type": self._window_type()}

    def _window_type(self) -> str:
        """Of keys and values; "float32" where there are no windows."""
        types = {array.dtype for name, array in self.arrays.items() if name.endswith((".keys", ".values"))}
        return max((kind.name for kind in types), default="float32")

    def info(self) -> dict[str, Any]:
        """What `sbedge state info --json` prints."""
        try:
            session = summary(self.texts["session"]) if "session" in self.texts else None
        except ValueError as error:
            raise StateError(f"{self.path}: the saved session is damaged ({error})") from None
        return {"file": str(self.path), "file_bytes": self.path.stat().st_size, "format": self.format,
                "position": self.position, **self.sizes(), "vocabulary": 0 if self.logits is None else len(self.logits),
                "fingerprint": self.fingerprint, "session": session,
                "texts": {name: len(text) for name, text in self.texts.items()}}

    def difference(self, other: StateView) -> dict[str, Any]:
        """What `sbedge state diff --json` prints. Windows are compared where both hold the token of one position.

        `max_abs` is null where there is nothing to compare, or no finite answer. StateError if the sizes differ.
        """
        mine, theirs = self.sizes(), other.sizes()
        if {mine["window_type"], theirs["window_type"]} == {"float16", "float32"}:
            theirs["window_type"] = mine["window_type"]
        if key := next((key for key in mine if mine[key] != theirs[key]), None):
            raise StateError(f"{other.path}: {key} is {theirs[key]}, that of {self.path} is {mine[key]}; only states "
                             "of one model can be compared")
        start = max(0, self.position - self.window, other.position - self.window)
        tokens = np.arange(start, max(start, min(self.position, other.position)))
        names = [name for name in self.arrays if not name.endswith("_scales")]
        return {"equal": self.equals(other), "position": [self.position, other.position],
                "fingerprint": [self.fingerprint, other.fingerprint], "window_tokens": len(tokens),
                "last_logits": largest(self.logits, other.logits),
                "layers": [{"array": name, "max_abs": largest(self._values(name, tokens), other._values(name, tokens))}
                           for name in sorted(names, key=lambda name: (int(name.split(".")[0]), name))]}

    def equals(self, other: StateView) -> bool:
        """Whether the states are, byte for byte; their texts are not compared."""
        pairs = [(self.arrays[name], other.arrays[name]) for name in self.arrays]
        if self.logits is not None and other.logits is not None:
            pairs.append((self.logits, other.logits))
        return (self.position == other.position and self.fingerprint == other.fingerprint
                and (self.logits is None) == (other.logits is None) and all(np.array_equal(a, b) for a, b in pairs))

    def _values(self, name: str, tokens: np.ndarray) -> np.ndarray:
        """What an array stands for, of a ring for the tokens at those positions."""
        if not is_ring(name):
            return self.arrays[name]
        slots = tokens % max(self.window, 1)
        values, scales = self.arrays[name][slots], self.arrays.get(name.removesuffix("s") + "_scales")
        return values if scales is None else values.astype(np.float64) * scales[slots][..., None]


def largest(a: np.ndarray | None, b: np.ndarray | None) -> float | None:
    """The largest |a - b|; None if there is none, or it is not finite."""
    if a is None or b is None or a.shape != b.shape or not a.size:
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        value = float(np.abs(a.astype(np.float64) - b).max())
    return value if np.isfinite(value) else None
