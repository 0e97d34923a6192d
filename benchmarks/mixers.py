"""The mixer kernels alone: GLA prefill beside onnxruntime's LinearAttention, the others beside what the machine can do.

    python benchmarks/mixers.py [gla-prefill] [gla-decode] [window-decode] [window-prefill] [--threads 2] [--rounds 9]

Every round times the contestants in turn (A B A B); medians, and the median of the rounds' ratios. The kernels run on
Python threads (their calls release the interpreter). Decoding steps through several layers' states, as a model does:
together they are larger than the caches, and their bytes a second stand beside the machine's read bandwidth.
"""
from __future__ import annotations

import argparse
import copy
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no installation

from sbedge.apps.measure import read_bandwidth, timed
from sbedge.reference import log_sigmoid, relu, rope_angles
from sbedge.runtime.native.library import GlaInput, Ring, WindowInput, load_native

SHAPES = {"7b": (28, 4, 128), "1b": (32, 8, 64)}    # query heads, key/value heads, head size
LAYERS = 8      # of decoding
REPEATS = 20    # of GLA prefill in a contestant's turn
LIBRARY: Any = load_native()


class Gla:
    """One layer's inputs [n, heads, d] and state; `part` is what one of `nth` threads does."""

    def __init__(self, shape: tuple[int, int, int], n: int, nth: int):
        (H, G, d), rng = shape, np.random.default_rng(0)
        self.q, self.k, self.v, self.gate = (rng.standard_normal((n, heads * d), np.float32) for heads in (H, G, G, G))
        self.n, self.nth, self.state = n, nth, np.zeros((G, d, d), np.float32)
        self.weight, self.out = np.ones(d, np.float32), np.empty((n, H * d), np.float32)
        self.scratch = np.zeros(nth * LIBRARY.gla_scratch(H, G, d, n), np.float32)
        self.given = GlaInput(H, G, d, *(x.ctypes.data for x in (self.q, self.k, self.v, self.gate)), H * d, G * d,
                              G * d, G * d, self.weight.ctypes.data, 1e-6)

    def part(self, ith: int) -> None:
        LIBRARY.gla(ctypes.addressof(self.given), self.n, self.state.ctypes.data, self.out.ctypes.data,
                    self.scratch.ctypes.data, ith, self.nth)

    def again(self) -> Gla:
        """The same inputs and outputs, another state."""
        other = copy.copy(self)
        other.state, other.scratch = np.zeros_like(self.state), np.zeros_like(self.scratch)
        other.given = GlaInput.from_buffer_copy(self.given)
        return other


class Window:
    """One layer's inputs and ring, filled up to `position`."""

    def __init__(self, shape: tuple[int, int, int], window: int, n: int, position: int, nth: int):
        (H, G, d), rng = shape, np.random.default_rng(0)
        self.q, self.k, self.v = (rng.standard_normal((n, heads * d), np.float32) for heads in (H, G, G))
        self.cos, self.sin = rope_angles(position + np.arange(n), d, 1e6)
        self.nth, self.out = nth, np.empty((n, H * d), np.float32)
        self.ring = rng.standard_normal((2, window, G, d), np.float32)
        self.scratch = np.zeros(nth * LIBRARY.window_scratch(H, G, d, window, n), np.float32)
        self.given = WindowInput(H, *(x.ctypes.data for x in (self.q, self.k, self.v, self.cos, self.sin)), H * d,
                                 G * d, G * d)
        self.described = Ring(window, G, d, self.ring[0].ctypes.data, self.ring[1].ctypes.data)
        self.arguments = (ctypes.addressof(self.given), position, n, ctypes.addressof(self.described),
                          self.out.ctypes.data, self.scratch.ctypes.data)

    def part(self, ith: int) -> None:
        LIBRARY.window(*self.arguments, ith, self.nth)


def linear_attention(case: Gla, shape: tuple[int, int, int], threads: int) -> tuple[Callable[[], Any], np.ndarray]:
    """onnxruntime's node on the same numbers, and the state it leaves behind. What our kernel does besides (relu,
    log-sigmoid, the norm of every head) is left out on its side."""
    import onnxruntime as ort
    from onnx import TensorProto, helper
    (H, G, d), n = shape, case.n
    decay = (log_sigmoid(case.gate) / 16).astype(np.float32)
    inputs = {"q": relu(case.q)[None], "k": relu(case.k)[None], "v": case.v[None],
              "past": np.zeros((1, G, d, d), np.float32), "decay": decay[None]}
    outputs = {"y": np.empty((1, n, H * d), np.float32), "present": np.empty((1, G, d, d), np.float32)}
    node = helper.make_node("LinearAttention", list(inputs), list(outputs), domain="com.microsoft",
                            update_rule="gated", q_num_heads=H, kv_num_heads=G, scale=d ** -0.5)
    described = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in some.items()]
                 for some in (inputs, outputs)]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "peer", *described), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, x in inputs.items():
        binding.bind_cpu_input(name, x)
    for name, x in outputs.items():
        binding.bind_output(name, "cpu", 0, np.float32, x.shape, x.ctypes.data)

    def run(keep: Any = (inputs, outputs)) -> None:
        for _ in range(REPEATS):
            session.run_with_iobinding(binding)
    return run, outputs["present"][0]


