"""`sbedge chat`: a conversation in the terminal. `Chat` knows the conversation, the rest the terminal."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sbedge.apps.options import add_engine, add_model, add_sampling, sampling_from
from sbedge.apps.text import without_control
from sbedge.errors import InputError, SbedgeError, StateError
from sbedge.runtime.load import load
from sbedge.runtime.session import Session
from sbedge.state import State

TEMPERATURE, TOP_P = 0.7, 0.9
HELP = """/reset        forget the conversation
/save FILE    keep the conversation in a file
/load FILE    go on with a kept one
/help         this list
/exit         leave (or Ctrl-D); Ctrl-C stops a reply"""


class Exit(Exception):
    """The user wants to leave."""


@dataclass
class Chat:
    """A conversation and its slash commands, without a terminal."""

    session: Session
    system: str | None = None
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()

    def reply(self, message: str) -> Iterator[str]:
        """Text of the reply as it comes."""
        for piece in self.session.chat(message, system=self.system, max_tokens=self.max_tokens, stop=self.stop):
            yield piece.text

    def command(self, line: str) -> str:
        """Do a slash command and say what was done. Raises Exit, and SbedgeError for what cannot be done."""
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if name in ("/exit", "/quit"):
            raise Exit
        if name == "/help":
            return HELP
        if name == "/reset":
            self.session.reset()
            return "forgotten; a new conversation begins"
        if name not in ("/save", "/load"):
            raise InputError(f"{name} is no command; /help lists them")
        if not argument:
            raise InputError(f"{name} needs the name of a file")
        return self.save(Path(argument)) if name == "/save" else self.load(Path(argument))

    def save(self, path: Path) -> str:
        if path.exists():
            try:
                State.load_extra(path)
            except StateError:
                raise InputError(f"{path}: exists and is no saved conversation; choose another name") from None
        self.session.save(path)
        return f"saved to {path} ({path.stat().st_size / 1e6:.1f} MB)"

    def load(self, path: Path) -> str:
        sampling = self.session.sampling
        self.session = Session.load(path, self.session.engine, self.session.tokenizer)
        if self.session.sampling != sampling:   # options given for this chat win; otherwise the dice roll on
            self.session.sampling = sampling
        turns = sum(message["role"] == "user" for message in self.session.messages)
        return f"loaded {path}: {turns} turns, position {self.session.state.position}"

    def status(self, tokens_before: int, seconds_before: float) -> str:
        """What the last reply cost, given the decode timings before it."""
        t = self.session.timings
        tokens, seconds = t.decode_tokens - tokens_before, t.decode_seconds - seconds_before
        speed = f", {tokens / seconds:.1f} tok/s" if seconds > 0 else ""
        state = self.session.state
        return f"[{tokens} tokens{speed}, position {state.position}, state {state.nbytes / 1e6:.1f} MB]"


# --- the terminal ------------------------------------------------------------------------------------
def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Talk with a chat model. It remembers the conversation in a state of constant size,\n"
                          f"so there is no limit to its length. In the chat:\n\n{HELP}")
    parser.epilog = ('examples:\n  sbedge chat model.gguf --system "Answer in one sentence."\n'
                     '  echo "Who wrote Hamlet?" | sbedge chat model.gguf --temperature 0')
    add_model(parser)
    add_chat_options(parser)
    add_engine(parser)


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="instructions that precede the conversation")
    parser.add_argument("-n", "--max-tokens", type=int, default=1024, metavar="N",
                        help="at most N tokens a reply (default 1024)")
    add_sampling(parser, temperature=TEMPERATURE, top_p=TOP_P)


def run(args: argparse.Namespace) -> None:
    sampling = sampling_from(args)
    session = load(args.model, args.engine, args.threads)
    session.sampling = sampling
    talk(make_chat(session, args))


def make_chat(session: Session, args: argparse.Namespace) -> Chat:
    if session.tokenizer.chat_template is None:
        raise InputError("this model has no chat template, so it cannot chat; use `sbedge generate`")
    return Chat(session, args.system, args.max_tokens, tuple(args.stop))


def talk(chat: Chat, read: Callable[[], str] | None = None) -> None:
    """Read lines and reply until the end of input or /exit. Replies go to stdout, all else to stderr."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        note("/help lists the commands; Ctrl-C stops a reply, Ctrl-D leaves")
    read = read or (line_editor() if interactive else read_line)
    while take_turn(chat, read):
        pass


def take_turn(chat: Chat, read: Callable[[], str]) -> bool:
    """Read a line and act on it; False when the conversation is over."""
    try:
        line = read()
        if line.strip():
            answer(chat, line)
    except KeyboardInterrupt:
        pass        # at the prompt: drop the line
    except (EOFError, Exit):
        return False
    except SbedgeError as error:
        note(str(error))
    return True


def answer(chat: Chat, line: str) -> None:
    """One turn. Ctrl-C ends the reply; what was said stays in the conversation."""
    if line.lstrip().startswith("/"):
        note(chat.command(line))
        return
    t = chat.session.timings
    before = t.decode_tokens, t.decode_seconds
    try:
        print_reply(chat, line)
    except KeyboardInterrupt:
        print()
        note("stopped")
    note(chat.status(*before))


def print_reply(chat: Chat, message: str) -> None:
    """The reply on standard output as it comes; a pipe gets the text as it is."""
    for text in chat.reply(message):
        print(without_control(text) if sys.stdout.isatty() else text, end="", flush=True)
    print()


def read_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def line_editor() -> Callable[[], str]:
    """Line editing with history."""
    from prompt_toolkit import PromptSession

    editor: PromptSession[str] = PromptSession()
    return lambda: editor.prompt("> ")


def note(text: str) -> None:
    """A line beside the conversation, dim where the terminal can."""
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(text, style="dim", markup=False)
