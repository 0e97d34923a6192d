"""pytest tests/test_onnx_native.py: our kernels compute what the bodies of our ops do, in place or not."""
from __future__ import annotations

import ctypes as c
import threading

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isas import BEST, ISAS
from isas import lib as LIBRARY
from onnx import TensorProto, helper, numpy_helper

from sbedge.export.onnx import events, ops
from sbedge.export.onnx.spike_ops import GROUPS
from sbedge.quant.event_layout import quantize_w4, to_stripes
from sbedge.reference import rope_angles


@pytest.fixture(params=ISAS)
def isa(request):
    LIBRARY.set_isa(request.param.encode())
    yield request.param
    LIBRARY.set_isa(BEST)


class Node:
    """One node of our op set in a session of its own, on its kernel or (native=False) on its body.

    `constants` are initializers, `inputs` are fed; both by the node's input names in order.
    """

    def __init__(self, op, inputs, outputs, constants=(), native=True, threads=2, digits=2, **attributes):
        self.inputs = {name: array for name, array in inputs.items() if name not in constants}
        self.outputs = outputs
        node = helper.make_node(op, list(inputs), list(outputs), domain=ops.DOMAIN, **attributes)
        given = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
                 for name, array in self.inputs.items()]
        made = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), None)
                for name, kind in outputs.items()]
        graph = helper.make_graph([node], "g", given, made,
                                  [numpy_helper.from_array(inputs[name], name) for name in constants])
        opsets = [helper.make_opsetid(domain, version) for domain, version in (
            ("", ops.OPSET), ("com.microsoft", 1), (ops.DOMAIN, ops.VERSION))]
        model = helper.make_model(graph, functions=ops.functions({op}, digits), opset_imports=opsets,
                                  ir_version=ops.IR_VERSION)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        if native:
            options.add_session_config_entry("ai.sbedge.threads", str(threads))
            options.register_custom_ops_library(str(LIBRARY.path))
        self.session = ort.InferenceSession(model.SerializeToString(), options)

    def __call__(self, **changes):
        return dict(zip(self.outputs, self.session.run(None, {**self.inputs, **changes}), strict=True))

    def in_place(self, aliases):
        """Run with each output in `aliases` (output -> input) in the very memory of that input."""
        binding = self.session.io_binding()
        held = {name: array.copy() for name, array in self.inputs.items()}
        for name, array in held.items():
            binding.bind_cpu_input(name, array)
        for name in self.outputs:
            if name not in aliases:
                binding.bind_output(name)
                continue
            array = held[aliases[name]]
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self.session.run_with_iobinding(binding)
        copied = dict(zip(self.outputs, binding.copy_outputs_to_cpu(), strict=True))
        return {name: held[aliases[name]] if name in aliases else copied[name] for name in self.outputs}


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def refused(match, op, inputs, outputs, **options):
    with pytest.raises(Exception, match=match) as error:
        Node(op, inputs, outputs, **options)()
    assert "ai.sbedge" in str(error.value)


# --- spikes --------------------------------------------------------------------------------------
SPIKES = {"count": np.float32, "threshold": np.float32}


@given(seed=st.integers(0, 999), n=st.integers(1, 40), width=st.integers(1, 300), k=st.sampled_from([1.0, 3.0, 7.5]),
       dead_zone=st.sampled_from([0.0, 0.4]))
@settings(max_examples=25, deadline=None)
def test_spikes_are_those_of_the_body(seed, n, width, k, dead_zone):
    x = normal(np.random.default_rng(seed), 1, n, width) ** 3
    zone = {"dead_zone": dead_zone} if dead_zone else {}
    found, expected = (Node("SpikeEncode", {"x": x}, SPIKES, native=native, k=k, **zone)() for native in (True, False))
    np.testing.assert_allclose(found["threshold"], expected["threshold"], rtol=1e-6)
    # The mean may differ in its last bit, which moves a count by one where the ratio lies at a half.
    differ = found["count"] != expected["count"]
    assert np.count_nonzero(differ) <= max(1, 0.01 * differ.size)
    if dead_zone:
        silent = np.abs(x) < dead_zone * np.abs(x).mean(-1, keepdims=True) * 0.999
        assert not found["count"][silent].any() and not expected["count"][silent].any()


