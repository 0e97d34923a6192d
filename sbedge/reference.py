"""The whole model in plain NumPy, streaming: the truth every engine and kernel is tested against.

Read it top to bottom: weights, then `forward` in the order the data flows, then the four pieces it is made
of (linear, GLA, sliding window, FFN) and the small functions under them. It is written to be
read, not to be fast. Source: SpikingBrain report sections 2 and 3.3 and BICLab's published code.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .checkpoint import SPIKING_PROJECTIONS, Checkpoint
from .config import GATE_DIVISOR, KIND_OF, ModelConfig
from .errors import InputError, StateError
from .state import State, state_layout

QUERY_SPIKE_K = 3.0     # sliding-window queries of a spiking model are always coded with k = 3


class Reference:
    """Engine over a checkpoint: D hidden, H query heads, G key/value heads, d head size, W window."""

    def __init__(self, checkpoint: Checkpoint | str | Path, *, config: ModelConfig | None = None,
                 weight: Callable[[str], np.ndarray] | None = None):
        """`config` and `weight` (name -> float32) replace the checkpoint's own: what an export made of them."""
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint(checkpoint)
        self.config = config or checkpoint.config
        self.fingerprint: str | None = checkpoint.fingerprint
        names = [n for n in checkpoint.names() if not n.endswith(".scales")]
        self.weights: Mapping[str, np.ndarray] = {name: (weight or checkpoint.weight)(name) for name in names}

    def new_state(self) -> State:
        return State(self.config, self.fingerprint)

    def forward(self, ids: Sequence[int] | np.ndarray, state: State, *, logits: str = "last") -> np.ndarray | None:
        """Advance `state` by len(ids) tokens; logits float32 [1, V] ("last"), [n, V] ("all") or None ("none")."""
        c = self.config
        ids = np.asarray(ids, np.int64)                                             # [n]
        if ids.size == 0 or ids.min() < 0 or ids.max() >= c.vocab_size:
            raise InputError(f"expected token ids from 0 to {c.vocab_size - 1}, at least one")
        if state.layout != state_layout(c):
            raise StateError("the state belongs to a model of other sizes")
        h = self.weights["model.embeddings.weight"][ids]                            # [n, D]
        for i in range(c.num_hidden_layers):
            mixer = self.window_layer if c.is_window_layer(i) else self.gla_layer
            h = h + mixer(i, rms_norm(h, self.weights[f"model.layers.{i}.attn_norm.weight"], c.norm_eps), state)
            h = h + self.ffn(i, rms_norm(h, self.weights[f"model.layers.{i}.mlp_norm.weight"], c.norm_eps))
        state.position += len(ids)
        state.last_logits = None
        if logits == "none":
            return None
        rows = h if logits == "all" else h[-1:]
        lm_head = self.weights["model.embeddings.weight" if c.tie_word_embeddings else "lm_head.weight"]    # [V, D]
        out = rms_norm(rows, self.weights["model.norm.weight"], c.norm_eps) @ lm_head.T
        state.last_logits = out[-1].copy()
        return out

    # --- the pieces of a layer -----------------------------------------------------------------
    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        """x [n, in] -> [n, out]; the input is spiked first where the model spikes."""
        c, projection = self.config, name.rsplit(".", 1)[-1]
        if c.spike_k and (projection in SPIKING_PROJECTIONS or (c.spike_down and projection == "down_proj")):
            count, threshold = self.encode(name, x)
            x = count * threshold
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def encode(self, name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Spike counts [n, in] and thresholds [n, 1] of the input of linear `name`."""
        layer, projection = int(name.split(".")[2]), name.split(".")[4]
        return spike_encode(x, *self.config.spikes_of(layer, KIND_OF[projection]))

    def gla_layer(self, i: int, x: np.ndarray, state: State) -> np.ndarray:
        return self.linear(f"model.layers.{i}.attn.o_proj", self.gla(i, x, state))

    def gla(self, i: int, x: np.ndarray, state: State) -> np.ndarray:
        """Gated linear attention: S_t = exp(g_t) * S_(t-1) + k_t v_t^T ; o_t = q_t S_t / sqrt(d)."""
        c, attn = self.config, f"model.layers.{i}.attn."
        n, G, d = len(x), c.num_key_value_heads, c.head_dim
        q = relu(self.linear(attn + "q_proj", x)).reshape(n, G, c.group_size, d) * np.float32(d ** -0.5)
        k = relu(self.linear(attn + "k_proj", x)).reshape(n, G, d)
        v = self.linear(attn + "v_proj", x).reshape(n, G, d)
        log_decay = log_sigmoid(self.gate(attn, x)).reshape(n, G, d) / GATE_DIVISOR
        S = state.arrays[f"{i}.recurrent_state"]                                    # [G, d_k, d_v]
        o = np.empty(q.shape, np.float32)                                           # [n, G, H/G, d]
        for t in range(n):
            S[...] = np.exp(log_decay[t])[:, :, None] * S + k[t][:, :, None] * v[t][:, None, :]
            o[t] = q[t] @ S
        return rms_norm(o, self.weights[attn + "g_norm.weight"], c.norm_eps).reshape(n, c.hidden_size)

    def gate(self, attn: str, x: np.ndarray) -> np.ndarray:
        """Gate logits [n, G*d]: one full-rank projection (W8ASpike) or two through 16 channels."""
        if not self.config.gate_rank:
            return self.linear(attn + "gk_proj", x)
        return self.linear(attn + "gk_proj.1", self.linear(attn + "gk_proj.0", x))

    def window_layer(self, i: int, x: np.ndarray, state: State) -> np.ndarray:
        return self.linear(f"model.layers.{i}.attn.o_proj", self.window(i, x, state))

    def window(self, i: int, x: np.ndarray, state: State) -> np.ndarray:
        """Softmax attention over the last W tokens, the current one included, kept in a ring."""
        c, attn = self.config, f"model.layers.{i}.attn."
        n, G, d, W = len(x), c.num_key_value_heads, c.head_dim, c.sliding_window
        cos, sin = rope_angles(state.position + np.arange(n), d, c.rope_theta)      # [n, d/2]
        q = self.linear(attn + "q_proj", x).reshape(n, c.num_attention_heads, d)
        k = self.linear(attn + "k_proj", x).reshape(n, G, d)
        v = self.linear(attn + "v_proj", x).reshape(n, G, d)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if c.int8_window:
            count, threshold = spike_encode(q, QUERY_SPIKE_K)
            q = count * threshold
        grouped = q.reshape(n, G, c.group_size, d)
        o = np.empty(grouped.shape, np.float32)
        for t in range(n):
            self.store(state, i, (state.position + t) % W, k[t], v[t])
            keys, values = self.stored(state, i, min(state.position + t + 1, W))    # [len, G, d]
            scores = np.einsum("ghd,wgd->ghw", grouped[t], keys) * np.float32(d ** -0.5)
            o[t] = np.einsum("ghw,wgd->ghd", softmax(scores), values)
        return o.reshape(n, c.hidden_size)

    def store(self, state: State, i: int, slot: int, k: np.ndarray, v: np.ndarray) -> None:
        """Put one token's key and value [G, d] into the ring, as int8 codes where the model does so."""
        for name, row in (("key", k), ("value", v)):
            if self.config.int8_window:
                codes, state.arrays[f"{i}.{name}_scales"][slot] = int8_encode(row)
                state.arrays[f"{i}.{name}s"][slot] = codes
            else:
                state.arrays[f"{i}.{name}s"][slot] = row

    def stored(self, state: State, i: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [length, G, d] float32 of the first `length` slots."""
        keys, values = state.arrays[f"{i}.keys"][:length], state.arrays[f"{i}.values"][:length]
        if not self.config.int8_window:
            return keys, values
        return (keys * state.arrays[f"{i}.key_scales"][:length, :, None],
                values * state.arrays[f"{i}.value_scales"][:length, :, None])

    def ffn(self, i: int, x: np.ndarray) -> np.ndarray:
        return self.linear(f"model.layers.{i}.mlp.down_proj", self.gated(i, x))

    def gated(self, i: int, x: np.ndarray) -> np.ndarray:
        mlp = f"model.layers.{i}.mlp."
        return silu(self.linear(mlp + "gate_proj", x)) * self.linear(mlp + "up_proj", x)


# --- functions -----------------------------------------------------------------------------------
def spike_encode(x: np.ndarray, k: float, dead_zone: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Spike counts (whole numbers, float32, unclamped) and firing thresholds over the last axis (report 3.3).

    Channels with |x| < dead_zone * mean|x| stay silent, whatever their count would be.
    """
    mean = np.asarray(np.mean(np.abs(x), axis=-1, keepdims=True, dtype=np.float32))
    threshold = np.asarray(np.clip(mean / np.float32(k), np.float32(1e-5), np.float32(1e4)))
    count = np.round(x / threshold)                      # np.round is half to even
    return np.where(np.abs(x) < np.float32(dead_zone) * mean, np.float32(0), count), threshold


def int8_encode(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x [..., d] -> int8 codes [..., d] and scales [...]: symmetric, per vector."""
    scale = np.clip(np.abs(x).max(-1) / np.float32(127), np.float32(1e-5), np.float32(1e4))
    return np.clip(np.round(x / scale[..., None]), -128, 127).astype(np.int8), scale


def rope_angles(positions: np.ndarray, d: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [n, d/2] float32, from float64 angles: right at any position."""
    angles = positions[:, None].astype(np.float64) * theta ** (-np.arange(0, d, 2, dtype=np.float64) / d)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotary embedding of x [n, heads, d]: channel c turns with channel c + d/2."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def silu(x: np.ndarray) -> np.ndarray:
    return x * np.exp(-np.logaddexp(np.float32(0), -x))     # x * sigmoid(x), without overflow


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(np.float32(0), -x)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
