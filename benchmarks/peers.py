"""Decode and prefill beside llama.cpp, in one process, in turns (A B A B), medians and ratios.

    python benchmarks/peers.py --peer ORIGINAL.gguf OURS.gguf [OURS-ONNX ...] [--depth 0] [--tokens 48] [--rounds 7]

Each round times, for every contestant in turn, one prefill of `--prefill` tokens; then rounds of `--tokens`
single-token steps after `--depth` tokens of context, each step with its logits and their argmax. A context is filled
once and then gone back to. `--jump` fills a deep one without reading all of it, which changes no speed: sbedge enters
one window before its end, llama.cpp's cache repeats the keys and values of its first tokens. llama.cpp runs with flash
attention off and on; the better median counts. Needs llama-cpp-python.
"""
from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no installation

from peer_cache import repeated

from sbedge.apps.files import size_of
from sbedge.apps.measure import random_ids, read_bandwidth, timed

BATCH = 2048      # tokens of a prompt that one call takes


class Contestant(Protocol):
    name: str
    bytes: int

    def fill(self, depth: int, jump: bool) -> None:
        """A context of `depth` tokens, to go back to with `rewind`."""

    def rewind(self) -> None: ...

    def step(self, token: int) -> int:
        """Feed one token, return the likeliest next."""

    def prefill(self, ids: list[int]) -> None:
        """Read a prompt in a context of its own."""


class Sbedge:
    def __init__(self, path: Path, threads: int):
        from sbedge.runtime.load import open_engine
        self.engine = open_engine(path, threads=threads)
        self.name, self.bytes = f"sbedge {path.name}", size_of(path)

    def fill(self, depth: int, jump: bool) -> None:
        self.state, self.depth = self.engine.new_state(), depth
        if jump:
            self.state.position = max(0, depth - self.engine.config.sliding_window)
        while left := depth - self.state.position:
            ids = random_ids(min(left, BATCH), self.engine.config.vocab_size, seed=self.state.position)
            self.engine.forward(ids, self.state, logits="none")

    def rewind(self) -> None:
        self.state.position = self.depth     # what the state remembers changes no speed

    def step(self, token: int) -> int:
        return int(self.engine.forward([token], self.state)[0].argmax())

    def prefill(self, ids: list[int]) -> None:
        state = self.engine.new_state()
        for start in range(0, len(ids), BATCH):
            last = start + BATCH >= len(ids)
            self.engine.forward(ids[start:start + BATCH], state, logits="last" if last else "none")


