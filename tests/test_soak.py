"""pytest tests/test_soak.py: the soak benchmark covers every token, and would notice inexact rotations."""
from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny_checkpoint

from sbedge.export import export_model
from sbedge.quant.ggml_library import ggml_available
from sbedge.runtime import ggml_graph
from sbedge.runtime.load import open_engine

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "soak.py"

pytestmark = pytest.mark.skipif(not ggml_available() or not os.path.exists("/proc/self/statm"),
                                reason="needs a ggml library, and reads resident memory from /proc")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak")
    export_model(write_tiny_checkpoint(folder / "c"), folder / "m.gguf", quant="q8_0")
    return folder / "m.gguf"


def test_a_soak_reads_and_decodes_every_token_and_keeps_its_memory(model, tmp_path):
    command = [sys.executable, SCRIPT, model, "--tokens", "3000", "--ends", "200", "--chunk", "50", "--threads", "1",
               "-o", tmp_path / "soak.csv"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert found["position"] == "3000"
    assert int(found["resident_growth_bytes"]) < 5 << 20
    assert float(found["rope"]) < 1e-6
    with (tmp_path / "soak.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["tokens"]) for row in rows) == 3000
    assert sum(int(row["tokens"]) for row in rows if row["kind"] == "decode") == 400
    assert [int(row["position"]) for row in rows] == sorted(int(row["position"]) for row in rows)


def test_angles_in_float32_would_be_noticed(model, monkeypatch):
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    soak = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "soak", soak)
    spec.loader.exec_module(soak)

    def in_float32(positions, d, theta):
        steps = np.float32(theta) ** (-np.arange(d // 2, dtype=np.float32) / np.float32(d // 2))
        angles = (np.asarray(positions, np.float32)[:, None] * steps).astype(np.float32)
        return np.cos(angles), np.sin(angles)

    assert soak.rope_difference(open_engine(model), 1_000_000) < 1e-6
    monkeypatch.setattr(ggml_graph, "rope_angles", in_float32)
    assert soak.rope_difference(open_engine(model), 1_000_000) > 1e-3
