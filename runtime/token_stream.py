"""A text of any length as token ids, a block at a time: memory stays the same."""
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np

from .tokenizer import Tokenizer

BLOCK = 1 << 16     # characters encoded at a time

# Places that no token of any known tokenizer spans: before a single space, and after a single line break.
_CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")
_ANCHOR = "\n"


def stream_ids(tokenizer: Tokenizer, pieces: Iterable[str], block: int = BLOCK) -> Iterator[list[int]]:
    """The ids that `tokenizer.encode` gives for all `pieces` as one text, special tokens written in it taken as text.

    Only where `block` characters hold neither a single space nor a single line break may a word be cut in two.
    """
    text, first = "", True
    for piece in pieces:
        text += piece
        while len(text) >= block:
            cut = max((found.end() for found in _CUT.finditer(text)), default=len(text))
            yield _encode(tokenizer, text[:cut], first)
            text, first = text[cut:], False
    if text or first:
        yield _encode(tokenizer, text, first)


def _encode(tokenizer: Tokenizer, text: str, first: bool) -> list[int]:
    if first:
        return tokenizer.encode(text, parse_special=False)
    # Behind a line break, which is taken away again: sentencepiece treats the beginning of a text specially.
    anchor = tokenizer.encode(_ANCHOR, parse_special=False, add_bos=False)
    ids = tokenizer.encode(_ANCHOR + text, parse_special=False, add_bos=False)
    return ids[len(anchor):]


def in_chunks(blocks: Iterable[list[int]], size: int, most: int | None = None) -> Iterator[np.ndarray]:
    """The ids of `blocks`, at most `most` of them, as arrays of `size` (the last may be shorter)."""
    waiting: list[int] = []
    left = most
    for block in blocks:
        waiting += block if left is None else block[:left]
        left = None if left is None else left - len(block)
        while len(waiting) >= size:
            yield np.array(waiting[:size], np.int64)
            waiting = waiting[size:]
        if left is not None and left <= 0:
            break
    if waiting:
        yield np.array(waiting, np.int64)
