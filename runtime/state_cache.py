"""StateCache: states at places one may want to go back to, found by the token ids that led there.

A snapshot costs what is new in it. GLA layers' states are copied (3.7 MB at 7B). Of the windows (235 MB when full)
only the rows of the tokens since the last snapshot on the same path are; all others are shared with it. Snapshots are
exact: the state they give back is equal byte for byte.
"""
from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from math import prod
from pathlib import Path
from threading import Lock

import numpy as np

from sbedge.state import State, is_ring, state_layout

from .engine import Engine
from .state_folder import StateFolder

MEMORY_SHARE = 8        # the default budget is this part of the machine's memory ...
FEWEST_STATES = 2       # ... but enough for so many states with full windows
UNKNOWN_MEMORY = 8 << 30


class Rows:
    """What the windows hold of the tokens at positions [start, stop): name -> [stop - start, ...]. Never changed."""

    def __init__(self, state: State, start: int, stop: int):
        self.start, self.stop = start, stop
        self.arrays = {name: ring[np.arange(start, stop) % len(ring)]
                       for name, ring in state.arrays.items() if is_ring(name)}
        self.nbytes = sum(rows.nbytes for rows in self.arrays.values())


class Snapshot:
    """A state as it was after `position` tokens."""

    def __init__(self, state: State, since: Snapshot | None = None):
        """`since`: an earlier snapshot that this very state went on from."""
        self.position = state.position
        self.arrays = {name: a.copy() for name, a in state.arrays.items() if not is_ring(name)}
        self.last_logits = None if state.last_logits is None else state.last_logits.copy()
        self.nbytes = sum(a.nbytes for a in self.arrays.values()) + (
            0 if self.last_logits is None else self.last_logits.nbytes)
        window = max((len(a) for name, a in state.arrays.items() if is_ring(name)), default=0)
        first = max(0, self.position - window)      # the oldest token still in the window
        kept: list[Rows] = [] if since is None else [rows for rows in since.rows if rows.stop > first]
        start = max(first, kept[-1].stop if kept else 0)
        new = [Rows(state, start, self.position)] if start < self.position and window else []
        self.rows: tuple[Rows, ...] = (*kept, *new)

    def restore(self, state: State) -> None:
        """Write it into `state`, a new one of the same model."""
        state.position = self.position
        state.last_logits = None if self.last_logits is None else self.last_logits.copy()
        for name, a in self.arrays.items():
            state.arrays[name][...] = a
        for rows in self.rows:
            for name, values in rows.arrays.items():
                ring = state.arrays[name]
                start = max(rows.start, self.position - len(ring))
                ring[np.arange(start, rows.stop) % len(ring)] = values[start - rows.start:]


class StateCache:
    """Snapshots of the states of one engine, the least recently used dropped first. Sessions and threads may share one.

    budget          bytes of memory; None: an eighth of the machine's, and at least two states
    folder          where the snapshots are also written, so that another process finds them; one for each model file
    folder_budget   bytes of disk; None: as `budget`
    """

    def __init__(self, engine: Engine, *, budget: int | None = None, folder: str | Path | None = None,
                 folder_budget: int | None = None) -> None:
        """Raises StateError if the folder cannot be used."""
        self.engine = engine
        self.budget = default_budget(engine) if budget is None else budget
        self.folder = None if folder is None else StateFolder(
            Path(folder), self.budget if folder_budget is None else folder_budget)
        self.nbytes = 0
        self._snapshots: OrderedDict[bytes, Snapshot] = OrderedDict()   # the one used last at the end
        self._shared: Counter[Rows] = Counter()                         # by how many snapshots
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._snapshots)

    def put(self, ids: Sequence[int], state: State, since: Snapshot | None = None) -> Snapshot:
        """Keep `state`, which has read exactly `ids`; `since`: the last snapshot on the way to it, to share with."""
        snapshot = Snapshot(state, since)
        (key,) = self._keys(ids, [len(ids)])
        with self._lock:
            self._insert(key, snapshot)
        if self.folder:
            self.folder.write(key, state)
        return snapshot

    def longest(self, ids: Sequence[int], above: int = 0) -> Snapshot | None:
        """The snapshot that has read the most of `ids` from its beginning, if those are more than `above`."""
        with self._lock:
            lengths = {s.position for s in self._snapshots.values()} | (self.folder.lengths() if self.folder else set())
        wanted = sorted(n for n in lengths if above < n <= len(ids))
        for key, length in zip(reversed(self._keys(ids, wanted)), reversed(wanted), strict=True):
            snapshot = self._find(key, length)
            if snapshot is not None:
                return snapshot
        return None

    def state(self, snapshot: Snapshot) -> State:
        """A new state, equal to the one the snapshot was taken of."""
        state = self.engine.new_state()
        snapshot.restore(state)
        return state

    def clear(self) -> None:
        """Drop all snapshots from memory; files stay."""
        with self._lock:
            self._snapshots.clear()
            self._shared.clear()
            self.nbytes = 0

    # --- how it works ------------------------------------------------------------------------------
    def _find(self, key: bytes, length: int) -> Snapshot | None:
        with self._lock:
            if key in self._snapshots:
                self._snapshots.move_to_end(key)
                return self._snapshots[key]
        state = self.folder.read(key, length, self.engine) if self.folder else None
        if state is None:
            return None
        snapshot = Snapshot(state)
        with self._lock:
            self._insert(key, snapshot)
        return snapshot

    def _keys(self, ids: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """A digest of the first n ids for each n of `lengths`, which ascend."""
        data = memoryview(array("i", ids)).cast("B")
        digest, at, keys = hashlib.blake2b((self.engine.fingerprint or "").encode(), digest_size=32), 0, []
        for length in lengths:
            digest.update(data[4 * at:4 * length])
            keys.append(digest.copy().digest())
            at = length
        return keys

    def _insert(self, key: bytes, snapshot: Snapshot) -> None:
        if key in self._snapshots:
            self._drop(key)
        self._snapshots[key] = snapshot
        self.nbytes += snapshot.nbytes
        for rows in snapshot.rows:
            self._shared[rows] += 1
            self.nbytes += rows.nbytes if self._shared[rows] == 1 else 0
        while self.nbytes > self.budget:
            self._drop(next(iter(self._snapshots)))

    def _drop(self, key: bytes) -> None:
        snapshot = self._snapshots.pop(key)
        self.nbytes -= snapshot.nbytes
        for rows in snapshot.rows:
            self._shared[rows] -= 1
            if not self._shared[rows]:
                del self._shared[rows]
                self.nbytes -= rows.nbytes


def default_budget(engine: Engine) -> int:
    """Bytes: an eighth of the memory this process may use, and at least two states of `engine`."""
    layout = state_layout(engine.config).values()
    state = sum(prod(shape) * dtype.itemsize for shape, dtype in layout) + 4 * engine.config.vocab_size
    return max(memory_bytes() // MEMORY_SHARE, FEWEST_STATES * state)


def memory_bytes() -> int:
    """The machine's memory, or less where a control group grants less."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = UNKNOWN_MEMORY
    try:
        granted = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        granted = ""
    return min(memory, int(granted)) if granted.isdigit() else memory
