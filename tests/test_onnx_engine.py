"""pytest tests/test_onnx_engine.py: an ONNX export computes what the reference computes, however it is streamed."""
from __future__ import annotations

import threading

import numpy as np
import onnxruntime as ort
import pytest
from compare import assert_close, assert_same_model, kl_divergence, run
from golden import FOLDERS, TINY, W8ASPIKE
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny_checkpoint

from sbedge.checkpoint import Checkpoint
from sbedge.errors import EngineUnavailable, InputError, ModelFileError, StateError
from sbedge.export.onnx import write_onnx
from sbedge.reference import Reference
from sbedge.runtime import onnx_engine
from sbedge.runtime.onnx_engine import OnnxEngine

F32 = 1e-4      # how closely float32 exports follow the reference


def export(checkpoint, folder, quant="f32", **options):
    write_onnx(Checkpoint(checkpoint), folder, quant=quant, **options)
    return OnnxEngine(folder, threads=1)


def ids_of(config, count, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, count)


@pytest.mark.parametrize("quant", ["f32", "int8"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_published_logits_and_greedy_tokens_are_matched(folder, quant, tmp_path):
    spiking = Checkpoint(folder).is_w8aspike
    if quant == "int8" and not spiking:
        pytest.skip("int8 is exact for W8ASpike only")
    golden = np.load(folder / "expected.npz")
    engine = export(folder, tmp_path / "m", quant, embedding_quant="f32")
    same = assert_same_model if spiking else assert_close
    logits, state = run(engine, golden["input_ids"])
    same(golden["logits_full"], logits, 1e-3)
    streamed, _ = run(engine, golden["input_ids"], [int(golden["prefill_len"])] + [1] * 1000)
    same(golden["logits_stream"], streamed, 1e-3)
    greedy = []
    for _ in golden["greedy_ids"]:
        assert state.last_logits is not None
        greedy.append(int(state.last_logits.argmax()))
        engine.forward(greedy[-1:], state)
    assert greedy == golden["greedy_ids"].tolist()


@pytest.mark.parametrize("overrides", [
    {"attn_layers": []}, {"attn_layers": [0, 1, 2, 3]}, {"attn_layers": [2], "dtype": "BF16"},
    {"tie_word_embeddings": True, "dtype": "F16"}, {"sliding_window": 1}, {"rope_theta": 12345.678},
    {"norm_eps": 1e-3}, {"num_hidden_layers": 1}])
def test_every_kind_of_checkpoint_follows_the_reference(overrides, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "c", **overrides)
    engine, reference = export(folder, tmp_path / "m"), Reference(folder)
    ids = ids_of(engine.config, 50)
    assert_close(run(reference, ids)[0], run(engine, ids, [7, 1])[0], F32)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "w8aspike"])
def pair(request, tmp_path_factory):
    """An engine and the reference on the same random checkpoint; W8ASpike with codes beyond int8."""
    root = tmp_path_factory.mktemp("pair")
    folder = write_tiny_checkpoint(root / "c", w8aspike=request.param)
    engine = export(folder, root / "m", "int8" if request.param else "f32", embedding_quant="f32")
    return engine, Reference(folder), assert_same_model if request.param else assert_close


@given(sizes=st.lists(st.integers(1, 40), max_size=8))
@settings(max_examples=15, deadline=None)
def test_any_chunking_gives_the_same_logits_and_state(pair, sizes):
    engine, _, same = pair
    ids = ids_of(engine.config, 60)
    whole, state = run(engine, ids)
    chunked, other = run(engine, ids, sizes)
    same(whole, chunked, F32)
    assert other.position == state.position == 60


def test_inputs_longer_than_a_run_of_the_session_are_split(pair, monkeypatch):
    engine, reference, same = pair
    ids = ids_of(engine.config, 70)
    expected, _ = run(reference, ids)
    monkeypatch.setattr(engine, "chunk", 32)
    found, state = run(engine, ids)
    same(expected, found, F32)
    last = engine.forward(ids, engine.new_state())
    assert last.shape == (1, engine.config.vocab_size)
    assert_close(found[-1], last[0], 1e-5)      # one row of logits is summed in another order than many
    assert state.last_logits is not None and np.array_equal(state.last_logits, found[-1])


