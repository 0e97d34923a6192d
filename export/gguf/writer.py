"""Checkpoint -> one GGUF file, streamed: a few blocks of rows are in memory at a time."""
from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

import sbedge
from sbedge.checkpoint import EMBEDDINGS, Checkpoint
from sbedge.config import ModelConfig
from sbedge.errors import ExportError, SbedgeError
from sbedge.export.calibrated import Calibrated, quant_of
from sbedge.export.spikes import Spikes, event_layout, exported_config
from sbedge.gguf_format import ARCHITECTURE, config_metadata, gguf_name, row_bytes
from sbedge.quant.ggml_blocks import block_rows
from sbedge.quant.ggml_library import load_ggml, quantize_rows

from .tensors import QUANTS, Tensor, event_tensors, stored_type

ALIGNMENT = 64              # rows of event layouts start on cache lines
BLOCK_BYTES = 1 << 24       # float32 bytes quantized at a time
THREADS = 2

FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q4_k": 14, "q6_k": 18}     # llama.cpp's LLAMA_FTYPE

Progress = Callable[[int, int, str], None]


def write_gguf(checkpoint: Checkpoint, path: Path, *, quant: str, embedding_quant: str | None = None,
               spikes: Spikes | None = None, tokenizer_metadata: dict[str, Any] | None = None,
               progress: Progress | None = None, force: bool = False, dry: bool = False) -> int:
    """Write `checkpoint` to `path` in one of QUANTS; embeddings and lm_head have their own. Returns the file's bytes.

    `spikes` says how activations spike where `quant` ends in -spike (see Spikes). The file appears whole or not at
    all. `progress(done_bytes, total_bytes, tensor_name)` is called after each block. With `dry` no file appears: the
    bytes it would have are counted.
    Raises ExportError (bad option, existing path, full disk).
    """
    path = Path(path)
    embedding_quant = embedding_quant or default_embedding_quant(checkpoint, quant)
    _check_options(checkpoint, quant, embedding_quant)
    if path.exists() and not force:
        raise ExportError(f"{path}: exists already; choose another name or pass --force")
    if path.is_dir():
        raise ExportError(f"{path}: is a folder; a GGUF export is one file")
    config = exported_config(checkpoint, quant, spikes)
    tensors = [t for name in checkpoint.names() if not name.endswith(".scales")
               for t in _plan(checkpoint, name, quant, embedding_quant)]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write_header(temporary, checkpoint, config, quant, recipe_of(checkpoint, quant, embedding_quant),
                      tokenizer_metadata or {}, tensors)
        size = aligned(temporary.stat().st_size) + sum(aligned(tensor.nbytes) for tensor in tensors)
        if not dry:
            _write_data(temporary, checkpoint, tensors, progress)
            os.replace(temporary, path)
        return size
    except OSError as error:
        raise ExportError(f"{path}: cannot be written ({error.strerror or error}); "
                          "nothing was left behind") from None
    finally:
        temporary.unlink(missing_ok=True)


def default_embedding_quant(checkpoint: Checkpoint, quant: str) -> str:
    """8 bit, except where the linears are kept exact too."""
    if quant == "w8-spike" and checkpoint.is_w8aspike:
        return "f32"
    return quant if quant in ("f32", "f16") else "q8_0"


def recipe_of(checkpoint: Checkpoint, quant: str, embedding_quant: str) -> str:
    """What the file says of how it was made."""
    if not isinstance(checkpoint, Calibrated):
        return f"{quant}, embeddings {embedding_quant}"
    parts = [quant, checkpoint.finer(), f"embeddings {embedding_quant}", "calibrated"]
    return ", ".join(filter(None, parts))


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _check_options(checkpoint: Checkpoint, quant: str, embedding_quant: str) -> None:
    dense = [name for name in QUANTS if not name.endswith("-spike")]
    for option, value, allowed in (("quant", quant, list(QUANTS)), ("embedding quant", embedding_quant, dense)):
        if value not in allowed:
            raise ExportError(f"{option} {value!r} is not known for GGUF, expected one of {', '.join(allowed)}")
        if value.endswith("_k"):
            load_ggml()     # only ggml itself can make k-quants: say so before anything is written


