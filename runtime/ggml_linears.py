"""The linears of a GGUF file for our kernels: event layouts (see sbedge/gguf_format.py) and ggml's own block formats.

Event layouts are checked, handed to the kernels, or decoded where there are none.
"""
from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sbedge.config import WEIGHT_GROUP
from sbedge.errors import ModelFileError
from sbedge.gguf_reader import GgufFile
from sbedge.quant.event_layout import (
    NIBBLE_STRIPE,
    STRIPE,
    W4,
    W4_BLOCK,
    dequantize_w4,
    from_stripes,
    join_codes,
    residual_rows,
)
from sbedge.quant.int8_groups import dequantize_int8_groups

from .native import library
from .native.ggml_ops import KIND_DENSE, KIND_W4, KIND_W8

W4_GROUPS = (32, 64, 128)       # what the kernels know
DENSE_BITS = {"Q8_0": 8, "Q4_0": 4}


class NativeLinear(NamedTuple):
    """A linear as the kernels take it: their structure, its KIND_, its outputs and the bytes of its weights."""

    struct: ctypes.Structure
    kind: int
    out: int
    nbytes: int


class Event(NamedTuple):
    """Where a linear in event layout stands: tensor names are `stem` and a part."""

    stem: str
    bits: int
    width: int
    out: int


def event_linears(file: GgufFile) -> Iterator[Event]:
    for name in file.tensors:
        stem, _, part = name.rpartition(".")
        if part in ("codes", "nibbles"):
            out = file.tensors[f"{stem}.scales"].shape[1]
            bits = 8 if part == "codes" else 4
            yield Event(stem, bits, int(np.prod(file.tensors[name].shape)) * 8 // bits // out, out)


# --- what a file must hold ---------------------------------------------------------------------------
def check_event_layout(file: GgufFile, name: str, shape: tuple[int, ...]) -> set[str]:
    """The tensors that stand for the weight `name` of `shape` [out, in], sound ones; none if it is no event layout."""
    stem = name.removesuffix("weight")
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    if stem + "codes" in file.tensors:
        wanted = _w8_parts(file, stem, shape)
    elif stem + "nibbles" in file.tensors:
        wanted = _w4_parts(file, stem, shape)
    for part, (kind, expected) in wanted.items():
        found = file.tensors.get(part)
        if found is None or (found.type, found.shape) != (kind, expected):
            have = "missing" if found is None else f"{found.type} {list(found.shape)}"
            raise ModelFileError(f"{file.path}: tensor {part} is {have}, expected {kind} {list(expected)}")
    if stem + "residual_index" in wanted:
        index = file.array(stem + "residual_index")
        if index.min() < 0 or index.max() >= shape[0] * shape[1] or (np.diff(index) <= 0).any():
            raise ModelFileError(f"{file.path}: tensor {stem}residual_index is not ascending within its weight")
    return set(wanted)


def _w8_parts(file: GgufFile, stem: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    out, width = shape
    codes = (width, out) if len(file.tensors[stem + "codes"].shape) == 2 else (width * out,)
    wanted = {stem + "codes": ("I8", codes), stem + "scales": ("F32", (-(-width // WEIGHT_GROUP), out))}
    if stem + "residual_index" in file.tensors:
        count = file.tensors[stem + "residual_index"].shape[:1]
        wanted |= {stem + "residual_index": ("I32", count), stem + "residual_value": ("I32", count)}
    return wanted


def _w4_parts(file: GgufFile, stem: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    out, width = shape
    scales = file.tensors.get(stem + "scales")
    group = width // scales.shape[0] if scales else 0
    if out % W4_BLOCK or group not in W4_GROUPS or width % group:
        raise ModelFileError(f"{file.path}: {stem}nibbles holds {out} outputs in groups of {group} inputs, expected a "
                             f"multiple of {W4_BLOCK} in groups of {' or '.join(map(str, W4_GROUPS))}")
    wanted = {stem + "nibbles": ("I8", (width * out // 2,)), stem + "scales": ("F16", (width // group, out))}
    if stem + "zeros" in file.tensors:
        wanted[stem + "zeros"] = "I8", (width // group, out)
    return wanted


# --- for the kernels ---------------------------------------------------------------------------------
def native_events(file: GgufFile) -> tuple[dict[str, NativeLinear], list[np.ndarray]]:
    """The kernels' view of a checked file's event layouts, by stem, over the file's own memory; and what they hold on
    to: where each channel's residual begins."""
    events: dict[str, NativeLinear] = {}
    held: list[np.ndarray] = []
    for event in event_linears(file):
        stem, bits, width, out = event
        address = {part: file.data.ctypes.data + file.tensors[f"{stem}.{part}"].offset
                   for part in ("codes", "nibbles", "scales", "zeros", "bias") if f"{stem}.{part}" in file.tensors}
        if bits == 4:
            nibbles, group = file.tensors[f"{stem}.nibbles"], width // file.tensors[f"{stem}.scales"].shape[0]
            struct: ctypes.Structure = library.W4(width, out, STRIPE, group, address["nibbles"],
                                                  address["scales"], address.get("zeros"), address.get("bias"))
            events[stem] = NativeLinear(struct, KIND_W4, out, nibbles.nbytes)
            continue
        codes = file.tensors[f"{stem}.codes"]
        linear = library.W8(width, out, STRIPE if len(codes.shape) == 1 else 0, address["codes"], address["scales"],
                            address.get("bias"))
        if f"{stem}.residual_index" in file.tensors:
            start, output = residual_rows(file.array(f"{stem}.residual_index"), (width, out))
            held += [start, output]
            linear.residual_start, linear.residual_output = start.ctypes.data, output.ctypes.data
            linear.residual_value = file.array(f"{stem}.residual_value").ctypes.data
        events[stem] = NativeLinear(linear, KIND_W8, out, codes.nbytes)
    return events, held


def native_dense(file: GgufFile) -> dict[str, NativeLinear]:
    """Matrices whose block format the kernels know, by stem, over the file's own memory."""
    dense = {}
    for name, info in file.tensors.items():
        if info.type in DENSE_BITS and len(info.shape) == 2:
            stem, (out, width) = name.removesuffix(".weight"), info.shape
            bias = file.tensors.get(stem + ".bias")
            struct = library.Dense(width, out, DENSE_BITS[info.type], file.data.ctypes.data + info.offset,
                                   file.data.ctypes.data + bias.offset if bias else None)
            dense[stem] = NativeLinear(struct, KIND_DENSE, out, info.nbytes)
    return dense


# --- without them ------------------------------------------------------------------------------------
def decode_event_layout(file: GgufFile, name: str) -> np.ndarray:
    """The float32 [out, in] weight that an event layout stands for, exactly."""
    stem = name.removesuffix("weight")
    scales = file.array(stem + "scales")
    out = scales.shape[1]
    if stem + "nibbles" in file.tensors:
        flat = file.array(stem + "nibbles").view(np.uint8)
        zeros = file.array(stem + "zeros").view(np.uint8) if stem + "zeros" in file.tensors else None
        return dequantize_w4(W4(from_stripes(flat, (2 * flat.size // out, out // 2), NIBBLE_STRIPE), scales, zeros))
    codes = file.array(stem + "codes")
    if codes.ndim == 1:
        codes = from_stripes(codes, (codes.size // out, out))
    nothing = np.zeros(0, np.int32)
    index, value = (file.array(stem + part) if stem + part in file.tensors else nothing
                    for part in ("residual_index", "residual_value"))
    return dequantize_int8_groups(join_codes(codes, index, value), scales.T)
