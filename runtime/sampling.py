"""Choosing the next token from the logits."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sbedge.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. The filters act in this order, as in llama.cpp:

    logit_bias, penalties, top_k, top_p, min_p, temperature. top_p and min_p therefore see the
    probabilities at temperature 1. Out-of-range options raise InputError.
    """

    temperature: float = 0.0         # 0: always the most likely token (the lowest id among equals)
    top_k: int = 0                   # keep the k most likely; 0: all
    top_p: float = 1.0               # keep the fewest tokens whose probabilities reach this sum; 1: all
    min_p: float = 0.0               # drop those less likely than this share of the best; 0: none
    repetition_penalty: float = 1.0  # divides positive logits of recent tokens, multiplies negative ones
    presence_penalty: float = 0.0    # subtracted from the logit of every recent token
    penalty_window: int = 64         # how many tokens back are recent, the prompt's included; -1: all
    seed: int | None = None          # None: different each time
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit; -inf bans
    logprobs: int = 0                # report this many of the most likely tokens beside the chosen one

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, 100)
        _check("top_k", self.top_k, 0, 2**31, whole=True)
        _check("top_p", self.top_p, 0, 1, open_low=True)
        _check("min_p", self.min_p, 0, 1)
        _check("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        _check("presence_penalty", self.presence_penalty, -100, 100)
        _check("penalty_window", self.penalty_window, -1, 2**31, whole=True)
        _check("logprobs", self.logprobs, 0, 1000, whole=True)
        if self.seed is not None:
            _check("seed", self.seed, 0, 2**64 - 1, whole=True)
        for id, bias in self.logit_bias.items():
            _check("logit_bias token id", id, 0, 2**31, whole=True)
            if isinstance(bias, bool) or not isinstance(bias, (int, float)) or math.isnan(bias) or bias == math.inf:
                raise InputError(f"logit_bias[{id}] is {bias!r}, expected a number or -inf")


@dataclass(frozen=True)
class Sample:
    """A chosen token. Log-probabilities are those of the model: the softmax of the unmodified logits."""

    id: int
    logprob: float
    top: list[tuple[int, float]]  # the `logprobs` most likely (id, logprob), best first


class Sampler:
    """Draws tokens by one `Sampling`; owns the random generator (NumPy's PCG64), whose state can be kept."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def sample(self, logits: np.ndarray, history: Sequence[int] | np.ndarray = ()) -> Sample:
        """Choose from `logits` [V] float32, penalizing the tokens of `history` (the latest last).

        Raises InputError if no choice can be made: NaN or infinite logits, a bias for an id past V.
        """
        logits = np.asarray(logits, dtype=np.float32)
        best = float(logits.max(initial=-np.inf))
        if not math.isfinite(best):  # max() is NaN if any logit is
            raise InputError("the model's logits hold NaN or infinity: the model file is damaged, or its weights "
                             "overflow in this number format")
        s = self.sampling
        adjusted = self._adjust(logits, history)
        chosen = int(adjusted.argmax()) if s.temperature == 0 else self._draw(adjusted)
        log_norm = best + math.log(float(np.exp(logits - best).sum(dtype=np.float64)))
        top = [(int(id), float(logits[id]) - log_norm) for id in _largest(logits, s.logprobs)]
        return Sample(chosen, float(logits[chosen]) - log_norm, top)

    def get_state(self) -> dict[str, Any]:
        """The random generator's state, which fits in JSON: drawing continues from here after set_state."""
        return dict(self._random.bit_generator.state)

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a `get_state`. Raises InputError if it is none."""
        try:
            self._random.bit_generator.state = dict(state)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise InputError("the saved random generator is damaged; start without it") from None

    def _adjust(self, logits: np.ndarray, history: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits [V] after bias and penalties."""
        s = self.sampling
        penalized = s.penalty_window != 0 and (s.repetition_penalty != 1 or s.presence_penalty != 0)
        if not s.logit_bias and not (penalized and len(history)):
            return logits
        adjusted = logits.copy()
        for id, bias in s.logit_bias.items():
            if id >= len(logits):
                raise InputError(f"logit_bias names token id {id}, expected less than the vocabulary's {len(logits)}")
            adjusted[id] += bias
        if penalized and len(history):
            recent = np.unique(np.asarray(history if s.penalty_window < 0 else history[-s.penalty_window :]))
            values = adjusted[recent]
            values = np.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
            adjusted[recent] = values - np.float32(s.presence_penalty)
        if not np.isfinite(adjusted.max()):
            raise InputError("logit_bias bans every token")
        return adjusted

    def _draw(self, logits: np.ndarray) -> int:
        """Draw one id at random after top-k, top-p, min-p and temperature."""
        s = self.sampling
        ids: np.ndarray | None = None  # candidates, best first; None: all, in order of id
        if 0 < s.top_k < len(logits):
            ids = _largest(logits, s.top_k)
        if s.top_p < 1:
            ids = _nucleus(logits, s.top_p) if ids is None else ids[: _reach(_softmax(logits[ids]), s.top_p)]
        kept = logits if ids is None else logits[ids]
        best = kept.max()
        if s.min_p > 0:
            strong = np.flatnonzero(kept >= best + math.log(s.min_p))
            ids, kept = strong if ids is None else ids[strong], kept[strong]
        reached = _softmax(kept / np.float32(s.temperature)).cumsum()
        drawn = int(np.searchsorted(reached, self._random.random() * reached[-1], side="right"))
        drawn = min(drawn, len(kept) - 1)
        return drawn if ids is None else int(ids[drawn])


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float64, so that their sums are exact enough to compare with top_p."""
    exps = np.exp(logits.astype(np.float64) - float(logits.max()))
    return exps / exps.sum()


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, best first, equals by index; sorts only those."""
    count = min(count, len(values))
    if count == 0:
        return np.empty(0, np.intp)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > threshold)
    ids = np.concatenate([above, np.flatnonzero(values == threshold)[: count - len(above)]])
    return ids[np.lexsort((ids, -values[ids]))]


def _reach(probabilities: np.ndarray, top_p: float) -> int:
    """How many of the leading probabilities are needed for their sum to reach top_p."""
    return min(int(np.searchsorted(probabilities.cumsum(), top_p)) + 1, len(probabilities))


def _nucleus(logits: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest ids whose probabilities reach top_p, best first. Looks at a few hundred before sorting all."""
    probabilities = _softmax(logits)
    for count in (256, 8192, len(logits)):
        ids = _largest(logits, count)
        if len(ids) == len(logits) or probabilities[ids].sum() >= top_p:
            break
    return ids[: _reach(probabilities[ids], top_p)]


def _check(name: str, value: Any, low: float, high: float, *, whole: bool = False, open_low: bool = False) -> None:
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    fits = isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
    if not fits or (open_low and value == low):
        kind = "a whole number" if whole else "a number"
        bounds = f"above {low} and up to {high}" if open_low else f"from {low} to {high}"
        raise InputError(f"{name} is {value!r}, expected {kind} {bounds}")
