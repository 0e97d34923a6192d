"""What calibration did: the export beside one that is rounded to the nearest, on the end of the text."""
from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from sbedge.apps.files import size_of
from sbedge.apps.measure import skipped_share
from sbedge.checkpoint import Checkpoint
from sbedge.errors import EngineUnavailable
from sbedge.export import export_model
from sbedge.export.calibration import exact_logits
from sbedge.export.perplexity import nats
from sbedge.export.report import Report, compare
from sbedge.runtime.engine import Engine
from sbedge.runtime.load import ENGINE_OF, open_engine

DECODED = 32        # tokens fed one at a time, for the speed


def before_and_after(checkpoint: Checkpoint, out: Path, options: dict[str, Any],
                     ids: np.ndarray) -> dict[str, Any] | None:
    """Figures of the checkpoint, of an export rounded to the nearest with the same `options`, and of the calibrated one
    at `out`, over ids [samples, tokens]; None, and a note, without an engine."""
    exact = exact_logits(checkpoint, ids)
    table: dict[str, Any] = {"tokens": int(ids[:, 1:].size), "float32": {"perplexity": perplexity(exact, ids)}}
    try:
        with TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.rounded.") as folder:
            rounded = Path(folder) / out.name
            export_model(checkpoint, rounded, **options)
            table["rounded"] = figures(rounded, options["format"], ids, exact)
        table["calibrated"] = figures(out, options["format"], ids, exact)
    except EngineUnavailable as error:
        print(f"not compared with rounding: {error}", file=sys.stderr)
        return None
    return table


def figures(model: Path, format: str, ids: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    engine = open_engine(model, ENGINE_OF[format])
    logits = np.array([engine.forward(sample, engine.new_state(), logits="all") for sample in ids])
    report: Report | None = None
    for p, q in zip(exact, logits, strict=True):
        part = compare(p, q)
        report = part if report is None else report.merged(part)
    assert report is not None
    return {"perplexity": perplexity(logits, ids), "kl": report.kl_mean, "top1_agreement": report.top1_agreement,
            "bytes": size_of(model), **decoded(engine, ids[0])}


def decoded(engine: Engine, ids: np.ndarray) -> dict[str, float | None]:
    """Tokens a second, one at a time, and the share of weight bytes that silence spared; None where none is counted."""
    state = engine.new_state()
    engine.forward(ids[:1], state)
    tokens = ids[1:1 + DECODED]
    start = time.perf_counter()
    skipped = skipped_share(engine, lambda: [engine.forward([int(token)], state) for token in tokens])
    return {"tok_s": len(tokens) / (time.perf_counter() - start), "skipped": skipped}


def perplexity(logits: np.ndarray, ids: np.ndarray) -> float:
    """Of samples that each begin with an empty state: logits [samples, tokens, V], ids [samples, tokens]."""
    return float(np.exp(np.mean([nats(rows[:-1], sample[1:]) for rows, sample in zip(logits, ids, strict=True)])))


def chosen_text(chosen: dict[str, Any]) -> str:
    """What calibration chose, in a line."""
    def span(values: list[float]) -> str:
        low, high = (f"{value:.3g}" for value in values)
        return low if low == high else f"{low} to {high}"

    parts = [f"linears of {' and '.join(f'{count} inputs in {quant}' for quant, count in chosen['inputs'].items())}"]
    if "k" in chosen:
        parts += [f"k {span(chosen['k'])}", f"dead zones {span(chosen['dead_zone'])}"]
    return "chosen: " + ", ".join(parts)


def print_comparison(table: dict[str, Any]) -> None:
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    shown.add_column(f"{table['tokens']} tokens held out")
    for title in ("perplexity", "KL", "same top\ntoken", "MB", "tok/s", "bytes\nskipped"):
        shown.add_column(title, justify="right", no_wrap=True)
    shown.add_row("float32", f"{table['float32']['perplexity']:.2f}")
    for name in ("rounded", "calibrated"):
        row = table[name]
        skipped = "" if row["skipped"] is None else f"{row['skipped']:.1%}"
        shown.add_row(name, f"{row['perplexity']:.2f}", f"{row['kl']:.3g}", f"{row['top1_agreement']:.1%}",
                      f"{row['bytes'] / 1e6:.1f}", f"{row['tok_s']:.0f}", skipped)
    Console(markup=False, highlight=False, emoji=False).print(shown)
