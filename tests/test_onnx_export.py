"""pytest tests/test_onnx_export.py: an ONNX folder appears whole or not at all, and a damaged one is refused."""
from __future__ import annotations

import errno
import json
import os
import shutil

import numpy as np
import onnx
import pytest
from golden import TINY, W8ASPIKE, truncate
from tiny import write_tiny_checkpoint

from sbedge.checkpoint import Checkpoint
from sbedge.errors import ExportError, ModelFileError
from sbedge.export.onnx import graph, ops, write_onnx
from sbedge.export.onnx.weights import DataFile
from sbedge.runtime import onnx_folder
from sbedge.runtime.onnx_engine import OnnxEngine


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "m"
    write_onnx(Checkpoint(TINY), folder, quant="int4")
    return folder


@pytest.fixture
def model(exported, tmp_path):
    """A copy of an exported folder, to be damaged."""
    return shutil.copytree(exported, tmp_path / "m")


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_graph(folder, edit):
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def refused(folder, match):
    with pytest.raises(ModelFileError, match=match) as error:
        OnnxEngine(folder)
    assert "\n" not in str(error.value)


# --- what an export holds ------------------------------------------------------------------------
@pytest.mark.parametrize("quant", ["f32", "int8", "int4"])
@pytest.mark.parametrize("w8aspike", [False, True])
def test_exported_graphs_pass_the_full_checker(quant, w8aspike, tmp_path):
    if w8aspike and quant == "int4":
        pytest.skip("int4 is refused for W8ASpike checkpoints, which has a test of its own")
    write_onnx(Checkpoint(write_tiny_checkpoint(tmp_path / "c", w8aspike=w8aspike)), tmp_path / "m", quant=quant)
    onnx.checker.check_model(str(tmp_path / "m/model.onnx"), full_check=True)


def test_every_op_of_ours_has_a_body_of_standard_and_com_microsoft_ops():
    bodies = {function.name: function for function in ops.functions()}
    assert set(bodies) == {"SpikeEncode", "SpikeLinear", "SpikeLinearPair", "SpikeLinearTriple", "SpikeLinear4",
                           "SpikeLinear4Pair", "SpikeLinear4Triple", "GatedLinearAttention", "RotaryAngles",
                           "SlidingWindowAttention", "SpikingWindowAttention"}
    for body in bodies.values():
        for node in body.node:
            assert node.domain in ("", "com.microsoft") or (node.domain == ops.DOMAIN and node.op_type in bodies)


def test_the_folder_says_where_it_comes_from(exported):
    block = json.loads((exported / "config.json").read_text())["sbedge"]
    checkpoint = Checkpoint(TINY)
    assert block["source"] == checkpoint.fingerprint
    assert block["quantization"] == {"linear": "int4", "embedding": "int8"}
    assert onnx_folder.read_config(exported / "config.json") == checkpoint.config
    genai = json.loads((exported / "genai_config.json").read_text())["model"]
    names = {value.name for value in onnx.load(exported / "model.onnx", load_external_data=False).graph.input}
    assert genai["decoder"]["inputs"]["past_key_names"] % 1 in names
    assert genai["decoder"]["inputs"]["past_recurrent_names"] % 0 in names
    assert sorted(p.name for p in exported.iterdir()) == [
        "config.json", "genai_config.json", "model.onnx", "model.onnx.data"]


def test_tokenizer_files_come_along(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "c")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    (folder / "notes.txt").write_text("mine")
    write_onnx(Checkpoint(folder), tmp_path / "m", quant="f32")
    assert (tmp_path / "m/tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "m/notes.txt").exists()


def test_writer_and_reader_agree_on_names_and_versions():
    assert graph.io_names is onnx_folder.io_names
    assert graph.io_names("3.recurrent_state") == ("past.3.recurrent", "present.3.recurrent")
    assert graph.io_names("12.keys") == ("past_key_values.12.key", "present.12.key")
    assert graph.io_names("12.value_scales") == ("past_key_values.12.value_scale", "present.12.value_scale")
    assert (ops.DOMAIN, ops.VERSION) == (onnx_folder.DOMAIN, onnx_folder.VERSION)


def test_tied_embeddings_are_stored_once(tmp_path):
    sizes = {}
    for tied in (False, True):
        folder = write_tiny_checkpoint(tmp_path / f"c{tied}", tie_word_embeddings=tied, vocab_size=4096)
        write_onnx(Checkpoint(folder), tmp_path / f"m{tied}", quant="int4", embedding_quant="int8")
        sizes[tied] = (tmp_path / f"m{tied}/model.onnx.data").stat().st_size
    assert sizes[False] - sizes[True] >= 4096 * 64


def test_progress_counts_every_byte_of_the_source(tmp_path):
    seen: list[tuple[int, int, str]] = []
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "c", dtype="BF16"))
    for quant in ("f32", "int4"):
        seen.clear()
        write_onnx(checkpoint, tmp_path / quant, quant=quant, progress=lambda *step: seen.append(step))
        done, total, names = zip(*seen, strict=True)
        assert list(done) == sorted(done) and done[-1] == total[-1]
        assert set(names) == set(checkpoint.names())
        assert total[0] == sum(checkpoint.raw(name).nbytes for name in checkpoint.names())


