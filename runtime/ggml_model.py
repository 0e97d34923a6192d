"""SpikingBrain's layers as ggml operations, in the order the data flows; the twin of sbedge/reference.py.

Shapes in comments are ggml's, innermost first: a State array [W, G, d] is (d, G, W) here.
D hidden, F FFN, V vocabulary, H query heads, G key/value heads, r = H/G, d head size, W window, n new tokens.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sbedge.config import GATE_DIVISOR, ModelConfig
from sbedge.reference import QUERY_SPIKE_K

F4 = 4                              # bytes of a float32
ROUND_EVEN = 1.5 * 2.0 ** 23        # adding and subtracting it rounds half to even, for |x| < 2^22
MIN_SCALE, MAX_SCALE = 1e-5, 1e4    # what thresholds and int8 scales are clamped to
POOL_MAX = 0


def k_leaf(k: float) -> str:
    """The name of the constant k: dividing by it is exact, multiplying by 1 / k is not."""
    return f"k {k}"


class Ops:
    """ggml's functions with the context filled in: `op.mul_mat(a, b)`."""

    def __init__(self, functions: Any, context: int):
        self._functions, self._context = functions, context

    def __getattr__(self, name: str):
        function = partial(getattr(self._functions, name), self._context)
        setattr(self, name, function)
        return function


