"""OnnxEngine: an exported ONNX folder on onnxruntime's CPU provider.

The session updates the arrays of a State where they lie: past and present are bound to the same memory, which our
kernels and the bodies of our ops allow (see export/onnx/ops.py). Nothing is copied and nothing grows.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import numpy as np
import onnxruntime as ort

from sbedge.config import WEIGHT_GROUP, ModelConfig
from sbedge.errors import EngineUnavailable, ModelFileError, StateError
from sbedge.state import State, state_layout

from .engine import Logits, checked_ids, default_threads
from .native.library import load_native
from .onnx_folder import io_names, open_folder, read_fingerprint
from .onnx_native import register_kernels

MAX_CHUNK, MIN_CHUNK = 256, 16      # tokens per run of the session
CHUNK_BYTES = 1 << 26               # what the largest temporary of a run may take, on composed operations
NATIVE_CHUNK = 512                  # tokens per run on our kernels, which have no large temporaries
MAX_BINDINGS = 16
LINEAR_ATTENTION = 1, 29            # the first onnxruntime whose LinearAttention shares states between query heads


class OnnxEngine:
    """Engine over an ONNX folder. `threads` defaults to the CPUs this process may use; waiting threads sleep.

    traffic  counts the weight bytes that silent channels saved; None without our kernels (see onnx_native)

    Raises ModelFileError, one line, when the folder is missing, damaged or not ours, EngineUnavailable when
    onnxruntime is too old for it. May be used from several threads at once, each with its own state.
    """

    def __init__(self, folder: str | Path, *, threads: int | None = None):
        folder = self._folder = Path(folder)
        config, ops = open_folder(folder)
        self.config: ModelConfig = config
        self.fingerprint = read_fingerprint(folder / "config.json")
        self.layout = state_layout(self.config)
        threads = threads or default_threads()
        options = session_options(threads, ops)
        library = load_native()
        self.traffic = register_kernels(options, library, threads) if library else None
        if not self.traffic:
            check_version(self.config, folder)
        self.chunk = NATIVE_CHUNK if self.traffic else chunk_tokens(self.config)
        self._session = open_session(folder, options)
        self._run_options = ort.RunOptions()
        self._bindings: OrderedDict[int, ort.IOBinding] = OrderedDict()
        self._lock = Lock()

    def new_state(self) -> State:
        """The state before the first token."""
        return State(self.config, self.fingerprint)

    def forward(self, ids: Sequence[int] | np.ndarray, state: State, *, logits: Logits = "last") -> np.ndarray | None:
        """See `Engine.forward`. An interrupt leaves the state as it was after a whole number of runs."""
        ids = checked_ids(ids, self.config)                                             # [n]
        if state.layout != self.layout:
            raise StateError("the state belongs to a model of other sizes; use this engine's new_state()")
        rows = {"last": 1, "all": len(ids), "none": 0}[logits]
        out = np.empty((rows, self.config.vocab_size), np.float32)
        for start in range(0, len(ids), self.chunk):
            piece = ids[start:start + self.chunk]
            if logits == "all":
                self._run(piece, state, out[start:start + len(piece)])
            else:
                self._run(piece, state, out if start + len(piece) == len(ids) else out[:0])
        return out if rows else None

    def _run(self, ids: np.ndarray, state: State, logits: np.ndarray) -> None:
        """One run of the session over ids [n]; logits [k, V] receives those of the last k tokens."""
        inputs = {"input_ids": ids[None], "logits_to_keep": np.array([len(logits)], np.int64),
                  "position_ids": np.arange(state.position, state.position + len(ids), dtype=np.int64)[None]}
        binding = self._binding(state)
        for name, array in inputs.items():      # `inputs` keeps the arrays alive during the run
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits", "cpu", 0, np.float32, (1, *logits.shape), logits.ctypes.data)
        failed = False
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:
            failed = True
            raise ModelFileError(f"{self._folder}: onnxruntime {ort.__version__} cannot run it ({reason(error)}); "
                                 "export it again") from None
        finally:        # Python notices an interrupt only after the run, when the arrays have moved on
            if not failed:
                state.position += len(ids)
                state.last_logits = logits[-1].copy() if len(logits) else None

    def _binding(self, state: State) -> ort.IOBinding:
        """The state's arrays as past and as present, bound once for each block of memory."""
        key = state.block.ctypes.data
        with self._lock:
            binding = self._bindings.pop(key, None) or self._bind(state)
            self._bindings[key] = binding
            if len(self._bindings) > MAX_BINDINGS:
                self._bindings.popitem(last=False)
        return binding

    def _bind(self, state: State) -> ort.IOBinding:
        binding = self._session.io_binding()
        for name, (shape, dtype) in self.layout.items():
            past, present = io_names(name)
            where = "cpu", 0, dtype.type, (1, *shape), state.arrays[name].ctypes.data
            binding.bind_input(past, *where)
            binding.bind_output(present, *where)
        return binding


def check_version(config: ModelConfig, folder: Path) -> None:
    """Of the onnxruntime that runs the bodies of our ops: before 1.29 LinearAttention was missing, or wrong for query
    heads that share a state."""
    found = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if found < LINEAR_ATTENTION and len(config.attn_layers) < config.num_hidden_layers:
        raise EngineUnavailable(f"{folder}: its GLA layers need onnxruntime 1.29 or newer, found {ort.__version__}; "
                                "run: pip install --upgrade onnxruntime (needs Python 3.11 or newer), or install "
                                "sbedge where there is a C++ compiler: its own kernels need no newer one")


def session_options(threads: int, ops: set[str]) -> ort.SessionOptions:
    """For a graph made of these op types."""
    options = ort.SessionOptions()
    if "MatMulNBits" not in ops:    # which is slow on weights as stored; all else only gains a second copy of them
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")    # leave the CPU to others
    options.log_severity_level = 4
    return options


def open_session(folder: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelFileError(f"{folder / 'model.onnx'}: onnxruntime {ort.__version__} cannot load it "
                             f"({reason(error)}); export it again, or update onnxruntime") from None


def reason(error: Exception) -> str:
    """What onnxruntime says, in a line; it raises many kinds, with no common base."""
    return " ".join(str(error).split())[:300]


def chunk_tokens(config: ModelConfig) -> int:
    """Tokens per run, so that the attention scores and the partial sums of spiking linears stay small."""
    per_token = 4 * config.num_attention_heads * (config.sliding_window + MAX_CHUNK)
    if config.spike_k:
        groups = config.hidden_size // WEIGHT_GROUP
        per_token = max(per_token, 4 * 2 * groups * max(config.intermediate_size, config.hidden_size))
    return min(MAX_CHUNK, max(MIN_CHUNK, CHUNK_BYTES // per_token))
