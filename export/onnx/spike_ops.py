"""The bodies of our spiking ops; see ops.py."""
from __future__ import annotations

# What a spiking linear takes after counts and thresholds.
PARTS = {"SpikeLinear": ("codes", "scales", "residual_inputs", "residual_outputs", "residual_values"),
         "SpikeLinear4": ("nibbles", "scales", "zeros")}
GROUPS = {2: "Pair", 3: "Triple"}

# x [..., channels] -> count [..., channels] (whole numbers), threshold [..., 1]
#   threshold = clip(mean|x| / k, 1e-5, 1e4)
#   count = round_half_even(x / threshold), or 0 if |x| < dead_zone * mean|x|
SPIKE_ENCODE = """
SpikeEncode <k, dead_zone: float = 0.0> (x) => (count, threshold) {
    last = Constant <value_ints = [-1]> ()
    divisor = Constant <value_float: float = @k> ()
    silence = Constant <value_float: float = @dead_zone> ()
    low = Constant <value_float = 1e-5> ()
    high = Constant <value_float = 1e4> ()
    none = Constant <value_float = 0.0> ()
    magnitude = Abs (x)
    mean = ReduceMean <keepdims = 1> (magnitude, last)
    unclamped = Div (mean, divisor)
    threshold = Clip (unclamped, low, high)
    ratio = Div (x, threshold)
    rounded = Round (ratio)
    least = Mul (mean, silence)
    silent = Less (magnitude, least)
    count = Where (silent, none, rounded)
}
"""

# The two spiking linears sum whole numbers, exactly: counts go in as signed base-256 digits, products are int32.
# count [1, n, K], codes [.., K/g, g, S] -> whole [K/g, n, N] int32: for each group of g inputs, count @ (codes - zero)
#
#   count --floor((c + 128) / 256)--> higher digits --+
#     +-----c - 256 * higher-------> low digit -------+-- MatMulInteger --stripes of S side by side--> combine
#
# |count| <= k * K, because mean|x| >= max|x| / K (up to the threshold's cap of 1e4, which no sane input reaches);
# so two digits are enough while k * K <= MAX_COUNT.
CONSTANTS = """
    base = Constant <value_float = 256.0> ()
    offset = Constant <value_float = 128.0> ()
    base_int = Constant <value = int32 {256}> ()
    middle = Constant <value = uint8 {128}> ()
    same_1d = Constant <value_ints = [0]> ()
    flat_1d = Constant <value_ints = [-1]> ()
    group_axis = Constant <value_ints = [1]> ()
"""


def digit_sums(digits: int, zero: str) -> str:
    """From `count` and `codes` to `whole`; `zero` is the zero point of the codes, as a further argument, or nothing."""
    split, rest = "", "rows"
    for d in range(digits - 1):
        split += f"""
    raised_{d} = Add ({rest}, offset)
    quotient_{d} = Div (raised_{d}, base)
    higher_{d} = Floor (quotient_{d})
    higher_part_{d} = Mul (higher_{d}, base)
    digit_{d} = Sub ({rest}, higher_part_{d})"""
        rest = f"higher_{d}"
    combined, total = "", f"sums_{digits - 1}"
    for d in reversed(range(digits - 1)):
        combined += f"""
    shifted_{d} = Mul ({total}, base_int)
    total_{d} = Add (sums_{d}, shifted_{d})"""
        total = f"total_{d}"
    all_digits = ", ".join([*(f"digit_{d}" for d in range(digits - 1)), rest])
    all_sums = ", ".join(f"sums_{d}" for d in range(digits))
    return f"""
    rows = Squeeze (count, same_1d){split}
    digits = Concat <axis = 0> ({all_digits})
    group = Shape <start = -2, end = -1> (codes)
    group_shape = Concat <axis = 0> (same_1d, flat_1d, group)
    grouped = Reshape (digits, group_shape)
    by_group = Transpose <perm = [1, 0, 2]> (grouped)
    raised = Add (by_group, offset)
    bytes = Cast <to = 2> (raised)
    stripe_sums = MatMulInteger (bytes, codes, middle{zero})
    groups_and_rows = Shape <end = 2> (by_group)
    stripe = Shape <start = -1> (codes)
    striped_shape = Concat <axis = 0> (flat_1d, groups_and_rows, stripe)
    striped = Reshape (stripe_sums, striped_shape)
    side_by_side = Transpose <perm = [1, 2, 0, 3]> (striped)
    joined_shape = Concat <axis = 0> (same_1d, same_1d, flat_1d)
    joined = Reshape (side_by_side, joined_shape)
    {all_sums} = Split <axis = 1, num_outputs = {digits}> (joined){combined}
    whole = Identity ({total})
"""


