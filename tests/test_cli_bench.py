"""python -m pytest tests/test_cli_bench.py: `sbedge bench` counts bytes rightly and prints what it measured."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from golden import TINY, W8ASPIKE

from sbedge.apps import cli
from sbedge.apps.commands import bench
from sbedge.apps.commands.inspect import read_gguf_contents
from sbedge.checkpoint import Checkpoint
from sbedge.errors import SbedgeError
from sbedge.export import export_model
from sbedge.gguf_reader import read_gguf
from sbedge.quant.ggml_library import ggml_available
from sbedge.runtime.native.library import load_native

needs_ggml = pytest.mark.skipif(not ggml_available(), reason="the ggml libraries are not installed")
QUICK = ("--tokens", "3", "--prefill", "5", "--rounds", "2", "--threads", "1")
KEYS = {"model", "engine", "shape", "random_weights", "threads", "tokens", "prefill", "rounds", "jump", "load_seconds",
        "decoded_events", "file_bytes", "state_bytes", "peak_rss_bytes", "rss_beyond_bytes", "read_bytes_per_second",
        "depths", "sessions", "sessions_tok_s"}
ROW_KEYS = {"depth", "decode_tok_s", "prefill_tok_s", "weight_bytes_per_token", "bandwidth_share", "silent_share"}


@pytest.fixture(autouse=True)
def small_buffer_and_own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "read_bandwidth", lambda threads: 1e10)
    monkeypatch.setenv("SBEDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def random_spiking(tmp_path: Path) -> Path:
    """What `--shape tiny` makes, made in this process and laid into the cache."""
    (tmp_path / "cache/bench").mkdir(parents=True)
    model = tmp_path / "cache/bench/tiny-w8-spike.gguf"
    bench.make_model(tmp_path / "checkpoint", model, "tiny", "gguf", "w8-spike", None)
    return model


def bench_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert cli.main(["bench", *argv, *QUICK, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def check_sane(summary: dict[str, Any]) -> None:
    assert summary.keys() == KEYS
    for row in summary["depths"]:
        assert row.keys() == ROW_KEYS
        for rates in (row["decode_tok_s"], row["prefill_tok_s"]):
            assert 0 < rates["min"] <= rates["median"] <= rates["max"]
        assert row["bandwidth_share"] == pytest.approx(
            row["weight_bytes_per_token"] * row["decode_tok_s"]["median"] / 1e10)
    assert summary["load_seconds"] > 0 and summary["state_bytes"] > 0
    assert summary["rss_beyond_bytes"] == summary["peak_rss_bytes"] - summary["file_bytes"] - summary["state_bytes"]


# --- what is measured --------------------------------------------------------------------------------
@needs_ggml
def test_sequences_that_advance_together_are_measured(random_spiking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = bench_json(capsys, "--shape", "tiny", "--sessions", "3")["sessions_tok_s"]
    assert 0 < rates["min"] <= rates["median"] <= rates["max"]
    assert bench_json(capsys, "--shape", "tiny")["sessions_tok_s"] is None


def unread(checkpoint: Checkpoint) -> int:
    """Bytes of its float32 embeddings, all rows but that of the token."""
    assert not checkpoint.config.tie_word_embeddings
    return 4 * checkpoint.config.hidden_size * (checkpoint.config.vocab_size - 1)


def test_a_checkpoint_reads_its_whole_file_but_for_embeddings_for_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    summary = bench_json(capsys, str(TINY), "--depth", "7", "0", "7")
    check_sane(summary)
    size = (TINY / "model.safetensors").stat().st_size - unread(Checkpoint(TINY))
    assert [row["depth"] for row in summary["depths"]] == [0, 7]
    assert all(row["weight_bytes_per_token"] == size and row["silent_share"] is None for row in summary["depths"])
    assert summary["engine"] == "reference" and not summary["random_weights"] and not summary["decoded_events"]


def test_an_onnx_folder_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="the ONNX engine needs it")
    export_model(TINY, tmp_path / "onnx", quant="f32")
    summary = bench_json(capsys, str(tmp_path / "onnx"))
    check_sane(summary)
    assert summary["depths"][0]["weight_bytes_per_token"] == summary["file_bytes"] - unread(Checkpoint(TINY)) > 0


@needs_ggml
def test_silent_channels_are_not_counted_as_read(random_spiking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not load_native():
        pytest.skip("only the native kernels leave silent channels out")
    summary = bench_json(capsys, "--shape", "tiny", "--depth", "0", "40")
    check_sane(summary)
    tensors = read_gguf(random_spiking).tensors
    codes = sum(t.nbytes for name, t in tensors.items() if name.endswith(".codes"))
    whole = bench.weight_bytes(read_gguf_contents(random_spiking), native=True)
    for row in summary["depths"]:
        assert 0.02 < row["silent_share"] < 0.5
        assert row["weight_bytes_per_token"] == pytest.approx(whole - row["silent_share"] * codes, abs=1)
    assert summary["random_weights"] and summary["shape"] == "tiny" and not summary["decoded_events"]


@needs_ggml
def test_without_native_kernels_event_layouts_count_as_the_float32_they_are(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbedge.runtime.ggml_weights.load_native", lambda: None)
    export_model(W8ASPIKE, tmp_path / "m.gguf")
    summary = bench_json(capsys, str(tmp_path / "m.gguf"))
    check_sane(summary)
    assert summary["decoded_events"] and summary["depths"][0]["silent_share"] is None
    tensors = read_gguf(tmp_path / "m.gguf").tensors
    codes = sum(t.nbytes for name, t in tensors.items() if name.endswith(".codes"))
    assert summary["depths"][0]["weight_bytes_per_token"] > 4 * codes


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_read_in_full_only_as_lm_head(tied: bool, tmp_path: Path) -> None:
    from tiny import write_tiny_checkpoint
    export_model(write_tiny_checkpoint(tmp_path / "c", tie_word_embeddings=tied), tmp_path / "m.gguf", quant="f32")
    contents = read_gguf_contents(tmp_path / "m.gguf")
    whole, row = sum(t.nbytes for t in contents.tensors), 4 * contents.config.hidden_size
    skipped = 0 if tied else row * (contents.config.vocab_size - 1)
    assert bench.weight_bytes(contents, native=True) == bench.weight_bytes(contents, native=False) == whole - skipped


def test_a_jump_reads_one_window_and_stands_at_the_depth(capsys: pytest.CaptureFixture[str],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[tuple[int, int]] = []         # (position before, ids)

    def watched(*args: Any) -> Any:
        engine = open_engine(*args)
        forward = engine.forward

        def counted(ids: Any, state: Any, **options: Any) -> Any:
            fed.append((state.position, len(ids)))
            return forward(ids, state, **options)

        engine.forward = counted            # type: ignore[method-assign]
        return engine

    open_engine = bench.open_engine
    monkeypatch.setattr(bench, "open_engine", watched)
    window = json.loads((TINY / "config.json").read_text())["sliding_window"]
    summary = bench_json(capsys, str(TINY), "--depth", "1000000", "--jump")
    assert summary["jump"]
    assert (10**6 - window, window) in fed
    assert sum(count for _, count in fed) == 1 + window + 3 * (5 + 1 + 3)   # load, context, three rounds
    assert max(position for position, _ in fed) == 10**6 + 3


# --- random weights ----------------------------------------------------------------------------------
@needs_ggml
def test_random_weights_are_made_once_and_leave_nothing_else(tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--shape", "tiny", "--dead-zone", "0.5", "--spike-k", "4", *QUICK]
    assert cli.main(arguments) == 0
    first = capsys.readouterr()
    (model,) = (tmp_path / "cache/bench").iterdir()
    assert model.name == "tiny-w8-spike-k4-dead-zone0.5.gguf"
    assert str(model) in first.err and "weights are random" in first.out
    made = os.stat(model)
    assert cli.main(arguments) == 0
    assert "making" not in capsys.readouterr().err
    assert os.stat(model).st_mtime_ns == made.st_mtime_ns
    assert read_gguf_contents(model).config.dead_zone == 0.5


def test_an_error_in_the_other_process_is_the_same_error_here(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(SbedgeError, match="exists already"):
        bench.in_another_process(bench.make_model, tmp_path / "checkpoint", tmp_path / "m.gguf", "tiny", "gguf", "f32",
                                 None)


def test_a_process_that_dies_is_one_clear_error() -> None:
    with pytest.raises(SbedgeError, match="choose a smaller --shape"):
        bench.in_another_process(os._exit, 9)       # type: ignore[arg-type]


# --- printing and refusals ---------------------------------------------------------------------------
@needs_ggml
def test_the_table_fits_80_columns(random_spiking: Path, capsys: pytest.CaptureFixture[str],
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["bench", "--shape", "tiny", "--depth", "0", "1000000", "--jump", *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if ".." in line and "B " in line]
    assert [row[0] for row in table] == ["0", "1,000,000"]
    assert all(len(line) <= 80 and "…" not in line for line in lines if str(random_spiking) not in line)


@pytest.mark.parametrize("argv", [["--shape", "2b"], [], [str(TINY), "--shape", "tiny"]])
def test_an_unknown_shape_or_no_single_model_is_wrong_usage(argv: list[str],
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", *argv])
    assert exit.value.code == 2 and capsys.readouterr().out == ""


@pytest.mark.parametrize(("argv", "message"), [
    ([str(TINY), "--tokens", "0"], "--tokens is 0"),
    ([str(TINY), "--depth", "0", "-5"], "--depth is -5"),
    ([str(TINY), "--spike-k", "4"], "--spike-k goes with --shape"),
    (["--shape", "tiny", "--quant", "q9"], "quant 'q9' is not known"),
    (["--shape", "tiny", "--quant", "f32", "--dead-zone", "1"], "found --quant f32"),
    (["--shape", "tiny", "--dead-zone", "-1"], "dead zone is -1"),
    (["nowhere.gguf"], "nowhere.gguf: no such file"),
])
def test_a_refusal_is_one_line_and_code_2(argv: list[str], message: str, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "cache").exists()        # refused before anything is made


def test_a_cache_that_cannot_be_written_is_one_line_that_names_it(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SBEDGE_CACHE", str(tmp_path / "file"))
    assert cli.main(["bench", "--shape", "tiny"]) == 2
    assert "set SBEDGE_CACHE to another folder" in capsys.readouterr().err


def test_the_bandwidth_is_that_of_a_memory() -> None:
    from sbedge.apps.measure import read_bandwidth
    assert 1e7 < read_bandwidth(2, nbytes=1 << 22, repeats=2) < 1e13
