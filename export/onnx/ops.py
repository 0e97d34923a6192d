"""Our op set, domain `ai.sbedge` version 1, each op with a body of standard and com.microsoft ops.

A runtime that has a kernel for one of these ops runs it; any other one, a plain onnxruntime session
included, inlines the body below. The bodies therefore define what the ops compute. Batch is 1;
n tokens, H query heads, G key/value heads, d head size, W window. docs/onnx.md has the table.
"""
from __future__ import annotations

from onnx import FunctionProto, parser

DOMAIN = "ai.sbedge"
VERSION = 1
OPSET = 23              # the first with RMSNormalization and RotaryEmbedding
IR_VERSION = 11         # the one of opset 23
MAX_COUNT = 127 * 256 + 127     # what SpikeLinear sums exactly: two signed base-256 digits
HEADER = f'<opset_import: ["" : {OPSET}, "com.microsoft" : 1, "{DOMAIN}" : {VERSION}], domain: "{DOMAIN}">\n'

# x [..., channels] -> count [..., channels] (whole numbers), threshold [..., 1]
#   threshold = clip(mean|x| / k, 1e-5, 1e4)      count = round_half_even(x / threshold)
SPIKE_ENCODE = """
SpikeEncode <k> (x) => (count, threshold) {
    last = Constant <value_ints = [-1]> ()
    divisor = Constant <value_float: float = @k> ()
    low = Constant <value_float = 1e-5> ()
    high = Constant <value_float = 1e4> ()
    magnitude = Abs (x)
    mean = ReduceMean <keepdims = 1> (magnitude, last)
    unclamped = Div (mean, divisor)
    threshold = Clip (unclamped, low, high)
    ratio = Div (x, threshold)
    count = Round (ratio)
}
"""

# count [1, n, K], threshold [1, n, 1] -> y [1, n, N] = threshold * (count @ weight)
#   weight[i, o] = (codes[i, o] - 128) * scales[i // 128, o]    input-channel-major, uint8 [K/128, 128, N]
#                + residual_values[j] at [residual_inputs[j], residual_outputs[j]]    codes beyond int8
# Counts go in as two base-256 digits, so that the sums are whole numbers in int32 and exact:
#
#   count --floor((c + 128) / 256)--> high digit --+                           scales
#     +-----c - 256 * high-------> low digit ------+-- MatMulInteger -> combine -> x --sum groups--+
#     +-- one token at a time: gather inputs, times values, scatter-add to outputs ----------------+-- x threshold
#
# |count| <= k * K, because mean|x| >= max|x| / K (up to the threshold's cap of 1e4, which no sane input reaches);
# so two digits are enough while k * K <= MAX_COUNT.
SPIKE_LINEAR = """
SpikeLinear (count, threshold, codes, scales, residual_inputs, residual_outputs, residual_values) => (y) {
    base = Constant <value_float = 256.0> ()
    offset = Constant <value_float = 128.0> ()
    base_int = Constant <value = int32 {256}> ()
    zero_point = Constant <value = uint8 {128}> ()
    batch_axis = Constant <value_ints = [0]> ()
    group_shape = Constant <value_ints = [0, -1, 128]> ()
    group_axis = Constant <value_ints = [1]> ()

    rows = Squeeze (count, batch_axis)
    raised = Add (rows, offset)
    quotient = Div (raised, base)
    high = Floor (quotient)
    high_part = Mul (high, base)
    low = Sub (rows, high_part)
    digits = Concat <axis = 0> (low, high)
    grouped = Reshape (digits, group_shape)
    by_group = Transpose <perm = [1, 0, 2]> (grouped)
    shifted = Add (by_group, offset)
    bytes = Cast <to = 2> (shifted)
    sums = MatMulInteger (bytes, codes, zero_point, zero_point)
    low_sums, high_sums = Split <axis = 1, num_outputs = 2> (sums)
    high_shifted = Mul (high_sums, base_int)
    whole = Add (low_sums, high_shifted)
    whole_float = Cast <to = 1> (whole)
    scales_by_group = Unsqueeze (scales, group_axis)
    scaled = Mul (whole_float, scales_by_group)
    dense = ReduceSum <keepdims = 0> (scaled, batch_axis)

    outputs = Shape <start = -1> (codes)
    zeros = ConstantOfShape (outputs)
    residual = Scan <num_scan_inputs = 1, body = one_token (float[K] token) => (float[N] sparse) {
        gathered = Gather <axis = 0> (token, residual_inputs)
        products = Mul (gathered, residual_values)
        sparse = ScatterElements <axis = 0, reduction = "add"> (zeros, residual_outputs, products)
    }> (rows)
    total = Add (dense, residual)
    y = Mul (total, threshold)
}
"""

