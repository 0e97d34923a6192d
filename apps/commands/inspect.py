"""`sbedge inspect`: what a model file holds, read from its headers."""
from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sbedge.apps.options import add_model
from sbedge.apps.text import one_line
from sbedge.config import ModelConfig
from sbedge.errors import CheckpointError, ModelFileError
from sbedge.runtime.load import model_kind, open_tokenizer
from sbedge.runtime.tokenizer import Tokenizer
from sbedge.state import ALIGNMENT, state_layout

PREFILL = 512       # tokens the engines read at a time


@dataclass(frozen=True)
class Tensor:
    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Contents:
    """What one model holds. `source` may have "fingerprint", "recipe" and "exporter"."""

    kind: str
    file_bytes: int
    config: ModelConfig
    tensors: list[Tensor]
    source: dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Show a model's architecture, layers, tensor types and sizes, the size of its state and the\n"
                          "memory it needs. Reads headers only, no weights.")
    parser.epilog = "example:\n  sbedge inspect model.gguf --tensors"
    add_model(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    contents = read_contents(args.model)
    tokenizer = open_tokenizer(args.model, contents.config.vocab_size)
    summary = summarize(contents, tokenizer, tensors=args.tensors)
    if args.json:
        print(json.dumps(summary))
    else:
        sys.stdout.write(describe(args.model, summary))


# --- reading -----------------------------------------------------------------------------------------
def read_contents(path: str | Path) -> Contents:
    """Contents of a GGUF file, an ONNX folder or a checkpoint folder; errors as `load`."""
    return {"gguf": read_gguf_contents, "onnx": read_onnx_contents,
            "checkpoint": read_checkpoint_contents}[model_kind(path)](Path(path))


def read_gguf_contents(path: Path) -> Contents:
    from sbedge.gguf_format import ARCHITECTURE, SOURCE_KEYS, config_from_metadata
    from sbedge.gguf_reader import read_gguf

    file = read_gguf(path)
    tensors = [Tensor(t.name, t.type, t.shape, t.nbytes) for t in file.tensors.values()]
    keys = {key: file.metadata.get(f"{ARCHITECTURE}.source.{key}") for key in SOURCE_KEYS}
    return Contents("gguf", path.stat().st_size, config_from_metadata(file.metadata, str(path)), tensors,
                    {key: str(value) for key, value in keys.items() if value})


def read_checkpoint_contents(path: Path) -> Contents:
    from sbedge.checkpoint import Checkpoint

    checkpoint = Checkpoint(path)
    tensors = []
    for name, shape in checkpoint.shapes.items():
        dtype = checkpoint.rows(name, 0, 0).dtype
        tensors.append(Tensor(name, dtype.name, shape, math.prod(shape) * dtype.itemsize))
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return Contents("checkpoint", size, checkpoint.config, tensors, {"fingerprint": checkpoint.fingerprint})


def read_onnx_contents(path: Path) -> Contents:
    import onnx
    from google.protobuf.message import DecodeError

    config, source = read_onnx_config(path / "config.json")
    try:
        model = onnx.load(path / "model.onnx", load_external_data=False)
    except DecodeError:
        raise ModelFileError(f"{path / 'model.onnx'}: not an ONNX model, or damaged; export it again") from None
    tensors = [onnx_tensor(initializer) for initializer in model.graph.initializer]
    size = sum(file.stat().st_size for file in path.glob("model.onnx*"))
    return Contents("onnx", size, config, tensors, source)


def read_onnx_config(path: Path) -> tuple[ModelConfig, dict[str, str]]:
    """The config and source that an export wrote into its config.json."""
    try:
        block = json.loads(path.read_text(encoding="utf-8"))["sbedge"]
        quantization = ", ".join(f"{key} {value}" for key, value in block["quantization"].items())
        config = ModelConfig.from_dict(block["config"], source=str(path))
        return config, {"fingerprint": str(block["source"]), "recipe": quantization,
                        "exporter": f"sbedge {block['exporter']}"}
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}); export the model again") from None
    except CheckpointError as error:
        raise ModelFileError(str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"{path}: not written by `sbedge export` ({error!r}); export the model again") from None


def onnx_tensor(initializer: Any) -> Tensor:
    from onnx import TensorProto

    external = {entry.key: entry.value for entry in initializer.external_data}
    nbytes = int(external["length"]) if external.get("length", "").isdigit() else initializer.ByteSize()
    return Tensor(initializer.name, TensorProto.DataType.Name(initializer.data_type), tuple(initializer.dims), nbytes)


# --- summing up --------------------------------------------------------------------------------------
def summarize(contents: Contents, tokenizer: Tokenizer | None, *, tensors: bool = False) -> dict[str, Any]:
    """All that --json prints; sizes in bytes."""
    config = contents.config
    types: dict[str, dict[str, int]] = defaultdict(Counter)
    for tensor in contents.tensors:
        types[tensor.type].update(tensors=1, bytes=tensor.nbytes)
    state, scratch = state_bytes(config), scratch_bytes(config)
    summary: dict[str, Any] = {
        "kind": contents.kind, "config": config.to_dict(), "layers": layer_pattern(config),
        "file_bytes": contents.file_bytes, "state_bytes": state, "scratch_bytes": scratch,
        "memory_bytes": contents.file_bytes + state + scratch, "types": types, "source": contents.source,
        "tokenizer": None if tokenizer is None else tokenizer_summary(tokenizer)}
    if residual := residual_of(contents):
        summary["residual"] = residual
    if tensors:
        summary["tensors"] = [asdict(tensor) for tensor in contents.tensors]
    return summary


