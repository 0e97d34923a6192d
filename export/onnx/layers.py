"""The pieces a graph is made of: nodes, and linear layers and embeddings in each storage form."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from sbedge.checkpoint import Checkpoint
from sbedge.config import WEIGHT_GROUP, ModelConfig
from sbedge.export.calibrated import Calibrated, quant_of
from sbedge.export.spikes import event_layout
from sbedge.quant.blocks import BLOCK, Blocks, blocks_of, quantize_blocks

from . import ops
from .events import write_w4, write_w8
from .spike_ops import GROUPS
from .weights import DataFile, same_bytes

BITS = {"int8": 8, "int4": 4}
READ_WEIGHTS = 1 << 23          # weights read at a time: what streaming holds in memory
SLICE_WEIGHTS = 1 << 17         # weights quantized at a time: temporaries stay in the CPU's cache
WORKERS = 2

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Recipe:
    """How weights are stored, and the model that this makes of the checkpoint."""

    linear: str             # "f32", "int8", "int4", "w8-spike" or "w4-spike"
    embedding: str          # embeddings and lm_head: "f32", "int8" or "int4"
    config: ModelConfig


@dataclass(frozen=True)
class Spikes:
    """A spiked activation: names of the counts [1, n, channels] and thresholds [1, n, 1]."""

    count: str
    threshold: str


class Layers:
    """Collects nodes and initializers; each weight goes to `data` when its layer is built."""

    def __init__(self, checkpoint: Checkpoint, data: DataFile, recipe: Recipe, progress: Progress | None):
        self.checkpoint, self.data, self.recipe, self.progress = checkpoint, data, recipe, progress
        self.config = recipe.config
        self.nodes: list[NodeProto] = []
        self.value_info: list[ValueInfoProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.padded: dict[str, str] = {}    # counts -> the same up to a whole group of inputs
        self.bytes_per_weight = {name: checkpoint.rows(name, 0, 1).itemsize for name in checkpoint.names()}
        self.total = sum(prod(checkpoint.shapes[name]) * size for name, size in self.bytes_per_weight.items())
        self.done = 0

    # --- nodes -------------------------------------------------------------------------------------
    def node(self, op: str, inputs: list[str], domain: str = "", **attributes) -> str:
        """Add a node of one output and return that output's name."""
        label = f"{len(self.nodes)}.{op}"
        self.nodes.append(helper.make_node(op, inputs, [label], label, domain=domain, **attributes))
        return label

    def own(self, op: str, inputs: list[str], outputs: list[str], **attributes) -> list[str]:
        """Add a node of our op set. Outputs without a dot are local to the node and get its number."""
        label = f"{len(self.nodes)}.{op}"
        outputs = [name if "." in name else f"{label}.{name}" for name in outputs]
        self.nodes.append(helper.make_node(op, inputs, outputs, label, domain=ops.DOMAIN, **attributes))
        return outputs

    def typed(self, name: str, width: int) -> str:
        """Declare `name` float32 [1, tokens, width], which shape inference cannot know of ops outside the standard."""
        self.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, None, width)))
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.initializers:
            self.initializers[name] = self.data.array(name, value)
        return name

    def rms_norm(self, name: str, x: str) -> str:
        return self.node("RMSNormalization", [x, self.stored(name + ".weight")], axis=-1, epsilon=self.config.norm_eps)

    def spiked(self, i: int, kind: str, x: str) -> str | Spikes:
        """`x`, a kind of input of layer i, as spikes where the model spikes; one encoding serves all linears that read
        it."""
        if not self.config.spike_k:
            return x
        k, dead_zone = self.config.spikes_of(i, kind)
        zone = {"dead_zone": float(dead_zone)} if dead_zone else {}
        return Spikes(*self.own("SpikeEncode", [x], ["count", "threshold"], k=float(k), **zone))

    # --- linear layers: x [1, n, K] -> [1, n, N] ---------------------------------------------------
    def linears(self, names: list[str], x: str | Spikes) -> list[str]:
        """Linears of one input; spiking ones of one layout are one node."""
        layouts = {self.event_layout(name) for name in names}
        layout = layouts.pop()
        if not isinstance(x, Spikes) or layout is None or layouts:
            return [self.linear(name, x) for name in names]
        return [self.add_bias(name, y) for name, y in zip(names, self.spike_linears(names, x, layout), strict=True)]

    def event_layout(self, name: str) -> str | None:
        quant = quant_of(self.checkpoint, name + ".weight", self.recipe.linear)
        if quant == "int8" and self.checkpoint.is_w8aspike:
            quant = "w8-spike"      # its 8 bits are spiking ones
        return event_layout(self.checkpoint, name + ".weight", quant)

    def linear(self, name: str, x: str | Spikes) -> str:
        layout = self.event_layout(name)
        if isinstance(x, Spikes) and layout:
            return self.add_bias(name, self.spike_linears([name], x, layout)[0])
        if isinstance(x, Spikes):
            x = self.node("Mul", [x.count, x.threshold])
        # The two small gate projections decide what a state forgets: they stay exact.
        exact = "gk_proj" in name or self.checkpoint.is_w8aspike
        return self.dense(name, x, "f32" if exact else quant_of(self.checkpoint, name + ".weight", self.recipe.linear))

    def dense(self, name: str, x: str, form: str) -> str:
        weight = name + ".weight"
        N, K = self.checkpoint.shapes[weight]
        if form == "f32":       # [N, K] as published: FusedMatMul reads it transposed, no second copy is stored
            y = self.node("FusedMatMul", [x, self.stored(weight)], domain="com.microsoft", transB=1)
            return self.add_bias(name, self.typed(y, N))
        parts = self.quantized(weight, BITS[form])
        if name + ".bias" in self.checkpoint.shapes:
            parts += ["", self.stored(name + ".bias")]
        y = self.node("MatMulNBits", [x, *parts], domain="com.microsoft", K=K, N=N, bits=BITS[form],
                      block_size=BLOCK, accuracy_level=4)
        return self.typed(y, N)

    def add_bias(self, name: str, y: str) -> str:
        bias = name + ".bias"
        return self.node("Add", [y, self.stored(bias)]) if bias in self.checkpoint.shapes else y

    def spike_linears(self, names: list[str], x: Spikes, layout: str) -> list[str]:
        """One node of linears on spikes with their weights in layout "w8" or "w4"."""
        op, write = ("SpikeLinear", write_w8) if layout == "w8" else ("SpikeLinear4", write_w4)
        parts: list[str] = []
        for name in names:
            tensors = write(self.checkpoint, name + ".weight", self.data, self.advance)
            self.initializers |= {tensor.name: tensor for tensor in tensors}
            parts += [tensor.name for tensor in tensors]
        channels = self.checkpoint.shapes[names[0] + ".weight"][1]
        count = self.whole_groups(x.count, channels) if layout == "w8" else x.count
        outputs = [f"y_{i}" for i in range(len(names))]
        return self.own(op + GROUPS.get(len(names), ""), [count, x.threshold, *parts], outputs)

    def whole_groups(self, count: str, channels: int) -> str:
        """Counts [1, n, channels] with silent channels up to a whole group of inputs, as SpikeLinear takes them."""
        lacking = -channels % WEIGHT_GROUP
        if lacking and count not in self.padded:
            pads = self.constant(f"pads.{lacking}", np.array([0, 0, 0, 0, 0, lacking]))
            self.padded[count] = self.node("Pad", [count, pads])
        return self.padded.get(count, count)

    # --- embeddings and lm_head, one stored copy when tied -----------------------------------------
    def embeddings(self) -> str:
        """input_ids [1, n] -> [1, n, D]"""
        weight, form = "model.embeddings.weight", self.recipe.embedding
        if form == "f32":
            return self.node("Gather", [self.stored(weight), "input_ids"], axis=0)
        codes, scales, zero_points = self.quantized(weight, BITS[form])
        V, blocks, _ = self.initializers[codes].dims
        D = self.config.hidden_size
        # The same bytes as MatMulNBits reads, seen as rows of V.
        rows = self.view(codes, (V, blocks * BLOCK * BITS[form] // 8))
        if not self.config.tie_word_embeddings:
            del self.initializers[codes]
        x = self.node("GatherBlockQuantized", [rows, "input_ids", scales, zero_points], domain="com.microsoft",
                      bits=BITS[form], block_size=BLOCK, gather_axis=0, quantize_axis=1)
        self.typed(x, blocks * BLOCK)
        if blocks * BLOCK == D:
            return x
        return self.node("Slice", [x, *(self.constant(f"embeddings.{part}", np.array([value])) for part, value in (
            ("start", 0), ("end", D), ("axis", 2)))])

    def lm_head(self, x: str) -> str:
        """[1, k, D] -> [1, k, V]"""
        name = "model.embeddings" if self.config.tie_word_embeddings else "lm_head"
        return self.dense(name, x, self.recipe.embedding)

    # --- weights -----------------------------------------------------------------------------------
    def stored(self, name: str) -> str:
        """The tensor the model computes with, as float32."""
        if name not in self.initializers:
            shape = self.checkpoint.shapes[name]
            if prod(shape) < READ_WEIGHTS or self.checkpoint.is_quantized(name):
                self.initializers[name] = self.data.array(name, self.checkpoint.weight(name))
                self.advance(name, prod(shape))
            else:
                self.initializers[name] = self.data.append(name, np.float32, shape, self.read(name))
        return name

    def quantized(self, name: str, bits: int) -> list[str]:
        """Names of a weight's codes, scales and zero points for MatMulNBits."""
        codes, scales, zero_points = names = [f"{name}.{part}" for part in Blocks._fields]
        if codes not in self.initializers:
            N, K = self.checkpoint.shapes[name]
            count = -(-K // BLOCK)
            small = np.empty((N, count), np.float32), np.empty((N, -(-count * bits // 8)), np.uint8)
            self.initializers[codes] = self.data.append(
                codes, np.uint8, (N, count, BLOCK * bits // 8), self.quantize(name, bits, *small))
            self.constant(scales, small[0])
            self.constant(zero_points, small[1])
        return names

    def quantize(self, name: str, bits: int, scales: np.ndarray, zero_points: np.ndarray) -> Iterator[np.ndarray]:
        """Codes, piece by piece, while scales and zero points are filled in."""
        if isinstance(self.checkpoint, Calibrated) and (levels := self.checkpoint.levels(name)):
            blocks = blocks_of(levels, bits)
            scales[:], zero_points[:] = blocks.scales, blocks.zero_points
            yield blocks.codes
            self.advance(name, levels.levels.size)
            return
        rows, at = max(1, SLICE_WEIGHTS // self.checkpoint.shapes[name][1]), 0
        with ThreadPoolExecutor(WORKERS) as pool:
            for piece in self.read(name):
                slices = (piece[start:start + rows] for start in range(0, len(piece), rows))
                for blocks in pool.map(lambda weight: quantize_blocks(weight, bits), slices):
                    end = at + len(blocks.scales)
                    scales[at:end], zero_points[at:end] = blocks.scales, blocks.zero_points
                    at = end
                    yield blocks.codes

    def read(self, name: str) -> Iterator[np.ndarray]:
        """Rows of a stored tensor, a few million weights at a time."""
        total, width = self.checkpoint.shapes[name]
        rows = max(1, READ_WEIGHTS // width)
        for start in range(0, total, rows):
            piece = self.checkpoint.rows(name, start, min(start + rows, total))
            yield piece
            self.advance(name, piece.size)

    def view(self, name: str, shape: tuple[int, ...]) -> str:
        """A stored tensor under another shape, without a second copy."""
        twin = name + ".rows"
        self.initializers[twin] = same_bytes(self.initializers[name], twin, shape)
        return twin

    def advance(self, name: str, weights: int) -> None:
        self.done += weights * self.bytes_per_weight[name]
        self.checkpoint.release()
        if self.progress:
            self.progress(self.done, self.total, name)
