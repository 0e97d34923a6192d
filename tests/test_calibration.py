"""pytest tests/test_calibration.py: a calibrated export computes what the reference does with the weights, k and dead
zones it states; the same text gives the same file; what cannot be calibrated is refused in one line."""
from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from compare import assert_same_spiking, run
from golden import W8ASPIKE, add_tokenizer, edit_tensors
from tiny import write_tiny_checkpoint

from sbedge.apps.cli import main
from sbedge.checkpoint import Checkpoint
from sbedge.config import INPUT_KINDS
from sbedge.errors import ExportError
from sbedge.export import export_model
from sbedge.export.activations import Layers, Samples
from sbedge.export.calibration import Calibration, Limits, exact_logits, split_text
from sbedge.export.grids import bytes_beside
from sbedge.export.spikes import Spikes
from sbedge.reference import Reference
from sbedge.runtime.load import open_engine
from sbedge.runtime.model_weights import open_weights

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
IDS = np.random.default_rng(1).integers(0, 128, (12, 24))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("c") / "c", **SIZES)


def out_name(format):
    return "m.gguf" if format == "gguf" else "m"


def opened(checkpoint, model):
    """The engine of an export, and the reference over the weights and config that the file holds."""
    weights = open_weights(model)
    return open_engine(model), Reference(Checkpoint(checkpoint), config=weights.config, weight=weights.__getitem__)


# --- what is seen --------------------------------------------------------------------------------
@pytest.mark.parametrize("sizes", [SIZES, {"num_attention_heads": 8, "num_key_value_heads": 2}, {"sliding_window": 5}])
def test_samples_run_together_as_each_does_in_the_reference(sizes, tmp_path):
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "c", **sizes))
    reference = Reference(checkpoint)
    expected = np.stack([run(reference, ids)[0] for ids in IDS[:3]])
    np.testing.assert_allclose(exact_logits(checkpoint, IDS[:3]), expected, atol=2e-4)


def test_folded_layers_are_the_same_function(folder):
    checkpoint = Checkpoint(folder)
    layers, plain = Layers(checkpoint), Reference(checkpoint).weights
    h = np.random.default_rng(0).standard_normal((2, 9, checkpoint.config.hidden_size)).astype(np.float32)
    for i in range(checkpoint.config.num_hidden_layers):
        for last in ("attention out", "FFN down"):
            found, expected = (Samples(checkpoint.config, w).half(i, last, h) for w in (layers[i], plain))
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_end_of_a_text_is_held_out():
    ids = np.arange(20_000)
    samples, held_out = split_text(ids, "text")
    assert samples.shape == (128, 128) and samples.max() < held_out.min() == 20_000 - 1024
    assert samples.min() == 0 and held_out.max() == 19_999
    samples, held_out = split_text(ids[:1024], "text")
    assert samples.shape == (7, 128) and held_out.shape == (1, 128)


# --- what is written -----------------------------------------------------------------------------
@pytest.mark.parametrize(("format", "quant"), [
    ("gguf", "w8-spike"), ("gguf", "w4-spike"), ("gguf", "q8_0"), ("gguf", "q4_0"),
    ("onnx", "w8-spike"), ("onnx", "w4-spike"), ("onnx", "int8"), ("onnx", "int4")])
def test_a_calibrated_export_computes_what_the_reference_does_with_what_it_states(format, quant, folder, tmp_path):
    model = tmp_path / out_name(format)
    spiking = quant.endswith("-spike")
    export_model(folder, model, format=format, quant=quant, embedding_quant="f32",
                 calibration=Calibration(IDS, Limits(skip=0.4 if spiking else None)))
    engine, expected = opened(folder, model)
    if not spiking:     # the engines round activations to 8 bit beside such weights
        ids = IDS[0]
        assert np.abs(run(engine, ids)[0] - run(expected, ids)[0]).max() < 0.15
        return
    layers = engine.config.num_hidden_layers
    assert len(engine.config.input_dead_zone) == len(engine.config.input_spike_k) == layers * len(INPUT_KINDS)
    assert len(set(engine.config.input_dead_zone)) > 4
    assert_same_spiking(expected, engine)
    assert_same_spiking(expected, engine, [1] * 16)


