"""The picture of what benchmarks/soak.py measured: a token's time and the process's memory by position.

    python benchmarks/soak_plot.py soak.csv soak.svg

Needs matplotlib (pip install '.[plots]').
"""
from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no installation

from sbedge.apps.spike_plots import DOWN, UP, new_figure

BINS = 120      # points of a curve, spread evenly over the logarithm of the position


def main() -> None:
    source, path = (Path(argument) for argument in sys.argv[1:3])
    with source.open(newline="") as file:
        samples = list(csv.DictReader(file))
    names = list(dict.fromkeys(s["name"] for s in samples))
    with new_figure() as figure:
        axes = figure.subplots(1, 3)
        for name, color in zip(names, (UP, DOWN), strict=False):
            mine = [s for s in samples if s["name"] == name]
            label = "llama.cpp" if name == "llama.cpp" else "sbedge"
            for axis, kind in zip(axes, ("read", "decode"), strict=False):
                chosen = [s for s in mine if s["kind"] == kind]
                ms = [1e3 * float(s["seconds"]) / int(s["tokens"]) for s in chosen]
                axis.plot(*curve(chosen, ms), color=color, linewidth=1.3, marker="." if kind == "decode" else "",
                          label=label)
            megabytes = [int(s["resident_bytes"]) / 1e6 for s in mine]
            axes[2].plot(*curve(mine, megabytes), color=color, linewidth=1.3)
        titles = ("a token read in a chunk, ms", "a token decoded, ms", "resident memory, MB")
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title)
            axis.set_xscale("log")
            axis.set_xlabel("position")
            axis.set_ylim(bottom=0)
        axes[0].legend(loc="upper left")
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)


def curve(samples: list[dict[str, str]], values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Medians of the values in bins of the position's logarithm; bins without a sample are left out."""
    x, y = np.array([float(s["position"]) for s in samples]), np.asarray(values)
    bins = np.floor(np.log10(x) * BINS / 6).astype(int)
    chosen = [bins == b for b in np.unique(bins)]
    return np.array([x[c].mean() for c in chosen]), np.array([np.median(y[c]) for c in chosen])


if __name__ == "__main__":
    main()
