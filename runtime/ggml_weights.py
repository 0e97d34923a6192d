"""The weights of a GGUF file as ggml tensors: mapped from the file, repacked only where that pays.

Matrices that multiply the same input and lie next to each other in the file (q, k, v; gate, up) become
one tensor, so that a layer has fewer and larger operations.
"""
from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy as np

from sbedge.config import ModelConfig
from sbedge.errors import ModelFileError
from sbedge.gguf_format import SPIKING_LINEARS, TYPES, expected_gguf_tensors
from sbedge.gguf_reader import GgufFile
from sbedge.quant.ggml_library import InitParams, load_ggml

from .ggml_linears import (
    NativeLinear,
    check_event_layout,
    decode_event_layout,
    event_linears,
    native_dense,
    native_events,
)
from .native.library import load_native

REPACKED = "Q4_0"       # ggml's interleaved layout: 1.2 to 1.4 times faster; other types crash or gain nothing
REPACKED_ROWS = 8       # it takes whole multiples of so many and crashes at any others
GROUPS = (("attn_q.weight", "attn_k.weight", "attn_v.weight"), ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
          ("ffn_gate.weight", "ffn_up.weight"))
MATRIX_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
EMBEDDINGS = "token_embd.weight"
SMALL_WEIGHTS = 1 << 20     # of a matrix that a single thread of ggml's multiplies without being missed by the others
ALIGNMENT = 64


class _Source(NamedTuple):
    """Where a weight lies in memory, and the ggml buffer over that memory."""

    type: str
    shape: tuple[int, ...]
    address: int
    nbytes: int
    buffer: int


