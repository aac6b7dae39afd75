// Columns of activations in another order, or padded.

#pragma once

#include <cstdint>

struct CUstream_st;

namespace w4a16::activations {

// out[i, j] = x[i, columns[j]], or +0 where columns[j] is outside 0..k_in - 1.  Values are copied as bits.
struct Gather {
    const std::uint16_t *x; // [m, k_in], rows x_stride elements apart
    int m;                  // > 0
    std::int64_t x_stride;  // >= k_in
    int k_in;               // > 0
    const std::int32_t *columns; // [k_out]; null: columns[j] = j
    int k_out;                   // > 0, a multiple of 8
    std::uint16_t *out;          // [m, k_out], dense, aligned to 16 bytes, apart from x
};

// Launches one kernel on the current device, which has `sm_count` SMs; the caller asks CUDA for the error.
void gather_columns(const Gather &gather, int sm_count, CUstream_st *stream);

} // namespace w4a16::activations
