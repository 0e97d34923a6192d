"""Scales that cost nothing at run time: a channel of an input made louder, the weights that read it smaller.

What is silent, and how finely a count is rounded, depends on |x| alone; how finely a group of weights, on the largest
of them. Once every channel is as loud as what it adds to the outputs, x_j * ||w_j||, silence falls on those that matter
least (WINA, TEAL), and the weights of a group are of one size (AWQ). The factors go into what makes the input: a norm's
weight, or the rows of up_proj. Keys, values and recurrent states are left alone, so a state goes on under any export.
"""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sbedge.config import ModelConfig

POWER = 1.0


def folded(weights: Mapping[str, np.ndarray], config: ModelConfig, power: float = POWER) -> dict[str, np.ndarray]:
    """The tensors of one layer, by their names within it ("attn.q_proj.weight" [out, in], ...), the same function."""
    w = dict(weights)
    for norm, readers in (("attn_norm.weight", ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.gk_proj",
                                                "attn.gk_proj.0")),
                          ("mlp_norm.weight", ("mlp.gate_proj", "mlp.up_proj"))):
        names = [f"{reader}.weight" for reader in readers if f"{reader}.weight" in w]
        factor = loudness([w[name] for name in names], power)
        w[norm] = w[norm] * factor
        for name in names:
            w[name] = w[name] / factor
    factor = loudness([w["mlp.down_proj.weight"]], power)
    w["mlp.up_proj.weight"] = w["mlp.up_proj.weight"] * factor[:, None]
    w["mlp.down_proj.weight"] = w["mlp.down_proj.weight"] / factor
    return w


def loudness(weights: list[np.ndarray], power: float) -> np.ndarray:
    """||w_j|| ** power over all outputs of `weights` [out, in] together, their geometric mean 1: [in] float32."""
    norms = np.sqrt(sum(np.square(w, dtype=np.float64).sum(axis=0) for w in weights))
    largest = norms.max()
    if not largest > 0:
        return np.ones(len(norms), np.float32)
    logs = power * np.log(np.maximum(norms, 1e-3 * largest))
    return np.exp(logs - logs.mean()).astype(np.float32)
