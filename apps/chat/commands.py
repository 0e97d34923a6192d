"""Slash commands: what a line that begins with a slash does to a chat."""
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sbedge.errors import InputError

from .branches import MAIN, Chat
from .meter import megabytes, statistics

KINDS: dict[str, type] = {"temperature": float, "top_k": int, "top_p": float, "min_p": float,
                          "repetition_penalty": float, "presence_penalty": float, "penalty_window": int, "seed": int}
MAX_TOKENS = "max_tokens"
PARAMS = (*KINDS, MAX_TOKENS)


class Exit(Exception):
    """The user wants to leave."""


class GoOn(Exception):
    """The user wants more of the last reply."""


@dataclass(frozen=True)
class Command:
    """`run` does it, given what stands behind the name, and says what was done. `takes`: [..] may be left out, "" is
    nothing at all."""

    name: str
    takes: str
    help: str
    run: Callable[[Chat, str], str]


def run_command(chat: Chat, line: str) -> str:
    """Do what a line says, and say what was done. Exit, GoOn, or SbedgeError for what cannot be done."""
    name, *rest = line.strip().split(None, 1)
    argument = rest[0] if rest else ""
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        close = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else "/help lists them; a space before it makes it a message"
        raise InputError(f"{name:.40} is no command; {hint}")
    if argument and not command.takes:
        raise InputError(f"{name} takes nothing behind it, found {argument!r:.40}")
    if not argument and command.takes and not command.takes.startswith("["):
        raise InputError(f"{name} needs {command.takes} behind it; /help lists the commands")
    return command.run(chat, argument)


def help_text(chat: Chat, _: str) -> str:
    return HELP


def system(chat: Chat, text: str) -> str:
    branch = chat.branch
    if not text:
        return f"system text: {branch.system}" if branch.system else "no system text; /system TEXT sets one"
    branch.system = None if text == "none" else text
    done = "taken away" if branch.system is None else "set"
    return f"system text {done}" + ("; the conversation will be read again with it" if branch.turns else "")


def params(chat: Chat, text: str) -> str:
    words = text.replace("=", " ").split()
    if len(words) % 2:
        raise InputError(f"/params takes pairs of NAME and VALUE, found {text!r:.60}")
    chosen = {name: parameter(name, value) for name, value in zip(words[::2], words[1::2], strict=True)}
    limit = chosen.pop(MAX_TOKENS, chat.max_tokens)
    sampling = replace(chat.session.sampling, **chosen)     # checks the ranges; nothing is changed before
    if limit is not None and limit < 1:
        raise InputError(f"max_tokens is {limit}, expected a whole number from 1, or none for no limit")
    if sampling != chat.session.sampling:
        chat.session.sampling = sampling
    chat.chosen |= bool(chosen)
    chat.max_tokens = limit
    shown = {name: getattr(sampling, name) for name in KINDS} | {MAX_TOKENS: limit}
    return "\n".join(f"{name:20}{'none' if value is None else value}" for name, value in shown.items())


def parameter(name: str, text: str) -> Any:
    if name not in PARAMS:
        close = get_close_matches(name, PARAMS, 1)
        raise InputError(f"there is no parameter {name!r:.40}; " + (
            f"did you mean {close[0]}?" if close else f"there are {', '.join(PARAMS)}"))
    if text == "none" and name in ("seed", MAX_TOKENS):
        return None
    kind = KINDS.get(name, int)
    try:
        return kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise InputError(f"{name} is {text!r:.40}, expected {expected}") from None


def stats(chat: Chat, _: str) -> str:
    of = f" of {', '.join(chat.branches)}" if len(chat.branches) > 1 else ""
    facts = [("branch", chat.name + of), *statistics(chat.session),
             ("kept in", "nowhere" if chat.kept is None else shown_path(chat.kept.folder))]
    return "\n".join(f"{name:14}{text}" for name, text in facts)


def save(chat: Chat, name: str) -> str:
    path = Path(os.path.expanduser(name))
    chat.save(path)
    return f"saved to {name} ({megabytes(path.stat().st_size)})"


def load(chat: Chat, name: str) -> str:
    before = chat.name
    chat.load(Path(os.path.expanduser(name)))
    back = f"; /switch {before} goes back" if chat.name != before else ""
    return f"loaded {name}: {where(chat)}{back}"


def fork(chat: Chat, name: str) -> str:
    before = chat.name
    chat.fork(name)
    return f"now in {chat.name}, with the same past; /switch {before} goes back"


def switch(chat: Chat, name: str) -> str:
    if not name:
        return "\n".join(f"{'*' if there == chat.name else ' '} {there:14}{counted(branch.turns)}"
                         for there, branch in chat.branches.items())
    chat.switch(name)
    return f"now in {name}: {where(chat)}"


def rewind(chat: Chat, text: str) -> str:
    if text and not (text.isascii() and text.isdigit()):
        raise InputError(f"/rewind takes a number of turns, found {text!r:.40}")
    message = chat.rewind(int(text[:9]) if text else 1)
    return f"back to before {shortened(message)!r}: {where(chat)}"


def new(chat: Chat, name: str) -> str:
    before = chat.name
    chat.new(name)
    return f"a new conversation, {chat.name}; /switch {before} goes back"


def resume(chat: Chat, _: str) -> str:
    chat.resume()
    return resumed(chat)


def go_on(chat: Chat, _: str) -> str:
    raise GoOn


def leave(chat: Chat, _: str) -> str:
    raise Exit


def resumed(chat: Chat) -> str:
    others = f"; other branches: {', '.join(name for name in chat.branches if name != chat.name)}"
    return f"resumed {chat.name}: {where(chat)}{others if len(chat.branches) > 1 else ''}"


def prompt_text(chat: Chat) -> str:
    return "> " if chat.name == MAIN else f"{chat.name}> "


def where(chat: Chat) -> str:
    return f"{counted(chat.branch.turns)}, position {chat.session.state.position}"


def counted(turns: int) -> str:
    return f"{turns} turn{'' if turns == 1 else 's'}"


def shortened(text: str, length: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def shown_path(path: Path) -> str:
    return str(Path("~") / path.relative_to(Path.home())) if path.is_relative_to(Path.home()) else str(path)


COMMANDS = {command.name: command for command in (
    Command("/help", "", "this list", help_text),
    Command("/system", "[TEXT]", "show or set the system text; none takes it away", system),
    Command("/params", "[NAME VALUE ...]", "show or set how tokens are chosen", params),
    Command("/stats", "", "what the conversation holds and took", stats),
    Command("/save", "FILE", "keep this conversation in a file", save),
    Command("/load", "FILE", "go on with a kept one", load),
    Command("/fork", "[NAME]", "go on in a branch; this one stays as it is", fork),
    Command("/switch", "[NAME]", "go to another branch; without a name: list them", switch),
    Command("/rewind", "[N]", "take back the last turn, or N", rewind),
    Command("/continue", "", "more of a reply that was cut short", go_on),
    Command("/new", "[NAME]", "another conversation; this one stays as a branch", new),
    Command("/resume", "", "go on with the last kept chat", resume),
    Command("/quit", "", "leave", leave))}
ALIASES = {"/exit": "/quit"}
HELP = "\n".join([*(f"{f'{c.name} {c.takes}':26}{c.help}" for c in COMMANDS.values()),
                  "Enter sends; Alt+Enter, or \\ at the end of a line, begins another line.",
                  "Tab completes commands. Ctrl-C stops a reply; Ctrl-C or Ctrl-D leaves."])
