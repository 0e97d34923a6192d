"""Checks an ONNX folder before anything reads it: the files are untrusted."""
from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from sbedge.checkpoint import MAX_LAYERS
from sbedge.config import ModelConfig
from sbedge.errors import CheckpointError, ModelFileError
from sbedge.onnx_format import io_names
from sbedge.state import state_layout

DOMAIN, VERSION = "ai.sbedge", 1
MAX_GRAPH_BYTES = 1 << 28           # weights lie beside the graph; a graph alone is never this large
MAX_CONFIG_BYTES = 1 << 20
MAX_STATE_BYTES = 1 << 40


def open_folder(folder: Path) -> tuple[ModelConfig, set[str]]:
    """The model's config and the op types of its graph, once the folder is known to be whole; ModelFileError in one
    line if it is not."""
    if not folder.is_dir():
        raise ModelFileError(f"{folder}: no such folder; expected an ONNX folder made by `sbedge export`")
    config = read_config(folder / "config.json")
    model = read_graph(folder / "model.onnx")
    check_interface(model, config, folder / "model.onnx")
    for tensor in tensors(model):
        check_data(tensor, folder)
    return config, {node.op_type for node in model.graph.node}


def read_config(path: Path) -> ModelConfig:
    block = read_json(path).get("sbedge")
    if not isinstance(block, dict) or not isinstance(block.get("config"), dict):
        raise ModelFileError(f"{path}: has no 'sbedge' block; expected a folder made by `sbedge export`")
    try:
        config = ModelConfig.from_dict(block["config"], source=str(path))
    except CheckpointError as error:
        raise ModelFileError(f"{error}; this file was made by sbedge {str(block.get('exporter'))[:20]}") from None
    if config.num_hidden_layers > MAX_LAYERS or state_bytes(config) > MAX_STATE_BYTES:
        raise ModelFileError(f"{path}: absurd sizes: {config.num_hidden_layers} layers, hidden size "
                             f"{config.hidden_size}, window {config.sliding_window}")
    return config


def read_fingerprint(path: Path) -> str | None:
    """The source checkpoint's fingerprint, from a config.json that `read_config` found sound."""
    source = read_json(path)["sbedge"].get("source")
    return source if isinstance(source, str) and source else None


def state_bytes(config: ModelConfig) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in state_layout(config).values())


def read_json(path: Path) -> dict:
    try:
        value = json.loads(read(path, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_graph(path: Path) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(read(path, MAX_GRAPH_BYTES))
    except DecodeError:
        raise ModelFileError(f"{path}: damaged, not an ONNX model; export it again") from None
    version = {opset.domain: opset.version for opset in model.opset_import}.get(DOMAIN)
    if version is None:
        raise ModelFileError(f"{path}: does not use the op set {DOMAIN}; expected a model made by `sbedge export`")
    if version > VERSION:
        raise ModelFileError(f"{path}: made by sbedge {model.producer_version[:20]} with version {version} of the op "
                             f"set {DOMAIN}, this sbedge knows version {VERSION}; update sbedge")
    return model


def read(path: Path, limit: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > limit:
            raise ModelFileError(f"{path}: {size} bytes, expected at most {limit}; not a file made by `sbedge export`")
        return path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}); "
                             "expected an ONNX folder made by `sbedge export`") from None


# --- the interface -------------------------------------------------------------------------------
def check_interface(model: onnx.ModelProto, config: ModelConfig, path: Path) -> None:
    """Inputs and outputs are those of `config`: names, types and sizes (0 stands for any)."""
    inputs: dict[str, tuple] = {"input_ids": (TensorProto.INT64, 1, 0), "position_ids": (TensorProto.INT64, 1, 0),
                                "logits_to_keep": (TensorProto.INT64, 1)}
    outputs: dict[str, tuple] = {"logits": (TensorProto.FLOAT, 1, 0, config.vocab_size)}
    for name, (shape, dtype) in state_layout(config).items():
        past, present = io_names(name)
        inputs[past] = outputs[present] = helper.np_dtype_to_tensor_dtype(dtype), 1, *shape
    for kind, wanted, values in (("input", inputs, model.graph.input), ("output", outputs, model.graph.output)):
        found = {str(value.name): interface(value) for value in values}     # bytes where it is no UTF-8
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise ModelFileError(
                    f"{path}: {kind} {name[:80]} is {described(found.get(name))}, config.json beside it asks for "
                    f"{described(wanted.get(name))}; the files do not belong together, or another version of sbedge "
                    f"({model.producer_version[:20]}) made them")


def interface(value: onnx.ValueInfoProto) -> tuple:
    tensor = value.type.tensor_type
    return tensor.elem_type, *(dim.dim_value for dim in tensor.shape.dim)


def described(found: tuple | None) -> str:
    if found is None:
        return "absent"
    kind, *shape = found
    names = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.INT8: "int8"}
    return f"{names.get(kind, f'type {kind}')} {shape}"


# --- the data ------------------------------------------------------------------------------------
def tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of the model, those inside nodes and function bodies included."""
    yield from graph_tensors(model.graph)
    for function in model.functions:
        yield from node_tensors(function.node)


def graph_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from node_tensors(graph.node)


def node_tensors(nodes) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from graph_tensors(graph)


def check_data(tensor: TensorProto, folder: Path) -> None:
    """An external tensor lies inside a file of this folder, with the size its shape asks for."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return
    name = str(tensor.name)[:80]
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = str(entries.get("location", ""))
    if Path(location).name != location or location in ("", ".", ".."):
        raise ModelFileError(f"{folder / 'model.onnx'}: tensor {name} lies in {location[:80]!r}, "
                             "expected a plain file name in the same folder")
    path = folder / location
    if not path.is_file():
        raise ModelFileError(f"{path}: missing; the weights of model.onnx lie there, copy the whole folder")
    try:
        offset, length = int(entries.get("offset", "0")), int(entries["length"])
        wanted = prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError):
        raise ModelFileError(f"{folder / 'model.onnx'}: tensor {name} has no readable offset, length or type") from None
    size = path.stat().st_size
    if offset < 0 or length < 0 or offset + length > size:
        raise ModelFileError(f"{path}: truncated: tensor {name} needs bytes {offset} to {offset + length}, "
                             f"the file has {size}; export or copy it again")
    if length != wanted or any(dim < 0 for dim in tensor.dims):
        raise ModelFileError(f"{folder / 'model.onnx'}: tensor {name} has {length} bytes, its shape "
                             f"{list(tensor.dims)} needs {wanted}")
