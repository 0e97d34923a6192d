"""The contract between a model file and everything that uses it: token ids in, logits out."""
from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from sbedge.config import ModelConfig
from sbedge.errors import InputError
from sbedge.state import State

Logits = Literal["last", "all", "none"]


class Engine(Protocol):
    """Knows token ids and arrays; nothing of text."""

    config: ModelConfig
    fingerprint: str | None     # of the source checkpoint: states move between engines over the same one

    def new_state(self) -> State:
        """The state before the first token."""

    def forward(self, ids: Sequence[int] | np.ndarray, state: State, *, logits: Logits = "last") -> np.ndarray | None:
        """Advance `state` in place by len(ids) tokens.

        Returns float32 logits [1, V] ("last"), [n, V] ("all") or None ("none"). Any chunking of the same
        ids gives the same result. `state.last_logits` is the last row, or None after "none".
        Raises InputError if `ids` is empty or holds an id outside the vocabulary; StateError if the state
        belongs to a model of other sizes. In both cases the state is untouched.
        """


def forward_batch(engine: Engine, ids: Sequence[int] | np.ndarray, states: Sequence[State]) -> np.ndarray:
    """Advance each of several states of one model by one token: ids [N] -> float32 logits [N, V].

    The result is what each would give alone. An engine with a `forward_batch` of its own reads the weights once for
    all; with any other one this takes as long as one after the other.
    Raises InputError if counts differ or a state appears twice, and what `Engine.forward` raises; no state moves then.
    """
    own = getattr(engine, "forward_batch", None)
    if own is not None:
        return own(ids, states)
    return forward_each(engine, checked_batch(ids, states, engine.config), states)


def forward_each(engine: Engine, ids: np.ndarray, states: Sequence[State]) -> np.ndarray:
    rows = [engine.forward(ids[i:i + 1], state) for i, state in enumerate(states)]
    return np.concatenate([row for row in rows if row is not None])


def checked_batch(ids: Sequence[int] | np.ndarray, states: Sequence[State], config: ModelConfig) -> np.ndarray:
    """`ids` as int64 [N], one for each state; InputError if they do not match or a state appears twice."""
    array = checked_ids(ids, config)
    if len(array) != len(states):
        raise InputError(f"a batch takes one token for each state, found {len(array)} tokens for {len(states)} states")
    if len({id(state) for state in states}) != len(states):
        raise InputError("a state appears twice in a batch; give each sequence its own (State.copy)")
    return array


def checked_ids(ids: Sequence[int] | np.ndarray, config: ModelConfig) -> np.ndarray:
    """`ids` as int64 [n]; InputError if empty, not whole numbers, or outside the vocabulary."""
    array = np.asarray(ids)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"expected a non-empty list of token ids, found shape {list(array.shape)}")
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"token ids must be whole numbers, found {array.dtype}")
    outside = array[(array < 0) | (array >= config.vocab_size)]
    if outside.size:
        raise InputError(f"token id {outside[0]} is outside the model's vocabulary of {config.vocab_size}")
    return array.astype(np.int64)


def default_threads() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
