// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cutlass/cutlass.h"

#include <cuda_bf16.h>

namespace cutlass
{
// A 16-bit float with a name of its own; the conversion from double rounds once, to nearest even.
struct bfloat16_t
{
    __nv_bfloat16 storage;
    bfloat16_t() = default;
    CUTLASS_HOST_DEVICE explicit bfloat16_t(double x)
        : storage(__double2bfloat16(x))
    {
    }
    CUTLASS_HOST_DEVICE operator float() const
    {
        return static_cast<float>(storage);
    }
};
} // namespace cutlass
