"""A session is a conversation with a model: engine, tokenizer, state and sampler, put together.

    session = Session(engine, tokenizer)
    for piece in session.generate("The capital of France is"):
        print(piece.text, end="", flush=True)

Everything read so far lives in `state`, whose size never changes. A token that was drawn waits in
`pending` and is fed with whatever comes next, so stopping a reply at any point costs nothing and
`generate()` without a prompt goes on just there.
"""
from __future__ import annotations

import json
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from sbedge.errors import InputError, SbedgeError, StateError
from sbedge.state import State, check_source, load_state

from .chat_template import chat_parts
from .detokenizer import StreamDecoder
from .engine import Engine, checked_ids
from .generate import Piece, ReplyText, Timings
from .sampling import Sample, Sampler, Sampling
from .tokenizer import Tokenizer

CHUNK = 512  # tokens per call while reading a prompt: Ctrl-C acts between calls

Message = dict[str, Any]    # {"role": "system" | "user" | "assistant", "content": str}
Parts = list[str | int]     # text and special-token ids, as `Tokenizer.encode_parts` takes them


@dataclass(frozen=True)
class _Turn:
    """The chat reply under way or last given."""

    prompt: Parts            # what the state had read when the reply began
    start: int               # index into `tokens` where the reply begins
    content: str | None = None  # the reply, where a stop string cut it short of what was drawn


