"""The tensors of a GGUF file, those of event layouts among them: what they hold is made when they are written."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from sbedge.checkpoint import Checkpoint
from sbedge.config import WEIGHT_GROUP
from sbedge.export.spikes import W4_GROUP, weight_codes, weight_nibbles
from sbedge.gguf_format import TYPES, gguf_name, row_bytes
from sbedge.quant.event_layout import NIBBLE_STRIPE, split_codes, to_stripes

# quant name -> (type of linears, type where a width is no multiple of its block)
QUANTS = {"f32": ("F32", "F32"), "f16": ("F16", "F16"), "q8_0": ("Q8_0", "F16"), "q4_0": ("Q4_0", "F16"),
          "q4_k": ("Q4_K", "Q5_0"), "q6_k": ("Q6_K", "Q8_0"), "w8-spike": ("codes", "codes"),
          "w4-spike": ("nibbles", "nibbles")}


def stored_type(quant: str, width: int) -> str:
    """The type of ggml's that rows of `width` weights have in a dense `quant`."""
    return next((kind for kind in QUANTS[quant] if width % TYPES[kind].block == 0), "F16")


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: `blocks` yields its bytes in order, each array a job done by a worker."""

    name: str
    shape: tuple[int, ...]
    type: str
    blocks: Callable[[], Iterator[Callable[[], np.ndarray]]]

    @property
    def nbytes(self) -> int:
        return row_bytes(self.type, self.shape[-1]) * int(np.prod(self.shape[:-1]))


def event_tensors(checkpoint: Checkpoint, name: str, layout: str) -> list[Tensor]:
    """One linear, input-channel-major (see sbedge/gguf_format.py): "w8", lossless for W8ASpike, or "w4"."""
    return w8_tensors(checkpoint, name) if layout == "w8" else w4_tensors(checkpoint, name)


def w8_tensors(checkpoint: Checkpoint, name: str) -> list[Tensor]:
    out, width = checkpoint.shapes[name]
    parts = {"codes": ("I8", (width * out,)), "scales": ("F32", (-(-width // WEIGHT_GROUP), out))}
    residual = 0
    if checkpoint.is_w8aspike:
        published = weight_codes(checkpoint, name)[0]
        residual = int(np.count_nonzero((published < -128) | (published > 127)))
    if residual:
        parts |= {"residual_index": ("I32", (residual,)), "residual_value": ("I32", (residual,))}

    def make() -> dict[str, np.ndarray]:
        codes, scales = weight_codes(checkpoint, name)
        int8, index, value = split_codes(codes)
        return {"codes": to_stripes(int8), "scales": scales.T, "residual_index": index, "residual_value": value}

    return made_together(name, parts, make)


def w4_tensors(checkpoint: Checkpoint, name: str) -> list[Tensor]:
    out, width = checkpoint.shapes[name]
    groups = width // W4_GROUP

    def make() -> dict[str, np.ndarray]:
        nibbles, scales, zeros = weight_nibbles(checkpoint, name)
        assert zeros is not None
        return {"nibbles": to_stripes(nibbles, NIBBLE_STRIPE), "scales": scales, "zeros": zeros}

    return made_together(name, {"nibbles": ("I8", (width * out // 2,)), "scales": ("F16", (groups, out)),
                                "zeros": ("I8", (groups, out))}, make)


def made_together(name: str, parts: dict[str, tuple[str, tuple[int, ...]]],
                  make: Callable[[], dict[str, np.ndarray]]) -> list[Tensor]:
    """Tensors whose arrays `make` gives all at once: when the first is written. Each is let go with its turn."""
    stem = gguf_name(name).removesuffix("weight")
    made: dict[str, np.ndarray] = {}

    def bytes_of(part: str) -> np.ndarray:
        if not made:
            made.update(make())
        array = np.ascontiguousarray(made.pop(part)).view(np.uint8)
        if part == list(parts)[-1]:
            made.clear()
        return array

    return [Tensor(stem + part, shape, kind, lambda part=part: iter([partial(bytes_of, part)]))     # type: ignore[misc]
            for part, (kind, shape) in parts.items()]