@dataclass
class Forward:
    """Builds one forward pass of `n` tokens with `length` ring slots in view; `graph` collects the nodes.

    weights  tensor by name, groups joined by '+' (see GgmlWeights)
    leaf     inputs: ids (n), cos and sin (d, 1, n), mask (keys, n), slots (min(n, W)), and constants
    state    leaves over the state's memory: recurrent_state (d*d, G), keys and values (G*d, W)
    """

    op: Ops
    f: Any
    graph: int
    config: ModelConfig
    weights: dict[str, int]
    leaf: dict[str, int]
    state: dict[str, int]
    n: int
    length: int
    # int8 windows only: "{i}.keys" -> (codes (d, G, n), scales (1, G, n)) of the new tokens
    new_codes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def build(self, n_logits: int) -> int:
        """Expand the whole pass into the graph; returns the logits tensor (V, n_logits), or 0."""
        c, op = self.config, self.op
        h = op.get_rows(self.weights["token_embd.weight"], self.leaf["ids"])            # (D, n)
        for i in range(c.num_hidden_layers):
            x = self.norm(h, f"blk.{i}.attn_norm.weight")
            h = op.add(h, self.window_layer(i, x) if c.is_window_layer(i) else self.gla_layer(i, x))
            h = op.add(h, self.ffn(i, self.norm(h, f"blk.{i}.ffn_norm.weight")))
        if not n_logits:
            return 0
        if n_logits < self.n:
            h = op.view_2d(h, c.hidden_size, n_logits, c.hidden_size * F4, (self.n - n_logits) * c.hidden_size * F4)
        head = "token_embd" if c.tie_word_embeddings else "output"
        logits = self.lm_head(head, self.norm(h, "output_norm.weight"), n_logits)
        self.f.set_output(logits)
        self.expand(logits)
        return logits

    def lm_head(self, stem: str, x: int, n: int) -> int:
        """Logits (V, n) of x (D, n)."""
        return self.op.mul_mat(self.weights[stem + ".weight"], x)

    def expand(self, tensor: int) -> None:
        """Put `tensor` and what it needs into the graph now: nodes run in the order they are expanded."""
        self.f.build_forward_expand(self.graph, tensor)

    # --- linears ---------------------------------------------------------------------------------------
    def linear(self, stem: str, x: int) -> int:
        """W x + b, with the bias where the model has one; `stem` is a tensor name without its suffix."""
        y = self.op.mul_mat(self.weights[stem + ".weight"], x)
        return self.op.add(y, self.weights[stem + ".bias"]) if stem + ".bias" in self.weights else y

    def linears(self, i: int, stems: tuple[str, ...], x: int) -> int:
        """Several linears of one input, one after the other along the innermost axis: (sum of outs, n)."""
        names = [f"blk.{i}.{s}.weight" for s in stems]
        joined = self.weights.get("+".join(names))
        y = self.op.mul_mat(joined, x) if joined else self.concat(
            [self.op.mul_mat(self.weights[name], x) for name in names])
        biases = [f"blk.{i}.{s}.bias" for s in stems]
        if not any(b in self.weights for b in (biases[0], "+".join(biases))):
            return y
        joined = self.weights.get("+".join(biases)) or self.concat([self.weights[b] for b in biases])
        return self.op.add(y, joined)

    def concat(self, tensors: list[int], axis: int = 0) -> int:
        total = tensors[0]
        for tensor in tensors[1:]:
            total = self.op.concat(total, tensor, axis)
        return total

    def norm(self, x: int, weight: str) -> int:
        return self.op.mul(self.op.rms_norm(x, self.config.norm_eps), self.weights[weight])

    # --- spikes ----------------------------------------------------------------------------------------
    def spiked_input(self, i: int, kind: str, x: int) -> int:
        """What the linears of a spiking input of layer i take; x itself where the model does not spike."""
        return self.spiked(x, *self.config.spikes_of(i, kind)) if self.config.spike_k else x

    def spiked(self, x: int, k: float, dead_zone: float = 0.0) -> int:
        """count * threshold over the innermost axis."""
        op = self.op
        mean = op.mean(op.abs(x))
        threshold = op.clamp(op.div(mean, self.leaf[k_leaf(k)]), MIN_SCALE, MAX_SCALE)
        counts = self.rounded(op.div(x, threshold))
        if dead_zone:
            silent = op.step(op.neg(op.sub(op.abs(x), op.scale(mean, dead_zone))))      # one at the border is not
            counts = op.mul(counts, op.scale_bias(silent, -1.0, 1.0))
        return op.mul(counts, threshold)

    def rounded(self, x: int) -> int:
        return self.op.scale_bias(self.op.scale_bias(x, 1.0, ROUND_EVEN), 1.0, -ROUND_EVEN)

    # --- GLA -------------------------------------------------------------------------------------------
    def gla_layer(self, i: int, x: int) -> int:
        """S_t = exp(g_t) * S_(t-1) + k_t v_t^T ; o_t = q_t S_t / sqrt(d)."""
        spikes = self.spiked_input(i, "attention in", x)
        projected = self.linears(i, ("attn_q", "attn_k", "attn_v"), spikes)             # ((H+2G)*d, n)
        if self.config.gate_rank:
            gate = self.linear(f"blk.{i}.attn_gk_b", self.linear(f"blk.{i}.attn_gk_a", x))
        else:
            gate = self.linears(i, ("attn_gk",), spikes)                                # (G*d, n)
        return self.linears(i, ("attn_output",), self.spiked_input(i, "attention out", self.gla(i, projected, gate)))

    def gla(self, i: int, projected: int, gate: int) -> int:
        """From q, k, v (rows of `projected`) and gate to (D, n), by ggml's own operation.

        That one wants a state for every query head, so k, v, decay and S are repeated r times in scratch
        memory; the State keeps G.
        """
        c, op, n = self.config, self.op, self.n
        H, G, r, d = c.num_attention_heads, c.num_key_value_heads, c.group_size, c.head_dim
        q, k, v = self.heads(projected, 0, H), self.heads(projected, H, G), self.heads(projected, H + G, G)
        q, k, v = op.relu(op.cont(q)), op.relu(op.cont(k)), op.cont(v)                  # (d, H, n), (d, G, n)
        decay = self.decay(gate)
        S = self.state[f"{i}.recurrent_state"]                                          # (d*d, G)
        k, v, decay = (self.per_query_head(t, d, r, G, n) for t in (k, v, decay))       # (d, H, n)
        repeated = op.reshape_2d(self.per_query_head(S, d * d, r, G, 1), d * d * H, 1)
        both = op.gated_linear_attn(k, v, q, decay, repeated, d ** -0.5)                # outputs, then states
        o = op.view_3d(both, d, H, n, d * F4, H * d * F4, 0)
        self.expand(both)
        last = op.view_2d(both, d * d, G, r * d * d * F4, n * H * d * F4)               # S of each first head
        self.expand(op.cpy(last, S))
        return op.reshape_2d(self.norm(o, f"blk.{i}.attn_g_norm.weight"), H * d, n)

    def heads(self, x: int, first: int, count: int) -> int:
        """Heads [first, first + count) of the rows of x, as a view (d, count, n)."""
        d = self.config.head_dim
        row = self.width(x) * F4
        return self.op.view_3d(x, d, count, self.n, d * F4, row, first * d * F4)

    def width(self, x: int) -> int:
        """Innermost size of a float32 tensor of n rows."""
        return self.f.nbytes(x) // (F4 * self.n)

    def decay(self, gate: int) -> int:
        """exp(logsigmoid(gate) / 16) = exp(-softplus(-gate) / 16)."""
        op = self.op
        return op.exp(op.scale(op.softplus(op.neg(gate)), -1.0 / GATE_DIVISOR))

    def per_query_head(self, x: int, width: int, r: int, G: int, n: int) -> int:
        """(width, G, n) -> (width, H, n): every group's row r times over."""
        if r == 1:
            return self.op.reshape_3d(x, width, G, n)
        x = self.op.repeat_4d(self.op.reshape_4d(x, width, 1, G, n), width, r, G, n)
        return self.op.reshape_3d(x, width, r * G, n)

    # --- sliding window --------------------------------------------------------------------------------
    def window_layer(self, i: int, x: int) -> int:
        """Softmax attention over the last W tokens."""
        spikes = self.spiked_input(i, "attention in", x)
        projected = self.linears(i, ("attn_q", "attn_k", "attn_v"), spikes)                 # ((H+2G)*d, n)
        return self.linears(i, ("attn_output",), self.spiked_input(i, "attention out", self.window(i, projected)))

    def window(self, i: int, projected: int) -> int:
        """From q, k, v (rows of `projected`) to (D, n); new keys and values go into the ring."""
        c, op = self.config, self.op
        H, G = c.num_attention_heads, c.num_key_value_heads
        qk = self.rotated(self.heads(projected, 0, H + G))                              # (d, H+G, n)
        q = self.heads(qk, 0, H)
        k = self.cached(f"{i}.keys", self.heads(qk, H, G))
        v = self.cached(f"{i}.values", self.heads(projected, H + G, G))
        if c.int8_window:
            q = self.spiked(op.cont(q), QUERY_SPIKE_K)
        if self.n == 1:     # the slot it takes is that of the one token that just left the window
            self.store(i, k, v)
            return self.attend_one(i, q)
        o = self.attend_many(i, q, k, v)
        self.expand(o)
        self.store(i, k, v)
        return o

    def rotated(self, x: int) -> int:
        """Rotary embedding of x (d, heads, n): x * [cos, cos] + (halves of x swapped) * [-sin, sin]."""
        op = self.op
        swapped = op.roll(x, self.config.head_dim // 2, 0, 0, 0)
        return op.add(op.mul(x, self.leaf["cos"]), op.mul(swapped, self.leaf["sin"]))

    def cached(self, name: str, x: int) -> int:
        """x as the cache will hold it: rounded to int8 codes * scale where the model does so."""
        if not self.config.int8_window:
            return x
        op = self.op
        x = op.cont(x)
        largest = op.pool_1d(op.abs(x), POOL_MAX, self.config.head_dim, self.config.head_dim, 0)    # (1, G, n)
        scale = op.clamp(op.div(largest, self.leaf["127"]), MIN_SCALE, MAX_SCALE)
        codes = op.clamp(self.rounded(op.div(x, scale)), -128.0, 127.0)
        for output in (codes, scale):
            self.f.set_output(output)
        self.new_codes[name] = codes, scale
        return op.mul(codes, scale)

    def store(self, i: int, k: int, v: int) -> None:
        """Write the last min(n, W) tokens of k and v (d, G, n) into their ring slots."""
        c, op = self.config, self.op
        d, G = c.head_dim, c.num_key_value_heads
        m = min(self.n, c.sliding_window)
        for name, x in (("keys", k), ("values", v)):
            # Rows of one token each; x may be a view into a larger tensor, so make them plain first.
            rows = op.reshape_2d(op.cont(x), G * d, self.n)
            last = op.view_2d(rows, G * d, m, G * d * F4, (self.n - m) * G * d * F4)
            self.expand(op.set_rows(self.state[f"{i}.{name}"], last, self.leaf["slots"]))

    def ring(self, i: int, name: str) -> int:
        c = self.config
        d, G = c.head_dim, c.num_key_value_heads
        return self.op.view_3d(self.state[f"{i}.{name}"], d, G, self.length, d * F4, G * d * F4, 0)

    def attend_one(self, i: int, q: int) -> int:
        """One token against the ring, each group's r queries together: (D, 1)."""
        c, op, L = self.config, self.op, self.length
        d, G, r, H = c.head_dim, c.num_key_value_heads, c.group_size, c.num_attention_heads
        keys, values = (op.permute(self.ring(i, name), 0, 2, 1, 3) for name in ("keys", "values"))  # (d, L, G)
        scores = op.mul_mat(keys, op.reshape_3d(op.cont(q), d, r, G))                   # (L, r, G)
        weights = op.soft_max_ext(op.reshape_3d(scores, L, 1, H), self.leaf["mask"], d ** -0.5, 0.0)
        weights = op.reshape_3d(weights, L, r, G)
        return op.reshape_2d(op.out_prod(values, op.transpose(weights)), H * d, 1)      # (d, r, G)

    def attend_many(self, i: int, q: int, k: int, v: int) -> int:
        """n tokens against the ring as it was before them and against each other, masked: (D, n)."""
        c, op = self.config, self.op
        d, H = c.head_dim, c.num_attention_heads
        if self.length:
            k, v = op.concat(self.ring(i, "keys"), k, 2), op.concat(self.ring(i, "values"), v, 2)   # (d, G, L)
        scores = op.mul_mat(op.permute(k, 0, 2, 1, 3), op.permute(q, 0, 2, 1, 3))       # (L, n, H)
        weights = op.soft_max_ext(scores, self.leaf["mask"], d ** -0.5, 0.0)
        o = op.mul_mat(op.cont(op.permute(v, 1, 2, 0, 3)), weights)                     # (d, n, H)
        return op.reshape_2d(op.cont(op.permute(o, 0, 2, 1, 3)), H * d, self.n)

    # --- FFN -------------------------------------------------------------------------------------------
    def ffn(self, i: int, x: int) -> int:
        h = self.gated(i, x)                                                            # (F, n)
        return self.linears(i, ("ffn_down",), self.spiked_input(i, "FFN down", h) if self.config.spike_down else h)

    def gated(self, i: int, x: int) -> int:
        """silu(gate) * up, (F, n)."""
        return self.op.swiglu(self.linears(i, ("ffn_gate", "ffn_up"), self.spiked_input(i, "FFN in", x)))
