"""A checkpoint becomes an ONNX folder: model.onnx with its data, config.json, tokenizer files, genai_config.json."""
from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

import onnx

from sbedge import __version__
from sbedge.checkpoint import Checkpoint
from sbedge.errors import ExportError
from sbedge.export.calibrated import Calibrated
from sbedge.export.spikes import Spikes, exported_config

from .genai import genai_config
from .graph import Graph
from .layers import Progress, Recipe
from .ops import MAX_COUNT, MAX_DIGITS_COUNT, largest_count
from .weights import DataFile

FORMS = ("f32", "int8", "int4", "w8-spike", "w4-spike")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model",
                   "special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template.jinja")


def write_onnx(checkpoint: Checkpoint, folder: str | Path, *, quant: str = "int4", embedding_quant: str | None = None,
               spikes: Spikes | None = None, progress: Progress | None = None, force: bool = False,
               dry: bool = False) -> int:
    """Export `checkpoint` to `folder`, tensor by tensor; the folder appears complete or not at all. Returns its bytes.

    quant            one of FORMS: how linear layers are stored (W8ASpike: "f32" or "w8-spike", both exact; "int8" is
                     another name of the latter there)
    embedding_quant  "f32", "int8" or "int4" for embeddings and lm_head; default "int8", or "f32" when quant is exact
    spikes           how activations spike where quant ends in -spike (see Spikes)
    progress         called with (bytes done, bytes in all, tensor name), bytes of the source
    force            replace `folder` if it exists
    dry              no folder appears: the bytes it would have are counted

    Raises ExportError for a bad option, an existing folder, or a disk that fails or is full.
    """
    folder = Path(folder)
    recipe = checked_recipe(checkpoint, quant, embedding_quant, spikes)
    check_replaceable(folder, force)
    # Named before it is made: whenever we are stopped, we know what to remove.
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        temporary.mkdir(mode=0o700)
        write_model(checkpoint, temporary, recipe, progress, dry)
        write_sidecars(checkpoint, temporary, recipe)
        size = sum(file.stat().st_size for file in temporary.iterdir())
        if not dry:
            publish(temporary, folder)
        return size
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written ({error.strerror or error}); nothing was left behind") from None
    finally:        # also after an interrupt
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(folder: Path, force: bool) -> None:
    """An existing folder may be replaced with `force`, but only by what it is: an ONNX folder."""
    if not os.path.lexists(folder):
        return
    if not force:
        raise ExportError(f"{folder}: already exists; choose another name or pass --force to replace it")
    if not (folder / "model.onnx").is_file():
        raise ExportError(f"{folder}: is not an ONNX folder, so --force does not replace it; choose another name")


def checked_recipe(checkpoint: Checkpoint, quant: str, embedding_quant: str | None, spikes: Spikes | None) -> Recipe:
    # W8ASpike as published is exact all through; 8 bit in the embeddings alone would spoil that.
    embedding_quant = embedding_quant or ("f32" if quant == "f32" or checkpoint.is_w8aspike else "int8")
    dense = [form for form in FORMS if not form.endswith("-spike")]
    for name, form, forms in (("quant", quant, FORMS), ("embedding_quant", embedding_quant, dense)):
        if form not in forms:
            raise ExportError(f"{name} is {form!r}, expected one of {', '.join(forms)}")
    if checkpoint.is_w8aspike and quant == "int4":
        raise ExportError(f"{checkpoint.folder}: a W8ASpike checkpoint has 8-bit weights, which int4 would lose; "
                          "use --quant int8 or f32, both exact")
    config = exported_config(checkpoint, quant, spikes)
    D, k = config.hidden_size, config.spike_k
    if quant == "int8" and k * D > MAX_COUNT:       # the count of a channel that holds all the activity
        raise ExportError(f"{checkpoint.folder}: hidden size {D} allows spike counts beyond {MAX_COUNT}, "
                          "which an int8 export cannot sum exactly; use --quant f32")
    if quant.endswith("-spike") and largest_count(config) > MAX_DIGITS_COUNT:
        raise ExportError(f"spike k {k:g} allows spike counts beyond {MAX_DIGITS_COUNT}, which an ONNX export cannot "
                          "sum exactly; choose a smaller --spike-k")
    return Recipe(quant, embedding_quant, config)


def write_model(checkpoint: Checkpoint, folder: Path, recipe: Recipe, progress: Progress | None, dry: bool) -> None:
    with DataFile(folder, dry) as data:
        model = Graph(checkpoint, data, recipe, progress).build()
    onnx.save(model, folder / "model.onnx")


def write_sidecars(checkpoint: Checkpoint, folder: Path, recipe: Recipe) -> None:
    published = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    quantization: dict[str, Any] = {"linear": recipe.linear, "embedding": recipe.embedding}
    if isinstance(checkpoint, Calibrated):
        quantization["calibrated"] = True
        if finer := checkpoint.finer():
            quantization["finer"] = finer
    block: dict[str, Any] = {
        "config": recipe.config.to_dict(), "source": checkpoint.fingerprint, "exporter": __version__,
        "quantization": quantization, "spike_k": recipe.config.spike_k}
    write_json(folder / "config.json", {**published, "sbedge": block})
    write_json(folder / "genai_config.json", genai_config(recipe.config))
    for name in TOKENIZER_FILES:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def publish(temporary: Path, folder: Path) -> None:
    """Rename the finished export into place; what it replaces is removed only after that."""
    temporary.chmod(0o755)      # private until now
    if not os.path.lexists(folder):
        temporary.rename(folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    folder.rename(old / folder.name)
    try:
        temporary.rename(folder)
    except BaseException:
        (old / folder.name).rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
