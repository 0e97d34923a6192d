"""Whatever a user gets wrong ends with exit code 2, one line that names the thing, and nothing left behind."""
from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from golden import TINY, W8ASPIKE, add_tokenizer, copy_checkpoint, edit_config, edit_tensors, truncate

import sbedge
from sbedge.apps import cli
from sbedge.quant.ggml_library import ggml_available

ROOT = Path(sbedge.__file__).parents[1]
needs_ggml = pytest.mark.skipif(not ggml_available(), reason="the ggml libraries are not installed")
Fails = Callable[..., str]


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must fail; returns its line on stderr."""
    def run(*argv: str | Path) -> str:
        capsys.readouterr()
        before = sorted(tmp_path.rglob("*"))
        code = cli.main([str(word) for word in argv])
        captured = capsys.readouterr()
        assert (code, captured.out) == (2, ""), captured.err
        assert captured.err.startswith("sbedge: ") and captured.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before, "files were left behind"
        return captured.err
    return run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return add_tokenizer(copy_checkpoint(TINY, tmp_path / "model"))


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    sbedge.export_model(TINY, tmp_path / "m.gguf", quant="f32")
    return tmp_path / "m.gguf"


@pytest.fixture
def onnx_folder(tmp_path: Path) -> Path:
    sbedge.export_model(TINY, tmp_path / "m-onnx", quant="f32")
    return tmp_path / "m-onnx"


# --- checkpoints, through every command that opens one -------------------------------------------------
def remove_tensor(folder: Path) -> str:
    edit_tensors(folder, remove="model.layers.2.attn.k_proj.bias")
    return "tensor model.layers.2.attn.k_proj.bias is missing, expected shape [32]"


def add_tensor(folder: Path) -> str:
    edit_tensors(folder, add={"model.layers.9.strange": np.zeros(3, np.float32)})
    return "tensor model.layers.9.strange with shape [3]"


def misshape_tensor(folder: Path) -> str:
    edit_tensors(folder, add={"lm_head.weight": np.zeros((64, 320), np.float32)})
    return "tensor lm_head.weight has shape [64, 320], expected [320, 64]"


def cut_safetensors(folder: Path) -> str:
    truncate(folder / "model.safetensors")
    return "model.safetensors: damaged or truncated"


def break_json(folder: Path) -> str:
    (folder / "config.json").write_text("{'hidden_size': 64}")
    return "config.json: not valid JSON"


def version_two(folder: Path) -> str:
    edit_config(folder, model_type="sse_swa_moba")
    return "SpikingBrain2.0"


def other_model(folder: Path) -> str:
    edit_config(folder, model_type="llama")
    return "model_type is 'llama', expected 'gla_swa'"


def short_convolution(folder: Path) -> str:
    edit_config(folder, use_short_conv=True)
    return "use_short_conv is true"


def large_tokenizer(folder: Path) -> str:
    add_tokenizer(folder, extra_tokens=100)
    return "the tokenizer has 360 tokens but the model's vocabulary only 320"


def broken_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{}")
    return "tokenizer.json"


@pytest.mark.parametrize("damage", [remove_tensor, add_tensor, misshape_tensor, cut_safetensors, break_json,
                                    version_two, other_model, short_convolution, large_tokenizer, broken_tokenizer])
@pytest.mark.parametrize("command", ["generate", "export gguf", "export onnx", "inspect"])
def test_a_damaged_checkpoint_is_refused_by_name(
        command: str, damage: Callable[[Path], str], checkpoint: Path, tmp_path: Path, fails: Fails) -> None:
    message = damage(checkpoint)
    argv = {"generate": ["generate", checkpoint, "-p", "hi"], "inspect": ["inspect", checkpoint],
            "export gguf": ["export", checkpoint, "-o", tmp_path / "out.gguf"],
            "export onnx": ["export", checkpoint, "-o", tmp_path / "out"]}[command]
    line = fails(*argv)
    assert message in line and str(checkpoint) in line


def test_weight_scales_that_are_wrong_stop_an_export_without_a_trace(tmp_path: Path, fails: Fails) -> None:
    folder = copy_checkpoint(W8ASPIKE, tmp_path / "model")
    edit_tensors(folder, add={"model.layers.3.mlp.up_proj.weight_quantizer.scales": np.zeros((256, 1, 1), np.float32)})
    for out in ("out.gguf", "out-onnx"):
        assert "model.layers.3.mlp.up_proj.weight" in fails("export", folder, "-o", tmp_path / out)


# --- requests ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("ids", ["320", "1,-1", "99999999999999"])
def test_a_token_id_out_of_range_is_named(ids: str, tmp_path: Path, fails: Fails) -> None:
    line = fails("logits", TINY, "--ids", ids, "-o", tmp_path / "x.npy")
    assert f"token id {ids.split(',')[-1]} is outside the model's vocabulary of 320" in line


@pytest.mark.parametrize("ids", ["", "one", "1,2.5", "9" * 30])
def test_ids_that_are_no_numbers_are_refused(ids: str, tmp_path: Path, fails: Fails) -> None:
    fails("logits", TINY, f"--ids={ids}", "-o", tmp_path / "x.npy")


def test_id_files_that_hold_no_ids_are_refused(tmp_path: Path, fails: Fails) -> None:
    np.save(tmp_path / "floats.npy", np.ones(3))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04" + bytes(40))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object))
    for name in ("floats.npy", "broken.npy", "empty.npy", "zip.npy", "pickle.npy", "absent.txt"):
        line = fails("logits", TINY, "--ids-file", tmp_path / name, "-o", tmp_path / "x.npy")
        assert name in line or "whole numbers" in line


def test_an_empty_prompt_is_refused(checkpoint: Path, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "empty.txt").touch()
    assert "the prompt is empty" in fails("generate", checkpoint, "-p", "")
    assert "the prompt is empty" in fails("generate", checkpoint, "-f", tmp_path / "empty.txt")
    assert "the prompt is empty" in fails("demo", "--dir", tmp_path / "demo", "-p", " ")


def test_a_prompt_that_is_not_utf8_is_refused(checkpoint: Path, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert "latin.txt: not UTF-8 text (byte 0)" in fails("generate", checkpoint, "-f", tmp_path / "latin.txt")


@pytest.mark.parametrize(("option", "value", "word"), [
    ("--temperature", "-1", "temperature"), ("--temperature", "nan", "temperature"), ("--top-p", "0", "top_p"),
    ("--min-p", "2", "min_p"), ("--seed", "-3", "seed"), ("--logit-bias", "5", "ID=VALUE"),
    ("--logit-bias", "999=1", "999"), ("--logprobs", "-1", "logprobs"), ("-n", "0", "max_tokens"),
    ("--stop", "", "stop"), ("--threads", "0", "threads"), ("--engine", "onnx", "engine"),
])
def test_an_option_out_of_range_is_named(option: str, value: str, word: str, checkpoint: Path, fails: Fails) -> None:
    assert word in fails("generate", checkpoint, "-p", "hi", f"{option}={value}" if option[1] == "-" else f"-n{value}")


def test_text_for_a_model_without_tokenizer_is_refused(fails: Fails) -> None:
    assert "carries no tokenizer" in fails("generate", TINY, "-p", "hi")
    assert "no tokenizer here" in fails("tokenize", TINY, "-p", "hi")


def test_a_line_that_is_no_json_string_is_numbered(checkpoint: Path, tmp_path: Path, fails: Fails) -> None:
    for bad in ("plain", "[1]", "", '"open'):
        (tmp_path / "texts").write_text(f'"fine"\n{bad}\n')
        assert "texts: line 2 is not a JSON string" in fails("tokenize", checkpoint, "--file", tmp_path / "texts",
                                                             "--json")


@pytest.mark.parametrize(("options", "message"), [
    (["-o", "x.gguf", "--quant", "int4"], "quant 'int4' is not known for gguf, expected one of f32, f16, q8_0"),
    (["-o", "x", "--quant", "q4_k"], "quant 'q4_k' is not known for onnx, expected one of f32, int8, int4"),
    (["-o", "x.gguf", "--quant", "q8_0", "--spike-k", "3"], "quant q8_0 has no spikes to set; choose w8-spike"),
    (["-o", "x.gguf", "--quant", "w8-spike", "--spike-k", "0"], "spike k is 0, expected 0.1 to 1000"),
    (["-o", "x.gguf", "--quant", "w8-spike", "--dead-zone", "-1"], "dead zone is -1, expected 0 to 100"),
    (["-o", "x", "--dead-zone", "1"], "int8 has no spikes to set; choose w8-spike"),
    (["-o", "x.gguf", "--embedding-quant", "nope"], "'nope'"),
    (["-o", "x", "--embedding-quant", "nope"], "'nope'"),
    (["-o", "x.bin"], "which format is this"),
    (["-o", "no/such/x.gguf"], "no such folder"),
])
def test_export_options_that_do_not_exist_are_refused(
        options: list[str], message: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
        fails: Fails) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails("export", checkpoint, *options)


# --- outputs -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ["gguf", "onnx", "logits"])
def test_an_existing_output_needs_force(command: str, checkpoint: Path, tmp_path: Path, fails: Fails) -> None:
    out = tmp_path / {"gguf": "m.gguf", "onnx": "m-onnx", "logits": "x.npy"}[command]
    argv = {"logits": ["logits", checkpoint, "--ids", "1", "-o", out]}.get(
        command, ["export", checkpoint, "-o", out, "--no-report"])
    assert cli.main([str(word) for word in argv]) == 0
    contents = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    line = fails(*argv)
    assert f"{out}: exists already" in line and "--force" in line
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == contents
    assert cli.main([*(str(word) for word in argv), "--force"]) == 0


def test_force_never_replaces_a_folder_that_is_no_export(checkpoint: Path, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.txt").write_text("ten years")
    assert "something else" in fails("export", checkpoint, "-o", tmp_path / "thesis", "--format", "onnx", "--force")
    for out in (checkpoint, tmp_path):
        assert "the checkpoint itself" in fails("export", checkpoint, "-o", out, "--format", "onnx", "--force")


@pytest.mark.skipif(sys.platform == "win32", reason="the file size limit that stands for a full disk is POSIX's")
@pytest.mark.parametrize("out", ["m.gguf", "m-onnx", "x.npy"])
def test_a_disk_that_fills_up_midway_leaves_nothing(out: str, checkpoint: Path, tmp_path: Path) -> None:
    limited = ("import resource, signal, sys; from sbedge.apps.cli import main;"
               "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.exit(main(sys.argv[1:]))")
    ids = ",".join(["1"] * 200)     # 200 * 320 * 4 bytes of logits
    argv = ["logits", checkpoint, "--ids", ids, "-o", tmp_path / out, "--chunk", "20"] if out == "x.npy" else [
        "export", checkpoint, "-o", tmp_path / out, "--quant", "f32", "--no-report"]
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run([sys.executable, "-c", limited, *map(str, argv)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"sbedge: {tmp_path / out}: cannot be written")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", ["m.gguf", "m-onnx"])
def test_an_interrupted_export_leaves_nothing(
        out: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    @contextmanager
    def interrupting() -> Iterator[Callable[..., None]]:
        def report(what: str, done: int, total: int) -> None:
            if done > total // 2:
                raise KeyboardInterrupt
        yield report

    monkeypatch.setattr("sbedge.apps.commands.export.progress_bar", interrupting)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["export", str(checkpoint), "-o", str(tmp_path / out)]) == 130
    assert sorted(tmp_path.rglob("*")) == before and capsys.readouterr() == ("", "")


def test_a_state_that_does_not_fit_on_the_disk_leaves_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sbedge.state_file.os.replace", full)
    session = sbedge.load(TINY)
    session.feed([1, 2, 3])
    with pytest.raises(sbedge.SbedgeError, match=r"s\.state: state cannot be written \(.*No space left"):
        session.save(tmp_path / "s.state")
    assert list(tmp_path.iterdir()) == []


# --- GGUF files --------------------------------------------------------------------------------------
@needs_ggml
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.3, 0.999])
def test_a_truncated_gguf_is_refused(share: float, gguf_file: Path, fails: Fails) -> None:
    truncate(gguf_file, share)
    for argv in (["generate", gguf_file, "-p", "hi"], ["inspect", gguf_file], ["tokenize", gguf_file, "-p", "hi"]):
        assert str(gguf_file) in fails(*argv)


@needs_ggml
@pytest.mark.parametrize("field", ["tensors", "keys", "first key length", "dimension", "offset"])
def test_a_gguf_with_absurd_sizes_is_refused_at_once(field: str, gguf_file: Path, fails: Fails) -> None:
    data = bytearray(gguf_file.read_bytes())
    name = b"token_embd.weight"     # followed by its number of dimensions, their sizes, type and offset
    after = data.index(name) + len(name) + 4
    at = {"tensors": 8, "keys": 16, "first key length": 24, "dimension": after, "offset": after + 20}[field]
    struct.pack_into("<Q", data, at, 1 << 60)
    gguf_file.write_bytes(data)
    for argv in (["generate", gguf_file, "-p", "hi"], ["inspect", gguf_file]):
        assert "damaged or truncated GGUF" in fails(*argv)


@needs_ggml
def test_a_gguf_whose_numbers_ask_for_absurd_memory_is_refused(gguf_file: Path, fails: Fails) -> None:
    data = bytearray(gguf_file.read_bytes())
    key = b"spikingbrain.attention.sliding_window"
    at = data.index(key) + len(key)
    for window in (0, 0xFFFFFFFF):
        struct.pack_into("<I", data, at + 4, window)
        gguf_file.write_bytes(data)
        assert "sliding_window" in fails("logits", gguf_file, "--ids", "1", "-o", gguf_file.parent / "x.npy")


@needs_ggml
def test_a_gguf_of_another_architecture_is_refused_by_name(gguf_file: Path, fails: Fails) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes().replace(b"spikingbrain", b"spikingbrane", 1))
    for argv in (["generate", gguf_file, "-p", "hi"], ["inspect", gguf_file]):
        assert str(gguf_file) in fails(*argv)


# --- ONNX folders ------------------------------------------------------------------------------------
def largest(folder: Path) -> Path:
    return max(folder.glob("model.onnx*"), key=lambda path: path.stat().st_size)


def cut_data(folder: Path) -> None:
    truncate(largest(folder))


def remove_data(folder: Path) -> None:
    largest(folder).unlink()


def cut_graph(folder: Path) -> None:
    truncate(folder / "model.onnx")


def garble_graph(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\xff" * 1000)


def break_onnx_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def drop_our_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["sbedge"]
    (folder / "config.json").write_text(json.dumps(config))


def other_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["sbedge"]["config"]["num_key_value_heads"] = 4
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [cut_data, remove_data, cut_graph, garble_graph, break_onnx_json, drop_our_config,
                                    other_sizes])
def test_a_damaged_onnx_folder_is_refused(damage: Callable[[Path], None], onnx_folder: Path, fails: Fails) -> None:
    damage(onnx_folder)
    line = fails("logits", onnx_folder, "--ids", "1", "-o", onnx_folder.parent / "x.npy")
    assert str(onnx_folder) in line


@pytest.mark.parametrize("damage", [cut_graph, garble_graph, break_onnx_json, drop_our_config])
def test_inspect_refuses_a_damaged_onnx_folder(damage: Callable[[Path], None], onnx_folder: Path, fails: Fails) -> None:
    damage(onnx_folder)
    assert str(onnx_folder) in fails("inspect", onnx_folder)
