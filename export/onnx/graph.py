"""The graph of a SpikingBrain model, in the order the data flows."""
from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from sbedge import __version__
from sbedge.onnx_format import io_names
from sbedge.reference import QUERY_SPIKE_K
from sbedge.state import state_layout

from . import ops
from .layers import Layers

INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT


class Graph(Layers):
    """n tokens, D hidden size, H query heads, G key/value heads, d head size, W window, V vocabulary."""

    def build(self) -> ModelProto:
        c = self.config
        if c.attn_layers:
            frequencies = c.rope_theta ** (-np.arange(0, c.head_dim, 2, dtype=np.float64) / c.head_dim)
            self.rotary_angles = self.own(
                "RotaryAngles", ["position_ids", self.constant("rope.frequencies", frequencies)], ["cos", "sin"])
        h = self.embeddings()                                                       # [1, n, D]
        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}."
            mixer = self.window_layer if c.is_window_layer(i) else self.gla_layer
            h = self.node("Add", [h, mixer(i, layer + "attn.", self.rms_norm(layer + "attn_norm", h))])
            h = self.node("Add", [h, self.ffn(i, layer + "mlp.", self.rms_norm(layer + "mlp_norm", h))])
        logits = self.lm_head(self.rms_norm("model.norm", self.last_rows(h)))       # [1, k, V]
        self.nodes.append(helper.make_node("Identity", [logits], ["logits"], "logits"))
        return self.model()

    def gla_layer(self, i: int, attn: str, x: str) -> str:
        spiked = self.spiked(i, "attention in", x)
        q, k, v = self.linears([f"{attn}{name}_proj" for name in "qkv"], spiked)
        if self.config.gate_rank:
            gate = self.linear(attn + "gk_proj.1", self.linear(attn + "gk_proj.0", x))
        else:
            gate = self.linear(attn + "gk_proj", spiked)
        y, _ = self.own(
            "GatedLinearAttention", [q, k, v, gate, self.stored(attn + "g_norm.weight"), f"past.{i}.recurrent"],
            ["y", f"present.{i}.recurrent"], epsilon=self.config.norm_eps, **self.head_sizes())
        return self.linear(attn + "o_proj", self.spiked(i, "attention out", self.typed(y, self.config.hidden_size)))

    def window_layer(self, i: int, attn: str, x: str) -> str:
        spiked = self.spiked(i, "attention in", x)
        q, k, v = self.linears([f"{attn}{name}_proj" for name in "qkv"], spiked)
        op, parts, extra = "SlidingWindowAttention", ["key", "value"], {}
        if self.config.int8_window:
            op, parts = "SpikingWindowAttention", ["key", "key_scale", "value", "value_scale"]
            extra = {"spike_k": QUERY_SPIKE_K}
        y, *_ = self.own(
            op, [q, k, v, *(f"past_key_values.{i}.{part}" for part in parts), *self.rotary_angles, "position_ids"],
            ["y", *(f"present.{i}.{part}" for part in parts)], **self.head_sizes(), **extra)
        return self.linear(attn + "o_proj", self.spiked(i, "attention out", self.typed(y, self.config.hidden_size)))

    def ffn(self, i: int, mlp: str, x: str) -> str:
        """down(silu(gate(x)) * up(x)); the input of down spikes if the model says so (W8ASpike does not)."""
        spiked = self.spiked(i, "FFN in", x)
        gate, up = self.linears([mlp + "gate_proj", mlp + "up_proj"], spiked)
        silu = self.node("Mul", [gate, self.node("Sigmoid", [gate])])
        h = self.node("Mul", [silu, up])
        return self.linear(mlp + "down_proj", self.spiked(i, "FFN down", h) if self.config.spike_down else h)

    def last_rows(self, h: str) -> str:
        """h [1, n, D] -> its last logits_to_keep rows: none of them when that is 0."""
        tokens = self.node("Shape", [h], start=1, end=2)
        start = self.node("Sub", [tokens, "logits_to_keep"])
        return self.node("Slice", [h, start, tokens, self.constant("token_axis", np.array([1]))])

    def head_sizes(self) -> dict[str, float]:
        c = self.config
        return {"num_heads": c.num_attention_heads, "kv_num_heads": c.num_key_value_heads, "scale": c.head_dim ** -0.5}

    # --- the model's interface ---------------------------------------------------------------------
    def model(self) -> ModelProto:
        inputs = [value("input_ids", INT64, (1, "n")), value("position_ids", INT64, (1, "n")),
                  value("logits_to_keep", INT64, (1,))]
        outputs = [value("logits", FLOAT, (1, "k", self.config.vocab_size))]
        for name, (shape, dtype) in state_layout(self.config).items():
            past, present = io_names(name)
            kind = helper.np_dtype_to_tensor_dtype(dtype)
            inputs.append(value(past, kind, (1, *shape)))
            outputs.append(value(present, kind, (1, *shape)))
        graph = helper.make_graph(self.nodes, "spikingbrain", inputs, outputs, list(self.initializers.values()),
                                  value_info=self.value_info)
        opsets = [helper.make_opsetid("", ops.OPSET), helper.make_opsetid("com.microsoft", 1),
                  helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
        used = {node.op_type for node in self.nodes if node.domain == ops.DOMAIN}
        functions = ops.functions(used, ops.digits_of(self.config))
        return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=ops.IR_VERSION,
                                 producer_name="sbedge", producer_version=__version__)


def value(name: str, kind: int, shape: tuple) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)
