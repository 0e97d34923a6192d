"""What each linear of an export is stored on, and the bytes that takes."""
from __future__ import annotations

from math import prod

from sbedge.checkpoint import EMBEDDINGS, Checkpoint
from sbedge.config import INPUT_KINDS
from sbedge.gguf_format import TYPES
from sbedge.quant.ggml_blocks import BLOCK, GGML_GRIDS
from sbedge.quant.gptq import GRIDS, Grid

from .activations import path
from .calibrated import quant_of
from .gguf.tensors import stored_type
from .spikes import EVENT_LINEARS, event_layout

ONNX_EMBEDDINGS = ("int8", "int4")      # embedding quants that are no types of ggml's


def linears_of(layer: int, kind: str) -> list[str]:
    """The large linears that read a kind of input of a layer."""
    return [f"model.layers.{layer}.{path(p)}.weight" for p in INPUT_KINDS[kind] if p in EVENT_LINEARS]


def grid_of(checkpoint: Checkpoint, name: str, quant: str) -> Grid | None:
    """The grid that an export in `quant` stores this tensor on; None: it is not calibrated."""
    if not name.endswith(".weight") or name.split(".")[-2] not in EVENT_LINEARS:
        return None
    quant = quant_of(checkpoint, name, quant)
    if quant.endswith("-spike"):
        return GRIDS["w4-spike" if event_layout(checkpoint, name, quant) == "w4" else "w8-spike"]
    if quant in GGML_GRIDS.values() and checkpoint.shapes[name][1] % BLOCK:
        return None         # stored in float16
    return GRIDS[quant]


def grid_bytes(shape: tuple[int, ...], grid: Grid | None) -> tuple[float, float]:
    """Bytes of a linear's codes, which a silent channel spares, and of its scales and zero points."""
    if grid is None:
        return 2 * prod(shape), 0
    out, width = shape
    per_group = (2 if grid.half else 4) + (1 if grid.middle is None else 0)
    return out * width * grid.bits / 8, out * -(-width // grid.group) * per_group


def bytes_beside(checkpoint: Checkpoint, quant: str, embedding_quant: str) -> float:
    """Bytes of weights that a decoded token reads beside the calibrated linears: lm_head above all."""
    if embedding_quant in ONNX_EMBEDDINGS:
        grid = GRIDS[embedding_quant]
        per_weight = sum(grid_bytes((1, grid.group), grid)) / grid.group
    else:
        kind = TYPES[stored_type(embedding_quant, checkpoint.config.hidden_size)]
        per_weight = kind.nbytes / kind.block
    looked_up = "" if checkpoint.config.tie_word_embeddings else "model.embeddings.weight"
    return sum(prod(shape) * (per_weight if name in EMBEDDINGS else 4) for name, shape in checkpoint.shapes.items()
               if name != looked_up and grid_of(checkpoint, name, quant) is None)
