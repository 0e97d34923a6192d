"""An engine for tests of sessions: tiny, deterministic, with logits that depend on every id seen so far: a token fed
twice, left out or out of order changes all that follows."""
from __future__ import annotations

from functools import cache

import numpy as np

from sbedge.config import ModelConfig
from sbedge.runtime import template_worker
from sbedge.runtime.engine import checked_ids
from sbedge.runtime.session import Session
from sbedge.state import State

WINDOW = 4


def tiny_config(vocab_size: int) -> ModelConfig:
    return ModelConfig.from_dict({
        "model_type": "gla_swa", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 8, "vocab_size": vocab_size, "sliding_window": WINDOW,
    })


@cache
def plain_ids(vocabulary) -> list[int]:
    special = set(vocabulary.special.values())
    return [i for i in range(vocabulary.size) if vocabulary.token_bytes(i) and i not in special]


class FakeEngine:
    """Replies with `script` (token ids) once `cue` was read, else with ids drawn from a hash of all ids."""

    def __init__(self, tokenizer, script=(), cue="", vocab_size=None):
        self.config, self.fingerprint = tiny_config(vocab_size or tokenizer.vocab_size), None
        self.tokenizer, self.script, self.cue = tokenizer, list(script), cue
        self.usable = plain_ids(tokenizer.vocabulary)
        self.calls: list[list[int]] = []
        self.interrupt_after: int | None = None     # calls; the next one is interrupted ...
        self.interrupted = "before"                 # ... "before" it does anything, "after" it, or, its position not
                                                    # moved on yet, "between"

    def new_state(self):
        state = State(self.config)
        next(iter(state.arrays.values())).flat[0] = 1  # the hash, kept in the state's own memory
        return state

    def forward(self, ids, state, *, logits="last"):
        ids = checked_ids(ids, self.config).tolist()
        interrupt = self.interrupt_after is not None and len(self.calls) >= self.interrupt_after
        if interrupt and self.interrupted == "before":
            raise KeyboardInterrupt
        self.calls.append(ids)
        memory = next(iter(state.arrays.values())).flat
        for id in ids:
            memory[0] = (int(memory[0]) * 31 + id * 7 + 1) % 65521
            for ring in ("1.keys", "1.values"):
                state.arrays[ring][state.position % WINDOW] = id
            state.position += 1
        rng = np.random.default_rng(int(memory[0]))
        row = np.full(self.config.vocab_size, -20, np.float32)
        row[self.usable] = rng.normal(size=len(self.usable)).astype(np.float32)
        if self.script:
            begins = len(ids) > 1 or state.position == 1    # after a prompt the script is said from its start
            memory[1] = at = 0 if begins else int(memory[1]) + 1
            row[self.script[min(at, len(self.script) - 1)]] = 50
        if interrupt and self.interrupted == "between":
            state.position -= len(ids)
            raise KeyboardInterrupt
        state.last_logits = row
        if interrupt:
            raise KeyboardInterrupt
        return row[None]


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def ids_of(pieces):
    return [id for piece in pieces for id in piece.ids]


def scripted(tokenizer, text, **kw):
    return Session(FakeEngine(tokenizer, script=tokenizer.encode(text)), tokenizer, **kw)


def render_here(template: str, messages: list[dict], **context) -> str:
    """In place of `render_chat`, which starts a process each time: for tests that trust their templates."""
    return template_worker.render(template, {"add_generation_prompt": True, **context, "messages": messages}, 1 << 20)