def residual_of(contents: Contents) -> dict[str, int] | None:
    """Codes beyond int8, kept exact beside the int8 ones: how many, of how many, and the bytes they take; None if the
    model stores no such residual."""
    parts = [t for t in contents.tensors if t.name.rpartition(".")[2].startswith("residual_")]
    count = sum(math.prod(t.shape) for t in parts if t.name.endswith(("residual_value", "residual_values")))
    if not count:
        return None
    linears = {t.name.rpartition(".")[0] for t in parts}
    codes = sum(t.nbytes for t in contents.tensors if t.name.removesuffix(".codes") in linears)
    return {"codes_beyond_int8": count, "codes": codes, "bytes": sum(t.nbytes for t in parts)}


def residual_text(residual: dict[str, int]) -> str:
    beyond, codes = residual["codes_beyond_int8"], residual["codes"]
    return (f"{beyond:,} of {codes:,} codes ({beyond / codes:.2%}) are beyond int8 and kept exact in "
            f"{size(residual['bytes'])} beside them")


def layer_pattern(config: ModelConfig) -> str:
    """One letter a layer: G for GLA, W for a sliding window."""
    return "".join("W" if config.is_window_layer(i) else "G" for i in range(config.num_hidden_layers))


def state_bytes(config: ModelConfig) -> int:
    """Bytes of a state: computed, for the config of an untrusted file could ask for any amount of memory."""
    sizes = (math.prod(shape) * dtype.itemsize for shape, dtype in state_layout(config).values())
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def scratch_bytes(config: ModelConfig) -> int:
    """Rough peak of the activations while PREFILL tokens are read: FFN, attention inputs, one layer's scores."""
    widths = 3 * config.intermediate_size + 8 * config.hidden_size
    scores = config.num_attention_heads * (min(PREFILL, config.sliding_window) + config.sliding_window)
    return 4 * (PREFILL * (widths + (scores if config.attn_layers else 0)) + config.vocab_size)


def tokenizer_summary(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"tokens": tokenizer.vocab_size, "special": len(tokenizer.special_ids), "bos": tokenizer.bos_id,
            "end": sorted(tokenizer.eos_ids), "chat_template": tokenizer.chat_template is not None}


def describe(path: str, summary: dict[str, Any]) -> str:
    c, tokenizer, source = summary["config"], summary["tokenizer"], summary["source"]
    head = c["hidden_size"] // c["num_attention_heads"]
    spiking = f", spiking activations ({spiking_as(c)})" if c["spike_k"] else ""
    lines = [
        ("model", f"{path} ({summary['kind']}, {size(summary['file_bytes'])})"),
        ("architecture", f"SpikingBrain{spiking}"),
        ("layers", f"{c['num_hidden_layers']}: {summary['layers']}  (G gated linear attention, W sliding window)"),
        ("sizes", f"hidden {c['hidden_size']}, FFN {c['intermediate_size']}, {c['num_attention_heads']} query heads, "
                  f"{c['num_key_value_heads']} key/value heads of {head}, window {c['sliding_window']}"),
        ("vocabulary", f"{c['vocab_size']}{' (embeddings tied)' if c['tie_word_embeddings'] else ''}"),
        ("tokenizer", "none: this model takes token ids only" if tokenizer is None else
            f"{tokenizer['tokens']} tokens, {'with' if tokenizer['chat_template'] else 'no'} chat template"),
        *((f"{name}", f"{t['tensors']} tensors, {size(t['bytes'])}") for name, t in sorted(summary["types"].items())),
        *((("residual", residual_text(summary["residual"])),) if "residual" in summary else ()),
        ("state", f"{size(summary['state_bytes'])}, whatever the position"),
        ("memory", f"about {size(summary['memory_bytes'])}: file, state, and {size(summary['scratch_bytes'])} for "
                   f"reading {PREFILL} tokens at a time"),
        *source.items()]
    if "tensors" in summary:
        lines += [("tensor", f"{t['name']}  {t['type']} {list(t['shape'])}  {size(t['nbytes'])}")
                  for t in summary["tensors"]]
    return "".join(f"{name + ':':14}{one_line(str(value))}\n" for name, value in lines)


def spiking_as(config: dict[str, Any]) -> str:
    """The k of a spiking model and its dead zones, if it has any; from the least to the largest where inputs differ."""
    k = config.get("input_spike_k") or [config["spike_k"]]
    text = f"k = {min(k):g}" + (f" to {max(k):g}" if max(k) > min(k) else "")
    if zones := config.get("input_dead_zone"):
        return f"{text}, dead zones {min(zones):.2f} to {max(zones):.2f}"
    return f"{text}, dead zone {config['dead_zone']:g}" if config["dead_zone"] else text


def size(nbytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} B"
