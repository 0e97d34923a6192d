"""Decode and prefill beside llama.cpp, in one process, in turns (A B A B), medians and ratios.

    python benchmarks/peers.py --peer ORIGINAL.gguf OURS.gguf [OURS-ONNX ...] [--depth 0] [--tokens 48] [--rounds 7]

Each round times, for every contestant in turn, `--tokens` single-token steps after `--depth` tokens of context
(each step takes the logits and their argmax), and one prefill of `--prefill` tokens. llama.cpp runs with flash
attention off and on; the better median counts. Needs llama-cpp-python.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no installation

from sbedge.apps.measure import random_ids, read_bandwidth, timed


class Contestant(Protocol):
    name: str
    bytes: int

    def start(self, depth: int) -> None:
        """A fresh context of `depth` tokens."""

    def step(self, token: int) -> int:
        """Feed one token, return the likeliest next."""

    def prefill(self, ids: list[int]) -> None: ...


class Sbedge:
    def __init__(self, path: Path, threads: int):
        from sbedge.runtime.load import open_engine
        self.engine = open_engine(path, threads=threads)
        self.name, self.bytes = f"sbedge {path.name}", size_of(path)

    def start(self, depth: int) -> None:
        self.state = self.engine.new_state()
        if depth:
            self.engine.forward(random_ids(depth, self.engine.config.vocab_size), self.state)

    def step(self, token: int) -> int:
        return int(self.engine.forward([token], self.state)[0].argmax())

    def prefill(self, ids: list[int]) -> None:
        self.engine.forward(ids, self.engine.new_state())


class LlamaCpp:
    def __init__(self, path: Path, threads: int, n_ctx: int, flash: bool):
        import llama_cpp
        self.lib = llama_cpp
        self.model = llama_cpp.Llama(str(path), n_ctx=n_ctx, n_batch=2048, n_threads=threads, n_threads_batch=threads,
                                     flash_attn=flash, verbose=False)
        self.name, self.bytes = f"llama.cpp {path.name}{' +fa' if flash else ''}", size_of(path)
        self.vocab = self.model.n_vocab()

    def start(self, depth: int) -> None:
        self.model.reset()
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.model.ctx), True)
        if depth:
            self.model.eval(random_ids(depth, self.vocab))

    def step(self, token: int) -> int:
        # The C interface itself: llama-cpp-python's own loop costs more than our whole step.
        one = (self.lib.llama_token * 1)(token)
        self.lib.llama_decode(self.model.ctx, self.lib.llama_batch_get_one(one, 1))
        logits = self.lib.llama_get_logits_ith(self.model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def prefill(self, ids: list[int]) -> None:
        self.start(0)
        array = (self.lib.llama_token * len(ids))(*ids)
        self.lib.llama_decode(self.model.ctx, self.lib.llama_batch_get_one(array, len(ids)))
        self.lib.llama_get_logits_ith(self.model.ctx, -1)


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else list(path.iterdir())
    return sum(f.stat().st_size for f in files)


def decode_rate(contestant: Contestant, tokens: int) -> float:
    """Tokens per second over `tokens` steps, from the context it holds."""
    token = 5

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
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    n_ctx = max(args.depth + args.tokens * (args.rounds + 1) + 64, args.prefill + 64)
    # The peer first: its package's libraries are then the process's one copy.
    peers = [LlamaCpp(args.peer, args.threads, n_ctx, flash) for flash in (False, True)]
    contestants: list[Contestant] = [*peers, *(Sbedge(path, args.threads) for path in args.ours)]
    rates: dict[str, list[float]] = {c.name: [] for c in contestants}
    prefills: dict[str, list[float]] = {c.name: [] for c in contestants}
    prompt = random_ids(args.prefill, peers[0].vocab)
    for round_number in range(args.rounds + 1):         # the first warms up and is not counted
        for contestant in contestants:
            prefill = args.prefill / timed(lambda c=contestant: c.prefill(prompt))
            contestant.start(args.depth)
            decode_rate(contestant, 4)
            rate = decode_rate(contestant, args.tokens)
            if round_number:
                rates[contestant.name].append(rate)
                prefills[contestant.name].append(prefill)
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