# q [1, n, H*d], k, v, gate [1, n, G*d], norm_weight [d], past [1, G, d, d] -> y [1, n, H*d], present
#   S_t = exp(g_t) S_(t-1) + relu(k_t) v_t^T      g = logsigmoid(gate) / 16
#   y_t = rmsnorm per head (scale * relu(q_t) S_t) * norm_weight
GATED_LINEAR_ATTENTION = """
GatedLinearAttention <num_heads, kv_num_heads, scale, epsilon> (q, k, v, gate, norm_weight, past) => (y, present) {
    divisor = Constant <value_float = -16.0> ()
    leading = Constant <value_ints = [0, 0, -1]> ()

    q_positive = Relu (q)
    k_positive = Relu (k)
    negative = Neg (gate)
    loss = Softplus (negative)
    log_decay = Div (loss, divisor)
    mixed, present = com.microsoft.LinearAttention <
        update_rule = "gated", q_num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale>
        (q_positive, k_positive, v, past, log_decay)

    head_size = Shape (norm_weight)
    head_shape = Concat <axis = 0> (leading, head_size)
    heads = Reshape (mixed, head_shape)
    normed = RMSNormalization <axis = -1, epsilon: float = @epsilon> (heads, norm_weight)
    q_shape = Shape (q)
    y = Reshape (normed, q_shape)
}
"""

# position_ids [1, n], inverse_frequencies [d/2] double -> cos, sin [1, n, d/2]
# Angles are double and brought into one turn, so that they are right at any position: 2 pi = 6.28125 + rest, where
# turns * 6.28125 is exact. Cos is Sin a quarter turn ahead: most onnxruntimes have only Sin in double.
ROTARY_ANGLES = """
RotaryAngles (position_ids, inverse_frequencies) => (cos, sin) {
    last = Constant <value_ints = [-1]> ()
    turns_per_radian = Constant <value = double {0.15915494309189535}> ()
    two_pi_head = Constant <value = double {6.28125}> ()
    two_pi_rest = Constant <value = double {0.0019353071795864769}> ()
    quarter_turn = Constant <value = double {1.5707963267948966}> ()
    column = Unsqueeze (position_ids, last)
    positions = Cast <to = 11> (column)
    angles = Mul (positions, inverse_frequencies)
    all_turns = Mul (angles, turns_per_radian)
    turns = Round (all_turns)
    head = Mul (turns, two_pi_head)
    rest = Mul (turns, two_pi_rest)
    nearly_reduced = Sub (angles, head)
    reduced = Sub (nearly_reduced, rest)
    ahead = Add (reduced, quarter_turn)
    cos_double = Sin (ahead)
    sin_double = Sin (reduced)
    cos = Cast <to = 1> (cos_double)
    sin = Cast <to = 1> (sin_double)
}
"""

# The bodies of the two window ops share the four pieces below.
#
#   q, k, v --HEADS--> q_heads, k_rows, v_rows --+--> (spike q, int8 k and v) --> ATTEND --> y
#   position_ids --VISIBLE--> visible -----------|---------------------------------^
#   past --------------------------------------- +--> RING: the last min(n, W) rows go to slots position % W
#
# (GroupQueryAttention is not used: it keeps its window cache in arrival order as [G, W, d], where ours is a
# ring [W, G, d], and reads angles from a table with a row per position, where our positions are unbounded.)

# Which of the W ring slots and n new tokens each query sees. Slot s holds the latest position before
# the first new one that equals s modulo W; a negative position means the slot was never written.
#   visible [n, 1, W + n]:  position - W < key position <= position  and  key position >= 0
VISIBLE = """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    flat = Constant <value_ints = [-1]> ()
    query_axes = Constant <value_ints = [1, 2]> ()
    window = Shape <start = 1, end = 2> (past_key)
    window_scalar = Squeeze (window)
    positions = Reshape (position_ids, flat)
    first = Gather <axis = 0> (positions, zero)
    before = Sub (first, one)
    slots = Range (zero, window_scalar, one)
    behind = Sub (before, slots)
    age = Mod (behind, window)
    past_positions = Sub (before, age)
    key_positions = Concat <axis = 0> (past_positions, positions)
    query_positions = Unsqueeze (positions, query_axes)
    oldest = Sub (query_positions, window)
    causal = LessOrEqual (key_positions, query_positions)
    recent = Greater (key_positions, oldest)
    written = GreaterOrEqual (key_positions, zero)
    causal_recent = And (causal, recent)
    visible = And (causal_recent, written)
"""

