"""`sbedge logits`: how other tools check our numbers."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

import numpy as np

from sbedge.apps.files import new_file
from sbedge.apps.options import add_engine, add_model, engine_options
from sbedge.errors import InputError
from sbedge.runtime.engine import Engine, checked_ids
from sbedge.runtime.load import open_engine

CHUNK = 256     # ids at a time by default: bounds the memory prefill needs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Feed token ids to a model and write the logits of every position as a float32 array\n"
                          "[number of ids, vocabulary]. No tokenizer is needed.")
    parser.epilog = "example:\n  sbedge logits model.gguf --ids 785,6722,315,9625,374 -o logits.npy"
    add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ids", help="token ids, separated by commas")
    source.add_argument("--ids-file", type=Path, metavar="FILE", help="the same in a file; or a .npy array")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.npy")
    parser.add_argument("--chunk", type=int, default=CHUNK, metavar="N",
                        help=f"ids fed at a time; 1 streams token by token (default {CHUNK}); changes no result")
    add_engine(parser)
    parser.add_argument("--force", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> None:
    if args.chunk < 1:
        raise InputError(f"--chunk is {args.chunk}, expected at least 1")
    with new_file(args.output, force=args.force) as temporary:
        engine = open_engine(args.model, *engine_options(args))
        ids = checked_ids(read_ids(args.ids, args.ids_file), engine.config)
        with temporary.open("wb") as file:
            write_logits(file, engine, ids, args.chunk)


def write_logits(file: BinaryIO, engine: Engine, ids: np.ndarray, chunk: int) -> None:
    """A .npy array [len(ids), V] float32, written as it is computed."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(ids), engine.config.vocab_size)}
    np.lib.format.write_array_header_1_0(file, header)
    state = engine.new_state()
    for start in range(0, len(ids), chunk):
        logits = engine.forward(ids[start:start + chunk], state, logits="all")
        file.write(np.ascontiguousarray(logits, "<f4").data)


def read_ids(text: str | None, file: Path | None) -> np.ndarray:
    """Token ids from the command line or a file; InputError names what is not a whole number."""
    if file is not None and file.suffix == ".npy":
        try:
            return np.load(file, allow_pickle=False)
        except (ValueError, EOFError, BadZipFile) as error:
            raise InputError(f"{file}: not a .npy array of token ids ({error})") from None
    try:
        text = file.read_text(encoding="utf-8") if file is not None else text or ""
        return np.array([int(word) for word in text.strip("[] \n").replace(",", " ").split()], np.int64)
    except (ValueError, OverflowError) as error:
        where = f"{file}: " if file is not None else "--ids: "
        raise InputError(f"{where}expected whole numbers separated by commas ({error})") from None
