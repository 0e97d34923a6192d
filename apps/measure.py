"""What the machine gives and what this process takes: for `sbedge bench` and the scripts of benchmarks/."""
from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_bandwidth(threads: int, nbytes: int = 1 << 29, repeats: int = 10) -> float:
    """Bytes a second of summing a buffer far larger than the caches, all threads at once; the best of `repeats`."""
    parts = np.array_split(np.ones(nbytes // 8, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return nbytes / min(timed(lambda: list(pool.map(np.sum, parts))) for _ in range(repeats))


def random_ids(count: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Token ids to fill a context with; the first three are often special and left out."""
    return np.random.default_rng(seed).integers(min(3, vocab_size - 1), min(vocab_size, 30_000), count).tolist()


def skipped_share(engine: object, work: Callable[[], object]) -> float | None:
    """Share of weight bytes that silent channels spared `engine` during `work`; None where none is counted."""
    traffic = getattr(engine, "traffic", None)
    before = (traffic.fetched, traffic.dense) if traffic else (0, 0)
    work()
    stored = traffic.dense - before[1] if traffic else 0
    return 1 - (traffic.fetched - before[0]) / stored if traffic and stored else None


def resident_bytes() -> int:
    """Bytes of memory this process holds now (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_rss() -> int | None:
    """Most bytes of memory this process has held at once; None where the system does not say."""
    try:
        import resource  # absent on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