def test_no_tokens_are_no_work():
    found = Node("SpikeEncode", {"x": np.empty((1, 0, 9), np.float32)}, SPIKES, k=3.0)()
    assert found["count"].shape == (1, 0, 9) and found["threshold"].shape == (1, 0, 1)
    inputs, _ = spiking_linear(np.random.default_rng(0), 0, 128, 70)
    assert Node("SpikeLinear", inputs, Y, list(inputs)[2:])()["y"].shape == (1, 0, 70)


def spiking_linear(rng, n, K, N, *, largest=5, beyond=0.0, stripe=None):
    """Inputs of SpikeLinear, and what they stand for in float64 [n, N]."""
    count = rng.integers(-largest, largest + 1, (1, n, K)).astype(np.float32)
    count[rng.random(count.shape) < 0.3] = 0
    codes = rng.integers(-128, 128, (N, K)).astype(np.int32)
    codes[rng.random(codes.shape) < beyond] *= 9
    scales = rng.random((N, K // 128), np.float32) * np.float32(0.01) + np.float32(1e-4)
    names = ("codes", "scales", "residual_inputs", "residual_outputs", "residual_values")
    weights = dict(zip(names, map(np.ascontiguousarray, events.spike_weights(codes, scales)), strict=True))
    if stripe:
        weights["codes"] = np.ascontiguousarray(weights["codes"].reshape(K // 128, 128, N // stripe, stripe)
                                                .transpose(2, 0, 1, 3))
    threshold = rng.random((1, n, 1), np.float32)
    exact = count[0].astype(np.float64) @ (codes * np.repeat(scales, 128, axis=1)).astype(np.float64).T * threshold[0]
    return {"count": count, "threshold": threshold, **weights}, exact


Y = {"y": np.float32}


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("beyond", [0.0, 0.02], ids=["int8", "beyond"])
@pytest.mark.parametrize(("N", "stripe"), [(1, None), (70, None), (192, None), (256, 128), (640, 640)])
@pytest.mark.parametrize("n", [1, 5, 70])
def test_spiking_linears_are_exact_in_one_stripe_and_in_many(isa, n, N, stripe, beyond, constant):
    rng = np.random.default_rng(n + N)
    for largest in (5, 40_000):
        inputs, exact = spiking_linear(rng, n, 256, N, largest=largest, beyond=beyond, stripe=stripe)
        node = Node("SpikeLinear", inputs, Y, list(inputs)[2:] if constant else ())
        np.testing.assert_allclose(node()["y"][0], exact, rtol=0, atol=np.abs(exact).max() * 1e-6)


@pytest.mark.parametrize("digits", [2, 3])
@pytest.mark.parametrize("stripe", [None, 64])
def test_the_bodies_of_spiking_linears_are_exact_too(digits, stripe):
    largest = ops.MAX_COUNT if digits == 2 else 900_000
    inputs, exact = spiking_linear(np.random.default_rng(digits), 3, 256, 128, largest=largest, beyond=0.02,
                                   stripe=stripe)
    y = Node("SpikeLinear", inputs, Y, native=False, digits=digits)()["y"]
    np.testing.assert_allclose(y[0], exact, rtol=0, atol=np.abs(exact).max() * 1e-6)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize(("N", "stripe"), [(64, 64), (256, 128), (192, 192)])
def test_spiking_linears_in_4_bits_are_exact(native, group, N, stripe):
    rng = np.random.default_rng(N)
    K = 256
    weight = quantize_w4(normal(rng, N, K), group)
    codes = np.repeat(weight.scales.astype(np.float64), group, axis=0)
    for n, largest in ((1, 5), (4, 30_000)):
        count = rng.integers(-largest, largest + 1, (1, n, K)).astype(np.float32)
        nibbles = to_stripes(weight.nibbles, stripe // 2).reshape(N // stripe, K, stripe // 2)
        inputs = {"count": count, "threshold": np.full((1, n, 1), 0.5, np.float32), "nibbles": nibbles,
                  "scales": weight.scales, "zeros": weight.zeros}
        y = Node("SpikeLinear4", inputs, Y, ["nibbles", "scales", "zeros"], native)()["y"][0]
        halves = np.stack([weight.nibbles.reshape(K, -1, 32) & 15, weight.nibbles.reshape(K, -1, 32) >> 4], axis=2)
        exact = count[0] @ ((halves.reshape(K, N) - np.repeat(weight.zeros.astype(float), group, axis=0)) * codes) * 0.5
        np.testing.assert_allclose(y, exact, rtol=0, atol=np.abs(exact).max() * 1e-6)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("n", [1, 40])
def test_linears_of_one_input_together_are_the_same_as_each_alone(n, members, native):
    rng = np.random.default_rng(n)
    widths = [(192, 64), (70, None), (300, None)][:members]
    parts = [spiking_linear(rng, n, 256, N, beyond=0.02, stripe=stripe)[0] for N, stripe in widths]
    shared = {name: parts[0][name] for name in ("count", "threshold")}
    weights = {f"{name}_{m}": array for m, inputs in enumerate(parts) for name, array in list(inputs.items())[2:]}
    outputs = {f"y_{m}": np.float32 for m in range(members)}
    for constants in (list(weights), []):
        together = Node("SpikeLinear" + GROUPS[members], {**shared, **weights}, outputs, constants, native)()
        for m, inputs in enumerate(parts):
            alone = Node("SpikeLinear", {**inputs, **shared}, Y, list(inputs)[2:], native)()["y"]
            np.testing.assert_array_equal(together[f"y_{m}"], alone)


def test_linears_together_must_read_the_same_input():
    rng = np.random.default_rng(0)
    first, second = spiking_linear(rng, 1, 256, 64)[0], spiking_linear(rng, 1, 128, 64)[0]
    weights = {f"{name}_{m}": array for m, inputs in enumerate((first, second))
               for name, array in list(inputs.items())[2:]}
    refused(r"count is \[1, 1, 256\], expected \[1, any, 128\]", "SpikeLinearPair",
            {"count": first["count"], "threshold": first["threshold"], **weights},
            {"y_0": np.float32, "y_1": np.float32})


def test_a_residual_may_come_in_any_order():
    rng = np.random.default_rng(0)
    inputs, exact = spiking_linear(rng, 3, 128, 100, beyond=0.1)
    order = rng.permutation(len(inputs["residual_values"]))
    for name in ("residual_inputs", "residual_outputs", "residual_values"):
        inputs[name] = inputs[name][order]
    y = Node("SpikeLinear", inputs, Y, list(inputs)[2:])()["y"]
    np.testing.assert_allclose(y[0], exact, rtol=0, atol=np.abs(exact).max() * 1e-6)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(("name", "value", "match"), [
    ("residual_inputs", 128, r"lies at \[128, .*\] of \[128, 70\]"), ("residual_inputs", -1, r"lies at \[-1, "),
    ("residual_outputs", 70, r", 70\] of \[128, 70\]"), ("residual_outputs", -(2 ** 60), "lies at"),
    ("residual_values", 0.123456, "expected a whole number"), ("residual_values", np.nan, "expected a whole number")])
def test_a_residual_outside_its_weight_is_refused(name, value, match, constant):
    inputs, _ = spiking_linear(np.random.default_rng(0), 1, 128, 70, beyond=0.1)
    inputs[name][3] = value
    refused(match, "SpikeLinear", inputs, Y, constants=list(inputs)[2:] if constant else ())


@pytest.mark.parametrize(("name", "shape"), [
    ("count", (1, 1, 100)), ("threshold", (1, 2, 1)), ("codes", (1, 128, 64)), ("codes", (2, 1, 128, 30)),
    ("codes", (70, 1, 128, 1)), ("codes", (1, 64, 140)), ("scales", (2, 70)), ("scales", (70,)),
    ("residual_outputs", (0,))])
def test_tensors_that_do_not_fit_are_refused(name, shape):
    inputs, _ = spiking_linear(np.random.default_rng(0), 1, 128, 70, beyond=0.1)
    inputs[name] = np.zeros(shape, inputs[name].dtype)
    refused("is .*expected|stripes of", "SpikeLinear", inputs, Y, constants=list(inputs)[2:])


# --- mixers --------------------------------------------------------------------------------------
MIXED = {"y": np.float32, "present": np.float32}


def gla_inputs(rng, n, H, G, d):
    return {"q": normal(rng, 1, n, H * d), "k": normal(rng, 1, n, G * d), "v": normal(rng, 1, n, G * d),
            "gate": normal(rng, 1, n, G * d) * 5, "norm": normal(rng, d), "past": normal(rng, 1, G, d, d)}


def sizes(H, G, d):
    return {"num_heads": H, "kv_num_heads": G, "scale": d ** -0.5}


def agree(found, expected, tolerance=2e-5):
    for name, array in expected.items():
        if array.dtype == np.int8:      # a code may differ by one where rounding ties
            assert np.abs(found[name].astype(int) - array).max(initial=0) <= 1
        else:
            np.testing.assert_allclose(found[name], array, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(("H", "G", "d"), [(4, 4, 8), (8, 2, 16), (7, 1, 6), (16, 2, 10)])
@pytest.mark.parametrize("n", [1, 2, 33, 100])
def test_gated_linear_attention_is_the_bodys_in_place_and_apart(isa, n, H, G, d):
    inputs = gla_inputs(np.random.default_rng(n + d), n, H, G, d)
    attributes = {**sizes(H, G, d), "epsilon": 1e-6}
    expected = Node("GatedLinearAttention", inputs, MIXED, native=False, **attributes)()
    node = Node("GatedLinearAttention", inputs, MIXED, **attributes)
    before = inputs["past"].copy()
    agree(node(), expected, 1e-4)
    np.testing.assert_array_equal(inputs["past"], before)
    agree(node.in_place({"present": "past"}), expected, 1e-4)


@pytest.mark.parametrize("position", [0, 10_000_000, 2 ** 40])
@pytest.mark.parametrize("n", [1, 50])
def test_rotary_angles_are_right_at_any_position(position, n):
    frequencies = 1e6 ** (-np.arange(0, 64, 2, dtype=np.float64) / 64)
    positions = np.arange(position, position + n)
    found = Node("RotaryAngles", {"p": positions[None], "f": frequencies}, {"cos": np.float32, "sin": np.float32},
                 ["f"])()
    cos, sin = rope_angles(positions, 64, 1e6)
    np.testing.assert_allclose(found["cos"][0], cos, rtol=0, atol=1e-7)
    np.testing.assert_allclose(found["sin"][0], sin, rtol=0, atol=1e-7)


def window_inputs(rng, n, H, G, d, W, position, int8):
    cos, sin = rope_angles(np.arange(position, position + n), d, 1e4)
    ring = {"past_key": normal(rng, 1, W, G, d), "past_value": normal(rng, 1, W, G, d)}
    if int8:
        ring = {name: part for key in ("past_key", "past_value") for name, part in (
            (key, rng.integers(-127, 128, (1, W, G, d), np.int8)),
            (f"{key}_scale", rng.random((1, W, G), np.float32) / 50))}
    for array in ring.values():
        array[:, position:] = 0     # slots never written
    return {"q": normal(rng, 1, n, H * d), "k": normal(rng, 1, n, G * d), "v": normal(rng, 1, n, G * d), **ring,
            "cos": cos[None], "sin": sin[None], "position_ids": np.arange(position, position + n)[None]}


def window_op(int8):
    parts = ["key", "key_scale", "value", "value_scale"] if int8 else ["key", "value"]
    outputs = {"y": np.float32, **{f"present_{part}": np.int8 if int8 and "scale" not in part else np.float32
                                   for part in parts}}
    return ("SpikingWindowAttention" if int8 else "SlidingWindowAttention", outputs,
            {f"present_{part}": f"past_{part}" for part in parts}, {"spike_k": 3.0} if int8 else {})


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("H", "G", "d"), [(4, 4, 8), (8, 2, 16), (7, 1, 6)])
@pytest.mark.parametrize(("n", "position"), [(1, 0), (1, 5), (1, 1000), (7, 3), (11, 40), (30, 0), (30, 10_000_000)])
def test_windows_are_the_bodys_in_place_and_apart(isa, n, position, H, G, d, int8):
    op, outputs, aliases, extra = window_op(int8)
    inputs = window_inputs(np.random.default_rng(n + d), n, H, G, d, 11, position, int8)
    expected = Node(op, inputs, outputs, native=False, **sizes(H, G, d), **extra)()
    node = Node(op, inputs, outputs, **sizes(H, G, d), **extra)
    before = {name: array.copy() for name, array in inputs.items()}
    found, in_place = node(), node.in_place(aliases)
    for name, array in before.items():
        np.testing.assert_array_equal(inputs[name], array)
    for result in (found, in_place):
        agree({name: result[name] for name in aliases}, {name: expected[name] for name in aliases}, 1e-5)
        # A flipped spike count of a query moves a head's output, visibly and rarely.
        assert (np.abs(result["y"] - expected["y"]) < 1e-4).mean() > (0.9 if int8 else 0.9999)
    np.testing.assert_array_equal(found["y"], in_place["y"])


def test_positions_that_do_not_follow_one_another_are_refused():
    op, outputs, _, _ = window_op(False)
    inputs = window_inputs(np.random.default_rng(0), 3, 2, 1, 4, 5, 7, False)
    for positions, match in (([7, 8, 10], "not consecutive"), ([-1, 0, 1], "out of range"),
                             ([2 ** 63 - 3, 2 ** 63 - 2, 2 ** 63 - 1], "out of range")):
        changed = {**inputs, "position_ids": np.array([positions])}
        refused(match, op, changed, outputs, **sizes(2, 1, 4))


@pytest.mark.parametrize(("op", "name", "shape"), [
    ("gla", "k", (1, 3, 9)), ("gla", "gate", (1, 2, 8)), ("gla", "norm", (3,)), ("gla", "past", (1, 2, 4, 5)),
    ("window", "v", (1, 3, 3)), ("window", "past_key", (1, 5, 1, 4)), ("window", "past_value", (1, 6, 2, 4)),
    ("window", "cos", (1, 3, 1)), ("window", "position_ids", (1, 2)), ("window", "past_key", (1, 0, 2, 4)),
    ("gla", "q", (2, 3, 16)), ("gla", "q", (1, 3, 15))])
def test_mixer_inputs_that_do_not_fit_are_refused(op, name, shape):
    rng = np.random.default_rng(0)
    if op == "gla":
        kind, inputs, outputs, extra = "GatedLinearAttention", gla_inputs(rng, 3, 4, 2, 4), MIXED, {"epsilon": 1e-6}
    else:
        kind, outputs, _, extra = window_op(False)
        inputs = window_inputs(rng, 3, 4, 2, 4, 5, 7, False)
    inputs[name] = np.zeros(shape, inputs[name].dtype)
    refused("expected|a window of", kind, inputs, outputs, **sizes(4, 2, 4), **extra)


@pytest.mark.parametrize("attributes", [
    {**sizes(4, 3, 4)}, {**sizes(0, 1, 4)}, {**sizes(4, 8, 4)}, {**sizes(4, 2, 4), "scale": 0.3},
    {"num_heads": 4, "kv_num_heads": 2}])
def test_attributes_the_kernels_cannot_run_are_refused(attributes):
    inputs = gla_inputs(np.random.default_rng(0), 3, 4, 2, 4)
    with pytest.raises(Exception, match=r"num_heads|scale"):
        Node("GatedLinearAttention", inputs, MIXED, **attributes, epsilon=1e-6)()


def test_one_kernel_runs_on_several_threads_at_once():
    inputs, _ = spiking_linear(np.random.default_rng(0), 33, 256, 256, beyond=0.01)
    node = Node("SpikeLinear", inputs, Y, list(inputs)[2:])
    counts = [np.roll(inputs["count"], shift, axis=1) for shift in range(6)]
    expected = [node(count=count)["y"] for count in counts]
    right = []

    def work(index):
        right.append(all(np.array_equal(node(count=counts[index])["y"], expected[index]) for _ in range(30)))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(counts))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert right == [True] * len(counts)


# --- registration --------------------------------------------------------------------------------
class ApiBase(c.Structure):
    _fields_ = (("get_api", c.CFUNCTYPE(c.c_void_p, c.c_uint32)), ("version", c.CFUNCTYPE(c.c_void_p)))


def test_an_onnxruntime_without_our_version_of_the_api_gets_an_error_and_no_silence():
    """OrtApiBase as an old onnxruntime gives it: no table for the version we ask for, one for version 1."""
    said, version = [], c.create_string_buffer(b"1.9.0")
    create = c.CFUNCTYPE(c.c_void_p, c.c_int, c.c_char_p)(lambda code, text: said.append((code, text)) or 0xABC)
    table = (c.c_void_p * 300)(c.cast(create, c.c_void_p))
    base = ApiBase(type(ApiBase().get_api)(lambda version: c.addressof(table) if version == 1 else None),
                   type(ApiBase().version)(lambda: c.addressof(version)))
    register = LIBRARY.handle.RegisterCustomOps
    register.restype, register.argtypes = c.c_void_p, (c.c_void_p, c.c_void_p)
    assert register(None, c.addressof(base)) == 0xABC
    assert said == [(9, b"libsbedge needs onnxruntime 1.17 or newer, found 1.9.0")]


@pytest.mark.parametrize(("key", "value"), [("ai.sbedge.threads", "two"), ("ai.sbedge.id", "-5"), ("ai.sbedge.id", "")])
def test_options_that_are_no_numbers_are_refused(key, value):
    options = ort.SessionOptions()
    options.add_session_config_entry(key, value)
    with pytest.raises(Exception, match=f"{key} is '{value}', expected a whole number"):
        options.register_custom_ops_library(str(LIBRARY.path))


def test_the_traffic_of_an_unknown_session_is_an_error():
    fetched, dense = c.c_int64(7), c.c_int64(7)
    assert LIBRARY.ort_traffic(2 ** 50, c.addressof(fetched), c.addressof(dense)) == -1
    assert fetched.value == dense.value == 7


def test_sessions_without_thread_options_share_work_out_too():
    inputs, exact = spiking_linear(np.random.default_rng(0), 5, 128, 512)
    node = helper.make_node("SpikeLinear", list(inputs), ["y"], domain=ops.DOMAIN)
    given = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
             for name, array in inputs.items()]
    graph = helper.make_graph([node], "g", given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", ops.OPSET), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ops.IR_VERSION)   # no body to fall back on
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(LIBRARY.path))
    y, = ort.InferenceSession(model.SerializeToString(), options).run(None, inputs)
    np.testing.assert_allclose(y[0], exact, rtol=0, atol=np.abs(exact).max() * 1e-6)
