"""pytest tests/test_half_window.py: windows kept in float16 take half the memory and leave the model what it is."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compare import assert_close, kl_divergence, run
from tiny import write_tiny_checkpoint

import sbedge
from sbedge.apps.state_view import StateView
from sbedge.errors import InputError
from sbedge.export import export_model
from sbedge.quant.ggml_library import ggml_available
from sbedge.reference import Reference
from sbedge.runtime.engine import forward_batch
from sbedge.runtime.load import open_engine
from sbedge.runtime.native.library import load_native
from sbedge.state import State, is_ring

pytestmark = pytest.mark.skipif(not ggml_available() or load_native() is None,
                                reason="needs a ggml library and the native kernels")
HEADS = [(4, 4), (4, 1), (7, 1), (8, 1)]
TOLERANCE = 4e-3        # float16 rounds by 2^-11


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    write_tiny_checkpoint(folder / "c", sliding_window=7)
    export_model(folder / "c", folder / "m.gguf", quant="f32")
    return folder


def ids_for(config, count, seed=3):
    return np.random.default_rng(seed).integers(0, config.vocab_size, count)


@pytest.mark.parametrize("sizes", [(), (1,) * 30, (5, 1, 1, 9), (8, 8)], ids=str)
def test_logits_are_the_references_in_any_chunking(model, sizes):
    reference, engine = Reference(model / "c"), open_engine(model / "m.gguf", window="f16")
    ids = ids_for(engine.config, 40)
    found, state = run(engine, ids, sizes)
    assert_close(run(reference, ids)[0], found, TOLERANCE)
    assert sum(a.nbytes for name, a in state.arrays.items() if is_ring(name)) * 2 == sum(
        a.nbytes for name, a in reference.new_state().arrays.items() if is_ring(name))
    assert {a.dtype for name, a in state.arrays.items() if is_ring(name)} == {np.dtype(np.float16)}


@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_any_number_of_heads_may_share_a_key(heads, groups, tmp_path):
    write_tiny_checkpoint(tmp_path / "c", sliding_window=9, hidden_size=32 * heads, num_attention_heads=heads,
                          num_key_value_heads=groups)
    export_model(tmp_path / "c", tmp_path / "m.gguf", quant="f32")
    engine = open_engine(tmp_path / "m.gguf", window="f16")
    ids = ids_for(engine.config, 30)
    assert_close(run(Reference(tmp_path / "c"), ids)[0], run(engine, ids, (4, 1, 1))[0], TOLERANCE)


def test_a_batch_is_as_each_sequence_alone(model):
    engine = open_engine(model / "m.gguf", window="f16")
    states = [run(engine, ids_for(engine.config, n, n))[1] for n in (1, 6, 20)]
    alone = [state.copy() for state in states]
    together = forward_batch(engine, [5, 6, 7], states)
    for token, state, row in zip((5, 6, 7), alone, together, strict=True):
        assert_close(engine.forward([token], state)[0], row, 1e-4)


def test_saved_states_move_between_float16_and_float32(model, tmp_path):
    half, full = (open_engine(model / "m.gguf", window=window) for window in ("f16", "f32"))
    ids, after = ids_for(half.config, 25), [3, 1, 4]
    for source, target in ((half, full), (full, half)):
        state = run(source, ids)[1]
        state.save(tmp_path / "s.state")
        moved = State.load(tmp_path / "s.state", target.config, target.fingerprint)
        assert moved.layout == target.new_state().layout and moved.position == 25
        moved.save(tmp_path / "t.state")
        assert_close(run(source, after, state=state.copy())[0], run(target, after, state=moved)[0], TOLERANCE)
        views = [StateView(tmp_path / name) for name in ("s.state", "t.state")]
        assert {view.sizes()["window_type"] for view in views} == {"float16", "float32"}
        assert max(layer["max_abs"] for layer in views[0].difference(views[1])["layers"]) < 2e-3
    exact = run(half, ids)[1]
    exact.save(tmp_path / "u.state")        # float16 to float32 loses nothing, and comes back as it was
    widened = State.load(tmp_path / "u.state", full.config)
    widened.save(tmp_path / "v.state")
    assert State.load(tmp_path / "v.state", half.config, half.fingerprint) == exact


def test_what_float16_cannot_hold_becomes_its_largest_number(model, tmp_path):
    half, full = (open_engine(model / "m.gguf", window=window) for window in ("f16", "f32"))
    state = run(full, [1, 2, 3])[1]
    name = next(name for name in state.arrays if name.endswith(".values"))
    state.arrays[name][1, 0, :2] = 1e9, -1e9
    state.save(tmp_path / "s.state")
    assert State.load(tmp_path / "s.state", half.config).arrays[name][1, 0, :2].tolist() == [65504, -65504]


def test_a_spiking_export_predicts_the_same_with_windows_in_float16(tmp_path):
    """Rounded keys flip some counts, which moves logits: hence by distribution and likeliest token."""
    write_tiny_checkpoint(tmp_path / "c", hidden_size=128, intermediate_size=128)
    export_model(tmp_path / "c", tmp_path / "m.gguf", quant="w8-spike")
    full, half = (open_engine(tmp_path / "m.gguf", window=window) for window in ("f32", "f16"))
    ids = ids_for(full.config, 200)
    expected, found = run(full, ids)[0], run(half, ids, (50,))[0]
    assert kl_divergence(expected, found) < 0.005
    assert (expected.argmax(-1) == found.argmax(-1)).mean() > 0.8     # random weights often have near ties


def test_what_cannot_keep_float16_says_so(model, tmp_path):
    export_model(model / "c", tmp_path / "onnx", format="onnx", quant="f32")
    shutil.copytree(model / "c", tmp_path / "c")
    for path in (tmp_path / "onnx", tmp_path / "c"):
        with pytest.raises(InputError, match="keeps its windows in float32"):
            open_engine(path, window="f16")
    write_tiny_checkpoint(tmp_path / "w8", w8aspike=True)
    export_model(tmp_path / "w8", tmp_path / "w8.gguf", quant="w8-spike")
    with pytest.raises(InputError, match="keeps its windows in int8"):
        open_engine(tmp_path / "w8.gguf", window="f16")
    with pytest.raises(InputError, match="window is 'f8', expected one of f32, f16"):
        open_engine(model / "m.gguf", window="f8")


def test_without_the_kernels_it_says_so_in_one_line(model, tmp_path):
    command = [sys.executable, "-m", "sbedge", "logits", model / "m.gguf", "--ids", "1,2", "--window", "f16", "-o",
               tmp_path / "x.npy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env={**os.environ, "SBEDGE_NATIVE": "0"}, cwd=Path(sbedge.__file__).parents[1])
    assert done.returncode == 2 and "float16 windows need the native kernels" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "x.npy").exists()
