"""The parts of a streamed reply: pieces, stop strings, timings. `Session` puts them together."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sbedge.errors import InputError

from .detokenizer import StreamDecoder

Finish = Literal["stop", "eos", "length"]


@dataclass(frozen=True)
class Piece:
    """A stretch of a reply: whole characters that no stop string can take back, and their tokens.

    The texts of all pieces are the reply; their ids are all tokens drawn, an end token included.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]                            # one for each id, natural logarithm
    top_logprobs: tuple[list[tuple[int, float]], ...] = ()  # for each id the likeliest (id, logprob)
    finish: Finish | None = None                           # set on the last piece, which may have no text


class ReplyText:
    """Text of a reply as it becomes final, token by token."""

    def __init__(self, decoder: StreamDecoder, stop: Sequence[str]) -> None:
        if isinstance(stop, str):
            stop = (stop,)
        if not all(isinstance(text, str) and text for text in stop):
            raise InputError(f"stop is {list(stop)!r}, expected texts that are not empty")
        self._decoder = decoder
        self._stop = tuple(stop)
        self._held = ""  # could be the beginning of a stop string

    def push(self, id: int) -> tuple[str, bool]:
        """Text that is final now, and whether a stop string was reached; the stop string is left out."""
        text = self._held + self._decoder.push(id)
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        text, self._held = self._held + self._decoder.flush(), ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class Timings:
    """Work done by a session. Prefill: tokens given; decode: tokens drawn and fed back one by one."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0
