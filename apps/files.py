"""Output files that appear whole or not at all."""
from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sbedge.errors import ExportError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, else disappears.

    Raises ExportError if `path` exists or the disk refuses a write.
    """
    if path.exists() or path.is_symlink():
        raise ExportError(f"{path}: exists already; choose another name or remove it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    except OSError as error:
        raise ExportError(f"{path}: cannot write the checkpoint ({error.strerror or error}); "
                          "free some space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well, and vanishes otherwise.

    Raises ExportError if `path` exists (without `force`) or its folder does not.
    """
    if path.is_dir():
        raise ExportError(f"{path}: this is a folder, expected the name of a file to write")
    if path.exists() and not force:
        raise ExportError(f"{path}: exists already; choose another name or use --force")
    if not path.parent.is_dir():
        raise ExportError(f"{path.parent}: no such folder to write {path.name} in")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise ExportError(f"{path}: cannot be written ({error.strerror})") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())      # mkstemp makes files only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary)) or isinstance(error, BrokenPipeError):
            raise       # trouble with another file, such as one the block reads, or the standard output
        raise ExportError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def safetensors_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Header of a safetensors file whose data are the tensors (name, "F32" | "BF16", shape) in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * {"F32": 4, "BF16": 2}[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned for memory mapping
    return len(text).to_bytes(8, "little") + text
