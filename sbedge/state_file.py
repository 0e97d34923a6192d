"""State files: safetensors written and read without a second copy in memory. docs/state.md describes the layout.

    8 bytes   length of the header, little endian
    header    JSON: array name -> {dtype, shape, data_offsets}; "__metadata__" -> texts, `checksum` among them
    data      the arrays, one after the other

A file is read as what a stranger may have written: nothing is allocated but what the model's own sizes ask for and what
lies in the file, and nothing is returned before the checksum of the whole has been found right.
"""
from __future__ import annotations

import json
import os
import re
import stat
import tempfile
import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import StateError

FORMAT = "sbedge-state-2"
FORMERLY = "sbedge-state-1"         # whole windows, extras in the metadata, no checksum, no fingerprint
MAX_HEADER = 100_000_000            # as in the safetensors library
MAX_STRUCTURE = 1 << 20             # characters of JSON outside its texts, and quotes: bounds what they can become
DTYPES: dict[str, np.dtype] = {name: np.dtype(code) for name, code in
                              {"F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1"}.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
EXTRA = "extra."                    # arrays of ours that hold a text
OLD_METADATA = ("format", "position")   # in the first format; what else stood there was the caller's
NO_CHECKSUM = "00000000"            # stands in the header while the checksum is computed
CHECKSUM = re.compile(rb'("checksum" ?: ?")[0-9a-f]{8}(?=")')
CHUNK = 1 << 20                     # bytes at a time of what is only checked


class Entry(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int                      # bytes from the first array
    stop: int

    def __str__(self) -> str:
        return f"{NAMES[self.dtype]} {list(self.shape)}"


def write_state_file(path: Path, arrays: Mapping[str, np.ndarray], texts: Mapping[str, str],
                     metadata: Mapping[str, str]) -> None:
    """Write `path`, whole or not at all. `texts` of any length become arrays "extra.NAME"; StateError if it fails."""
    arrays = {**arrays, **{EXTRA + name: np.frombuffer(text.encode(), np.uint8)
                           for name, text in texts.items()}}
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))   # so that each lies on its own boundary
    header = _header(arrays, {"format": FORMAT, **metadata, "checksum": NO_CHECKSUM})
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(len(header).to_bytes(8, "little") + header)
            checksum = zlib.crc32(header)
            for array in arrays.values():
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                checksum = zlib.crc32(data, checksum)
                file.write(data)
            file.seek(8)
            file.write(_with_checksum(header, f"{checksum:08x}"))
        os.replace(temporary, path)
    except (OSError, ValueError) as error:      # ValueError: a null byte in the name
        raise StateError(f"{path}: state cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def _header(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, array in arrays.items():
        end = at + array.nbytes
        entries[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def _with_checksum(header: bytes, checksum: str) -> bytes:
    """The header with another checksum."""
    return CHECKSUM.sub(rb"\g<1>" + checksum.encode(), header, count=1)


class StateFile:
    """An open state file whose header is sound: each array lies in the file and none over another.

    entries      name -> type, shape and place of every array
    metadata     texts, `format` among them
    Raises StateError, one line. Use as a context manager.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):        # a pipe would wait for ever
                raise self.error("not a file; expected a saved state")
            self._file = self.path.open("rb", buffering=0)
        except (OSError, ValueError) as error:
            raise self.error(f"cannot be read ({getattr(error, 'strerror', error)})") from None
        try:
            self._header, self.entries, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def error(self, problem: str) -> StateError:
        return StateError(f"{self.path}: {problem}")

    def damaged(self, problem: str) -> StateError:
        return self.error(f"not a saved state, or damaged ({problem}); take another copy, or start without it")

    @property
    def is_old(self) -> bool:
        return self.metadata["format"] == FORMERLY

    @property
    def extras(self) -> list[str]:
        """Names of the texts that lie among the arrays."""
        return [name for name in self.entries if name.startswith(EXTRA)]

    def read(self, into: Mapping[str, np.ndarray]) -> dict[str, str]:
        """Fill the arrays of `into`, which have the entries' shapes and types, and return the file's texts.

        StateError if the file is too short or its checksum another; the arrays hold anything then.
        """
        checksum, texts = zlib.crc32(_with_checksum(self._header, NO_CHECKSUM)), {}
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1].start):
            if name in into:
                data = into[name].reshape(-1).view(np.uint8)
                checksum = self._fill(data, checksum)
            elif name.startswith(EXTRA):
                data = np.empty(entry.stop - entry.start, np.uint8)
                checksum = self._fill(data, checksum)
                texts[name.removeprefix(EXTRA)] = data.tobytes()
            else:
                for start in range(entry.start, entry.stop, CHUNK):
                    checksum = self._fill(np.empty(min(CHUNK, entry.stop - start), np.uint8), checksum)
        if not self.is_old and self.metadata["checksum"] != f"{checksum:08x}":
            raise self.damaged("its checksum is not that of its contents")
        if self.is_old:
            return {key: value for key, value in self.metadata.items() if key not in OLD_METADATA}
        try:
            return {name: text.decode() for name, text in texts.items()}
        except UnicodeDecodeError:
            raise self.damaged("a text in it is no UTF-8") from None

    def _fill(self, data: np.ndarray, checksum: int) -> int:
        """Read len(data) bytes into `data` and return the checksum carried on over them."""
        view, done = data.data, 0
        while done < len(data):
            try:
                got = self._file.readinto(view[done:])
            except OSError as error:
                raise self.error(f"cannot be read ({error.strerror})") from None
            if not got:
                raise self.damaged("it ends too early")
            done += got
        return zlib.crc32(view, checksum)

    # --- the header ----------------------------------------------------------------------------------
    def _read_header(self) -> tuple[bytes, dict[str, Entry], dict[str, str]]:
        size = os.fstat(self._file.fileno()).st_size
        if size < 8:
            raise self.damaged(f"it has {size} bytes")
        length = np.empty(8, np.uint8)
        self._fill(length, 0)
        nbytes = int.from_bytes(length.tobytes(), "little")
        if nbytes > min(size - 8, MAX_HEADER):
            raise self.damaged(f"its header would have {nbytes} bytes")
        data = np.empty(nbytes, np.uint8)
        self._fill(data, 0)
        header = data.tobytes()
        try:
            raw = bounded_json(header)
        except ValueError as error:
            raise self.damaged(f"its header is {error}") from None
        metadata = self._metadata(raw.pop("__metadata__", {}) if isinstance(raw, dict) else {})
        return header, self._entries(raw, size - 8 - nbytes), metadata

    def _metadata(self, raw: Any) -> dict[str, str]:
        texts = isinstance(raw, dict) and all(isinstance(value, str) for value in raw.values())
        metadata: dict[str, str] = raw if texts else {}
        if metadata.get("format") not in (FORMAT, FORMERLY):
            raise self.error("not a state saved by sbedge, or by a newer one "
                             f"(format {metadata.get('format', '')!r:.40}, expected {FORMAT!r})")
        if metadata["format"] == FORMAT and "checksum" not in metadata:
            raise self.damaged("it has no checksum")
        return metadata

    def _entries(self, raw: Mapping[str, Any], nbytes: int) -> dict[str, Entry]:
        entries = {name: self._entry(name, value) for name, value in raw.items()}
        at = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
            if entry.start != at:
                raise self.damaged(f"array {name!r:.40} begins at byte {entry.start}, expected {at}")
            at = entry.stop
        if at != nbytes:
            raise self.damaged(f"its arrays take {at} bytes, and {nbytes} are there")
        return entries

    def _entry(self, name: str, raw: Any) -> Entry:
        problem = self.damaged(f"array {name!r:.40} has an unreadable entry")
        try:
            dtype, shape, (start, stop) = DTYPES[raw["dtype"]], tuple(raw["shape"]), raw["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise problem from None
        sizes = (*shape, start, stop)
        if not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes) or len(shape) > 4:
            raise problem
        if stop - start != prod(shape) * dtype.itemsize:
            raise self.damaged(f"array {name!r:.40} has {stop - start} bytes, its shape needs "
                               f"{prod(shape) * dtype.itemsize}")
        return Entry(dtype, shape, start, stop)


def bounded_json(data: bytes, limit: int = MAX_STRUCTURE) -> Any:
    """The value of a JSON text, in memory that its length bounds: no more objects than an honest one needs.

    ValueError says what is wrong, a name that occurs twice and texts that are no UTF-8 among it.
    """
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")        # texts end at the next quote now
    if plain.count(b'"') > limit or sum(map(len, plain.split(b'"')[::2])) > limit:
        raise ValueError("JSON of too many parts")
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name occurs twice")
    return value
