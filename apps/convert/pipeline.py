"""The whole conversion: from a source to a checkpoint, in stages that each leave a file, so that it can be resumed."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbedge.apps.files import new_file
from sbedge.checkpoint import SPIKES_FILE, Checkpoint
from sbedge.config import INPUT_KINDS
from sbedge.errors import InputError, SbedgeError
from sbedge.export import export_model
from sbedge.export.calibrated import write_npy
from sbedge.export.choices import silent_zones
from sbedge.quant.ggml_library import ggml_available
from sbedge.runtime.engine import Engine
from sbedge.runtime.load import open_engine
from sbedge.runtime.tokenizer import Tokenizer

from . import stages
from .delta import Delta, apply_delta, check_source, load_delta, save_delta
from .fitting import Plan, Report
from .sampling import Writer
from .source import write_window_checkpoint
from .torch_model import GlaMixer, Hybrid

TRIAL_SHARE, TRANSFER_SHARE = 0.1, 0.1    # of the training tokens: all layers before ranking, the chosen ones after
TRANSFER_RATE, TUNE_RATE, SPIKE_RATE = 1e-3, 7e-4, 4e-4
RANK_ROWS = 2                               # rows that layers are ranked by
# of what the models write themselves: a chat keeps to what is likely, and there the hybrid falls into loops
SOURCE_TEMPERATURE, HYBRID_TEMPERATURE = (0.2, 1.0), (0.0, 0.8)
SHARE_ASKED = 0.5                           # of the chats whose question they think up, too
SPIKE_K = 8.0                               # fine counts: what is silent is decided by dead zones


@dataclass(frozen=True)
class Settings:
    """What a conversion is asked for; token counts are training tokens, `own` is how many the models write themselves.

    spike  share of the weights that shall be silent when it spikes; None: it is not trained to spike
    """

    gla_layers: int | None
    window: int | None = None
    tokens: int = 1_000_000
    own: int = 300_000
    seed: int = 0
    rank: int = 8
    length: int = 512
    batch: int = 4          # rows a step
    spike: float | None = None
    spike_tokens: int = 500_000

    def steps(self, tokens: float) -> int:
        return max(2, round(tokens / (self.length * self.batch)))


def convert(source: Path, out: Path, settings: Settings, texts: Sequence[str] = (), *, start: Path | None = None,
            resume: bool = False, delta_file: Path | None = None, report: Report | None = None) -> None:
    """Convert `source` to the checkpoint folder `out`. Work under way is in a folder beside it, `out`.work.

    With `start`, a delta of an earlier conversion of this source, training goes on from there.
    The same arguments give the same checkpoint (on one machine, with as many threads); so does a run that was
    interrupted and resumed. Raises InputError for settings that do not fit the source, and what reading it raises.
    """
    work = out.with_name(f"{out.name}.work")
    begun = work.exists()
    _begin(work, source, settings, texts, start, delta_file, resume)
    try:
        checkpoint = _source(work, source, settings, report)
        delta = _start(start, checkpoint, settings) if start else None
        rows = _text(work, delta, settings, texts, report)
    except SbedgeError:
        if not begun:       # nothing is in there that one would go on with
            shutil.rmtree(work)
        raise
    tokens: float = settings.tokens
    if delta is None:
        delta = _transferred(work, checkpoint, settings, rows, report)
        tokens *= 1 - TRIAL_SHARE - TRANSFER_SHARE
    delta = _tuned(work, checkpoint, settings, rows, delta, tokens, report)
    if delta_file:
        save_delta(delta, delta_file, force=True)
    apply_delta(work / "source", delta, out, progress=report, extra={"conversion.csv": (work / "log.csv").read_bytes()})
    shutil.rmtree(work)


def _begin(work: Path, source: Path, settings: Settings, texts: Sequence[str], start: Path | None,
           delta_file: Path | None, resume: bool) -> None:
    asked = {"source": str(source.resolve()), **asdict(settings), "text": [len(text) for text in texts],
             "start": str(start.resolve()) if start else None,
             "delta": str(delta_file.resolve()) if delta_file else None}
    file = work / "settings.json"
    if work.exists() and not resume:
        raise InputError(f"{work}: exists already; --resume goes on with it, or remove it")
    if resume and not file.exists():
        raise InputError(f"{work}: no conversion to resume there; leave --resume out")
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        for key, value in asked.items():
            if kept.get(key) != value:
                raise InputError(f"{file}: the conversion was begun with {key} {kept.get(key)!r}, found {value!r}; "
                                 "resume with the same options")
    else:
        work.mkdir(parents=True)
        with new_file(file) as temporary:
            temporary.write_text(json.dumps(asked, indent=2), encoding="utf-8")


# ---- the stages ------------------------------------------------------------------------------------------

def _source(work: Path, source: Path, settings: Settings, report: Report | None) -> Checkpoint:
    """The source with sliding-window layers only."""
    if not (work / "source").exists():
        write_window_checkpoint(source, work / "source", window=settings.window, progress=report)
    checkpoint = Checkpoint(work / "source")
    count = checkpoint.config.num_hidden_layers
    if settings.gla_layers is not None and settings.gla_layers > count:
        raise InputError(f"--gla-layers is {settings.gla_layers}, but {source} has {count} layers in all")
    return checkpoint


def _start(path: Path, checkpoint: Checkpoint, settings: Settings) -> Delta:
    """The delta to go on from."""
    delta = load_delta(path)
    check_source(delta, checkpoint, str(path))
    count = len(delta.converted(checkpoint.config))
    if settings.gla_layers not in (None, count):
        raise InputError(f"--gla-layers is {settings.gla_layers}, but {path} has {count}; leave the option out")
    if delta.rank > settings.rank:
        raise InputError(f"--rank is {settings.rank}, but the corrections to go on from have {delta.rank}")
    return delta


def _text(work: Path, delta: Delta | None, settings: Settings, texts: Sequence[str],
          report: Report | None) -> np.ndarray:
    """Training rows [N, length]: `texts`, and what the source writes itself (with `delta` half of it its hybrid)."""
    file = work / "rows.npy"
    if not file.exists():
        tokenizer = Tokenizer.from_folder(work / "source")
        rows = _own_text(work, delta, settings, tokenizer, report) if settings.own else []
        rows += [row for text in texts for row in pack([tokenizer.encode(text)], settings.length, cut=False)]
        if len(rows) < RANK_ROWS:
            raise InputError(f"there are {len(rows)} training rows of {settings.length} tokens, expected at least "
                             f"{RANK_ROWS}; give more --text or --own-tokens")
        order = np.random.default_rng(settings.seed).permutation(len(rows))
        with new_file(file) as temporary:
            write_npy(temporary, np.array(rows, np.int64)[order])
    return np.load(file)


def _own_text(work: Path, delta: Delta | None, settings: Settings, tokenizer: Tokenizer,
              report: Report | None) -> list[list[int]]:
    """Rows that the source writes, or half of them the source and half its hybrid."""
    writers = {"write text": (work / "source", SOURCE_TEMPERATURE)}
    if delta:
        writers["write text as the hybrid does"] = _made(work / "start", delta, report), HYBRID_TEMPERATURE
    rows: list[list[int]] = []
    for n, (stage, (checkpoint, temperature)) in enumerate(writers.items()):
        writer = Writer(_engine(checkpoint), tokenizer, settings.seed + n, settings.length, temperature=temperature,
                        share_asked=SHARE_ASKED)
        progress = partial(report, stage) if report else None
        rows += pack((ids for _, ids in writer.write(settings.own // len(writers), progress)), settings.length)
    return rows


def _made(folder: Path, delta: Delta, report: Report | None) -> Path:
    """The checkpoint that `delta` makes of the source beside `folder`, not spiking, in `folder`."""
    if not folder.exists():
        apply_delta(folder.with_name("source"), replace(delta, spikes=None), folder, progress=report)
    return folder


def pack(documents: Iterable[Sequence[int]], length: int, *, cut: bool = True) -> list[list[int]]:
    """Rows of `length` ids; with `cut` every row begins where a document does, and what is over is dropped."""
    rows, row = [], list[int]()
    for ids in documents:
        row += ids
        while len(row) >= length:
            rows.append(row[:length])
            row = [] if cut else row[length:]
    return rows


def _engine(checkpoint: Path) -> Engine:
    """The fastest engine that can run a checkpoint here; what it runs is kept beside it."""
    model = checkpoint.with_name(f"{checkpoint.name}.gguf" if ggml_available() else f"{checkpoint.name}-onnx")
    if not model.exists():
        export_model(checkpoint, model, format="gguf" if model.suffix else "onnx")
    return open_engine(model)


def _transferred(work: Path, checkpoint: Checkpoint, settings: Settings, rows: np.ndarray,
                 report: Report | None) -> Delta:
    """The layers to convert, and their mixers after transfer."""
    assert settings.gla_layers is not None
    model = Hybrid(checkpoint.config, checkpoint.weight)
    mixers = {i: stages.new_gla(model, i, checkpoint.weight, settings.seed) for i in range(len(model.layers))}
    if not (work / "trial.pt").exists():
        stages.solve_outputs(model, mixers, rows[:4 * settings.batch], settings.batch)
    trial = Plan("trial", settings.steps(TRIAL_SHARE * settings.tokens), settings.batch, TRANSFER_RATE, settings.seed)
    stages.transfer(model, mixers, rows, trial, work, report)
    ranking = work / "ranking.json"
    if not ranking.exists():
        chosen = stages.rank(model, mixers, rows[-RANK_ROWS:], settings.gla_layers, report=report)
        with new_file(ranking) as temporary:
            temporary.write_text(json.dumps(chosen), encoding="utf-8")
    chosen = json.loads(ranking.read_text(encoding="utf-8"))
    mixers = {i: mixers[i] for i in chosen}
    plan = Plan("transfer", settings.steps(TRANSFER_SHARE * settings.tokens), settings.batch, TRANSFER_RATE,
                settings.seed + 1)
    stages.transfer(model, mixers, rows, plan, work, report)
    model.replace(mixers)
    return delta_of(model, checkpoint)


def _tuned(work: Path, checkpoint: Checkpoint, settings: Settings, rows: np.ndarray, delta: Delta, tokens: float,
           report: Report | None) -> Delta:
    """The hybrid trained as a whole on so many tokens and, if asked, to spike."""
    first = delta.lowest if tokens else 0
    tune = Plan("tune", settings.steps(tokens), settings.batch, TUNE_RATE, settings.seed + 2)
    spike = Plan("spike", settings.steps(settings.spike_tokens), settings.batch, SPIKE_RATE, settings.seed + 3)
    steps = max(tune.steps if tokens else 0, 0 if settings.spike is None else spike.steps)
    source, needed = Hybrid(checkpoint.config, checkpoint.weight), rows[:steps * settings.batch]
    answers = stages.ask_source(source, needed, first, work, settings.batch, report)
    del source
    if tokens:
        model = hybrid_of(checkpoint, delta, settings, first)
        stages.tune(model, answers, first, tune, work, report)
        delta = delta_of(model, checkpoint)
    if settings.spike is not None:
        spikes = _spikes(work, settings, rows, delta, report)
        model = hybrid_of(checkpoint, delta, settings, 0)
        stages.make_spike(model, Checkpoint(work / "tuned"), spikes, settings.batch)
        stages.tune(model, answers, 0, spike, work, report)
        delta = replace(delta_of(model, checkpoint), spikes=spikes)
    return delta


def _spikes(work: Path, settings: Settings, rows: np.ndarray, delta: Delta, report: Report | None) -> dict[str, Any]:
    """How the model that `delta` makes (kept as `work`/tuned) shall spike: silent where that costs least."""
    assert settings.spike is not None
    tuned = Checkpoint(_made(work / "tuned", delta, report))
    file = work / SPIKES_FILE
    if not file.exists():
        zones = (0.0,) * (tuned.config.num_hidden_layers * len(INPUT_KINDS))
        if settings.spike:
            progress = (lambda done, total, _: report("try silence", done, total)) if report else None
            zones = silent_zones(tuned, rows, settings.spike, SPIKE_K, progress)
        with new_file(file) as temporary:
            temporary.write_text(json.dumps({"spike_k": SPIKE_K, "input_dead_zone": zones}), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


# ---- the model and its delta -----------------------------------------------------------------------------

def hybrid_of(checkpoint: Checkpoint, delta: Delta, settings: Settings, first: int) -> Hybrid:
    """What `delta` makes of the source, to be trained on, with corrections from layer `first`."""
    torch.manual_seed(settings.seed)        # corrections begin at random
    model = Hybrid(checkpoint.config, checkpoint.weight, rank=settings.rank, first=first)
    model.replace({i: GlaMixer(checkpoint.config) for i in delta.converted(checkpoint.config)})
    with torch.no_grad():
        for name, parameter in model.trained():
            values = delta.tensors.get(delta_name(name))
            if values is None:
                continue
            if name.endswith(".B"):
                parameter[:, :len(values)] = torch.from_numpy(values.T)
            else:
                parameter[:len(values)] = torch.from_numpy(values)
    return model


def delta_of(model: Hybrid, checkpoint: Checkpoint) -> Delta:
    """What `model` has learned."""
    tensors = {}
    for name, parameter in model.trained():
        values = parameter.detach().float().numpy()
        tensors[delta_name(name)] = np.array(values.T if name.endswith(".B") else values, order="C")
    kept = tuple(i for i, layer in enumerate(model.layers) if layer.gla is None)
    return Delta(checkpoint.fingerprint, kept, tensors)


def delta_name(parameter: str) -> str:
    """'layers.5.window.qkv.A' -> 'model.layers.5.attn.qkv.A'"""
    _, layer, part, rest = parameter.split(".", 3)
    return f"model.layers.{layer}." + (f"attn.{rest}" if part in ("gla", "window") else f"mlp.{part}.{rest}")
