// The mixers as nodes of an ONNX graph, on the memory of the state where past and present are one. Shapes: docs/onnx.md.
#pragma once

#include "ort_kernel.h"

namespace sbedge {
namespace ort {

struct Heads {
    int64_t heads, groups;
    float scale;
    void create(Construction& node);
    // The head size d of q [1, n, heads * d]; the kernels scale by d^-0.5.
    int64_t size(Checked& node, const Tensor& q) const;
};

// q [1, n, H*d], k, v, gate [1, n, G*d], norm_weight [d], past [1, G, d, d] -> y [1, n, H*d], present
class GatedLinearAttention {
public:
    static constexpr Signature signature{"GatedLinearAttention", {FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, FLOAT},
                                         {FLOAT, FLOAT}};
    void create(Construction& node);
    void run(Run& run) const;

private:
    Heads heads_;
    float epsilon_;
};

// position_ids [1, n], inverse_frequencies [d/2] -> cos, sin [1, n, d/2]
class RotaryAngles {
public:
    static constexpr Signature signature{"RotaryAngles", {INT64, DOUBLE}, {FLOAT, FLOAT}};
    void create(Construction&) {}
    void run(Run& run) const;
};

// q [1, n, H*d], k, v [1, n, G*d], past_key, past_value [1, W, G, d], cos, sin [1, n, d/2], position_ids [1, n]
// -> y [1, n, H*d], present_key, present_value
class SlidingWindowAttention {
public:
    static constexpr Signature signature{
        "SlidingWindowAttention", {FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, INT64}, {FLOAT, FLOAT, FLOAT}};
    void create(Construction& node);
    void run(Run& run) const;

private:
    Heads heads_;
};

// The same with the ring as int8 codes, and scales [1, W, G] after each of key and value.
class SpikingWindowAttention {
public:
    static constexpr Signature signature{"SpikingWindowAttention",
                                         {FLOAT, FLOAT, FLOAT, INT8, FLOAT, INT8, FLOAT, FLOAT, FLOAT, INT64},
                                         {FLOAT, INT8, FLOAT, INT8, FLOAT}};
    void create(Construction& node);
    void run(Run& run) const;

private:
    Heads heads_;
    float spike_k_;
};

}  // namespace ort
}  // namespace sbedge
