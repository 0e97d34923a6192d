"""The model in torch, for training: sbedge/reference.py over whole sequences at once, with gradients.

Linears of the source are frozen and held in the compute type (bfloat16 where the processor multiplies it, else
float32); what is trained is float32. Notation: B sequences, T tokens, D hidden, H query heads, G groups, d head size.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbedge.checkpoint import Checkpoint
from sbedge.config import GATE_DIVISOR, ModelConfig
from sbedge.reference import rope_angles

CHUNK = 64              # tokens of a GLA chunk
BLOCK = 128             # queries of a block of window attention
LEAST_DECAY = -1.2      # log-decay of a token: ratios inside a chunk stay within float32 (exp(64 * 1.2 / 2))
Weight = Callable[[str], np.ndarray]
Spike = Callable[[str, Tensor], Tensor]     # (kind of input, x) -> what the linears that read it multiply


def compute_type() -> torch.dtype:
    """bfloat16 where the processor has instructions for it [five times faster there, eight times slower elsewhere]."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Gated linear attention from an empty state, in chunks: q [B, G, T, h, d], k, v, log_decay [B, G, T, d] -> as q.

    o_t = q_t S_t with S_t = exp(log_decay_t) S_(t-1) + k_t v_t^T. T is a multiple of CHUNK.
    """
    B, G, T, h, d = q.shape
    n, C = T // CHUNK, CHUNK
    k, v, g = (x.reshape(B, G, n, C, d) for x in (k, v, log_decay.clamp(min=LEAST_DECAY)))
    q = q.reshape(B, G, n, C, h, d)
    decay = g.cumsum(3)                                         # from before the chunk to each token
    last = decay[:, :, :, -1:]                                  # [B, G, n, 1, d]
    middle = decay[:, :, :, C // 2:C // 2 + 1].detach()         # ratios around it neither over- nor underflow
    # inside a chunk: every query with the keys up to it
    near = q * (decay - middle).exp().unsqueeze(4)
    scores = near.flatten(3, 4) @ (k * (middle - decay).exp()).transpose(-1, -2)     # [B, G, n, C*h, C]
    rows = torch.arange(C * h) // h
    inside = scores.masked_fill(rows[:, None] < torch.arange(C), 0.0) @ v
    # across chunks: the state at each chunk's beginning
    added = (k * (last - decay).exp()).transpose(-1, -2) @ v                         # [B, G, n, d, d]
    kept = last.exp().transpose(-1, -2)                                              # [B, G, n, d, 1]
    state, states = torch.zeros_like(added[:, :, 0]), []
    for i in range(n):
        states.append(state)
        state = kept[:, :, i] * state + added[:, :, i]
    across = (q * decay.exp().unsqueeze(4)).flatten(3, 4) @ torch.stack(states, 2)
    return (inside + across).reshape(B, G, T, h, d)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class StraightThrough(torch.autograd.Function):
    """Counts times threshold of x [B, T, width] in its first `rows` rows; the gradient passes as if it were x.

    loudness [width] is what channels are multiplied with before their counts are taken (quant/folding.py).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, k: float, zone: float, loudness: Tensor) -> Tensor:
        loud = x[:rows].float() * loudness
        size = loud.abs()
        mean = size.mean(-1, keepdim=True)
        threshold = (mean / k).clamp(1e-5, 1e4)
        spiked = loud.div_(threshold).round_().mul_(threshold).masked_fill_(size < zone * mean, 0.0).div_(loudness)
        return torch.cat([spiked.to(x.dtype), x[rows:]])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return upstream, None, None, None, None


@dataclass(frozen=True)
class Spiking:
    """How the inputs of a layer spike; zones and loudness by kind of input (INPUT_KINDS).

    rows  of a batch that spike; the others do not, so that the model stays good without spikes, too
    """

    k: float
    zones: Mapping[str, float]
    loudness: Mapping[str, Tensor]
    rows: int

    def __call__(self, kind: str, x: Tensor) -> Tensor:
        return StraightThrough.apply(x, self.rows, self.k, self.zones[kind], self.loudness[kind])


def as_it_is(kind: str, x: Tensor) -> Tensor:
    return x


class Frozen(nn.Module):
    """A linear of the source, with a trained low-rank correction if `rank`: y = x (W + B A)^T."""

    def __init__(self, weight: np.ndarray, rank: int, dtype: torch.dtype, bias: np.ndarray | None = None):
        super().__init__()
        self.register_buffer("weight", torch.from_numpy(weight).to(dtype), persistent=False)
        has_bias = bias is not None and bool(np.any(bias))
        self.register_buffer("bias", torch.from_numpy(bias).to(dtype) if has_bias else None, persistent=False)
        out, inputs = weight.shape
        if rank:
            self.A = nn.Parameter(torch.randn(rank, inputs) * inputs ** -0.5)
            self.B = nn.Parameter(torch.zeros(out, rank))
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.rank:
            y = y + F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        return y


