"""`sbedge generate`: one prompt, one reply."""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

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
from sbedge.errors import InputError
from sbedge.runtime.generate import Piece, Timings
from sbedge.runtime.load import load
from sbedge.runtime.session import Session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Continue a text. Only the continuation goes to standard output, as it is made.\n"
                          "The prompt is taken as it is: for a chat model's turns and template use `sbedge chat`.")
    parser.epilog = ('examples:\n  sbedge generate model.gguf -p "The capital of France is" -n 32\n'
                     "  cat report.txt | sbedge generate model.gguf -p - --temperature 0.7 --seed 1")
    add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    add_prompt(source)
    source.add_argument("-f", "--file", type=Path, help="read the prompt from a file")
    parser.add_argument("-n", "--max-tokens", type=int, default=64, metavar="N", help="at most N tokens (default 64)")
    add_sampling(parser)
    parser.add_argument("--logprobs", type=int, default=0, metavar="N",
                        help="with --json: the N most likely tokens at each step, with their log-probabilities")
    add_engine(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the text")
    parser.add_argument("--verbose", action="store_true", help="print speed and sizes to standard error")


def run(args: argparse.Namespace) -> None:
    prompt = read_text(args.file) if args.file else read_prompt(args.prompt)
    sampling = sampling_from(args, args.logprobs)
    if not prompt:
        raise InputError("the prompt is empty; give at least one character")
    session = load(args.model, *engine_options(args))
    pieces = []
    for piece in session.generate(prompt, max_tokens=args.max_tokens, stop=args.stop, sampling=sampling):
        pieces.append(piece)
        if not args.json:
            print(piece.text, end="", flush=True)
    if args.json:
        print(json.dumps(reply_object(prompt, pieces, session), ensure_ascii=False))
    else:
        print()
    if args.verbose:
        print(describe_timings(session.timings, session), file=sys.stderr)


def reply_object(prompt: str, pieces: list[Piece], session: Session) -> dict[str, Any]:
    """What --json prints; `tokens` has one entry for each token drawn, an end token included."""
    tokens = []
    for piece in pieces:
        for id, logprob, top in zip(piece.ids, piece.logprobs, piece.top_logprobs, strict=True):
            token: dict[str, Any] = {"id": id, "text": session.tokenizer.token_text(id), "logprob": logprob}
            if top:
                token["top"] = [{"id": i, "text": session.tokenizer.token_text(i), "logprob": p} for i, p in top]
            tokens.append(token)
    t = session.timings
    return {"prompt": prompt, "text": "".join(piece.text for piece in pieces), "finish": pieces[-1].finish,
            "tokens": tokens, "position": session.state.position, "state_bytes": session.state.nbytes,
            "timings": {"prefill_tokens": t.prefill_tokens, "prefill_seconds": t.prefill_seconds,
                        "decode_tokens": t.decode_tokens, "decode_seconds": t.decode_seconds}}


def describe_timings(t: Timings, session: Session) -> str:
    return (f"prefill {t.prefill_tokens} tokens, {t.prefill_tokens_per_second:.1f} tok/s; "
            f"decode {t.decode_tokens} tokens, {t.decode_tokens_per_second:.1f} tok/s; "
            f"position {session.state.position}, state {session.state.nbytes / 1e6:.1f} MB")
