"""pytest tests/test_onnx_ops.py: the bodies of our ops compute what model.md says, at their hard ends too."""
from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from golden import W8ASPIKE
from onnx import TensorProto, helper

from sbedge.checkpoint import Checkpoint
from sbedge.errors import ExportError
from sbedge.export.onnx import events, ops, write_onnx
from sbedge.reference import rms_norm, rope_angles, spike_encode


def run(op, inputs, outputs, **attributes):
    """The outputs of one node of our op set, run from its body by onnxruntime."""
    node = helper.make_node(op, list(inputs), outputs, domain=ops.DOMAIN, **attributes)
    values = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
              for name, array in inputs.items()]
    graph = helper.make_graph([node], "g", values, [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs])
    opsets = [helper.make_opsetid(domain, version) for domain, version in (
        ("", ops.OPSET), ("com.microsoft", 1), (ops.DOMAIN, ops.VERSION))]
    model = helper.make_model(graph, functions=ops.functions({op}), opset_imports=opsets, ir_version=ops.IR_VERSION)
    return ort.InferenceSession(model.SerializeToString()).run(None, inputs)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_spikes_are_the_references(size):
    x = normal(1, 7, 96) * np.float32(size)
    count, threshold = run("SpikeEncode", {"x": x}, ["count", "threshold"], k=3.0)
    expected_count, expected_threshold = spike_encode(x, 3.0)
    np.testing.assert_allclose(threshold, expected_threshold, rtol=1e-6)
    # The mean may differ in its last bit, which moves a count by one where the ratio lies at a half.
    assert (count != expected_count).mean() < 0.01 and np.abs(count - expected_count).max() <= 1


def test_spike_counts_round_half_to_even():
    x = np.array([[[1.0, -1, 3, -3, 5, 2, 3, 6]]], np.float32)     # mean 3, threshold 2 at k = 1.5
    count, threshold = run("SpikeEncode", {"x": x}, ["count", "threshold"], k=1.5)
    assert threshold == 2 and count.tolist() == [[[0, -0.0, 2, -2, 2, 1, 2, 3]]]


@pytest.mark.parametrize("largest", [0, 3, 127, 128, 129, 2_000, ops.MAX_COUNT])
@pytest.mark.parametrize("beyond", [False, True], ids=["int8", "beyond"])
def test_spiking_linears_sum_whole_numbers_exactly(largest, beyond):
    rng = np.random.default_rng(largest)
    n, K, N = 5, 384, 33
    count = rng.integers(-largest, largest + 1, (1, n, K)).astype(np.float32)
    count[0, 0, 0] = -largest
    codes = rng.integers(-128, 128, (N, K)).astype(np.int32)
    if beyond:
        codes[rng.random((N, K)) < 0.01] *= 9
    scales = 2.0 ** rng.integers(-3, 3, (N, K // 128)).astype(np.float32)      # powers of two keep the sums exact
    names = ("codes", "scales", "residual_inputs", "residual_outputs", "residual_values")
    weights = dict(zip(names, map(np.ascontiguousarray, events.spike_weights(codes, scales)), strict=True))
    assert beyond or not weights["residual_values"].size
    y, = run("SpikeLinear", {"count": count, "threshold": np.full((1, n, 1), 0.5, np.float32), **weights}, ["y"])
    exact = count[0].astype(np.float64) @ (codes * np.repeat(scales, 128, axis=1)).astype(np.float64).T * 0.5
    np.testing.assert_allclose(y[0], exact, rtol=1e-6, atol=np.abs(exact).max() * 1e-6)


def test_counts_too_large_for_exact_sums_are_refused_at_export(tmp_path, monkeypatch):
    monkeypatch.setattr("sbedge.export.onnx.MAX_COUNT", 3 * 128 - 1)
    checkpoint = Checkpoint(W8ASPIKE)
    with pytest.raises(ExportError, match="use --quant f32"):
        write_onnx(checkpoint, tmp_path / "m", quant="int8")


@pytest.mark.parametrize("gate_size", [0.1, 10, 1000])
@pytest.mark.parametrize("n", [1, 3, 200])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (7, 1), (28, 4)])
def test_gated_linear_attention_holds_from_no_decay_to_full_decay(gate_size, n, heads, groups):
    d = 8
    q, k, v = normal(1, n, heads * d), normal(1, n, groups * d, seed=1), normal(1, n, groups * d, seed=2)
    gate, weight, past = normal(1, n, groups * d, seed=3) * np.float32(gate_size), normal(d), normal(1, groups, d, d)
    y, present = run("GatedLinearAttention", dict(q=q, k=k, v=v, gate=gate, weight=weight, past=past),
                     ["y", "present"], num_heads=heads, kv_num_heads=groups, scale=d ** -0.5, epsilon=1e-6)
    S, rows = past[0].astype(np.float64), []
    decay = np.exp(-np.logaddexp(0, -gate[0].astype(np.float64)).reshape(n, groups, d) / 16)
    for t in range(n):
        key, value = np.maximum(k[0, t], 0).reshape(groups, d), v[0, t].reshape(groups, d)
        S = decay[t][:, :, None] * S + key[:, :, None] * value[:, None, :]
        rows.append(np.maximum(q[0, t], 0).reshape(groups, -1, d) @ S * d ** -0.5)
    np.testing.assert_allclose(y[0], rms_norm(np.array(rows), weight, 1e-6).reshape(n, -1), atol=1e-4)
    np.testing.assert_allclose(present[0], S, atol=1e-4)


@pytest.mark.parametrize("position", [0, 10_000_000, 2 ** 40])
def test_rotary_angles_are_right_at_any_position(position):
    frequencies = 1e6 ** (-np.arange(0, 64, 2, dtype=np.float64) / 64)
    positions = np.arange(position, position + 5)
    cos, sin = run("RotaryAngles", {"p": positions[None], "f": frequencies}, ["cos", "sin"])
    for found, expected in zip((cos[0], sin[0]), rope_angles(positions, 64, 1e6), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("n", [1, 4, 5, 6, 23])
def test_a_window_holds_exactly_its_last_tokens_within_a_chunk_too(n):
    """Keys of zero weigh all visible tokens alike, so each output is the mean of the last W values."""
    W, G, d = 5, 1, 4
    values = np.arange(40, dtype=np.float32)
    ring = np.zeros((1, W, G, d), np.float32)
    for seen in range(7):
        ring[0, seen % W] = values[seen]
    new = np.repeat(values[7:7 + n], d).reshape(1, n, d)
    flat = np.ones((1, n, d // 2), np.float32)
    y, keys, present = run(
        "SlidingWindowAttention", {
            "q": normal(1, n, 2 * d), "k": np.zeros((1, n, d), np.float32), "v": new, "past_key": np.zeros_like(ring),
            "past_value": ring, "cos": flat, "sin": np.zeros_like(flat), "p": np.arange(7, 7 + n)[None]},
        ["y", "keys", "present"], num_heads=2, kv_num_heads=1, scale=0.5)
    expected = [values[7 + t - W + 1:7 + t + 1].mean() for t in range(n)]
    np.testing.assert_allclose(y[0], np.repeat(expected, 2 * d).reshape(n, -1), rtol=1e-6)
    assert not keys.any()
    for seen in range(7 + n - W, 7 + n):
        assert (present[0, seen % W] == values[seen]).all()
