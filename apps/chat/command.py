"""`sbedge chat`: its options, and what the demo shares with it."""
from __future__ import annotations

import argparse
from pathlib import Path

from sbedge.apps.options import add_engine, add_model, add_sampling, engine_options, sampling_from
from sbedge.errors import InputError
from sbedge.runtime.load import load
from sbedge.runtime.sampling import Sampling
from sbedge.runtime.session import Session

from .branches import USUAL, Chat
from .commands import HELP
from .kept import Shelf, chats_folder
from .loop import talk
from .terminal import Terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Talk with a chat model. It remembers the conversation in a state of constant size,\n"
                          "so there is no limit to its length. A chat in a terminal is kept when a reply\n"
                          "begins, now and then while it comes, and when it ends\n"
                          f"($XDG_STATE_HOME/sbedge, else ~/.local/state/sbedge). In the chat:\n\n{HELP}")
    parser.epilog = ('examples:\n  sbedge chat model.gguf --system "Answer in one sentence."\n'
                     '  sbedge chat model.gguf --resume\n'
                     '  echo "Who wrote Hamlet?" | sbedge chat model.gguf --temperature 0')
    add_model(parser)
    add_chat_options(parser)
    add_engine(parser)


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="instructions that precede the conversation")
    parser.add_argument("-n", "--max-tokens", type=int, default=1024, metavar="N",
                        help="at most N tokens a reply (default 1024)")
    parser.add_argument("--resume", action="store_true", help="go on with the last kept chat with this model")
    parser.add_argument("--no-autosave", action="store_true", help="keep neither the chat nor what is typed")
    parser.add_argument("--no-color", action="store_true", help="plain text (as with NO_COLOR=1, and into a pipe)")
    add_sampling(parser, temperature=USUAL.temperature, top_p=USUAL.top_p)


def run(args: argparse.Namespace) -> int:
    sampling = chat_sampling(args)
    session = load(args.model, *engine_options(args))
    session.sampling = sampling
    return start(session, args.model, args)


def chat_sampling(args: argparse.Namespace) -> Sampling:
    """What the options of `add_chat_options` choose. InputError for what can be no chat's, before a model loads."""
    if args.max_tokens < 1:
        raise InputError(f"--max-tokens is {args.max_tokens}, expected a whole number from 1")
    if "" in args.stop:
        raise InputError("--stop is empty; give at least one character")
    return sampling_from(args)


def start(session: Session, model: str | Path, args: argparse.Namespace) -> int:
    """Talk in the terminal there is; the exit code: not 0 if something in a pipe could not be answered."""
    terminal = Terminal.found(not args.no_color)
    chat = make_chat(session, args, Shelf(chats_folder(model, session.engine)),
                     keep=(terminal.person or args.resume) and not args.no_autosave)
    if args.resume:
        chat.resume()
    return 0 if talk(chat, terminal) or terminal.person else 2


def make_chat(session: Session, args: argparse.Namespace, shelf: Shelf | None = None, keep: bool = False) -> Chat:
    if session.tokenizer.chat_template is None:
        raise InputError("this model has no chat template, so it cannot chat; use `sbedge generate`")
    return Chat(session, system=args.system, max_tokens=args.max_tokens, stop=tuple(args.stop),
                chosen=args.sampling_chosen, shelf=shelf, keep=keep)
