"""The whole conversion: from a source to a checkpoint, in stages that each leave a file, so that it can be resumed."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from sbedge.apps.files import new_file
from sbedge.checkpoint import Checkpoint
from sbedge.errors import InputError, SbedgeError
from sbedge.export import export_model
from sbedge.quant.ggml_library import ggml_available
from sbedge.runtime.engine import Engine
from sbedge.runtime.load import open_engine
from sbedge.runtime.tokenizer import Tokenizer

from . import stages
from .delta import Delta, apply_delta, save_delta
from .fitting import Plan, Report
from .sampling import Writer
from .source import write_window_checkpoint
from .torch_model import GlaMixer, Hybrid

TRIAL_SHARE, TRANSFER_SHARE = 0.1, 0.1    # of the training tokens: all layers before ranking, the chosen ones after
TRANSFER_RATE, TUNE_RATE = 1e-3, 7e-4
RANK_ROWS = 2                               # rows that layers are ranked by


@dataclass(frozen=True)
class Settings:
    """What a conversion is asked for; token counts are training tokens, `own` is how many of them the source writes."""

    gla_layers: int
    window: int | None = None
    tokens: int = 1_000_000
    own: int = 300_000
    seed: int = 0
    rank: int = 8
    length: int = 512
    batch: int = 4          # rows a step

    def steps(self, share: float) -> int:
        return max(2, round(share * self.tokens / (self.length * self.batch)))


def convert(source: Path, out: Path, settings: Settings, texts: Sequence[str] = (), *, resume: bool = False,
            delta_file: Path | None = None, report: Report | None = None) -> None:
    """Convert `source` to the checkpoint folder `out`. Work under way is in a folder beside it, `out`.work.

    The same arguments give the same checkpoint (on one machine, with as many threads); so does a run that was
    interrupted and resumed. Raises InputError for settings that do not fit the source, and what reading it raises.
    """
    work = out.with_name(f"{out.name}.work")
    begun = work.exists()
    _begin(work, source, settings, texts, resume)
    try:
        checkpoint = _source(work, source, settings, report)
        rows = _text(work, checkpoint, settings, texts, report)
    except SbedgeError:
        if not begun:       # nothing is in there that one would go on with
            shutil.rmtree(work)
        raise
    chosen, mixers = _chosen(work, checkpoint, settings, rows, report)
    model = _tuned(work, checkpoint, settings, rows, chosen, mixers, report)
    delta = delta_of(model, checkpoint, chosen)
    if delta_file:
        save_delta(delta, delta_file, force=True)
    apply_delta(work / "source", delta, out, progress=report, extra={"conversion.csv": (work / "log.csv").read_bytes()})
    shutil.rmtree(work)


def _begin(work: Path, source: Path, settings: Settings, texts: Sequence[str], resume: bool) -> None:
    asked = {"source": str(source.resolve()), **asdict(settings), "text": [len(text) for text in texts]}
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
        file.write_text(json.dumps(asked, indent=2), encoding="utf-8")


# ---- the stages ------------------------------------------------------------------------------------------

def _source(work: Path, source: Path, settings: Settings, report: Report | None) -> Checkpoint:
    """The source with sliding-window layers only."""
    if not (work / "source").exists():
        write_window_checkpoint(source, work / "source", window=settings.window, progress=report)
    checkpoint = Checkpoint(work / "source")
    count = checkpoint.config.num_hidden_layers
    if settings.gla_layers > count:
        raise InputError(f"--gla-layers is {settings.gla_layers}, but {source} has {count} layers in all")
    return checkpoint


def _text(work: Path, checkpoint: Checkpoint, settings: Settings, texts: Sequence[str],
          report: Report | None) -> np.ndarray:
    """Training rows [N, length]: what the source writes itself, and `texts`."""
    file = work / "rows.npy"
    if not file.exists():
        tokenizer = Tokenizer.from_folder(work / "source")
        writer = Writer(_engine(work), tokenizer, settings.seed, settings.length)
        progress = (lambda done, total: report("write text", done, total)) if report else None
        documents = [ids for _, ids in writer.write(settings.own, progress)] if settings.own else []
        rows = pack(documents, settings.length)
        rows += [row for text in texts for row in pack([tokenizer.encode(text)], settings.length, cut=False)]
        if len(rows) < RANK_ROWS:
            raise InputError(f"there are {len(rows)} training rows of {settings.length} tokens, expected at least "
                             f"{RANK_ROWS}; give more --text or --own-tokens")
        order = np.random.default_rng(settings.seed).permutation(len(rows))
        with new_file(file) as temporary, temporary.open("wb") as out:
            np.save(out, np.array(rows, np.int64)[order])
    return np.load(file)


def pack(documents: Iterable[Sequence[int]], length: int, *, cut: bool = True) -> list[list[int]]:
    """Rows of `length` ids; with `cut` every row begins where a document does, and what is over is dropped."""
    rows, row = [], list[int]()
    for ids in documents:
        row += ids
        while len(row) >= length:
            rows.append(row[:length])
            row = [] if cut else row[length:]
    return rows


def _engine(work: Path) -> Engine:
    """The fastest engine that can run the source here."""
    model = work / ("source.gguf" if ggml_available() else "source-onnx")
    if not model.exists():
        export_model(work / "source", model, format="gguf" if model.suffix else "onnx")
    return open_engine(model)


def _chosen(work: Path, checkpoint: Checkpoint, settings: Settings, rows: np.ndarray,
            report: Report | None) -> tuple[list[int], dict[int, GlaMixer]]:
    """The layers to convert, best first, and their mixers after transfer."""
    model = Hybrid(checkpoint.config, checkpoint.weight)
    mixers = {i: stages.new_gla(model, i, checkpoint.weight, settings.seed) for i in range(len(model.layers))}
    if not (work / "trial.pt").exists():
        stages.solve_outputs(model, mixers, rows[:4 * settings.batch], settings.batch)
    trial = Plan("trial", settings.steps(TRIAL_SHARE), settings.batch, TRANSFER_RATE, settings.seed)
    stages.transfer(model, mixers, rows, trial, work, report)
    ranking = work / "ranking.json"
    if not ranking.exists():
        chosen = stages.rank(model, mixers, rows[-RANK_ROWS:], settings.gla_layers, report=report)
        with new_file(ranking) as temporary:
            temporary.write_text(json.dumps(chosen), encoding="utf-8")
    chosen = json.loads(ranking.read_text(encoding="utf-8"))
    mixers = {i: mixers[i] for i in chosen}
    plan = Plan("transfer", settings.steps(TRANSFER_SHARE), settings.batch, TRANSFER_RATE, settings.seed + 1)
    stages.transfer(model, mixers, rows, plan, work, report)
    return chosen, mixers


def _tuned(work: Path, checkpoint: Checkpoint, settings: Settings, rows: np.ndarray, chosen: list[int],
           mixers: dict[int, GlaMixer], report: Report | None) -> Hybrid:
    torch.manual_seed(settings.seed)        # the corrections begin at random
    first, steps = min(chosen), settings.steps(1 - TRIAL_SHARE - TRANSFER_SHARE)
    model = Hybrid(checkpoint.config, checkpoint.weight, rank=settings.rank, first=first)
    needed = rows[:steps * settings.batch]
    answers = stages.ask_source(model, needed, first, work, settings.batch, report)
    model.replace(mixers)
    plan = Plan("tune", steps, settings.batch, TUNE_RATE, settings.seed + 2)
    stages.tune(model, answers, first, plan, work, report)
    return model


# ---- the result ------------------------------------------------------------------------------------------

def delta_of(model: Hybrid, checkpoint: Checkpoint, chosen: Sequence[int]) -> Delta:
    """What `model` has learned, by the names of a delta."""
    tensors = {}
    for name, parameter in model.trained():
        values = parameter.detach().float().numpy()
        _, layer, rest = name.split(".", 2)
        part, _, rest = rest.partition(".")
        rest = f"attn.{rest}" if part in ("gla", "window") else f"mlp.{part}.{rest}"
        tensors[f"model.layers.{layer}.{rest}"] = np.ascontiguousarray(values.T if rest.endswith(".B") else values)
    kept = tuple(i for i in range(checkpoint.config.num_hidden_layers) if i not in chosen)
    return Delta(checkpoint.fingerprint, kept, tensors)
