"""pytest tests/test_cli_state.py: `sbedge state` writes a state, goes on from it, and says what one holds or lacks."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import TINY, W8ASPIKE, add_tokenizer, copy_checkpoint
from safetensors.numpy import save_file
from tiny import write_tiny_checkpoint

import sbedge
from sbedge.apps import cli
from sbedge.apps.state_view import StateView
from sbedge.errors import StateError
from sbedge.quant.ggml_library import ggml_available
from sbedge.reference import Reference
from sbedge.runtime.sampling import Sampling
from sbedge.state import State

TEXT = "Once upon a time there was a neuron"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(add_tokenizer(copy_checkpoint(TINY, tmp_path_factory.mktemp("state") / "model")))


@pytest.fixture
def saved(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    path = str(tmp_path / "s.state")
    assert cli.main(["state", "save", model, "-p", TEXT, "-o", path]) == 0
    capsys.readouterr()
    return path


def out(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert cli.main(["state", *argv]) == code
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of an error that exits with 2 and prints nothing else."""
    assert cli.main(["state", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("sbedge: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("action", ["save", "load", "info", "diff"])
def test_help_of_every_action_has_an_example(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["state", action, "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and f"example:\n  sbedge state {action} " in text and "--json" in text


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["save", "m"], ["save", "m", "-p", "x", "--ids", "1", "-o", "f"],
                                  ["info"], ["diff", "one"]])
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["state", *argv])
    assert exit.value.code == 2 and capsys.readouterr().out == ""


# --- save and load -----------------------------------------------------------------------------------
def test_load_goes_on_where_save_stopped(
        model: str, saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = sbedge.load(model)
    expected = "".join(piece.text for piece in session.generate(TEXT, max_tokens=12))
    assert out(capsys, "load", model, saved, "-n", "12") == expected + "\n"
    expected = "".join(piece.text for piece in sbedge.load(model).generate(TEXT + ", and", max_tokens=12))
    assert out(capsys, "load", model, saved, "-p", ", and", "-n", "12") == expected + "\n"


def test_load_prints_json_and_writes_the_next_state(
        model: str, saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = out(capsys, "load", model, saved, "-n", "12")
    first = json.loads(out(capsys, "load", model, saved, "-n", "5", "--json", "-o", str(tmp_path / "next")))
    assert len(first["tokens"]) == 5 and first["position"] == len(TEXT) + 4
    assert first["text"] + out(capsys, "load", model, str(tmp_path / "next"), "-n", "7") == whole


def test_the_sampling_of_a_saved_session_goes_on_unless_options_say_otherwise(
        model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = sbedge.load(model)
    session.sampling = Sampling(temperature=1, seed=3)
    list(session.generate(TEXT, max_tokens=4))
    session.save(tmp_path / "s.state")
    cold = out(capsys, "load", model, str(tmp_path / "s.state"), "-n", "12", "--top-k", "1")
    warm = out(capsys, "load", model, str(tmp_path / "s.state"), "-n", "12")
    assert warm == "".join(piece.text for piece in session.generate(max_tokens=12)) + "\n" != cold


def test_an_option_wins_over_the_saved_sampling_even_if_it_is_the_usual_one(
        model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = sbedge.load(model)
    session.sampling = Sampling(temperature=1, seed=3)
    session.feed(TEXT)
    session.save(tmp_path / "s.state")
    expected = "".join(piece.text for piece in sbedge.load(model).generate(TEXT, max_tokens=12)) + "\n"
    assert out(capsys, "load", model, str(tmp_path / "s.state"), "-n", "12", "--temperature", "0") == expected
    assert out(capsys, "load", model, str(tmp_path / "s.state"), "-n", "12") != expected


def test_save_takes_ids_and_a_bare_state_can_be_loaded(
        model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(out(capsys, "save", model, "--ids", "1,2,3", "-o", str(tmp_path / "a"), "--json"))
    assert report["position"] == 3 and report["fingerprint"] == sbedge.Checkpoint(model).fingerprint
    engine = Reference(model)
    state = engine.new_state()
    engine.forward([1, 2, 3], state)
    state.save(tmp_path / "b")
    assert State.load(tmp_path / "a", engine.config) == state
    assert out(capsys, "load", model, str(tmp_path / "a"), "-n", "5") == out(
        capsys, "load", model, str(tmp_path / "b"), "-n", "5")


@pytest.mark.skipif(not ggml_available(), reason="the ggml libraries are not installed")
def test_a_state_of_the_checkpoint_goes_on_under_its_gguf(
        model: str, saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sbedge.export_model(model, tmp_path / "m.gguf", quant="f32")
    assert out(capsys, "load", str(tmp_path / "m.gguf"), saved) == out(capsys, "load", model, saved)


def test_save_replaces_nothing_unasked(model: str, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(saved).read_bytes()
    assert "exists already" in fails(capsys, "save", model, "-p", "x", "-o", saved)
    assert Path(saved).read_bytes() == before
    assert cli.main(["state", "save", model, "-p", "x", "-o", saved, "--force"]) == 0
    assert Path(saved).read_bytes() != before


def test_the_state_of_another_checkpoint_is_refused(
        saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", seed=5)
    assert "belongs to another model" in fails(capsys, "load", str(other), saved)


@pytest.mark.parametrize("argv", [["info"], ["diff", "."], ["load"]])
def test_what_is_no_state_is_one_line(
        argv: list[str], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "note.txt").write_text("ten years of work")
    for name, problem in (("note.txt", "not a saved state, or damaged"), ("none", "No such file"), (".", "not a file")):
        path = str(tmp_path / name)
        action, *rest = argv
        assert problem in fails(capsys, action, *([model, path] if action == "load" else [path, *rest]))


# --- info --------------------------------------------------------------------------------------------
def test_info_tells_what_a_session_holds(
        model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = sbedge.load(model)
    list(session.chat("hello", max_tokens=4))
    session.feed([1])
    session.save(tmp_path / "s.state")
    found = json.loads(out(capsys, "info", str(tmp_path / "s.state"), "--json"))
    assert found["session"].pop("sampling")["temperature"] == 0
    assert found == {
        "file": str(tmp_path / "s.state"), "file_bytes": (tmp_path / "s.state").stat().st_size,
        "format": "sbedge-state-2", "position": session.state.position,
        "layers": "GWGW", "kv_heads": 2, "head_size": 16,
        "sliding_window": 16, "window_type": "float32", "vocabulary": 320, "texts": found["texts"],
        "fingerprint": session.state.fingerprint,
        "session": {"tokens": session.state.position, "messages": session.messages, "replying": False}}
    text = out(capsys, "info", str(tmp_path / "s.state"))
    assert f"position:   {session.state.position} tokens read\n" in text and "2 messages" in text
    assert session.state.fingerprint in text


def test_info_reads_bare_int8_and_old_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Reference(W8ASPIKE)
    state = engine.new_state()
    engine.forward([1, 2, 3], state)
    state.save(tmp_path / "new", {"note": "x" * 7})
    save_file(dict(state.arrays), tmp_path / "old", {"format": "sbedge-state-1", "position": "3", "note": "x" * 7})
    new, old = (json.loads(out(capsys, "info", str(tmp_path / name), "--json")) for name in ("new", "old"))
    assert new["window_type"] == "int8" and new["session"] is None and new["texts"] == {"note": 7}
    same = ("position", "layers", "kv_heads", "head_size", "sliding_window", "window_type", "session", "texts")
    assert {key: new[key] for key in same} == {key: old[key] for key in same}
    assert (old["fingerprint"], old["vocabulary"]) == (None, 0)
    assert "only its sizes tell" in out(capsys, "info", str(tmp_path / "old"))


@pytest.mark.parametrize("session", ["{", "[]", "7", '{"tokens": 1}', '{"tokens": "AAAA", "messages": [3]}'])
def test_info_of_a_damaged_session_is_one_line(
        session: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    State(Reference(TINY).config).save(tmp_path / "s", {"session": session})
    assert "the saved session is damaged" in fails(capsys, "info", str(tmp_path / "s"))


# --- diff --------------------------------------------------------------------------------------------
def state_after(folder: Path, ids: list[int]) -> State:
    engine = Reference(folder)
    state = engine.new_state()
    for id in ids:
        engine.forward([id], state)
    return state


def test_equal_states_differ_in_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (TINY, W8ASPIKE):
        for name in "ab":
            state_after(folder, [1, 2, 3]).save(tmp_path / name, {"note": name})
        found = json.loads(out(capsys, "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"))
        assert found["equal"] and found["last_logits"] == 0 and {layer["max_abs"] for layer in found["layers"]} == {0}
        assert out(capsys, "diff", str(tmp_path / "a"), str(tmp_path / "b")).endswith("equal\n")


def test_diff_finds_the_layer_and_the_size_of_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_after(TINY, [1, 2, 3])
    state.save(tmp_path / "a")
    state.arrays["2.recurrent_state"].flat[7] += np.float32(0.5)
    state.save(tmp_path / "b")
    found = json.loads(out(capsys, "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json", code=1))
    assert {layer["array"]: layer["max_abs"] for layer in found["layers"] if layer["max_abs"]} == {
        "2.recurrent_state": pytest.approx(0.5, rel=1e-5)}
    assert not found["equal"] and found["last_logits"] == 0
    assert "2.recurrent_state:  0.5\n" in out(capsys, "diff", str(tmp_path / "a"), str(tmp_path / "b"), code=1)


@pytest.mark.parametrize(("folder", "window"), [(TINY, 16), (W8ASPIKE, 64)])
def test_windows_of_different_positions_are_compared_where_they_hold_the_same_tokens(
        folder: Path, window: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.random.default_rng(0).integers(0, 250, window + 9).tolist()
    for name, count in (("a", window + 9), ("b", window + 3), ("c", 2)):
        state_after(folder, ids[:count]).save(tmp_path / name)
    found = json.loads(out(capsys, "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json", code=1))
    assert found["position"] == [window + 9, window + 3] and found["window_tokens"] == window - 6
    by_name: dict[str, Any] = {layer["array"]: layer["max_abs"] for layer in found["layers"]}
    assert by_name["1.keys"] == by_name["1.values"] == 0 < by_name["0.recurrent_state"]
    assert "nothing to compare" in out(capsys, "diff", str(tmp_path / "a"), str(tmp_path / "c"), code=1)


def test_states_of_models_of_other_sizes_cannot_be_compared(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state_after(TINY, [1]).save(tmp_path / "a")
    state_after(W8ASPIKE, [1]).save(tmp_path / "b")
    assert "only states of one model can be compared" in fails(capsys, "diff", str(tmp_path / "a"), str(tmp_path / "b"))


@pytest.mark.parametrize("change", ["name", "layer", "shape", "scales", "rank"])
def test_a_file_whose_arrays_make_no_state_is_refused(change: str, tmp_path: Path) -> None:
    arrays = dict(state_after(W8ASPIKE, [1, 2]).arrays)
    if change == "name":
        arrays["0.recurrent"] = arrays["0.recurrent_state"]
    elif change == "layer":
        del arrays["1.values"]
    elif change == "shape":
        arrays["0.recurrent_state"] = np.zeros((1, 64, 32), np.float32)
    elif change == "scales":
        arrays["1.key_scales"] = np.zeros((64, 3), np.float32)
    else:
        arrays["1.keys"] = np.zeros((), np.int8)
    save_file(arrays, tmp_path / "s", {"format": "sbedge-state-1", "position": "2"})
    with pytest.raises(StateError, match=r"which no state has|lacks some|different sizes"):
        StateView(tmp_path / "s")
