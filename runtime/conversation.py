"""Conversation: the messages of a chat, and the token ids they have become.

A chat template renders the whole conversation anew for every turn. To feed only what is new, the ids of the new prompt
must begin with those already read; so replies must keep the ids they were drawn as, which the tokenizer need not give
back for their text. A conversation remembers its text in the stretches it was read and drawn in, each with its ids, and
takes from a new prompt as many of them as still stand there.
"""
from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sbedge.errors import InputError

from .tokenizer import Tokenizer

Message = dict[str, Any]    # {"role": "system" | "user" | "assistant", "content": str}
Parts = list[str | int]     # text and special-token ids, as `Tokenizer.encode_parts` takes them


@dataclass(frozen=True)
class Turn:
    """A stretch of a conversation's text: what a prompt added to the one before, and the reply to it."""

    prompt: Parts
    messages: int       # how many there were with this prompt
    start: int          # the reply has become ids[start:stop]
    stop: int
    reply: str = ""
    unlike: str = ""    # why the reply's ids are not those of its text in the conversation


@dataclass
class Prompt:
    """A rendered conversation as token ids.

    known    so many ids the conversation has read or drawn before, by its text
    marks    where messages of the user begin (indices into ids), a good place to come back to
    changed  why not all that was read before is part of it; "" if it is
    """

    messages: list[Message]
    ids: array
    known: int
    marks: list[int]
    changed: str
    turns: list[Turn]


@dataclass
class Conversation:
    """What a session has read and said as a chat.

    messages   all but the reply under way
    ids        what they have become, in the stretches that `turns` tell
    rewrites   whether the template was seen to change earlier turns
    """

    messages: list[Message] = field(default_factory=list)
    ids: array = field(default_factory=lambda: array("i"))
    turns: list[Turn] = field(default_factory=list)
    rewrites: bool = False

    def copy(self) -> Conversation:
        return Conversation([dict(m) for m in self.messages], self.ids[:], list(self.turns), self.rewrites)

    def encode(self, messages: Sequence[Message], parts: Parts, tokenizer: Tokenizer) -> Prompt:
        """The ids of `parts`, what `messages` were rendered to, ready for a reply."""
        turns, rest, changed = self._known(parts)
        if changed:
            changed = _changed(self.messages, messages) or changed
        self.rewrites |= changed == REWRITTEN
        known = turns[-1].stop if turns else 0
        covered = turns[-1].messages + (turns[-1].stop > turns[-1].start) if turns else 0
        begins = _beginnings(messages[covered:], rest)
        if self.rewrites:       # the words that open a reply will look different next time: come back to before them
            begins.add(max((i for i, part in enumerate(rest) if isinstance(part, int)), default=0))
        ids, marks = self.ids[:known], []
        for i, part in enumerate(rest):
            if i in begins:
                marks.append(len(ids))
            ids.extend(tokenizer.encode_parts([part]))
        turns.append(Turn(rest, len(messages), len(ids), len(ids)))
        return Prompt(list(messages), ids, known, [*marks, len(ids)], changed, turns)

    def begin(self, prompt: Prompt) -> None:
        """The prompt was read; a reply follows."""
        self.messages, self.ids, self.turns = list(prompt.messages), prompt.ids, prompt.turns

    def end(self, ids: Sequence[int], content: str, text: str, unlike: str) -> None:
        """The reply drawn as `ids` says `content`; `text` and `unlike` as in `Turn`."""
        self.messages.append({"role": "assistant", "content": content})
        self.ids.extend(ids)
        self.turns[-1] = replace(self.turns[-1], stop=len(self.ids), reply=text, unlike=unlike)

    def rewind(self, count: int) -> None:
        """Keep the first `count` messages, and the ids of the turns that lie within them."""
        del self.messages[count:]
        self.turns = [turn for turn in self.turns if turn.messages < count]
        del self.ids[self.turns[-1].stop if self.turns else 0:]

    def _known(self, parts: Parts) -> tuple[list[Turn], Parts, str]:
        """The turns that `parts` begins with (of the last one perhaps only the prompt), what follows them, and why that
        is not all there was."""
        turns: list[Turn] = []
        rest = parts
        for number, turn in enumerate(self.turns, 1):
            after = without_beginning(rest, turn.prompt)
            if after is None:
                return turns, rest, REWRITTEN
            rest = after
            after = None if turn.unlike else without_beginning(rest, [turn.reply])
            if after is None:
                turns.append(replace(turn, stop=turn.start, reply="", unlike=""))
                return turns, rest, f"reply {number} {turn.unlike}" if turn.unlike else TRIMMED
            turns.append(turn)
            rest = after
        return turns, rest, ""


def checked_messages(messages: Sequence[Message]) -> list[Message]:
    """Copies of `messages`; InputError if they are none."""
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise InputError(f"a message is {message!r:.60}, expected a role and a content, both texts")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


REWRITTEN = "the chat template rewrites earlier turns"
TRIMMED = "the chat template alters replies"
CUT = "was cut by a stop string"
HIDDEN = "holds special tokens that its text does not show"


def _changed(old: Sequence[Message], new: Sequence[Message]) -> str:
    """Which message of the old ones is another now; "" if none is."""
    for i, message in enumerate(old):
        if i >= len(new) or new[i] != message:
            roles = {message["role"], new[i]["role"] if i < len(new) else ""}
            done = "changed" if i < len(new) else "taken out"
            return f"the system text was {done}" if "system" in roles else f"message {i + 1} was {done}"
    return ""


def _beginnings(messages: Sequence[Message], parts: Parts) -> set[int]:
    """Indices of the parts in which messages of the user lie. A template that alters a message hides its place."""
    at, found = 0, set()
    for message in messages:
        text = message["content"].strip()
        where = next((i for i in range(at, len(parts)) if isinstance(part := parts[i], str) and text in part), None)
        if where is not None:
            at = where + 1
            if message["role"] == "user":
                found.add(where)
    return found


def without_beginning(parts: Parts, beginning: Parts) -> Parts | None:
    """What `parts` adds to `beginning`; None if it does not begin with it."""
    known: Parts = []
    for part in beginning:  # join neighbouring texts
        if known and isinstance(part, str) and isinstance(last := known[-1], str):
            known[-1] = last + part
        elif part != "":
            known.append(part)
    if not known:
        return parts
    at = len(known) - 1
    if parts[:at] != known[:at] or len(parts) <= at:
        return None
    same, found = known[at], parts[at]
    if same == found:
        return parts[at + 1 :]
    if isinstance(same, str) and isinstance(found, str) and found.startswith(same):
        return [found[len(same) :], *parts[at + 1 :]]
    return None
