// Weight packing on the CPU: plain INT4 into the layouts that TensorRT-LLM's mixed-input kernels read.

#pragma once

#include <cstdint>

namespace w4a16::packing {

// What a packed weight looks like.  All layouts walk down the columns of the [K, N] matrix, 32 rows to 16 bytes.
enum class Layout {
    // SM90: each column contiguous; the rows of each 32 permuted so that a thread's operand registers hold what WGMMA
    // wants, the nibbles of each 32-bit word ordered for conversion two at a time.
    column_permuted,
    // SM90 before the permuted layout existed (TensorRT-LLM up to 0.15): contiguous columns in natural order, signed.
    column_signed,
    // SM75 to SM89, SM100 and later: as column_permuted, with blocks of 64 rows of 4 columns interleaved.
    interleaved,
};

// Both functions want K to be a multiple of 64, N of 8, and buffers of K * N / 2 bytes that do not overlap.
// `threads` = 0 takes one per core; if not all of them can be started, the others do their work.  std::bad_alloc is all
// that they throw, before anything is written.

// `plain`: row-major [K, N / 2] bytes, unsigned nibbles, the even column in the low one.
void pack(Layout layout, const std::uint8_t *plain, std::int64_t k, std::int64_t n, std::uint8_t *packed, int threads);

void unpack(Layout layout, const std::uint8_t *packed, std::int64_t k, std::int64_t n, std::uint8_t *plain,
    int threads);

} // namespace w4a16::packing
