"""What a person would see: a terminal small enough to read, and a program that runs in one."""
from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pexpect
from rich.cells import cell_len

import sbedge

ROOT = Path(sbedge.__file__).parents[1]
SEQUENCE = re.compile(r"\x1b\[([?>]?)([0-9;]*)([A-Za-z])|\x1b[=>78]")
PATIENCE = 60       # seconds; far more than anything takes, for the machine may be busy


class Screen:
    """Rows of cells under a cursor, and `history`, the rows that have scrolled off the top."""

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.columns, self.rows = columns, rows
        self.history: list[str] = []
        self.grid = [[" "] * columns for _ in range(rows)]
        self.x = self.y = 0
        self.wrap = True
        self._rest = ""     # the beginning of a control sequence

    def feed(self, text: str) -> None:
        text, self._rest = self._rest + text, ""
        at = 0
        while at < len(text):
            if text[at] != "\x1b":
                self._put(text[at])
                at += 1
            elif match := SEQUENCE.match(text, at):
                self._control(match)
                at = match.end()
            else:
                assert len(text) - at < 16, f"unknown control sequence {text[at:at + 16]!r}"
                self._rest = text[at:]
                return

    def _put(self, char: str) -> None:
        if char == "\r":
            self.x = 0
        elif char == "\n":
            self._line_feed()
        elif char == "\b":
            self.x = max(self.x - 1, 0)
        elif char == "\t":
            self.x = min((self.x // 8 + 1) * 8, self.columns - 1)
        elif char != "\x07":
            assert char.isprintable() or ord(char) > 0x9f, f"control character {char!r}"
            width = cell_len(char)
            if self.x + width > self.columns:       # the last column is full
                if self.wrap:
                    self.x = 0
                    self._line_feed()
                else:
                    self.x = self.columns - width
            if width == 0:
                self.grid[self.y][max(self.x - 1, 0)] += char
                return
            self.grid[self.y][self.x:self.x + width] = [char, *[""] * (width - 1)]
            self.x += width

    def _line_feed(self) -> None:
        if self.y < self.rows - 1:
            self.y += 1
            return
        self.history.append("".join(self.grid.pop(0)).rstrip())
        self.grid.append([" "] * self.columns)

    def _control(self, match: re.Match[str]) -> None:
        private, numbers, kind = match[1], match[2], match[3]
        if private == "?":
            if numbers == "7":
                self.wrap = kind == "h"
            return
        n = int(numbers.split(";")[0] or 0) if numbers else 0
        self.x = min(self.x, self.columns - 1) if kind and kind in "ABCDJK" else self.x
        row = self.grid[self.y]
        match kind:
            case "A":
                self.y = max(self.y - max(n, 1), 0)
            case "B":
                self.y = min(self.y + max(n, 1), self.rows - 1)
            case "C":
                self.x = min(self.x + max(n, 1), self.columns - 1)
            case "D":
                self.x = max(self.x - max(n, 1), 0)
            case "H":
                self.y, self.x = 0, 0
            case "K":
                row[self.x if n == 0 else 0:] = [" "] * (self.columns - (self.x if n == 0 else 0))
            case "J":
                row[self.x:] = [" "] * (self.columns - self.x)
                for y in range(self.y + 1 if n == 0 else 0, self.rows):
                    self.grid[y] = [" "] * self.columns
            case "m" | "q" | "n" | None:
                pass
            case _:
                raise AssertionError(f"unknown control sequence {match[0]!r}")

    def resize(self, columns: int, rows: int, reflow: bool = False) -> None:
        """As terminals do: some cut rows that are too long, some break them (`reflow`)."""
        lines = self.text.split("\n")
        if reflow:
            lines = [line[i:i + columns] for line in lines for i in range(0, max(len(line), 1), columns)]
        self.columns, self.rows = columns, rows
        top = max(0, len(lines) - rows)
        self.history, shown = lines[:top], [line[:columns] for line in lines[top:]]
        self.grid = [list(line.ljust(columns)) for line in shown + [""] * (rows - len(shown))]
        self.y, self.x = len(shown) - 1, min(len(shown[-1]), columns - 1)

    @property
    def display(self) -> str:
        """What is on the screen."""
        return "\n".join("".join(row).rstrip() for row in self.grid).rstrip("\n")

    @property
    def text(self) -> str:
        """All there is, scrolled off or not."""
        return "\n".join([*self.history, *("".join(row).rstrip() for row in self.grid)]).rstrip("\n")


def heed_interrupts() -> None:
    """Ctrl-C shall reach the program though the tests themselves run in the background, where a shell ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Program:
    """A Python program in a terminal: `python arguments`. `raw` is what it has written so far."""

    def __init__(self, *arguments: str | Path, home: Path, columns: int = 80, rows: int = 24,
                 environment: Mapping[str, str] | None = None) -> None:
        own = {"TERM": "xterm", "HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "LC_ALL": "C.UTF-8",
               "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "PATH": os.environ["PATH"], **(environment or {})}
        self.child = pexpect.spawn(sys.executable, [str(word) for word in arguments], env=own, cwd=str(ROOT),
                                   dimensions=(rows, columns), encoding="utf-8", codec_errors="replace",
                                   preexec_fn=heed_interrupts)
        self.child.delaybeforesend = None
        self.screen = Screen(columns, rows)
        self.raw = ""

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.close(force=True)

    def type(self, text: str) -> None:
        self.child.send(text)

    def say(self, line: str, expect: str = "position") -> str:
        """Type a line; what the terminal shows from there to the next prompt, once `expect` is in it."""
        before = len(self.screen.text)
        shown = self.screen.text.count(expect)
        self.type(f"{line}\r")
        self.until(lambda: self.screen.text.count(expect) > shown + line.count(expect) and self.at_prompt())
        return self.screen.text[before:]

    def until(self, done) -> str:
        """Read until `done` (a text on the screen, or a function) and return all that is there."""
        deadline = time.monotonic() + PATIENCE
        while not (done() if callable(done) else done in self.screen.text):
            assert time.monotonic() < deadline and self._read(), f"{done!r} did not come:\n{self.screen.text}"
        return self.screen.text

    def at_prompt(self) -> bool:
        last = self.screen.display.rpartition("\n")[2]
        return re.fullmatch(r"([\w-]+)?>", last) is not None

    def end(self) -> int | None:
        """Read to the end; the exit code, None if a signal ended it."""
        self.drain()
        self.child.close()
        return self.child.exitstatus

    def drain(self) -> None:
        """Read all there is until the program ends."""
        while self._read():
            pass

    def resize(self, columns: int, rows: int, reflow: bool = False) -> None:
        self.screen.resize(columns, rows, reflow)
        self.child.setwinsize(rows, columns)

    def _read(self) -> bool:
        try:
            text = self.child.read_nonblocking(1 << 16, timeout=1)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += text
        self.screen.feed(text)
        return True
