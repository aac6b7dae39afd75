// One product's columns to several outputs.

#pragma once

#include <cstdint>

struct CUstream_st;

namespace w4a16::fusion {

// c[i] [m, n[i]] gets the columns of x [m, n[0] + n[1] + n[2]] that follow those of c[i - 1]; all dense, aligned to 16
// bytes.
struct Split {
    const std::uint16_t *x;
    int m;               // > 0
    int n[3];            // multiples of 8; 0: no such output
    std::uint16_t *c[3]; // apart from x
    // May start before the stream's last kernel has ended; x is read after it has.
    bool overlap;
};

// Launches one kernel on the current device, which has `sm_count` SMs; the caller asks CUDA for the error.
void split_columns(const Split &split, int sm_count, CUstream_st *stream);

} // namespace w4a16::fusion
