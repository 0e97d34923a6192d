"""The same layers on our own kernels, as a few large nodes of the ggml graph (see runtime/native/ggml_ops.h).

    x -> encode -> linears (q k v) -> gla | window -> encode -> linears (o) -> + ...

A node is told where its inputs and outputs lie once ggml has placed them: `place` fills the addresses in.
"""
from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sbedge.gguf_format import TYPES
from sbedge.reference import QUERY_SPIKE_K

from .ggml_linears import NativeLinear
from .ggml_model import F4, Forward
from .native.ggml_ops import BlockEncodeOp, EncodeOp, GlaOp, LinearsOp, WindowOp
from .native.library import F16, F32, INT8, NativeLibrary, Ring

ALL_THREADS = -1        # ggml's GGML_N_TASKS_MAX


BLOCK = 32              # activations that share a scale beside dense weights


class Spikes(NamedTuple):
    """A spiked input: counts int32 [n, width], then thresholds float32 [n], in one tensor."""

    tensor: int
    width: int


@dataclass
class NativeForward(Forward):
    """`events`, `dense`: linears by stem. `sequences`: the arrays of each State, one, or several with a token each.
    `positions`: int64 [sequences], read at every run.
    `pool`: the threads that nodes run on; None: on ggml's own."""

    library: NativeLibrary = field(kw_only=True)
    events: dict[str, NativeLinear] = field(kw_only=True)
    dense: dict[str, NativeLinear] = field(kw_only=True)
    sequences: Sequence[Mapping[str, np.ndarray]] = field(kw_only=True)
    positions: np.ndarray = field(kw_only=True)
    threads: int = field(kw_only=True)
    pool: int | None = field(kw_only=True)
    # Weight bytes of the event layouts that ran: read, and in all. The kernels add to them.
    traffic: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))
    _ops: list[Any] = field(default_factory=list)      # structures and arrays that nodes point to
    _addresses: list[tuple[Any, str, int, int]] = field(default_factory=list)

    def place(self) -> None:
        """Tell every node where its tensors lie; once, after ggml has allocated the graph."""
        for structure, name, tensor, offset in self._addresses:
            if address := self.f.get_data(tensor):      # none for what no wanted output needs
                setattr(structure, name, address + offset)

    def node(self, function: str, op: ctypes.Structure, inputs: list[int], kind: str, count: int) -> int:
        """A node that runs `sbedge_ggml_<function>` on all threads and owns `count` elements of memory."""
        op.pool = self.pool
        self._ops.append(op)
        callback = ctypes.cast(getattr(self.library.handle, f"sbedge_ggml_{function}"), ctypes.c_void_p)
        sources = (ctypes.c_void_p * len(inputs))(*inputs)
        return self.op.custom_4d(TYPES[kind].number, count, 1, 1, 1, sources, len(inputs), callback, ALL_THREADS,
                                 ctypes.addressof(op))

    def at(self, structure: Any, name: str, tensor: int, offset: int = 0) -> None:
        self._addresses.append((structure, name, tensor, offset))

    # --- spikes ----------------------------------------------------------------------------------------
    def spiked_input(self, i: int, kind: str, x: Any) -> Any:
        if not self.events or not self.config.spike_k:
            return super().spiked_input(i, kind, x)
        n, width = self.n, self.width(x)
        k, dead_zone = self.config.spikes_of(i, kind)
        op = EncodeOp(k=k, dead_zone=dead_zone, n=n, width=width)
        tensor = self.node("encode", op, [x], "I32", n * width + n)
        self.at(op, "x", x)
        self.at(op, "counts", tensor)
        self.at(op, "thresholds", tensor, n * width * 4)
        return Spikes(tensor, width)

    # --- linears ---------------------------------------------------------------------------------------
    def linear(self, stem: str, x: int) -> int:
        y = self.product([stem], x, self.n)
        return super().linear(stem, x) if y is None else y

    def linears(self, i: int, stems: tuple[str, ...], x: Any) -> int:
        names = [f"blk.{i}.{stem}" for stem in stems]
        y = self.product(names, x, self.n)
        if y is None and len(stems) > 1 and not self.dense.keys().isdisjoint(names):    # in various formats
            return self.concat([self.linears(i, (stem,), x) for stem in stems])
        return super().linears(i, stems, x) if y is None else y

    def lm_head(self, stem: str, x: int, n: int) -> int:
        y = self.product([stem], x, n)
        return super().lm_head(stem, x, n) if y is None else y

    def product(self, stems: list[str], x: Any, n: int) -> int | None:
        """Linears of one input of n rows side by side, (sum of outs, n); None where they are not all ours."""
        found = self.native_linears(stems, x, n)
        if found is None:
            return None
        op, source = found
        y = self.node("linears", op, [source], "F32", op.y_stride * n)
        self.at(op, "y", y)
        return self.op.reshape_2d(y, op.y_stride, n)

    def gated(self, i: int, x: int) -> int:
        spikes = self.spiked_input(i, "FFN in", x)
        found = self.native_linears([f"blk.{i}.ffn_gate", f"blk.{i}.ffn_up"], spikes, self.n)
        if found is None:
            return super().gated(i, x)
        op, source = found
        width, op.gated = op.y_stride // 2, 1
        memory = self.node("linears", op, [source], "F32", (width + op.y_stride) * self.n)      # result, scratch
        self.at(op, "out", memory)
        self.at(op, "y", memory, width * self.n * F4)
        return self.op.view_2d(memory, width, self.n, width * F4, 0)

    def native_linears(self, stems: list[str], x: Any, n: int) -> tuple[LinearsOp, int] | None:
        """The structure for linears side by side, all but where they write, and the tensor that their encoded input
        lies in; None where they are not all ours."""
        table = self.events if isinstance(x, Spikes) else self.dense
        if not all(stem in table for stem in stems):
            return None
        linears = [table[stem] for stem in stems]
        op = LinearsOp(n=n, count=len(linears))
        if isinstance(x, Spikes):
            source = x.tensor
            self.at(op, "counts", source)
            self.at(op, "thresholds", source, n * x.width * 4)
            op.traffic = self.traffic.ctypes.data
        else:
            source = self.blocks(op, x, n)
        for index, linear in enumerate(linears):
            op.weights[index], op.kinds[index] = ctypes.addressof(linear.struct), linear.kind
            op.columns[index] = op.y_stride
            op.y_stride += linear.out
            op.bytes += linear.nbytes
        return op, source

    def blocks(self, linears: LinearsOp, x: int, n: int) -> int:
        """Encode x (width, n) for dense weights and tell `linears` where that lies; returns the tensor."""
        width = self.f.nbytes(x) // (F4 * n)
        op, count = BlockEncodeOp(n=n, width=width), n * width
        tensor = self.node("block_encode", op, [x], "F32", count // F4 + 2 * count // BLOCK)
        self.at(op, "x", x)
        for name, offset in (("codes", 0), ("scales", count), ("sums", count + count // BLOCK * F4)):
            self.at(op, name, tensor, offset)
            self.at(linears, name, tensor, offset)
        return tensor

    # --- mixers ----------------------------------------------------------------------------------------
    def gla(self, i: int, projected: int, gate: int) -> int:
        c, n, d = self.config, self.n, self.config.head_dim
        H, G = c.num_attention_heads, c.num_key_value_heads
        count = len(self.sequences)
        scratch = self.library.gla_scratch(H, G, d, n // count) * self.threads
        states = (ctypes.c_void_p * count)(*(arrays[f"{i}.recurrent_state"].ctypes.data for arrays in self.sequences))
        self._ops.append(states)
        op = GlaOp(n=n // count, sequences=count, states=ctypes.addressof(states))
        op.input.heads, op.input.groups, op.input.d, op.input.eps = H, G, d, c.norm_eps
        op.input.gate_stride = self.width(gate)
        norm = self.weights[f"blk.{i}.attn_g_norm.weight"]
        out = self.node("gla", op, [projected, gate, norm], "F32", n * H * d + scratch)
        self._read_qkv(op.input, projected)
        self.at(op.input, "gate", gate)
        self.at(op.input, "norm_weight", norm)
        return self._mixed(op, out, H * d)

    def window(self, i: int, projected: int) -> int:
        c, n, d = self.config, self.n, self.config.head_dim
        H, G, W = c.num_attention_heads, c.num_key_value_heads, c.sliding_window
        count = len(self.sequences)
        scratch = self.library.window_scratch(H, G, d, W, n // count) * self.threads
        rings = (Ring * count)(*(self.ring_of(i, arrays) for arrays in self.sequences))
        self._ops.append(rings)
        op = WindowOp(n=n // count, sequences=count, rings=ctypes.addressof(rings),
                      positions=self.positions.ctypes.data)
        op.input.heads, op.input.query_k = H, QUERY_SPIKE_K if c.int8_window else 0
        cos, sin = self.leaf["cos"], self.leaf["sin"]
        out = self.node("window", op, [projected, cos, sin], "F32", n * H * d + scratch)
        self._read_qkv(op.input, projected)
        self.at(op.input, "cos", cos)
        self.at(op.input, "sin", sin)
        return self._mixed(op, out, H * d)

    def ring_of(self, i: int, arrays: Mapping[str, np.ndarray]) -> Ring:
        c = self.config
        kind = INT8 if c.int8_window else F16 if c.half_window else F32
        ring = Ring(c.sliding_window, c.num_key_value_heads, c.head_dim, type=kind)
        for name in ("keys", "values", "key_scales", "value_scales"):
            array = arrays.get(f"{i}.{name}")
            setattr(ring, name, None if array is None else array.ctypes.data)
        return ring

    def _read_qkv(self, given: Any, projected: int) -> None:
        """q, k and v lie side by side in the rows of `projected`."""
        c = self.config
        H, G = c.num_attention_heads, c.num_key_value_heads
        given.q_stride = given.k_stride = given.v_stride = self.width(projected)
        for name, first in (("q", 0), ("k", H), ("v", H + G)):
            self.at(given, name, projected, first * c.head_dim * F4)

    def _mixed(self, op: Any, memory: int, width: int) -> int:
        self.at(op, "out", memory)
        self.at(op, "scratch", memory, self.n * width * F4)
        self.expand(memory)     # it moves the state on, whether or not its output is wanted
        return self.op.view_2d(memory, width, self.n, width * F4, 0)
