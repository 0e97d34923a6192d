"""What each input of a model, a layer and a kind, would lose by silence or by coarser weights: tried in float32.

All inputs are tried at once: a stream for each, in which that input alone is silenced (or the linears that read it
alone are rounded), is carried through the float32 model to its end, where its predictions tell what that cost (KL).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sbedge.checkpoint import Checkpoint
from sbedge.config import INPUT_KINDS, ModelConfig
from sbedge.quant.gptq import CLIPS, rounded
from sbedge.quant.sparsity import Silence, silence

from .activations import Layers, Samples
from .grids import grid_of, linears_of
from .report import log_softmax

PROBES, PROBE_TOKENS = 8, 64        # samples that are tried on
SCORED = slice(3, None, 4)          # of their tokens, those whose predictions are compared: logits take long
HALVES = (("attention in", "attention out"), ("FFN in", "FFN down"))
ROWS = 1024                         # outputs rounded at a time

# How finely an input may spike. A larger k loses nothing but speed: our kernels take counts up to 64 many channels at a
# time, on every processor, and larger ones channel by channel. So k is the largest of these with few of those.
KS = (4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
FAST_COUNT, RARE = 64, 0.02

Progress = Callable[[int, int, str], None]


@dataclass
class Input:
    """A kind of input of a layer: the linears that read it, how it may spike, and what it loses (KL, in nats)."""

    layer: int
    kind: str
    linears: list[str]
    k: float                    # the finest of KS that keeps counts small
    silence: Silence            # what each share of silence loses: in units of its own until `by_silence` was measured
    by_rounding: float = 0.0    # with its linears on the grid of the export


def measured(checkpoint: Checkpoint, layers: Layers, quant: str, ids: np.ndarray, progress: Progress | None, *,
             level: int | None, rounding: bool) -> list[Input]:
    """Every input, layer by layer in the order of INPUT_KINDS, as the first samples of `ids` show it.

    level      of SHARES, the silence that is tried; None: none is, and losses by silence stay in units of their own
    rounding   whether the linears are tried on their grids in `quant`
    """
    ids = ids[:: max(1, len(ids) // PROBES)][:PROBES, :PROBE_TOKENS]
    count, config = layers.config.num_hidden_layers, layers.config
    ends = Samples(config, layers.rest())
    streams = ends.embed(ids)[None]                     # [1 + tried so far, samples, tokens, D]
    inputs: list[Input] = []
    tried: list[tuple[Input, str]] = []
    for i in range(count):
        weights = layers[i]
        model = Samples(config, weights)
        for half in HALVES:
            h, later = streams[0], []
            for kind in half:
                x = model.before(i, kind, h)
                inputs.append(seen(i, kind, x.reshape(-1, x.shape[-1]), weights))
                for what, changed in changes(inputs[-1], x, weights, model, checkpoint, quant, level, rounding).items():
                    later.append(changed.half(i, half[-1], h))
                    tried.append((inputs[-1], what))
            streams = np.stack([model.half(i, half[-1], h) for h in streams] + later)
        if progress:
            progress((i + 1) * layers.bytes, count * layers.bytes, f"trying choices in layer {i}")
    exact = log_softmax(ends.logits(streams[0][:, SCORED]))
    for (input, what), h in zip(tried, streams[1:], strict=True):
        cost = kl(exact, log_softmax(ends.logits(h[:, SCORED])))
        if what == "rounding":
            input.by_rounding = cost
        else:
            losses = input.silence.losses
            input.silence = input.silence._replace(losses=losses * (cost / max(float(losses[level]), 1e-30)))
    return inputs


def seen(i: int, kind: str, x: np.ndarray, weights: Mapping[str, np.ndarray]) -> Input:
    """An input of which x [n, width] was seen."""
    linears = linears_of(i, kind)
    norms = np.sqrt(sum(np.square(weights[name]).sum(axis=0) for name in linears))
    size = np.abs(x)
    largest = (FAST_COUNT + 0.5) * np.maximum(size.mean(axis=1, keepdims=True), 1e-30)
    k = max((k for k in KS if (size * k > largest).mean() <= RARE), default=KS[0])
    return Input(i, kind, linears, k, silence(x, norms))


def changes(input: Input, x: np.ndarray, weights: dict[str, np.ndarray], model: Samples, checkpoint: Checkpoint,
            quant: str, level: int | None, rounding: bool) -> dict[str, Samples]:
    """The layer with what is to be tried of this input."""
    found: dict[str, Samples] = {}
    if level is not None:
        found["silence"] = Silenced(model.config, weights, input.kind, float(input.silence.zones[level]))
    if rounding:
        found["rounding"] = Samples(model.config, weights | rounded_linears(input, x, weights, checkpoint, quant))
    return found


def rounded_linears(input: Input, x: np.ndarray, weights: Mapping[str, np.ndarray], checkpoint: Checkpoint,
                    quant: str) -> dict[str, np.ndarray]:
    """The linears of an input on their grids, each weight rounded to the nearest with well-chosen scales: what GPTQ
    loses is less, but in proportion."""
    x = x.reshape(-1, x.shape[-1])
    importance = np.square(x / np.maximum(np.abs(x).mean(axis=1, keepdims=True), 1e-30)).mean(axis=0)
    found = {}
    for name in input.linears:
        if grid := grid_of(checkpoint, name, quant):
            blocks = (weights[name][start:start + ROWS].T for start in range(0, len(weights[name]), ROWS))
            found[name] = np.concatenate([rounded(block, importance, grid, CLIPS).weight().T for block in blocks])
    return found


class Silenced(Samples):
    """The model with one kind of input silent within a dead zone, and not spiking otherwise."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, np.ndarray], kind: str, zone: float):
        super().__init__(config, weights)
        self.projections, self.zone = INPUT_KINDS[kind], zone

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        if name.rsplit(".", 1)[-1] in self.projections:
            x = np.where(np.abs(x) < self.zone * np.abs(x).mean(axis=-1, keepdims=True), np.float32(0), x)
        return super().linear(name, x)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Mean KL(p || q) of log-probabilities."""
    return float((np.exp(p) * (p - q)).sum(-1).mean())
