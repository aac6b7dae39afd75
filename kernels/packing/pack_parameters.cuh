// What the kernels that pack are given.

#pragma once

#include "tile.cuh"

namespace w4a16::packing {

struct PackParameters {
    const std::uint8_t *q;
    const std::int32_t *rows;
    int source_k;
    int source_n;
    Packed packed;
    uint4 *out;
};

// Launches the kernel for rows that are picked from columns (gptq, compressed_tensors); false: it takes no source as
// high as this one.
bool pack_picked_device(const PackParameters &parameters, Format format, CUstream_st *stream);

} // namespace w4a16::packing
