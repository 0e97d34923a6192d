"""pytest tests/test_choices.py: a calibrated export keeps within its budget to the byte, uses it, and runs with formats
and ways to spike that differ from input to input; limits that cannot be kept are refused before any work is done."""
from __future__ import annotations

import json

import numpy as np
import pytest
from compare import assert_same_spiking, run
from golden import add_tokenizer
from tiny import write_tiny_checkpoint

from sbedge.apps.calibration_report import chosen_text
from sbedge.apps.cli import main
from sbedge.apps.files import size_of
from sbedge.apps.options import read_size
from sbedge.checkpoint import Checkpoint
from sbedge.config import INPUT_KINDS
from sbedge.errors import ExportError, InputError
from sbedge.export import QUANTS, export_model
from sbedge.export.activations import Layers
from sbedge.export.calibration import Calibration, Limits
from sbedge.export.gguf.writer import write_gguf
from sbedge.export.grids import grid_bytes, grid_of, linears_of
from sbedge.export.onnx import write_onnx
from sbedge.export.probes import FAST_COUNT, KS, RARE, measured
from sbedge.export.spikes import Spikes
from sbedge.quant.gptq import FINER
from sbedge.reference import Reference
from sbedge.runtime.load import open_engine
from sbedge.runtime.model_weights import open_weights

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
IDS = np.random.default_rng(1).integers(0, 128, (12, 24))
MIXED = [("gguf", "w4-spike"), ("gguf", "q4_0"), ("onnx", "w4-spike"), ("onnx", "int4")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("c") / "c", **SIZES)


def out_name(format):
    return "m.gguf" if format == "gguf" else "m"


def export(folder, out, format, quant, **limits):
    """The bytes of a calibrated export, and what was chosen for it."""
    chosen = export_model(folder, out, format=format, quant=quant, calibration=Calibration(IDS, Limits(**limits)),
                          embedding_quant="f32", force=True)
    return size_of(out), chosen


def assert_runs(folder, model, spiking):
    """It computes what the reference does with the weights and config that the file holds."""
    weights = open_weights(model)
    engine = open_engine(model)
    expected = Reference(Checkpoint(folder), config=weights.config, weight=weights.__getitem__)
    if spiking:
        assert_same_spiking(expected, engine)
        assert_same_spiking(expected, engine, [1] * 16)
    else:       # the engines round activations to 8 bit beside such weights
        assert np.abs(run(engine, IDS[0])[0] - run(expected, IDS[0])[0]).max() < 0.15


# --- bytes of the file -----------------------------------------------------------------------------
@pytest.mark.parametrize(("format", "quant"), [(format, quant) for format in QUANTS for quant in QUANTS[format]])
@pytest.mark.parametrize("tied", [False, True])
def test_a_dry_run_counts_every_byte(format, quant, tied, tmp_path):
    sizes = {"vocab_size": 260, "intermediate_size": 320, "hidden_size": 72, "tie_word_embeddings": tied}
    checkpoint = Checkpoint(add_tokenizer(write_tiny_checkpoint(tmp_path / "c", **sizes)))
    write = write_gguf if format == "gguf" else write_onnx
    counted = write(checkpoint, tmp_path / out_name(format), quant=quant, dry=True)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    written = write(checkpoint, tmp_path / out_name(format), quant=quant)
    assert counted == written == size_of(tmp_path / out_name(format))


