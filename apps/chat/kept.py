"""Chats on disk: each in a folder of its own, a state file for every branch, written when a reply begins, while it
comes and when it ends.

    $XDG_STATE_HOME/sbedge/history                              lines typed, for the line editor
    $XDG_STATE_HOME/sbedge/chats/MODEL/STARTED/BRANCH.state     MODEL: all exports of one checkpoint

A chat that is open holds a lock, so no two processes write one. Nothing is overwritten but a branch by its own later
self. Only the newest chats of a model stay.
"""
from __future__ import annotations

import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from sbedge.errors import StateError
from sbedge.runtime.engine import Engine
from sbedge.runtime.session import Session
from sbedge.runtime.state_cache import StateCache
from sbedge.runtime.tokenizer import Tokenizer

try:
    import fcntl
except ImportError:         # Windows: no locks there
    fcntl = None            # type: ignore[assignment]

MOST = 20               # chats of a model
PAUSE = 30.0            # seconds between two saves of one reply: a full window of a 7B model is 240 MB
SUFFIX = ".state"


def state_home() -> Path:
    """$XDG_STATE_HOME/sbedge, else ~/.local/state/sbedge. A relative path in the variable counts for nothing."""
    named = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".local/state") / "sbedge"


def chats_folder(model: str | Path, engine: Engine) -> Path:
    """Where the chats with a model are kept: by the checkpoint it comes from if that is known, else by its path."""
    key = engine.fingerprint or str(Path(model).resolve())
    return state_home() / "chats" / hashlib.sha256(key.encode()).hexdigest()[:16]   # what a model file says is no path


NOTHING = 0


def mark(session: Session) -> int:
    """Another number once the conversation or its sampling is another one. A prompt that was read half way has not
    changed it."""
    messages = tuple((message["role"], message["content"]) for message in session.messages)
    return hash((messages, repr(session.sampling))) if messages else NOTHING


class KeptChat:
    """The files of one chat. `when`: the time of its last save, None if there was none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None
        self._due = 0.0
        self._saved: dict[str, int | None] = {}     # by branch; None: in the midst of a reply

    def files(self) -> list[Path]:
        """One for each branch, the one last saved first."""
        dated = []
        for file in self.folder.glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):       # another process may be removing the chat
                dated.append((file.stat().st_mtime_ns, file))
        return [file for _, file in sorted(dated, reverse=True)]

    @property
    def when(self) -> float | None:
        with suppress(FileNotFoundError):
            return next((file.stat().st_mtime for file in self.files()), None)
        return None

    def open(self) -> bool:
        """Take it for this process; False if another one has it. StateError if its folder cannot be made."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StateError(f"{self.folder}: the chat cannot be kept there ({error.strerror})") from None
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return False
        self._lock = lock
        for left_over in self.folder.glob("*.tmp"):     # of a process that was killed while it wrote
            left_over.unlink(missing_ok=True)
        return True

    def save(self, branch: str, session: Session, *, replying: bool = False, sparing: bool = False) -> None:
        """Write a branch if there is anything new.

        replying  a reply is under way; at its end there is something new even if its text stays the same
        sparing   not if it was written a short time ago

        StateError if that fails.
        """
        if sparing and time.monotonic() < self._due:
            return
        now = mark(session)
        if now == self._saved.get(branch, NOTHING):
            return
        self._due = time.monotonic() + PAUSE
        if self._lock is None and not self.open():
            raise StateError(f"{self.folder}: another process has this chat open; it is not kept")
        session.save(self.folder / f"{branch}{SUFFIX}")
        self._saved[branch] = None if replying else now

    def load(self, file: Path, engine: Engine, tokenizer: Tokenizer, cache: StateCache) -> Session:
        """One of `files`. StateError as `Session.load`."""
        session = Session.load(file, engine, tokenizer, cache=cache)
        self._saved[file.name.removesuffix(SUFFIX)] = mark(session)
        return session

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> bool:
        """Delete it, unless a process has it open; whether that was done."""
        try:
            if not self.open():
                return False
            shutil.rmtree(self.folder)
        except (StateError, OSError):
            return False
        finally:
            self.close()
        return True


class Shelf:
    """All kept chats of one model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def new(self) -> KeptChat:
        """A chat that begins now; nothing is written before its first save."""
        return KeptChat(self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{token_hex(3)}")

    def chats(self) -> list[KeptChat]:
        """The last used first."""
        if not self.folder.is_dir():
            return []
        dated = [(chat.when, str(folder), chat) for folder in self.folder.iterdir() if (chat := KeptChat(folder)).when]
        return [chat for *_, chat in sorted(dated, key=lambda entry: entry[:2], reverse=True)]

    def newest(self) -> KeptChat | None:
        """The last used one that no process has open; it is open for this one then."""
        return next((chat for chat in self.chats() if chat.open()), None)

    def tidy(self) -> int:
        """Remove all but the newest; how many those were."""
        return sum(chat.remove() for chat in self.chats()[MOST:])
