"""`sbedge.load` finds out what a path holds, and says plainly what it found when that is no model."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden import TINY, W8ASPIKE, add_tokenizer, copy_checkpoint

import sbedge
from sbedge.errors import CheckpointError, EngineUnavailable, InputError, ModelFileError, TokenizerError
from sbedge.quant.ggml_library import ggml_available
from sbedge.reference import Reference
from sbedge.runtime import load as loading


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(copy_checkpoint(TINY, tmp_path_factory.mktemp("load") / "model"))


@pytest.fixture(scope="module", params=["ggml", "onnx"])
def exported(request: pytest.FixtureRequest, checkpoint: Path) -> Path:
    if request.param == "ggml" and not ggml_available():
        pytest.skip("the ggml libraries are not installed")
    out = checkpoint.parent / ("model.gguf" if request.param == "ggml" else "model-onnx")
    sbedge.export_model(checkpoint, out, quant="f32")
    return out


# --- what is public ----------------------------------------------------------------------------------
def test_every_public_name_can_be_imported_and_there_are_at_most_ten() -> None:
    assert len(sbedge.__all__) <= 10
    for name in sbedge.__all__:
        assert getattr(sbedge, name) is not None
        assert name in dir(sbedge)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sbedge.nonsense


def test_importing_sbedge_imports_no_library() -> None:
    code = "import sbedge, sys; print([m for m in ('numpy', 'onnxruntime', 'onnx', 'tokenizers') if m in sys.modules])"
    root = Path(sbedge.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


# --- loading -----------------------------------------------------------------------------------------
def test_a_checkpoint_folder_runs_on_the_reference(checkpoint: Path) -> None:
    session = sbedge.load(checkpoint)
    assert isinstance(session.engine, Reference)
    assert len([id for piece in session.generate("hello", max_tokens=5) for id in piece.ids]) <= 5


def test_an_export_gives_the_greedy_tokens_of_its_checkpoint(checkpoint: Path, exported: Path) -> None:
    def ids(path: Path) -> list[int]:
        return [id for piece in sbedge.load(path, threads=1).generate("hello", max_tokens=12) for id in piece.ids]

    assert ids(exported) == ids(checkpoint)


def test_an_export_carries_tokenizer_and_chat_template(checkpoint: Path, exported: Path) -> None:
    ours, theirs = sbedge.load(exported).tokenizer, sbedge.load(checkpoint).tokenizer
    text = "a cab, é 大 <|im_end|>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.chat_template == theirs.chat_template and ours.eos_ids >= theirs.eos_ids


def test_a_state_saved_under_one_engine_continues_under_another(
        checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    prompt = list(range(40))
    first, second = sbedge.load(checkpoint).engine, sbedge.load(exported).engine
    state = first.new_state()
    first.forward(prompt, state)
    state.save(tmp_path / "s.state")
    moved = sbedge.State.load(tmp_path / "s.state", second.config)
    a, b = first.forward([7, 8], state, logits="all"), second.forward([7, 8], moved, logits="all")
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-3)


def test_a_model_without_a_tokenizer_takes_ids_and_says_why_it_takes_no_text() -> None:
    session = sbedge.load(W8ASPIKE)
    pieces = list(session.generate([1, 2, 3], max_tokens=4))
    assert "".join(piece.text for piece in pieces) == "" and sum(len(piece.ids) for piece in pieces) > 0
    with pytest.raises(TokenizerError, match="carries no tokenizer"):
        session.generate("text")


def test_a_folder_that_is_both_goes_by_the_engine(checkpoint: Path, tmp_path: Path) -> None:
    both = copy_checkpoint(TINY, tmp_path / "both")
    (both / "model.onnx").write_bytes(b"")
    assert loading.model_kind(both) == "onnx"
    assert loading.model_kind(both, "reference") == "checkpoint"


# --- refusals ----------------------------------------------------------------------------------------
def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"nowhere: no such file or folder; expected a \.gguf file"):
        sbedge.load(tmp_path / "nowhere")


def test_a_folder_or_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"neither model\.onnx nor model\.safetensors"):
        sbedge.load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelFileError, match="starts with b'hell'"):
        sbedge.load(tmp_path / "notes.txt")


def test_a_file_inside_a_model_folder_points_to_the_folder() -> None:
    with pytest.raises(ModelFileError, match="name the folder"):
        sbedge.load(TINY / "model.safetensors")


def test_an_engine_that_cannot_run_the_file_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="a checkpoint folder runs on engine 'reference', not on 'onnx'"):
        sbedge.load(checkpoint, engine="onnx")
    with pytest.raises(InputError, match="expected one of auto, ggml, onnx, reference"):
        sbedge.load(checkpoint, engine="cuda")


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_an_impossible_number_of_threads_is_refused(checkpoint: Path, threads: int) -> None:
    with pytest.raises(InputError, match=f"threads is {threads}"):
        sbedge.load(checkpoint, threads=threads)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = add_tokenizer(copy_checkpoint(TINY, tmp_path / "model"), extra_tokens=100)
    with pytest.raises(TokenizerError, match="the tokenizer has 360 tokens but the model's vocabulary only 320"):
        sbedge.load(folder)


def test_a_missing_ggml_says_which_command_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sbedge.quant import ggml_library
    sbedge.export_model(TINY, tmp_path / "m.gguf", quant="f32")
    monkeypatch.setattr(ggml_library, "_library_folder", lambda package: None)
    ggml_library.load_ggml.cache_clear()
    try:
        with pytest.raises(EngineUnavailable, match=r"pip install 'sbedge\[ggml\]'"):
            sbedge.load(tmp_path / "m.gguf")
    finally:
        ggml_library.load_ggml.cache_clear()


def test_a_broken_checkpoint_keeps_its_own_error(tmp_path: Path) -> None:
    folder = copy_checkpoint(TINY, tmp_path / "model")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        sbedge.load(folder)
