"""`sbedge tokenize`: text to token ids."""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sbedge.apps.options import add_prompt, read_prompt
from sbedge.errors import InputError, TokenizerError
from sbedge.runtime.load import open_tokenizer
from sbedge.runtime.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Turn text into the model's token ids. --json prints one JSON list of ids;\n"
                          "with --file, one list for each line of the file, which must be a JSON string.")
    parser.epilog = 'example:\n  sbedge tokenize model.gguf -p "The capital of France is" --json'
    parser.add_argument("model", metavar="MODEL", help="a model, or a folder with tokenizer files")
    source = parser.add_mutually_exclusive_group(required=True)
    add_prompt(source)
    source.add_argument("--file", type=Path, help="a file with one JSON string a line")
    parser.add_argument("--json", action="store_true", help="print JSON lists of ids only")


def run(args: argparse.Namespace) -> None:
    tokenizer = open_tokenizer(args.model)
    if tokenizer is None:
        raise TokenizerError(f"{args.model}: no tokenizer here; expected a GGUF file or a folder with tokenizer.json, "
                             "vocab.json + merges.txt or tokenizer.model")
    texts = read_lines(args.file) if args.file else [read_prompt(args.prompt)]
    for text in texts:
        ids = tokenizer.encode(text)
        if args.json:
            print(json.dumps(ids))
        else:
            print_table(tokenizer, ids)


def read_lines(file: Path) -> list[str]:
    texts = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            text = json.loads(line)
        except (ValueError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise InputError(f"{file}: line {number} is not a JSON string")
        texts.append(text)
    return texts


def print_table(tokenizer: Tokenizer, ids: list[int]) -> None:
    for id in ids:
        print(f"{id:>8}  {json.dumps(tokenizer.token_text(id), ensure_ascii=False)}")
    print(f"{len(ids)} tokens", file=sys.stderr)
