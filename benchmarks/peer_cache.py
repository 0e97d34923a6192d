"""llama.cpp's cache of one sequence, made deeper by repetition, so that a deep context need not be read to be timed.

What `llama_state_seq_get_data` writes (llama.cpp, llama-kv-cache.cpp), all little-endian:

    u32 magic, u32 sequence, u32 streams (1), u32 cells
    cells * (i32 position, u32 sequences (1), i32 sequence)
    u32 values transposed, u32 layers
    layers * (i32 type, u64 bytes of a row, cells rows)                                                  the keys
    layers * (i32 type, u64 bytes of a row, cells rows)                                                  the values
    or, transposed, layers * (i32 type, u32 bytes of an element, u32 rows, rows * cells elements)
"""
from __future__ import annotations

import numpy as np

HEAD = 16    # bytes up to and with the number of cells
CELL = 12


def repeated(cache: np.ndarray, depth: int) -> np.ndarray:
    """The cache of `depth` cells that repeats the given one's keys and values; bytes in, bytes out."""
    reader = _Reader(cache)
    head = reader.words(HEAD // 4)
    streams, cells = int(head[2]), int(head[3])
    if streams != 1 or not cells:
        raise SystemExit(f"llama.cpp wrote a cache of {streams} streams and {cells} cells, in a layout not known here")
    reader.take(cells * CELL)
    meta = np.zeros((depth, CELL // 4), np.uint32)
    meta[:, 0], meta[:, 1] = np.arange(depth), 1
    head = head.copy()
    head[3] = depth
    transposed, layers = (int(word) for word in reader.words(2))
    parts = [head, meta, np.array([transposed, layers], np.uint32)]
    for is_values in (False, True):
        for _ in range(layers):
            row = reader.take(12)
            parts.append(row)
            if is_values and transposed:
                element, rows = (int(word) for word in row[4:].view(np.uint32))
                data = reader.take(rows * cells * element).reshape(rows, cells, element)
                parts.append(data[:, np.arange(depth) % cells])
            else:
                width = int(row[4:].copy().view(np.uint64)[0])
                parts.append(reader.take(cells * width).reshape(cells, width)[np.arange(depth) % cells])
    if reader.offset != cache.size:
        raise SystemExit("llama.cpp wrote its cache in a layout not known here")
    return np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts])


class _Reader:
    def __init__(self, cache: np.ndarray):
        self.cache, self.offset = cache, 0

    def take(self, size: int) -> np.ndarray:
        part = self.cache[self.offset:self.offset + size]
        if part.size != size:
            raise SystemExit("llama.cpp wrote its cache in a layout not known here")
        self.offset += size
        return part

    def words(self, count: int) -> np.ndarray:
        return self.take(4 * count).copy().view(np.uint32)
