// Rendered from templates/bundle/src/pack_check.h; do not edit.

// What the packing functions check alike, whether they work on the CPU or on the GPU.

#pragma once

#include "packing/pack.h"
#include "w4a16.h"

#include <cstdint>

namespace w4a16 {

// The layout that `arch` reads (null: this library's architecture), if it packs a weight of this shape.
w4a16_status check_packed(const char *arch, std::int64_t k, std::int64_t n, packing::Layout &layout);

// All of `args` but the row indices.
w4a16_status check_pack_args(const w4a16_pack_args *args, packing::Layout &layout, packing::Source &source);

} // namespace w4a16
