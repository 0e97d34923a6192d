"""A reply on standard output, as it comes: rendered where the terminal can, else as plain text."""
from __future__ import annotations

import sys
from typing import Protocol

from sbedge.apps.text import without_control

from .terminal import Terminal, terminal_size


class ReplyView(Protocol):
    def write(self, text: str) -> None:
        """What comes next."""

    def end(self) -> None:
        """Nothing more comes; the cursor goes to the beginning of a row."""


def reply_view(terminal: Terminal) -> ReplyView:
    if not terminal.styled:
        return PlainReply()
    from .streaming import MarkdownReply  # not before it is needed: the libraries take a while to load

    return MarkdownReply(sys.stdout, terminal_size)


class PlainReply:
    """The text as it is; a terminal gets it without what could command it."""

    def write(self, text: str) -> None:
        print(without_control(text) if sys.stdout.isatty() else text, end="", flush=True)

    def end(self) -> None:
        print(flush=True)
