"""A reply in Markdown, rendered while it comes."""
from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.text import Text

from sbedge.apps.text import without_control

from .markdown import block_rows, parse
from .painter import Painter

FRAME = 1 / 25          # seconds from one painting to the next ...
SHARE = 10              # ... and so many times as long as a painting takes
WAITING = "…"           # until the reply begins


class MarkdownReply:
    """Renders Markdown while it comes. Only the last block is parsed and painted again, those before it are done."""

    def __init__(self, out: TextIO, size: Callable[[], tuple[int, int]]) -> None:
        self._painter = Painter(out, size)
        self._console = Console(file=out, force_terminal=True, highlight=False)
        self._text, self._start = "", 0     # the last block begins at text[start]
        self._due = 0.0
        self._painter.paint([self._styled(Text(WAITING, "dim"))])

    def write(self, text: str) -> None:
        self._text += without_control(text)
        began = time.monotonic()
        if began >= self._due:
            self._paint()
            now = time.monotonic()
            self._due = now + max(FRAME, SHARE * (now - began))

    def end(self) -> None:
        self._paint(whole=True)
        self._painter.finish()

    def _paint(self, whole: bool = False) -> None:
        if self._painter.lost():
            self._start = 0
        rest = self._text[self._start:]
        blocks, final = parse(rest), 0
        rows: list[Text] = []
        for block in blocks:
            final = len(rows)
            rows += [Text()] if rows or self._start else []
            rows += block_rows(block, self._painter.columns)
        if blocks and blocks[-1].type == "table" and not whole:     # the next line may widen its columns
            rows = rows[: final + self._painter.height - 1]
        self._painter.paint([self._styled(row) for row in rows] or [""], final)
        if blocks and (lines := blocks[-1].map):
            self._start += sum(len(line) + 1 for line in rest.split("\n")[: lines[0]])

    def _styled(self, row: Text) -> str:
        with self._console.capture() as capture:
            self._console.print(row, end="", soft_wrap=True)
        return capture.get()
