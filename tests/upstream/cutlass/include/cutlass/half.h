// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cutlass/cutlass.h"

#include <cuda_fp16.h>

namespace cutlass
{
// A 16-bit float with a name of its own; the conversion from double rounds once, to nearest even.
struct half_t
{
    __half storage;
    half_t() = default;
    CUTLASS_HOST_DEVICE explicit half_t(double x)
        : storage(__double2half(x))
    {
    }
    CUTLASS_HOST_DEVICE operator float() const
    {
        return static_cast<float>(storage);
    }
};
} // namespace cutlass