class GlaMixer(nn.Module):
    """The attention of a converted layer; parameters are named as in the checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, kv = config.hidden_size, config.kv_dim
        self.config = config
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, kv), nn.Linear(D, kv)
        self.o_proj = nn.Linear(D, D, bias=False)
        gate = nn.Sequential(nn.Linear(D, config.gate_rank, bias=False), nn.Linear(config.gate_rank, kv))
        self.gk_proj = gate
        self.g_norm = nn.Module()
        self.g_norm.weight = nn.Parameter(torch.ones(config.head_dim))

    def features(self, x: Tensor, spike: Spike = as_it_is) -> Tensor:
        """What o_proj takes: x [B, T, D] (normed) -> [B, T, D]. The gate never spikes."""
        c, (B, T, D) = self.config, x.shape
        G, h, d = c.num_key_value_heads, c.group_size, c.head_dim

        seen = spike("attention in", x)

        def apply(linear: nn.Linear) -> Tensor:
            bias = None if linear.bias is None else linear.bias.to(x.dtype)
            return F.linear(seen, linear.weight.to(x.dtype), bias).float()

        pad = -T % CHUNK
        q = F.relu(apply(self.q_proj)).reshape(B, T, G, h, d).transpose(1, 2) * d ** -0.5
        k = F.relu(apply(self.k_proj)).reshape(B, T, G, d).transpose(1, 2)
        v = apply(self.v_proj).reshape(B, T, G, d).transpose(1, 2)
        low = F.linear(x, self.gk_proj[0].weight.to(x.dtype)).float()
        gate = self.gk_proj[1](low)
        log_decay = F.logsigmoid(gate).reshape(B, T, G, d).transpose(1, 2) / GATE_DIVISOR
        if pad:
            q = F.pad(q, (0, 0, 0, 0, 0, pad))
            k, v, log_decay = (F.pad(y, (0, 0, 0, pad)) for y in (k, v, log_decay))
        o = gla(q, k, v, log_decay)[:, :, :T]
        return rms_norm(o, self.g_norm.weight, c.norm_eps).transpose(1, 2).reshape(B, T, D)

    def forward(self, x: Tensor, spike: Spike = as_it_is) -> Tensor:
        return F.linear(spike("attention out", self.features(x, spike).to(x.dtype)), self.o_proj.weight.to(x.dtype))


class WindowMixer(nn.Module):
    """Sliding-window attention with the source's weights: q, k and v as one matrix."""

    def __init__(self, config: ModelConfig, attn: str, weight: Weight, rank: int, dtype: torch.dtype):
        super().__init__()
        self.config = config
        names = ("q_proj", "k_proj", "v_proj")
        self.qkv = Frozen(np.concatenate([weight(f"{attn}{n}.weight") for n in names]), rank, dtype,
                          np.concatenate([weight(f"{attn}{n}.bias") for n in names]))
        self.o = Frozen(weight(f"{attn}o_proj.weight"), rank, dtype)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], spike: Spike = as_it_is) -> Tensor:
        c, (B, T, D) = self.config, x.shape
        H, G, d, W = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.sliding_window
        qkv = self.qkv(spike("attention in", x)).reshape(B, T, H + 2 * G, d).transpose(1, 2)
        qk = rotate(qkv[:, :H + G], *turn)
        q, k, v = qk[:, :H], qk[:, H:], qkv[:, H + G:]
        k, v = (y.repeat_interleave(H // G, dim=1) for y in (k, v))
        o = window_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), W).reshape(B, H, T, d)
        return self.o(spike("attention out", o.transpose(1, 2).reshape(B, T, D)))