class Bench:
    def __init__(self, threads: int, rounds: int):
        self.threads, self.rounds, self.pool = threads, rounds, ThreadPoolExecutor(threads)

    def together(self, layers: Sequence[Gla | Window]) -> Callable[[], Any]:
        """Every layer in turn, each thread its parts of them: they need not wait for each other in between."""
        def work(ith: int) -> None:
            for layer in layers:
                layer.part(ith)
        return lambda: list(self.pool.map(work, range(self.threads)))

    def seconds(self, *contestants: Callable[[], Any]) -> np.ndarray:
        """[rounds, contestants], in turns. Each has the machine to itself: threads that wait awake for more work
        (onnxruntime's do) are given the time to fall asleep."""
        times = np.empty((self.rounds, len(contestants)))
        for row in times:
            for i, run in enumerate(contestants):
                time.sleep(0.05)
                row[i] = timed(run)
        return times

    def gla_prefill(self) -> None:
        shape, n = SHAPES["7b"], 512
        case = Gla(shape, n, self.threads)
        peer, present = linear_attention(case, shape, self.threads)
        for ith in range(self.threads):
            case.part(ith)
        peer()
        if not np.allclose(case.state, present, rtol=1e-3, atol=1e-4 * float(np.abs(present).max())):
            raise SystemExit("gla: the states differ")
        times = self.seconds(self.together([case.again() for _ in range(REPEATS)]), peer) / REPEATS
        mine, theirs = np.median(times, axis=0) * 1e3
        ratio = statistics.median(times[:, 1] / times[:, 0])
        print(f"gla prefill, 28/4 heads of 128, {n} tokens: {mine:.2f} ms, LinearAttention {theirs:.2f} ms, "
              f"{ratio:.2f} times as fast")

    def gla_decode(self) -> None:
        for name, shape in SHAPES.items():
            layers = [Gla(shape, 1, self.threads) for _ in range(200)]
            nbytes = sum(2 * layer.state.nbytes for layer in layers)    # read and written
            self.decode(f"gla decode, {name}", layers, nbytes)

    def window_decode(self) -> None:
        for name, shape in SHAPES.items():
            layers = [Window(shape, 4096, 1, 100_000, self.threads) for _ in range(LAYERS)]
            self.decode(f"window decode, {name}, 4096 keys", layers, sum(layer.ring.nbytes for layer in layers))

    def decode(self, name: str, layers: list[Any], nbytes: int) -> None:
        seconds = float(np.median(self.seconds(self.together(layers))))
        print(f"{name}: {seconds / len(layers) * 1e6:.0f} us a layer, {nbytes / seconds / 1e9:.1f} GB/s")

    def window_prefill(self) -> None:
        n, window, position = 1024, 4096, 8192
        for name, shape in SHAPES.items():
            case = Window(shape, window, n, position, self.threads)
            seconds = float(np.median(self.seconds(self.together([case]))))
            H, _, d = shape
            print(f"window prefill, {name}, {n} tokens at {position}, 4096 keys: {seconds * 1e3:.1f} ms, "
                  f"{4 * n * window * H * d / seconds / 1e9:.0f} GFLOP/s")
        a, b = np.ones((2, 2048, 2048), np.float32)
        parts = np.array_split(a, self.threads)
        seconds = float(np.median(self.seconds(lambda: list(self.pool.map(lambda part: part @ b, parts)))))
        print(f"a matrix product of 2048 (NumPy): {2 * 2048 ** 3 / seconds / 1e9:.0f} GFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("gla-prefill", "gla-decode", "window-decode", "window-prefill")
    parser.add_argument("kinds", nargs="*", metavar="|".join(kinds))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if LIBRARY is None:
        raise SystemExit("libsbedge is not built: cmake -S . -B build && cmake --build build")
    bench = Bench(args.threads, args.rounds)
    print(f"{LIBRARY.isa().decode()}, {args.threads} threads, reads {read_bandwidth(args.threads) / 1e9:.1f} GB/s")
    for kind in args.kinds or kinds:
        if kind not in kinds:
            parser.error(f"unknown {kind!r}: one of {', '.join(kinds)}")
        getattr(bench, kind.replace("-", "_"))()


if __name__ == "__main__":
    main()