class GgmlWeights:
    """`tensors`: name -> ggml tensor pointer; a group is found under its names joined by '+'."""

    def __init__(self, file: GgufFile, config: ModelConfig):
        check_tensors(file, config)
        self.native = load_native()
        self.events: dict[str, NativeLinear] = {}
        self.dense: dict[str, NativeLinear] = {}
        self.pooled = False     # whether our kernels do all large products, on threads of our own
        self.f, self._file = load_ggml().f, file
        self.tensors: dict[str, int] = {}
        self._memory: list[np.ndarray] = []     # what the tensors point into
        self._buffers: list[int] = []
        self._repack = repack_buffer_type(self.f)
        count = len(file.tensors) + config.num_hidden_layers    # a layer's biases are there joined, too
        self.context = self.f.init(InitParams(self.f.tensor_overhead() * (count + 8), None, True))
        sources = self._mapped(file)
        if self.native:
            self.events, held = native_events(file)
            self._memory += held
            self.dense = native_dense(file)
            self.pooled = not _needs_ggml(sources, self.dense)
            if self.pooled:     # embeddings are looked up by ggml
                sources = {name: source for name, source in sources.items()
                           if name == EMBEDDINGS or name.removesuffix(".weight") not in self.dense}
            else:
                self.dense = {}
        else:
            sources |= self._decoded(file)
        for unit in _units(config, sources):
            joined = _join([sources[name] for name in unit])
            if joined:
                self._add("+".join(unit), joined)
            if not joined or unit[0].endswith(".bias"):     # a linear in a format of its own needs its own bias
                for name in unit:
                    self._add(name, sources[name])

    def close(self) -> None:
        for buffer in self._buffers:
            self.f.backend_buffer_free(buffer)
        self.f.free(self.context)
        self.tensors, self._buffers, self._memory = {}, [], []

    def _mapped(self, file: GgufFile) -> dict[str, _Source]:
        buffer, base = self._buffer_over(file.data), file.data.ctypes.data
        return {name: _Source(t.type, t.shape, base + t.offset, t.nbytes, buffer)
                for name, t in file.tensors.items() if t.type in MATRIX_TYPES}

    def _decoded(self, file: GgufFile) -> dict[str, _Source]:
        """Event layouts as float32 [out, in] in one block: exact, at four times the memory."""
        shapes = {f"{event.stem}.weight": (event.out, event.width) for event in event_linears(file)}
        if not shapes:
            return {}
        sizes = {name: -(-4 * out * width // ALIGNMENT) * ALIGNMENT for name, (out, width) in shapes.items()}
        block = aligned_empty(sum(sizes.values()))
        buffer, at, sources = self._buffer_over(block), 0, {}
        for name, shape in shapes.items():
            weight = block[at:at + 4 * shape[0] * shape[1]].view(np.float32).reshape(shape)
            weight[...] = decode_event_layout(file, name)
            sources[name] = _Source("F32", shape, weight.ctypes.data, weight.nbytes, buffer)
            at += sizes[name]
        return sources

    def _buffer_over(self, array: np.ndarray) -> int:
        self._memory.append(array)
        self._buffers.append(self.f.backend_cpu_buffer_from_ptr(array.ctypes.data, array.nbytes))
        return self._buffers[-1]

    def _add(self, name: str, source: _Source) -> None:
        sizes = (ctypes.c_int64 * len(source.shape))(*reversed(source.shape))
        tensor = self.f.new_tensor(self.context, TYPES[source.type].number, len(source.shape), sizes)
        # Row look-ups need the plain layout.
        if source.type == REPACKED and self._repack and name != EMBEDDINGS and source.shape[0] % REPACKED_ROWS == 0:
            buffer = self.f.backend_buft_alloc_buffer(self._repack, source.nbytes + ALIGNMENT)
            self._buffers.append(buffer)
            self.f.backend_tensor_alloc(buffer, tensor, self.f.backend_buffer_get_base(buffer))
            self.f.backend_tensor_set(tensor, source.address, 0, source.nbytes)
            self._file.release()        # this part of the file is not read again
        else:
            self.f.backend_tensor_alloc(source.buffer, tensor, source.address)
        self.tensors[name] = tensor


def _needs_ggml(sources: dict[str, _Source], dense: dict[str, NativeLinear]) -> bool:
    """Whether a matrix large enough to need all threads is in a format that only ggml multiplies."""
    return any(prod(source.shape) > SMALL_WEIGHTS and name.removesuffix(".weight") not in dense
               for name, source in sources.items()
               if name.endswith(".weight") and len(source.shape) == 2 and not _only_looked_up(name, sources))


def _only_looked_up(name: str, sources: dict[str, _Source]) -> bool:
    return name == EMBEDDINGS and "output.weight" in sources


def _units(config: ModelConfig, names: dict[str, _Source]) -> Iterator[list[str]]:
    """Every weight once: groups together, the others alone."""
    grouped = set()
    for i in range(config.num_hidden_layers):
        for group in GROUPS:
            unit = [f"blk.{i}.{name}" for name in group]
            if names.keys() >= set(unit):
                grouped.update(unit)
                yield unit
    for name in names:
        if name not in grouped:
            yield [name]


def _join(parts: list[_Source]) -> _Source | None:
    """One matrix over all parts, if they lie side by side; None if not."""
    first = parts[0]
    if any(p.type != first.type or p.shape[1:] != first.shape[1:] or p.buffer != first.buffer for p in parts):
        return None
    if any(a.address + a.nbytes != b.address for a, b in pairwise(parts)):
        return None
    rows = sum(p.shape[0] for p in parts)
    return first._replace(shape=(rows, *first.shape[1:]), nbytes=sum(p.nbytes for p in parts))


# --- what a file must hold ---------------------------------------------------------------------------
def check_tensors(file: GgufFile, config: ModelConfig) -> None:
    """ModelFileError unless the file holds exactly the tensors of `config`, in shapes and types we run."""
    known: set[str] = set()
    events: dict[str, bool] = {}    # linears whose inputs spike: whether they are in event layout
    for name, shape in expected_gguf_tensors(config).items():
        if input_spikes(config, name):
            parts = check_event_layout(file, name, shape)
            events[name] = bool(parts)
            if parts:
                known |= parts
                continue
        known.add(name)
        found = file.tensors.get(name)
        if found is None:
            raise ModelFileError(f"{file.path}: tensor {name} is missing, expected shape {list(shape)}")
        if found.shape != shape or found.type not in (MATRIX_TYPES if len(shape) == 2 else ("F32",)):
            raise ModelFileError(f"{file.path}: tensor {name} is {found.type} {list(found.shape)}, "
                                 f"expected shape {list(shape)}")
    if extra := file.tensors.keys() - known:
        raise ModelFileError(f"{file.path}: tensor {min(extra)} is not part of this architecture")
    if len(set(events.values())) > 1:
        plain = next(name for name, is_event in events.items() if not is_event)
        raise ModelFileError(f"{file.path}: tensor {plain} is plain, but other linears are in event layout; expected "
                             "all or none")


def input_spikes(config: ModelConfig, name: str) -> bool:
    """Whether the tensor `name` is the weight of a linear that takes spikes."""
    linear = name.split(".")[2] if name.startswith("blk.") and name.endswith(".weight") else ""
    return bool(config.spike_k) and (linear in SPIKING_LINEARS or (linear == "ffn_down" and config.spike_down))


def aligned_empty(nbytes: int) -> np.ndarray:
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start:start + nbytes]


def repack_buffer_type(f) -> int | None:
    """ggml's buffer type of interleaved weights, or None where this build or processor has none for Q4_0."""
    if not f.cpu_has_avx2() and not f.cpu_has_dotprod():
        return None
    register = f.backend_cpu_reg()
    address = f.backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    extra = ctypes.PYFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(
        f.backend_reg_dev_get(register, 0))
    index = 0
    while extra and extra[index]:
        if f.backend_buft_name(extra[index]) == b"CPU_REPACK":
            return extra[index]
        index += 1
    return None
