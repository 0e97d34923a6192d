"""What `sbedge spikes` finds out: runs a model, watches its spikes, and sums up."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sbedge.config import ModelConfig
from sbedge.errors import EngineUnavailable, ModelFileError
from sbedge.export.perplexity import Predictions, chunk_tokens, read_all
from sbedge.quant.spike_stats import CountHistogram, energy
from sbedge.runtime.load import open_engine
from sbedge.runtime.model_weights import ModelWeights
from sbedge.runtime.spike_observer import KINDS, SpikeObserver, fan_outs, widths

# The report's figures for 7B at k = 3.
PUBLISHED = {"silent": 0.184, "small": 0.941, "spikes": 1.13, "slot_sparsity": 0.6915}
FIGURES = tuple(PUBLISHED)

SWEEP_K = (1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
SWEEP_DEAD_ZONE = (0.2, 0.3, 0.4, 0.5, 0.6)
MAP_TOKENS, MAP_SKIPPED = 24, 4     # of the firing map; the first token's outliers would set its scale


@dataclass
class Recording:
    """The spikes of one run: a histogram for every layer and kind of input, and counts of `map_layer` for a picture."""

    config: ModelConfig
    inputs: dict[tuple[int, str], CountHistogram] = field(default_factory=dict)
    map_counts: list[np.ndarray] = field(default_factory=list)      # [n, channels]: the FFN input of map_layer

    @property
    def map_layer(self) -> int:
        return self.config.num_hidden_layers // 2

    def see(self, layer: int, kind: str, counts: np.ndarray) -> None:
        try:
            self.inputs.setdefault((layer, kind), CountHistogram()).add(counts)
        except ValueError:
            raise ModelFileError(f"layer {layer}: what goes into its linears are no finite numbers; the file may be "
                                 "damaged, export or download it again") from None
        if layer == self.map_layer and kind == "FFN in" and sum(map(len, self.map_counts)) < MAP_TOKENS + MAP_SKIPPED:
            self.map_counts.append(counts.astype(np.int64))

    def kind(self, kind: str) -> CountHistogram | None:
        found = [histogram for (_, name), histogram in self.inputs.items() if name == kind]
        return CountHistogram().merged(*found) if found else None

    def all(self) -> CountHistogram:
        return CountHistogram().merged(*self.inputs.values())

    def weights(self, layer: int, kind: str) -> int:
        """Weights that read an input of this kind."""
        return widths(self.config)[kind] * fan_outs(self.config, layer)[kind]

    def weighted(self, figure: Callable[[CountHistogram], float]) -> float:
        """The sum of a figure over all inputs, each as often as there are weights that read it: a token's."""
        return sum(figure(histogram) * self.weights(*key) for key, histogram in self.inputs.items())

    @property
    def silent_weights(self) -> float:
        """Share of the spiking linears' weights that a token finds silent."""
        return self.weighted(lambda h: h.silent) / self.weighted(lambda _: 1.0)


# --- running -----------------------------------------------------------------------------------------
def record(weights: ModelWeights, config: ModelConfig, ids: np.ndarray, name: str) -> tuple[Recording, Predictions]:
    """Read `ids` [n] with `config`; also how well they are predicted."""
    recording = Recording(config)
    reader = Predictions(SpikeObserver(config, weights, recording.see), name)
    read_all(reader, chunks(ids, config.vocab_size))
    return recording, reader


def chunks(ids: np.ndarray, vocab_size: int) -> Iterator[np.ndarray]:
    size = chunk_tokens(vocab_size)
    return (ids[start:start + size] for start in range(0, len(ids), size))


def sweep(weights: ModelWeights, config: ModelConfig, ids: np.ndarray, name: str,
          progress: Callable[[str], None]) -> dict[str, Any]:
    """Perplexity without spikes, and perplexity and silence over k and over dead zones at the config's own k."""
    progress("without spikes")
    unspiked = Predictions(SpikeObserver(replace(config, spike_k=0.0), weights, lambda *_: None), name)
    read_all(unspiked, chunks(ids, config.vocab_size))
    config = replace(config, input_spike_k=(), input_dead_zone=())
    settings = [("k", replace(config, spike_k=k, dead_zone=0.0)) for k in SWEEP_K]
    settings += [("dead_zone", replace(config, dead_zone=zone)) for zone in SWEEP_DEAD_ZONE]
    points: dict[str, Any] = {"unspiked": unspiked.perplexity, "k": [], "dead_zone": []}
    for varied, setting in settings:
        progress(f"k = {setting.spike_k:g}, dead zone {setting.dead_zone:g}")
        recording, reader = record(weights, setting, ids, name)
        points[varied].append({"spike_k": setting.spike_k, "dead_zone": setting.dead_zone,
                               "silent_weights": recording.silent_weights, "perplexity": reader.perplexity})
    return points


def skipped_bytes(path: Path, engine: str, threads: int | None, ids: np.ndarray) -> dict[str, Any] | str:
    """What the engine that runs the file read of its event weights, a token at a time; or why it skips nothing."""
    try:
        running = open_engine(path, engine, threads)
    except EngineUnavailable as error:
        return str(error)
    traffic = getattr(running, "traffic", None)
    if traffic is None:
        return "this engine reads all weights of every token"
    state = running.new_state()
    for token in ids:
        running.forward([int(token)], state)       # with logits: without any, the last FFN is left out
    if not traffic.dense:
        return "no weights in an event layout, or no native kernels here: all weights of every token are read"
    return {"tokens": len(ids), "read_bytes_per_token": traffic.fetched / len(ids),
            "stored_bytes_per_token": traffic.dense / len(ids), "skipped": 1 - traffic.fetched / traffic.dense}


# --- summing up --------------------------------------------------------------------------------------
def figures(histogram: CountHistogram) -> dict[str, Any]:
    return {"counts": histogram.total, **{name: getattr(histogram, name) for name in FIGURES},
            "largest": histogram.largest}


def summarize(recording: Recording) -> dict[str, Any]:
    """All figures of a run, by layer and kind, by kind, and in all."""
    config = recording.config
    by_kind = {kind: histogram for kind in KINDS if (histogram := recording.kind(kind))}
    macs = recording.weighted(lambda _: 1.0)
    additions = recording.weighted(lambda histogram: histogram.spikes)
    estimate = energy(macs, additions)
    return {
        "total": figures(recording.all()), "silent_weights": recording.silent_weights, "published": PUBLISHED,
        "kinds": {kind: figures(histogram) for kind, histogram in by_kind.items()},
        "layers": [{"layer": layer, "mixer": "window" if config.is_window_layer(layer) else "gla", "kind": kind,
                    "channels": widths(config)[kind], "outputs": fan_outs(config, layer)[kind], **figures(histogram)}
                   for (layer, kind), histogram in sorted(recording.inputs.items(), key=_in_order)],
        "energy": {"macs_per_token": macs, "additions_per_token": additions, "fp16_pj": estimate.fp16,
                   "int8_pj": estimate.int8, "spikes_pj": estimate.spikes,
                   "saved_from_fp16": estimate.saved_from_fp16, "saved_from_int8": estimate.saved_from_int8}}


def _in_order(item: tuple[tuple[int, str], CountHistogram]) -> tuple[int, int]:
    (layer, kind), _ = item
    return layer, list(KINDS).index(kind)
