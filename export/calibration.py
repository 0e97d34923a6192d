"""Calibration: what a text shows of a model decides how its weights are rounded and which channels fall silent.

Layer by layer, and within a layer input kind by input kind (activations.py), samples of the text run through the export
as it is so far, rounded and spiking; the linears that read an input are put on their grids by what they see then
(quant/gptq.py). One layer is in memory at a time; finished linears lie in files until they are written.

(Regression on the float32 activations, to make up for what spiking or the layers before have lost, was tried: on 8,000
tokens it fits noise. It cost 3 to 5 % of perplexity where GPTQ alone costs nothing.)
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from sbedge.checkpoint import Checkpoint
from sbedge.config import INPUT_KINDS, ModelConfig
from sbedge.errors import ExportError
from sbedge.quant.folding import POWER, folded
from sbedge.quant.ggml_blocks import BLOCK as GGML_BLOCK
from sbedge.quant.ggml_blocks import GGML_GRIDS
from sbedge.quant.gptq import GRIDS, Grid, calibrate
from sbedge.quant.sparsity import SHARES, shared_out, silence

from .activations import Samples, in_batches, path
from .calibrated import Calibrated
from .report import log_softmax
from .spikes import EVENT_LINEARS, Spikes, event_layout, exported_config

SAMPLES, SAMPLE_TOKENS = 128, 128
LEAST_TOKENS = 1024         # of a text
HELD_OUT = 1024             # tokens at its end, for the report
BATCH = 16                  # samples that run at a time
PROBES, PROBE_TOKENS = 8, 64        # what dead zones are tried on
SCORED = slice(3, None, 4)          # of their tokens, those whose predictions are compared: logits take long
DAMPING = 0.01              # of the usual channel's energy, added to every channel's
DEFAULT_K = 8.0             # of a calibrated export: fine counts, for silence comes from dead zones

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Calibration:
    """What an export is calibrated with.

    ids     [samples, tokens], samples of text
    skip    share of the spiking linears' weights that shall be silent; None: as the dead zone says, the same everywhere
    """

    ids: np.ndarray
    skip: float | None = None

    def __post_init__(self) -> None:
        if self.skip is not None and not 0 < self.skip <= 0.9:
            raise ExportError(f"the share to skip is {self.skip:g}, expected more than 0 and up to 0.9")


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


def grid_of(checkpoint: Checkpoint, name: str, quant: str) -> Grid | None:
    """The grid that an export in `quant` stores this tensor on; None: it is not calibrated."""
    if not name.endswith(".weight") or name.split(".")[-2] not in EVENT_LINEARS:
        return None
    if quant.endswith("-spike"):
        return GRIDS["w4-spike" if event_layout(checkpoint, name, quant) == "w4" else "w8-spike"]
    if quant in GGML_GRIDS.values() and checkpoint.shapes[name][1] % GGML_BLOCK:
        return None         # stored in float16
    return GRIDS[quant]


def calibrated(checkpoint: Checkpoint, quant: str, calibration: Calibration, spikes: Spikes | None, work: Path,
               progress: Progress | None = None) -> Calibrated:
    """`checkpoint` as an export in `quant` shall hold it, put together in the folder `work`."""
    if quant not in GRIDS:
        raise ExportError(f"quant {quant} has nothing to calibrate; choose one of {', '.join(GRIDS)}")
    if checkpoint.is_w8aspike:
        raise ExportError(f"{checkpoint.folder}: a W8ASpike checkpoint has its codes already, and they are kept "
                          "exactly; leave --calibrate out")
    spiking = quant.endswith("-spike")
    if calibration.skip is not None and not spiking:
        raise ExportError(f"quant {quant} has no silent channels to skip; choose w8-spike or w4-spike")
    if spiking and spikes is None and not checkpoint.trained_spikes:
        spikes = Spikes(k=DEFAULT_K)
    config = exported_config(checkpoint, quant, spikes)
    layers = Layers(checkpoint)
    if calibration.skip is not None:
        config = with_dead_zones(layers, config, calibration, progress)
    result = Calibrated(checkpoint, config, work)
    Stream(layers, config, calibration.ids, quant, result).run(progress)
    return result


class Layers:
    """The folded weights of a checkpoint (as they are, if it was trained to spike), a layer at a time, by full name."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.power = 0.0 if checkpoint.trained_spikes else POWER
        self.bytes = 4 * sum(math.prod(shape) for name, shape in checkpoint.shapes.items() if ".layers.0." in name)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        prefix = f"model.layers.{i}."
        names = [name for name in self.checkpoint.names() if name.startswith(prefix)]
        weights = {name.removeprefix(prefix): self.checkpoint.tensor(name) for name in names}
        self.checkpoint.release()
        return {prefix + name: weight for name, weight in folded(weights, self.power).items()}

    def rest(self) -> dict[str, np.ndarray]:
        return {name: self.checkpoint.tensor(name) for name in self.checkpoint.names() if ".layers." not in name}


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
        for grid, names in self.grids(i, kind, weights).items():        # linears of one grid go together: faster
            weight = np.concatenate([weights[name] for name in names]).T
            levels = calibrate(weight, moments, grid)
            ends = np.cumsum([len(weights[name]) for name in names])
            for name, start, end in zip(names, [0, *ends], ends, strict=False):
                self.result.keep(name, levels.outputs(start, end))
            weights.update(zip(names, np.split(levels.weight().T, ends[:-1]), strict=True))
        if not kind.endswith(" in"):
            self.h = in_batches(partial(model.after, i, kind), BATCH, self.h, x)

    def grids(self, i: int, kind: str, weights: Mapping[str, np.ndarray]) -> dict[Grid, list[str]]:
        """The linears of a kind of input, by the grid they go on."""
        found: dict[Grid, list[str]] = {}
        for projection in INPUT_KINDS[kind]:
            name = f"model.layers.{i}.{path(projection)}.weight"
            if name in weights and (grid := grid_of(self.result, name, self.quant)):
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