@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_k_and_dead_zone_differ_by_layer_and_kind_in_every_engine(format, folder, tmp_path, monkeypatch):
    config = Checkpoint(folder).config
    count = config.num_hidden_layers * len(INPUT_KINDS)
    stated = {"input_spike_k": tuple(2.0 + i for i in range(count)),
              "input_dead_zone": tuple(0.0625 * (i % 7) for i in range(count))}
    writer = f"sbedge.export.{'gguf.writer' if format == 'gguf' else 'onnx'}.exported_config"
    monkeypatch.setattr(writer, lambda *_: replace(config, spike_k=3.0, spike_down=True, **stated))
    export_model(folder, tmp_path / out_name(format), format=format, quant="w8-spike", embedding_quant="f32")
    engine, expected = opened(folder, tmp_path / out_name(format))
    assert {key: getattr(engine.config, key) for key in stated} == stated
    assert_same_spiking(expected, engine)
    monkeypatch.setenv("SBEDGE_NATIVE", "0")
    from sbedge.runtime.native.library import load_native
    load_native.cache_clear()
    try:
        assert_same_spiking(expected, open_engine(tmp_path / out_name(format)))
    finally:
        load_native.cache_clear()


@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_the_same_text_gives_the_same_file(format, folder, tmp_path):
    files = []
    for name in "ab":
        (tmp_path / name).mkdir()
        export_model(folder, tmp_path / name / out_name(format), format=format, quant="w4-spike",
                     calibration=Calibration(IDS, Limits(skip=0.3)))
        written = tmp_path / name / out_name(format)
        files.append([f.read_bytes() for f in sorted(written.rglob("*") if written.is_dir() else [written])])
        assert [p.name for p in (tmp_path / name).iterdir()] == [written.name]      # nothing is left beside it
    assert files[0] == files[1]


def test_calibration_keeps_the_fingerprint_so_states_go_on(folder, tmp_path):
    export_model(folder, tmp_path / "m.gguf", quant="w8-spike", calibration=Calibration(IDS))
    export_model(folder, tmp_path / "plain.gguf", quant="f32")
    calibrated, plain = (open_engine(tmp_path / name) for name in ("m.gguf", "plain.gguf"))
    assert calibrated.fingerprint == plain.fingerprint == Checkpoint(folder).fingerprint
    state = plain.new_state()
    plain.forward(IDS[0], state)
    assert calibrated.forward([1, 2], state).shape == (1, 128)


@pytest.mark.parametrize("quant", ["w4-spike", "q4_0"])
def test_calibration_brings_predictions_closer_than_rounding(quant, folder, tmp_path):
    checkpoint, held_out = Checkpoint(folder), np.random.default_rng(5).integers(0, 128, (4, 24))
    exact, errors = exact_logits(checkpoint, held_out), []
    spikes = Spikes(k=8) if quant.endswith("-spike") else None
    for calibration in (None, Calibration(np.random.default_rng(2).integers(0, 128, (64, 24)))):
        model = tmp_path / f"{calibration is None}.gguf"
        export_model(checkpoint, model, quant=quant, spikes=spikes, embedding_quant="f32", calibration=calibration)
        engine = open_engine(model)
        errors.append(np.square(np.stack([run(engine, ids)[0] for ids in held_out]) - exact).mean())
    assert errors[1] < 0.8 * errors[0]


# --- what is refused -----------------------------------------------------------------------------
@pytest.mark.parametrize(("quant", "skip", "match"), [
    ("f32", None, "f32 has nothing to calibrate; choose one of w8-spike"),
    ("f16", None, "f16 has nothing to calibrate"),
    ("q4_k", None, "q4_k has nothing to calibrate"),
    ("q4_0", 0.4, "q4_0 has no silent channels to skip; choose w8-spike"),
    ("w8-spike", 0.95, "share to skip is 0.95, expected more than 0 and up to 0.9")])
def test_what_cannot_be_calibrated_is_refused(quant, skip, match, folder, tmp_path):
    with pytest.raises(ExportError, match=match) as error:
        export_model(folder, tmp_path / "m.gguf", quant=quant, calibration=Calibration(IDS, Limits(skip=skip)))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_w8aspike_checkpoint_is_refused(tmp_path):
    with pytest.raises(ExportError, match="has its codes already, and they are kept exactly"):
        export_model(W8ASPIKE, tmp_path / "m.gguf", quant="w8-spike", calibration=Calibration(IDS))


