"""`sbedge demo`: fetch a small model, make it a SpikingBrain hybrid, export it, chat."""
from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from sbedge.apps.chat.command import add_chat_options, chat_sampling, make_chat, start
from sbedge.apps.chat.loop import show
from sbedge.apps.chat.terminal import Terminal
from sbedge.apps.demo_model import (
    HYBRID_VERSION,
    cache_folder,
    fetch_weights,
    write_demo_checkpoint,
    write_hybrid_checkpoint,
)
from sbedge.apps.options import read_prompt
from sbedge.apps.progress import progress_bar
from sbedge.errors import InputError
from sbedge.export import DEFAULT_QUANT, check_quant, export_model
from sbedge.quant.ggml_library import ggml_available
from sbedge.runtime.load import load

ALL_WINDOW_NAME = "smollm2-135m"
HYBRID = f"{ALL_WINDOW_NAME}-hybrid"
NAME = f"{HYBRID}-{HYBRID_VERSION}"
HYBRID_NAMES = re.compile(HYBRID + r"(?:-(\d+))?-(?:checkpoint|onnx-[\w-]+|[\w-]+\.gguf)")
FORMAT_OF = {"ggml": "gguf", "onnx": "onnx"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Chat with a real small model in a minute: fetches SmolLM2-135M-Instruct (90 MB, once), makes it a\n"
        "SpikingBrain hybrid of gated linear attention and sliding-window layers (made by `sbedge convert`), exports\n"
        "and runs it. Everything is kept in the cache folder ($SBEDGE_CACHE, else $XDG_CACHE_HOME/sbedge, else\n"
        "~/.cache/sbedge; 0.8 GB).")
    parser.epilog = 'examples:\n  sbedge demo\n  sbedge demo -p "Why is the sky blue?" --temperature 0'
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="print one reply to TEXT and leave; - reads it")
    parser.add_argument("--engine", choices=list(FORMAT_OF), help="default: ggml if its libraries are there, else onnx")
    parser.add_argument("--quant", metavar="NAME", help="number format of the weights (default: 8 bit)")
    parser.add_argument("--all-window", action="store_true",
                        help="the original instead of the hybrid: sliding-window layers only")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="keep checkpoint and export there")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one for each core this process may use")
    add_chat_options(parser)


def run(args: argparse.Namespace) -> int:
    sampling = chat_sampling(args)
    prompt = None if args.prompt is None else read_prompt(args.prompt)
    if prompt is not None and not prompt.strip():
        raise InputError("the prompt is empty; give at least one character")
    if args.dir is None:
        remove_outdated(cache_folder())
    model = prepare(args.dir or cache_folder(), args.engine or default_engine(), args.quant, all_window=args.all_window)
    session = load(model, threads=args.threads)
    session.sampling = sampling
    terminal = Terminal.found(not args.no_color)
    if prompt is None:
        what = "without GLA layers" if args.all_window else "converted to a SpikingBrain hybrid"
        terminal.note(f"SmolLM2-135M {what}: fluent English, loose facts")
        return start(session, model, args)
    chat = make_chat(session, args)
    show(chat, terminal, (piece.text for piece in chat.reply(prompt)))
    return 0


def default_engine() -> str:
    if ggml_available():
        return "ggml"
    Terminal.found().note("the ggml libraries are not installed (pip install 'sbedge[ggml]'): using ONNX Runtime")
    return "onnx"


def remove_outdated(cache: Path) -> None:
    """Remove what was made of the hybrid's earlier versions (0.5 GB each): nothing takes it any more."""
    for path in cache.glob(f"{HYBRID}*"):
        found = HYBRID_NAMES.fullmatch(path.name)
        if not found or int(found[1] or 1) >= HYBRID_VERSION:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def prepare(folder: Path, engine: str, quant: str | None, *, all_window: bool = False) -> Path:
    """The exported demo model in `folder`; what exists is taken, what is missing is made, whole or not at all."""
    format = FORMAT_OF[engine]
    quant = quant or DEFAULT_QUANT[format]
    check_quant(format, quant)
    folder.mkdir(parents=True, exist_ok=True)
    name = ALL_WINDOW_NAME if all_window else NAME
    checkpoint = folder / f"{name}-checkpoint"
    model = folder / (f"{name}-{quant}.gguf" if format == "gguf" else f"{name}-onnx-{quant}")
    if model.exists():
        return model
    with progress_bar() as bar:
        if not checkpoint.exists():
            write = write_demo_checkpoint if all_window else write_hybrid_checkpoint
            write(fetch_weights(bar), checkpoint, progress=bar)
        export_model(checkpoint, model, format=format, quant=quant,
                     progress=lambda done, total, name: bar(f"exporting {name}", done, total))
    return model
