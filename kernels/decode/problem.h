// What a decode kernel is told besides its tensor maps.  For host and device code.

#pragma once

#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

namespace w4a16::decode {

// How a launch relates to the kernel before it and to the one after it (programmatic dependent launch).
enum Dependence {
    independent,   // an ordinary launch
    release_early, // may start beside the kernel before; lets the next one start at once
    release_late,  // likewise, but lets the next one start once this one has asked for all of its weights
};

// Of shared memory, on an SM that runs so many CTAs.
constexpr int shared_bytes_of_a_cta(int ctas_per_sm) { return (ctas_per_sm == 1 ? 227 : 113) * 1024; }

// A divisor of numbers below 2^31, as a multiplication and a shift (Granlund and Montgomery, "Division by Invariant Integers
// using Multiplication", 1994): a division takes some 40 instructions, and CTAs need several before they can start.
struct Divisor {
    int value;
    std::uint32_t factor; // ceil(2^(32 + shift) / value); value 1: not used
    int shift;            // ceil(log2(value)) - 1
};

// How a kernel that streams deals out the tiles of a product, counted along tokens and then along rows: first `streamed` of
// them, whose stages it divides evenly between its CTAs, then each CTA has as many whole ones as any other.
struct Streams {
    Divisor blocks_of_tile; // stages
    Divisor token_tiles;
    int streamed;
    int least;            // stages of a CTA from these; the first `more` CTAs have one more
    int more;
    int whole;            // tiles of a CTA after that
    void *workspace;      // for sums that one CTA hands to another
    std::uint64_t ticket; // which no other launch that may use that memory has
};

struct Problem {
    const __half *bias;   // [N], or null
    __half *c[3];         // outputs side by side: c[i] is [M, ends[i] - ends[i - 1]]
    int ends[3];          // multiples of 8 up to N, ascending; one output: N, N, N
    int m;
    int n;
    int k;
    int group_shift; // log2 of the group size; 31 per column, which makes every row of K the first group
    int dependence;
    Streams streams; // of kernels that stream

    // Where column n of a token's row goes.
    __device__ __forceinline__ __half *place(int token, int n) const {
        const bool second = n >= ends[0];
        const bool third = n >= ends[1];
        const int begin = third ? ends[1] : second ? ends[0] : 0;
        const int end = third ? ends[2] : second ? ends[1] : ends[0];
        __half *const output = third ? c[2] : second ? c[1] : c[0];
        return output + static_cast<std::size_t>(token) * (end - begin) + (n - begin);
    }
};

} // namespace w4a16::decode
