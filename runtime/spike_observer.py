"""Watches a model spike: the reference, over the weights of any model, tells the counts of every linear's input.

The reference is what the engines are tested against, so its counts are theirs. It is exact, and slow.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from sbedge.config import INPUT_KINDS, ModelConfig
from sbedge.reference import Reference

KINDS = tuple(INPUT_KINDS)
_KIND_OF = {linears[0]: kind for kind, linears in INPUT_KINDS.items()}      # the first that reads it tells

See = Callable[[int, str, np.ndarray], None]    # (layer, kind, counts [n, channels])


class SpikeObserver(Reference):
    """An engine (see runtime/engine.py) that calls `see` with all counts of an input when they are used."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, np.ndarray], see: See):
        self.config, self.weights, self.see = config, weights, see
        self.fingerprint = None

    def encode(self, name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts, thresholds = super().encode(name, x)
        _, _, layer, _, projection = name.split(".")
        if projection in _KIND_OF:
            self.see(int(layer), _KIND_OF[projection], counts)
        return counts, thresholds


def spiking_config(config: ModelConfig, k: float, dead_zone: float = 0.0) -> ModelConfig:
    """`config` with every large linear's input spiked, as `w8-spike` exports of a base checkpoint have it."""
    return replace(config, spike_k=k, spike_down=True, dead_zone=dead_zone, input_spike_k=(), input_dead_zone=())


def fan_outs(config: ModelConfig, layer: int) -> dict[str, int]:
    """Outputs of all linears that read a kind of input: the weights that a silent channel spares, by kind.

    The low-rank gate of base checkpoints does not spike and is not counted.
    """
    D, F, kv = config.hidden_size, config.intermediate_size, config.kv_dim
    gate = kv if not (config.gate_rank or config.is_window_layer(layer)) else 0
    outs = {"attention in": D + 2 * kv + gate, "attention out": D, "FFN in": 2 * F, "FFN down": D}
    return {kind: out for kind, out in outs.items() if kind != "FFN down" or config.spike_down}


def widths(config: ModelConfig) -> dict[str, int]:
    """Channels of each kind of input."""
    return {kind: config.intermediate_size if kind == "FFN down" else config.hidden_size for kind in KINDS}
