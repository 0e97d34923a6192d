"""GGUF engine: our graph on the ggml of an installed package, over a mapped file.

Decoding reuses one graph per state, built for a number of ring slots (a bucket) and bound to the state's own
memory, so that a token costs one call; prefill builds a graph for every chunk.
"""
from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sbedge.config import ModelConfig
from sbedge.errors import EngineUnavailable, InputError, StateError
from sbedge.gguf_format import config_from_metadata, source_fingerprint
from sbedge.gguf_reader import read_gguf
from sbedge.quant.ggml_library import load_ggml
from sbedge.state import State, state_layout

from .engine import Logits, checked_batch, checked_ids, default_threads, forward_each
from .ggml_graph import Graph
from .ggml_native import NativeForward
from .ggml_weights import GgmlWeights, aligned_empty

CHUNK = 512                     # tokens a prefill graph takes
LOGITS_BYTES = 1 << 26          # most memory the logits of one chunk may take
BUCKET = 256                    # ring slots a decode graph grows by
PARAMS_BYTES = 8192             # room for ggml_threadpool_params, whose layout is ggml's business


@dataclass
class Traffic:
    """Weight bytes of event layouts since the engine was loaded: fetched by forward passes, and what the same passes
    would have fetched had no channel been silent (up to 64 tokens share a pass, which fetches a row once)."""

    fetched: int = 0
    dense: int = 0


class GgmlEngine:
    """Engine over a GGUF file; `metadata` holds the file's keys (the tokenizer's among them).

    threads      defaults to the cores this process may use
    half_window  keep the windows' keys and values in float16; InputError where no kernels are there for that
    traffic      counts the weight bytes that silent channels saved
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, half_window: bool = False):
        self.path = Path(path)
        self.f = load_ggml().f
        self._file = read_gguf(self.path)
        self.metadata = self._file.metadata
        self.config: ModelConfig = config_from_metadata(self.metadata, str(self.path))
        self.fingerprint = source_fingerprint(self.metadata)
        self._weights = GgmlWeights(self._file, self.config)
        if half_window:
            self.config = self._with_half_window()
        self._layout = state_layout(self.config)
        self.traffic = Traffic()
        self.threads = threads or default_threads()
        self._native = self._weights.native
        self._pool = self._native.pool_new(self.threads) if self._native and self._weights.pooled else None
        self._backend, self._threadpool = self._start_backend()
        self._prefill_memory = self.f.gallocr_new(self.f.backend_cpu_buffer_type())
        self._bound: weakref.WeakKeyDictionary[State, _Bound] = weakref.WeakKeyDictionary()
        self._batch: tuple[list[int], Graph] | None = None
        self._lock = threading.Lock()

    def _with_half_window(self) -> ModelConfig:
        if self.config.int8_window:
            raise InputError(f"{self.path}: a W8ASpike model keeps its windows in int8; load it without window 'f16'")
        if not self._weights.native:
            raise InputError(f"{self.path}: float16 windows need the native kernels, which are not there; load it "
                             "without window 'f16', or install a C++ compiler and sbedge once more")
        return replace(self.config, half_window=True)

    def new_state(self) -> State:
        return State(self.config, self.fingerprint)

    def forward(self, ids: Sequence[int] | np.ndarray, state: State, *, logits: Logits = "last") -> np.ndarray | None:
        """Advance `state` in place; see `Engine.forward`."""
        ids = checked_ids(ids, self.config)
        if state.layout != self._layout:
            raise StateError("the state belongs to a model of other sizes")
        rows: list[np.ndarray] = []
        for start, stop in self._chunks(len(ids), logits):
            n_logits = {"all": stop - start, "last": int(stop == len(ids)), "none": 0}[logits]
            with self._lock:
                out = self._advance(ids[start:stop], state, n_logits)
            if out is not None:
                rows.append(out)
        return np.concatenate(rows) if rows else None

    def _chunks(self, count: int, logits: Logits) -> list[tuple[int, int]]:
        size = CHUNK if logits != "all" else max(1, min(CHUNK, LOGITS_BYTES // (4 * self.config.vocab_size)))
        return [(start, min(start + size, count)) for start in range(0, count, size)]

    def _advance(self, ids: np.ndarray, state: State, n_logits: int) -> np.ndarray | None:
        bound = self._bound.get(state)
        if bound is None or not bound.is_current(state):
            bound = self._bound[state] = _Bound(self, state)
        graph = bound.graph(len(ids), state.position, n_logits)
        graph.set_inputs(ids, [state.position])
        logits = None

        def finish() -> None:
            nonlocal logits
            bound.finish(graph, state)
            logits = graph.logits()
            state.last_logits = None if logits is None else logits[-1].copy()

        self._compute(graph, finish)
        return logits

    def _compute(self, graph: Graph, finish: Callable[[], None]) -> None:
        """Run `graph`, then `finish`, which moves positions on: after an interrupt too, for Python notices one only
        when the run is over and the states' arrays have moved."""
        status = 0
        try:
            status = self.f.backend_graph_compute(self._backend, graph.graph)
        finally:
            if status == 0:
                finish()
        if status != 0:
            raise MemoryError("ggml could not run a forward pass")
        if isinstance(graph.forward, NativeForward):
            self.traffic.fetched += int(graph.forward.traffic[0])
            self.traffic.dense += int(graph.forward.traffic[1])
            graph.forward.traffic[:] = 0

    def forward_batch(self, ids: Sequence[int] | np.ndarray, states: Sequence[State]) -> np.ndarray:
        """One token for each of several states, which share one pass over the weights; see `Engine.forward_batch`."""
        ids = checked_batch(ids, states, self.config)
        if any(state.layout != self._layout for state in states):
            raise StateError("a state belongs to a model of other sizes")
        if not self._weights.native or len(states) == 1:
            return forward_each(self, ids, states)
        with self._lock:
            graph = self._batch_graph(states)
            graph.set_inputs(ids, [state.position for state in states])
            logits = np.empty((len(states), self.config.vocab_size), np.float32)

            def finish() -> None:
                logits[:] = graph.logits()
                for state, row in zip(states, logits, strict=True):
                    state.position += 1
                    state.last_logits = row.copy()

            self._compute(graph, finish)
        return logits

    def _batch_graph(self, states: Sequence[State]) -> Graph:
        """The graph of the last batch if these are its states in their order, else a new one in its place."""
        key = [state.block.ctypes.data for state in states]
        if self._batch is None or self._batch[0] != key:
            if self._batch:
                self._batch[1].close()
                self._batch = None
            graph = Graph(self.config, self._weights, [dict(state.arrays) for state in states],
                          [state.block for state in states], len(states), self.config.sliding_window, len(states),
                          self.threads, self._pool)
            self._batch = key, graph
        return self._batch[1]

    def _start_backend(self) -> tuple[int, int]:
        params = ctypes.create_string_buffer(PARAMS_BYTES)
        threads = 1 if self._pool else self.threads
        self.f.threadpool_params_init(params, threads)
        backend, threadpool = self.f.backend_cpu_init(), self.f.threadpool_new(params)
        if not backend or not threadpool:
            raise EngineUnavailable("ggml could not start its CPU backend")
        self.f.backend_cpu_set_n_threads(backend, threads)
        self.f.backend_cpu_set_threadpool(backend, threadpool)
        return backend, threadpool

    def close(self) -> None:
        """Give back all memory; the engine cannot be used afterwards, its states can."""
        with self._lock:
            if self._backend:
                self._bound.clear()
                if self._batch:
                    self._batch[1].close()
                self.f.gallocr_free(self._prefill_memory)
                self.f.backend_free(self._backend)
                self.f.threadpool_free(self._threadpool)
                if self._native and self._pool:
                    self._native.pool_free(self._pool)
                self._weights.close()
                self._backend = 0

    def __del__(self) -> None:
        if getattr(self, "_lock", None):    # absent if loading failed
            self.close()


