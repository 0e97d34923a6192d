"""Which linears of an export spike, and with which weights."""
from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sbedge.checkpoint import Checkpoint
from sbedge.config import ModelConfig
from sbedge.errors import ExportError
from sbedge.quant.event_layout import W4, W4_BLOCK, dequantize_w4, pack_nibbles, quantize_w4
from sbedge.quant.gptq import INT8_ZERO
from sbedge.quant.int8_groups import dequantize_int8_groups, quantize_int8_groups

from .calibrated import Calibrated

# Of a checkpoint that was not trained to spike: every large linear. The low-rank gate stays float32, for it decides
# how long the model remembers.
EVENT_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEFAULT_K = 3.0         # as W8ASpike was trained to
W4_GROUP = 64           # inputs that share a scale and a zero point: 4.375 bits a weight, fewer than Q4_0


@dataclass(frozen=True)
class Spikes:
    """How activations spike: threshold = mean|x| / k; channels with |x| < dead_zone * mean|x| are silent.
    None: k = 3 and no dead zone, or what calibration chooses for each input."""

    k: float | None = None
    dead_zone: float | None = None

    def __post_init__(self) -> None:
        if self.k is not None and not 0.1 <= self.k <= 1000:
            raise ExportError(f"spike k is {self.k:g}, expected 0.1 to 1000")
        if self.dead_zone is not None and not 0 <= self.dead_zone <= 100:
            raise ExportError(f"dead zone is {self.dead_zone:g}, expected 0 to 100 (times the mean of |x|)")


def exported_config(checkpoint: Checkpoint, quant: str, spikes: Spikes | None) -> ModelConfig:
    """The model an export holds. A checkpoint that was trained to spike does so as it was; W8ASpike has k = 3."""
    if isinstance(checkpoint, Calibrated):
        return checkpoint.exported
    config = checkpoint.config
    if spikes and not quant.endswith("-spike"):
        raise ExportError(f"quant {quant} has no spikes to set; choose w8-spike or w4-spike")
    if not quant.endswith("-spike"):
        return config
    if spikes is None and checkpoint.trained_spikes:
        return checkpoint.trained_spikes
    spikes = spikes or Spikes()
    trained = checkpoint.trained_spikes
    k, dead_zone = spikes.k or (trained.spike_k if trained else DEFAULT_K), spikes.dead_zone or 0.0
    if checkpoint.is_w8aspike and quant != "w8-spike":
        raise ExportError(f"{checkpoint.folder}: a W8ASpike checkpoint has 8-bit weights, which {quant} would lose; "
                          "use w8-spike, which is exact")
    if checkpoint.is_w8aspike:
        if k != config.spike_k:
            raise ExportError(f"{checkpoint.folder}: W8ASpike was trained with spike k {config.spike_k:g}, "
                              f"found {k:g}; leave the option out")
        return replace(config, dead_zone=dead_zone)
    return replace(config, spike_k=k, spike_down=True, dead_zone=dead_zone)


def event_layout(checkpoint: Checkpoint, name: str, quant: str) -> str | None:
    """The event layout ("w8" or "w4") in which an export in `quant` stores this tensor; None: in none.

    4 bits need a multiple of 64 outputs and 64 inputs; a linear of other sizes is stored in 8.
    """
    if not quant.endswith("-spike") or not is_event_linear(checkpoint, name):
        return None
    out, inputs = checkpoint.shapes[name]
    return "w4" if quant == "w4-spike" and out % W4_BLOCK == 0 and inputs % W4_GROUP == 0 else "w8"


def is_event_linear(checkpoint: Checkpoint, name: str) -> bool:
    """Whether this tensor is the weight of a linear whose input spikes."""
    if checkpoint.is_w8aspike:
        return checkpoint.is_quantized(name)
    return name.endswith(".weight") and name.split(".")[-2] in EVENT_LINEARS


def weight_codes(checkpoint: Checkpoint, name: str, start: int = 0,
                 stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Integer codes [out, in] and scales [out, ceil(in/128)] of outputs [start, stop): the published ones, calibrated
    ones, or rounded to int8 here."""
    if isinstance(checkpoint, Calibrated) and (levels := checkpoint.levels(name, start, stop)):
        return levels.levels.T.astype(np.int32) - INT8_ZERO, levels.scales.T
    if checkpoint.is_w8aspike:
        return checkpoint.weight_codes(name, start, stop)
    return quantize_int8_groups(checkpoint.weight(name, start, stop))


def weight_nibbles(checkpoint: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> W4:
    """The weight of outputs [start, stop) in 4 bits with zero points: calibrated, or rounded here."""
    if isinstance(checkpoint, Calibrated) and (levels := checkpoint.levels(name, start, stop)):
        return W4(pack_nibbles(levels.levels), levels.scales.astype(np.float16), levels.zeros)
    return quantize_w4(checkpoint.weight(name, start, stop), W4_GROUP, zeros=True)


def event_weight(checkpoint: Checkpoint, name: str, quant: str = "w8-spike") -> np.ndarray:
    """The float32 weight an event export computes with: what a Reference of that export is given."""
    layout = event_layout(checkpoint, name, quant)
    if layout is None:
        return checkpoint.weight(name)
    if layout == "w4":
        return dequantize_w4(weight_nibbles(checkpoint, name))
    return dequantize_int8_groups(*weight_codes(checkpoint, name))
