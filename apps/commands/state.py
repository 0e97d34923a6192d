"""`sbedge state`: what a model remembers, as a file: written, gone on from, looked into, compared."""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sbedge.apps.commands.generate import reply_object
from sbedge.apps.commands.inspect import size
from sbedge.apps.commands.logits import read_ids
from sbedge.apps.files import new_file
from sbedge.apps.options import (
    add_engine,
    add_model,
    add_prompt,
    add_sampling,
    engine_options,
    read_prompt,
    read_text,
    sampling_from,
)
from sbedge.apps.state_view import StateView
from sbedge.apps.text import one_line
from sbedge.runtime.load import load
from sbedge.runtime.session import Session
from sbedge.state import State
from sbedge.state_file import StateFile

DIFFERENT = 1       # exit code of `diff` when it finds a difference, as that of cmp


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Keep what a model remembers in a file and go on from it: later, elsewhere, under the other\n"
                          "engine, or with another quantization of the same checkpoint.")
    parser.epilog = "examples:\n" + "\n".join(f"  sbedge state {action.example}" for action in ACTIONS.values())
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, action in ACTIONS.items():
        sub = actions.add_parser(name, help=action.help, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 description=action.description, epilog=f"example:\n  sbedge state {action.example}")
        action.add(sub)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        sub.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int | None:
    return ACTIONS[args.action].run(args)