# q [1, n, H*d], k, v [1, n, G*d] --rotate q and k, split heads--> q_heads [n, H, d], k_rows, v_rows [n, G, d]
HEADS = """
    groups = Constant <value_int: int = @kv_num_heads> ()
    heads = Constant <value_int: int = @num_heads> ()
    groups_1d = Reshape (groups, flat)
    heads_1d = Reshape (heads, flat)
    head_size = Shape <start = 3, end = 4> (past_key)
    kv_shape = Concat <axis = 0> (flat, groups_1d, head_size)
    q_shape = Concat <axis = 0> (flat, heads_1d, head_size)
    q_rotated = RotaryEmbedding <num_heads: int = @num_heads> (q, cos, sin)
    k_rotated = RotaryEmbedding <num_heads: int = @kv_num_heads> (k, cos, sin)
    q_heads = Reshape (q_rotated, q_shape)
    k_rows = Reshape (k_rotated, kv_shape)
    v_rows = Reshape (v, kv_shape)
"""

# q_used [n, H, d], old_keys, old_values [W, G, d] (the ring), new_keys, new_values [n, G, d] -> y [1, n, H*d]
#   scores [G, n * H/G, W + n] = scale * [q @ old_keys^T | q @ new_keys^T]
#   y = softmax(scores where visible) @ [old_values; new_values], without joining old and new
ATTEND = """
    hidden = Constant <value = float {-inf}> ()
    zero_1d = Constant <value_ints = [0]> ()
    token_shape = Concat <axis = 0> (zero_1d, groups_1d, flat, head_size)
    query_shape = Concat <axis = 0> (groups_1d, flat, head_size)
    q_by_token = Reshape (q_used, token_shape)
    q_by_group = Transpose <perm = [1, 0, 2, 3]> (q_by_token)
    queries = Reshape (q_by_group, query_shape)
    old_scores = com.microsoft.FusedMatMul <transB = 1, transBatchB = 1, alpha: float = @scale> (queries, old_keys)
    new_scores = com.microsoft.FusedMatMul <transB = 1, transBatchB = 1, alpha: float = @scale> (queries, new_keys)
    scores = Concat <axis = -1> (old_scores, new_scores)
    tokens = Shape (positions)
    keys_total = Shape (key_positions)
    scores_shape = Concat <axis = 0> (groups_1d, tokens, flat, keys_total)
    scores_by_token = Reshape (scores, scores_shape)
    masked = Where (visible, scores_by_token, hidden)
    weights_by_token = Softmax <axis = -1> (masked)
    weights_shape = Shape (scores)
    weights = Reshape (weights_by_token, weights_shape)
    parts = Concat <axis = 0> (window, tokens)
    old_weights, new_weights = Split <axis = -1> (weights, parts)
    old_mixed = com.microsoft.FusedMatMul <transBatchB = 1> (old_weights, old_values)
    new_mixed = com.microsoft.FusedMatMul <transBatchB = 1> (new_weights, new_values)
    mixed = Add (old_mixed, new_mixed)
    mixed_shape = Concat <axis = 0> (groups_1d, tokens, flat, head_size)
    mixed_by_group = Reshape (mixed, mixed_shape)
    mixed_by_token = Transpose <perm = [1, 0, 2, 3]> (mixed_by_group)
    one_1d = Reshape (one, flat)
    y_shape = Concat <axis = 0> (one_1d, tokens, flat)
    y = Reshape (mixed_by_token, y_shape)
"""

# positions [n] -> which of the new rows enter the ring (the last min(n, W)) and in which slots [m, 1]
SLOTS = """
    row_axis = Constant <value_ints = [0]> ()
    batch_axis = Constant <value_ints = [0]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    newest = Neg (window)
    kept_positions = Slice (positions, newest, end, row_axis)
    kept_slots = Mod (kept_positions, window)
    kept_index = Unsqueeze (kept_slots, flat)
"""


