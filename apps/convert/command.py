"""`sbedge convert`: make a hybrid with GLA layers of a Llama or Qwen2."""
from __future__ import annotations

import argparse
from pathlib import Path

from sbedge.apps.options import read_text
from sbedge.apps.progress import steps_bar
from sbedge.errors import EngineUnavailable, ExportError, InputError
from sbedge.runtime.engine import default_threads

SPIKE_TOKENS = 500_000      # to train on, where nothing else is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Convert a transformer to a SpikingBrain hybrid: N of its layers become gated linear attention, trained to do\n"
        "what the source's attention did; the others become sliding-window attention. The source writes its own\n"
        "training text. Needs torch (pip install 'sbedge[convert]') and hours rather than minutes; an interrupted\n"
        "conversion goes on with --resume. docs/convert.md tells how it works.")
    parser.epilog = ("example:\n  sbedge convert SmolLM2-135M-Instruct -o hybrid --gla-layers 8 --text prose.txt\n"
                     "  sbedge chat hybrid.gguf       # after: sbedge export hybrid -o hybrid.gguf\n"
                     "  sbedge convert SmolLM2-135M-Instruct -o spiking --start hybrid.delta --tokens 0 --spike 0.3")
    parser.add_argument("source", type=Path, metavar="SOURCE",
                        help="Llama or Qwen2: a GGUF file, or a folder with config.json, safetensors and tokenizer; "
                             "or a SpikingBrain checkpoint without GLA layers")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="CHECKPOINT", help="folder to write")
    parser.add_argument("--gla-layers", type=int, metavar="N", help="how many layers to convert")
    parser.add_argument("--start", type=Path, metavar="DELTA",
                        help="go on from a delta of an earlier conversion (--delta), instead of choosing layers")
    parser.add_argument("--window", type=int, metavar="W",
                        help="tokens that the other layers see (default 2048, or as SOURCE has it)")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE",
                        help="UTF-8 text to train on, too; may be repeated")
    parser.add_argument("--tokens", type=int, default=1_000_000, metavar="N",
                        help="tokens to train on, repetitions counted (default 1000000; 0 with --start: none)")
    parser.add_argument("--spike", type=float, metavar="SHARE",
                        help="afterwards train it to spike, with this share of the weights silent (0.4: 40 %%)")
    parser.add_argument("--spike-tokens", type=int, metavar="N",
                        help=f"tokens to do that on (default half of --tokens; {SPIKE_TOKENS} with --tokens 0)")
    parser.add_argument("--own-tokens", type=int, metavar="N",
                        help="tokens of text that the source writes itself, half of it the hybrid with --start "
                             "(default: a third of --tokens, or of --spike-tokens with --tokens 0)")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a training row (default 512)")
    parser.add_argument("--rank", type=int, default=8, metavar="R",
                        help="rank of the corrections to the other weights; 0 trains the GLA layers alone (default 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same checkpoint")
    parser.add_argument("--threads", type=int, metavar="N", help="default: the cores this process may use")
    parser.add_argument("--delta", type=Path, metavar="FILE", help="also write what was learned as a small file, 8 bit")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted conversion, same options")


def run(args: argparse.Namespace) -> None:
    spike = args.spike_tokens if args.spike_tokens is not None else args.tokens // 2 or SPIKE_TOKENS
    own = args.own_tokens if args.own_tokens is not None else (args.tokens or spike) // 3
    for option, value, least in (("--gla-layers", args.gla_layers, 1), ("--window", args.window, 1),
                                 ("--tokens", args.tokens, 0 if args.start else 1), ("--own-tokens", own, 0),
                                 ("--length", args.length, 64), ("--rank", args.rank, 0), ("--seed", args.seed, 0),
                                 ("--threads", args.threads, 1),
                                 ("--spike-tokens", spike, 0 if args.spike is None else 1)):
        if value is not None and not least <= value <= 1 << 40:
            raise InputError(f"{option} is {value}, expected a whole number from {least}")
    if args.length % 64:
        raise InputError(f"--length is {args.length}, expected a multiple of 64")
    if args.gla_layers is None and not args.start:
        raise InputError("how many layers shall be converted? give --gla-layers, or --start with a delta to go on from")
    if not args.tokens and args.spike is None:
        raise InputError("--tokens 0 trains nothing; give --spike, too, or some tokens")
    if args.spike is not None and not 0 <= args.spike <= 0.9:
        raise InputError(f"--spike is {args.spike:g}, expected a share from 0 to 0.9")
    if args.output.exists():
        raise ExportError(f"{args.output}: exists already; choose another name or remove it first")
    if args.delta and args.delta.exists() and not args.resume:
        raise ExportError(f"{args.delta}: exists already; choose another name or remove it first")
    if args.delta and not args.delta.parent.is_dir():
        raise ExportError(f"{args.delta.parent}: no such folder to write {args.delta.name} in")
    texts = [read_text(file) for file in args.text]
    if not torch_installed():
        raise EngineUnavailable("conversion trains with torch, which is not installed; pip install 'sbedge[convert]'")
    import torch

    from .pipeline import Settings, convert
    torch.set_num_threads(args.threads or default_threads())
    settings = Settings(args.gla_layers, args.window, args.tokens, own, args.seed, args.rank, args.length,
                        spike=args.spike, spike_tokens=spike)
    with steps_bar() as report:
        convert(args.source, args.output, settings, texts, start=args.start, resume=args.resume, delta_file=args.delta,
                report=report)


def torch_installed() -> bool:
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True