def window_attention(q: Tensor, k: Tensor, v: Tensor, W: int) -> Tensor:
    """Softmax attention over the last W tokens: q, k, v [N, T, d] -> [N, T, d].

    In blocks of queries, so that what lies in the future is not multiplied [forward and backward take 0.4 of the
    time of torch's scaled_dot_product_attention].
    """
    T, out = q.shape[1], []
    for start in range(0, T, BLOCK):
        stop, low = min(start + BLOCK, T), max(0, start - W + 1)
        distance = torch.arange(start, stop)[:, None] - torch.arange(low, stop)
        outside = torch.zeros(distance.shape, dtype=q.dtype).masked_fill((distance < 0) | (distance >= W), -torch.inf)
        scores = torch.baddbmm(outside, q[:, start:stop], k[:, low:stop].transpose(1, 2), alpha=q.shape[-1] ** -0.5)
        out.append(scores.softmax(-1) @ v[:, low:stop])
    return torch.cat(out, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., T, d]; cos and sin [T, d/2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, i: int, weight: Weight, rank: int, dtype: torch.dtype):
        super().__init__()
        name = f"model.layers.{i}."
        self.eps = config.norm_eps
        self.attn_norm = _vector(weight(name + "attn_norm.weight"))
        self.mlp_norm = _vector(weight(name + "mlp_norm.weight"))
        self.window: WindowMixer | None = WindowMixer(config, name + "attn.", weight, rank, dtype)
        gate_up = np.concatenate([weight(f"{name}mlp.{part}_proj.weight") for part in ("gate", "up")])
        self.gate_up = Frozen(gate_up, rank, dtype)
        self.down = Frozen(weight(name + "mlp.down_proj.weight"), rank, dtype)
        self.gla: GlaMixer | None = None
        self.spike: Spike = as_it_is
        self.dtype = dtype

    def mixer_input(self, h: Tensor) -> Tensor:
        return rms_norm(h, self.attn_norm, self.eps).to(self.dtype)

    def forward(self, h: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = self.mixer_input(h)
        return self.ffn(h + (self.gla(x, self.spike) if self.gla is not None else self.source_mixer(x, turn)))

    def source_mixer(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        assert self.window is not None, "the source's attention was dropped when the layer was converted"
        return self.window(x, turn, self.spike)

    def ffn(self, h: Tensor) -> Tensor:
        x = self.spike("FFN in", rms_norm(h, self.mlp_norm, self.eps).to(self.dtype))
        gate, up = self.gate_up(x).chunk(2, -1)
        return h + self.down(self.spike("FFN down", F.silu(gate) * up))


class Hybrid(nn.Module):
    """A source model whose layers become GLA ones by being given a `gla`; `rank` of the corrections, 0 for none.

    first  the lowest layer with corrections
    """

    def __init__(self, config: ModelConfig, weight: Weight, *, rank: int = 0, first: int = 0,
                 dtype: torch.dtype | None = None):
        super().__init__()
        self.config, self.dtype = config, dtype or compute_type()
        self.embeddings = _vector(weight("model.embeddings.weight"))
        self.norm = _vector(weight("model.norm.weight"))
        tied = config.tie_word_embeddings
        self.head = _vector(weight("model.embeddings.weight" if tied else "lm_head.weight")).to(self.dtype)
        self.layers = nn.ModuleList(Layer(config, i, weight, rank if i >= first else 0, self.dtype)
                                    for i in range(config.num_hidden_layers))

    @classmethod
    def of(cls, checkpoint: Checkpoint, **options: Any) -> Hybrid:
        """A checkpoint as it is, its GLA layers included."""
        model = cls(checkpoint.config, checkpoint.weight, **options)
        for i, _ in enumerate(model.layers):
            if not checkpoint.config.is_window_layer(i):
                mixer = GlaMixer(checkpoint.config)
                mixer.load_state_dict({name: torch.from_numpy(checkpoint.weight(f"model.layers.{i}.attn.{name}"))
                                       for name in mixer.state_dict()})
                model.replace({i: mixer})
        return model

    def replace(self, mixers: Mapping[int, GlaMixer]) -> None:
        """Convert layers for good: their window attention is dropped."""
        for i, mixer in mixers.items():
            self.layers[i].gla, self.layers[i].window = mixer, None

    def turn(self, T: int) -> tuple[Tensor, Tensor]:
        cos, sin = rope_angles(np.arange(T), self.config.head_dim, self.config.rope_theta)
        return torch.from_numpy(cos).to(self.dtype), torch.from_numpy(sin).to(self.dtype)

    def hidden(self, h: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Through layers [start, stop): h [B, T, D] float32."""
        turn = self.turn(h.shape[1])
        for layer in self.layers[start:stop]:
            h = layer(h, turn)
        return h

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embeddings)

    def final(self, h: Tensor) -> Tensor:
        """What the head takes."""
        return rms_norm(h, self.norm, self.config.norm_eps).to(self.dtype)

    def logits(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> float32 [B, T, V]; for short inputs."""
        return F.linear(self.final(self.hidden(self.embed(ids))), self.head).float()

    def trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)


def _vector(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, np.float32))