class Session:
    """One stream of text through a model. Sessions are independent: use one per thread.

    state      what the model remembers; advanced in place
    tokens     ids that `state` has consumed in this session, in order (4 bytes each)
    pending    the id drawn last, not consumed yet: [id] or []
    reused, prefilled   how many tokens the last `chat` found in the state, and how many it had to feed
    timings    work done since the session began or was reset
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, sampling: Sampling | None = None,
                 state: State | None = None) -> None:
        """`state`: go on from there instead of from the start.

        Raises TokenizerError if the tokenizer has ids beyond the model's vocabulary, StateError if the state is
        another model's.
        """
        if state is not None:
            check_source(state.fingerprint, engine.fingerprint, "the state")
        tokenizer.check_vocabulary(engine.config.vocab_size)
        self.engine = engine
        self.tokenizer = tokenizer
        self.state = engine.new_state() if state is None else state
        self.sampler = Sampler(sampling or Sampling())
        self.tokens = array("i")
        self.pending: list[int] = []
        self.timings = Timings()
        self.reused = self.prefilled = 0
        self._messages: list[Message] = []
        self._turn: _Turn | None = None
        self._running: Any = None  # the iterator of the reply under way

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; setting it starts a new random generator."""
        return self.sampler.sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self.sampler = Sampler(sampling)

    # --- plain text --------------------------------------------------------------------------------

    def feed(self, prompt: str | Sequence[int], *, progress: Callable[[int, int], None] | None = None) -> None:
        """Read text or token ids without replying. `progress(done, total)` is called as tokens are read.

        Raises InputError if there is nothing to read or an id is outside the vocabulary.
        """
        ids = self._ids(prompt)
        self._settle()
        self._prefill(ids, progress)

    def generate(self, prompt: str | Sequence[int] | None = None, *, max_tokens: int | None = 128,
                 stop: Sequence[str] = (), sampling: Sampling | None = None) -> Iterator[Piece]:
        """Continue `prompt`, or without one what the session has read so far; iterates over text pieces.

        Ends at an end token, at a stop string (left out of the text), or after `max_tokens` (None: never).
        `sampling` replaces the session's for this reply only. Starting anything else on the session ends
        the iteration. Raises InputError for an empty prompt or a bad option, before the first piece.
        """
        ids = [] if prompt is None else self._ids(prompt)
        if not ids and not self.pending and self.state.last_logits is None:
            raise InputError("nothing to continue: give a prompt of at least one token")
        reply = self._reply(ids, *self._options(max_tokens, stop, sampling))
        self._settle()
        self._running = reply
        return reply

    # --- chat --------------------------------------------------------------------------------------

    def chat(self, message: str, *, system: str | None = None, max_tokens: int | None = 1024,
             stop: Sequence[str] = (), sampling: Sampling | None = None, **variables: Any) -> Iterator[Piece]:
        """Reply to `message` in the conversation so far; iterates over text pieces like `generate`.

        Only what the state has not read yet is fed. If the conversation is no continuation of that (another
        `system`, a template that rewrites earlier turns, `feed` in between) it is read from the start.
        `variables` go to the chat template. Raises InputError if the model has no template or it rejects
        the messages.
        """
        if not isinstance(message, str) or not message.strip():
            raise InputError("the message is empty")
        messages = [*self.messages, {"role": "user", "content": message}]
        if system is not None:
            others = [m for m in messages if m["role"] != "system"]
            messages = [{"role": "system", "content": system}, *others]
        options = self._options(max_tokens, stop, sampling)
        prompt = chat_parts(self.tokenizer, messages, **variables)
        new = _continuation(self._transcript(), prompt)
        self._settle()
        if new is None:
            self._forget()
        ids = self.tokenizer.encode_parts(prompt if new is None else new)
        reply = self._chat(messages, prompt, ids, options)
        self._running = reply
        return reply

    @property
    def messages(self) -> list[Message]:
        """The conversation, with the reply as far as it was drawn."""
        if self._turn is None:
            return list(self._messages)
        content = self._reply_text() if self._turn.content is None else self._turn.content
        return [*self._messages, {"role": "assistant", "content": content}]

    # --- the whole ---------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything; the random generator starts again from its seed."""
        self._settle()
        self._forget()
        self._messages = []
        self.sampling = self.sampling
        self.timings = Timings()
        self.reused = self.prefilled = 0

    def fork(self) -> Session:
        """An independent session with the same past and, until its sampling is changed, the same future."""
        twin = Session(self.engine, self.tokenizer, sampling=self.sampling, state=self.state.copy())
        twin._restore(self._record())
        return twin

    def save(self, path: str | Path) -> None:
        """Write state and conversation to one file (safetensors), from which `load` continues."""
        self.state.save(path, {"session": json.dumps(self._record())})

    @classmethod
    def load(cls, path: str | Path, engine: Engine, tokenizer: Tokenizer) -> Session:
        """A saved session, to go on with the very tokens it would have drawn. Raises StateError."""
        state, extra = load_state(path, engine.config, engine.fingerprint)
        if "session" not in extra:
            raise StateError(f"{path}: holds a state but no session; read it with State.load")
        session = cls(engine, tokenizer, state=state)
        try:
            session._restore(json.loads(extra["session"]))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, SbedgeError) as error:
            raise StateError(f"{path}: the saved session is damaged ({error}); start a new one") from None
        return session

    def _record(self) -> dict[str, Any]:
        """All but the model's state, as JSON values."""
        return {
            "tokens": self.tokens.tolist(), "pending": self.pending, "messages": self._messages,
            "turn": None if self._turn is None else asdict(self._turn),
            "sampling": asdict(self.sampling) | {"logit_bias": list(self.sampling.logit_bias.items())},
            "random": self.sampler.get_state(),
        }

    def _restore(self, record: dict[str, Any]) -> None:
        sampling = record["sampling"]
        self.sampling = Sampling(**sampling | {"logit_bias": dict(sampling["logit_bias"])})
        self.sampler.set_state(record["random"])
        for ids in (record["tokens"], record["pending"]):
            if ids:
                checked_ids(ids, self.engine.config)
        if len(record["tokens"]) > self.state.position or len(record["pending"]) > 1:
            raise ValueError("its tokens do not fit its state")
        self.tokens, self.pending = array("i", record["tokens"]), list(record["pending"])
        self._messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in record["messages"]]
        turn = record["turn"]
        if turn and not 0 <= turn["start"] <= len(self.tokens):
            raise ValueError("its reply begins outside its tokens")
        self._turn = _Turn(list(turn["prompt"]), turn["start"], turn["content"]) if turn else None

    # --- how it works ------------------------------------------------------------------------------

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; the very first one gets the tokenizer's beginning-of-text token."""
        if isinstance(prompt, str):
            if not prompt:
                raise InputError("the prompt is empty; give at least one character")
            prompt = self.tokenizer.encode(prompt, add_bos=None if self.state.position == 0 else False)
        return checked_ids(prompt, self.engine.config).tolist()

    def _options(self, max_tokens: int | None, stop: Sequence[str], sampling: Sampling | None
                 ) -> tuple[int | None, ReplyText, Sampler]:
        if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int)
                                       or max_tokens < 1):
            raise InputError(f"max_tokens is {max_tokens!r}, expected a whole number from 1, or None for no limit")
        text = ReplyText(StreamDecoder(self.tokenizer, skip_special=True, at_start=False), stop)
        return max_tokens, text, self.sampler if sampling is None else Sampler(sampling)

    def _advance(self, ids: Sequence[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Feed the pending token and `ids`. `tokens` follows what the state took, even if interrupted."""
        queue = [*self.pending, *ids]
        for start in range(0, len(queue), CHUNK):
            chunk = queue[start : start + CHUNK]
            before = self.state.position
            try:
                self.engine.forward(chunk, self.state)
            finally:
                taken = chunk[: self.state.position - before]
                self.tokens.extend(taken)
                if taken:
                    self.pending = []
            if progress is not None:
                progress(start + len(chunk), len(queue))

    def _prefill(self, ids: Sequence[int], progress: Callable[[int, int], None] | None = None) -> None:
        began, read = time.perf_counter(), len(self.tokens)
        self._advance(ids, progress)
        self.timings.prefill_seconds += time.perf_counter() - began
        self.timings.prefill_tokens += len(self.tokens) - read

    def _draw(self, sampler: Sampler) -> Sample:
        """Draw the next token, feeding the pending one first."""
        began, read = time.perf_counter(), len(self.tokens)
        self._advance(())
        logits = self.state.last_logits  # [V]
        assert logits is not None
        window = sampler.sampling.penalty_window
        recent = self.tokens if window < 0 else self.tokens[max(0, len(self.tokens) - window) :]
        sample = sampler.sample(logits, np.array(recent, np.int32))
        self.timings.decode_seconds += time.perf_counter() - began
        self.timings.decode_tokens += len(self.tokens) - read
        return sample

    def _reply(self, ids: Sequence[int], max_tokens: int | None, text: ReplyText, sampler: Sampler
               ) -> Iterator[Piece]:
        """Read `ids`, then draw tokens until something ends the reply."""
        if ids:
            self._prefill(ids)
        drawn: list[Sample] = []  # since the last piece
        for number in count(1):
            sample = self._draw(sampler)
            drawn.append(sample)
            if sample.id in self.tokenizer.eos_ids:
                yield _piece(text.flush(), drawn, "eos")
                return
            self.pending = [sample.id]
            new, stopped = text.push(sample.id)
            if stopped:
                yield _piece(new, drawn, "stop")
                return
            if number == max_tokens:
                yield _piece(new + text.flush(), drawn, "length")
                return
            if new or not self.tokenizer.vocab_size:  # without a tokenizer there is never text to wait for
                yield _piece(new, drawn)
                drawn = []

    def _chat(self, messages: list[Message], prompt: Parts, ids: list[int],
              options: tuple[int | None, ReplyText, Sampler]) -> Iterator[Piece]:
        self.reused, self.prefilled = len(self.tokens), len(self.pending) + len(ids)
        self._prefill(ids)
        self._messages = messages  # only now: an interrupted prompt leaves the conversation as it was
        self._turn = _Turn(prompt, len(self.tokens))
        content = ""
        for piece in self._reply((), *options):
            content += piece.text
            if piece.finish == "stop":
                self._turn = _Turn(prompt, self._turn.start, content)
            yield piece

    def _reply_ids(self) -> list[int]:
        return [] if self._turn is None else [*self.tokens[self._turn.start :], *self.pending]

    def _reply_text(self) -> str:
        return self.tokenizer.decode(self._reply_ids(), skip_special=True, at_start=False)

    def _transcript(self) -> Parts | None:
        """What the state has read, as parts; None when that is not known to be a conversation."""
        if self._turn is None:
            return [] if self.state.position == 0 and not self.pending else None
        if not self.tokenizer.special_ids.isdisjoint(self._reply_ids()):
            return None  # the reply holds a marker that its text does not show
        return [*self._turn.prompt, self._reply_text()]

    def _settle(self) -> None:
        """End the reply under way and keep what it said."""
        if self._running is not None:
            try:
                self._running.close()
            except ValueError:
                raise InputError("the session is busy in another thread; use one session per thread") from None
            self._running = None
        self._messages, self._turn = self.messages, None

    def _forget(self) -> None:
        """Back to before the first token."""
        self.state = self.engine.new_state()
        self.tokens, self.pending = array("i"), []


def _piece(text: str, drawn: list[Sample], finish: Any = None) -> Piece:
    return Piece(text, tuple(s.id for s in drawn), tuple(s.logprob for s in drawn), tuple(s.top for s in drawn), finish)


def _continuation(read: Parts | None, prompt: Parts) -> Parts | None:
    """What `prompt` adds to what was `read`; None if it does not begin with it."""
    if read is None:
        return None
    known: Parts = []
    for part in read:  # join neighbouring texts
        if known and isinstance(part, str) and isinstance(last := known[-1], str):
            known[-1] = last + part
        elif part != "":
            known.append(part)
    if not known:
        return prompt
    at = len(known) - 1
    if prompt[:at] != known[:at] or len(prompt) <= at:
        return None
    same, found = known[at], prompt[at]
    if same == found:
        return prompt[at + 1 :]
    if isinstance(same, str) and isinstance(found, str) and found.startswith(same):
        return [found[len(same) :], *prompt[at + 1 :]]
    return None