class _Bound:
    """What the engine keeps for one state: its graphs, and a float32 mirror of an int8 window.

    ggml computes on float32 rings; the State's int8 codes stay the truth and are updated after every run, so
    the mirror can be made again from them whenever another engine moved the state on.
    """

    def __init__(self, engine: GgmlEngine, state: State):
        self.config, self.weights, self.shared = engine.config, engine._weights, engine._prefill_memory
        self.threads, self.pool = engine.threads, engine._pool
        self.address, self.position = state.block.ctypes.data, state.position
        self.memory = dict(state.arrays)
        self.blocks = [state.block]
        self.mirrored = self.config.int8_window and not self.weights.native
        if self.mirrored:
            self._mirror(state)
        self.decode: Graph | None = None
        self.prefill: Graph | None = None

    def is_current(self, state: State) -> bool:
        return self.address == state.block.ctypes.data and (not self.mirrored or self.position == state.position)

    def graph(self, n: int, position: int, n_logits: int) -> Graph:
        if self.prefill:
            self.prefill.close()
            self.prefill = None
        W = self.config.sliding_window
        if n > 1:
            self.prefill = self._new(n, min(position, W), n_logits, self.shared)
            return self.prefill
        length = W if self.weights.native else min(W, -(-(position + 1) // BUCKET) * BUCKET)
        if self.decode is None or (self.decode.length, self.decode.n_logits) != (length, n_logits):
            if self.decode:
                self.decode.close()
                self.decode = None
            self.decode = self._new(1, length, n_logits, None)
        return self.decode

    def _new(self, n: int, length: int, n_logits: int, allocator: int | None) -> Graph:
        return Graph(self.config, self.weights, [self.memory], self.blocks, n, length, n_logits, self.threads,
                     self.pool, allocator)

    def finish(self, graph: Graph, state: State) -> None:
        """After a run: the state has moved on by the graph's tokens."""
        for name in graph.forward.new_codes:
            slots = graph.inputs["slots"]
            codes, scales = graph.new_codes(name)
            state.arrays[name][slots] = codes[-len(slots):]
            state.arrays[name.removesuffix("s") + "_scales"][slots] = scales[-len(slots):]
        state.position += graph.n
        self.position = state.position

    def _mirror(self, state: State) -> None:
        names = [name for name, a in state.arrays.items() if a.dtype == np.int8]
        if not names:
            return
        shape = state.arrays[names[0]].shape
        size = 4 * int(np.prod(shape))
        padded = -(-size // 64) * 64
        block = aligned_empty(padded * len(names))
        self.blocks.append(block)
        for i, name in enumerate(names):
            ring = block[i * padded:i * padded + size].view(np.float32).reshape(shape)
            np.multiply(state.arrays[name], state.arrays[name.removesuffix("s") + "_scales"][..., None], out=ring)
            self.memory[name] = ring
            del self.memory[name.removesuffix("s") + "_scales"]

    def __del__(self) -> None:
        for graph in (self.decode, self.prefill):
            if graph:
                graph.close()
