"""Calibration: what a text shows of a model decides how its weights are rounded and which channels fall silent.

Layer by layer, and within a layer input kind by input kind (activations.py), samples of the text run through the export
as it is so far, rounded and spiking; the linears that read an input are put on their grids by what they see then
(quant/gptq.py). One layer is in memory at a time; finished linears lie in files until they are written.

(Regression on the float32 activations, to make up for what spiking or the layers before have lost, was tried: on 8,000
tokens it fits noise. It cost 3 to 5 % of perplexity where GPTQ alone costs nothing.)
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from sbedge.checkpoint import Checkpoint
from sbedge.config import INPUT_KINDS, ModelConfig
from sbedge.errors import ExportError
from sbedge.quant.gptq import Grid, calibrate

from .activations import Layers, Samples, in_batches
from .calibrated import Calibrated
from .choices import Limits, choose
from .grids import grid_of, linears_of
from .spikes import Spikes, exported_config

SAMPLES, SAMPLE_TOKENS = 128, 128
LEAST_TOKENS = 1024         # of a text
HELD_OUT = 1024             # tokens at its end, for the report
BATCH = 16                  # samples that run at a time
DAMPING = 0.01              # of the usual channel's energy, added to every channel's

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Calibration:
    """What an export is calibrated with: samples of text, ids [samples, tokens], and limits to choose within."""

    ids: np.ndarray
    limits: Limits = field(default_factory=Limits)


def split_text(ids: np.ndarray, source: str) -> tuple[np.ndarray, np.ndarray]:
    """A text's ids as samples to calibrate with, spread evenly over it, and its end, held out to see what that did:
    [n, SAMPLE_TOKENS] each. ExportError if it is too short."""
    if len(ids) < LEAST_TOKENS:
        raise ExportError(f"{source}: {len(ids)} tokens, expected at least {LEAST_TOKENS} to calibrate with, better "
                          f"{SAMPLES * SAMPLE_TOKENS} or more")
    held = min(HELD_OUT, len(ids) // 8) // SAMPLE_TOKENS
    end = len(ids) - held * SAMPLE_TOKENS
    starts = np.linspace(0, end - SAMPLE_TOKENS, min(SAMPLES, end // SAMPLE_TOKENS)).astype(int)
    return np.stack([ids[at:at + SAMPLE_TOKENS] for at in starts]), ids[end:].reshape(held, SAMPLE_TOKENS)


def calibrated(checkpoint: Checkpoint, quant: str, calibration: Calibration, spikes: Spikes | None, work: Path,
               embedding_quant: str, size: Callable[[Calibrated], int], progress: Progress | None = None) -> Calibrated:
    """`checkpoint` as an export in `quant` shall hold it, put together in the folder `work`. `size` tells the bytes of
    the file that would be written of it."""
    result = Calibrated(checkpoint, exported_config(checkpoint, quant, spikes), work)
    layers = Layers(checkpoint)
    choose(result, layers, quant, calibration.ids, spikes, calibration.limits, embedding_quant, size, progress)
    Stream(layers, result.exported, calibration.ids, quant, result).run(progress)
    return result


# --- rounding ------------------------------------------------------------------------------------
class Stream:
    """The samples' h [samples, tokens, D] on its way through the layers of the export, which is made as it passes."""

    def __init__(self, layers: Layers, config: ModelConfig, ids: np.ndarray, quant: str, result: Calibrated):
        self.layers, self.config, self.quant, self.result = layers, config, quant, result
        self.h = Samples(config, layers.rest()).embed(ids)

    def run(self, progress: Progress | None) -> None:
        replaced: dict[str, np.ndarray] = {}
        layers, kinds = self.config.num_hidden_layers, list(INPUT_KINDS)
        for i in range(layers):
            weights = self.layers[i]
            for done, kind in enumerate(kinds):
                self.stage(i, kind, weights)
                if progress:
                    step = self.layers.bytes // len(kinds)
                    progress((i * len(kinds) + done + 1) * step, layers * len(kinds) * step, f"calibrating layer {i}")
            replaced |= {name: weight for name, weight in weights.items()
                         if grid_of(self.result, name, self.quant) is None}
        self.result.replaced = replaced

    def stage(self, i: int, kind: str, weights: dict[str, np.ndarray]) -> None:
        """Put the linears that read an input on their grids, and what they then are into `weights`; with the last input
        of half a layer the stream moves on."""
        model = Samples(self.config, weights)
        x = in_batches(partial(model.before, i, kind), BATCH, self.h)
        moments = moments_of(in_batches(partial(model.spiked, i, kind), BATCH, x))
        for grid, names in self.grids(i, kind).items():        # linears of one grid go together: faster
            weight = np.concatenate([weights[name] for name in names]).T
            try:
                levels = calibrate(weight, moments, grid)
            except ValueError as error:
                raise ExportError(f"{names[0]}: cannot be calibrated ({error}); is the checkpoint damaged?") from None
            ends = np.cumsum([len(weights[name]) for name in names])
            for name, start, end in zip(names, [0, *ends], ends, strict=False):
                self.result.keep(name, levels.outputs(start, end))
            weights.update(zip(names, np.split(levels.weight().T, ends[:-1]), strict=True))
        if not kind.endswith(" in"):
            self.h = in_batches(partial(model.after, i, kind), BATCH, self.h, x)

    def grids(self, i: int, kind: str) -> dict[Grid, list[str]]:
        """The linears of a kind of input, by the grid they go on."""
        found: dict[Grid, list[str]] = {}
        for name in linears_of(i, kind):
            if grid := grid_of(self.result, name, self.quant):
                found.setdefault(grid, []).append(name)
        return found


def moments_of(x: np.ndarray) -> np.ndarray:
    """Second moments [in, in] of x [samples, tokens, in]."""
    x = x.reshape(-1, x.shape[-1])
    # A few tokens, the first of a text above all, are thousands of times louder: they would be all that counts.
    energy = np.square(x).mean(axis=1, keepdims=True)
    x = x * np.sqrt(np.minimum(1, np.median(energy) / np.maximum(energy, 1e-30)))
    moments = x.T @ x
    moments[np.diag_indices_from(moments)] += DAMPING * np.median(np.diag(moments))
    return moments


# --- the float32 model, for comparison -----------------------------------------------------------
def exact_logits(checkpoint: Checkpoint, ids: np.ndarray) -> np.ndarray:
    """Logits [samples, tokens, V] of the checkpoint for ids [samples, tokens], each sample from an empty state; one
    layer is in memory at a time."""
    layers = Layers(checkpoint)
    ends = Samples(checkpoint.config, layers.rest())
    h = ends.embed(ids)
    for i in range(checkpoint.config.num_hidden_layers):
        model = Samples(checkpoint.config, layers[i])
        for last in ("attention out", "FFN down"):
            h = in_batches(partial(model.half, i, last), BATCH, h)
    return ends.logits(h)
