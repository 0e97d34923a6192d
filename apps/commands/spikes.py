"""`sbedge spikes`: how a model spikes, what that spares, and what it costs."""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from sbedge.apps.commands.inspect import size, spiking_as
from sbedge.apps.commands.perplexity import text_pieces
from sbedge.apps.options import add_engine, add_model, add_text
from sbedge.apps.spike_report import FIGURES, PUBLISHED, record, skipped_bytes, summarize, sweep
from sbedge.apps.text import one_line
from sbedge.checkpoint import Checkpoint
from sbedge.config import ModelConfig
from sbedge.errors import InputError
from sbedge.export.spikes import DEFAULT_K, Spikes
from sbedge.quant.spike_stats import FP16_MAC, INT8_ADD, INT8_MAC, SMALL, WINDOW
from sbedge.runtime.load import ids_only, model_kind, open_tokenizer
from sbedge.runtime.model_weights import open_weights
from sbedge.runtime.spike_observer import KINDS, spiking_config
from sbedge.runtime.token_stream import in_chunks, stream_ids

TOKENS = 256
COLUMNS = {"silent": "silent", "small": f"|s| <= {SMALL}", "spikes": "spikes a\nchannel",
           "slot_sparsity": "silent\nslots"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Watch a model spike while it reads a text: for every layer and kind of input how many channels are silent,\n"
        "how large the counts are, how many spikes they take; what that saves in weights read and in arithmetic. The\n"
        "counts come from the reference in NumPy, over the weights of MODEL: exact, and slow (a few hundred tokens a\n"
        "minute for a small model), so the text is read only in part. A model that does not spike is watched as if it\n"
        "did. --plots draws the counts, a firing map, sparsity by layer, and perplexity against sparsity.")
    parser.epilog = ("examples:\n  sbedge spikes model-w8-spike.gguf --text prose.txt\n"
                     "  sbedge spikes CHECKPOINT --text prose.txt --spike-k 4 --plots plots")
    add_model(parser)
    add_text(parser)
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N",
                        help=f"read the first N tokens of it (default {TOKENS})")
    parser.add_argument("--spike-k", type=float, metavar="K",
                        help="for a model that does not spike: firing threshold mean|x| / K (default: as it was "
                             "trained, else 3)")
    parser.add_argument("--dead-zone", type=float, metavar="Z",
                        help="for a model that does not spike: channels with |x| below Z * mean|x| stay silent "
                             "(default: as it was trained, else none)")
    parser.add_argument("--plots", type=Path, metavar="FOLDER",
                        help="draw into FOLDER, too (reads the text some ten times more; needs matplotlib)")
    parser.add_argument("--plot-format", choices=("svg", "png"), default="svg")
    add_engine(parser, window=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every layer's figures")


def run(args: argparse.Namespace) -> None:
    check_arguments(args)
    weights = open_weights(args.model, args.engine)
    own = weights.config
    config = config_to_watch(args, own)
    ids = read_ids(args, own)
    with Console(stderr=True).status("watching") as status:
        recording, reader = record(weights, config, ids, args.model)
        summary = {"model": args.model, "text": str(args.text), "tokens": len(ids),
                   "spike_k": config.spike_k, "dead_zone": config.dead_zone,
                   "input_spike_k": list(config.input_spike_k), "input_dead_zone": list(config.input_dead_zone),
                   "spikes_itself": bool(own.spike_k), "trained_to_spike": config.trained_to_spike or own.int8_window,
                   "perplexity": reader.perplexity, **summarize(recording)}
        status.update("counting the bytes the engine reads")
        summary["skipped"] = skipped(args, own, ids)
        if args.plots:
            summary["sweep"] = sweep(weights, config, ids, args.model, lambda what: status.update(one_line(what)))
            from sbedge.apps.spike_plots import draw
            summary["plots"] = [str(path) for path in draw(args.plots, args.plot_format, summary, recording)]
    if args.json:
        print(json.dumps(summary))
    else:
        print_summary(summary, recording.config)


def check_arguments(args: argparse.Namespace) -> None:
    if args.tokens < 2:
        raise InputError(f"--tokens is {args.tokens}, expected at least 2")
    args.text.open("rb").close()        # a missing text is found before a model is loaded
    if args.plots:
        from sbedge.apps.spike_plots import check_folder
        check_folder(args.plots)


def config_to_watch(args: argparse.Namespace, own: ModelConfig) -> ModelConfig:
    """The model's own way to spike, or the one that it was trained for, or that is asked for, where it has none."""
    asked = {"k": args.spike_k, "dead_zone": args.dead_zone}
    given = {name: value for name, value in asked.items() if value is not None}
    if not own.spike_k:
        is_checkpoint = model_kind(args.model, args.engine) == "checkpoint"
        trained = Checkpoint(args.model).trained_spikes if is_checkpoint else None
        if trained and not given:
            return trained
        spikes = Spikes(**given)
        return spiking_config(own, spikes.k or (trained.spike_k if trained else DEFAULT_K), spikes.dead_zone or 0.0)
    if given:
        raise InputError(f"{args.model}: spikes already, at k = {own.spike_k:g} with dead zone {own.dead_zone:g}; "
                         "leave --spike-k and --dead-zone out")
    return own


def read_ids(args: argparse.Namespace, config: ModelConfig) -> np.ndarray:
    tokenizer = open_tokenizer(args.model, config.vocab_size) or ids_only(config, args.model)
    blocks = stream_ids(tokenizer, text_pieces(args.text, lambda *_: None))
    ids = np.concatenate([*in_chunks(blocks, args.tokens, args.tokens), np.empty(0, np.int64)])
    if len(ids) < 2:
        raise InputError(f"{args.text}: {len(ids)} tokens, expected at least 2")
    return ids


def skipped(args: argparse.Namespace, own: ModelConfig, ids: np.ndarray) -> dict[str, Any] | str:
    if model_kind(args.model, args.engine) == "checkpoint":
        return "a checkpoint is no file to run; export it with --quant w8-spike"
    if not own.spike_k:
        return "this file does not spike: all weights of every token are read; export with --quant w8-spike"
    return skipped_bytes(Path(args.model), args.engine, args.threads, ids)


# --- printing ----------------------------------------------------------------------------------------
def print_summary(summary: dict[str, Any], config: ModelConfig) -> None:
    console = Console(markup=False, highlight=False, emoji=False)
    print(*map(one_line, heading(summary)), sep="\n")
    console.print(kinds_table(summary))
    if "FFN down" not in summary["kinds"]:
        print("FFN down does not spike: its published form multiplies plain activations")
    print(f"a slot is a time step of a count: whole windows of {WINDOW}, as many as its bits need, at least one\n"
          f"weights that a token finds silent: {summary['silent_weights']:.1%} of those of spiking linears\n")
    console.print(layers_table(summary, config))
    print(one_line(skipped_text(summary["skipped"])), *energy_text(summary["energy"]),
          *map(one_line, summary.get("plots", [])), sep="\n")


def heading(summary: dict[str, Any]) -> list[str]:
    lines = [f"{summary['model']}: {summary['tokens']} tokens of {summary['text']}, "
             f"{spiking_as(summary)}"]
    if summary["trained_to_spike"] and not summary["spikes_itself"]:
        lines.append("it was trained to spike so, and does when exported with --quant w8-spike or w4-spike")
    elif not summary["spikes_itself"]:
        lines.append("this model does not spike; it is watched as if it did")
    if not summary["trained_to_spike"]:
        lines.append("this checkpoint was not trained to spike")
    return lines


def kinds_table(summary: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("input")
    for title in (*COLUMNS.values(), "largest\n|s|"):
        table.add_column(title, justify="right", no_wrap=True)
    rows = {**summary["kinds"], "all channels": summary["total"], "published, 7B at k = 3": PUBLISHED}
    for name, row in rows.items():
        largest = f"{row['largest']:,}" if "largest" in row else ""
        table.add_row(name, *(figure(row, key) for key in FIGURES), largest)
    return table


def figure(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.2f}" if key == "spikes" else f"{row[key]:.1%}"


def layers_table(summary: dict[str, Any], config: ModelConfig) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("")
    kinds = [kind for kind in KINDS if kind in summary["kinds"]]
    for what in ("silent\n", "silent slots\n"):
        for kind in kinds:
            table.add_column((what if kind == kinds[0] else "\n") + short(kind), justify="right", no_wrap=True)
    rows = {(row["layer"], row["kind"]): row for row in summary["layers"]}
    for layer in range(config.num_hidden_layers):
        cells = [f"{rows[layer, kind][key]:.0%}" for key in ("silent", "slot_sparsity") for kind in kinds]
        table.add_row(str(layer), "W" if config.is_window_layer(layer) else "G", *cells)
    return table


def short(kind: str) -> str:
    return kind.replace("attention", "attn").replace(" ", "\n")


def skipped_text(skipped: dict[str, Any] | str) -> str:
    if isinstance(skipped, str):
        return f"weight bytes skipped: none: {skipped}"
    read, stored = (size(round(skipped[f"{what}_bytes_per_token"])) for what in ("read", "stored"))
    return f"weight bytes skipped: {skipped['skipped']:.1%}: of {stored} in event layout {read} a token were read"


def energy_text(energy: dict[str, float]) -> list[str]:
    """The report's estimate, with all that it assumes."""
    macs, additions = (f"{energy[f'{what}_per_token']:,.0f}" for what in ("macs", "additions"))
    spikes, int8, fp16 = (f"{energy[key] / 1e6:,.3g} µJ" for key in ("spikes_pj", "int8_pj", "fp16_pj"))
    return [
        f"energy by the report's model: {spikes} a token as spikes,",
        f"  {energy['saved_from_int8']:.1%} less than INT8 ({int8}), {energy['saved_from_fp16']:.1%} less than FP16 "
        f"({fp16})",
        f"  assumed: 45 nm; FP16 MAC {FP16_MAC} pJ, INT8 MAC {INT8_MAC} pJ, INT8 addition {INT8_ADD} pJ",
        f"  assumed: {macs} MACs a token become {additions} additions,",
        "    one for each spike and weight (bidirectional bitwise code)",
        "  assumed: weighing a time step, finding counts and scaling sums cost nothing",
        "  left out: memory, attention itself, norms, lm_head, linears that do not spike",
        "  a figure for neuromorphic hardware: a CPU gains by the bytes it does not fetch"]
