"""From token ids back to text, one token at a time."""
from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


class StreamDecoder:
    """Turns ids into text as they come; what is printed is never a broken character.

    Bytes of an unfinished UTF-8 character wait for the next token. The texts of all `push`es and the final
    `flush` add up to `tokenizer.decode(ids)`; bytes that are no UTF-8 become U+FFFD.

    `at_start` says that the text begins here: sentencepiece's space before the first word is then taken
    away. A reply that continues a prompt is decoded with `at_start=False`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False, at_start: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip_space = tokenizer.space_prefix and at_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Text that token `id` completes; may be empty."""
        data = self._tokenizer.token_bytes(id)
        if id in self._tokenizer.special_ids:
            # The encoder puts its space before the text after a special token, too.
            self._strip_space = self._tokenizer.space_prefix
            return "" if self._skip_special else self._utf8.decode(data)
        if self._strip_space and data:
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Text of the bytes still waiting, as U+FFFD; the next push starts a new character."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
