"""A session is a conversation with a model: engine, tokenizer, state and sampler, put together.

    session = Session(engine, tokenizer)
    for piece in session.generate("The capital of France is"):
        print(piece.text, end="", flush=True)

Everything read so far lives in `state`, whose size never changes. A token that was drawn waits in
`pending` and is fed with whatever comes next, so stopping a reply at any point costs nothing and
`generate()` without a prompt goes on just there.

A chat keeps snapshots in `cache`: where a message of the user begins, where a reply begins and where it ends. What a
new prompt shares with anything read before is not read again.
"""
from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from sbedge.errors import InputError, SbedgeError, StateError
from sbedge.state import State, check_source, load_state

from .chat_template import chat_parts
from .conversation import CUT, HIDDEN, Conversation, Message, Prompt, checked_messages
from .detokenizer import StreamDecoder
from .engine import Engine, checked_ids
from .generate import Piece, ReplyText, Timings
from .sampling import Sample, Sampler, Sampling
from .session_record import Record
from .state_cache import Snapshot, StateCache
from .tokenizer import Tokenizer

CHUNK = 512         # tokens per call while reading a prompt: Ctrl-C acts between calls
NEAR = 8            # tokens: another snapshot this near is good enough, and a call for so few costs as much as for more


class Session:
    """One stream of text through a model. Sessions are independent: use one per thread.

    state      what the model remembers; advanced in place
    tokens     ids that `state` has consumed in this session, in order (4 bytes each)
    pending    the id drawn last, not consumed yet: [id] or []
    cache      snapshots to come back to; forks share it, and so may all sessions of one engine
    reused, prefilled   of the last `chat`'s prompt: tokens found in the state or the cache, and tokens fed
    reread     why `reused` is less than all that was read before; "" if it is not
    timings    work done since the session began or was reset
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, sampling: Sampling | None = None,
                 state: State | None = None, cache: StateCache | None = None) -> None:
        """`state`: go on from there instead of from the start. `cache`: None makes one of the default budget.

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
        self.cache = StateCache(engine) if cache is None else cache
        self.timings = Timings()
        self.reused, self.prefilled, self.reread = 0, 0, ""
        self._conversation = Conversation()
        self._replying = False              # the conversation's last turn awaits its reply: all tokens since its start
        self._cut: str | None = None        # that reply, where a stop string cut it short of what was drawn
        self._snapshot: Snapshot | None = None      # the last one on the way to `state`
        self._torn = False                  # an interrupt may have left the state further than its position says
        self._running: Any = None           # the iterator of the reply under way

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
        the iteration. Without a prompt, while `can_continue`, what comes is still part of a chat's last reply.
        Raises InputError for an empty prompt or a bad option, before the first piece.
        """
        ids = [] if prompt is None else self._ids(prompt)
        if not ids and not self.pending and self.state.last_logits is None:
            raise InputError("nothing to continue: give a prompt of at least one token")
        reply = self._reply(ids, *self._options(max_tokens, stop, sampling))
        if not ids and self.can_continue:
            self._stop()
            reply = self._said(reply, self._reply_text())
        else:
            self._settle()
        self._running = reply
        return reply

    # --- chat --------------------------------------------------------------------------------------

    def chat(self, message: str | Sequence[Message], *, system: str | None = None, max_tokens: int | None = 1024,
             stop: Sequence[str] = (), sampling: Sampling | None = None, **variables: Any) -> Iterator[Piece]:
        """Reply to `message` in the conversation so far; iterates over text pieces like `generate`.

        `message` may also be the whole conversation, a list of messages that replaces the one so far.

        Only what neither the state nor the cache has read is fed: after an edit of an earlier message, all from that
        message on. `reused`, `prefilled` and `reread` tell how that went once the first piece is there. `variables` go
        to the chat template. Raises InputError if the model has no template or it rejects the messages.
        """
        messages = self._extended(message)
        if system is not None:
            others = [m for m in messages if m["role"] != "system"]
            messages = [{"role": "system", "content": system}, *others]
        options = self._options(max_tokens, stop, sampling)
        parts = chat_parts(self.tokenizer, messages, **variables)
        self._settle()
        reply = self._chat(self._conversation.encode(messages, parts, self.tokenizer), options)
        self._running = reply
        return reply

    @property
    def can_continue(self) -> bool:
        """Whether `generate` without a prompt adds to a chat's last reply: nothing was begun or taken back since, and
        no stop string has ended it."""
        return self._replying and self._cut is None

    def rewind(self, turns: int = 1) -> None:
        """Take back the last `turns` messages of the user and all that followed each.

        The state goes back to the nearest snapshot; the next `chat` reads what lies between, if anything. Raises
        InputError if there are not so many.
        """
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if isinstance(turns, bool) or not isinstance(turns, int) or not 1 <= turns <= len(asked):
            raise InputError(f"turns is {turns!r}, expected a whole number from 1 to the conversation's {len(asked)}")
        self._settle()
        self._conversation.rewind(asked[-turns])
        self._reach(self._conversation.ids)

    @property
    def messages(self) -> list[Message]:
        """The conversation, with the reply as far as it was drawn."""
        messages = [dict(message) for message in self._conversation.messages]
        if self._replying:
            content = self._reply_text() if self._cut is None else self._cut
            messages.append({"role": "assistant", "content": content})
        return messages

    # --- the whole ---------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything but the cache; the random generator starts again from its seed."""
        self._settle()
        self._forget()
        self._conversation = Conversation()
        self.sampling = self.sampling
        self.timings = Timings()
        self.reused, self.prefilled, self.reread = 0, 0, ""

    def fork(self) -> Session:
        """An independent session with the same past and, until its sampling is changed, the same future."""
        twin = Session(self.engine, self.tokenizer, sampling=self.sampling, state=self.state.copy(), cache=self.cache)
        twin._take(self._record())
        twin._snapshot, twin._torn = self._snapshot, self._torn
        return twin

    def save(self, path: str | Path) -> None:
        """Write state and conversation to one file, from which `load` continues; docs/state.md describes it.

        The file appears whole or not at all, replacing the one before, and holds of the windows only what is in use:
        cheap enough to call after every turn, and between the pieces of a reply, too. A process that is killed loses
        what came after the last call. Raises StateError if it cannot be written.
        """
        if self._torn:
            self._mend()
        self.state.save(path, {"session": self._record().to_json()})

    @classmethod
    def load(cls, path: str | Path, engine: Engine, tokenizer: Tokenizer, *,
             cache: StateCache | None = None) -> Session:
        """A saved session, to go on with the very tokens it would have drawn. Raises StateError."""
        state, texts = load_state(path, engine.config, engine.fingerprint)
        if "session" not in texts:
            raise StateError(f"{path}: holds a state but no session; read it with State.load")
        session = cls(engine, tokenizer, state=state, cache=cache)
        try:
            session._take(Record.from_json(texts["session"], engine.config, state.position))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, SbedgeError) as error:
            raise StateError(f"{path}: the saved session is damaged ({error}); start a new one") from None
        return session

    def _record(self) -> Record:
        """All but the model's state."""
        return Record(self.tokens[:], list(self.pending), self._conversation.copy(), self._replying, self._cut,
                      self.sampling, self.sampler.get_state())

    def _take(self, record: Record) -> None:
        self.tokens, self.pending, self._conversation = record.tokens, record.pending, record.conversation
        self._replying, self._cut = record.replying, record.cut
        self.sampling = record.sampling
        self.sampler.set_state(record.random)

    # --- how it works ------------------------------------------------------------------------------

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; the very first one gets the tokenizer's beginning-of-text token."""
        if isinstance(prompt, str):
            if not prompt:
                raise InputError("the prompt is empty; give at least one character")
            prompt = self.tokenizer.encode(prompt, add_bos=None if self.state.position == 0 else False)
        return checked_ids(prompt, self.engine.config).tolist()

    def _extended(self, message: str | Sequence[Message]) -> list[Message]:
        """The conversation with `message`, or the one that `message` is."""
        if isinstance(message, str):
            message = [*self.messages, {"role": "user", "content": message}]
        if not isinstance(message, (list, tuple)):
            raise InputError(f"the message is {message!r:.40}, expected a text or a list of messages")
        messages = checked_messages(message)
        if not messages or not messages[-1]["content"].strip():
            raise InputError("the message is empty")
        return messages

    def _options(self, max_tokens: int | None, stop: Sequence[str], sampling: Sampling | None
                 ) -> tuple[int | None, ReplyText, Sampler]:
        if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int)
                                       or max_tokens < 1):
            raise InputError(f"max_tokens is {max_tokens!r}, expected a whole number from 1, or None for no limit")
        text = ReplyText(StreamDecoder(self.tokenizer, skip_special=True, at_start=False), stop)
        return max_tokens, text, self.sampler if sampling is None else Sampler(sampling)

    def _advance(self, ids: Sequence[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Feed the pending token and `ids`. `tokens` follows what the state took, even if interrupted."""
        if self._torn:
            self._mend()
        queue = [*self.pending, *ids]
        for start in range(0, len(queue), CHUNK):
            chunk = queue[start : start + CHUNK]
            before = self.state.position
            try:
                self.engine.forward(chunk, self.state)
            except BaseException:
                self._torn |= self.state.position == before
                raise
            finally:
                taken = chunk[: self.state.position - before]
                self.tokens.extend(taken)
                if taken:
                    self.pending = []
                if 0 < len(taken) < len(chunk):
                    self.state.last_logits = None   # those of an earlier token
            if progress is not None:
                progress(start + len(chunk), len(queue))

    def _mend(self) -> None:
        """Bring a torn state to where `tokens` says it is, from the nearest snapshot."""
        ids, pending = self.tokens, self.pending
        if self.state.position != len(ids):     # what came before this session is not known
            raise StateError("an interrupt left the state half way through a token; go on from a saved one")
        self._reach(ids)
        self._advance(ids[len(self.tokens):])
        self.pending = pending

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

    def _chat(self, prompt: Prompt, options: tuple[int | None, ReplyText, Sampler]) -> Iterator[Piece]:
        continued = self._reach(prompt.ids)
        self.reused, self.prefilled = len(self.tokens), len(prompt.ids) - len(self.tokens)
        self.reread = self._why(prompt, continued)
        for mark in prompt.marks:
            last = self._snapshot.position if self._snapshot else 0
            if len(self.tokens) < mark and (mark - last >= NEAR or mark == len(prompt.ids)):
                self._prefill(prompt.ids[len(self.tokens) : mark])
                self._keep()
        self._conversation.begin(prompt)    # only now: an interrupted prompt leaves the conversation as it was
        self._replying, self._cut = True, None
        yield from self._said(self._reply((), *options), "")

    def _said(self, pieces: Iterator[Piece], content: str) -> Iterator[Piece]:
        """`pieces` of the conversation's reply, which has begun with `content`."""
        for piece in pieces:
            content += piece.text
            if piece.finish:
                self._cut = content if piece.finish == "stop" else None
                self._keep()
            yield piece

    def _reach(self, ids: array) -> bool:
        """Bring the state to the longest beginning of `ids` that it or the cache has read; whether it was at one."""
        read = len(self.tokens)
        there = self.state.position == read and ids[:read] == self.tokens and not self._torn and (
            read < len(ids) or self.state.last_logits is not None or not read)
        snapshot = self.cache.longest(ids, above=read if there else 0)
        if snapshot is not None:
            self.state, self.tokens, self._snapshot = self.cache.state(snapshot), ids[: snapshot.position], snapshot
            self._torn = False
        elif not there:
            self._forget()
        elif self._snapshot is None and read:
            self._keep()
        self.pending = []
        return there

    def _keep(self) -> None:
        """Put the state into the cache."""
        sound = self.state.position == len(self.tokens) and self.state.last_logits is not None and not self._torn
        if sound and (self._snapshot is None or self._snapshot.position != self.state.position):
            self._snapshot = self.cache.put(self.tokens, self.state, self._snapshot)

    def _why(self, prompt: Prompt, continued: bool) -> str:
        """What `reread` says."""
        reasons = [prompt.changed] if prompt.changed else []
        if not continued and not reasons:
            reasons.append("what was read last is not part of the conversation")
        if (missing := prompt.known - self.reused) > NEAR:
            reasons.append(f"the cache holds no snapshot nearer than {missing} tokens before")
        return "; ".join(reasons)

    def _reply_ids(self) -> list[int]:
        return [*self.tokens[self._conversation.turns[-1].start :], *self.pending]

    def _reply_text(self) -> str:
        return self.tokenizer.decode(self._reply_ids(), skip_special=True, at_start=False)

    def _stop(self) -> None:
        """End the iteration under way."""
        if self._running is not None:
            try:
                self._running.close()
            except ValueError:
                raise InputError("the session is busy in another thread; use one session per thread") from None
            self._running = None

    def _settle(self) -> None:
        """End the reply under way and keep what it said."""
        self._stop()
        if self._replying:
            ids, text = self._reply_ids(), self._reply_text()
            hidden = not self.tokenizer.special_ids.isdisjoint(ids)
            self._conversation.end(ids, text if self._cut is None else self._cut, text,
                                   CUT if self._cut is not None else HIDDEN if hidden else "")
            self._replying, self._cut = False, None
            self._keep()

    def _forget(self) -> None:
        """Back to before the first token."""
        self.state, self._snapshot, self._torn = self.engine.new_state(), None, False
        self.tokens, self.pending = array("i"), []


def _piece(text: str, drawn: list[Sample], finish: Any = None) -> Piece:
    return Piece(text, tuple(s.id for s in drawn), tuple(s.logprob for s in drawn), tuple(s.top for s in drawn), finish)
