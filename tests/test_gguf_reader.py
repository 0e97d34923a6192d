"""pytest tests/test_gguf_reader.py: a GGUF file is read right, and never trusted."""
from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbedge.errors import ModelFileError
from sbedge.gguf_reader import read_gguf


def write_sample(path, **values):
    writer = gguf.GGUFWriter(path, "spikingbrain")
    for key, value in values.items():
        writer.add_array(key, value) if isinstance(value, list) else writer.add_string(key, value)
    writer.add_tensor("a", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("b", np.arange(5, dtype=np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def header(n_tensors=0, n_keys=0, version=3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


def key(name: bytes, kind: int) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind)


def tensor(name: bytes, dims, kind=0, offset=0) -> bytes:
    return (struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims))
            + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset))


def test_what_the_gguf_package_writes_is_read_back(tmp_path):
    file = read_gguf(write_sample(tmp_path / "x.gguf", words=["a", "é", ""], numbers=[1, -2], text="hello"))
    assert file.metadata["words"] == ["a", "é", ""]
    assert file.metadata["numbers"] == [1, -2]
    assert file.metadata["text"] == "hello"
    np.testing.assert_array_equal(file.array("a"), np.arange(12, dtype=np.float32).reshape(3, 4))
    np.testing.assert_array_equal(file.array("b"), np.arange(5, dtype=np.int8))


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path):
    whole = write_sample(tmp_path / "whole.gguf", words=["a", "b"]).read_bytes()
    end_of_data = len(whole) - (-5 % 32)         # the last tensor's padding may be missing
    cut = tmp_path / "cut.gguf"
    for size in [*range(1, end_of_data, 7), end_of_data - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelFileError, match=r"cut\.gguf"):
            read_gguf(cut)


@pytest.mark.parametrize(("what", "data"), [
    ("nothing", b""),
    ("another format", b"PK\3\4" + bytes(64)),
    ("an unknown version", header(version=99) + bytes(64)),
    ("absurd tensor count", header(n_tensors=1 << 60) + bytes(64)),
    ("absurd key count", header(n_keys=1 << 60) + bytes(64)),
    ("absurd string", header(n_keys=1) + struct.pack("<Q", 1 << 62) + bytes(64)),
    ("absurd array", header(n_keys=1) + key(b"k", 9) + struct.pack("<IQ", 4, 1 << 61) + bytes(64)),
    ("absurd array of strings", header(n_keys=1) + key(b"k", 9) + struct.pack("<IQ", 8, 1 << 61) + bytes(64)),
    ("arrays nested without end", header(n_keys=1) + key(b"k", 9) + struct.pack("<IQ", 9, 1) * 64),
    ("unknown value type", header(n_keys=1) + key(b"k", 77) + bytes(64)),
    ("absurd dimensions", header(n_tensors=1) + tensor(b"t", [1 << 40, 1 << 40]) + bytes(64)),
    ("zero dimension", header(n_tensors=1) + tensor(b"t", [0, 4]) + bytes(64)),
    ("five dimensions", header(n_tensors=1) + tensor(b"t", [1, 1, 1, 1, 1]) + bytes(64)),
    ("absurd offset", header(n_tensors=1) + tensor(b"t", [4], offset=1 << 62) + bytes(64)),
    ("unknown tensor type", header(n_tensors=1) + tensor(b"t", [4], kind=999) + bytes(64)),
    ("half a block", header(n_tensors=1) + tensor(b"t", [16], kind=8) + bytes(64)),
    ("a tensor twice", header(n_tensors=2) + tensor(b"t", [4]) * 2 + bytes(128)),
    ("alignment zero", header(n_keys=1) + key(b"general.alignment", 4) + bytes(64)),
])
def test_hostile_headers_are_one_clear_error(tmp_path, what, data):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelFileError) as caught:
        read_gguf(path)
    assert "bad.gguf" in str(caught.value), what
    assert "\n" not in str(caught.value), what


def test_a_missing_file_or_folder_is_one_clear_error(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelFileError, match="cannot be read"):
            read_gguf(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bytes_never_crash_the_reader(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    sample = folder / "sample.gguf"
    if not sample.exists():
        write_sample(sample, words=["a", "b"], numbers=[1, 2])
    damaged = bytearray(sample.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        file = read_gguf(path)
    except ModelFileError as error:
        assert "\n" not in str(error)
    else:
        assert all(t.offset + t.nbytes <= len(damaged) for t in file.tensors.values())
