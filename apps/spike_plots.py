"""The pictures of `sbedge spikes --plots`, by matplotlib, which is imported only here."""
from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sbedge.apps.commands.inspect import spiking_as
from sbedge.apps.spike_report import MAP_SKIPPED, MAP_TOKENS, Recording
from sbedge.errors import SbedgeError
from sbedge.quant.spike_stats import SMALL
from sbedge.quant.spike_trains import bidirectional_train
from sbedge.runtime.spike_observer import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID, SILENT = "#333333", "#dddddd", "#f7f7f7"
UP, DOWN = "#0072b2", "#d55e00"                                     # told apart by any eye (Okabe and Ito)
COLORS = dict(zip(KINDS, ("#0072b2", "#e69f00", "#009e73", "#cc79a7"), strict=True))
MARKS = dict(zip(KINDS, "os^D", strict=True))
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
    "figure.constrained_layout.use": True, "svg.fonttype": "none", "svg.hashsalt": "sbedge"}
MAP_CHANNELS = 64
SHOWN = 15          # the largest |s| of the histogram's axis


def check_folder(folder: Path) -> None:
    """SbedgeError unless pictures can be drawn into `folder`, which need not be there yet."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SbedgeError("--plots needs matplotlib; install it with: pip install 'sbedge[plots]'")
    if folder.exists() and not folder.is_dir():
        raise SbedgeError(f"{folder}: is no folder; name one to draw into")


def draw(folder: Path, format: str, summary: dict[str, Any], recording: Recording) -> list[Path]:
    """Write the four pictures; earlier ones of the same names are replaced. Raises SbedgeError if it cannot."""
    drawings = {"spike-counts": draw_counts, "firing-map": draw_firing_map, "sparsity-by-layer": draw_layers,
                "perplexity-against-sparsity": draw_sweep}
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, drawing in drawings.items():
            path = folder / f"{name}.{format}"
            temporary = path.with_name(f".{path.name}.tmp")
            with new_figure() as figure:
                drawing(figure, summary, recording)
                metadata = {"Date": None} if format == "svg" else {}        # the same picture, the same bytes
                figure.savefig(temporary, format=format, dpi=150, metadata=metadata)
            temporary.replace(path)
            paths.append(path)
    except OSError as error:
        raise SbedgeError(f"{folder}: cannot be drawn into ({error.strerror or error})") from None
    return paths


@contextmanager
def new_figure() -> Iterator[Figure]:
    import matplotlib
    matplotlib.use("Agg")       # draws into files; needs no screen
    from matplotlib import pyplot
    with matplotlib.rc_context(STYLE):
        figure = pyplot.figure(figsize=(7.2, 3.6))
        try:
            yield figure
        finally:
            pyplot.close(figure)


def subtitle(summary: dict[str, Any]) -> str:
    model = Path(summary["model"]).name
    trained = "" if summary["trained_to_spike"] else ", not trained to spike"
    return f"{model}, {spiking_as(summary)}, {summary['tokens']} tokens{trained}"


# --- the pictures ------------------------------------------------------------------------------------
def draw_counts(figure: Figure, summary: dict[str, Any], recording: Recording) -> None:
    """How often each spike count comes, by kind of input."""
    kinds = [kind for kind in KINDS if kind in summary["kinds"]]
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    figure.suptitle(f"Spike counts: {subtitle(summary)}", fontsize=10)
    shown = np.arange(-SHOWN, SHOWN + 1)
    for axis, kind in zip(axes, kinds, strict=True):
        histogram = recording.kind(kind)
        assert histogram is not None
        shares = np.array([histogram.times[int(count)] for count in shown]) / histogram.total
        axis.axvspan(-SMALL - 0.5, SMALL + 0.5, ymax=0.78, color=GRID, alpha=0.45, linewidth=0)
        axis.bar(shown, shares, width=0.8, color=[INK if count == 0 else COLORS[kind] for count in shown])
        axis.set_yscale("log")
        axis.set_ylim(1e-4, 4)     # room above for words
        axis.set_yticks([1e-4, 1e-3, 1e-2, 1e-1], ["0.01%", "0.1%", "1%", "10%"])
        axis.set_xticks([-SMALL, 0, SMALL])
        axis.grid(visible=False, axis="x")
        axis.set_title(kind)
        axis.set_xlabel("spike count s")
        axis.text(0.5, 0.985, f"silent {histogram.silent:.1%}\n|s| ≤ {SMALL}: {histogram.small:.1%}\n"
                  f"largest {histogram.largest:,}", transform=axis.transAxes, ha="center", va="top", fontsize=8)
    axes[0].set_ylabel("share of channels")


def draw_firing_map(figure: Figure, summary: dict[str, Any], recording: Recording) -> None:
    """Which channel fires when: each token is as many time steps as its counts have bits."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    counts = np.concatenate(recording.map_counts)[MAP_SKIPPED:MAP_SKIPPED + MAP_TOKENS, :MAP_CHANNELS]
    if not counts.size:
        counts = np.concatenate(recording.map_counts)[:MAP_TOKENS, :MAP_CHANNELS]
    train = bidirectional_train(counts)
    tokens, channels = counts.shape
    steps = max(1, len(train.weights))
    picture = np.zeros((channels, tokens * steps), np.int8)
    for step, spikes in enumerate(train.spikes):
        picture[:, step::steps] = spikes.T
    axis = figure.subplots()
    axis.imshow(picture, cmap=ListedColormap([DOWN, SILENT, UP]), vmin=-1, vmax=1, aspect="auto",
                interpolation="nearest", extent=(0, tokens, channels, 0))
    axis.set_xticks(range(0, tokens + 1, 4))
    axis.set_xticks(range(tokens + 1), minor=True)
    axis.grid(visible=False)
    axis.grid(which="minor", axis="x", color="#999999", linewidth=0.5)
    axis.tick_params(which="minor", length=0)
    axis.set_xlabel(f"token; {steps} time steps each, the most significant bit first")
    axis.set_ylabel("channel")
    silent = 1 - np.count_nonzero(picture) / picture.size
    figure.suptitle(f"Firing map of layer {recording.map_layer}, FFN in: {silent:.0%} of these slots silent\n"
                    f"{subtitle(summary)}", fontsize=10)
    figure.legend(handles=[Patch(color=UP, label="spike +1"), Patch(color=DOWN, label="spike −1"),
                           Patch(facecolor=SILENT, edgecolor="#999999", label="silent")],
                  loc="outside lower right", ncols=3, fontsize=8)


