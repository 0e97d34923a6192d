"""The memory around one forward pass: inputs, state and scratch, and running it."""
from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np

from sbedge.config import ModelConfig
from sbedge.gguf_format import TYPES
from sbedge.quant.ggml_library import InitParams, load_ggml
from sbedge.reference import QUERY_SPIKE_K, rope_angles

from .ggml_model import Forward, Ops, k_leaf
from .ggml_native import NativeForward
from .ggml_weights import ALIGNMENT, GgmlWeights, aligned_empty

NODES_PER_LAYER = 128       # more than any layer makes
DTYPES: dict[str, np.dtype] = {"F32": np.dtype(np.float32), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}


class Graph:
    """A forward pass of `n` tokens with `length` ring slots in view, bound to one state's memory, or, with native
    kernels, to that of several: n states, a token each.

    `memory` names each state's arrays (without native kernels all float32), which lie within `blocks`. For n = 1
    the graph serves any position below `length`, and any position at all once `length` is the whole window; with
    native kernels `length` plays no part.
    `allocator` is ggml's scratch allocator to share with graphs that are not alive at the same time.
    """

    def __init__(self, config: ModelConfig, weights: GgmlWeights, memory: Sequence[Mapping[str, np.ndarray]],
                 blocks: Sequence[np.ndarray], n: int, length: int, n_logits: int, threads: int,
                 pool: int | None, allocator: int | None = None):
        self.config, self.n, self.length, self.n_logits = config, n, length, n_logits
        self.blocks, self.native, self.sequences = tuple(blocks), weights.native, len(memory)
        self.f = load_ggml().f
        nodes = NODES_PER_LAYER * (config.num_hidden_layers + 1)
        size = self.f.tensor_overhead() * nodes * 2 + self.f.graph_overhead_custom(nodes, False)
        self.context = self.f.init(InitParams(size, None, True))
        self.graph = self.f.new_graph_custom(self.context, nodes, False)
        self._buffers = [self.f.backend_cpu_buffer_from_ptr(b.ctypes.data, b.nbytes) for b in self.blocks]
        self.inputs, leaves = self._make_inputs()
        common = (Ops(self.f, self.context), self.f, self.graph, config, weights.tensors, leaves)
        if self.native:
            self.forward: Forward = NativeForward(
                *common, {}, n, length, library=self.native, events=weights.events, dense=weights.dense,
                sequences=memory, positions=self.inputs["positions"], threads=threads, pool=pool)
        else:
            self.forward = Forward(*common, self._state_leaves(memory[0]), n, length)
        self._logits = self.forward.build(n_logits)
        self._own_allocator = None if allocator else self.f.gallocr_new(self.f.backend_cpu_buffer_type())
        if not self.f.gallocr_alloc_graph(allocator or self._own_allocator, self.graph):
            raise MemoryError("ggml could not allocate the scratch memory of a forward pass")
        if isinstance(self.forward, NativeForward):
            self.forward.place()

    def close(self) -> None:
        if self.context:
            if self._own_allocator:
                self.f.gallocr_free(self._own_allocator)
            for buffer in self._buffers:
                self.f.backend_buffer_free(buffer)
            self.f.free(self.context)
            self.context = 0

    # --- inputs ----------------------------------------------------------------------------------------
    def _make_inputs(self) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        c, n = self.config, self.n
        keys = self.length if n == 1 else self.length + n
        shapes: dict[str, tuple[str, tuple[int, ...]]]
        angles: tuple[int, ...]
        if self.native:
            angles = (n, c.head_dim // 2)
            shapes = {"positions": ("I64", (self.sequences,)), "cos": ("F32", angles), "sin": ("F32", angles)}
        else:
            angles = (n, 1, c.head_dim)
            shapes = {"cos": ("F32", angles), "sin": ("F32", angles), "mask": ("F32", (n, keys)),
                      "slots": ("I64", (min(n, c.sliding_window),))}
        constants = {"127": 127.0, **{k_leaf(k): k for k in {c.spike_k or 1.0, QUERY_SPIKE_K, *c.input_spike_k}}}
        shapes |= {"ids": ("I32", (n,)), **{name: ("F32", (1,)) for name in constants}}
        sizes = {name: int(np.prod(shape)) * DTYPES[kind].itemsize for name, (kind, shape) in shapes.items()}
        padded = {name: -(-size // ALIGNMENT) * ALIGNMENT for name, size in sizes.items()}
        block = aligned_empty(sum(padded.values()))
        self._buffers.append(self.f.backend_cpu_buffer_from_ptr(block.ctypes.data, block.nbytes))
        inputs: dict[str, np.ndarray] = {}
        leaves: dict[str, int] = {}
        at = 0
        for name, (kind, shape) in shapes.items():
            inputs[name] = block[at:at + sizes[name]].view(DTYPES[kind]).reshape(shape)
            leaves[name] = self._leaf(kind, shape, inputs[name], self._buffers[-1])
            at += padded[name]
        for name, value in constants.items():
            inputs[name][0] = value
        return inputs, leaves

    def _state_leaves(self, memory: Mapping[str, np.ndarray]) -> dict[str, int]:
        leaves = {}
        for name, array in memory.items():
            rows = array.reshape(len(array), -1)        # [G, d*d] or [W, G*d]
            buffer = next(buffer for block, buffer in zip(self.blocks, self._buffers, strict=False)
                          if 0 <= array.ctypes.data - block.ctypes.data < block.nbytes)
            leaves[name] = self._leaf("F32", rows.shape, rows, buffer)
        return leaves

    def _leaf(self, kind: str, shape: tuple[int, ...], array: np.ndarray, buffer: int) -> int:
        sizes = (ctypes.c_int64 * len(shape))(*reversed(shape))
        tensor = self.f.new_tensor(self.context, TYPES[kind].number, len(shape), sizes)
        self.f.backend_tensor_alloc(buffer, tensor, array.ctypes.data)
        return tensor

    def set_inputs(self, ids: np.ndarray, positions: Sequence[int]) -> None:
        """Token ids [n] and all that depends on the position of each state."""
        c, n, x, W = self.config, self.n, self.inputs, self.config.sliding_window
        position = positions[0]
        at = position + np.arange(n) if self.sequences == 1 else np.array(positions)
        x["ids"][:] = ids
        cos, sin = rope_angles(at, c.head_dim, c.rope_theta)                        # [n, d/2]
        if self.native:
            x["positions"][:], x["cos"][:], x["sin"][:] = positions, cos, sin
            return
        x["cos"][:, 0] = np.concatenate([cos, cos], 1)
        x["sin"][:, 0] = np.concatenate([-sin, sin], 1)
        x["slots"][:] = at[n - len(x["slots"]):] % W
        slot = np.arange(self.length)
        if n == 1:
            x["mask"][0] = np.where(slot <= position, 0, -np.inf)
            return
        held = position - 1 - (position - 1 - slot) % W         # the position of the token each slot holds
        keys = np.concatenate([held, at])[None]
        x["mask"][:] = np.where((keys <= at[:, None]) & (keys > at[:, None] - W), 0, -np.inf)

    # --- results ---------------------------------------------------------------------------------------
    def logits(self) -> np.ndarray | None:
        """float32 [n_logits, V] of the last run, a copy."""
        if not self.n_logits:
            return None
        return self._result(self._logits, (self.n_logits, self.config.vocab_size)).copy()

    def new_codes(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """int8 windows: codes [n, G, d] and scales [n, G] (both float32) of the last run's tokens."""
        c = self.config
        codes, scales = self.forward.new_codes[name]
        shape = (self.n, c.num_key_value_heads, c.head_dim)
        return self._result(codes, shape), self._result(scales, shape[:2])

    def _result(self, tensor: int, shape: tuple[int, ...]) -> np.ndarray:
        count = int(np.prod(shape))
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.f.get_data(tensor))).reshape(shape)
