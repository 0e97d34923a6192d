"""How well a model predicts a text, as a stream: the state is never reset, and memory does not grow with the text."""
from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from sbedge.errors import ModelFileError
from sbedge.runtime.engine import Engine

from .report import Report, compare, log_softmax

CHUNK = 512             # tokens fed at a time, fewer where the vocabulary is large
LOGITS_BYTES = 1 << 26  # most memory that the logits of a chunk take
ROWS = 16               # rows of logits scored at a time: they become float64


def chunk_tokens(vocab_size: int) -> int:
    """Tokens to feed at a time."""
    return max(1, min(CHUNK, LOGITS_BYTES // (4 * vocab_size)))


@dataclass
class RunningMean:
    """A mean and its standard error, of values that come a few at a time."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: np.ndarray) -> None:
        self.count += values.size
        self.total += float(values.sum(dtype=np.float64))
        self.squares += float(np.square(values, dtype=np.float64).sum())

    @property
    def value(self) -> float:
        return self.total / self.count

    @property
    def stderr(self) -> float:
        """As if the values were independent; those of neighbouring tokens nearly are."""
        if self.count < 2:
            return math.inf
        variance = (self.squares - self.total ** 2 / self.count) / (self.count - 1)
        return math.sqrt(max(variance, 0.0) / self.count)


class Predictions:
    """One engine reading a text: the mean of -log p(token | all before it) in nats, and the time it takes."""

    def __init__(self, engine: Engine, name: str):
        self.engine, self.name = engine, name
        self.state = engine.new_state()
        self.nll = RunningMean()
        self.seconds = 0.0
        self._last: np.ndarray | None = None        # logits [1, V] for the token to come

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Feed ids [n]; their logits [n, V], and the nats of each id that had any before it: [n], at first [n - 1]."""
        start = time.perf_counter()
        logits = self.engine.forward(ids, self.state, logits="all")
        self.seconds += time.perf_counter() - start
        assert logits is not None
        before = [] if self._last is None else [nats(self._last, ids[:1])]
        scored = np.concatenate([*before, nats(logits[:-1], ids[1:])])
        if not (np.isfinite(scored).all() and np.isfinite(logits[-1]).all()):
            raise ModelFileError(f"{self.name}: what it predicts around token {self.state.position} are no finite "
                                 "numbers; the file may be damaged, export or download it again")
        self._last = logits[-1:].copy()
        self.nll.add(scored)
        return logits, scored

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll.value))

    @property
    def perplexity_stderr(self) -> float:
        return self.perplexity * self.nll.stderr

    @property
    def tokens_per_second(self) -> float:
        return self.state.position / self.seconds


class Comparison:
    """Two engines reading the same text side by side."""

    def __init__(self, model: Predictions, other: Predictions):
        self.model, self.other = model, other
        self.difference = RunningMean()     # nats a token that the model needs more than the other
        self.report: Report | None = None   # KL(other || model)

    def read(self, ids: np.ndarray) -> None:
        logits, nats_of_model = self.model.read(ids)
        exact, nats_of_other = self.other.read(ids)
        self.difference.add(nats_of_model - nats_of_other)
        for rows in _slices(len(ids)):
            part = compare(exact[rows], logits[rows])
            self.report = part if self.report is None else self.report.merged(part)


def nats(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """-log p of each id under its row of logits [n, V]: float64 [n]."""
    parts = [-np.take_along_axis(log_softmax(logits[rows]), ids[rows, None], -1)[:, 0] for rows in _slices(len(ids))]
    return np.concatenate(parts) if parts else np.empty(0)


def read_all(reader: Predictions | Comparison, chunks: Iterable[np.ndarray]) -> None:
    for ids in chunks:
        reader.read(ids)


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS))
