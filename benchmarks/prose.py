"""The prose that calibration and conversion are trained and measured with, as two disjoint halves of a text.

    python benchmarks/prose.py SOURCE prose-1.txt prose-2.txt [CHARACTERS]

SOURCE is a text compressed by gzip, or a folder with HTML pages, out of a Debian package, such as

    jargon-text 4.4.7-4.1         usr/share/doc/jargon-text/jargon.txt.gz
    debian-handbook 11.20220922   usr/share/doc/debian-handbook/html/en-US

Paragraphs of running English are kept, one a line; pages are read in the order of their names. With CHARACTERS each
half keeps about so many, in paragraphs spread evenly over it. The whole halves of the Jargon File have SHA-256 sums
that begin with e4dfb199 and 266c7bb7.
"""
from __future__ import annotations

import gzip
import hashlib
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

LEAST = 200             # characters of a paragraph
LETTERS = 0.92          # and its share of letters and spaces


class Paragraphs(HTMLParser):
    """The text of a page's <p> and <div class="para"> elements."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p" or (tag, dict(attrs).get("class")) == ("div", "para"):
            self.inside = True
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("p", "div")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1] += data


def paragraphs(source: Path) -> Iterator[str]:
    if source.is_dir():
        for page in sorted(source.rglob("*.html")):
            yield from Paragraphs(page.read_text(encoding="utf-8", errors="replace")).found
    else:
        yield from re.split(r"\n\s*\n", gzip.decompress(source.read_bytes()).decode())


def is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return (len(paragraph) > LEAST and letters / len(paragraph) > LETTERS and paragraph[0].isalpha()
            and paragraph[-1] in ".!?)")


def thinned(prose: str, characters: int) -> str:
    """Every so many-th paragraph, so that about `characters` are left."""
    return "\n\n".join(prose.split("\n\n")[::max(1, round(len(prose) / characters))])


def main(source: str, first: str, second: str, characters: str = "") -> None:
    clean = (re.sub(r"\s+", " ", part).strip() for part in paragraphs(Path(source)))
    prose = "\n\n".join(dict.fromkeys(filter(is_prose, clean)))
    cut = prose.index("\n\n", len(prose) // 2)
    for path, half in ((first, prose[:cut]), (second, prose[cut + 2:])):
        half = thinned(half, int(characters)) if characters else half
        Path(path).write_text(half + "\n", encoding="utf-8")
        print(path, len(half), hashlib.sha256(Path(path).read_bytes()).hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:])