# --- save --------------------------------------------------------------------------------------------
def add_save(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    add_prompt(source)
    source.add_argument("-f", "--file", type=Path, help="read the text from a file")
    source.add_argument("--ids", help="token ids, separated by commas")
    source.add_argument("--ids-file", type=Path, metavar="FILE", help="the same in a file; or a .npy array")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    add_engine(parser)


def run_save(args: argparse.Namespace) -> None:
    with new_file(args.output, force=args.force) as temporary:
        prompt: Any = prompt_of(args)
        if prompt is None:
            prompt = read_ids(args.ids, args.ids_file)
        session = load(args.model, *engine_options(args))
        session.feed(prompt)
        session.save(temporary)
    state, nbytes = session.state, args.output.stat().st_size
    if args.json:
        print(json.dumps({"file": str(args.output), "position": state.position, "file_bytes": nbytes,
                          "fingerprint": state.fingerprint}))
    else:
        print(one_line(f"{args.output}: {state.position} tokens read, {size(nbytes)}"), file=sys.stderr)


def prompt_of(args: argparse.Namespace) -> str | None:
    if args.file is not None:
        return read_text(args.file)
    return None if args.prompt is None else read_prompt(args.prompt)


# --- load --------------------------------------------------------------------------------------------
def add_load(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("state", metavar="FILE", help="a saved state")
    source = parser.add_mutually_exclusive_group()
    add_prompt(source)
    source.add_argument("-f", "--file", type=Path, help="read the prompt from a file")
    parser.add_argument("-n", "--max-tokens", type=int, default=64, metavar="N", help="at most N tokens (default 64)")
    add_sampling(parser)
    add_engine(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the state after the reply there")
    parser.add_argument("--force", action="store_true", help="replace an existing output")


def run_load(args: argparse.Namespace) -> None:
    if args.output is None:
        say(args)
        return
    with new_file(args.output, force=args.force) as temporary:
        say(args).save(temporary)


def say(args: argparse.Namespace) -> Session:
    """Print what the model says next. The file's own sampling goes on, dice and all, unless options ask otherwise."""
    prompt, sampling, session = prompt_of(args), sampling_from(args), open_session(args)
    if args.sampling_chosen:
        session.sampling = sampling
    pieces = []
    for piece in session.generate(prompt, max_tokens=args.max_tokens, stop=args.stop):
        pieces.append(piece)
        if not args.json:
            print(piece.text, end="", flush=True)
    print(json.dumps(reply_object(prompt or "", pieces, session), ensure_ascii=False) if args.json else "")
    return session


def open_session(args: argparse.Namespace) -> Session:
    """A session from the file, which may also hold a state alone."""
    with StateFile(args.state):     # what is no state is found before a large model is loaded
        pass
    there = load(args.model, *engine_options(args))
    if "session" in State.load_extra(args.state):
        return Session.load(args.state, there.engine, there.tokenizer)
    state = State.load(args.state, there.engine.config, there.engine.fingerprint)
    return Session(there.engine, there.tokenizer, state=state)


# --- info --------------------------------------------------------------------------------------------
def add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("state", metavar="FILE", help="a saved state")


def run_info(args: argparse.Namespace) -> None:
    info = StateView(args.state).info()
    if args.json:
        print(json.dumps(info, ensure_ascii=False))
        return
    session = info["session"]
    lines = [
        ("file", f"{info['file']} ({size(info['file_bytes'])}, {info['format']})"),
        ("position", f"{info['position']} tokens read"),
        ("layers", f"{len(info['layers'])}: {info['layers']}  (G gated linear attention, W sliding window)"),
        ("sizes", f"{info['kv_heads']} key/value heads of {info['head_size']}" + (
            f", window {info['sliding_window']} ({info['window_type']})" if info["sliding_window"] else "")),
        ("logits", f"for {info['vocabulary']} tokens" if info["vocabulary"] else "none"),
        ("checkpoint", info["fingerprint"] or "unknown: only its sizes tell which models it fits"),
        ("session", "none: a state alone" if session is None else
            f"{session['tokens']} tokens, {len(session['messages'])} messages"
            f"{', in a reply' if session['replying'] else ''}, temperature {session['sampling']['temperature']}"),
        *(("text", f"{name} ({length} characters)") for name, length in info["texts"].items() if name != "session")]
    sys.stdout.write("".join(f"{name + ':':12}{one_line(str(text))}\n" for name, text in lines))


# --- diff --------------------------------------------------------------------------------------------
def add_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="FILE", help="a saved state")
    parser.add_argument("second", metavar="OTHER", help="another one of the same model, or of another quantization")


def run_diff(args: argparse.Namespace) -> int | None:
    found = StateView(args.first).difference(StateView(args.second))
    if args.json:
        print(json.dumps(found))
    else:
        sys.stdout.write(describe(found))
    return None if found["equal"] else DIFFERENT


def describe(found: dict[str, Any]) -> str:
    (mine, theirs), (checkpoint, other) = found["position"], found["fingerprint"]
    lines = [("position", f"{mine} and {theirs}" if mine != theirs else f"{mine}, the same")]
    if checkpoint != other:
        lines.append(("checkpoint", f"{checkpoint} and {other}"))
    if mine != theirs:
        lines.append(("windows", f"compared in the {found['window_tokens']} positions that both hold"))
    arrays = [(layer["array"], layer["max_abs"]) for layer in found["layers"]] + [("last_logits", found["last_logits"])]
    lines += [(name, "nothing to compare" if value is None else f"{value:.6g}") for name, value in arrays]
    return "".join(f"{name + ':':20}{one_line(str(text))}\n" for name, text in lines) + (
        "equal\n" if found["equal"] else "largest differences, as absolute values\n")


class Action(NamedTuple):
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    help: str
    description: str
    example: str


ACTIONS = {
    "save": Action(add_save, run_save, "read a text and write the state after it",
                   "Read a text, or token ids, with a model and write what it remembers then to a file.",
                   "save model.gguf -f report.txt -o report.state"),
    "load": Action(add_load, run_load, "go on from a state",
                   "Go on from a saved state, with a prompt or just where it stopped. Only the reply goes to standard\n"
                   "output. Without sampling options the file's own go on: the very tokens it would have drawn.",
                   'load model.gguf report.state -p "In short, it says that" -n 60'),
    "info": Action(add_info, run_info, "show what a state file holds",
                   "Show position, sizes, checkpoint and session of a state file. Needs no model, and checks the\n"
                   "whole file.", "info report.state"),
    "diff": Action(add_diff, run_diff, "compare two states layer by layer",
                   "Print how far two states of one model, or of its quantizations, are apart, for each layer.\n"
                   "Exit code 0 if they are equal, 1 if they differ, 2 if they cannot be compared.",
                   "diff report.state other.state"),
}
