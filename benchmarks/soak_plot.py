"""The picture of benchmarks/soak.py: a token's time and the process's memory by position."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbedge.apps.spike_plots import DOWN, UP, new_figure

BINS = 120      # points of a curve, spread evenly over the logarithm of the position


def draw(path: Path, samples: Sequence[Any]) -> None:
    names = list(dict.fromkeys(s.name for s in samples))
    with new_figure() as figure:
        axes = figure.subplots(1, 3)
        for name, color in zip(names, (UP, DOWN), strict=False):
            for axis, kind in zip(axes, ("read", "decode"), strict=False):
                chosen = [s for s in samples if s.name == name and s.kind == kind]
                position, ms = curve([s.position for s in chosen], [1e3 * s.seconds / s.tokens for s in chosen])
                axis.plot(position, ms, color=color, linewidth=1.3, marker="o" if kind == "decode" else "",
                          markersize=3, label="llama.cpp" if name == "llama.cpp" else "sbedge")
            chosen = [s for s in samples if s.name == name]
            position, megabytes = curve([s.position for s in chosen], [s.resident_bytes / 1e6 for s in chosen])
            axes[2].plot(position, megabytes, color=color, linewidth=1.3)
        titles = ("a token read in a chunk, ms", "a token decoded, ms", "resident memory, MB")
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title)
            axis.set_xscale("log")
            axis.set_xlabel("position")
            axis.set_ylim(bottom=0)
        axes[0].legend(loc="upper left")
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)


def curve(positions: list[int], values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Medians of the values in bins of the position's logarithm; bins without a sample are left out."""
    x, y = np.asarray(positions, float), np.asarray(values)
    bins = np.floor(np.log10(x) * BINS / 6).astype(int)
    chosen = [bins == b for b in np.unique(bins)]
    return np.array([x[c].mean() for c in chosen]), np.array([np.median(y[c]) for c in chosen])
