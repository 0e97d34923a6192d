"""pytest tests/test_onnx_spikes.py: w8-spike and w4-spike exports compute what the reference does, with our kernels and
without, and count what they read."""
from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from compare import assert_close, assert_same_model, assert_same_spiking, run
from golden import FOLDERS, TINY, W8ASPIKE
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny_checkpoint

from sbedge.checkpoint import Checkpoint
from sbedge.errors import ExportError, ModelFileError
from sbedge.export import export_model
from sbedge.export.onnx import MAX_COUNT, write_onnx
from sbedge.export.onnx.events import stripe_width
from sbedge.export.spikes import Spikes, event_weight, exported_config
from sbedge.reference import Reference
from sbedge.runtime import onnx_engine
from sbedge.runtime.native.library import load_native
from sbedge.runtime.onnx_engine import OnnxEngine

LIBRARY = load_native()
needs_library = pytest.mark.skipif(LIBRARY is None, reason="libsbedge is not built here")
WITH_AND_WITHOUT = [pytest.param(True, marks=needs_library, id="kernels"), pytest.param(False, id="bodies")]
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
ODD = {"hidden_size": 6 * 24, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 300}


@pytest.fixture(params=WITH_AND_WITHOUT)
def native(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(onnx_engine, "load_native", lambda: None)
    return request.param


def export(folder, out, quant, **options):
    write_onnx(Checkpoint(folder), out, quant=quant, **options)
    return OnnxEngine(out, threads=2)


def reference(folder, quant, config):
    checkpoint = Checkpoint(folder)
    return Reference(checkpoint, config=config, weight=lambda name: event_weight(checkpoint, name, quant))


def ids_of(config, count, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, count)


def op_types(folder):
    return {node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node}


@pytest.mark.parametrize(("sizes", "quant", "spikes", "op"), [
    ({}, "w8-spike", None, "SpikeLinear"), (WIDE, "w8-spike", Spikes(k=4, dead_zone=0.3), "SpikeLinear"),
    (ODD, "w8-spike", None, "SpikeLinear"), (WIDE, "w4-spike", Spikes(k=4), "SpikeLinear4"),
    ({}, "w4-spike", Spikes(dead_zone=0.3), "SpikeLinear4"), (ODD, "w4-spike", None, "SpikeLinear")])
def test_a_base_checkpoint_exported_with_spikes_follows_the_reference(sizes, quant, spikes, op, native, tmp_path):
    """Widths that are no multiple of 128 included; those that 4 bits cannot take are stored in 8."""
    folder = write_tiny_checkpoint(tmp_path / "c", **sizes)
    engine = export(folder, tmp_path / "m", quant, spikes=spikes, embedding_quant="f32")
    assert engine.config == exported_config(Checkpoint(folder), quant, spikes)
    assert engine.config.spike_down and op in op_types(tmp_path / "m")
    expected = reference(folder, quant, engine.config)
    assert_same_spiking(expected, engine)
    assert_same_spiking(expected, engine, [1] * 16)


def test_a_w8aspike_checkpoint_goes_to_w8_spike_without_loss(native, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "c", w8aspike=True)
    engine = export(folder, tmp_path / "m", "w8-spike")
    ids = ids_of(engine.config, 60)
    assert_same_model(run(Reference(folder), ids)[0], run(engine, ids, [20, 1, 1, 1])[0])
    assert engine.config == Checkpoint(folder).config


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_published_logits_are_matched(folder, native, tmp_path):
    golden = np.load(folder / "expected.npz")
    spiking = Checkpoint(folder).is_w8aspike
    engine = export(folder, tmp_path / "m", "w8-spike" if spiking else "f32", embedding_quant="f32")
    same = assert_same_model if spiking else assert_close
    same(golden["logits_full"], run(engine, golden["input_ids"])[0], 1e-3)
    streamed, _ = run(engine, golden["input_ids"], [int(golden["prefill_len"])] + [1] * 1000)
    same(golden["logits_stream"], streamed, 1e-3)


@pytest.mark.parametrize(("quant", "w8aspike"), [("int8", True), ("w8-spike", True), ("w8-spike", False),
                                                 ("w4-spike", False)])
def test_spiking_graphs_pass_the_full_checker(quant, w8aspike, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "c", w8aspike=w8aspike)
    write_onnx(Checkpoint(folder), tmp_path / "m", quant=quant, spikes=None if w8aspike else Spikes(dead_zone=0.2))
    onnx.checker.check_model(str(tmp_path / "m/model.onnx"), full_check=True)


# --- with and without kernels --------------------------------------------------------------------
@pytest.fixture(scope="module", params=["plain", "w8aspike", "w8-spike", "w4-spike"])
def twins(request, tmp_path_factory):
    """One model on our kernels and on bodies."""
    if LIBRARY is None:
        pytest.skip("libsbedge is not built here")
    out = tmp_path_factory.mktemp("twins")
    folder = write_tiny_checkpoint(out / "c", w8aspike=request.param == "w8aspike", num_hidden_layers=3)
    quant = {"plain": "f32", "w8aspike": "int8"}.get(request.param, request.param)
    kernels = export(folder, out / "m", quant, embedding_quant="f32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_engine, "load_native", lambda: None)
        bodies = OnnxEngine(out / "m", threads=1)
    assert kernels.traffic is not None and bodies.traffic is None
    return kernels, bodies, assert_close if request.param == "plain" else assert_same_model


def test_every_instruction_set_gives_the_same_model(twins):
    kernels, bodies, same = twins
    best = LIBRARY.isa()
    ids = ids_of(kernels.config, 50)
    expected, _ = run(bodies, ids)
    for name in (b"scalar", b"avx2", b"avxvnni", b"avx512vnni", b"neon"):
        if LIBRARY.set_isa(name) == 0:
            found = [run(kernels, ids)[0], run(kernels, ids, [20, 1, 1])[0]]
            LIBRARY.set_isa(best)
            for logits in found:
                same(expected, logits, 1e-4)


@given(sizes=st.lists(st.integers(1, 40), max_size=8))
@settings(max_examples=10, deadline=None)
def test_any_chunking_gives_the_same_logits_and_state(twins, sizes):
    kernels, _, same = twins
    ids = ids_of(kernels.config, 60)
    whole, state = run(kernels, ids)
    chunked, other = run(kernels, ids, sizes)
    same(whole, chunked, 1e-4)
    assert other.position == state.position == 60


def test_a_state_moves_between_kernels_and_bodies(twins):
    kernels, bodies, same = twins
    ids = ids_of(kernels.config, 60)
    expected, _ = run(bodies, ids)
    for first, second in ((kernels, bodies), (bodies, kernels)):
        _, state = run(first, ids[:23])
        same(expected[23:], run(second, ids[23:], [5], state)[0], 1e-4)


def test_any_position_gives_the_same_model(twins):
    kernels, bodies, same = twins
    _, begun = run(bodies, ids_of(bodies.config, 45))
    begun.position = 10_000_000
    texts = [ids_of(bodies.config, 8, seed) for seed in range(6)]
    expected, found = ([run(e, ids, [5, 1], begun.copy())[0] for ids in texts] for e in (bodies, kernels))
    same(np.concatenate(expected), np.concatenate(found), 1e-4)


def test_the_first_form_of_an_int8_export_runs_on_the_kernels(native, tmp_path, monkeypatch):
    """Codes [K/128, 128, N], as exported before there were stripes."""
    folder = write_tiny_checkpoint(tmp_path / "c", w8aspike=True, num_hidden_layers=2)
    write_onnx(Checkpoint(folder), tmp_path / "m", quant="int8")
    model = onnx.load(tmp_path / "m/model.onnx", load_external_data=False)
    codes = [tensor for tensor in model.graph.initializer if tensor.name.endswith(".codes")]
    for tensor in codes:
        assert tensor.dims[0] == 1      # one stripe, so that the bytes are the same
        del tensor.dims[0]
    (tmp_path / "m/model.onnx").write_bytes(model.SerializeToString())
    engine = OnnxEngine(tmp_path / "m", threads=2)
    ids = ids_of(engine.config, 40)
    assert len(codes) > 8 and bool(engine.traffic) == native
    assert_same_model(run(Reference(folder), ids)[0], run(engine, ids, [9, 1, 1])[0])


# --- what was read -------------------------------------------------------------------------------
@needs_library
@pytest.mark.parametrize("quant", ["w8-spike", "w4-spike"])
def test_the_traffic_counts_the_bytes_that_silence_saved(quant, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "c", **WIDE)
    engines = [export(folder, tmp_path / str(zone), quant, spikes=Spikes(dead_zone=zone)) for zone in (0.0, 0.6)]
    checkpoint = Checkpoint(folder)
    weights = sum(np.prod(checkpoint.shapes[name]) for name in checkpoint.names()
                  if name.endswith("_proj.weight") and ".gk_proj" not in name)
    shares = []
    for engine in engines:
        assert engine.traffic.fetched == engine.traffic.dense == 0
        state = engine.new_state()
        for id in range(5):
            engine.forward([id], state)
        assert engine.traffic.dense == 5 * weights / (1 if quant == "w8-spike" else 2)
        shares.append(1 - engine.traffic.fetched / engine.traffic.dense)
    assert 0.05 < shares[0] < 0.3 and 0.3 < shares[1] < 0.6


# --- libraries that do not do --------------------------------------------------------------------
@needs_library
def test_a_library_that_onnxruntime_cannot_take_is_warned_of_and_the_bodies_run(tmp_path, monkeypatch):
    class Broken:
        path = tmp_path / "libsbedge.so"

    Broken.path.write_text("no library")
    monkeypatch.setattr(onnx_engine, "load_native", lambda: Broken)
    with pytest.warns(UserWarning, match=r"libsbedge.so: onnxruntime .* cannot use it .*composed operations") as caught:
        engine = export(TINY, tmp_path / "m", "f32")
    assert "\n" not in str(caught[0].message) and engine.traffic is None
    golden = np.load(TINY / "expected.npz")
    assert_close(golden["logits_full"], run(engine, golden["input_ids"])[0], 1e-3)


def test_without_the_library_the_same_folder_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SBEDGE_NATIVE", "0")
    load_native.cache_clear()
    try:
        engine = export(TINY, tmp_path / "m", "w4-spike")
        assert engine.traffic is None and engine.chunk < onnx_engine.NATIVE_CHUNK
        assert engine.forward([1, 2, 3], engine.new_state()).shape == (1, engine.config.vocab_size)
    finally:
        load_native.cache_clear()


@needs_library
def test_a_folder_whose_weights_do_not_fit_is_refused_in_one_line(tmp_path):
    write_onnx(Checkpoint(write_tiny_checkpoint(tmp_path / "c", w8aspike=True)), tmp_path / "m", quant="w8-spike")
    model = onnx.load(tmp_path / "m/model.onnx", load_external_data=False)
    codes = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("gate_proj.weight.codes"))
    assert codes.dims == [1, 1, 128, 256]
    codes.dims[:] = [1, 1, 256, 128]
    (tmp_path / "m/model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelFileError, match=r"cannot load it .*codes is") as error:
        OnnxEngine(tmp_path / "m")
    assert "\n" not in str(error.value)


def test_a_plain_onnxruntime_session_runs_a_spiking_model(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "c")
    engine = export(folder, tmp_path / "m", "w4-spike", embedding_quant="f32")
    session = ort.InferenceSession(tmp_path / "m/model.onnx")
    past = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs()[3:]}
    logits, *_ = session.run(None, {"input_ids": np.arange(9)[None], "position_ids": np.arange(9)[None],
                                    "logits_to_keep": np.array([9]), **past})
    assert_same_model(run(reference(folder, "w4-spike", engine.config), np.arange(9))[0], logits[0])


# --- exporting -----------------------------------------------------------------------------------
def test_the_folder_says_how_it_spikes(tmp_path):
    export_model(TINY, tmp_path / "m", quant="w8-spike", spikes=Spikes(k=5, dead_zone=0.25))
    block = json.loads((tmp_path / "m/config.json").read_text())["sbedge"]
    assert block["quantization"] == {"linear": "w8-spike", "embedding": "int8"} and block["spike_k"] == 5
    assert block["config"]["dead_zone"] == 0.25 and block["config"]["spike_down"] is True


@pytest.mark.parametrize(("folder", "quant", "spikes", "match"), [
    (TINY, "int8", Spikes(), "int8 has no spikes to set; choose w8-spike"),
    (W8ASPIKE, "w8-spike", Spikes(k=4), "trained with spike k 3, found 4"),
    (W8ASPIKE, "w4-spike", None, "8-bit weights, which w4-spike would lose")])
def test_spikes_that_an_export_cannot_have_are_refused(folder, quant, spikes, match, tmp_path):
    with pytest.raises(ExportError, match=match):
        write_onnx(Checkpoint(folder), tmp_path / "m", quant=quant, spikes=spikes)


def test_counts_that_take_three_digits_stay_exact(native, tmp_path):
    assert 1000 * Checkpoint(TINY).config.intermediate_size > MAX_COUNT
    engine = export(TINY, tmp_path / "m", "w8-spike", spikes=Spikes(k=1000), embedding_quant="f32")
    ids = ids_of(engine.config, 20)
    assert_same_model(run(reference(TINY, "w8-spike", engine.config), ids)[0], run(engine, ids)[0])


def test_counts_too_large_for_exact_sums_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sbedge.export.onnx.MAX_DIGITS_COUNT", 100)
    with pytest.raises(ExportError, match=r"spike k 3 allows spike counts beyond 100.*choose a smaller --spike-k"):
        write_onnx(Checkpoint(TINY), tmp_path / "m", quant="w8-spike")


def test_embeddings_have_no_spiking_form(tmp_path):
    with pytest.raises(ExportError, match="embedding_quant is 'w8-spike', expected one of f32, int8, int4"):
        write_onnx(Checkpoint(TINY), tmp_path / "m", quant="w8-spike", embedding_quant="w8-spike")


@pytest.mark.parametrize(("outputs", "width"), [
    (64, 64), (100, 100), (1024, 1024), (2048, 1024), (3584, 896), (18944, 512), (512, 512), (576, 576), (1088, 1088)])
def test_stripes_divide_the_outputs_evenly(outputs, width):
    assert stripe_width(outputs, 1024) == width
