"""pytest tests/test_terminated.py: an export that is stopped midway leaves nothing behind."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from golden import add_tokenizer
from tiny import write_tiny_checkpoint

from sbedge.export.calibrated import write_npy

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
STOPS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def stop_export(number: int, out: Path, begun: Callable[[], bool], *options: object) -> tuple[int, str]:
    """Start an export to `out`, send it a signal once it has `begun`; its exit code and what it said."""
    process = subprocess.Popen([sys.executable, "-m", "sbedge", "export", *map(str, options), "-o", str(out),
                                "--no-report"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not begun() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert process.poll() is None, "it was too fast to be stopped"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said.decode()


@pytest.mark.parametrize("format", ["gguf", "onnx"])
@pytest.mark.parametrize(("number", "code"), STOPS)
def test_a_stopped_export_leaves_no_file(number, code, format, tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path / "c", vocab_size=20_000, hidden_size=512, num_hidden_layers=12,
                                       intermediate_size=2048)
    out = tmp_path / "out" / ("m.gguf" if format == "gguf" else "m")
    out.parent.mkdir()
    assert stop_export(number, out, lambda: any(out.parent.iterdir()), checkpoint, "--format", format, "--quant",
                       "f32") == (code, "")
    assert not any(out.parent.iterdir())


@pytest.mark.parametrize(("number", "code"), STOPS)
@pytest.mark.parametrize("work", ["choosing", "rounding"])
def test_a_stopped_calibration_leaves_no_work_folder(work, number, code, tmp_path):
    sizes = {"vocab_size": 260, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12}
    checkpoint = add_tokenizer(write_tiny_checkpoint(tmp_path / "c", **sizes))
    (tmp_path / "text.txt").write_text("a neuron that kept silent, once upon a time. " * 60)
    out = tmp_path / "out" / "m.gguf"
    out.parent.mkdir()

    def begun() -> bool:
        """With the first choices to be made, or with a linear put away."""
        return any(out.parent.rglob("*.npy") if work == "rounding" else out.parent.iterdir())

    assert stop_export(number, out, begun, checkpoint, "--quant", "w4-spike", "--calibrate", tmp_path / "text.txt",
                       "--skip", "0.3") == (code, "")
    assert not any(out.parent.iterdir())


def test_a_stop_while_an_array_is_written_is_still_a_stop(tmp_path):
    """Some 500 signals at any point of it: np.save turns about five of them into a TypeError."""
    array, random = np.arange(128 * 512, dtype=np.uint8).reshape(128, 512), np.random.default_rng(0)

    def stop(*_: object) -> None:
        raise SystemExit(143)

    def write_until_stopped(delay: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, delay, 1.0)
        while True:
            write_npy(tmp_path / "a.npy", array)

    before = signal.signal(signal.SIGALRM, stop)
    try:
        for delay in random.uniform(1e-6, 3e-4, 500):
            with pytest.raises(SystemExit):
                write_until_stopped(delay)
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    write_npy(tmp_path / "a.npy", array)
    assert np.array_equal(np.load(tmp_path / "a.npy"), array)
