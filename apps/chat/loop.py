"""Reads a message, replies, reads the next. Replies go to standard output, all else to standard error."""
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from sbedge.errors import SbedgeError, StateError
from sbedge.runtime.generate import Piece

from .branches import Chat
from .commands import Exit, GoOn, prompt_text, resumed, run_command
from .kept import MOST, state_home
from .meter import Meter
from .reply import reply_view
from .terminal import CtrlC, Terminal, quiet_keys

Read = Callable[[], str]        # one message; raises EOFError or KeyboardInterrupt to leave


def talk(chat: Chat, terminal: Terminal, read: Read | None = None) -> bool:
    """A conversation until the end of input, Ctrl-C at the prompt, or /quit; whether all that was asked was done."""
    if terminal.person:
        greet(chat, terminal)
    read = read or reader(chat, terminal)
    done = True
    while (turn := take_turn(chat, terminal, read)) is not None:
        done &= turn
    if terminal.person and chat.kept and chat.kept.when:
        terminal.note("kept; --resume goes on with it")
    return done


def greet(chat: Chat, terminal: Terminal) -> None:
    if chat.kept and chat.shelf and (removed := chat.shelf.tidy()):
        terminal.note(f"removed the oldest {removed} of the kept chats with this model; the last {MOST} stay")
    if chat.branch.turns:
        show_last(chat, terminal)
    elif chat.shelf and (former := next(iter(chat.shelf.chats()), None)):
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(former.when))
        terminal.note(f"the chat of {day} is kept: /resume goes on with it")
    terminal.note("/help lists the commands; Ctrl-C stops a reply, Ctrl-D leaves")


def show_last(chat: Chat, terminal: Terminal) -> None:
    """The last exchange, to remind of where a resumed conversation stands."""
    terminal.note(resumed(chat))
    messages = chat.session.messages
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    terminal.note(f"> {messages[last]['content']}")
    for message in messages[last + 1:]:
        view = reply_view(terminal)
        view.write(message["content"])
        view.end()
    if chat.session.can_continue and chat.session.pending:
        terminal.note("that reply was cut short; /continue goes on with it")


def reader(chat: Chat, terminal: Terminal) -> Read:
    if terminal.editing:
        from .editor import line_editor  # not before it is needed: the library takes a while to load

        return line_editor(chat, terminal, state_home() / "history" if chat.kept else None)
    return lambda: read_message(prompt_text(chat) if terminal.person else "")


def read_message(prompt: str) -> str:
    """Lines of standard input up to one that does not end in a backslash."""
    lines: list[str] = []
    while True:
        print("  " if lines and prompt else prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line and not lines:
            raise EOFError
        line = line.rstrip("\r\n")
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines)


def take_turn(chat: Chat, terminal: Terminal, read: Read) -> bool | None:
    """Read a message and act on it; whether that could be done, None when the conversation is over."""
    done = True
    try:
        line = read()
    except (EOFError, KeyboardInterrupt):
        if terminal.person and not terminal.editing:
            print(file=sys.stderr)      # the editor ends its line itself
        return None
    with quiet_keys():
        try:
            act(chat, terminal, line)
        except Exit:
            return None
        except KeyboardInterrupt:
            terminal.note("stopped")
        except SbedgeError as error:
            done = False
            terminal.note(str(error))
        except OSError as error:
            if error.filename is None:      # no file the user named: whoever reads our output has gone
                raise
            done = False
            terminal.note(f"{error.filename}: {error.strerror}")
        keep(chat, terminal)
    return done


def keep(chat: Chat, terminal: Terminal) -> None:
    try:
        with CtrlC():       # waits until it is written
            chat.keep()
    except StateError as error:
        terminal.note(f"this turn is not kept: {error}")


def act(chat: Chat, terminal: Terminal, line: str) -> None:
    """A command or a message. One that begins with a space is a message, whatever follows."""
    line = line.encode(errors="replace").decode()       # a terminal may send bytes that are no character
    if not line.strip():
        return
    if not line.startswith("/"):
        answer(chat, terminal, chat.reply(line))
        return
    try:
        terminal.note(run_command(chat, line))
    except GoOn:
        answer(chat, terminal, chat.go_on())


def answer(chat: Chat, terminal: Terminal, pieces: Iterator[Piece]) -> None:
    """One reply. Ctrl-C ends it; what was said stays in the conversation."""
    meter = Meter(chat.session)
    try:
        show(chat, terminal, meter.watch(pieces))
    except KeyboardInterrupt:
        terminal.note("stopped" if meter.tokens else "stopped before the reply began; the conversation is as it was")
    terminal.note(meter.status())


def show(chat: Chat, terminal: Terminal, texts: Iterator[str]) -> None:
    """Show a reply as it comes. Its beginning is kept, so that the message is, and what there is of it now and then."""
    with CtrlC() as ctrl_c:
        view = reply_view(terminal)
        try:
            ctrl_c.waits = False                # while the prompt is read, which may take long
            for i, text in enumerate(texts):
                ctrl_c.waits = True
                view.write(text)
                with suppress(StateError):      # told at the end of the turn
                    chat.keep(replying=True, sparing=i > 0)
                if ctrl_c.pressed:
                    raise KeyboardInterrupt
        finally:
            ctrl_c.waits = True
            view.end()