def ring(name: str, rows: str) -> str:
    """past_{name} [1, W, ...] with the last rows of `rows` [n, ...] written to their slots -> present_{name}."""
    return f"""
    {name}_ring = Squeeze (past_{name}, batch_axis)
    {name}_kept = Slice ({rows}, newest, end, row_axis)
    {name}_written = ScatterND ({name}_ring, kept_index, {name}_kept)
    present_{name} = Unsqueeze ({name}_written, batch_axis)
"""


def int8_encode(name: str) -> str:
    """{name}_rows [n, G, d] -> {name}_codes int8, {name}_scales [n, G], new_{name}s and old_{name}s as float."""
    return f"""
    {name}_magnitude = Abs ({name}_rows)
    {name}_peak = ReduceMax <keepdims = 1> ({name}_magnitude, flat)
    {name}_step = Div ({name}_peak, int8_max)
    {name}_scale_rows = Clip ({name}_step, scale_low, scale_high)
    {name}_ratio = Div ({name}_rows, {name}_scale_rows)
    {name}_rounded = Round ({name}_ratio)
    {name}_clipped = Clip ({name}_rounded, int8_low, int8_max)
    {name}_codes = Cast <to = 3> ({name}_clipped)
    {name}_scales = Squeeze ({name}_scale_rows, flat)
    new_{name}s = Mul ({name}_clipped, {name}_scale_rows)
    {name}_old_codes = Squeeze (past_{name}, row_axis)
    {name}_old_float = Cast <to = 1> ({name}_old_codes)
    {name}_old_scales = Squeeze (past_{name}_scale, row_axis)
    {name}_old_columns = Unsqueeze ({name}_old_scales, flat)
    old_{name}s = Mul ({name}_old_float, {name}_old_columns)
"""


def window_body(middle: str, rings: str) -> str:
    return "{" + VISIBLE + HEADS + SLOTS + middle + ATTEND + rings + "}"


# past_key, past_value [1, W, G, d] float32: the ring -> y [1, n, H*d] and the ring after the last token
SLIDING_WINDOW_ATTENTION = """
SlidingWindowAttention <num_heads, kv_num_heads, scale>
    (q, k, v, past_key, past_value, cos, sin, position_ids) => (y, present_key, present_value)
""" + window_body("""
    q_used = Identity (q_heads)
    new_keys = Identity (k_rows)
    new_values = Identity (v_rows)
    old_keys = Squeeze (past_key, row_axis)
    old_values = Squeeze (past_value, row_axis)
""", ring("key", "k_rows") + ring("value", "v_rows"))

# The same with q spiked per head (k = spike_k) and the ring kept as int8 codes and scales [1, W, G]
SPIKING_WINDOW_ATTENTION = """
SpikingWindowAttention <num_heads, kv_num_heads, scale, spike_k>
    (q, k, v, past_key, past_key_scale, past_value, past_value_scale, cos, sin, position_ids)
    => (y, present_key, present_key_scale, present_value, present_value_scale)
""" + window_body("""
    q_count, q_threshold = ai.sbedge.SpikeEncode <k: float = @spike_k> (q_heads)
    q_used = Mul (q_count, q_threshold)
    int8_max = Constant <value_float = 127.0> ()
    int8_low = Constant <value_float = -128.0> ()
    scale_low = Constant <value_float = 1e-5> ()
    scale_high = Constant <value_float = 1e4> ()
    key_rows = Identity (k_rows)
    value_rows = Identity (v_rows)
""" + int8_encode("key") + int8_encode("value"),
    ring("key", "key_codes") + ring("key_scale", "key_scales")
    + ring("value", "value_codes") + ring("value_scale", "value_scales"))

BODIES = (SPIKE_ENCODE, SPIKE_LINEAR, GATED_LINEAR_ATTENTION, ROTARY_ANGLES, SLIDING_WINDOW_ATTENTION,
          SPIKING_WINDOW_ATTENTION)


def functions(used: set[str] | None = None) -> list[FunctionProto]:
    """The model-local functions of the `used` ops (all by default) and of the ops these call."""
    parsed = {function.name: function for function in (parser.parse_function(HEADER + body) for body in BODIES)}
    wanted = set(parsed) if used is None else set(used)
    for name in list(wanted):
        wanted |= {node.op_type for node in parsed[name].node if node.domain == DOMAIN}
    return [function for name, function in parsed.items() if name in wanted]
