"""From a path to an engine, a tokenizer, or a whole session: finds out what a path holds."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sbedge.errors import InputError, ModelFileError, TokenizerError

if TYPE_CHECKING:
    from sbedge.config import ModelConfig

    from .engine import Engine
    from .session import Session
    from .tokenizer import Tokenizer

Kind = Literal["gguf", "onnx", "checkpoint"]
ENGINE_OF: dict[str, str] = {"gguf": "ggml", "onnx": "onnx", "checkpoint": "reference"}
ENGINES = ("auto", *ENGINE_OF.values())
WINDOW_TYPES = ("f32", "f16")
WHAT = {"gguf": "a GGUF file", "onnx": "an ONNX folder", "checkpoint": "a checkpoint folder"}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
EXPECTED = "expected a .gguf file, a folder with model.onnx, or a checkpoint folder with safetensors"


def load(path: str | Path, engine: str = "auto", threads: int | None = None, window: str = "f32") -> Session:
    """A session on a GGUF file, an ONNX folder, or a checkpoint folder.

    engine   "auto" takes the one that runs the file: "ggml", "onnx", or, for a checkpoint folder, "reference"
             (plain NumPy: exact and slow; export the checkpoint to run it fast)
    threads  None: one for each core this process may use
    window   "f16" keeps keys and values of the sliding windows in half the memory (GGUF files, native kernels): faster
             where windows are full, and as exact as float16 is. Saved states move between both.

    Raises ModelFileError or CheckpointError if there is no sound model at `path`, EngineUnavailable if a library
    is not installed, TokenizerError if the tokenizer does not fit, InputError if an option does not. A model without
    a tokenizer loads, too: it takes token ids and no text.
    """
    from .session import Session

    running = open_engine(path, engine, threads, window)
    tokenizer = open_tokenizer(path, running.config.vocab_size)
    return Session(running, ids_only(running.config, path) if tokenizer is None else tokenizer)


def model_kind(path: str | Path, engine: str = "auto") -> Kind:
    """What `path` holds; a folder that is both an ONNX folder and a checkpoint goes by `engine`."""
    path = Path(path)
    if engine not in ENGINES:
        raise InputError(f"engine is {engine!r}, expected one of {', '.join(ENGINES)}")
    kinds = _kinds(path)
    if engine == "auto":
        return kinds[0]
    for kind in kinds:
        if ENGINE_OF[kind] == engine:
            return kind
    raise InputError(f"{path}: {WHAT[kinds[0]]} runs on engine {ENGINE_OF[kinds[0]]!r}, not on {engine!r}; leave "
                     "the engine out, or export the checkpoint for that engine")


def open_engine(path: str | Path, engine: str = "auto", threads: int | None = None, window: str = "f32") -> Engine:
    """The engine alone, for token ids; arguments and errors as `load`."""
    kind = model_kind(path, engine)
    if threads is not None and not 1 <= threads <= 1024:
        raise InputError(f"threads is {threads}, expected a whole number from 1 to 1024")
    if window not in WINDOW_TYPES:
        raise InputError(f"window is {window!r}, expected one of {', '.join(WINDOW_TYPES)}")
    if kind == "gguf":
        from .ggml_engine import GgmlEngine
        return GgmlEngine(path, threads=threads, half_window=window == "f16")
    if window != "f32":
        raise InputError(f"{path}: {WHAT[kind]} keeps its windows in float32, found window {window!r}; leave that out "
                         "or export a GGUF file")
    if kind == "onnx":
        from .onnx_engine import OnnxEngine
        return OnnxEngine(path, threads=threads)
    from sbedge.reference import Reference
    return Reference(path)


def open_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer | None:
    """The tokenizer that comes with a model, or in a folder of tokenizer files; None if there is none.

    Raises TokenizerError if it is damaged, or has ids beyond the model's `vocab_size`.
    """
    path = Path(path)
    try:
        tokenizer = _read_tokenizer(path)
        if tokenizer and vocab_size is not None:
            tokenizer.check_vocabulary(vocab_size)
    except TokenizerError as error:
        message = str(error)
        raise TokenizerError(message if str(path) in message else f"{path}: {message}") from None
    return tokenizer


def ids_only(config: ModelConfig, path: str | Path) -> Tokenizer:
    """Stands in for the tokenizer that the model at `path` lacks: prompts are token ids, replies have no text."""
    from .tokenizer import Tokenizer

    return Tokenizer(NoVocabulary(path), eos_ids=frozenset(config.eos_token_id))


class NoVocabulary:
    """A vocabulary without a single token."""

    size = 0
    space_prefix = False

    def __init__(self, path: str | Path):
        self.path = path
        self.special: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        raise TokenizerError(f"{self.path}: this model carries no tokenizer, so it takes token ids and no text; put "
                             "the tokenizer files into the checkpoint folder and export it again")

    def token_id(self, token: str) -> int | None:
        return None

    def token_bytes(self, id: int) -> bytes:
        return b""

    def to_gguf(self, size: int) -> dict[str, Any]:
        return {}

    def save(self, folder: Path) -> None:
        """There is nothing to write."""


def _read_tokenizer(path: Path) -> Tokenizer | None:
    if path.is_dir():
        if not any((path / name).is_file() for name in TOKENIZER_FILES):
            return None
        from .tokenizer import Tokenizer
        return Tokenizer.from_folder(path)
    if model_kind(path) == "gguf":
        from sbedge.gguf_reader import read_gguf

        from .tokenizer import Tokenizer
        metadata = read_gguf(path).metadata
        return Tokenizer.from_gguf(metadata) if "tokenizer.ggml.model" in metadata else None
    return None


def _kinds(path: Path) -> list[Kind]:
    if not path.exists():
        raise ModelFileError(f"{path}: no such file or folder; {EXPECTED}")
    if path.is_dir():
        kinds: list[Kind] = []
        if (path / "model.onnx").is_file():
            kinds.append("onnx")
        if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file():
            kinds.append("checkpoint")
        if not kinds:
            raise ModelFileError(f"{path}: this folder holds neither model.onnx nor model.safetensors; {EXPECTED}")
        return kinds
    if path.suffix == ".gguf" or _first_bytes(path) == b"GGUF":
        return ["gguf"]
    if path.suffix in (".onnx", ".safetensors", ".json", ".data"):
        raise ModelFileError(f"{path}: name the folder that this file is in ({path.parent})")
    raise ModelFileError(f"{path}: not a model file (it starts with {_first_bytes(path)!r}); {EXPECTED}")


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None
