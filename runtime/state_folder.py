"""StateFolder: the files of a StateCache. Each appears whole; what turns out damaged is removed with a warning."""
from __future__ import annotations

import os
import re
import time
import warnings
from collections import OrderedDict
from pathlib import Path
from threading import Lock

from sbedge.errors import StateError
from sbedge.state import State, load_state

from .engine import Engine

NAME = re.compile(r"([0-9]{1,18})-([0-9a-f]{64})\.state")           # how many tokens, and their key
LEFT_OVER = re.compile(NAME.pattern + r".*\.tmp")                   # of a process that was killed while it wrote
LEFT_OVER_SECONDS = 3600
KEY = "state_cache_key"     # in each file: a file that was renamed is not what its name says


class StateFolder:
    """State files under a budget of bytes, the least recently used dropped first; other files are left alone.

    Several processes may use one folder: what another one removed is then just not there.
    """

    def __init__(self, path: Path, budget: int):
        """Raises StateError if the folder cannot be made or read."""
        self.path, self.budget = path, budget
        self._files: OrderedDict[bytes, tuple[Path, int, int]] = OrderedDict()    # key -> file, tokens, bytes
        self._lock = Lock()
        try:
            path.mkdir(parents=True, exist_ok=True)
            found = sorted((entry.stat().st_mtime, entry.name, entry.stat().st_size) for entry in os.scandir(path))
        except OSError as error:
            raise StateError(f"{path}: no folder to keep states in ({error.strerror}); name another one") from None
        for changed, name, size in found:
            if match := NAME.fullmatch(name):
                self._files[bytes.fromhex(match[2])] = path / name, int(match[1]), size
            elif LEFT_OVER.fullmatch(name) and changed < time.time() - LEFT_OVER_SECONDS:
                _remove(path / name)
        self._shrink()

    def lengths(self) -> set[int]:
        """How many tokens the states in the folder have read."""
        with self._lock:
            return {tokens for _, tokens, _ in self._files.values()}

    def write(self, key: bytes, state: State) -> None:
        """Keep `state`. What cannot be written is not kept, with a warning: the disk may be full."""
        path = self.path / f"{state.position}-{key.hex()}.state"
        try:
            state.save(path, {KEY: key.hex()})
            size = path.stat().st_size
        except (StateError, OSError) as error:
            warnings.warn(f"{error}; it is not kept on disk", stacklevel=3)
            return
        with self._lock:
            self._files.pop(key, None)
            self._files[key] = path, state.position, size
            self._shrink()

    def read(self, key: bytes, tokens: int, engine: Engine) -> State | None:
        """The state kept under `key`, which has read so many tokens; None if it is not there or not sound."""
        with self._lock:
            if key not in self._files:
                return None
            path = self._files[key][0]
        try:
            state, texts = load_state(path, engine.config, engine.fingerprint)
            if state.position != tokens or texts.get(KEY) != key.hex() or state.last_logits is None:
                raise StateError(f"{path}: is not the state that its name says")
            os.utime(path)
        except (StateError, OSError) as error:
            with self._lock:
                self._files.pop(key, None)
            if path.exists():
                warnings.warn(f"{error}; it is removed from the cache", stacklevel=3)
                _remove(path)
            return None
        with self._lock:
            if key in self._files:
                self._files.move_to_end(key)
        return state

    def _shrink(self) -> None:
        total = sum(size for _, _, size in self._files.values())
        while total > self.budget:
            _, (path, _, size) = self._files.popitem(last=False)
            _remove(path)
            total -= size


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path}: cannot be removed ({error.strerror})", stacklevel=2)
