// Weight packing on the GPU, bit-identical to that on the CPU.

#pragma once

#include "pack.h"

struct CUstream_st;

namespace w4a16::packing {

// Both launch one kernel on the current device; the caller asks CUDA for the error.  They take what pack() and unpack()
// take, in device memory.

// `packed` is aligned to 16 bytes, `source.q` to 4 (plain and bytes: 1).  Indices in `source.rows` that are no row
// count as -1; of a byte of Format::bytes the lower nibble counts.
void pack_device(Layout layout, const Source &source, std::int64_t k, std::int64_t n, std::uint8_t *packed,
    CUstream_st *stream);

// `packed` is aligned to 16 bytes, `plain` to 4.
void unpack_device(Layout layout, const std::uint8_t *packed, std::int64_t k, std::int64_t n, std::uint8_t *plain,
    CUstream_st *stream);

} // namespace w4a16::packing
