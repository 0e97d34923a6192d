"""Markdown as rows of a terminal, in such a way that text which is still growing changes few of them.

Nothing a model says gets lost: HTML is text, a link shows where it leads, a line break breaks the line.
"""
from __future__ import annotations

import io
from functools import lru_cache

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode as Node
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound
from rich import box
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

# `lheading` would make a heading of every line above a list while that begins, `reference` hide text.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable(
    ["lheading", "reference", "image"])
SPANS = {"strong": "bold", "em": "italic", "s": "strike", "a": "underline"}    # tag -> style
CODE = "cyan"
NARROWEST = 8           # columns left for a text that is nested deep
LAYOUT = Console(file=io.StringIO(), width=80)      # measures; prints nothing


def parse(text: str) -> list[Node]:
    """The blocks of `text`; all but the last stay as they are however the text goes on."""
    tokens = PARSER.parse(text)
    for token in tokens:        # spans stay a list: they nest without limit, and a tree of them is recursive
        if token.type == "inline":
            token.meta, token.children = {"spans": token.children}, None
    return Node(tokens).children


def block_rows(block: Node, width: int) -> list[Text]:
    """One block as rows of at most `width` columns (but for texts nested too deep)."""
    width = max(width, NARROWEST)
    match block.type:
        case "paragraph":
            return wrapped(inline(block.children[0]), width)
        case "heading":
            style = "bold underline" if block.tag in ("h1", "h2") else "bold"
            return wrapped(inline(block.children[0], style), width) if block.children else []
        case "fence" | "code_block":
            return code_rows(block.content, block.info.partition(" ")[0], width)
        case "bullet_list" | "ordered_list":
            return list_rows(block, width)
        case "blockquote":
            return [Text.assemble(("▌ ", "dim"), row) for row in stacked(block.children, width - 2)]
        case "table":
            return table_rows(block, width)
        case "hr":
            return [Text("─" * width, "dim")]
    return wrapped(Text(block.content), width)


def stacked(blocks: list[Node], width: int, item: bool = False) -> list[Text]:
    """Blocks one below the other, an empty row between; none before a list within an `item` of a list."""
    rows: list[Text] = []
    for block in blocks:
        if rows and not (item and block.type.endswith("_list")):
            rows.append(Text())
        rows += block_rows(block, width)
    return rows


def list_rows(block: Node, width: int) -> list[Text]:
    """Items follow each other closely, and numbers up to 99 indent alike: the next item moves none before it."""
    rows: list[Text] = []
    first = int(str(block.attrs.get("start", 1)))
    for number, item in enumerate(block.children, first):
        lead = " • " if block.type == "bullet_list" else f"{number}.".rjust(3) + " "
        item_rows = stacked(item.children, width - len(lead), item=True) or [Text()]
        rows += [Text.assemble((lead if i == 0 else " " * len(lead), "bold"), row) for i, row in enumerate(item_rows)]
    return rows


def table_rows(block: Node, width: int) -> list[Text]:
    head, *body = [row for part in block.children for row in part.children]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for cell in head.children:
        alignment = str(cell.attrs.get("style", "")).removeprefix("text-align:")
        table.add_column(inline(cell.children[0]), overflow="fold",
                         justify="right" if alignment == "right" else "center" if alignment == "center" else "left")
    for row in body:
        table.add_row(*(inline(cell.children[0]) for cell in row.children))
    lines = LAYOUT.render_lines(table, LAYOUT.options.update(width=width), pad=False)
    return [_trimmed(Text.assemble(*((s.text, s.style or "") for s in line))) for line in lines]


def code_rows(code: str, language: str, width: int) -> list[Text]:
    code = code.rstrip("\n").expandtabs(4)
    lexer = lexer_of(language)
    text = Text(code) if lexer is None else Syntax("", lexer, theme="ansi_dark", word_wrap=True).highlight(code)
    text.rstrip()
    return [Text.assemble("  ", row) for row in wrapped(text, width - 2)]


@lru_cache(maxsize=64)
def lexer_of(language: str) -> Lexer | None:
    try:
        return get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return None


def inline(node: Node, style: str = "") -> Text:
    """The spans of a paragraph or a cell as one text."""
    text = Text(style=style)
    begun: list[tuple[int, Token]] = []
    for span in node.meta["spans"]:
        if span.nesting == 1:
            begun.append((len(text), span))
        elif span.nesting == -1:
            start, opening = begun.pop()
            text.stylize(SPANS[span.tag], start)
            if span.tag == "a" and (url := str(opening.attrs["href"])).removeprefix("mailto:") != text.plain[start:]:
                text.append(f" ({url})", "dim")
        elif span.type in ("softbreak", "hardbreak"):
            text.append("\n")
        else:
            text.append(span.content, CODE if span.type == "code_inline" else None)
    return text


def wrapped(text: Text, width: int) -> list[Text]:
    """The text broken between words where it can be."""
    return [_trimmed(row) for row in text.wrap(LAYOUT, width, overflow="fold")]


def _trimmed(row: Text) -> Text:
    row.rstrip()
    return row
