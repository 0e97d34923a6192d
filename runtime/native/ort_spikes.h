// Spike coding and spiking linears as nodes of an ONNX graph. Shapes and meanings: docs/onnx.md.
#pragma once

#include <memory>

#include "ort_kernel.h"

namespace sbedge {
namespace ort {

// x [..., C] -> count [..., C], threshold [..., 1]
class SpikeEncode {
public:
    static constexpr Signature signature{"SpikeEncode", {FLOAT}, {FLOAT, FLOAT}};
    void create(Construction& node);
    void run(Run& run) const;

private:
    float k_ = 3, dead_zone_ = 0;
};

// The weights of a SpikeLinear as the kernel takes them: the codes where they are, the codes beyond int8 as whole numbers
// in the order of input channels.
class Int8Weights {
public:
    // codes uint8 [K/128, 128, N] or, in stripes of S outputs, [N/S, K/128, 128, S], each code + 128; scales [K/128, N];
    // at inputs[j], outputs[j] (int64 [m]) a code lacks values[j] / its scale.
    struct Tensors {
        Tensor codes, scales, inputs, outputs, values;
    };
    void build(Checked& node, const Tensors& given);

    sbedge_w8 layer{};      // all but the codes and scales, which ONNX Runtime hands to every run

private:
    void build_residual(Checked& node, const Tensors& given);
    std::unique_ptr<int32_t[]> start_, output_, value_;
};

// count [1, n, K], threshold [1, n, 1] and Int8Weights -> y [1, n, N]
class SpikeLinear {
public:
    static constexpr Signature signature{
        "SpikeLinear", {FLOAT, FLOAT, UINT8, FLOAT, INT64, INT64, FLOAT}, {FLOAT}};
    void create(Construction& node);
    void run(Run& run) const;

private:
    Int8Weights weights_;
    bool constant_ = false;     // the weights never change: weights_ was built when the kernel was created
};

// count [1, n, K], threshold [1, n, 1], nibbles uint8 [N/S, K, S/2], scales float16 and zeros uint8 [K/g, N] -> y [1, n, N]
class SpikeLinear4 {
public:
    static constexpr Signature signature{"SpikeLinear4", {FLOAT, FLOAT, UINT8, FLOAT16, UINT8}, {FLOAT}};
    void create(Construction& node);
    void run(Run& run) const;

private:
    sbedge_w4 layer_{};
    bool constant_ = false;
};

}  // namespace ort
}  // namespace sbedge
