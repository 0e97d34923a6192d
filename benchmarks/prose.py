"""The prose that docs/calibration.md measures with: two disjoint halves of the Jargon File 4.4.7 (public domain).

    python benchmarks/prose.py jargon.txt.gz prose-1.txt prose-2.txt

jargon.txt.gz is that of the Debian package jargon-text 4.4.7-4.1 (the text within: SHA-256 40dfb4b9...). Paragraphs of
running English are kept, one a line; the halves' SHA-256 begin with e4dfb199 and 266c7bb7.
"""
from __future__ import annotations

import gzip
import hashlib
import re
import sys
from pathlib import Path

LEAST = 200             # characters of a paragraph
LETTERS = 0.92          # and its share of letters and spaces


def is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return (len(paragraph) > LEAST and letters / len(paragraph) > LETTERS and paragraph[0].isalpha()
            and paragraph[-1] in ".!?)")


def main(source: str, first: str, second: str) -> None:
    text = gzip.decompress(Path(source).read_bytes()).decode()
    paragraphs = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text))
    prose = "\n\n".join(dict.fromkeys(filter(is_prose, paragraphs)))
    cut = prose.index("\n\n", len(prose) // 2)
    for path, half in ((first, prose[:cut]), (second, prose[cut + 2:])):
        Path(path).write_text(half + "\n", encoding="utf-8")
        print(path, hashlib.sha256(Path(path).read_bytes()).hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:])
