"""`sbedge export`: a checkpoint becomes a GGUF file or an ONNX folder."""
from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from sbedge.apps.calibration_report import before_and_after, chosen_text, print_comparison
from sbedge.apps.commands.inspect import read_contents, residual_of, residual_text
from sbedge.apps.files import size_of
from sbedge.apps.options import read_size, read_text
from sbedge.apps.progress import progress_bar
from sbedge.checkpoint import Checkpoint
from sbedge.errors import EngineUnavailable, InputError
from sbedge.export import QUANTS, check_quant, default_quant, export_model, format_of
from sbedge.export.calibration import Calibration, split_text
from sbedge.export.choices import Limits
from sbedge.export.report import Report, compare, sample_ids
from sbedge.export.spikes import Spikes
from sbedge.reference import Reference
from sbedge.runtime.load import ENGINE_OF, open_engine, open_tokenizer

SMALL_CHECKPOINT = 2 << 30      # bytes; larger ones are compared with float32 only on request: it takes long


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Turn a checkpoint folder (config.json + safetensors + tokenizer files) into one GGUF file,\n"
                          "or into a folder for ONNX Runtime, and say how far its predictions are from float32.\n\n"
                          f"  gguf   {', '.join(QUANTS['gguf'])}\n  onnx   {', '.join(QUANTS['onnx'])}")
    parser.epilog = ("examples:\n  sbedge export SpikingBrain-7B -o spikingbrain-q4_0.gguf --quant q4_0\n"
                     "  sbedge export SpikingBrain-7B -o spikingbrain-w4.gguf --quant w4-spike --calibrate prose.txt\n"
                     "  sbedge export SpikingBrain-7B -o spikingbrain-onnx --format onnx --quant int4")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder with the checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=".gguf file, or ONNX folder")
    parser.add_argument("--format", choices=list(QUANTS), help="default: gguf if OUT ends in .gguf, onnx for a folder")
    parser.add_argument("--quant", metavar="NAME",
                        help="number format of the weights (default: 8 bit, lossless for W8ASpike)")
    parser.add_argument("--embedding-quant", metavar="NAME",
                        help="for embeddings and lm_head (default: 8 bit, exact where --quant is)")
    parser.add_argument("--spike-k", type=float, metavar="K",
                        help="w8-spike, w4-spike: firing threshold is mean|x| / K; larger is finer and less silent "
                             "(default: as the checkpoint was trained, else 3; --calibrate chooses for each input)")
    parser.add_argument("--dead-zone", type=float, metavar="Z",
                        help="w8-spike, w4-spike: channels with |x| below Z * mean|x| stay silent (default: as the "
                             "checkpoint was trained, if no K is given; else 0, with --calibrate 1/16)")
    parser.add_argument("--calibrate", type=Path, metavar="TEXT",
                        help="round the weights so that outputs stay close on this UTF-8 text, 16,000 tokens of prose "
                             "or more; for every quant but f32, f16 and the k-quants. Takes minutes")
    parser.add_argument("--skip", type=float, metavar="SHARE",
                        help="with --calibrate and a spiking quant: silence this share of the weights (0.4: 40 %%), "
                             "where it costs least")
    parser.add_argument("--budget", metavar="SIZE",
                        help="with --calibrate and a 4-bit quant: keep linears in 8 bit where 4 cost most, as many as "
                             "there is room for in a file (or folder) of SIZE, such as 100MB")
    parser.add_argument("--read", metavar="SIZE",
                        help="with --calibrate and a spiking quant: choose silence (in w4-spike also what is kept in 8 "
                             "bit) so that decoding a token reads SIZE of weights")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--report", action=argparse.BooleanOptionalAction, default=None,
                        help="compare with float32 (default: if the checkpoint is under 2 GB)")
    parser.add_argument("--json", action="store_true", help="print the summary as a JSON object")