@pytest.mark.parametrize(("format", "quant"), MIXED)
def test_a_budget_is_kept_and_used_and_the_file_runs(format, quant, folder, tmp_path):
    model, finer = tmp_path / out_name(format), FINER[quant]
    smallest, chosen = export(folder, model, format, quant)
    assert chosen["inputs"] == {quant: 8}
    largest, chosen = export(folder, model, format, quant, budget=1 << 40)      # more than there is to spend
    assert chosen["inputs"] == {finer: 8}
    assert_runs(folder, model, quant.endswith("-spike"))
    checkpoint = Checkpoint(folder)
    step = max(sum(sum(grid_bytes(checkpoint.shapes[n], grid_of(checkpoint, n, finer)))
                   - sum(grid_bytes(checkpoint.shapes[n], grid_of(checkpoint, n, quant))) for n in linears_of(0, kind))
               for kind in INPUT_KINDS)
    for budget in ((smallest + largest) // 2, largest - 1):
        found, chosen = export(folder, model, format, quant, budget=budget)
        assert budget - 2 * step < found <= budget
        assert set(chosen["inputs"]) == {quant, finer}
        assert_runs(folder, model, quant.endswith("-spike"))
    assert [path.name for path in tmp_path.iterdir()] == [model.name]


@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_the_linears_that_lose_most_are_kept_in_8_bits(format, folder, tmp_path, monkeypatch):
    loud = [(0, "FFN down"), (1, "attention in")]

    def stated(*args, **kwargs):
        inputs = measured(*args, **kwargs)
        for input in inputs:
            input.by_rounding = 1.0 if (input.layer, input.kind) in loud else 1e-3
        return inputs

    smallest = export(folder, tmp_path / "small", format, "w4-spike")[0]
    monkeypatch.setattr("sbedge.export.choices.measured", stated)
    model = tmp_path / out_name(format)
    export(folder, model, format, "w4-spike", budget=smallest + 40_000)
    weights, checkpoint = open_weights(model), Checkpoint(folder)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.attn.v_proj.weight"):
        assert len(np.unique(weights[name])) > 1000, name               # not 16 levels a group
    assert len(np.unique(weights["model.layers.0.mlp.gate_proj.weight"][0, :64])) <= 16
    assert checkpoint.fingerprint == open_engine(model).fingerprint


@pytest.mark.parametrize(("format", "quant"), MIXED)
def test_the_smallest_export_fits_and_less_is_refused_at_once(format, quant, folder, tmp_path, monkeypatch):
    model = tmp_path / out_name(format)
    smallest, _ = export(folder, model, format, quant)
    found, _ = export(folder, model, format, quant, budget=smallest + 800)
    assert found <= smallest + 800
    monkeypatch.setattr("sbedge.export.choices.measured", None)         # no work is done
    with pytest.raises(ExportError, match=rf"export in {quant} takes .* found a budget of {smallest - 400:,}; allow"):
        export(folder, model, format, quant, budget=smallest - 400)
    assert [path.name for path in tmp_path.iterdir()] == [model.name]


def test_a_budget_and_silence_go_together(folder, tmp_path):
    smallest, _ = export(folder, tmp_path / "m.gguf", "gguf", "w4-spike")
    found, chosen = export(folder, tmp_path / "m.gguf", "gguf", "w4-spike", budget=smallest + 40_000, skip=0.3)
    assert smallest < found <= smallest + 40_000 and len(chosen["inputs"]) == 2 and chosen["dead_zone"][1] > 0.2
    assert_runs(folder, tmp_path / "m.gguf", True)


# --- bytes read ------------------------------------------------------------------------------------
@pytest.mark.parametrize("quant", ["w4-spike", "w8-spike"])
@pytest.mark.parametrize("share", [0.9, 0.7])
def test_decoding_reads_what_it_may(quant, share, folder, tmp_path):
    model = tmp_path / "m.gguf"
    export(folder, model, "gguf", "w8-spike")
    engine = open_engine(model)
    beside = 4 * sum(np.prod(shape) for name, shape in Checkpoint(folder).shapes.items()
                     if name != "model.embeddings.weight" and grid_of(Checkpoint(folder), name, quant) is None)
    linears = sum(sum(grid_bytes(Checkpoint(folder).shapes[n], grid_of(Checkpoint(folder), n, quant)))
                  for i in range(2) for kind in INPUT_KINDS for n in linears_of(i, kind))
    limit = int(beside + share * linears)
    _, chosen = export(folder, model, "gguf", quant, read=limit)
    assert_runs(folder, model, True)
    engine, state = open_engine(model), None
    for ids in IDS:
        state = engine.new_state()
        for id in ids:
            engine.forward([int(id)], state)
    tokens = IDS.size
    held = sum(t.nbytes for t in engine._file.tensors.values() if t.name.endswith((".scales", ".zeros")))
    read = beside + held + engine.traffic.fetched / tokens
    assert 0.85 * limit < read < 1.05 * limit
    assert chosen["dead_zone"][1] > 0.05


# --- k ---------------------------------------------------------------------------------------------
def test_k_is_the_finest_whose_counts_are_small(folder):
    checkpoint = Checkpoint(folder)
    inputs = measured(checkpoint, Layers(checkpoint), "w8-spike", IDS, None, level=None, rounding=False)
    assert [(input.layer, input.kind) for input in inputs] == [(i, kind) for i in range(2) for kind in INPUT_KINDS]
    assert {input.k for input in inputs} <= set(KS) and max(input.k for input in inputs) > 8
    assert all(np.diff(input.silence.losses).min() >= 0 and input.by_rounding == 0 for input in inputs)
    loud = np.ones((1, 1000), np.float32)
    loud[0, :15] = 10                       # 1.5 % of the channels, nine times the mean
    from sbedge.export.probes import seen
    weights = {name: np.ones((2, 1000), np.float32) for name in linears_of(0, "attention in")}
    assert seen(0, "attention in", loud, weights).k == 32 and RARE == 0.02
    loud[0, :25] = 10                       # 2.5 %
    k = seen(0, "attention in", loud, weights).k
    assert 10 / loud.mean() * k <= FAST_COUNT < 10 / loud.mean() * KS[KS.index(k) + 1]


@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_spike_k_and_dead_zone_stay_what_they_were_set_to(format, folder, tmp_path):
    calibration = Calibration(IDS)
    for spikes, k, zone in ((None, None, 1 / 16), (Spikes(k=5), {5.0}, 1 / 16), (Spikes(dead_zone=0.25), None, 0.25)):
        export_model(folder, tmp_path / out_name(format), format=format, quant="w8-spike", spikes=spikes, force=True,
                     calibration=calibration)
        config = open_engine(tmp_path / out_name(format)).config
        assert config.dead_zone == zone and config.spike_k == max(config.input_spike_k)
        assert set(config.input_spike_k) == k if k else set(config.input_spike_k) <= set(KS)


def test_the_tensors_tried_are_the_models_own(folder):
    """With nothing tried the float32 model runs; what is tried loses something."""
    checkpoint = Checkpoint(folder)
    inputs = measured(checkpoint, Layers(checkpoint), "w4-spike", IDS, None, level=40, rounding=True)
    assert all(input.by_rounding > 0 and input.silence.losses[40] > 0 for input in inputs)
    finer = measured(checkpoint, Layers(checkpoint), "w8-spike", IDS, None, level=None, rounding=True)
    assert all(a.by_rounding / b.by_rounding > 8 for a, b in zip(inputs, finer, strict=True))


# --- what is refused -------------------------------------------------------------------------------
@pytest.mark.parametrize(("quant", "limits", "match"), [
    ("f16", {"budget": 10 ** 6}, "f16 has nothing to calibrate"),
    ("q8_0", {"budget": 10 ** 6}, "q8_0 has 8 bits already.*choose one of w4-spike, q4_0, int4"),
    ("w8-spike", {"budget": 10 ** 6}, "w8-spike has 8 bits already"),
    ("q4_0", {"read": 10 ** 6}, "q4_0 has no silent channels and reads what it stores; set a budget"),
    ("w4-spike", {"read": 1000}, "reads .* bytes a token at the most silence there is, found a limit of 1,000"),
    ("w4-spike", {"budget": 1000}, "smallest export in w4-spike takes .* found a budget of 1,000; allow more"),
    ("w4-spike", {"budget": 10 ** 6, "read": 1000}, "found a limit of 1,000")])
def test_limits_that_cannot_be_kept_are_refused(quant, limits, match, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sbedge.export.choices.measured", None)
    with pytest.raises(ExportError, match=match) as error:
        export_model(folder, tmp_path / "m.gguf", quant=quant, calibration=Calibration(IDS, Limits(**limits)))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "match"), [
    (["--budget", "1MB"], "--budget chooses by what a text shows; add --calibrate TEXT"),
    (["--read", "1MB"], "--read chooses by what a text shows; add --calibrate TEXT"),
    (["--quant", "w4-spike", "--calibrate", "short.txt", "--budget", "1XB"], "--budget '1XB': expected a size such as"),
    (["--quant", "w4-spike", "--calibrate", "short.txt", "--read", "-5"], "--read"),
    (["--quant", "w4-spike", "--calibrate", "short.txt", "--read", "1MB", "--skip", "0.2"], "leave one out"),
    (["--quant", "w4-spike", "--calibrate", "short.txt", "--read", "1MB", "--dead-zone", "1"], "leave --dead-zone out"),
    (["--quant", "f16", "--calibrate", "short.txt"], "f16 has nothing to calibrate"),      # not that the text is short
    (["--quant", "f32", "--calibrate", "none.txt"], "f32 has nothing to calibrate"),
    (["--quant", "q8_0", "--calibrate", "short.txt", "--budget", "1MB"], "q8_0 has 8 bits already"),
    (["--quant", "nonsense", "--calibrate", "short.txt"], "'nonsense' is not known for gguf")])
