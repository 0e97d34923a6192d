"""From a checkpoint to one file that runs: GGUF for the ggml engine, a folder for ONNX Runtime."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sbedge.checkpoint import Checkpoint
from sbedge.errors import ExportError
from sbedge.runtime.load import open_tokenizer

from .calibration import Calibration, calibrated
from .choices import summary_of
from .spikes import Spikes

Progress = Callable[[int, int, str], None]      # (bytes done, bytes in total, tensor name)

QUANTS = {"gguf": ("f32", "f16", "q8_0", "q4_0", "q4_k", "q6_k", "w8-spike", "w4-spike"),
          "onnx": ("f32", "int8", "int4", "w8-spike", "w4-spike")}
DEFAULT_QUANT = {"gguf": "q8_0", "onnx": "int8"}
LOSSLESS_SPIKING = {"gguf": "w8-spike", "onnx": "int8"}     # a W8ASpike checkpoint's own int8 codes, all of them


def export_model(checkpoint: Checkpoint | str | Path, out: str | Path, *, format: str | None = None,
                 quant: str | None = None, embedding_quant: str | None = None, spikes: Spikes | None = None,
                 calibration: Calibration | None = None, force: bool = False,
                 progress: Progress | None = None) -> dict[str, Any] | None:
    """Export `checkpoint` to `out`: a .gguf file, or for ONNX a folder. Tokenizer and chat template go along.
    Returns what a calibration chose (see choices.summary_of).

    format            "gguf" or "onnx"; None: by the suffix of `out`
    quant             one of QUANTS[format]; None: 8 bit, lossless for a W8ASpike checkpoint
    embedding_quant   for embeddings and lm_head, no spiking one; None: 8 bit, or as exact as `quant` where that is
                      lossless
    spikes            how activations spike, for quants "w8-spike" and "w4-spike"; None: as the checkpoint was
                      trained to, else k = 3 and no dead zone, or what the calibration chooses
    calibration       a text to round the weights by, and limits to choose within; None: to the nearest
    force             replace an existing `out`

    `out` appears whole or not at all. Raises CheckpointError, TokenizerError (damaged, or not of this model),
    ExportError (bad options, existing output, full disk) and EngineUnavailable (k-quants need ggml's libraries).
    """
    out = Path(out)
    format = format or format_of(out)
    if format not in QUANTS:
        raise ExportError(f"format is {format!r}, expected one of {', '.join(QUANTS)}")
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    quant = quant or default_quant(checkpoint, format)
    check_quant(format, quant)
    check_output(checkpoint, out, force)
    if calibration:
        embedding_quant = embedding_quant or DEFAULT_QUANT[format]
    write = _writer(checkpoint, out, format, quant, embedding_quant, spikes, force, progress)
    if not calibration:
        write(checkpoint)
        return None
    assert embedding_quant is not None
    calibration.limits.check(checkpoint, quant)
    try:
        write(checkpoint, dry=True, progress=None)      # what will be refused is refused before the work
        with TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.calibration.") as work:
            made = calibrated(checkpoint, quant, calibration, spikes, Path(work), embedding_quant,
                              partial(write, dry=True, progress=None), progress)
            write(made)
            return summary_of(made, quant)
    except OSError as error:
        raise ExportError(f"{out}: cannot be written ({error.strerror or error}); nothing was left behind") from None


def _writer(checkpoint: Checkpoint, out: Path, format: str, quant: str, embedding_quant: str | None,
            spikes: Spikes | None, force: bool, progress: Progress | None) -> Callable[..., int]:
    """What writes a checkpoint, this one or what calibration makes of it, to `out`, and tells the bytes."""
    tokenizer = open_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)
    if format == "onnx":
        from .onnx import write_onnx
        return partial(write_onnx, folder=out, quant=quant, embedding_quant=embedding_quant, spikes=spikes, force=force,
                       progress=progress)
    from .gguf.writer import write_gguf
    metadata = tokenizer.to_gguf_metadata(checkpoint.config.vocab_size) if tokenizer else None
    return partial(write_gguf, path=out, quant=quant, embedding_quant=embedding_quant, spikes=spikes,
                   tokenizer_metadata=metadata, force=force, progress=progress)


def format_of(out: Path) -> str:
    """The format that an output name implies."""
    if out.suffix == ".gguf":
        return "gguf"
    if not out.suffix or out.suffix == ".onnx" or out.is_dir():
        return "onnx"
    raise ExportError(f"{out}: which format is this? name a .gguf file or a folder, or give --format")


def default_quant(checkpoint: Checkpoint, format: str) -> str:
    return (LOSSLESS_SPIKING if checkpoint.is_w8aspike else DEFAULT_QUANT)[format]


def check_quant(format: str, quant: str) -> None:
    if quant not in QUANTS[format]:
        others = [name for name, quants in QUANTS.items() if quant in quants]
        hint = f" ({quant} exists for {others[0]})" if others else ""
        raise ExportError(f"quant {quant!r} is not known for {format}, expected one of "
                          f"{', '.join(QUANTS[format])}{hint}")


def check_output(checkpoint: Checkpoint, out: Path, force: bool) -> None:
    """Refuse an output that exists; with `force` only what is not an earlier export."""
    if not out.absolute().parent.is_dir():
        raise ExportError(f"{out.absolute().parent}: no such folder to write {out.name} in")
    if not out.exists():
        return
    if not force:
        raise ExportError(f"{out}: exists already; choose another name or use --force")
    if checkpoint.folder.resolve().is_relative_to(out.resolve()):
        raise ExportError(f"{out}: the checkpoint itself is there; choose another name")
    if out.is_dir() and any(out.iterdir()) and not (out / "model.onnx").is_file():
        raise ExportError(f"{out}: this folder holds something else than an ONNX export and is not replaced; "
                          "choose another name")