def run(args: argparse.Namespace) -> None:
    checkpoint = Checkpoint(args.checkpoint)
    format = args.format or format_of(args.output)
    quant = args.quant or default_quant(checkpoint, format)
    asked = {"k": args.spike_k, "dead_zone": args.dead_zone}
    spikes = Spikes(**{k: v for k, v in asked.items() if v is not None}) if set(asked.values()) != {None} else None
    calibration, held_out = calibration_of(args, checkpoint, format, quant)
    start = time.perf_counter()
    options = {"format": format, "quant": quant, "embedding_quant": args.embedding_quant, "spikes": spikes}
    with progress_bar() as bar:
        chosen = export_model(checkpoint, args.output, **options, calibration=calibration, force=args.force,
                              progress=lambda done, total, name: bar(name, done, total))
    seconds = time.perf_counter() - start
    small = checkpoint_bytes(checkpoint) < SMALL_CHECKPOINT
    wanted = small if args.report is None else args.report
    report = report_on(checkpoint, args.output, format) if wanted else None
    table = before_and_after(checkpoint, args.output, options, held_out) if wanted and held_out is not None else None
    summary = {"output": str(args.output), "format": format, "quant": quant, "bytes": size_of(args.output),
               "seconds": round(seconds, 3), "fingerprint": checkpoint.fingerprint,
               "report": report.to_dict() if report else None, "calibration": table, "chosen": chosen,
               "residual": residual_of(read_contents(args.output)) if checkpoint.is_w8aspike else None,
               "spiking": quant.endswith("-spike") or bool(checkpoint.config.spike_k)}
    if args.json:
        print(json.dumps(summary))
    else:
        print_summary(summary, report, hint=args.report is None and not small)


def calibration_of(args: argparse.Namespace, checkpoint: Checkpoint, format: str,
                   quant: str) -> tuple[Calibration | None, np.ndarray | None]:
    """What to calibrate with, and the end of the text, held out: ids [n, tokens]."""
    if args.calibrate is None:
        for option, value in (("--skip", args.skip), ("--budget", args.budget), ("--read", args.read)):
            if value is not None:
                raise InputError(f"{option} chooses by what a text shows; add --calibrate TEXT")
        return None, None
    for option, value in (("--skip", args.skip), ("--read", args.read)):
        if value is not None and args.dead_zone is not None:
            raise InputError(f"{option} chooses a dead zone for every input; leave --dead-zone out")
    limits = Limits(args.skip, read_size(args.budget, "--budget"), read_size(args.read, "--read"))
    check_quant(format, quant)
    limits.check(checkpoint, quant)
    text = read_text(args.calibrate)
    tokenizer = open_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)
    if tokenizer is None:
        raise InputError(f"{checkpoint.folder}: has no tokenizer, which --calibrate needs to read {args.calibrate}")
    samples, held_out = split_text(np.array(tokenizer.encode(text, parse_special=False), np.int64), str(args.calibrate))
    return Calibration(samples, limits), held_out


def report_on(checkpoint: Checkpoint, exported: Path, format: str) -> Report | None:
    """Run checkpoint and export, one after the other, over the sample; None, and a note, without an engine."""
    tokenizer = open_tokenizer(checkpoint.folder)
    ids = sample_ids(tokenizer.encode if tokenizer else None, checkpoint.config.vocab_size)
    try:
        engine = open_engine(exported, ENGINE_OF[format])
    except EngineUnavailable as error:
        print(f"not compared with float32: {error}", file=sys.stderr)
        return None
    found = engine.forward(ids, engine.new_state(), logits="all")
    del engine      # the float32 weights come now: not both at once
    reference = Reference(checkpoint)
    exact = reference.forward(ids, reference.new_state(), logits="all")
    assert exact is not None and found is not None
    return compare(exact, found)


def print_summary(summary: dict[str, Any], report: Report | None, hint: bool) -> None:
    print(f"{summary['output']}: {summary['format']} {summary['quant']}, {summary['bytes'] / 1e6:.1f} MB "
          f"in {summary['seconds']:.1f} s")
    if summary["residual"]:
        print(residual_text(summary["residual"]))
    if summary["chosen"]:
        print(chosen_text(summary["chosen"]))
    if summary["calibration"]:
        print_comparison(summary["calibration"])
    if report:
        print(report)
        if summary["spiking"]:
            print("spike counts are rounded: the last bit of a sum can decide one, so small differences are normal")
    if hint:
        print("--report compares it with float32 (needs the memory of the checkpoint in float32)", file=sys.stderr)


def checkpoint_bytes(checkpoint: Checkpoint) -> int:
    return sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors"))

