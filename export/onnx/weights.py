"""The external data file of an ONNX model: tensors are appended as they are converted, never held together."""
from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

DATA_FILE = "model.onnx.data"
ALIGNMENT = 4096            # a page, so that runtimes can map each tensor
INLINE_BYTES = 1024         # smaller tensors travel in model.onnx itself


class DataFile:
    """Appends tensors to `folder`/model.onnx.data and returns references to them."""

    def __init__(self, folder: Path, dry: bool = False):
        """`dry`: nothing is written nor even made, but the file grows as if it were (with a hole in it)."""
        self.dry = dry
        self.file = open(folder / DATA_FILE, "wb")  # noqa: SIM115  (closed by __exit__)

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, name: str, dtype: type, shape: Sequence[int], pieces: Iterable[np.ndarray]) -> TensorProto:
        """Write `pieces`, which together are a C-ordered tensor of `shape`, and return its reference."""
        self.file.write(b"\0" * (-self.file.tell() % ALIGNMENT))
        offset = self.file.tell()
        if self.dry:
            self.file.truncate(self.file.seek(prod(shape) * np.dtype(dtype).itemsize, os.SEEK_CUR))
        else:
            for piece in pieces:
                self.file.write(np.ascontiguousarray(piece, dtype).data if piece.size else b"")
        return reference(name, dtype, shape, offset, self.file.tell() - offset)

    def array(self, name: str, array: np.ndarray) -> TensorProto:
        """The tensor itself when it is small, else appended."""
        if array.nbytes <= INLINE_BYTES:
            return helper.make_tensor(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape,
                                      array.tobytes(), raw=True)
        return self.append(name, array.dtype.type, array.shape, [array])


def reference(name: str, dtype: type, shape: Iterable[int], offset: int, length: int) -> TensorProto:
    """A TensorProto whose bytes lie in the data file."""
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), dims=shape,
                         data_location=TensorProto.EXTERNAL)
    for key, value in (("location", DATA_FILE), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def same_bytes(tensor: TensorProto, name: str, shape: Iterable[int]) -> TensorProto:
    """`tensor` under another name and shape: two initializers, one copy in the file."""
    twin = TensorProto()
    twin.CopyFrom(tensor)
    twin.name = name
    twin.dims[:] = shape
    return twin
