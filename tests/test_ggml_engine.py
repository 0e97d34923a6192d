"""pytest tests/test_ggml_engine.py: a GGUF export computes what the reference computes, however it is streamed."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from compare import assert_close, assert_same_model, assert_same_spiking, kl_divergence, run
from golden import FOLDERS, TINY, W8ASPIKE
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny_checkpoint

from sbedge.checkpoint import Checkpoint
from sbedge.errors import InputError, ModelFileError, StateError
from sbedge.export.gguf.writer import write_gguf
from sbedge.export.spikes import Spikes, event_weight, exported_config
from sbedge.quant.ggml_library import ggml_available
from sbedge.reference import Reference
from sbedge.runtime.ggml_engine import GgmlEngine
from sbedge.state import State

pytestmark = pytest.mark.skipif(not ggml_available(), reason="neither llama-cpp-python nor libggml-python is installed")
F32 = 1e-4      # how closely float32 exports follow the reference


def export(folder, path, quant="f32", **options):
    write_gguf(Checkpoint(folder), path, quant=quant, **options)
    return GgmlEngine(path)


def ids_of(config, count, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, count)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_published_logits_and_greedy_tokens_are_matched(folder, tmp_path):
    golden = np.load(folder / "expected.npz")
    engine = export(folder, tmp_path / "m.gguf")
    same = assert_same_model if engine.config.spike_k else assert_close
    logits, state = run(engine, golden["input_ids"])
    same(golden["logits_full"], logits, 1e-3)
    streamed, _ = run(engine, golden["input_ids"], [int(golden["prefill_len"])] + [1] * 1000)
    same(golden["logits_stream"], streamed, 1e-3)
    greedy = []
    for _ in golden["greedy_ids"]:
        greedy.append(int(state.last_logits.argmax()))
        engine.forward(greedy[-1:], state)
    assert greedy == golden["greedy_ids"].tolist()


@pytest.mark.parametrize("overrides", [
    {"attn_layers": []}, {"attn_layers": [0, 1, 2, 3]}, {"attn_layers": [0, 3]}, {"tie_word_embeddings": True},
    {"num_hidden_layers": 1}, {"sliding_window": 1}, {"sliding_window": 300}])
def test_other_layer_patterns_follow_the_reference(overrides, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "c", **overrides)
    engine, reference = export(folder, tmp_path / "m.gguf"), Reference(folder)
    ids = ids_of(engine.config, 50)
    assert_close(run(reference, ids)[0], run(engine, ids, [7, 1, 1, 20])[0], F32)


@pytest.fixture(scope="module")
def tiny_pair(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "m.gguf"
    return export(TINY, path), Reference(TINY)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), seed=st.integers(0, 9))
def test_any_chunking_gives_the_same_logits_and_state(tiny_pair, sizes, seed):
    engine, reference = tiny_pair
    ids = ids_of(engine.config, sum(sizes), seed)
    expected, theirs = run(reference, ids)
    logits, state = run(engine, ids, sizes)
    assert_close(expected, logits, F32)
    assert state.position == theirs.position
    for name, array in theirs.arrays.items():
        np.testing.assert_allclose(state.arrays[name], array, rtol=1e-4, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("position", [100_003, 10_000_000, 2**31 + 5])
def test_rotary_angles_stay_exact_at_large_positions(tiny_pair, position):
    engine, reference = tiny_pair
    ids = ids_of(engine.config, 45)
    states = [e.new_state() for e in (engine, reference)]
    for state in states:
        state.position = position
    assert_close(run(reference, ids, state=states[1])[0], run(engine, ids, [5, 1, 1, 20], states[0])[0], F32)


def test_a_state_moves_between_reference_and_engine(tiny_pair):
    engine, reference = tiny_pair
    ids = ids_of(engine.config, 60)
    expected, _ = run(reference, ids)
    for first, second in ((engine, reference), (reference, engine)):
        state = first.new_state()
        first.forward(ids[:33], state)
        assert_close(expected[33:], run(second, ids[33:], [1, 9], state)[0], F32)


def test_a_copied_state_has_its_own_future(tiny_pair):
    engine, _ = tiny_pair
    ids = ids_of(engine.config, 30)
    state = engine.new_state()
    engine.forward(ids[:20], state)
    twin = state.copy()
    engine.forward(ids[20:], state)
    assert twin.position == 20
    engine.forward(ids[20:], twin)
    assert twin == state


@pytest.mark.parametrize("quant", ["f32", "w8-spike"])
def test_w8aspike_follows_the_reference_with_codes_beyond_int8(quant, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "c", w8aspike=True)
    engine, reference = export(folder, tmp_path / "m.gguf", quant), Reference(folder)
    ids = ids_of(engine.config, 60)
    expected, theirs = run(reference, ids)
    logits, state = run(engine, ids, [20, 1, 1, 1])
    assert_same_model(expected, logits)
    assert state.arrays["1.keys"].dtype == np.int8
    for name in ("1.keys", "1.values"):     # a flipped spike may move a code by one
        assert (np.abs(state.arrays[name].astype(int) - theirs.arrays[name]) <= 1).mean() > 0.99


def test_w8_spike_holds_the_published_weights_bit_for_bit(tmp_path):
    from sbedge.gguf_format import gguf_name
    from sbedge.gguf_reader import read_gguf
    from sbedge.runtime.ggml_linears import decode_event_layout
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "c", w8aspike=True))
    write_gguf(checkpoint, tmp_path / "m.gguf", quant="w8-spike")
    file = read_gguf(tmp_path / "m.gguf")
    names = [n for n in checkpoint.names() if checkpoint.is_quantized(n)]
    assert any(t.endswith("residual_value") for t in file.tensors)
    for name in names:
        np.testing.assert_array_equal(decode_event_layout(file, gguf_name(name)), checkpoint.weight(name))


@pytest.mark.parametrize("quant", ["w8-spike", "w4-spike"])
@pytest.mark.parametrize(("overrides", "spikes"), [
    ({}, Spikes()), ({}, Spikes(k=4, dead_zone=0.3)),
    ({"hidden_size": 6 * 24, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 300}, Spikes()),
    ({"num_hidden_layers": 2, "intermediate_size": 2112}, Spikes())])
def test_a_base_checkpoint_exported_with_spikes_follows_the_reference(overrides, spikes, quant, tmp_path):
    """Widths that are no multiple of 128 or 64 included: groups are shorter then, and 4 bits give way to 8. Those of
    several stripes, the last one narrower, too."""
    folder = write_tiny_checkpoint(tmp_path / "c", **overrides)
    checkpoint = Checkpoint(folder)
    engine = export(folder, tmp_path / "m.gguf", quant, spikes=spikes, embedding_quant="f32")
    assert engine.config == exported_config(checkpoint, quant, spikes)
    reference = Reference(checkpoint, config=engine.config, weight=lambda name: event_weight(checkpoint, name, quant))
    assert_same_spiking(reference, engine)
    assert_same_spiking(reference, engine, [1] * 16)


def test_an_int8_window_continues_from_a_state_that_another_engine_moved(tmp_path):
    engine, reference = export(W8ASPIKE, tmp_path / "m.gguf"), Reference(W8ASPIKE)
    ids = ids_of(engine.config, 100)
    expected, _ = run(reference, ids)
    state = engine.new_state()
    for i, start in enumerate(range(0, 100, 20)):
        logits, _ = run((engine, reference)[i % 2], ids[start:start + 20], [3, 1], state)
        assert_same_model(expected[start:start + 20], logits)


# KL (nats) against float32 measured on this checkpoint, with room: f16 2e-7, q8_0 2e-4, q4_0 0.011, q4_k 0.005
@pytest.mark.parametrize(("quant", "bound"), [("f16", 1e-5), ("q8_0", 1e-3), ("q6_k", 1e-3), ("q4_k", 0.02),
                                              ("q4_0", 0.04)])
def test_quantized_exports_stay_close_to_float32(quant, bound, tmp_path):
    engine, reference = export(TINY, tmp_path / "m.gguf", quant), Reference(TINY)
    ids = ids_of(engine.config, 64)
    expected, _ = run(reference, ids)
    assert kl_divergence(expected, run(engine, ids)[0]) < bound
    assert kl_divergence(expected, run(engine, ids, [1] * 64)[0]) < bound


def test_logits_come_only_where_asked(tiny_pair):
    engine, _ = tiny_pair
    ids = ids_of(engine.config, 10)
    state = engine.new_state()
    assert engine.forward(ids, state, logits="none") is None
    assert state.last_logits is None
    assert engine.forward(ids, state, logits="last").shape == (1, engine.config.vocab_size)
    assert engine.forward(ids, state, logits="all").shape == (10, engine.config.vocab_size)
    assert engine.forward(ids[:1], state, logits="none") is None
    assert state.position == 31


def test_refused_input_leaves_the_state_untouched(tiny_pair, tmp_path):
    engine, _ = tiny_pair
    state = engine.new_state()
    engine.forward([1, 2, 3], state)
    before = state.copy()
    for ids in ([], [1, engine.config.vocab_size], [-1]):
        with pytest.raises(InputError):
            engine.forward(ids, state)
    assert state == before
    other = Checkpoint(write_tiny_checkpoint(tmp_path / "c", sliding_window=99)).config
    with pytest.raises(StateError):
        engine.forward([1], State(other))


def test_two_sessions_in_threads_do_not_disturb_each_other(tiny_pair):
    import threading
    engine, _ = tiny_pair
    ids = [ids_of(engine.config, 60, seed) for seed in (1, 2)]
    alone = [run(engine, x, [1] * 60)[0] for x in ids]
    together: list[np.ndarray] = [np.empty(0)] * 2

    def work(which: int) -> None:
        together[which] = run(engine, ids[which], [1] * 60)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, found in zip(alone, together, strict=True):
        np.testing.assert_array_equal(found, expected)


def rewritten(source, path, change, **keys):
    """A copy of a GGUF file; `change(name, data)` of each tensor gives data, None to leave it out, or {name: (data,
    type)} in its place. `keys` are metadata without their prefix, '_' for '.'."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "spikingbrain")
    writer.add_custom_alignment(reader.alignment)
    for field in reader.fields.values():
        if field.name.partition(".")[0] != "GGUF" and field.name not in writer.kv_data[0]:
            value = keys.get(field.name.removeprefix("spikingbrain.").replace(".", "_"), field.contents())
            writer.add_key_value(field.name, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        new = change(tensor.name, np.array(tensor.data))
        new = new if isinstance(new, dict) else {tensor.name: (new, tensor.tensor_type)}
        for name, (data, kind) in new.items():
            if data is not None:
                writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_with_a_missing_or_wrong_tensor_is_refused_by_name(tmp_path):
    source = tmp_path / "m.gguf"
    write_gguf(Checkpoint(TINY), source, quant="f32")
    wrong = {
        "missing": lambda name, data: None if name == "blk.1.attn_k.weight" else data,
        "expected shape": lambda name, data: data[:-1] if name == "blk.1.attn_k.weight" else data,
    }
    for what, change in wrong.items():
        with pytest.raises(ModelFileError, match=r"blk\.1\.attn_k\.weight.*" + what):
            GgmlEngine(rewritten(source, tmp_path / "bad.gguf", change))


def test_event_layouts_where_nothing_spikes_are_refused(tmp_path):
    from gguf import GGMLQuantizationType as Type

    source, as_it_is = tmp_path / "m.gguf", lambda name, data: data
    write_gguf(Checkpoint(write_tiny_checkpoint(tmp_path / "c")), source, quant="w8-spike")

    def renamed(old, new):
        return lambda name, data: {new: (data, Type.F32)} if name == old else data

    def plain(name, data):
        if name == "blk.2.ffn_up.codes":
            return {"blk.2.ffn_up.weight": (np.zeros((96, 64), np.float32), Type.F32)}
        return None if name == "blk.2.ffn_up.scales" else data

    for change, keys, line in (
            (renamed("output_norm.weight", "output_norm.codes"), {}, r"output_norm\.weight is missing"),
            (renamed("token_embd.weight", "token_embd.codes"), {}, r"token_embd\.weight is missing"),
            (as_it_is, {"spike_k": 0.0}, r"blk\.0\.attn_q\.weight is missing"),
            (as_it_is, {"spike_down": False}, r"blk\.0\.ffn_down\.weight is missing"),
            (plain, {}, r"blk\.2\.ffn_up\.weight is plain.*all or none")):
        with pytest.raises(ModelFileError, match=line) as error:
            GgmlEngine(rewritten(source, tmp_path / "bad.gguf", change, **keys))
        assert "\n" not in str(error.value)


def test_linears_of_one_input_may_have_different_formats(tmp_path):
    """As programs mix them that quantize by their own lights."""
    from gguf import GGMLQuantizationType as Type
    from gguf import quants

    source = tmp_path / "m.gguf"
    write_gguf(Checkpoint(TINY), source, quant="f32")

    def mixed(name, data):
        if name.rpartition("blk.")[2].partition(".")[2] in ("attn_q.weight", "ffn_up.weight", "attn_gk_a.weight"):
            return {name: (quants.quantize(data, Type.Q8_0), Type.Q8_0)}
        return data

    engine, reference = GgmlEngine(rewritten(source, tmp_path / "mixed.gguf", mixed)), Reference(TINY)
    ids = ids_of(engine.config, 40)
    for sizes in ((), [1] * 40):
        assert kl_divergence(run(reference, ids)[0], run(engine, ids, sizes)[0]) < 0.005


@pytest.mark.parametrize("vocab_size", [128, 132, 129])
def test_q4_0_matrices_of_any_height_run_on_ggml_itself(vocab_size, tmp_path, monkeypatch):
    """Its interleaved layout takes multiples of 8 rows and nothing else."""
    monkeypatch.setattr("sbedge.runtime.ggml_weights.load_native", lambda: None)
    folder = write_tiny_checkpoint(tmp_path / "c", vocab_size=vocab_size)
    engine = export(folder, tmp_path / "m.gguf", "q4_0", embedding_quant="q4_0")
    logits, _ = run(engine, ids_of(engine.config, 20))
    assert kl_divergence(run(Reference(folder), ids_of(engine.config, 20))[0], logits) < 1


def test_scales_of_event_layouts_are_no_matrices_that_only_ggml_multiplies():
    """Those of a 7B w4-spike file have a million entries: its products stay on our threads all the same."""
    from sbedge.runtime.ggml_weights import SMALL_WEIGHTS, _needs_ggml, _Source
    large = _Source("F16", (64, SMALL_WEIGHTS // 32), 0, 0, 0)
    assert not _needs_ggml({"blk.0.ffn_up.scales": large}, {})
    assert _needs_ggml({"blk.0.ffn_up.weight": large}, {})


def test_an_absurd_number_of_layers_is_refused_before_anything_is_made_of_it(tmp_path):
    from sbedge.gguf_format import config_from_metadata
    metadata = {"general.architecture": "spikingbrain", "spikingbrain.block_count": 1 << 20,
                "spikingbrain.attention.sliding_window_pattern": [True, False] * (1 << 19)}
    with pytest.raises(ModelFileError, match="has 1048576 layers, expected at most 4096"):
        config_from_metadata(metadata, "m.gguf")


def test_event_layouts_of_earlier_files_in_one_stripe_still_run(tmp_path, monkeypatch):
    from sbedge.export.gguf import tensors
    folder = write_tiny_checkpoint(tmp_path / "c", num_hidden_layers=2, intermediate_size=1100)
    now = export(folder, tmp_path / "now.gguf", "w8-spike")

    def plain(checkpoint, name):
        codes, *others = made(checkpoint, name)
        out, width = checkpoint.shapes[name]
        return [replace(codes, shape=(width, out)), *others]

    made = tensors.w8_tensors
    monkeypatch.setattr(tensors, "w8_tensors", plain)
    monkeypatch.setattr(tensors, "to_stripes", lambda rows: rows)
    before = export(folder, tmp_path / "before.gguf", "w8-spike")
    ids = ids_of(now.config, 20)
    np.testing.assert_array_equal(run(now, ids)[0], run(before, ids)[0])
    np.testing.assert_array_equal(run(now, ids, [1] * 20)[0], run(before, ids, [1] * 20)[0])


def test_an_interrupt_during_a_run_leaves_the_state_as_after_it(tmp_path):
    """Python notices an interrupt when ggml has returned: the arrays have moved on, so must the position and logits."""
    engine = export(TINY, tmp_path / "m.gguf")
    ids = ids_of(engine.config, 12)
    whole, interrupted = engine.new_state(), engine.new_state()
    run_graph = engine.f.backend_graph_compute

    def then_interrupt(*arguments):
        run_graph(*arguments)
        raise KeyboardInterrupt

    class Interrupting:
        backend_graph_compute = staticmethod(then_interrupt)

        def __getattr__(self, name):
            return getattr(functions, name)

    functions = engine.f
    for piece in (ids[:7], ids[7:8]):
        engine.forward(piece, whole)
        engine.f = Interrupting()
        with pytest.raises(KeyboardInterrupt):
            engine.forward(piece, interrupted)
        engine.f = functions
    assert interrupted == whole
    np.testing.assert_array_equal(engine.forward(ids[8:], interrupted), engine.forward(ids[8:], whole))


def test_traffic_is_of_the_passes_that_ran(tmp_path):
    """64 tokens share a pass over the weights; linears whose outputs nobody asked for do not run and do not count."""
    engine = export(write_tiny_checkpoint(tmp_path / "c"), tmp_path / "m.gguf", "w8-spike")
    if engine._native is None:
        pytest.skip("only the native kernels leave silent channels out")

    def dense(count, logits):
        before = engine.traffic.fetched, engine.traffic.dense
        engine.forward(ids_of(engine.config, count), engine.new_state(), logits=logits)
        fetched, stored = engine.traffic.fetched - before[0], engine.traffic.dense - before[1]
        assert 0 < fetched <= stored
        return stored

    stored = sum(t.nbytes for name, t in engine._file.tensors.items() if name.endswith(".codes"))
    assert [dense(count, "last") for count in (1, 64, 65, 200)] == [stored, stored, 2 * stored, 4 * stored]
    assert dense(1, "none") < stored