@pytest.mark.parametrize("position", [100_003, 10_000_000, 3_000_000_000])
def test_any_position_follows_the_reference(pair, position):
    """Many short continuations of one state: a flipped spike count spoils the rest of one of them only."""
    engine, reference, same = pair
    _, begun = run(reference, ids_of(engine.config, 45))
    begun.position = position
    texts = [ids_of(engine.config, 8, seed) for seed in range(12)]
    expected, found = ([run(e, ids, [5, 1], begun.copy())[0] for ids in texts] for e in (reference, engine))
    same(np.concatenate(expected), np.concatenate(found), F32)


def test_states_move_between_the_reference_and_the_engine(pair):
    engine, reference, same = pair
    ids = ids_of(engine.config, 60)
    expected, _ = run(reference, ids)
    for first, second in ((engine, reference), (reference, engine)):
        _, state = run(first, ids[:23])
        found, _ = run(second, ids[23:], [5], state)
        same(expected[23:], found, F32)


def test_a_state_of_the_engine_equals_the_references(pair):
    engine, reference, _ = pair
    ids = ids_of(engine.config, 33)
    mine, theirs = (run(e, ids[:20], (), e.new_state())[1] for e in (engine, reference))
    for name, array in mine.arrays.items():
        if "keys" in name or "values" in name:      # int8 codes may differ by one where rounding ties
            tolerance = 1 if array.dtype == np.int8 else F32
            assert_close(theirs.arrays[name].astype(np.float32), array.astype(np.float32), tolerance)
        else:
            assert_close(theirs.arrays[name], array, 1e-3)


def test_codes_beyond_int8_stay_exact(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "c", w8aspike=True, num_hidden_layers=2)
    checkpoint = Checkpoint(folder)
    codes, _ = checkpoint.weight_codes("model.layers.0.mlp.up_proj.weight")
    assert 0.005 < (np.abs(codes) > 127).mean() < 0.02
    ids = ids_of(checkpoint.config, 30)
    int8 = run(export(folder, tmp_path / "int8", "int8", embedding_quant="f32"), ids)[0]
    assert_same_model(run(Reference(checkpoint), ids)[0], int8, F32)
    # Float weights give the same model, so int8 lost nothing.
    assert_same_model(run(export(folder, tmp_path / "f32"), ids)[0], int8, F32)


def test_a_w8aspike_model_without_codes_beyond_int8_runs(tmp_path):
    assert (np.abs(Checkpoint(W8ASPIKE).weight_codes("model.layers.0.attn.q_proj.weight")[0]) <= 127).all()
    ids = np.arange(30)
    engine = export(W8ASPIKE, tmp_path / "m", "int8", embedding_quant="f32")
    assert_same_model(run(Reference(W8ASPIKE), ids)[0], run(engine, ids)[0], F32)


@pytest.mark.parametrize(("quant", "bound"), [("int8", 1e-3), ("int4", 0.15)])
@pytest.mark.parametrize("tied", [False, True])
def test_quantized_exports_stay_near_float32(quant, bound, tied, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "c", hidden_size=60, num_attention_heads=6, num_key_value_heads=2,
                                   intermediate_size=100, tie_word_embeddings=tied)
    engine = export(folder, tmp_path / "m", quant)
    ids = ids_of(engine.config, 50)
    expected, _ = run(Reference(folder), ids)
    divergence = kl_divergence(expected, run(engine, ids, [17])[0])
    # Random weights forgive little: tied ones give logits of variance D, hence sharp distributions.
    assert 0 < divergence < bound * (60 if tied else 1)


@pytest.mark.parametrize("embedding_quant", ["f32", "int8", "int4"])
def test_embeddings_and_lm_head_have_a_setting_of_their_own(embedding_quant, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "c")
    engine = export(folder, tmp_path / "m", "f32", embedding_quant=embedding_quant)
    ids = ids_of(engine.config, 40)
    divergence = kl_divergence(run(Reference(folder), ids)[0], run(engine, ids)[0])
    assert divergence < {"f32": 1e-9, "int8": 1e-3, "int4": 0.1}[embedding_quant]


def test_logits_are_computed_only_where_asked(pair):
    engine, *_ = pair
    ids = ids_of(engine.config, 9)
    state = engine.new_state()
    assert engine.forward(ids, state, logits="none") is None
    assert state.last_logits is None and state.position == 9
    other = engine.new_state()
    assert engine.forward(ids, other).shape == (1, engine.config.vocab_size)
    assert np.array_equal(state.block, other.block)


def test_bad_ids_and_foreign_states_leave_the_state_untouched(pair, tmp_path):
    engine, *_ = pair
    state = engine.new_state()
    engine.forward([1, 2, 3], state)
    before = state.copy()
    for bad in ([], [engine.config.vocab_size], [-1], [0.5]):
        with pytest.raises(InputError):
            engine.forward(bad, state)
    assert state == before
    foreign = Reference(write_tiny_checkpoint(tmp_path / "c", sliding_window=7)).new_state()
    with pytest.raises(StateError, match="other sizes"):
        engine.forward([1], foreign)
    assert foreign.position == 0 and not foreign.block.any()