# count [1, n, K], threshold [1, n, 1] -> y [1, n, N] = threshold * (count @ weight)
#   weight[i, o] = (codes[i, o] - 128) * scales[i // 128, o]
#                + residual_values[j] at [residual_inputs[j], residual_outputs[j]], of codes beyond int8
#   codes, input-channel-major: uint8 [K/128, 128, N] or, in stripes of S outputs, [N/S, K/128, 128, S]
# The residual: one token at a time, gather inputs, times values, scatter-add to outputs.
def spike_linear(digits: int) -> str:
    return """
SpikeLinear (count, threshold, codes, scales, residual_inputs, residual_outputs, residual_values) => (y) {
""" + CONSTANTS + digit_sums(digits, ", middle") + """
    whole_float = Cast <to = 1> (whole)
    scales_by_group = Unsqueeze (scales, group_axis)
    scaled = Mul (whole_float, scales_by_group)
    dense = ReduceSum <keepdims = 0> (scaled, same_1d)

    outputs = Shape <start = -1> (scales)
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


def group(op: str, name: str, members: int) -> str:
    """A body of several linears of one input: count, threshold, then the weights of each."""
    weights = [[f"{part}_{m}" for part in PARTS[op]] for m in range(members)]
    lines = "".join(f"    y_{m} = ai.sbedge.{op} (count, threshold, {', '.join(parts)})\n"
                    for m, parts in enumerate(weights))
    inputs = ", ".join(part for parts in weights for part in parts)
    return f"{name} (count, threshold, {inputs}) => ({', '.join(f'y_{m}' for m in range(members))}) {{\n{lines}}}"


# The same in 4 bits: weight[i, o] = (nibbles[i, o] - zeros[i // g, o]) * scales[i // g, o]
#   nibbles uint8 [N/S, K, S/2]: of each 64 outputs of a stripe, b in the low and b + 32 in the high half of byte b
#   scales float16, zeros uint8 [K/g, N], g = 32, 64 or 128
def spike_linear_4(digits: int) -> str:
    return """
SpikeLinear4 (count, threshold, nibbles, scales, zeros) => (y) {
""" + CONSTANTS + """
    low_bits = Constant <value = uint8 {15}> ()
    shift = Constant <value = uint8 {4}> ()
    two = Constant <value_ints = [2]> ()
    block_shape = Constant <value_ints = [0, 0, -1, 1, 32]> ()
    low = BitwiseAnd (nibbles, low_bits)
    high = BitShift <direction = "RIGHT"> (nibbles, shift)
    low_blocks = Reshape (low, block_shape)
    high_blocks = Reshape (high, block_shape)
    blocks = Concat <axis = 3> (low_blocks, high_blocks)
    stripe_bytes = Shape <start = 2> (nibbles)
    stripe_outputs = Mul (stripe_bytes, two)
    groups = Shape <end = 1> (scales)
    codes_shape = Concat <axis = 0> (same_1d, groups, flat_1d, stripe_outputs)
    codes = Reshape (blocks, codes_shape)
""" + digit_sums(digits, "") + """
    input_axis = Constant <value_ints = [2]> ()
    rows_int = Cast <to = 6> (rows)
    grouped_int = Reshape (rows_int, group_shape)
    by_group_int = Transpose <perm = [1, 0, 2]> (grouped_int)
    group_counts = ReduceSum <keepdims = 1> (by_group_int, input_axis)
    zeros_int = Cast <to = 6> (zeros)
    zeros_by_group = Unsqueeze (zeros_int, group_axis)
    brought_in = Mul (group_counts, zeros_by_group)
    exact = Sub (whole, brought_in)
    exact_float = Cast <to = 1> (exact)
    scales_float = Cast <to = 1> (scales)
    scales_by_group = Unsqueeze (scales_float, group_axis)
    scaled = Mul (exact_float, scales_by_group)
    total = ReduceSum <keepdims = 0> (scaled, same_1d)
    y = Mul (total, threshold)
}
"""