# --- silence -------------------------------------------------------------------------------------
def with_dead_zones(layers: Layers, config: ModelConfig, calibration: Calibration,
                    progress: Progress | None) -> ModelConfig:
    """`config` with a dead zone for each layer and input kind, so that `skip` of all weights is silent.

    All inputs are tried at once: a stream for each, in which that input alone is silenced as much as the average shall
    be, is carried through the float32 model to its end, where its predictions tell what that cost (KL). How the cost
    grows with silence is taken from the outputs it takes away.
    """
    assert calibration.skip is not None
    ids = calibration.ids[:: max(1, len(calibration.ids) // PROBES)][:PROBES, :PROBE_TOKENS]
    level = int(np.searchsorted(SHARES, calibration.skip))
    rest = layers.rest()
    streams = Samples(layers.config, rest).embed(ids)[None]         # [1 + inputs so far, samples, tokens, D]
    found, sizes = [], []
    for i in range(config.num_hidden_layers):
        weights = layers[i]
        model = Samples(layers.config, weights)
        halves = {"attention in": "attention out", "FFN in": "FFN down"}
        for first, last in halves.items():
            h, later = streams[0], []
            for kind in (first, last):
                names = [f"model.layers.{i}.{path(p)}.weight" for p in INPUT_KINDS[kind] if p in EVENT_LINEARS]
                norms = np.sqrt(sum(np.square(weights[name]).sum(axis=0) for name in names))
                x = model.before(i, kind, h)
                found.append(silence(x.reshape(-1, x.shape[-1]), norms))
                sizes.append(sum(weights[name].size for name in names))
                quiet = Silenced(layers.config, weights, kind, float(found[-1].zones[level]))
                later.append(quiet.half(i, last, h))
            streams = np.stack([model.half(i, last, h) for h in streams] + later)
        if progress:
            progress((i + 1) * layers.bytes, config.num_hidden_layers * layers.bytes, f"trying silence in layer {i}")
    model = Samples(layers.config, rest)
    exact = log_softmax(model.logits(streams[0][:, SCORED]))
    costs = np.array([kl(exact, log_softmax(model.logits(h[:, SCORED]))) for h in streams[1:]])
    losses = np.array([cost * s.losses / max(s.losses[level], 1e-30) for cost, s in zip(costs, found, strict=True)])
    choice = shared_out(losses, np.array(sizes, float), calibration.skip)
    zones = tuple(float(np.float32(s.zones[c])) for s, c in zip(found, choice, strict=True))    # as files hold them
    return replace(config, input_dead_zone=zones)


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
