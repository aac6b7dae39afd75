// What a decode kernel that normalises its activations is told of them.  For host and device code.

#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace w4a16::decode {

// LayerNorm or RMSNorm of the rows of x, as normalize_rows.h states it.
struct Norm {
    const __half *x;       // [M, hidden]; this, weight and bias are aligned to 16 bytes
    std::int64_t x_stride; // halves from row to row, a multiple of 8
    const __half *weight;  // [hidden], or null: 1
    const __half *bias;    // [hidden], or null: 0
    int hidden;            // up to K, a multiple of 8; columns beyond are 0
    float eps;
    bool rms;
    // Set by the launch.
    float inverse;  // 1 / hidden
    int rows_shift; // log2 of the rows that the warps share: M, rounded up
};

} // namespace w4a16::decode
