"""What calibration chooses for each input, a layer and a kind: k, a dead zone, and whether the linears that read it are
kept in 8 bits where the export has 4; for the least loss within the limits that are set (quant/budget.py)."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from sbedge.checkpoint import Checkpoint
from sbedge.config import INPUT_KINDS
from sbedge.errors import ExportError
from sbedge.quant.budget import cheapest, sum_of
from sbedge.quant.gptq import FINER, GRIDS
from sbedge.quant.sparsity import SHARES

from .activations import Layers
from .calibrated import Calibrated, quant_of
from .grids import bytes_beside, grid_bytes, grid_of, linears_of
from .probes import KS, Input, Progress, measured
from .spikes import Spikes, exported_config

DEAD_ZONE = 1 / 16          # where none is chosen: 6 % of a usual input are silent and are hardly missed
TRIED = (0.1, 0.6)          # least and most silence that --read is tried with
ROUNDS = 4                  # of bringing what is chosen up to the budget
LONGEST = 1.2345679104328156e-05        # a number that takes the most characters in JSON
LEAST_LOSS = 1e-12          # of 4 bits, so that 8 are chosen where there is room for them
# Eight bits are taken to lose nothing: the 135M stand-in of the demo loses 0.1 % of perplexity by them, 9 % by four.


@dataclass(frozen=True)
class Limits:
    """What an export may not exceed; None: as it comes.

    skip    share of the spiking linears' weights that shall be silent
    budget  bytes of the file or folder
    read    bytes of weights that decoding a token reads: all linears that are not silent, and lm_head
    """

    skip: float | None = None
    budget: int | None = None
    read: int | None = None

    def __post_init__(self) -> None:
        if self.skip is not None and not 0 < self.skip <= 0.9:
            raise ExportError(f"the share to skip is {self.skip:g}, expected more than 0 and up to 0.9")
        if self.skip is not None and self.read is not None:
            raise ExportError("a share to skip and bytes to read were set, but these decide the same: leave one out")

    def check(self, checkpoint: Checkpoint, quant: str) -> None:
        """ExportError unless `checkpoint` can be calibrated in `quant` within limits of this kind."""
        if quant not in GRIDS:
            raise ExportError(f"quant {quant} has nothing to calibrate; choose one of {', '.join(GRIDS)}")
        if checkpoint.is_w8aspike:
            raise ExportError(f"{checkpoint.folder}: a W8ASpike checkpoint has its codes already, and they are kept "
                              "exactly; leave --calibrate out")
        if self.skip is not None and not quant.endswith("-spike"):
            raise ExportError(f"quant {quant} has no silent channels to skip; choose w8-spike or w4-spike")
        if self.read is not None and not quant.endswith("-spike"):
            raise ExportError(f"quant {quant} has no silent channels and reads what it stores; set a budget, or "
                              "choose w8-spike or w4-spike")
        if self.budget is not None and quant not in FINER:
            raise ExportError(f"quant {quant} has 8 bits already, and a budget chooses what of 4 is kept in 8; "
                              f"choose one of {', '.join(FINER)}")


def choose(result: Calibrated, layers: Layers, quant: str, ids: np.ndarray, spikes: Spikes | None, limits: Limits,
           embedding_quant: str, size: Callable[[Calibrated], int], progress: Progress | None) -> None:
    """Set how the inputs of `result` spike (`exported`), and which linears are kept in 8 bits (`quants`).

    spikes   what is chosen already; what is None in it is open, unless the checkpoint was trained to spike: then k is
             as it was trained with, and the dead zones, if no limit asks for others
    size     the bytes that the file would have with `result` as it is
    """
    spiking = quant.endswith("-spike")
    if not spiking and limits.budget is None:
        return
    trained = result.exported.trained_to_spike
    fixed = spikes.k if spikes else result.exported.spike_k if trained else None
    if spiking:     # as finely as may be, until it is known: no choice takes more bytes to state
        finest = (fixed or KS[-1],) * result.config.num_hidden_layers * len(INPUT_KINDS)
        result.exported = replace(result.exported, input_spike_k=finest, spike_k=finest[0])
    if spiking and not trained:
        zone = DEAD_ZONE if spikes is None or spikes.dead_zone is None else spikes.dead_zone
        result.exported = replace(result.exported, dead_zone=zone)
    if fixed and limits == Limits():    # nothing is left to try
        return
    table = Table(result, quant, limits, embedding_quant, size)
    inputs = measured(result, layers, quant, ids, progress, level=table.level, rounding=len(table.quants) > 1)
    if spiking and not fixed:
        k = tuple(input.k for input in inputs)
        result.exported = replace(result.exported, spike_k=max(k), input_spike_k=k)
    table.settle(inputs)


def silent_zones(checkpoint: Checkpoint, ids: np.ndarray, share: float, k: float,
                 progress: Progress | None) -> tuple[float, ...]:
    """A dead zone for each input (as ModelConfig.input_dead_zone), so that `share` of the weights is silent at k, where
    samples `ids` lose the least by it."""
    spikes = Spikes(k)
    result = Calibrated(checkpoint, exported_config(checkpoint, "w8-spike", spikes), checkpoint.folder)
    choose(result, Layers(checkpoint), "w8-spike", ids, spikes, Limits(skip=share), "q8_0", lambda _: 0, progress)
    return result.exported.input_dead_zone


class Table:
    """The choices of every input, which are its formats times its shares of silence, and their sizes."""

    def __init__(self, result: Calibrated, quant: str, limits: Limits, embedding_quant: str,
                 size: Callable[[Calibrated], int]):
        self.result, self.budget, self.size = result, limits.budget, size
        open_formats = quant in FINER and (limits.budget is not None or limits.read is not None)
        self.quants = [quant, FINER[quant]] if open_formats else [quant]
        self.shares = np.zeros(1) if limits.skip is None and limits.read is None else SHARES
        linears = [linears_of(i, kind) for i in range(result.config.num_hidden_layers) for kind in INPUT_KINDS]
        self.open = {name for names in linears for name in names        # not: sizes that 4 bits cannot hold
                     if len({grid_of(result, name, quant) for quant in self.quants}) > 1}
        split = np.array([[np.sum([grid_bytes(result.shapes[n], grid_of(result, n, stored)) for n in names], axis=0)
                           for stored in self.quants] for names in linears])            # [inputs, formats, 2]
        weights = np.array([sum(prod(result.shapes[name]) for name in names) for names in linears], float)
        live = 1 - self.shares
        self.sizes: dict[str, np.ndarray] = {}          # each [inputs, formats, shares]
        self.limits: dict[str, float] = {}
        if limits.skip is not None:
            self.sizes["live"], self.limits["live"] = weights[:, None, None] * live, (1 - limits.skip) * weights.sum()
        if limits.read is not None:
            self.sizes["read"] = split[..., :1] * live + split[..., 1:]
            self.limits["read"] = limits.read - bytes_beside(result, quant, embedding_quant)
        if limits.budget is not None:
            self.sizes["file"] = split.sum(axis=-1, keepdims=True)
            self.limits["file"] = limits.budget - self.bytes_beside_linears(quant, limits.budget)
        self.sizes = {name: np.broadcast_to(size, (len(linears), len(self.quants), len(self.shares)))
                      for name, size in self.sizes.items()}
        if "read" in self.limits and (short := self.sizes["read"].min(axis=(1, 2)).sum() - self.limits["read"]) > 0:
            raise ExportError(f"{quant} reads {int(limits.read + short + 1):,} bytes a token at the most silence there "
                              f"is, found a limit of {limits.read:,}; allow more, or choose fewer bits for lm_head "
                              "(--embedding-quant)")
        self.level: int | None = None       # of SHARES, how much silence is tried
        if limits.skip is not None:
            self.level = int(np.searchsorted(SHARES, limits.skip))
        elif limits.read is not None:
            unread = 1 - self.limits["read"] / split[:, 0, 0].sum()
            self.level = int(np.searchsorted(SHARES, np.clip(unread, *TRIED)))

    def bytes_beside_linears(self, quant: str, budget: int) -> int:
        """What the smallest export has beside its linears. ExportError if it is beyond the budget."""
        exported = self.result.exported
        if exported.spike_k:
            self.result.exported = replace(exported, input_dead_zone=(LONGEST,) * len(exported.input_spike_k))
        smallest = self.size(self.result)
        self.result.exported = exported
        if smallest > budget:
            raise ExportError(f"the smallest export in {quant} takes {smallest:,} bytes, found a budget of {budget:,}; "
                              "allow more, or choose fewer bits for embeddings (--embedding-quant)")
        return smallest - int(self.sizes["file"][:, 0].sum())

    # --- choosing --------------------------------------------------------------------------------
    def settle(self, inputs: list[Input]) -> None:
        """Give `result` the best choice."""
        losses = np.zeros((len(inputs), len(self.quants), len(self.shares)))
        if len(self.quants) > 1:
            losses[:, 0] += np.array([max(input.by_rounding, LEAST_LOSS) for input in inputs])[:, None]
        if self.level is not None:
            losses += np.array([input.silence.losses for input in inputs])[:, None]
        if self.budget is None:
            return self.apply(inputs, self.cheapest(losses))
        file = self.sizes["file"].reshape(len(inputs), -1)
        best, least_loss = None, float("inf")
        for _ in range(ROUNDS):     # what a choice adds to the file is known but for padding and a few bytes of header
            choice = self.cheapest(losses)
            self.apply(inputs, choice)
            found, loss = self.size(self.result), float(sum_of(losses.reshape(file.shape), choice))
            if found <= self.budget and loss < least_loss:
                best, least_loss = choice, loss
            self.limits["file"] = max(sum_of(file, choice) + self.budget - found, file[:, 0].sum())
        if best is None:            # all in 4 bits: the budget has been seen to hold that
            self.limits["file"] = file[:, 0].sum()
            best = self.cheapest(losses)
        self.apply(inputs, best)

    def cheapest(self, losses: np.ndarray) -> np.ndarray:
        flat = losses.reshape(len(losses), -1)
        sizes = np.array([size.reshape(flat.shape) for size in self.sizes.values()]).reshape(-1, *flat.shape)
        return cheapest(flat, sizes, np.array([self.limits[name] for name in self.sizes]))

    def apply(self, inputs: list[Input], choice: np.ndarray) -> None:
        formats, silent = np.divmod(choice, len(self.shares))
        if self.level is not None:
            zones = tuple(float(np.float32(input.silence.zones[s])) for input, s in zip(inputs, silent, strict=True))
            self.result.exported = replace(self.result.exported, dead_zone=0.0, input_dead_zone=zones)
        self.result.quants = {name: self.quants[f] for input, f in zip(inputs, formats, strict=True) if f
                              for name in input.linears if name in self.open}


def summary_of(result: Calibrated, quant: str) -> dict[str, Any]:
    """What was chosen: how many inputs (a layer and a kind each) have their linears in each format, the least and the
    largest k and dead zone."""
    config = result.exported
    kinds = [linears_of(i, kind) for i in range(config.num_hidden_layers) for kind in INPUT_KINDS]
    formats = Counter(quant_of(result, names[0], quant) for names in kinds)
    chosen: dict[str, Any] = {"inputs": dict(formats.most_common())}
    if config.spike_k:
        zones = config.input_dead_zone or (config.dead_zone,)
        chosen |= {"k": [min(config.input_spike_k), max(config.input_spike_k)], "dead_zone": [min(zones), max(zones)]}
    return chosen
