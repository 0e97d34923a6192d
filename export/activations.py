"""The reference over many samples at once, a stage at a time: what calibration looks at.

A layer has four stages, one for each kind of input (INPUT_KINDS), and each sample begins with an empty state:

    x = norm(h) --attention in--> q, k, v --mixer--> x --attention out--> h += o_proj x
    x = norm(h) --FFN in--> gate, up --> x --FFN down--> h += down_proj x
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sbedge.checkpoint import Checkpoint
from sbedge.config import GATE_DIVISOR, INPUT_KINDS, KIND_OF, ModelConfig
from sbedge.quant.folding import folded
from sbedge.reference import Reference, log_sigmoid, relu, rms_norm, rope_angles, rotate, softmax


class Samples(Reference):
    """The model of `config` and `weights` on activations [samples, tokens, width]."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, np.ndarray]):
        assert not config.int8_window, "W8ASpike is exact: there is nothing to calibrate"
        self.config, self.weights, self.fingerprint = config, weights, None

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """ids [samples, tokens] -> h [samples, tokens, D]"""
        return self.weights["model.embeddings.weight"][ids]

    def before(self, i: int, kind: str, h: np.ndarray) -> np.ndarray:
        """The input of `kind` in layer i, [..., width], from the stream h before that half of the layer."""
        layer = f"model.layers.{i}."
        norm = "attn_norm" if kind.startswith("attention") else "mlp_norm"
        x = rms_norm(h, self.weights[f"{layer}{norm}.weight"], self.config.norm_eps)
        if kind.endswith(" in"):
            return x
        if kind == "FFN down":
            return self.gated(i, x)
        return self.window(i, x, None) if self.config.is_window_layer(i) else self.gla(i, x, None)

    def after(self, i: int, kind: str, h: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The stream after the half of layer i that ends with input x of `kind`, "attention out" or "FFN down"."""
        return h + self.linear(f"model.layers.{i}.{path(INPUT_KINDS[kind][0])}", x)

    def half(self, i: int, last: str, h: np.ndarray) -> np.ndarray:
        """The stream after the half of layer i that ends with an input of kind `last`."""
        return self.after(i, last, h, self.before(i, last, h))

    def logits(self, h: np.ndarray) -> np.ndarray:
        c = self.config
        head = self.weights["model.embeddings.weight" if c.tie_word_embeddings else "lm_head.weight"]
        return rms_norm(h, self.weights["model.norm.weight"], c.norm_eps) @ head.T

    def spiked(self, i: int, kind: str, x: np.ndarray) -> np.ndarray:
        """What the linears of this input multiply."""
        if not self.config.spike_k:
            return x
        count, threshold = self.encode(f"model.layers.{i}.{path(INPUT_KINDS[kind][0])}", x)
        return count * threshold

    # --- mixers from an empty state, over all tokens of a sample at once ---------------------------
    def window(self, i: int, x: np.ndarray, state: Any) -> np.ndarray:
        c, attn = self.config, f"model.layers.{i}.attn."
        n, G, r, d = x.shape[-2], c.num_key_value_heads, c.group_size, c.head_dim
        cos, sin = rope_angles(np.arange(n), d, c.rope_theta)
        behind = np.arange(n)[:, None] - np.arange(n)                               # [query, key]
        hidden = np.where((behind >= 0) & (behind < c.sliding_window), np.float32(0), np.float32(-np.inf))
        out = np.empty((*x.shape[:-1], c.hidden_size), np.float32)
        projected = [self.linear(f"{attn}{name}_proj", x) for name in "qkv"]
        for o, q, k, v in zip(out, *projected, strict=True):                        # a sample: [n, heads * d]
            q, k = (rotate(y.reshape(n, -1, d), cos, sin) for y in (q, k))
            q = q.reshape(n, G, r, d).transpose(1, 2, 0, 3) * np.float32(d ** -0.5)             # [G, r, n, d]
            k, v = k.transpose(1, 2, 0)[:, None], v.reshape(n, G, d).transpose(1, 0, 2)[:, None]
            o[:] = (softmax(q @ k + hidden) @ v).transpose(2, 0, 1, 3).reshape(n, -1)
        return out

    def gla(self, i: int, x: np.ndarray, state: Any) -> np.ndarray:
        c, attn = self.config, f"model.layers.{i}.attn."
        G, r, d = c.num_key_value_heads, c.group_size, c.head_dim
        q = relu(self.linear(attn + "q_proj", x)).reshape(*x.shape[:2], G, r, d) * np.float32(d ** -0.5)
        k = relu(self.linear(attn + "k_proj", x)).reshape(*x.shape[:2], G, d)
        v = self.linear(attn + "v_proj", x).reshape(k.shape)
        decay = np.exp(log_sigmoid(self.gate(attn, x)).reshape(k.shape) / np.float32(GATE_DIVISOR))
        S, o = np.zeros((len(x), G, d, d), np.float32), np.empty(q.shape, np.float32)
        for t in range(x.shape[1]):
            S = decay[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None]
            o[:, t] = q[:, t] @ S
        return rms_norm(o, self.weights[attn + "g_norm.weight"], c.norm_eps).reshape(x.shape)


class Layers:
    """The folded weights of a checkpoint (as they are, if it was trained to spike), a layer at a time, by full name."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.fold = checkpoint.trained_spikes is None
        self.bytes = 4 * sum(math.prod(shape) for name, shape in checkpoint.shapes.items() if ".layers.0." in name)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        prefix = f"model.layers.{i}."
        names = [name for name in self.checkpoint.names() if name.startswith(prefix)]
        weights = {name.removeprefix(prefix): self.checkpoint.tensor(name) for name in names}
        self.checkpoint.release()
        return {prefix + name: weight for name, weight in (folded(weights) if self.fold else weights).items()}

    def rest(self) -> dict[str, np.ndarray]:
        return {name: self.checkpoint.tensor(name) for name in self.checkpoint.names() if ".layers." not in name}


def path(projection: str) -> str:
    """'q_proj' -> 'attn.q_proj'"""
    return f"{'attn' if KIND_OF[projection].startswith('attention') else 'mlp'}.{projection}"


def in_batches(function: Callable[..., np.ndarray], size: int, *arrays: np.ndarray) -> np.ndarray:
    """`function` of `size` samples of each array at a time, put together."""
    return np.concatenate([function(*(a[start:start + size] for a in arrays))
                           for start in range(0, len(arrays[0]), size)])
