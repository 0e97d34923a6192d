"""A million tokens through one state: does a token cost the same at the end, in time and in memory?

    python benchmarks/soak.py MODEL [--peer LLAMA.gguf] [--tokens 1000000] [-o soak.csv]
    python benchmarks/soak_plot.py soak.csv soak.svg

MODEL reads one window to warm up, decodes `--ends` tokens one by one, reads on in chunks, and decodes the last `--ends`
tokens one by one. After that:

    in turns     the state that was copied after the first `--ends` tokens and the one at the end decode by turns, so
                 that a machine that is faster or slower by then changes nothing
    rope         two fresh states, one placed a million tokens further on, are given the same tokens; the keys of the
                 first window layer, turned back in float64 by the angles of their positions, must be the same

The peer, a transformer of the same shape on llama.cpp, reads the same chunks and decodes a few tokens after each
doubling, until `--peer-minutes` are over. Each runs in a process of its own, whose resident memory is recorded.
"""
from __future__ import annotations

import argparse
import csv
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no installation

from sbedge.apps.commands.inspect import read_contents
from sbedge.apps.measure import random_ids, resident_bytes, timed
from sbedge.reference import rotate

KINDS = ("read", "decode")
TURNS = 20
PEER_ROOM, DECODED = 1 << 17, 8     # tokens of the peer's cache; how many it decodes after each doubling


class Sample(NamedTuple):
    """What `tokens` tokens that end at `position` took."""
    name: str
    kind: str           # one of KINDS
    position: int
    tokens: int
    seconds: float
    resident_bytes: int


@dataclass(frozen=True)
class Plan:
    tokens: int
    ends: int
    chunk: int
    threads: int
    peer_minutes: float

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        for begin in range(start, stop, self.chunk):
            yield begin, min(begin + self.chunk, stop)


# --- sbedge ------------------------------------------------------------------------------------------
def soak(path: Path, plan: Plan) -> tuple[list[Sample], dict[str, Any]]:
    """All samples, and what the comparisons at the end found."""
    from sbedge.runtime.load import open_engine
    engine = open_engine(path, threads=plan.threads)
    window, vocab = engine.config.sliding_window, engine.config.vocab_size
    state = engine.new_state()
    samples: list[Sample] = []

    def feed(kind: str, start: int, stop: int) -> None:
        ids = random_ids(stop - start, vocab, seed=start)
        pieces = [ids] if kind == "read" else [[token] for token in ids]
        seconds = 0.0
        for piece in pieces:
            begin = time.perf_counter()
            logits = engine.forward(piece, state)
            seconds += time.perf_counter() - begin
            if not np.isfinite(logits).all():
                raise SystemExit(f"{path}: logits that are no numbers near token {stop:,}")
        samples.append(Sample(path.name, kind, stop, stop - start, seconds, resident_bytes()))

    settled = window + plan.ends
    for kind, begin, end in (("read", 0, window), ("decode", window, settled), ("read", settled, settled + plan.ends)):
        for start, stop in plan.chunks(begin, end):
            feed(kind, start, stop)
    early = state.copy()
    for kind, begin, end in (("read", settled + plan.ends, plan.tokens - plan.ends),
                             ("decode", plan.tokens - plan.ends, plan.tokens)):
        for start, stop in plan.chunks(begin, end):
            feed(kind, start, stop)
    return samples, {"state_bytes": state.nbytes, "early_position": early.position, "position": state.position,
                     "in_turns": in_turns(engine, early, state), "rope": rope_difference(engine, plan.tokens)}


def in_turns(engine: Any, early: Any, late: Any, steps: int = 100) -> float:
    """Seconds a decoded token takes at the end over those it took early, by turns: the median of the ratios."""
    ids = random_ids(steps, engine.config.vocab_size)

    def decode(state: Any) -> float:
        position = state.position
        seconds = timed(lambda: [engine.forward([token], state) for token in ids])
        state.position = position       # what the state remembers changes no speed
        return seconds

    decode(early), decode(late)
    ratios = []
    for turn in range(TURNS):           # who goes first changes, too
        pair = (early, late) if turn % 2 else (late, early)
        seconds = {id(state): decode(state) for state in pair}
        ratios.append(seconds[id(late)] / seconds[id(early)])
    return statistics.median(ratios)