# --- what goes into the file -----------------------------------------------------------------------
def _plan(checkpoint: Checkpoint, name: str, quant: str, embedding_quant: str) -> list[Tensor]:
    shape, quant = checkpoint.shapes[name], quant_of(checkpoint, name, quant)
    if layout := event_layout(checkpoint, name, quant):
        return event_tensors(checkpoint, name, layout)
    kind = _type_of(name, shape, embedding_quant if name in EMBEDDINGS else quant)
    rows = shape[0] if len(shape) == 1 else max(1, BLOCK_BYTES // (4 * shape[1]))

    def block(start: int, stop: int) -> np.ndarray:
        if isinstance(checkpoint, Calibrated) and (levels := checkpoint.levels(name, start, stop)):
            return block_rows(levels, kind)
        return quantize_rows(np.atleast_2d(checkpoint.weight(name, start, stop)), kind)

    def blocks() -> Iterator[Callable[[], np.ndarray]]:
        for start in range(0, shape[0], rows):
            yield partial(block, start, min(start + rows, shape[0]))

    return [Tensor(gguf_name(name), shape, kind, blocks)]


def _type_of(name: str, shape: tuple[int, ...], quant: str) -> str:
    # Vectors are small and the low-rank gate decides how long the model remembers: both stay exact.
    if len(shape) == 1 or ".gk_proj." in name or quant.endswith("-spike"):
        return "F32"
    return stored_type(quant, shape[1])


# --- writing ---------------------------------------------------------------------------------------
def _write_header(path: Path, checkpoint: Checkpoint, config: ModelConfig, quant: str, recipe: str,
                  tokenizer: dict[str, Any], tensors: list[Tensor]) -> None:
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_custom_alignment(ALIGNMENT)
    metadata = {"general.name": checkpoint.folder.resolve().name, "general.quantization_version": 2,
                **({"general.file_type": FILE_TYPES[quant]} if quant in FILE_TYPES else {}),
                **config_metadata(config),
                f"{ARCHITECTURE}.source.fingerprint": checkpoint.fingerprint,
                f"{ARCHITECTURE}.source.recipe": recipe,
                f"{ARCHITECTURE}.source.exporter": f"sbedge {sbedge.__version__}", **tokenizer}
    for key, value in metadata.items():
        _add(writer, key, value)
    for tensor in tensors:
        # The writer takes the shape in bytes where it is told that the data are bytes.
        shape = (*tensor.shape[:-1], row_bytes(tensor.type, tensor.shape[-1]))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.nbytes,
                               gguf.GGMLQuantizationType[tensor.type])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float64(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _write_data(path: Path, checkpoint: Checkpoint, tensors: list[Tensor], progress: Progress | None) -> None:
    total, done = sum(t.nbytes for t in tensors), 0
    with path.open("ab") as file, ThreadPoolExecutor(THREADS) as workers:
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        for tensor in tensors:
            written = 0
            for block in _in_order(workers, tensor.blocks()):
                file.write(block.data)
                written += block.nbytes
                if progress:
                    progress(done + written, total, tensor.name)
            if written != tensor.nbytes:
                raise SbedgeError(f"{tensor.name}: {written} bytes made, {tensor.nbytes} announced")
            done += written
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            checkpoint.release()
        file.flush()
        os.fsync(file.fileno())


def _in_order(workers: ThreadPoolExecutor, jobs: Iterator[Callable[[], np.ndarray]]) -> Iterator[np.ndarray]:
    """Results of `jobs` in order, at most a few of them ahead: keeps the workers busy and memory small."""
    ahead: deque[Future[np.ndarray]] = deque()
    for job in jobs:
        ahead.append(workers.submit(job))
        if len(ahead) > THREADS:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()