class LlamaCpp:
    def __init__(self, path: Path, threads: int, n_ctx: int, flash: bool):
        import llama_cpp
        self.lib = llama_cpp
        self.model = llama_cpp.Llama(str(path), n_ctx=n_ctx, n_batch=BATCH, n_threads=threads, n_threads_batch=threads,
                                     flash_attn=flash, verbose=False)
        self.name, self.bytes = f"llama.cpp {path.name}{' +fa' if flash else ''}", size_of(path)
        self.vocab = self.model.n_vocab()
        self.memory = self.lib.llama_get_memory(self.model.ctx)

    def fill(self, depth: int, jump: bool) -> None:
        self.depth = depth
        read = min(depth, BATCH) if jump else depth
        self.prefill(random_ids(read, self.vocab))
        if read < depth:
            context = self.model.ctx
            cache = np.empty(self.lib.llama_state_seq_get_size(context, 0), np.uint8)
            pointer = ctypes.POINTER(ctypes.c_uint8)
            self.lib.llama_state_seq_get_data(context, cache.ctypes.data_as(pointer), cache.nbytes, 0)
            deep = repeated(cache, depth)
            if not self.lib.llama_state_seq_set_data(context, deep.ctypes.data_as(pointer), deep.nbytes, 0):
                raise SystemExit(f"llama.cpp does not take a cache of {depth} tokens in the layout that it wrote")

    def rewind(self) -> None:
        self.lib.llama_memory_seq_rm(self.memory, 0, self.depth, -1)

    def step(self, token: int) -> int:
        # The C interface itself: llama-cpp-python's own loop costs more than our whole step.
        self.decode([token])
        logits = self.lib.llama_get_logits_ith(self.model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def prefill(self, ids: list[int]) -> None:
        self.lib.llama_memory_clear(self.memory, True)
        for start in range(0, len(ids), BATCH):
            self.decode(ids[start:start + BATCH])
        if ids:
            self.lib.llama_get_logits_ith(self.model.ctx, -1)

    def decode(self, ids: list[int]) -> None:
        array = (self.lib.llama_token * len(ids))(*ids)
        if status := self.lib.llama_decode(self.model.ctx, self.lib.llama_batch_get_one(array, len(ids))):
            raise SystemExit(f"llama.cpp could not read {len(ids)} tokens (status {status})")


def in_turns(contestants: list[Contestant], rounds: int, rate: Callable[[Contestant], float]) -> dict[str, list[float]]:
    """Each contestant's rate in every round, by name."""
    rates: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant in contestants:
            rates[contestant.name].append(rate(contestant))
    return rates


def decode_rate(contestant: Contestant, tokens: int) -> float:
    """Tokens per second over `tokens` steps, from the context that it filled."""
    token = 5
    contestant.rewind()

    def steps() -> None:
        nonlocal token
        for _ in range(tokens):
            token = contestant.step(token)

    return tokens / timed(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", nargs="+", type=Path)
    parser.add_argument("--peer", type=Path, required=True, help="the GGUF file llama.cpp runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--jump", action="store_true", help="fill a deep context without reading all of it")
    parser.add_argument("--flash-attention", choices=["off", "on", "both"], default="both", help="of llama.cpp")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    n_ctx = max(args.depth + args.tokens, args.prefill) + 64
    # The peer first: its package's libraries are then the process's one copy.
    peers = [LlamaCpp(args.peer, args.threads, n_ctx, flash) for flash in (False, True)
             if args.flash_attention in ("both", "on" if flash else "off")]
    contestants: list[Contestant] = [*peers, *(Sbedge(path, args.threads) for path in args.ours)]
    prompt = random_ids(args.prefill, peers[0].vocab)
    for contestant in contestants:
        contestant.prefill(prompt[:64])     # warms up
    prefills = in_turns(contestants, args.rounds, lambda c: len(prompt) / timed(lambda: c.prefill(prompt)))
    for contestant in contestants:
        contestant.fill(args.depth, args.jump)
        decode_rate(contestant, min(args.tokens, 4))
    rates = in_turns(contestants, args.rounds, lambda c: decode_rate(c, args.tokens))
    report(args, contestants, rates, prefills)


def report(args: argparse.Namespace, contestants: list[Contestant], rates: dict[str, list[float]],
           prefills: dict[str, list[float]]) -> None:
    bandwidth = read_bandwidth(args.threads) / 1e9
    best = {kind: max(statistics.median(table[c.name]) for c in contestants if isinstance(c, LlamaCpp))
            for kind, table in (("decode", rates), ("prefill", prefills))}
    rows = [{"name": c.name, "megabytes": round(c.bytes / 1e6, 1),
             "decode_tok_s": round(statistics.median(rates[c.name]), 1),
             "decode_ratio": round(statistics.median(rates[c.name]) / best["decode"], 3),
             "bandwidth_share": round(statistics.median(rates[c.name]) * c.bytes / 1e9 / bandwidth, 3),
             "prefill_tok_s": round(statistics.median(prefills[c.name]), 1),
             "prefill_ratio": round(statistics.median(prefills[c.name]) / best["prefill"], 3)} for c in contestants]
    if args.json:
        print(json.dumps({"depth": args.depth, "threads": args.threads, "read_gb_s": round(bandwidth, 1),
                          "rounds": args.rounds, "rows": rows}, indent=2))
        return
    table = Table(title=f"depth {args.depth}, {args.threads} threads, median of {args.rounds} rounds, "
                        f"memory reads {bandwidth:.1f} GB/s")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "name" else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