# --- what an export refuses, and what it leaves behind -------------------------------------------
def test_an_existing_folder_is_kept_unless_forced(tmp_path):
    checkpoint = Checkpoint(TINY)
    write_onnx(checkpoint, tmp_path / "m", quant="f32")
    with pytest.raises(ExportError, match=r"already exists.*--force"):
        write_onnx(checkpoint, tmp_path / "m", quant="int8")
    assert json.loads((tmp_path / "m/config.json").read_text())["sbedge"]["quantization"]["linear"] == "f32"
    write_onnx(checkpoint, tmp_path / "m", quant="int8", force=True)
    assert json.loads((tmp_path / "m/config.json").read_text())["sbedge"]["quantization"]["linear"] == "int8"
    assert os.listdir(tmp_path) == ["m"]


def test_force_never_replaces_what_is_no_export(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("meow")
    (tmp_path / "file").write_text("mine")
    for name in ("photos", "file"):
        with pytest.raises(ExportError, match="not an ONNX folder"):
            write_onnx(Checkpoint(TINY), tmp_path / name, quant="f32", force=True)
    assert (tmp_path / "photos/cat.jpg").exists() and sorted(os.listdir(tmp_path)) == ["file", "photos"]


@pytest.mark.parametrize(("options", "match"), [
    ({"quant": "q4_0"}, "quant is 'q4_0', expected one of f32, int8, int4"),
    ({"quant": "int8", "embedding_quant": "f16"}, "embedding_quant is 'f16'")])
def test_unknown_forms_are_refused(options, match, tmp_path):
    with pytest.raises(ExportError, match=match):
        write_onnx(Checkpoint(TINY), tmp_path / "m", **options)


def test_int4_of_w8aspike_is_refused_naming_what_works(tmp_path):
    with pytest.raises(ExportError, match="int8 or f32"):
        write_onnx(Checkpoint(W8ASPIKE), tmp_path / "m", quant="int4")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("force", [False, True])
def test_an_interrupted_export_leaves_nothing_and_keeps_what_was_there(interruption, force, tmp_path, monkeypatch):
    checkpoint = Checkpoint(TINY)
    if force:
        write_onnx(checkpoint, tmp_path / "m", quant="f32")
    append, calls = DataFile.append, []

    def failing(self, *arguments):
        calls.append(arguments)
        if len(calls) > 5:
            raise interruption
        return append(self, *arguments)

    monkeypatch.setattr(DataFile, "append", failing)
    expected = KeyboardInterrupt if isinstance(interruption, KeyboardInterrupt) else ExportError
    with pytest.raises(expected) as error:
        write_onnx(checkpoint, tmp_path / "m", quant="int8", force=force)
    if expected is ExportError:
        assert "No space left on device" in str(error.value)
    assert os.listdir(tmp_path) == (["m"] if force else [])
    if force:
        OnnxEngine(tmp_path / "m").forward([1], OnnxEngine(tmp_path / "m").new_state())


def test_a_failed_replacement_puts_the_old_folder_back(tmp_path, monkeypatch):
    write_onnx(Checkpoint(TINY), tmp_path / "m", quant="f32")
    rename = type(tmp_path).rename

    def failing(self, target):
        if self.name.startswith(".m.") and target.name == "m":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing)
    with pytest.raises(ExportError, match="Input/output error"):
        write_onnx(Checkpoint(TINY), tmp_path / "m", quant="int8", force=True)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["m"]
    OnnxEngine(tmp_path / "m")


# --- damaged folders -----------------------------------------------------------------------------
def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "none", "no such folder")


