// LayerNorm and RMSNorm of the rows of a matrix.

#pragma once

#include <cstdint>

struct CUstream_st;

namespace w4a16::fusion {

constexpr int most_normalized_columns = 32768;

// out[i, j] = half(normalised(x[i])[columns[j]]), or +0 where columns[j] is outside 0..hidden - 1, with
// normalised(r) = (r - mean(r)) / sqrt(variance(r) + eps) * weight + bias, for RMS r / sqrt(mean(r * r) + eps) * weight
// + bias: all in FP32, rounded once.
struct Normalization {
    const std::uint16_t *x; // [m, hidden] half, rows x_stride elements apart
    int m;                  // > 0
    std::int64_t x_stride;  // >= hidden
    int hidden;             // > 0
    const std::uint16_t *weight; // [hidden] half; null: 1
    const std::uint16_t *bias;   // [hidden] half; null: 0
    const std::int32_t *columns; // [k], aligned to 16 bytes; null: columns[j] = j
    int k;                       // >= hidden, a multiple of 8, at most most_normalized_columns
    std::uint16_t *out;          // [m, k], dense, aligned to 16 bytes, apart from x
    float eps;
    bool rms;
    // May start before the stream's last kernel has ended; everything is read after it has.
    bool overlap;
};

// Launches one kernel on the current device, which has `sm_count` SMs; the caller asks CUDA for the error.
void normalize_rows(const Normalization &normalization, int sm_count, CUstream_st *stream);

} // namespace w4a16::fusion
