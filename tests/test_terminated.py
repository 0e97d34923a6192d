"""pytest tests/test_terminated.py: an export that is stopped midway leaves nothing behind."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from tiny import write_tiny_checkpoint


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize("format", ["gguf", "onnx"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_export_leaves_no_file(number, code, format, tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path / "c", vocab_size=20_000, hidden_size=512, num_hidden_layers=12,
                                       intermediate_size=2048)
    out = tmp_path / "out" / ("m.gguf" if format == "gguf" else "m")
    out.parent.mkdir()
    process = subprocess.Popen([sys.executable, "-m", "sbedge", "export", str(checkpoint), "-o", str(out), "--format",
                                format, "--quant", "f32", "--no-report"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not any(out.parent.iterdir()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)       # until it has begun to write
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert not any(out.parent.iterdir())
