"""pytest tests/test_cli_spikes.py: what `sbedge spikes` says of a model, and what it refuses."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden import add_tokenizer
from tiny import write_tiny_checkpoint

from sbedge.apps import cli


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
