"""Our op set, domain `ai.sbedge` version 1, each op with a body of standard and com.microsoft ops.

A runtime that has a kernel for one of these ops runs it; any other one, a plain onnxruntime session
included, inlines the body below. The bodies therefore define what the ops compute. Batch is 1;
n tokens, H query heads, G key/value heads, d head size, W window. docs/onnx.md has the table.
"""
from __future__ import annotations

from onnx import FunctionProto, parser

from sbedge.config import ModelConfig

from .spike_ops import GROUPS, PARTS, SPIKE_ENCODE, group, spike_linear, spike_linear_4

DOMAIN = "ai.sbedge"
VERSION = 1
OPSET = 23              # the first with RMSNormalization and RotaryEmbedding
IR_VERSION = 11         # the one of opset 23
MAX_COUNT = 127 * 256 + 127     # the largest spike count of two signed base-256 digits
MAX_DIGITS_COUNT = MAX_COUNT + 127 * 256 ** 2       # and of three
HEADER = f'<opset_import: ["" : {OPSET}, "com.microsoft" : 1, "{DOMAIN}" : {VERSION}], domain: "{DOMAIN}">\n'

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

# The bodies of the two window ops share the pieces below. They write first and read after, so that past and present
# may be one buffer: the rows to be overwritten are taken out, and the write waits for them (its index is built
# from their count).
#
#   q, k, v --HEADS--> q_heads, k_rows, v_rows [--spike q, k and v to int8--]
#   past --RING--> evicted rows --> present, with the last m = min(n, W) new rows at slots position % W
#   present, evicted and the first n - m new rows --ATTEND, where VISIBLE--> y
#
# (GroupQueryAttention is not used: it keeps its window cache in arrival order as [G, W, d], where ours is a
# ring [W, G, d], and reads angles from a table with a row per position, where our positions are unbounded.)

