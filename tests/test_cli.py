"""The commands: what goes to standard output, what to standard error, and the exit code."""
from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import TINY, W8ASPIKE, add_tokenizer, copy_checkpoint
from tiny import write_tiny_checkpoint

import sbedge
from sbedge.apps import cli
from sbedge.checkpoint import Checkpoint
from sbedge.errors import ExportError
from sbedge.export import QUANTS
from sbedge.quant.ggml_library import ggml_available
from sbedge.reference import Reference

ROOT = Path(sbedge.__file__).parents[1]
needs_ggml = pytest.mark.skipif(not ggml_available(), reason="the ggml libraries are not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that has a tokenizer and a chat template: any command runs on it, through the reference."""
    return str(add_tokenizer(copy_checkpoint(TINY, tmp_path_factory.mktemp("cli") / "model")))


class Stdin(io.TextIOWrapper):
    def __init__(self, text: str):
        super().__init__(io.BytesIO(text.encode()), encoding="utf-8")


def sbedge_json(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert cli.main(argv) == 0
    return json.loads(capsys.readouterr().out)


# --- help, usage and exit codes ----------------------------------------------------------------------
@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_describes_the_command_and_shows_an_example(
        command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    assert f"  sbedge {command}" in out[out.index("example"):]
    assert len(out[out.index("\n\n"):out.index("options:")]) > 80


def test_help_of_the_whole_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and all(f"    {name} " in out for name in cli.COMMANDS)


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"sbedge {sbedge.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["generate"], ["logits", "m", "--ids", "1"],
                                  ["generate", "m", "-p", "x", "--top-k", "two"],
                                  ["export", "c", "-o", "x", "--format", "pt"]])
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2 and capsys.readouterr().out == ""


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(args: object) -> None:
        raise error
    monkeypatch.setattr("sbedge.apps.commands.inspect.run", run)


@pytest.mark.parametrize(("error", "code", "line"), [
    (ExportError("x: broken\nin two \x1b[31mlines"), 2, "sbedge: x: broken in two \\x1b[31mlines"),
    (PermissionError(13, "Permission denied", "/a/b"), 2, "sbedge: /a/b: Permission denied"),
    (MemoryError(), 2, "sbedge: not enough memory"),
    (ZeroDivisionError("oops"), 1, "sbedge: unexpected ZeroDivisionError: oops (a bug"),
])
def test_errors_are_one_line_and_bugs_exit_with_1(
        error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    raising(monkeypatch, error)
    assert cli.main(["inspect", "m"]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(line) and captured.err.count("\n") == 1


@pytest.mark.parametrize("by_variable", [True, False])
def test_debug_shows_the_traceback(by_variable: bool, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    raising(monkeypatch, ExportError("x"))
    if by_variable:
        monkeypatch.setenv("SBEDGE_DEBUG", "1")
    assert cli.main(["inspect", "m", *([] if by_variable else ["--debug"])]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    assert cli.main(["inspect", "m"]) == 130
    assert capsys.readouterr().err == ""


def test_a_reader_that_goes_away_is_no_error(model: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "sbedge", "generate", model, "-p", "x"], stdout=write,
                          stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("command", [["tokenize"], ["generate", "-n", "1"]])
def test_output_that_cannot_be_written_is_one_line(model: str, command: list[str]) -> None:
    name, *options = command
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "sbedge", name, model, "-p", "x", *options], stdout=full,
                              env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
                              stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "sbedge: No space left on device"
    assert "Exception" not in done.stderr


def test_streams_that_the_caller_closed_are_no_error(model: str) -> None:
    command = f"{sys.executable} -m sbedge chat {model} -n 2 <&- >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_character_that_the_terminal_lacks_is_no_error(model: str) -> None:
    done = subprocess.run([sys.executable, "-m", "sbedge", "tokenize", model, "-p", "\xe9"],
                          env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "2 tokens\n") and "?" in done.stdout


# --- generate ----------------------------------------------------------------------------------------
def test_generate_prints_only_the_reply(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", model, "-p", "hello", "-n", "8"]) == 0
    captured = capsys.readouterr()
    expected = "".join(p.text for p in sbedge.load(model).generate("hello", max_tokens=8))
    assert captured.out == expected + "\n" and captured.err == ""


def test_generate_verbose_tells_speed_on_stderr(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", model, "-p", "hello", "-n", "3", "--verbose"]) == 0
    captured = capsys.readouterr()
    assert "prefill 5 tokens" in captured.err and "tok/s" not in captured.out


def test_generate_json_tells_tokens_and_logprobs(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    reply = sbedge_json(capsys, "generate", model, "-p", "hello", "-n", "5", "--json", "--logprobs", "3")
    assert reply["prompt"] == "hello" and reply["finish"] == "length" and len(reply["tokens"]) == 5
    for token in reply["tokens"]:
        assert token["logprob"] < 0 and len(token["top"]) == 3
        assert token["top"][0] == {key: token[key] for key in ("id", "text", "logprob")}     # greedy: the best
    assert reply["timings"]["prefill_tokens"] == 5


def test_generate_reads_the_prompt_from_a_file_or_standard_input(
        model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = sbedge_json(capsys, "generate", model, "-p", "héllo", "-n", "4", "--json")["tokens"]
    (tmp_path / "prompt.txt").write_text("héllo", encoding="utf-8")
    from_file = sbedge_json(capsys, "generate", model, "-f", str(tmp_path / "prompt.txt"), "-n", "4", "--json")
    monkeypatch.setattr(sys, "stdin", Stdin("héllo"))
    from_stdin = sbedge_json(capsys, "generate", model, "-p", "-", "-n", "4", "--json")
    assert from_file["tokens"] == from_stdin["tokens"] == wanted


def test_the_seed_and_the_logit_bias_reach_the_sampler(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def ids(*options: str) -> list[int]:
        reply = sbedge_json(capsys, "generate", model, "-p", "hi", "-n", "6", "--json", *options)
        return [token["id"] for token in reply["tokens"]]

    hot = ("--temperature", "2")
    assert ids(*hot, "--seed", "1") == ids(*hot, "--seed", "1") != ids(*hot, "--seed", "2")
    assert ids("--logit-bias", "65=100", "--logit-bias", "66=-inf") == [65] * 6


def test_a_stop_text_ends_the_reply_before_it(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Bias to "a" and "b" alone makes the tiny model speak those letters.
    bias = [option for id in (64, 65) for option in ("--logit-bias", f"{id}=100")]
    whole = sbedge_json(capsys, "generate", model, "-p", "hi", "-n", "40", "--json", *bias, "--temperature", "1",
                        "--seed", "3")["text"]
    stop = whole[5:8]
    reply = sbedge_json(capsys, "generate", model, "-p", "hi", "-n", "40", "--json", *bias, "--temperature", "1",
                        "--seed", "3", "--stop", stop)
    assert reply["finish"] == "stop" and reply["text"] == whole[:whole.index(stop)]


# --- tokenize ----------------------------------------------------------------------------------------
def test_tokenize_prints_one_json_list(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = sbedge.load(model).tokenizer
    assert sbedge_json(capsys, "tokenize", model, "-p", "cab é", "--json") == tokenizer.encode("cab é")


def test_tokenize_prints_a_list_for_each_line_of_a_file(
        model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["one", "", "two\nlines", "é\u2028大"]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    assert cli.main(["tokenize", model, "--file", str(file), "--json"]) == 0
    lists = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tokenizer = sbedge.load(model).tokenizer
    assert [tokenizer.decode(ids) for ids in lists] == texts and lists[1] == []


def test_tokenize_shows_a_table(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tokenize", model, "-p", "ab\n"]) == 0
    captured = capsys.readouterr()
    assert [line.split() for line in captured.out.splitlines()] == [["256", '"ab"'], ["198", '"\\n"']]
    assert captured.err == "2 tokens\n"


def test_tokenize_takes_a_folder_with_tokenizer_files_only(
        model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer.json").write_bytes((Path(model) / "tokenizer.json").read_bytes())
    assert sbedge_json(capsys, "tokenize", str(tmp_path), "-p", "ab", "--json") == [256]


# --- logits ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [[], ["--chunk", "1"], ["--chunk", "7"]])
def test_logits_are_those_of_the_reference_in_any_chunking(chunk: list[str], tmp_path: Path) -> None:
    ids = list(range(50))
    assert cli.main(["logits", str(TINY), "--ids", ",".join(map(str, ids)), "-o", str(tmp_path / "x.npy"), *chunk]) == 0
    found = np.load(tmp_path / "x.npy")
    model = Reference(TINY)
    wanted = model.forward(ids, model.new_state(), logits="all")
    assert wanted is not None and found.dtype == np.float32 and found.shape == (50, 320)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


def test_logits_reads_ids_from_text_and_npy_files(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("3, 1\n4\n")
    np.save(tmp_path / "ids.npy", np.array([3, 1, 4]))
    outputs = []
    for name in ("ids.txt", "ids.npy"):
        out = tmp_path / f"{name}.out.npy"
        assert cli.main(["logits", str(TINY), "--ids-file", str(tmp_path / name), "-o", str(out)]) == 0
        outputs.append(np.load(out))
    assert outputs[0].shape == (3, 320)
    np.testing.assert_array_equal(*outputs)


@needs_ggml
def test_logits_agree_across_the_engines(model: str, tmp_path: Path) -> None:
    for out, engine in ((tmp_path / "m.gguf", "ggml"), (tmp_path / "m-onnx", "onnx")):
        assert cli.main(["export", model, "-o", str(out), "--quant", "f32", "--no-report"]) == 0
        assert cli.main(["logits", str(out), "--ids", "5,6,7,8,9", "-o", str(tmp_path / f"{engine}.npy"),
                         "--engine", engine, "--chunk", "2"]) == 0
    assert cli.main(["logits", model, "--ids", "5,6,7,8,9", "-o", str(tmp_path / "reference.npy")]) == 0
    wanted = np.load(tmp_path / "reference.npy")
    for engine in ("ggml", "onnx"):
        np.testing.assert_allclose(np.load(tmp_path / f"{engine}.npy"), wanted, rtol=0, atol=1e-3)


# --- inspect -----------------------------------------------------------------------------------------
@needs_ggml
@pytest.mark.parametrize("source", [TINY, W8ASPIKE], ids=lambda path: path.name)
def test_inspect_tells_the_same_model_in_every_form(
        source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [source, tmp_path / "m.gguf", tmp_path / "m-onnx"]
    for out in paths[1:]:
        sbedge.export_model(source, out)
    checkpoint, *exports = [sbedge_json(capsys, "inspect", str(path), "--json", "--tensors") for path in paths]
    engine = Reference(source)
    assert checkpoint["layers"] == "GWGW" and checkpoint["state_bytes"] == engine.new_state().nbytes
    names = {tensor["name"]: tensor["shape"] for tensor in checkpoint["tensors"]}
    assert names["lm_head.weight"] == [engine.config.vocab_size, engine.config.hidden_size]
    for summary in [checkpoint, *exports]:
        assert summary["memory_bytes"] > summary["file_bytes"] >= sum(t["bytes"] for t in summary["types"].values())
        assert sum(t["tensors"] for t in summary["types"].values()) == len(summary["tensors"])
    for summary in exports:
        assert summary["layers"] == "GWGW" and summary["state_bytes"] == checkpoint["state_bytes"]
        assert summary["source"]["fingerprint"] == checkpoint["source"]["fingerprint"]
        assert summary["source"]["exporter"] == f"sbedge {sbedge.__version__}" and summary["source"]["recipe"]
        same = ("hidden_size", "attn_layers", "vocab_size", "rope_theta", "spike_k", "int8_window", "gate_rank")
        assert {key: summary["config"][key] for key in same} == {key: checkpoint["config"][key] for key in same}


def test_inspect_for_people_names_what_they_ask(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", model, "--tensors"]) == 0
    out = capsys.readouterr().out
    for words in ("GWGW", "window 16", "with chat template", "float32", "whatever the position", "lm_head.weight"):
        assert words in out


@needs_ggml
@pytest.mark.parametrize("out", ["m.gguf", "m-onnx"])
def test_export_and_inspect_tell_the_size_of_what_int8_cannot_hold(
        out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "c", w8aspike=True, num_hidden_layers=2))
    codes = [checkpoint.weight_codes(name)[0] for name in checkpoint.names() if checkpoint.is_quantized(name)]
    beyond = sum(int(((c < -128) | (c > 127)).sum()) for c in codes)
    exported = sbedge_json(capsys, "export", str(checkpoint.folder), "-o", str(tmp_path / out), "--no-report", "--json")
    residual = sbedge_json(capsys, "inspect", str(tmp_path / out), "--json")["residual"]
    assert residual == exported["residual"] and residual["bytes"] >= 8 * beyond > 0
    assert (residual["codes_beyond_int8"], residual["codes"]) == (beyond, sum(c.size for c in codes))
    assert cli.main(["inspect", str(tmp_path / out)]) == 0
    assert f"{beyond:,} of " in capsys.readouterr().out
    assert cli.main(["export", str(checkpoint.folder), "-o", str(tmp_path / out), "--no-report", "--force"]) == 0
    assert "are beyond int8 and kept exact in" in capsys.readouterr().out


def test_a_checkpoint_without_such_codes_has_no_residual(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "residual" not in sbedge_json(capsys, "inspect", model, "--json")


# --- export ------------------------------------------------------------------------------------------
def test_export_help_names_every_quant_that_the_writers_know(capsys: pytest.CaptureFixture[str]) -> None:
    from sbedge.export.gguf import writer
    from sbedge.export.onnx import FORMS
    assert set(QUANTS["gguf"]) == set(writer.QUANTS) and set(QUANTS["onnx"]) == set(FORMS)


@needs_ggml
@pytest.mark.parametrize(("options", "quant", "most", "least"), [
    (["-o", "m.gguf", "--quant", "f32"], "f32", 1e-9, 1.0), (["-o", "m.gguf"], "q8_0", 1e-3, 0.9),
    (["-o", "m.gguf", "--quant", "q4_0"], "q4_0", 0.1, 0.3), (["-o", "m-onnx"], "int8", 1e-2, 0.9),
    (["-o", "m", "--format", "onnx", "--quant", "f32"], "f32", 1e-9, 1.0),
])
def test_export_reports_its_distance_from_float32(
        options: list[str], quant: str, most: float, least: float, model: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    summary = sbedge_json(capsys, "export", model, *options, "--json")
    report = summary["report"]
    assert summary["quant"] == quant and summary["bytes"] > 0
    assert report["tokens"] == 128 and 0 <= report["kl_mean"] <= most and report["kl_max"] >= report["kl_mean"]
    assert least <= report["top1_agreement"] <= 1


def test_export_without_report_runs_no_engine(
        model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sbedge.apps.commands.export.open_engine", None)
    assert sbedge_json(capsys, "export", model, "-o", str(tmp_path / "m.gguf"), "--no-report", "--json")[
        "report"] is None


def test_a_large_checkpoint_is_compared_only_on_request(
        model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sbedge.apps.commands.export.SMALL_CHECKPOINT", 1000)
    assert cli.main(["export", model, "-o", str(tmp_path / "m.gguf")]) == 0
    captured = capsys.readouterr()
    assert "KL" not in captured.out and "--report compares" in captured.err


@needs_ggml
def test_a_spiking_export_is_lossless_by_default_and_says_what_rounding_does(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(W8ASPIKE), "-o", str(tmp_path / "m.gguf")]) == 0
    out = capsys.readouterr().out
    assert "w8-spike" in out and "same top token 100.0%" in out and "spike counts are rounded" in out
