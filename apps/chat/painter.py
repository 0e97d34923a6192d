"""Rows at the end of what a terminal shows, some of which may still change."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TextIO

from rich.text import Text

UP, LINE_START, ERASE_REST_OF_ROW, ERASE_BELOW = "\x1b[{}A", "\r", "\x1b[K", "\x1b[J"
HOME, CLIP, WRAP = "\x1b[H", "\x1b[?7l", "\x1b[?7h"


class Painter:
    """Paints rows over those it painted before, changed ones only.

    The cursor rests at the end of the last row. Rows that have scrolled off the screen are out of reach and stay as
    they are. A row is clipped where the terminal ends: were it broken in two, counting rows would fail.
    """

    def __init__(self, out: TextIO, size: Callable[[], tuple[int, int]]) -> None:
        """`size` tells columns and rows of the terminal, now."""
        self._out, self._size = out, size
        self._rows: list[str] = []      # painted and not final
        self._columns = size()[0]
        self._afresh = False            # on an empty screen: what has no room there is left out

    @property
    def columns(self) -> int:
        """How wide rows may be: the last column stays free, for terminals differ in what follows it."""
        return max(self._size()[0] - 1, 1)

    @property
    def height(self) -> int:
        return self._size()[1]

    def paint(self, rows: Sequence[str], final: int = 0) -> None:
        """Show `rows`, texts with styles, in place of those that were not final. The first `final` of them, not all,
        are so from now on."""
        height = self.height
        if self._afresh:
            left_out = max(0, len(rows) - height)
            rows, final, self._afresh = rows[left_out:], max(0, final - left_out), False
        shown = self._rows
        reach = max(0, len(shown) - height)
        rows = [*rows, *[""] * (reach + 1 - len(rows))]
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(shown, rows, strict=False)))
        first = max(reach, min(same, len(rows) - 1))
        up = len(shown) - 1 - first
        move = "\r\n" if up < 0 and shown else (UP.format(up) if up > 0 else "") + LINE_START
        below = ERASE_BELOW if len(rows) < len(shown) else ""
        text = "\r\n".join(row + ERASE_REST_OF_ROW for row in rows[first:])
        self._out.write(CLIP + move + text + below + WRAP)
        self._out.flush()
        self._rows = rows[final:]

    def finish(self) -> None:
        """All rows are final; the cursor goes to the beginning of the next."""
        self._out.write("\r\n")
        self._out.flush()
        self._rows = []

    def lost(self) -> bool:
        """Whether painted rows are no longer where they were, for the terminal has become too narrow for them.

        Some terminals break such rows and some cut them, so there is no going back to them: all is scrolled away, and
        what should stand on the screen is to be painted anew.
        """
        before, (self._columns, height) = self._columns, self._size()
        if self._columns >= before or all(Text.from_ansi(row).cell_len <= self._columns for row in self._rows):
            return False
        self._out.write("\r\n" * height + HOME)
        self._rows, self._afresh = [], True
        return True