# Which keys each query sees: those in the W slots after the write, then n others: m evicted and n - m that came
# and went within this call. A slot holds the latest position equal to it modulo W; a negative one was never written.
#   visible [n, 1, W + n]:  position - W < key position <= position  and  key position >= 0
VISIBLE = """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    zero_1d = Constant <value_ints = [0]> ()
    two_1d = Constant <value_ints = [2]> ()
    flat = Constant <value_ints = [-1]> ()
    query_axes = Constant <value_ints = [1, 2]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    window = Shape <start = 1, end = 2> (past_key)
    window_scalar = Squeeze (window)
    newest = Neg (window)
    positions = Reshape (position_ids, flat)
    tokens = Shape (positions)
    kept_positions = Slice (positions, newest, end, zero_1d)
    kept = Shape (kept_positions)
    passing = Sub (tokens, kept)
    kept_slots = Mod (kept_positions, window)
    first = Gather <axis = 0> (positions, zero_1d)
    before = Sub (first, one)
    evicted_behind = Sub (before, kept_slots)
    evicted_age = Mod (evicted_behind, window)
    evicted_positions = Sub (before, evicted_age)
    last = Gather <axis = 0> (positions, flat)
    slots = Range (zero, window_scalar, one)
    behind = Sub (last, slots)
    age = Mod (behind, window)
    ring_positions = Sub (last, age)
    passing_positions = Slice (positions, zero_1d, passing, zero_1d)
    key_positions = Concat <axis = 0> (ring_positions, evicted_positions, passing_positions)
    query_positions = Unsqueeze (positions, query_axes)
    oldest = Sub (query_positions, window)
    causal = LessOrEqual (key_positions, query_positions)
    recent = Greater (key_positions, oldest)
    written = GreaterOrEqual (key_positions, zero)
    causal_recent = And (causal, recent)
    visible = And (causal_recent, written)
    slot_column = Unsqueeze (kept_slots, flat)
    batch_column = Sub (slot_column, slot_column)
    kept_index = Concat <axis = 1> (batch_column, slot_column)
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

# q_used [n, H, d], ring_keys, ring_values [W, G, d], other_keys, other_values [n, G, d] -> y [1, n, H*d]
#   scores [G, n * H/G, W + n] = scale * [q @ ring_keys^T | q @ other_keys^T]
#   y = softmax(scores where visible) @ [ring_values; other_values], without joining ring and others
ATTEND = """
    hidden = Constant <value = float {-inf}> ()
    token_shape = Concat <axis = 0> (zero_1d, groups_1d, flat, head_size)
    query_shape = Concat <axis = 0> (groups_1d, flat, head_size)
    q_by_token = Reshape (q_used, token_shape)
    q_by_group = Transpose <perm = [1, 0, 2, 3]> (q_by_token)
    queries = Reshape (q_by_group, query_shape)
    ring_scores = com.microsoft.FusedMatMul <transB = 1, transBatchB = 1, alpha: float = @scale> (queries, ring_keys)
    other_scores = com.microsoft.FusedMatMul <transB = 1, transBatchB = 1, alpha: float = @scale> (queries, other_keys)
    scores = Concat <axis = -1> (ring_scores, other_scores)
    keys_total = Shape (key_positions)
    scores_shape = Concat <axis = 0> (groups_1d, tokens, flat, keys_total)
    scores_by_token = Reshape (scores, scores_shape)
    masked = Where (visible, scores_by_token, hidden)
    weights_by_token = Softmax <axis = -1> (masked)
    weights_shape = Shape (scores)
    weights = Reshape (weights_by_token, weights_shape)
    parts = Concat <axis = 0> (window, tokens)
    ring_weights, other_weights = Split <axis = -1> (weights, parts)
    ring_mixed = com.microsoft.FusedMatMul <transBatchB = 1> (ring_weights, ring_values)
    other_mixed = com.microsoft.FusedMatMul <transBatchB = 1> (other_weights, other_values)
    mixed = Add (ring_mixed, other_mixed)
    mixed_shape = Concat <axis = 0> (groups_1d, tokens, flat, head_size)
    mixed_by_group = Reshape (mixed, mixed_shape)
    mixed_by_token = Transpose <perm = [1, 0, 2, 3]> (mixed_by_group)
    y_shape = Shape (q)
    y = Reshape (mixed_by_token, y_shape)
"""


def ring(name: str, rows: str) -> str:
    """past_{name} [1, W, ...], `rows` [n, ...] -> evicted_{name} [m, ...], present_{name}, and ring_{name} [W, ...]."""
    return f"""
    {name}_out = Gather <axis = 1> (past_{name}, kept_slots)
    {name}_count = Shape <start = 1, end = 2> ({name}_out)
    {name}_index_shape = Concat <axis = 0> ({name}_count, two_1d)
    {name}_index = Reshape (kept_index, {name}_index_shape)
    {name}_kept = Slice ({rows}, newest, end, zero_1d)
    present_{name} = ScatterND (past_{name}, {name}_index, {name}_kept)
    evicted_{name} = Squeeze ({name}_out, zero_1d)
    ring_{name} = Squeeze (present_{name}, zero_1d)
"""


def float_window(name: str, rows: str) -> str:
    """The ring of float `rows` [n, G, d] -> ring_{name}s [W, G, d], other_{name}s [n, G, d]."""
    return ring(name, rows) + f"""
    passing_{name} = Slice ({rows}, zero_1d, passing, zero_1d)
    other_{name}s = Concat <axis = 0> (evicted_{name}, passing_{name})
    ring_{name}s = Identity (ring_{name})
"""


def int8_window(name: str, rows: str) -> str:
    """The same with `rows` kept as int8 codes and scales; all keys and values are those the codes stand for."""
    return f"""
    {name}_magnitude = Abs ({rows})
    {name}_peak = ReduceMax <keepdims = 1> ({name}_magnitude, flat)
    {name}_step = Div ({name}_peak, int8_max)
    {name}_scale_column = Clip ({name}_step, scale_low, scale_high)
    {name}_ratio = Div ({rows}, {name}_scale_column)
    {name}_rounded = Round ({name}_ratio)
    {name}_clipped = Clip ({name}_rounded, int8_low, int8_max)
    {name}_codes = Cast <to = 3> ({name}_clipped)
    {name}_scales = Squeeze ({name}_scale_column, flat)