def rope_difference(engine: Any, far: int) -> float:
    """Largest difference of keys of the same tokens at position 0 and `far` on, turned back; over the largest key."""
    ids = random_ids(min(256, engine.config.sliding_window), engine.config.vocab_size)
    keys = []
    for position in (0, far):
        state = engine.new_state()
        state.position = position
        engine.forward(ids, state, logits="none")
        keys.append(turned_back(engine.config, state, np.arange(position, position + len(ids))))
    return float(np.abs(keys[0] - keys[1]).max() / np.abs(keys[0]).max())


def turned_back(config: Any, state: Any, positions: np.ndarray) -> np.ndarray:
    """Keys [n, G, d] of the first window layer as they were before their rotation."""
    ring, half = state.arrays[f"{min(config.attn_layers)}.keys"], config.head_dim // 2
    x = ring[positions % len(ring)].astype(np.float64)
    angles = positions[:, None] * config.rope_theta ** (-np.arange(half) / half)
    return rotate(x, np.cos(angles), -np.sin(angles))


# --- llama.cpp ---------------------------------------------------------------------------------------
def soak_peer(path: Path, plan: Plan) -> tuple[list[Sample], dict[str, Any]]:
    """As far as the time and a cache of 128k tokens go."""
    from peers import LlamaCpp
    room = min(plan.tokens, PEER_ROOM)
    peer = LlamaCpp(path, plan.threads, room, flash=False)
    samples: list[Sample] = []
    deadline, next_decode, position = time.perf_counter() + 60 * plan.peer_minutes, plan.chunk, 0

    def add(kind: str, tokens: int, seconds: float) -> None:
        samples.append(Sample("llama.cpp", kind, position, tokens, seconds, resident_bytes()))

    while position + plan.chunk + DECODED <= room and time.perf_counter() < deadline:
        ids = random_ids(plan.chunk, peer.vocab, seed=position)
        seconds = timed(lambda ids=ids: peer.decode(ids))
        position += plan.chunk
        add("read", plan.chunk, seconds)
        if position >= next_decode:
            next_decode *= 2
            steps = random_ids(DECODED, peer.vocab)
            seconds = timed(lambda steps=steps: [peer.step(token) for token in steps])
            position += len(steps)
            add("decode", len(steps), seconds)
    return samples, {"position": position}


# --- the report --------------------------------------------------------------------------------------
def summary(samples: list[Sample], found: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Medians of a token's time over the first and the last `ends` tokens after the window is full, and the rest."""
    result, window = dict(found), found["early_position"] - 2 * plan.ends
    for kind in KINDS:
        rates = [s.seconds / s.tokens for s in samples if s.kind == kind and s.position > window]
        count = max(1, plan.ends // plan.chunk)
        first, last = statistics.median(rates[:count]), statistics.median(rates[-count:])
        result[kind] = {"first_ms": 1e3 * first, "last_ms": 1e3 * last, "ratio": last / first}
    settled = [s.resident_bytes for s in samples if s.position > found["early_position"]]
    result["resident_growth_bytes"] = settled[-1] - settled[0]
    return result


def in_own_process(work: Any, *arguments: object) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(work, *arguments).result()


def write_csv(path: Path, samples: list[Sample]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Sample._fields)
        writer.writerows(s._replace(seconds=round(s.seconds, 6)) for s in samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", type=Path, help="a Llama of the same shape (benchmarks/make_llama.py)")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--ends", type=int, default=10_000, help="tokens compared at either end, decoded one by one")
    parser.add_argument("--chunk", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-minutes", type=float, default=6)
    parser.add_argument("-o", "--out", type=Path, default=Path("soak.csv"))
    args = parser.parse_args()
    window = read_contents(args.model).config.sliding_window
    if args.tokens < window + 3 * args.ends:
        parser.error(f"--tokens is {args.tokens}, expected at least the window of {window} and three times --ends")
    plan = Plan(args.tokens, args.ends, args.chunk, args.threads, args.peer_minutes)
    samples, found = in_own_process(soak, args.model, plan)
    result = summary(samples, found, plan)
    if args.peer:
        peer_samples, peer = in_own_process(soak_peer, args.peer, plan)
        samples += peer_samples
        result["peer_position"] = peer["position"]
    write_csv(args.out, samples)
    for key, value in result.items():
        print(f"{key:22} {value}")


if __name__ == "__main__":
    main()