@pytest.mark.parametrize("count", [0, 1, 1023])
def test_a_text_too_short_is_refused(count):
    with pytest.raises(ExportError, match=f"text.txt: {count} tokens, expected at least 1024 to calibrate with"):
        split_text(np.zeros(count, np.int64), "text.txt")


@pytest.mark.parametrize(("options", "match"), [
    (["--skip", "0.4"], "add --calibrate TEXT"),
    (["--calibrate", "none.txt"], "none.txt"),
    (["--calibrate", "text.txt", "--quant", "w8-spike"], "has no tokenizer, which --calibrate needs"),
    (["--calibrate", "text.txt", "--skip", "0.4", "--dead-zone", "0.3"], "leave --dead-zone out")])
def test_the_command_refuses_in_one_line(options, match, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some words " * 1000)
    assert main(["export", str(folder), "-o", "m.gguf", *options]) == 2
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1


def test_inspect_tells_that_an_export_is_calibrated(folder, tmp_path, capsys):
    export_model(folder, tmp_path / "m.gguf", quant="w4-spike", calibration=Calibration(IDS, Limits(skip=0.3)))
    assert main(["inspect", str(tmp_path / "m.gguf"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert "calibrated" in json.dumps(shown["source"]) and len(shown["config"]["input_dead_zone"]) == 8
    assert main(["inspect", str(tmp_path / "m.gguf")]) == 0
    assert "dead zones 0" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_the_command_shows_what_calibration_did(format, tmp_path, capsys):
    checkpoint = add_tokenizer(write_tiny_checkpoint(tmp_path / "c", vocab_size=260, **SIZES))
    (tmp_path / "text.txt").write_text("a neuron that kept silent, once upon a time. " * 60)
    command = ["export", str(checkpoint), "-o", str(tmp_path / out_name(format)), "--quant", "w8-spike", "--calibrate",
               str(tmp_path / "text.txt"), "--skip", "0.4"]
    assert main([*command, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["calibration"]
    assert table["tokens"] >= 127 and table["float32"]["perplexity"] > 1
    assert table["rounded"]["bytes"] == pytest.approx(table["calibrated"]["bytes"], rel=0.05)
    assert main([*command, "--force"]) == 0
    shown = capsys.readouterr().out
    assert "float32" in shown and "rounded" in shown and "calibrated" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["c", "text.txt", out_name(format)])


def test_what_an_export_refuses_is_refused_before_calibrating(folder, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("hours of work for nothing")

    monkeypatch.setattr("sbedge.export.calibrated", never)
    for options, line in (({"embedding_quant": "nope"}, "'nope'"), ({"embedding_quant": "w8-spike"}, "w8-spike"),
                          ({"format": "onnx", "embedding_quant": "q8_0"}, "q8_0")):
        with pytest.raises(ExportError, match=line):
            export_model(folder, tmp_path / "out.gguf", **{"format": "gguf", **options}, quant="w8-spike",
                         calibration=Calibration(IDS))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_weight_is_named(tmp_path):
    damaged = write_tiny_checkpoint(tmp_path / "c", **SIZES)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = Checkpoint(damaged).weight(name).copy()
    weight[3, 5] = np.nan
    edit_tensors(damaged, remove=name, add={name: weight})
    with pytest.raises(ExportError, match="cannot be calibrated") as error:
        export_model(damaged, tmp_path / "m.gguf", quant="w8-spike", calibration=Calibration(IDS))
    assert "\n" not in str(error.value) and not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(("width", "embedding_quant", "same"), [
    (128, "q6_k", "q8_0"), (48, "q8_0", "f16"), (48, "q4_0", "f16"), (256, "q6_k", None)])
def test_what_lm_head_reads_is_counted_in_the_type_it_is_stored_in(width, embedding_quant, same, tmp_path):
    """Of a width that is no multiple of a type's block it is another type."""
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "c", hidden_size=width, intermediate_size=128))
    found = bytes_beside(checkpoint, "w8-spike", embedding_quant)
    if same:
        assert found == bytes_beside(checkpoint, "w8-spike", same)
    else:
        assert found < bytes_beside(checkpoint, "w8-spike", "q8_0")