def test_an_interrupted_run_leaves_a_state_one_can_continue(pair, monkeypatch):
    engine, *_ = pair
    ids = ids_of(engine.config, 12)
    _, expected = run(engine, ids)
    session = engine._session

    class Interrupted:
        io_binding = session.io_binding

        def run_with_iobinding(self, *arguments):
            session.run_with_iobinding(*arguments)
            raise KeyboardInterrupt     # where Python raises it: after the call into onnxruntime

    _, state = run(engine, ids[:9])
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_session", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            engine.forward(ids[9:], state)
    assert state.position == 12
    assert expected.last_logits is not None and state.last_logits is not None
    assert_close(expected.last_logits, state.last_logits, F32)
    assert_close(run(engine, [1], (), expected)[0], run(engine, [1], (), state)[0], F32)


def test_a_run_that_fails_is_one_line_and_leaves_the_state_where_it_was(pair, monkeypatch):
    engine, *_ = pair
    ids = ids_of(engine.config, 12)
    _, state = run(engine, ids[:9])

    class Failing:
        io_binding = engine._session.io_binding

        def run_with_iobinding(self, *arguments):
            raise RuntimeError("Non-zero status code\nreturned while running a node")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_session", Failing())
        with pytest.raises(ModelFileError, match=r"cannot run it .*while running a node") as error:
            engine.forward(ids[9:], state)
    assert state.position == 9 and "\n" not in str(error.value)


def test_a_run_works_in_the_memory_of_the_state(pair):
    engine, *_ = pair
    state = engine.new_state()
    block = state.block
    run(engine, ids_of(engine.config, 40), [1, 20, 1], state)
    assert state.block is block and block.any()


def test_copies_of_a_state_go_their_own_ways(pair):
    engine, *_ = pair
    ids = ids_of(engine.config, 30)
    _, state = run(engine, ids[:20])
    fork = state.copy()
    first = engine.forward(ids[20:], fork)
    engine.forward(ids[:3], state)
    _, again = run(engine, ids[:20])
    assert np.array_equal(first, engine.forward(ids[20:], again))


def test_threads_with_states_of_their_own_do_not_disturb_each_other(pair):
    engine, *_ = pair
    streams = [ids_of(engine.config, 40, seed) for seed in range(4)]
    expected = [run(engine, ids, [1] * 40)[0] for ids in streams]
    found: dict[int, np.ndarray] = {}

    def work(index):
        found[index] = run(engine, streams[index], [1] * 40)[0]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(streams))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index, logits in enumerate(expected):
        assert np.array_equal(found[index], logits)


def test_bindings_do_not_pile_up(pair):
    engine, *_ = pair
    for _ in range(40):
        state = engine.new_state()
        engine.forward([1, 2], state)
        engine.forward([3], state.copy())
    assert len(engine._bindings) <= onnx_engine.MAX_BINDINGS


def test_an_onnxruntime_too_old_for_gla_layers_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ort, "__version__", "1.23.2")
    monkeypatch.setattr(onnx_engine, "load_native", lambda: None)       # our kernels need no LinearAttention
    export(write_tiny_checkpoint(tmp_path / "w", attn_layers=[0, 1, 2, 3]), tmp_path / "window")     # needs none
    with pytest.raises(EngineUnavailable, match=r"1\.29 or newer, found 1\.23\.2; run: pip install"):
        export(TINY, tmp_path / "m")


def test_a_plain_onnxruntime_session_runs_the_model(tmp_path):
    write_onnx(Checkpoint(TINY), tmp_path / "m", quant="f32")
    session = ort.InferenceSession(tmp_path / "m/model.onnx")
    kinds = {"tensor(float)": np.float32, "tensor(int8)": np.int8}
    past = {i.name: np.zeros(i.shape, kinds[i.type]) for i in session.get_inputs()[3:]}
    golden = np.load(TINY / "expected.npz")
    for position, token in enumerate(golden["input_ids"]):
        logits, *present = session.run(None, {
            "input_ids": np.array([[token]]), "position_ids": np.array([[position]]),
            "logits_to_keep": np.array([1]), **past})
        past = dict(zip(past, present, strict=True))
        assert_close(golden["logits_stream"][position], logits[0, 0], 1e-3)
