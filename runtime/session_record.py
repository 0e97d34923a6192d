"""Record: a session without its model's state, as JSON; docs/state.md describes it. Files are not trusted."""
from __future__ import annotations

import base64
import json
from array import array
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from sbedge.config import ModelConfig
from sbedge.errors import InputError
from sbedge.state_file import bounded_json

from .conversation import Conversation, Parts, Turn, checked_messages
from .engine import checked_ids
from .sampling import Sampler, Sampling

MAX_STRUCTURE = 1 << 22     # characters of JSON that are no text: tens of thousands of turns


@dataclass
class Record:
    """What a session goes on from; the fields are those of `Session`."""

    tokens: array
    pending: list[int]
    conversation: Conversation
    replying: bool
    cut: str | None
    sampling: Sampling
    random: dict[str, Any]

    def to_json(self) -> str:
        talk, read = self.conversation, self.tokens + array("i", self.pending)
        shared = read[:len(talk.ids)] == talk.ids       # nearly always: not written twice then
        return json.dumps({
            "tokens": encode_ids(self.tokens), "pending": self.pending, "messages": talk.messages,
            "turns": [asdict(turn) for turn in talk.turns],
            "turn_ids": len(talk.ids) if shared else encode_ids(talk.ids),
            "rewrites": talk.rewrites, "replying": self.replying, "cut": self.cut,
            "sampling": asdict(self.sampling) | {"logit_bias": list(self.sampling.logit_bias.items())},
            "random": self.random})

    @classmethod
    def from_json(cls, text: str, config: ModelConfig, position: int) -> Record:
        """The record of a session whose state is at `position`. InputError, ValueError, TypeError, KeyError,
        AttributeError or OverflowError if it is none."""
        raw = bounded_json(text.encode(), MAX_STRUCTURE)
        raw = raw if "turns" in raw else _upgraded(raw)
        tokens, pending = _ids(raw["tokens"], config), _ids(raw["pending"], config)
        if len(tokens) > position or len(pending) > 1:
            raise ValueError("its tokens do not fit its state")
        conversation = _conversation(raw, tokens + pending, config)
        replying, cut = bool(raw["replying"]), raw["cut"]
        if replying and not (conversation.turns and conversation.ids == tokens[:conversation.turns[-1].start]):
            raise ValueError("its reply begins outside its tokens")
        sampling = Sampling(**raw["sampling"] | {"logit_bias": dict(raw["sampling"]["logit_bias"])})
        Sampler(sampling).set_state(raw["random"])      # refuses what is no generator
        return cls(tokens, pending.tolist(), conversation, replying, None if cut is None else _text(cut), sampling,
                   dict(raw["random"]))


def summary(text: str) -> dict[str, Any]:
    """What a record tells without a model: how many tokens, messages, replying, sampling. ValueError if it is none."""
    try:
        raw = bounded_json(text.encode(), MAX_STRUCTURE)
        raw = raw if "turns" in raw else _upgraded(raw)
        tokens = len(base64.b64decode(raw["tokens"])) // 4 if isinstance(raw["tokens"], str) else len(raw["tokens"])
        return {"tokens": tokens, "messages": checked_messages(raw["messages"]),
                "replying": bool(raw["replying"]), "sampling": {"temperature": 0.0} | raw["sampling"]}
    except (InputError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(str(error)) from None


def encode_ids(ids: array) -> str:
    return base64.b64encode(np.asarray(ids, "<i4").tobytes()).decode()


def _ids(value: Any, config: ModelConfig) -> array:
    """Token ids: base64 of little-endian int32, or a list."""
    ids = np.frombuffer(base64.b64decode(value, validate=True), "<i4") if isinstance(value, str) else value
    return array("i", checked_ids(ids, config).tolist()) if len(ids) else array("i")


def _conversation(raw: dict[str, Any], read: array, config: ModelConfig) -> Conversation:
    """The messages and turns of a record, whose tokens and pending token are `read`."""
    messages = checked_messages(raw["messages"])
    size = raw["turn_ids"]
    ids = _ids(size, config) if isinstance(size, str) else read[:_ascending(0, size, len(read))[1]]
    turns = [Turn(_parts(turn["prompt"], config), turn["messages"], turn["start"], turn["stop"], _text(turn["reply"]),
                  _text(turn["unlike"])) for turn in raw["turns"]]
    _ascending(0, *(number for turn in turns for number in (turn.start, turn.stop)), len(ids))
    _ascending(0, *(turn.messages for turn in turns), len(messages))
    if (turns[-1].stop if turns else 0) != len(ids):
        raise ValueError("its turns do not add up to its tokens")
    return Conversation(messages, ids, turns, bool(raw["rewrites"]))


def _ascending(*numbers: Any) -> tuple[int, ...]:
    if not all(type(number) is int for number in numbers) or any(a > b for a, b in pairwise((0, *numbers))):
        raise ValueError("its turns are not in order")
    return numbers


def _parts(value: Any, config: ModelConfig) -> Parts:
    for part in value:
        if not isinstance(part, str) and not (type(part) is int and 0 <= part < config.vocab_size):
            raise ValueError("a prompt of it is neither text nor tokens")
    return list(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text of it is none")
    return value


def _upgraded(raw: dict[str, Any]) -> dict[str, Any]:
    """A record of version 1, which knew its last turn only."""
    turn = raw["turn"]
    start = 0 if turn is None else turn["start"]
    turns = [] if turn is None else [{"prompt": turn["prompt"], "messages": len(raw["messages"]), "start": start,
                                      "stop": start, "reply": "", "unlike": ""}]
    return {**raw, "turns": turns, "turn_ids": start, "rewrites": False, "replying": turn is not None,
            "cut": turn and turn["content"]}
