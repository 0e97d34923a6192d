"""How outputs of two implementations are compared: closely, and for spiking models by distribution too."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sbedge.runtime.engine import Engine
from sbedge.state import State


def run(engine: Engine, ids: Sequence[int] | np.ndarray, sizes: Sequence[int] = (),
        state: State | None = None) -> tuple[np.ndarray, State]:
    """All logits [n, V] of `ids` fed in chunks of the given sizes (the rest at once), and the state after them."""
    state = state or engine.new_state()
    rows, at = [], 0
    for size in [*sizes, len(ids)]:
        chunk = ids[at:at + size]
        if len(chunk):
            rows.append(engine.forward(chunk, state, logits="all"))
        at += len(chunk)
    return np.concatenate(rows), state


def kl_divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Mean KL(expected || found) in nats over rows of logits."""
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in
            (expected.astype(np.float64), found.astype(np.float64)))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def assert_close(expected: np.ndarray, found: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def assert_same_model(expected: np.ndarray, found: np.ndarray, tolerance: float = 1e-3) -> None:
    """The rule for spiking models: a count is round(x / threshold), so a last-bit difference may flip one.

    A flipped count moves all later logits a little, therefore: most entries within `tolerance`, the
    likeliest token the same almost everywhere, and the distributions the same.
    """
    assert (np.abs(expected - found) <= tolerance).mean() >= 0.9
    assert (expected.argmax(-1) == found.argmax(-1)).mean() >= 0.95
    assert kl_divergence(expected, found) < 1e-3


def assert_same_spiking(reference: Engine, engine: Engine, sizes: Sequence[int] = (), sequences: int = 8) -> None:
    """The same rule over short independent sequences: most have no flipped count and agree closely all through."""
    close, divergences = 0, []
    for seed in range(sequences):
        ids = np.random.default_rng(seed).integers(0, reference.config.vocab_size, 16)
        expected, found = run(reference, ids)[0], run(engine, ids, sizes)[0]
        close += bool(np.abs(expected - found).max() < 1e-3)
        divergences.append(kl_divergence(expected, found))
    assert close >= 0.6 * sequences, f"{close} of {sequences} sequences agree"
    assert np.median(divergences) < 1e-6
    assert max(divergences) < 0.05
