// Spike coding and spiking linears as nodes of an ONNX graph. Shapes and meanings: docs/onnx.md.
#pragma once

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

}  // namespace ort
}  // namespace sbedge