def test_the_command_refuses_in_one_line(options, match, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("some words")
    code = None
    try:
        code = main(["export", str(folder), "-o", "m.gguf", *options])
    except SystemExit as error:         # argparse
        code = error.code
    error = capsys.readouterr().err
    assert code == 2 and match in error
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(("text", "size"), [("100MB", 100_000_000), ("95.5MB", 95_500_000), ("4GB", 4 * 10 ** 9),
                                            ("123", 123), ("7 kB", 7000), ("1.5g", 1_500_000_000), ("12b", 12)])
def test_sizes(text, size):
    assert read_size(text, "--budget") == size and read_size(None, "--budget") is None


@pytest.mark.parametrize("text", ["", "MB", "0", "-1MB", "1 0MB", "1e6", "nan", "infGB", "1.MB", "1MiB", "1" * 40])
def test_no_sizes(text):
    with pytest.raises(InputError, match=r"--budget .*: expected a size such as 100MB, 4\.5GB or a number of bytes"):
        read_size(text, "--budget")


# --- what is told ----------------------------------------------------------------------------------
def test_the_command_tells_what_was_chosen(tmp_path, capsys):
    checkpoint = add_tokenizer(write_tiny_checkpoint(tmp_path / "c", vocab_size=260, **SIZES))
    (tmp_path / "text.txt").write_text("a neuron that kept silent, once upon a time. " * 60)
    command = ["export", str(checkpoint), "-o", str(tmp_path / "m.gguf"), "--quant", "w4-spike", "--calibrate",
               str(tmp_path / "text.txt"), "--no-report", "--force"]
    assert main([*command, "--json"]) == 0
    size = json.loads(capsys.readouterr().out)["bytes"]
    assert main([*command, "--json", "--budget", str(size + 40_000)]) == 0
    summary = json.loads(capsys.readouterr().out)
    chosen = summary["chosen"]
    assert size < summary["bytes"] <= size + 40_000 and sum(chosen["inputs"].values()) == 8
    assert set(chosen["inputs"]) == {"w4-spike", "w8-spike"} and chosen["dead_zone"] == [0.0625, 0.0625]
    assert main([*command, "--budget", str(size + 40_000), "--skip", "0.3"]) == 0
    shown = capsys.readouterr().out
    assert "chosen: linears of " in shown and " in w8-spike" in shown and "dead zones 0" in shown
    assert main(["inspect", str(tmp_path / "m.gguf")]) == 0
    assert "linears w8-spike, embeddings q8_0, calibrated" in capsys.readouterr().out


def test_what_was_chosen_in_a_line():
    chosen = {"inputs": {"w4-spike": 108, "w8-spike": 12}, "k": [8.0, 16.0], "dead_zone": [0.0625, 0.0625]}
    assert chosen_text(chosen) == ("chosen: linears of 108 inputs in w4-spike and 12 inputs in w8-spike, k 8 to 16, "
                                   "dead zones 0.0625")
    assert chosen_text({"inputs": {"int4": 8}}) == "chosen: linears of 8 inputs in int4"
