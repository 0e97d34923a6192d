"""Options that several commands share."""
from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from sbedge.errors import InputError
from sbedge.runtime.load import ENGINES, WINDOW_TYPES
from sbedge.runtime.sampling import Sampling


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=".gguf file, ONNX folder or checkpoint folder")


def add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text; all of it is plain text")


def add_engine(parser: argparse.ArgumentParser, *, window: bool = True) -> None:
    parser.add_argument("--engine", choices=ENGINES, default="auto",
                        help="default: the one that runs MODEL; reference is plain NumPy, exact and slow")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one for each core this process may use")
    if window:
        parser.add_argument("--window", choices=WINDOW_TYPES, default="f32",
                            help="what keeps keys and values of the sliding windows (default f32); f16, for GGUF "
                                 "files, takes half the memory")


def engine_options(args: argparse.Namespace) -> tuple[str, int | None, str]:
    """What `add_engine` asked for, as `load` and `open_engine` take it after the path."""
    return args.engine, args.threads, args.window


def add_prompt(parser: Any) -> None:
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="the text; - reads it from standard input")


def read_prompt(text: str) -> str:
    """The text itself, or standard input for "-"."""
    if text != "-":
        return text
    return decode(sys.stdin.buffer.read(), "standard input")


def decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 text (byte {error.start}); convert it first") from None


def read_size(text: str | None, option: str) -> int | None:
    """Bytes: a whole number, or with a unit (100MB, 4.5GB; decimal)."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    size = round(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if not 0 < size < 1 << 62:
        raise InputError(f"{option} {text!r}: expected a size such as 100MB, 4.5GB or a number of bytes")
    return size


def read_text(file: Path) -> str:
    return decode(file.read_bytes(), str(file))


def add_sampling(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Sampling options; `defaults` replace those of Sampling."""
    group = parser.add_argument_group("choosing the next token")
    base = Sampling(**defaults)

    def add(option: str, kind: Any, help: str) -> None:
        value = getattr(base, option)
        shown = "" if value is None else f" (default {value})"
        group.add_argument(f"--{option.replace('_', '-')}", type=kind, default=value, help=help + shown,
                           metavar="N" if kind is int else "X", action=Chosen)

    add("temperature", float, "0 takes the most likely token, more is more varied")
    add("top_k", int, "choose among the K most likely; 0: all")
    add("top_p", float, "choose among the fewest tokens whose probabilities reach this sum")
    add("min_p", float, "drop tokens less likely than this share of the best")
    add("repetition_penalty", float, "above 1 makes recent tokens less likely")
    add("presence_penalty", float, "subtracted from the logit of every recent token")
    add("seed", int, "the same seed gives the same text")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT",
                       help="end the reply before this text; may be repeated")
    group.add_argument("--logit-bias", action=ChosenToo, default=[], metavar="ID=VALUE",
                       help="add VALUE to the logit of token ID, -inf bans it; may be repeated")
    parser.set_defaults(sampling_chosen=False)


class Chosen(argparse.Action):
    """Stores a sampling option, and that one was chosen, as it may be what it is by default."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        namespace.sampling_chosen = True


class ChosenToo(Chosen):
    """The same for an option that may be repeated."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        super().__call__(parser, namespace, [*getattr(namespace, self.dest), values], option_string)


def sampling_from(args: argparse.Namespace, logprobs: int = 0) -> Sampling:
    """The Sampling that the options of `add_sampling` ask for; InputError for what is out of range."""
    return Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
                    repetition_penalty=args.repetition_penalty, presence_penalty=args.presence_penalty,
                    seed=args.seed, logit_bias=dict(map(_bias, args.logit_bias)), logprobs=logprobs)


def _bias(text: str) -> tuple[int, float]:
    id, _, value = text.partition("=")
    try:
        return int(id), float(value)
    except ValueError:
        raise InputError(f"--logit-bias {text!r}: expected ID=VALUE such as 42=-5 or 42=-inf") from None