@pytest.mark.parametrize("name", ["config.json", "model.onnx", "model.onnx.data"])
def test_missing_files_are_named(model, name):
    (model / name).unlink()
    refused(model, f"{name}: (cannot be read|missing)")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(model, text):
    (model / "config.json").write_text(text)
    refused(model, "config.json: (not valid JSON|expected a JSON object)")


def test_a_config_without_our_block_is_refused(model):
    shutil.copyfile(TINY / "config.json", model / "config.json")
    refused(model, "no 'sbedge' block")


@pytest.mark.parametrize(("changes", "match"), [
    ({"hidden_size": -1}, "hidden_size is -1"),
    ({"num_hidden_layers": 1 << 23, "attn_layers": []}, "absurd sizes"),
    ({"sliding_window": 1 << 24, "hidden_size": 1 << 24}, "absurd sizes|asks for"),
    ({"sliding_window": 17}, "do not belong together"),
    ({"attn_layers": [0]}, "do not belong together"),
    ({"vocab_size": 999}, "output logits"),
    ({"int8_window": True}, "do not belong together")])
def test_a_config_of_another_model_is_refused(model, changes, match):
    block = json.loads((model / "config.json").read_text())["sbedge"]
    edit_json(model / "config.json", sbedge={**block, "config": {**block["config"], **changes}})
    refused(model, match)


@pytest.mark.parametrize("damage", [
    lambda path: truncate(path), lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"\xff" * 1000)])
def test_a_damaged_graph_is_refused(model, damage):
    damage(model / "model.onnx")
    refused(model, "model.onnx")


@pytest.mark.parametrize("name", [b"logits_to_keep", b"model.onnx.data"])
def test_names_that_are_no_text_are_refused(model, name):
    path = model / "model.onnx"
    path.write_bytes(path.read_bytes().replace(name, name[:-1] + b"\xff"))
    refused(model, "model.onnx")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_truncated_data_is_refused_before_it_is_read(model, share):
    truncate(model / "model.onnx.data", share)
    refused(model, "truncated: tensor .* needs bytes")


@pytest.mark.parametrize("location", ["../model.onnx.data", "/etc/passwd", "", "..", "sub/x"])
def test_data_outside_the_folder_is_refused(model, location):
    def edit(proto):
        tensor = next(t for t in proto.graph.initializer if t.external_data)
        tensor.external_data[0].value = location
    edit_graph(model, edit)
    refused(model, "expected a plain file name")


def test_data_outside_the_folder_is_found_in_function_bodies_too(model):
    def edit(proto):
        nodes = (node for function in proto.functions for node in function.node)
        tensor = next(a.t for node in nodes for a in node.attribute if a.HasField("t"))
        tensor.ClearField("float_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="/etc/passwd")
    edit_graph(model, edit)
    refused(model, "expected a plain file name")


@pytest.mark.parametrize("entry", [("offset", "-4096"), ("offset", "x"), ("length", "1"), ("length", "99999999999")])
def test_wrong_offsets_and_lengths_are_refused(model, entry):
    def edit(proto):
        tensor = next(t for t in proto.graph.initializer if t.external_data)
        next(e for e in tensor.external_data if e.key == entry[0]).value = entry[1]
    edit_graph(model, edit)
    refused(model, "tensor .* (has|needs)")


def test_a_foreign_model_and_a_newer_one_are_told_apart(model):
    def newer(proto):
        next(o for o in proto.opset_import if o.domain == ops.DOMAIN).version = 7
    edit_graph(model, newer)
    refused(model, "version 7 of the op set ai.sbedge.*update sbedge")

    def foreign(proto):
        del proto.opset_import[:]
    edit_graph(model, foreign)
    refused(model, "does not use the op set")


def test_what_onnxruntime_refuses_is_reported_in_one_line(model):
    edit_graph(model, lambda proto: proto.graph.node[3].input.__setitem__(0, "nowhere"))
    refused(model, "onnxruntime .* cannot load it")


def test_the_data_file_may_be_cut_anywhere_without_a_crash(model):
    data = (model / "model.onnx.data").read_bytes()
    for size in np.linspace(0, len(data) - 1, 7).astype(int):
        (model / "model.onnx.data").write_bytes(data[:size])
        refused(model, "truncated")


def test_errors_of_the_file_system_name_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="file"):
        write_onnx(Checkpoint(TINY), tmp_path / "file/m", quant="f32")


