"""The weights of an ONNX folder as float32 (see docs/onnx.md for the forms they are stored in)."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from sbedge.checkpoint import expected_tensors
from sbedge.config import WEIGHT_GROUP
from sbedge.errors import ModelFileError
from sbedge.quant.blocks import BLOCK, Blocks, dequantize_blocks
from sbedge.quant.event_layout import W4, dequantize_w4
from sbedge.quant.int8_groups import dequantize_int8_groups

from .onnx_folder import open_folder, read_graph


class OnnxTensors:
    """The initializers of a folder that has been checked, by name; their bytes are read when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config, _ = open_folder(folder)
        self._stored = {tensor.name: tensor for tensor in read_graph(folder / "model.onnx").graph.initializer}
        self._shapes = expected_tensors(self.config)

    def weight(self, name: str) -> np.ndarray:
        """A weight under its checkpoint name, in the checkpoint's shape. Raises ModelFileError if it is not there."""
        shape, weight = self._shapes[name], None
        try:
            if name in self._stored:
                weight = self.array(name).astype(np.float32, copy=False)
            elif f"{name}.zero_points" in self._stored:
                weight = self._blocks(name, shape)
            elif f"{name}.nibbles" in self._stored:
                nibbles, scales, zeros = (self.array(f"{name}.{part}") for part in ("nibbles", "scales", "zeros"))
                weight = dequantize_w4(W4(_side_by_side(nibbles), scales, zeros))
            elif f"{name}.codes" in self._stored:
                weight = dequantize_int8_groups(self.codes(name), self.array(f"{name}.scales").T)
        except (KeyError, ValueError, IndexError) as error:
            raise ModelFileError(f"{self.folder / 'model.onnx'}: the parts of {name} do not belong together "
                                 f"({error}); export it again") from None
        if weight is None or weight.shape != shape:
            found = "missing" if weight is None else f"{list(weight.shape)}"
            raise ModelFileError(f"{self.folder / 'model.onnx'}: tensor {name} is {found}, expected {list(shape)}")
        return weight

    def codes(self, name: str) -> np.ndarray:
        """The integer codes [out, in] of a spiking linear, those beyond int8 whole again: a residual holds code times
        scale, which is within half a code of it."""
        inputs, outputs = (self.array(f"{name}.residual_{part}") for part in ("inputs", "outputs"))
        scales = self.array(f"{name}.scales")
        beyond = np.rint(self.array(f"{name}.residual_values") / scales[inputs // WEIGHT_GROUP, outputs])
        stored = self.array(f"{name}.codes")
        *stripes, groups, rows, width = stored.shape
        codes = _side_by_side(stored.reshape(*stripes, groups * rows, width)).astype(np.int32) - 128
        codes[inputs, outputs] += beyond.astype(np.int32)
        return np.ascontiguousarray(codes[:self._shapes[name][1]].T)

    def array(self, name: str) -> np.ndarray:
        """An initializer; mapped where it lies in the data file."""
        tensor = self._stored[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        entries = {entry.key: entry.value for entry in tensor.external_data}
        return np.memmap(self.folder / entries["location"], helper.tensor_dtype_to_np_dtype(tensor.data_type), "r",
                         int(entries.get("offset", "0")), tuple(tensor.dims))

    def _blocks(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A weight in blocks of 4 or 8 bits. Embeddings that are only looked up are stored as rows."""
        part = "codes" if f"{name}.codes" in self._stored else "codes.rows"
        scales, zero_points = self.array(f"{name}.scales"), self.array(f"{name}.zero_points")
        codes = self.array(f"{name}.{part}").reshape(*scales.shape, -1)
        bits = codes.shape[-1] * 8 // BLOCK
        return dequantize_blocks(Blocks(codes, scales, zero_points), bits, shape[1])


def _side_by_side(stripes: np.ndarray) -> np.ndarray:
    """[stripes, in, width] -> [in, stripes * width]; one stripe may come without its axis."""
    return stripes if stripes.ndim == 2 else np.concatenate(list(stripes), axis=1)
