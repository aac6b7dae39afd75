// What a decode kernel is told besides its tensor maps.  For host and device code.

#pragma once

#include <cuda_fp16.h>

namespace w4a16::decode {

// How a launch relates to the kernel before it and to the one after it (programmatic dependent launch).
enum Dependence {
    independent,   // an ordinary launch
    release_early, // may start beside the kernel before; lets the next one start at once
    release_late,  // likewise, but lets the next one start once this one has asked for all of its weights
};

struct Problem {
    const __half *scales; // [K / group, N]
    const __half *zeros;  // likewise, or null
    const __half *bias;   // [N], or null
    __half *c;            // [M, N]
    int m;
    int n;
    int k;
    int group_shift; // log2 of the group size; 31 per column, which makes every row of K the first group
    int dependence;
};

} // namespace w4a16::decode
