"""Training text that the source model writes itself: chats and continued prose, as token ids.

Many sequences advance together (`forward_batch` reads the weights once for all), each with a state of its own.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from sbedge.runtime.chat_template import chat_parts
from sbedge.runtime.engine import Engine, forward_batch
from sbedge.runtime.tokenizer import Tokenizer
from sbedge.state import State

from .prompts import FOLLOW_UPS, TOPICS, chat_prompts, openings

TEMPERATURE = 0.9
MIN_P = 0.03            # tokens less likely than this share of the best are never drawn
MARK = "\ufffdmessage\ufffd"    # stands for a message in a template that is rendered once


@dataclass
class Dialogue:
    """A sequence being written: ids so far, room left for this reply, turns to come."""

    ids: list[int]
    turns: int              # replies to write, this one included; 0: plain text
    state: State | None = None
    read: int = 0           # ids the state has seen
    reply: int = 0          # tokens of the reply so far


@dataclass
class Writer:
    """Writes sequences of up to `length` tokens with `engine`; the same seed gives the same ones.

    share_chat   of the sequences that are chats; the rest is prose (all of it where the model has no chat template)
    temperature  of what is drawn: lower keeps to what is likeliest
    """

    engine: Engine
    tokenizer: Tokenizer
    seed: int = 0
    length: int = 512
    sessions: int = 32
    share_chat: float = 0.7
    topics: tuple[str, ...] = TOPICS
    temperature: float = TEMPERATURE
    random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self._chats = chat_prompts(self.random, self.topics)
        self._prose = openings(self.random, self.topics)
        if self.tokenizer.chat_template is None:
            self.share_chat = 0.0
        else:
            asked = chat_parts(self.tokenizer, [{"role": "user", "content": MARK}])
            self._first = asked
            whole = chat_parts(self.tokenizer, [{"role": "user", "content": MARK},
                                                {"role": "assistant", "content": MARK},
                                                {"role": "user", "content": MARK}])
            self._next = whole[len(asked):]     # what follows a reply: its end, the next question, an opening
            self._turns = 3 if any(isinstance(part, int) for part in self._next) else 1     # most in a chat

    def write(self, tokens: int,
              progress: Callable[[int, int], None] | None = None) -> Iterator[tuple[bool, list[int]]]:
        """(is a chat, ids) of finished sequences, until they hold `tokens` ids in all."""
        done = 0
        slots = [self._begin() for _ in range(self.sessions)]
        while done < tokens:
            for i, slot in enumerate(slots):
                while self._finished(slot):
                    if slot.turns > 1 and len(slot.ids) < self.length - 64:
                        self._ask_again(slot)
                        break
                    done += len(slot.ids)
                    yield slot.turns > 0, slot.ids
                    if progress:
                        progress(min(done, tokens), tokens)
                    slots[i] = slot = self._begin()
            self._step(slots)

    def _begin(self) -> Dialogue:
        if self.random.random() < self.share_chat:
            ids = self._encode(self._first, next(self._chats))
            return Dialogue(ids, min(int(self.random.integers(1, 4)), self._turns))
        return Dialogue(self.tokenizer.encode(next(self._prose)), 0)

    def _encode(self, parts: list[str | int], message: str) -> list[int]:
        return self.tokenizer.encode_parts([p.replace(MARK, message) if isinstance(p, str) else p for p in parts])

    def _ask_again(self, slot: Dialogue) -> None:
        parts = list(self._next)
        at = next(i for i, p in enumerate(parts) if isinstance(p, int))
        rest = parts[at + (slot.ids[-1] == parts[at]):]
        slot.ids += self._encode(rest, str(self.random.choice(FOLLOW_UPS)))
        slot.turns, slot.reply = slot.turns - 1, 0

    def _finished(self, slot: Dialogue) -> bool:
        return len(slot.ids) >= self.length or (slot.reply > 0 and slot.ids[-1] in self.tokenizer.eos_ids)

    def _step(self, slots: list[Dialogue]) -> None:
        """One more token for each."""
        for slot in slots:
            if slot.state is None:
                slot.state = self.engine.new_state()
            if slot.read < len(slot.ids) - 1:
                self.engine.forward(slot.ids[slot.read:-1], slot.state, logits="none")
                slot.read = len(slot.ids) - 1
        states = [slot.state for slot in slots if slot.state is not None]
        logits = forward_batch(self.engine, [slot.ids[-1] for slot in slots], states)
        for slot, id in zip(slots, self._draw(logits), strict=True):
            slot.ids.append(int(id))
            slot.read += 1
            slot.reply += 1

    def _draw(self, logits: np.ndarray) -> np.ndarray:
        """One id for each row of logits [N, V]."""
        weights = np.exp((logits - logits.max(1, keepdims=True)) / np.float32(self.temperature))
        weights[weights < MIN_P] = 0
        sums = np.cumsum(weights, axis=1, dtype=np.float64)
        return (sums < (self.random.random(len(logits)) * sums[:, -1])[:, None]).sum(1).clip(max=logits.shape[1] - 1)