def draw_layers(figure: Figure, summary: dict[str, Any], recording: Recording) -> None:
    """Silence by layer, of channels and of time slots."""
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"Sparsity by layer: {subtitle(summary)}", fontsize=10)
    for axis, key, title in ((left, "silent", "silent channels"), (right, "slot_sparsity", "silent time slots")):
        for kind in summary["kinds"]:
            rows = [row for row in summary["layers"] if row["kind"] == kind]
            axis.plot([row["layer"] for row in rows], [100 * row[key] for row in rows], color=COLORS[kind],
                      marker=MARKS[kind], markersize=3.5, linewidth=1.2, label=kind)
        published = summary["published"][key]
        axis.axhline(100 * published, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label="published, 7B at k = 3")
        axis.set_title(f"{title} (published: {published:.1%})")
        axis.set_xlabel("layer")
        axis.set_ylabel("%")
        axis.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylim(bottom=0)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)


def draw_sweep(figure: Figure, summary: dict[str, Any], recording: Recording) -> None:
    """What silence costs: over k, and over dead zones at one k."""
    axis: Axes = figure.subplots()
    points = summary["sweep"]
    base = points["unspiked"]
    for varied, color, mark, sign, label in (
            ("k", UP, "o", "k", "coarser step: smaller k"),
            ("dead_zone", DOWN, "s", "z", f"dead zone z at k = {summary['spike_k']:g}")):
        x = [100 * point["silent_weights"] for point in points[varied]]
        y = [100 * (point["perplexity"] / base - 1) for point in points[varied]]
        axis.plot(x, y, color=color, marker=mark, markersize=5, linewidth=1.3, label=label)
        for point, place in zip(points[varied], zip(x, y, strict=True), strict=True):
            value = point["spike_k" if varied == "k" else "dead_zone"]
            above = varied == "k"
            axis.annotate(f"{sign} = {value:g}", place, xytext=(-4, 4) if above else (5, -9),
                          textcoords="offset points", ha="right" if above else "left", fontsize=7.5, color=color)
    axis.axhline(0, color=INK, linewidth=0.9)
    axis.margins(x=0.1)
    axis.set_xlim(left=0)
    axis.set_xlabel("weights that a token finds silent, % (bytes that need not be read)")
    axis.set_ylabel("perplexity above\nthe model without spikes, %")
    axis.legend(loc="upper left")
    figure.suptitle(f"What silence costs: {subtitle({**summary, 'dead_zone': 0, 'input_dead_zone': ()})}", fontsize=10)
