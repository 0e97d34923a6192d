"""The `sbedge` command: finds the subcommand, runs it, and turns what goes wrong into one line and an exit code.

0 done · 1 a bug of ours, or a difference found by `state diff` · 2 an error the user can mend · 130 interrupted
143 terminated
"""
from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper

import sbedge
from sbedge.apps.text import one_line
from sbedge.errors import SbedgeError

# name -> (module with add_arguments(parser) and run(args), one line of help)
COMMANDS = {
    "demo": ("demo", "chat with a small model that is fetched for you"),
    "chat": ("chat.command", "talk with a model in the terminal"),
    "generate": ("commands.generate", "continue a text"),
    "convert": ("convert.command", "make a hybrid with GLA layers of a Llama or Qwen2 (trains)"),
    "export": ("commands.export", "turn a checkpoint into a GGUF file or an ONNX folder"),
    "bench": ("commands.bench", "measure speed and memory of a model, or of random weights of a shape"),
    "inspect": ("commands.inspect", "show what a model file holds and how much memory it needs"),
    "perplexity": ("commands.perplexity", "measure how well a model predicts a text, alone or beside another"),
    "spikes": ("commands.spikes", "show how a model spikes, what that spares and what it costs"),
    "logits": ("commands.logits", "write the logits of a list of token ids to a .npy file"),
    "state": ("commands.state", "keep what a model remembers in a file, go on from it, look into it"),
    "tokenize": ("commands.tokenize", "turn text into token ids"),
}
OK, BUG, USER_ERROR, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (argparse itself exits with 0 for help and 2 for bad usage)."""
    if argv is None:        # we are the program: when terminated, tidy up as for any error
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    argv = list(sys.argv[1:] if argv is None else argv)
    open_streams()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):       # a character the terminal lacks is no reason to stop
            stream.reconfigure(errors="replace")
    debug = "--debug" in argv or bool(os.environ.get("SBEDGE_DEBUG"))
    try:
        args = build_parser(argv).parse_args(argv)
        command = import_module(f"sbedge.apps.{COMMANDS[args.command][0]}")
        code = command.run(args) or OK
        sys.stdout.flush()      # a full disk or a reader that has gone shows here at the latest
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:     # the reader of our output has gone (`| head`): stop quietly
        finish_output()
        return OK
    except Exception as error:
        if debug:
            traceback.print_exc()
        finish_output()
        line, code = describe(error)
        print(f"sbedge: {one_line(line)}", file=sys.stderr)
        return code


def open_streams() -> None:
    """A stream that the caller has closed (`<&-`) is empty, or leads nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))      # noqa: SIM115 (as long as the process lives)


def finish_output() -> None:
    """Write what was printed. What cannot be written goes nowhere, or the flush at exit would fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):     # no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands; only the one named in `argv` is imported, so that --help is instant."""
    parser = argparse.ArgumentParser(
        prog="sbedge", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run SpikingBrain language models on ordinary CPUs, with a memory that never grows.",
        epilog="sbedge COMMAND --help explains a command, with an example.\nFor a first try: sbedge demo")
    parser.add_argument("-V", "--version", action="version", version=f"sbedge {sbedge.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:
            import_module(f"sbedge.apps.{module}").add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error (or SBEDGE_DEBUG=1)")
    return parser


def describe(error: Exception) -> tuple[str, int]:
    """One line and the exit code for an exception."""
    if isinstance(error, SbedgeError):
        return str(error), USER_ERROR
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", USER_ERROR
    if isinstance(error, MemoryError):
        return "not enough memory; see `sbedge inspect MODEL` for what the model needs", USER_ERROR
    return f"unexpected {type(error).__name__}: {error} (a bug; --debug shows the traceback)", BUG


if __name__ == "__main__":
    sys.exit(main())
