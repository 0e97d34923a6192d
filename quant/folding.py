"""Scales that cost nothing at run time: a channel of an input made louder, the weights that read it smaller.

What is silent, and how finely a count is rounded, depends on |x| alone; how finely a group of weights, on the largest
of them. Once every channel is as loud as what it adds to the outputs, x_j * ||w_j||, silence falls on those that matter
least (WINA, TEAL), and the weights of a group are of one size (AWQ). The factors go into what makes the input: a norm's
weight, or the rows of up_proj. Keys, values and recurrent states are left alone, so a state goes on under any export.
"""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# kind of input -> what reads it, by the names within a layer. o_proj's cannot be folded: it comes from the state.
READERS = {"attention in": ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.gk_proj", "attn.gk_proj.0"),
           "FFN in": ("mlp.gate_proj", "mlp.up_proj"), "FFN down": ("mlp.down_proj",)}
MAKER = {"attention in": "attn_norm.weight", "FFN in": "mlp_norm.weight", "FFN down": "mlp.up_proj.weight"}


def folded(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of one layer, by their names within it ("attn.q_proj.weight" [out, in], ...), the same function."""
    w = dict(weights)
    for kind in READERS:
        factor, maker = loudness(w, kind), MAKER[kind]
        w[maker] = (w[maker].T * factor).T
        for name in readers_of(w, kind):
            w[name] = w[name] / factor
    return w


def readers_of(weights: Mapping[str, np.ndarray], kind: str) -> list[str]:
    return [f"{reader}.weight" for reader in READERS[kind] if f"{reader}.weight" in weights]


def loudness(weights: Mapping[str, np.ndarray], kind: str) -> np.ndarray:
    """What folding makes the channels of an input louder by: the norm of the weights that read each, over all outputs,
    as a multiple of their geometric mean: [in] float32."""
    read = [weights[name] for name in readers_of(weights, kind)]
    norms = np.sqrt(sum(np.square(w, dtype=np.float64).sum(axis=0) for w in read))
    largest = norms.max()
    if not largest > 0:
        return np.ones(len(norms), np.float32)
    logs = np.log(np.maximum(norms, 1e-3 * largest))
    return np.exp(logs - logs.mean()).astype(np.float32)
