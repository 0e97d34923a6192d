"""The line a person types: edited, completed, remembered."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth, create_output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from .branches import Chat
from .commands import COMMANDS, PARAMS, prompt_text
from .terminal import Terminal


def line_editor(chat: Chat, terminal: Terminal, history: Path | None) -> Callable[[], str]:
    """A function that lets a person type one message, of several lines if need be. It raises EOFError to leave.

    history  a file for what was typed, None to forget it
    """
    output = create_output()
    if isinstance(output, Vt100_Output):
        output.enable_cpr = False       # nothing here asks where the cursor is, and not every terminal answers
    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory() if history is None else SavedHistory(history), output=output,
        color_depth=None if terminal.styled else ColorDepth.DEPTH_1_BIT,
        completer=Completions(chat), complete_while_typing=False, complete_style=CompleteStyle.READLINE_LIKE,
        multiline=True, prompt_continuation="  ", key_bindings=bindings(), enable_suspend=True)
    style = "bold" if terminal.styled else ""
    return lambda: session.prompt([(style, prompt_text(chat))])


def bindings() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        """Send, or go on in a new line after a backslash."""
        buffer = event.current_buffer
        if buffer.text.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def drop(event: KeyPressEvent) -> None:
        """Drop what was typed (the up arrow brings it back), or leave."""
        if event.current_buffer.text:
            event.current_buffer.reset(append_to_history=True)
        else:
            event.app.exit(exception=EOFError)

    return keys


class Completions(Completer):
    """Commands, and what stands behind some of them."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, argument = text.partition(" ")
        if space and name in ("/save", "/load"):
            yield from self._paths.get_completions(Document(argument), event)
            return
        if not space:
            words = [f"{c.name} " if c.takes else c.name for c in COMMANDS.values()]
        else:
            words = {"/switch": [*self._chat.branches], "/params": [f"{name} " for name in PARAMS]}.get(name, [])
        begun = argument.rpartition(" ")[2] if space else name
        yield from (Completion(word, -len(begun)) for word in words if word.startswith(begun))


class SavedHistory(FileHistory):
    """A file that only its owner may read. Trouble with it is no reason not to chat."""

    def load_history_strings(self) -> Iterable[str]:
        with suppress(OSError):
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            path = Path(os.fsdecode(self.filename))
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
            super().store_string(string)
