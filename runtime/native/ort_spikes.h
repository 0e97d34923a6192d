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

// The weight of a spiking linear, K inputs and N outputs, as its kernel takes it. `layer` is all but the pointers to
// tensors, which every run hands over anew.
//
// In 8 bits: codes uint8 [K/128, 128, N] or, in stripes of S outputs, [N/S, K/128, 128, S], each code + 128; scales
// [K/128, N]; at inputs[j], outputs[j] (int64 [m]) a code lacks values[j] (float [m]) / its scale: a whole number, which
// goes into a residual in the order of input channels.
class Int8Weight {
public:
    static constexpr int PARTS = 5;
    static constexpr int types[PARTS] = {UINT8, FLOAT, INT64, INT64, FLOAT};
    static constexpr const char* names[] = {"SpikeLinear", "SpikeLinearPair", "SpikeLinearTriple"};
    using Layer = sbedge_w8;

    void build(Checked& node, const Tensor (&given)[PARTS]);
    Layer bound(Run& run, size_t first) const;      // to the inputs from `first` on
    static int64_t bytes(const Layer& layer) { return layer.in * layer.out; }
    static constexpr auto matmul = sbedge_spike_matmul_w8;

private:
    void build_residual(Checked& node, const Tensor (&given)[PARTS]);
    Layer layer_{};
    std::unique_ptr<int32_t[]> start_, output_, value_;
};

// In 4 bits: nibbles uint8 [N/S, K, S/2], scales float16 and zeros uint8 [K/g, N].
class Int4Weight {
public:
    static constexpr int PARTS = 3;
    static constexpr int types[PARTS] = {UINT8, FLOAT16, UINT8};
    static constexpr const char* names[] = {"SpikeLinear4", "SpikeLinear4Pair", "SpikeLinear4Triple"};
    using Layer = sbedge_w4;

    void build(Checked& node, const Tensor (&given)[PARTS]);
    Layer bound(Run& run, size_t first) const;
    static int64_t bytes(const Layer& layer) { return layer.in * layer.out / 2; }
    static constexpr auto matmul = sbedge_spike_matmul_w4;

private:
    Layer layer_{};
};

// count [1, n, K], threshold [1, n, 1], then M weights -> M times y [1, n, N]: linears of one input, sharing its counts
// and one turn of the threads.
template <class Weight, int M>
class SpikeLinears {
public:
    static constexpr Signature signature = [] {
        Signature made{Weight::names[M - 1], {FLOAT, FLOAT}, {}};
        for (int i = 0; i < M * Weight::PARTS; ++i) made.inputs[2 + i] = Weight::types[i % Weight::PARTS];
        for (int m = 0; m < M; ++m) made.outputs[m] = FLOAT;
        return made;
    }();
    void create(Construction& node);
    void run(Run& run) const;

private:
    static constexpr size_t first(int m) { return 2 + m * Weight::PARTS; }
    void multiply(Run& run, const Weight (&weights)[M]) const;
    Weight weights_[M];
    bool constant_ = true;      // the weights never change: weights_ were built when the kernel was created
};

}  // namespace ort
}  // namespace sbedge
