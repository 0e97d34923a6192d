"""Training text that the source model writes itself: chats and continued prose, as token ids.

Many sequences advance together (`forward_batch` reads the weights once for all), each with a state of its own.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from sbedge.runtime.chat_template import chat_parts
from sbedge.runtime.engine import Engine, forward_batch
from sbedge.runtime.tokenizer import Tokenizer
from sbedge.state import State

from .loops import TIMES, loop
from .prompts import FOLLOW_UPS, TOPICS, chat_prompts, openings

MIN_P = 0.03            # tokens less likely than this share of the best are never drawn
MARK = "\ufffdmessage\ufffd"    # stands for a message in a template that is rendered once
ASKING = 1.0            # temperature of a question that the model thinks up
QUESTION = 96           # most tokens of it


@dataclass
class Dialogue:
    """A sequence being written: ids so far, room left for this reply, turns to come."""

    ids: list[int]
    turns: int              # replies to write, this one included; 0: plain text
    temperature: float
    state: State | None = None
    read: int = 0           # ids the state has seen
    reply: int = 0          # tokens of the reply so far
    asking: bool = False    # what it writes is the first question yet
    looped: bool = False    # it came to say one piece over and over


@dataclass
class Writer:
    """Writes sequences of up to `length` tokens with `engine`; the same seed gives the same ones.

    share_chat   of the sequences that are chats; the rest is prose (all of it where the model has no chat template)
    share_asked  of the chats whose first question the model thinks up itself; others are about `topics`
    temperature  lowest and highest; every sequence has its own
    """

    engine: Engine
    tokenizer: Tokenizer
    seed: int = 0
    length: int = 512
    sessions: int = 32
    share_chat: float = 0.7
    share_asked: float = 0.0
    topics: tuple[str, ...] = TOPICS
    temperature: tuple[float, float] = (0.9, 0.9)
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
            at = next((i for i, part in enumerate(asked) if isinstance(part, str) and MARK in part), len(asked))
            before, mark, after = str(asked[at]).partition(MARK) if at < len(asked) else ("", "", "")
            self._before, self._after = [*asked[:at], before], [after, *asked[at + 1:]]
            if not mark or not self._encode(self._before, ""):
                self.share_asked = 0.0      # nothing before a question from which one could be thought up
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
                    if slot.asking:
                        self._asked(slot)
                        break
                    if slot.turns > 1 and not slot.looped and len(slot.ids) < self.length - 64:
                        self._ask_again(slot)
                        break
                    done += len(slot.ids)
                    yield slot.turns > 0, slot.ids
                    if progress:
                        progress(min(done, tokens), tokens)
                    slots[i] = slot = self._begin()
            self._step(slots)

    def _begin(self) -> Dialogue:
        temperature = float(self.random.uniform(*self.temperature))
        if self.random.random() < self.share_chat:
            turns = min(int(self.random.integers(1, 4)), self._turns)
            if self.random.random() < self.share_asked:
                return Dialogue(self._encode(self._before, ""), turns, temperature, asking=True)
            return Dialogue(self._encode(self._first, next(self._chats)), turns, temperature)
        return Dialogue(self.tokenizer.encode(next(self._prose)), 0, temperature)

    def _asked(self, slot: Dialogue) -> None:
        """The question stands: what a template puts between it and the reply."""
        if slot.ids[-1] in self.tokenizer.eos_ids:
            slot.ids.pop()
        slot.ids += self._encode(self._after, "")
        slot.asking, slot.reply = False, 0

    def _encode(self, parts: list[str | int], message: str) -> list[int]:
        return self.tokenizer.encode_parts([p.replace(MARK, message) if isinstance(p, str) else p for p in parts])

    def _ask_again(self, slot: Dialogue) -> None:
        parts = list(self._next)
        at = next(i for i, p in enumerate(parts) if isinstance(p, int))
        rest = parts[at + (slot.ids[-1] == parts[at]):]
        slot.ids += self._encode(rest, str(self.random.choice(FOLLOW_UPS)))
        slot.turns, slot.reply = slot.turns - 1, 0

    def _finished(self, slot: Dialogue) -> bool:
        return (len(slot.ids) >= self.length or slot.looped or (slot.asking and slot.reply >= QUESTION)
                or (slot.reply > 0 and slot.ids[-1] in self.tokenizer.eos_ids))

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
        for slot, row in zip(slots, logits, strict=True):
            slot.ids.append(self._draw(row, ASKING if slot.asking else slot.temperature))
            slot.read += 1
            slot.reply += 1
            slot.looped = not slot.asking and loop(slot.ids[-slot.reply:], TIMES + 1) > 0

    def _draw(self, logits: np.ndarray, temperature: float) -> int:
        """An id for logits [V]."""
        best = logits.max()
        likely = np.flatnonzero(logits >= best + temperature * math.log(MIN_P))
        weights = np.exp((logits[likely] - best) / max(temperature, 1e-6))
        sums = np.cumsum(weights, dtype=np.float64)
        return int(likely[min(int((sums < self.random.random() * sums[-1]).sum()), len(likely) - 1)])
