"""Reads a GGUF file that may be hostile: every size is checked against the file before it is used.

The gguf package's own reader trusts the counts it finds and takes seconds on a vocabulary of 150,000.
"""
from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ModelFileError
from .gguf_format import TYPES, row_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 16       # metadata keys, or tensors
MAX_ARRAY_DEPTH = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_TYPE_NAMES = {kind.number: name for name, kind in TYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` outermost first, `offset` from the start of the file, sizes in bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """`metadata` as Python values, `tensors` by name, `data` the whole file memory-mapped (uint8, read-only)."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: np.ndarray
    mapping: mmap.mmap

    def release(self) -> None:
        """Give up the resident pages of the file; what is used again is read again (from the page cache)."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor, uint8, not copied."""
        info = self.tensors[name]
        return self.data[info.offset:info.offset + info.nbytes]

    def array(self, name: str) -> np.ndarray:
        """A tensor stored as plain numbers (F32, F16, I8, I32), not copied."""
        dtype = {"F32": np.float32, "F16": np.float16, "I8": np.int8, "I32": np.int32}[self.tensors[name].type]
        return self.raw(name).view(dtype).reshape(self.tensors[name].shape)


def read_gguf(path: str | Path) -> GgufFile:
    """Open and validate; ModelFileError (one line) for anything that is not a complete GGUF file."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    data = np.frombuffer(mapping, np.uint8)
    try:
        metadata, tensors = _Parser(data).parse()
    except (_Damaged, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: damaged or truncated GGUF file ({error}); export or download it again") from None
    return GgufFile(path, metadata, tensors, data, mapping)


class _Damaged(Exception):
    pass


class _Parser:
    """Walks the header once. `need` guards every read and every count."""

    def __init__(self, data: np.ndarray):
        self.view: memoryview = data.data
        self.size = len(self.view)
        self.at = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if bytes(self.view[:4]) != MAGIC:
            raise _Damaged(f"it starts with {bytes(self.view[:4])!r}, expected {MAGIC!r}")
        self.at = 4
        version, n_tensors, n_keys = self.scalar("I"), self.scalar("Q"), self.scalar("Q")
        if version not in VERSIONS:
            raise _Damaged(f"version {version}, expected one of {VERSIONS}")
        for what, count in (("tensors", n_tensors), ("metadata keys", n_keys)):
            if count > MAX_ENTRIES:
                raise _Damaged(f"it claims {count} {what}, expected at most {MAX_ENTRIES}")
        metadata = {}
        for _ in range(n_keys):
            key = self.string()
            metadata[key] = self.value(self.scalar("I"))
        headers = [self.tensor_header() for _ in range(n_tensors)]
        return metadata, self.place(headers, metadata.get("general.alignment", 32))

    def need(self, nbytes: int) -> None:
        if nbytes > self.size - self.at:
            raise _Damaged(f"{nbytes} bytes expected at offset {self.at}, the file ends at {self.size}")

    def scalar(self, code: str) -> Any:
        nbytes = struct.calcsize("<" + code)
        self.need(nbytes)
        (value,) = struct.unpack_from("<" + code, self.view, self.at)
        self.at += nbytes
        return value

    def string(self) -> str:
        return self.blob(self.scalar("Q")).decode("utf-8")

    def blob(self, nbytes: int) -> bytes:
        self.need(nbytes)
        self.at += nbytes
        return bytes(self.view[self.at - nbytes:self.at])

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            # Vocabularies may hold single bytes that are no UTF-8; keep them recoverable.
            return self.blob(self.scalar("Q")).decode("utf-8", "surrogateescape")
        if kind != _ARRAY or depth >= MAX_ARRAY_DEPTH:
            raise _Damaged(f"unknown value type {kind} at offset {self.at}")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            width = struct.calcsize("<" + _SCALARS[item])
            self.need(count * width)
            return np.frombuffer(self.blob(count * width), "<" + _SCALARS[item]).tolist()
        self.need(count * 8)        # the least an element of a string or array takes
        return self.strings(count) if item == _STRING else [self.value(item, depth + 1) for _ in range(count)]

    def strings(self, count: int) -> list[str]:
        unpack, view, at, size, out = struct.Struct("<Q").unpack_from, self.view, self.at, self.size, []
        for _ in range(count):
            if at + 8 > size:
                raise _Damaged("an array of strings runs past the end of the file")
            end = at + 8 + unpack(view, at)[0]
            if end > size:
                raise _Damaged("a string runs past the end of the file")
            out.append(str(view[at + 8:end], "utf-8", "surrogateescape"))
            at = end
        self.at = at
        return out

    def tensor_header(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dims = self.string(), self.scalar("I")
        if not 1 <= n_dims <= 4:
            raise _Damaged(f"tensor {name[:64]!r} has {n_dims} dimensions, expected 1 to 4")
        shape = tuple(self.scalar("Q") for _ in range(n_dims))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")

    def place(self, headers: list, alignment: Any) -> dict[str, TensorInfo]:
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise _Damaged(f"alignment {alignment!r}, expected a power of two from 8 to 65536")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, number, offset in headers:
            if number not in _TYPE_NAMES:
                raise _Damaged(f"tensor {name[:64]!r} has unknown type {number}")
            kind = _TYPE_NAMES[number]
            count = 1
            for dimension in shape:
                count *= dimension
            if not count or shape[-1] % TYPES[kind].block:
                raise _Damaged(f"tensor {name[:64]!r} of type {kind} has impossible shape {list(shape)}")
            nbytes = row_bytes(kind, count)
            if start + offset + nbytes > self.size:
                raise _Damaged(f"tensor {name[:64]!r} {list(shape)} would end at byte {start + offset + nbytes}, "
                               f"the file has {self.size}")
            if name in tensors or offset % alignment:
                raise _Damaged(f"tensor {name[:64]!r} is repeated or not aligned")
            tensors[name] = TensorInfo(name, shape, kind, start + offset, nbytes)
        return tensors
