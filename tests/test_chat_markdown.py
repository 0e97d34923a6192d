"""pytest tests/test_chat_markdown.py: a reply is rendered while it comes, nothing of it lost, doubled or torn."""
from __future__ import annotations

import io
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.text import Text
from screen import Screen

from sbedge.apps.chat import streaming
from sbedge.apps.chat.markdown import block_rows, parse, stacked
from sbedge.apps.chat.streaming import MarkdownReply

DOCUMENT = """# The sea, in **short**

It is *deep* and `blue`: 大きい海 and 🌊. A paragraph long enough to be wrapped on a terminal of eighty columns.
Its second line has <b>tags</b>, [a link](https://example.org/a?b=c) and ~~an error~~.

Facts:
- one **bold with
  a break** in it
- two
  1. nested
  2. nested as well, with a text that must be wrapped because it is longer than the terminal is wide

> a quoted text which is long enough to be wrapped on a terminal of eighty columns, one would think

```python
def f(x):
    return "a line of code that goes far over the edge of the terminal, unless it is broken", x
```

| name | meaning | n |
|------|:-------:|--:|
| alpha | the first letter of the alphabet | 1 |
| beta | some `code` and **bold** | 22 |

---

"""
LONG = DOCUMENT + "".join(f"{i}. item {i} " + "and more " * (i % 13) + "\n" for i in range(1, 30)) + "\n" + DOCUMENT
TALL_TABLE = "| a | b |\n|---|---|\n" + "".join(f"| {i} | {'wide ' * i} |\n" for i in range(30)) + "\nthe end\n"
TALL_CODE = "```c\n" + "".join(f"int line_{i} = {i};\n" for i in range(40)) + "```\nthe end\n"


def rows(text: str, width: int = 79) -> list[str]:
    return [row.plain for row in stacked(parse(text), width)]


class Terminal:
    """A reply on a screen, written in random portions of at most so many characters."""

    def __init__(self, columns: int = 80, height: int = 24) -> None:
        self.screen, self.out = Screen(columns, height), io.StringIO()
        self.reply = MarkdownReply(self.out, lambda: (self.screen.columns, self.screen.rows))

    def write(self, text: str, rng: random.Random, most: int = 9) -> None:
        at = 0
        while at < len(text):
            size = rng.randint(1, most)
            self.reply.write(text[at:at + size])
            self.show()
            at += size

    def show(self) -> str:
        self.screen.feed(self.out.getvalue().replace("\n", "\r\n").replace("\r\r\n", "\r\n"))
        self.out.seek(0)
        self.out.truncate()
        return self.screen.text

    def end(self) -> str:
        self.reply.end()
        return self.show()