""" + ring(name, f"{name}_codes") + ring(f"{name}_scale", f"{name}_scales") + f"""
    {name}_ring_float = Cast <to = 1> (ring_{name})
    {name}_ring_column = Unsqueeze (ring_{name}_scale, flat)
    ring_{name}s = Mul ({name}_ring_float, {name}_ring_column)
    {name}_evicted_float = Cast <to = 1> (evicted_{name})
    {name}_evicted_column = Unsqueeze (evicted_{name}_scale, flat)
    {name}_evicted = Mul ({name}_evicted_float, {name}_evicted_column)
    {name}_new = Mul ({name}_clipped, {name}_scale_column)
    {name}_passing = Slice ({name}_new, zero_1d, passing, zero_1d)
    other_{name}s = Concat <axis = 0> ({name}_evicted, {name}_passing)
"""


# past_key, past_value [1, W, G, d] float32: the ring -> y [1, n, H*d] and the ring after the last token
SLIDING_WINDOW_ATTENTION = """
SlidingWindowAttention <num_heads, kv_num_heads, scale>
    (q, k, v, past_key, past_value, cos, sin, position_ids) => (y, present_key, present_value) {
""" + VISIBLE + HEADS + float_window("key", "k_rows") + float_window("value", "v_rows") + """
    q_used = Identity (q_heads)
""" + ATTEND + "}"

# The same with q spiked per head (k = spike_k) and the ring kept as int8 codes and scales [1, W, G]
SPIKING_WINDOW_ATTENTION = """
SpikingWindowAttention <num_heads, kv_num_heads, scale, spike_k>
    (q, k, v, past_key, past_key_scale, past_value, past_value_scale, cos, sin, position_ids)
    => (y, present_key, present_key_scale, present_value, present_value_scale) {
    int8_max = Constant <value_float = 127.0> ()
    int8_low = Constant <value_float = -128.0> ()
    scale_low = Constant <value_float = 1e-5> ()
    scale_high = Constant <value_float = 1e4> ()
""" + VISIBLE + HEADS + int8_window("key", "k_rows") + int8_window("value", "v_rows") + """
    q_count, q_threshold = ai.sbedge.SpikeEncode <k: float = @spike_k> (q_heads)
    q_used = Mul (q_count, q_threshold)
""" + ATTEND + "}"

BODIES = (SPIKE_ENCODE, GATED_LINEAR_ATTENTION, ROTARY_ANGLES, SLIDING_WINDOW_ATTENTION, SPIKING_WINDOW_ATTENTION)


def largest_count(config: ModelConfig) -> float:
    """No spike count of the model's linears is larger; see spike_ops.py."""
    k = max((config.spike_k, *config.input_spike_k))
    return k * max(config.hidden_size, config.intermediate_size if config.spike_down else 0)


def digits_of(config: ModelConfig) -> int:
    return 2 if largest_count(config) <= MAX_COUNT else 3


def functions(used: set[str] | None = None, digits: int = 2) -> list[FunctionProto]:
    """The model-local functions of the `used` ops (all by default) and of the ops these call.

    digits   base-256 digits that hold the spike counts of linears: 2 up to MAX_COUNT, 3 beyond
    """
    bodies = [*BODIES, spike_linear(digits), spike_linear_4(digits),
              *(group(op, op + suffix, members) for op in PARTS for members, suffix in GROUPS.items())]
    parsed = {function.name: function for function in (parser.parse_function(HEADER + body) for body in bodies)}
    wanted = set(parsed) if used is None else set(used)
    for name in list(wanted):
        wanted |= {node.op_type for node in parsed[name].node if node.domain == DOMAIN}
    return [function for name, function in parsed.items() if name in wanted]
