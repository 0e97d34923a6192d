"""pytest tests/test_cli_spikes.py: what `sbedge spikes` says of a model, and what it refuses."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden import add_tokenizer
from tiny import write_tiny_checkpoint

from sbedge.apps import cli
from sbedge.checkpoint import SPIKES_FILE
from sbedge.export import export_model
from sbedge.export.spikes import Spikes
from sbedge.quant.ggml_library import ggml_available
from sbedge.runtime.load import open_engine
from sbedge.runtime.native.library import load_native


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("The spike is the alphabet of the brain. " * 2, encoding="utf-8")
    return str(tmp_path / "text.txt")


def checkpoint(folder: Path, w8aspike: bool) -> str:
    return str(add_tokenizer(write_tiny_checkpoint(folder / "model", w8aspike=w8aspike, vocab_size=260)))


def test_a_model_that_does_not_spike_was_not_trained_to(
        tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["spikes", checkpoint(tmp_path, False), "--text", text, "--tokens", "20"]) == 0
    assert "was not trained to spike" in capsys.readouterr().out


def test_the_reports_figures_stand_beside(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["spikes", checkpoint(tmp_path, True), "--text", text, "--tokens", "20"]) == 0
    out = capsys.readouterr().out
    assert all(f in out for f in ("published", "18.4%", "94.1%", "1.13")) and "not trained" not in out


def test_json_has_every_layers_figures(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["spikes", checkpoint(tmp_path, True), "--text", text, "--tokens", "20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 20 and len(found["layers"]) == 4 * 3      # down_proj does not spike
    assert all(0 <= row["silent"] <= 1 for row in found["layers"])


@pytest.mark.parametrize("extra", [["--tokens", "1"], ["--spike-k", "4"]])
def test_bad_input_is_one_line(
        tmp_path: Path, text: str, extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["spikes", checkpoint(tmp_path, True), "--text", text, *extra]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_plots_are_written(tmp_path: Path, text: str) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    assert cli.main(["spikes", checkpoint(tmp_path, True), "--text", text, "--tokens", "12",
                     "--plots", str(tmp_path / "plots")]) == 0
    assert len(list((tmp_path / "plots").glob("*.svg"))) == 4


@pytest.mark.skipif(not (ggml_available() and load_native()), reason="silent rows are skipped by the native kernels")
def test_the_bytes_the_engine_skips_are_the_weights_found_silent(
        tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "m.gguf"
    export_model(checkpoint(tmp_path, False), model, quant="w8-spike", embedding_quant="f32", spikes=Spikes(2, 0.4))
    assert cli.main(["spikes", str(model), "--text", text, "--tokens", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["spikes_itself"] and not found["trained_to_spike"]
    assert (found["spike_k"], found["dead_zone"]) == (2, 0.4)
    assert found["silent_weights"] > 0.2
    assert found["skipped"]["skipped"] == pytest.approx(found["silent_weights"], abs=0.005)


def test_a_model_that_does_not_spike_is_watched_as_if_it_did_at_the_k_asked_for(
        tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, silent = checkpoint(tmp_path, False), []
    for options in ([], ["--spike-k", "1"], ["--spike-k", "1", "--dead-zone", "0.8"]):
        assert cli.main(["spikes", model, "--text", text, "--tokens", "20", *options, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert not found["spikes_itself"] and len(found["layers"]) == 4 * 4     # down_proj spikes, too
        silent.append(found["total"]["silent"])
    assert silent == sorted(silent) and silent[0] < silent[2]


def test_plots_without_matplotlib_name_what_to_install(
        tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["spikes", "m.gguf", "--text", text, "--plots", str(tmp_path / "plots")]) == 2
    assert "pip install 'sbedge[plots]'" in capsys.readouterr().err and not (tmp_path / "plots").exists()


TRAINED = {"spike_k": 8.0, "input_dead_zone": [0.5] * 16}


def test_a_checkpoint_that_was_trained_to_spike_is_watched_and_exported_so(
        tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(checkpoint(tmp_path, False))
    (folder / SPIKES_FILE).write_text(json.dumps(TRAINED))
    export_model(folder, tmp_path / "onnx", quant="w8-spike", embedding_quant="f32")
    silent = []
    for model in (folder, tmp_path / "onnx"):
        assert cli.main(["spikes", str(model), "--text", text, "--tokens", "20", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["trained_to_spike"] and found["spike_k"] == 8 and found["input_dead_zone"] == [0.5] * 16
        silent.append(found["silent_weights"])
    assert silent[0] == pytest.approx(silent[1], abs=0.01) and silent[0] > 0.2
    assert cli.main(["spikes", str(folder), "--text", text, "--tokens", "20"]) == 0
    assert "was trained to spike so" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "k", "dead_zone"), [
    ({"spikes": Spikes(4)}, 4, 0), ({"spikes": Spikes(dead_zone=0.25)}, 8, 0.25), ({"quant": "int8"}, 0, 0)])
def test_a_trained_checkpoint_can_be_exported_otherwise(
        tmp_path: Path, options: dict, k: float, dead_zone: float) -> None:
    folder = Path(checkpoint(tmp_path, False))
    (folder / SPIKES_FILE).write_text(json.dumps(TRAINED))
    export_model(folder, tmp_path / "onnx", **{"quant": "w8-spike", "embedding_quant": "f32", **options})
    config = open_engine(tmp_path / "onnx").config
    assert not config.trained_to_spike and not config.input_dead_zone
    assert (config.spike_k, config.dead_zone) == (k, dead_zone)


@pytest.mark.parametrize(("trained", "line"), [
    ({}, "expected spike_k above 0 and input_dead_zone"),
    ({"spike_k": 8}, "expected spike_k above 0 and input_dead_zone"),
    ({"spike_k": 8, "input_dead_zone": [0.5]}, "input_dead_zone must hold 16 numbers"),
    ({"spike_k": "8", "input_dead_zone": [0.5] * 16}, "spike_k is '8'"),
    ([], "expected a JSON object"),
])
def test_a_damaged_spikes_file_is_one_line(
        tmp_path: Path, trained: object, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(checkpoint(tmp_path, False))
    (folder / SPIKES_FILE).write_text(json.dumps(trained))
    assert cli.main(["export", str(folder), "-o", str(tmp_path / "onnx"), "--quant", "w8-spike"]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1 and not (tmp_path / "onnx").exists()
