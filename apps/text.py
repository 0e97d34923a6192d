"""Text on its way to a terminal."""
from __future__ import annotations


def one_line(text: str) -> str:
    """One line without control characters: names inside model files are not trusted with the terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text).strip()


def without_control(text: str) -> str:
    """The text without the characters by which it could command a terminal; line breaks and tabs stay."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t" or ord(c) > 0x9f)
