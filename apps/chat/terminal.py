"""The terminal a chat talks in: what it can do, and lines beside the conversation."""
from __future__ import annotations

import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sbedge.apps.text import without_control

try:
    import termios
except ImportError:         # Windows
    termios = None          # type: ignore[assignment]

USUAL_SIZE = (80, 24)
NARROWEST = 10          # columns that notes are broken for


@dataclass(frozen=True)
class Terminal:
    """What a chat may do with its three streams.

    person   someone types and reads here: prompts and hints make sense
    editing  the cursor may move in the line that is typed
    styled   replies are rendered, with colours; otherwise they are plain text
    """

    person: bool = False
    editing: bool = False
    styled: bool = False

    @classmethod
    def found(cls, color: bool = True) -> Terminal:
        """What there is; `color` False forbids styles, as do NO_COLOR and TERM=dumb."""
        person = sys.stdin.isatty() and sys.stdout.isatty()
        capable = os.name != "posix" or os.environ.get("TERM", "dumb") != "dumb"
        unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        styled = color and capable and unicode and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        return cls(person, editing=person and capable, styled=styled)

    def note(self, text: str) -> None:
        """A line beside the conversation, on standard error; on a terminal it is broken between words."""
        text = without_control(text)
        if sys.stderr.isatty():
            width = max(terminal_size()[0] - 1, NARROWEST)
            text = "\n".join(textwrap.fill(line, width, subsequent_indent="  ", replace_whitespace=False,
                                           break_long_words=False, break_on_hyphens=False)
                             for line in text.split("\n"))
            text = f"\x1b[2m{text}\x1b[0m" if self.styled else text
        print(text, file=sys.stderr, flush=True)


def terminal_size() -> tuple[int, int]:
    """Columns and rows of the terminal that standard output goes to."""
    try:
        columns, rows = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):       # no terminal, or no file
        columns, rows = shutil.get_terminal_size(USUAL_SIZE)
    return columns or USUAL_SIZE[0], rows or USUAL_SIZE[1]


@contextmanager
def quiet_keys() -> Iterator[None]:
    """What is typed meanwhile is not shown but waits for the next prompt; Ctrl-C acts, Ctrl-Z does not.

    Echoed keys would stand in the midst of a reply and move the rows that are yet to be painted over.
    """
    if termios is None or not sys.stdin.isatty():
        yield
        return
    file = sys.stdin.fileno()
    before, quiet = termios.tcgetattr(file), termios.tcgetattr(file)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    quiet[6][termios.VSUSP] = b"\0"
    termios.tcsetattr(file, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(file, termios.TCSANOW, before)


class CtrlC:
    """Within this context Ctrl-C interrupts at once, or where `waits` is set only notes that it was pressed.

    In the midst of a token it would leave the model's state half way, in the midst of a control sequence the screen.
    """

    def __init__(self) -> None:
        self.waits, self.pressed = True, False

    def __enter__(self) -> CtrlC:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        self.pressed = True
        if not self.waits:
            raise KeyboardInterrupt
