"""`sbedge bench`: speed, memory, and what a token reads."""
from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from sbedge.apps.commands.inspect import (
    Contents,
    read_checkpoint_contents,
    read_gguf_contents,
    read_onnx_contents,
    size,
)
from sbedge.apps.demo_model import cache_folder
from sbedge.apps.measure import peak_rss, random_ids, read_bandwidth, timed
from sbedge.apps.options import add_engine, engine_options
from sbedge.apps.progress import progress_bar
from sbedge.apps.synthetic import SHAPES, config_json, write_checkpoint
from sbedge.apps.text import one_line
from sbedge.errors import InputError, SbedgeError
from sbedge.export import check_quant, export_model
from sbedge.export.spikes import Spikes
from sbedge.gguf_format import expected_gguf_tensors
from sbedge.runtime.engine import Engine, default_threads, forward_batch
from sbedge.runtime.load import ENGINE_OF, model_kind, open_engine
from sbedge.state import State

if TYPE_CHECKING:
    from sbedge.runtime.ggml_engine import Traffic

DEFAULT_QUANT = "w8-spike"
FEED = 4096     # ids fed at a time on the way to a depth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure a model, or random weights of a shape: decode and prefill speed at given depths, the weight bytes\n"
        "a token reads and their share of what the machine's memory gives, memory, and time to the first token.\n"
        "Speeds are medians over the rounds, with the slowest and the fastest. What a token reads of the state is not\n"
        "counted.")
    parser.epilog = ("examples:\n  sbedge bench model.gguf --depth 0 4096 --threads 2\n"
                     "  sbedge bench --shape 1b --quant w8-spike --dead-zone 0.3")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("model", metavar="MODEL", nargs="?", help=".gguf file, ONNX folder or checkpoint folder")
    source.add_argument("--shape", choices=list(SHAPES),
                        help="random weights of this shape, made once and kept in the cache folder ($SBEDGE_CACHE, "
                             "else ~/.cache/sbedge)")
    parser.add_argument("--quant", metavar="NAME", help=f"with --shape: number format (default {DEFAULT_QUANT})")
    parser.add_argument("--spike-k", type=float, metavar="K", help="with --shape: as in `sbedge export`")
    parser.add_argument("--dead-zone", type=float, metavar="Z", help="with --shape: as in `sbedge export`")
    parser.add_argument("--depth", type=int, nargs="+", default=[0], metavar="N",
                        help="tokens of context before measuring (default 0)")
    parser.add_argument("--jump", action="store_true",
                        help="enter contexts deeper than the sliding window one window before their end instead of "
                             "reading all of it: the same work a token")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens decoded in a round (default 32)")
    parser.add_argument("--prefill", type=int, default=512, metavar="N", help="tokens of a prompt (default 512)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5, after one to warm up")
    parser.add_argument("--sessions", type=int, default=1, metavar="N",
                        help="measure N sequences that advance together, too (default 1: do not)")
    add_engine(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    check_arguments(args)
    model = Path(args.model) if args.model else random_model(args)
    contents = read_contents(model, args.engine)
    bench = Bench(model, contents, args)
    depths = [bench.at_depth(depth) for depth in sorted(set(args.depth))]
    memory = bench.memory()         # before the bandwidth's own buffer and the states of several sessions count
    together = bench.together(args.sessions) if args.sessions > 1 else None
    bandwidth = read_bandwidth(bench.threads)
    for row in depths:
        row["bandwidth_share"] = row["weight_bytes_per_token"] * row["decode_tok_s"]["median"] / bandwidth
    summary = {"model": str(model), "engine": ENGINE_OF[contents.kind], "shape": args.shape,
               "random_weights": bool(args.shape), "threads": bench.threads, "tokens": args.tokens,
               "prefill": args.prefill, "rounds": args.rounds, "jump": args.jump, "load_seconds": bench.load_seconds,
               "decoded_events": has_events(contents) and depths[0]["silent_share"] is None,
               **memory, "read_bytes_per_second": bandwidth, "depths": depths, "sessions": args.sessions,
               "sessions_tok_s": together}
    if args.json:
        print(json.dumps(summary))
    else:
        print_summary(summary)


def check_arguments(args: argparse.Namespace) -> None:
    for option, least in (("tokens", 1), ("prefill", 1), ("rounds", 1), ("sessions", 1)):
        if getattr(args, option) < least:
            raise InputError(f"--{option} is {getattr(args, option)}, expected at least {least}")
    if min(args.depth) < 0:
        raise InputError(f"--depth is {min(args.depth)}, expected at least 0")
    for option in ("quant", "spike_k", "dead_zone"):
        if args.model and getattr(args, option) is not None:
            raise InputError(f"--{option.replace('_', '-')} goes with --shape; {args.model} is measured as it is")


def read_contents(model: Path, engine: str) -> Contents:
    return {"gguf": read_gguf_contents, "onnx": read_onnx_contents,
            "checkpoint": read_checkpoint_contents}[model_kind(model, engine)](model)


# --- measuring ---------------------------------------------------------------------------------------
class Bench:
    """A loaded model and its one state: a second one would count as memory of the engine."""

    def __init__(self, model: Path, contents: Contents, args: argparse.Namespace):
        self.contents, self.args, self.config = contents, args, contents.config
        self.threads = args.threads or default_threads()
        start = time.perf_counter()
        self.engine: Engine = open_engine(model, *engine_options(args))
        self.state: State = self.engine.new_state()
        self.step(random_ids(1, self.config.vocab_size)[0])
        self.load_seconds = time.perf_counter() - start
        self.traffic: Traffic | None = getattr(self.engine, "traffic", None)
        self.state.position = self.token = 0

    def step(self, token: int) -> int:
        """Feed one token; the likeliest next."""
        logits = self.engine.forward([token], self.state)
        assert logits is not None
        return int(logits[0].argmax())

    def decode(self, count: int) -> None:
        token = self.token
        for _ in range(count):
            token = self.step(token)
        self.token = token

    def at_depth(self, depth: int) -> dict[str, Any]:
        """Every figure after `depth` tokens but the share of the bandwidth."""
        args, prompt = self.args, random_ids(self.args.prefill, self.config.vocab_size)
        self.feed_to(depth)
        decode, prefill, fetched, dense = [], [], 0, 0
        for round_number in range(args.rounds + 1):     # the first warms up and is not counted
            # Back to the depth by turning the position back: what the state remembers changes no speed.
            self.state.position = depth
            prefill_seconds = timed(lambda: self.engine.forward(prompt, self.state))
            self.state.position, self.token = depth, prompt[round_number % len(prompt)]
            self.decode(1)      # builds what the engine keeps between steps
            before = (self.traffic.fetched, self.traffic.dense) if self.traffic else (0, 0)
            decode_seconds = timed(lambda: self.decode(args.tokens))
            if round_number == 0:
                continue
            decode.append(args.tokens / decode_seconds)
            prefill.append(args.prefill / prefill_seconds)
            if self.traffic:
                fetched += self.traffic.fetched - before[0]
                dense += self.traffic.dense - before[1]
        self.state.position = depth
        saved = (dense - fetched) / (args.tokens * args.rounds)
        return {"depth": depth, "decode_tok_s": spread(decode), "prefill_tok_s": spread(prefill),
                "weight_bytes_per_token": round(weight_bytes(self.contents, native=dense > 0) - saved),
                "silent_share": 1 - fetched / dense if dense else None}

    def feed_to(self, depth: int) -> None:
        """Random ids until the state's position is `depth`."""
        if self.args.jump:
            self.state.position = max(self.state.position, depth - self.config.sliding_window)
        if self.state.position == depth:
            return
        with Console(stderr=True).status(f"reading up to token {depth:,}"):
            while left := depth - self.state.position:
                ids = random_ids(min(left, FEED), self.config.vocab_size, seed=self.state.position)
                self.engine.forward(ids, self.state, logits="none")

    def together(self, count: int) -> dict[str, float]:
        """Tokens a second of `count` sequences at position 0, all of them counted."""
        states = [self.engine.new_state() for _ in range(count)]
        ids = random_ids(count, self.config.vocab_size)

        def steps() -> None:
            for _ in range(self.args.tokens):
                forward_batch(self.engine, ids, states)

        forward_batch(self.engine, ids, states)
        return spread([count * self.args.tokens / timed(steps) for _ in range(self.args.rounds)])

    def memory(self) -> dict[str, int | None]:
        file, state, peak = self.contents.file_bytes, self.state.nbytes, peak_rss()
        return {"file_bytes": file, "state_bytes": state, "peak_rss_bytes": peak,
                "rss_beyond_bytes": None if peak is None else peak - file - state}


def spread(rates: list[float]) -> dict[str, float]:
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def weight_bytes(contents: Contents, *, native: bool) -> int:
    """Weight bytes a decoded token reads when no channel is silent.

    Without native kernels an event layout is float32 in memory. Of untied embeddings a token reads one row.
    """
    rows = 1 if contents.config.tie_word_embeddings else contents.config.vocab_size
    if contents.kind != "gguf":
        table = sum(tensor.nbytes for tensor in contents.tensors if tensor.name.startswith("model.embeddings.weight"))
        return contents.file_bytes - table + table // rows
    stored = {tensor.name: tensor.nbytes for tensor in contents.tensors}
    if not native:
        stored = {name: stored.get(name, 4 * prod(shape))
                  for name, shape in expected_gguf_tensors(contents.config).items()}
    stored["token_embd.weight"] //= rows
    return sum(stored.values())


def has_events(contents: Contents) -> bool:
    """Whether it is a GGUF file with event layouts, which the engine decodes where it has no kernels for them."""
    return contents.kind == "gguf" and any(tensor.name.endswith((".codes", ".nibbles")) for tensor in contents.tensors)


# --- random weights ----------------------------------------------------------------------------------
def random_model(args: argparse.Namespace) -> Path:
    """The export of random weights that the options ask for, from the cache folder or made now."""
    format = "onnx" if args.engine == "onnx" else "gguf"
    quant = args.quant or DEFAULT_QUANT
    check_quant(format, quant)
    asked = {"k": args.spike_k, "dead_zone": args.dead_zone}
    given = {name: value for name, value in asked.items() if value is not None}
    if given and not quant.endswith("-spike"):
        raise InputError(f"--spike-k and --dead-zone set how a quant such as w8-spike spikes, found --quant {quant}")
    spikes = Spikes(**given) if given else None
    name = "-".join([args.shape, quant, *(f"{key.replace('_', '-')}{value:g}" for key, value in given.items())])
    folder = cache_folder() / "bench"
    model = folder / f"{name}{'.gguf' if format == 'gguf' else '-onnx'}"
    if not model.exists():
        print(f"making random weights once: {model}", file=sys.stderr)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as temporary:
                made = Path(temporary) / model.name
                in_another_process(make_model, made.with_name("checkpoint"), made, args.shape, format, quant, spikes)
                made.rename(model)
        except OSError as error:
            raise SbedgeError(f"{folder}: cannot hold the random weights ({error.strerror or error}); "
                              "free some space or set SBEDGE_CACHE to another folder") from error
    return model


def make_model(checkpoint: Path, out: Path, shape: str, format: str, quant: str, spikes: Spikes | None) -> None:
    with progress_bar() as bar:
        write_checkpoint(checkpoint, config_json(SHAPES[shape]),
                         progress=lambda done, total: bar("random weights", done, total))
        export_model(checkpoint, out, format=format, quant=quant, spikes=spikes,
                     progress=lambda done, total, name: bar(name, done, total))


def in_another_process(work: Callable[..., None], *arguments: object) -> None:
    """Run `work` where its memory does not count in our peak. Stops it when we are stopped."""
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=signal.signal,
                                   initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        executor.submit(work, *arguments).result()
    except BrokenProcessPool:
        raise SbedgeError("the process that made the random weights was ended, perhaps for want of memory; "
                          "choose a smaller --shape") from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        executor.shutdown()


# --- printing ----------------------------------------------------------------------------------------
def print_summary(summary: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for column in ("depth", "decode\ntok/s", "slowest..\nfastest", "prefill\ntok/s", "weights\na token",
                   "share of\nreads", "silent"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in summary["depths"]:
        decode, silent = row["decode_tok_s"], row["silent_share"]
        table.add_row(f"{row['depth']:,}", rate(decode["median"]), f"{rate(decode['min'])}..{rate(decode['max'])}",
                      rate(row["prefill_tok_s"]["median"]), size(row["weight_bytes_per_token"]),
                      f"{row['bandwidth_share']:.0%}", "-" if silent is None else f"{silent:.1%}")
    print(one_line(summary["model"]))
    print(f"{summary['engine']} engine, {summary['threads']} threads; medians of {summary['rounds']} rounds of "
          f"{summary['tokens']} tokens and a prompt of {summary['prefill']}")
    Console().print(table)
    if summary["sessions_tok_s"]:
        rates = summary["sessions_tok_s"]
        print(f"{summary['sessions']} sequences together: {rate(rates['median'])} tok/s in all "
              f"({rate(rates['min'])}..{rate(rates['max'])})")
    print(f"memory reads {summary['read_bytes_per_second'] / 1e9:.1f} GB/s; "
          f"first token {summary['load_seconds']:.2f} s after loading began")
    print(f"file {size(summary['file_bytes'])}, state {size(summary['state_bytes'])}{memory_text(summary)}")
    if summary["decoded_events"]:
        print("no native kernels: event weights are float32 in memory and read in full")
    if summary["random_weights"]:
        print(f"the weights are random: {random_text(summary['depths'])}")


def rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.{1 if tokens_per_second < 1000 else 0}f}"


def memory_text(summary: dict[str, Any]) -> str:
    if summary["peak_rss_bytes"] is None:
        return ""
    beyond = summary["rss_beyond_bytes"]
    where = f"{size(beyond)} beyond these" if beyond >= 0 else "less than these: not all was read"
    return f"; peak memory {size(summary['peak_rss_bytes'])}, {where}"


def random_text(depths: list[dict[str, Any]]) -> str:
    shares = [row["silent_share"] for row in depths]
    if None in shares:
        return "speed does not depend on them"
    return f"{statistics.mean(shares):.1%} silent; what a trained model leaves out differs"
