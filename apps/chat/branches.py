"""Chat: conversations with one model, each a branch with a name; knows nothing of the terminal."""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sbedge.errors import InputError, StateError
from sbedge.runtime.generate import Piece
from sbedge.runtime.sampling import Sampling
from sbedge.runtime.session import Session
from sbedge.runtime.session_record import summary
from sbedge.state import State

from .kept import SUFFIX, KeptChat, Shelf

USUAL = Sampling(temperature=0.7, top_p=0.9)
MAIN = "main"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")        # also a file's name


@dataclass
class Branch:
    session: Session
    system: str | None = None       # what precedes the conversation from the next message on

    @classmethod
    def of(cls, session: Session) -> Branch:
        return cls(session, next((m["content"] for m in session.messages if m["role"] == "system"), None))

    @property
    def turns(self) -> int:
        return sum(message["role"] == "user" for message in self.session.messages)


class Chat:
    """Branches, of which one is spoken in.

    name        of that one
    chosen      the session's sampling was chosen for this chat: it wins over that of a kept one
    shelf       where chats with this model are kept, None for nowhere
    kept        where this one is kept, None for nowhere
    """

    def __init__(self, session: Session, *, system: str | None = None, max_tokens: int | None = 1024,
                 stop: tuple[str, ...] = (), chosen: bool = False, shelf: Shelf | None = None,
                 keep: bool = False) -> None:
        self.branches = {MAIN: Branch(session, system)}
        self.name = MAIN
        self.max_tokens, self.stop, self.chosen, self.shelf = max_tokens, stop, chosen, shelf
        self.kept: KeptChat | None = shelf.new() if shelf and keep else None

    @property
    def branch(self) -> Branch:
        return self.branches[self.name]

    @property
    def session(self) -> Session:
        return self.branch.session

    # --- talking -----------------------------------------------------------------------------------
    def reply(self, message: str) -> Iterator[Piece]:
        """The reply to a message as it comes. InputError for a message that cannot be."""
        said = [m for m in self.session.messages if m["role"] != "system"]
        system = [{"role": "system", "content": self.branch.system}] if self.branch.system else []
        return self.session.chat([*system, *said, {"role": "user", "content": message}],
                                 max_tokens=self.max_tokens, stop=self.stop)

    def go_on(self) -> Iterator[Piece]:
        """More of the last reply."""
        if not self.session.messages:
            raise InputError("there is no reply yet to go on with")
        if not self.session.can_continue:
            raise InputError("the last reply is at its end; send a message")
        return self.session.generate(max_tokens=self.max_tokens, stop=self.stop)

    def rewind(self, turns: int = 1) -> str:
        """Take back the last turns; returns the first message of the user among them."""
        asked = [m["content"] for m in self.session.messages if m["role"] == "user"]
        if not asked:
            raise InputError("nothing was said yet that could be taken back")
        self.session.rewind(turns)
        return asked[-turns]

    # --- branches ----------------------------------------------------------------------------------
    def fork(self, name: str = "") -> None:
        """Go on in a branch with the same past; this one stays as it is."""
        self._add(self._new_name(name, "branch"), Branch(self.session.fork(), self.branch.system))

    def new(self, name: str = "") -> None:
        """Begin another conversation; this one stays as it is."""
        there = self.session
        fresh = Session(there.engine, there.tokenizer, sampling=there.sampling, cache=there.cache)
        self._add(self._new_name(name, "chat"), Branch(fresh, self.branch.system))

    def switch(self, name: str) -> None:
        if name not in self.branches:
            raise InputError(f"there is no branch {name!r:.40}; there are {', '.join(self.branches)}")
        self.name = name

    def _new_name(self, name: str, otherwise: str) -> str:
        if not name:
            return next(n for i in range(2, len(self.branches) + 3) if (n := f"{otherwise}{i}") not in self.branches)
        if not NAME.fullmatch(name):
            raise InputError(f"{name!r:.40} is no name for a branch: letters, digits, - and _, at most 32")
        if name in self.branches:
            raise InputError(f"there is a branch {name!r} already; /switch {name} goes there")
        return name

    def _add(self, name: str, branch: Branch) -> None:
        self.branches[name] = branch
        self.name = name

    # --- files -------------------------------------------------------------------------------------
    def save(self, path: Path) -> None:
        """Write this branch to a file, which may be a former one of its kind but nothing else."""
        if path.exists():
            try:
                there = summary(State.load_extra(path)["session"])
            except (StateError, KeyError, ValueError):
                there = {"tokens": 1, "messages": []}
            if there["tokens"] and not there["messages"]:       # what `sbedge state save` has read may have taken long
                raise InputError(f"{path}: exists and is no saved conversation; choose another name")
        self.session.save(path)

    def load(self, path: Path) -> None:
        """Go on with a saved conversation, in a branch of its own if this one has begun."""
        there = self.session
        session = Session.load(path, there.engine, there.tokenizer, cache=there.cache)
        if session.tokens and not session.messages:
            raise InputError(f"{path}: holds a text but no conversation; go on with it by `sbedge state load`")
        if session.sampling != there.sampling:      # what was chosen for this chat wins; otherwise the dice roll on
            session.sampling = there.sampling
        if self.branch.turns:
            self._add(self._new_name("", "loaded"), Branch.of(session))
        else:
            self.branches[self.name] = Branch.of(session)

    def keep(self, *, replying: bool = False, sparing: bool = False) -> None:
        """Write this branch to where the chat is kept, if anywhere; see KeptChat.save. StateError if that fails."""
        if self.kept is not None:
            self.kept.save(self.name, self.session, replying=replying, sparing=sparing)

    def resume(self) -> None:
        """Take the last chat off the shelf, with all its branches. InputError or StateError if that cannot be.

        System text and sampling that were chosen for this chat win over the kept ones.
        """
        if any(branch.turns for branch in self.branches.values()):
            raise InputError("a conversation has begun; a kept one is resumed before the first message")
        kept = self.shelf.newest() if self.shelf else None
        if kept is None:
            raise InputError("no chat with this model is kept, or it is open elsewhere")
        there = self.branch
        try:
            self.branches = {file.name.removesuffix(SUFFIX): self._resumed(kept, file, there) for file in kept.files()}
        except StateError:
            kept.close()
            raise
        self.name = next(iter(self.branches))
        if self.kept is None:
            kept.close()
        else:
            self.kept = kept

    def _resumed(self, kept: KeptChat, file: Path, chosen: Branch) -> Branch:
        there = chosen.session
        branch = Branch.of(kept.load(file, there.engine, there.tokenizer, there.cache))
        if self.chosen:
            branch.session.sampling = there.sampling
        branch.system = chosen.system or branch.system
        return branch