@pytest.fixture(params=["each piece", "some pieces"])
def often(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece is painted, or only those that come long enough after the last."""
    if request.param == "each piece":
        monkeypatch.setattr(streaming, "FRAME", 0)
        monkeypatch.setattr(streaming, "SHARE", 0)


# --- rows --------------------------------------------------------------------------------------------
def test_the_parts_of_markdown_are_rendered() -> None:
    shown = rows(DOCUMENT)
    for row in ("The sea, in short", " • one bold with", "   a break in it", "    1. nested", "  def f(x):",
                "▌ a quoted text which is long enough to be wrapped on a terminal of eighty", "─" * 79):
        assert row in shown, row
    assert "Its second line has <b>tags</b>, a link (https://example.org/a?b=c) and an" in shown
    assert any(re.fullmatch(r"alpha +the first letter of the alphabet +1", row) for row in shown)


@pytest.mark.parametrize("width", [20, 33, 79])
def test_no_row_is_wider_than_asked_for(width: int) -> None:
    assert all(row.cell_len <= width for row in stacked(parse(LONG), width))


@pytest.mark.parametrize("text", [
    "<think>so</think> yes", "<div>\n\nhidden?\n\n</div>", "![a picture](https://example.org/p.png)",
    "[ref]: https://example.org", "Roses are red\nviolets are blue", "a & b &lt; c", "head\n===", "| no | table |",
    "```\nunclosed code", "a very" + "very" * 40 + "long word", "    four spaces", "text\n- item\n\n      code in it"])
def test_no_word_is_lost_whatever_markdown_makes_of_it(text: str) -> None:
    shown = "".join(rows(text, 30)).replace(" ", "")
    for word in re.findall(r"\w+", text.replace("&lt;", "")):
        assert word in shown or word in re.sub(r"\W", "", shown), word


def test_lines_stay_lines() -> None:
    assert rows("Roses are red\nviolets are blue") == ["Roses are red", "violets are blue"]


def test_code_keeps_its_indentation_and_is_broken_not_cut() -> None:
    code = "if x:\n\tif y:\n        " + "z" * 100
    shown = rows(f"```python\n{code}\n```", 40)
    assert shown[0] == "  if x:" and shown[1] == "      if y:"
    assert sum(row.count("z") for row in shown) == 100


def test_styles_tell_headings_code_and_emphasis_apart() -> None:
    (row,) = stacked(parse("a **b** `c`"), 40)
    assert {str(span.style) for span in row.spans} == {"bold", "cyan"}


@pytest.mark.parametrize("text", [
    ">" * 200 + " deep", "- " * 100 + "deep", "1. " * 60 + "x", "[" * 500, "*" * 999 + "a" + "*" * 999,
    "`" * 301, "|" * 300 + "\n" + "|-" * 300 + "|", "\t" * 50 + "x", "```" + "no-such-language" * 20 + "\nx\n```",
    "#" * 9, "-", "1.", ">", "&#27;[2J &#x9b;31m", "\u202e\u200d\ufe0f", "\n\n \n"])
@pytest.mark.parametrize("width", [1, 10, 79])
def test_odd_texts_are_rendered_too(text: str, width: int) -> None:
    shown = stacked(parse(text), width)
    assert not any(char in row.plain for row in shown for char in "\x1b\x9b\r\n\t")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*"ab *_`#->|1.[]()~\n\\<&;:é大🌊", "\n\n", "```", "- ", "  ", "|-|", "**"]),
                max_size=60).map("".join))
def test_any_text_renders(text: str) -> None:
    assert all(isinstance(row, Text) for row in stacked(parse(text), 20))


def test_only_the_last_block_changes_as_text_comes() -> None:
    for end in range(0, len(DOCUMENT), 3):
        before, after = parse(DOCUMENT[:end]), parse(DOCUMENT[:end + 40])
        for old, new in zip(before[:-1], after, strict=False):
            assert [r.plain for r in block_rows(old, 79)] == [r.plain for r in block_rows(new, 79)]


# --- painting ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", [DOCUMENT, LONG, TALL_TABLE, TALL_CODE, "", "\n", "word"],
                         ids=["document", "long", "tall table", "tall code", "empty", "blank", "word"])
@pytest.mark.parametrize(("columns", "height"), [(80, 24), (40, 8)])
def test_streamed_in_any_portions_it_looks_as_if_rendered_at_once(
        text: str, columns: int, height: int, often: None) -> None:
    terminal = Terminal(columns, height)
    terminal.write(text, random.Random(0))
    assert terminal.end().rstrip() == "\n".join(row.rstrip() for row in rows(text, columns - 1)).rstrip()
    assert terminal.screen.x == 0


def test_a_reply_leaves_what_stood_above_it(often: None) -> None:
    terminal = Terminal(80, 10)
    terminal.screen.history = ["> a question"]
    terminal.write(LONG, random.Random(1))
    assert terminal.end().startswith("> a question\nThe sea, in short\n")


def test_before_the_reply_comes_the_terminal_shows_that_it_is_awaited() -> None:
    terminal = Terminal()
    assert terminal.show() == "…"
    terminal.write("Hello", random.Random(0))
    assert terminal.show() == "Hello"


def test_what_has_been_painted_is_not_painted_again(often: None) -> None:
    terminal = Terminal()
    for _ in range(20):
        terminal.reply.write("A line of text.\n")
    terminal.show()
    terminal.reply.write("more")
    assert len(terminal.out.getvalue()) < 60


@pytest.mark.parametrize("reflow", [True, False])
@pytest.mark.parametrize("columns", [100, 60])
def test_a_resized_terminal_shows_the_end_of_the_reply_once_and_whole(
        columns: int, reflow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "FRAME", 0)
    monkeypatch.setattr(streaming, "SHARE", 0)
    whole = rows(LONG, columns - 1)
    for at in range(100, len(LONG) - 700, 311):
        terminal = Terminal(80, 24)
        terminal.write(LONG[:at], random.Random(at), most=200)
        terminal.screen.resize(columns, 20, reflow)
        terminal.write(LONG[at:at + 1], random.Random(at))
        items = re.findall(r"\. item (\d+)", terminal.screen.display if columns < 80 else terminal.screen.text)
        assert items == sorted(set(items), key=int)
        terminal.write(LONG[at + 1:], random.Random(at), most=200)
        assert terminal.end().split("\n")[-15:] == whole[-15:]


def test_a_reply_cannot_command_the_terminal() -> None:
    terminal = Terminal()
    terminal.reply.write("a\x1b[2Jb\x07 \x9b31m\r`c\x1b]0;title\x07`")
    terminal.reply.end()
    assert terminal.show() == "a[2Jb 31mc]0;title"
